import copy
import math

import pytest
import torch
from torch import nn

from hf_dash.filling import check_fillable, filled_shrink_
from hf_dash.models import fresh_state
from hf_dash.tensors import find_shrinkable


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
