import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler

from hf_dash.data.batches import EvenBatchSampler, balanced_weights, cut_evenly, even_sizes


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "num_processes", "sizes"),
    [
        (12, 4, 1, [4, 4, 4]),
        (13, 4, 1, [3, 3, 3, 4]),
        (5, 4, 1, [2, 3]),
        (3, 4, 1, [3]),
        (13, 4, 2, [3, 3, 3, 4]),
        (9, 4, 2, [2, 2, 2, 3]),
        (3, 4, 2, [1, 2]),
        (2, 1, 3, [1, 1]),
        (0, 4, 1, []),
    ],
)
def test_sizes_worked_out_by_hand(num_examples, batch_size, num_processes, sizes):
    assert even_sizes(num_examples, batch_size, num_processes) == sizes


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "num_processes", "sizes"),
    [
        (12, 4, 1, [4, 4, 4]),
        (13, 4, 1, [4, 4, 4]),
        (3, 4, 1, [3]),
        (13, 4, 2, [4, 4]),
        (21, 4, 2, [4, 4, 4, 4]),
        (5, 4, 2, [2, 2]),
        (0, 4, 1, []),
    ],
)
def test_one_size_worked_out_by_hand(num_examples, batch_size, num_processes, sizes):
    assert even_sizes(num_examples, batch_size, num_processes, drop_last=True) == sizes


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_sizes_differ_by_one_and_nothing_is_lost(num_processes):
    for num_examples in range(num_processes, 80):
        for batch_size in range(1, 12):
            sizes = even_sizes(num_examples, batch_size, num_processes)
            assert sum(sizes) == num_examples
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= batch_size
            assert len(sizes) % num_processes == 0 or len(sizes) == num_examples
            # No step more than an epoch with a remainder has.
            assert len(sizes) <= num_processes * -(-num_examples // (batch_size * num_processes))


def test_a_number_of_batches_can_be_asked_for():
    assert cut_evenly(7, 3) == [2, 2, 3]
    assert cut_evenly(0, 0) == []


def shares(num_examples, batch_size, num_processes):
    """What Accelerate gives each process, in two epochs."""
    for rank in range(num_processes):
        generator = torch.Generator().manual_seed(0)
        sampler = RandomSampler(range(num_examples), generator=generator)
        batches = EvenBatchSampler(sampler, batch_size, num_processes)
        loader = DataLoader(list(range(num_examples)), batch_sampler=batches)
        prepared = prepare_data_loader(
            loader,
            num_processes=num_processes,
            process_index=rank,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=7,
        )
        yield [[batch.tolist() for batch in prepared] for _ in range(2)]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_examples", [12, 13, 17, 24])
def test_accelerate_deals_every_example_out_once(num_examples, num_processes):
    dealt = list(shares(num_examples, 4, num_processes))
    for epoch in (0, 1):
        batches = [batch for share in dealt for batch in share[epoch]]
        assert sorted(number for batch in batches for number in batch) == list(range(num_examples))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert len({len(share[epoch]) for share in dealt}) == 1  # no process waits
    assert dealt[0][0] != dealt[0][1]  # another order


def test_an_example_for_every_process_is_needed():
    with pytest.raises(ValueError, match="num_processes is 3, but there are only 2 examples"):
        EvenBatchSampler(RandomSampler(range(2)), 4, 3)


def test_balanced_weights_make_classes_count_equally():
    weights = balanced_weights([30, 10, 0])
    assert weights.tolist() == pytest.approx([40 / 60, 40 / 20, 0])
    assert 30 * weights[0] == pytest.approx(10 * weights[1])
