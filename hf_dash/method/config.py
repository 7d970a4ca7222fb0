"""Settings of the DASH pass, checked when they are made.

Source: Algorithm 1 of Shin et al., NeurIPS 2024 (arXiv:2410.23495).
Symbols: α (``alpha``) weighs the newest minibatch in the moving average of the gradients,
λ (``lam``) is the smallest factor a vector can be multiplied by.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from hf_dash.utils.checks import check_count, check_flag, check_number

Grouping = Literal["kernel", "filter", "auto"]

Preset = Literal["paper"]

Variant = Literal["fill", "orthogonal"]

# The base that stands for the paper's method, whatever a model began from.
ZERO = "zero"


@dataclass(frozen=True)
class DashConfig:
    """What the shrink is to do.

    Args:
        alpha: weight of the newest minibatch in the moving average, in (0, 1].
        lam: smallest factor, in [0, 1]; 1 keeps every weight, 0 lets vectors vanish, or with a base
            go back to the checkpoint. Towards a checkpoint of mostly 1×1 kernels 0 ended 3.3 points
            above 0.3 (0.5 … 6.1, 5 seeds), with wrong labels 4.4 (1.5 … 7.2); 0.6 ended below. That
            is one network, retrained once: the default is the paper's 0.3 here too.
        grouping: what one vector of a convolution is: every spatial ``"kernel"`` (the paper), a
            whole output ``"filter"``, or ``"auto"``: kernels, but filters where a kernel is 1×1
            and its cosine could only be ±1. Measured over three rounds of CIFAR-10 and 3 seeds
            (recipes/results): on a bottleneck network of mostly 1×1 kernels filters end 0.8 points
            above kernels for a third more steps, auto 0.3; on a 3×3 network accuracies differ by
            less than the seeds do. Towards a checkpoint of mostly 1×1 kernels ``"auto"`` ends 0.7
            points above kernels (−4.8 … 6.1, 5 seeds). Too little to leave the paper: the default
            is ``"kernel"``.
        tolerance: share of the moving average that may be left out, in [0, 1). Only the newest
            K = ⌈ln(tolerance) / ln(1 − alpha)⌉ minibatches are read; 0 reads all.
        num_batches: K given outright instead, at least 1.
        gradient_batch_size: images in one minibatch of the pass, at least 1, where hf_dash makes
            the minibatches.
        micro_batch_size: images to compute at a time, at least 1, where a minibatch is too large
            for memory. The result is the same, up to rounding: pieces weigh by what the loss is the
            mean of. A loss that cannot be put together from pieces is refused; to know that costs
            one forward pass more per minibatch, without gradients.
        include_frozen: shrink tensors that do not require gradients too.
        preset: ``"paper"`` uses one arrival per minibatch and reads all of them, as the authors do.
        variant: None is the paper's method. ``"fill"`` gives every vector fresh initialization for
            what it loses; ``"orthogonal"`` replaces every shrunk matrix by its nearest scaled
            orthogonal one, as FIRE does (``hf_dash.method.variants``). Measured vs. plain DASH on
            CIFAR-10 (recipes/results), 5 seeds, 3 where they lose: fill gains 1.1 points (0.3 …
            1.8) on an MLP in 0.75 of the last round's steps, 2.4 points (0.5 … 4.4) on a small
            ConvNeXt, takes 0.89 of the steps (0.82 … 0.97) on a small ViT, and loses 3 points on a
            ResNet with batch norm; orthogonal gains 2.5 points (2.2 … 2.8) on the MLP, loses as
            many on the ViT and nothing on the ResNet. So neither is the default; try fill where
            norms are layer norms.
        base: the checkpoint that a fine-tuned model began from: a model folder, a Hub id
            (``user/name`` or ``user/name@revision``), or a state dict. Every vector of the change
            w − w₀ shrinks instead of w, so that pretrained features stay: measured 5.6 points above
            a warm start (2.4 … 8.8, 5 seeds), and towards zero 17 below. None or ``"zero"``
            shrinks towards zero, as the paper does; :class:`~hf_dash.DashCallback` and the recipes
            take None for the checkpoint that the model's history names.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range.

    Example:
        >>> from hf_dash import DashConfig
        >>> DashConfig(alpha=0.3, tolerance=1e-3).newest
        20
        >>> DashConfig(lam=2)
        Traceback (most recent call last):
        ...
        ValueError: lam must be in [0, 1], got 2
    """

    alpha: float = 0.3
    lam: float = 0.3
    grouping: Grouping = "kernel"
    tolerance: float = 1e-3
    num_batches: int | None = None
    gradient_batch_size: int = 128
    micro_batch_size: int | None = None
    include_frozen: bool = False
    preset: Preset | None = None
    variant: Variant | None = None
    # Or a state dict, which no parser of flags can give.
    base: str | None = None

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, "(0, 1]", 0.0, 1.0)
        check_number("lam", self.lam, "[0, 1]", 0.0, 1.0)
        check_number("tolerance", self.tolerance, "[0, 1)", 0.0, 1.0)
        check_count("gradient_batch_size", self.gradient_batch_size)
        check_flag("include_frozen", self.include_frozen)
        for name in ("num_batches", "micro_batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.grouping not in get_args(Grouping):
            raise ValueError(f"grouping must be one of {get_args(Grouping)}, got {self.grouping!r}")
        if self.preset is not None and self.preset not in get_args(Preset):
            raise ValueError(f"preset must be None or 'paper', got {self.preset!r}")
        if self.variant is not None and self.variant not in get_args(Variant):
            raise ValueError(
                f"variant must be None or one of {get_args(Variant)}, got {self.variant!r}"
            )
        if self.base is not None and not isinstance(self.base, str | Path | Mapping):
            raise TypeError(
                "base must be None, 'zero', a model folder, a Hub id or a state dict, got"
                f" {type(self.base).__name__}"
            )
        towards_zero = self.base is None or (isinstance(self.base, str) and self.base == ZERO)
        if self.variant is not None and not towards_zero:
            raise ValueError(f"variant must be None with a base, got {self.variant!r}")

    @property
    def newest(self) -> int | None:
        """K, the number of newest minibatches to read; None means all of them."""
        if self.num_batches is not None:
            return self.num_batches
        if self.preset == "paper" or self.tolerance == 0:
            return None
        if self.alpha == 1:
            return 1
        return max(1, math.ceil(math.log(self.tolerance) / math.log1p(-self.alpha)))


# What dash_shrink_ and DashCallback can be given by name: they do not make the minibatches.
SETTINGS = tuple(f.name for f in fields(DashConfig) if f.name != "gradient_batch_size")


def with_settings(
    config: DashConfig | None, settings: Mapping[str, Any], function: str
) -> DashConfig:
    """Return ``config``, by default the paper's, with some settings replaced.

    Args:
        config: the settings to begin with.
        settings: values by name, of those in ``SETTINGS``.
        function: the name of the function that was called, for the message.

    Raises:
        TypeError: a name is unknown, or an argument is of the wrong kind.
        ValueError: a value is out of its range.
    """
    if config is not None and not isinstance(config, DashConfig):
        raise TypeError(f"config must be a DashConfig, got {type(config).__name__}")
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise TypeError(f"{function} got unknown settings {unknown}; known are {list(SETTINGS)}")
    return replace(config or DashConfig(), **settings)
