"""What one process reads of streams in an epoch, a chunk of every batch at a time.

Flow: a reader's share → the order of the epoch → encoded images, read ahead in the order that the
files have, unless they are kept → chunks, decoded.
Differs from a buffer of images: the order is known before anything is read, so what is kept is
looked up where it lies, and a reader holds what is read and not given yet, and nothing else.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from hf_dash.data.examples import Augment
from hf_dash.data.image_batch import put_together
from hf_dash.data.mixing import Order, epoch_order
from hf_dash.data.shares import Share, Source
from hf_dash.data.streams import Row, StreamedImages, rows_at

Chunk = dict[str, Any]


def this_worker() -> tuple[int, int]:
    """Return the number of this worker of a ``DataLoader``, and that of all its workers."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Seed python, numpy and torch on the CPU; restore their states on exit."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # No devices: a forked worker must not touch one.
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class Ahead:
    """Encoded images, read in one order and taken in another; what is kept is not read.

    Args:
        sources: that are read.
        order: of an epoch.
    """

    def __init__(self, sources: Sequence[Source], order: Order) -> None:
        self._order = order
        # Asked once, so that a source is read whole or not at all.
        kept = np.array([source.is_kept for source in sources], dtype=bool)
        self._wanted = np.flatnonzero(~kept[order.sources])
        self._num_read = 0
        self._rows: dict[int, Row] = {}
        by_source = self._wanted[np.argsort(order.sources[self._wanted], kind="stable")]
        numbers, starts = np.unique(order.sources[by_source], return_index=True)
        places = np.split(order.places[by_source], starts[1:])
        self._lines = {
            number: _rows_of(sources[number], own)
            for number, own in zip(numbers.tolist(), places, strict=False)
        }

    def take(self, positions: np.ndarray) -> list[Row | None]:
        """Return what is at these positions of the order, each once; None for what is kept.

        Raises:
            ValueError: a source holds more or fewer examples than were counted.
        """
        if not len(self._wanted):
            return [None] * len(positions)
        end = int(np.searchsorted(self._wanted, positions.max(initial=-1), side="right"))
        for position in self._wanted[self._num_read : end].tolist():
            self._rows[position] = next(self._lines[int(self._order.sources[position])])
        self._num_read = max(self._num_read, end)
        return [self._rows.pop(position, None) for position in positions.tolist()]


def _rows_of(source: Source, places: np.ndarray) -> Iterator[Row]:
    """Yield rows of a source, which is read again where all of it was; at its end it is let go.

    Args:
        source: to be read.
        places: in the source, those of one time after those of the other.

    Raises:
        ValueError: it holds more or fewer examples than were counted.
    """
    for begin in range(0, len(places), len(source)):
        rows = source.rows(places[begin : begin + len(source)])
        for left in reversed(range(len(source))):
            row = next(rows, None)
            if row is None:
                raise ValueError("num_examples is more than a stream holds")
            if not left and next(rows, None) is not None:
                raise ValueError("num_examples is less than a stream holds")
            yield row


@dataclass(frozen=True)
class Reader(TorchIterableDataset[Chunk]):
    """What one process reads in one epoch: of every batch, each worker's share as a chunk."""

    shares: tuple[Share, ...]
    num_batches: int
    batch_size: int
    seed: int
    buffer_size: int
    num_workers: int
    process_index: int
    augment: Augment | None = None
    normalized: bool = True
    epoch: int = 0
    skip: int = 0

    def __iter__(self) -> Iterator[Chunk]:
        return self.chunks(this_worker()[0])

    def chunks(self, worker: int) -> Iterator[Chunk]:
        """Yield one worker's chunks; a skipped or empty chunk gives only its length."""
        share = self.shares[worker]
        entropy = self.seed, self.epoch, self.process_index, worker
        order = epoch_order(share, self.buffer_size, np.random.default_rng(entropy))
        ahead, arrivals = Ahead(share.sources, order), _Arrivals(share.sources)
        is_known = all(source.arrival.transform.key for source in share.sources)
        for number in range(self.num_batches):
            begin, end = self._end(worker, number), self._end(worker, number + 1)
            positions = order.given[begin:end]
            rows = ahead.take(positions)
            if not rows or self._behind(worker, number) <= self.skip:
                yield {"skipped": len(rows)}
                continue
            # Seeded per chunk, random transforms are the same with and without a skip.
            may_draw = not is_known and any(row is not None for row in rows)
            seeds = may_draw or self.augment is not None
            with _seeded(*entropy, number) if seeds else nullcontext():
                pixels, labels = arrivals.decoded(order, positions, rows, self.normalized)
                if self.augment is not None:
                    pixels = torch.stack([self.augment(image, None) for image in pixels])
            yield {"pixel_values": pixels, "labels": labels}

    def _end(self, worker: int, number: int) -> int:
        """Return how many examples are in a worker's first ``number`` chunks."""
        return len(self.shares[worker]) * number // self.num_batches

    def _behind(self, worker: int, number: int) -> int:
        """Return how many examples have come by the end of a chunk; workers take turns."""
        turns = range(len(self.shares))
        return sum(self._end(other, number + (other <= worker)) for other in turns)


class _Arrivals:
    """The arrivals of some sources, and where each source begins in its own."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.arrivals = list({id(source.arrival): source.arrival for source in sources}.values())
        numbers = {id(arrival): number for number, arrival in enumerate(self.arrivals)}
        self.numbers = np.array([numbers[id(source.arrival)] for source in sources], dtype=np.int64)
        self.firsts = np.array([source.first for source in sources], dtype=np.int64)

    def decoded(
        self, order: Order, positions: np.ndarray, rows: Sequence[Row | None], normalized: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the images and labels at some positions of an order, in the order given."""
        sources = order.sources[positions]
        places, of_row = self.firsts[sources] + order.places[positions], self.numbers[sources]
        parts = []
        for number in np.unique(of_row).tolist():
            at, arrival = np.flatnonzero(of_row == number), self.arrivals[number]
            pixels, labels = _read(arrival, places[at], [rows[place] for place in at.tolist()])
            parts.append((at, arrival.normalized(pixels) if normalized else pixels, labels))
        return parts[0][1:] if len(parts) == 1 else put_together(parts)


def _read(
    arrival: StreamedImages, places: np.ndarray, rows: Sequence[Row | None]
) -> tuple[Tensor, Tensor]:
    """Return the images, not normalized, and labels of an arrival's examples, and keep them.

    Args:
        arrival: the arrival.
        places: of the examples.
        rows: the examples, encoded; None where they are kept.
    """
    kept = arrival.kept
    if kept is None:
        return arrival.decode_pixels([row for row in rows if row is not None])
    pixels, labels, missing = kept.read(places.tolist())
    if missing:
        gone = sorted({int(places[n]) for n in missing if rows[n] is None})
        again = dict(zip(gone, (row for _, row in rows_at([arrival], gone)), strict=True))
        decoded, theirs = arrival.decode_pixels([rows[n] or again[int(places[n])] for n in missing])
        for number, image, label in zip(missing, decoded, theirs.tolist(), strict=True):
            kept.write(int(places[number]), image, label)
            pixels[number], labels[number] = image, label
    return pixels, labels
