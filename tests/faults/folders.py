"""Faults of the folder that is written."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import hf_dash
from faults.table import fault, rewritten

AREA = "output folder"


def a_file_instead(world):
    if world.home.exists():
        shutil.rmtree(world.home)
    world.home.write_text("mine")


def not_writable():
    real = os.access
    os.access = lambda path, mode, **how: not mode & os.W_OK and real(path, mode, **how)


def hold(world):
    """Let another process hold the folder while the command runs."""
    script = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]);"
        "lock.acquire(); open(sys.argv[2], 'w').close(); time.sleep(60)"
    )
    world.home.mkdir(exist_ok=True)
    held = world.folder / "held"
    flags = [sys.executable, "-c", script, str(world.home / ".lock"), str(held)]
    HOLDERS.append(subprocess.Popen(flags))
    while not held.exists():
        time.sleep(0.01)
    held.unlink()


# Processes that a test ends with itself.
HOLDERS: list[subprocess.Popen] = []


def of_another_run(world):
    """A run with other settings, or for the Trainer any run at all."""
    if world.command == "retrain":
        (world.home / "rounds").mkdir(parents=True)
        first = hf_dash.read_history(world.history).records[0]
        hf_dash.history.write_history(world.home / "history.json", {"lam": 0.1}, [first])
    else:
        rewritten(lambda content: content["settings"].update(lam=0.1))(world.history)


def another_history(world):
    world.home.mkdir()
    first = hf_dash.read_history(world.history).records[0]
    other = replace(first, accuracy=0.125)
    hf_dash.history.write_history(world.home / "history.json", {}, [other])


def kill_leftovers(world):
    world.home.mkdir(exist_ok=True)
    for name in (".history.jsonl.tmp", ".champion.json.tmp"):
        (world.home / name).write_text("half")
    model = world.home / "model" if world.command == "continual" else world.home
    halves = [model / ".aside"]
    if world.command in ("continual", "promote"):
        halves.append(world.home / "rounds" / "002" / ".dash_seed0.tmp")
    for half in halves:
        half.mkdir(parents=True)
        (half / "model.safetensors").write_text("half")


def pending_model(world):
    """An export that was killed when some of its files had moved."""
    folder = {"continual": world.home / "model"}.get(world.command, world.model)
    pending = folder / ".pending"
    pending.mkdir()
    (folder / "model.safetensors").rename(pending / "model.safetensors")
    (pending / "stale.json").write_text("[]")


def stale_report(world):
    world.home.mkdir(exist_ok=True)
    (world.home / "dash_report.json").write_text(json.dumps({"config": {"lam": 0.9}}))


def strangers(world):
    world.home.mkdir(exist_ok=True)
    for name in ("mine.png", "my_config.json", ".env", "notes.txt"):
        (world.home / name).write_text('"secret"')


fault(AREA, "a file", "RRRR", "is a file|not a finished round|must hold", damage=a_file_instead)
fault(AREA, "read-only", "FFF=", "must be writable", inside=not_writable)
fault(AREA, "in use by another process", "RRRR", "in use by", damage=hold)
fault(
    AREA,
    "of a run with other settings, or of any run for the Trainer",
    "RR--",
    r"other settings \(lam was 0.1|is the folder of a run",
    damage=of_another_run,
)
fault(
    AREA,
    "holds a history that would be lost",
    "-R--",
    "holds another history",
    damage=another_history,
)
fault(AREA, "half-written copies of a kill", "==--", damage=kill_leftovers)
fault(AREA, "an export that was killed while its files moved", "==-=", damage=pending_model)
fault(
    AREA, "the report of another shrink", "-=-R", "is not what (history|its)", damage=stale_report
)
fault(AREA, "files of other people", "====", damage=strangers)
fault(
    AREA,
    "its name is empty",
    "RRRR",
    "must name a folder|must hold|not a finished round",
    flags=("{home}=",),
)
