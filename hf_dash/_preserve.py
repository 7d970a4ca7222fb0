"""Leave no trace: what a gradient pass may change besides its result, put back afterwards."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


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
