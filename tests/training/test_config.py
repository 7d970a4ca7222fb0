import dataclasses

import pytest
from transformers import HfArgumentParser

from hf_dash import TrainingConfig


def changed(config):
    """The fields that are not as by default."""
    default = dataclasses.asdict(TrainingConfig())
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if value != default[name]}


def test_the_plain_preset():
    assert changed(TrainingConfig(training_preset="plain")) == {
        "training_preset": "plain",
        "learning_rate": 1e-3,
    }


def test_the_state_of_the_art_preset():
    assert changed(TrainingConfig(training_preset="sota")) == {
        "training_preset": "sota",
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "augment": True,
        "lr_milestones": [60, 120, 160, 200],
        "warmup_epochs": 1,
        "max_epochs": 260,
        "accuracy_threshold": None,
    }


def test_values_of_ones_own_win_over_a_preset():
    config = TrainingConfig(training_preset="sota", learning_rate=0.2, lr_milestones=[3])
    assert (config.learning_rate, config.lr_milestones, config.max_epochs) == (0.2, [3], 260)


def test_a_filled_preset_survives_copying():
    config = TrainingConfig(training_preset="sota", sam_rho=0.1)
    assert TrainingConfig(**dataclasses.asdict(config)) == config
    assert dataclasses.replace(config, max_epochs=2).max_epochs == 2
    config.lr_milestones.append(999)
    assert TrainingConfig(training_preset="sota").lr_milestones == [60, 120, 160, 200]


def test_the_command_line_sets_every_kind_of_field():
    flags = "--lr_milestones 3 5 --optim adamw --augment --accuracy_threshold 0.5 --sam_rho 0.1"
    parser = HfArgumentParser(TrainingConfig)
    (config,) = parser.parse_args_into_dataclasses(flags.split(" "))
    assert changed(config) == {
        "lr_milestones": [3, 5],
        "optim": "adamw",
        "augment": True,
        "accuracy_threshold": 0.5,
        "sam_rho": 0.1,
    }
    (config,) = HfArgumentParser(TrainingConfig).parse_args_into_dataclasses(
        ["--training_preset", "sota"]
    )
    assert config == TrainingConfig(training_preset="sota")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("learning_rate", 0.0, "greater than 0"),
        ("learning_rate", float("nan"), "greater than 0"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("weight_decay", -1.0, "at least 0"),
        ("train_batch_size", 0, "at least 1"),
        ("max_epochs", 0, "at least 1"),
        ("accuracy_threshold", 1.5, r"in \(0, 1\]"),
        ("adam_beta1", 1.0, r"in \[0, 1\)"),
        ("adam_beta2", -0.1, r"in \[0, 1\)"),
        ("adam_epsilon", 0.0, "greater than 0"),
        ("sam_rho", -0.1, "at least 0"),
        ("lr_milestones", [3, 2], r"rising and at least 1"),
        ("lr_milestones", [2, 2], r"rising and at least 1"),
        ("lr_milestones", [0, 2], r"rising and at least 1"),
        ("lr_gamma", 1.5, r"in \(0, 1\]"),
        ("warmup_epochs", -1, "at least 0"),
        ("num_workers", -1, "at least 0"),
        ("optim", "adam", r"one of \('sgd', 'adamw'\)"),
        ("training_preset", "best", r"one of \['plain', 'sota'\]"),
    ],
)
def test_values_out_of_range_are_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} must be {allowed}, got ") as error:
        TrainingConfig(**{field: value})
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("learning_rate", "0.1", "a number"),
        ("sam_rho", True, "a number"),
        ("accuracy_threshold", "none", "a number"),
        ("max_epochs", 2.5, "an integer"),
        ("num_workers", None, "an integer"),
        ("momentum", None, "a number"),
        ("augment", "yes", "True or False"),
        ("channels_last", 1, "True or False"),
        ("lr_milestones", 3, "a list of integers"),
        ("lr_milestones", [1.5], "a list of integers"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(field, value, allowed):
    with pytest.raises(TypeError, match=f"{field} must be {allowed}, got "):
        TrainingConfig(**{field: value})
