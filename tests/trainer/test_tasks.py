"""Every vision task that a Trainer trains: bound, unbound, and by ``dash_shrink_``."""

import pytest
import torch
import torch.nn.functional as F
from helpers import same_state, state_of
from torch import nn
from torch.utils.data import default_collate
from transformers import (
    CLIPConfig,
    CLIPModel,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    YolosConfig,
    YolosForObjectDetection,
)

import hf_dash

VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}


def images(index, size=16):
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(index))


def together(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def yolos():
    return YolosForObjectDetection(YolosConfig(**VIT, image_size=[16, 16], num_labels=3))


def detr():
    backbone = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 4],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        backbone_config=backbone,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        num_queries=3,
        num_labels=3,
    )
    return DetrForObjectDetection(config)


def detection(make_model):
    """Nested dicts of labels, as many boxes as there are."""
    rows = [
        {
            "pixel_values": images(i),
            "labels": {
                "class_labels": torch.tensor([i % 3] * (i % 2 + 1)),
                "boxes": torch.full((i % 2 + 1, 4), 0.4),
            },
        }
        for i in range(16)
    ]

    def collate(rows):
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": [row["labels"] for row in rows]}

    return make_model(), rows, collate


def segmentation():
    """A class for every pixel, 255 for none."""
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[1, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
        semantic_loss_ignore_index=255,
    )
    maps = torch.tensor([0, 1, 2, 255]).repeat(64).view(16, 16)
    rows = [{"pixel_values": images(i), "labels": maps} for i in range(16)]
    return SegformerForSemanticSegmentation(config), rows, together


def contrast():
    """Pairs of images and texts, without labels."""
    tower = {key: value for key, value in VIT.items() if key != "patch_size"}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 2},
        vision_config={**VIT, "image_size": 16},
        projection_dim=8,
    )
    texts = [{"input_ids": torch.tensor([1, 3 + i, 4, 2]), "return_loss": True} for i in range(16)]
    rows = [{"pixel_values": images(i), **text} for i, text in enumerate(texts)]

    def collate(rows):
        return {
            **together([{k: r[k] for k in ("pixel_values", "input_ids")} for r in rows]),
            "return_loss": True,
        }

    return CLIPModel(config), rows, collate


def autoencoder():
    decoder = {
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }
    model = ViTMAEForPreTraining(ViTMAEConfig(**VIT, **decoder, image_size=16))
    # Without ``noise`` every call would draw other masks.
    noise = torch.tensor([0.1, 0.4, 0.2, 0.3])
    return model, [{"pixel_values": images(i), "noise": noise} for i in range(16)], together


def masked_images():
    model = ViTForMaskedImageModeling(ViTConfig(**VIT, image_size=16, encoder_stride=8))
    mask = torch.tensor([True, False, True, False])
    return (
        model,
        [{"pixel_values": images(i), "bool_masked_pos": mask} for i in range(16)],
        together,
    )


def regression(to):
    model = ViTForImageClassification(ViTConfig(**VIT, image_size=16, num_labels=1))
    rows = [{"pixel_values": images(i), "labels": to(i)} for i in range(16)]
    return model, rows, together


def several_labels():
    config = ViTConfig(**VIT, image_size=16, num_labels=3)
    config.problem_type = "multi_label_classification"
    rows = [{"pixel_values": images(i), "labels": [1.0, i % 2, 0.0]} for i in range(16)]
    return ViTForImageClassification(config), rows, together


class TwoHeads(nn.Module):
    """A dict of labels, one per head."""

    def __init__(self):
        super().__init__()
        self.coarse, self.fine = nn.Linear(768, 2), nn.Linear(768, 3)

    def forward(self, pixel_values, labels):
        x = pixel_values.flatten(1)
        loss = F.cross_entropy(self.coarse(x), labels["coarse"])
        return {"loss": loss + F.cross_entropy(self.fine(x), labels["fine"])}


def two_heads():
    rows = [
        {"pixel_values": images(i), "labels": {"coarse": i % 2, "fine": i % 3}} for i in range(16)
    ]
    return TwoHeads(), rows, default_collate


TASKS = {
    "detection, YOLOS": lambda: detection(yolos),
    "detection, DETR": lambda: detection(detr),
    "segmentation": segmentation,
    "contrast": contrast,
    "autoencoder": autoencoder,
    "masked images": masked_images,
    "regression of floats": lambda: regression(float),
    "regression of integers": lambda: regression(lambda i: i % 5),
    "several labels": several_labels,
    "two heads": two_heads,
}


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **options,
    )


class AfterShrink(hf_dash.DashCallback):
    def on_train_begin(self, *arguments, model, **kwargs):
        super().on_train_begin(*arguments, model=model, **kwargs)
        self.after = state_of(model)


@pytest.mark.parametrize("task", TASKS)
def test_the_trainer_and_the_function_shrink_alike(tmp_path, task):
    found = []
    for how in ("function", "unbound", "bound"):
        torch.manual_seed(0)
        model, rows, collate = TASKS[task]()
        before = state_of(model)
        if how == "function":
            batches = [collate(rows[:8]), collate(rows[8:])]
            report = hf_dash.dash_shrink_(model, batches)
            after = state_of(model)
        else:
            trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collate)
            callback = AfterShrink(trainer=trainer if how == "bound" else None)
            trainer.add_callback(callback)
            trainer.train()
            report, after = callback.report, callback.after
        assert (report.num_batches, report.num_images) == (2, 16)
        assert not same_state(before, after)
        found.append(after)
    for after in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)


def test_labels_of_another_name_need_the_trainers_own_loss(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = F.cross_entropy(model(inputs["pixel_values"].flatten(1)), inputs["targets"])
            return (loss, {}) if return_outputs else loss

    class Bare(nn.Linear):
        def forward(self, pixels):
            return super().forward(pixels)

    rows = [{"pixel_values": images(i), "targets": i % 3} for i in range(16)]
    for bound in (True, False):
        trainer = Own(
            Bare(768, 3),
            arguments(tmp_path, label_names=["targets"]),
            train_dataset=rows,
            data_collator=together,
        )
        callback = hf_dash.DashCallback(trainer=trainer if bound else None)
        trainer.add_callback(callback)
        if bound:
            trainer.train()
            assert callback.report.num_images == 16
        else:
            before = state_of(trainer.model)
            with pytest.raises(ValueError, match=r"batch has no labels: its keys are .*targets"):
                trainer.train()
            assert same_state(before, state_of(trainer.model))
