import logging

import pytest
import torch
from datasets import ClassLabel, Features, Image, Value
from helpers import broken, png, record, write_parquet

import hf_dash
from hf_dash import DataConfig
from hf_dash.data.schedule import cut_schedule, file_schedule, load_schedules, single_schedule


def level(image):
    """A transform that gives the gray level, which tells the image."""
    return torch.tensor([float(image.getpixel((0, 0)))])


def read(examples):
    return [
        (examples[i]["pixel_values"].item(), examples[i]["labels"]) for i in range(len(examples))
    ]


@pytest.fixture
def incoming(tmp_path):
    """Two shards that name the same animals in another order, and one with a third animal."""
    folder = tmp_path / "incoming"
    folder.mkdir()
    write_parquet(folder / "1.parquet", [png(10), png(11)], [0, 1])
    write_parquet(folder / "2.parquet", [png(20), png(21)], [0, 1], names=("dog", "cat"))
    write_parquet(folder / "3.parquet", [png(30), png(31)], [2, 0], names=("cat", "dog", "eel"))
    held_out = tmp_path / "held_out.parquet"
    write_parquet(held_out, [png(1), png(2), png(3)], [0, 1, 2], names=("yak", "eel", "cat"))
    return folder


def config(incoming, **options):
    return DataConfig(
        dataset_name=str(incoming),
        test_dataset_name=str(incoming.parent / "held_out.parquet"),
        arrive_by="files",
        **options,
    )


def test_new_files_make_one_round_labeled_by_name(incoming):
    schedule = file_schedule(config(incoming), [])
    (only,) = schedule.rounds(level)
    assert only.files == ("1.parquet", "2.parquet", "3.parquet")
    assert only.label_names == schedule.label_names() == ("cat", "dog", "eel")
    assert read(only.examples) == [(10, 0), (11, 1), (20, 1), (21, 0), (30, 2), (31, 0)]


def test_files_can_be_rounds_of_their_own_and_labels_come_as_they_arrive(incoming):
    schedule = file_schedule(config(incoming, files_per_round=1), [])
    rounds = schedule.rounds(level)
    assert [r.files for r in rounds] == [("1.parquet",), ("2.parquet",), ("3.parquet",)]
    assert [r.label_names for r in rounds] == [("cat", "dog")] * 2 + [("cat", "dog", "eel")]
    assert [r.num_new for r in rounds] == [2, 2, 2]
    assert read(rounds[2].examples) == [(10, 0), (11, 1), (20, 1), (21, 0), (30, 2), (31, 0)]
    # Nobody has ever named the yak.
    assert sorted(read(schedule.held_out_examples(level))) == [(1, -1), (2, 2), (3, 0)]


def test_files_since_the_last_round_form_the_next(incoming):
    past = [
        record(files=["1.parquet", "3.parquet"]),
        record("cold", files=["1.parquet", "3.parquet"]),
    ]
    rounds = file_schedule(config(incoming), past).rounds(level)
    assert [r.files for r in rounds] == [("1.parquet", "3.parquet"), ("2.parquet",)]


def test_streams_give_the_same_rounds(incoming):
    plain = file_schedule(config(incoming, files_per_round=2), []).rounds(level)
    streamed = file_schedule(config(incoming, files_per_round=2, streaming=True), []).rounds(level)
    assert [r.fingerprint for r in plain] == [r.fingerprint for r in streamed]
    assert [r.label_names for r in plain] == [r.label_names for r in streamed]
    for ours, theirs in zip(plain, streamed, strict=True):
        assert (ours.num_new, ours.num_total) == (theirs.num_new, theirs.num_total)
        batches = hf_dash.data.train_batches(theirs, 4, seed=0)
        pixels = [value for batch in batches for value in batch["pixel_values"].flatten().tolist()]
        labels = [label for batch in batches for label in batch["labels"].tolist()]
        assert sorted(pixels) == sorted(value for value, _ in read(ours.examples))
        assert sorted(labels) == sorted(label for _, label in read(ours.examples))


def test_nothing_new_makes_no_round_and_says_so(incoming, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    past = [record(files=["1.parquet"]), record(round_index=2, files=["2.parquet", "3.parquet"])]
    rounds = file_schedule(config(incoming), past).rounds(level)
    assert len(rounds) == 2
    assert "nothing new in" in caplog.text
    assert "since round 2: no new round" in caplog.text


def test_an_arrival_without_examples_makes_no_round_and_says_so(incoming, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    write_parquet(incoming / "0.parquet", [], [])
    rounds = file_schedule(config(incoming, files_per_round=1), []).rounds(level)
    assert [r.files for r in rounds] == [("1.parquet",), ("2.parquet",), ("3.parquet",)]
    assert "skipping an arrival without examples: ['0.parquet']" in caplog.text


def test_a_file_that_disappeared_is_named(incoming):
    past = [record(files=["1.parquet"])]
    (incoming / "1.parquet").unlink()
    with pytest.raises(ValueError, match=r"disappeared from .*: \['1.parquet'\]"):
        file_schedule(config(incoming), past)


def test_another_kind_of_labels_in_a_later_round_is_named(incoming):
    features = {"image": Image(), "label": Value("string")}
    write_parquet(incoming / "4.parquet", [png(1)], ["cat"], label=Features(features)["label"])
    with pytest.raises(ValueError, match=r"4.parquet: column 'label' holds strings, but class"):
        file_schedule(config(incoming, files_per_round=1), [])


def test_corrupt_images_are_left_out_and_listed_once_found(incoming):
    write_parquet(incoming / "4.parquet", [png(40), broken(41), png(42)], [0, 0, 0])
    with pytest.raises(ValueError, match=r"4.parquet:1 is a corrupt image"):
        file_schedule(config(incoming, files_per_round=1), [])
    data = config(incoming, files_per_round=1, on_bad_example="skip")
    last = file_schedule(data, []).rounds(level)[-1]
    assert (last.skipped, last.num_new) == (("4.parquet:1",), 2)
    past = [record(round_index=i, files=[f"{i}.parquet"]) for i in (1, 2, 3)]
    past.append(record(round_index=4, files=["4.parquet"], skipped=["4.parquet:1"]))
    again = file_schedule(data, past).rounds(level)[-1]
    assert again.fingerprint == last.fingerprint


def test_one_dataset_is_cut_alike_for_every_start_of_a_seed(digits, digits_test):
    options = {"num_rounds": 3, "examples_per_round": 20}
    first, again = (cut_schedule(digits, digits_test, seed=1, **options) for _ in range(2))
    other = cut_schedule(digits, digits_test, seed=2, **options)
    transform = lambda image: torch.zeros(1)  # noqa: E731
    rounds = first.rounds(transform)
    assert [(r.num_new, r.num_total) for r in rounds] == [(20, 20), (20, 40), (20, 60)]
    assert [r.fingerprint for r in rounds] == [r.fingerprint for r in again.rounds(transform)]
    assert rounds[0].fingerprint != other.rounds(transform)[0].fingerprint
    assert len(first.held_out_examples(transform)) == 360


def test_wrong_labels_differ_between_arrivals_and_not_between_calls(digits, digits_test):
    schedule = cut_schedule(digits, digits_test, num_rounds=2, seed=0)
    transform = lambda image: torch.zeros(1)  # noqa: E731
    one, two = (schedule.rounds(transform, label_noise=0.1, noise_seed=3)[-1] for _ in range(2))
    flips = [arrival.flipped for arrival in one.arrivals]
    assert flips == [arrival.flipped for arrival in two.arrivals]
    assert [len(part) for part in flips] == [72, 72]
    assert flips[0] != flips[1]


def test_wrong_labels_of_streams_are_refused(incoming):
    with pytest.raises(ValueError, match=r"label_noise must be 0 for streams, got 0\.1"):
        file_schedule(config(incoming, streaming=True), []).rounds(level, label_noise=0.1)


def test_each_seed_has_a_schedule(incoming, digits):
    cut = load_schedules(DataConfig("digits"), [0, 1], 3, 10, [])
    names = tuple(hf_dash.data.label_names(digits))
    assert [s.label_names() for s in cut] == [names, names]
    by_file = load_schedules(config(incoming), [0, 1], 5, None, [])
    assert [len(s.arrivals) for s in by_file] == [1, 1]


def renamed(digits, names, rows):
    """Some digits whose labels are stored in another order, the same names."""
    part = digits.select(rows)
    feature = ClassLabel(names=names)
    labels = [feature.str2int(digits.features["label"].int2str(v)) for v in part["label"]]
    return part.remove_columns("label").add_column("label", labels).cast_column("label", feature)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_are_matched_by_name(digits, small_model, streaming):
    names = [str(digit) for digit in reversed(range(10))]
    parts = [digits.select(range(20)), renamed(digits, names, range(20, 50))]
    wanted = sorted(digits.select(range(50))["label"])
    if streaming:
        parts = [part.to_iterable_dataset() for part in parts]
    schedule = single_schedule(parts, [digits.select(range(5))], seed=0)
    assert schedule.label_names() == tuple(str(digit) for digit in range(10))
    round_ = schedule.rounds(hf_dash.models.image_transform(small_model))[-1]
    assert (round_.index, round_.num_new, round_.num_total) == (2, 30, 50)
    batches = hf_dash.data.gradient_batches(round_, hf_dash.DashConfig())
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == wanted


def test_held_out_parts_are_joined(digits, small_model):
    names = [str(digit) for digit in reversed(range(10))]
    parts = (digits.select(range(5)), renamed(digits, names, range(5, 9)))
    schedule = single_schedule([digits.select(range(9))], parts, seed=0)
    held_out = schedule.held_out_examples(
        hf_dash.models.image_transform(small_model), allow_unknown=False
    )
    labels = sorted(held_out[index]["labels"] for index in range(len(held_out)))
    assert labels == sorted(digits.select(range(9))["label"])


def test_a_class_nobody_trained_is_refused(digits, small_model):
    names = [*(str(digit) for digit in range(10)), "ten"]
    odd = renamed(digits, names, range(3))
    with pytest.raises(ValueError, match=r"labels \['ten'\] of the held-out images"):
        single_schedule([digits], [odd], seed=0).held_out_examples(
            lambda image: image, allow_unknown=False
        )


def test_a_stream_sorted_by_class_arrives_mixed(digits, small_model):
    by_class = sorted(range(len(digits)), key=digits["label"][:].__getitem__)
    stream = digits.select(by_class).to_iterable_dataset(num_shards=4)
    schedule = single_schedule([stream], [digits.select(range(5))], seed=0)
    (round_,) = schedule.rounds(hf_dash.models.image_transform(small_model))
    rows = [label for _, label in round_.streams[0].rows()]
    assert sorted(rows) == sorted(digits["label"])
    assert len(set(rows[:40])) == 10
    # What is skipped to is what would have followed.
    assert [label for _, label in round_.streams[0].rows(1000)] == rows[1000:]
