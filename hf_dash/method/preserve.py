"""Leave no trace: what a gradient pass may change besides its result, put back afterwards."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn


@contextmanager
def rng_preserved() -> Iterator[None]:
    """Put the global random states of python, numpy and torch (and its device) back on leaving."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Naming one device keeps fork_rng from opening a context on every other one.
    kind, devices = "cuda", []
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        devices = [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode and each back into its own mode on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Hide the ``.grad`` of all parameters and put the same tensors back on leaving."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def gradients_required(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters among these require gradients, and freeze them again on leaving."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def caches_set_aside(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Give a function that empties the model's caches; put their contents back on leaving.

    Some of timm's models (LeViT and its kin) keep what evaluation computed from a parameter in a
    dict for the next call: with it they would keep a graph that one backward pass has used up.
    """
    caches = [
        (cache, dict(cache))
        for module in model.modules()
        for name, cache in vars(module).items()
        if name.endswith("_cache") and isinstance(cache, dict)
    ]

    def empty() -> None:
        for cache, _ in caches:
            cache.clear()

    try:
        yield empty
    finally:
        empty()
        for cache, contents in caches:
            cache.update(contents)


@contextmanager
def batch_norms_renewed(model: nn.Module, images: Iterable[Tensor]) -> Iterator[None]:
    """Give batch norms the statistics of ``images`` under the present weights, and theirs back."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        with evaluation_mode(model):
            update_bn(images, model)
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
