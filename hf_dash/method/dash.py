"""The whole method: gradients over old and new data, then the shrink.

Flow: batches, oldest to newest → newest K → G (``gradients``) → factors → weights (``shrink``).
Source: Algorithm 1 of Shin et al., NeurIPS 2024 (arXiv:2410.23495); authors' commit 3d3cea6.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_dash.method.base import Base, open_base
from hf_dash.method.batches import Batch, check_labels, newest_batches, split_labels
from hf_dash.method.config import DashConfig, Variant, with_settings
from hf_dash.method.gradients import LossFn, average_gradients
from hf_dash.method.shrink import ShrinkReport, all_factors, report_tensors, shrink_
from hf_dash.method.tensors import ShrinkableTensor, find_shrinkable, is_sharded
from hf_dash.method.variants import check_fillable, filled_shrink_, orthogonal_shrink_
from hf_dash.method.wrappers import takes_labels, unwrap
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
    accelerator: "Accelerator | None" = None,
    seed: int = 0,
    dry_run: bool = False,
    disable_tqdm: bool | None = None,
    **settings: Any,
) -> ShrinkReport:
    """Shrink every weight vector of a model by how well it agrees with the descent direction.

    Call it on the weights of the last round, before you train on old and new data. The model may
    be a bare timm model, a transformers image classifier, or either prepared by Accelerate. It
    runs in evaluation mode; afterwards nothing but the weights has changed.

    Args:
        model: the model, changed in place.
        batches: minibatches ordered from oldest to newest: mappings with ``labels``, or pairs of
            images [batch, channels, height, width] and labels [batch]. Only the newest K are
            computed; see :func:`~hf_dash.method.batches.newest_batches`. Use evaluation transforms.
        loss_fn: called as ``loss_fn(model, batch)``, returns the scalar mean loss; by default the
            model's own loss, or cross-entropy where the model takes no labels.
        config: all settings at once; by default the paper's.
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
        TypeError, ValueError: an argument or a batch is not of the form above.
        FloatingPointError: a loss, gradient or weight is not finite.
        NotImplementedError: the model is wrapped or stored in a way the shrink cannot work on.

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
    config = with_settings(config, settings, "dash_shrink_()")
    wrapped = unwrap(model)
    module = wrapped.module
    tensors, untouched = _find(module, config, seed)
    newest = newest_batches(batches, config.newest)
    if loss_fn is None:
        loss_fn, newest = default_loss, _labels_checked(newest, module)

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
            disable_tqdm=disable_tqdm,
            quietly=wrapped.has_foreign_hooks,
        )
        factors = all_factors(tensors, average, config.lam, base)
        if not dry_run:
            _change_(module, tensors, factors, config.variant, seed, base)
            wrapped.refresh()
    synchronize(tensors[0].parameter.device)
    report = ShrinkReport(
        tensors=report_tensors(tensors, factors, config.lam),
        untouched=tuple(untouched),
        config=config if base is None else replace(config, base=base.name),
        num_batches=len(average.batch_sizes),
        num_images=sum(average.batch_sizes) * num_processes(),
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        towards_zero=() if base is None else base.towards_zero,
    )
    if is_main_process():
        logger.info("%s", str(report).partition("\n")[0])
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
    return found


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


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss on a batch, or cross-entropy where it takes no labels.

    Args:
        model: a transformers image classifier, or a bare model from images to logits.
        batch: a mapping with ``labels``, or a pair (images, labels).

    Raises:
        ValueError: the batch has no labels, or more inputs than a bare model can take.
    """
    inputs, labels = split_labels(batch)
    if isinstance(inputs, Mapping) and takes_labels(model):
        loss: Tensor = model(**inputs, labels=labels).loss
        return loss
    if isinstance(inputs, Mapping):
        if len(inputs) != 1:
            raise ValueError(
                f"a model that takes no labels takes the images alone, got {sorted(inputs)}"
            )
        (inputs,) = inputs.values()
    outputs = model(inputs)
    return F.cross_entropy(getattr(outputs, "logits", outputs), labels)


def _labels_checked(batches: Iterable[Batch], model: nn.Module) -> Iterator[Batch]:
    """Check labels while they are still in main memory: on a device an index too high is fatal."""
    config = getattr(model, "config", None)
    num_classes = getattr(config, "num_labels", getattr(model, "num_classes", None))
    for batch in batches:
        check_labels(split_labels(batch)[1], num_classes)
        yield batch


def _under_autocast(loss_fn: LossFn, accelerator: "Accelerator | None") -> LossFn:
    if accelerator is None:
        return loss_fn

    def loss_under_autocast(model: nn.Module, batch: Batch) -> Tensor:
        with accelerator.autocast():
            return loss_fn(model, batch)

    return loss_under_autocast
