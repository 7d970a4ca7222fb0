"""What a step of training is made of besides the model: optimizer, learning rate, SAM.

Flow: ``TrainingConfig`` → torch's optimizer and schedule; optimizer state ↔ plain tensors by name,
so that momentum can outlive the optimizer of a round; SAM around a step's second gradient.
Source: SAM is Algorithm 1 of Foret et al., ICLR 2021 (arXiv:2010.01412).
Differs: under several processes SAM climbs the gradient of the whole batch, not of each process's
share, so that the result does not depend on their number.
The state by name is read and written here: ``torch.distributed.checkpoint.state_dict`` would bring
the old learning rate along, count a step that AdamW never took, and keep momentum of a head that
grew.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, MultiStepLR
from transformers import get_cosine_schedule_with_warmup

from hf_dash.training.config import TrainingConfig
from hf_dash.utils.distributed import whole

# Between a parameter's name and the entry of its state; no name of a parameter holds it.
SEPARATOR = "::"

_ENTRIES: dict[type[Optimizer], set[str]] = {
    SGD: {"momentum_buffer"},
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def copies_kept(config: TrainingConfig) -> int:
    """Return how many times the size of its weights a trained round takes on disk."""
    return 1 + (2 if config.optim == "adamw" else int(config.momentum > 0))


def make_optimizer(
    model: nn.Module, config: TrainingConfig, *, fused: bool | None = None
) -> Optimizer:
    """Return torch's optimizer over all parameters of a model.

    Args:
        model: on any device.
        config: which optimizer, and its settings.
        fused: update all parameters in one kernel, which differs by rounding; None lets torch
            choose, which does not.
    """
    rate: float | Tensor = config.learning_rate
    device = next(model.parameters()).device
    if config.cuda_graphs:  # a recorded step reads it where the schedule writes it
        rate = torch.tensor(rate, device=device)
    if config.optim == "adamw":
        return AdamW(
            model.parameters(),
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=fused,
            capturable=config.cuda_graphs and device.type == "cuda",
        )
    return SGD(
        model.parameters(),
        lr=rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def make_schedule(
    optimizer: Optimizer, config: TrainingConfig, steps_per_epoch: int | None
) -> LRScheduler | None:
    """Return the schedule of the learning rate, to be stepped after every optimizer step.

    Args:
        optimizer: torch's own, whose learning rate is set for the first step.
        config: gives warm-up and milestones.
        steps_per_epoch: optimizer steps in one epoch; None where it is not known.

    Returns:
        The schedule, or None where the learning rate never changes.

    Raises:
        ValueError: there is a schedule, but ``steps_per_epoch`` is None.
    """
    cosine = config.lr_scheduler_type == "cosine"
    if not config.lr_milestones and not config.warmup_epochs and not cosine:
        return None
    if steps_per_epoch is None:
        raise ValueError(
            "lr_milestones, warmup_epochs and a cosine schedule count epochs, so batches must have"
            f" a length; got lr_milestones {config.lr_milestones}, warmup_epochs"
            f" {config.warmup_epochs} and lr_scheduler_type {config.lr_scheduler_type!r}"
        )
    if cosine:
        schedule: LRScheduler = get_cosine_schedule_with_warmup(
            optimizer,
            config.warmup_epochs * steps_per_epoch,
            config.max_epochs * steps_per_epoch,
        )
        return schedule
    warmup = max(1, config.warmup_epochs * steps_per_epoch)
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    milestones = [epoch * steps_per_epoch for epoch in config.lr_milestones]
    return ChainedScheduler([rise, MultiStepLR(optimizer, milestones, gamma=config.lr_gamma)])


def kept_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return copies, on the CPU, of all tensors an optimizer keeps.

    Args:
        model: whose parameters it optimizes, all of them and in their order; not wrapped.
        optimizer: torch's own.

    Returns:
        Contiguous tensors by ``"<parameter name>::<entry>"``, such as
        ``"fc.weight::momentum_buffer"``.
    """
    return {
        f"{name}{SEPARATOR}{entry}": whole(value.detach()).to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer_(
    model: nn.Module, optimizer: Optimizer, state: Mapping[str, Tensor]
) -> list[str]:
    """Let a new optimizer continue with kept state.

    The state of a parameter is dropped, and the parameter starts over, where a shape no longer
    fits, where the model has no parameter of that name, and where another kind of optimizer left
    the state.

    Args:
        model: as for :func:`kept_state`.
        optimizer: torch's own, before its first step.
        state: as :func:`kept_state` returns it.

    Returns:
        The names of the parameters that continue.

    Raises:
        ValueError: a key is not of the form ``"<parameter name>::<entry>"``.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, separator, entry = key.rpartition(SEPARATOR)
        if not (name and separator and entry):
            raise ValueError(
                f"optimizer_state must have keys '<parameter name>{SEPARATOR}<entry>', got {key!r}"
            )
        kept.setdefault(name, {})[entry] = tensor
    parameters = dict(model.named_parameters())
    fitting = {
        name: entries
        for name, entries in kept.items()
        if name in parameters
        and set(entries) == _ENTRIES[type(optimizer)]
        and all(t.shape in ((), parameters[name].shape) for t in entries.values())
    }
    places = {name: place for place, name in enumerate(parameters)}
    content = optimizer.state_dict()
    content["state"] = {
        places[name]: {entry: _laid_out(t, parameters[name]) for entry, t in entries.items()}
        for name, entries in fitting.items()
    }
    optimizer.load_state_dict(content)
    return list(fitting)


@torch.no_grad()
def _laid_out(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a copy, which the optimizer writes into, in the memory layout of its parameter.

    A fused step refuses others, such as those of weights that were kept contiguous and are trained
    channels last.
    """
    if tensor.shape != parameter.shape:
        return tensor.clone()
    like = torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device)
    return like.copy_(tensor)


@contextmanager
def sharpest_point(model: nn.Module, rho: float) -> Iterator[None]:
    """Hold the weights at w + ρ·g / ‖g‖ within the block, and at exactly w again after it.

    g are the gradients the parameters have on entering, the norm is over all of them; a zero
    gradient moves nothing. Within the block batch norms compute as in training, but leave their
    running statistics alone: these have seen the batch at w.

    Args:
        model: after a backward pass; may be wrapped.
        rho: ρ, greater than 0.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    weights = [parameter.detach().clone() for parameter in parameters]
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    _climb_(parameters, rho)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        with torch.no_grad():
            # Put back rather than subtracted: nothing is lost to rounding, nor to an overflow of
            # scaled gradients.
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)


@torch.no_grad()
def _climb_(parameters: list[nn.Parameter], rho: float) -> None:
    if not parameters:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_(gradient * scale)
