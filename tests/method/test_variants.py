import copy
import math

import pytest
import torch
from torch import nn

from hf_dash.method.tensors import find_shrinkable
from hf_dash.method.variants import (
    check_fillable,
    filled_shrink_,
    orthogonal_shrink_,
    orthogonal_weight,
    polar_factors,
)
from hf_dash.models import fresh_state


def conditioned(rows, columns, low=0.5, seed=0):
    """A matrix whose singular values lie between ``low`` and 1, and its polar factor."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    return u @ torch.linspace(low, 1, rank).diag() @ v.mT, u @ v.mT


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (3, 8), (8, 3), (5, 1), (1, 5), (1, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_polar_factors_equal_those_of_the_svd_at_any_scale(rows, columns, scale):
    matrix, polar = conditioned(rows, columns)
    torch.testing.assert_close(polar_factors(matrix * scale, 10), polar, rtol=0, atol=1e-5)


def test_one_step_worked_by_hand():
    # ‖diag(3, 4)‖_F = 5; 1.5·0.6 − 0.5·0.6³ = 0.792 and 1.5·0.8 − 0.5·0.8³ = 0.944.
    step = polar_factors(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1)
    torch.testing.assert_close(step, torch.tensor([[0.792, 0.0], [0.0, 0.944]]))


def test_small_singular_values_grow_by_at_most_half_a_step_and_zeros_stay():
    matrix = torch.diag(torch.tensor([1.0, 1e-4, 0.0]))
    values = polar_factors(matrix, 10).diagonal()
    assert values[0].item() == pytest.approx(1.0, abs=1e-5)
    assert values[1].item() == pytest.approx(1e-4 * 1.5**10, rel=1e-4)
    assert values[2].item() == 0
    assert torch.equal(polar_factors(torch.zeros(2, 3, 3), 10), torch.zeros(2, 3, 3))


def test_half_precision_is_computed_in_full():
    matrix, polar = conditioned(4, 6)
    weight = orthogonal_weight(matrix.bfloat16(), 10)
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), polar * math.sqrt(4 / 6), rtol=0, atol=2e-2)


@pytest.mark.parametrize("kernel", [(), (1,), (3, 3), (1, 3), (2, 2, 2)])
@pytest.mark.parametrize(("d_out", "d_in"), [(4, 6), (6, 4)])
def test_every_kernel_position_is_a_scaled_isometry(kernel, d_out, d_in):
    positions = math.prod(kernel)
    weight = torch.empty(d_out, d_in, positions)
    for position in range(positions):
        weight[:, :, position] = conditioned(d_out, d_in, seed=position)[0] * (position + 1)
    result = orthogonal_weight(weight.reshape(d_out, d_in, *kernel), 10)
    scale = math.sqrt(d_out / d_in) / positions
    for position in range(positions):
        matrix = result.reshape(d_out, d_in, positions)[:, :, position]
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(values, torch.full((4,), scale), rtol=1e-4, atol=0)
        polar = conditioned(d_out, d_in, seed=position)[1]
        torch.testing.assert_close(matrix, scale * polar, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_taken_one_by_one(transposed):
    layer = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    torch.manual_seed(0)
    grouped = layer(6, 4, 3, groups=2, bias=False)
    result = orthogonal_weight(grouped.weight.detach(), 60, groups=2, transposed=transposed)
    for group in range(2):
        # The layer that this group is on its own: 3 channels in, 2 out.
        if transposed:
            own = result[3 * group : 3 * group + 3].permute(2, 3, 1, 0)
        else:
            own = result[2 * group : 2 * group + 2].permute(2, 3, 0, 1)
        assert own.shape == (3, 3, 2, 3)
        expected = torch.full((3, 3, 2), math.sqrt(2 / 3) / 9)
        torch.testing.assert_close(torch.linalg.svdvals(own), expected, rtol=1e-4, atol=0)


def test_depthwise_kernels_and_zero_weights_stay_as_they_are():
    depthwise = torch.randn(4, 1, 3, 3)
    assert torch.equal(orthogonal_weight(depthwise, 10, groups=4), depthwise)
    # One channel in and out without groups is a plain convolution: ±1 over 9 positions.
    plain = orthogonal_weight(depthwise[:1], 10)
    torch.testing.assert_close(plain, depthwise[:1].sign() / 9)
    assert torch.equal(orthogonal_weight(torch.zeros(4, 2, 3, 3), 10), torch.zeros(4, 2, 3, 3))


def by_svd(matrix, steps):
    """Newton-Schulz on the singular values alone, one after the other, in double precision."""
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    size = math.sqrt(sum(float(value) ** 2 for value in values))
    grown = []
    for value in values:
        x = float(value) / size
        for _ in range(steps):
            x = 1.5 * x - 0.5 * x**3
        grown.append(x)
    return u @ torch.tensor(grown, dtype=torch.float64).diag() @ vh


def test_orthogonal_shrink_is_the_shrink_and_then_newton_schulz(every_layer):
    tensors = find_shrinkable(every_layer)[0]
    torch.manual_seed(1)
    factors = []
    for tensor in tensors:
        shape = [1 if dim in tensor.dims else size for dim, size in enumerate(tensor.shape)]
        factors.append(torch.rand(shape) * 0.7 + 0.3)
    before = {tensor.name: tensor.parameter.detach().clone() for tensor in tensors}
    orthogonal_shrink_(every_layer, tensors, factors)
    by_name = dict(zip([tensor.name for tensor in tensors], factors, strict=True))

    shrunk = before["conv.weight"] * by_name["conv.weight"]
    for row in range(3):
        for column in range(3):
            found = every_layer.conv.weight[:, :, row, column].double()
            expected = by_svd(shrunk[:, :, row, column], 10) * math.sqrt(8 / 3) / 9
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    expected = by_svd(before["head.weight"] * by_name["head.weight"], 10) * math.sqrt(10 / 4)
    torch.testing.assert_close(every_layer.head.weight.double(), expected, rtol=0, atol=1e-5)
    # A bias is no matrix, a depthwise kernel keeps nothing but a sign: both are shrunk alone.
    for name in ("head.bias", "depthwise.weight"):
        found = every_layer.get_parameter(name)
        torch.testing.assert_close(found, before[name] * by_name[name])


def constant_factors(tensors, factor):
    return [torch.full_like(tensor.view(tensor.parameter), factor) for tensor in tensors]


def test_every_number_is_the_shrunk_one_and_its_share_of_the_fresh_one(small_model):
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    fresh = fresh_state(small_model, 7)
    tensors = find_shrinkable(small_model)[0]
    # 0.6² + 0.8² = 1.
    filled_shrink_(small_model, tensors, constant_factors(tensors, 0.6), seed=7)
    touched = {tensor.name for tensor in tensors}
    assert any(name.endswith("bias") for name in touched)
    for name, parameter in small_model.named_parameters():
        new = fresh[name.removeprefix("timm_model.")]
        expected = 0.6 * before[name] + 0.8 * new if name in touched else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_factors_of_one_and_zero_keep_and_replace(small_model):
    before = copy.deepcopy(small_model.state_dict())
    tensors = find_shrinkable(small_model)[0]
    filled_shrink_(small_model, tensors, constant_factors(tensors, 1.0), seed=7)
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(tensor, before[name])
    filled_shrink_(small_model, tensors, constant_factors(tensors, 0.0), seed=7)
    fresh = fresh_state(small_model, 7)
    for tensor in tensors:
        assert torch.equal(tensor.parameter, fresh[tensor.name.removeprefix("timm_model.")])


def test_a_fresh_model_keeps_its_scale(small_model):
    tensors = find_shrinkable(small_model)[0]
    largest = max(tensors, key=lambda tensor: tensor.parameter.numel()).parameter
    before = largest.norm().item()
    filled_shrink_(small_model, tensors, constant_factors(tensors, 0.3), seed=7)
    # n independent numbers: the norm's relative spread is about 1 / √(2n).
    assert abs(largest.norm().item() / before - 1) < 6 / math.sqrt(2 * largest.numel())


def test_the_draw_follows_from_the_seed_and_leaves_the_random_state_alone(small_model):
    filled = []
    for seed in (7, 7, 8):
        other = copy.deepcopy(small_model)
        tensors = find_shrinkable(other)[0]
        state = torch.get_rng_state()
        filled_shrink_(other, tensors, constant_factors(tensors, 0.5), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        filled.append(other.timm_model.get_classifier().weight)
    assert torch.equal(filled[0], filled[1])
    assert not torch.equal(filled[0], filled[2])


def test_what_timm_cannot_draw_is_refused_unchanged(small_model, every_layer):
    with pytest.raises(TypeError, match=r"variant 'fill' needs a timm model in .*, got EveryLayer"):
        check_fillable(every_layer, 0)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        check_fillable(small_model, 1.5)
    with pytest.raises(TypeError, match="seed must be an integer, got True"):
        check_fillable(small_model, True)
    small_model.timm_model.extra = nn.Linear(2, 2)
    before = copy.deepcopy(small_model.state_dict())
    tensors = find_shrinkable(small_model)[0]
    with pytest.raises(ValueError, match=r"no fresh 'timm_model.extra.weight' of shape \(2, 2\)"):
        filled_shrink_(small_model, tensors, constant_factors(tensors, 0.5), seed=7)
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_failure_on_the_way_changes_nothing(small_model):
    before = copy.deepcopy(small_model.state_dict())
    tensors = find_shrinkable(small_model)[0]
    *factors, last = constant_factors(tensors, 0.5)
    with pytest.raises(RuntimeError, match="must match the size"):
        filled_shrink_(small_model, tensors, [*factors, torch.cat([last, last, last])], seed=7)
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(tensor, before[name])
