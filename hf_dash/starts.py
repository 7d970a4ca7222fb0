"""Where a round starts from: one function per strategy, their names and their settings.

Flow: the model with the last round's final weights → the start changes it in place → training.
Every start is a function ``start(model, context)``, and so is your own. In the first round there
are no earlier weights: all strategies share one fresh model, and only starts marked with
``every_round`` are called. A name may carry settings: ``"dash+alpha=0.1+grouping=auto"`` is DASH
with these two fields set, so one run can compare settings on the same rounds and seeds.
Source: see each start.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dash.data.rounds import Round, gradient_batches
from hf_dash.method.base import BaseLike, open_base
from hf_dash.method.batches import Batch
from hf_dash.method.config import DashConfig
from hf_dash.method.dash import dash_shrink_
from hf_dash.method.gradients import LossFn
from hf_dash.method.shrink import ShrinkReport
from hf_dash.method.tensors import find_shrinkable
from hf_dash.method.variants import NEWTON_SCHULZ_STEPS, make_orthogonal_
from hf_dash.models import fresh_state, timm_model_of
from hf_dash.pretrained import Checkpoint, classifier_prefixes
from hf_dash.utils.checks import check_count, check_flag, check_number


@dataclass(frozen=True)
class StartsConfig:
    """Settings of all starts except DASH.

    Args:
        perturb_lam: factor of shrink-and-perturb, in [0, 1].
        perturb_sigma: standard deviation of its noise, at least 0.
        l2_init_lam: weight of L2-init's penalty ‖θ − θ₀‖², at least 0.
        fire_steps: Newton-Schulz steps of FIRE, at least 1.
        reset_optimizer: train with fresh optimizer state after a start that changed the weights
            (shrink-and-perturb, head reset, FIRE, DASH). False keeps the momentum, as the authors'
            code does. The warm start and L2-init always keep it; the cold start never does.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from hf_dash.starts import StartsConfig
        >>> StartsConfig(perturb_lam=0.5).perturb_sigma
        0.01
    """

    perturb_lam: float = 0.3
    perturb_sigma: float = 0.01
    l2_init_lam: float = 1e-2
    fire_steps: int = NEWTON_SCHULZ_STEPS
    reset_optimizer: bool = True

    def __post_init__(self) -> None:
        check_number("perturb_lam", self.perturb_lam, "[0, 1]", 0.0, 1.0)
        check_number("perturb_sigma", self.perturb_sigma, "[0, inf)", 0.0, math.inf)
        check_number("l2_init_lam", self.l2_init_lam, "[0, inf)", 0.0, math.inf)
        check_count("fire_steps", self.fire_steps)
        check_flag("reset_optimizer", self.reset_optimizer)


@dataclass(frozen=True)
class StartContext:
    """Everything a start may use.

    Args:
        round_: the round about to be trained: old and new examples.
        seed: seed for anything random; differs between rounds and is the same on every process.
        init_seed: seed of the run's first weights.
        dash: settings of the gradient pass and the shrink.
        start_config: settings of the other starts.
        accelerator: gives processes and precision; None without Accelerate.
        checkpoint: the pretrained weights that the run began from; None after fresh ones. Cold
            begins there again, DASH and shrink-and-perturb shrink towards it unless ``dash.base``
            says otherwise.
        loss_fn: the loss that is trained with; None stands for the model's own.

    Example:
        >>> import hf_dash
        >>> model = hf_dash.create_model("test_resnet", label_names=list("0123456789"))
        >>> transform = hf_dash.models.image_transform(model)
        >>> images = hf_dash.load_images().select(range(256))
        >>> (round_,) = hf_dash.data.cut_rounds(images, 1, transform)
        >>> context = hf_dash.StartContext(round_, seed=0)
        >>> len(context.gradient_batches())
        2
    """

    round_: Round
    seed: int
    init_seed: int = 0
    dash: DashConfig = field(default_factory=DashConfig)
    start_config: StartsConfig = field(default_factory=StartsConfig)
    accelerator: Accelerator | None = None
    checkpoint: Checkpoint | None = None
    loss_fn: LossFn | None = None

    @property
    def base(self) -> BaseLike | None:
        """What weights shrink towards; None stands for zero."""
        if self.dash.base is not None or self.checkpoint is None:
            return self.dash.base
        return self.checkpoint.state

    def first_state(self, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
        """Return the weights that a run begins with, fresh ones drawn from ``seed``."""
        if self.checkpoint is None:
            return fresh_state(model, seed)
        return self.checkpoint.first_state(model, seed)

    def gradient_batches(self) -> Iterable[Batch]:
        """Return this process's share of the minibatches, oldest examples first."""
        if self.accelerator is None:
            return gradient_batches(self.round_, self.dash)
        return gradient_batches(
            self.round_,
            self.dash,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
        )


@dataclass(frozen=True)
class Started:
    """What a start tells the training that follows.

    Args:
        report: report of the shrink, if there was one.
        keep_optimizer: keep the previous round's optimizer state, including momentum.
        penalty: called as ``penalty(model)`` at every step and added to the loss.

    Example:
        >>> import hf_dash
        >>> def frozen_(model, context):  # a start of your own that keeps the momentum
        ...     model.requires_grad_(False)
        ...     return hf_dash.Started(keep_optimizer=True)
        >>> hf_dash.Started().keep_optimizer
        False
    """

    report: ShrinkReport | None = None
    keep_optimizer: bool = False
    penalty: Callable[[nn.Module], Tensor] | None = None


# A start gets the model with the last round's weights, changes it in place, and returns what
# training needs to know. None means a fresh optimizer and nothing else. Your own start is a
# function of this form, passed to ``run_rounds`` instead of one from ``STARTS``:
#
#     def halve_(model: PreTrainedModel, context: StartContext) -> None:
#         with torch.no_grad():
#             model.timm_model.get_classifier().weight.mul_(0.5)
#
# The first round trains fresh weights and calls no start, except those marked ``every_round``.
Start = Callable[[PreTrainedModel, StartContext], Started | None]


def every_round(start: Start) -> Start:
    """Decorate a start to be called in the first round too.

    It sets the attribute ``every_round = True`` on the function.

    Example:
        >>> from hf_dash.starts import every_round
        >>> @every_round
        ... def penalize_(model, context):
        ...     return None
        >>> penalize_.every_round
        True
    """
    start.every_round = True  # type: ignore[attr-defined]
    return start


def cold_(model: PreTrainedModel, context: StartContext) -> None:
    """Begin again: timm's fresh initialization, or the run's checkpoint with a fresh classifier.

    Raises:
        TypeError: the model is not a timm wrapper.
    """
    timm_model_of(model).load_state_dict(context.first_state(model, context.seed))


def warm_(model: PreTrainedModel, context: StartContext) -> Started:
    """Keep the last round's weights and the optimizer's momentum.

    Source: the warm start of Ash & Adams, NeurIPS 2020 (arXiv:1910.08475).
    """
    return Started(keep_optimizer=True)


def warm_reset_momentum_(model: PreTrainedModel, context: StartContext) -> None:
    """Keep the last round's weights but start with zero momentum.

    Source: the warm start of Ash & Adams, NeurIPS 2020 (arXiv:1910.08475), which creates a new
    optimizer every round.
    """


@torch.no_grad()
def shrink_perturb_(model: PreTrainedModel, context: StartContext) -> Started:
    """Shrink and perturb: w ← λ·w + N(0, σ²), λ = ``perturb_lam``, σ = ``perturb_sigma``.

    Of a run that began from a checkpoint w₀ the change shrinks: w ← w₀ + λ·(w − w₀) + N(0, σ²).

    Weights and biases of linear and convolution layers change, as in the DASH authors' code;
    norms, embeddings and frozen tensors stay. The noise depends only on the context's seed: it is
    the same on every process, and the global random state is left alone.

    Source: Ash & Adams, NeurIPS 2020 (arXiv:1910.08475).
    """
    settings, generator = context.start_config, torch.Generator().manual_seed(context.seed)
    tensors = find_shrinkable(model)[0]
    with open_base(context.base, tensors, model) as base:
        for tensor in tensors:
            weight = tensor.parameter
            # Drawn on the CPU, so that every machine draws the same.
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.mul_(settings.perturb_lam).add_(noise, alpha=settings.perturb_sigma)
            if base is not None and base.holds(tensor):
                origin = base.origin(tensor).view_as(weight).to(weight)
                weight.add_(origin, alpha=1 - settings.perturb_lam)
    return Started(keep_optimizer=not settings.reset_optimizer)


def head_reset_(model: PreTrainedModel, context: StartContext) -> Started:
    """Replace the classifier by timm's fresh initialization and keep everything below it.

    If a model has two classifiers (the second on a distillation token), both are replaced.

    Source: the last layer's reset of Nikishin et al., ICML 2022 (arXiv:2205.07802).

    Raises:
        TypeError: the model is not a timm wrapper.
        ValueError: timm finds no classifier with weights in the model.
    """
    timm_model = timm_model_of(model)
    fresh = fresh_state(model, context.seed)
    prefixes = classifier_prefixes(timm_model)
    head = {name: tensor for name, tensor in fresh.items() if name.startswith(prefixes)}
    if not head:
        raise ValueError(
            f"model must have a classifier to reset, but timm finds none in"
            f" {model.config.architecture!r}"
        )
    timm_model.load_state_dict(head, strict=False)
    return Started(keep_optimizer=not context.start_config.reset_optimizer)


@every_round
def l2_init_(model: PreTrainedModel, context: StartContext) -> Started:
    """Keep the weights and pull them toward the initial ones in training: penalty λ·‖θ − θ₀‖².

    θ are all trainable parameters, θ₀ the run's first weights, drawn again from
    ``context.init_seed`` or read from the run's checkpoint; λ = ``l2_init_lam``. The model must
    already be on its device. The first round uses the penalty too.

    Source: Kumar et al., 2023 (arXiv:2308.11958).
    Differs from the DASH authors' code, which squares the sum of per-module norms.

    Raises:
        TypeError: the model is not a timm wrapper.
        ValueError: a trainable parameter is not one of timm's.
    """
    timm_model_of(model)
    fresh = context.first_state(model, context.init_seed)
    initial = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.removeprefix("timm_model.") not in fresh:
            raise ValueError(
                f"model has the trainable parameter {name!r}, but a fresh"
                f" {model.config.architecture!r} of timm does not, so its initial value is unknown"
            )
        initial.append(fresh[name.removeprefix("timm_model.")].to(parameter))
    lam = context.start_config.l2_init_lam

    def penalty(trained: nn.Module) -> Tensor:
        # By order: a wrapper such as DDP changes the names but not the order.
        trainable = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        pairs = zip(trainable, initial, strict=True)
        return lam * torch.stack([(now - first).square().sum() for now, first in pairs]).sum()

    return Started(keep_optimizer=True, penalty=penalty)


def dash_(model: PreTrainedModel, context: StartContext) -> Started:
    """Shrink the last round's weights by their agreement with the descent direction.

    Source: Shin et al., NeurIPS 2024 (arXiv:2410.23495), Algorithm 1.
    """
    report = dash_shrink_(
        model,
        context.gradient_batches(),
        context.loss_fn,
        accelerator=context.accelerator,
        disable_tqdm=True,
        seed=context.seed,
        config=context.dash,
        base=context.base,
    )
    return Started(report, keep_optimizer=not context.start_config.reset_optimizer)


@torch.no_grad()
def fire_(model: PreTrainedModel, context: StartContext) -> Started:
    """Replace each trainable linear and convolution weight by the nearest scaled orthogonal one.

    Biases, depthwise kernels and zero matrices stay. A fused query-key-value projection counts as
    one matrix (``hf_dash.method.variants.orthogonal_weight``). ``fire_steps`` sets the steps.

    Source: Han et al., ICLR 2026 (arXiv:2602.08040).
    """
    tensors = find_shrinkable(model)[0]
    weights = [tensor.parameter for tensor in tensors]
    make_orthogonal_(model, tensors, weights, context.start_config.fire_steps)
    return Started(keep_optimizer=not context.start_config.reset_optimizer)


STARTS: dict[str, Start] = {
    "cold": cold_,
    "warm": warm_,
    "warm_reset_momentum": warm_reset_momentum_,
    "shrink_perturb": shrink_perturb_,
    "head_reset": head_reset_,
    "l2_init": l2_init_,
    "dash": dash_,
    "fire": fire_,
}


def find_start(name: str) -> Start:
    """Return the start with this name.

    Args:
        name: one of ``STARTS``, followed by any number of ``+field=value``: fields of
            :class:`~hf_dash.DashConfig` or :class:`~hf_dash.starts.StartsConfig` that differ from
            the run's. A value that is not valid JSON is taken as text.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: the start or field does not exist, or a value is out of range.

    Example:
        >>> import hf_dash
        >>> hf_dash.find_start("warm") is hf_dash.STARTS["warm"]
        True
        >>> dash = hf_dash.find_start("dash+alpha=0.1+grouping=auto")
    """
    base, *settings = name.split("+")
    if base not in STARTS:
        raise ValueError(f"start must be one of {sorted(STARTS)}, got {base!r}")
    # Unknown fields and values out of range are refused here, before the first round.
    start_settings(name)
    start = STARTS[base]
    if not settings:
        return start

    @wraps(start)
    def with_its_own(model: PreTrainedModel, context: StartContext) -> Started | None:
        dash, start_config = start_settings(name, context.dash, context.start_config)
        return start(model, replace(context, dash=dash, start_config=start_config))

    return with_its_own


def need_state(
    start_config: StartsConfig, starts: Mapping[str, Start], others: Iterable[str] = ()
) -> bool:
    """Tell whether some start may ask for the optimizer's state after the round before.

    Args:
        start_config: settings of the run.
        starts: by name, as :func:`find_start` returns them; your own always may.
        others: names of more; those that are not known here do not count.

    Example:
        >>> from hf_dash.starts import STARTS, StartsConfig, find_start, need_state
        >>> [need_state(StartsConfig(), {name: STARTS[name]}) for name in ("cold", "warm", "dash")]
        [False, True, False]
        >>> need_state(StartsConfig(), {}, ["cold", "dash+reset_optimizer=false"])
        True
    """
    known = {name: find_start(name) for name in others if name.partition("+")[0] in STARTS}
    return any(
        _may_keep_optimizer(start, name, start_config)
        for name, start in {**known, **starts}.items()
    )


def _may_keep_optimizer(start: Start, name: str, start_config: StartsConfig) -> bool:
    own = getattr(start, "__wrapped__", start)
    if own in (shrink_perturb_, head_reset_, dash_, fire_):
        _, start_config = start_settings(name, None, start_config)
        return not start_config.reset_optimizer
    return own not in (cold_, warm_reset_momentum_)


def start_settings(
    name: str, dash: DashConfig | None = None, start_config: StartsConfig | None = None
) -> tuple[DashConfig, StartsConfig]:
    """Return the settings that the start of that name runs with.

    Args:
        name: as :func:`find_start` takes it.
        dash: settings of the run, which the name may change; None for the defaults.
        start_config: settings of the run, which the name may change; None for the defaults.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: there is no such field, or a value is out of range.

    Example:
        >>> dash, start_config = start_settings("dash+alpha=0.1")
        >>> dash.alpha, dash.lam
        (0.1, 0.3)
    """
    configs = dash or DashConfig(), start_config or StartsConfig()
    settings = name.split("+")[1:]
    own = [_own_fields(name, settings, type(config)) for config in configs]
    unknown = [s for s in settings if not any(s.partition("=")[0] in values for values in own)]
    if unknown:
        raise ValueError(
            f"settings of start {name!r} must be +field=value with fields of DashConfig or"
            f" StartsConfig, got {unknown}"
        )
    return replace(configs[0], **own[0]), replace(configs[1], **own[1])


def is_dash(name: str) -> bool:
    """Return whether the start of that name is DASH, with whatever settings.

    Example:
        >>> is_dash("dash+alpha=0.1"), is_dash("warm")
        (True, False)
    """
    return name.split("+")[0] == "dash"


def _own_fields(name: str, settings: list[str], config: type) -> dict[str, Any]:
    """Return the settings that are fields of this config, by name."""
    known = {entry.name for entry in fields(config)}
    own: dict[str, Any] = {}
    for setting in settings:
        field, _, text = setting.partition("=")
        if field in own:
            raise ValueError(f"settings of start {name!r} must set {field!r} once")
        if field in known:
            own[field] = _parse(text)
    return own


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
