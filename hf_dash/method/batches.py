"""Minibatches for the gradient pass: the newest K of them, on the device, checked.

Flow: any iterable, oldest to newest → its newest K → (inputs on the model's device, image count).
Source: in Algorithm 1 the gradient of the t-th newest minibatch has weight α(1 − α)^t, so only the
newest few matter (see ``DashConfig.newest``).
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

Batch = Mapping[str, Any] | Sequence[Any]

LABEL_KEYS = ("labels", "label")

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def newest_batches(batches: Iterable[Batch], newest: int | None) -> Iterator[Batch]:
    """Yield the newest ``newest`` minibatches of ``batches``, oldest of them first.

    A sequence or a loader over ordered map-style data is cut to its end without touching the rest.
    A shuffled loader carries no age: its first ``newest`` batches are as good as any. Anything else
    is read through to its end while only the newest are kept, so it must be finite.

    Args:
        batches: minibatches ordered from oldest to newest.
        newest: how many to keep, at least 1; None keeps all.
    """
    # A generator: nothing is read before the pass, which tells other processes of what goes wrong.
    length = _length(batches)
    if newest is None:
        yield from batches
    elif isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset):
        if is_shuffled(batches):
            yield from islice(batches, newest)
        else:
            yield from _tail_of_loader(batches, newest)
    elif isinstance(batches, Sequence):
        yield from batches[max(0, len(batches) - newest) :]
    elif length is not None:
        yield from islice(batches, max(0, length - newest), None)
    else:
        yield from deque(batches, maxlen=newest)


def _length(batches: Iterable[Batch]) -> int | None:
    """Return the number of minibatches where it is known: a loader of a stream only claims to."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def is_shuffled(loader: "DataLoader[Any]") -> bool:
    """Tell whether a map-style loader draws its examples at random."""
    # A loader that was given a batch sampler has a meaningless default in ``sampler``; the real
    # one is inside, under layers of batch samplers where Accelerate has prepared the loader.
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while sampler is not None:
        if isinstance(sampler, _RANDOM_SAMPLERS) or getattr(sampler, "shuffle", False):
            return True
        inner = getattr(sampler, "batch_sampler", None)
        sampler = getattr(sampler, "sampler", None) if inner is None else inner
    return False


def _tail_of_loader(loader: "DataLoader[Any]", newest: int) -> "DataLoader[Any]":
    """Return a loader over the last batches only, so that earlier images are never decoded."""
    samples = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    tail = deque(samples, maxlen=newest)
    # Without a batch sampler the dataset itself makes batches: its "indices" are one per batch.
    batching: dict[str, Any] = (
        {"batch_sampler": list(tail)}
        if loader.batch_sampler is not None
        else {"sampler": list(tail), "batch_size": None}
    )
    return DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        **batching,
    )


def split_labels(batch: Batch) -> tuple[Any, Tensor]:
    """Part a batch into its inputs and its labels.

    Args:
        batch: a mapping with ``labels`` (or ``label``) among its keys, or a pair (images, labels).

    Returns:
        The images and the labels: int64 of shape [batch], or class probabilities as floats of
        shape [batch, classes].

    Raises:
        TypeError: the batch is neither a mapping nor a sequence, or its labels are no tensor.
        ValueError: it has no labels.
    """
    if isinstance(batch, Mapping):
        key = next((key for key in LABEL_KEYS if key in batch), None)
        if key is None:
            raise ValueError(
                f"batch has no labels: its keys are {sorted(map(str, batch))}, one of"
                f" {LABEL_KEYS} is needed"
            )
        inputs, labels = {name: batch[name] for name in batch if name != key}, batch[key]
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        if len(batch) != 2:
            raise ValueError(
                f"batch has no labels: a pair (images, labels) is needed, got {len(batch)} items"
            )
        inputs, labels = batch
    else:
        raise TypeError(
            "batch must be a mapping with labels or a pair (images, labels), got"
            f" {type(batch).__name__}"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels of a batch must be a tensor, got {type(labels).__name__}")
    return inputs, labels


def count_images(batch: Batch) -> int:
    """Return the number of images in a batch: the first dimension of its labels."""
    return int(split_labels(batch)[1].shape[0])


def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[float, Batch]]:
    """Cut a batch into pieces of at most ``size`` images.

    Args:
        batch: as :func:`split_labels` takes it; every tensor in it whose first dimension is the
            number of images is cut, anything else goes with every piece.
        size: at least 1; None keeps the batch whole.

    Yields:
        Each piece after its share of the images, so that the shares of all add up to 1 and the
        mean loss over the batch is the sum of share × mean loss of the piece.
    """
    images = count_images(batch)
    if size is None or images <= size:
        yield 1.0, batch
        return
    for begin in range(0, images, size):
        end = min(begin + size, images)
        yield (end - begin) / images, _rows(batch, begin, end, images)


def _rows(value: Any, begin: int, end: int, images: int) -> Any:
    if isinstance(value, Tensor):
        return value[begin:end] if value.ndim and value.shape[0] == images else value
    if isinstance(value, Mapping):
        return {key: _rows(item, begin, end, images) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rows(item, begin, end, images) for item in value]
    return value


def check_labels(labels: Tensor, num_classes: int | None) -> None:
    """Check that integer labels name classes the model has.

    Args:
        labels: integers of shape [batch]; floats (class probabilities) pass unchecked.
        num_classes: the number of classes, or None where it is not known.

    Raises:
        ValueError: a label is negative or ``num_classes`` or more.
    """
    if num_classes is None or labels.is_floating_point() or labels.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 1} for a model of {num_classes} classes, got"
            f" labels from {low} to {high}"
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor in it on ``device``."""
    from accelerate.utils import send_to_device

    moved: Batch = send_to_device(batch, device)
    return moved


def derive_max_steps(
    num_examples: int,
    batch_size: int,
    num_processes: int,
    num_epochs: float,
    gradient_accumulation_steps: int = 1,
) -> int:
    """Return ``max_steps`` for a ``Trainer`` that cannot know the length of its stream.

    Args:
        num_examples: in one epoch, over all processes.
        batch_size: per process and forward pass.
        num_processes: that train together.
        num_epochs: greater than 0.
        gradient_accumulation_steps: forward passes in one optimizer step. What an epoch has left
            over gets no step of its own: a ``Trainer`` without a length carries it on into the
            next epoch's first step, and ends with its last step.

    Raises:
        ValueError: an argument is out of its range, or an epoch is too short for a single step.
    """
    given = {
        "num_examples": num_examples,
        "batch_size": batch_size,
        "num_processes": num_processes,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not num_epochs > 0:
        raise ValueError(f"num_epochs must be greater than 0, got {num_epochs}")
    batches = math.ceil(num_examples / (batch_size * num_processes))
    if batches < gradient_accumulation_steps:
        raise ValueError(
            f"gradient_accumulation_steps is {gradient_accumulation_steps}, but an epoch has only"
            f" {batches} batches: a Trainer without a length would never take a step"
        )
    return math.ceil(num_epochs * (batches // gradient_accumulation_steps))
