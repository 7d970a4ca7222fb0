import dataclasses
import json

import pytest
from helpers import REPOSITORY, SHRINK, record

from hf_dash import History, read_history
from hf_dash.history import MAY_DIFFER, Promotion, open_history, write_history


def test_records_come_back_as_they_were(tmp_path):
    history = History(tmp_path / "history.json", {"alpha": 0.3})
    records = [record(), record(round_index=2, shrink=SHRINK), record("cold")]
    for one in records:
        history.append(one)
    back = read_history(tmp_path / "history.json")
    assert back.records == records == history.records
    assert back.settings == {"alpha": 0.3}
    assert records[0].seconds == 2.5
    back.append(record("dash"))
    assert len(read_history(tmp_path / "history.json").records) == 4


def test_a_round_is_recorded_once(tmp_path):
    history = History(tmp_path / "history.json", {})
    history.append(record())
    before = (tmp_path / "history.json").read_bytes()
    with pytest.raises(ValueError, match=r"already has a record of .* \('warm', 0, 1\)"):
        history.append(record(accuracy=0.9))
    assert (tmp_path / "history.json").read_bytes() == before
    assert history.records == [record()]


def test_without_a_path_it_stays_in_memory():
    history = History(None, {})
    history.append(record())
    assert history.records == [record()]


def test_a_failure_while_writing_leaves_the_history_whole(tmp_path, monkeypatch):
    history = History(tmp_path / "history.json", {})
    history.append(record())
    before = (tmp_path / "history.json").read_bytes()

    def full_disk(file_number):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_dash.utils.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        history.append(record(round_index=2))
    assert (tmp_path / "history.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["history.json"]
    assert history.records == [record()]


def test_records_are_selected_by_start_and_seed():
    history = History(None, {})
    for start in ("cold", "dash"):
        for seed in (0, 1):
            history.append(record(start, seed))
    assert [(r.start, r.seed) for r in history.select(start="dash")] == [("dash", 0), ("dash", 1)]
    assert [(r.start, r.seed) for r in history.select(seed=1)] == [("cold", 1), ("dash", 1)]


@pytest.mark.parametrize("damage", ["cut", "format", "field", "edited"])
def test_a_damaged_history_is_refused(tmp_path, damage):
    path = tmp_path / "history.json"
    write_history(path, {}, [record()])
    content = json.loads(path.read_text())
    if damage == "format":
        content["format"] = 99
    if damage == "field":
        del content["records"][0]["accuracy"]
    if damage == "edited":
        content["records"][0]["accuracy"] = 0.99
    text = json.dumps(content)
    path.write_text(text[:-20] if damage == "cut" else text)
    with pytest.raises(ValueError, match=r"history.json is not a whole hf_dash history"):
        read_history(path)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().accuracy = 1.0


def test_the_folder_of_a_round():
    assert record("dash", 2, 13).folder == "rounds/013/dash_seed2"


def test_a_run_goes_on_with_its_own_history_only(tmp_path):
    path = tmp_path / "history.json"
    settings = {"alpha": 0.3, "starts": ("dash",), "num_rounds": 2}
    open_history(path, settings).append(record())
    again = open_history(path, {**settings, "num_rounds": 3}, may_differ={"num_rounds"})
    assert again.records == [record()]
    assert again.find("warm", 0, 1) == record()
    assert again.find("warm", 0, 2) is None
    again.append(record(round_index=2))
    assert read_history(path).settings["num_rounds"] == 3
    with pytest.raises(ValueError, match=r"other settings \(alpha was 0.3, is 0.1\): give its"):
        open_history(path, {**settings, "alpha": 0.1, "num_rounds": 3})
    assert open_history(None, settings).records == []


def test_settings_that_change_no_result_may_change_on_record(tmp_path):
    path = tmp_path / "history.json"
    settings = {"augment": False, "streaming": False, "num_workers": 0, "micro_batch_size": None}
    open_history(path, settings, may_differ=MAY_DIFFER).append(record())
    others = {**settings, "num_workers": 2, "micro_batch_size": 8}
    open_history(path, others, may_differ=MAY_DIFFER).append(record(round_index=2))
    (change,) = read_history(path).changes
    assert change.changes == {"num_workers": [0, 2], "micro_batch_size": [None, 8]}


@pytest.mark.parametrize("matter", ["augment", "streaming"])
def test_where_workers_draw_images_their_number_stays(tmp_path, matter):
    path = tmp_path / "history.json"
    open_history(path, {matter: True, "num_workers": 0}, may_differ=MAY_DIFFER).append(record())
    with pytest.raises(ValueError, match="num_workers was 0, is 2"):
        open_history(path, {matter: True, "num_workers": 2}, may_differ=MAY_DIFFER)


def test_promotions_come_back_as_they_were_and_survive_new_records(tmp_path):
    history = History(tmp_path / "history.json", {})
    history.append(record())
    first = Promotion("promote", "rounds/001/a_seed0", None, "first champion", "2025-01-01T00:00Z")
    second = Promotion(
        "reject", "b", "a", "worse", "later", 0.5, {"overall": {"low": -0.1}}, 4, "f"
    )
    for entry in (first, second):
        history.append_promotion(entry)
    history.append(record(round_index=2))
    back = read_history(tmp_path / "history.json")
    assert back.promotions == history.promotions == [first, second]
    assert len(back.records) == 2


def test_the_champion_is_the_last_model_taken():
    history = History(None, {})
    assert history.champion is None
    expected = [("reject", "a", None), ("promote", "b", "b"), ("reject", "c", "b")]
    expected += [("force", "c", "c"), ("rollback", "b", "b")]
    for kind, challenger, champion in expected:
        history.append_promotion(Promotion(kind, challenger, None, "", ""))
        assert history.champion == champion


def test_an_unknown_kind_of_promotion_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'demote'"):
        Promotion("demote", "a", None, "", "")


def test_a_failed_write_leaves_the_promotions_as_they_were(tmp_path, monkeypatch):
    history = History(tmp_path / "history.json", {})
    history.append(record())

    def full_disk(file_number):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_dash.utils.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        history.append_promotion(Promotion("promote", "a", None, "", ""))
    assert history.promotions == read_history(tmp_path / "history.json").promotions == []


def test_the_committed_histories_read():
    folders = (REPOSITORY / "recipes" / "results").glob("*/history.json")
    for path in sorted(folders):
        assert read_history(path).promotions == []
