"""Starts side by side end as starts one after the other do, whoever dies on the way."""

import os
import pickle
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from children import CONTEXT
from helpers import heard, same_state, state_of
from parallel_worker import NAMES, Create, run, runs_of, train

import hf_dash
from hf_dash.history import read_history
from hf_dash.runs import parallel
from hf_dash.runs.round_files import HISTORY, report_of
from hf_dash.utils.reports import REPORT_NAME


def outcome(history):
    """What must not depend on how the starts were trained, in the order of the history."""
    told = ("start_seconds", "train_seconds", "previous", "shrink")
    return [
        replace(
            record,
            **dict.fromkeys(told[:2], 0.0),
            previous=None,
            shrink=None,
            # A report tells seconds; its content is compared on its own.
            file_sha256={n: s for n, s in record.file_sha256.items() if n != REPORT_NAME},
        )
        for record in history.records
    ]


def shrinks(history):
    place = history.path.parent
    found = (report_of(place / record.folder, record) for record in history.records)
    return [{**shrink, "seconds": 0} for shrink in found if shrink is not None]


def folders(output_dir):
    """What a run's folder holds, without the contents that tell times."""
    return sorted(
        str(path.relative_to(output_dir))
        for path in output_dir.rglob("*")
        if path.name not in (".lock", HISTORY)
    )


@pytest.fixture(scope="module")
def rounds(digits, tmp_path_factory):
    """Two rounds of 20 digits each."""
    arrived = hf_dash.data.in_arrival_order(digits, seed=0, num_examples=40)
    transform = hf_dash.models.image_transform(Create(tmp_path_factory.mktemp("orders"))())
    return list(hf_dash.data.cut_rounds(arrived, 2, transform, in_memory=True))


@pytest.fixture(scope="module")
def alone(rounds, tmp_path_factory):
    """The same starts one after the other: history, last weights, and the names of all files."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    history, model = train(folder, rounds, Accelerator(cpu=True), 1)
    return SimpleNamespace(history=history, weights=state_of(model), files=folders(folder))


def test_the_result_is_that_of_one_after_the_other(
    alone, rounds, accelerator, tmp_path, monkeypatch
):
    trained = []

    def counted(*args, **options):
        trained.append(options["description"])
        return original(*args, **options)

    original = hf_dash.training.train_round
    monkeypatch.setattr("hf_dash.runs.continual.train_round", counted)
    history, model = train(tmp_path / "both", rounds, accelerator, 3)
    # The one round of this process; those of the starts train the others.
    assert trained == ["cold round 1"]
    shared = [r for r in history.records if r.round_index == 1 and r.start != "l2_init"]
    assert len({(r.weights_sha256, r.train_seconds) for r in shared}) == 1
    assert [(r.start, r.round_index) for r in history.records] == [
        (name, index) for name in NAMES for index in (1, 2)
    ]
    assert outcome(history) == outcome(alone.history)
    assert shrinks(history) == shrinks(alone.history)
    assert same_state(state_of(model), alone.weights)
    assert folders(tmp_path / "both") == alone.files
    assert outcome(read_history(tmp_path / "both" / HISTORY)) == outcome(alone.history)
    for record in history.records:
        found = read_history(tmp_path / "both" / record.folder / HISTORY)
        assert found.records[0].previous == record.previous


def test_one_that_fails_leaves_the_others_and_the_same_call_continues(
    alone, rounds, accelerator, tmp_path
):
    (tmp_path / "cold").write_text("no room for cold")
    (tmp_path / NAMES[2]).write_text("killed")
    folder = tmp_path / "run"
    with heard() as messages, pytest.raises(RuntimeError) as raised:
        train(folder, rounds, accelerator, 4)
    assert "OSError: no room for cold" in str(raised.value)
    assert f"{NAMES[2]}: its process ended with exit code {-signal.SIGKILL}" in str(raised.value)
    assert any("cold has failed: OSError: no room for cold" in message for message in messages)
    own = {path.name: read_history(path / HISTORY) for path in (folder / "starts").iterdir()}
    indices = {name: [r.round_index for r in history.records] for name, history in own.items()}
    assert indices == {
        "l2_init_seed0": [1, 2],
        "cold_seed0": [1],
        f"{NAMES[2]}_seed0": [1],
    }
    before = own["l2_init_seed0"].records
    joined = hf_dash.report.join_histories([folder / "starts" / name / HISTORY for name in own])
    assert len(joined.records) == 4

    (tmp_path / "cold").unlink()
    (tmp_path / NAMES[2]).unlink()
    history, _ = train(folder, rounds, accelerator, 4)
    assert outcome(history) == outcome(alone.history)
    assert [r.train_seconds for r in history.select("l2_init")] == [r.train_seconds for r in before]


def test_one_after_the_other_continues_what_was_begun_side_by_side(
    alone, rounds, accelerator, tmp_path, monkeypatch
):
    monkeypatch.setattr(parallel, "_run_processes", lambda *given: {"cold": "stopped"})
    with pytest.raises(RuntimeError, match="cold: stopped"):
        train(tmp_path / "run", rounds, accelerator, 2)
    assert len(list((tmp_path / "run" / "starts").iterdir())) == len(NAMES)
    history, _ = train(tmp_path / "run", rounds, accelerator, 1)
    assert outcome(history) == outcome(alone.history)
    assert folders(tmp_path / "run") == alone.files


def test_what_arrives_later_is_trained_side_by_side_too(alone, rounds, accelerator, tmp_path):
    train(tmp_path / "run", rounds[:1], accelerator, 1, save_total_limit=1)
    history, _ = train(tmp_path / "run", rounds, accelerator, 4, save_total_limit=1)
    key = lambda record: (record.start, record.round_index)  # noqa: E731
    expected = sorted(outcome(alone.history), key=key)
    assert sorted(outcome(history), key=key) == expected
    kept = [path.name for path in (tmp_path / "run" / "rounds").glob("*/*")]
    assert sorted(kept) == sorted(f"{name}_seed0" for name in NAMES)


def test_an_interrupt_stops_every_process(monkeypatch):
    processes = []

    class Endless(parallel._Process):
        def __init__(self, task, name):
            self._process = CONTEXT.Process(target=time.sleep, args=(600,))
            self._process.start()
            self.sentinel = self._process.sentinel
            processes.append(self._process)

    def interrupted(sentinels):
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "_Process", Endless)
    monkeypatch.setattr(parallel, "connection", SimpleNamespace(wait=interrupted))
    with pytest.raises(KeyboardInterrupt):
        parallel._run_processes(None, ["cold", "dash"], 2)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2


@pytest.mark.slow
def test_killed_with_all_its_processes_it_continues(alone, rounds, accelerator, tmp_path):
    arrived = hf_dash.data.in_arrival_order(hf_dash.load_images("digits"), seed=0, num_examples=40)
    folder = tmp_path / "run"
    process = CONTEXT.Process(target=run, args=(str(folder), arrived, 2))
    process.start()
    while process.is_alive() and not list(folder.glob("starts/*/rounds/002/*")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # The starts' own processes end with it, or their folders would stay in use.
    history, _ = train(folder, rounds, accelerator, 4)
    assert outcome(history) == outcome(alone.history)


def test_bad_input_is_refused_before_anything_is_trained(rounds, accelerator, tmp_path):
    history = hf_dash.History(tmp_path / "run" / HISTORY, {})
    runs, create = runs_of(history, accelerator), Create(tmp_path)
    given = (rounds, rounds[0].new)

    def refused(kind, message, runs=runs, create=create, number=2):
        with pytest.raises(kind, match=message):
            hf_dash.runs.run_starts(create, *given, runs, number)

    refused(ValueError, "num_parallel_starts must be at least 1, got 0", number=0)
    refused(TypeError, "num_parallel_starts must be an integer", number=2.5)
    refused(ValueError, "different names, got .'cold', 'cold'", runs=[runs[1], runs[1]])
    other = replace(runs[1], name="warm", seed=1)
    refused(ValueError, "alike but for their names, 'warm' is not", runs=[runs[0], other])
    refused(ValueError, "start must be one of", runs=[replace(runs[0], name="mine")])
    nowhere = replace(runs[0], output_dir=None)
    refused(ValueError, "got output_dir None and parent None", runs=[nowhere])
    refused(TypeError, "must be picklable", create=lambda: None)
    assert not (tmp_path / "run").exists()
    several = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2)
    with pytest.raises(ValueError, match="num_parallel_starts must be 1 with 2 processes"):
        hf_dash.runs.check_parallel(3, several)
    hf_dash.runs.check_parallel(1, several)


def test_a_process_gets_what_this_one_is_set_to(rounds, accelerator, tmp_path):
    history = hf_dash.History(tmp_path / HISTORY, {"lam": 0.3})
    task = parallel._Task.of(Create(tmp_path), rounds, None, runs_of(history, accelerator))
    assert (task.cpu, task.mixed_precision, task.folder) == (True, "no", os.getcwd())
    _, rounds, _, runs = pickle.loads(task.content)
    assert [r.fingerprint for r in rounds] == [r.fingerprint for r in rounds]
    # One file of decoded images, whoever reads it.
    assert rounds[0].new._cache.path == rounds[0].new._cache.path
    assert [run.name for run in runs] == list(NAMES)
