"""The recipes as a user starts them, each by ``accelerate launch`` once, in an empty folder.

The slow tests launch each of them as a fresh interpreter.
"""

import csv
import json
import shutil

import pytest
from helpers import QUICK, REPOSITORY, launch, record
from huggingface_hub import ModelCard

import hf_dash
from hf_dash.report.tables import memorization_table
from hf_dash.runs.round_files import report_of
from hf_dash.studies.pretraining import pretrained_epochs

SMALL = ["--dataset_name", "digits", "--num_rounds", "2", "--examples_per_round", "100", *QUICK]


CIFAR10 = REPOSITORY.parent / "shared" / "data" / "cifar10"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The comparison on digits, two small rounds, one epoch each."""
    folder = tmp_path_factory.mktemp("recipes")
    done = launch("continual_rounds.py", folder, *SMALL, binary=True)
    return folder, done


def test_the_comparison_prints_its_tables_and_writes_its_files(finished):
    folder, done = finished
    output = folder / "runs" / "continual_rounds"
    history = hf_dash.read_history(output / "history.jsonl")
    assert [(r.start, r.round_index) for r in history.records] == [
        (start, index) for start in ("cold", "warm", "dash") for index in (1, 2)
    ]
    assert history.settings["alpha"] == 0.3
    assert history.settings["starts"] == ["cold", "warm", "dash"]
    assert hf_dash.report.rounds_table(history.records) in done.stdout
    assert hf_dash.report.starts_table(history.records) in done.stdout
    assert (output / "rounds.png").stat().st_size > 10_000
    assert "it/s" not in done.stderr
    sentence = hf_dash.report.start_verdict(history.records).sentence
    assert done.stdout.splitlines()[-1] == sentence
    assert "1 seed is too few to choose by" in sentence
    for folder in (output, output / "model"):
        read = hf_dash.report.read_recommendation(folder)
        assert (read.sentence, read.history_digest) == (sentence, history.digest)
        assert sorted(read.label_names) == [str(digit) for digit in range(10)]


def test_the_same_command_finds_everything_done(finished):
    folder, done = finished
    output = folder / "runs" / "continual_rounds"
    before = {path: path.read_bytes() for path in output.rglob("*.*") if path.suffix != ".lock"}
    again = launch("continual_rounds.py", folder, *SMALL, launcher=False, figures=True)
    assert again.stdout == done.stdout
    assert {path: path.read_bytes() for path in before} == before


def test_another_runs_folder_is_refused(finished):
    flags = [*SMALL, "--lam", "0.1"]
    done = launch("continual_rounds.py", finished[0], *flags, check=False, launcher=False)
    assert done.returncode != 0
    assert "belongs to a run with other settings (lam was 0.3, is 0.1)" in done.stderr


def test_files_that_arrive_make_rounds(tmp_path, digits, digits_test):
    (tmp_path / "incoming").mkdir()
    digits_test.to_parquet(tmp_path / "held_out.parquet")
    flags = ["--arrive_by", "files", "--dataset_name", "incoming", "--starts", "warm", *QUICK]
    flags += ["--test_dataset_name", "held_out.parquet", "--output_dir", "run", "--streaming"]
    history = tmp_path / "run" / "history.jsonl"
    for index, day in enumerate(["monday", "tuesday"]):
        part = digits.select(range(60 * index, 60 * index + 60))
        part.to_parquet(tmp_path / "incoming" / f"{day}.parquet")
        launch("continual_rounds.py", tmp_path, *flags, launcher=False)
        last = hf_dash.read_history(history).records[-1]
        assert (last.round_index, last.files) == (index + 1, [f"{day}.parquet"])
        assert (last.num_new, last.num_total) == (60, 60 * (index + 1))
    whole = history.read_bytes()
    done = launch("continual_rounds.py", tmp_path, *flags, launcher=False)
    assert "nothing new in incoming since round 2: no new round" in done.stderr
    assert history.read_bytes() == whole


def test_all_starts_run_on_noisy_labels_with_a_replay(tmp_path):
    flags = ["--starts", "all", "--num_rounds", "2", "--examples_per_round", "40", *QUICK]
    flags += ["--label_noise", "0.2", "--measure_memorization", "--export_start", "dash"]
    flags += ["--max_eval_samples", "60"]
    flags += ["--replay_samples", "0.5", "--replay_strategy", "class_balanced"]
    flags += ["--new_share", "0.5"]
    done = launch("continual_rounds.py", tmp_path, *flags, launcher=False, figures=True)
    records = hf_dash.read_history(tmp_path / "runs/continual_rounds/history.jsonl").records
    second = [r for r in records if r.round_index == 2]
    assert [r.start for r in second] == list(hf_dash.STARTS)
    assert {(r.num_new, r.num_total, r.replay["num_drawn"]) for r in second} == {(40, 60, 20)}
    assert len({r.replay["sha256"] for r in second}) == 1
    assert done.stderr.count("old images are replayed (class_balanced, seed 0): 20 of 40") == 1
    assert memorization_table(records) in done.stdout
    assert (tmp_path / "runs" / "continual_rounds" / "factors.png").exists()


def test_starts_share_the_first_round(finished):
    records = hf_dash.read_history(finished[0] / "runs/continual_rounds/history.jsonl").records
    first = {(r.accuracy, r.train_accuracy, r.steps) for r in records if r.round_index == 1}
    assert len(first) == 1


def test_the_exported_folder_is_whole(finished):
    model_folder = finished[0] / "runs" / "continual_rounds" / "model"
    names = sorted(file.name for file in model_folder.iterdir() if file.name != ".lock")
    assert names == [
        "README.md",
        "config.json",
        "dash_report.json",
        "factors.png",
        "history.json",
        "model.safetensors",
        "recommendation.json",
        "rounds.png",
    ]
    card = ModelCard.load(model_folder / "README.md")
    own = hf_dash.read_history(model_folder / "history.json").records
    assert [r.start for r in own] == ["dash", "dash"]
    assert card.data.eval_results[0].metric_value == own[-1].accuracy
    assert str(finished[0]) not in str(card)
    assert hf_dash.load_model(str(model_folder)).config.num_labels == 10


def test_the_next_round_goes_on_with_the_trainer(finished, tmp_path, digits, digits_test, fresh):
    for name, rows in (("old", range(200)), ("new", range(200, 300))):
        digits.select(rows).to_parquet(tmp_path / f"{name}.parquet")
    digits_test.to_parquet(tmp_path / "test.parquet")
    shutil.copytree(finished[0] / "runs" / "continual_rounds" / "model", tmp_path / "parent")
    flags = ["--model_name_or_path", "parent", "--output_dir", "child", "--disable_tqdm", "true"]
    flags += ["--seen_dataset_names", "old.parquet", "--dataset_name", "new.parquet"]
    flags += ["--test_dataset_name", "test.parquet", "--num_train_epochs", "1"]
    flags += ["--save_strategy", "steps", "--save_steps", "30", "--report_to", "none"]
    launch("retrain_with_trainer.py", tmp_path, *flags, fresh=fresh)

    records = hf_dash.read_history(tmp_path / "child" / "history.json").records
    assert [r.round_index for r in records] == [1, 2, 3]
    last = records[-1]
    assert (last.num_new, last.num_total, last.start) == (100, 300, "dash")
    report = json.loads((tmp_path / "child" / "dash_report.json").read_text())
    assert report_of(tmp_path / "child", last) == report
    assert last.shrink.items() <= report.items()
    assert "tensors" not in last.shrink
    assert last.shrink["num_images"] == 300
    card = ModelCard.load(tmp_path / "child" / "README.md")
    assert card.data.eval_results[0].metric_value == last.accuracy
    assert "| learning_rate " in str(card)

    whole = (tmp_path / "child" / "model.safetensors").read_bytes()
    flags += ["--resume_from_checkpoint", "child/checkpoint-30"]
    launch("retrain_with_trainer.py", tmp_path, *flags, launcher=False)
    resumed = hf_dash.read_history(tmp_path / "child" / "history.json").records[-1]
    assert resumed.shrink == last.shrink
    assert (tmp_path / "child" / "model.safetensors").read_bytes() == whole


def test_the_next_round_follows_a_recommendation(finished, tmp_path):
    parent = finished[0] / "runs" / "continual_rounds" / "model"
    flags = ["--model_name_or_path", str(parent), "--output_dir", "child", "--disable_tqdm", "true"]
    flags += ["--dataset_name", "digits", "--max_train_samples", "60", "--num_train_epochs", "1"]
    flags += ["--max_eval_samples", "60", "--save_strategy", "no", "--report_to", "none"]
    launch("retrain_with_trainer.py", tmp_path, *flags, "--start", "auto", launcher=False)
    last = hf_dash.read_history(tmp_path / "child" / "history.json").records[-1]
    followed = hf_dash.report.read_recommendation(parent)
    assert (last.start, last.shrink) == (followed.start, None) == ("warm", None)
    assert last.images_read == 60
    assert not (tmp_path / "child" / "dash_report.json").exists()
    card = " ".join((tmp_path / "child" / "README.md").read_text().split())
    assert (
        f"The start follows a recommendation (`recommendation.json`): {followed.sentence}" in card
    )

    (tmp_path / "recommendation.json").write_text("{}")
    flags += ["--start", "auto", "--recommendation", "recommendation.json"]
    damaged = launch("retrain_with_trainer.py", tmp_path, *flags, check=False, launcher=False)
    assert damaged.returncode != 0
    assert "recommendation.json is not a whole recommendation" in damaged.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "0"], "alpha must be in (0, 1], got 0.0"),
        (["--seeds", "4-2"], "seeds must be at least 1, or a range such as 1-5, got '4-2'"),
        (["--label_column_name", "digit"], "label_column 'digit' is not a column"),
        (["--image_mode", "L"], "image mode is 'L', but the model takes 3 channels"),
    ],
)
def test_bad_flags_end_with_a_clear_message(tmp_path, flags, message):
    done = launch("continual_rounds.py", tmp_path, *flags, check=False, launcher=False)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="the CIFAR-10 files are not beside the project")
def test_cifar10_streams_through_the_comparison(tmp_path):
    flags = ["--dataset_name", str(CIFAR10), "--streaming", "--num_rounds", "3"]
    flags += ["--examples_per_round", "100", "--starts", "warm", "dash", *QUICK]
    flags += ["--max_eval_samples", "200"]
    launch("continual_rounds.py", tmp_path, *flags, launcher=False)
    records = hf_dash.read_history(tmp_path / "runs/continual_rounds/history.jsonl").records
    assert [r.num_total for r in records] == [100, 200, 300] * 2
    assert set(records[0].per_class_accuracy) >= {"airplane", "truck"}


def test_the_input_benchmark_compares_all_ways(tmp_path):
    flags = ["--num_examples", "64", "--num_rounds", "2", "--batch_size", "16", "--repeats", "1"]
    done = launch("benchmarks/input.py", tmp_path, *flags, "--num_workers", "0", launcher=False)
    lines = done.stdout.splitlines()
    assert [line[2:5] for line in lines if line.startswith("| (")] == [f"({w})" for w in "abcde"]
    assert "1.000 (1.000 … 1.000)" in done.stdout


def test_the_counts_of_the_input_benchmark_are_right(tmp_path):
    flags = ["--num_images", "8", "--size", "40", "--image_size", "32", "--workers", "0"]
    done = launch("benchmarks/input_counts.py", tmp_path, *flags, launcher=False)
    rows = [line.rsplit(",", 8) for line in done.stdout.splitlines() if line.count(",") >= 8]
    counts = {row[0].strip('"'): [int(r[3]) for r in rows if r[0] == row[0]] for row in rows[1:]}
    assert counts == {
        "Pillow, decode alone": [8],
        "hf_dash, kept": [8, 0],
        "hf_dash, not kept": [8, 8],
        "datasets, plain DataLoader": [8, 8],
    }


@pytest.mark.slow
def test_the_decoding_benchmark_measures_every_way_that_is_installed(tmp_path):
    flags = ["--num_images", "8", "--size", "40", "--image_size", "32", "--repeats", "1"]
    done = launch("benchmarks/decoding.py", tmp_path, *flags, launcher=False)
    rows = {row["way"]: row for row in csv.DictReader(done.stdout.splitlines())}
    assert {"pillow_alone", "hf_dash", "hf_dash, streaming, kept", "datasets"} <= rows.keys()
    assert all(float(row["CPU-ms per image"]) > 0 for row in rows.values())


def test_the_history_benchmark_counts_what_an_addition_writes(tmp_path):
    flags = ["--records", "3", "30", "--repeats", "1"]
    done = launch("benchmarks/history.py", tmp_path, *flags, launcher=False)
    rows = list(csv.DictReader(done.stdout.splitlines()[-5:]))
    written = {(row["way"], int(row["records"])): int(row["bytes to add"]) for row in rows}
    assert written["whole", 30] > 5 * written["whole", 3]
    # A line; the number of its round has one digit more.
    assert written["lines", 30] == written["lines", 3] + 1 < 2000


def test_the_learning_framework_is_swept(tmp_path, fresh):
    flags = ["--num_points", "100", "--num_experiments", "4", "--num_test_points", "0"]
    flags += ["--seeds", "2", "--sweep", "gamma", "5", "20", "--output_dir", "out"]
    done = launch("learning_framework.py", tmp_path, *flags, fresh=fresh)
    sizes = {"num_points": 100, "num_experiments": 4, "num_test_points": 0}
    expected = {
        f"C=2 K=50 N=100 γ={gamma} τ=3": [
            hf_dash.studies.simulate(start, seed=seed, gamma=gamma, **sizes)
            for start in ("random", "warm", "ideal", "partial")
            for seed in (0, 1)
        ]
        for gamma in (5, 20)
    }
    assert hf_dash.studies.simulations_table(expected) in done.stdout
    hf_dash.studies.write_simulations(expected, tmp_path / "expected.csv")
    output = tmp_path / "out"
    assert (output / "simulations.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    assert (output / "simulations.png").stat().st_size > 10_000
    wrong = launch(
        "learning_framework.py", tmp_path, "--sweep", "delta", "1", check=False, launcher=False
    )
    assert wrong.returncode != 0
    assert "sweep must be one of ['num_classes', " in wrong.stderr


def test_lengths_of_pretraining_are_compared(tmp_path, fresh):
    flags = ["--num_examples", "80", "--pretrain_epochs", "1", "2", "--starts", "warm", *QUICK]
    flags += ["--max_eval_samples", "60"]
    done = launch("memorization.py", tmp_path, *flags, fresh=fresh)
    output = tmp_path / "runs" / "memorization"
    records = hf_dash.read_history(output / "history.jsonl").records
    lengths = [pretrained_epochs(r, records) for r in records if r.start == "warm"]
    assert lengths == [1, 2]
    assert [r.num_total for r in records if r.start == "pretraining"] == [40, 40]
    assert hf_dash.studies.pretraining_table(records) in done.stdout
    assert (output / "pretraining.png").stat().st_size > 10_000
    assert "flipped_reproduced" in records[-1].memorization["after"]
    wrong = launch("memorization.py", tmp_path, "--num_examples", "3", check=False, launcher=False)
    assert "num_examples must be even, at least 2, got 3" in wrong.stderr


def test_the_framework_benchmark_compares_with_the_plain_loops(tmp_path):
    flags = ["--num_experiments", "2", "--loop_experiments", "1", "--repeats", "1"]
    flags += ["--figure_seeds", "1"]
    flags += ["--num_test_points", "100"]
    done = launch("benchmarks/framework.py", tmp_path, *flags, launcher=False)
    lines = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    names = [line[1].strip() for line in lines]
    assert names[2:] == ["random", "warm", "ideal", "partial"]
    assert "\n1 seeds of all starts with figure: " in done.stdout


def test_starts_are_compared_without_training(tmp_path, fresh):
    for start, gain in (("cold", 0.0), ("dash", 0.1)):
        records = [
            record(start, seed=seed, round_index=index, accuracy=0.4 + gain)
            for seed in (0, 1, 2)
            for index in (1, 2)
        ]
        hf_dash.history.write_history(tmp_path / f"{start}.json", {"starts": [start]}, records)
    histories = ("--histories", "cold.json", "dash.json", "--skip_seeds", "0")
    histories = (*histories, "--output_dir", "both")
    printed = launch("compare_starts.py", tmp_path, *histories, fresh=fresh).stdout
    cells = [cell.strip() for cell in printed.split("|")]
    assert cells[cells.index("dash") :][:3] == ["dash", "2", "50.00 ± 0.00 %"]
    assert "+10.00 (+10.00 … +10.00)" in printed
    joined = hf_dash.read_history(tmp_path / "both" / "history.json")
    assert {(r.start, r.seed) for r in joined.records} == {
        (start, seed) for start in ("cold", "dash") for seed in (1, 2)
    }
    assert (tmp_path / "both" / "rounds.png").stat().st_size > 10_000
