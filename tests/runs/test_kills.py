"""Each of the four commands, killed by SIGKILL at many points, ends with the same state."""

import json
import signal

import pytest
from commands import COMMANDS, copy_world, expect, final_state, make_worlds, run


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return make_worlds(tmp_path_factory.mktemp("worlds"))


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


def check_kills(command, worlds, undisturbed, hub, folder, number):
    expected, events, touching = undisturbed
    points = points_of(number, events, touching)
    assert len(points) >= number
    for point in points:
        hub.repositories.clear()
        world = copy_world(worlds[command], folder / str(point))
        assert run(command, world, kill_at=point).returncode == -signal.SIGKILL
        expect(run(command, world))
        assert final_state(command, world, hub) == expected, f"killed at event {point}"


def test_killed_at_some_points(command, worlds, undisturbed, hub, tmp_path):
    check_kills(command, worlds, undisturbed, hub, tmp_path, 2)


@pytest.mark.slow
def test_killed_at_fifty_points(command, worlds, undisturbed, hub, tmp_path):
    check_kills(command, worlds, undisturbed, hub, tmp_path, 50)
