"""What a Trainer trains on and minimizes, drawn for the gradient pass without a trace.

Flow: the Trainer's loader → what its own sampler draws first → its dataset, collator and number of
workers → this process's minibatches; the Trainer's ``_prepare_inputs`` and ``compute_loss`` → a
loss of one minibatch.
Differs from iterating the loader: samplers, random generators, positions and the state of gradient
accumulation are left as they were.
"""

import copy
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerState, TrainingArguments

from hf_dash.data.stream_loader import in_turn
from hf_dash.data.streams import is_shardable, share_minibatches
from hf_dash.method.batches import (
    Batch,
    count_images,
    loader_over,
    newest_samples,
    samplers_of,
    split_labels,
)
from hf_dash.method.gradients import LossFn
from hf_dash.method.preserve import states_preserved
from hf_dash.utils.logging import get_logger

if TYPE_CHECKING:
    from torch.optim import Optimizer

logger = get_logger(__name__, main_process_only=True)

# Shards of a stream that are read at a time.
OPEN_SHARDS = 16


@dataclass
class Training:
    """What a shrink needs of the training it is part of, as a Trainer shows it to callbacks."""

    args: TrainingArguments
    state: TrainerState
    model: nn.Module
    optimizer: "Optimizer | None"
    loader: "DataLoader[Any]"

    def batches(self, gradient_dataset: Any, newest: int | None) -> Iterable[Batch]:
        """Draw batches from ``gradient_dataset``, or where it is None from the training data."""
        if gradient_dataset is None:
            return training_batches(self.loader, self.args, newest, int(self.state.epoch or 0))
        # Less than the argument says, where the Trainer had to try smaller batches.
        size = self.state.train_batch_size or self.args.train_batch_size
        return newest_of_dataset(gradient_dataset, self.loader, self.args, newest, size)


def training_batches(
    loader: Any, args: TrainingArguments, newest: int | None, epoch: int = 0
) -> Iterable[Batch]:
    """Draw the first batches that training will see, without touching the loader's state.

    Args:
        loader: the Trainer's own; of a sequential sampler the last batches are drawn, which are the
            newest. Where it is not a ``DataLoader``, its own iterator is read.
        args: give this process's place among all.
        newest: number of batches; None reads the data once.
        epoch: that training is about to begin, which samplers may depend on.

    Returns:
        This process's share. A smaller batch at the end is left out, unless it is the only one.

    Raises:
        ValueError: what is read would be missing in training, since it can be read only once; or
            all is to be read of a sampler that has no end.
    """
    _refuse_one_shot(loader)
    if not isinstance(loader, DataLoader):
        return islice(iter(loader), newest)
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        _refuse_one_shot(dataset)
        # Accelerate may have given each process its share already.
        is_share = type(dataset).__name__ == "IterableDatasetShard"
        inner = getattr(dataset, "dataset", dataset) if is_share else dataset
        _refuse_one_shot(inner)
        return _begin_of_stream(inner, loader, args, newest, loader.batch_size)
    samplers = samplers_of(loader)
    with states_preserved(samplers):
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        samples = newest_samples(loader, newest, ordered=False)
    if len(samples) > 1 and isinstance(samples[0], list) and len(samples[-1]) < len(samples[0]):
        samples = samples[:-1]
    return loader_over(loader, samples)


def _refuse_one_shot(source: Any) -> None:
    """Refuse to take from an iterator, or a dataset around one, what training would then miss."""
    held = [source, *vars(source).values()] if hasattr(source, "__dict__") else [source]
    found = [one for one in held if isinstance(one, Iterator) and not isinstance(one, io.IOBase)]
    if found:
        raise ValueError(
            f"the training data come from {type(found[0]).__name__}, which can be read only once:"
            " what the shrink reads would be missing in training; give the callback"
            " gradient_dataset= or batches="
        )


def newest_of_dataset(
    dataset: Any,
    loader: "DataLoader[Any]",
    args: TrainingArguments,
    newest: int | None,
    batch_size: int,
) -> Iterator[Batch]:
    """Read the newest batches of a dataset ordered from oldest to newest.

    Args:
        dataset: map-style: its tail is read, in order, batches counted from the newest example
            backwards; a stream: its first batches, since its end cannot be seen from its
            beginning, taken from its shards in turn.
        loader: the Trainer's; its collator makes the batches, and of two ``datasets`` datasets
            only the columns that the Trainer's has are read where ``remove_unused_columns`` says.
        args: give this process's place among all.
        newest: number of batches; None reads the dataset once.
        batch_size: of each process.

    Returns:
        This process's share, the same number of batches on every process.
    """
    if args.remove_unused_columns:
        dataset = _with_columns_of(dataset, loader.dataset)
    if isinstance(dataset, IterableDataset):
        return _begin_of_stream(dataset, loader, args, newest, batch_size)
    world = args.world_size
    bounds = sorted({0, *range(len(dataset), 0, -batch_size * world)})
    shares = share_minibatches(bounds, world, args.process_index)
    shares = shares if newest is None else shares[-newest:]
    own = [list(share) for share in shares]
    return iter(
        DataLoader(
            dataset,
            batch_sampler=own,
            collate_fn=loader.collate_fn,
            num_workers=min(loader.num_workers, len(own)),
            worker_init_fn=loader.worker_init_fn,
        )
    )


def _begin_of_stream(
    dataset: "IterableDataset[Any]",
    loader: "DataLoader[Any]",
    args: TrainingArguments,
    newest: int | None,
    batch_size: int | None,
) -> Iterator[Batch]:
    # A stream begins anew with every iterator; each process takes every world-th batch, and what
    # the end of the stream cannot give to all of them equally is left out.
    rank, world, workers = args.process_index, args.world_size, loader.num_workers
    if newest is not None and AcrossShards.takes(dataset):
        dataset, workers = AcrossShards(dataset), 0
    batches = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=loader.collate_fn,
        drop_last=world > 1 and batch_size is not None,
        num_workers=workers,
        worker_init_fn=loader.worker_init_fn,
    )
    groups = zip(*[iter(batches)] * world, strict=False)
    return _watched(group[rank] for group in islice(groups, newest))


class AcrossShards(IterableDataset[Any]):
    """A stream's examples, taken from its shards in turn, so that the first ones are of many.

    Args:
        stream: see :meth:`takes`.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    @staticmethod
    def takes(stream: Any) -> bool:
        """Check that it is a stream of several shards, which together hold each example once."""
        is_stream = isinstance(stream, datasets.IterableDataset)
        return is_stream and stream.num_shards > 1 and is_shardable(stream._ex_iterable)

    def __iter__(self) -> Iterator[Any]:
        count = self.stream.num_shards
        step = math.ceil(count / OPEN_SHARDS)
        for first in range(step):
            shards = [self.stream.shard(count, index) for index in range(first, count, step)]
            yield from in_turn([iter(shard) for shard in shards])


def _watched(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches; say at their end if all of their images were of one class."""
    classes: set[int] = set()
    images = 0
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            classes.update(labels.tolist())
            images += len(labels)
        yield batch
    if images > 1 and len(classes) == 1:
        logger.warning(
            "all %d images of the gradient pass have the label %d: the stream is sorted by class;"
            " shuffle it, or give the callback gradient_dataset= with mixed images",
            *(images, *classes),
        )


def _with_columns_of(dataset: Any, training: Any) -> Any:
    """Drop columns that the Trainer has dropped from its own dataset."""
    wanted, present = (getattr(each, "column_names", None) for each in (training, dataset))
    if not wanted or not present:
        return dataset
    return dataset.select_columns([name for name in present if name in wanted])


class TrainerLoss:
    """The loss that a Trainer computes in training, as a function of model and batch.

    Batches are opaque: they go through ``_prepare_inputs`` and ``compute_loss`` as in training, so
    label smoothing, ``compute_loss_func`` and overrides of both are honored, in the Trainer's own
    context. Where the Trainer would count the items of all accumulated batches, those of the one
    batch are counted: the loss is its mean, up to a factor that all batches share.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        trainer, named = self.trainer, self._named(model, batch)
        items = _counted(trainer, named)
        # A copy, since compute_loss takes the labels out of what it is given.
        inputs = copy.copy(trainer._prepare_inputs(named))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        return cast(Tensor, loss)

    def count_items(self, batch: Batch) -> int:
        """Return how many items the loss of a batch is the mean of."""
        items = _counted(self.trainer, batch)
        return count_images(batch) if items is None else int(items)

    def _named(self, model: nn.Module, batch: Any) -> Any:
        """Return a pair as the keyword arguments that the Trainer's own ``compute_loss`` needs."""
        trainer = self.trainer
        own = isinstance(trainer, Trainer)
        own = own and type(trainer).compute_loss is not Trainer.compute_loss
        if own or not isinstance(batch, list | tuple) or len(batch) != 2:
            return batch
        images, labels = split_labels(batch)
        return {getattr(model, "main_input_name", "pixel_values"): images, "labels": labels}


def _counted(trainer: Trainer, batch: Any) -> Tensor | None:
    counts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    labels = batch.get("labels") if counts and isinstance(batch, Mapping) else None
    return labels.ne(-100).sum() if isinstance(labels, Tensor) else None


def prepared(trainer: Trainer, loss_fn: LossFn) -> LossFn:
    """Return a loss function whose batches are prepared as in training."""

    def loss_of_prepared(model: nn.Module, batch: Batch) -> Tensor:
        known = isinstance(batch, Mapping | list | tuple)
        return loss_fn(model, trainer._prepare_inputs(cast(Any, batch)) if known else batch)

    return loss_of_prepared
