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

from hf_dash._preserve import evaluation_mode, gradients_set_aside, rng_preserved
from hf_dash.batches import Batch, count_images, to_device
from hf_dash.distributed import RankStatus, agree, mean_across_ranks_
from hf_dash.tensors import ShrinkableTensor

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass
class GradientAverage:
    """G over the minibatches read.

    Args:
        parts: G of each shrinkable tensor in the shape of its :class:`ShrinkableTensor`; views
            of one flat buffer.
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
) -> GradientAverage:
    """Compute G over ``batches``, leaving the model exactly as it was.

    The model runs in evaluation mode; modes, ``.grad`` and global random states are put back.

    Args:
        model: the module whose parameters ``tensors`` are; unwrapped, so that no wrapper averages
            gradients between processes.
        tensors: what to accumulate, as found by :func:`~hf_dash.tensors.find_shrinkable`.
        batches: minibatches from oldest to newest; on several processes, each one's share of the
            global minibatches.
        loss_fn: called with the model and a minibatch on its device; returns the mean loss.
        alpha: weight of the newest minibatch, in (0, 1].

    Raises:
        FloatingPointError: a loss or gradient is not finite; the message names the minibatch.
        ValueError: there is no minibatch, a loss is not a scalar, or the ranks' batches differ.
        RuntimeError: the pass failed on another rank.
    """
    average, flat = _empty_average(tensors)
    error: Exception | None = None
    with rng_preserved(), evaluation_mode(model), gradients_set_aside(model):
        try:
            with _folding(model, tensors, average.parts, alpha):
                _run(model, batches, loss_fn, flat, average.batch_sizes, alpha)
        except Exception as failure:
            error = failure
    # The others wait for this rank: they must hear of its failure before it is raised.
    agree(RankStatus(tuple(average.batch_sizes), None if error is None else repr(error)))
    if error is not None:
        raise error
    mean_across_ranks_(flat)
    return average


def _empty_average(tensors: list[ShrinkableTensor]) -> tuple[GradientAverage, Tensor]:
    devices = {tensor.parameter.device for tensor in tensors}
    if len(devices) > 1:
        raise NotImplementedError(
            f"hf_dash cannot shrink a model on several devices: {sorted(map(str, devices))}"
        )
    # float32 at least, so that small steps of the average are not lost in half precision.
    dtype = reduce(torch.promote_types, (t.parameter.dtype for t in tensors), torch.float32)
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=devices.pop())
    slices = torch.split(flat, sizes)
    parts = [part.view(tensor.shape) for part, tensor in zip(slices, tensors, strict=True)]
    return GradientAverage(parts), flat


@contextmanager
def _folding(
    model: nn.Module, tensors: list[ShrinkableTensor], parts: list[Tensor], alpha: float
) -> Iterator[None]:
    """Fold every gradient into its part of G as soon as it is complete, and release it."""
    targets = {id(t.parameter): (t, part) for t, part in zip(tensors, parts, strict=True)}

    def fold(parameter: Tensor) -> None:
        target = targets.get(id(parameter))
        if target is not None and parameter.grad is not None:
            tensor, part = target
            part.sub_(parameter.grad.view(tensor.shape), alpha=alpha)
        parameter.grad = None

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [
        parameter.register_post_accumulate_grad_hook(fold)  # type: ignore[no-untyped-call]
        for parameter in trainable
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    flat: Tensor,
    batch_sizes: list[int],
    alpha: float,
) -> None:
    """Run forward and backward over all minibatches and check that all numbers stay finite."""
    device = flat.device
    largest: list[Tensor] = []
    for batch in batches:
        batch_sizes.append(count_images(batch))
        with torch.enable_grad():
            loss = loss_fn(model, to_device(batch, device))
            _check_loss(loss)
            flat.mul_(1 - alpha)
            loss.backward()  # type: ignore[no-untyped-call]
        # Read after the pass: asking the device for a number here would make it wait every time.
        largest_entry = torch.linalg.vector_norm(flat, ord=math.inf)
        largest.append(torch.stack([loss.detach().to(flat.dtype), largest_entry]))
    if not largest:
        raise ValueError("batches must hold at least one minibatch, got none")
    for index, (loss_value, entry) in enumerate(torch.stack(largest).tolist()):
        if not (math.isfinite(loss_value) and math.isfinite(entry)):
            what = "gradient" if math.isfinite(loss_value) else "loss"
            raise FloatingPointError(
                f"the {what} of minibatch {index} (of {len(largest)}, counted from the oldest read)"
                f" is not finite: loss {loss_value}; no weight was changed"
            )


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got a tensor of shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss_fn must return a loss that depends on trainable weights")
