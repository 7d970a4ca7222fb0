import dataclasses
import hashlib
import json
import logging

import pytest
from helpers import REPOSITORY, SHRINK, record

from hf_dash import History, read_history
from hf_dash.history import MAY_DIFFER, Promotion, chained, open_history, write_history


def test_records_come_back_as_they_were(tmp_path):
    history = History(tmp_path / "history.jsonl", {"alpha": 0.3})
    records = [record(), record(round_index=2, shrink=SHRINK), record("cold")]
    for one in records:
        history.append(one)
    back = read_history(tmp_path / "history.jsonl")
    assert back.records == records == history.records
    assert back.settings == {"alpha": 0.3}
    assert records[0].seconds == 2.5
    back.append(record("dash"))
    assert len(read_history(tmp_path / "history.jsonl").records) == 4


def test_names_keep_their_order(tmp_path):
    history = History(tmp_path / "history.jsonl", {"b": 1, "a": 2})
    history.append(record(per_class_accuracy={"9": 0.5, "10": 0.25, "1": 1.0}))
    back = read_history(tmp_path / "history.jsonl")
    assert list(back.settings) == ["b", "a"]
    assert list(back.records[0].per_class_accuracy) == ["9", "10", "1"]


def test_a_round_is_recorded_once(tmp_path):
    history = History(tmp_path / "history.jsonl", {})
    history.append(record())
    before = (tmp_path / "history.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"already has a record of .* \('warm', 0, 1\)"):
        history.append(record(accuracy=0.9))
    assert (tmp_path / "history.jsonl").read_bytes() == before
    assert history.records == [record()]


def test_without_a_path_it_stays_in_memory():
    history = History(None, {})
    history.append(record())
    assert history.records == [record()]


def test_a_failure_while_writing_leaves_the_history_whole(tmp_path, monkeypatch):
    history = History(tmp_path / "history.jsonl", {})
    history.append(record())
    before = (tmp_path / "history.jsonl").read_bytes()

    def full_disk(file_number):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_dash.utils.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        history.append(record(round_index=2))
    assert (tmp_path / "history.jsonl").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["history.jsonl"]
    assert history.records == [record()]


def test_records_are_selected_by_start_and_seed():
    history = History(None, {})
    for start in ("cold", "dash"):
        for seed in (0, 1):
            history.append(record(start, seed))
    assert [(r.start, r.seed) for r in history.select(start="dash")] == [("dash", 0), ("dash", 1)]
    assert [(r.start, r.seed) for r in history.select(seed=1)] == [("cold", 1), ("dash", 1)]


@pytest.mark.parametrize("damage", ["cut", "format", "field", "edited"])
def test_a_damaged_history_of_a_model_is_refused(tmp_path, damage):
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


@pytest.fixture
def grown(tmp_path):
    """A history of two rounds, a promotion and a change of settings, one line each."""
    path = tmp_path / "history.jsonl"
    history = open_history(path, {"alpha": 0.3, "num_rounds": 1}, may_differ={"num_rounds"})
    history.append(record())
    history.append_promotion(Promotion("promote", record().folder, None, "first champion", ""))
    again = open_history(path, {"alpha": 0.3, "num_rounds": 2}, may_differ={"num_rounds"})
    again.append(record(round_index=2))
    return path


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def test_every_entry_is_one_line_that_holds_the_digest_of_the_one_before(grown):
    header, *lines = map(json.loads, lines_of(grown))
    assert header["run"] == {"format": 4, "settings": {"alpha": 0.3, "num_rounds": 1}}
    names = [next(name for name in line if name != "digest") for line in lines]
    assert names == ["round", "promotion", "settings", "round"]
    entries = [line[name] for line, name in zip(lines, names, strict=True)]
    for line, entry in zip(lines, entries, strict=True):
        text = json.dumps(entry, sort_keys=True)
        assert line["digest"] == hashlib.sha256(text.encode()).hexdigest()
    digests = ["", *(line["digest"] for line in lines)]
    assert [entry["previous"] for entry in entries] == digests[:-1]
    assert read_history(grown).head == digests[-1]
    assert read_history(grown).settings == {"alpha": 0.3, "num_rounds": 2}


def test_an_addition_leaves_what_is_there(grown):
    before, inode = grown.read_bytes(), grown.stat().st_ino
    open_history(grown, {"alpha": 0.3, "num_rounds": 2}).append(record(round_index=3))
    assert grown.read_bytes()[: len(before)] == before
    assert grown.stat().st_ino == inode
    assert len(lines_of(grown)) == 6


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_line_changed_by_hand_is_named(grown, number):
    lines = lines_of(grown)
    lines[number - 1] = lines[number - 1].replace(b"0", b"1", 1)
    grown.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=rf"history.jsonl is not a whole .*: line {number} was ch"):
        read_history(grown)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_line_that_is_missing_or_moved_is_named(grown, number):
    lines = lines_of(grown)
    taken = lines.pop(number - 1)
    for others in (lines, [*lines, taken]):
        grown.write_bytes(b"".join(others))
        with pytest.raises(ValueError, match=rf"line {number} has lost the one before"):
            read_history(grown)


def test_a_line_of_another_kind_is_named(grown):
    lines = lines_of(grown)
    for number, line in ((2, lines[1].replace(b'"round"', b'"other"', 1)), (1, lines[1])):
        grown.write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))
        with pytest.raises(ValueError, match=rf"not a whole hf_dash history: line {number}"):
            read_history(grown)


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_torn_last_line_is_said_and_cut_off(grown, left, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_dash"), "propagate", True)
    *whole, last = lines_of(grown)
    grown.write_bytes(b"".join([*whole, last[:left]]))
    # A reader leaves it: it may be a line that is just being written.
    assert len(read_history(grown).records) == 1
    assert lines_of(grown)[-1] == last[:left]
    history = open_history(grown, {"alpha": 0.3, "num_rounds": 2})
    assert "history.jsonl ended in the middle of a line, which was cut off" in caplog.text
    assert grown.read_bytes() == b"".join(whole)
    history.append(record(round_index=2))
    assert grown.read_bytes() == b"".join([*whole, last])


def test_a_file_that_something_else_has_written_gets_no_line(grown):
    one, other = (open_history(grown, {"alpha": 0.3, "num_rounds": 2}) for _ in range(2))
    one.append(record(round_index=3))
    before = grown.read_bytes()
    with pytest.raises(ValueError, match=r"history.jsonl has .* something else has changed it"):
        other.append(record(round_index=4))
    assert grown.read_bytes() == before
    assert len(other.records) == 2


def test_a_file_that_was_not_read_is_not_replaced(grown):
    before = grown.read_bytes()
    with pytest.raises(ValueError, match=r"path must not be there yet, got .*history.jsonl"):
        History(grown, {}).append(record())
    assert grown.read_bytes() == before


@pytest.mark.parametrize("chain", [chained, list])
def test_a_history_of_an_older_version_becomes_lines(tmp_path, chain, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_dash"), "propagate", True)
    whole, path = tmp_path / "history.json", tmp_path / "history.jsonl"
    old = chain([record(), record(round_index=2, shrink=SHRINK, train_accuracy=None)])
    write_history(whole, {"alpha": 0.3}, old)
    for name in (whole, path):
        assert read_history(name).records == old
    before = whole.read_bytes()
    history = open_history(path, {"alpha": 0.3})
    head = history.head
    assert whole.read_bytes() == before
    history.append(record(round_index=3))
    assert "history.json is history.jsonl now" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["history.jsonl"]
    found = read_history(whole)
    assert found.records == [*old, record(round_index=3)]
    assert [one.previous for one in found.records] == [*(one.previous for one in old), head]
    assert found.entries == history.entries
    # A line of the oldest ones is missed too.
    lines = lines_of(path)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="has lost the one before"):
        read_history(path)


def test_a_conversion_that_fails_leaves_the_whole_file(tmp_path, monkeypatch):
    write_history(tmp_path / "history.json", {}, [record()])
    history = open_history(tmp_path / "history.jsonl", {})

    def full_disk(file_number):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_dash.utils.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        history.append(record(round_index=2))
    assert [file.name for file in tmp_path.iterdir()] == ["history.json"]
    assert read_history(tmp_path / "history.json").records == [record()]


def test_what_was_dropped_comes_back(tmp_path):
    history = History(tmp_path / "history.jsonl", {})
    history.append(record())
    history.append_dropped([record().folder], 3)
    found = read_history(tmp_path / "history.jsonl")
    assert found.dropped == history.dropped == {"rounds/001/warm_seed0": 3}
    assert found.records == [record()]
    for folder in ("rounds/001/../..", "/etc", "rounds/001"):
        with pytest.raises(ValueError, match=f"folders must be those of rounds, got '{folder}'"):
            history.append_dropped([folder], 3)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().accuracy = 1.0


def test_the_folder_of_a_round():
    assert record("dash", 2, 13).folder == "rounds/013/dash_seed2"


def test_a_run_goes_on_with_its_own_history_only(tmp_path):
    path = tmp_path / "history.jsonl"
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
    path = tmp_path / "history.jsonl"
    settings = {"augment": False, "streaming": False, "num_workers": 0, "micro_batch_size": None}
    open_history(path, settings, may_differ=MAY_DIFFER).append(record())
    others = {**settings, "num_workers": 2, "micro_batch_size": 8}
    open_history(path, others, may_differ=MAY_DIFFER).append(record(round_index=2))
    (change,) = read_history(path).changes
    assert change.changes == {"num_workers": [0, 2], "micro_batch_size": [None, 8]}


@pytest.mark.parametrize("matter", ["augment", "streaming"])
def test_where_workers_draw_images_their_number_stays(tmp_path, matter):
    path = tmp_path / "history.jsonl"
    open_history(path, {matter: True, "num_workers": 0}, may_differ=MAY_DIFFER).append(record())
    with pytest.raises(ValueError, match="num_workers was 0, is 2"):
        open_history(path, {matter: True, "num_workers": 2}, may_differ=MAY_DIFFER)


def test_promotions_come_back_as_they_were_and_survive_new_records(tmp_path):
    history = History(tmp_path / "history.jsonl", {})
    history.append(record())
    first = Promotion("promote", "rounds/001/a_seed0", None, "first champion", "2025-01-01T00:00Z")
    second = Promotion(
        "reject", "b", "a", "worse", "later", 0.5, {"overall": {"low": -0.1}}, 4, "f"
    )
    for entry in (first, second):
        history.append_promotion(entry)
    history.append(record(round_index=2))
    back = read_history(tmp_path / "history.jsonl")
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
    history = History(tmp_path / "history.jsonl", {})
    history.append(record())

    def full_disk(file_number):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_dash.utils.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        history.append_promotion(Promotion("promote", "a", None, "", ""))
    assert history.promotions == read_history(tmp_path / "history.jsonl").promotions == []


def test_the_committed_histories_read():
    folders = (REPOSITORY / "recipes" / "results").glob("*/history.json")
    for path in sorted(folders):
        assert read_history(path).promotions == []
