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
    buffers_preserved,
    caches_set_aside,
    evaluation_mode,
    gradients_required,
    gradients_set_aside,
    rng_preserved,
)
from hf_dash.method.tensors import ShrinkableTensor, is_sharded
from hf_dash.utils.distributed import (
    RankStatus,
    agree,
    gather,
    is_main_process,
    local,
    mean_across_ranks_,
)

LossFn = Callable[[nn.Module, Any], Tensor]

Backward = Callable[[Tensor, float], None]

CountItems = Callable[[Any], int]

# Losses are multiplied by this before the backward pass, so that half precision loses no small
# gradient to underflow; a power of two, divided out again, changes nothing in float32.
LOSS_SCALE = 2.0**10

# Instead of shrinking G before every minibatch, each newer minibatch weighs more, and G is brought
# back to its own size only when this weight is reached: G is then read once a minibatch, not twice.
LARGEST_WEIGHT = 2.0**16

# The loss of a minibatch and that of its pieces may differ by this much, relative: by rounding.
PIECES_TOLERANCE = 2e-3


@dataclass
class GradientAverage:
    """G over the minibatches read.

    Args:
        parts: G of each shrinkable tensor, or this process's share of it, in the shape of its
            :class:`~hf_dash.method.tensors.ShrinkableTensor`; views of one flat buffer.
        batch_sizes: number of images in each minibatch this process read, oldest to newest.
        reached: of each tensor, whether any minibatch of any process gave it a gradient.
    """

    parts: list[Tensor]
    batch_sizes: list[int] = field(default_factory=list)
    reached: list[bool] = field(default_factory=list)


def average_gradients(
    model: nn.Module,
    tensors: list[ShrinkableTensor],
    batches: Iterable[Batch],
    loss_fn: LossFn,
    *,
    alpha: float,
    micro_batch_size: int | None = None,
    count_items: CountItems = count_images,
    disable_tqdm: bool | None = True,
    quietly: bool = False,
) -> GradientAverage:
    """Compute G over ``batches``, leaving the model exactly as it was.

    The model runs in evaluation mode; modes, buffers, ``.grad`` and global random states are put
    back.

    Args:
        model: the module whose parameters ``tensors`` are; unwrapped, so that no wrapper averages
            gradients between processes (FSDP2, which is not a wrapper, does, and is meant to).
        tensors: what to accumulate, as found by :func:`~hf_dash.method.tensors.find_shrinkable`.
        batches: minibatches from oldest to newest; on several processes, each one's share of the
            global minibatches.
        loss_fn: called with the model and a minibatch on its device; returns the mean loss.
        alpha: weight of the newest minibatch, in (0, 1].
        micro_batch_size: images to compute at a time; None computes a minibatch at once.
        count_items: returns how many items of a minibatch the loss is the mean of.
        disable_tqdm: show no progress; None shows it on a terminal; the main process's only.
        quietly: let no hook on the parameters fire, since they are somebody else's (DeepSpeed's);
            costs the memory of one more set of gradients.

    Raises:
        FloatingPointError: a loss (the message names its minibatch) or a gradient is not finite.
        ValueError: there is no minibatch, a loss is not a scalar, no gradient reached a tensor, the
            ranks' batches differ, or micro-batches would give another loss than the whole.
        RuntimeError: the pass failed on another rank.
    """
    average, flat = _empty_average(tensors)
    sharded = is_sharded(tensors)
    if sharded:
        # Every backward pass of a sharded model is a meeting of all ranks: agree before the first.
        batches = _read_and_agree(batches)
    hidden = True if not is_main_process() else disable_tqdm
    reached = [False] * len(tensors)
    error: Exception | None = None
    scale = 1.0
    with (
        rng_preserved(),
        evaluation_mode(model),
        buffers_preserved(model),
        gradients_set_aside(model),
        gradients_required([source for tensor in tensors for source in tensor.sources]),
        caches_set_aside(model) as empty_caches,
        (_folding_apart if quietly else _folding)(model, tensors, average.parts, reached) as fold,
        tqdm(desc="DASH", unit=" minibatches", disable=hidden) as progress,
    ):

        def fresh_loss(module: nn.Module, batch: Batch) -> Tensor:
            empty_caches()
            return loss_fn(module, batch)

        one_pass = _Pass(model, fresh_loss, fold, flat, alpha, micro_batch_size, count_items)
        try:
            scale = one_pass.run(batches, progress)
        except Exception as failure:
            error = failure
    average.batch_sizes = one_pass.sizes
    # The others wait for this rank: they must hear of its failure before it is raised.
    told = None if error is None else repr(error)
    status = RankStatus(tuple(one_pass.sizes), told, tuple(one_pass.items), tuple(reached))
    statuses = agree(status)
    if error is not None:
        raise error
    average.reached = [any(one.reached[i] for one in statuses) for i in range(len(tensors))]
    flat.mul_(scale)
    if not sharded:
        mean_across_ranks_(flat)
    _check_reached(average, flat, sharded)
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
    held = [tensor.view(local(tensor.sources[0])) for tensor in tensors]
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
    model: nn.Module, tensors: list[ShrinkableTensor], parts: list[Tensor], reached: list[bool]
) -> Iterator[Backward]:
    """Fold every gradient into its part of G as soon as it is complete, and release it.

    Gives the backward pass to go with it: of a loss, with the weight of its gradient in G.
    """
    current = 1.0
    targets: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        for source in tensor.sources:
            targets.setdefault(id(source), []).append(index)

    def fold(parameter: Tensor) -> None:
        if parameter.grad is not None:
            for index in targets.get(id(parameter), ()):
                gradient = tensors[index].view(local(parameter.grad))
                parts[index].sub_(gradient, alpha=current)
                reached[index] = True
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
    model: nn.Module, tensors: list[ShrinkableTensor], parts: list[Tensor], reached: list[bool]
) -> Iterator[Backward]:
    """Give a backward pass that folds the same and neither touches ``.grad`` nor fires hooks."""
    pairs = [(index, source) for index, t in enumerate(tensors) for source in t.sources]

    def backward(loss: Tensor, weight: float) -> None:
        sources = [source for _, source in pairs]
        gradients = torch.autograd.grad(loss, sources, allow_unused=True)
        for (index, _), gradient in zip(pairs, gradients, strict=True):
            if gradient is not None:
                parts[index].sub_(tensors[index].view(gradient), alpha=weight)
                reached[index] = True

    yield backward


@dataclass
class _Pass:
    """Forward and backward over all minibatches, the gradients folded into ``flat``."""

    model: nn.Module
    loss_fn: LossFn
    backward: Backward
    flat: Tensor
    alpha: float
    micro_batch_size: int | None
    count_items: CountItems
    sizes: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    # Read after the pass: asking the device for a number here would make it wait every time.
    losses: list[Tensor] = field(default_factory=list)
    # The same, where it was computed in pieces, from the minibatch as a whole.
    wholes: list[Tensor] = field(default_factory=list)

    def run(self, batches: Iterable[Batch], progress: "tqdm[Any]") -> float:
        """Go through the minibatches; return what to multiply ``flat`` by to get G."""
        weight = 1.0
        for batch in batches:
            if self.losses and self.alpha < 1 and weight < LARGEST_WEIGHT:
                weight /= 1 - self.alpha
            elif self.losses:
                self.flat.mul_((1 - self.alpha) / weight)
                weight = 1.0
            self.losses.append(self._fold(batch, weight))
            progress.update()
            if progress.format_dict["elapsed"]:
                rate = sum(self.sizes) / progress.format_dict["elapsed"]
                progress.set_postfix_str(f"{rate:.0f} images/s", refresh=False)
        if not self.losses:
            raise ValueError("batches must hold at least one minibatch, got none")
        _check_finite(torch.stack(self.losses).tolist(), self.flat)
        if self.micro_batch_size is not None:
            self._check_pieces()
        return self.alpha / (LOSS_SCALE * weight)

    def _fold(self, batch: Batch, weight: float) -> Tensor:
        """Fold the gradient of one minibatch into G; return its loss."""
        self.sizes.append(count_images(batch))
        self.items.append(self.count_items(batch))
        device = self.flat.device
        pieces = list(micro_batches(batch, self.micro_batch_size))
        total = torch.zeros((), dtype=self.flat.dtype, device=device)
        for piece in pieces:
            share = self.count_items(piece) / max(1, self.items[-1]) if len(pieces) > 1 else 1.0
            if share == 0:
                continue
            with torch.enable_grad():
                loss = self.loss_fn(self.model, to_device(piece, device))
                _check_loss(loss)
                self.backward(loss * (share * LOSS_SCALE), weight)
            total += share * loss.detach()
        self.wholes.append(total)
        if len(pieces) > 1:
            with torch.no_grad():
                self.wholes[-1] = self.loss_fn(self.model, to_device(batch, device)).to(total)
        return total

    def _check_pieces(self) -> None:
        """Refuse a loss that is not the mean of what its pieces give."""
        losses, wholes = (torch.stack(each).tolist() for each in (self.losses, self.wholes))
        for loss, whole in zip(losses, wholes, strict=True):
            if not math.isclose(loss, whole, rel_tol=PIECES_TOLERANCE, abs_tol=1e-6):
                raise ValueError(
                    f"micro_batch_size={self.micro_batch_size} would change the result: the loss of"
                    f" a minibatch is {whole:.4g}, that of its pieces {loss:.4g}. It is not a mean"
                    " over images: classes weigh differently, images depend on each other, or the"
                    " model draws random numbers. Leave micro_batch_size out, and give smaller"
                    " minibatches where memory is short"
                )


def _check_reached(average: GradientAverage, flat: Tensor, sharded: bool) -> None:
    """Refuse a G that says nothing: it would multiply every weight by λ."""
    nonzero = [bool(flat.any())]
    if any(average.reached) and any(gather(nonzero[0]) if sharded else nonzero):
        return
    what = "is zero everywhere" if any(average.reached) else "reached no tensor that can shrink"
    raise ValueError(
        f"the gradient of {len(average.batch_sizes)} minibatches {what}: the loss does not depend"
        " on these weights; no weight was changed"
    )


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
