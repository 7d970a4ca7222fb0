"""A run of three rounds that can be killed at a given point; started by test_exactly_once.py."""

import gc
import os
import signal
from functools import reduce
from importlib import import_module

import torch
from accelerate import Accelerator
from datasets import Dataset

import hf_dash

NUM_ROUNDS = 3

# Where to die: the function called there, before or after it, and at which of its calls.
POINTS = {
    "before the shrink": ("hf_dash.starts", "dash_shrink_", "before", 1),
    "in the shrink": ("hf_dash.method.dash", "shrink_", "before", 2),
    "after the shrink": ("hf_dash.starts", "dash_shrink_", "after", 1),
    "in training": ("hf_dash.training.loop", "_Training.step", "before", 4),
    "after training": ("hf_dash.runs.continual", "evaluate_model", "before", 2),
    "saving the weights": ("hf_dash.models", "save_file", "after", 2),
    "saving the optimizer": ("hf_dash.runs.store", "save_file", "before", 2),
    # In every round os.rename moves the model's files, what is trained, and the finished folder.
    "before the trained round is kept": ("hf_dash.runs.store", "os.rename", "before", 2),
    "after the trained round is kept": ("hf_dash.runs.store", "os.rename", "after", 5),
    "before the folder is there": ("hf_dash.runs.store", "os.rename", "before", 3),
    "after the folder is there": ("hf_dash.runs.store", "os.rename", "after", 6),
    # The first round begins the history, every later one adds a line to it.
    "before the history is there": ("hf_dash.history", "append_line", "before", 1),
    "in the history": ("hf_dash.utils.files", "os.replace", "before", 3),
    "after the history is there": ("hf_dash.history", "write_lines", "after", 1),
}


def die_at(point: str) -> None:
    module_name, path, when, count = POINTS[point]
    *parents, attribute = path.split(".")
    holder = reduce(getattr, parents, import_module(module_name))
    function, calls = getattr(holder, attribute), []

    def dying(*args, **kwargs):
        calls.append(1)
        last = len(calls) == count
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, attribute, dying)


def run(output_dir: str, arriving: Dataset, point: str | None = None) -> None:
    """Take a DASH run with living momentum through its rounds; continue it where it ended."""
    gc.freeze()  # the imports of the process this one was forked from are never garbage
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if point is not None:
        die_at(point)
    model = hf_dash.create_model(
        "test_resnet", label_names=hf_dash.data.label_names(arriving), image_size=32, seed=0
    )
    transform = hf_dash.models.image_transform(model)
    rounds = list(hf_dash.data.cut_rounds(arriving, NUM_ROUNDS, transform, in_memory=True))
    with hf_dash.runs.open_run(output_dir, {"lam": 0.3}) as history:
        hf_dash.run_rounds(
            model,
            rounds,
            rounds[0].new,
            hf_dash.find_start("dash"),
            hf_dash.runs.Run(
                "dash",
                0,
                history,
                Accelerator(cpu=True),
                dash=hf_dash.DashConfig(gradient_batch_size=15),
                start_config=hf_dash.starts.StartsConfig(reset_optimizer=False),
                training=hf_dash.TrainingConfig(
                    max_epochs=1, train_batch_size=15, disable_tqdm=True
                ),
                output_dir=output_dir,
            ),
        )
