"""Stop a ``Trainer`` once the training accuracy of an epoch is high enough.

Flow: every training step → right answers and images are counted from the logits it computed
anyway → the epoch ends → one sum over all ranks → ``train_accuracy`` is logged → stop or go on.
Source: the convergence criterion of Shin et al. (arXiv:2410.23495): training accuracy over an epoch
of at least 99.9 %.
Differs: counted while the weights change, as ``train_round`` does, without a second pass.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_dash.method.batches import split_labels
from hf_dash.trainer.logging import DeferredLog
from hf_dash.utils.checks import check_number
from hf_dash.utils.distributed import mean_across_ranks_

BIND = "trainer.add_callback(TrainAccuracyStop().bind(trainer))"


class TrainAccuracyStop(DeferredLog):
    """Log ``train_accuracy`` after every epoch and end training where it reaches the threshold.

    Best used as ``trainer.add_callback(TrainAccuracyStop().bind(trainer))``: the labels are then
    read before the Trainer or its subclass takes them out of the batch, and the number goes through
    ``Trainer.log`` to all that ``report_to`` names. Without ``bind`` the labels must reach the
    model, which label smoothing and ``compute_loss_func`` prevent; and the number, though in
    ``state.log_history`` at once, is printed with the Trainer's next log, behind the trackers.

    ``train_accuracy`` is that of the last counted epoch, in [0, 1], or None. Evaluation and the
    gradient pass of ``DashCallback`` do not count. Where images cannot be shared out equally among
    processes, the few that Accelerate repeats count twice. An epoch that ``max_steps`` cuts short
    is counted as far as it went; one that a resumed run begins in its middle is not judged.

    Args:
        threshold: training accuracy over an epoch at which training ends, in (0, 1].

    Raises:
        TypeError, ValueError: ``threshold`` is not a number, or out of its range.

    Example:
        >>> from hf_dash import TrainAccuracyStop
        >>> stop = TrainAccuracyStop(0.95)
        >>> stop.threshold, stop.train_accuracy
        (0.95, None)
        >>> # trainer.add_callback(stop.bind(trainer)); trainer.train()
    """

    def __init__(self, threshold: float = 0.999) -> None:
        super().__init__()
        self.threshold = check_number("threshold", threshold, "(0, 1]", 0.0, 1.0)
        self.train_accuracy: float | None = None
        self._trainer: Trainer | None = None
        self._hook: Any = None
        self._counts: Tensor | None = None
        self._resumed_inside = False

    def bind(self, trainer: Trainer) -> "TrainAccuracyStop":
        """Count in ``trainer.compute_loss``, whatever it does with the labels; return itself.

        Raises:
            TypeError: ``trainer`` is not a ``Trainer``.
            ValueError: the callback is bound to another one.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
        if self._trainer is trainer:
            return self
        if self._trainer is not None:
            raise ValueError("trainer must be the one this callback is bound to: make another one")
        compute_loss = trainer.compute_loss

        @functools.wraps(compute_loss)
        def counted(
            model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            if not model.training:
                return compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            labels = _labels_of(inputs)  # before they are taken out
            computed = compute_loss(model, inputs, return_outputs=True, **kwargs)
            if not isinstance(computed, tuple) or len(computed) != 2:
                raise ValueError(
                    "TrainAccuracyStop needs a compute_loss that returns (loss, outputs) where"
                    f" return_outputs=True, got {type(computed).__name__}"
                )
            self._count(computed[1], labels)
            return computed if return_outputs else computed[0]

        trainer.compute_loss = counted  # type: ignore[method-assign, assignment]
        self._trainer = trainer
        return self

    def on_train_begin(  # type: ignore[override]  # the Trainer passes more by keyword
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Make ready to count; say so where labels would not arrive."""
        self.train_accuracy = None
        self._resumed_inside = not float(state.epoch or 0.0).is_integer()
        self._unhook()
        if self._trainer is not None:
            return
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}: the Trainer then takes"
                f" the labels out of the batch, unseen by TrainAccuracyStop; use {BIND}"
            )
        self._hook = model.register_forward_hook(self._after_forward, with_kwargs=True)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Begin to count anew."""
        # Right answers and images; read once an epoch, so that no step waits for the device.
        self._counts = torch.zeros(2, dtype=torch.int64, device=args.device)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Log the epoch's accuracy over all ranks, and stop where it is high enough.

        Raises:
            ValueError: not one image was counted in the epoch.
        """
        counts, self._counts = self._counts, None
        if counts is None:
            return
        right, images = mean_across_ranks_(counts.float()).tolist()
        if self._resumed_inside:
            self._resumed_inside = False
            return
        if images == 0:
            if control.should_training_stop:  # the data had nothing left
                return
            raise ValueError(f"TrainAccuracyStop saw no training forward pass; use {BIND}")
        self.train_accuracy = right / images
        self._log(self.train_accuracy, state, control)
        if self.train_accuracy >= self.threshold:
            control.should_training_stop = True

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the model as it was."""
        self._unhook()

    def _log(self, accuracy: float, state: TrainerState, control: TrainerControl) -> None:
        logs = {"train_accuracy": accuracy}
        if self._trainer is None:
            self.log_later(logs, state, epoch=state.epoch)
            return
        # Logging withdraws the wish to log, which the Trainer's own loss may still need.
        should_log = control.should_log
        self._trainer.log(logs)
        control.should_log = should_log

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(
        self, module: nn.Module, positional: tuple[Any, ...], inputs: dict[str, Any], outputs: Any
    ) -> None:
        if module.training and torch.is_grad_enabled():
            self._count(outputs, _labels_of(inputs))

    @torch.no_grad()
    def _count(self, outputs: Any, labels: Tensor) -> None:
        if self._counts is None:  # called outside of an epoch
            return
        logits = _logits_of(outputs)
        classes = labels.argmax(dim=-1) if labels.is_floating_point() else labels
        if logits.ndim != 2 or classes.shape != logits.shape[:1]:
            raise ValueError(
                "TrainAccuracyStop needs logits of shape [batch, classes] and labels of shape"
                f" [batch], got {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        right = (logits.argmax(dim=-1) == classes).sum()
        self._counts += torch.stack([right, torch.full_like(right, len(classes))])

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _labels_of(inputs: Any) -> Tensor:
    try:
        return split_labels(inputs)[1]
    except ValueError as error:
        raise ValueError(
            f"TrainAccuracyStop needs labels: {error}; where they are taken out before the model,"
            f" use {BIND}"
        ) from None


def _logits_of(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "TrainAccuracyStop needs outputs with logits: a mapping or an object with 'logits', or"
            f" the tensor itself, got {type(outputs).__name__}"
            + (f" with {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else "")
        )
    return logits
