"""DASH in a ``Trainer``, by one line: ``Trainer(..., callbacks=[DashCallback()])``.

Flow: ``train()`` begins → a few batches of the training data → ``dash_shrink_`` → fresh optimizer
state → the report is logged → training goes on as if nothing had been read.
Differs from ``dash_shrink_``: training data of a Trainer are shuffled and carry no age, so any K
batches do; give ``batches`` where the order of arrival is known.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_dash._files import write_text
from hf_dash._preserve import rng_preserved
from hf_dash.batches import Batch
from hf_dash.config import DashConfig, Grouping
from hf_dash.dash import dash_shrink_
from hf_dash.gradients import LossFn
from hf_dash.shrink import ShrinkReport

if TYPE_CHECKING:
    from torch.optim import Optimizer

logger = logging.get_logger(__name__)

REPORT_NAME = "dash_report.json"


class DashCallback(TrainerCallback):  # type: ignore[misc]
    """Shrink the model's weights when training begins, and never on resume.

    By default the gradients come from K batches of the Trainer's own training data, through its
    dataset and collator; whatever augmentation these contain stays in. ``report`` holds the last
    :class:`~hf_dash.shrink.ShrinkReport`; ``dash_report.json`` in the output directory says the
    same, and the Trainer's log its summary.

    Args:
        alpha: as in :func:`~hf_dash.dash.dash_shrink_`, like those that follow.
        lam: smallest factor.
        batches: minibatches from oldest to newest to use instead, with evaluation transforms;
            on several processes each one's own share.
        loss_fn: called as ``loss_fn(model, batch)``; the model's own loss by default.
        grouping: what one vector of a convolution is.
        tolerance: share of the moving average that may be left out; sets K.
        num_batches: K outright.
        micro_batch_size: images to compute at a time.
        include_frozen: shrink tensors that do not require gradients too.
        reset_optimizer: forget optimizer state that belongs to the weights before the shrink.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        lam: float = 0.3,
        *,
        batches: Iterable[Batch] | None = None,
        loss_fn: LossFn | None = None,
        grouping: Grouping = "kernel",
        tolerance: float = 1e-3,
        num_batches: int | None = None,
        micro_batch_size: int | None = None,
        include_frozen: bool = False,
        reset_optimizer: bool = True,
    ) -> None:
        self.config = DashConfig(
            alpha=alpha,
            lam=lam,
            grouping=grouping,
            tolerance=tolerance,
            num_batches=num_batches,
            micro_batch_size=micro_batch_size,
            include_frozen=include_frozen,
        )
        self.batches = batches
        self.loss_fn = loss_fn
        self.reset_optimizer = reset_optimizer
        self.report: ShrinkReport | None = None
        self._to_log: dict[str, float] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: "DataLoader[Any]",
        optimizer: "Optimizer | None" = None,
        **kwargs: Any,
    ) -> None:
        """Shrink, unless this training resumes one that has begun."""
        if state.global_step > 0:
            logger.info("DASH: training resumes at step %d, no shrink", state.global_step)
            return
        if getattr(args, "deepspeed", None):
            raise NotImplementedError(
                "DashCallback cannot shrink under DeepSpeed: the Trainer hands it the model without"
                " the engine, which would undo the shrink; call dash_shrink_ before trainer.train()"
            )
        with rng_preserved():
            batches = self.batches
            if batches is None:
                batches = sample_batches(train_dataloader, args, self.config.newest)
            self.report = dash_shrink_(
                model,
                batches,
                self.loss_fn,
                disable_tqdm=args.disable_tqdm or None,
                **self.config.arguments,
            )
        if self.reset_optimizer and optimizer is not None:
            reset_optimizer_(optimizer)
        if state.is_world_process_zero:
            output_dir = Path(args.output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            write_text(output_dir / REPORT_NAME, json.dumps(self.report.to_dict(), indent=1))
        self._to_log = self.report.summary()
        state.log_history.append({**self._to_log, "step": state.global_step})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the summary with the first numbers the Trainer itself logs."""
        if logs is not None:
            logs.update(self._to_log)
            self._to_log = {}


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
        # A stream begins anew with every iterator; each process takes every world-th batch, and
        # what the end of the stream cannot give to all of them equally is left out.
        batches = DataLoader(
            dataset, batch_size=size, collate_fn=loader.collate_fn, drop_last=world > 1
        )
        groups = zip(*[iter(batches)] * world, strict=False)
        return (group[rank] for group in islice(groups, newest))
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(dataset), generator=generator)  # type: ignore[arg-type]
    size = max(1, min(size, len(order) // world))
    count = len(order) // (size * world)
    count = count if newest is None else min(count, newest)
    mine = order[: count * size * world].tolist()[rank::world]
    subset = Subset(dataset, mine)
    return iter(DataLoader(subset, batch_size=size, collate_fn=loader.collate_fn))


def reset_optimizer_(optimizer: "Optimizer") -> None:
    """Forget an optimizer's state, such as momentum, in place; its settings stay."""
    optimizer.state.clear()
