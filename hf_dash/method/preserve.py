"""Leave no trace: what a gradient pass may change besides its result, put back afterwards."""

import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

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
def states_preserved(samplers: Iterable[object]) -> Iterator[None]:
    """Give samplers back what drawing from them changes: attributes, lists, random generators."""
    attributes = [(vars(one), dict(vars(one))) for one in samplers if hasattr(one, "__dict__")]
    values = [value for _, before in attributes for value in before.values()]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]
    states = [(g, g.get_state()) for g in values if isinstance(g, torch.Generator)]
    others = [(g, g.getstate()) for g in values if isinstance(g, random.Random)]
    arrays = [(g, g.bit_generator.state) for g in values if isinstance(g, np.random.Generator)]
    try:
        yield
    finally:
        for own, before in attributes:
            own.clear()
            own.update(before)
        for items, kept in lists:
            items[:] = kept
        for generator, state in states:
            generator.set_state(state)
        for python_generator, python_state in others:
            python_generator.setstate(python_state)
        for array_generator, array_state in arrays:
            array_generator.bit_generator.state = array_state


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode and each back into its own mode on leaving.

    The flags are set one by one: a module's own ``train`` may do more, or refuse. Recurrent layers
    stay in training, without dropout: on a GPU they have no backward pass in evaluation.
    """
    modes = [(module, module.training) for module in model.modules()]
    recurrent = [(m, m.dropout) for m, _ in modes if isinstance(m, nn.RNNBase)]
    for module, _ in modes:
        module.training = isinstance(module, nn.RNNBase)
    for module, _ in recurrent:
        module.dropout = 0.0
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, dropout in recurrent:
            module.dropout = dropout


@contextmanager
def buffers_preserved(model: nn.Module) -> Iterator[None]:
    """Give every buffer the tensor and the content back that it has now, whatever changes it."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, content in kept:
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(content)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Let Ctrl-C and its like wait until the end, so that they never fall between two tensors.

    In other threads than the main one nothing is done: signals do not reach them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Handlers of the system itself end the process, and with it the weights.
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda *arrived: received.append(arrived))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrived, frame in received:
            cast(Callable[..., Any], handlers[signal.Signals(arrived)])(arrived, frame)


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
