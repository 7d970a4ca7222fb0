"""The moving average G of the descent direction over minibatches.

Flow: minibatches, oldest to newest → loss, backward → hooks fold every gradient into one flat
buffer and release it at once → the mean over ranks.
Source: Algorithm 1 (arXiv:2410.23495): G ← (1 − α)·G + α·(−U) with U the gradient of a minibatch.
Differs from the authors' commit 3d3cea6: no copy of the model and no second set of gradients; one
buffer of the size of the shrinkable tensors is all that the pass keeps, in float32 or finer.
Symbols: G (the buffer), U (one minibatch's gradient), α.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_dash.method.batches import Batch, count_images, micro_batches, to_device
from hf_dash.method.preserve import (
    caches_set_aside,
    evaluation_mode,
    gradients_required,
    gradients_set_aside,
    rng_preserved,
)
from hf_dash.method.tensors import ShrinkableTensor, is_sharded
from hf_dash.utils.distributed import RankStatus, agree, is_main_process, local, mean_across_ranks_

LossFn = Callable[[nn.Module, Any], Tensor]

Backward = Callable[[Tensor, float], None]

# Losses are multiplied by this before the backward pass, so that half precision loses no small
# gradient to underflow; a power of two, divided out again, changes nothing in float32.
LOSS_SCALE = 2.0**10

# Instead of shrinking G before every minibatch, each newer minibatch weighs more, and G is brought
# back to its own size only when this weight is reached: G is then read once a minibatch, not twice.
LARGEST_WEIGHT = 2.0**16


@dataclass
class GradientAverage:
    """G over the minibatches read.

    Args:
        parts: G of each shrinkable tensor, or this process's share of it, in the shape of its
            :class:`~hf_dash.method.tensors.ShrinkableTensor`; views of one flat buffer.
        batch_sizes: number of images in each minibatch this process read, oldest to newest.
    """

    parts: list[Tensor]
    batch_sizes: list[int] = field(default_factory=list)


def average_gradients(
    model: nn.Module,
    tensors: list[ShrinkableTensor],
    batches: Iterable[Batch],
    loss_fn: LossFn,
    *,
    alpha: float,
    micro_batch_size: int | None = None,
    disable_tqdm: bool | None = True,
    quietly: bool = False,
) -> GradientAverage:
    """Compute G over ``batches``, leaving the model exactly as it was.

    The model runs in evaluation mode; modes, ``.grad`` and global random states are put back.

    Args:
        model: the module whose parameters ``tensors`` are; unwrapped, so that no wrapper averages
            gradients between processes (FSDP2, which is not a wrapper, does, and is meant to).
        tensors: what to accumulate, as found by :func:`~hf_dash.method.tensors.find_shrinkable`.
        batches: minibatches from oldest to newest; on several processes, each one's share of the
            global minibatches.
        loss_fn: called with the model and a minibatch on its device; returns the mean loss.
        alpha: weight of the newest minibatch, in (0, 1].
        micro_batch_size: images to compute at a time; None computes a minibatch at once.
        disable_tqdm: show no progress; None shows it on a terminal; the main process's only.
        quietly: let no hook on the parameters fire, since they are somebody else's (DeepSpeed's);
            costs the memory of one more set of gradients.

    Raises:
        FloatingPointError: a loss (the message names its minibatch) or a gradient is not finite.
        ValueError: there is no minibatch, a loss is not a scalar, or the ranks' batches differ.
        RuntimeError: the pass failed on another rank.
    """
    average, flat = _empty_average(tensors)
    sharded = is_sharded(tensors)
    if sharded:
        # Every backward pass of a sharded model is a meeting of all ranks: agree before the first.
        batches = _read_and_agree(batches)
    hidden = True if not is_main_process() else disable_tqdm
    error: Exception | None = None
    scale = 1.0

    def fresh_loss(module: nn.Module, batch: Batch) -> Tensor:
        empty_caches()
        return loss_fn(module, batch)

    with (
        rng_preserved(),
        evaluation_mode(model),
        gradients_set_aside(model),
        gradients_required([tensor.parameter for tensor in tensors]),
        caches_set_aside(model) as empty_caches,
        (_folding_apart if quietly else _folding)(model, tensors, average.parts) as backward,
        tqdm(desc="DASH", unit=" minibatches", disable=hidden) as progress,
    ):
        try:
            average.batch_sizes, scale = _run(
                model, batches, fresh_loss, backward, flat, alpha, micro_batch_size, progress
            )
        except Exception as failure:
            error = failure
    # The others wait for this rank: they must hear of its failure before it is raised.
    agree(RankStatus(tuple(average.batch_sizes), None if error is None else repr(error)))
    if error is not None:
        raise error
    flat.div_(scale)
    if not sharded:
        mean_across_ranks_(flat)
    return average


def _read_and_agree(batches: Iterable[Batch]) -> list[Batch]:
    read: list[Batch] = []
    sizes: tuple[int, ...] = ()
    error: Exception | None = None
    try:
        read = list(batches)
        sizes = tuple(count_images(batch) for batch in read)
    except Exception as failure:
        error = failure
    agree(RankStatus(sizes, None if error is None else repr(error)))
    if error is not None:
        raise error
    return read


def _empty_average(tensors: list[ShrinkableTensor]) -> tuple[GradientAverage, Tensor]:
    held = [tensor.view(local(tensor.parameter)) for tensor in tensors]
    devices = {tensor.device for tensor in held}
    if len(devices) > 1:
        raise NotImplementedError(
            f"hf_dash cannot shrink a model on several devices: {sorted(map(str, devices))}"
        )
    # float32 at least, so that small steps of the average are not lost in half precision.
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in held), torch.float32)
    sizes = [tensor.numel() for tensor in held]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=devices.pop())
    slices = torch.split(flat, sizes)
    return GradientAverage([g.view(t.shape) for g, t in zip(slices, held, strict=True)]), flat


@contextmanager
def _folding(
    model: nn.Module, tensors: list[ShrinkableTensor], parts: list[Tensor]
) -> Iterator[Backward]:
    """Fold every gradient into its part of G as soon as it is complete, and release it.

    Gives the backward pass to go with it: of a loss, with the weight of its gradient in G.
    """
    current = 1.0
    targets = {id(t.parameter): (t, part) for t, part in zip(tensors, parts, strict=True)}

    def fold(parameter: Tensor) -> None:
        target = targets.get(id(parameter))
        if target is not None and parameter.grad is not None:
            tensor, part = target
            part.sub_(tensor.view(local(parameter.grad)), alpha=current)
        parameter.grad = None

    def backward(loss: Tensor, weight: float) -> None:
        nonlocal current
        current = weight
        loss.backward()  # type: ignore[no-untyped-call]

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [
        parameter.register_post_accumulate_grad_hook(fold)  # type: ignore[no-untyped-call]
        for parameter in trainable
    ]
    try:
        yield backward
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _folding_apart(
    model: nn.Module, tensors: list[ShrinkableTensor], parts: list[Tensor]
) -> Iterator[Backward]:
    """Give a backward pass that folds the same and neither touches ``.grad`` nor fires hooks."""

    def backward(loss: Tensor, weight: float) -> None:
        parameters = [tensor.parameter for tensor in tensors]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for tensor, part, gradient in zip(tensors, parts, gradients, strict=True):
            if gradient is not None:
                part.sub_(tensor.view(gradient), alpha=weight)

    yield backward


def _run(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    backward: Backward,
    flat: Tensor,
    alpha: float,
    micro_batch_size: int | None,
    progress: "tqdm[Any]",
) -> tuple[list[int], float]:
    """Run forward and backward over all minibatches.

    Returns:
        How many images each had, and how many times too large G is in ``flat``.
    """
    sizes: list[int] = []
    # Read after the pass: asking the device for a number here would make it wait every time.
    losses: list[Tensor] = []
    weight = alpha
    for batch in batches:
        if losses and alpha < 1 and weight < LARGEST_WEIGHT:
            weight /= 1 - alpha
        elif losses:
            flat.mul_((1 - alpha) * alpha / weight)
            weight = alpha
        sizes.append(count_images(batch))
        total = torch.zeros((), dtype=flat.dtype, device=flat.device)
        for share, piece in micro_batches(batch, micro_batch_size):
            with torch.enable_grad():
                loss = loss_fn(model, to_device(piece, flat.device))
                _check_loss(loss)
                backward(loss * (share * LOSS_SCALE), weight)
            total += share * loss.detach()
        losses.append(total)
        progress.update()
        if progress.format_dict["elapsed"]:
            rate = sum(sizes) / progress.format_dict["elapsed"]
            progress.set_postfix_str(f"{rate:.0f} images/s", refresh=False)
    if not losses:
        raise ValueError("batches must hold at least one minibatch, got none")
    _check_finite(torch.stack(losses).tolist(), flat)
    return sizes, LOSS_SCALE * weight / alpha


def _check_finite(losses: list[float], flat: Tensor) -> None:
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of minibatch {index} (of {len(losses)}, counted from the oldest read) is"
                f" not finite: {loss}; no weight was changed"
            )
    if not math.isfinite(float(torch.stack(torch.aminmax(flat)).sum())):
        raise FloatingPointError(
            f"the gradient of one of the {len(losses)} minibatches is not finite, though its loss"
            " is; no weight was changed"
        )


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got a tensor of shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss_fn must return a loss that depends on trainable weights")
