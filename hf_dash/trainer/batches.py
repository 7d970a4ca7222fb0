"""What a Trainer trains on and minimizes, drawn for the gradient pass without a trace.

Flow: the Trainer's dataset (or one given instead) → its collator → this process's minibatches;
the Trainer's ``compute_loss`` → a loss of one minibatch.
Differs from the Trainer's own loader: nothing of it is iterated, so neither its samplers nor its
position, its workers or the state of gradient accumulation notice.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer, TrainerState, TrainingArguments

from hf_dash.data.streams import share_minibatches
from hf_dash.method.batches import Batch, split_labels
from hf_dash.method.gradients import LossFn

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass
class Training:
    """What a shrink needs of the training it is part of, as a Trainer shows it to callbacks."""

    args: TrainingArguments
    state: TrainerState
    model: nn.Module
    optimizer: "Optimizer | None"
    loader: "DataLoader[Any]"

    def batches(self, gradient_dataset: Any, newest: int | None) -> Iterator[Batch]:
        """Draw batches from ``gradient_dataset``, or where it is None from the training data."""
        if gradient_dataset is None:
            return sample_batches(self.loader, self.args, newest)
        return newest_of_dataset(gradient_dataset, self.loader, self.args, newest)


def sample_batches(
    loader: "DataLoader[Any]", args: TrainingArguments, newest: int | None
) -> Iterator[Batch]:
    """Draw batches from a Trainer's training data without touching its loader's state.

    Args:
        loader: the Trainer's; only its dataset and collator are used.
        args: give the batch size, the seed and this process's place among all.
        newest: number of batches; None reads the data once.

    Returns:
        This process's share: batches of ``per_device_train_batch_size``, the same number on every
        process and no smaller one at the end, unless the data make less than one.
    """
    dataset, size = loader.dataset, args.per_device_train_batch_size
    rank, world = args.process_index, args.world_size
    if isinstance(dataset, IterableDataset):
        return _begin_of_stream(dataset, loader, args, newest)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(dataset), generator=generator)  # type: ignore[arg-type]
    size = max(1, min(size, len(order) // world))
    count = len(order) // (size * world)
    count = count if newest is None else min(count, newest)
    mine = order[: count * size * world].tolist()[rank::world]
    subset = Subset(dataset, mine)
    return iter(DataLoader(subset, batch_size=size, collate_fn=loader.collate_fn))


def newest_of_dataset(
    dataset: Any, loader: "DataLoader[Any]", args: TrainingArguments, newest: int | None
) -> Iterator[Batch]:
    """Read the newest batches of a dataset ordered from oldest to newest.

    Args:
        dataset: map-style: its tail is read, in order, batches counted from the newest example
            backwards; a stream: its first batches, since its end cannot be seen from its beginning.
        loader: the Trainer's; its collator makes the batches, and of two ``datasets`` datasets
            only the columns that the Trainer's has are read where ``remove_unused_columns`` says.
        args: as :func:`sample_batches` takes them.
        newest: number of batches; None reads the dataset once.

    Returns:
        This process's share, the same number of batches on every process.
    """
    if args.remove_unused_columns:
        dataset = _with_columns_of(dataset, loader.dataset)
    if isinstance(dataset, IterableDataset):
        return _begin_of_stream(dataset, loader, args, newest)
    world = args.world_size
    bounds = sorted({0, *range(len(dataset), 0, -args.per_device_train_batch_size * world)})
    shares = share_minibatches(bounds, world, args.process_index)
    shares = shares if newest is None else shares[-newest:]
    own = [list(share) for share in shares]
    return iter(DataLoader(dataset, batch_sampler=own, collate_fn=loader.collate_fn))


def _begin_of_stream(
    dataset: "IterableDataset[Any]",
    loader: "DataLoader[Any]",
    args: TrainingArguments,
    newest: int | None,
) -> Iterator[Batch]:
    # A stream begins anew with every iterator; each process takes every world-th batch, and what
    # the end of the stream cannot give to all of them equally is left out.
    rank, world = args.process_index, args.world_size
    size = args.per_device_train_batch_size
    batches = DataLoader(
        dataset, batch_size=size, collate_fn=loader.collate_fn, drop_last=world > 1
    )
    groups = zip(*[iter(batches)] * world, strict=False)
    return (group[rank] for group in islice(groups, newest))


def _with_columns_of(dataset: Any, training: Any) -> Any:
    """Drop columns that the Trainer has dropped from its own dataset."""
    wanted, present = (getattr(each, "column_names", None) for each in (training, dataset))
    if not wanted or not present:
        return dataset
    return dataset.select_columns([name for name in present if name in wanted])


def trainer_loss(trainer: Trainer) -> LossFn:
    """Return the loss that a Trainer computes in training, as a function of model and batch.

    Label smoothing, ``compute_loss_func`` and a subclass's ``compute_loss`` are honoured, under
    the Trainer's own context. Where the Trainer would count the items of all accumulated batches,
    those of the one batch are counted: the loss is its mean, up to a factor that all batches share.
    """

    def loss_of_trainer(model: nn.Module, batch: Batch) -> Tensor:
        if isinstance(batch, Mapping):
            inputs = dict(batch)  # compute_loss takes the labels out of what it is given
        else:
            images, labels = split_labels(batch)
            inputs = {getattr(model, "main_input_name", "pixel_values"): images, "labels": labels}
        items = None
        if trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None:
            given = inputs.get("labels")
            items = given.ne(-100).sum() if isinstance(given, Tensor) else None
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        return loss

    return loss_of_trainer
