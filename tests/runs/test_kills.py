"""Each of the four commands, killed by SIGKILL at many points, ends with the same state."""

import csv
import json
import signal

import pytest
from commands import COMMANDS, TABLES, copy_world, expect, final_state, run, write_where_asked

TABLE = TABLES / "kills.csv"
HEADER = ["command", "events", "of them at files", "kills", "other ends"]


@pytest.fixture(scope="module")
def rows():
    """The committed table, as it comes out."""
    rows = []
    yield rows
    write_where_asked(TABLE, HEADER, rows)


@pytest.fixture(params=COMMANDS)
def command(request):
    return request.param


@pytest.fixture
def undisturbed(command, worlds, hub, tmp_path):
    """The end of a command that nobody killed; the number of its events, and those at files."""
    world = copy_world(worlds[command], tmp_path / "undisturbed")
    expect(run(command, world, count_in=str(tmp_path / "count.json")))
    state = final_state(command, world, hub)
    # The same once more: what is finished is left as it is.
    expect(run(command, world))
    assert final_state(command, world, hub) == state
    return state, *json.loads((tmp_path / "count.json").read_text())


def points_of(number, events, touching):
    """Return events to be killed at: evenly spaced ones, and some more at files."""
    at_files = touching[:: max(1, 2 * len(touching) // number)]
    spaced = [1 + index * (events - 1) // number for index in range(number)]
    return sorted({*at_files, *spaced})


def other_ends(command, worlds, expected, hub, folder, points):
    """Kill a command at each point, then let it finish; return the points with another end."""
    others = []
    for point in points:
        hub.repositories.clear()
        world = copy_world(worlds[command], folder / str(point))
        assert run(command, world, kill_at=point).returncode == -signal.SIGKILL
        expect(run(command, world))
        if final_state(command, world, hub) != expected:
            others.append(point)
    return others


def test_killed_in_the_middle_of_its_files(command, worlds, undisturbed, hub, tmp_path):
    expected, events, touching = undisturbed
    points = touching or range(1, events)  # a push writes no file
    middle = points[len(points) // 2]
    assert other_ends(command, worlds, expected, hub, tmp_path, [middle]) == []


@pytest.mark.thorough
def test_killed_at_fifty_points(command, worlds, undisturbed, hub, rows, tmp_path):
    expected, events, touching = undisturbed
    points = points_of(50, events, touching)
    others = other_ends(command, worlds, expected, hub, tmp_path, points)
    rows.append([command, events, len(touching), len(points), len(others)])
    assert len(points) >= 50
    assert others == []


def test_the_committed_table_is_of_fifty_kills_each():
    with TABLE.open(newline="", encoding="utf-8") as file:
        table = {row["command"]: row for row in csv.DictReader(file)}
    assert list(table) == list(COMMANDS)
    assert all(int(row["kills"]) >= 50 and row["other ends"] == "0" for row in table.values())
