"""The same shrink whatever the precision, memory layout and wrapping of the model."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import DeepSpeedEngine, EveryLayer, make_tiny_timm, random_pairs, same_state, state_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_dash
from hf_dash.method.wrappers import as_trained, base_name, plain_name, unwrap


def resnet_and_batches(**options):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, **options)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 8, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (4, 8), generator=generator)
    return model, list(zip(images, labels, strict=True))


def distance(left: nn.Module, right: nn.Module, before: nn.Module) -> float:
    """Return how far two shrunk models are apart, relative to how far the shrink went."""
    rows = zip(left.parameters(), right.parameters(), before.parameters(), strict=True)
    apart, moved = 0.0, 0.0
    for a, b, start in rows:
        apart += (a - b).float().square().sum().item()
        moved += (b - start).float().square().sum().item()
    return (apart / moved) ** 0.5


# Rounding moves each cosine a little; kernels of 1×1, whose factor is λ or 1 by the sign of one
# small number, are what makes the distance more than rounding: hence grouping by filters.
@pytest.mark.parametrize("how", ["argument", "prepared", "loss_fn"])
def test_bfloat16_autocast_gives_nearly_the_same_factors(how):
    assert 0 < autocast_distance(how, torch.bfloat16) <= 0.05


def test_float16_autocast_gives_nearly_the_same_factors():
    # By the loss function: Accelerate gives the CPU no float16.
    assert 0 < autocast_distance("loss_fn", torch.float16) <= 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
@pytest.mark.parametrize(
    "options",
    [{}, {"grouping": "filter"}, {"variant": "fill", "seed": 3}, {"variant": "orthogonal"}],
    ids=str,
)
def test_a_gpu_shrinks_as_the_cpu_does(options):
    device = "cuda"
    on_cpu = make_tiny_timm()
    before, on_gpu = copy.deepcopy(on_cpu), copy.deepcopy(on_cpu).to(device)
    pairs = random_pairs(4, size=32)
    batches = [{"pixel_values": images, "labels": labels} for images, labels in pairs]
    moved = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    hf_dash.dash_shrink_(on_cpu, batches, **options)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        hf_dash.dash_shrink_(on_gpu, moved, **options)
    assert distance(on_gpu.to("cpu"), on_cpu, before) <= 1e-5


def autocast_distance(how, dtype):
    model, batches = resnet_and_batches()
    plain, before = copy.deepcopy(model), copy.deepcopy(model)
    hf_dash.dash_shrink_(plain, batches, grouping="filter")
    types = set()
    model.fc.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    if how == "loss_fn":

        def loss_fn(model, batch):
            with torch.autocast("cpu", dtype):
                return F.cross_entropy(model(batch[0]), batch[1])

        hf_dash.dash_shrink_(model, batches, loss_fn, grouping="filter")
    else:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        options = {"accelerator": accelerator} if how == "argument" else {}
        prepared = accelerator.prepare(model) if how == "prepared" else model
        hf_dash.dash_shrink_(prepared, batches, grouping="filter", **options)
    assert types == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return distance(model, plain, before)


def test_half_precision_loses_no_small_gradient():
    """A gradient of 2⁻²⁶ is zero in fp16; the loss is scaled so that it is not."""
    layer = nn.Linear(4, 2, bias=False).half()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    batch = (torch.ones(1, 4, dtype=torch.float16), torch.tensor([0]))
    loss_fn = lambda m, b: -(m(b[0]) * 2.0**-20).sum() * 2.0**-6  # noqa: E731
    report = hf_dash.dash_shrink_(layer, [batch], loss_fn, dry_run=True)
    assert report.mean_factor == pytest.approx(1.0)


def test_bfloat16_weights_stay_bfloat16():
    model, batches = resnet_and_batches()
    wide = copy.deepcopy(model)
    model = model.to(torch.bfloat16)
    wide.load_state_dict(model.state_dict())  # the same rounded weights
    before = copy.deepcopy(wide)
    hf_dash.dash_shrink_(wide, batches, grouping="filter")
    hf_dash.dash_shrink_(
        model,
        [(images.to(torch.bfloat16), labels) for images, labels in batches],
        grouping="filter",
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert distance(model, wide, before) <= 0.05


def test_compiled_models_shrink_under_their_plain_names():
    model, batches = resnet_and_batches()
    plain = copy.deepcopy(model)
    expected = hf_dash.dash_shrink_(plain, batches)
    compiled = torch.compile(model, backend="eager")
    report = hf_dash.dash_shrink_(compiled, batches)
    assert report.tensors == expected.tensors
    assert report.untouched == expected.untouched
    assert same_state(state_of(plain), state_of(model))


# Dynamo looks at the .grad of what it traces and is warned of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_shrink_under_their_plain_names():
    model, batches = resnet_and_batches()
    plain = copy.deepcopy(model)
    expected = hf_dash.dash_shrink_(plain, batches)
    model.layer1 = torch.compile(model.layer1, backend="eager")
    report = hf_dash.dash_shrink_(model, batches)
    assert [t.name for t in report.tensors] == [t.name for t in expected.tensors]
    assert distance(model, plain, resnet_and_batches()[0]) <= 1e-5


def test_gradient_checkpointing_changes_nothing():
    model, batches = resnet_and_batches()
    plain = copy.deepcopy(model)
    hf_dash.dash_shrink_(plain, batches)
    model.set_grad_checkpointing(True)
    hf_dash.dash_shrink_(model, batches)
    assert same_state(state_of(plain), state_of(model))


def test_channels_last_weights_are_scaled_themselves():
    model, batches = resnet_and_batches()
    plain, before = copy.deepcopy(model), copy.deepcopy(model)
    hf_dash.dash_shrink_(plain, batches)
    model = model.to(memory_format=torch.channels_last)
    memory = {name: p.data_ptr() for name, p in model.named_parameters()}
    hf_dash.dash_shrink_(model, [(x.to(memory_format=torch.channels_last), y) for x, y in batches])
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == memory
    # Another kernel computes the gradients; a few 1×1 weights have one so small that it turns.
    assert distance(model, plain, before) <= 0.01


def test_a_frozen_backbone_stays_unless_asked_for():
    model, batches = resnet_and_batches()
    whole = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    frozen = copy.deepcopy(model)
    before = state_of(model)
    report = hf_dash.dash_shrink_(model, batches)
    assert [tensor.name for tensor in report.tensors] == ["fc.weight", "fc.bias"]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"fc.weight", "fc.bias"}

    hf_dash.dash_shrink_(frozen, batches, include_frozen=True)
    hf_dash.dash_shrink_(whole, batches)
    assert same_state(state_of(frozen), state_of(whole))
    assert [p.requires_grad for p in frozen.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


class LowRank(nn.Module):
    """A linear layer as PEFT wraps it: frozen, beside two trainable thin ones."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


def test_of_a_low_rank_adapter_only_the_thin_layers_shrink():
    model, batches = resnet_and_batches()
    model.requires_grad_(False)
    model.fc = LowRank(model.fc)
    before = state_of(model)
    report = hf_dash.dash_shrink_(model, batches)
    assert [t.name for t in report.tensors] == ["fc.lora_a.weight", "fc.lora_b.weight"]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"fc.lora_a.weight", "fc.lora_b.weight"}


class Packed(nn.Linear):
    """A linear layer as quantization libraries leave it: integers instead of weights."""

    def __init__(self) -> None:
        super().__init__(4, 2, bias=False)
        integers = torch.zeros(2, 4, dtype=torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)


def test_quantized_weights_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="Packed is parametrized or quantized"):
        hf_dash.dash_shrink_(nn.Sequential(Packed(), nn.Linear(2, 2)), random_pairs(1))


def test_dynamically_quantized_layers_are_refused_by_name():
    # Their weights are not parameters, so nothing else would show; torch warns when it makes one.
    where = {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"}
    model = nn.Sequential(type("Linear", (nn.Module,), where)(), nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="Linear is parametrized or quantized"):
        hf_dash.dash_shrink_(model, random_pairs(1))


def test_zero_three_partitions_are_refused_by_name(every_layer):
    every_layer.conv.weight.ds_id = 0
    with pytest.raises(NotImplementedError, match=r"ZeRO-3: .* 'conv.weight' among them"):
        hf_dash.dash_shrink_(every_layer, random_pairs(1))


def test_a_deepspeed_engine_takes_over_the_shrunk_weights():
    model, batches = resnet_and_batches()
    plain = copy.deepcopy(model)
    expected = hf_dash.dash_shrink_(plain, batches)
    engine = DeepSpeedEngine(model)
    report = hf_dash.dash_shrink_(engine, batches)
    assert report.tensors == expected.tensors
    assert same_state(state_of(plain), state_of(model))
    for copied, parameter in zip(engine.copies, plain.parameters(), strict=True):
        assert torch.equal(copied, parameter)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8, 100])
def test_micro_batches_give_the_same_factors(every_layer, micro_batch_size):
    whole, before = copy.deepcopy(every_layer), copy.deepcopy(every_layer)
    sizes = []

    def loss_fn(model, batch):
        if torch.is_grad_enabled():  # the whole is computed once more, to compare
            sizes.append(len(batch[1]))
        return F.cross_entropy(model(batch[0]), batch[1])

    expected = hf_dash.dash_shrink_(whole, random_pairs(3))
    report = hf_dash.dash_shrink_(
        every_layer, random_pairs(3), loss_fn, micro_batch_size=micro_batch_size
    )
    assert max(sizes) == min(8, micro_batch_size)
    assert sum(sizes) == report.num_images == expected.num_images == 24
    assert report.num_batches == 3
    assert distance(every_layer, whole, before) <= 1e-5


def test_micro_batches_cut_mappings_too():
    model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
    whole = copy.deepcopy(model)
    before = copy.deepcopy(model)
    batch = {"pixel_values": torch.randn(5, 3, 32, 32), "labels": torch.tensor([0, 1, 0, 1, 1])}
    hf_dash.dash_shrink_(whole, [batch], grouping="filter")
    hf_dash.dash_shrink_(model, [batch], grouping="filter", micro_batch_size=2)
    assert distance(model, whole, before) <= 1e-4


def test_progress_is_shown_with_images_and_can_be_hidden(every_layer, capsys):
    hf_dash.dash_shrink_(every_layer, random_pairs(3), disable_tqdm=False)
    shown = capsys.readouterr().err
    assert "DASH" in shown
    assert "3 minibatches" in shown
    assert "images/s" in shown
    hf_dash.dash_shrink_(every_layer, random_pairs(3), disable_tqdm=True)
    assert capsys.readouterr().err == ""


def test_every_layer_is_a_fair_sample():
    """Guards the fixture: no kind of layer may silently fall out of the tests above."""
    kinds = {type(module).__name__ for module in EveryLayer().modules()}
    assert {"Conv2d", "ConvTranspose2d", "Linear", "BatchNorm2d", "Dropout"} <= kinds


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "DataParallel", "PipelineEngine"])
def test_unsupported_wrappers_are_refused_by_name(name):
    wrapped = type(name, (nn.Sequential,), {})(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=f"cannot shrink a model under {name}"):
        unwrap(nn.Sequential(wrapped))


def test_wrappers_are_taken_off_whatever_their_order():
    layer = nn.Linear(2, 2)
    assert unwrap(layer).module is layer
    assert unwrap(layer).kind == "plain"
    compiled = torch.compile(layer, backend="eager")
    assert unwrap(compiled).module is layer
    for engine in (DeepSpeedEngine(compiled), torch.compile(DeepSpeedEngine(layer))):
        wrapped = unwrap(engine)
        assert wrapped.module is layer
        assert (wrapped.kind, wrapped.has_foreign_hooks) == ("deepspeed", True)


def test_a_wrapper_hears_of_new_weights():
    engine = DeepSpeedEngine(nn.Linear(2, 2, bias=False))
    wrapped = unwrap(engine)
    with torch.no_grad():
        wrapped.module.weight.fill_(3.0)
    wrapped.refresh()
    assert torch.equal(engine.copies[0], torch.full((2, 2), 3.0))
    unwrap(nn.Linear(2, 2)).refresh()  # nobody to tell


def test_the_engine_of_a_trainer_is_found_or_asked_for():
    class Plain:
        deepspeed_plugin = None

    class Engined:
        deepspeed_plugin = object()

    class Bound:
        model_wrapped = None

    layer, trainer = nn.Linear(2, 2), Bound()
    assert as_trained(layer, Plain()) is layer
    with pytest.raises(NotImplementedError, match=r"under DeepSpeed unless .*bind\(trainer\)"):
        as_trained(layer, Engined())
    trainer.model_wrapped = layer  # before the engine is made
    assert as_trained(layer, Engined(), trainer) is layer
    trainer.model_wrapped = DeepSpeedEngine(layer)
    assert as_trained(layer, Engined(), trainer) is trainer.model_wrapped
    other = nn.Linear(2, 2)
    assert as_trained(other, Engined(), trainer) is other


def test_names_are_told_as_written():
    assert plain_name("layer1._orig_mod.0._orig_mod.weight") == "layer1.0.weight"
    assert base_name("base_model.model.fc.weight") == "fc.weight"


@pytest.mark.parametrize("kind", ["linear", "convolution", "conv1d"])
def test_a_lora_update_shrinks_once_by_one_factor_per_row(kind):
    peft = pytest.importorskip("peft", reason="peft is no dependency: tested where it is there")
    torch.manual_seed(0)
    layer = {"linear": nn.Linear(5, 4), "convolution": nn.Conv2d(5, 4, 3), "conv1d": Conv1D(4, 5)}
    inner = nn.ModuleDict({"layer": layer[kind], "head": nn.Linear(4, 3)})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            x = self.inner["layer"](x if kind == "convolution" else x.mean((2, 3)))
            return self.inner["head"](x.mean((2, 3)) if kind == "convolution" else x)

    config = peft.LoraConfig(
        r=2, target_modules=["layer"], init_lora_weights=False, fan_in_fan_out=kind == "conv1d"
    )
    model = peft.get_peft_model(Model(), config)
    adapted = model.base_model.model.inner["layer"]
    weight, update = adapted.base_layer.weight, adapted.get_delta_weight("default").detach()
    images = torch.randn(6, 5, 5, 5, generator=torch.Generator().manual_seed(1))
    batch = (images, torch.tensor([0, 1, 2, 0, 1, 2]))
    loss_fn = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731

    # The gradient of W is that of W + ΔW: one cosine a row, of all that its output reads.
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_fn(model.eval(), batch), weight)
    weight.requires_grad_(False)
    rows = (lambda t: t.mT) if kind == "conv1d" else (lambda t: t.flatten(1))
    cosines = F.cosine_similarity(rows(-gradient), rows(update))
    expected = cosines.clamp(0.3, 1)[:, None] * rows(update)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = hf_dash.dash_shrink_(model, [batch], loss_fn, micro_batch_size=4)
    found = rows(adapted.get_delta_weight("default"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    (tensor,) = report.tensors
    assert changed == {tensor.name} == {"base_model.model.inner.layer.lora_B.default.weight"}
    assert tensor.num_vectors == 4
    assert any("lora_A" in name for name in report.untouched)
    assert not weight.requires_grad


def test_lora_that_is_not_a_plain_update_is_refused_by_name():
    peft = pytest.importorskip("peft", reason="peft is no dependency: tested where it is there")
    batches = random_pairs(1)
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4))  # noqa: E731
    dora = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["1"], use_dora=True))
    with pytest.raises(NotImplementedError, match="of DoRA the update is not"):
        hf_dash.dash_shrink_(dora, batches)
    merged = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["1"]))
    merged.merge_adapter()
    with pytest.raises(NotImplementedError, match=r"'default' while it is merged: .*unmerge"):
        hf_dash.dash_shrink_(merged, batches)
    merged.unmerge_adapter()
    with pytest.raises(NotImplementedError, match="variant 'orthogonal' is not defined"):
        hf_dash.dash_shrink_(merged, batches, variant="orthogonal")


def test_tensors_that_cannot_have_a_gradient_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="'weight' on the meta device"):
        unwrap(nn.Linear(2, 2, device="meta"))
    with torch.inference_mode():
        layer = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match=r"'weight', made in torch.inference_mode"):
        unwrap(layer)
