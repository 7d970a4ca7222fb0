import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import same_state, state_of
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_dash import TrainingConfig
from hf_dash.data import RandomCropFlip, train_batches
from hf_dash.method.loss import WeightedLoss
from hf_dash.models import black_pixel
from hf_dash.training import train_round

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


POINTS = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.5, -2.0], [2.0, 1.0], [-1.5, -1.0], [0.2, 0.3]])


CLASSES = torch.tensor([0, 1, 0, 1, 1, 0])


BATCHES = [
    {"pixel_values": POINTS[begin : begin + 2], "labels": CLASSES[begin : begin + 2]}
    for begin in range(0, 6, 2)
]


FIXED = {"max_epochs": 3, "accuracy_threshold": None, **QUIET}


def two_tables():
    torch.manual_seed(0)
    model = Table()
    return model, copy.deepcopy(model)


def assert_same(model, plain, **tolerances):
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, **tolerances)


def test_steps_equal_plain_adamw(accelerator):
    model, plain = two_tables()
    config = TrainingConfig(
        optim="adamw",
        learning_rate=0.1,
        weight_decay=0.2,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-3,
        **FIXED,
    )
    result = train_round(model, BATCHES, config, accelerator)
    assert (result.epochs, result.steps, result.converged) == (3, 9, None)
    m, v = {}, {}
    for t, batch in enumerate(BATCHES * 3, start=1):
        plain.zero_grad()
        plain(**batch).loss.backward()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                m[name] = 0.8 * m.get(name, 0) + 0.2 * p.grad
                v[name] = 0.9 * v.get(name, 0) + 0.1 * p.grad**2
                p *= 1 - 0.1 * 0.2
                right = m[name] / (1 - 0.8**t)
                p -= 0.1 * right / ((v[name] / (1 - 0.9**t)).sqrt() + 1e-3)
    assert_same(model, plain)


def pull(model):
    return 0.3 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("penalty", [None, pull])
def test_sam_equals_the_paper(accelerator, penalty):
    model, plain = two_tables()
    config = TrainingConfig(learning_rate=0.1, momentum=0.0, sam_rho=0.5, **FIXED)
    train_round(model, BATCHES, config, accelerator, penalty=penalty)
    eta, rho = 0.1, 0.5

    def gradient_of_loss(w, batch):
        copied = copy.deepcopy(plain)
        for parameter, value in zip(copied.parameters(), w, strict=True):
            parameter.data = value.clone()
        loss = copied(**batch).loss
        if penalty is not None:
            loss = loss + penalty(copied)
        return torch.autograd.grad(loss, list(copied.parameters()))

    w = [p.detach() for p in plain.parameters()]
    for batch in BATCHES * 3:
        nabla = gradient_of_loss(w, batch)
        norm = sum(float((part**2).sum()) for part in nabla) ** 0.5
        epsilon = [rho * part / norm for part in nabla]
        g = gradient_of_loss([a + b for a, b in zip(w, epsilon, strict=True)], batch)
        w = [a - eta * b for a, b in zip(w, g, strict=True)]
    for parameter, expected in zip(model.parameters(), w, strict=True):
        torch.testing.assert_close(parameter.detach(), expected)


def test_sam_counts_every_batch_once_in_batch_norms(two_rounds, small_model, accelerator):
    config = TrainingConfig(sam_rho=0.1, max_epochs=1, **QUIET)
    result = train_round(small_model, train_batches(two_rounds[0], 30, seed=0), config, accelerator)
    norms = [m for m in small_model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {int(norm.num_batches_tracked) for norm in norms} == {result.steps}


def test_a_penalty_joins_the_loss(accelerator):
    model, plain = two_tables()
    config = TrainingConfig(learning_rate=0.1, momentum=0.0, **FIXED)
    train_round(model, BATCHES, config, accelerator, penalty=pull)
    for batch in BATCHES * 3:
        plain.zero_grad()
        plain(**batch).loss.backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.1 * (p.grad + 0.6 * p)
    assert_same(model, plain)


def test_the_schedule_begins_anew_in_every_round(accelerator):
    model, plain = two_tables()
    config = TrainingConfig(
        learning_rate=0.4,
        momentum=0.0,
        warmup_epochs=1,
        lr_milestones=[2],
        lr_gamma=0.5,
        **FIXED,
    )
    for _ in range(2):
        train_round(model, BATCHES, config, accelerator)
    rates = [0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2] * 2
    for batch, rate in zip(BATCHES * 6, rates, strict=True):
        plain.zero_grad()
        plain(**batch).loss.backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= rate * p.grad
    assert_same(model, plain)


def digit_batches(round_):
    """The same minibatches in the same order for every epoch."""
    rows = [round_.examples[i] for i in range(len(round_.examples))]
    return [
        {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows[i : i + 20]]),
            "labels": torch.tensor([row["labels"] for row in rows[i : i + 20]]),
        }
        for i in range(0, len(rows), 20)
    ]


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_two_rounds_with_kept_state_are_one(two_rounds, small_model, accelerator, optim):
    batches = digit_batches(two_rounds[0])
    other, third = copy.deepcopy(small_model), copy.deepcopy(small_model)
    once = {"optim": optim, "learning_rate": 0.01, "accuracy_threshold": None, **QUIET}
    whole = train_round(small_model, batches, TrainingConfig(max_epochs=2, **once), accelerator)
    one = TrainingConfig(max_epochs=1, **once)
    first = train_round(other, batches, one, accelerator)
    kept = {key: tensor.clone() for key, tensor in first.optimizer_state.items()}
    second = train_round(other, batches, one, accelerator, optimizer_state=first.optimizer_state)
    assert same_state(state_of(small_model), state_of(other))
    assert same_state(whole.optimizer_state, second.optimizer_state)
    assert same_state(kept, first.optimizer_state)
    assert "optimizer_state" not in repr(first)
    entry = "momentum_buffer" if optim == "sgd" else "exp_avg"
    assert f"timm_model.fc.weight::{entry}" in kept

    for _ in range(2):
        train_round(third, batches, one, accelerator)
    assert not same_state(state_of(small_model), state_of(third))


class Stream:
    """Batches that are no DataLoader, in an order of each epoch's own."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(BATCHES[self.epochs[-1] :])


def test_other_batches_than_loaders_are_told_the_epoch(accelerator):
    stream = Stream()
    result = train_round(Table(), stream, TrainingConfig(**FIXED), accelerator)
    assert stream.epochs == [0, 1, 2]
    assert result.steps == 3 + 2 + 1


def test_an_epoch_without_images_is_an_error(accelerator):
    with pytest.raises(ValueError, match="batches gave no image in an epoch"):
        train_round(Table(), iter(BATCHES), TrainingConfig(**FIXED), accelerator)


def test_a_schedule_needs_to_know_the_length_of_an_epoch(accelerator):
    model, plain = two_tables()
    config = TrainingConfig(warmup_epochs=1, **FIXED)
    with pytest.raises(ValueError, match="batches must have a length"):
        train_round(model, Stream(), config, accelerator)
    assert_same(model, plain, rtol=0, atol=0)


def test_augmented_training_repeats_by_seed(two_rounds, small_model, accelerator):
    augment = RandomCropFlip(fill=black_pixel(small_model))
    states = []
    for seed in (7, 7, 8):
        model = copy.deepcopy(small_model)
        batches = train_batches(two_rounds[0], 30, seed=seed, augment=augment)
        train_round(model, batches, TrainingConfig(max_epochs=1, **QUIET), accelerator)
        states.append(state_of(model))
    assert same_state(states[0], states[1])
    assert not same_state(states[0], states[2])


def test_channels_last_differs_by_rounding_alone(two_rounds, small_model, accelerator):
    trained = {}
    for channels_last in (False, True):
        model = copy.deepcopy(small_model)
        config = TrainingConfig(max_epochs=1, channels_last=channels_last, **QUIET)
        train_round(model, train_batches(two_rounds[0], 30, seed=0), config, accelerator)
        assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
        trained[channels_last] = state_of(model)
    assert not same_state(trained[True], trained[False])
    for name, tensor in trained[False].items():
        torch.testing.assert_close(trained[True][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_loss_of_ones_own_takes_the_place_of_the_models(accelerator):
    torch.manual_seed(0)
    model, plain = Table(), Table()
    plain.load_state_dict(model.state_dict())
    images, labels = torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
    batch = {"pixel_values": images, "labels": labels}
    weights = torch.tensor([2 / 3, 2.0])
    config = TrainingConfig(learning_rate=0.1, momentum=0.0, max_epochs=1, **QUIET)
    train_round(model, [batch], config, accelerator, loss=WeightedLoss(weights))
    rows = nn.functional.cross_entropy(plain.linear(images), labels, reduction="none")
    (weights[labels] * rows).mean().backward()
    expected = plain.linear.weight - 0.1 * plain.linear.weight.grad
    assert torch.allclose(model.linear.weight, expected, atol=1e-6)
