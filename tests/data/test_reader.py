from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers import as_tensor, numbered

from hf_dash.data import StreamedImages, StreamLoader, reader
from hf_dash.data.mixing import OPEN, epoch_order
from hf_dash.data.reader import Ahead
from hf_dash.data.shares import shares_of
from hf_dash.data.streams import FileBlock
from hf_dash.transforms import ImageTransform


@dataclass(frozen=True)
class Group:
    """Numbers as the images of a row group, and a note of when it is opened and closed."""

    number: int
    num_rows: int
    notes: list = field(compare=False)
    scattered: bool = False

    def images(self, rows):
        self.notes.append(("open", self.number))
        try:
            yield from (100 * self.number + row for row in rows)
        finally:
            self.notes.append(("closed", self.number))


def arrival_of(num_groups, size, notes, **options):
    labels = np.zeros(size, dtype=np.int64)
    blocks = [
        FileBlock(Group(number, size, notes), np.arange(size), labels)
        for number in range(num_groups)
    ]
    stream = numbered(0, num_groups * size).to_iterable_dataset()
    return StreamedImages(stream, as_tensor, blocks=blocks, **options)


def ahead_of(arrivals, buffer_size):
    (share,) = shares_of(arrivals, 1, 0, 1)
    order = epoch_order(share, buffer_size, np.random.default_rng(0))
    return Ahead(share.sources, order), order


@pytest.mark.parametrize(("buffer_size", "most_open"), [(5, 1), (30, 3), (400, OPEN)])
def test_as_much_is_read_ahead_as_the_buffer_holds(buffer_size, most_open):
    notes = []
    ahead, order = ahead_of([arrival_of(40, 10, notes)], buffer_size)
    found, num_open = [], 0
    for begin in range(0, 400, 4):
        rows = ahead.take(order.given[begin : begin + 4])
        found += [image for image, _ in rows]
        assert len(ahead._rows) <= buffer_size - 1
        opened = [number for what, number in notes if what == "open"]
        closed = [number for what, number in notes if what == "closed"]
        assert len(set(opened)) == len(opened)  # each row group is read once
        num_open = max(num_open, len(opened) - len(closed))
    assert num_open == most_open
    assert len(closed) == 40
    assert sorted(found) == [100 * number + row for number in range(40) for row in range(10)]
    given = order.given
    assert found == (100 * order.sources[given] + order.places[given]).tolist()


def test_what_is_kept_is_not_read():
    notes = []
    arrivals = [arrival_of(3, 4, notes, cache=True), arrival_of(2, 4, notes)]
    kept = arrivals[0].kept
    for place in range(1, 12):
        kept.write(place, as_tensor(place), 0)
    notes.clear()
    ahead, order = ahead_of(arrivals, 50)
    rows = ahead.take(order.given)
    is_kept = order.sources[order.given] < 3
    assert [row is None for row in rows] == is_kept.tolist()
    assert sorted(number for what, number in notes if what == "open") == [0, 1]  # of the second


@pytest.mark.parametrize(("missing", "word"), [(1, "more"), (-1, "less")])
def test_a_source_with_other_rows_than_were_counted_is_noticed_at_its_end(missing, word):
    @dataclass(frozen=True)
    class Wrong(Group):
        def images(self, rows):
            return iter(range(len(rows) - missing))

    piece = Wrong(0, 4, [])
    block = FileBlock(piece, np.arange(4), np.zeros(4, dtype=np.int64))
    # Not strict, as a stream of unknown length is read.
    object.__setattr__(block, "rows", lambda places: ((n, 0) for n in piece.images(places)))
    stream = numbered(0, 4).to_iterable_dataset()
    ahead, order = ahead_of([StreamedImages(stream, as_tensor, blocks=[block])], 50)
    with pytest.raises(ValueError, match=f"num_examples is {word} than a stream holds"):
        ahead.take(order.given)


@pytest.mark.parametrize(("key", "count"), [(None, 2), ("known", 0)])
def test_only_transforms_that_may_draw_are_seeded(monkeypatch, key, count):
    seeded = []

    def noted(*entropy):
        seeded.append(entropy)
        return nullcontext()

    monkeypatch.setattr(reader, "_seeded", noted)
    transform = ImageTransform(as_tensor, None, "it takes any", key=key)
    arrival = StreamedImages(numbered(0, 8).to_iterable_dataset(), transform, num_examples=8)
    assert [len(batch["labels"]) for batch in StreamLoader([arrival], 4, seed=0)] == [4, 4]
    assert len(seeded) == count
