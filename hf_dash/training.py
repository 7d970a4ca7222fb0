"""Train one round under Accelerate, to convergence.

Flow: model and shuffled batches → epochs of SGD → stop at the first epoch whose training accuracy
reaches the threshold.
Source: the convergence criterion of Shin et al. (arXiv:2410.23495): training accuracy over an epoch
of at least 99.9 %, here counted while training, without a second pass over the data.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_dash.distributed import synchronise


@dataclass(frozen=True)
class TrainingConfig:
    """How a round is trained.

    Args:
        learning_rate: of SGD, greater than 0.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD, at least 0.
        train_batch_size: images per step and process, at least 1.
        max_epochs: stop after so many epochs even without convergence, at least 1.
        accuracy_threshold: training accuracy over an epoch at which training ends, in (0, 1].
        disable_tqdm: show no progress bar.
    """

    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    train_batch_size: int = 32
    max_epochs: int = 100
    accuracy_threshold: float = 0.999
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "learning_rate": ("greater than 0", self.learning_rate > 0),
            "momentum": ("in [0, 1)", 0 <= self.momentum < 1),
            "weight_decay": ("at least 0", self.weight_decay >= 0),
            "train_batch_size": ("at least 1", self.train_batch_size >= 1),
            "max_epochs": ("at least 1", self.max_epochs >= 1),
            "accuracy_threshold": ("in (0, 1]", 0 < self.accuracy_threshold <= 1),
        }
        for name, (range_, valid) in allowed.items():
            if not valid:
                raise ValueError(f"{name} must be {range_}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TrainingResult:
    """How a training went.

    Args:
        epochs: number of epochs.
        steps: number of optimizer steps.
        train_accuracy: over the last epoch, in [0, 1].
        converged: whether the threshold was reached.
        seconds: duration.
    """

    epochs: int
    steps: int
    train_accuracy: float
    converged: bool
    seconds: float


def train_round(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    config: TrainingConfig,
    accelerator: Accelerator,
    *,
    description: str = "training",
) -> TrainingResult:
    """Train a model in place until its training accuracy reaches the threshold.

    Args:
        model: a transformers image classifier; not prepared.
        batches: a shuffled ``DataLoader`` of mappings with ``labels``; not prepared.
        config: optimizer and stopping.
        accelerator: gives devices, processes and precision.
        description: shown beside the progress bar.

    Raises:
        FloatingPointError: the loss of an epoch is not finite.
    """
    optimizer: Any = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    device = accelerator.device
    synchronise(device)
    started = time.perf_counter()
    epochs = steps = 0
    accuracy = 0.0
    hidden = config.disable_tqdm or not accelerator.is_main_process
    with tqdm(desc=description, unit=" steps", disable=hidden) as progress:
        while epochs < config.max_epochs and accuracy < config.accuracy_threshold:
            accuracy, epoch_steps = _train_epoch(model, batches, optimizer, accelerator, progress)
            epochs, steps = epochs + 1, steps + epoch_steps
            progress.set_postfix(epoch=epochs, train_accuracy=f"{accuracy:.4f}")
    synchronise(device)
    seconds = time.perf_counter() - started
    # Takes the precision wrapper off the model's forward, or the next round would wrap it again.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return TrainingResult(epochs, steps, accuracy, accuracy >= config.accuracy_threshold, seconds)


def _train_epoch(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    optimizer: Any,
    accelerator: Accelerator,
    progress: "tqdm[Any]",
) -> tuple[float, int]:
    """Train one epoch; return its running accuracy over all processes and the steps."""
    model.train()
    # Right answers, images, loss summed over images: read once an epoch, so no step has to wait.
    totals = torch.zeros(3, device=accelerator.device)
    steps = 0
    for batch in batches:
        outputs = model(**batch)
        accelerator.backward(outputs.loss)
        optimizer.step()
        optimizer.zero_grad()
        totals += _totals(outputs, batch["labels"])
        steps += 1
        progress.update()
    right, images, loss = accelerator.reduce(totals, reduction="sum").tolist()
    if not loss - loss == 0:
        raise FloatingPointError(f"the training loss is not finite: {loss / max(images, 1)}")
    return right / images, steps


@torch.no_grad()
def _totals(outputs: Any, labels: Tensor) -> Tensor:
    right = (outputs.logits.argmax(dim=-1) == labels).sum()
    images = torch.full_like(right, labels.shape[0])
    return torch.stack([right.float(), images.float(), outputs.loss.float() * labels.shape[0]])
