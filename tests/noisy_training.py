"""Trainings in which every disturbance shows, shared by tests in one process and in several."""

import random
from dataclasses import fields

import numpy as np
import torch
from accelerate.state import GradientState
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

import hf_dash


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


class Doubled:
    """A loader around another."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            yield {**batch, "pixel_values": 2 * batch["pixel_values"]}


class OwnLoader(Trainer):
    def get_train_dataloader(self):
        return Doubled(super().get_train_dataloader())


TIMES = ("seconds", "runtime", "per_second")


def numbers_of(trainer):
    """Everything the Trainer logged, without clocks and without DASH's own."""
    hidden = (*TIMES, "dash/")
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in hidden)}
        for entry in trainer.state.log_history
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


SETUPS = {
    "map-style": {},
    "a loader around the loader": {"trainer_class": OwnLoader},
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
