import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import same_state, state_of
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_dash import TrainingConfig, train_batches, train_round

QUIET = {"disable_tqdm": True, "train_batch_size": 30}


class Table(nn.Module):
    """Learns two points; counts its steps."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, pixel_values, labels):
        logits = self.linear(pixel_values)
        loss = nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def test_training_stops_at_the_first_converged_epoch(two_rounds, small_model, accelerator):
    batches = train_batches(two_rounds[0], 30, seed=0)
    config = TrainingConfig(accuracy_threshold=0.9, **QUIET)
    result = train_round(small_model, batches, config, accelerator)
    assert result.converged
    assert 0.9 <= result.train_accuracy <= 1
    assert result.steps == 2 * result.epochs
    assert result.epochs < config.max_epochs
    assert result.seconds > 0


def test_training_stops_at_the_largest_number_of_epochs(two_rounds, small_model, accelerator):
    config = TrainingConfig(max_epochs=2, accuracy_threshold=1.0, **QUIET)
    result = train_round(small_model, train_batches(two_rounds[0], 30, seed=0), config, accelerator)
    assert (result.epochs, result.steps, result.converged) == (2, 4, False)


def test_steps_equal_plain_sgd(accelerator):
    torch.manual_seed(0)
    model, plain = Table(), Table()
    plain.load_state_dict(model.state_dict())
    images, labels = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    config = TrainingConfig(
        learning_rate=0.1, momentum=0.5, weight_decay=0.01, max_epochs=3, **QUIET
    )
    result = train_round(
        model, torch.utils.data.DataLoader(rows, batch_size=2), config, accelerator
    )
    assert result.steps == 3 * result.epochs

    velocity = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for _ in range(result.epochs):
        for begin in range(0, 6, 2):
            plain.zero_grad()
            plain(images[begin : begin + 2], labels[begin : begin + 2]).loss.backward()
            with torch.no_grad():
                for name, p in plain.named_parameters():
                    velocity[name] = 0.5 * velocity[name] + p.grad + 0.01 * p
                    p -= 0.1 * velocity[name]
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p)


def test_the_accuracy_is_counted_while_training(accelerator):
    model = Table()
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.copy_(torch.tensor([1.0, 0.0]))  # says class 0 to everything
    rows = [{"pixel_values": torch.zeros(2), "labels": torch.tensor(y)} for y in (0, 0, 0, 1)]
    config = TrainingConfig(learning_rate=1e-9, max_epochs=1, **QUIET)
    result = train_round(
        model, torch.utils.data.DataLoader(rows, batch_size=3), config, accelerator
    )
    assert result.train_accuracy == pytest.approx(0.75)


def test_the_same_seed_gives_the_same_weights(two_rounds, small_model, accelerator):
    other = copy.deepcopy(small_model)
    config = TrainingConfig(max_epochs=2, **QUIET)
    for model in (small_model, other):
        train_round(model, train_batches(two_rounds[0], 30, seed=7), config, accelerator)
    assert same_state(state_of(small_model), state_of(other))


def test_mixed_precision_is_taken_off_again(two_rounds, small_model):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    forward = small_model.forward
    config = TrainingConfig(max_epochs=1, **QUIET)
    for _ in range(2):
        train_round(small_model, train_batches(two_rounds[0], 30, seed=0), config, accelerator)
        assert small_model.forward == forward
    assert {p.dtype for p in small_model.parameters()} == {torch.float32}


@pytest.mark.parametrize("disabled", [True, False])
def test_the_progress_bar_can_be_turned_off(two_rounds, small_model, accelerator, capsys, disabled):
    config = TrainingConfig(max_epochs=1, train_batch_size=30, disable_tqdm=disabled)
    batches = train_batches(two_rounds[0], 30, seed=0)
    train_round(small_model, batches, config, accelerator, description="round 1")
    assert ("round 1" in capsys.readouterr().err) is not disabled


def test_a_loss_that_is_not_finite_is_an_error(two_rounds, small_model, accelerator):
    with torch.no_grad():
        small_model.timm_model.fc.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the training loss is not finite: nan"):
        train_round(
            small_model,
            train_batches(two_rounds[0], 30, seed=0),
            TrainingConfig(**QUIET),
            accelerator,
        )


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("learning_rate", 0.0, "greater than 0"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("weight_decay", -1.0, "at least 0"),
        ("train_batch_size", 0, "at least 1"),
        ("max_epochs", 0, "at least 1"),
        ("accuracy_threshold", 1.5, r"in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} must be {allowed}, got {value}"):
        TrainingConfig(**{field: value})
