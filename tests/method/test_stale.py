"""Momentum and averaged copies after a shrink."""

import pytest
import timm.utils
import torch
from helpers import EveryLayer, random_pairs, same_state, state_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hf_dash
from hf_dash.method.stale import check_stale, refresh_copy_, reset_optimizer_


def with_momentum(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9)
    model(random_pairs(1)[0][0]).sum().backward()
    optimizer.step()
    return optimizer


def test_resetting_an_optimizer_keeps_its_settings():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.25, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    assert optimizer.state
    reset_optimizer_(optimizer)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.25
    weight.grad = torch.ones(2)
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.25)  # no momentum left


def test_a_shrink_forgets_momentum_and_renews_averages():
    model = EveryLayer()
    averages = [
        timm.utils.ModelEmaV3(model, decay=0.9),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    ]
    optimizer = with_momentum(model)
    averages[0].update(model)
    averages[1].update_parameters(model)
    hf_dash.dash_shrink_(model, random_pairs(2), optimizer=optimizer, ema=averages)
    assert not optimizer.state
    for average in averages:
        assert same_state(state_of(average.module), state_of(model))
    # The next update of an average begins anew: it is a copy, not a mean with the old weights.
    with torch.no_grad():
        model.head.weight.add_(1.0)
    averages[1].update_parameters(model)
    assert torch.equal(averages[1].module.head.weight, model.head.weight)


def test_a_dry_run_touches_neither():
    model = EveryLayer()
    optimizer, average = with_momentum(model), AveragedModel(EveryLayer())
    before = state_of(average)
    hf_dash.dash_shrink_(model, random_pairs(2), optimizer=optimizer, ema=average, dry_run=True)
    assert optimizer.state
    assert same_state(before, state_of(average))


def test_a_plain_copy_is_renewed_too():
    model, copy = EveryLayer(), EveryLayer()
    refresh_copy_(copy, model)
    assert same_state(state_of(copy), state_of(model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch optimizer, got str"),
        ({"ema": ["average"]}, TypeError, "ema must be a module or a list of modules, got str"),
        ({"ema": nn.Linear(2, 2)}, ValueError, "ema must be a copy of the model, but Linear"),
    ],
)
def test_what_is_neither_is_refused_before_anything_is_read(options, error, message):
    def no_batches():
        raise AssertionError("a batch was asked for")
        yield

    model = EveryLayer()
    before = state_of(model)
    with pytest.raises(error, match=message):
        hf_dash.dash_shrink_(model, no_batches(), **options)
    assert same_state(before, state_of(model))
    assert check_stale(None, None, model) == []
