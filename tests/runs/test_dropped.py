import logging

import pytest
from helpers import SHRINK, record, save_round

import hf_dash
from hf_dash.history import Promotion, open_history, read_history
from hf_dash.runs import dropped
from hf_dash.runs.dropped import check_kept, drop_rounds
from hf_dash.runs.store import open_run, record_promotion


def make_run(folder, model, starts=("warm",), num_rounds=3, settings=None):
    """A run of these starts, one after another, whose second round of all began with a shrink."""
    history = open_history(folder / "history.jsonl", settings or {})
    for start in starts:
        for index in range(1, num_rounds + 1):
            one = record(start, round_index=index, shrink=SHRINK if index == 2 else None)
            history.append(save_round(folder, model, {}, one, history.settings, history.head))
    return history


def kept(folder):
    """The rounds that still have weights."""
    paths = sorted(folder.glob("rounds/*/*/model.safetensors"))
    return [f"{path.parent.parent.name} {path.parent.name}" for path in paths]


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_dash"), "propagate", True)
    caplog.set_level(logging.INFO, "hf_dash")
    return caplog


def test_old_rounds_are_dropped_and_their_records_and_reports_stay(small_model, tmp_path, said):
    history = make_run(tmp_path, small_model)
    records = list(history.records)
    assert drop_rounds(tmp_path, history, 2) == ["rounds/001/warm_seed0"]
    assert kept(tmp_path) == ["002 warm_seed0", "003 warm_seed0"]
    assert not (tmp_path / "rounds" / "001").exists()
    assert "save_total_limit 2 drops the weights of rounds/001/warm_seed0" in said.text
    assert drop_rounds(tmp_path, history, 1) == ["rounds/002/warm_seed0"]
    assert [path.name for path in (tmp_path / "rounds/002/warm_seed0").iterdir()] == [
        "dash_report.json"
    ]
    assert drop_rounds(tmp_path, history, 1) == []
    found = read_history(tmp_path / "history.jsonl")
    assert found.records == records
    assert found.dropped == {"rounds/001/warm_seed0": 2, "rounds/002/warm_seed0": 1}
    # The report that stays still completes the record.
    joined = hf_dash.report.join_histories([tmp_path / "history.jsonl"])
    assert joined.records[1].shrink == SHRINK


def test_the_champion_stays(small_model, tmp_path):
    history = make_run(tmp_path, small_model)
    first = Promotion("promote", history.records[0].folder, None, "first champion", "")
    record_promotion(tmp_path, history, first)
    drop_rounds(tmp_path, history, 1)
    assert kept(tmp_path) == ["001 warm_seed0", "003 warm_seed0"]
    second = Promotion("promote", history.records[2].folder, first.challenger, "better", "")
    record_promotion(tmp_path, history, second)
    drop_rounds(tmp_path, history, 1)
    assert kept(tmp_path) == ["003 warm_seed0"]


def test_a_first_round_stays_while_a_start_has_not_begun(small_model, tmp_path):
    settings = {"starts": ["warm", "cold"]}
    history = make_run(tmp_path, small_model, ["warm"], 2, settings)
    assert drop_rounds(tmp_path, history, 1) == []
    history = make_run(tmp_path, small_model, ["cold"], 2, settings)
    # Only the starts that are named.
    assert drop_rounds(tmp_path, history, 1, [("cold", 0)]) == ["rounds/001/cold_seed0"]
    assert drop_rounds(tmp_path, history, 1) == ["rounds/001/warm_seed0"]
    assert kept(tmp_path) == ["002 cold_seed0", "002 warm_seed0"]


def test_a_kill_in_the_middle_is_finished_by_the_next_call(small_model, tmp_path, monkeypatch):
    history = make_run(tmp_path, small_model)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dropped, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            drop_rounds(tmp_path, history, 1)
    assert len(kept(tmp_path)) == 3
    with open_run(tmp_path, {}) as again:
        assert again.entries == history.entries
    assert kept(tmp_path) == ["003 warm_seed0"]


def test_what_a_link_leads_to_is_not_removed(small_model, tmp_path):
    history = make_run(tmp_path / "run", small_model, num_rounds=2)
    folder, elsewhere = tmp_path / "run" / history.records[0].folder, tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    drop_rounds(tmp_path / "run", history, 1)
    assert (elsewhere / "model.safetensors").is_file()


def test_what_needs_a_dropped_round_says_so(small_model, tmp_path, digits, accelerator):
    history = make_run(tmp_path, small_model)
    first, last = history.records[0], history.records[-1]
    drop_rounds(tmp_path, history, 1)
    says = "rounds/001/warm_seed0 has no weights to {}: save_total_limit 1 has dropped them"
    with pytest.raises(ValueError, match=says.format("start round 2 from")):
        check_kept(history, first, "start round 2 from")
    check_kept(history, last, "start round 4 from")
    for argument, rounds in (("challenger", [first]), ("champion", [last, first])):
        names = [one.folder for one in rounds]
        champion = names[1] if argument == "champion" else None
        with pytest.raises(ValueError, match=says.format(f"be {argument}")):
            hf_dash.promote(tmp_path, names[0], [], champion=champion, accelerator=accelerator)
    promoted = Promotion("promote", last.folder, None, "first champion", "")
    record_promotion(tmp_path, history, promoted)
    with pytest.raises(ValueError, match=says.format("be to")):
        hf_dash.rollback(tmp_path, first.folder)
    data = hf_dash.report.CardData("digits", "test", 360)
    chain = hf_dash.report.Chain(history, "warm", 0, data).until(first)
    with pytest.raises(ValueError, match=says.format("export")):
        hf_dash.report.export_round(small_model, tmp_path, chain)
