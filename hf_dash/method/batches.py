"""Minibatches for the gradient pass: the newest K of them, on the device, checked.

Flow: any iterable, oldest to newest → its newest K → (inputs on the model's device, image count).
Source: in Algorithm 1 the gradient of the t-th newest minibatch has weight α(1 − α)^t, so only the
newest few matter (see ``DashConfig.newest``).
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import count, cycle, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hf_dash.method.preserve import states_preserved
from hf_dash.utils.distributed import num_processes, process_index
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

Batch = Mapping[str, Any] | Sequence[Any]

LABEL_KEYS = ("labels", "label")

# Batches read from an iterator before its user is asked whether it has an end.
MANY_BATCHES = 10_000

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def newest_batches(
    batches: Iterable[Batch], newest: int | None, *, ordered: bool = True
) -> Iterator[Batch]:
    """Yield the newest ``newest`` minibatches of ``batches``, oldest of them first.

    A sequence or a loader over ordered map-style data is cut to its end without touching the rest.
    Where there is no age, any batches are as good: of a shuffled loader, of one whose sampler has
    no end, and of ``itertools.cycle`` the first ``newest`` are read. Anything else is read through
    to its end while only the newest are kept, so it must be finite.

    Args:
        batches: minibatches ordered from oldest to newest.
        newest: how many to keep, at least 1; None keeps all.
        ordered: whether samplers of an unknown kind go from the oldest to the newest example.

    Raises:
        ValueError: all are to be kept of batches that have no end.
    """
    # A generator: nothing is read before the pass, which tells other processes of what goes wrong.
    length = _length(batches)
    if newest is None:
        if _is_endless(batches):
            raise ValueError(
                "batches have no end, so they cannot all be read: give num_batches, or tolerance"
                " above 0"
            )
        yield from batches
    elif isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset):
        yield from loader_over(batches, newest_samples(batches, newest, ordered=ordered))
    elif isinstance(batches, Sequence):
        yield from batches[max(0, len(batches) - newest) :]
    elif length is not None:
        yield from islice(batches, max(0, length - newest), None)
    elif _is_endless(batches):
        yield from islice(batches, newest)
    else:
        yield from deque(_announced(batches), maxlen=newest)


def _length(batches: Iterable[Any]) -> int | None:
    """Return the number of minibatches where it is known: a loader of a stream only claims to."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def _is_endless(batches: Iterable[Batch]) -> bool:
    """Tell what is known to have no end: these iterators, and samplers without a length."""
    if isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset):
        return _length(_samples_of(batches)) is None
    return isinstance(batches, cycle | repeat | count)


def _announced(batches: Iterable[Batch]) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        if number == MANY_BATCHES:
            logger.warning(
                "DASH: %d minibatches read and no end yet; if they have none, give"
                " itertools.islice(batches, n)",
                number,
            )
        yield batch


def is_shuffled(loader: "DataLoader[Any]") -> bool:
    """Tell whether a map-style loader draws its examples at random."""
    return any(
        isinstance(sampler, _RANDOM_SAMPLERS) or getattr(sampler, "shuffle", False)
        for sampler in samplers_of(loader)
    )


def samplers_of(loader: "DataLoader[Any]") -> list[Any]:
    """Return a loader's samplers, from the outermost to the innermost."""
    # A loader that was given a batch sampler has a meaningless default in ``sampler``; the real
    # one is inside, under layers of batch samplers where Accelerate has prepared the loader.
    found: list[Any] = []
    sampler: Any = _samples_of(loader)
    while sampler is not None and sampler not in found:
        found.append(sampler)
        inner = getattr(sampler, "batch_sampler", None)
        sampler = getattr(sampler, "sampler", None) if inner is None else inner
    return found


def _samples_of(loader: "DataLoader[Any]") -> Iterable[Any]:
    """Return the indices of each batch; single ones where the dataset itself makes batches."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def newest_samples(loader: "DataLoader[Any]", newest: int | None, *, ordered: bool) -> list[Any]:
    """Return what a map-style loader's sampler draws for its newest batches, and leave no trace.

    Args:
        loader, ordered: as :func:`newest_batches` takes them.
        newest: number of batches of this process; None takes all.

    Returns:
        A list of indices per batch; single ones if the loader has no batch sampler.
    """
    # Only a loader of this kind shares out the batches when it reads them, not when it samples.
    shared = any(cls.__name__ == "DataLoaderDispatcher" for cls in type(loader).__mro__)
    world = num_processes() if shared else 1
    samples, length = _samples_of(loader), _length(_samples_of(loader))
    in_order = ordered or any(isinstance(s, SequentialSampler) for s in samplers_of(loader))
    if newest is None and length is None:
        raise ValueError(
            "the loader's sampler has no end, so it cannot be read to it: give num_batches, or"
            " tolerance above 0"
        )
    first, last = 0, length
    if newest is not None and length is not None and in_order and not is_shuffled(loader):
        # No more than the length says: some samplers that have one go on for ever.
        first = max(0, length // world - newest) * world
    elif newest is not None:
        last = newest * world
    with states_preserved(samplers_of(loader)):
        drawn = list(islice(samples, first, last))
    return drawn[process_index() :: world][: len(drawn) // world] if shared else drawn


def loader_over(loader: "DataLoader[Any]", samples: list[Any]) -> "DataLoader[Any]":
    """Return a loader like ``loader`` over some of what its sampler draws.

    Args:
        loader: map-style.
        samples: as :func:`newest_samples` returns them.
    """
    # Without a batch sampler the dataset itself makes batches: its "indices" are one per batch.
    options: dict[str, Any] = {"batch_sampler": samples}
    if loader.batch_sampler is None:
        options = {"sampler": samples, "batch_size": None}
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
    return DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=min(loader.num_workers, len(samples)),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
        **options,
    )


def split_labels(batch: Batch) -> tuple[Any, Tensor]:
    """Part a batch into its inputs and its labels.

    Args:
        batch: a mapping with ``labels`` (or ``label``) among its keys, or a pair (images, labels).

    Returns:
        The images and the labels: int64 of shape [batch], or class probabilities as floats of
        shape [batch, classes].

    Raises:
        TypeError: the batch is neither a mapping nor a sequence, or its labels are not a tensor.
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


def count_images(batch: Any) -> int:
    """Return the number of images in a batch: the leading dimension of the first tensor in it.

    Args:
        batch: of any form. A list in it, such as one of images of different sizes, counts by its
            length; what holds no tensor by its own, or as one image where it has none.
    """
    found = _count(batch, top=True)
    if found is not None:
        return found
    return len(batch) if isinstance(batch, Sized) else 1


def _count(value: Any, top: bool = False) -> int | None:
    if isinstance(value, Tensor):
        return int(value.shape[0]) if value.ndim else None
    if isinstance(value, Mapping):
        return next((n for item in value.values() if (n := _count(item)) is not None), None)
    if isinstance(value, list | tuple) and value:
        rows = not top or isinstance(value[0], Mapping)
        return (
            len(value) if rows else next((n for v in value if (n := _count(v)) is not None), None)
        )
    return None


def micro_batches(batch: Any, size: int | None) -> Iterator[Any]:
    """Cut a batch into pieces of at most ``size`` images.

    Args:
        batch: of any form; every tensor and list in it whose length is the number of images is cut,
            anything else goes with every piece.
        size: at least 1; None keeps the batch whole.
    """
    images = count_images(batch)
    if size is None or images <= size:
        yield batch
        return
    for begin in range(0, images, size):
        yield _rows(batch, begin, min(begin + size, images), images, top=True)


def _rows(value: Any, begin: int, end: int, images: int, top: bool = False) -> Any:
    if isinstance(value, Tensor):
        return value[begin:end] if value.ndim and value.shape[0] == images else value
    if isinstance(value, Mapping):
        return {key: _rows(item, begin, end, images) for key, item in value.items()}
    if isinstance(value, list | tuple):
        per_image = not top or (len(value) > 0 and isinstance(value[0], Mapping))
        if per_image and len(value) == images:
            return value[begin:end]
        return [_rows(item, begin, end, images) for item in value]
    return value


def check_labels(labels: Tensor, num_classes: int | None, ignore_index: int | None = None) -> None:
    """Check that integer labels name classes the model has.

    Args:
        labels: integers of shape [batch]; floats (class probabilities) pass unchecked.
        num_classes: the number of classes, or None where it is not known.
        ignore_index: a label that stands for none and passes.

    Raises:
        ValueError: a label is negative or ``num_classes`` or more.
    """
    labels = labels if ignore_index is None else labels[labels != ignore_index]
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

    Example:
        >>> from hf_dash.method import derive_max_steps
        >>> derive_max_steps(1000, batch_size=32, num_processes=2, num_epochs=3)
        48
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
