"""Shuffled training batches straight from streams, the same number on every process.

Flow: the blocks of all arrivals → shared out among processes, then among their workers → each
worker's share of every batch, read in an order of its own and decoded → batches, cut in the main
process.
Differs from a ``DataLoader`` of a stream: every process has as many examples as the others, or one
more, so that each counts alike in a mean over processes; and a loader resumes with exactly the
batches that would have followed. Differs from ``split_dataset_by_node``, which selects different
examples from a stream whose order matters (after ``skip``, ``take``, …), and lets every process
read all shards where their number is not divisible.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset

from hf_dash.data.batches import cut_evenly
from hf_dash.data.examples import Augment
from hf_dash.data.image_batch import ImageBatch
from hf_dash.data.mixing import say_sorted
from hf_dash.data.reader import Chunk, Reader, this_worker
from hf_dash.data.shares import count_together, shares_of
from hf_dash.data.streams import StreamedImages
from hf_dash.utils.memory import empty_tensor

# How a seed becomes an order; another number marks another way.
ORDER = 3

# Examples that are read and decoded together where they are given one by one.
AT_ONCE = 32


def in_turn(iterators: list[Iterator[Chunk]]) -> Iterator[Chunk]:
    """Take one chunk from each iterator in turn, as a ``DataLoader`` does from its workers."""
    while iterators:
        for iterator in list(iterators):
            chunk = next(iterator, None)
            if chunk is None:
                iterators.remove(iterator)
            else:
                yield chunk


def _after(chunks: Iterator[Chunk], skip: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels, starting with example number ``skip``."""
    for chunk in chunks:
        length = chunk["skipped"] if "skipped" in chunk else len(chunk["labels"])
        if length > skip:
            yield chunk["pixel_values"][skip:], chunk["labels"][skip:]
        skip = max(0, skip - length)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    return torch.cat(tuple(parts), out=empty_tensor(shape, parts[0].dtype))


def cut_batches(parts: Iterator[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> Iterator[Chunk]:
    """Cut parts of any length into batches of these sizes.

    Raises:
        ValueError: the parts hold more or fewer examples in total.
    """
    held: list[tuple[Tensor, Tensor]] = []
    for size in sizes:
        while sum(len(labels) for _, labels in held) < size:
            part = next(parts, None)
            if part is None:
                raise ValueError("num_examples is more than a stream holds")
            held.append(part)
        pixels, labels = (
            part[0] if len(part) == 1 else _joined(part) for part in zip(*held, strict=True)
        )
        yield {"pixel_values": pixels[:size], "labels": labels[:size]}
        held = [(pixels[size:], labels[size:])] if len(labels) > size else []
    if held or next(parts, None) is not None:
        raise ValueError("num_examples is less than a stream holds")


def _batch_sizes(counts: Sequence[int], process_index: int, batch_size: int) -> list[int]:
    """Return the batch sizes of one process; all processes have the same number of batches."""
    num_batches = math.ceil(max(counts) / batch_size)
    if min(counts) < max(1, num_batches):
        raise ValueError(
            f"every process needs an example for each of the {max(1, num_batches)} batches, got"
            f" {list(counts)} examples by process; use larger batches or fewer processes"
        )
    return cut_evenly(counts[process_index], num_batches)


class StreamedExamples(TorchIterableDataset[dict[str, Any]]):
    """Streams as shuffled single examples, for a loader of somebody else's, such as a Trainer's.

    Each iteration yields the examples of an epoch once, normalized; a ``DataLoader``'s worker reads
    what a worker of :class:`StreamLoader` would.

    Args:
        arrivals: the streams to train on, at least one.
        seed: seed for the order and for random transforms, at least 0.
        buffer_size: number of encoded images a worker draws the next one from, at least 1.
        new_share: see :class:`StreamLoader`.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> stream = hf_dash.load_images("digits", split="test", streaming=True)
        >>> arrival = hf_dash.data.StreamedImages(stream, pil_to_tensor, num_examples=360)
        >>> examples = hf_dash.data.StreamedExamples([arrival], seed=0)
        >>> len([example["labels"] for example in examples])
        360
    """

    def __init__(
        self,
        arrivals: Sequence[StreamedImages],
        *,
        seed: int,
        buffer_size: int = 1000,
        new_share: float | None = None,
    ) -> None:
        self.arrivals, self.seed, self.buffer_size = tuple(arrivals), seed, buffer_size
        self.new_share = new_share
        say_sorted(self.arrivals, buffer_size)
        # Shared, so that workers that outlive an epoch see the next one.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration, in workers too."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, count = this_worker()
        shares = shares_of(self.arrivals, 1, 0, count, self.new_share)
        chunks = math.ceil(sum(map(len, self.arrivals)) / (AT_ONCE * count))
        order = AT_ONCE, self.seed, self.buffer_size, count, 0
        reader = Reader(shares, chunks, *order, epoch=int(self._epoch))
        for pixels, labels in _after(reader.chunks(worker), 0):
            for image, label in zip(pixels, labels.tolist(), strict=True):
                yield {"pixel_values": image, "labels": label}


class StreamLoader:
    """Shuffled training batches of streams: ``pixel_values`` [b, c, h, w], ``labels`` [b] int64.

    Each iteration yields the batches of one epoch, on the CPU; the next one yields the next epoch.
    A batch is a mapping whose images are bytes until they are used, see
    :class:`~hf_dash.data.image_batch.ImageBatch`.
    The order depends on ``seed``, the epoch, ``buffer_size`` and the numbers of workers and
    processes. All processes must create the loader together, because they agree on one number of
    batches. Each has as many examples as the others, or one more, and cuts them into that many
    batches whose sizes differ by at most one: no example is lost or repeated, and each
    counts alike.

    A worker holds ``buffer_size`` encoded images and, where row groups are read, as many again:
    those of up to 16 row groups of an arrival that are open at a time, or of one if it is larger.

    Every file is read once an epoch, whatever the number of workers; of ``num_processes``, at most
    ``num_processes`` − 1 row groups are read twice. A row group is read by one worker, so that
    fewer row groups than workers leave workers idle. A stream without blocks is read from its
    beginning by each of its readers, if its shards are fewer than they.

    Args:
        arrivals: the streams to train on, at least one.
        batch_size: images per batch and process, at least 1.
        seed: seed for the order and for random transforms, at least 0.
        buffer_size: number of encoded images a worker draws the next one from, at least 1.
        num_workers: processes that read and decode; 0 uses this one.
        num_processes: number of processes that share the examples.
        process_index: index of this process.
        augment: from an image tensor to another of the same shape, drawn again every epoch.
        new_share: share of the last arrival's images in every batch, in (0, 1), to within one image
            of each worker; None mixes in proportion. An epoch keeps its length: of the kind that is
            too few for it, images come again, and of the other some do not come.

    Raises:
        RuntimeError: another process failed to count its examples.
        ValueError: an argument is out of range, or a process has fewer examples than batches, or no
            old or new one for ``new_share`` (on all processes). While iterating: a stream does not
            hold ``num_examples`` examples.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> stream = hf_dash.load_images("digits", split="test", streaming=True)
        >>> arrival = hf_dash.data.StreamedImages(stream, pil_to_tensor, num_examples=360)
        >>> loader = hf_dash.data.StreamLoader([arrival], batch_size=60, seed=0)
        >>> len(loader), next(iter(loader))["pixel_values"].shape
        (6, torch.Size([60, 3, 32, 32]))
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
        new_share: float | None = None,
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
        if not arrivals:
            raise ValueError(f"arrivals must be at least one, got {list(arrivals)}")
        ranks = num_processes, process_index
        self._arrivals = tuple(arrivals)
        count_together(arrivals, *ranks)
        self._counts = cut_evenly(sum(map(len, arrivals)), num_processes)
        self._sizes = _batch_sizes(self._counts, process_index, batch_size)
        shares = shares_of(arrivals, *ranks, num_workers, new_share)
        say_sorted(arrivals, buffer_size)
        order = batch_size, seed, buffer_size, num_workers, process_index
        steps = [arrival.transform.normalize for arrival in arrivals]
        # Images travel as bytes if they can be normalized last, and all alike.
        last = augment is None and all(step is steps[0] for step in steps)
        self._normalize = steps[0] if last else None
        self._reader = Reader(shares, len(self._sizes), *order, augment, not last)
        self._epoch = self._batches = self._first = 0
        self._new_share = new_share

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[ImageBatch]:
        epoch, first = self._epoch, self._first
        self._batches, self._first = first, 0
        skip = sum(self._sizes[:first])
        reader = replace(self._reader, epoch=epoch, skip=skip)
        for batch in cut_batches(_after(self._chunks(reader), skip), self._sizes[first:]):
            self._batches += 1
            yield ImageBatch(batch["pixel_values"], batch["labels"], self._normalize)
        self._epoch, self._batches = epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration; a different epoch starts from its beginning."""
        if epoch != self._epoch:
            self._epoch, self._batches, self._first = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the batches yielded so far, and everything the order depends on."""
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
            "new_share": self._new_share,
            "order": ORDER,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batches that would have followed; earlier ones are not decoded.

        Raises:
            ValueError: the state belongs to a loader with another order.
        """
        for name, own in self.state_dict().items():
            if name not in ("epoch", "batches") and state.get(name) != own:
                raise ValueError(
                    f"state belongs to a loader with {name} {state.get(name)}, this one has {own}"
                )
        self._epoch, self._batches, self._first = state["epoch"], state["batches"], state["batches"]

    def _chunks(self, reader: Reader) -> Iterator[Chunk]:
        # Asked of each before workers start, so that they share the file of what is kept.
        kept = [source.is_kept for share in reader.shares for source in share.sources]
        if all(kept):
            return in_turn([reader.chunks(worker) for worker in range(len(reader.shares))])
        return iter(self._load(reader))

    def _load(self, dataset: "TorchIterableDataset[Any]") -> "DataLoader[Any]":
        # A separate generator, so that the loader does not disturb training's random state.
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._reader.num_workers,
            generator=torch.Generator().manual_seed(self._reader.seed),
        )
