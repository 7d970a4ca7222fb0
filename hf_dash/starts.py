"""Where a round starts from: one function per strategy, one dict of their names.

Flow: the model with the last round's final weights → the start changes it in place → training.
Every start has the same form, ``start(model, context)``, so that a user's own function will do.
The first round has no weights to start from: there all strategies share one fresh model, and only
a start marked by ``every_round`` is called.
Source: named by each start.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dash.batches import Batch
from hf_dash.config import DashConfig, StartsConfig
from hf_dash.dash import dash_shrink_
from hf_dash.models import fresh_state, timm_model_of
from hf_dash.orthogonal import make_orthogonal_
from hf_dash.rounds import Round, gradient_batches
from hf_dash.shrink import ShrinkReport
from hf_dash.tensors import find_shrinkable


@dataclass(frozen=True)
class StartContext:
    """What a start may use.

    Args:
        round_: the round about to be trained: old and new examples.
        seed: for anything random; differs between rounds, is the same on every process.
        init_seed: with which the run's first weights were initialised.
        dash: settings of the gradient pass and the shrink.
        starts: settings of the other starts.
        accelerator: tells processes and precision; None outside Accelerate.
    """

    round_: Round
    seed: int
    init_seed: int = 0
    dash: DashConfig = field(default_factory=DashConfig)
    starts: StartsConfig = field(default_factory=StartsConfig)
    accelerator: Accelerator | None = None

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
    """What a start has to tell the training that follows.

    Args:
        report: of the shrink, where there was one.
        keep_optimizer: go on with the optimizer state of the round before, momentum included.
        penalty: called as ``penalty(model)`` in every step; joins the loss.
    """

    report: ShrinkReport | None = None
    keep_optimizer: bool = False
    penalty: Callable[[nn.Module], Tensor] | None = None


# A start changes the model in place, its timm weights being those of the last round, and returns
# what training has to know, or None where it is to go on with a fresh optimizer and nothing else.
# Your own is a function of this form, given to ``run_rounds`` in place of one from ``STARTS``:
#
#     def halve_(model: PreTrainedModel, context: StartContext) -> None:
#         with torch.no_grad():
#             model.timm_model.get_classifier().weight.mul_(0.5)
#
# The first round begins with fresh weights and calls no start, unless the start says that it has
# something to do there too, by the decorator ``every_round``.
Start = Callable[[PreTrainedModel, StartContext], Started | None]


def every_round(start: Start) -> Start:
    """Mark a start that is to be called in the first round too; use it as a decorator.

    The mark is the attribute ``every_round = True`` on the function itself.
    """
    start.every_round = True  # type: ignore[attr-defined]
    return start


def cold_(model: PreTrainedModel, context: StartContext) -> None:
    """Replace all weights by timm's fresh initialisation: training from scratch.

    Raises:
        TypeError: the model is no timm wrapper.
    """
    timm_model_of(model).load_state_dict(fresh_state(model, context.seed))


def warm_(model: PreTrainedModel, context: StartContext) -> Started:
    """Keep the last round's weights as they are, and the optimizer's momentum with them.

    Source: the warm start of Ash & Adams, NeurIPS 2020 (arXiv:1910.08475).
    """
    return Started(keep_optimizer=True)


def warm_reset_momentum_(model: PreTrainedModel, context: StartContext) -> None:
    """Keep the last round's weights as they are, but let momentum begin from zero.

    Source: the warm start of Ash & Adams, NeurIPS 2020 (arXiv:1910.08475), whose every round makes
    a new optimizer.
    """


@torch.no_grad()
def shrink_perturb_(model: PreTrainedModel, context: StartContext) -> Started:
    """Shrink and perturb: w ← λ·w + N(0, σ²), λ = ``perturb_lam``, σ = ``perturb_sigma``.

    Weights and biases of linear and convolution layers change, as in the code of the authors of
    DASH; norms, embeddings and frozen tensors stay. The noise follows from the context's seed
    alone: it is the same on every process, and the global random state is left alone.

    Source: Ash & Adams, NeurIPS 2020 (arXiv:1910.08475).
    """
    generator = torch.Generator().manual_seed(context.seed)
    for tensor in find_shrinkable(model)[0]:
        weight = tensor.parameter
        # Drawn on the CPU, where every machine draws the same.
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        weight.mul_(context.starts.perturb_lam).add_(noise, alpha=context.starts.perturb_sigma)
    return Started(keep_optimizer=not context.starts.reset_optimizer)


def head_reset_(model: PreTrainedModel, context: StartContext) -> Started:
    """Give the classifier timm's fresh initialisation and keep everything below it.

    Models with two classifiers (a second one on a distillation token) get both anew.

    Source: the last layer's reset of Nikishin et al., ICML 2022 (arXiv:2205.07802).

    Raises:
        TypeError: the model is no timm wrapper.
        ValueError: timm names no classifier with weights in it.
    """
    timm_model = timm_model_of(model)
    classifier: Any = timm_model.get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    names = [name for name, module in timm_model.named_modules() if any(module is h for h in heads)]
    fresh = fresh_state(model, context.seed)
    prefixes = tuple(f"{name}." for name in names)
    head = {name: tensor for name, tensor in fresh.items() if name.startswith(prefixes)}
    if not head:
        raise ValueError(
            f"model must have a classifier to reset, but timm names none in"
            f" {model.config.architecture!r}"
        )
    timm_model.load_state_dict(head, strict=False)
    return Started(keep_optimizer=not context.starts.reset_optimizer)


@every_round
def l2_init_(model: PreTrainedModel, context: StartContext) -> Started:
    """Keep the weights, and pull them to the first ones in training: penalty λ·‖θ − θ₀‖².

    θ are all trainable parameters, θ₀ what timm draws for them from ``context.init_seed``, where
    the run's first weights came from; λ = ``l2_init_lam``. The model has to be on its device. The
    first round is trained with the penalty too.

    Source: Kumar et al., 2023 (arXiv:2308.11958).
    Differs from the code of the authors of DASH, which squares the sum of per-module norms.

    Raises:
        TypeError: the model is no timm wrapper.
        ValueError: a trainable parameter is none of timm's.
    """
    timm_model_of(model)
    fresh = fresh_state(model, context.init_seed)
    initial = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.removeprefix("timm_model.") not in fresh:
            raise ValueError(
                f"model has the trainable parameter {name!r}, which a fresh"
                f" {model.config.architecture!r} of timm has not, so it has no first value"
            )
        initial.append(fresh[name.removeprefix("timm_model.")].to(parameter))
    lam = context.starts.l2_init_lam

    def penalty(trained: nn.Module) -> Tensor:
        # By order, since a wrapper such as DDP changes the names and not the order.
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
        accelerator=context.accelerator,
        disable_tqdm=True,
        seed=context.seed,
        **context.dash.arguments,
    )
    return Started(report, keep_optimizer=not context.starts.reset_optimizer)


@torch.no_grad()
def fire_(model: PreTrainedModel, context: StartContext) -> Started:
    """Replace each trainable linear and convolution weight by its nearest scaled orthogonal one.

    Biases stay, so do depthwise kernels and zero matrices; a fused query-key-value projection is
    one matrix. See :func:`~hf_dash.orthogonal.orthogonal_weight`; the steps are ``fire_steps``.

    Source: Han et al., ICLR 2026 (arXiv:2602.08040).
    """
    tensors = find_shrinkable(model)[0]
    weights = [tensor.parameter for tensor in tensors]
    make_orthogonal_(model, tensors, weights, context.starts.fire_steps)
    return Started(keep_optimizer=not context.starts.reset_optimizer)


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
