"""Two variants of the shrink: matrices made orthogonal, as FIRE does, and fresh weights filled in.

Flow (orthogonal): weight → one matrix per kernel position and group → Newton-Schulz steps → polar
factors, each times √(d_out / d_in) / k² → the weight again.
Flow (fill): weights w and their factors s → fresh weights v → s·w + √(1 − s²)·v.
Source: orthogonal: Han et al., ICLR 2026 (arXiv:2602.08040). fill: ours; shrink-and-perturb (Ash &
Adams, NeurIPS 2020, arXiv:1910.08475) adds noise too, to all weights alike.
Differs from FIRE: a grouped convolution is taken group by group, since at one kernel position it is
a block-diagonal matrix, whose polar factor is that of its blocks. Depthwise kernels stay as they
are: the polar factor of a 1×1 matrix would keep nothing but the sign.
Symbols: k², the number of kernel positions, 1 for a linear layer. s² + (√(1 − s²))² = 1, so a
vector as long as a fresh one, and independent of it, keeps that length on average: the more a
vector is shrunk, the more of it begins anew.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from hf_dash.method.tensors import ShrinkableTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# After so many steps singular values above a 25th of the norm are within 0.5 % of 1.
NEWTON_SCHULZ_STEPS = 10


def polar_factors(matrices: Tensor, steps: int) -> Tensor:
    """Return the orthogonal factor U Vᵀ of each matrix U S Vᵀ, to the accuracy of the steps.

    Newton-Schulz, X ← 1.5·X − 0.5·X Xᵀ X from X / ‖X‖_F, at most multiplies a small singular value
    by 1.5 in a step: after 10 steps those above a 25th of ‖X‖_F are within 0.5 % of 1, smaller ones
    are on their way there, and those that are zero stay zero.

    Args:
        matrices: of shape [..., rows, columns], floating point.
        steps: at least 1.

    Returns:
        Matrices of the same shape, at least in float32. A zero matrix, which has no polar factor,
        stays zero.
    """
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    # Divided by its largest entry first, so that no square leaves the range of the numbers.
    x = _divided(x, x.abs().amax(dim=(-2, -1), keepdim=True))
    x = _divided(x, torch.linalg.matrix_norm(x, keepdim=True))
    rows, columns = x.shape[-2:]
    for _ in range(steps):
        # (X Xᵀ) X = X (Xᵀ X): the smaller of the two Gram matrices costs less.
        cubed = (x @ x.mT) @ x if rows <= columns else x @ (x.mT @ x)
        x = 1.5 * x - 0.5 * cubed
    return x


def _divided(x: Tensor, by: Tensor) -> Tensor:
    return x / torch.where(by > 0, by, torch.ones_like(by))


def orthogonal_weight(
    weight: Tensor, steps: int, *, groups: int = 1, transposed: bool = False
) -> Tensor:
    """Return a weight whose matrices are orthogonal and scaled.

    Args:
        weight: of a linear layer, [out, in]; of a convolution, [out, in / groups, *kernel]; of a
            transposed one, [in, out / groups, *kernel].
        steps: of Newton-Schulz, at least 1.
        groups: of the convolution; out / groups = in / groups = 1 is depthwise.
        transposed: the weight is that of a transposed convolution.

    Returns:
        A weight of the same shape and dtype: for every kernel position and group the polar factor
        of [out / groups, in / groups] times √(out / in) / k². Depthwise weights and zero matrices
        come back unchanged.
    """
    first, second, *kernel = weight.shape
    positions = math.prod(kernel)
    if first == groups > 1 and second == 1:
        return weight
    # [groups, out / groups, in / groups, positions], or with out and in exchanged.
    grouped = weight.reshape(groups, first // groups, second, positions)
    to_matrices = (3, 0, 2, 1) if transposed else (3, 0, 1, 2)
    matrices = grouped.permute(to_matrices)
    d_out, d_in = matrices.shape[-2:]
    factors = polar_factors(matrices, steps) * (math.sqrt(d_out / d_in) / positions)
    # The way back: the position that each dimension of ``grouped`` went to.
    back = [to_matrices.index(dim) for dim in range(4)]
    return factors.permute(back).reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def make_orthogonal_(
    model: nn.Module, tensors: list[ShrinkableTensor], values: Sequence[Tensor], steps: int
) -> None:
    """Give tensors of a model new values, made orthogonal where they are matrices, in place.

    All is computed before anything is changed. Biases get their values as they are; a fused
    query-key-value projection is one matrix.

    Args:
        model: whose layers tell groups and transposed convolutions.
        tensors: some of its linear and convolution layers' weights and biases.
        values: of each, in the parameter's shape.
        steps: of Newton-Schulz, at least 1.
    """
    layers = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    replacements = [
        value
        if value.ndim < 2
        else orthogonal_weight(
            value,
            steps,
            groups=getattr(layers[id(tensor.parameter)], "groups", 1),
            transposed=isinstance(layers[id(tensor.parameter)], _ConvTransposeNd),
        )
        for tensor, value in zip(tensors, values, strict=True)
    ]
    for tensor, replacement in zip(tensors, replacements, strict=True):
        tensor.parameter.copy_(replacement)


@torch.no_grad()
def orthogonal_shrink_(
    model: nn.Module, tensors: list[ShrinkableTensor], factors: list[Tensor]
) -> None:
    """Multiply every vector by its factor, then make every matrix orthogonal, in place.

    The shrink decides which directions lead, the orthogonal matrix gives all of them the same
    scale: w ← polar(s·w)·√(out / in) / k². Biases are shrunk alone. All is computed before anything
    is changed, which takes as much memory as the tensors once more.

    Args:
        model: whose tensors they are.
        tensors: what to change; none may be sharded.
        factors: of each, as :func:`~hf_dash.method.shrink.all_factors` returns them.
    """
    shrunk = [
        (tensor.view(tensor.parameter) * factor).view_as(tensor.parameter)
        for tensor, factor in zip(tensors, factors, strict=True)
    ]
    make_orthogonal_(model, tensors, shrunk, NEWTON_SCHULZ_STEPS)


def check_fillable(model: nn.Module, seed: int) -> None:
    """Check that fresh weights can be drawn for a model.

    Raises:
        TypeError: it is not a timm wrapper, whose config alone says how timm makes another one, or
            ``seed`` is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    from hf_dash.models import is_timm

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
        factors: of each, in [0, 1], as :func:`~hf_dash.method.shrink.all_factors` returns them.
        seed: of the fresh weights.

    All is computed before anything is changed, which takes as much memory as the tensors once more.

    Raises:
        ValueError: a tensor is not among timm's, or has another shape there; nothing was changed.
    """
    from hf_dash.models import fresh_state

    drawn = fresh_state(cast("PreTrainedModel", model), seed)
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
