"""What comes of every fault in each of the four commands, as the committed table says."""

import copy
import csv
import os
import re
from pathlib import Path

import pytest
from commands import (
    COMMANDS,
    HOME,
    PUSH,
    TABLES,
    copy_world,
    expect,
    final_state,
    run,
    write_where_asked,
)
from faults import FAULTS, World
from faults.folders import HOLDERS
from helpers import hub_address
from hub_double import HubDouble

TABLE = TABLES / "faults.csv"
HEADER = ["fault", *COMMANDS, "message"]
LONGEST = 100  # characters of a message
CELLS = [(name, c) for name, fault in FAULTS.items() for c in COMMANDS if fault.outcome(c) != "-"]

# A dozen that once went wrong.
QUICK = [
    ("output folder: holds a history that would be lost", "retrain"),
    ("output folder: in use by another process", "retrain"),
    ("output folder: its name is empty", "continual"),
    ("output folder: the report of another shrink", "publish"),
    ("history: an accuracy that is text", "retrain"),
    ("history: an older copy, and entries between are lost", "continual"),
    ("weights: a bit flipped", "promote"),
    ("config: label names in another order", "promote"),
    ("a stranger's config: a checkpoint_path", "retrain"),
    ("figure: a symbolic link to a secret", "publish"),
    ("machine: training diverges to NaN", "retrain"),
    ("machine: the disk is full at the card", "retrain"),
]


@pytest.fixture(scope="module")
def pushed(worlds, tmp_path_factory):
    """Repositories with a run's first round, and its second one as a challenger."""
    world = copy_world(worlds["continual"], tmp_path_factory.mktemp("pushed") / "world")
    arriving = world / "shards" / "tuesday.parquet"
    arriving.rename(world / "later.parquet")
    with HubDouble(hub_address()) as hub:
        expect(run("continual", world, *PUSH["continual"]))
        (world / "later.parquet").rename(arriving)
        expect(run("continual", world, *PUSH["continual"], "--hub_revision", "challenger"))
        return hub.repositories, hub.objects


@pytest.fixture(scope="module")
def ends():
    """The ends of commands that nothing went wrong with, by command and whether it pushes."""
    return {}


@pytest.fixture(scope="module")
def seen():
    """The rows of the table, as they come out; written where ``WRITE_FAULTS`` is set."""
    rows = {name: {} for name in FAULTS}
    yield rows
    write_where_asked(TABLE, HEADER, [row_of(name, cells) for name, cells in rows.items()])


def row_of(name, cells):
    outcomes = [cells[command][0] if command in cells else "-" for command in COMMANDS]
    messages = [message for _, message in cells.values() if message]
    message = messages[0] if messages else ""
    shown = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
    return [name, *outcomes, shown]


def read_table():
    with TABLE.open(newline="", encoding="utf-8") as file:
        return {row["fault"]: row for row in csv.DictReader(file)}


def prepare(pushes, command, worlds, hub, pushed, folder):
    hub.repositories.clear()
    if pushes and command == "promote":
        repositories, objects = pushed
        hub.repositories.update(copy.deepcopy(repositories))
        hub.objects.update(objects)
    return copy_world(worlds[command], folder)


def content_of(world, hub):
    """Return every byte, and where links lead."""
    files = {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in world.rglob("*")
        if path.is_symlink() or (path.is_file() and path.name != ".lock")
    }
    return files, copy.deepcopy(hub.repositories)


def message_of(done, world, hub):
    """Return the last error or warning, without what differs between two runs."""
    lines = [line.strip() for line in done.stderr.splitlines()]
    error = r"([\w.]+Error|KeyboardInterrupt)\b|\w+\.py: error: "
    errors = [line for line in lines if re.match(error, line)]
    warnings = [line for line in lines if re.search("not pushed to|stays at main", line)]
    told = (errors or warnings or [f"status {done.returncode}"])[-1]
    told = told.replace(str(world), "…").replace(hub.endpoint, "https://huggingface.co")
    return re.sub(r"\b(0x)?[0-9a-f]{10,}\b", "…", told)


def check_end(end, fault, command, before, world, expected):
    end = {
        name: value
        for name, value in end.items()
        # What others had there stays; what a kill left does not.
        if name in expected or str(world / HOME[command] / name) not in before or is_left(name)
    }
    for state in (end, expected):
        state |= {name: "may differ" for name in state if Path(name).name in fault.but}
    assert end == expected


def is_left(name):
    return any(part in (".aside", ".pending") or part.endswith(".tmp") for part in Path(name).parts)


def happens(name, command, world, hub, undisturbed):
    """Let a fault happen to a command; return what comes of it, and the message."""
    fault = FAULTS[name]
    flags = [flag.replace("{home}", flag_of(command)) for flag in fault.flags]
    flags += PUSH[command] if fault.hub is not None else []
    if fault.damage is not None:
        fault.damage(World(world, command))
    if fault.hub is not None:
        fault.hub(hub)
    before = content_of(world, hub)
    done = run(command, world, *flags, fault=None if fault.inside is None else name)
    while HOLDERS:
        HOLDERS[-1].kill()
        HOLDERS.pop().wait()
    hub.faults.clear()
    message = message_of(done, world, hub)
    failed = done.returncode != 0 or "not pushed to" in done.stderr
    if failed:
        assert re.search(fault.says, message), done.stderr[-3000:]
    if failed and fault.inside is None:
        assert content_of(world, hub) == before, "files have changed"
        return "refused", message
    if failed:
        expect(run(command, world, *flags))
    end = final_state(command, world, hub)
    check_end(end, fault, command, before[0], world, dict(undisturbed()))
    return ("finished", message) if failed else ("right", "")


def flag_of(command):
    return "--model_dir" if command == "publish" else "--output_dir"


def check(name, command, worlds, pushed, ends, seen, hub, folder):
    pushes = FAULTS[name].hub is not None

    def undisturbed():
        if (command, pushes) not in ends:
            world = prepare(pushes, command, worlds, hub, pushed, folder / "undisturbed")
            expect(run(command, world, *(PUSH[command] if pushes else ())))
            ends[command, pushes] = final_state(command, world, hub)
        return ends[command, pushes]

    world = prepare(pushes, command, worlds, hub, pushed, folder / "world")
    happened = happens(name, command, world, hub, undisturbed)
    seen[name][command] = happened
    assert happened[0] == FAULTS[name].outcome(command), happened


@pytest.mark.parametrize(("name", "command"), QUICK)
def test_some_faults(name, command, worlds, ends, seen, hub, tmp_path):
    check(name, command, worlds, None, ends, seen, hub, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "command"), CELLS)
def test_every_fault(name, command, worlds, pushed, ends, seen, hub, tmp_path):
    check(name, command, worlds, pushed, ends, seen, hub, tmp_path)


def test_the_committed_table_is_of_these_faults():
    table = read_table()
    assert list(table) == list(FAULTS)
    assert len(table) >= 80
    for name, row in table.items():
        assert [row[c] for c in COMMANDS] == [FAULTS[name].outcome(c) for c in COMMANDS]
