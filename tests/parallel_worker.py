"""Starts side by side as test_parallel.py has them run: a model that dies where it is told to."""

import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset

import hf_dash

NAMES = ("l2_init", "cold", "dash+alpha=0.5")


@dataclass
class Create:
    """Gives the first model; in the process of a start, ends it as a file of its name says."""

    folder: Path
    label_names: list[str] = field(default_factory=lambda: [str(digit) for digit in range(10)])

    def __call__(self):
        order = self.folder / multiprocessing.current_process().name
        if order.is_file():
            if order.read_text() == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(order.read_text())
        return hf_dash.create_model(
            "test_resnet", label_names=self.label_names, image_size=32, seed=0
        )


def runs_of(history, accelerator, names=NAMES, **options):
    training = hf_dash.TrainingConfig(max_epochs=1, train_batch_size=10, disable_tqdm=True)
    return [
        hf_dash.runs.Run(
            name,
            0,
            history,
            accelerator,
            dash=hf_dash.DashConfig(gradient_batch_size=10),
            training=training,
            output_dir=history.path.parent,
            **options,
        )
        for name in names
    ]


def train(folder, rounds, accelerator, at_once, names=NAMES, create=None, **options):
    """Do what the recipe does for one seed; return the history and the last start's model."""
    create = create or Create(folder.parent)
    with hf_dash.runs.open_run(folder, {"lam": 0.3}) as history:
        runs = runs_of(history, accelerator, names, **options)
        hf_dash.runs.run_starts(create, rounds, rounds[0].new, runs, at_once)
        for run in runs:
            start = hf_dash.find_start(run.name)
            model = hf_dash.run_rounds(create(), rounds, rounds[0].new, start, run)
    return history, model


def run(folder: str, arriving: Dataset, num_rounds: int) -> None:
    """Train side by side, in a process that the test can kill."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    create = Create(Path(folder).parent)
    transform = hf_dash.models.image_transform(create())
    rounds = list(hf_dash.data.cut_rounds(arriving, num_rounds, transform, in_memory=True))
    train(Path(folder), rounds, Accelerator(cpu=True), 4)
