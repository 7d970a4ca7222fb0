import copy

import pytest
import torch
from helpers import heard
from torch import nn

from hf_dash import TrainingConfig
from hf_dash.data import train_batches
from hf_dash.training import train_round
from hf_dash.training.batch_norms import renew_batch_norms_, steps_needed
from hf_dash.utils.logging import warn_once

QUIET = {"disable_tqdm": True, "accuracy_threshold": None}


def test_renewed_batch_norms_are_those_of_the_trained_weights(two_rounds, small_model, accelerator):
    batch = next(iter(train_batches(two_rounds[0], 64, seed=0)))
    before = copy.deepcopy(small_model)
    train_round(before, [batch], TrainingConfig(max_epochs=5, **QUIET), accelerator)
    config = TrainingConfig(max_epochs=5, renew_batch_norms=True, **QUIET)
    assert train_round(small_model, [batch], config, accelerator).steps == 5
    # The weights are the same; only what batch norms have counted differs.
    for (name, one), two in zip(small_model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, two), name
    norms = [m for m in small_model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    seen = {}
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, _: seen.update({module: inputs[0]}))
    small_model.train()
    with torch.no_grad():
        kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        small_model(batch["pixel_values"])
    for norm, (mean, variance) in zip(norms, kept, strict=True):
        values = seen[norm].transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean, values.mean(dim=1))
        torch.testing.assert_close(variance, values.var(dim=1))


def test_a_short_training_says_once_that_batch_norms_lag(two_rounds, small_model, accelerator):
    batches = train_batches(two_rounds[0], 30, seed=0)
    said = {}
    warn_once.cache_clear()
    for epochs, renewed in ((1, False), (1, False), (1, True), (22, False)):
        config = TrainingConfig(max_epochs=epochs, renew_batch_norms=renewed, **QUIET)
        with heard() as lines:
            steps = train_round(small_model, batches, config, accelerator).steps
        said.setdefault((steps < 44, renewed), []).append(len(lines))
    assert said == {(True, False): [1, 0], (True, True): [0], (False, False): [0]}


def test_the_steps_needed_follow_from_the_momentum():
    # 0.9 ** 44 = 0.0097 and 0.99 ** 459 = 0.0099, each the first below a hundredth.
    norms = [nn.BatchNorm2d(2), nn.BatchNorm2d(2, momentum=0.01)]
    assert [steps_needed(norm) for norm in norms] == [44, 459]
    assert steps_needed(nn.Sequential(*norms)) == 459
    for settings in ({"momentum": None}, {"track_running_stats": False}, {"momentum": 1.0}):
        assert steps_needed(nn.BatchNorm2d(2, **settings)) == 0


def test_no_more_than_a_hundred_batches_are_counted():
    norm, read = nn.BatchNorm2d(1), []

    def batches():
        for number in range(1000):
            read.append(number)
            yield {"pixel_values": torch.full((2, 1, 1, 1), float(number))}

    renew_batch_norms_(norm, batches())
    assert len(read) == 100
    assert norm.running_mean.item() == pytest.approx(49.5)
