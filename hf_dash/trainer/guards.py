"""What a model's weights tell of their past, before they are shrunk.

Flow: norms and heads as initialization leaves them, and a mark in the model's config → what speaks
against a shrink → a warning, or a refusal where the callback is strict.
Differs from guessing: a sign counts only where training cannot have left it.
"""

from typing import Any

from torch import nn

from hf_dash.method.origin import filled_with, is_fresh
from hf_dash.method.wrappers import plain_name
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

# Written to the model's config, so that a saved model carries it: "shrunk", then "trained".
MARK = "hf_dash_state"


def mark_model(model: nn.Module, state: str) -> None:
    """Note in a model's config (or on a model without one) what happened to its weights last."""
    setattr(getattr(model, "config", model), MARK, state)


def check_past(model: nn.Module, strict: bool) -> None:
    """Warn of weights that a shrink can only harm, or refuse them.

    Args:
        model: unwrapped.
        strict: refuse.

    Raises:
        ValueError: ``strict``, and the model is fresh, has a new head, or was shrunk and not
            trained since.
    """
    found = objection(model)
    if not found:
        return
    if strict:
        raise ValueError(f"{found}; it is not shrunk, since strict=True")
    logger.warning("DASH: %s. strict=True refuses it.", found)


def objection(model: nn.Module) -> str:
    """Return what speaks against shrinking a model; empty where nothing does."""
    mark = getattr(getattr(model, "config", model), MARK, None)
    if mark == "shrunk":
        return (
            "the model has been shrunk and not trained since, so this would shrink it twice: load"
            " it again"
        )
    if mark == "trained":
        return ""
    if is_fresh(model):
        return "the model has never been trained, so there is nothing to forget"
    head = _new_head(model)
    if head:
        return (
            f"{head!r} is newly initialized: the model has never been trained on these labels, so"
            " fine-tune it first"
        )
    return ""


def _new_head(model: nn.Module) -> str:
    """Return the name of a linear layer that was in no checkpoint and has a bias of zeros."""
    # transformers marks what it has loaded; where nothing is marked, nothing is known.
    named: list[tuple[str, Any]] = list(model.named_modules())
    if not any(getattr(p, "_is_hf_initialized", False) for p in model.parameters()):
        return ""
    for name, module in named:
        if not isinstance(module, nn.Linear) or module.bias is None:
            continue
        loaded = getattr(module.weight, "_is_hf_initialized", False)
        if not loaded and module.weight.requires_grad and filled_with(module.bias, 0.0):
            return plain_name(f"{name}.weight")
    return ""
