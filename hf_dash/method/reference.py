"""The method in plain loops, for tests and benchmarks: slow, and independent of the fast code.

It shares no helper with the rest of the package, on purpose. Letters as in the paper
(arXiv:2410.23495): in Algorithm 1 θ a tensor, w a vector of it, G the moving average, U a
minibatch's gradient; in the learning framework of section 3 V a point's features, L the learned
ones.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

SIMULATED = ("accuracy", "learned_features", "nonzero_points", "memorized_points")


def reference_factors(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    alpha: float = 0.3,
    lam: float = 0.3,
    grouping: str = "kernel",
    sample: int | None = None,
    base: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return, per tensor name, the factor of every element (float64, the tensor's own shape).

    With ``sample`` only so many vectors of each tensor, drawn at random, are computed; the elements
    of all others are NaN. With ``base`` the change since its tensors, by the same names, takes the
    place of the weights; a tensor it lacks counts from zero.
    """
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
    result = {}
    for name, tensor in theta.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        count, where = _vectors(owner, name, tensor, grouping)
        numbers: Iterable[int] = range(count)
        if sample is not None and count > sample:
            numbers = random.Random(0).sample(range(count), sample)
        factors = torch.full(tensor.shape, math.nan, dtype=torch.float64)
        change = tensor.detach().double() - (base or {}).get(name, torch.zeros(())).double()
        for number in numbers:
            vector = where(number)
            g, w = G[name][vector].flatten().tolist(), change[vector].flatten().tolist()
            factors[vector] = max(lam, min(1.0, _cosine(g, w)))
        result[name] = factors
    return result


def published_pass_(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    alpha: float = 0.3,
    lam: float = 0.3,
) -> None:
    """Shrink Linear and Conv2d layers the way the paper describes it: all data, a copied model.

    The yardstick of the benchmarks; its cosine raises norms to 1e-8, as the authors' does.
    """
    probe = copy.deepcopy(model).eval()
    parameters = dict(probe.named_parameters())
    G = {name: torch.zeros_like(theta) for name, theta in parameters.items()}
    for batch in batches:
        probe.zero_grad()
        loss_fn(probe, batch).backward()  # type: ignore[no-untyped-call]
        for name, theta in parameters.items():
            U = torch.zeros_like(theta) if theta.grad is None else theta.grad.clone()
            G[name] = (1 - alpha) * G[name] + alpha * (-U)
    with torch.no_grad():
        for prefix, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            for local, theta in module.named_parameters(recurse=False):
                length = theta[0, 0].numel() if theta.ndim == 4 else theta.shape[-1]
                g, w = (t.reshape(-1, length) for t in (G[f"{prefix}.{local}"], theta))
                factors = F.cosine_similarity(g, w, dim=1).clamp(lam, 1)
                theta.copy_((w * factors[:, None]).reshape(theta.shape))


def reference_simulation(
    start: str,
    seed: int = 0,
    C: int = 2,
    K: int = 50,
    N: int = 1000,
    J: int = 50,
    gamma: int = 50,
    tau: int = 3,
    max_probability: float = 0.2,
    forget_share: float = 0.5,
    num_test_points: int = 10_000,
) -> dict[str, list[float]]:
    """Return the counts and accuracies of ``hf_dash.studies.simulate``, by their names there."""
    uniform, arriving, testing, coin, forgetting = (
        np.random.default_rng([seed, stream]).random for stream in range(5)
    )
    p = [sorted((max_probability * uniform() for _ in range(K)), reverse=True) for _ in range(C)]

    def draw(c: int, number: Callable[[], float]) -> set[tuple[int, int]]:
        return {(c, k) for k in range(K) if number() < p[c][k]}

    V: dict[tuple[int, int], set[tuple[int, int]]] = {}
    result: dict[str, list[float]] = {name: [] for name in SIMULATED}
    test = [draw(c, testing) for c in range(C) for _ in range(num_test_points // C)]
    coins = [coin() < 1 / C for _ in test]
    L: set[tuple[int, int]] = set()
    memorized: set[tuple[int, int]] = set()
    for j in range(J):
        if start == "random":
            L = set()
        if start in ("random", "ideal"):
            memorized = set()
        if start == "partial":
            forgotten = {i for i in sorted(V) if forgetting() < forget_share}
            memorized = memorized - forgotten
        new = [(c, i) for c in range(C) for i in range(N // C * j, N // C * (j + 1))]
        V.update((point, draw(point[0], arriving)) for point in new)
        nonzero = [i for i in V if i not in memorized and len(V[i] & L) < tau]
        result["nonzero_points"].append(len(nonzero))
        while True:
            frequency = {(c, k): 0 for c in range(C) for k in range(K)}
            for i in nonzero:
                for v in V[i]:
                    frequency[v] += 1
            # Python sorts stably, so that equals stay in the order of class and feature.
            order = sorted(frequency, key=lambda v: frequency[v], reverse=True)
            wanted = [v for v in order if v not in L and frequency[v] >= gamma]
            if not wanted:
                break
            L = L | {wanted[0]}
            nonzero = [i for i in nonzero if len(V[i] & L) < tau]
        memorized = memorized | set(nonzero)
        right = [len(x & L) >= tau or lucky for x, lucky in zip(test, coins, strict=True)]
        result["accuracy"].append(sum(right) / len(right) if right else math.nan)
        result["learned_features"].append(len(L))
        result["memorized_points"].append(len(memorized))
    return result


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
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            wanted = [local for local, _ in module.named_parameters(recurse=False)]
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


def _vectors(
    module: nn.Module, name: str, theta: Tensor, grouping: str
) -> tuple[int, Callable[[int], Any]]:
    """Return how many vectors a tensor has, and where in it the n-th of them is."""
    if theta.ndim == 1:  # a bias
        return 1, lambda n: ...
    if not isinstance(module, CONVOLUTIONS):
        return theta.shape[0], lambda n: n
    if grouping == "kernel" or (grouping == "auto" and max(theta.shape[2:]) > 1):
        return theta.shape[0] * theta.shape[1], lambda n: divmod(n, theta.shape[1])
    if not isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return theta.shape[0], lambda n: n
    # Transposed: [in, out / groups, *k]; the inputs of one group make its output channels.
    step, outputs = theta.shape[0] // module.groups, theta.shape[1]
    return module.groups * outputs, lambda n: (
        slice(n // outputs * step, n // outputs * step + step),
        n % outputs,
    )


def _cosine(g: list[float], w: list[float]) -> float:
    norm_g, norm_w = math.hypot(*g), math.hypot(*w)
    if norm_g == 0 or norm_w == 0:
        return 0.0
    return math.fsum((a / norm_g) * (b / norm_w) for a, b in zip(g, w, strict=True))
