"""Child processes that are up at once: forked from a server that has imported everything.

The server is forked from the test process before its first test, with all that is imported there.
It computes nothing, so a child starts like a fresh interpreter, only without the seconds of its
imports.
"""

import faulthandler
import gc
import importlib
import itertools
import logging
import multiprocessing
import os
import pkgutil
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import huggingface_hub
import PIL.Image
from accelerate.commands import accelerate_cli

import hf_dash

CONTEXT = multiprocessing.get_context("forkserver")
# What children use and the fixtures have not imported.
MODULES = [
    *(module.name for module in pkgutil.walk_packages(hf_dash.__path__, "hf_dash.")),
    "matplotlib.pyplot",
    "sklearn.datasets",
    "sklearn.model_selection",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
    "transformers.models.vit.modeling_vit",
    "transformers.trainer",
]
STREAMS = ("stdout", "stderr")
# What libraries read of the environment when they are imported, so that a child cannot change it.
FIXED = {"HF_ENDPOINT", "HF_HOME"}


def start_server():
    """Fork the server of multiprocessing, which would import for as long as this process has."""
    for name in MODULES:
        importlib.import_module(name)
    PIL.Image.init()  # imports a module for each format
    resource_tracker.ensure_running()
    with mock.patch("multiprocessing.util.spawnv_passfds", fork_instead):
        forkserver.ensure_running()


def fork_instead(path, arguments, descriptors):
    """Run ``python -c code`` in a fork of this process, with the given descriptors only."""
    *_, code = arguments
    child = os.fork()
    if child == 0:
        try:
            forget_pytest()
            # The caller holds the lock of this module; what a child starts is forked as well.
            forkserver._forkserver.__init__()
            limit = os.sysconf("SC_OPEN_MAX")
            for low, high in itertools.pairwise([2, *sorted(descriptors), limit]):
                os.closerange(low + 1, high)
            exec(code)
        finally:
            os._exit(1)
    return child


# What pytest's settings turn into errors or show; ordered as in ``warnings.filters``.
FILTERS = {
    ("error", Warning),
    ("always", DeprecationWarning),
    ("always", PendingDeprecationWarning),
}


def forget_pytest():
    """Undo what pytest has done to the interpreter."""
    warnings.filters[:] = [one for one in warnings.filters if (one[0], one[2]) not in FILTERS]
    faulthandler.disable()
    logging.root.handlers.clear()
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__


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


def run_launcher_with_forks(path, flags):
    """Do the same, but fork where the launcher starts an interpreter."""
    stand_in = SimpleNamespace(Popen=Forked, CalledProcessError=subprocess.CalledProcessError)
    with mock.patch("accelerate.commands.launch.subprocess", stand_in):
        run_launcher(path, flags)


class Forked:
    """``subprocess.Popen`` for ``python script flags…``: in a fork of this process."""

    def __init__(self, command, env):
        _, script, *flags = command
        arguments = (env, Path(script), flags)
        self.process = multiprocessing.get_context("fork").Process(target=run_in, args=arguments)
        self.process.start()

    def wait(self):
        self.process.join()
        self.returncode = self.process.exitcode


def run_in(environment, path, flags):
    os.environ.clear()
    os.environ.update(environment)
    run_script(path, flags)
