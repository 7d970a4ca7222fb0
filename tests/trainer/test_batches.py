import itertools

import pytest
import torch
from datasets import Dataset
from helpers import heard
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hf_dash.trainer.batches import TrainerLoss, newest_of_dataset, prepared, training_batches


class Rank:
    per_device_train_batch_size, seed, remove_unused_columns = 4, 1, False

    def __init__(self, process_index=0, world_size=2, **options):
        self.process_index, self.world_size = process_index, world_size
        vars(self).update(options)


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(100))


def lists(batches):
    return [batch.tolist() for batch in batches]


def test_what_the_loaders_own_sampler_draws_is_read():
    weights = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    sampler = WeightedRandomSampler(weights, 12, generator=generator)
    loader = DataLoader(torch.arange(6), batch_size=4, sampler=sampler)
    found = lists(training_batches(loader, Rank(), 2))
    assert {number for batch in found for number in batch} <= {1, 3, 5}
    assert lists(loader)[:2] == found  # drawing has moved nothing
    subset = DataLoader(torch.arange(9), batch_size=2, sampler=SubsetRandomSampler([2, 4, 6, 8]))
    found = lists(training_batches(subset, Rank(), 5))
    assert sorted(number for batch in found for number in batch) == [2, 4, 6, 8]


def test_of_a_sequential_loader_the_newest_are_read():
    loader = DataLoader(torch.arange(12), batch_size=4)
    assert lists(training_batches(loader, Rank(), 2)) == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_smaller_last_batch_is_left_out_unless_it_is_alone():
    loader = DataLoader(torch.arange(6), batch_size=4)
    assert lists(training_batches(loader, Rank(), None)) == [[0, 1, 2, 3]]
    loader = DataLoader(torch.arange(3), batch_size=4)
    assert lists(training_batches(loader, Rank(), 5)) == [[0, 1, 2]]


def test_datasets_that_make_batches_themselves_are_read():
    rows = torch.arange(6).view(3, 2)
    loader = DataLoader(rows, batch_size=None)
    assert lists(training_batches(loader, Rank(), 2)) == [[2, 3], [4, 5]]

    class Batches(IterableDataset):
        def __iter__(self):
            return iter(rows)

    stream = DataLoader(Batches(), batch_size=None)
    assert lists(training_batches(stream, Rank(world_size=1), 2)) == [[0, 1], [2, 3]]


def test_a_stream_is_sampled_from_its_beginning():
    loader = DataLoader(Numbers(), batch_size=4)
    shares = [lists(training_batches(loader, Rank(rank), 2)) for rank in range(2)]
    assert shares == [[[0, 1, 2, 3], [8, 9, 10, 11]], [[4, 5, 6, 7], [12, 13, 14, 15]]]


def sorted_stream(num_shards, num_classes=5, per_class=40):
    """A stream of numbers sorted by class, and the numbers that were read of it."""
    count, read = num_classes * per_class, []
    rows = Dataset.from_dict({"x": range(count), "labels": [n // per_class for n in range(count)]})
    stream = rows.to_iterable_dataset(num_shards=num_shards)
    return stream.map(lambda row: read.append(row["x"]) or row), read


def test_of_a_stream_of_many_shards_the_first_batches_hold_all_classes():
    stream, read = sorted_stream(num_shards=40)
    batches = list(training_batches(DataLoader(stream, batch_size=16), Rank(world_size=1), 2))
    assert [sorted(set(batch["labels"].tolist())) for batch in batches] == [[0, 1, 2, 3, 4]] * 2
    assert len(read) == 32  # no more than is used
    with heard() as lines:
        stream, _ = sorted_stream(num_shards=40)
        list(newest_of_dataset(stream, DataLoader(stream), Rank(world_size=1), 2, 16))
    assert lines == []


def test_a_stream_of_many_shards_is_read_whole_in_any_order():
    stream, _ = sorted_stream(num_shards=40)
    found = training_batches(DataLoader(stream, batch_size=16), Rank(world_size=1), 100)
    assert sorted(n for batch in found for n in batch["x"].tolist()) == list(range(200))


def test_a_stream_sorted_by_class_is_warned_of():
    stream, _ = sorted_stream(num_shards=1)
    with heard() as lines:
        list(training_batches(DataLoader(stream, batch_size=16), Rank(world_size=1), 2))
    assert len(lines) == 1
    assert "all 32 images of the gradient pass have the label 0" in lines[0]
    with heard() as lines:
        list(training_batches(DataLoader(stream, batch_size=16), Rank(world_size=1), 3))
    assert lines == []


def test_a_loader_of_another_kind_is_iterated():
    class Prefetcher:
        def __iter__(self):
            return iter(torch.arange(8).view(4, 2))

    assert lists(training_batches(Prefetcher(), Rank(), 2)) == [[0, 1], [2, 3]]


class Once(IterableDataset):
    def __init__(self):
        self.source = iter(range(8))

    def __iter__(self):
        return self.source


def test_what_can_be_read_only_once_is_refused_untouched():
    dataset = Once()
    for loader in (DataLoader(dataset, batch_size=2), dataset.source):
        with pytest.raises(ValueError, match=r"can be read only once: .*gradient_dataset="):
            training_batches(loader, Rank(), 2)
    assert next(dataset.source) == 0


class Forever(Sampler):
    def __iter__(self):
        return itertools.cycle(range(4))


def test_a_sampler_without_an_end_is_read_only_as_far_as_asked():
    loader = DataLoader(torch.arange(4), batch_size=3, sampler=Forever())
    assert lists(training_batches(loader, Rank(), 2)) == [[0, 1, 2], [3, 0, 1]]
    with pytest.raises(ValueError, match=r"no end.* num_batches"):
        training_batches(loader, Rank(), None)


def test_of_a_given_dataset_the_tail_is_read_in_order():
    loader = DataLoader(torch.zeros(5))
    one = newest_of_dataset(torch.arange(10), loader, Rank(world_size=1), 2, 4)
    assert lists(one) == [[2, 3, 4, 5], [6, 7, 8, 9]]
    whole = newest_of_dataset(torch.arange(10), loader, Rank(world_size=1), None, 4)
    assert lists(whole) == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_processes_share_every_batch_of_a_given_dataset():
    loader = DataLoader(torch.zeros(5))
    shares = [lists(newest_of_dataset(torch.arange(20), loader, Rank(r), 2, 4)) for r in range(2)]
    both = [sorted(left + right) for left, right in zip(*shares, strict=True)]
    assert both == [list(range(4, 12)), list(range(12, 20))]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4], [4, 4]]


def test_of_a_given_stream_the_beginning_is_read():
    loader = DataLoader(torch.zeros(5))
    found = newest_of_dataset(Numbers(), loader, Rank(world_size=1), 2, 4)
    assert lists(found) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_columns_the_trainer_dropped_are_dropped():
    training = Dataset.from_dict({"x": [1.0], "labels": [0]})
    given = Dataset.from_dict({"x": [1.0, 2.0], "labels": [0, 1], "name": ["a", "b"]})
    loader = DataLoader(training, collate_fn=lambda rows: rows)
    for remove, columns in [(True, {"x", "labels"}), (False, {"x", "labels", "name"})]:
        rank = Rank(world_size=1, remove_unused_columns=remove)
        (batch,) = newest_of_dataset(given, loader, rank, None, 4)
        assert set(batch[0]) == columns


class OwnLoss:
    """As much of a Trainer as the loss needs."""

    model_accepts_loss_kwargs = False

    def __init__(self, compute_loss_func=None):
        self.compute_loss_func = compute_loss_func
        self.seen = []

    def _prepare_inputs(self, batch):
        return {name: value + 1 for name, value in batch.items()}

    def compute_loss_context_manager(self):
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        self.seen.append((sorted(inputs), num_items_in_batch, torch.is_autocast_enabled("cpu")))
        inputs.pop("labels")
        return torch.zeros(())


@pytest.mark.parametrize(("func", "items"), [(None, None), (print, 2)])
def test_the_trainer_computes_the_loss_in_its_own_context(func, items):
    trainer = OwnLoss(func)
    batch = {"pixel_values": torch.zeros(3, 1), "labels": torch.tensor([1, -100, 0])}
    TrainerLoss(trainer)(torch.nn.Identity(), batch)
    assert trainer.seen == [(["labels", "pixel_values"], items, True)]
    assert "labels" in batch


def test_a_loss_counts_the_labels_that_the_trainer_counts():
    batch = {"pixel_values": torch.zeros(3, 1), "labels": torch.tensor([1, -100, 0])}
    assert TrainerLoss(OwnLoss(print)).count_items(batch) == 2
    assert TrainerLoss(OwnLoss()).count_items(batch) == 3
    assert TrainerLoss(OwnLoss(print)).count_items({"x": torch.zeros(5), "labels": [{}] * 5}) == 5


def test_a_loss_function_gets_prepared_batches():
    loss_fn = prepared(OwnLoss(), lambda model, batch: batch["x"])
    assert loss_fn(None, {"x": torch.zeros(())}).item() == 1.0


def test_a_pair_becomes_what_the_model_calls_its_images():
    trainer, model = OwnLoss(), torch.nn.Identity()
    model.main_input_name = "images"
    TrainerLoss(trainer)(model, (torch.zeros(2, 1), torch.zeros(2)))
    assert trainer.seen[0][0] == ["images", "labels"]


@pytest.mark.parametrize("count", [12, 15, 16, 17])
def test_processes_sample_equal_batches_of_a_stream_that_ends_anyhow(count):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(count))

    loader = DataLoader(Stream(), batch_size=4)
    shares = [lists(training_batches(loader, Rank(rank), None)) for rank in range(2)]
    whole = count // 8
    assert [[len(batch) for batch in share] for share in shares] == [[4] * whole] * 2
    read = [number for share in shares for batch in share for number in batch]
    assert sorted(read) == list(range(8 * whole))
