"""What is committed as evidence: tables and figures are those of their data."""

import re
import runpy
import shutil
import sys

import pytest
from helpers import REPOSITORY

import hf_dash
from hf_dash.report import read_evidence, read_series
from hf_dash.studies import simulate

RESULTS = REPOSITORY / "recipes" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.rglob("settings.json"))


def launch(monkeypatch, render, *flags):
    monkeypatch.setattr(sys, "argv", [str(render), *flags])
    runpy.run_path(str(render), run_name="__main__")


@pytest.fixture
def copy(tmp_path):
    """A repository with three of the experiments."""
    results = tmp_path / "recipes" / "results"
    for name in ("cifar10_5_rounds", "digits", "tolerance"):
        shutil.copytree(RESULTS / name, results / name)
    shutil.copy(RESULTS / "render.py", results)
    return results


def test_every_table_and_figure_is_that_of_its_data(monkeypatch):
    launch(monkeypatch, RESULTS / "render.py", "--check")


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("digits/README.md", "99.35 ± 0.42 %", "99.36 ± 0.42 %", ["table starts"]),
        ("tolerance/README.md", "6.4e-03", "6.3e-03", ["table csv file=tolerance.csv"]),
        ("tolerance/tolerance.csv", "6.4e-03", "6.3e-03", ["table csv file=tolerance.csv"]),
        ("digits/rounds.csv", ",450,", ",540,", ["table starts", "figure rounds"]),
        (
            "cifar10_5_rounds/settings.json",
            '"1 × cpu, fp32"',
            '"2 × cpu, fp32"',
            ["table setup", "figure rounds", "table setup", "figure rounds"],
        ),
    ],
)
def test_a_changed_number_is_named(monkeypatch, capsys, copy, file, old, new, stale):
    launch(monkeypatch, copy / "render.py", "--check")
    capsys.readouterr()
    text = (copy / file).read_text(encoding="utf-8")
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"run python recipes/results/render\.py"):
        launch(monkeypatch, copy / "render.py", "--check")
    named = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in named] == stale
    launch(monkeypatch, copy / "render.py")
    launch(monkeypatch, copy / "render.py", "--check")


def test_a_run_becomes_a_folder(monkeypatch, copy):
    evidence = read_evidence(RESULTS / "digits")
    history = copy / "history.json"
    hf_dash.history.write_history(history, evidence.settings["settings"], evidence.records)
    flags = ("--add", str(history), "--name", "mine", "--like", "cifar10_5_rounds")
    launch(monkeypatch, copy / "render.py", *flags)
    settings = copy / "mine" / "settings.json"
    assert read_evidence(copy / "mine").records == evidence.records
    settings.write_text(settings.read_text().replace('"network": ""', '"network": "tiny"'))
    launch(monkeypatch, copy / "render.py", *flags)
    assert read_evidence(copy / "mine").settings["about"]["network"] == "tiny"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_experiment_has_its_page_and_place_in_the_index(folder):
    page = folder if (folder / "README.md").is_file() else folder.parent
    assert page.parent == RESULTS
    assert f"({page.name}/README.md)" in (RESULTS / "README.md").read_text(encoding="utf-8")
    text = (page / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# `{page.name}`: ")
    shown = set(re.findall(r"\]\((\w+\.png)\)", text))
    assert shown == {path.name for path in page.glob("*.png")}


def test_the_evidence_stays_small_and_holds_no_history():
    files = [
        path for path in RESULTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files if path.suffix != ".png") < 1_000_000
    assert {path.suffix for path in files} == {".csv", ".gz", ".json", ".md", ".png", ".py"}
    assert {path.name for path in files if path.suffix == ".json"} == {"settings.json"}
    assert len((RESULTS / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_committed_simulations_are_what_the_code_gives():
    series = read_series(RESULTS / "learning_framework" / "simulations.csv.gz")
    # The last of each start; C, K, N, γ and τ are in the setting's name.
    flags = ("num_classes", "num_features", "num_points", "gamma", "tau")
    for start in ("random", "warm", "ideal", "partial"):
        setting, seed = [(key[0], key[2]) for key in series if key[1] == start][-1]
        sizes = (int(part.split("=")[1]) for part in setting.split())
        again = simulate(start, seed=int(seed), **dict(zip(flags, sizes, strict=True)))
        for name, values in series[setting, start, seed].items():
            assert values == getattr(again, name).tolist()
