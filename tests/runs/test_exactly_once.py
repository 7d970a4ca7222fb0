"""A run killed by SIGKILL anywhere ends, started again, with the same weights, bit by bit."""

import random
import signal
import time
from functools import partial
from pathlib import Path

import kill_worker
import pytest
from children import CONTEXT
from datasets import Dataset

import hf_dash


@pytest.fixture(scope="module")
def attempt(digits):
    """A function that runs until the end, or until killed, and returns the exit code."""
    arriving = hf_dash.data.in_arrival_order(digits, seed=0, num_examples=90)
    return partial(attempt_on, arriving)


def attempt_on(
    arriving: Dataset, folder: Path, point: str | None = None, seconds: float | None = None
) -> int:
    process = CONTEXT.Process(target=kill_worker.run, args=(str(folder), arriving, point))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def outcome(folder: Path) -> list[tuple]:
    """What must not depend on how often a run was killed."""
    records = hf_dash.read_history(folder / "history.jsonl").records
    return [
        (r.folder, r.parent, r.weights_sha256, r.data_fingerprint, r.steps, r.accuracy)
        for r in records
    ]


@pytest.fixture(scope="module")
def undisturbed(attempt, tmp_path_factory):
    """The outcome of a run nobody killed, and how long it took."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    assert attempt(first) == 0
    # Timed once the server is up, or most kills would come too late.
    started = time.monotonic()
    assert attempt(second) == 0
    duration = time.monotonic() - started
    assert outcome(first) == outcome(second)
    return outcome(first), duration


@pytest.mark.parametrize("point", kill_worker.POINTS)
def test_killed_at_every_step(attempt, point, undisturbed, tmp_path):
    assert attempt(tmp_path, point) == -signal.SIGKILL
    assert attempt(tmp_path) == 0
    assert outcome(tmp_path) == undisturbed[0]
    leftovers = [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert leftovers == []


def killed_at_random(attempt, times: int, seed: int, undisturbed, folder: Path) -> None:
    expected, duration = undisturbed
    draw = random.Random(seed)
    kills = runs = 0
    while kills < times:
        code = attempt(folder / str(runs), seconds=draw.uniform(0.0, duration))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:
            assert outcome(folder / str(runs)) == expected
            runs += 1
    assert attempt(folder / str(runs)) == 0
    assert outcome(folder / str(runs)) == expected


def test_killed_five_times_at_random(attempt, undisturbed, tmp_path):
    killed_at_random(attempt, 5, 0, undisturbed, tmp_path)


@pytest.mark.slow
def test_killed_fifty_times_at_random(attempt, undisturbed, tmp_path):
    killed_at_random(attempt, 50, 1, undisturbed, tmp_path)


def test_a_finished_run_is_left_alone(attempt, undisturbed, tmp_path):
    assert attempt(tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert attempt(tmp_path) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
