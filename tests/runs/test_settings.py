import json

import pytest
from transformers import TrainingArguments

import hf_dash
from hf_dash.runs import recorded_settings, training_settings


def test_settings_are_recorded_without_places_and_secrets(tmp_path):
    data = hf_dash.DataConfig(str(tmp_path / "images"), test_dataset_name="user/held_out")
    more = {"token": "hf_secret", "output_dir": "a", "names": [str(tmp_path / "a"), "b"]}
    settings = recorded_settings(data, hf_dash.DashConfig(lam=0.1), more, {"lam": 0.2})
    assert (settings["dataset_name"], settings["test_dataset_name"]) == ("images", "user/held_out")
    assert (settings["lam"], settings["names"]) == (0.2, ["a", "b"])
    assert not {"token", "output_dir"} & settings.keys()
    assert str(tmp_path) not in json.dumps(settings)
    with pytest.raises(TypeError, match="groups must be dataclasses or mappings, got 3"):
        recorded_settings(data, 3)


def test_the_settings_of_a_trainer_tell_what_was_changed_and_no_secret(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "home"),
        hub_token="hf_secret",
        hub_model_id="user/name",
        run_name="mine",
        resume_from_checkpoint=str(tmp_path / "home"),
        label_smoothing_factor=0.1,
        optim="sgd",
        gradient_accumulation_steps=2,
        use_cpu=True,
    )
    settings = training_settings(args)
    assert settings["label_smoothing_factor"] == "0.1"
    assert settings["gradient_accumulation_steps"] == "2"
    assert (settings["optim"], settings["lr_scheduler_type"]) == ("sgd", "linear")
    assert (settings["learning_rate"], settings["world_size"]) == ("5e-05", 1)
    assert not {"adam_beta1", "accelerator_config", "max_grad_norm"} & set(settings)
    assert not [text for text in ("secret", "home", "user/name", "mine") if text in str(settings)]
    json.dumps(settings)
