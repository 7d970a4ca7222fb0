"""Which examples each worker of each process reads.

Flow: the blocks of all arrivals, counted by all processes together → shared out among processes,
cut where that makes them equal → shared out whole among the workers of each.
Differs from ``split_dataset_by_node`` and the shards of a ``DataLoader``: processes get equally
many examples, and no shard is read by every process because their numbers do not match.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby, pairwise, repeat

import numpy as np
from torch import Tensor

from hf_dash.data.batches import cut_evenly
from hf_dash.data.streams import Block, Row, StreamedImages
from hf_dash.utils.distributed import gather

# A place in a source, unless nobody counted it, and what is there, unless it is kept.
Item = tuple[int | None, Row | None]


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
    def block(self) -> Block:
        """The block."""
        return self.arrival.blocks[self.number]

    def cut(self, sizes: Iterable[int]) -> "list[Source]":
        """Return parts of these sizes that follow one another."""
        ends = accumulate(sizes, initial=self.begin)
        return [replace(self, begin=a, end=b) for a, b in pairwise(ends) if b > a]

    @property
    def is_kept(self) -> bool:
        """Whether loaders have kept all of it."""
        kept = self.arrival.kept
        return kept is not None and kept.hold(range(self._begin, self._begin + len(self)))

    @property
    def _begin(self) -> int:
        return self.arrival.begins[self.number] + self.begin

    def items(self, generator: np.random.Generator) -> Iterator[Item]:
        """Yield places and what is to be decoded there: nothing where all is kept."""
        order: Sequence[int] = range(len(self))
        if self.block.scattered:
            order = generator.permutation(len(self)).tolist()
        if self.is_kept:
            return zip(order, repeat(None), strict=False)
        rows = self.block.rows([self.begin + place for place in order])
        # A stream may hold more than was counted, which is noticed later.
        return zip(chain(order, repeat(None)), rows, strict=False)

    def decode(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Return the images and labels of these items, before images are normalized."""
        places, kept = [place for place, _ in items if place is not None], self.arrival.kept
        if kept is None or len(places) < len(items):
            return self.arrival.decode_pixels([row for _, row in items if row is not None])
        pixels, labels, missing = kept.read([self._begin + place for place in places])
        if missing:
            rows = self._rows([items[number] for number in missing])
            decoded, theirs = self.arrival.decode_pixels(rows)
            for number, image, label in zip(missing, decoded, theirs.tolist(), strict=True):
                kept.write(self._begin + places[number], image, label)
                pixels[number], labels[number] = image, label
        return pixels, labels

    def _rows(self, items: Sequence[Item]) -> list[Row]:
        """Return encoded images; what was kept, and is gone since, is read from the stream."""
        gone = {self.begin + place for place, row in items if row is None and place is not None}
        again = zip(sorted(gone), self.block.rows(sorted(gone)), strict=False)
        rows: dict[int | None, Row] = {place - self.begin: row for place, row in again}
        return [rows[place] if row is None else row for place, row in items]


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
