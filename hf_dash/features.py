"""How rich the features before a classifier are.

Flow: features of examples, a matrix → the share of dormant units, the effective rank.
Source: dormant units: Sokar et al., ICML 2023 (arXiv:2302.12902), definition 3.1; effective rank:
Roy & Vetterli, EUSIPCO 2007.
Differs: dormant units are counted in the one layer that is given, not over all layers.
"""

import torch
from torch import Tensor

# τ of Sokar et al.: a unit whose mean activation is at most this share of the layer's is dormant.
DORMANT_SHARE = 0.025


def dormant_share(features: Tensor, threshold: float = DORMANT_SHARE) -> float:
    """Return the share of dormant units.

    Args:
        features: activations [examples, units].
        threshold: τ, at least 0: a unit is dormant whose mean absolute activation over the examples
            is at most τ of the mean over all units. 0 counts those that are never active.

    Source: Sokar et al., ICML 2023 (arXiv:2302.12902), definition 3.1. Where no unit is ever
    active, all are dormant.
    """
    activity = features.abs().mean(dim=0)
    return float((activity <= threshold * activity.mean()).double().mean())


def effective_rank(features: Tensor) -> float:
    """Return the effective rank of a matrix: exp of the entropy of its normalised singular values.

    Args:
        features: a matrix [examples, units]; not centred.

    Returns:
        A number from 1 to the smaller dimension; 0 for a matrix of zeros.

    Source: Roy & Vetterli, EUSIPCO 2007.
    """
    values = torch.linalg.svdvals(features)
    if values.sum() == 0:
        return 0.0
    # entr is −p ln p, and 0 at 0.
    return float(torch.special.entr(values / values.sum()).sum().exp())
