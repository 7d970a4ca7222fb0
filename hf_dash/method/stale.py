"""What training keeps besides the weights, brought in line with weights that have shrunk.

Flow: an optimizer → forgets its state, such as momentum; an average of the weights (timm's
``ModelEmaV3``, torch's ``AveragedModel``) → a copy of the new weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Copies = nn.Module | Sequence[nn.Module]


def reset_optimizer_(optimizer: Optimizer) -> None:
    """Forget an optimizer's state, such as momentum, in place; its settings stay.

    Example:
        >>> import torch
        >>> from hf_dash.method.stale import reset_optimizer_
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward(); optimizer.step()
        >>> reset_optimizer_(optimizer)
        >>> len(optimizer.state), optimizer.param_groups[0]["lr"]
        (0, 0.1)
    """
    optimizer.state.clear()


def check_stale(optimizer: Any, ema: Any, model: nn.Module) -> list[nn.Module]:
    """Check both before anything is computed; return the copies in ``ema``.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or ``ema`` holds something else than modules.
        ValueError: a copy is not one of ``model``.
    """
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    given: Iterable[Any] = () if ema is None else [ema] if isinstance(ema, nn.Module) else ema
    copies = list(given)
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for copy in copies:
        if not isinstance(copy, nn.Module):
            raise TypeError(f"ema must be a module or a list of modules, got {type(copy).__name__}")
        theirs = {name: tensor.shape for name, tensor in _inner(copy).state_dict().items()}
        if theirs != own:
            odd = sorted(
                name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)
            )
            raise ValueError(
                f"ema must be a copy of the model, but {type(copy).__name__} differs in {odd[:3]}"
            )
    return copies


@torch.no_grad()
def refresh_copy_(copy: nn.Module, model: nn.Module) -> None:
    """Make an average of a model's weights begin anew from the weights as they are.

    Args:
        copy: a module of the same form, or one that holds it as ``module``. An ``AveragedModel``
            counts its next update as its first.
        model: unwrapped.
    """
    _inner(copy).load_state_dict(model.state_dict())
    counted = getattr(copy, "n_averaged", None)
    if isinstance(counted, torch.Tensor):
        counted.zero_()


def _inner(copy: nn.Module) -> nn.Module:
    inner = getattr(copy, "module", None)
    return inner if isinstance(inner, nn.Module) else copy
