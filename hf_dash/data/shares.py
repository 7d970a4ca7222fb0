"""Which examples each worker of each process reads.

Flow: the blocks of all arrivals, counted by all processes together → shared out among processes,
cut where that makes them equal → shared out whole among the workers of each.
Differs from ``split_dataset_by_node`` and the shards of a ``DataLoader``: processes get equally
many examples, and no shard is read by every process because their numbers do not match.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
from torch import Tensor

from hf_dash.data.batches import cut_evenly
from hf_dash.data.streams import Block, StreamedImages
from hf_dash.utils.distributed import gather


@dataclass(frozen=True)
class Source:
    """The part of one arrival's block that one worker of one process reads.

    Args:
        arrival: the arrival.
        number: of the block.
        begin: place of the first example in the block.
        end: place behind the last one.
    """

    arrival: StreamedImages
    number: int
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def key(self) -> tuple[int, int, int]:
        """Identifies a source among those of its arrival."""
        return self.number, self.begin, self.end

    @property
    def block(self) -> Block:
        """The block."""
        return self.arrival.blocks[self.number]

    def cut(self, sizes: Iterable[int]) -> "list[Source]":
        """Return parts of these sizes that follow one another."""
        ends = accumulate(sizes, initial=self.begin)
        return [replace(self, begin=a, end=b) for a, b in pairwise(ends) if b > a]

    def items(self, generator: np.random.Generator) -> Iterator[Any]:
        """Yield encoded images and labels, or positions in the cache."""
        order: Sequence[int] = range(len(self))
        if self.block.scattered:
            order = generator.permutation(len(self)).tolist()
        if not self.arrival.cache:
            return self.block.rows([self.begin + place for place in order])
        held = len(self.arrival.decoded[self.key][1])
        return iter(order if held == len(self) else range(held))

    def rows(self) -> Iterator[tuple[Any, int]]:
        """Yield encoded images and labels in the arrival's order."""
        return self.block.rows(range(self.begin, self.end))

    def decode(self, items: list[Any]) -> tuple[Tensor, Tensor]:
        """Return the images and labels of these items."""
        if self.arrival.cache:
            pixels, labels = self.arrival.decoded[self.key]
            return self.arrival.normalized(pixels[items]), labels[items]
        return self.arrival.decode(items)


def sources_of(
    arrivals: Sequence[StreamedImages], num_processes: int, process_index: int, num_workers: int
) -> list[list[Source]]:
    """Return what each worker of one process reads; together, all read every example once."""
    whole = [
        Source(arrival, number, 0, len(block))
        for arrival in arrivals
        for number, block in enumerate(arrival.blocks)
        if len(block)
    ]
    own = share_out(whole, num_processes, exact=True)[process_index]
    return share_out(own, max(1, num_workers))


def share_out(
    sources: Sequence[Source], num_readers: int, *, exact: bool = False
) -> list[list[Source]]:
    """Share sources out among readers, each arrival as evenly as its blocks allow.

    Args:
        sources: those of an arrival follow one another.
        num_readers: at least 1.
        exact: cut blocks so that every reader has as many examples as the others, or one more;
            at most ``num_readers`` − 1 of those that are best read whole are read twice.

    Returns:
        The sources of each reader.
    """
    if num_readers == 1:
        return [list(sources)]
    room = np.array(cut_evenly(sum(map(len, sources)), num_readers))
    shares: list[list[Source]] = [[] for _ in range(num_readers)]
    for _, group in groupby(sources, key=lambda source: id(source.arrival)):
        parts = _divided(list(group), num_readers)
        # The largest first, each to the reader with the most room.
        for part in sorted(parts, key=len, reverse=True):
            rest = [part]
            while rest:
                reader = int(room.argmax())
                taken = min(len(rest[0]), int(room[reader])) if exact else len(rest[0])
                first, *rest = rest[0].cut([taken, len(rest[0]) - taken])
                shares[reader].append(first)
                room[reader] -= taken
    return shares


def _divided(sources: list[Source], num_readers: int) -> list[Source]:
    """Cut what can be read in parts: single examples always, others if they are few."""
    few = len(sources) < num_readers
    parts = []
    for source in sources:
        divisible = source.block.scattered or (few and not source.block.whole)
        count = min(num_readers, len(source)) if divisible else min(1, len(source))
        parts += source.cut(cut_evenly(len(source), count))
    return parts


def count_together(
    arrivals: Sequence[StreamedImages], num_processes: int, process_index: int
) -> None:
    """Count the shards of streams, each on one process; a failure on one fails on all."""
    if num_processes == 1:
        return
    shards = [(a, shard) for a in arrivals for shard in a.uncounted]
    counts: list[int] = []
    failure = None
    try:
        counts = [arrival.count(shard) for arrival, shard in shards[process_index::num_processes]]
    except Exception as error:
        failure = error
    told = gather((counts, None if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(told):
        if message is not None:
            raise RuntimeError(f"counting the examples failed on rank {rank}: {message}")
    if len(told) != num_processes:
        raise ValueError(f"num_processes is {num_processes}, but the process group has {len(told)}")
    found = {
        shard: told[n % num_processes][0][n // num_processes] for n, shard in enumerate(shards)
    }
    for arrival in arrivals:
        if arrival.uncounted:
            arrival.set_sizes([found[arrival, shard] for shard in arrival.uncounted])
