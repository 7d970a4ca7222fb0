from types import SimpleNamespace

import numpy as np
import pytest
from helpers import as_tensor, heard, numbered

from hf_dash.data import StreamedImages
from hf_dash.data.mixing import (
    buffered,
    epoch_order,
    interleaved,
    mixed,
    say_sorted,
    spread,
)
from hf_dash.data.order import shuffled
from hf_dash.data.shares import shares_of
from hf_dash.data.streams import FileBlock
from hf_dash.utils.logging import warn_once


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("buffer_size", [1, 7, 100])
def test_a_buffer_mixes_what_is_near_and_loses_nothing(buffer_size):
    found = buffered(60, buffer_size, generator()).tolist()
    assert sorted(found) == list(range(60))
    assert all(number - place < buffer_size for place, number in enumerate(found))
    assert (found == list(range(60))) == (buffer_size == 1)
    assert buffered(0, buffer_size, generator()).tolist() == []


def test_a_buffer_is_the_one_that_items_go_through(monkeypatch):
    """The same draws as of a buffer of items, one after the other."""
    monkeypatch.setattr("hf_dash.data.order.DRAWN_AT_ONCE", 53)
    expected = list(shuffled(range(60), 7, generator(3)))
    assert buffered(60, 7, generator(3)).tolist() == expected


def test_lines_mix_as_a_full_shuffle_and_keep_their_order():
    lines = [np.arange(0, 900), np.arange(900, 1200)]
    places = []
    for seed in range(200):
        items = mixed(lines, generator(seed))
        assert [items[items < 900].tolist(), items[items >= 900].tolist()] == [
            line.tolist() for line in lines
        ]
        places.append(int((items[:40] >= 900).sum()))
    # Hypergeometric: 40 of 1,200, of which 300 count.
    assert np.mean(places) == pytest.approx(10, abs=0.7)
    assert np.var(places) == pytest.approx(40 / 4 * 3 / 4 * 1160 / 1199, rel=0.3)


def test_those_of_a_kind_are_evenly_spaced_and_in_random_order():
    kinds = np.repeat([3, 5, 8], [20, 10, 5])
    orders = [spread(kinds.tolist(), generator(seed)) for seed in range(50)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(35))
        for begin in range(28):  # a window of seven: of each kind its share, give or take one
            counts = np.bincount(kinds[order[begin : begin + 7]], minlength=9)[[3, 5, 8]]
            assert (np.abs(counts - [4, 2, 1]) <= 1).all()
    assert len({tuple(order[:3].tolist()) for order in orders}) > 40
    assert len({int(order[0]) for order in orders}) > 10


def test_parts_are_interleaved_evenly():
    # By hand: two of six and one of three at a time.
    parts = [np.arange(6), np.arange(10, 13)]
    assert interleaved(parts).tolist() == [0, 10, 1, 2, 11, 3, 4, 12, 5]
    assert interleaved([np.arange(3)]).tolist() == [0, 1, 2]


def test_an_order_reads_what_comes_again_as_often_as_it_is_wanted():
    streams = [
        StreamedImages(numbered(begin, end).to_iterable_dataset(), as_tensor, num_examples=size)
        for begin, end, size in ((0, 12, 12), (12, 16, 4))
    ]
    (share,) = shares_of(streams, 1, 0, 1, new_share=0.5)
    assert (share.parts, share.counts) == (((0,), (1,)), (8, 8))
    order = epoch_order(share, 3, generator())
    # All of the old are read in order, of which eight are given; the four new ones twice.
    assert order.sources.tolist() == [0] * 12 + [1] * 8
    assert order.places.tolist() == [*range(12), *range(4), *range(4)]
    assert len(set(order.given.tolist())) == 16
    assert (order.given[1::2] >= 12).all()
    assert sorted(order.places[order.given[1::2]].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def arrival_of(*labels, scattered=False):
    """An arrival of row groups with these labels."""
    blocks = []
    for own in map(np.array, labels):
        piece = SimpleNamespace(num_rows=len(own), scattered=scattered)
        blocks.append(FileBlock(piece, np.arange(len(own)), own))
    stream = numbered(0, 1).to_iterable_dataset()
    every = np.concatenate(labels).tolist()
    return StreamedImages(stream, as_tensor, blocks=blocks, labels=every)


@pytest.mark.parametrize(
    ("arrival", "buffer_size", "lines"),
    [
        (arrival_of([0] * 19 + [1], [1] * 20), 20, 1),
        (arrival_of([0] * 20, [1] * 20), 21, 0),  # the buffer holds several
        (arrival_of([0, 1] * 10, [1, 0] * 10), 20, 0),  # mixed
        (arrival_of([0] * 20, [0] * 20), 20, 0),  # of one class alone
        (arrival_of([0] * 20, [1] * 20, scattered=True), 20, 0),  # read one by one
    ],
)
def test_sorted_row_groups_that_fill_the_buffer_are_said_once(arrival, buffer_size, lines):
    warn_once.cache_clear()
    with heard() as said:
        for _ in range(2):
            say_sorted([arrival], buffer_size)
    assert len(said) == lines
    assert all("one of 20 images fills the buffer of 20" in line for line in said)
