"""What a gradient pass may touch is put back, whether it ends well or badly."""

import random
import signal
import threading

import numpy as np
import pytest
import torch
from helpers import EveryLayer, same_state, state_of
from torch import nn

from hf_dash.method.preserve import (
    batch_norms_renewed,
    buffers_preserved,
    caches_set_aside,
    evaluation_mode,
    gradients_required,
    gradients_set_aside,
    rng_preserved,
    signals_deferred,
)


def draw():
    return random.random(), float(np.random.rand()), torch.rand(1).item()


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_put_back(fails):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    try:
        with rng_preserved():
            assert draw() == expected
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert draw() == expected


def test_every_module_gets_its_own_mode_back():
    model = EveryLayer().train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    try:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_gradients_are_hidden_and_the_same_tensors_come_back():
    layer = nn.Linear(2, 2)
    layer.weight.grad = gradient = torch.ones(2, 2)
    with gradients_set_aside(layer):
        assert layer.weight.grad is None
        layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is gradient
    assert layer.bias.grad is None


def test_frozen_parameters_require_gradients_for_a_while():
    frozen, trained = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    with gradients_required([frozen, trained]):
        assert frozen.requires_grad
        assert trained.requires_grad
    assert not frozen.requires_grad
    assert trained.requires_grad


def test_caches_of_a_model_are_emptied_on_request_and_filled_again():
    layer = nn.Linear(2, 2)
    layer.bias_cache, layer.weight_cached = {"before": 1}, {"other": 2}
    cache = layer.bias_cache
    with caches_set_aside(layer) as empty:
        empty()
        assert cache == {}
        cache["during"] = 3
    assert layer.bias_cache is cache
    assert cache == {"before": 1}
    assert layer.weight_cached == {"other": 2}


def test_batch_norms_have_the_statistics_of_the_images_for_a_while():
    model = nn.BatchNorm2d(2)
    images = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    before = state_of(model)
    with batch_norms_renewed(model, [images]):
        torch.testing.assert_close(model.running_mean, images.mean((0, 2, 3)))
        torch.testing.assert_close(model.running_var, images.transpose(0, 1).flatten(1).var(1))
    assert same_state(before, state_of(model))


def test_buffers_come_back_changed_or_replaced():
    norm = nn.BatchNorm1d(2)
    before, mean = state_of(norm), norm.running_mean
    with buffers_preserved(norm):
        norm(torch.randn(8, 2))
        norm.running_mean = torch.ones(2)
    assert norm.running_mean is mean
    assert same_state(before, state_of(norm))


def test_signals_wait_for_the_end():
    done = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals_deferred():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_signals_are_left_alone():
    found = []

    def work():
        with signals_deferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
