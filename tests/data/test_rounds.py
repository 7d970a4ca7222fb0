from itertools import chain

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch.utils.data import DataLoader

from hf_dash import DashConfig, Round
from hf_dash.data import (
    RandomCropFlip,
    StreamedImages,
    cut_rounds,
    gradient_batches,
    train_batches,
    training_stream,
)
from hf_dash.data.examples import ImageExamples
from hf_dash.models import image_transform


def numbered(count):
    """A dataset whose "image" is its number."""
    features = Features({"image": Value("int64"), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": list(range(count)), "label": [i % 2 for i in range(count)]}
    return Dataset.from_dict(rows, features=features)


def as_tensor(number):
    return torch.tensor([number])


def rounds(count, num_rounds):
    return list(cut_rounds(numbered(count), num_rounds, as_tensor))


def numbers(loader):
    return [batch["pixel_values"].flatten().tolist() for batch in loader]


def test_rounds_share_all_examples_out_in_order():
    cut = rounds(11, 3)
    assert [round_.index for round_ in cut] == [1, 2, 3]
    assert [len(round_.new) for round_ in cut] == [4, 4, 3]
    assert cut[0].seen is None
    assert [example["pixel_values"].item() for example in cut[2].seen] == list(range(8))
    assert [example["pixel_values"].item() for example in cut[2].new] == [8, 9, 10]
    assert [example["labels"] for example in cut[1].examples] == [0, 1] * 4


@pytest.mark.parametrize("num_rounds", [0, 12])
def test_the_number_of_rounds_is_checked(num_rounds):
    with pytest.raises(ValueError, match=f"at most the number of examples, 11, got {num_rounds}"):
        rounds(11, num_rounds)


def test_an_empty_round_is_refused():
    with pytest.raises(ValueError, match="round 4 is empty"):
        Round(4, (ImageExamples(numbered(0), as_tensor),))
    with pytest.raises(ValueError, match="round 1 is empty"):
        Round(1, ())


def test_training_batches_hold_every_example_in_a_seeded_new_order_each_epoch():
    round_ = rounds(10, 2)[1]
    loader = train_batches(round_, 4, seed=5)
    first, second = numbers(loader), numbers(loader)
    assert [len(batch) for batch in first] == [3, 3, 4]
    for epoch in (first, second):
        assert sorted(number for batch in epoch for number in batch) == list(range(10))
    assert first != second
    assert numbers(train_batches(round_, 4, seed=5)) == first
    assert numbers(train_batches(round_, 4, seed=6)) != first


def three_channels(number):
    return torch.arange(48.0).reshape(3, 4, 4) + 100 * number


# From Python 3.12 on, forking a process that has threads warns; torch's workers are made so.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_augmented_batches_repeat_by_seed(num_workers):
    augment = RandomCropFlip(fill=(-1.0, -1.0, -1.0), padding=1)
    round_ = next(cut_rounds(numbered(6), 1, three_channels, in_memory=True))
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(runs))
        loader = train_batches(round_, 4, seed=seed, num_workers=num_workers, augment=augment)
        runs.append([numbers(loader) for _ in range(3)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len({str(sorted(chain(*epoch))) for epoch in runs[0]}) == 3  # every epoch anew
    assert torch.equal(round_.examples[2]["pixel_values"], three_channels(2))


def test_gradient_batches_are_ordered_and_the_short_one_is_the_oldest():
    config = DashConfig(gradient_batch_size=4)
    assert numbers(gradient_batches(rounds(10, 2)[1], config)) == [
        [0, 1],
        [2, 3, 4, 5],
        [6, 7, 8, 9],
    ]


def test_the_papers_preset_makes_every_arrival_one_minibatch():
    config = DashConfig(preset="paper")
    assert numbers(gradient_batches(rounds(7, 3)[2], config)) == [[0, 1, 2], [3, 4], [5, 6]]


def test_processes_share_every_minibatch_equally():
    config = DashConfig(gradient_batch_size=4)
    round_ = rounds(11, 1)[0]
    shares = [
        numbers(gradient_batches(round_, config, num_processes=2, process_index=rank))
        for rank in range(2)
    ]
    # The oldest minibatch [0, 1, 2] has one too many for two processes: the oldest is dropped.
    assert shares == [[[1], [3, 5], [7, 9]], [[2], [4, 6], [8, 10]]]
    with pytest.raises(ValueError, match="round 1 has 2 examples, too few for 3 processes"):
        gradient_batches(rounds(2, 1)[0], config, num_processes=3)


def test_loaders_are_plain_data_loaders():
    round_ = rounds(4, 1)[0]
    assert type(train_batches(round_, 2, seed=0)) is DataLoader
    assert type(gradient_batches(round_, DashConfig())) is DataLoader


def test_a_training_stream_yields_every_example_each_epoch_in_another_order(digits, small_model):
    transform = image_transform(small_model)
    parts = [digits.select(range(30)), digits.select(range(30, 50))]
    ids = [9 - digit for digit in range(10)]
    streams = tuple(
        StreamedImages(part.to_iterable_dataset(num_shards=2), transform, label_ids=ids)
        for part in parts
    )
    stream = training_stream(Round(2, streams), seed=0)
    epochs = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        epochs.append(list(stream))
        labels = sorted(example["labels"] for example in epochs[-1])
        assert labels == sorted(9 - label for label in digits.select(range(50))["label"])
        assert epochs[-1][0]["pixel_values"].shape == (3, 32, 32)
    # Each image once: its sum tells it from the others.
    sums = [sorted(float(e["pixel_values"].sum()) for e in epoch) for epoch in epochs]
    images = digits.select(range(50))["image"]
    assert sums[0] == sums[1] == sorted(float(transform(image).sum()) for image in images)
    assert [e["labels"] for e in epochs[0]] != [e["labels"] for e in epochs[1]]


def test_a_training_stream_needs_streams(two_rounds):
    with pytest.raises(ValueError, match="round 1 must hold streams"):
        training_stream(two_rounds[0], seed=0)
