"""Child processes that are up at once: forked from one that has imported everything.

That process, a server of multiprocessing, computes nothing, so a child starts like a fresh
interpreter, only without the seconds of its imports.
"""

import gc
import multiprocessing
import os
import pkgutil
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import datasets
import huggingface_hub
from accelerate.commands import accelerate_cli

import hf_dash

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *(module.name for module in pkgutil.walk_packages(hf_dash.__path__, "hf_dash.")),
        "accelerate.commands.accelerate_cli",
        "matplotlib.pyplot",
        "sklearn.datasets",
        "sklearn.model_selection",
        "transformers.models.timm_wrapper.modeling_timm_wrapper",
        "transformers.models.vit.modeling_vit",
        "transformers.trainer",
    ]
)
STREAMS = ("stdout", "stderr")
# What libraries read of the environment when they are imported, so that a child cannot change it.
FIXED = {"HF_ENDPOINT", "HF_HOME"}


class Child:
    """A function called in a forked process, with its own folder, environment and output."""

    def __init__(self, function, *arguments, folder, **environment):
        assert not FIXED & environment.keys(), "read at import, so fixed in a forked child"
        self.output = Path(tempfile.mkdtemp())
        self.process = CONTEXT.Process(
            target=enter,
            args=(self.output, folder, {**os.environ, **environment}, function, arguments),
        )
        self.process.start()

    def result(self):
        """Return the exit code and the output of a child that has ended."""
        self.process.join()
        texts = [(self.output / name).read_text(encoding="utf-8") for name in STREAMS]
        shutil.rmtree(self.output)
        return subprocess.CompletedProcess(str(self.process), self.process.exitcode, *texts)


def enter(output, folder, environment, function, arguments):
    gc.freeze()  # what the server imported is never garbage, but slow to walk through
    for descriptor, name in enumerate(STREAMS, start=1):
        with (output / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    offline = environment["HF_HUB_OFFLINE"] == "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
    os.chdir(folder)
    function(*arguments)


def join(children, timeout=500):
    """Wait for all children; end the others where one fails, as ``torchrun`` does."""
    deadline = time.monotonic() + timeout
    running = {child.process.sentinel: child.process for child in children}
    failed = False
    while running and not failed:
        ended = wait(running, max(0, deadline - time.monotonic()))
        processes = [running.pop(sentinel) for sentinel in ended]
        for process in processes:
            process.join()
        failed = not ended or any(process.exitcode for process in processes)
    for process in running.values():
        process.kill()
    return [child.result() for child in children]


def run_script(path, flags):
    """Run a script as ``python path flags…`` does."""
    sys.argv = [str(path), *flags]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def run_launcher(path, flags):
    """Run a script as ``accelerate launch path flags…`` does."""
    sys.argv = ["accelerate", "launch", str(path), *flags]
    accelerate_cli.main()
