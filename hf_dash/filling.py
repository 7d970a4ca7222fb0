"""What a shrink takes away, filled with fresh initialisation: DASH's fill variant.

Flow: weights w and their factors s → fresh weights v of the same architecture → s·w + √(1 − s²)·v.
Source: ours; shrink-and-perturb (Ash & Adams, NeurIPS 2020, arXiv:1910.08475) adds noise too, to
all weights alike.
Symbols: s² + (√(1 − s²))² = 1, so that a vector which is as long as a fresh one, and independent of
it, keeps that length on average: the more a vector is shrunk, the more of it begins anew.
"""

import torch
from torch import Tensor, nn

from hf_dash.models import fresh_state, is_timm
from hf_dash.tensors import ShrinkableTensor


def check_fillable(model: nn.Module, seed: int) -> None:
    """Check that fresh weights can be drawn for a model.

    Raises:
        TypeError: it is no timm wrapper, whose config alone says how timm makes another one, or
            ``seed`` is no integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not is_timm(model):
        raise TypeError(
            "variant 'fill' needs a timm model in transformers' wrapper, whose fresh weights timm"
            f" can draw, got {type(model).__name__}"
        )


@torch.no_grad()
def filled_shrink_(
    model: nn.Module, tensors: list[ShrinkableTensor], factors: list[Tensor], seed: int
) -> None:
    """Multiply every vector by its factor and add the fresh one in proportion, in place.

    w ← s·w + √(1 − s²)·v, v what timm draws for the same tensor. The draw follows from the seed
    alone: it is the same on every process, and the global random state is left alone.

    Args:
        model: a timm wrapper, whose tensors they are.
        tensors: what to change; none may be sharded.
        factors: of each, in [0, 1], as :func:`~hf_dash.shrink.all_factors` returns them.
        seed: of the fresh weights.

    All is computed before anything is changed, which takes as much memory as the tensors once more.

    Raises:
        ValueError: a tensor is none of timm's, or of another shape there; nothing was changed.
    """
    drawn = fresh_state(model, seed)
    added = []
    for tensor, factor in zip(tensors, factors, strict=True):
        new = drawn.get(tensor.name.removeprefix("timm_model."))
        if new is None or new.shape != tensor.parameter.shape:
            raise ValueError(
                f"variant 'fill' finds no fresh {tensor.name!r} of shape"
                f" {tuple(tensor.parameter.shape)} among what timm draws for this architecture"
            )
        added.append(tensor.view(new.to(tensor.parameter)) * (1 - factor.square()).sqrt())
    for tensor, factor, share in zip(tensors, factors, added, strict=True):
        tensor.view(tensor.parameter).mul_(factor).add_(share)
