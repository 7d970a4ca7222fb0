from dataclasses import replace

import pytest
import torch
from helpers import record, same_state, state_of

import hf_dash
from hf_dash.runs import store as checkpoints
from hf_dash.runs.store import (
    find_round,
    load_optimizer_state,
    load_weights_,
    prune_rounds,
    save_round,
)

SETTINGS = {"lam": 0.3}


@pytest.fixture
def saved(small_model, tmp_path):
    momentum = {"timm_model.fc.weight::momentum_buffer": torch.ones(10, 32)}
    return save_round(tmp_path, small_model, momentum, record(), SETTINGS)


def test_a_round_comes_back_as_it_was(saved, small_model, tmp_path):
    expected = state_of(small_model)
    with torch.no_grad():
        for parameter in small_model.parameters():
            parameter.zero_()
    load_weights_(small_model, tmp_path, saved)
    assert same_state(state_of(small_model), expected)
    momentum = load_optimizer_state(tmp_path, saved)
    assert list(momentum) == ["timm_model.fc.weight::momentum_buffer"]
    found = find_round(tmp_path, saved.folder)
    assert found.records == [saved]
    assert found.settings == SETTINGS
    assert hf_dash.load_model(str(tmp_path / saved.folder)).config.num_labels == 10


def test_a_round_without_optimizer_state(small_model, tmp_path):
    saved = save_round(tmp_path, small_model, {}, record(), SETTINGS)
    assert load_optimizer_state(tmp_path, saved) == {}


def test_a_round_is_saved_once(saved, small_model, tmp_path):
    with pytest.raises(ValueError, match=r"001/warm_seed0 is there already"):
        save_round(tmp_path, small_model, {}, record(), SETTINGS)


def test_a_round_that_is_not_there(tmp_path):
    assert find_round(tmp_path, record().folder) is None


def test_a_killed_attempt_is_swept_away(tmp_path):
    leftover = tmp_path / "rounds" / "001" / ".warm_seed0.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert find_round(tmp_path, record().folder) is None
    assert not leftover.exists()


@pytest.mark.parametrize("where", ["save_model", "save_file", "flush_folder"])
def test_a_full_disk_leaves_nothing_behind(where, small_model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, where, full)
    with pytest.raises(
        OSError, match=r"warm_seed0 could not be saved: .*No space left.*same command"
    ):
        save_round(tmp_path, small_model, {"a": torch.zeros(1)}, record(), SETTINGS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_weights_that_changed_or_vanished_are_refused(saved, small_model, tmp_path):
    with pytest.raises(ValueError, match="its checksum differs"):
        load_weights_(small_model, tmp_path, replace(saved, weights_sha256="0" * 64))
    (tmp_path / saved.folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is gone: the next round cannot"):
        load_weights_(small_model, tmp_path, saved)


def test_old_rounds_are_pruned(small_model, tmp_path):
    records = [
        save_round(tmp_path, small_model, {}, record(round_index=index), SETTINGS)
        for index in (1, 2, 3)
    ]
    prune_rounds(tmp_path, records, keep=2)
    assert [(tmp_path / r.folder).exists() for r in records] == [False, True, True]
    prune_rounds(tmp_path, records, keep=1, champion=records[1].folder)
    assert [(tmp_path / r.folder).exists() for r in records] == [False, True, True]
