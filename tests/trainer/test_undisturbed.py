"""With λ = 1 the callback changes no weight: then nothing else may change either."""

import random

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from helpers import same_state, state_of
from noisy_training import ROWS, SETUPS, Stream, hub_stream, make_trainer, numbers_of, train
from transformers import TrainerCallback

import hf_dash

pytestmark = [
    pytest.mark.filterwarnings("ignore::hf_dash.method.NoEffectWarning"),
    # On a machine of one core.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def assert_undisturbed(plain, dash):
    (trainer, witness), (with_dash, dash_witness) = plain, dash
    assert len(witness.notes) > 3
    for mine, other in zip(witness.notes, dash_witness.notes, strict=True):
        assert mine == other
    assert numbers_of(trainer) == numbers_of(with_dash)
    assert same_state(state_of(trainer.model), state_of(with_dash.model))


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("setup", SETUPS)
def test_training_is_the_same_to_the_bit(tmp_path, setup, bound):
    options = dict(SETUPS[setup])
    make_data = options.pop("data", lambda: None)
    plain = train(tmp_path / "plain", False, data=make_data(), **options)
    dash = train(tmp_path / "dash", True, bound, data=make_data(), **options)
    assert_undisturbed(plain, dash)


def everything(trainer, model, optimizer, loader, state):
    """What a shrink could leave behind, by name."""
    gradients = GradientState()
    sampler = loader.batch_sampler.sampler
    return {
        "python's random state": random.getstate(),
        "numpy's random state": np.random.get_state()[1].tolist(),
        "torch's random state": torch.get_rng_state().tolist(),
        "the sampler's position": [
            loader.iteration,
            sampler.epoch,
            sampler.initial_seed,
        ],
        "gradient_state": [
            gradients.sync_gradients,
            gradients.end_of_dataloader,
            gradients.remainder,
            gradients.num_steps,
            gradients.active_dataloader is None,
            len(gradients.dataloader_references),
        ],
        "num_input_tokens_seen": state.num_input_tokens_seen,
        "batch norm's statistics": [buffer.tolist() for buffer in model.buffers()],
        "the gradient scaler": trainer.accelerator.scaler.state_dict(),
        "the modes of the modules": [module.training for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "what is trained": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [
            [
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
            ]
            for module in model.modules()
        ],
        "the optimizer's settings": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "the process's settings": [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")],
    }


TRACES = [
    "python's random state",
    "numpy's random state",
    "torch's random state",
    "the sampler's position",
    "gradient_state",
    "num_input_tokens_seen",
    "batch norm's statistics",
    "the gradient scaler",
    "the modes of the modules",
    "gradients",
    "what is trained",
    "hooks",
    "the optimizer's settings",
    "the process's settings",
]


@pytest.fixture(scope="module")
def before_and_after(tmp_path_factory):
    """Everything, right before and right after a shrink that does change the weights."""
    found = []

    class Probe(hf_dash.DashCallback):
        def on_train_begin(self, args, state, control, *, model, **kwargs):
            state.num_input_tokens_seen = 7
            seen = (trainer, model, kwargs["optimizer"], kwargs["train_dataloader"], state)
            weights = state_of(model)
            found.append(everything(*seen))
            super().on_train_begin(args, state, control, model=model, **kwargs)
            found.append(everything(*seen))
            assert not same_state(weights, state_of(model))

    trainer = make_trainer(tmp_path_factory.mktemp("probe"), [Probe()], max_steps=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.train()
    return found


def test_every_trace_is_looked_for(before_and_after):
    assert list(before_and_after[0]) == TRACES


@pytest.mark.parametrize("trace", TRACES)
def test_a_shrink_leaves_alone(before_and_after, trace):
    before, after = before_and_after
    assert before[trace] == after[trace]


@pytest.mark.parametrize("make_data", [Stream, hub_stream])
def test_a_stream_begins_where_it_would_have(tmp_path, make_data):
    firsts = []

    class First(TrainerCallback):
        def on_epoch_begin(self, args, state, control, *, train_dataloader, **kwargs):
            if not firsts or len(firsts) < len(trainers):
                firsts.append([batch["labels"].tolist() for batch in train_dataloader])

    trainers = []
    for callbacks in ([First()], [hf_dash.DashCallback(lam=1.0), First()]):
        trainers.append(make_trainer(tmp_path, callbacks, data=make_data(), max_steps=1))
        trainers[-1].train()
    assert firsts[0] == firsts[1]
    assert sum(map(len, firsts[0])) == len(ROWS)
