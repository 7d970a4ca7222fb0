"""Faults of the machine and of the process: full disks, numbers that overflow, signals."""

import os
import shutil
import signal
from collections import namedtuple

import torch

from faults.table import fault

AREA = "machine"


def replaced(place, name, make):
    """Replace a function by one that is made of it."""
    setattr(place, name, make(getattr(place, name)))


def no_space_left():
    usage = namedtuple("usage", "total used free")
    shutil.disk_usage = lambda path: usage(10**9, 10**9, 0)


def failing(error, at):
    """Let the ``at``-th call fail, and all later ones."""

    def make(function):
        calls = []

        def fail(*arguments, **named):
            calls.append(1)
            if len(calls) >= at:
                raise error
            return function(*arguments, **named)

        return fail

    return make


FULL = OSError(28, "No space left on device")


def full_at_the_weights():
    import hf_dash.models

    replaced(hf_dash.models, "save_file", failing(FULL, 1))


def full_at_the_first_file():
    replaced(os, "fsync", failing(FULL, 1))


def full_at_a_later_file():
    replaced(os, "fsync", failing(FULL, 6))


def full_at_the_history():
    """At the last of them, which ends a round or a promotion."""
    import hf_dash.history

    def make(write_text):
        def fail(path, text):
            if path.name == "history.json" and not path.parent.name.endswith(".trained"):
                raise FULL
            write_text(path, text)

        return fail

    replaced(hf_dash.history, "write_text", make)
    replaced(hf_dash.history, "append_line", failing(FULL, 1))


def full_at_the_card():
    import hf_dash.report.export

    replaced(hf_dash.report.export, "write_card", failing(FULL, 1))


def diverges():
    """Each step of training adds NaN to the weights."""

    def make(step):
        def broken(self, *arguments, **named):
            result = step(self, *arguments, **named)
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))
            return result

        return broken

    for kind in (torch.optim.SGD, torch.optim.AdamW):
        kind.step = make(kind.step)


def evaluation_fails():
    import hf_dash.runs.promotion as promotion
    import hf_dash.training.evaluation as evaluation

    for place in (evaluation, promotion):
        replaced(place, "predict", failing(RuntimeError("the device is lost"), 1))


def figures_fail():
    import hf_dash.report.export

    replaced(hf_dash.report.export, "plot_rounds", failing(ImportError("No matplotlib"), 1))


def interrupted():
    """Ctrl-C when training begins its second step."""

    def make(step):
        calls = []

        def press(self, *arguments, **named):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, *arguments, **named)

        return press

    for kind in (torch.optim.SGD, torch.optim.AdamW):
        kind.step = make(kind.step)


def killed_at(place, name, at=1):
    """Kill the process at a call of a function."""

    def make(function):
        calls = []

        def die(*arguments, **named):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return die

    replaced(place, name, make)


fault(AREA, "the disk is full before the start", "FF--", "MB left", inside=no_space_left)
fault(AREA, "the disk is full at the weights", "FF--", "space", inside=full_at_the_weights)
fault(AREA, "the disk is full at the first file", "FFF-", "space", inside=full_at_the_first_file)
fault(AREA, "the disk is full at a later file", "FF--", "space", inside=full_at_a_later_file)
fault(AREA, "the disk is full at the history", "FFF-", "space", inside=full_at_the_history)
fault(AREA, "the disk is full at the card", "FF--", "space", inside=full_at_the_card)
fault(AREA, "training diverges to NaN", "FF--", "not finite", inside=diverges)
fault(AREA, "the device is lost in evaluation", "FFF-", "device is lost", inside=evaluation_fails)
fault(AREA, "figures cannot be drawn", "FF--", "No matplotlib", inside=figures_fail)
fault(AREA, "Ctrl-C in training", "FF--", "KeyboardInterrupt", inside=interrupted)
fault(AREA, "killed at a rename", "FFF-", inside=lambda: killed_at(os, "rename"))
fault(AREA, "killed at a replacement", "FFF-", inside=lambda: killed_at(os, "replace"))
fault(AREA, "killed at the second rename", "FF--", inside=lambda: killed_at(os, "rename", 2))
fault(AREA, "killed when files are flushed", "FFF-", inside=lambda: killed_at(os, "fsync", 2))
