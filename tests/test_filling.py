import copy
import math

import pytest
import torch
from torch import nn

import hf_dash
from hf_dash.filling import check_fillable, filled_shrink_
from hf_dash.models import fresh_state
from hf_dash.tensors import find_shrinkable


@pytest.fixture
def model():
    return hf_dash.create_model(
        "test_resnet", label_names=[str(label) for label in range(10)], image_size=32, seed=3
    )


def constant_factors(tensors, factor):
    return [torch.full_like(tensor.view(tensor.parameter), factor) for tensor in tensors]


def test_every_number_is_the_shrunk_one_and_its_share_of_the_fresh_one(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fresh = fresh_state(model, 7)
    tensors = find_shrinkable(model)[0]
    # 0.6² + 0.8² = 1.
    filled_shrink_(model, tensors, constant_factors(tensors, 0.6), seed=7)
    touched = {tensor.name for tensor in tensors}
    assert any(name.endswith("bias") for name in touched)
    for name, parameter in model.named_parameters():
        new = fresh[name.removeprefix("timm_model.")]
        expected = 0.6 * before[name] + 0.8 * new if name in touched else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_factors_of_one_and_zero_keep_and_replace(model):
    before = copy.deepcopy(model.state_dict())
    tensors = find_shrinkable(model)[0]
    filled_shrink_(model, tensors, constant_factors(tensors, 1.0), seed=7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    filled_shrink_(model, tensors, constant_factors(tensors, 0.0), seed=7)
    fresh = fresh_state(model, 7)
    for tensor in tensors:
        assert torch.equal(tensor.parameter, fresh[tensor.name.removeprefix("timm_model.")])


def test_a_fresh_model_keeps_its_scale(model):
    tensors = find_shrinkable(model)[0]
    largest = max(tensors, key=lambda tensor: tensor.parameter.numel()).parameter
    before = largest.norm().item()
    filled_shrink_(model, tensors, constant_factors(tensors, 0.3), seed=7)
    # n independent numbers: the norm's relative spread is about 1 / √(2n).
    assert abs(largest.norm().item() / before - 1) < 6 / math.sqrt(2 * largest.numel())


def test_the_draw_follows_from_the_seed_and_leaves_the_random_state_alone(model):
    filled = []
    for seed in (7, 7, 8):
        other = copy.deepcopy(model)
        tensors = find_shrinkable(other)[0]
        state = torch.get_rng_state()
        filled_shrink_(other, tensors, constant_factors(tensors, 0.5), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        filled.append(other.timm_model.get_classifier().weight)
    assert torch.equal(filled[0], filled[1])
    assert not torch.equal(filled[0], filled[2])


def test_what_timm_cannot_draw_is_refused_unchanged(model, every_layer):
    with pytest.raises(TypeError, match=r"variant 'fill' needs a timm model in .*, got EveryLayer"):
        check_fillable(every_layer, 0)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        check_fillable(model, 1.5)
    with pytest.raises(TypeError, match="seed must be an integer, got True"):
        check_fillable(model, True)
    model.timm_model.extra = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    tensors = find_shrinkable(model)[0]
    with pytest.raises(ValueError, match=r"no fresh 'timm_model.extra.weight' of shape \(2, 2\)"):
        filled_shrink_(model, tensors, constant_factors(tensors, 0.5), seed=7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
