"""A history as a folder of CSV files: what is written is read back, what is damaged is named."""

import gzip
import json
import re
from dataclasses import replace

import pytest

from hf_dash.history import History, RoundRecord
from hf_dash.report import (
    add_series,
    evidence_digest,
    read_evidence,
    read_series,
    starts_table,
    write_evidence,
)
from hf_dash.studies import simulate, write_simulations

CONFIG = {"alpha": 0.3, "lam": 0.3, "grouping": "kernel"}


def shrink(vectors=4, config=CONFIG):
    tensors = [
        ("conv.weight", vectors, 0.41234567, 0.3, 1.0, 3 / vectors),
        ("fc.bias", 1, 0.5, 0.5, 0.5, 0.0),
    ]
    keys = ("name", "num_vectors", "mean_factor", "min_factor", "max_factor", "share_at_lam")
    return {
        "tensors": [dict(zip(keys, tensor, strict=True)) for tensor in tensors],
        "untouched": ["bn.weight"],
        "config": config,
        "num_batches": 20,
        "num_images": 2560,
        "seconds": 1.234567,
        "dry_run": False,
        "mean_factor": (0.41234567 * vectors + 0.5) / (vectors + 1),
        "share_at_lam": 3 / (vectors + 1),
    }


def record(start="cold", seed=0, round_index=1, **changes):
    whole = RoundRecord(
        start=start,
        seed=seed,
        round_index=round_index,
        num_new=1000,
        num_total=1000 * round_index,
        accuracy=0.1 + 0.2,
        per_class_accuracy={"cat, tabby": 1 / 3, "dog": 0.0},
        train_accuracy=1.0,
        converged=True,
        epochs=3.5,
        steps=24 + seed,
        start_seconds=0.123456789,
        train_seconds=12.0,
        parent=None if round_index == 1 else f"rounds/001/{start}_seed{seed}",
        weights_sha256=f"{start}{seed}{round_index}",
        data_fingerprint=f"images {seed} {round_index}",
        images_read=24_000,
        versions={"torch": "2.14.1"},
        hardware="1 × cpu, fp32",
        held_out_fingerprint="held out",
    )
    return replace(whole, **changes)


def everything():
    """Records that use every field, and differ in what most runs share."""
    return [
        record(),
        record(round_index=2, converged=False, train_accuracy=None, epochs=4),
        record(round_index=2, seed=1, images_read=None, weights_sha256=None),
        record("dash", round_index=2, shrink=shrink()),
        record("dash", round_index=3, shrink=shrink(vectors=5), versions={"torch": "2.15.0"}),
        record("dash+lam=0.1", round_index=2, shrink=shrink(config={**CONFIG, "lam": 0.3, "x": 1})),
        record(
            "warm",
            seed=2,
            files=["a.parquet", "b.parquet"],
            skipped=["a.parquet:3"],
            hardware=None,
            per_class_accuracy={"dog": 0.25},
            memorization={"before": {"accuracy_old": 1 / 7}, "after": {"gradient_norm_old": 2e-7}},
        ),
    ]


def as_written(records):
    """Round what a folder rounds."""
    rounded = []
    for one in records:
        report = json.loads(json.dumps(one.shrink))
        if report:
            report["seconds"] = round(report["seconds"], 5)
            for tensor in report["tensors"]:
                tensor["mean_factor"] = round(tensor["mean_factor"], 4)
            for name in ("mean_factor", "share_at_lam"):
                report[name] = pytest.approx(one.shrink[name], abs=5e-5)
        seconds = round(one.start_seconds, 5)
        classes = {name: round(value, 6) for name, value in one.per_class_accuracy.items()}
        rounded.append(
            replace(one, shrink=report, start_seconds=seconds, per_class_accuracy=classes)
        )
    return rounded


def test_what_is_written_is_read_back(tmp_path):
    settings = {"learning_rate": 0.05, "model_args": "{}", "preset": None, "lr_milestones": [6, 12]}
    about = {"commits": ["d4ea7da"], "network": "ResNet"}
    write_evidence(History(None, settings, everything()), tmp_path / "run", about=about)
    found = read_evidence(tmp_path / "run")
    assert found.records == as_written(everything())
    assert found.settings["settings"] == settings
    assert found.settings["about"] == about
    assert starts_table(found.records) == starts_table(everything())
    header, *rows = (tmp_path / "run" / "rounds.csv").read_text().splitlines()
    assert header == (
        "start,seed,round,num_new,num_total,accuracy,train_accuracy,converged,epochs,steps,"
        "start_seconds,train_seconds,images_read,parent,weights_sha256"
    )
    assert (
        rows[0] == "cold,0,1,1000,1000,0.30000000000000004,1,True,3.5,24,0.12346,12,24000,,cold01"
    )


def test_files_without_content_are_not_there(tmp_path):
    write_evidence(History(None, {}, everything()), tmp_path)
    write_evidence(History(None, {}, [record(per_class_accuracy={})]), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rounds.csv", "settings.json"]
    assert read_evidence(tmp_path).records == as_written([record(per_class_accuracy={})])


def test_a_folder_holds_nothing_that_the_one_it_is_like_holds(tmp_path):
    first = [record(s, seed, i) for s in ("cold", "warm") for seed in (1, 2) for i in (1, 2, 3)]
    same = [one for one in first if one.start == "warm" and one.round_index < 3]
    own = [record("cold", 1, i, steps=5) for i in (1, 2)]
    own += [record("dash", 1, 2, shrink=shrink(), data_fingerprint="images 1 2")]
    settings = {"optim": "sgd", "learning_rate": 0.05, "preset": None, "old": 1}
    write_evidence(History(None, settings, first), tmp_path / "first")
    changed = {"optim": "adamw", "learning_rate": 0.05, "preset": None, "new": None}
    history = History(None, changed, [own[0], *same, *own[1:]])
    write_evidence(history, tmp_path / "second", like="first")
    found = read_evidence(tmp_path / "second")
    assert found.records == as_written([*own[:2], *same, own[2]])
    assert found.settings["settings"] == changed
    assert "warm" not in (tmp_path / "second" / "rounds.csv").read_text()
    written = json.loads((tmp_path / "second" / "settings.json").read_text())
    assert written["like"] == {"folder": "first", "starts": ["warm"], "last_round": 2}
    assert written["settings"] == {"optim": "adamw", "new": None}
    assert written["unset"] == ["old"]
    assert not {"records", "data_fingerprint"} & written.keys()


def test_starts_of_a_seed_must_have_been_trained_on_the_same_images(tmp_path):
    history = History(None, {}, [record(), record("warm", data_fingerprint="others")])
    with pytest.raises(ValueError, match=r"one data_fingerprint .* \('warm', 0, 1\)"):
        write_evidence(history, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_history_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="history must have at least one record"):
        write_evidence(History(None, {}), tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("rounds.csv", "cold,0,1,", "cold,0,one,", r"line 2, round must be of type int, got 'one'"),
        ("rounds.csv", "0.30000000000000004", "", r"line 2, accuracy must be of type float"),
        ("rounds.csv", ",True,", ",yes,", r"line 2, converged must be of type bool, got 'yes'"),
        ("rounds.csv", ",steps,", ",step,", r"must have the columns start, seed, .* 'step'"),
        ("rounds.csv", ",24000,,cold01", ",24000", r"line 2 must have 15 cells, got 13"),
        ("rounds.csv", "dash,0,3,", "dash,0,4,", r"rows of rounds.csv, got \[\('dash', 0, 3\)\]"),
        ("per_class.csv.gz", "0.25", "a", r"line 8, dog must be of type float, got 'a'"),
        ("measurements.csv", "2e-07", "x", r"gradient_norm_old must be of type float, got 'x'"),
        ("factors.csv", "0.4123 1 3", "0.4123 1", r"must have the factors of \('dash', 0, 2\)"),
        ("settings.json", "{", "", r"must be JSON"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, file, old, new, message):
    write_evidence(History(None, {}, everything()), tmp_path)
    packed = file.endswith(".gz")
    content = (tmp_path / file).read_bytes()
    text = (gzip.decompress(content) if packed else content).decode()
    assert old in text
    content = text.replace(old, new, 1).encode()
    (tmp_path / file).write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=message) as error:
        read_evidence(tmp_path)
    assert re.search(r"\.(csv|json)\b", str(error.value))


def test_the_digest_is_that_of_the_data(tmp_path):
    history = History(None, {"alpha": 0.3}, everything())
    write_evidence(history, tmp_path / "a", about={"network": "ResNet"})
    write_evidence(history, tmp_path / "b", like="a")
    digests = [evidence_digest(tmp_path / name) for name in "ab"]
    write_evidence(history, tmp_path / "a", about={"network": "ViT"})
    assert [evidence_digest(tmp_path / name) for name in "ab"] == digests
    history.records[0] = replace(history.records[0], accuracy=0.5)
    write_evidence(history, tmp_path / "a")
    assert evidence_digest(tmp_path / "a") != digests[0]
    assert evidence_digest(tmp_path / "b") != digests[1]


def test_series_of_two_runs_are_read_back(tmp_path):
    small = {"num_experiments": 3, "num_points": 100, "gamma": 8}
    runs = [simulate(start, seed=seed, **small) for start in ("warm", "ideal") for seed in (0, 1)]
    for setting, group in (("γ=8", runs[:3]), ("γ=8", runs[2:]), ("γ=9", runs[:1])):
        write_simulations({setting: group}, tmp_path / "run.csv")
        for name in ("all.csv", "all.csv.gz"):
            add_series(tmp_path / "run.csv", tmp_path / name)
    found = read_series(tmp_path / "all.csv")
    assert read_series(tmp_path / "all.csv.gz") == found
    assert (
        gzip.decompress((tmp_path / "all.csv.gz").read_bytes())
        == (tmp_path / "all.csv").read_bytes()
    )
    assert list(found) == [
        *(("γ=8", one.start, str(one.seed)) for one in runs),
        ("γ=9", "warm", "0"),
    ]
    for one, numbers in zip(runs, found.values(), strict=False):
        assert len(numbers) == 4
        for name, values in numbers.items():
            assert values == getattr(one, name).tolist()
