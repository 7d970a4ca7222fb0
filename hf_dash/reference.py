"""Algorithm 1 in plain loops, for tests: slow, obvious, and independent of the fast code.

It shares no helper with the rest of the package, on purpose. Letters as in the paper
(arXiv:2410.23495): θ a tensor, w a vector of it, G the moving average, U a minibatch's gradient.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def reference_factors(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    alpha: float = 0.3,
    lam: float = 0.3,
    grouping: str = "kernel",
) -> dict[str, Tensor]:
    """Return, per tensor name, the factor of every element (float64, the tensor's own shape)."""
    theta = reference_tensors(model)
    G = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in theta.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for batch in batches:
        loss = loss_fn(model, batch)
        gradients = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        for name, U in zip(theta, gradients, strict=True):
            u = torch.zeros_like(G[name]) if U is None else U.double()
            G[name] = (1 - alpha) * G[name] + alpha * (-u)
    for module, training in modes.items():
        module.training = training
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in theta}
    return {
        name: _tensor_factors(owners[name], name, G[name], tensor.detach().double(), lam, grouping)
        for name, tensor in theta.items()
    }


def reference_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable tensors that shrink, by name, a tied one under its first name."""
    theta: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            wanted = [
                "in_proj_weight",
                "q_proj_weight",
                "k_proj_weight",
                "v_proj_weight",
                "in_proj_bias",
            ]
        elif isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            wanted = ["weight", "bias"]
        else:
            continue
        for local in wanted:
            tensor = getattr(module, local)
            if tensor is None or not tensor.requires_grad:
                continue
            if any(tensor is other for other in theta.values()):
                continue
            theta[f"{prefix}.{local}" if prefix else local] = tensor
    return theta


def _tensor_factors(
    module: nn.Module, name: str, G: Tensor, theta: Tensor, lam: float, grouping: str
) -> Tensor:
    factors = torch.empty(theta.shape, dtype=torch.float64)
    for where in _vectors(module, name, theta, grouping):
        g = [G[index].item() for index in where]
        w = [theta[index].item() for index in where]
        factor = max(lam, min(1.0, _cosine(g, w)))
        for index in where:
            factors[index] = factor
    return factors


def _vectors(
    module: nn.Module, name: str, theta: Tensor, grouping: str
) -> list[list[tuple[int, ...]]]:
    """Return, for every vector, the indices of its elements."""
    by_vector: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in _indices(tuple(theta.shape)):
        if name.endswith("bias"):
            vector: tuple[int, ...] = ()
        elif not isinstance(module, CONVOLUTIONS):
            vector = index[:1]
        elif grouping == "kernel" or (grouping == "auto" and max(theta.shape[2:]) > 1):
            vector = index[:2]
        elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            inputs_per_group = theta.shape[0] // module.groups
            vector = (index[0] // inputs_per_group, index[1])
        else:
            vector = index[:1]
        by_vector.setdefault(vector, []).append(index)
    return list(by_vector.values())


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for size in shape:
        indices = [(*index, i) for index in indices for i in range(size)]
    return indices


def _cosine(g: list[float], w: list[float]) -> float:
    norm_g, norm_w = math.hypot(*g), math.hypot(*w)
    if norm_g == 0 or norm_w == 0:
        return 0.0
    return math.fsum((a / norm_g) * (b / norm_w) for a, b in zip(g, w, strict=True))
