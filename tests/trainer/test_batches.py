import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset

from hf_dash.trainer.batches import newest_of_dataset, sample_batches, trainer_loss


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


def test_processes_sample_equal_batches_without_overlap():
    loader = DataLoader(torch.arange(19))
    shares = [lists(sample_batches(loader, Rank(rank), None)) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4], [4, 4]]
    everything = [number for share in shares for batch in share for number in batch]
    assert len(set(everything)) == 16
    assert len(list(sample_batches(loader, Rank(), 1))) == 1


def test_a_stream_is_sampled_from_its_beginning():
    loader = DataLoader(Numbers())
    shares = [lists(sample_batches(loader, Rank(rank), 2)) for rank in range(2)]
    assert shares == [[[0, 1, 2, 3], [8, 9, 10, 11]], [[4, 5, 6, 7], [12, 13, 14, 15]]]


def test_a_dataset_smaller_than_one_batch_makes_one():
    assert lists(sample_batches(DataLoader(torch.arange(3)), Rank(), 5)) != []


def test_of_a_given_dataset_the_tail_is_read_in_order():
    loader = DataLoader(torch.zeros(5))
    one = newest_of_dataset(torch.arange(10), loader, Rank(world_size=1), 2)
    assert lists(one) == [[2, 3, 4, 5], [6, 7, 8, 9]]
    whole = newest_of_dataset(torch.arange(10), loader, Rank(world_size=1), None)
    assert lists(whole) == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_processes_share_every_batch_of_a_given_dataset():
    loader = DataLoader(torch.zeros(5))
    shares = [lists(newest_of_dataset(torch.arange(20), loader, Rank(r), 2)) for r in range(2)]
    both = [sorted(left + right) for left, right in zip(*shares, strict=True)]
    assert both == [list(range(4, 12)), list(range(12, 20))]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4], [4, 4]]


def test_of_a_given_stream_the_beginning_is_read():
    loader = DataLoader(torch.zeros(5))
    found = newest_of_dataset(Numbers(), loader, Rank(world_size=1), 2)
    assert lists(found) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_columns_the_trainer_dropped_are_dropped():
    training = Dataset.from_dict({"x": [1.0], "labels": [0]})
    given = Dataset.from_dict({"x": [1.0, 2.0], "labels": [0, 1], "name": ["a", "b"]})
    loader = DataLoader(training, collate_fn=lambda rows: rows)
    for remove, columns in [(True, {"x", "labels"}), (False, {"x", "labels", "name"})]:
        rank = Rank(world_size=1, remove_unused_columns=remove)
        (batch,) = newest_of_dataset(given, loader, rank, None)
        assert set(batch[0]) == columns


class OwnLoss:
    """As much of a Trainer as the loss needs."""

    model_accepts_loss_kwargs = False

    def __init__(self, compute_loss_func=None):
        self.compute_loss_func = compute_loss_func
        self.seen = []

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
    trainer_loss(trainer)(torch.nn.Identity(), batch)
    assert trainer.seen == [(["labels", "pixel_values"], items, True)]
    assert "labels" in batch


def test_a_pair_becomes_what_the_model_calls_its_images():
    trainer, model = OwnLoss(), torch.nn.Identity()
    model.main_input_name = "images"
    trainer_loss(trainer)(model, (torch.zeros(2, 1), torch.zeros(2)))
    assert trainer.seen[0][0] == ["images", "labels"]


@pytest.mark.parametrize("count", [12, 15, 16, 17])
def test_processes_sample_equal_batches_of_a_stream_that_ends_anyhow(count):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(count))

    loader = DataLoader(Stream())
    shares = [lists(sample_batches(loader, Rank(rank), None)) for rank in range(2)]
    whole = count // 8
    assert [[len(batch) for batch in share] for share in shares] == [[4] * whole] * 2
    read = [number for share in shares for batch in share for number in batch]
    assert sorted(read) == list(range(8 * whole))
