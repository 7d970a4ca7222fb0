"""What a model's weights tell of their past, before they are shrunk."""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import heard, make_trainer, same_state, state_of, tiny_vit
from torch import nn
from transformers import ViTForImageClassification

import hf_dash
from hf_dash.trainer.guards import check_past, mark_model, objection


def trained_vit():
    """A ViT whose norms and biases have moved, as any training moves them."""
    model = tiny_vit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def test_a_fresh_model_has_nothing_to_forget(small_model):
    assert "never been trained" in objection(tiny_vit())
    assert "never been trained" in objection(small_model)
    assert objection(trained_vit()) == ""
    assert objection(nn.Linear(2, 2)) == ""  # nothing is known of it


def test_a_new_head_is_named(tmp_path):
    trained_vit().save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path)
    assert objection(again) == ""
    more = ViTForImageClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert "'classifier.weight' is newly initialized" in objection(more)
    trained_vit().vit.save_pretrained(tmp_path / "body")
    body = ViTForImageClassification.from_pretrained(tmp_path / "body", num_labels=5)
    assert "'classifier.weight' is newly initialized" in objection(body)
    with torch.no_grad():
        more.classifier.bias.add_(0.01)  # trained by whatever loop
    assert objection(more) == ""


def test_a_mark_travels_with_the_model(tmp_path):
    model = trained_vit()
    mark_model(model, "shrunk")
    model.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path)
    assert "shrunk and not trained since" in objection(again)
    mark_model(again, "trained")
    assert objection(again) == ""
    bare = nn.Linear(2, 2)
    mark_model(bare, "shrunk")
    assert "shrunk and not trained since" in objection(bare)


def test_strict_refuses_what_is_else_a_warning():
    with heard() as messages:
        check_past(tiny_vit(), strict=False)
    assert len(messages) == 1
    assert "never been trained" in messages[0]
    with pytest.raises(ValueError, match=r"never been trained.*strict=True"):
        check_past(tiny_vit(), strict=True)


def test_a_cell_that_is_run_twice_does_not_shrink_twice_unheard(tmp_path, two_rounds):
    class Interrupted(hf_dash.DashCallback):
        def on_train_begin(self, *arguments, **kwargs):
            super().on_train_begin(*arguments, **kwargs)
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, two_rounds[0], [Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = state_of(trainer.model)
    again = make_trainer(tmp_path, two_rounds[0], [hf_dash.DashCallback(strict=True)], max_steps=1)
    again.model = again.model_wrapped = trainer.model
    with pytest.raises(ValueError, match="shrunk and not trained since"):
        again.train()
    assert same_state(before, state_of(trainer.model))


def test_after_a_step_the_model_counts_as_trained(tmp_path, two_rounds):
    trainer = make_trainer(tmp_path, two_rounds[0], [hf_dash.DashCallback()], max_steps=1)
    trainer.train()
    assert objection(trainer.model) == ""
    with pytest.raises(TypeError, match="strict must be True or False, got 1"):
        hf_dash.DashCallback(strict=1)


@pytest.mark.parametrize(
    ("make", "said"),
    [(tiny_vit, "never been trained"), (trained_vit, "may be pretrained")],
)
def test_a_model_from_a_folder_gets_the_one_warning_that_is_right(tmp_path, make, said):
    make().save_pretrained(tmp_path / "model")
    model = ViTForImageClassification.from_pretrained(tmp_path / "model")
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(16)]
    round_ = SimpleNamespace(examples=rows)
    trainer = make_trainer(tmp_path, round_, [hf_dash.DashCallback()], max_steps=1)
    trainer.model = trainer.model_wrapped = model
    with heard(logging.WARNING) as messages:
        trainer.train()
    assert len(messages) == 1
    assert said in messages[0]
