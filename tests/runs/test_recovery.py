import json
from dataclasses import asdict

import pytest
from helpers import SHRINK, files_below, record, save_round

from hf_dash.history import Promotion, open_history
from hf_dash.runs import recovery
from hf_dash.runs.recovery import read_champion, recover
from hf_dash.runs.store import open_run, read_run, record_promotion

SETTINGS = {"lam": 0.3}


def history_of(folder):
    return open_history(folder / "history.jsonl", SETTINGS)


def test_leftovers_of_a_kill_are_swept_away(small_model, tmp_path):
    saved = save_round(tmp_path, small_model, {}, record(), SETTINGS)
    history = history_of(tmp_path)
    recover(tmp_path, history)
    whole = files_below(tmp_path)
    for leftover in (
        *("rounds/001/.dash_seed0.tmp/model.safetensors", ".history.jsonl.tmp"),
        *(".champion.json.tmp", "model/.aside/config.json", f"{saved.folder}/trained.json"),
    ):
        (tmp_path / leftover).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / leftover).write_bytes(b"half")
    recover(tmp_path, history)
    assert files_below(tmp_path) == whole


def three_rounds(folder, model):
    """A run of three rounds, the second of which is champion."""
    history = history_of(folder)
    for index in (1, 2, 3):
        one = record(round_index=index, shrink=SHRINK if index > 1 else None)
        history.append(save_round(folder, model, {}, one, SETTINGS, history.head))
        if index == 2:
            entry = Promotion("promote", one.folder, None, "first champion", "")
            record_promotion(folder, history, entry)
    return history


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_finished_things_that_are_not_recorded_are_taken_over(small_model, tmp_path, kept):
    whole = three_rounds(tmp_path, small_model)
    content = (tmp_path / "history.jsonl").read_bytes()
    # An older copy: the folders and the champion hold what it lacks, in an unbroken chain.
    older = history_of(tmp_path)
    older.records, older.promotions = [], []
    (tmp_path / "history.jsonl").unlink()
    for entry in whole.entries[:kept]:
        (older.append_promotion if isinstance(entry, Promotion) else older.append)(entry)
    with open_run(tmp_path, SETTINGS) as history:
        assert history.entries == whole.entries
        assert history.head == whole.head
    assert (tmp_path / "history.jsonl").read_bytes() == content
    assert read_run(tmp_path).champion == "rounds/002/warm_seed0"


def test_an_older_history_is_noticed_where_folders_are_newer(small_model, tmp_path):
    older = three_rounds(tmp_path, small_model)
    content = (tmp_path / "history.jsonl").read_bytes()
    reject = Promotion("reject", older.records[2].folder, older.records[1].folder, "worse", "")
    record_promotion(tmp_path, older, reject)  # in the history alone
    one = record(round_index=4)
    older.append(save_round(tmp_path, small_model, {}, one, SETTINGS, older.head))
    (tmp_path / "history.jsonl").write_bytes(content)
    with (
        pytest.raises(ValueError, match=r"history.jsonl is older than rounds/004/warm_seed0"),
        open_run(tmp_path, SETTINGS),
    ):
        pass
    assert (tmp_path / "history.jsonl").read_bytes() == content


def test_an_older_history_is_noticed_where_the_champion_is_newer(small_model, tmp_path):
    history = three_rounds(tmp_path, small_model)
    content = (tmp_path / "history.jsonl").read_bytes()
    for challenger, kind in ((3, "reject"), (3, "force")):
        entry = Promotion(kind, f"rounds/00{challenger}/warm_seed0", None, "", "")
        record_promotion(tmp_path, history, entry)
    (tmp_path / "history.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"history.jsonl is older than champion.json"):
        read_run(tmp_path)


def test_a_damaged_champion_is_refused(small_model, tmp_path):
    three_rounds(tmp_path, small_model)
    entry = asdict(read_champion(tmp_path))
    for damaged in (
        "[]",
        "{",
        json.dumps({**entry, "kind": "x"}),
        json.dumps({**entry, "time": 3}),
    ):
        (tmp_path / "champion.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"champion.json is not a whole promotion"):
            read_run(tmp_path)


def test_another_runs_round_is_not_taken_over(small_model, tmp_path):
    save_round(tmp_path, small_model, {}, record(), {"lam": 0.1})
    with pytest.raises(ValueError, match=r"other settings \(lam was 0.1, is 0.3\)"):
        recover(tmp_path, history_of(tmp_path))


def test_what_is_recorded_is_not_read_again(small_model, tmp_path, monkeypatch):
    history, read, real = three_rounds(tmp_path, small_model), [], recovery.read_history
    monkeypatch.setattr(recovery, "read_history", lambda path: read.append(path) or real(path))
    recover(tmp_path, history)
    assert read == []
    one = record("cold")
    save_round(tmp_path, small_model, {}, one, SETTINGS, history.head)
    recover(tmp_path, history)
    assert read == [tmp_path / one.folder / "history.json"]
    assert history.find("cold", 0, 1) is not None


def test_other_things_among_the_rounds_stay(small_model, tmp_path):
    three_rounds(tmp_path, small_model)
    for name in ("rounds/notes.txt", "rounds/001/mine.txt", "rounds/001/plots/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = files_below(tmp_path)
    assert len(read_run(tmp_path).records) == 3
    assert files_below(tmp_path) == before
