"""Shuffled training batches straight from streams, on every process the same number of them.

Flow: arrivals → chunks, read, shuffled and decoded in workers → batches, cut in the main process.
Differs from a ``DataLoader`` of a stream: processes that hold fewer examples end with the others,
and a loader resumes with exactly the batches that would have followed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset

from hf_dash._chunks import Chunk, Decoder, Reader, Source, count_share, in_turn
from hf_dash.augmentation import Augment
from hf_dash.distributed import gather
from hf_dash.streams import StreamedImages


def _after(chunks: Iterator[Chunk], skip: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels from the example number ``skip`` on."""
    for chunk in chunks:
        length = chunk["skipped"] if "skipped" in chunk else len(chunk["labels"])
        if length > skip:
            yield chunk["pixel_values"][skip:], chunk["labels"][skip:]
        skip = max(0, skip - length)


def _cut(parts: Iterator[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> Iterator[Chunk]:
    """Cut parts of any length into batches of these sizes.

    Raises:
        ValueError: the parts hold more or fewer examples in all.
    """
    held: list[tuple[Tensor, Tensor]] = []
    for size in sizes:
        while sum(len(labels) for _, labels in held) < size:
            part = next(parts, None)
            if part is None:
                raise ValueError("num_examples is more than a stream holds")
            held.append(part)
        pixels, labels = (
            part[0] if len(part) == 1 else torch.cat(part) for part in zip(*held, strict=True)
        )
        yield {"pixel_values": pixels[:size], "labels": labels[:size]}
        held = [(pixels[size:], labels[size:])] if len(labels) > size else []
    if held or next(parts, None) is not None:
        raise ValueError("num_examples is less than a stream holds")


def _gather_counts(
    arrivals: Sequence[StreamedImages], num_processes: int, process_index: int
) -> list[int]:
    """Return how many examples each process holds; what fails on one of them fails on all."""
    if num_processes == 1:
        return [sum(len(arrival) for arrival in arrivals)]
    count, failure = 0, None
    try:
        count = sum(count_share(a, num_processes, process_index) for a in arrivals)
    except Exception as error:
        failure = error
    told = gather((count, None if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(told):
        if message is not None:
            raise RuntimeError(f"counting the examples failed on rank {rank}: {message}")
    if len(told) != num_processes:
        raise ValueError(f"num_processes is {num_processes}, but the process group has {len(told)}")
    return [count for count, _ in told]


def _batch_sizes(counts: Sequence[int], process_index: int, batch_size: int) -> list[int]:
    """Return the batch sizes of one process, of which all have equally many."""
    num_batches = math.ceil(max(counts) / batch_size)
    if min(counts) < max(1, num_batches):
        raise ValueError(
            f"every process needs an example for each of the {max(1, num_batches)} batches, got"
            f" {list(counts)} examples by process; give the stream a number of shards that the"
            " number of processes divides evenly, or one that it does not divide"
        )
    count = counts[process_index]
    if len(set(counts)) == 1:
        return [min(batch_size, count - begin) for begin in range(0, count, batch_size)]
    ends = [count * number // num_batches for number in range(num_batches + 1)]
    return [end - begin for begin, end in pairwise(ends)]


class StreamLoader:
    """Shuffled training batches of streams: ``pixel_values`` [b, c, h, w], ``labels`` [b] int64.

    Iterating yields the batches of one epoch, on the CPU, and goes on to the next epoch at its end.
    The order is drawn anew in every epoch from ``seed`` and the epoch; it also depends on
    ``buffer_size`` and the numbers of workers and processes. All processes must make the loader at
    the same time: they agree on one number of batches. Where they hold unequally many examples,
    each cuts its own into that many batches whose sizes differ by at most one, so none is lost or
    repeated and no process waits for another.

    Args:
        arrivals: what to train on, at least one.
        batch_size: images per batch and process, at least 1.
        seed: of the order and of random transforms, at least 0.
        buffer_size: number of encoded images among which a worker draws, at least 1.
        num_workers: processes that read and decode; 0 does so in this one.
        num_processes: that share the examples out among themselves.
        process_index: which of them this is.
        augment: from one image tensor to another of the same shape, drawn anew in every epoch.

    Raises:
        RuntimeError: another process failed to count its examples.
        ValueError: an argument is out of its range, only some arrivals have ``cache`` set, or a
            process has fewer examples than batches (on all processes); while iterating, an
            arrival's ``num_examples`` is not what its stream holds.
    """

    def __init__(
        self,
        arrivals: Sequence[StreamedImages],
        batch_size: int,
        *,
        seed: int,
        buffer_size: int = 1000,
        num_workers: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        augment: Augment | None = None,
    ) -> None:
        lowest = {"batch_size": (batch_size, 1), "seed": (seed, 0), "buffer_size": (buffer_size, 1)}
        lowest |= {"num_workers": (num_workers, 0), "num_processes": (num_processes, 1)}
        for name, (value, low) in lowest.items():
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if not 0 <= process_index < num_processes:
            raise ValueError(
                f"process_index must be in 0 … {num_processes - 1}, got {process_index}"
            )
        if len({arrival.cache for arrival in arrivals}) != 1:
            raise ValueError(
                "arrivals must be at least one, all with cache or all without, got"
                f" {[arrival.cache for arrival in arrivals]}"
            )
        ranks = num_processes, process_index
        self._reader = Reader(
            tuple(arrivals), batch_size, seed, buffer_size, num_workers, *ranks, augment
        )
        self._counts = _gather_counts(arrivals, *ranks)
        self._sizes = _batch_sizes(self._counts, process_index, batch_size)
        self._epoch = self._batches = self._first = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Chunk]:
        epoch, first = self._epoch, self._first
        self._batches, self._first = first, 0
        skip = sum(self._sizes[:first])
        reader = replace(self._reader, epoch=epoch, skip=skip)
        for batch in _cut(_after(self._chunks(reader), skip), self._sizes[first:]):
            self._batches += 1
            yield batch
        self._epoch, self._batches = epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of this epoch; of another one than now, from its beginning."""
        if epoch != self._epoch:
            self._epoch, self._batches, self._first = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the batches already yielded of it, and what the order depends on."""
        whole = self._batches == len(self)
        reader = self._reader
        return {
            "epoch": self._epoch + whole,
            "batches": 0 if whole else self._batches,
            "counts": list(self._counts),
            "batch_size": reader.batch_size,
            "seed": reader.seed,
            "buffer_size": reader.buffer_size,
            "num_workers": max(1, reader.num_workers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration yield the batches that would have followed, and only those.

        What comes before them is read but not decoded.

        Raises:
            ValueError: the state is of a loader with another order.
        """
        for name, own in self.state_dict().items():
            if name not in ("epoch", "batches") and state.get(name) != own:
                raise ValueError(
                    f"state is of a loader with {name} {state.get(name)}, this one has {own}"
                )
        self._epoch, self._batches, self._first = state["epoch"], state["batches"], state["batches"]

    def _chunks(self, reader: Reader) -> Iterator[Chunk]:
        workers = range(max(1, reader.num_workers))
        if reader.arrivals[0].cache:
            self._fill_cache([s for worker in workers for s in reader.sources(worker)])
            return in_turn([reader.chunks(worker) for worker in workers])
        return iter(self._load(reader))

    def _fill_cache(self, sources: list[Source]) -> None:
        """Decode what is not yet in memory, and forget what other loaders have left there."""
        for arrival in self._reader.arrivals:
            keys = {source.key for source in sources if source.arrival is arrival}
            arrival.decoded = {k: kept for k, kept in arrival.decoded.items() if k in keys}
        missing = tuple(s for s in sources if s.key not in s.arrival.decoded)
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in missing]
        if missing:
            for number, pixels, labels in self._load(Decoder(missing, self._reader.batch_size)):
                # A tensor from a worker holds a file open for as long as it lives: copied.
                parts[number].append((pixels.clone(), labels.clone()))
        for source, decoded in zip(missing, parts, strict=True):
            columns = zip(*decoded, strict=True) if decoded else ([torch.empty(0)],) * 2
            pixels, labels = (torch.cat(tuple(column)) for column in columns)
            source.arrival.decoded[source.key] = pixels, labels

    def _load(self, dataset: "TorchIterableDataset[Any]") -> "DataLoader[Any]":
        # A generator of its own: the loader draws from it, and training's draws stay as they are.
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._reader.num_workers,
            generator=torch.Generator().manual_seed(self._reader.seed),
        )
