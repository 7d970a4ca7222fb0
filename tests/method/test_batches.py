import itertools

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hf_dash.method.batches import (
    check_labels,
    count_images,
    is_shuffled,
    newest_batches,
    split_labels,
)


class Counting(Dataset):
    """Remembers which examples were read."""

    def __init__(self, length):
        self.length, self.read = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor([float(index)]), 0


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.tensor([float(i)]), 0) for i in range(10))


def first_numbers(batches):
    return [int(images[0]) for images, _ in batches]


@pytest.mark.parametrize("make", [list, tuple, iter, lambda b: (x for x in b), dict.fromkeys])
def test_the_newest_of_any_finite_iterable(make):
    assert list(newest_batches(make(range(10)), 3)) == [7, 8, 9]
    assert list(newest_batches(make(range(2)), 3)) == [0, 1]
    assert list(newest_batches(make(range(4)), None)) == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [2, None])
def test_an_ordered_loader_decodes_its_end_only(batch_size):
    data = Counting(11)
    loader = DataLoader(data, batch_size=batch_size)
    tail = newest_batches(loader, 2)
    assert first_numbers(tail) == ([8, 10] if batch_size else [9, 10])
    assert data.read == ([8, 9, 10] if batch_size else [9, 10])


def test_an_ordered_loader_prepared_by_accelerate_decodes_its_end_only():
    data = Counting(10)
    loader = Accelerator(cpu=True).prepare(DataLoader(data, batch_size=2))
    assert first_numbers(newest_batches(loader, 2)) == [6, 8]
    assert data.read == [6, 7, 8, 9]


def test_a_shuffled_loader_gives_its_first_batches():
    data = Counting(100)
    assert len(list(newest_batches(DataLoader(data, batch_size=2, shuffle=True), 3))) == 3
    assert len(data.read) <= 8  # three batches, and at most one looked ahead


def test_a_stream_is_read_through_for_its_newest():
    assert first_numbers(newest_batches(DataLoader(Stream(), batch_size=3), 2)) == [6, 9]


def test_an_endless_stream_can_be_cut_by_hand():
    endless = itertools.islice(itertools.count(), 5)
    assert list(newest_batches(endless, 2)) == [3, 4]


@pytest.mark.parametrize("seedable", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shuffling_is_seen_through_accelerate(seedable, shuffle):
    accelerator = Accelerator(cpu=True)
    accelerator.dataloader_config.use_seedable_sampler = seedable
    loader = DataLoader(TensorDataset(torch.zeros(4)), batch_size=2, shuffle=shuffle)
    assert is_shuffled(loader) is shuffle
    assert is_shuffled(accelerator.prepare(loader)) is shuffle
    loader = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler)
    assert is_shuffled(loader) is shuffle


def test_labels_are_found_in_mappings_and_pairs():
    images, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    inputs, found = split_labels({"pixel_values": images, "labels": labels})
    assert found is labels
    assert inputs["pixel_values"] is images
    assert split_labels({"image": images, "label": labels})[1] is labels
    assert split_labels([images, labels])[1] is labels
    assert count_images((images, labels)) == 2


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"pixel_values": torch.zeros(1)}, ValueError, "batch has no labels: its keys are"),
        ((torch.zeros(1),), ValueError, "batch has no labels: a pair .* got 1 items"),
        (torch.zeros(1), TypeError, "batch must be a mapping with labels or a pair"),
        ("text", TypeError, "batch must be a mapping with labels or a pair"),
        ({"labels": [0]}, TypeError, "labels of a batch must be a tensor, got list"),
    ],
)
def test_batches_without_labels_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        split_labels(batch)


def test_labels_out_of_range_are_refused():
    check_labels(torch.tensor([0, 2]), 3)
    check_labels(torch.tensor([7]), None)
    check_labels(torch.tensor([[0.5, 9.0]]), 2)
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"labels must lie in 0 … 2 .* got labels from"):
            check_labels(torch.tensor(labels), 3)
