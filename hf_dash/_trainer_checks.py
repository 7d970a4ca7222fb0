"""What DashCallback refuses, with the remedy: settings, Trainers and places it cannot work in."""

from typing import Any, Literal, get_args

from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_dash.config import check_count

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
            "when='epoch' needs training data with a length, which a stream has not: use"
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
    entries = [e if isinstance(e, list) else [e] for e in state.stateful_callbacks.values()]
    found = sum("shrunk_at" in one.get("attributes", {}) for entry in entries for one in entry)
    if found > 1:
        raise ValueError(
            f"a Trainer can have one DashCallback, got {found}, each of which would shrink: remove"
            " the others, e.g. by trainer.remove_callback(DashCallback)"
        )


def refuse_deepspeed(args: TrainingArguments) -> None:
    """Raise ``NotImplementedError`` where the weights are DeepSpeed's."""
    if getattr(args, "deepspeed", None):
        raise NotImplementedError(
            "DashCallback cannot shrink under DeepSpeed: the Trainer hands it the model without"
            " the engine, which would undo the shrink; call dash_shrink_ before trainer.train()"
        )


def refuse_incomplete(lost: list[str]) -> None:
    """Raise ``ValueError`` where arguments were lost that the shrink depends on."""
    if lost:
        raise ValueError(
            f"this DashCallback was made anew from a checkpoint, which cannot hold {lost}: set"
            " restore_callback_states_from_checkpoint=False, it finds its steps without"
        )
