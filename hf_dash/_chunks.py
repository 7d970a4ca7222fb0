"""Chunks of decoded examples, as the workers of a ``StreamLoader`` make them.

Flow: arrivals → the sources of one worker of one process → shuffled while encoded → decoded.
Source: the shuffle buffer is that of ``IterableDataset.shuffle``.
Differs from ``split_dataset_by_node`` and an ``IterableDataset`` in a ``DataLoader``: those select
other examples from a stream whose order matters (after ``skip``, ``take``, …), and let workers idle
for want of shards.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from hf_dash.augmentation import Augment
from hf_dash.streams import StreamedImages

Chunk = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What one worker of one process reads of one arrival: one shard of it, every so often.

    Args:
        arrival: to read.
        num_shards: into which the arrival is cut.
        shard: which of them this is.
        first: position of the first example in the shard.
        step: distance between examples.
    """

    arrival: StreamedImages
    num_shards: int = 1
    shard: int = 0
    first: int = 0
    step: int = 1

    @property
    def key(self) -> tuple[int, ...]:
        """What tells the sources of one arrival apart."""
        return self.num_shards, self.shard, self.first, self.step

    def items(self) -> Iterator[Any]:
        """Yield encoded images and labels in the order of the stream, or where they are cached."""
        if self.arrival.cache:
            return iter(range(len(self.arrival.decoded[self.key][1])))
        return self.rows()

    def rows(self) -> Iterator[tuple[Any, int]]:
        """Yield encoded images and labels in the order of the stream."""
        return self.arrival.rows(
            self.first, self.step, num_shards=self.num_shards, shard=self.shard
        )

    def decode(self, items: list[Any]) -> tuple[Tensor, Tensor]:
        """Return the images and labels of some items."""
        if self.arrival.cache:
            pixels, labels = self.arrival.decoded[self.key]
            return pixels[items], labels[items]
        return self.arrival.decode(items)


def sources_of(
    arrival: StreamedImages, num_processes: int, process_index: int, num_workers: int, worker: int
) -> list[Source]:
    """Return what a worker reads: all workers of all processes read every example once.

    Shards go to processes where each gets equally many, then to workers where each gets one;
    otherwise every reader takes each n-th example.
    """
    shards = arrival.num_shards
    if shards % num_processes != 0:
        first, step = process_index + num_processes * worker, num_processes * num_workers
        return [Source(arrival, first=first, step=step)]
    own = range(process_index, shards, num_processes)
    if len(own) < num_workers:
        return [Source(arrival, shards, shard, worker, num_workers) for shard in own]
    return [Source(arrival, shards, shard) for shard in own[worker::num_workers]]


def count_share(arrival: StreamedImages, num_processes: int, process_index: int) -> int:
    """Return how many examples of an arrival one process reads; reads its shards where it must."""
    if num_processes == 1:
        return len(arrival)
    shards = arrival.num_shards
    if shards % num_processes != 0:
        return len(range(process_index, len(arrival), num_processes))
    return sum(arrival.count(shards, i) for i in range(process_index, shards, num_processes))


def _items(sources: list[Source]) -> Iterator[tuple[int, dict[str, Any]]]:
    for source in sources:
        for number, item in enumerate(source.items()):
            yield number, {"source": source, "item": item}


def _decode(sources: list[Source], items: list[Any]) -> tuple[Tensor, Tensor]:
    """Return the images and labels of items of several sources, in the order given."""
    places: dict[Source, list[int]] = {}
    for place, source in enumerate(sources):
        places.setdefault(source, []).append(place)
    parts = [source.decode([items[i] for i in at]) for source, at in places.items()]
    order = torch.tensor([place for at in places.values() for place in at]).argsort()
    pixels, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return pixels[order], labels[order]


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Seed python, numpy and torch on the CPU, and put their states back on leaving."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # No device is named: a forked worker may not touch one.
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _this_worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


@dataclass(frozen=True)
class Reader(TorchIterableDataset[Chunk]):
    """The chunks of one process in one epoch, at most ``batch_size`` examples each."""

    arrivals: tuple[StreamedImages, ...]
    batch_size: int
    seed: int
    buffer_size: int
    num_workers: int
    num_processes: int
    process_index: int
    augment: Augment | None = None
    epoch: int = 0
    skip: int = 0

    def sources(self, worker: int) -> list[Source]:
        ranks = self.num_processes, self.process_index
        workers = max(1, self.num_workers)
        return [s for a in self.arrivals for s in sources_of(a, *ranks, workers, worker)]

    def __iter__(self) -> Iterator[Chunk]:
        return self.chunks(_this_worker()[0])

    def chunks(self, worker: int) -> Iterator[Chunk]:
        """Yield one worker's chunks; of one that is to be skipped only how long it is."""
        own = self.process_index, worker
        stream = IterableDataset(ExamplesIterable(_items, {"sources": self.sources(worker)}))
        stream = stream.shuffle(
            generator=np.random.default_rng([self.seed, *own]), buffer_size=self.buffer_size
        )
        stream.set_epoch(self.epoch)
        for number, columns in enumerate(stream.iter(self.batch_size)):
            # Workers take turns, so no more than these examples come before the end of this chunk.
            if (number * max(1, self.num_workers) + worker + 1) * self.batch_size <= self.skip:
                yield {"skipped": len(columns["item"])}
                continue
            # Seeded chunk by chunk, random transforms go on after a skip as they would have.
            with _seeded(self.seed, self.epoch, *own, number):
                pixels, labels = _decode(columns["source"], columns["item"])
                if self.augment is not None:
                    pixels = torch.stack([self.augment(image, None) for image in pixels])
            yield {"pixel_values": pixels, "labels": labels}


@dataclass(frozen=True)
class Decoder(TorchIterableDataset[tuple[int, Tensor, Tensor]]):
    """All examples of some sources, decoded, in chunks."""

    sources: tuple[Source, ...]
    batch_size: int

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        worker, workers = _this_worker()
        for number in range(worker, len(self.sources), workers):
            rows = self.sources[number].rows()
            while chunk := list(islice(rows, self.batch_size)):
                yield number, *self.sources[number].arrival.decode(chunk)


def in_turn(iterators: list[Iterator[Chunk]]) -> Iterator[Chunk]:
    """Yield as a ``DataLoader`` does of its workers: one from each, leaving out the exhausted."""
    while iterators:
        for iterator in list(iterators):
            chunk = next(iterator, None)
            if chunk is None:
                iterators.remove(iterator)
            else:
                yield chunk
