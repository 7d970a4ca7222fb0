"""The running statistics of batch norms after a short training.

Flow: steps of training → how much of the statistics is of the weights before → said, or counted
anew under the weights as they are.
Source: ``torch.optim.swa_utils.update_bn``; Wu and Johnson, "Rethinking 'Batch' in BatchNorm"
(arXiv:2105.07576).
Why: a step replaces a tenth of them. A shrink changes the scale of activations, so that what is
left after 26 steps, 6 %, is enough to make an evaluation wrong that training never sees.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from hf_dash.utils.logging import get_logger, warn_once

logger = get_logger(__name__, main_process_only=True)

# Share of the statistics before training that may be left without a word.
LAG = 0.01

# Batches from which statistics are counted, at most.
COUNTED = 100


def steps_needed(model: nn.Module) -> int:
    """Return after how many steps ``LAG`` of a model's running statistics are left, at most.

    Example:
        >>> import torch
        >>> from hf_dash.training.batch_norms import steps_needed
        >>> steps_needed(torch.nn.BatchNorm2d(3)), steps_needed(torch.nn.Linear(2, 2))
        (44, 0)
    """
    momenta = [
        norm.momentum
        for norm in model.modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats and norm.momentum
    ]
    return max(
        (math.ceil(math.log(LAG) / math.log1p(-own)) for own in momenta if own < 1), default=0
    )


def say_lag(model: nn.Module, steps: int) -> None:
    """Say once if a training was too short for the running statistics of batch norms."""
    needed = steps_needed(model)
    if steps < needed:
        warn_once(
            logger,
            "a round of fewer than %d steps leaves more than %.0f %% of batch norms' running"
            " statistics as they were before, which lowers accuracy, after a shrink most;"
            " renew_batch_norms counts them anew",
            *(needed, 100 * LAG),
        )


@torch.no_grad()
def renew_batch_norms_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    device: torch.device | None = None,
) -> None:
    """Give batch norms the statistics of some batches under the weights as they are, in place.

    Args:
        model: takes images; the mode of its modules is restored.
        batches: of mappings with ``pixel_values``; the first hundred are used. Of several
            processes, those of the first one count.
        device: to which images are moved; None leaves them where they are.

    Example:
        >>> import torch
        >>> from hf_dash.training.batch_norms import renew_batch_norms_
        >>> norm = torch.nn.BatchNorm2d(1)
        >>> renew_batch_norms_(norm, [{"pixel_values": torch.full((2, 1, 1, 1), 5.0)}])
        >>> norm.running_mean.item(), norm.training
        (5.0, True)
    """
    update_bn((batch["pixel_values"] for batch in islice(batches, COUNTED)), model, device)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            for buffer in norm.buffers():
                buffer.copy_(broadcast(buffer))
