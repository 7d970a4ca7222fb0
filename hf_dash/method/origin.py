"""Where a model's training began, as far as its folder and its config tell: the base by default.

Flow: the folder the model was loaded from → its history → the parent of round 1: nothing (fresh
weights) or a checkpoint; without a history → what suggests that the weights are pretrained.
Differs from guessing: a checkpoint becomes the base only where a record names it and it is found.
Anything else is a warning with the numbers and the way out, see :data:`ADVICE`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hf_dash.history import read_history
from hf_dash.method.base import open_base
from hf_dash.method.config import ZERO, DashConfig
from hf_dash.method.tensors import find_shrinkable
from hf_dash.utils.files import sha256_of
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

# Measured: recipes/results/finetune_clean, with a warm start and with a shrink towards zero.
ADVICE = (
    "DASH would shrink its weights towards zero, which destroys pretrained features: measured 45 %"
    " -> 28 % in one round on a fine-tuned ImageNet model. Give base=<the checkpoint that round 1"
    " began from> to shrink towards it instead, or base='zero' if the weights were first trained"
    " from scratch"
)
# Weights nearer to a checkpoint than this share of its norm are taken to come from it.
NEAR = 0.5

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Origin:
    """Where round 1 of a model began.

    Args:
        base: the checkpoint to shrink towards, or ``"zero"``; None where it is not known.
        reason: how that is known, or what suggests that the weights are pretrained; empty where
            nothing does.

    Example:
        >>> from hf_dash.method import Origin
        >>> Origin("zero", "its history says that round 1 began with fresh weights").base
        'zero'
    """

    base: str | None
    reason: str = ""


def find_origin(model: nn.Module) -> Origin:
    """Find where a model's training began. Reads local files alone, never the network.

    Args:
        model: a bare module, or one of transformers, unwrapped.

    Raises:
        ValueError: the history beside the model is damaged.

    Example:
        >>> import hf_dash
        >>> model = hf_dash.create_model("test_resnet", label_names=["cat", "dog"], image_size=32)
        >>> hf_dash.method.find_origin(model).reason
        ''
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    folder = Path(name) if name else None
    if folder is not None and (folder / "history.json").is_file():
        return _recorded(folder)
    if name:
        return Origin(None, f"it was loaded from {name!r}, which has no record of its first round")
    return _suspected(model)


def is_fresh(model: nn.Module) -> bool:
    """Tell a model whose norms, all of them trained, are at their first values: 1 (or 0), and 0.

    Args:
        model: unwrapped.
    """
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    pairs = [(norm.weight, norm.bias) for norm in norms if norm.weight is not None]
    if not pairs or any(not weight.requires_grad for weight, _ in pairs):
        return False
    return all(filled_with(weight, 1.0) or filled_with(weight, 0.0) for weight, _ in pairs) and all(
        bias is None or filled_with(bias, 0.0) for _, bias in pairs
    )


def filled_with(tensor: Tensor, value: float) -> bool:
    """Tell whether every element of a tensor is exactly ``value``."""
    return isinstance(tensor, Tensor) and bool((tensor.detach() == value).all())


def with_origin(config: DashConfig, model: nn.Module) -> DashConfig:
    """Return settings whose base is where the model began, if they name none and a record does.

    Where nothing is recorded and something suggests that the weights are pretrained, a warning says
    what a shrink towards zero would do, and the way out. Adapters of PEFT began at zero, and fresh
    weights are not pretrained, whatever folder they were loaded from.

    Args:
        config: ``base`` None asks; anything else stays.
        model: unwrapped.
    """
    if config.base is not None or hasattr(model, "peft_config"):
        return config
    origin = find_origin(model)
    if origin.base is None:
        if origin.reason and not is_fresh(model):
            logger.warning("DASH: the model may be pretrained: %s. %s.", origin.reason, ADVICE)
        return config
    if origin.base != ZERO:
        logger.warning("DASH: shrinks towards %s: %s", origin.base, origin.reason)
    return replace(config, base=origin.base)


def _recorded(folder: Path) -> Origin:
    """Return what the history in a model's folder says of round 1."""
    records = read_history(folder / "history.json").records
    first = min(records, key=lambda record: record.round_index, default=None)
    if first is None or first.round_index > 1:
        return Origin(None, f"the history in {folder} does not go back to its first round")
    if first.parent is None:
        return Origin(ZERO, "its history says that round 1 began with fresh weights")
    if "@" in first.parent:  # on the Hub, at an exact commit
        return Origin(first.parent, f"its history says that round 1 began from {first.parent!r}")
    for place in (Path(), folder, folder.parent):
        weights = place / first.parent / "model.safetensors"
        if weights.is_file() and first.parent_sha256 in (None, sha256_of(weights)):
            found = str(weights.parent)
            return Origin(found, f"its history says that round 1 began from {found!r}")
    return Origin(
        None,
        f"its history says that round 1 began from {first.parent!r}, which is not found, or is not"
        " what it was",
    )


def _suspected(model: nn.Module) -> Origin:
    """Return whether the weights lie near the checkpoint that timm names for the architecture."""
    settings = getattr(getattr(model, "config", None), "pretrained_cfg", None)
    settings = settings or getattr(model, "pretrained_cfg", None) or {}
    repo = settings.get("hf_hub_id") if isinstance(settings, dict) else None
    path = None if repo is None else _cached(str(repo))
    if path is None:
        return Origin(None)
    distance = _distance(model, path)
    if distance is None or distance > NEAR:
        return Origin(None)
    return Origin(None, f"its weights differ from {repo!r} by {distance:.0%} of their norm alone")


def _cached(repo: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found: Any = try_to_load_from_cache(repo, "model.safetensors")
    return Path(found).parent if isinstance(found, str) else None


def _distance(model: nn.Module, folder: Path) -> float | None:
    """Return ‖w − w₀‖ / ‖w₀‖ over the tensors that shrink; None where nothing can be compared."""
    try:
        tensors = find_shrinkable(model, include_frozen=True)[0]
        squares = torch.zeros(2, dtype=torch.float64)
        with open_base(folder, tensors, model) as base, torch.no_grad():
            for tensor in tensors:
                if base is None or not base.holds(tensor):
                    continue
                origin = base.origin(tensor)
                change: Tensor = tensor.view(tensor.parameter) - origin
                squares += torch.stack(
                    [change.double().square().sum(), origin.double().square().sum()]
                ).cpu()
    except (ValueError, NotImplementedError):
        return None
    return float((squares[0] / squares[1]).sqrt())
