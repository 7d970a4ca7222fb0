"""What is prepared for a GPU: its stages end by their limits, and all of it runs on the CPU."""

import runpy
import sys
import time

import pytest
from helpers import REPOSITORY, launch

from hf_dash.history import read_history, write_history

SESSION = REPOSITORY / "recipes" / "benchmarks" / "gpu_session.py"


@pytest.fixture(scope="module")
def session():
    return runpy.run_path(str(SESSION), run_name="session")


def test_a_stage_ends_at_its_limit_with_all_its_processes(session, tmp_path):
    path = tmp_path / "beats"
    beating = f"while True: open({str(path)!r}, 'a').write('x'); time.sleep(0.01)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '''{beating}'''])"
    command = [sys.executable, "-c", parent.replace("while", "import time\nwhile")]
    name, _, ended = session["run"]("endless", 1, command, tmp_path)
    assert (name, ended) == ("endless", "at its limit")
    beats = path.stat().st_size if path.exists() else 0
    time.sleep(0.1)
    assert (path.stat().st_size if path.exists() else 0) == beats


def test_what_a_stage_printed_is_kept(session, tmp_path):
    told = session["run"]("short", 60, [sys.executable, "-c", "print(7); exit(3)"], tmp_path)
    assert told[2] == "exit code 3"
    assert (tmp_path / "short.txt").read_text().endswith("print(7); exit(3)'\n\n7\n")


def test_histories_are_kept_of_starts_that_did_not_join(session, tmp_path):
    for folder in ("run", "run/starts/dash_seed0"):
        (tmp_path / folder).mkdir(parents=True)
        write_history(tmp_path / folder / "history.json", {"of": folder}, [])
    (tmp_path / "run" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "kept").mkdir()
    session["keep_histories"](tmp_path / "run", tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "dash_seed0.history.json",
        "run.history.json",
    ]


def test_the_starts_are_those_of_the_paper_and_the_control(session, tmp_path):
    args = session["Arguments"](dataset_name="cifar10", control_factor=0.4)
    ((_, seconds, command),) = session["start_stages"](args, tmp_path)
    place = command.index("--starts")
    assert command[place + 1 : place + 8] == [
        *("cold", "warm", "dash", "shrink_perturb", "fire", "dash+preset=paper"),
        "shrink_perturb+perturb_lam=0.4+perturb_sigma=0",
    ]
    stages = [*session["step_stages"](args), *session["shrink_stages"](args)]
    limits = [seconds for _, seconds, _ in [*stages, *session["test_stages"]()]]
    assert seconds + sum(limits) <= args.time_limit == 540
    assert command[command.index("--mixed_precision") + 1] == "bf16"


@pytest.mark.slow
def test_the_whole_session_runs_on_the_cpu(tmp_path):
    launch("benchmarks/gpu_session.py", tmp_path, "--tiny", "--time_limit", "600", fresh=True)
    kept = tmp_path / "runs" / "gpu_session"
    printed = {path.stem: path.read_text() for path in kept.glob("*.txt")}
    for way in ("(a) bare loop", "(b) on_device", "(d) loader", "(e) Trainer"):
        assert way in printed["step_bf16"]
    assert "1 × 1,000 (1)" in printed["shrink_float32"]
    assert "skipped" in printed["tests"]
    (history,) = kept.glob("run.history.json*")
    records = read_history(history).records
    assert [(r.seed, r.round_index) for r in records] == [(0, 1), (0, 2)] * 7 + [(1, 1), (1, 2)] * 7
    assert not list(kept.rglob("*.safetensors"))
