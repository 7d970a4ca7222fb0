"""What a model remembers: old data, new data, data it never saw, and wrong labels.

Flow: examples → a fixed subset, shared among the processes → predictions, gradients and features
in evaluation mode → a few numbers; the model is left as it was.
Source: Shin et al., NeurIPS 2024 (arXiv:2410.23495): a warm start keeps memorized noise, and what
is memorized gives no gradient to learn from. Dormant units: Sokar et al., ICML 2023
(arXiv:2302.12902), definition 3.1. Effective rank: Roy & Vetterli, EUSIPCO 2007.
Differs: dormant units are counted in the one layer that is given, not over all layers.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel

from hf_dash.data.examples import ImageExamples
from hf_dash.data.rounds import Round
from hf_dash.method.batches import check_labels
from hf_dash.method.preserve import (
    batch_norms_renewed,
    caches_set_aside,
    evaluation_mode,
    rng_preserved,
)
from hf_dash.utils.distributed import gather

# τ of Sokar et al.: a unit whose mean activation is at most this share of the layer's is dormant.
DORMANT_SHARE = 0.025


def dormant_share(features: Tensor, threshold: float = DORMANT_SHARE) -> float:
    """Return the share of dormant units.

    Args:
        features: activations [examples, units].
        threshold: τ, at least 0: a unit is dormant whose mean absolute activation over the examples
            is at most τ of the mean over all units. 0 counts those that are never active.

    Source: Sokar et al., ICML 2023 (arXiv:2302.12902), definition 3.1. Where no unit is ever
    active, all are dormant.
    """
    activity = features.abs().mean(dim=0)
    return float((activity <= threshold * activity.mean()).double().mean())


def effective_rank(features: Tensor) -> float:
    """Return the effective rank of a matrix: exp of the entropy of its normalized singular values.

    Args:
        features: a matrix [examples, units]; not centered.

    Returns:
        A number from 1 to the smaller dimension; 0 for a matrix of zeros.

    Source: Roy & Vetterli, EUSIPCO 2007.
    """
    values = torch.linalg.svdvals(features)
    if values.sum() == 0:
        return 0.0
    # entr is −p ln p, and 0 at 0.
    return float(torch.special.entr(values / values.sum()).sum().exp())


Examples = TorchDataset[dict[str, Any]]

# Images and labels, on the model's device.
Pairs = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ExampleSets:
    """What a model's memory is measured on; each set holds ``pixel_values`` and ``labels``.

    Args:
        new: examples that arrived in this round.
        held_out: examples never trained on.
        old: examples of earlier rounds; None in a first round.
        flipped: examples as they were trained, with a label that is wrong (:func:`flip_labels`).

    Raises:
        TypeError: a set is not a map-style dataset.
        ValueError: a set is empty.

    Example:
        >>> import torch
        >>> import hf_dash
        >>> examples = [{"pixel_values": torch.zeros(3, 8, 8), "labels": 0}]
        >>> list(hf_dash.training.ExampleSets(new=examples, held_out=examples).given)
        ['new', 'held_out']
    """

    new: Examples
    held_out: Examples
    old: Examples | None = None
    flipped: Examples | None = None

    def __post_init__(self) -> None:
        for name, examples in self.given.items():
            if not hasattr(examples, "__len__"):
                kind = type(examples).__name__
                raise TypeError(f"{name} must be a map-style dataset, got {kind}")
            if len(examples) == 0:
                raise ValueError(f"{name} must hold at least one example, got none")

    @property
    def given(self) -> dict[str, Examples]:
        """The sets there are, by name."""
        sets = {"old": self.old, "new": self.new, "held_out": self.held_out}
        sets["flipped"] = self.flipped
        return {name: examples for name, examples in sets.items() if examples is not None}


def measure_memorization(
    model: nn.Module,
    sets: ExampleSets,
    accelerator: Accelerator,
    *,
    batch_size: int = 256,
    max_examples: int | None = 2_000,
    with_features: bool = False,
    renew_batch_norms: bool = False,
) -> dict[str, float]:
    """Measure how well a model knows old, new and held-out examples, and what is left to learn.

    Everything runs in evaluation mode, in the model's own precision (without autocast, in which
    small gradients vanish). Afterwards the model, its gradients and all random states are as they
    were. On several processes each example is computed once; all get the same numbers.

    Batch norms use their running statistics, as evaluation does. Right after a start these still
    are those of the weights before: a shrunk model may answer at random for this reason alone.

    Args:
        model: a transformers image classifier; not prepared.
        sets: the examples.
        accelerator: gives the processes; the model is computed on the device it lies on.
        batch_size: images per batch and process, at least 1; gradients need memory for as many.
        max_examples: of each set, over all processes, at least 1: a fixed subset, evenly spaced
            from the first example on, so that the cost does not grow with the data. None takes
            all. At 2,000 the standard error of an accuracy is at most 1.1 points.
        with_features: describe the features before the classifier too; timm models only.
        renew_batch_norms: measure with the statistics of old and new examples under the present
            weights, which every process computes, instead of the running ones.

    Returns:
        ``accuracy_old``, ``accuracy_new``, ``accuracy_held_out``: in [0, 1].
        ``gradient_norm_old``, ``gradient_norm_new``: Euclidean norm of the gradient of the mean
        cross-entropy with respect to all trainable parameters together.
        ``flipped_reproduced``: share of ``flipped`` for which the model answers the wrong label it
        was trained on, in [0, 1].
        ``dormant_share``: share of the units of the last features whose mean absolute activation
        over the held-out examples is at most τ = 0.025 of the mean over all units, in [0, 1].
        ``effective_rank``: of the matrix of the held-out examples' features [examples, units]: the
        exponential of the entropy of its singular values divided by their sum; from 1 to the
        number of units, 0 where every feature is 0.
        Numbers of sets that were not given, and of features not asked for, are left out.

    Raises:
        TypeError: features are asked for and the model is not a timm model.
        ValueError: a label is not one of the model's classes, a number is out of range, or no
            parameter is trainable.
        FloatingPointError: a gradient is not finite.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> import hf_dash
        >>> from hf_dash.training import ExampleSets, measure_memorization
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> examples = [{"pixel_values": torch.rand(3, 32, 32), "labels": i % 2} for i in range(4)]
        >>> found = measure_memorization(
        ...     model, ExampleSets(new=examples, held_out=examples), Accelerator(cpu=True)
        ... )
        >>> sorted(found)
        ['accuracy_held_out', 'accuracy_new', 'gradient_norm_new']
    """
    _check(model, batch_size, max_examples, with_features)
    subsets = {
        name: Subset(examples, spaced_indices(len(examples), max_examples))  # type: ignore[arg-type]
        for name, examples in sets.given.items()
    }
    images = _images(
        model, [subsets[name] for name in ("old", "new") if name in subsets], batch_size
    )
    result: dict[str, float] = {}
    with (
        rng_preserved(),
        evaluation_mode(model),
        caches_set_aside(model) as empty_caches,
        batch_norms_renewed(model, images) if renew_batch_norms else nullcontext(),
    ):
        for name, subset in subsets.items():
            pairs = partial(_pairs, model, subset, accelerator, batch_size, empty_caches)
            if name in ("old", "new"):
                right, norm = _accuracy_and_gradient_norm(
                    model, pairs(), len(subset), accelerator, name
                )
                result[f"accuracy_{name}"], result[f"gradient_norm_{name}"] = right, norm
            else:
                key = "flipped_reproduced" if name == "flipped" else f"accuracy_{name}"
                result[key] = _accuracy(model, pairs(), len(subset), accelerator)
            if name == "held_out" and with_features:
                features = _features(model, pairs())
                result["dormant_share"] = dormant_share(features)
                result["effective_rank"] = effective_rank(features)
    return result


def measure_round(
    model: nn.Module, round_: Round, held_out: ImageExamples, accelerator: Accelerator
) -> dict[str, float]:
    """Measure a model by the examples of a round, old ones with wrong labels among them.

    Batch norms are renewed on the round's data before they answer: shrunk weights under the old
    statistics answer at random, whatever they remember.

    Args:
        model: as :func:`measure_memorization` takes it.
        round_: about to be trained; map-style.
        held_out: of these, the examples whose class the model knows.
        accelerator: gives the processes.

    Raises:
        ValueError: the round holds streams.
    """
    if not isinstance(round_.new, ImageExamples):
        raise ValueError("memorization cannot be measured on streams: use map-style data")
    num_classes = cast(int, cast(PreTrainedModel, model).config.num_labels)
    known = [index for index, label in enumerate(held_out.labels) if 0 <= label < num_classes]
    sets = ExampleSets(round_.new, Subset(held_out, known), round_.seen, round_.flipped_seen)
    return measure_memorization(
        model, sets, accelerator, with_features=True, renew_batch_norms=True
    )


def _check(
    model: nn.Module, batch_size: int, max_examples: int | None, with_features: bool
) -> None:
    for name, count in (("batch_size", batch_size), ("max_examples", max_examples)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count!r}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no trainable parameter, so there is no gradient to measure")
    if with_features and not hasattr(_timm_model(model), "forward_head"):
        raise TypeError(
            "with_features needs a timm model, which gives the features before its classifier, got"
            f" {type(model).__name__}"
        )


def spaced_indices(count: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` of the numbers 0 … count − 1, evenly spaced, beginning with 0."""
    kept = count if limit is None else min(count, limit)
    return [index * count // kept for index in range(kept)]


def _images(
    model: nn.Module, subsets: "list[Subset[dict[str, Any]]]", batch_size: int
) -> Iterator[Tensor]:
    examples: ConcatDataset[dict[str, Any]] = ConcatDataset(subsets)
    # A last batch of one image has no variance.
    batches = DataLoader(examples, batch_size=batch_size, drop_last=len(examples) > batch_size)
    device = next(model.parameters()).device
    yield from (batch["pixel_values"].to(device) for batch in batches)


def _pairs(
    model: nn.Module,
    subset: "Subset[dict[str, Any]]",
    accelerator: Accelerator,
    batch_size: int,
    empty_caches: Callable[[], None],
) -> Pairs:
    """Yield this process's share of the examples, dealt out in turn: each comes once."""
    share = range(accelerator.process_index, len(subset), accelerator.num_processes)
    device = next(model.parameters()).device
    num_classes = getattr(getattr(model, "config", None), "num_labels", None)
    for batch in DataLoader(Subset(subset, share), batch_size=batch_size):
        check_labels(batch["labels"], num_classes)
        empty_caches()
        yield batch["pixel_values"].to(device), batch["labels"].to(device)


@torch.no_grad()
def _accuracy(model: nn.Module, pairs: Pairs, count: int, accelerator: Accelerator) -> float:
    right = torch.zeros((), device=accelerator.device)
    for images, labels in pairs:
        right += _num_right(model(pixel_values=images).logits, labels).to(right.device)
    return float(accelerator.reduce(right, reduction="sum")) / count


def _num_right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels).sum()


def _accuracy_and_gradient_norm(
    model: nn.Module, pairs: Pairs, count: int, accelerator: Accelerator, name: str
) -> tuple[float, float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    right = torch.zeros((), device=accelerator.device)
    for images, labels in pairs:
        with torch.enable_grad():
            logits = model(pixel_values=images).logits
            # The sum over examples: batches of any size and processes with any share then add up.
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            # Not loss.backward(): nothing is left in .grad, and no hook of others fires.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for part, gradient in zip(parts, gradients, strict=True):
            if gradient is not None:
                part.add_(gradient.flatten())
        right += _num_right(logits.detach(), labels).to(right.device)
    flat = accelerator.reduce(flat.to(accelerator.device), reduction="sum")
    norm = float(torch.linalg.vector_norm(flat)) / count
    if not np.isfinite(norm):
        raise FloatingPointError(f"the gradient over the {name} examples is not finite")
    return float(accelerator.reduce(right, reduction="sum")) / count, norm


def _timm_model(model: nn.Module) -> Any:
    return getattr(model, "timm_model", model)


@torch.no_grad()
def _features(model: nn.Module, pairs: Pairs) -> Tensor:
    """Return the features before the classifier, of the examples of all processes."""
    timm_model = _timm_model(model)
    dtype = next(model.parameters()).dtype
    own = []
    for images, _ in pairs:
        features = timm_model.forward_features(images.to(dtype))
        own.append(timm_model.forward_head(features, pre_logits=True).flatten(1).double().cpu())
    return torch.cat([part for rank in gather(own) for part in rank])
