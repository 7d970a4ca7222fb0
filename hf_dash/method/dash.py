"""The whole method: gradients over old and new data, then the shrink.

Flow: batches, oldest to newest → newest K → G (``gradients``) → factors → weights (``shrink``).
Source: Algorithm 1 of Shin et al., NeurIPS 2024 (arXiv:2410.23495); authors' commit 3d3cea6.
"""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_dash.method.base import Base, open_base
from hf_dash.method.batches import Batch, count_images, newest_batches
from hf_dash.method.config import DashConfig, Variant, with_settings
from hf_dash.method.gradients import GradientAverage, LossFn, average_gradients
from hf_dash.method.loss import count_labels, default_loss, labels_checked
from hf_dash.method.preserve import signals_deferred
from hf_dash.method.shrink import ShrinkReport, all_factors, report_tensors, shrink_
from hf_dash.method.stale import Copies, check_stale, refresh_copy_, reset_optimizer_
from hf_dash.method.tensors import LowRankTensor, ShrinkableTensor, find_shrinkable, is_sharded
from hf_dash.method.variants import check_fillable, filled_shrink_, orthogonal_shrink_
from hf_dash.method.wrappers import unwrap
from hf_dash.utils.distributed import is_main_process, num_processes, synchronize
from hf_dash.utils.logging import get_logger

if TYPE_CHECKING:
    from accelerate import Accelerator


logger = get_logger(__name__)


def dash_shrink_(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn | None = None,
    *,
    config: DashConfig | None = None,
    optimizer: Optimizer | None = None,
    ema: Copies | None = None,
    accelerator: "Accelerator | None" = None,
    seed: int = 0,
    dry_run: bool = False,
    disable_tqdm: bool | None = None,
    **settings: Any,
) -> ShrinkReport:
    """Shrink every weight vector of a model by how well it agrees with the descent direction.

    Call it on the weights of the last round, before you train on old and new data. The model may
    be a bare timm model or any model of transformers, as it is or prepared by Accelerate. It runs
    in evaluation mode; afterwards nothing but the weights has changed.

    Args:
        model: the model, changed in place.
        batches: minibatches ordered from oldest to newest, of any form that ``loss_fn`` takes;
            without one, keyword arguments of the model, or pairs of images [batch, channels,
            height, width] and labels [batch]. Only the newest K are computed; see
            :func:`~hf_dash.method.batches.newest_batches`. Use evaluation transforms.
        loss_fn: called as ``loss_fn(model, batch)``, returns the scalar mean loss; by default the
            model's own loss, or cross-entropy of a bare classifier, see
            :func:`~hf_dash.method.loss.default_loss`.
        config: all settings at once; by default the paper's.
        optimizer: forgets its state, such as momentum, which belongs to the weights before.
        ema: averages of the weights, such as timm's ``ModelEmaV3`` or torch's ``AveragedModel``,
            one or a list; each becomes a copy of the new weights.
        accelerator: if given, the forward passes run under its autocast.
        seed: seed of the fresh weights, read by ``variant="fill"`` alone; the same on every
            process.
        dry_run: report what the shrink would do and change nothing.
        disable_tqdm: show no progress bar; by default there is one on a terminal.
        **settings: single settings, which win over ``config``: any field of
            :class:`~hf_dash.DashConfig` except ``gradient_batch_size``, such as ``alpha``, ``lam``,
            ``num_batches`` or ``micro_batch_size``.

    Returns:
        The report: factors per tensor, what was left alone, what was read.

    Raises:
        TypeError, ValueError: an argument or a batch is not of the form above, or no gradient
            reaches the weights.
        FloatingPointError: a loss, gradient or weight is not finite.
        NotImplementedError: the model is wrapped or stored in a way the shrink cannot work on.
        RuntimeError: called in ``torch.inference_mode()``, or the pass failed on another process.

    Whatever is raised, no weight has changed.

    Example:
        >>> import torch
        >>> from hf_dash import dash_shrink_
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> batches = [(torch.randn(8, 3, 2, 2), torch.arange(8) % 5) for _ in range(4)]
        >>> report = dash_shrink_(model, batches, lam=0.1, disable_tqdm=True)
        >>> report.num_vectors, report.num_images
        (6, 32)
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("dash_shrink_() computes gradients: call it outside of inference_mode()")
    config = with_settings(config, settings, "dash_shrink_()")
    wrapped = unwrap(model)
    module = wrapped.module
    copies = check_stale(optimizer, ema, module)
    tensors, untouched = _find(module, config, seed)
    newest, count_items = newest_batches(batches, config.newest), count_images
    if loss_fn is None:
        loss_fn, count_items = default_loss, count_labels
        newest = labels_checked(newest, module)

    synchronize(tensors[0].parameter.device)
    started = time.perf_counter()
    with open_base(config.base, tensors, module) as base:
        average = average_gradients(
            module,
            tensors,
            newest,
            _under_autocast(loss_fn, accelerator),
            alpha=config.alpha,
            micro_batch_size=config.micro_batch_size,
            count_items=getattr(loss_fn, "count_items", count_items),
            disable_tqdm=disable_tqdm,
            quietly=wrapped.has_foreign_hooks,
        )
        tensors, no_gradient = _reached(tensors, average)
        factors = all_factors(tensors, average, config.lam, base)
        if not dry_run:
            with signals_deferred():
                _change_(module, tensors, factors, config.variant, seed, base)
                wrapped.refresh()
                _renew_(optimizer, copies, module)
    synchronize(tensors[0].parameter.device)
    report = ShrinkReport(
        tensors=report_tensors(tensors, factors, config.lam),
        untouched=(*untouched, *no_gradient),
        no_gradient=no_gradient,
        config=config if base is None else replace(config, base=base.name),
        num_batches=len(average.batch_sizes),
        num_images=sum(average.batch_sizes) * num_processes(),
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        towards_zero=() if base is None else base.towards_zero,
    )
    _tell(report, module, tensors)
    return report


def _find(
    module: nn.Module, config: DashConfig, seed: int
) -> tuple[list[ShrinkableTensor], list[str]]:
    """Find what shrinks and what stays; refuse what a variant cannot change."""
    if config.variant == "fill":
        check_fillable(module, seed)
    found = find_shrinkable(module, config.grouping, include_frozen=config.include_frozen)
    if config.variant is not None and is_sharded(found[0]):
        raise NotImplementedError(
            f"variant {config.variant!r} needs whole tensors, but FSDP2 shards them: shrink before"
            " the model is sharded, or without a variant"
        )
    if config.variant is not None and any(isinstance(t, LowRankTensor) for t in found[0]):
        raise NotImplementedError(
            f"variant {config.variant!r} is not defined for the update of a LoRA adapter: leave"
            " variant out"
        )
    return found


def _reached(
    tensors: list[ShrinkableTensor], average: GradientAverage
) -> tuple[list[ShrinkableTensor], tuple[str, ...]]:
    """Return the tensors that got a gradient, and the names of the others, which stay as they are.

    No evidence is not disagreement: a head of another task, or a teacher, is none of the pass's.
    """
    pairs = list(zip(tensors, average.parts, average.reached, strict=True))
    average.parts = [part for _, part, reached in pairs if reached]
    without = tuple(tensor.name for tensor, _, reached in pairs if not reached)
    return [tensor for tensor, _, reached in pairs if reached], without


def _change_(
    module: nn.Module,
    tensors: list[ShrinkableTensor],
    factors: list[Tensor],
    variant: Variant | None,
    seed: int,
    base: Base | None,
) -> None:
    if variant is None:
        shrink_(tensors, factors, base)
    elif variant == "fill":
        filled_shrink_(module, tensors, factors, seed)
    else:
        orthogonal_shrink_(module, tensors, factors)


def _renew_(optimizer: Optimizer | None, copies: list[nn.Module], module: nn.Module) -> None:
    if optimizer is not None:
        reset_optimizer_(optimizer)
    for copy in copies:
        refresh_copy_(copy, module)


def _tell(report: ShrinkReport, module: nn.Module, tensors: list[ShrinkableTensor]) -> None:
    """Log the report's first line, and warn of weights that were left alone."""
    if not is_main_process():
        return
    logger.info("%s", str(report).partition("\n")[0])
    if report.no_gradient:
        logger.warning(
            "DASH: %d tensors got no gradient in any minibatch and stay as they are: %s",
            len(report.no_gradient),
            _some(list(report.no_gradient)),
        )
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    changed = {id(p) for tensor in tensors for p in (*tensor.used_up, *tensor.twins)}
    left = {name: p.numel() for name, p in trained.items() if id(p) not in changed}
    total = sum(p.numel() for p in trained.values())
    if sum(left.values()) > total / 2:
        logger.warning(
            "DASH: %.0f %% of the trained weights are in layers that do not shrink: %s",
            100 * sum(left.values()) / total,
            _some(sorted(left, key=lambda name: -left[name])),
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _under_autocast(loss_fn: LossFn, accelerator: "Accelerator | None") -> LossFn:
    if accelerator is None:
        return loss_fn

    def loss_under_autocast(model: nn.Module, batch: Batch) -> Tensor:
        with accelerator.autocast():
            return loss_fn(model, batch)

    return loss_under_autocast
