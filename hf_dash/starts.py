"""Where a round starts from: one function per strategy, one dict of their names.

Flow: the model with the last round's final weights → the start changes it in place → training.
Every start has the same form, ``start(model, context)``, so that a user's own function will do.
The first round has no weights to start from: there all strategies share one fresh model, and none
is called.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dash.batches import Batch
from hf_dash.config import DashConfig, StartsConfig
from hf_dash.dash import dash_shrink_
from hf_dash.models import fresh_state
from hf_dash.rounds import Round, gradient_batches
from hf_dash.shrink import ShrinkReport


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


# A start returns None where training is to go on with a fresh optimizer and nothing else.
Start = Callable[[PreTrainedModel, StartContext], Started | None]


def cold_(model: PreTrainedModel, context: StartContext) -> None:
    """Replace all weights by timm's fresh initialisation: training from scratch."""
    model.timm_model.load_state_dict(fresh_state(model, context.seed))


def warm_(model: PreTrainedModel, context: StartContext) -> None:
    """Keep the last round's weights as they are (warm start; Ash & Adams, NeurIPS 2020)."""


def dash_(model: PreTrainedModel, context: StartContext) -> Started:
    """Shrink the last round's weights by their agreement with the descent direction.

    Source: Shin et al., NeurIPS 2024 (arXiv:2410.23495), Algorithm 1.
    """
    report = dash_shrink_(
        model,
        context.gradient_batches(),
        accelerator=context.accelerator,
        disable_tqdm=True,
        **context.dash.arguments,
    )
    return Started(report, keep_optimizer=not context.starts.reset_optimizer)


STARTS: dict[str, Start] = {"cold": cold_, "warm": warm_, "dash": dash_}


def find_start(name: str) -> Start:
    """Return the start of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in STARTS:
        raise ValueError(f"start must be one of {sorted(STARTS)}, got {name!r}")
    return STARTS[name]
