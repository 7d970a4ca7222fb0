"""The four commands in miniature: a world for each, run in a forked child, killed where asked.

A world is a folder: two shards of images, held-out ones, and what the command continues from.
"""

import csv
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch
from children import Child, join, run_script
from helpers import REPOSITORY, draw_no_figures
from hub_double import TOKENS

import hf_dash

TABLES = Path(__file__).parent / "faults"

MODEL = {"layers": [1, 1, 0, 0], "channels": [4, 8, 8, 8], "stem_width": 4}
COLUMNS = ["--dataset_name", "shards", "--test_dataset_name", "held_out.parquet"]
FIRST, SECOND = "rounds/001/dash_seed0", "rounds/002/dash_seed0"

COMMANDS = {
    "continual": [
        *("continual_rounds.py", "--output_dir", "run", "--arrive_by", "files", *COLUMNS),
        *("--files_per_round", "1", "--starts", "dash", "--architecture", "resnet10t"),
        *("--model_args", json.dumps(MODEL), "--max_epochs", "1", "--train_batch_size", "8"),
        # A start that keeps the momentum, so that it lies in the rounds' folders too.
        *("--gradient_batch_size", "8", "--disable_tqdm", "--no_reset_optimizer"),
    ],
    "retrain": [
        *("retrain_with_trainer.py", "--output_dir", "child", "--model_name_or_path", "parent"),
        *("--seen_dataset_names", "shards/monday.parquet"),
        *("--dataset_name", "shards/tuesday.parquet", "--test_dataset_name", "held_out.parquet"),
        *("--num_train_epochs", "1", "--gradient_batch_size", "8", "--save_strategy", "no"),
        *("--disable_tqdm", "true", "--report_to", "none", "--base", "zero"),
    ],
    "promote": [
        *("promote.py", "--output_dir", "run", "--challenger", SECOND, "--force", *COLUMNS),
        *("--arrive_by", "files"),
    ],
    "publish": ["publish.py", "--model_dir", "model", "--hub_model_id", "user/model"],
}

# What a command writes.
HOME = {"continual": "run", "retrain": "child", "promote": "run", "publish": "model"}
# The model that it reads.
READ = {"continual": f"run/{FIRST}", "retrain": "parent", "promote": f"run/{SECOND}"}
READ["publish"] = "model"

# For a command to push what it has done.
PUSH = {
    "continual": ["--push_to_hub", "--hub_model_id", "user/run"],
    "retrain": ["--push_to_hub", "--hub_model_id", "user/child"],
    "promote": ["--push_to_hub", "--hub_model_id", "user/run", "--hub_revision", "challenger"],
    "publish": [],
}

# What differs between two runs of a command: clocks, and digests of what they are in.
TIMES = {"start_seconds", "train_seconds", "seconds", "time", "previous", "digest"}
# The checksum of a report, which tells seconds.
TIMES |= {"dash_report.json"}

FILE_EVENTS = {"replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "open", "write"}


def start(command, folder, *flags, fault=None, kill_at=None, count_in=None):
    """Start a command in a world; see :func:`perform`."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": next(iter(TOKENS))}
    arguments = (command, flags, fault, kill_at, count_in)
    return Child(perform, *arguments, folder=folder, **environment)


def run(command, folder, *flags, **options):
    """Run a command in a world to its end; return its exit code and output."""
    (done,) = join([start(command, folder, *flags, **options)])
    return done


def perform(command, flags, fault, kill_at, count_in):
    """Be the command, in a child.

    Args:
        fault: name of a fault that is in the process itself.
        kill_at: number of the event, among calls and returns in hf_dash, to be killed at.
        count_in: file to write the number of events to, and which of them touch files.
    """
    torch.set_num_threads(1)
    draw_no_figures()
    if fault is not None:
        from faults import FAULTS

        FAULTS[fault].inside()
    script, *given = COMMANDS[command]
    events, touching = [0], []
    if kill_at is not None or count_in is not None:
        watch(events, touching, kill_at)
    try:
        run_script(REPOSITORY / "recipes" / script, [*given, *flags])
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise
    finally:
        sys.setprofile(None)
        if count_in is not None:
            Path(count_in).write_text(json.dumps([events[0], touching]))


def watch(events, touching, kill_at):
    """Count what happens in hf_dash's own frames, and die at one event."""

    def profile(frame, event, argument):
        if not frame.f_globals.get("__name__", "").startswith("hf_dash"):
            return
        events[0] += 1
        if event.startswith("c_") and getattr(argument, "__name__", "") in FILE_EVENTS:
            touching.append(events[0])
        if events[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(profile)
    sys.setprofile(profile)


def make_worlds(folder):
    """Make a world of each command, by the commands themselves."""
    base = folder / "base"
    (base / "shards").mkdir(parents=True)
    digits = hf_dash.load_images("digits")
    for name, rows in {"shards/monday": range(16), "held_out": range(40, 64)}.items():
        digits.select(rows).to_parquet(base / f"{name}.parquet")
    expect(run("continual", base))
    worlds = {}
    for command in ("continual", "retrain"):
        worlds[command] = copy_world(base, folder / command)
        digits.select(range(16, 32)).to_parquet(worlds[command] / "shards" / "tuesday.parquet")
    (worlds["retrain"] / "run" / "model").rename(worlds["retrain"] / "parent")
    shutil.rmtree(worlds["retrain"] / "run")
    whole = copy_world(worlds["continual"], folder / "whole")
    expect(run("continual", whole))
    worlds["promote"] = copy_world(whole, folder / "promote")
    expect(run("promote", worlds["promote"], "--challenger", FIRST))
    worlds["publish"] = copy_world(whole, folder / "publish")
    (worlds["publish"] / "run" / "model").rename(worlds["publish"] / "model")
    shutil.rmtree(worlds["publish"] / "run")
    return worlds


def copy_world(world, folder):
    shutil.copytree(world, folder, symlinks=True)
    return folder


def expect(done):
    assert done.returncode == 0, done.stderr[-5000:]


def final_state(command, world, hub):
    """Return what must not depend on what happened on the way, on disk and on the Hub."""
    home = world / HOME[command]
    state = {str(path.relative_to(home)): plain(path, path.read_bytes()) for path in files_of(home)}
    for name, repository in hub.repositories.items():
        titles = [commit.title for commit in repository.log()]
        files = {n: plain(Path(n), content) for n, content in hub.files(name).items()}
        open_ones = len(repository.pull_requests) - len(repository.closed)
        state[f"on the Hub: {name}"] = titles, sorted(repository.tags), files, open_ones
    return state


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path.name != ".lock")


def plain(path, content):
    """Return the content of a file without what differs between two runs."""
    if path.suffix == ".json":
        return without_times(json.loads(content))
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in content.splitlines()]
    # The card tells seconds.
    return "a card" if path.name == "README.md" else content


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def write_where_asked(path, header, rows):
    """Write a committed table, in a test run with ``WRITE_FAULTS`` set."""
    if "WRITE_FAULTS" in os.environ:
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
