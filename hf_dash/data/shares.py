"""Which examples each worker of each process reads.

Flow: the blocks of all arrivals, counted by all processes together → shared out among processes,
cut where that makes them equal → shared out whole among the workers of each.
Differs from ``split_dataset_by_node`` and the shards of a ``DataLoader``: processes get equally
many examples, and no shard is read by every process because their numbers do not match.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

import numpy as np

from hf_dash.data.batches import cut_evenly
from hf_dash.data.streams import Block, Row, StreamedImages
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
    def block(self) -> Block:
        """The block."""
        return self.arrival.blocks[self.number]

    def cut(self, sizes: Iterable[int]) -> "list[Source]":
        """Return parts of these sizes that follow one another."""
        ends = accumulate(sizes, initial=self.begin)
        return [replace(self, begin=a, end=b) for a, b in pairwise(ends) if b > a]

    @property
    def first(self) -> int:
        """The place of its first example in the arrival."""
        return self.arrival.begins[self.number] + self.begin

    @property
    def kind(self) -> int:
        """The class of most of its examples; 0 if that is not known."""
        labels = self.block.labels
        return 0 if labels is None else int(np.bincount(labels[self.begin : self.end]).argmax())

    @property
    def is_kept(self) -> bool:
        """Whether loaders have kept all of it."""
        kept = self.arrival.kept
        return kept is not None and kept.hold(range(self.first, self.first + len(self)))

    def rows(self, places: np.ndarray) -> Iterator[Row]:
        """Yield encoded images and labels; places ascend unless the block is scattered."""
        return self.block.rows((self.begin + places).tolist())


@dataclass(frozen=True)
class Share:
    """What one reader reads in an epoch.

    Args:
        sources: all that it reads.
        parts: numbers of the sources whose examples are mixed in proportion to their sizes; parts
            are mixed in proportion to their counts.
        counts: number of examples of each part in an epoch, which may be less or more than there
            are.
    """

    sources: tuple[Source, ...]
    parts: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)


def shares_of(
    arrivals: Sequence[StreamedImages],
    num_processes: int,
    process_index: int,
    num_workers: int,
    new_share: float | None = None,
) -> tuple[Share, ...]:
    """Return what each worker of one process reads; together, all read every example once.

    Args:
        arrivals: the last one is new.
        num_processes: that share the examples.
        process_index: of this process.
        num_workers: readers of this process; 0 is one.
        new_share: share of the new examples, in (0, 1), in as many as there are in all; None reads
            every example once.

    Raises:
        ValueError: ``new_share`` is set, and there are fewer old or new examples than processes.
    """
    ranks = num_processes, process_index, num_workers
    num_old, num_new = sum(map(len, arrivals[:-1])), len(arrivals[-1])
    if new_share is None or not num_old:
        return tuple(_joined([(own, sum(map(len, own)))]) for own in sources_of(arrivals, *ranks))
    if min(num_old, num_new) < num_processes:
        raise ValueError(
            f"new_share must be None where there are fewer old or new examples than the"
            f" {num_processes} processes, got {new_share!r} with {num_old} and {num_new}"
        )
    count = cut_evenly(num_old + num_new, num_processes)[process_index]
    wanted = max(1, min(count - 1, round(count * new_share)))
    parts = [sources_of(arrivals[:-1], *ranks), sources_of(arrivals[-1:], *ranks)]
    counts = [
        _in_proportion(number, [sum(map(len, own)) for own in shares])
        for number, shares in zip((count - wanted, wanted), parts, strict=True)
    ]
    return tuple(
        _joined([(old, old_count), (new, new_count)])
        for old, new, old_count, new_count in zip(*parts, *counts, strict=True)
    )


def _joined(parts: Sequence[tuple[Sequence[Source], int]]) -> Share:
    ends = [*accumulate((len(sources) for sources, _ in parts), initial=0)]
    return Share(
        tuple(source for sources, _ in parts for source in sources),
        tuple(tuple(range(begin, end)) for begin, end in pairwise(ends)),
        tuple(count for _, count in parts),
    )


def _in_proportion(number: int, sizes: Sequence[int]) -> list[int]:
    """Share a number out in proportion to sizes, of which one is above 0."""
    ends = [number * end // sum(sizes) for end in accumulate(sizes, initial=0)]
    return [end - begin for begin, end in pairwise(ends)]


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
