"""Settings of the training of one round, checked when they are made, and the authors' two presets.

Source: Shin et al., NeurIPS 2024 (arXiv:2410.23495): ``"plain"`` is the training of its main
experiments, ``"sota"`` that of its comparison with the state of the art.
"""

import copy
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from typing import Any, Literal, get_args

from hf_dash.utils.checks import check_class_weights, check_flag

Optim = Literal["sgd", "adamw"]
Schedule = Literal["constant", "cosine"]

TrainingPreset = Literal["plain", "sota"]

_PRESETS: dict[str, dict[str, Any]] = {
    "plain": {
        "optim": "sgd",
        "learning_rate": 1e-3,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "train_batch_size": 128,
        "augment": False,
        "accuracy_threshold": 0.999,
    },
    "sota": {
        "optim": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "train_batch_size": 128,
        "augment": True,
        "lr_milestones": [60, 120, 160, 200],
        "lr_gamma": 0.2,
        "warmup_epochs": 1,
        "max_epochs": 260,
        "accuracy_threshold": None,
    },
}


@dataclass(frozen=True)
class TrainingConfig:
    """How a round is trained. Every round begins with a learning-rate schedule of its own.

    Args:
        learning_rate: greater than 0; after warm-up and before the first milestone.
        momentum: of SGD, in [0, 1).
        weight_decay: at least 0; decoupled from the gradient under AdamW.
        train_batch_size: images per step and process, at least 1.
        max_epochs: stop after so many epochs even without convergence, at least 1.
        accuracy_threshold: training accuracy over an epoch at which training ends, in (0, 1]; None
            always trains ``max_epochs``.
        disable_tqdm: show no progress bar.
        optim: ``"sgd"`` or ``"adamw"``.
        adam_beta1: of AdamW, in [0, 1).
        adam_beta2: of AdamW, in [0, 1).
        adam_epsilon: of AdamW, greater than 0.
        sam_rho: radius of sharpness-aware minimization, at least 0; 0 is without, the authors of
            DASH use 0.1. Every step then costs two.
        lr_milestones: numbers of epochs, rising and at least 1, after which the learning rate is
            multiplied by ``lr_gamma``; warm-up epochs count.
        lr_gamma: in (0, 1].
        lr_scheduler_type: ``"constant"`` (but for warm-up and milestones), or ``"cosine"``: after
            the warm-up the learning rate falls to 0 over ``max_epochs``, as people fine-tune. Such
            training always lasts ``max_epochs``: ``accuracy_threshold`` becomes None.
        warmup_epochs: epochs in which the learning rate rises step by step to its full value, at
            least 0: it is k / n of it in the k-th of n warm-up steps.
        augment: crop and flip training images at random; see
            :class:`~hf_dash.data.examples.RandomCropFlip`.
        num_workers: processes that load training images, at least 0.
        class_weights: ``"balanced"`` weighs the loss of every image by how rare its class is among
            the images so far; None weighs all alike.
        channels_last: train with weights and activations channels last, which convolutions often
            compute faster; results differ by rounding. The model comes back contiguous.
        on_device: keep the images of a round on the device, and cut, normalize and augment batches
            there; see :func:`~hf_dash.training.resident_batches`. Map-style images of one size
            only, without workers. Results are the same, but for other crops and flips.
        drop_last: every batch has ``train_batch_size`` images, and an epoch leaves out the rest,
            other images in each. A compiled step is then recorded as CUDA graphs for one shape, in
            all rounds. Not for streams. A batch size that divides every round leaves out none.
        cuda_graphs: record a step, optimizer included, as one CUDA graph per shape of batch, and
            replay it; results are the same. With ``on_device`` the host then hardly does anything.
            One process on a CUDA device, without fp16; with ``torch.compile`` too, in its default
            mode.
        renew_batch_norms: after training, give batch norms the statistics of the round's images
            under the weights as they are, in one more pass over at most 100 batches. Their running
            averages lag: after 26 steps, 6 % of them are of the weights before training.
        training_preset: ``"plain"`` (SGD, learning rate 1e-3, momentum 0.9, batches of 128, no
            decay, no augmentation, to 99.9 %; ``max_epochs`` is yours) or ``"sota"`` (learning rate
            0.1, momentum 0.9, decay 5e-4, batches of 128, augmentation, × 0.2 after 60, 120, 160
            and 200 epochs, one warm-up epoch, 260 epochs). It fills every field that has its
            default; a different value stays. A default given by name looks the same as none given.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range.

    Example:
        >>> import hf_dash
        >>> config = hf_dash.TrainingConfig(training_preset="sota", max_epochs=200)
        >>> (config.learning_rate, config.max_epochs, config.augment)
        (0.1, 200, True)
    """

    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    train_batch_size: int = 128
    max_epochs: int = 100
    accuracy_threshold: float | None = 0.999
    disable_tqdm: bool = False
    optim: Optim = "sgd"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    sam_rho: float = 0.0
    lr_milestones: list[int] = field(default_factory=list)
    lr_gamma: float = 0.2
    lr_scheduler_type: Schedule = "constant"
    warmup_epochs: int = 0
    augment: bool = False
    num_workers: int = 0
    class_weights: str | None = None
    channels_last: bool = False
    on_device: bool = False
    drop_last: bool = False
    cuda_graphs: bool = False
    renew_batch_norms: bool = False
    training_preset: TrainingPreset | None = None

    def __post_init__(self) -> None:
        if self.training_preset is not None:
            self._fill(self.training_preset)
        if self.optim not in get_args(Optim):
            raise ValueError(f"optim must be one of {get_args(Optim)}, got {self.optim!r}")
        if self.lr_scheduler_type not in get_args(Schedule):
            raise ValueError(
                f"lr_scheduler_type must be one of {get_args(Schedule)}, got"
                f" {self.lr_scheduler_type!r}"
            )
        if self.lr_scheduler_type == "cosine":
            if self.lr_milestones:
                raise ValueError(
                    f"lr_milestones must be empty with a cosine schedule, got {self.lr_milestones}"
                )
            object.__setattr__(self, "accuracy_threshold", None)
        check_class_weights(self.class_weights)
        self._check_kinds()
        self._check_ranges()
        for name in (
            "disable_tqdm",
            "augment",
            "channels_last",
            "on_device",
            "drop_last",
            "cuda_graphs",
            "renew_batch_norms",
        ):
            check_flag(name, getattr(self, name))

        if self.on_device and self.num_workers:
            raise ValueError(f"num_workers must be 0 with on_device, got {self.num_workers}")

    def _fill(self, preset: str) -> None:
        if preset not in _PRESETS:
            raise ValueError(f"training_preset must be one of {sorted(_PRESETS)}, got {preset!r}")
        for entry in fields(self):
            factory = entry.default_factory
            default = entry.default if factory is MISSING else factory()
            if entry.name in _PRESETS[preset] and getattr(self, entry.name) == default:
                # Frozen for everyone else.
                object.__setattr__(self, entry.name, copy.copy(_PRESETS[preset][entry.name]))

    def _check_kinds(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            # By the default: HfArgumentParser writes into the annotations.
            expected = type(entry.default)
            endless = entry.name == "accuracy_threshold" and value is None
            if expected not in (int, float) or endless:
                continue
            kind, article = (int, "an integer") if expected is int else (Real, "a number")
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TypeError(f"{entry.name} must be {article}, got {value!r}")
        milestones = self.lr_milestones
        if not isinstance(milestones, list) or any(type(epoch) is not int for epoch in milestones):
            raise TypeError(f"lr_milestones must be a list of integers, got {milestones!r}")

    def _check_ranges(self) -> None:
        milestones, threshold = self.lr_milestones, self.accuracy_threshold
        rising = milestones == sorted(set(milestones)) and all(epoch >= 1 for epoch in milestones)
        allowed = {
            "learning_rate": ("greater than 0", self.learning_rate > 0),
            "momentum": ("in [0, 1)", 0 <= self.momentum < 1),
            "weight_decay": ("at least 0", self.weight_decay >= 0),
            "train_batch_size": ("at least 1", self.train_batch_size >= 1),
            "max_epochs": ("at least 1", self.max_epochs >= 1),
            "accuracy_threshold": ("in (0, 1]", threshold is None or 0 < threshold <= 1),
            "adam_beta1": ("in [0, 1)", 0 <= self.adam_beta1 < 1),
            "adam_beta2": ("in [0, 1)", 0 <= self.adam_beta2 < 1),
            "adam_epsilon": ("greater than 0", self.adam_epsilon > 0),
            "sam_rho": ("at least 0", self.sam_rho >= 0),
            "lr_milestones": ("rising and at least 1", rising),
            "lr_gamma": ("in (0, 1]", 0 < self.lr_gamma <= 1),
            "warmup_epochs": ("at least 0", self.warmup_epochs >= 0),
            "num_workers": ("at least 0", self.num_workers >= 0),
        }
        for name, (range_, valid) in allowed.items():
            if not valid:
                raise ValueError(f"{name} must be {range_}, got {getattr(self, name)!r}")
