import hashlib
import json
from dataclasses import replace

import pytest
from helpers import record, tiny_processor, tiny_vit
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from hf_dash import DashCallback, History, read_history
from hf_dash._version import library_versions
from hf_dash.data.rounds import joint_fingerprint
from hf_dash.report import (
    CardData,
    CardInfo,
    Chain,
    trainer_record,
    training_settings,
    write_model_folder,
    write_results,
)

DATA = CardData("digits", "test", 360)


SHRINK = {
    "config": {"alpha": 0.3, "lam": 0.3, "grouping": "kernel"},
    "num_batches": 20,
    "num_images": 60,
    "seconds": 0.5,
    "mean_factor": 0.4,
    "share_at_lam": 0.2,
    "tensors": [
        {
            "name": "timm_model.fc.weight",
            "num_vectors": 10,
            "mean_factor": 0.4,
            "min_factor": 0.3,
            "max_factor": 0.9,
            "share_at_lam": 0.2,
        }
    ],
}


@pytest.fixture
def history():
    records = [
        record("dash", hardware="1 × cpu, fp32"),
        record("dash", round_index=2, shrink=SHRINK, hardware="1 × cpu, fp32"),
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


def export(model, folder, chain):
    write_model_folder(model, folder, chain.info(model))


def test_a_model_is_exported_with_its_own_records(history, small_model, tmp_path):
    export(small_model, tmp_path, Chain(history, "dash", 0, DATA))
    own = read_history(tmp_path / "history.json")
    assert own.records == history.records[:2]
    card = ModelCard.load(tmp_path / "README.md")
    assert "/home/me" not in str(card) + (tmp_path / "history.json").read_text()
    assert "| hardware | 1 × cpu, fp32 |" in " ".join(str(card).split())
    assert own.settings == {"lam": 0.3}
    with pytest.raises(ValueError, match="no record of start 'cold' and seed 0"):
        Chain(history, "cold", 0, DATA)


def test_an_exported_model_is_held_against_its_rival_from_scratch(history, small_model, tmp_path):
    known = {"data_fingerprint": "trained", "held_out_fingerprint": "frozen"}
    parent = {"parent": "rounds/001/dash_seed0", **known}
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
    assert read_history(tmp_path / "history.json").records == records[:2]
    assert not (tmp_path / "factors.png").exists()


def test_a_native_model_is_written_with_its_card_and_history(history, tmp_path):
    records = history.records[:2]
    info = CardInfo("a vit", records, {"lam": 0.3}, "digits", "test", 360)
    write_model_folder(tiny_vit(), tmp_path, info, image_processor=tiny_processor())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "dash_report.json",
        "factors.png",
        "history.json",
        "model.safetensors",
        "preprocessor_config.json",
        "rounds.png",
    ]
    assert read_history(tmp_path / "history.json").records == records
    text = (tmp_path / "README.md").read_text()
    assert "(rounds.png)" in text
    assert "(factors.png)" in text


def test_the_history_of_a_folder_knows_its_weights_and_the_last_shrink(small_model, tmp_path):
    before = [record("dash", shrink=SHRINK, weights_sha256=None)]
    info = CardInfo("a resnet", before, {}, "digits", "test", 360)
    write_model_folder(small_model, tmp_path, info)
    (own,) = read_history(tmp_path / "history.json").records
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert own == replace(before[0], weights_sha256=hashlib.sha256(weights).hexdigest())
    assert json.loads((tmp_path / "dash_report.json").read_text()) == SHRINK
    write_model_folder(small_model, tmp_path, replace(info, records=[record()]))
    assert not (tmp_path / "dash_report.json").exists()


@pytest.mark.parametrize("steps", [2, 6])
def test_the_record_of_a_trainers_round(two_rounds, small_model, tmp_path, steps):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=40,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
    )
    round_, callback = two_rounds[1], DashCallback(num_batches=1)
    trainer = Trainer(small_model, args, train_dataset=round_.examples, callbacks=[callback])
    seconds = trainer.train().metrics["train_runtime"]
    metrics = {"accuracy": 0.5, "per_class_accuracy": {3: 0.25, 0: 0.75}}
    held_out = two_rounds[0].new
    made = trainer_record(
        trainer, round_, metrics, train_seconds=seconds, parent="runs/a", held_out=held_out
    )
    assert (made.start, made.seed, made.round_index, made.parent) == ("dash", 7, 2, "runs/a")
    assert (made.num_new, made.num_total, made.steps) == (60, 120, steps)
    assert made.per_class_accuracy == {"3": 0.25, "0": 0.75}
    assert made.shrink["num_images"] == callback.report.num_images
    assert made.seconds == pytest.approx(seconds)
    # Two steps are no whole epoch of three, of which alone it is known what they read.
    report = json.loads((tmp_path / "dash_report.json").read_text())
    expected = None if steps == 2 else 2 * 120 + report["num_images"]
    assert made.images_read == expected
    assert (made.hardware, made.versions) == ("1 × cpu, fp32", library_versions())
    assert made.data_fingerprint == round_.fingerprint
    # One arrival or one part of several: the same images are the same.
    assert made.held_out_fingerprint == joint_fingerprint([two_rounds[0].new])


def test_the_settings_of_a_trainer_tell_what_was_changed_and_no_secret(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "home"),
        hub_token="hf_secret",
        hub_model_id="user/name",
        run_name="mine",
        resume_from_checkpoint=str(tmp_path / "home"),
        label_smoothing_factor=0.1,
        optim="sgd",
        gradient_accumulation_steps=2,
        use_cpu=True,
    )
    settings = training_settings(args)
    assert settings["label_smoothing_factor"] == "0.1"
    assert settings["gradient_accumulation_steps"] == "2"
    assert (settings["optim"], settings["lr_scheduler_type"]) == ("sgd", "linear")
    assert (settings["learning_rate"], settings["world_size"]) == ("5e-05", 1)
    assert not {"adam_beta1", "accelerator_config", "max_grad_norm"} & set(settings)
    assert not [text for text in ("secret", "home", "user/name", "mine") if text in str(settings)]
    json.dumps(settings)
