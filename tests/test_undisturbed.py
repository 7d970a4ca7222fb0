"""With λ = 1 the callback changes no weight: then nothing else may change either."""

import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from conftest import same_state, state_of
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

import hf_dash

pytestmark = [
    pytest.mark.filterwarnings("ignore::hf_dash.NoEffectWarning"),
    # On a machine of one core.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


class Noisy(nn.Module):
    """What tells of every disturbance: batch norm of its inputs' order, dropout of random draws."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values, labels=None, length=None):
        features = self.norm(self.conv(pixel_values)).relu().mean((2, 3))
        logits = self.head(self.dropout(features))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def make_rows(count=29):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(1, 6, 6, generator=generator), "labels": number % 3}
        for number in range(count)
    ]


ROWS = make_rows()


class Augmented(torch.utils.data.Dataset):
    """Draws from all three global generators for every image, as augmentations do."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        row = ROWS[index]
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return {**row, "pixel_values": row["pixel_values"] + noise}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        augmented = Augmented()
        return (augmented[index] for index in range(len(ROWS)))


def hub_dataset():
    """The rows as ``datasets`` keeps them, with a length that sorts them into groups."""
    pixels = [row["pixel_values"].numpy() for row in ROWS]
    lengths = [number % 7 for number in range(len(ROWS))]
    labels = [row["labels"] for row in ROWS]
    return Dataset.from_dict({"pixel_values": pixels, "labels": labels, "length": lengths})


def hub_stream():
    """A stream of ``datasets``, shuffled in a buffer."""
    stream = hub_dataset().remove_columns("length").to_iterable_dataset(num_shards=2)
    return stream.shuffle(seed=1, buffer_size=8)


def by_length():
    """Return the option that groups rows by length, whose name differs between releases."""
    names = {field.name for field in fields(TrainingArguments)}
    if "train_sampling_strategy" in names:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


class Witness(TrainerCallback):
    """Notes, at every step, the random states and what the Trainer is about to train on."""

    def __init__(self):
        self.notes = []

    def on_step_begin(self, args, state, control, *, model, optimizer, train_dataloader, **kwargs):
        gradients = GradientState()
        self.notes.append(
            {
                "random": random.getstate(),
                "numpy": np.random.get_state()[1].tolist(),
                "torch": torch.get_rng_state().tolist(),
                "sync": gradients.sync_gradients,
                "end": gradients.end_of_dataloader,
                "remainder": gradients.remainder,
                "loaders": len(gradients.dataloader_references),
                "iteration": train_dataloader.iteration,
                "tokens": state.num_input_tokens_seen,
                "epoch": state.epoch,
                "norm": model.norm.running_mean.tolist(),
                "tracked": int(model.norm.num_batches_tracked),
                "grads": [parameter.grad is None for parameter in model.parameters()],
                "requires": [parameter.requires_grad for parameter in model.parameters()],
                "lr": [group["lr"] for group in optimizer.param_groups],
                "moments": len(optimizer.state),
            }
        )


def make_trainer(folder, callbacks=(), data=None, trainer_class=Trainer, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    return trainer_class(
        Noisy(),
        args,
        train_dataset=Augmented() if data is None else data,
        eval_dataset=ROWS[:6],
        callbacks=list(callbacks),
    )


TIMES = ("seconds", "runtime", "per_second")


def numbers_of(trainer):
    """Everything the Trainer logged, without clocks and without DASH's own."""
    entries = [e for e in trainer.state.log_history if not any("dash/" in key for key in e)]
    return [
        {key: value for key, value in entry.items() if not any(time in key for time in TIMES)}
        for entry in entries
    ]


def train(folder, dash, bound=False, **options):
    GradientState._reset_state()  # it is one for all trainers of a process
    witness = Witness()
    callbacks = [hf_dash.DashCallback(lam=1.0)] if dash else []
    trainer = make_trainer(folder, [*callbacks, witness], **options)
    if bound:
        callbacks[0].bind(trainer)
    trainer.train()
    if dash:
        assert callbacks[0].report.num_batches >= 1
    return trainer, witness


def assert_undisturbed(plain, dash):
    (trainer, witness), (with_dash, dash_witness) = plain, dash
    assert len(witness.notes) > 3
    for mine, other in zip(witness.notes, dash_witness.notes, strict=True):
        assert mine == other
    assert numbers_of(trainer) == numbers_of(with_dash)
    assert same_state(state_of(trainer.model), state_of(with_dash.model))


SETUPS = {
    "map-style": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "workers": {"dataloader_num_workers": 2},
    "persistent workers": {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
    },
    "evaluation first": {"eval_on_start": True, "eval_strategy": "epoch"},
    "stream": {"data": Stream, "max_steps": 12},
    "stream accumulated": {"data": Stream, "max_steps": 6, "gradient_accumulation_steps": 2},
    "stream of datasets": {"data": hub_stream, "max_steps": 12},
    "stream with workers": {"data": hub_stream, "max_steps": 12, "dataloader_num_workers": 1},
    "grouped by length": {"data": hub_dataset, **by_length()},
    "tokens counted": {"include_num_input_tokens_seen": "all"},
    "own data seed": {"data_seed": 5},
    "sampler of the global generator": {"accelerator_config": {"use_seedable_sampler": False}},
    "half an epoch": {"num_train_epochs": 0.7},
    "bfloat16": {"bf16": True},
    "last batch dropped": {"dataloader_drop_last": True},
}


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
