import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from hf_dash.method.tensors import find_shrinkable


def found(model, grouping="kernel"):
    tensors, untouched = find_shrinkable(model, grouping)
    return {tensor.name: tensor.num_vectors for tensor in tensors}, untouched


def test_which_tensors_of_a_model_shrink(every_layer):
    tensors, untouched = found(every_layer)
    assert tensors == {
        "conv.weight": 24,
        "conv.bias": 1,
        "depthwise.weight": 8,
        "pointwise.weight": 48,
        "pointwise.bias": 1,
        "transposed.weight": 12,
        "transposed.bias": 1,
        "head.weight": 10,
        "head.bias": 1,
    }
    assert untouched == ["norm.weight", "norm.bias", "frozen.weight", "frozen.bias"]


def test_grouping_by_filter_and_auto(every_layer):
    filters, _ = found(every_layer, "filter")
    assert [filters[f"{n}.weight"] for n in ("conv", "depthwise", "pointwise")] == [8, 8, 6]
    # Two groups of two output channels each.
    assert filters["transposed.weight"] == 4
    auto, _ = found(every_layer, "auto")
    assert (auto["conv.weight"], auto["pointwise.weight"]) == (24, 6)


@pytest.mark.parametrize(("layer", "vectors"), [(nn.Conv1d, 6), (nn.Conv3d, 6)])
def test_convolutions_of_other_dimensions(layer, vectors):
    assert found(nn.Sequential(layer(2, 3, 3, bias=False)))[0] == {"0.weight": vectors}


def test_attention_shrinks_by_rows():
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    tensors, untouched = found(attention)
    assert tensors == {
        "in_proj_weight": 24,
        "in_proj_bias": 1,
        "out_proj.weight": 8,
        "out_proj.bias": 1,
    }
    assert untouched == ["bias_k", "bias_v"]
    separate, _ = found(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
    assert {f"{letter}_proj_weight": 8 for letter in "qkv"}.items() <= separate.items()


def test_a_tied_tensor_is_taken_once_under_its_first_name():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert found(model)[0] == {"0.weight": 4}


def test_a_view_never_copies_channels_last_memory():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last)
    (tensor, _), _ = find_shrinkable(layer, "filter")
    view = tensor.view(layer.weight)
    assert view.shape == (2, 2, 3, 3, 3)
    assert view.data_ptr() == layer.weight.data_ptr()


def test_a_model_without_shrinkable_tensors_is_refused():
    with pytest.raises(ValueError, match="model LayerNorm has no shrinkable tensor"):
        find_shrinkable(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="no shrinkable tensor"):
        find_shrinkable(nn.Linear(2, 2).requires_grad_(False))


def test_parametrized_weights_are_refused():
    with pytest.raises(NotImplementedError, match="ParametrizedLinear is parametrized"):
        find_shrinkable(weight_norm(nn.Linear(2, 2)))


def test_conv1d_of_transformers_shrinks_by_what_its_outputs_read():
    layer = Conv1D(3, 4)  # 3 outputs of 4 inputs, the weight is [4, 3]
    assert found(layer)[0] == {"weight": 3, "bias": 1}
    (weight, _), _ = find_shrinkable(layer)
    assert weight.dims == (0,)


@pytest.mark.parametrize(
    ("layer", "vectors"),
    [
        (
            nn.LSTM(3, 4, proj_size=2),
            {"weight_ih_l0": 16, "weight_hh_l0": 16, "weight_hr_l0": 2},
        ),
        (
            nn.GRU(3, 4, num_layers=2),
            {f"weight_{side}_l{layer}": 12 for layer in (0, 1) for side in ("ih", "hh")},
        ),
        (nn.GRUCell(3, 4), {"weight_ih": 12, "weight_hh": 12}),
    ],
    ids=["LSTM", "GRU", "GRUCell"],
)
def test_recurrent_layers_shrink_by_rows(layer, vectors):
    tensors, untouched = found(layer)
    biases = {name: 1 for name in dict(layer.named_parameters()) if name.startswith("bias")}
    assert tensors == {**vectors, **biases}
    assert len(biases) >= 2
    assert untouched == []


def test_two_parameters_on_the_same_memory_are_one():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert model[0].weight is not model[1].weight
    (tensor,), untouched = find_shrinkable(model)
    assert tensor.name == "0.weight"
    assert tensor.sources == (model[0].weight, model[1].weight)
    assert untouched == []


def test_parameters_that_overlap_are_refused():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False))
    memory = torch.randn(5, 4)
    model[0].weight, model[1].weight = nn.Parameter(memory[:3]), nn.Parameter(memory[2:])
    with pytest.raises(NotImplementedError, match=r"'0.weight' and '1.weight': they share a part"):
        find_shrinkable(model)
    model[1].weight = nn.Parameter(memory[3:])  # side by side, as in a flat buffer
    assert len(find_shrinkable(model)[0]) == 2
    model[1].weight = nn.Parameter(torch.randn(1, 4).expand(3, 4))
    with pytest.raises(NotImplementedError, match=r"'1.weight': its elements share their memory"):
        find_shrinkable(model)
