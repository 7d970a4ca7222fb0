"""Weights shrink towards a checkpoint: w₀ + s·(w − w₀) in place of s·w."""

import copy
import json
import math

import pytest
import torch
from helpers import nearby_state, random_pairs, same_state, state_of, tiny_vit
from safetensors.torch import save_file
from torch import nn

import hf_dash
from hf_dash import DashConfig, dash_shrink_
from hf_dash.method import NoEffectWarning
from hf_dash.method.dash import default_loss
from hf_dash.method.reference import reference_factors

QUIET = {"disable_tqdm": True}


def test_a_change_by_hand():
    # One minibatch, loss = −⟨g, w⟩ row by row: the descent direction is g itself.
    model = nn.Linear(2, 3, bias=False)
    weight = torch.tensor([[4.0, 2.0], [0.0, 1.0], [5.0, 5.0]])
    origin = torch.tensor([[1.0, 2.0], [0.0, 0.0], [4.0, 4.0]])
    descent = torch.tensor([[1.0, 0.0], [4.0, 3.0], [-1.0, -1.0]])
    with torch.no_grad():
        model.weight.copy_(weight)
    batches = [(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))]
    dash_shrink_(
        model,
        batches,
        lambda m, b: -(descent * m.weight).sum(),
        lam=0.25,
        base={"weight": origin},
        **QUIET,
    )
    # Changes (3, 0), (0, 1), (1, 1); cosines 1, 3/5, −1: factors 1, 0.6, 0.25.
    expected = torch.tensor([[4.0, 2.0], [0.0, 0.6], [4.25, 4.25]])
    torch.testing.assert_close(model.weight.data, expected)


@pytest.mark.parametrize("grouping", ["kernel", "filter", "auto"])
def test_every_kind_of_layer_equals_the_reference(every_layer, grouping):
    batches, before, base = random_pairs(3), state_of(every_layer), nearby_state(every_layer)
    factors = reference_factors(
        every_layer, batches, default_loss, grouping=grouping, base=base, lam=0.2
    )
    dash_shrink_(every_layer, batches, grouping=grouping, lam=0.2, base=base, **QUIET)
    for name, tensor in every_layer.state_dict().items():
        expected = before[name]
        if name in factors:
            change = before[name].double() - base[name].double()
            expected = (base[name].double() + factors[name] * change).to(tensor.dtype)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_a_base_of_zeros_is_the_papers_method_to_the_bit(every_layer):
    batches, other = random_pairs(3), copy.deepcopy(every_layer)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in other.state_dict().items()}
    plain = dash_shrink_(every_layer, batches, **QUIET)
    based = dash_shrink_(other, batches, base=zeros, **QUIET)
    assert same_state(state_of(every_layer), state_of(other))
    assert [t.mean_factor for t in plain.tensors] == [t.mean_factor for t in based.tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lam_one_is_the_identity(every_layer, dtype):
    model = every_layer.to(dtype)
    before, base = state_of(model), nearby_state(every_layer.float())
    model.to(dtype)
    batches = [(images.to(dtype), labels) for images, labels in random_pairs(2)]
    with pytest.warns(NoEffectWarning, match="the weights are those of|every factor is 1|nothing"):
        dash_shrink_(model, batches, lam=1.0, base=base, **QUIET)
    assert same_state(before, state_of(model))


def test_a_base_equal_to_the_model_changes_nothing_and_says_so(every_layer):
    before = state_of(every_layer)
    with pytest.warns(NoEffectWarning, match="the weights are those of a state dict"):
        dash_shrink_(every_layer, random_pairs(2), base=before, **QUIET)
    assert same_state(before, state_of(every_layer))


def test_a_base_in_another_precision_is_read_as_it_is(every_layer):
    batches, other = random_pairs(2), copy.deepcopy(every_layer)
    base = {name: tensor.bfloat16() for name, tensor in nearby_state(every_layer).items()}
    exact = {name: tensor.float() for name, tensor in base.items()}
    dash_shrink_(every_layer, batches, base=base, **QUIET)
    dash_shrink_(other, batches, base=exact, **QUIET)
    assert same_state(state_of(every_layer), state_of(other))


def test_a_new_head_shrinks_towards_zero_and_is_listed(tiny_timm):
    batches = [{"pixel_values": i, "labels": y} for i, y in random_pairs(2)]
    checkpoint = hf_dash.create_model(
        "resnet10t",
        label_names=["a", "b", "c"],
        model_args=tiny_timm.config.model_args,
        image_size=32,
        seed=3,
    )
    base, before = checkpoint.state_dict(), state_of(tiny_timm)
    head = {n: t for n, t in before.items() if n.startswith("timm_model.fc.")}
    known = {n: t for n, t in base.items() if n not in head}
    factors = reference_factors(tiny_timm, batches, default_loss, base=known)
    report = dash_shrink_(tiny_timm, batches, base=base, **QUIET)
    assert report.towards_zero == ("timm_model.fc.weight", "timm_model.fc.bias")
    for name in head:
        expected = (before[name].double() * factors[name]).float()
        torch.testing.assert_close(tiny_timm.state_dict()[name], expected, rtol=1e-5, atol=1e-7)


def test_a_folder_is_read_in_either_layout(tiny_timm, tmp_path):
    batches = [{"pixel_values": i, "labels": y} for i, y in random_pairs(2)]
    checkpoint = copy.deepcopy(tiny_timm)
    checkpoint.load_state_dict(nearby_state(tiny_timm))
    states = {}
    hf_dash.save_model(checkpoint, tmp_path / "timm")
    checkpoint.save_pretrained(tmp_path / "transformers")
    for base in (checkpoint.state_dict(), tmp_path / "timm", str(tmp_path / "transformers")):
        model = copy.deepcopy(tiny_timm)
        report = dash_shrink_(model, batches, base=base, **QUIET)
        assert report.towards_zero == ()
        states[str(base)] = state_of(model)
        json.dumps(report.to_dict())  # a state dict is only named in the report
    first, *others = states.values()
    assert all(same_state(first, other) for other in others)


def test_a_backbone_without_its_head_is_a_base(tmp_path):
    model = tiny_vit()
    checkpoint = tiny_vit()
    checkpoint.load_state_dict(nearby_state(model))
    checkpoint.vit.save_pretrained(tmp_path)  # no "vit." in front of its names
    batches = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 0, 1])}]
    report = dash_shrink_(model, batches, base=tmp_path, **QUIET)
    assert report.towards_zero == ("classifier.weight", "classifier.bias")


def test_a_bare_timm_model_takes_the_wrappers_checkpoint(tiny_timm):
    base = nearby_state(tiny_timm)
    batches = random_pairs(2)
    dicts = [{"pixel_values": i, "labels": y} for i, y in batches]
    bare = copy.deepcopy(tiny_timm.timm_model)
    dash_shrink_(tiny_timm, dicts, base=base, **QUIET)
    dash_shrink_(bare, batches, base=base, **QUIET)
    for name, tensor in bare.state_dict().items():
        torch.testing.assert_close(tensor, tiny_timm.timm_model.state_dict()[name])


def other_width(model):
    return {n: t[..., :1] if t.ndim == 4 else t for n, t in model.state_dict().items()}


def quantized(model):
    return {n: t.to(torch.int8) for n, t in model.state_dict().items()}


def without_values(model):
    return {n: t.to("meta") for n, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (without_values, ValueError, "'conv.weight' on the device 'meta'"),
        (other_width, ValueError, "'conv.weight' has the shape"),
        (quantized, ValueError, "'conv.weight' of torch.int8"),
        (lambda model: {"encoder.weight": torch.ones(3)}, ValueError, "holds 0 of the"),
        (lambda model: {}, ValueError, "holds 0 of the"),
        (lambda model: 3, TypeError, "base must be .*, got int"),
        (lambda model: {"conv.weight": 3}, TypeError, "int 'conv.weight'"),
        (
            lambda model: {"module.conv.weight": torch.ones(1), "conv.weight": torch.ones(1)},
            ValueError,
            "names one tensor twice",
        ),
    ],
    ids=[
        "no values",
        "other width",
        "quantized",
        "other names",
        "empty",
        "a number",
        "no tensors",
        "twice",
    ],
)
def test_a_bad_base_changes_nothing(every_layer, make, error, message):
    before = state_of(every_layer)
    with pytest.raises(error, match=message):
        dash_shrink_(every_layer, random_pairs(2), base=make(every_layer), **QUIET)
    assert same_state(before, state_of(every_layer))


def test_a_base_that_is_not_finite_changes_nothing(every_layer):
    before, base = state_of(every_layer), nearby_state(every_layer)
    base["pointwise.weight"][0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"'pointwise\.weight'"):
        dash_shrink_(every_layer, random_pairs(2), base=base, **QUIET)
    assert same_state(before, state_of(every_layer))


def test_a_pickle_is_refused(every_layer, tmp_path):
    torch.save(every_layer.state_dict(), tmp_path / "pytorch_model.bin")
    before = state_of(every_layer)
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        dash_shrink_(every_layer, random_pairs(2), base=tmp_path, **QUIET)
    assert same_state(before, state_of(every_layer))


def test_a_damaged_folder_changes_nothing(every_layer, tmp_path):
    save_file(nearby_state(every_layer), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    before = state_of(every_layer)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        dash_shrink_(every_layer, random_pairs(2), base=tmp_path, **QUIET)
    assert same_state(before, state_of(every_layer))


def test_a_repository_that_is_gone_is_named(every_layer, hub):
    before = state_of(every_layer)
    with pytest.raises(ValueError, match="user/gone"):
        dash_shrink_(every_layer, random_pairs(2), base="user/gone@round-001", **QUIET)
    assert same_state(before, state_of(every_layer))


def test_a_variant_and_a_base_exclude_each_other():
    with pytest.raises(ValueError, match="variant must be None with a base, got 'orthogonal'"):
        DashConfig(variant="orthogonal", base="somewhere")
    DashConfig(variant="orthogonal", base="zero")


def test_zero_stands_for_the_papers_method(every_layer):
    batches, other = random_pairs(2), copy.deepcopy(every_layer)
    dash_shrink_(every_layer, batches, **QUIET)
    dash_shrink_(other, batches, base="zero", **QUIET)
    assert same_state(state_of(every_layer), state_of(other))


def test_no_more_than_a_slice_of_the_checkpoint_is_read_at_a_time(monkeypatch):
    monkeypatch.setattr("hf_dash.method.shrink.SLICE", 100)
    model = nn.Linear(50, 40)
    base = nearby_state(model)
    read = []

    class Watched(dict):
        def __getitem__(self, name):
            tensor = super().__getitem__(name)
            read.append(tensor)
            return tensor

    whole = copy.deepcopy(model)
    batches = [(torch.randn(8, 50), torch.randint(0, 40, (8,)))]
    dash_shrink_(model, batches, base=Watched(base), **QUIET)
    monkeypatch.setattr("hf_dash.method.shrink.SLICE", 10**9)
    dash_shrink_(whole, batches, base=base, **QUIET)
    assert len(read) > 40
    assert same_state(state_of(model), state_of(whole))


# peft reads it under its older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_are_the_change_itself(tiny_timm):
    peft = pytest.importorskip("peft", reason="peft is not a dependency: tested where it is there")
    base = state_of(tiny_timm)
    config = peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_timm, config)
    other = copy.deepcopy(model)
    batches = [{"pixel_values": i, "labels": y} for i, y in random_pairs(2)]
    report = dash_shrink_(model, batches, base=base, **QUIET)
    dash_shrink_(other, batches, **QUIET)
    assert same_state(state_of(model), state_of(other))
    assert report.towards_zero == tuple(tensor.name for tensor in report.tensors)
