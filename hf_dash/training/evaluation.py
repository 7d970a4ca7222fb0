"""How good a model is on held-out examples.

Flow: held-out examples → predictions of all processes, in the examples' order →
``evaluate.Metric`` → accuracy overall and per class.
Differs from ``evaluate.load("accuracy")``: the metric is part of the package; nothing is fetched.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset


class ClassAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Accuracy overall and per class.

    ``compute`` returns ``accuracy`` in [0, 1] and ``per_class_accuracy``, a mapping from label to
    accuracy over the classes that occur among the references. A negative reference means a
    class the model does not know: no prediction of it is right, and it has no entry of its own.

    Example:
        >>> import hf_dash
        >>> metric = hf_dash.training.ClassAccuracy(keep_in_memory=True)
        >>> metric.compute(predictions=[0, 1, 1], references=[0, 1, -1])["per_class_accuracy"]
        {0: 1.0, 1: 1.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy overall and per class.",
            citation="",
            inputs_description="predictions and references: lists of integer labels.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        right = (predicted == true) & (true >= 0)
        classes = np.unique(true[true >= 0])
        return {
            "accuracy": float(right.mean()),
            "per_class_accuracy": {int(c): float(right[true == c].mean()) for c in classes},
        }


def check_readable(name: str, examples: "TorchDataset[dict[str, Any]]") -> None:
    """Read every example once, before hours of training rather than after them.

    Args:
        name: of the argument, for the message.
        examples: that will be evaluated on; map-style.

    Raises:
        ValueError: one cannot be read.
    """
    for index in range(len(examples)):  # type: ignore[arg-type]
        try:
            examples[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{name} must hold images that can be read, but example {index} cannot: {error}"
            ) from error


def predict(
    model: nn.Module,
    examples: "TorchDataset[dict[str, Any]]",
    accelerator: Accelerator,
    *,
    batch_size: int = 256,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Predict the labels of held-out examples in evaluation mode; the model's own mode is restored.

    Args:
        model: a transformers image classifier; not prepared.
        examples: mappings of ``pixel_values`` and ``labels``, one an example; a label of −1 means a
            class the model does not know.
        accelerator: gives devices and processes.
        batch_size: images per batch and process, at least 1.

    Returns:
        The predicted labels and the references: int64 of shape [num_examples] each, in the order
        of the examples, the same on every process.

    Raises:
        ValueError: ``examples`` are empty.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> import hf_dash
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> examples = [{"pixel_values": torch.zeros(3, 32, 32), "labels": i % 2} for i in range(4)]
        >>> predictions, labels = hf_dash.training.predict(model, examples, Accelerator(cpu=True))
        >>> (predictions.shape, labels.tolist())
        ((4,), [0, 1, 0, 1])
    """
    if len(examples) == 0:  # type: ignore[arg-type]
        raise ValueError("examples must hold at least one held-out example, got none")
    batches = accelerator.prepare_data_loader(DataLoader(examples, batch_size=batch_size))
    model.to(accelerator.device)
    was_training = model.training
    model.eval()
    pairs: list[np.ndarray[Any, Any]] = []
    with torch.no_grad():
        for batch in batches:
            with accelerator.autocast():
                predicted = model(pixel_values=batch["pixel_values"]).logits.argmax(dim=-1)
            gathered = accelerator.gather_for_metrics((predicted, batch["labels"]))
            pairs.append(torch.stack(gathered).cpu().numpy())
    model.train(was_training)
    predictions, references = np.concatenate(pairs, axis=1).astype(np.int64)
    return predictions, references


def evaluate_model(
    model: nn.Module,
    examples: "TorchDataset[dict[str, Any]]",
    accelerator: Accelerator,
    *,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Evaluate a model on held-out examples.

    Args:
        model: a transformers image classifier; not prepared.
        examples: mappings of ``pixel_values`` and ``labels``, one an example. A label of −1 means a
            class the model does not know: it counts as wrong in ``accuracy`` and has no entry
            in ``per_class_accuracy``.
        accelerator: gives devices and processes.
        batch_size: images per batch and process, at least 1.

    Returns:
        ``accuracy`` and ``per_class_accuracy`` in [0, 1], and ``num_examples``, all of them
        counted.

    Raises:
        ValueError: ``examples`` are empty.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> import hf_dash
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> examples = [{"pixel_values": torch.zeros(3, 32, 32), "labels": i % 2} for i in range(4)]
        >>> hf_dash.training.evaluate_model(model, examples, Accelerator(cpu=True))["accuracy"]
        0.5
    """
    predictions, references = predict(model, examples, accelerator, batch_size=batch_size)
    metric = ClassAccuracy(keep_in_memory=True)
    result: dict[str, Any] = metric.compute(predictions=predictions, references=references)
    return {**result, "num_examples": len(references)}
