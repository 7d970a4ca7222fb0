"""A start's own folder: what goes there, and how its rounds come back."""

import os
from contextlib import suppress

import pytest
import torch
from helpers import record, save_round

import hf_dash
from hf_dash.history import read_history
from hf_dash.runs import start_folders
from hf_dash.runs.round_files import HISTORY, OPTIMIZER, WEIGHTS
from hf_dash.runs.start_folders import (
    adopt_rounds,
    hand_over,
    import_round,
    open_start,
    start_folder,
)

SETTINGS = {"lam": 0.3}

MOMENTUM = {"timm_model.fc.weight::momentum_buffer": torch.ones(10, 32)}


@pytest.fixture
def run(tmp_path):
    with hf_dash.runs.open_run(tmp_path / "run", SETTINGS) as history:
        yield history


@pytest.fixture
def trained(run, small_model):
    """The folder of a start's own, with two rounds."""
    folder = start_folder(run.path.parent, "warm", 0)
    with open_start(run.path.parent, run, "warm", 0) as own:
        for index in (1, 2):
            made = record(round_index=index, previous=own.head)
            own.append(save_round(folder, small_model, MOMENTUM, made, SETTINGS))
    return folder


def test_rounds_come_back_with_their_files_and_their_chain(run, trained):
    before = read_history(trained / HISTORY).records
    adopt_rounds(run.path.parent, run, "warm", 0)
    assert run.records == before
    again = read_history(run.path)
    assert (again.records, again.head) == (before, run.head)
    for own in run.records:
        folder = run.path.parent / own.folder
        assert {WEIGHTS, OPTIMIZER, HISTORY} < {path.name for path in folder.iterdir()}
        assert read_history(folder / HISTORY).records[0].previous == own.previous
    assert not trained.parent.exists()
    adopt_rounds(run.path.parent, run, "warm", 0)  # nothing left to take over


def dying_at(call, function):
    """Return the function, interrupted at one of its calls."""
    calls = []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **options)

    return dying


@pytest.mark.parametrize(
    ("holder", "name"), [(os, "link"), (start_folders, "finish_round"), (os, "rename")]
)
def test_stopped_anywhere_it_continues(run, trained, monkeypatch, holder, name):
    expected = read_history(trained / HISTORY).records
    for call in (2, 1, 3, 4):
        with (
            hf_dash.runs.open_run(run.path.parent, SETTINGS) as again,
            monkeypatch.context() as patch,
            suppress(KeyboardInterrupt),
        ):
            patch.setattr(holder, name, dying_at(call, getattr(holder, name)))
            adopt_rounds(run.path.parent, again, "warm", 0)
    with hf_dash.runs.open_run(run.path.parent, SETTINGS) as again:
        adopt_rounds(run.path.parent, again, "warm", 0)
    assert again.records == expected
    assert len(list(run.path.parent.glob("rounds/*/*"))) == 2
    assert [path.name for path in run.path.parent.rglob(".*") if path.name != ".lock"] == []


def test_a_disk_without_links_gets_copies(run, trained, monkeypatch):
    def refused(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    expected = (trained / "rounds/002/warm_seed0" / WEIGHTS).read_bytes()
    adopt_rounds(run.path.parent, run, "warm", 0, keep=1)
    rounds = list(run.path.parent.glob("rounds/*/*"))
    assert [path.parent.name for path in rounds] == ["002"]
    assert (rounds[0] / WEIGHTS).read_bytes() == expected


def test_the_start_gets_all_records_and_its_newest_round(run, trained):
    adopt_rounds(run.path.parent, run, "warm", 0)
    with open_start(run.path.parent, run, "warm", 0) as own:
        for _ in range(2):
            hand_over(run.path.parent, run, own, "warm", 0)
        assert own.records == run.records
    assert [path.name for path in (trained / "rounds").iterdir()] == ["002"]


def test_damage_is_refused(run, trained):
    weights = trained / "rounds/001/warm_seed0" / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match=r"001/warm_seed0/model.safetensors is not what"):
        adopt_rounds(run.path.parent, run, "warm", 0)
    assert run.records == []
    weights.write_bytes(whole)
    adopt_rounds(run.path.parent, run, "warm", 0)
    other = record(weights_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"001/warm_seed0 holds another model"):
        import_round(run.path.parent, run, None, other)


def test_other_settings_are_refused(run, trained):
    other = hf_dash.History(None, {"lam": 0.1})
    with pytest.raises(ValueError, match=r"lam was 0\.3, is 0\.1"):
        adopt_rounds(run.path.parent, other, "warm", 0)
