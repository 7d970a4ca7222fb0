"""The order in which a reader reads the examples of an epoch, and that in which it gives them.

Flow: sources → lines of examples that follow one another, several for each arrival → mixed as a
full shuffle mixes lines → a buffer of what was read → the order of an epoch, as positions alone:
nothing is read.
Source: the shuffle buffer of ``IterableDataset.shuffle``; systematic sampling (Madow, 1949).
Differs from both: row groups whose images are mostly of one class come evenly spaced, so that a
stream sorted by class is mixed as well as its buffer allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_dash.data.shares import Share, Source
from hf_dash.data.streams import StreamedImages
from hf_dash.utils.logging import get_logger, warn_once

logger = get_logger(__name__, main_process_only=True)

# Row groups of an arrival that are open at a time, at most, if the buffer is that large.
OPEN = 16

# Share of one class from which on a row group is sorted.
SORTED = 0.9

NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Order:
    """The order of an epoch.

    Args:
        sources: [read] number of each example's source, in the order in which they are read.
        places: [read] its place in the source.
        given: [examples] positions in these, in the order in which examples are given.
    """

    sources: np.ndarray
    places: np.ndarray
    given: np.ndarray


def epoch_order(share: Share, buffer_size: int, generator: np.random.Generator) -> Order:
    """Return the order of an epoch of one reader.

    Args:
        share: what it reads.
        buffer_size: number of examples from which the next one is drawn, at least 1.
        generator: of the epoch.
    """
    starts = np.cumsum([0, *map(len, share.sources)])
    read, given, num_read = [NOTHING], [], 0
    for numbers, count in zip(share.parts, share.counts, strict=True):
        own, first = [NOTHING], num_read
        # Where more are wanted than there are, all come again.
        while num_read - first < count:
            ids, order = _once(share.sources, numbers, starts, buffer_size, generator)
            own.append(num_read + order)
            read.append(ids)
            num_read += len(ids)
        given.append(np.concatenate(own)[:count])
    ids = np.concatenate(read)
    sources = np.searchsorted(starts, ids, side="right") - 1
    # Held for an epoch: half the memory, while a reader has less than two billion examples.
    kind = np.int32 if len(ids) < 1 << 31 else np.int64
    columns = sources, ids - starts[sources], interleaved(given)
    return Order(*(column.astype(kind) for column in columns))


def _once(
    sources: Sequence[Source],
    numbers: Sequence[int],
    starts: np.ndarray,
    buffer_size: int,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return all examples of some sources as they are read, and the order in which they leave."""
    by_arrival: dict[tuple[int, bool], list[int]] = {}
    for number in numbers:
        key = id(sources[number].arrival), sources[number].block.scattered
        by_arrival.setdefault(key, []).append(number)
    lines, in_order = [], True
    for (_, scattered), own in by_arrival.items():
        spans = [np.arange(starts[number], starts[number + 1]) for number in own]
        if scattered:
            lines.append(generator.permutation(np.concatenate(spans)))
            continue
        in_order = False
        order = spread([sources[number].kind for number in own], generator).tolist()
        at_once = max(1, min(OPEN, buffer_size * len(spans) // sum(map(len, spans)), len(spans)))
        for first in range(at_once):
            lines.append(np.concatenate([spans[place] for place in order[first::at_once]]))
    ids = mixed(lines, generator)
    # What is read in random order need not wait for others.
    return ids, np.arange(len(ids)) if in_order else buffered(len(ids), buffer_size, generator)


def spread(kinds: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Return a random order of things in which those of each kind are evenly spaced.

    Example:
        >>> import numpy as np
        >>> from hf_dash.data.mixing import spread
        >>> order = spread([7, 7, 7, 9, 9, 9], np.random.default_rng(0))
        >>> [sorted({7: "a", 9: "b"}[k] for k in np.array([7, 7, 7, 9, 9, 9])[order[i : i + 2]])
        ...  for i in (0, 2, 4)]
        [['a', 'b'], ['a', 'b'], ['a', 'b']]
    """
    order = generator.permutation(len(kinds))
    own = np.asarray(kinds, dtype=np.int64)[order]
    at = np.empty(len(kinds))
    for kind in np.unique(own).tolist():
        alike = np.flatnonzero(own == kind)
        at[alike] = (np.arange(len(alike)) + generator.random()) / len(alike)
    return order[np.argsort(at, kind="stable")]


def mixed(lines: Sequence[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Return the items of all lines, mixed as a full shuffle does; those of a line keep its order.

    Example:
        >>> import numpy as np
        >>> from hf_dash.data.mixing import mixed
        >>> both = mixed([np.arange(3), np.arange(10, 12)], np.random.default_rng(0))
        >>> both[both < 10].tolist(), both[both >= 10].tolist()
        ([0, 1, 2], [10, 11])
    """
    line = generator.permutation(np.repeat(np.arange(len(lines)), [*map(len, lines)]))
    items = np.empty(len(line), dtype=np.int64)
    items[np.argsort(line, kind="stable")] = np.concatenate([NOTHING, *lines])
    return items


def buffered(count: int, buffer_size: int, generator: np.random.Generator) -> np.ndarray:
    """Return the order in which items leave a buffer, each drawn at random, for the next to come.

    Args:
        count: number of items.
        buffer_size: at least 1.
        generator: draws.

    Example:
        >>> import numpy as np
        >>> from hf_dash.data.mixing import buffered
        >>> buffered(5, buffer_size=1, generator=np.random.default_rng(0)).tolist()
        [0, 1, 2, 3, 4]
    """
    size = min(buffer_size, count)
    # Where each item lies in the buffer: that of the item which leaves for it.
    slots = np.concatenate([np.arange(size), generator.integers(size, size=count - size)])
    items = np.argsort(slots, kind="stable")
    stays = np.append(np.diff(slots[items]) != 0, True)[: len(items)]
    order = np.empty(count, dtype=np.int64)
    successors = items[1:][~stays[:-1]]
    order[successors - size] = items[:-1][~stays[:-1]]
    order[count - size :] = generator.permutation(items[stays])
    return order


def interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the items of all parts, those of each part in order and evenly spaced.

    Example:
        >>> import numpy as np
        >>> from hf_dash.data.mixing import interleaved
        >>> interleaved([np.arange(4), np.arange(10, 12)]).tolist()
        [0, 10, 1, 2, 11, 3]
    """
    at = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts]
    return np.concatenate(parts)[np.argsort(np.concatenate(at), kind="stable")]


def say_sorted(arrivals: Sequence[StreamedImages], buffer_size: int) -> None:
    """Say once if row groups fill a buffer with images of one class, and others are to come."""
    for arrival in arrivals:
        large = [
            np.bincount(block.labels)
            for block in arrival.blocks
            if block.whole and block.labels is not None and len(block) >= buffer_size
        ]
        counts = [own for own in large if own.max() >= SORTED * own.sum()]
        if counts and len(set(arrival.labels)) > 1:
            warn_once(
                logger,
                "row groups are sorted by class, and one of %d images fills the buffer of %d:"
                " batches hold few classes; write smaller row groups, or shuffle images before you"
                " write them",
                *(counts[0].sum(), buffer_size),
            )
