import itertools
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import heard
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from hf_dash.method.batches import (
    check_labels,
    count_images,
    is_shuffled,
    micro_batches,
    newest_batches,
    newest_samples,
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


@pytest.mark.parametrize("endless", [itertools.cycle(range(4)), itertools.count()])
def test_what_has_no_end_gives_its_first_batches(endless):
    assert list(newest_batches(endless, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"batches have no end, .* num_batches"):
        list(newest_batches(endless, None))


class Endless(Sampler):
    """Goes on for ever, whatever its length says."""

    def __init__(self, length=None):
        if length is not None:
            self.__class__ = type("Long", (Endless,), {"__len__": lambda self: length})

    def __iter__(self):
        return itertools.cycle(range(5))


@pytest.mark.parametrize(
    ("length", "ordered", "first"),
    [(None, True, [0, 2]), (None, False, [0, 2]), (10, True, [1, 3]), (10, False, [0, 2])],
)
def test_a_sampler_without_end_is_never_read_to_it(length, ordered, first):
    data = Counting(5)
    loader = DataLoader(data, batch_size=2, sampler=Endless(length))
    assert first_numbers(newest_batches(loader, 2, ordered=ordered)) == first
    assert len(data.read) == 4


def test_after_many_batches_the_user_is_asked_for_an_end(monkeypatch):
    monkeypatch.setattr("hf_dash.method.batches.MANY_BATCHES", 3)
    with heard() as messages:
        list(newest_batches(iter(range(3)), 1))
        assert messages == []
        list(newest_batches(iter(range(9)), 1))
    assert len(messages) == 1
    assert "3 minibatches read and no end yet" in messages[0]


def test_drawing_from_a_sampler_leaves_no_trace():
    class Own(Sampler):
        def __init__(self):
            self.epoch, self.order = 0, [0, 1, 2, 3]
            self.random, self.numpy = random.Random(1), np.random.default_rng(1)

        def __iter__(self):
            self.epoch += 1
            self.random.shuffle(self.order)
            self.numpy.random()
            return iter(self.order)

        def __len__(self):
            return 4

    generator = torch.Generator().manual_seed(3)
    for sampler in (Own(), RandomSampler(range(4), generator=generator)):
        loader = DataLoader(Counting(4), batch_size=2, sampler=sampler)
        first = first_numbers(newest_batches(loader, 2))
        assert first_numbers(newest_batches(loader, 2)) == first
        assert [int(images[0]) for images, _ in loader] == first


def test_a_loader_that_shares_batches_out_as_it_reads_gives_each_process_its_own(monkeypatch):
    loader = DataLoader(Counting(12), batch_size=2)
    loader.__class__ = type("DataLoaderDispatcher", (DataLoader,), {})
    monkeypatch.setattr("hf_dash.method.batches.num_processes", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("hf_dash.method.batches.process_index", lambda rank=rank: rank)
        shares.append(newest_samples(loader, 2, ordered=True))
    assert shares == [[[4, 5], [8, 9]], [[6, 7], [10, 11]]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loaders_workers_decode(workers):
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    data = Counting(9)
    loader = DataLoader(data, batch_size=3, **options)
    assert first_numbers(newest_batches(loader, 2)) == [3, 6]
    assert len(data.read) == (0 if workers else 6)  # workers read in their own memory


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


IMAGES = torch.zeros(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"pixel_values": IMAGES, "labels": [{"boxes": torch.zeros(2, 4)}] * 4}, 4),
        ((IMAGES, torch.zeros(4), torch.zeros(4)), 4),
        (([torch.zeros(3, 5, 5)] * 2, [{}] * 2), 2),  # images of different sizes
        ([{"image": torch.zeros(3, 5, 5)}] * 3, 3),  # rows that nobody has put together
        ({"scale": torch.tensor(2.0), "nested": {"x": torch.zeros(5, 1)}}, 5),
        (IMAGES, 4),
        ("text", 4),
        (None, 1),
    ],
)
def test_images_are_counted_whatever_the_form_of_a_batch(batch, count):
    assert count_images(batch) == count


def test_pieces_hold_the_rows_of_every_image():
    targets = [{"boxes": torch.full((4, 4), float(i))} for i in range(4)]
    batch = {
        "pixel_values": torch.arange(4.0)[:, None],
        "labels": targets,
        "scale": torch.ones(()),
        "size": (8, 8),
    }
    pieces = list(micro_batches(batch, 3))
    assert [len(piece["pixel_values"]) for piece in pieces] == [3, 1]
    assert [piece["labels"] for piece in pieces] == [targets[:3], targets[3:]]
    assert all(piece["size"] == [8, 8] for piece in pieces)
    pairs = list(micro_batches((torch.arange(2.0), torch.arange(2)), 1))
    assert [[part.tolist() for part in piece] for piece in pairs] == [[[0.0], [0]], [[1.0], [1]]]
    rows = [{"image": torch.zeros(3)}, {"image": torch.ones(3)}]
    assert list(micro_batches(rows, 1)) == [rows[:1], rows[1:]]
    assert list(micro_batches(batch, None)) == [batch]


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
    check_labels(torch.tensor([0, -100, 2]), 3, ignore_index=-100)
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"labels must lie in 0 … 2 .* got labels from"):
            check_labels(torch.tensor(labels), 3)
