"""How good a model is on held-out examples.

Flow: held-out examples → predictions of all processes → ``evaluate.Metric`` → accuracy overall and
per class.
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
    accuracy over the classes that occur among the references.
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
        right = predicted == true
        classes = np.unique(true)
        return {
            "accuracy": float(right.mean()),
            "per_class_accuracy": {int(c): float(right[true == c].mean()) for c in classes},
        }


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
        examples: mappings of ``pixel_values`` and ``labels``, one an example.
        accelerator: gives devices and processes.
        batch_size: images per batch and process.

    Returns:
        ``accuracy`` and ``per_class_accuracy`` in [0, 1], and ``num_examples``.

    Raises:
        ValueError: there is no example.
    """
    num_examples = len(examples)  # type: ignore[arg-type]
    if num_examples == 0:
        raise ValueError("examples must hold at least one held-out example, got none")
    batches = accelerator.prepare_data_loader(DataLoader(examples, batch_size=batch_size))
    model.to(accelerator.device)
    was_training = model.training
    model.eval()
    predictions: list[int] = []
    references: list[int] = []
    with torch.no_grad():
        for batch in batches:
            with accelerator.autocast():
                predicted = model(pixel_values=batch["pixel_values"]).logits.argmax(dim=-1)
            pair = accelerator.gather_for_metrics((predicted, batch["labels"]))
            predictions += pair[0].tolist()
            references += pair[1].tolist()
    model.train(was_training)
    metric = ClassAccuracy(keep_in_memory=True)
    result: dict[str, Any] = metric.compute(predictions=predictions, references=references)
    return {**result, "num_examples": num_examples}
