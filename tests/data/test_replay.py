import dataclasses
import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers import heard, numbered, png, same_state, state_of
from transformers import HfArgumentParser, TrainingArguments

import hf_dash
from hf_dash import DashConfig, Round
from hf_dash.data import ImageExamples, Replay, StreamedImages, gradient_batches, train_batches
from hf_dash.data.batches import NewShareSampler
from hf_dash.data.pieces import RowGroup
from hf_dash.data.replay import quotas, whole


def as_tensor(number):
    return torch.full((3, 8, 8), float(number))


def arrival(first, labels, transform=as_tensor, **options):
    """Images that are numbers from ``first`` on."""
    features = Features({"image": Value("int64"), "label": ClassLabel(names=["a", "b", "c"])})
    rows = {"image": list(range(first, first + len(labels))), "label": labels}
    dataset = Dataset.from_dict(rows, features=features)
    return ImageExamples(dataset, transform, fingerprint=f"{first} {labels}", **options)


def rounds_of(*sizes, **options):
    """Rounds of so many new images each, of classes a and b in turn."""
    ends = np.cumsum([0, *sizes]).tolist()
    parts = [
        arrival(first, [n % 2 for n in range(size)], **options)
        for first, size in zip(ends, sizes, strict=False)
    ]
    return [Round(n, tuple(parts[:n]), ("a", "b")) for n in range(1, len(parts) + 1)]


def numbers(examples):
    return [int(example["pixel_values"][0, 0, 0]) for example in examples]


def old_numbers(round_):
    return numbers(round_.seen)


def test_a_round_is_what_is_new_and_so_many_of_the_old():
    rounds = rounds_of(10, 20, 30, 40)
    drawn = Replay(samples=15).rounds(rounds, seed=3)
    assert [r.num_total for r in drawn] == [10, 30, 45, 55]
    assert [r.num_new for r in drawn] == [10, 20, 30, 40]
    assert numbers(drawn[3].new) == list(range(60, 100))
    old = old_numbers(drawn[3])
    assert len(set(old)) == 15
    assert set(old) <= set(range(60))
    assert old == sorted(old)
    assert drawn[0].replay is None
    sha256 = drawn[3].replay.pop("sha256")
    assert len(sha256) == 64
    assert drawn[3].replay == {
        "samples": 15,
        "strategy": "uniform",
        "seed": 3,
        "num_drawn": 15,
        "num_old": 60,
        "num_arrivals": 3,
    }


@pytest.mark.parametrize("strategy", ["uniform", "class_balanced", "recency"])
def test_a_sample_follows_from_seed_and_round_alone(strategy):
    def sample(seed, sizes):
        drawn = Replay(samples=12, strategy=strategy).rounds(rounds_of(*sizes), seed)
        return old_numbers(drawn[-1]), drawn[-1].replay["sha256"], drawn[-1].fingerprint

    assert sample(0, (40, 40, 5)) == sample(0, (40, 40, 5))
    for other in (sample(1, (40, 40, 5)), sample(0, (40, 40, 5, 5))):
        assert all(a != b for a, b in zip(sample(0, (40, 40, 5)), other, strict=True))
    assert len(sample(0, (40, 40, 5))[0]) == 12


def test_all_images_have_the_same_chance():
    rounds, times = rounds_of(7, 23, 10, 1)[-1:], np.zeros(40)
    for seed in range(400):
        (drawn,) = Replay(samples=8).rounds(rounds, seed)
        times[old_numbers(drawn)] += 1
    # Binomial: 400 draws of chance 8/40, a mean of 80 and a deviation of 8.
    assert times.sum() == 400 * 8
    assert np.abs(times - 80).max() < 4 * 8


def test_classes_are_balanced_and_a_rare_one_is_taken_whole():
    parts = [arrival(0, [0] * 50 + [1] * 3), arrival(53, [0] * 30 + [2] * 40), arrival(123, [0])]
    with heard(logging.WARNING) as lines:
        (drawn,) = Replay(samples=23, strategy="class_balanced").rounds(
            [Round(3, tuple(parts), ("a", "b", "c", "d"))], 0
        )
    labels = [example["labels"] for example in drawn.seen]
    assert [labels.count(label) for label in range(3)] == [10, 3, 10]
    assert any("round 3 has no old image of the classes d" in line for line in lines)


def test_recent_arrivals_weigh_more():
    # 100 images each, of ages 3, 2 and 1: weights 1/3, 1/2 and 1, so 20, 30 and 60 of 110.
    (drawn,) = Replay(samples=110, strategy="recency").rounds(rounds_of(100, 100, 100, 5)[-1:], 0)
    assert [len(part) for part in drawn.arrivals] == [20, 30, 60, 5]


def test_shares_worked_out_by_hand():
    # 5 of 16 would be 10 of 32; the second has only 4, so the others share 28 by 2 to 1.
    given = quotas(np.array([90, 4, 50, 0]), np.array([2.0, 1.0, 1.0, 1.0]), 32)
    assert given.tolist() == pytest.approx([56 / 3, 4, 28 / 3, 0])
    for seed in range(50):
        rounded = whole(given, np.random.default_rng(seed))
        assert rounded.sum() == 32
        assert (np.abs(rounded - given) < 1).all()


def test_of_a_ratio_the_decimal_point_tells():
    rounds = rounds_of(100, 10)
    sizes = [(1, 11), (1.0, 20), (0.5, 15), (0.01, 11), (2.5, 35)]
    for samples, size in sizes:
        assert Replay(samples=samples).rounds(rounds, 0)[1].num_total == size
    parser = HfArgumentParser(hf_dash.DataConfig)
    for text, samples in {"1": 1, "1.0": 1.0, "250": 250, "0.5": 0.5}.items():
        (data,) = parser.parse_args_into_dataclasses(["--replay_samples", text])
        assert data.replay_samples == samples
        assert type(data.replay_samples) is type(samples)
        assert data.replay == Replay(samples)


def test_no_replay_leaves_rounds_as_they_are():
    rounds = rounds_of(10, 10)
    for same, round_ in zip(Replay().rounds(rounds, 0), rounds, strict=True):
        assert same is round_


def test_more_than_there_are_takes_all_and_says_so_once():
    rounds = rounds_of(10, 10, 10)
    with heard(logging.WARNING) as lines:
        drawn = Replay(samples=15).rounds(rounds, 0)
    assert [r.num_total for r in drawn] == [10, 20, 25]
    assert drawn[1].arrivals == rounds[1].arrivals
    assert drawn[1].fingerprint == rounds[1].fingerprint
    assert [line for line in lines if "replay_samples 15" in line] == lines
    assert len(lines) == 1


def test_what_is_drawn_is_said_once():
    with heard() as lines:
        Replay(samples=5).rounds(rounds_of(10, 10, 10), seed=7)
    (line,) = lines
    assert "uniform, seed 7): 5 of 10 in round 2, 5 of 20 in round 3" in line
    assert "a cold start too" in line


def test_an_arrival_of_which_nothing_is_drawn_is_not_opened():
    opened = []

    def reading(number):
        opened.append(number)
        return as_tensor(number)

    options = {"transform": reading, "in_memory": True}
    parts = [arrival(10 * n, [0] * 10, cache_key=f"replay-test-{n}", **options) for n in range(30)]
    (drawn,) = Replay(samples=2).rounds([Round(30, tuple(parts), ("a",))], seed=0)
    assert opened == []
    for _ in range(2):
        list(train_batches(drawn, 4, seed=0))
    assert len(drawn.arrivals) == 3
    assert sorted(set(opened)) == sorted(numbers(drawn.examples))
    assert len(opened) == 12  # each once: what is decoded is kept
    del drawn, parts


def test_wrong_labels_stay_wrong():
    noisy = arrival(0, [0, 1] * 30, label_noise=0.5, noise_seed=0)
    new = arrival(60, [0])
    (drawn,) = Replay(samples=20).rounds([Round(2, (noisy, new), ("a", "b", "c"))], 0)
    rows = old_numbers(drawn)
    assert drawn.arrivals[0].labels == [noisy.labels[row] for row in rows]
    wrong = drawn.flipped_seen
    assert numbers(wrong) == [row for row in rows if row in noisy.flipped]


def test_the_gradient_pass_reads_what_is_new_and_what_was_drawn_oldest_first():
    drawn = Replay(samples=5).rounds(rounds_of(10, 10, 4), 0)[2]
    batches = gradient_batches(drawn, DashConfig(gradient_batch_size=4))
    read = [batch["pixel_values"][:, 0, 0, 0].int().tolist() for batch in batches]
    assert read[-1] == [20, 21, 22, 23]
    assert [len(batch) for batch in read] == [1, 4, 4]
    assert [*read[0], *read[1]] == old_numbers(drawn)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.75])
def test_every_batch_has_the_share_of_new_images(share):
    drawn = Replay(samples=2.0, new_share=share).rounds(rounds_of(100, 50), 0)[1]
    loader = train_batches(drawn, 16, seed=0)
    epochs = [[batch["pixel_values"][:, 0, 0, 0].int() for batch in loader] for _ in range(2)]
    for batches in epochs:
        assert sum(map(len, batches)) == 150
        assert all(abs(int((b >= 100).sum()) - share * len(b)) < 1 for b in batches)
    assert [b.tolist() for b in epochs[0]] != [b.tolist() for b in epochs[1]]
    # Of the kind that is too few for its places each image comes as often as any other, or one
    # more time.
    times = np.bincount(torch.cat(epochs[0]).numpy(), minlength=150)
    for part in (times[:100], times[100:]):
        assert part.max() - part.min() <= 1


def test_an_order_repeats_by_seed_and_epoch():
    def order(epoch, seed=0):
        sampler = NewShareSampler(20, 10, 0.5, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1) == order(1) != order(2)
    assert order(1, seed=1) != order(1)
    sampler = NewShareSampler(20, 10, 0.5, 0)
    assert [list(sampler), list(sampler)] == [order(0), order(1)]


def test_images_on_the_device_and_a_trainer_have_the_share_too(tmp_path):
    drawn = Replay(samples=1.0, new_share=0.25).rounds(rounds_of(16, 16), 0)[1]
    of_device = hf_dash.training.resident_batches(drawn, 8, seed=3)
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, report_to="none", use_cpu=True, seed=3
    )
    model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
    trainer = hf_dash.trainer.RoundTrainer(model, args, drawn)
    loaders = [train_batches(drawn, 8, seed=3), of_device, trainer.get_train_dataloader()]
    plain, *others = [
        [batch["pixel_values"][:, 0, 0, 0].int().tolist() for batch in loader] for loader in loaders
    ]
    assert [sum(number >= 16 for number in batch) for batch in plain] == [2, 2, 2, 2]
    assert others == [plain, plain]


def test_a_round_costs_what_its_day_costs(accelerator):
    decoded = []

    def counting(number):
        decoded.append(number)
        return as_tensor(number)

    rounds = Replay(samples=1.0).rounds(rounds_of(*[12] * 5, transform=counting), seed=0)
    model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
    history = hf_dash.History(None, {})
    training = hf_dash.TrainingConfig(
        max_epochs=2, accuracy_threshold=None, train_batch_size=12, disable_tqdm=True
    )
    run = hf_dash.runs.Run("dash", 0, history, accelerator, training=training)
    costs = []
    for number in range(1, 6):
        before = len(decoded)
        history.records.clear()
        hf_dash.run_rounds(
            model, [rounds[number - 1]], arrival(0, [0]), hf_dash.STARTS["dash"], run
        )
        costs.append((len(decoded) - before, history.records[0].images_read))
    # 24 images of which 12 are new: once in the gradient pass, twice in training.
    assert costs[1:] == [(72, 72)] * 4
    assert history.records[0].replay["num_old"] == 48


def test_taking_all_trains_to_the_same_bits(accelerator):
    def final(replay):
        rounds = replay.rounds(rounds_of(12, 12), seed=0)
        model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        training = hf_dash.TrainingConfig(max_epochs=1, train_batch_size=12, disable_tqdm=True)
        history = hf_dash.History(None, {})
        run = hf_dash.runs.Run("dash", 0, history, accelerator, training=training)
        hf_dash.run_rounds(model, rounds, arrival(0, [0]), hf_dash.STARTS["dash"], run)
        return state_of(model), history.records[1].data_fingerprint

    all_images, drawn, fewer = (final(Replay(samples)) for samples in (None, 12, 11))
    assert same_state(all_images[0], drawn[0])
    assert all_images[1] == drawn[1]
    assert not same_state(all_images[0], fewer[0])
    assert all_images[1] != fewer[1]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"replay_samples": 0}, "replay_samples must be at least 1, got 0"),
        ({"replay_samples": "-3"}, "replay_samples must be at least 1, got -3"),
        ({"replay_samples": 0.0}, r"replay_samples must be in \(0, inf\), got 0.0"),
        ({"replay_samples": "-0.5"}, r"replay_samples must be in \(0, inf\), got -0.5"),
        ({"replay_samples": float("nan")}, r"replay_samples must be in \(0, inf\), got nan"),
        ({"replay_samples": float("inf")}, r"replay_samples must be in \(0, inf\), got inf"),
        ({"replay_samples": "many"}, "replay_samples must be a number of images.* got 'many'"),
        ({"replay_samples": 5, "replay_strategy": "herding"}, "replay_strategy.*'herding'"),
        ({"replay_strategy": "recency"}, "replay_samples must be given.*'recency'"),
        ({"new_share": 0.0}, r"new_share must be in \(0, 1\), got 0.0"),
        ({"new_share": 1}, r"new_share must be in \(0, 1\), got 1"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        hf_dash.DataConfig("digits", **settings)


def test_a_flag_is_not_a_number():
    with pytest.raises(TypeError, match=r"replay_samples must be an integer.*got True"):
        Replay(samples=True)


def test_settings_go_on_record_as_numbers():
    data = hf_dash.DataConfig("digits", replay_samples="0.5", replay_strategy="recency")
    settings = hf_dash.runs.recorded_settings(data)
    assert settings["replay_samples"] == 0.5
    assert settings["replay_strategy"] == "recency"
    assert dataclasses.replace(data, replay_samples=500).replay == Replay(500, "recency")


def level(image):
    return torch.full((3, 8, 8), float(image.convert("L").getpixel((0, 0))))


def days(folder, count=5, size=40):
    """Shards of images of one gray level each, all different, in row groups of ten."""
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for day in range(count):
        levels = range(size * day, size * (day + 1))
        rows = {"image": [{"bytes": png(n), "path": None} for n in levels]}
        rows["label"] = [int(n % 4 == 0) for n in levels]
        Dataset.from_dict(rows, features=features).to_parquet(
            folder / f"day-{day}.parquet", batch_size=10
        )
    held_out = Dataset.from_dict(
        {"image": [{"bytes": png(n), "path": None} for n in (250, 251)], "label": [0, 1]},
        features=features,
    )
    held_out.to_parquet(folder.parent / "held_out.parquet")


@pytest.fixture(scope="module")
def drawn_days(tmp_path_factory):
    """Rounds of files, by strategy and whether they are streams."""
    folder = tmp_path_factory.mktemp("replay") / "days"
    folder.mkdir()
    days(folder)

    def draw(strategy, streaming, samples=8):
        data = hf_dash.DataConfig(
            str(folder),
            test_dataset_name=str(folder.parent / "held_out.parquet"),
            arrive_by="files",
            files_per_round=1,
            streaming=streaming,
            replay_samples=samples,
            replay_strategy=strategy,
        )
        (schedule,) = hf_dash.data.load_schedules(data, [0], 1, None, [])
        return data.replay.rounds(schedule.rounds(level), seed=0)

    return draw


def levels_of(batches):
    return sorted(int(n) for batch in batches for n in batch["pixel_values"][:, 0, 0, 0])


@pytest.mark.parametrize("strategy", ["uniform", "class_balanced", "recency"])
def test_of_a_stream_only_the_row_groups_of_what_is_drawn_are_read(
    drawn_days, monkeypatch, strategy
):
    round_ = drawn_days(strategy, streaming=True)[-1]
    groups, images = [], RowGroup.images

    def counted(group, rows):
        groups.append((group.path.name, group.number))
        return images(group, rows)

    monkeypatch.setattr(RowGroup, "images", counted)
    # Nothing is kept decoded, so that no old shard is opened to see how much room it needs.
    assert not any(arrival.cache for arrival in round_.arrivals)
    loader = train_batches(round_, 16, seed=0)
    epochs = [levels_of(loader), levels_of(loader)]
    old = [n for n in epochs[0] if n < 160]
    assert epochs[0] == epochs[1] == [*old, *range(160, 200)]
    assert len(set(old)) == 8
    needed = {(f"day-{n // 40}.parquet", n % 40 // 10) for n in epochs[0]}
    assert set(groups) == needed
    assert len(groups) == 2 * len(needed)  # once an epoch
    if strategy != "class_balanced":
        # Drawn in runs: of four shards two row groups each at most, where eight images by
        # themselves would be in up to eight.
        assert len(needed) <= 4 + 8
    groups.clear()
    batches = gradient_batches(round_, DashConfig(gradient_batch_size=16))
    assert levels_of(batches) == epochs[0]
    assert set(groups) == needed


def test_streams_and_map_style_images_are_drawn_alike_by_class(drawn_days):
    stream, images = (drawn_days("class_balanced", streaming)[-1] for streaming in (True, False))
    assert stream.replay == images.replay
    assert stream.class_counts() == images.class_counts() == [30 + 4, 10 + 4]
    assert levels_of(train_batches(stream, 16, seed=0)) == levels_of(
        train_batches(images, 16, seed=0)
    )


def test_a_trainer_reads_a_replayed_stream(drawn_days):
    round_ = drawn_days("uniform", streaming=True)[-1]
    stream = hf_dash.data.training_stream(round_, seed=0)
    found = sorted(int(row["pixel_values"][0, 0, 0]) for row in stream)
    assert found == levels_of(train_batches(round_, 16, seed=0))


def test_a_stream_that_is_read_from_its_beginning_is_refused():
    parts = [
        StreamedImages(numbered(0, 4).to_iterable_dataset(), as_tensor, num_examples=4)
        for _ in range(2)
    ]
    with pytest.raises(ValueError, match="stream must be of parquet files, tar files"):
        Replay(samples=2).rounds([Round(2, tuple(parts))], seed=0)


def test_a_trainer_reads_a_stream_with_the_share_of_new_images():
    parts = [
        StreamedImages(numbered(begin, end).to_iterable_dataset(), as_tensor)
        for begin, end in ((0, 36), (36, 48))
    ]
    (round_,) = Replay(new_share=0.5).rounds([Round(2, tuple(parts))], seed=0)
    rows = hf_dash.data.training_stream(round_, seed=0)
    found = [int(row["pixel_values"].flatten()[0]) for row in rows]
    assert [sum(n >= 36 for n in found[at : at + 8]) for at in range(0, 48, 8)] == [4] * 6
    # By hand: 24 of the 36 old ones, and each of the 12 new ones twice.
    times = np.bincount(found, minlength=48)
    assert times[36:].tolist() == [2] * 12
    assert sorted(times[:36].tolist()) == [0] * 12 + [1] * 24
