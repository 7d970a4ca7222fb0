import json
import math

import pytest
import torch
from torch import nn

from hf_dash import DashConfig
from hf_dash.method import NoEffectWarning
from hf_dash.method.gradients import GradientAverage
from hf_dash.method.shrink import (
    ShrinkReport,
    TensorReport,
    all_factors,
    report_tensors,
    shrink_,
    shrink_factors,
)
from hf_dash.method.tensors import find_shrinkable


def test_factors_by_hand():
    weight = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    gradient = torch.tensor([[4.0, 3.0], [-1.0, 0.0], [1.0, 3.0], [5.0, 5.0]])
    # cosines: 24/25; −1; 1/√10; 1
    factors = shrink_factors(gradient, weight, (1,), 0.2)
    torch.testing.assert_close(
        factors, torch.tensor([[0.96], [0.2], [1 / math.sqrt(10)], [1.0]]), rtol=0, atol=1e-6
    )


def test_a_one_by_one_kernel_has_factor_lam_or_one():
    weight = torch.randn(6, 5, 1, 1)
    gradient = torch.randn(6, 5, 1, 1)
    factors = shrink_factors(gradient, weight, (2, 3), 0.3)
    agree = torch.sign(weight) == torch.sign(gradient)
    torch.testing.assert_close(factors, torch.where(agree, 1.0, 0.3))


def test_zero_vectors_have_cosine_zero():
    weight = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    gradient = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert shrink_factors(gradient, weight, (1,), 0.0).tolist() == [[0.0], [0.0]]
    assert shrink_factors(gradient, weight, (1,), 0.3).flatten().tolist() == pytest.approx(
        [0.3] * 2
    )


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-9, 1e20, 1e37])
def test_the_cosine_is_free_of_scale(scale):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 50, 9, generator=generator)
    expected = shrink_factors(gradient, weight, (1,), 0.0)
    for scaled in (
        shrink_factors(gradient * scale, weight, (1,), 0.0),
        shrink_factors(gradient, weight * scale, (1,), 0.0),
    ):
        torch.testing.assert_close(scaled, expected, rtol=0, atol=2e-6)


def test_shrinking_multiplies_every_vector_in_place():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        layer.bias.copy_(torch.tensor([1.0, 1.0]))
    memory = layer.weight.data_ptr()
    tensors, _ = find_shrinkable(layer)
    parts = [torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([3.0, -3.0])]
    factors = all_factors(tensors, GradientAverage(parts), lam=0.5)
    shrink_(tensors, factors)
    assert layer.weight.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert layer.bias.tolist() == [0.5, 0.5]
    assert layer.weight.data_ptr() == memory


def test_bfloat16_weights_are_scaled_in_float32_and_rounded_once():
    layer = nn.Linear(64, 8, bias=False).to(torch.bfloat16)
    before = layer.weight.detach().clone()
    tensors, _ = find_shrinkable(layer)
    factors = [torch.rand(8, 1)]
    shrink_(tensors, factors)
    assert torch.equal(layer.weight, (before.float() * factors[0]).to(torch.bfloat16))


def test_a_weight_that_is_not_finite_is_named():
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    tensors, _ = find_shrinkable(layer)
    with pytest.raises(FloatingPointError, match=r"factors of \['weight'\] are not finite"):
        all_factors(tensors, GradientAverage([torch.ones(2, 2)]), lam=0.3)


def test_no_effect_warns():
    tensors, _ = find_shrinkable(nn.Linear(2, 2, bias=False))
    with pytest.warns(NoEffectWarning, match="every factor is 1"):
        shrink_(tensors, [torch.ones(2, 1)])


@pytest.fixture
def report():
    return ShrinkReport(
        tensors=(
            TensorReport("a.weight", 30, 0.5, 0.3, 0.9, 0.4),
            TensorReport("a.bias", 10, 0.7, 0.7, 0.7, 0.0),
        ),
        untouched=("norm.weight",),
        config=DashConfig(),
        num_batches=20,
        num_images=2560,
        seconds=1.25,
    )


def test_the_report_weighs_tensors_by_their_vectors(report):
    assert report.num_vectors == 40
    assert report.mean_factor == pytest.approx((30 * 0.5 + 10 * 0.7) / 40)
    assert report.share_at_lam == pytest.approx(12 / 40)


def test_the_report_is_plain_json(report):
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["config"]["alpha"] == 0.3
    assert plain["tensors"][1]["name"] == "a.bias"
    assert plain["untouched"] == ["norm.weight"]
    assert plain["mean_factor"] == report.mean_factor


def test_the_report_reads_well(report):
    lines = str(report).splitlines()
    assert lines[0] == (
        "DASH shrank 40 vectors in 2 tensors: mean factor 0.550, 30.0% at λ = 0.3 (α = 0.3, 20"
        " minibatches, 2560 images, 1.25 s; 1 parameters untouched)"
    )
    assert lines[2].split() == ["a.weight", "30", "0.500", "0.300", "0.900", "40.0%"]


def test_the_caller_s_autocast_does_not_round_the_factors():
    generator = torch.Generator().manual_seed(0)
    gradient, weight = torch.randn(2, 6, 4, 3, 3, generator=generator)
    expected = shrink_factors(gradient, weight, (2, 3), 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shrink_factors(gradient, weight, (2, 3), 0.0), expected)


def test_every_factor_is_counted_in_its_bin():
    layer = torch.nn.Linear(2, 4, bias=False)
    tensors, _ = find_shrinkable(layer, "kernel")
    factors = [torch.tensor([[0.3], [0.31], [0.99], [1.0]])]
    (found,) = report_tensors(tensors, factors, 0.3)
    assert sum(found.histogram) == 4
    assert found.histogram[6] == 2
    assert found.histogram[19] == 2
