"""A run that begins from a checkpoint: the first model, cold again, shrinks towards it."""

import copy

import pytest
import torch
from helpers import same_state, state_of

import hf_dash
from hf_dash import StartContext, find_start
from hf_dash.method.tensors import find_shrinkable
from hf_dash.pretrained import load_checkpoint, save_checkpoint
from hf_dash.starts import StartsConfig

NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of three other classes, as if pretrained."""
    model = hf_dash.create_model("test_resnet", label_names=["a", "b", "c"], image_size=32, seed=9)
    path = tmp_path_factory.mktemp("lite")
    hf_dash.save_model(model, path)
    return path


def is_head(name):
    return name.startswith(("fc.", "timm_model.fc."))


def test_the_first_model_is_the_checkpoint_with_a_fresh_head(folder):
    checkpoint = load_checkpoint(str(folder))
    source = hf_dash.load_model(str(folder)).timm_model.state_dict()
    first, second = (checkpoint.create_model(NAMES, seed=seed) for seed in (0, 1))
    assert first.config.num_labels == 10
    assert checkpoint.name == folder.name
    other = second.timm_model.state_dict()
    for name, tensor in first.timm_model.state_dict().items():
        if is_head(name):
            assert tensor.shape[0] == 10
            assert name.endswith("bias") or not torch.equal(tensor, other[name])
        else:
            assert torch.equal(tensor, source[name])


def test_the_head_is_fresh_even_for_as_many_classes(folder):
    source = hf_dash.load_model(str(folder)).timm_model.state_dict()
    model = load_checkpoint(str(folder)).create_model(["x", "y", "z"], seed=0)
    assert not torch.equal(model.timm_model.fc.weight, source["fc.weight"])


def moved(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def begun(folder, two_rounds):
    checkpoint = load_checkpoint(str(folder))
    model = moved(checkpoint.create_model(NAMES, seed=0))
    dash = hf_dash.DashConfig(gradient_batch_size=30)
    return model, StartContext(two_rounds[1], seed=5, dash=dash, checkpoint=checkpoint)


def test_cold_begins_at_the_checkpoint_again(begun):
    model, context = begun
    find_start("cold")(model, context)
    assert same_state(state_of(model), state_of(context.checkpoint.create_model(NAMES, seed=5)))


def test_shrink_and_perturb_shrinks_the_change(begun):
    model, context = begun
    before = state_of(model)
    settings = StartsConfig(perturb_lam=0.25, perturb_sigma=0.0)
    context = StartContext(
        context.round_, seed=5, start_config=settings, checkpoint=context.checkpoint
    )
    find_start("shrink_perturb")(model, context)
    shrinkable = {tensor.name for tensor in find_shrinkable(model)[0]}
    for name, tensor in model.state_dict().items():
        origin = context.checkpoint.state.get(name.removeprefix("timm_model."))
        expected = before[name]
        if name in shrinkable:
            origin = torch.zeros(()) if origin is None else origin
            expected = origin + 0.25 * (before[name] - origin)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_dash_shrinks_towards_the_checkpoint_unless_told_otherwise(begun):
    model, context = begun
    other, zero = copy.deepcopy(model), copy.deepcopy(model)
    report = find_start("dash")(model, context).report
    hf_dash.dash_shrink_(
        other, context.gradient_batches(), config=context.dash, base=context.checkpoint.state
    )
    assert same_state(state_of(model), state_of(other))
    assert all(is_head(name) for name in report.towards_zero)
    assert report.towards_zero
    find_start("dash+base=zero")(zero, context)
    assert not same_state(state_of(model), state_of(zero))
    norms = [float(m.timm_model.conv1[0].weight.detach().norm()) for m in (model, zero)]
    assert norms[1] < 0.6 * norms[0]


def test_l2_init_pulls_to_the_first_weights(begun):
    model, context = begun
    penalty = find_start("l2_init")(model, context).penalty
    model.load_state_dict(context.checkpoint.create_model(NAMES, seed=0).state_dict())
    assert penalty(model).item() == 0.0


def test_a_checkpoint_of_another_architecture_is_named(folder, tiny_timm):
    with pytest.raises(ValueError, match=f"checkpoint '{folder.name}' is a 'test_resnet'"):
        load_checkpoint(str(folder)).first_state(tiny_timm, 0)


def test_a_name_that_timm_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"model_name_or_path with pretrained .*, got 'nonsense'"):
        load_checkpoint("nonsense", pretrained=True)


def test_a_saved_checkpoint_is_the_same_base(folder, tmp_path):
    checkpoint = load_checkpoint(str(folder))
    save_checkpoint(checkpoint, tmp_path, NAMES)
    again = load_checkpoint(str(tmp_path))
    assert same_state(checkpoint.state, again.state)
