"""DASH in a ``Trainer``, by one line: ``Trainer(..., callbacks=[DashCallback()])``.

Flow: ``train()`` begins → a few batches of the training data → ``dash_shrink_`` → fresh optimizer
state → the report is logged → training continues as if nothing had been read.
Differs from ``dash_shrink_``: training data of a Trainer are shuffled and carry no age: any K
batches do, unless ``batches`` or ``gradient_dataset`` is given.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from hf_dash.method.batches import Batch
from hf_dash.method.config import SETTINGS, DashConfig, with_settings
from hf_dash.method.dash import dash_shrink_
from hf_dash.method.gradients import LossFn
from hf_dash.method.origin import with_origin
from hf_dash.method.preserve import rng_preserved
from hf_dash.method.shrink import ShrinkReport
from hf_dash.method.stale import reset_optimizer_
from hf_dash.method.wrappers import as_trained, unwrap
from hf_dash.trainer.batches import TrainerLoss, Training, prepared
from hf_dash.trainer.guards import check_past, mark_model
from hf_dash.trainer.logging import (
    DeferredLog,
    block_summary,
    draw_histograms,
    tag_model,
    write_report,
)
from hf_dash.utils.checks import check_count, check_flag
from hf_dash.utils.logging import get_logger

if TYPE_CHECKING:
    from torch.optim import Optimizer


When = Literal["train_begin", "epoch", "manual"]


def check_schedule(when: str, every_n_epochs: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` where these do not say when to shrink."""
    if when not in get_args(When):
        raise ValueError(f"when must be one of {get_args(When)}, got {when!r}")
    check_count("every_n_epochs", every_n_epochs)


def check_epochs(when: str, loader: "DataLoader[Any]") -> None:
    """Raise ``ValueError`` where epochs are to be counted that have no end to be known."""
    if when == "epoch" and not has_length(loader):
        raise ValueError(
            "when='epoch' needs training data with a length, and a stream has none: use"
            " when='train_begin', or when='manual' and shrink_()"
        )


def check_trainer(trainer: Trainer | None, state: TrainerState) -> None:
    """Raise ``ValueError`` where the Trainer that trains is not the one bound."""
    if trainer is not None and trainer.state is not state:
        raise ValueError(
            "this DashCallback is bound to another Trainer than the one that trains: bind it to"
            " this one, or give each Trainer a callback of its own"
        )


def refuse_duplicates(state: TrainerState) -> None:
    """Raise ``ValueError`` where a Trainer has more than one DashCallback."""
    callbacks = cast("dict[str, Any]", state.stateful_callbacks)  # declared as a list
    entries = [e if isinstance(e, list) else [e] for e in callbacks.values()]
    found = sum("shrunk_at" in one.get("attributes", {}) for entry in entries for one in entry)
    if found > 1:
        raise ValueError(
            f"a Trainer can have one DashCallback, got {found}, each of which would shrink: remove"
            " the others, e.g. by trainer.remove_callback(DashCallback)"
        )


def refuse_incomplete(lost: list[str]) -> None:
    """Raise ``ValueError`` where arguments were lost that the shrink depends on."""
    if lost:
        raise ValueError(
            f"this DashCallback was made anew from a checkpoint, which cannot hold {lost}: set"
            " restore_callback_states_from_checkpoint=False, it finds its steps without"
        )


logger = get_logger(__name__)

# Arguments that no checkpoint can hold.
NOT_SAVED = ("trainer", "batches", "gradient_dataset", "loss_fn")


class DashCallback(DeferredLog, ExportableState):
    """Shrink the model's weights when training begins, and never on resume.

    Every ``train()`` is a round: it shrinks once, in evaluation mode. By default the gradients come
    from K batches of the Trainer's own training data, through its dataset and collator; whatever
    augmentation these contain stays in, unless ``batches`` or ``gradient_dataset`` is given. A run
    that dies before its first checkpoint starts again from the weights it was given and shrinks
    them once; one that resumes from a checkpoint does not shrink again.

    The batches are those that the Trainer's own sampler, collator and workers make first.
    A Trainer does not show itself to its callbacks. Bound to it (``trainer=`` or :meth:`bind`) the
    callback prepares batches and computes the loss exactly as training does, comes before other
    callbacks that copy weights, and logs to every tracker; without, it uses the model's own loss,
    and the summary appears in the console, in ``trainer_state.json`` and in ``dash_report.json``.
    In both cases the numbers join the first log of the Trainer itself.

    Args:
        alpha: weight of the newest minibatch in the moving average, in (0, 1]; 0.3 by default.
        lam: smallest factor, in [0, 1]; 0.3 by default, 1 changes nothing.
        config: all settings at once, instead of ``alpha`` and ``lam``.
        when: ``"train_begin"``; ``"epoch"``: at the beginning of every ``every_n_epochs``-th epoch
            after the first, for data with a length; ``"manual"``: only by :meth:`shrink_`.
        every_n_epochs: at least 1; read where ``when`` is ``"epoch"``.
        trainer: whose loss and trackers to use.
        batches: minibatches from oldest to newest to use instead, with evaluation transforms;
            on several processes each one's own share. A list or loader, where it is read again.
        gradient_dataset: examples to use instead, without augmentation, for the Trainer's collator:
            of a map-style dataset ordered from oldest to newest the last, of a stream the first.
        loss_fn: called as ``loss_fn(model, batch)``; by default the bound Trainer's loss.
        reset_optimizer: forget optimizer state that belongs to the weights before the shrink.
        strict: refuse, instead of a warning, a model that is fresh, has a new head, or was shrunk
            and not trained since.
        **settings: any other setting of :func:`~hf_dash.dash_shrink_`, which wins over ``config``.

    Attributes:
        report: the last :class:`~hf_dash.method.shrink.ShrinkReport`, None before.
        shrunk_at: the global step of every shrink of this training; kept in checkpoints.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Example:
        >>> from hf_dash import DashCallback
        >>> callback = DashCallback(lam=0.1, when="epoch", every_n_epochs=10)
        >>> callback.config.lam
        0.1
        >>> # trainer.add_callback(callback.bind(trainer)); trainer.train()
    """

    def __init__(
        self,
        alpha: float | None = None,
        lam: float | None = None,
        *,
        config: DashConfig | None = None,
        when: When = "train_begin",
        every_n_epochs: int = 1,
        trainer: Trainer | None = None,
        batches: Iterable[Batch] | None = None,
        gradient_dataset: Any = None,
        loss_fn: LossFn | None = None,
        reset_optimizer: bool = True,
        strict: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        given = {n: v for n, v in (("alpha", alpha), ("lam", lam)) if v is not None}
        if config is not None and given:
            raise ValueError(f"give one of config and {given}: both say what {[*given]} should be")
        self.config = with_settings(config, {**given, **settings}, "DashCallback()")
        check_schedule(when, every_n_epochs)
        check_flag("strict", strict)
        if batches is not None and gradient_dataset is not None:
            raise ValueError("give one of batches and gradient_dataset: both say what is read")
        self.when, self.every_n_epochs = when, every_n_epochs
        self.batches, self.gradient_dataset, self.loss_fn = batches, gradient_dataset, loss_fn
        self.reset_optimizer, self.strict = reset_optimizer, strict
        self.report: ShrinkReport | None = None
        self.shrunk_at: list[int] = []
        self.trainer: Trainer | None = None
        self._given: list[str] = []
        self._training: Training | None = None
        self._marked = ""
        self._warned = False
        # The batch size of a training that shrunk and has not ended.
        self._unfinished: int | None = None
        if trainer is not None:
            self.bind(trainer)

    def bind(self, trainer: Trainer) -> "DashCallback":
        """Use this Trainer's loss and trackers; returns the callback itself.

        Raises:
            TypeError: ``trainer`` is not a Trainer.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers Trainer, got {type(trainer).__name__}")
        self.trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        if not any(isinstance(one, _Forerunner) and one.dash is self for one in callbacks):
            callbacks.insert(0, _Forerunner(self, trainer))
        return self

    def shrink_(
        self,
        model: nn.Module | None = None,
        batches: Iterable[Batch] | None = None,
        *,
        optimizer: "Optimizer | None" = None,
    ) -> ShrinkReport:
        """Shrink now, whatever ``when`` says.

        Args:
            model: by default the Trainer's, during training or where one is bound.
            batches: by default those that the callback would read.
            optimizer: whose state to forget; by default the Trainer's.

        Raises:
            ValueError: there is no Trainer to take the model or the batches from.
        """
        training = self._training
        if training is None and self.trainer is not None:
            own = self.trainer
            loader = own_loader(own)
            training = Training(
                own.args, own.state, cast(nn.Module, own.model), own.optimizer, loader
            )
        if training is not None:
            return self._shrink(training, model, batches, optimizer)
        batches = self.batches if batches is None else batches
        if model is None or batches is None:
            raise ValueError(
                "outside of training, and bound to no Trainer, shrink_ needs model and batches, got"
                f" {type(model).__name__} and {type(batches).__name__}"
            )
        config = with_origin(self.config, unwrap(model).module)
        self.report = dash_shrink_(model, batches, self.loss_fn, config=config)
        if self.reset_optimizer and optimizer is not None:
            reset_optimizer_(optimizer)
        return self.report

    @property
    def base(self) -> Any:
        """The base that was given; see :class:`~hf_dash.DashConfig`."""
        return self.config.base

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the settings, and at which steps weights were shrunk."""
        own = ("when", "every_n_epochs", "reset_optimizer", "strict")
        settings = {name: getattr(self.config, name) for name in SETTINGS}
        given = {name for name in NOT_SAVED if getattr(self, name) is not None}
        if isinstance(self.base, Mapping):  # tensors, which no checkpoint's JSON can hold
            settings["base"] = None
            given.add("base")
        return {
            "args": {**settings, **{name: getattr(self, name) for name in own}},
            "attributes": {
                "shrunk_at": list(self.shrunk_at),
                "_given": sorted(given | set(self._given)),
            },
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a second callback of this kind."""
        refuse_duplicates(state)

    def on_train_begin(  # type: ignore[override]  # the Trainer passes more by keyword
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
        check_trainer(self.trainer, state)
        check_epochs(self.when, train_dataloader)
        self._training = Training(args, state, model, optimizer, train_dataloader)
        if state.global_step > 0:
            self._resume(state, model)
            return
        refuse_duplicates(state)
        size = state.train_batch_size or 0
        if self._unfinished is not None and size < self._unfinished and args.auto_find_batch_size:
            # The Trainer starts over with smaller batches, but from weights that have been shrunk.
            logger.info("DASH: training starts over after a shrink, no second one")
            return
        if self.when != "manual":
            self.shrunk_at = []
        if self.when == "train_begin":
            self._shrink(self._training)
            self._unfinished = size

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink, where it is the turn of this epoch."""
        # A whole number only between epochs, not where training resumes in the midst of one.
        epoch = state.epoch or 0
        due = self.when == "epoch" and epoch > 0 and epoch % self.every_n_epochs == 0
        if due and state.global_step not in self.shrunk_at and self._training is not None:
            self._shrink(self._training)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the report next to the checkpoint whose weights it belongs to."""
        folder = Path(cast(str, args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.report is not None and folder.is_dir():
            write_report(self.report, folder, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of what belongs to this training."""
        self._training, self._unfinished = None, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the weights have been trained."""
        if self._training is not None and self._marked != "trained":
            self._mark(self._training.model, "trained")

    def _mark(self, model: nn.Module, what: str) -> None:
        self._marked = what
        mark_model(unwrap(model).module, what)

    def _resume(self, state: TrainerState, model: nn.Module) -> None:
        # The Trainer cannot save a callback that the checkpoint it resumes from did not know.
        callbacks = cast("dict[str, Any]", state.stateful_callbacks)  # declared as a list
        held = callbacks.setdefault(type(self).__name__, self.state())
        held = held[0] if isinstance(held, list) else held
        self.shrunk_at = list(held["attributes"].get("shrunk_at", []))
        if self.shrunk_at:
            tag_model(model)
        logger.warning("DASH: training resumes at step %d: no shrink", state.global_step)

    def _shrink(
        self,
        training: Training,
        model: nn.Module | None = None,
        batches: Iterable[Batch] | None = None,
        optimizer: "Optimizer | None" = None,
    ) -> ShrinkReport:
        args, state = training.args, training.state
        model = training.model if model is None else model
        optimizer = training.optimizer if optimizer is None else optimizer
        model = as_trained(model, args, self.trainer)
        refuse_incomplete([name for name in self._given if getattr(self, name) is None])
        if self.loss_fn is None and self.trainer is None and args.label_smoothing_factor > 0:
            logger.warning(
                "DASH: the loss is the model's, not smoothed: bind(trainer) to smooth it"
            )
        check_past(unwrap(model).module, self.strict)
        batches = self.batches if batches is None else batches
        with rng_preserved():
            if batches is None:
                batches = training.batches(self.gradient_dataset, self.config.newest)
            self.report = dash_shrink_(
                model,
                batches,
                self._loss(),
                disable_tqdm=args.disable_tqdm or None,
                seed=args.seed,
                config=with_origin(self.config, unwrap(model).module),
                optimizer=optimizer if self.reset_optimizer else None,
            )
        self._mark(model, "shrunk")
        self.shrunk_at.append(state.global_step)
        tag_model(model)
        write_report(self.report, cast(str, args.output_dir), state)
        numbers = self.report.summary()
        if self.trainer is not None:
            numbers |= block_summary(self.report, model)
            draw_histograms(self.trainer, self.report, model)
        self.log_later(numbers)
        return self.report

    def _loss(self) -> LossFn | None:
        """Return what is minimized: the given loss, the Trainer's, or None for the model's."""
        trainer = self.trainer
        if trainer is None:
            return self.loss_fn
        if type(trainer).training_step is not Trainer.training_step and not self._warned:
            self._warned = True
            logger.warning(
                "DASH: %s overrides training_step: what that does to a batch, such as mixup, the"
                " shrink does not see",
                type(trainer).__name__,
            )
        return TrainerLoss(trainer) if self.loss_fn is None else prepared(trainer, self.loss_fn)


class _Forerunner(TrainerCallback):
    """Stands first among a Trainer's callbacks, for the bound one that is added later.

    The shrink has to come before other callbacks copy the weights, and its numbers have to be in a
    log before trackers read it.
    """

    def __init__(self, dash: DashCallback, trainer: Trainer) -> None:
        self.dash, self.trainer = dash, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the callback behind transformers' own, which log, and before all others."""
        callbacks = self.trainer.callback_handler.callbacks
        if self.dash not in callbacks:
            return
        callbacks.remove(self.dash)
        own = (type(one).__module__.startswith("transformers.") for one in callbacks[1:])
        place = next((i for i, is_own in enumerate(own, 1) if not is_own), len(callbacks))
        callbacks.insert(place, self.dash)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the numbers of a shrink."""
        self.dash.on_log(args, state, control, **kwargs)


def own_loader(trainer: Trainer) -> "DataLoader[Any]":
    """Return a loader as the Trainer makes it, and leave no trace of it."""
    known = list(trainer.accelerator._dataloaders)
    with rng_preserved():
        loader: DataLoader[Any] = trainer.get_train_dataloader()
    trainer.accelerator._dataloaders[:] = known
    return loader
