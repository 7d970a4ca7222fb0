"""The loss that is minimized where none is given: the model's own, or plain cross-entropy.

Flow: a batch → does the model's ``forward`` take it as it is? → the loss that it returns; else
images → logits → cross-entropy with the labels.
Differs from guessing: cross-entropy stands for single-label classification alone, which logits and
labels must show. Anything else is refused with a ``loss_fn`` to start from.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dash.method.batches import LABEL_KEYS, Batch, check_labels, count_images, split_labels
from hf_dash.method.wrappers import without_adapter

# The label that cross-entropy leaves out of its mean, in torch as in transformers.
IGNORED = -100


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss on a batch, or cross-entropy where it has none.

    Args:
        model: one that takes the batch as keyword arguments and returns its loss, as those of
            transformers do, or a bare one from images [batch, …] to logits [batch, classes].
        batch: what the model takes; for a bare one a mapping with ``labels``, or a pair (images,
            labels). Labels are integers [batch] or class probabilities [batch, classes].

    Raises:
        ValueError: the batch has no labels or more inputs than a bare model can take, or what is to
            be minimized does not show: then a ``loss_fn`` is needed.

    Example:
        >>> import torch
        >>> from hf_dash.method.loss import default_loss
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = {"pixel_values": torch.ones(4, 3), "labels": torch.tensor([0, 1, 1, 0])}
        >>> default_loss(model, batch).ndim
        0
    """
    names = _parameters(model)
    if isinstance(batch, Mapping) and ("labels" in names or _takes(names, batch)):
        return _own_loss(model, model(**_with_labels(batch)))
    inputs, labels = split_labels(batch)
    if "labels" in names:
        images = getattr(model, "main_input_name", "pixel_values")
        return _own_loss(model, model(**{images: inputs}, labels=labels))
    if isinstance(inputs, Mapping):
        if len(inputs) != 1:
            raise ValueError(
                f"a model that takes no labels takes the images alone, got {sorted(inputs)}"
            )
        (inputs,) = inputs.values()
    outputs = model(inputs)
    return _cross_entropy(model, getattr(outputs, "logits", outputs), labels)


class WeightedLoss:
    """Cross-entropy with a weight for every class, as ``loss_fn`` of a shrink and in training.

    The mean is over images and not over weights, so it does not depend on what else is in a batch.

    Args:
        weights: [classes], at least 0.

    Example:
        >>> import torch
        >>> from hf_dash.method.loss import WeightedLoss
        >>> loss_fn = WeightedLoss(torch.tensor([0.5, 2.0]))
        >>> loss_fn.of(torch.zeros(2, 2), torch.tensor([0, 1]))  # (0.5 + 2) / 2 · ln 2
        tensor(0.8664)
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a model on a batch."""
        images, labels = split_labels(batch)
        inputs = images if isinstance(images, Mapping) else {"pixel_values": images}
        return self.of(model(**inputs).logits, labels)

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits [batch, classes] and labels [batch]."""
        weights = self.weights.to(logits)
        return F.cross_entropy(logits, labels, weights, reduction="none").mean()


def count_labels(batch: Batch) -> int:
    """Return how many items of a batch :func:`default_loss` is the mean of.

    They are the labels that are not to be ignored (−100), where there is one per image.
    """
    labels = _labels_of(batch)
    if labels is None or labels.is_floating_point() or labels.ndim != 1:
        return count_images(batch)
    return int(labels.ne(IGNORED).sum())


def labels_checked(batches: Iterable[Batch], model: nn.Module) -> Iterator[Batch]:
    """Check labels while they are still in main memory: on a device an index too high is fatal.

    Only single labels [batch] are checked: other tasks number their classes in their own way.
    """
    config = getattr(model, "config", None)
    num_classes = getattr(config, "num_labels", getattr(model, "num_classes", None))
    problem = getattr(config, "problem_type", None) or "single_label_classification"
    single = problem == "single_label_classification" and num_classes not in (None, 1)
    for batch in batches:
        labels = _labels_of(batch)
        if single and labels is not None and labels.ndim == 1:
            check_labels(labels, num_classes, IGNORED)
        yield batch


def _labels_of(batch: Any) -> Tensor | None:
    """Return the labels of a batch of a mapping or a pair; None where there is no such tensor."""
    labels = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        labels = batch[1]
    return labels if isinstance(labels, Tensor) else None


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(without_adapter(model).forward).parameters


def _takes(names: Mapping[str, inspect.Parameter], batch: Mapping[str, Any]) -> bool:
    """Tell whether keyword arguments can be the batch: all by name, or the rest as ``**kwargs``."""
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in names.values())
    return names.keys() >= batch.keys() or (open_ended and bool(names.keys() & batch.keys()))


def _with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with ``label`` under the name that models of transformers know."""
    return {"labels" if key == "label" else key: value for key, value in batch.items()}


def _own_loss(model: nn.Module, outputs: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, tuple) and outputs:
        loss = outputs[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        keys = f" with {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
        raise _needs_loss_fn(
            f"{type(model).__name__} returned no loss, but {type(outputs).__name__}{keys}",
            "my_loss(model(**batch), batch)",
        )
    return loss


def _cross_entropy(model: nn.Module, logits: Any, labels: Tensor) -> Tensor:
    name = type(model).__name__
    if not isinstance(logits, Tensor):
        raise _needs_loss_fn(
            f"{name} returned {type(logits).__name__}, not logits",
            "my_loss(model(batch[0]), batch[1])",
        )
    if logits.ndim != 2 or logits.shape[1] == 1:
        raise _needs_loss_fn(
            f"{name} returned {tuple(logits.shape)}, not two or more logits per image",
            "F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(-1), batch[1].float())",
        )
    if labels.is_floating_point() and labels.shape == logits.shape and _are_shares(labels):
        return F.cross_entropy(logits, labels)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
        raise _needs_loss_fn(
            f"labels are {labels.dtype} {tuple(labels.shape)}, neither one class per image nor"
            " probabilities of classes that add up to 1",
            "F.binary_cross_entropy_with_logits(model(batch[0]), batch[1].float())",
        )
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORED)


def _are_shares(labels: Tensor) -> bool:
    sums = labels.sum(1)
    return bool((labels >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)


def _needs_loss_fn(what: str, example: str) -> ValueError:
    return ValueError(
        f"{what}: what is minimized is not known, and hf_dash does not guess. Give it as loss_fn,"
        f" such as loss_fn=lambda model, batch: {example}"
    )
