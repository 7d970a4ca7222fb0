from dataclasses import dataclass

import numpy as np
import pytest
from helpers import as_tensor, numbered

from hf_dash.data import StreamedImages
from hf_dash.data.shares import share_out, sources_of
from hf_dash.data.streams import FileBlock


@dataclass(frozen=True)
class Numbers:
    """Numbers as images, read together as those of a row group, or each alone."""

    num_rows: int
    scattered: bool = False


def arrival(*sizes, scattered=False):
    blocks = [FileBlock(Numbers(n, scattered), np.arange(n), np.zeros(n, np.int64)) for n in sizes]
    return StreamedImages(numbered(1).to_iterable_dataset(), as_tensor, blocks=blocks)


def shared(arrivals, num_readers, **options):
    """What each reader reads: the number of the block, and where it begins and ends."""
    (sources,) = sources_of(arrivals, 1, 0, 1)
    return [
        [(one.number, one.begin, one.end) for one in share]
        for share in share_out(sources, num_readers, **options)
    ]


def test_whole_blocks_go_to_the_reader_with_the_most_room():
    # By hand: 7 to the first, 5 to the second, 4 to the second (room 3 vs. 5), 2 to the first.
    assert shared([arrival(7, 5, 4, 2)], 2) == [[(0, 0, 7), (3, 0, 2)], [(1, 0, 5), (2, 0, 4)]]
    # Workers are not made equal: one row group is read by one of them.
    assert sorted(shared([arrival(7)], 3)) == [[], [], [(0, 0, 7)]]


def test_processes_are_made_equal_by_a_cut():
    # By hand: 12 examples, six each; the block of 9 is cut, the one of 3 is not.
    assert shared([arrival(9, 3)], 2, exact=True) == [[(0, 0, 6)], [(0, 6, 9), (1, 0, 3)]]
    # Equal blocks whose number the processes divide are not cut.
    assert shared([arrival(5, 5, 5, 5)], 2, exact=True) == [
        [(0, 0, 5), (2, 0, 5)],
        [(1, 0, 5), (3, 0, 5)],
    ]


def test_single_examples_are_spread_over_all_readers():
    old, new = arrival(10, scattered=True), arrival(4, scattered=True)
    assert shared([old, new], 2) == [[(0, 0, 5), (0, 0, 2)], [(0, 5, 10), (0, 2, 4)]]


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_every_example_is_read_once_and_few_blocks_twice(scattered, num_processes, num_workers):
    generator = np.random.default_rng(num_processes)
    arrivals = [arrival(*generator.integers(0, 30, 9), scattered=scattered) for _ in range(3)]
    ranks = [sources_of(arrivals, num_processes, r, num_workers) for r in range(num_processes)]
    assert {len(workers) for workers in ranks} == {max(1, num_workers)}
    counts = [sum(len(source) for share in workers for source in share) for workers in ranks]
    assert max(counts) - min(counts) <= 1
    read = [source for workers in ranks for share in workers for source in share]
    found = sorted(
        (arrivals.index(source.arrival), source.number, place)
        for source in read
        for place in range(source.begin, source.end)
    )
    assert found == [
        (index, number, place)
        for index, one in enumerate(arrivals)
        for number, block in enumerate(one.blocks)
        for place in range(len(block))
    ]
    if not scattered:
        num_blocks = sum(len(block) > 0 for one in arrivals for block in one.blocks)
        assert len(read) <= num_blocks + num_processes - 1
