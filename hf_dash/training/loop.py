"""Train one round under Accelerate, to convergence.

Flow: model and shuffled batches → epochs of SGD or AdamW, by SAM where it is asked for → stop at
the first epoch whose training accuracy reaches the threshold.
Source: the convergence criterion of Shin et al. (arXiv:2410.23495): training accuracy over an epoch
of at least 99.9 %, here counted while training, without a second pass over the data.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_dash.method.batches import to_device
from hf_dash.method.loss import WeightedLoss
from hf_dash.training.batch_norms import renew_batch_norms_, say_lag
from hf_dash.training.config import TrainingConfig
from hf_dash.training.optimizers import (
    kept_state,
    make_optimizer,
    make_schedule,
    restore_optimizer_,
    sharpest_point,
)
from hf_dash.training.recorded import RecordedStep, Step, check_recordable
from hf_dash.utils.distributed import synchronize

# Called with the model, wrapped as it is trained, in every step; joins the loss.
Penalty = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class TrainingResult:
    """How a training went.

    Args:
        epochs: number of epochs.
        steps: number of optimizer steps.
        train_accuracy: over the last epoch, in [0, 1].
        converged: whether the threshold was reached; None where there was none.
        seconds: duration.
        optimizer_state: what the optimizer kept, momentum for one, as tensors on the CPU by
            ``"<parameter name>::<entry>"``; a later ``train_round`` can continue with it.
        images: trained on, of all epochs and processes.

    Example:
        >>> import hf_dash
        >>> hf_dash.training.TrainingResult(3, 30, 0.9, False, 1.5).optimizer_state
        {}
    """

    epochs: int
    steps: int
    train_accuracy: float
    converged: bool | None
    seconds: float
    optimizer_state: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    images: int = 0


@dataclass
class _Training:
    """What every step of one training needs; the model is prepared."""

    model: nn.Module
    optimizer: Any
    schedule: LRScheduler | None
    accelerator: Accelerator
    penalty: Penalty | None
    sam_rho: float
    loss: WeightedLoss | None = None

    def step(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Train on one batch; return :func:`_totals` at the weights before the step."""
        # Read at once: CUDA graphs write the outputs of the next pass over them.
        totals = _totals(self._backward(batch), batch["labels"])
        if self.sam_rho > 0:
            with sharpest_point(self.model, self.sam_rho):
                self.optimizer.zero_grad()
                self._backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return totals

    def _backward(self, batch: Any) -> Any:
        outputs = self.model(**batch)
        if self.loss is not None:
            outputs.loss = self.loss.of(outputs.logits, batch["labels"])
        loss = outputs.loss if self.penalty is None else outputs.loss + self.penalty(self.model)
        self.accelerator.backward(loss)
        return outputs

    def epoch(
        self, step: Step, batches: Iterable[Any], progress: "tqdm[Any]"
    ) -> tuple[float, int, int]:
        """Train one epoch; return its accuracy and images over all processes, and the steps."""
        self.model.train()
        device = self.accelerator.device
        # Read once an epoch, so no step waits.
        totals = torch.zeros(3, device=device)
        steps = 0
        for item in batches:
            # Prepared loaders have moved their batches already; then this does nothing.
            batch: Any = to_device(item, device)
            totals += step(batch)
            # Where scaled gradients overflow, float16 training skips a step and tries a smaller
            # scale.
            if self.schedule is not None and not self.optimizer.step_was_skipped:
                self.schedule.step()
            steps += 1
            progress.update()
        right, images, loss = self.accelerator.reduce(totals, reduction="sum").tolist()
        if images == 0:
            raise ValueError(
                "batches gave no image in an epoch: they must hold one, and start over in every"
                " epoch"
            )
        if not loss - loss == 0:
            raise FloatingPointError(f"the training loss is not finite: {loss / images}")
        return right / images, int(images), steps


def train_round(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    config: TrainingConfig,
    accelerator: Accelerator,
    *,
    penalty: Penalty | None = None,
    loss: WeightedLoss | None = None,
    optimizer_state: Mapping[str, Tensor] | None = None,
    description: str = "training",
) -> TrainingResult:
    """Train a model in place until its training accuracy reaches the threshold.

    Args:
        model: a transformers image classifier; not prepared.
        batches: a shuffled ``DataLoader`` of mappings with ``labels``, not prepared; or anything
            else that gives such mappings again in every epoch, each process its own equal share.
            Where it has ``set_epoch``, that is called with 0, 1, … before the epochs.
        config: optimizer, schedule and stopping.
        accelerator: gives devices, processes and precision.
        penalty: called as ``penalty(model)`` in every step with the prepared model; its scalar is
            added to the loss. Reported losses and accuracies are without it.
        loss: takes the place of the model's own.
        optimizer_state: of an earlier ``TrainingResult``, to continue with; one process or DDP.
            What no longer fits in shape, name or kind of optimizer is dropped.
        description: shown with the progress bar.

    Raises:
        FloatingPointError: the loss of an epoch is not finite.
        ValueError: an epoch had no image; ``config`` has a learning-rate schedule and ``batches``
            no length, or ``cuda_graphs`` where a step cannot be recorded; a key of
            ``optimizer_state`` is malformed.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> import hf_dash
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> batches = [{"pixel_values": torch.rand(8, 3, 32, 32), "labels": torch.arange(8) % 2}]
        >>> config = hf_dash.TrainingConfig(max_epochs=2, disable_tqdm=True)
        >>> hf_dash.training.train_round(model, batches, config, Accelerator(cpu=True)).steps
        2
    """
    inner = model
    if config.cuda_graphs:
        check_recordable(accelerator)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    # Elsewhere torch's own choice: a fused step differs by rounding.
    fused = True if accelerator.device.type == "cuda" else None
    optimizer: Any = make_optimizer(model, config, fused=fused)
    if optimizer_state:
        restore_optimizer_(model, optimizer, optimizer_state)
    plain_optimizer = optimizer
    if _length(batches) is None:
        # A schedule that cannot be made is refused before anything is prepared.
        make_schedule(optimizer, config, None)
    # A prepared DataLoader sets the epoch itself.
    set_epoch = None if isinstance(batches, DataLoader) else getattr(batches, "set_epoch", None)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        _share_forward_(inner, accelerator)
    # Not prepared by Accelerate, which would step it once per process.
    schedule = make_schedule(plain_optimizer, config, _length(batches))
    training = _Training(model, optimizer, schedule, accelerator, penalty, config.sam_rho, loss)
    step = RecordedStep(training.step) if config.cuda_graphs else training.step
    goal = config.accuracy_threshold
    synchronize(accelerator.device)
    started = time.perf_counter()
    epochs, steps, images, accuracy = 0, 0, 0, 0.0
    hidden = config.disable_tqdm or not accelerator.is_main_process
    with tqdm(desc=description, unit=" steps", disable=hidden) as progress:
        while epochs < config.max_epochs and (goal is None or accuracy < goal):
            if set_epoch is not None:
                set_epoch(epochs)
            accuracy, epoch_images, epoch_steps = training.epoch(step, batches, progress)
            epochs, steps, images = epochs + 1, steps + epoch_steps, images + epoch_images
            progress.set_postfix(epoch=epochs, train_accuracy=f"{accuracy:.4f}")
    if config.renew_batch_norms:
        renew_batch_norms_(model, batches, accelerator.device)
    else:
        say_lag(model, steps)
    synchronize(accelerator.device)
    seconds = time.perf_counter() - started
    # Takes the precision wrapper off the model's forward, or the next round would wrap it again.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if config.channels_last:
        # So that the next start computes the same on this model as on its saved weights.
        inner.to(memory_format=torch.contiguous_format)
    accelerator.free_memory()
    converged = None if goal is None else accuracy >= goal
    kept = kept_state(inner, plain_optimizer)
    return TrainingResult(epochs, steps, accuracy, converged, seconds, kept, images)


def _length(batches: Iterable[Any]) -> int | None:
    """Return the number of batches in an epoch where it is known; a stream's loader has none."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


# What Accelerate has made of a class's forward for mixed precision, the first time.
_FORWARDS: dict[tuple[Any, ...], Any] = {}


def _share_forward_(model: nn.Module, accelerator: Accelerator) -> None:
    """Give a prepared model the forward that the first one of its class was given.

    For mixed precision Accelerate makes a forward anew for every model and round. ``torch.compile``
    would compile each, and after eight of them none. A classifier notes its kind of labels in its
    first forward; without that note the second one would be compiled again.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and config.problem_type is None and config.num_labels > 1:
        config.problem_type = "single_label_classification"
    original = getattr(getattr(model, "_original_forward", None), "__func__", None)
    if original is not None:
        how = (accelerator.mixed_precision, accelerator.device.type, accelerator.autocast_handler)
        key = (original, *map(str, how))
        forward: Any = model.forward
        shared: Any = _FORWARDS.setdefault(key, forward.__func__)
        model.forward = MethodType(shared, model)


@torch.no_grad()
def _totals(outputs: Any, labels: Tensor) -> Tensor:
    """Return the right answers, the images, and the loss summed over them."""
    right = (outputs.logits.argmax(dim=-1) == labels).sum()
    images = torch.full_like(right, labels.shape[0])
    return torch.stack([right.float(), images.float(), outputs.loss.float() * labels.shape[0]])
