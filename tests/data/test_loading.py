import logging
from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel, Features, Image, Value
from helpers import broken, heard, png, record, write_parquet
from image_files import class_folders, photo
from PIL import Image as PILImage

import hf_dash
from hf_dash import DataConfig
from hf_dash.data import Arrival
from hf_dash.data.loading import (
    cut_schedule,
    file_schedule,
    load_held_out,
    load_schedules,
    round_schedule,
    single_schedule,
)


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


def arrivals(*parts):
    return [Arrival((), part, None) for part in parts]


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
    schedule = single_schedule(arrivals(*parts), arrivals(digits.select(range(5))), seed=0)
    assert schedule.label_names() == tuple(str(digit) for digit in range(10))
    round_ = schedule.rounds(hf_dash.models.image_transform(small_model))[-1]
    assert (round_.index, round_.num_new, round_.num_total) == (2, 30, 50)
    batches = hf_dash.data.gradient_batches(round_, hf_dash.DashConfig())
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == wanted


def test_held_out_parts_are_joined(digits, small_model):
    names = [str(digit) for digit in reversed(range(10))]
    parts = (digits.select(range(5)), renamed(digits, names, range(5, 9)))
    schedule = single_schedule(arrivals(digits.select(range(9))), arrivals(*parts), seed=0)
    held_out = schedule.held_out_examples(
        hf_dash.models.image_transform(small_model), allow_unknown=False
    )
    labels = sorted(held_out[index]["labels"] for index in range(len(held_out)))
    assert labels == sorted(digits.select(range(9))["label"])


def test_a_class_nobody_trained_is_refused(digits, small_model):
    names = [*(str(digit) for digit in range(10)), "ten"]
    odd = renamed(digits, names, range(3))
    with pytest.raises(ValueError, match=r"labels \['ten'\] of the held-out images"):
        single_schedule(arrivals(digits), arrivals(odd), seed=0).held_out_examples(
            lambda image: image, allow_unknown=False
        )


def test_a_stream_sorted_by_class_arrives_mixed(digits, small_model):
    by_class = sorted(range(len(digits)), key=digits["label"][:].__getitem__)
    stream = digits.select(by_class).to_iterable_dataset(num_shards=4)
    schedule = single_schedule(arrivals(stream), arrivals(digits.select(range(5))), seed=0)
    (round_,) = schedule.rounds(hf_dash.models.image_transform(small_model))
    rows = [label for _, label in round_.streams[0].rows()]
    assert sorted(rows) == sorted(digits["label"])
    assert len(set(rows[:40])) == 10
    # What is skipped to is what would have followed.
    (block,) = round_.streams[0].blocks
    assert [label for _, label in block.rows(range(1000, len(block)))] == rows[1000:]


def files_of(schedule):
    """Return what every arrival holds, by the names of its images."""
    return [
        {a.names.name(example_id) for example_id in a.survey.example_ids.tolist()}
        for a in schedule.arrivals
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_one_dataset_leaves_corrupt_images_out_where_asked(tmp_path, streaming):
    images = [png(n) for n in range(9)]
    images[4] = broken(4)
    write_parquet(tmp_path / "train.parquet", images, [n % 2 for n in range(9)])
    write_parquet(tmp_path / "test.parquet", [png(50), png(51)], [0, 1])
    data = DataConfig(str(tmp_path), streaming=streaming)
    with pytest.raises(ValueError, match=r"train\.parquet:4 is a corrupt image"):
        load_schedules(data, [0], 2, None, [])
    data = replace(data, on_bad_example="skip")
    one, two = load_schedules(data, [0, 1], 2, None, [])
    folder = tmp_path.name
    expected = {f"{folder}/train.parquet:{n}" for n in range(9) if n != 4}
    for schedule in (one, two):
        assert set.union(*files_of(schedule)) == expected
        assert [a.num_examples for a in schedule.arrivals] == [4, 4]
        assert schedule.arrivals[0].skipped == (f"{folder}/train.parquet:4",)
    assert files_of(one) != files_of(two)


def test_only_images_that_arrive_are_read(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [png(n) for n in range(200)], [0, 1] * 100)
    write_parquet(tmp_path / "test.parquet", [png(201), png(202)], [0, 1])
    opened = []
    original = PILImage.open
    monkeypatch.setattr(PILImage, "open", lambda *a, **k: opened.append(1) or original(*a, **k))
    load_schedules(DataConfig(str(tmp_path)), [0], 2, 5, [])
    assert len(opened) == 12  # ten to train on, two held out


def test_a_share_of_one_dataset_is_held_out_by_content(tmp_path):
    class_folders(tmp_path / "in", count=60)
    data = DataConfig(str(tmp_path / "in"), train_val_split=0.25)
    (schedule,) = load_schedules(data, [0], 3, None, [])
    assert schedule.held_out_split == "25% of train"
    held_out = {schedule.held_out[0].names.name(i) for i in schedule.held_out_images["example_id"]}
    train = set.union(*files_of(schedule))
    assert len(train) + len(held_out) == 120
    assert not train & held_out
    # promote holds out the same images.
    alone = load_held_out(data)
    assert {alone.names.name(i) for i in alone.dataset["example_id"]} == held_out
    with pytest.raises(ValueError, match="streaming needs held-out images"):
        load_schedules(replace(data, streaming=True), [0], 3, None, [])
    with pytest.raises(ValueError, match=r"train_val_split 1e-09 holds out none of \[120\] images"):
        load_schedules(replace(data, train_val_split=1e-9), [0], 3, None, [])


OVERLAPS = {
    "examples": ({}, lambda data: load_schedules(data, [0], 2, None, [])),
    "files": ({"arrive_by": "files"}, lambda data: [file_schedule(data, [])]),
    "round": ({}, lambda data: [round_schedule(data)]),
}


@pytest.mark.parametrize("how", OVERLAPS)
def test_held_out_images_are_never_trained_on(tmp_path, how):
    settings, load = OVERLAPS[how]
    folder = class_folders(tmp_path / "in" / "monday", count=4)
    held_out = class_folders(tmp_path / "held", count=2, first=50)
    (held_out / "cat" / "copy.png").write_bytes((folder / "cat" / "a_001.png").read_bytes())
    name = tmp_path / "in" if how == "files" else folder
    data = DataConfig(str(name), validation_dir=str(held_out), **settings)
    with pytest.raises(ValueError, match=r"1 of 5 held-out images .*held/cat/copy\.png = ") as e:
        load(data)
    assert "monday/cat/a_001.png" in str(e.value)
    (schedule,) = load(replace(data, allow_overlap=True))
    assert schedule.overlap == 1
    assert schedule.rounds(lambda image: torch.zeros(1))[0].overlap == 1


def test_a_copy_of_a_shard_makes_no_round(incoming, caplog):
    (incoming / "4.parquet").write_bytes((incoming / "1.parquet").read_bytes())
    with heard() as lines:
        schedule = file_schedule(config(incoming, files_per_round=1), [])
    assert [a.files for a in schedule.arrivals] == [("1.parquet",), ("2.parquet",), ("3.parquet",)]
    assert "4.parquet has the same images as 1.parquet: counted once" in lines
    # What is on record stays.
    past = [record(files=["1.parquet"]), record(round_index=2, files=["4.parquet"])]
    schedule = file_schedule(config(incoming), past)
    assert [a.files for a in schedule.arrivals][:2] == [("1.parquet",), ("4.parquet",)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("per_round", [None, 3])
def test_a_copy_of_a_file_counts_once_in_one_dataset(tmp_path, streaming, per_round):
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", [png(n) for n in range(6)], [0, 1] * 3)
    (tmp_path / "in" / "b.parquet").write_bytes((tmp_path / "in" / "a.parquet").read_bytes())
    (tmp_path / "in" / "c.parquet").symlink_to(tmp_path / "in" / "a.parquet")
    write_parquet(tmp_path / "held.parquet", [png(20), png(21)], [0, 1])
    held_out = str(tmp_path / "held.parquet")
    data = DataConfig(str(tmp_path / "in"), test_dataset_name=held_out, streaming=streaming)
    with heard() as lines:
        (schedule,) = load_schedules(data, [0], 2, per_round, [])
    assert set.union(*files_of(schedule)) == {f"in/a.parquet:{n}" for n in range(6)}
    copies = [f"in/{name}.parquet is the same as in/a.parquet: counted once" for name in "bc"]
    assert [line for line in lines if "counted once" in line] == copies


def test_a_copy_of_a_folder_counts_once_in_one_dataset(tmp_path):
    for day in ("monday", "tuesday"):
        class_folders(tmp_path / day, count=3)
    class_folders(tmp_path / "held", count=1, first=50)
    data = DataConfig(str(tmp_path / "*day"), validation_dir=str(tmp_path / "held"))
    with heard() as lines:
        (schedule,) = load_schedules(data, [0], 2, None, [])
    assert sum(arrival.num_examples for arrival in schedule.arrivals) == 6
    assert lines == ["tuesday has the same images as monday: counted once"]


def test_an_arrival_given_as_seen_and_new_counts_once(tmp_path):
    for day, first in (("monday", 0), ("tuesday", 20)):
        class_folders(tmp_path / day, count=3, first=first)
    class_folders(tmp_path / "held", count=1, first=50)
    names = [str(tmp_path / day) for day in ("monday", "tuesday", "monday")]
    data = DataConfig(names[2], validation_dir=str(tmp_path / "held"))
    with heard() as lines:
        schedule = round_schedule(data, names[:2])
    assert [a.num_examples for a in schedule.arrivals] == [6, 6]
    assert files_of(schedule)[1] == {f"monday/{name}" for name in files_below(tmp_path / "monday")}
    assert lines == ["monday has the same images as monday: counted once"]


def files_below(folder):
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*.png")]


def test_a_new_arrival_shares_a_class_with_those_before(incoming):
    write_parquet(incoming / "4.parquet", [png(40)], [0], names=("owl",))
    data = config(incoming, files_per_round=1)
    with pytest.raises(ValueError, match=r"the arrival \['4\.parquet'\] must share a class"):
        file_schedule(data, [])
    schedule = file_schedule(replace(data, allow_disjoint_classes=True), [])
    assert schedule.label_names() == ("cat", "dog", "eel", "owl")


def test_classes_that_look_alike_are_refused(incoming):
    write_parquet(incoming / "4.parquet", [png(40), png(41)], [0, 1], names=("cat", "Dog"))
    with pytest.raises(ValueError, match=r"got 'dog' and 'Dog'"):
        file_schedule(config(incoming), [])


def test_what_is_left_out_of_folders_is_recorded(tmp_path):
    class_folders(tmp_path / "in" / "monday", count=2)
    (tmp_path / "in" / "monday" / "cat" / "x.jxl").write_bytes(b"")
    class_folders(tmp_path / "held", count=1, first=50)
    data = DataConfig(
        str(tmp_path / "in"),
        arrive_by="files",
        validation_dir=str(tmp_path / "held"),
        allow_missing=True,
    )
    (round_,) = file_schedule(data, []).rounds(lambda image: torch.zeros(1))
    assert round_.skipped == ("monday/cat/x.jxl (needs the plug-in pillow-jxl-plugin)",)
    again = file_schedule(data, [record(files=["monday"], skipped=list(round_.skipped))])
    assert again.rounds(lambda image: torch.zeros(1))[0].skipped == round_.skipped


def test_an_image_of_another_mode_is_named_before_training(tmp_path, small_model):
    folder = class_folders(tmp_path / "in", count=2)
    photo(0, 9).convert("L").save(folder / "cat" / "gray.png")
    class_folders(tmp_path / "held", count=1, first=50)
    data = DataConfig(str(folder), validation_dir=str(tmp_path / "held"))
    (schedule,) = load_schedules(data, [0], 1, None, [])
    transform = hf_dash.models.image_transform(small_model)
    with pytest.raises(ValueError, match=r"in/cat/gray\.png: image mode is 'L', but the model"):
        schedule.rounds(transform)
    photo(0, 99).convert("L").save(tmp_path / "held" / "cat" / "gray.png")
    (schedule,) = load_schedules(replace(data, image_mode="RGB"), [0], 1, None, [])
    assert schedule.rounds(transform)[0].num_new == 5


def test_a_limit_of_samples_holds_for_all(tmp_path):
    class_folders(tmp_path / "in", count=8)
    class_folders(tmp_path / "held", count=8, first=50)
    data = DataConfig(
        str(tmp_path / "in"),
        validation_dir=str(tmp_path / "held"),
        max_train_samples=6,
        max_eval_samples=5,
    )
    (cut,) = load_schedules(data, [0], 2, None, [])
    one = round_schedule(data)
    assert [[a.num_examples for a in s.arrivals] for s in (cut, one)] == [[3, 3], [6]]
    assert [len(s.held_out_images) for s in (cut, one)] == [5, 5]
    assert load_held_out(data).num_examples == 5
