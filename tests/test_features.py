import pytest
import torch

from hf_dash.features import dormant_share, effective_rank


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(4, 7)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(3, 2)) == 0
    # Singular values 3 and 1: shares 3/4 and 1/4, so exp(entropy) = 4 / 3^(3/4), however rotated.
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    matrix = turn @ torch.diag(torch.tensor([3.0, 1.0])) @ turn
    assert effective_rank(matrix) == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_dormant_units_by_hand():
    # Mean absolute activations 0, 0.02, 1 and 2.98: their mean is 1, so τ = 0.025 takes two.
    features = torch.tensor([[0.0, 0.04, -1.0, 2.98], [0.0, 0.0, 1.0, -2.98]])
    assert dormant_share(features) == 0.5
    assert dormant_share(features, 0.0) == 0.25
    assert dormant_share(features, 0.01) == 0.25
    assert dormant_share(torch.zeros(2, 3)) == 1
