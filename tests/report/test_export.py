import hashlib
import json
from dataclasses import replace

import pytest
from helpers import SHRINK, record, tiny_processor, tiny_vit
from huggingface_hub import ModelCard

from hf_dash import History, read_history
from hf_dash.report import (
    CardData,
    CardInfo,
    Chain,
    write_model_folder,
    write_results,
)

DATA = CardData("digits", "test", 360)


@pytest.fixture
def history():
    records = [
        record("dash", hardware="1 × cpu, fp32"),
        record("dash", round_index=2, shrink=SHRINK, hardware="1 × cpu, fp32", weights_sha256=None),
        record("warm"),
    ]
    return History(None, {"lam": 0.3, "output_dir": "/home/me/runs"}, records)


def test_a_run_leaves_tables_and_figures(history, tmp_path):
    tables = write_results(history, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["factors.png", "rounds.png"]
    assert tables.count("| dash ") == 3  # two rounds, one start
    assert "accuracy, old" not in tables


def test_what_was_measured_is_in_the_tables(tmp_path):
    measured = {"before": {"accuracy_old": 1.0}, "after": {"accuracy_old": 0.5}}
    history = History(None, {}, [record(), record(round_index=2, memorization=measured)])
    assert "accuracy, old" in write_results(history, tmp_path)
    assert not (tmp_path / "factors.png").exists()


def with_sums(one, folder):
    """A record with the checksums of the files in a folder."""
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "config.json", "preprocessor_config.json")
        if (folder / name).exists()
    }
    return replace(one, weights_sha256=sums["model.safetensors"], file_sha256=sums)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def export(model, folder, chain):
    write_model_folder(model, folder, chain.info(model))


def test_a_model_is_exported_with_its_own_records(history, small_model, tmp_path):
    export(small_model, tmp_path, Chain(history, "dash", 0, DATA))
    own = read_history(tmp_path / "history.json")
    assert own.records == [history.records[0], with_sums(history.records[1], tmp_path)]
    card = ModelCard.load(tmp_path / "README.md")
    assert "/home/me" not in str(card) + (tmp_path / "history.json").read_text()
    assert "| hardware | 1 × cpu, fp32 |" in " ".join(str(card).split())
    assert own.settings == {"lam": 0.3}
    with pytest.raises(ValueError, match="no record of start 'cold' and seed 0"):
        Chain(history, "cold", 0, DATA)


def test_an_exported_model_is_held_against_its_rival_from_scratch(history, small_model, tmp_path):
    known = {"data_fingerprint": "trained", "held_out_fingerprint": "frozen"}
    parent = {"parent": "rounds/001/dash_seed0", **known}
    parent["weights_sha256"] = None
    records = [record("dash", accuracy=0.25, **known), record("dash", 0, 2, accuracy=0.5, **parent)]
    # Only the second is of the same seed and round.
    others = [(1, 2, 0.875), (0, 2, 0.75), (0, 1, 0.625)]
    records += [record("cold", seed, n, accuracy=a, **known) for seed, n, a in others]
    run = History(None, {}, records)
    (tmp_path / "factors.png").touch()  # of another model, exported here before
    export(small_model, tmp_path, Chain(run, "dash", 0, replace(DATA, dataset_revision="v1")))
    text = (tmp_path / "README.md").read_text()
    assert "| **held-out accuracy** | 25.00% | **50.00%** |       75.00% |" in text
    assert "| `v1` |" in " ".join(text.split())
    assert read_history(tmp_path / "history.json").records == [
        records[0],
        with_sums(records[1], tmp_path),
    ]
    assert not (tmp_path / "factors.png").exists()


def test_a_native_model_is_written_with_its_card_and_history(history, tmp_path):
    records = history.records[:2]
    info = CardInfo("a vit", records, {"lam": 0.3}, "digits", "test", 360)
    write_model_folder(tiny_vit(), tmp_path, info, image_processor=tiny_processor())
    assert names_in(tmp_path) == [
        "README.md",
        "config.json",
        "dash_report.json",
        "factors.png",
        "history.json",
        "model.safetensors",
        "preprocessor_config.json",
        "rounds.png",
    ]
    assert read_history(tmp_path / "history.json").records == [
        records[0],
        with_sums(records[1], tmp_path),
    ]
    text = (tmp_path / "README.md").read_text()
    assert "(rounds.png)" in text
    assert "(factors.png)" in text


def test_the_history_of_a_folder_knows_its_weights_and_the_last_shrink(small_model, tmp_path):
    before = [record("dash", shrink=SHRINK, weights_sha256=None)]
    info = CardInfo("a resnet", before, {}, "digits", "test", 360)
    write_model_folder(small_model, tmp_path, info)
    (own,) = read_history(tmp_path / "history.json").records
    assert own == with_sums(before[0], tmp_path)
    assert json.loads((tmp_path / "dash_report.json").read_text()) == SHRINK
    another = replace(info, records=[record(weights_sha256=None)])
    with pytest.raises(ValueError, match="holds another history, with round 1 of 'dash'"):
        write_model_folder(small_model, tmp_path, another)
    write_model_folder(small_model, tmp_path, another, known=[own])
    assert not (tmp_path / "dash_report.json").exists()
