import json
import logging
import os
from dataclasses import replace

import pytest
import torch
from helpers import SHRINK, files_below, record, same_state, save_round, state_of

import hf_dash
from hf_dash.history import open_history, read_history
from hf_dash.runs import store
from hf_dash.runs.round_files import report_of
from hf_dash.runs.store import (
    find_trained,
    finish_round,
    load_optimizer_state,
    load_trained_,
    load_weights_,
    open_model_folder,
    open_run,
    read_run,
    save_trained,
)

SETTINGS = {"lam": 0.3}

MOMENTUM = {"timm_model.fc.weight::momentum_buffer": torch.ones(10, 32)}


@pytest.fixture
def saved(small_model, tmp_path):
    return save_round(tmp_path, small_model, MOMENTUM, record(), SETTINGS)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_dash"), "propagate", True)
    return caplog


def test_a_round_comes_back_as_it_was(saved, small_model, tmp_path):
    expected = state_of(small_model)
    with torch.no_grad():
        for parameter in small_model.parameters():
            parameter.zero_()
    load_weights_(small_model, tmp_path, saved)
    assert same_state(state_of(small_model), expected)
    momentum = load_optimizer_state(tmp_path, saved)
    assert list(momentum) == ["timm_model.fc.weight::momentum_buffer"]
    found = read_history(tmp_path / saved.folder / "history.json")
    assert found.records == [saved]
    assert found.settings == SETTINGS
    assert hf_dash.load_model(str(tmp_path / saved.folder)).config.num_labels == 10
    assert set(saved.file_sha256) == {"model.safetensors", "config.json", "optimizer.safetensors"}
    assert saved.file_sha256["model.safetensors"] == saved.weights_sha256


def test_a_round_without_optimizer_state(small_model, tmp_path):
    saved = save_round(tmp_path, small_model, {}, record(), SETTINGS)
    assert load_optimizer_state(tmp_path, saved) == {}


def test_a_round_is_saved_once(saved, small_model, tmp_path):
    with pytest.raises(ValueError, match=r"001/warm_seed0 is there already"):
        save_round(tmp_path, small_model, {}, record(), SETTINGS)


@pytest.mark.parametrize("where", ["save_model", "save_file", "flush_folder"])
def test_a_full_disk_leaves_nothing_behind(where, small_model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, where, full)
    with pytest.raises(
        OSError, match=r"warm_seed0 could not be saved: .*No space left.*same command"
    ):
        save_round(tmp_path, small_model, {"a": torch.zeros(1)}, record(), SETTINGS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_weights_that_are_not_finite_are_not_saved(small_model, tmp_path):
    with torch.no_grad():
        small_model.timm_model.conv1[1].running_var[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"'timm_model.conv1.1.running_var' for one"):
        save_trained(tmp_path, small_model, {}, record(), SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_changed_or_vanished_are_refused(saved, small_model, tmp_path):
    with pytest.raises(ValueError, match="its checksum differs"):
        load_weights_(small_model, tmp_path, replace(saved, weights_sha256="0" * 64))
    (tmp_path / saved.folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is gone: the next round cannot"):
        load_weights_(small_model, tmp_path, saved)


@pytest.mark.parametrize("name", ["config.json", "optimizer.safetensors", "model.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_every_file_of_a_round_is_verified(saved, small_model, tmp_path, name, how):
    path, before = tmp_path / saved.folder / name, state_of(small_model)
    content = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name} is (gone|not what .* its checksum differs)"):
        load_weights_(small_model, tmp_path, saved)
    assert same_state(state_of(small_model), before)
    if name == "optimizer.safetensors":
        with pytest.raises(ValueError, match=r"optimizer.safetensors is"):
            load_optimizer_state(tmp_path, saved)


def test_the_report_of_a_shrink_is_kept_beside_the_weights(small_model, tmp_path):
    one = record(shrink={**SHRINK, "untouched": ["norm.weight"]})
    saved = save_round(tmp_path, small_model, {}, one, SETTINGS)
    assert saved.shrink == {k: v for k, v in SHRINK.items() if k != "tensors"}
    folder = tmp_path / saved.folder
    assert json.loads((folder / "dash_report.json").read_text()) == one.shrink
    assert report_of(folder, saved) == one.shrink
    for text in ("{}", (folder / "dash_report.json").read_text().replace("0.4", "0.9")):
        (folder / "dash_report.json").write_text(text)
        with pytest.raises(ValueError, match=r"dash_report.json is not what its round's record"):
            report_of(folder, saved)
    (folder / "dash_report.json").unlink()
    with pytest.raises(ValueError, match=r"dash_report.json is gone: the factors of a shrink"):
        report_of(folder, saved)
    # The next round needs the weights alone.
    load_weights_(small_model, tmp_path, saved)


ORIGIN = {"data_fingerprint": "images", "parent": "rounds/000/warm_seed0", "parent_sha256": None}


@pytest.fixture
def trained(small_model, tmp_path):
    """A round that was trained and not evaluated."""
    return save_trained(tmp_path, small_model, MOMENTUM, record(**ORIGIN), SETTINGS)


def history_of(folder, settings=SETTINGS, **options):
    return open_history(folder / "history.jsonl", settings, **options)


def test_what_was_trained_is_taken_up_and_finished(trained, small_model, tmp_path):
    expected = state_of(small_model)
    with torch.no_grad():
        small_model.timm_model.fc.weight.zero_()
    assert find_trained(tmp_path, history_of(tmp_path), trained.folder, ORIGIN) == trained
    momentum = load_trained_(small_model, tmp_path, trained)
    assert same_state(momentum, MOMENTUM)
    assert same_state(state_of(small_model), expected)
    done = finish_round(tmp_path, replace(trained, accuracy=0.75), SETTINGS)
    assert sorted(path.name for path in (tmp_path / done.folder).iterdir()) == [
        *("config.json", "history.json", "model.safetensors", "optimizer.safetensors")
    ]
    assert read_history(tmp_path / done.folder / "history.json").records[0].accuracy == 0.75
    assert find_trained(tmp_path, history_of(tmp_path), trained.folder, ORIGIN) is None


@pytest.mark.parametrize("name", ORIGIN)
def test_what_was_trained_on_or_from_something_else_is_not_taken_up(trained, tmp_path, name):
    other = {**ORIGIN, name: "another"}
    assert find_trained(tmp_path, history_of(tmp_path), trained.folder, other) is None


def test_what_was_trained_otherwise_or_has_changed_is_not_taken_up(trained, tmp_path, warnings):
    other = history_of(tmp_path, {"lam": 0.1})
    assert find_trained(tmp_path, other, trained.folder, ORIGIN) is None
    assert "is trained again: " in warnings.text
    kept = tmp_path / "rounds" / "001" / ".warm_seed0.trained"
    (kept / "model.safetensors").write_bytes(b"half")
    assert find_trained(tmp_path, history_of(tmp_path), trained.folder, ORIGIN) is None
    assert "its checksum differs" in warnings.text


def test_a_finish_that_fails_keeps_what_was_trained(trained, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "flush_folder", full)
        with pytest.raises(OSError, match="finishes it without training again"):
            finish_round(tmp_path, trained, SETTINGS)
    assert find_trained(tmp_path, history_of(tmp_path), trained.folder, ORIGIN) == trained


def test_a_run_is_open_once(tmp_path):
    with open_run(tmp_path / "run", SETTINGS) as history:
        assert (history.records, history.settings) == ([], SETTINGS)
        # In one process calls may be nested: an export locks its folder too.
        with open_model_folder(tmp_path / "run"):
            pass
    with pytest.raises(ValueError, match=r"output_dir must hold the history\.jsonl of a run"):
        read_run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_model_folder_is_put_in_order_first(tmp_path):
    pending = tmp_path / ".pending"
    pending.mkdir()
    (pending / "config.json").write_text("new")
    (pending / "stale.json").write_text('["factors.png"]')
    (tmp_path / ".aside").mkdir()
    # A kill leaves single files too.
    (tmp_path / ".history.jsonl.tmp").write_text("half")
    for name in ("config.json", "factors.png", "mine.txt"):
        (tmp_path / name).write_text("old")
    with open_model_folder(tmp_path):
        assert files_below(tmp_path) == {"config.json": b"new", "mine.txt": b"old"}
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "mine.txt"]
