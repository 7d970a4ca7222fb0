"""Every kind of image classifier people train with Trainer, shrunk by the callback in one line."""

import copy

import accelerate
import pytest
import torch
from helpers import same_state, state_of
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import hf_dash

LABELS = {"num_labels": 3}


def timm_model():
    return hf_dash.create_model("test_resnet", label_names=["a", "b", "c"], image_size=32, seed=0)


def vit():
    return ViTForImageClassification(
        ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            **LABELS,
        )
    )


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **LABELS)
    )


def convnext():
    return ConvNextForImageClassification(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32, **LABELS)
    )


def swin():
    return SwinForImageClassification(
        SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
            **LABELS,
        )
    )


def dinov2():
    return Dinov2ForImageClassification(
        Dinov2Config(
            image_size=28,
            patch_size=14,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            **LABELS,
        )
    )


def dinov2_head():
    """A classifier on frozen features: the linear probe."""
    model = dinov2()
    model.dinov2.requires_grad_(False)
    return model


class LowRank(nn.Module):
    """A frozen linear layer beside a trainable product of two thin ones, as LoRA has it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, inputs):
        return self.base_layer(inputs) + self.lora_B(self.lora_A(inputs))


def low_rank():
    model = timm_model().requires_grad_(False)
    torch.manual_seed(0)
    model.timm_model.fc = LowRank(model.timm_model.fc)
    model.timm_model.fc.base_layer.requires_grad_(False)
    return model


def peft_model():
    peft = pytest.importorskip("peft", reason="peft is no dependency: tested where it is there")
    config = peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    return peft.get_peft_model(timm_model(), config)


class Recorder:
    """A collator that keeps the batches it makes, while it is told to."""

    def __init__(self):
        self.batches = []
        self.recording = False

    def __call__(self, rows):
        batch = {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
        if self.recording:
            self.batches.append(batch)
        return batch


class Watched(hf_dash.DashCallback):
    """Keeps the model before the shrink, the batches read for it, and the weights after it."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def on_train_begin(self, *arguments, model, **kwargs):
        self.before = copy.deepcopy(model)
        self.recorder.recording = True
        super().on_train_begin(*arguments, model=model, **kwargs)
        self.recorder.recording = False
        self.after = state_of(model)


def train(folder, model, size=32, inputs=torch.float32, more_callbacks=(), **options):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "pixel_values": torch.randn(3, size, size, generator=generator).to(inputs),
            "labels": number % 3,
        }
        for number in range(24)
    ]
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    recorder = Recorder()
    callback = Watched(recorder)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        data_collator=recorder,
        callbacks=[callback, *more_callbacks],
    )
    trainer.train()
    return trainer, callback


def assert_shrunk_as_by_hand(callback):
    """Compare with ``dash_shrink_`` on a copy of the model and the batches that were read."""
    model, batches = callback.before, callback.recorder.batches
    assert len(batches) == 3
    before = state_of(model)
    report = hf_dash.dash_shrink_(model, batches)
    expected = state_of(model)
    assert same_state(expected, callback.after)
    names = [tensor.name for tensor in callback.report.tensors]
    assert names == [tensor.name for tensor in report.tensors]
    changed = {name for name in before if not torch.equal(before[name], callback.after[name])}
    assert changed
    assert changed <= set(names)


def weights_of(model):
    """Return the names of the weights of all trainable linear layers and convolutions.

    Of PEFT's adapters the update B·A shrinks as one, by way of B.
    """
    layers = (nn.Linear, nn.Conv2d)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, layers) and module.weight.requires_grad
        if not name.endswith("lora_A.default")
    }


MODELS = [timm_model, vit, resnet, convnext, swin, dinov2, dinov2_head, low_rank, peft_model]


# peft reads it under its older name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("make_model", MODELS, ids=lambda make: make.__name__)
def test_the_trainer_shrinks_as_dash_shrink_does(tmp_path, make_model):
    torch.manual_seed(0)
    model = make_model()
    trainer, callback = train(tmp_path, model, size=28 if "dinov2" in make_model.__name__ else 32)
    assert trainer.state.global_step == 2
    assert_shrunk_as_by_hand(callback)
    names = {tensor.name for tensor in callback.report.tensors}
    trainable = {name for name, p in callback.before.named_parameters() if p.requires_grad}
    assert weights_of(callback.before) <= names <= trainable
    assert names | set(callback.report.untouched) == {
        name for name, _ in callback.before.named_parameters()
    }
    assert not same_state(callback.after, state_of(trainer.model))  # and then it trained


@pytest.mark.parametrize("make_model", [dinov2_head, low_rank], ids=lambda make: make.__name__)
def test_only_what_is_trained_shrinks(tmp_path, make_model):
    torch.manual_seed(0)
    size = 28 if make_model is dinov2_head else 32
    _, callback = train(tmp_path, make_model(), size=size)
    expected = {
        dinov2_head: {"classifier.weight", "classifier.bias"},
        low_rank: {"timm_model.fc.lora_A.weight", "timm_model.fc.lora_B.weight"},
    }
    names = {tensor.name for tensor in callback.report.tensors}
    assert names == expected[make_model]
    frozen = {name: t for name, t in state_of(callback.before).items() if name not in names}
    assert all(torch.equal(callback.after[name], tensor) for name, tensor in frozen.items())


class FirstStep(TrainerCallback):
    """Notes how much was compiled before the first step."""

    def __init__(self, compiled):
        self.compiled = compiled

    def on_epoch_begin(self, *arguments, **kwargs):
        self.at_first_step = len(self.compiled)


@pytest.mark.parametrize("make_model", [timm_model, vit], ids=lambda make: make.__name__)
def test_a_compiled_model_is_shrunk_without_compiling_the_pass(tmp_path, monkeypatch, make_model):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    # The Trainer takes a backend by name alone; compiled code itself would be minutes of C++.
    monkeypatch.setattr(
        accelerate.utils.TorchDynamoPlugin, "to_kwargs", lambda self: {"backend": backend}
    )
    torch._dynamo.reset()
    torch.manual_seed(0)
    first_step = FirstStep(compiled)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer, callback = train(tmp_path, make_model(), more_callbacks=[first_step], **options)
    torch._dynamo.reset()
    assert first_step.at_first_step == 0  # the pass ran as written
    assert compiled  # the training did not
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert_shrunk_as_by_hand(callback)
    assert not any("_orig_mod" in tensor.name for tensor in callback.report.tensors)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("make_model", [timm_model, vit, swin], ids=lambda make: make.__name__)
def test_gradient_checkpointing_changes_nothing(tmp_path, make_model):
    torch.manual_seed(0)
    trainer, callback = train(tmp_path, make_model(), gradient_checkpointing=True)
    # timm's models have a flag of their own.
    own = getattr(getattr(trainer.model, "timm_model", None), "grad_checkpointing", False)
    assert own or trainer.model.is_gradient_checkpointing
    assert_shrunk_as_by_hand(callback)


def test_under_bf16_the_weights_stay_float32_and_shrink_the_same(tmp_path):
    torch.manual_seed(0)
    trainer, callback = train(tmp_path, vit(), bf16=True)
    assert trainer.accelerator.mixed_precision == "bf16"
    # Outside of the training step nothing runs under autocast: the pass is one in float32.
    assert_shrunk_as_by_hand(callback)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_a_model_in_bfloat16_is_shrunk_in_its_own_precision(tmp_path):
    torch.manual_seed(0)
    trainer, callback = train(tmp_path, vit().to(torch.bfloat16), inputs=torch.bfloat16)
    assert_shrunk_as_by_hand(callback)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


def test_fp16_on_the_cpu_is_no_mixed_precision_at_all(tmp_path):
    torch.manual_seed(0)
    trainer, callback = train(tmp_path, vit(), fp16=True)
    assert trainer.accelerator.scaler is None or not trainer.accelerator.scaler.is_enabled()
    assert_shrunk_as_by_hand(callback)
