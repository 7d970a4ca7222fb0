import copy
import math

import pytest
import torch
from helpers import random_pairs, same_state, state_of
from torch import nn

from hf_dash import TrainingConfig
from hf_dash.training.optimizers import (
    kept_state,
    make_optimizer,
    make_schedule,
    restore_optimizer_,
    sharpest_point,
)


def rates(config, steps_per_epoch, steps):
    """The learning rate of each of these steps."""
    optimizer = make_optimizer(nn.Linear(1, 1), config)
    schedule = make_schedule(optimizer, config, steps_per_epoch)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_and_milestones_by_hand():
    config = TrainingConfig(learning_rate=8.0, warmup_epochs=2, lr_milestones=[3, 4], lr_gamma=0.25)
    # Two steps an epoch: four of warm-up, two at 8, two at 2, then 0.5.
    expected = [2, 4, 6, 8, 8, 8, 2, 2, 0.5, 0.5]
    assert rates(config, 2, 10) == pytest.approx(expected, rel=1e-12)


def test_milestones_alone_and_warm_up_alone():
    config = TrainingConfig(learning_rate=1.0, lr_milestones=[1], lr_gamma=0.5)
    assert rates(config, 3, 5) == [1, 1, 1, 0.5, 0.5]
    config = TrainingConfig(learning_rate=1.0, warmup_epochs=1)
    assert rates(config, 2, 4) == [0.5, 1, 1, 1]
    assert rates(config, 1, 2) == [1, 1]


def test_a_milestone_within_warm_up_counts():
    config = TrainingConfig(learning_rate=4.0, warmup_epochs=2, lr_milestones=[1], lr_gamma=0.5)
    assert rates(config, 2, 5) == pytest.approx([1, 2, 1.5, 2, 2], rel=1e-12)


def test_a_cosine_falls_to_nothing_over_all_epochs():
    config = TrainingConfig(learning_rate=2.0, lr_scheduler_type="cosine", max_epochs=2)
    # Four steps, at the angles 0, 45, 90 and 135 degrees of half a turn.
    half = math.sqrt(0.5)
    assert rates(config, 2, 4) == pytest.approx([2, 1 + half, 1, 1 - half], rel=1e-12)
    assert config.accuracy_threshold is None
    config = TrainingConfig(
        learning_rate=2.0, lr_scheduler_type="cosine", max_epochs=2, warmup_epochs=1
    )
    assert rates(config, 2, 4) == pytest.approx([0, 1, 2, 1], rel=1e-12, abs=1e-12)
    with pytest.raises(ValueError, match=r"lr_milestones must be empty .*, got \[1\]"):
        TrainingConfig(lr_scheduler_type="cosine", lr_milestones=[1])
    with pytest.raises(ValueError, match=r"lr_scheduler_type must be one of .*, got 'linear'"):
        TrainingConfig(lr_scheduler_type="linear")


def test_no_schedule_where_the_rate_never_changes():
    optimizer = make_optimizer(nn.Linear(1, 1), TrainingConfig())
    assert make_schedule(optimizer, TrainingConfig(), None) is None
    with pytest.raises(ValueError, match=r"batches must have a length; got lr_milestones \[2\]"):
        make_schedule(optimizer, TrainingConfig(lr_milestones=[2]), None)


def stepped(optim, steps=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = make_optimizer(model, TrainingConfig(optim=optim))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("optim", "entries"),
    [("sgd", ["momentum_buffer"]), ("adamw", ["step", "exp_avg", "exp_avg_sq"])],
)
def test_state_is_kept_by_name_and_put_back(optim, entries):
    model, optimizer = stepped(optim)
    state = kept_state(model, optimizer)
    trained = ["0.weight", "1.weight", "1.bias"]
    assert set(state) == {f"{name}::{entry}" for name in trained for entry in entries}
    fresh = make_optimizer(model, TrainingConfig(optim=optim))
    assert restore_optimizer_(model, fresh, state) == trained
    assert same_state(kept_state(model, fresh), state)
    # Both copies: stepping on changes neither the model's new state nor what was kept.
    before = {key: tensor.clone() for key, tensor in state.items()}
    for one in (optimizer, fresh):
        one.step()
    assert same_state(state, before)


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_state_is_laid_out_as_its_weights(optim):
    """A fused step on a GPU refused contiguous momentum of weights that are channels last."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1))
    config = TrainingConfig(optim=optim)
    optimizer = make_optimizer(model, config)
    model(torch.rand(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    state = kept_state(model, optimizer)
    model.to(memory_format=torch.channels_last)
    fresh = make_optimizer(model, config)
    restore_optimizer_(model, fresh, state)
    for parameter, entries in fresh.state.items():
        for value in entries.values():
            assert value.ndim == 0 or value.stride() == parameter.stride()
    assert same_state(kept_state(model, fresh), state)


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_state_that_does_not_fit_is_dropped(optim):
    model, optimizer = stepped(optim)
    state = kept_state(model, optimizer)
    grown = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    fresh = make_optimizer(grown, TrainingConfig(optim=optim))
    assert restore_optimizer_(grown, fresh, {**state, "2.weight::step": torch.ones(())}) == [
        "0.weight"
    ]
    grown(torch.ones(1, 3)).sum().backward()
    fresh.step()
    other = "adamw" if optim == "sgd" else "sgd"
    assert (
        restore_optimizer_(model, make_optimizer(model, TrainingConfig(optim=other)), state) == []
    )


@pytest.mark.parametrize("key", ["0.weight", "::step", "0.weight::"])
def test_malformed_keys_are_refused(key):
    model, optimizer = stepped("sgd")
    before = kept_state(model, optimizer)
    with pytest.raises(ValueError, match=f"'<parameter name>::<entry>', got '{key}'"):
        restore_optimizer_(model, optimizer, {key: torch.ones(4, 3)})
    assert same_state(kept_state(model, optimizer), before)


def test_the_sharpest_point_is_rho_away_along_the_gradient(every_layer):
    (images, labels) = random_pairs(1)[0]
    nn.functional.cross_entropy(every_layer(images), labels).backward()
    before = state_of(every_layer)
    trained = [p for p in every_layer.parameters() if p.requires_grad]
    gradients = [p.grad.double() for p in trained]
    norm = sum(g.square().sum() for g in gradients).sqrt()
    weights = [p.detach().double() for p in trained]
    with sharpest_point(nn.Sequential(every_layer), 0.1):
        for parameter, w, g in zip(trained, weights, gradients, strict=True):
            moved = parameter.detach().double()
            torch.testing.assert_close(moved, w + 0.1 * g / norm, rtol=0, atol=1e-6)
        distance = sum((p - w).square().sum() for p, w in zip(trained, weights, strict=True)).sqrt()
        assert distance.item() == pytest.approx(0.1, rel=1e-4)
        assert torch.equal(every_layer.frozen.weight, before["frozen.weight"])
        every_layer(images)  # updates no running statistics
    assert same_state(state_of(every_layer), before)
    every_layer(images)
    assert not torch.equal(every_layer.norm.running_mean, before["norm.running_mean"])


def test_a_zero_gradient_moves_nothing_and_an_overflow_is_undone(every_layer):
    before = state_of(every_layer)
    with sharpest_point(every_layer, 0.1):  # no gradients at all
        assert same_state(state_of(every_layer), before)
    for parameter in every_layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with sharpest_point(every_layer, 0.1):
        assert same_state(state_of(every_layer), before)
    every_layer.head.bias.grad.fill_(float("inf"))
    with sharpest_point(every_layer, 0.1):
        assert not every_layer.head.bias.isfinite().any()
    assert same_state(state_of(every_layer), before)


def test_an_error_within_puts_everything_back(every_layer):
    (images, labels) = random_pairs(1)[0]
    nn.functional.cross_entropy(every_layer(images), labels).backward()
    before = copy.deepcopy(state_of(every_layer))
    with pytest.raises(RuntimeError, match="oops"), sharpest_point(every_layer, 0.1):
        raise RuntimeError("oops")
    assert same_state(state_of(every_layer), before)
    assert every_layer.norm.track_running_stats


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_fused_step_differs_by_rounding(optim):
    found = []
    for fused in (None, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4)
        config = TrainingConfig(optim=optim, weight_decay=0.1)
        optimizer = make_optimizer(model, config, fused=fused)
        for _ in range(5):
            model(torch.randn(3, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((model.weight.detach(), kept_state(model, optimizer)))
    (weight, state), (fused_weight, fused_state) = found
    torch.testing.assert_close(fused_weight, weight)
    torch.testing.assert_close(fused_state, state)
