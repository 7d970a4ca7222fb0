"""One production round by the recipes: retrained with the Trainer, promoted, rolled back."""

import json
from dataclasses import replace

from helpers import REPOSITORY, launch, tiny_processor, tiny_vit
from huggingface_hub import ModelCard

import hf_dash

RETRAIN = ["--num_train_epochs", "1", "--disable_tqdm", "true", "--report_to", "none"]


RETRAIN += ["--save_strategy", "no", "--per_device_train_batch_size", "8"]


def test_a_native_model_is_retrained_on_folders(tmp_path, digits):
    for number, row in enumerate(range(60)):
        example = digits[row]
        name = "even" if example["label"] % 2 == 0 else "odd"
        folder = tmp_path / ("held_out" if number % 3 == 0 else "images") / name
        folder.mkdir(parents=True, exist_ok=True)
        example["image"].save(folder / f"{number}.png")
    # The model knows the labels in the other order.
    hf_dash.save_model(tiny_vit(("odd", "even")), tmp_path / "vit", tiny_processor())
    flags = ["--model_name_or_path", "vit", "--validation_dir", "held_out", *RETRAIN]
    train = ["--train_dir", "images", "--do_train", "--do_eval", "--label_smoothing_factor", "0.1"]
    child = "--output_dir", "child"
    done = launch("retrain_with_trainer.py", tmp_path, *flags, *train, *child, launcher=False)
    (record,) = hf_dash.read_history(tmp_path / "child" / "history.json").records
    assert (record.num_total, record.round_index, record.parent) == (40, 1, "vit")
    assert set(record.per_class_accuracy) == {"odd", "even"}
    assert hf_dash.report.rounds_table([record]) in done.stdout
    card = ModelCard.load(tmp_path / "child" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.eval_results[0].dataset_split == "validation"
    model = hf_dash.load_model(str(tmp_path / "child"))
    assert model.config.id2label == {0: "odd", 1: "even"}

    flags[1] = "child"
    flags += ["--do_eval", "--train_dir", "images", "--output_dir", "evaluated"]
    launch("retrain_with_trainer.py", tmp_path, *flags, launcher=False)
    results = json.loads((tmp_path / "evaluated" / "eval_results.json").read_text())
    assert results == {"eval_accuracy": record.accuracy}
    assert not (tmp_path / "evaluated" / "history.json").exists()


def test_a_stream_with_a_new_label_is_retrained_on(tmp_path, digits):
    names = [str(digit) for digit in range(9)]
    model = hf_dash.create_model("test_resnet", label_names=names, image_size=32)
    hf_dash.save_model(model, tmp_path / "parent")
    for name, rows in (("old", range(40)), ("new", range(40, 100)), ("test", range(100, 130))):
        digits.select(rows).to_parquet(tmp_path / f"{name}.parquet")
    flags = ["--model_name_or_path", "parent", "--seen_dataset_names", "old.parquet", *RETRAIN]
    flags += ["--dataset_name", "new.parquet", "--test_dataset_name", "test.parquet"]
    flags += ["--streaming", "--output_dir", "child"]
    launch("retrain_with_trainer.py", tmp_path, *flags, launcher=False)
    (record,) = hf_dash.read_history(tmp_path / "child" / "history.json").records
    # 100 images in batches of 8 make 13 steps.
    assert (record.num_new, record.num_total, record.steps) == (60, 100, 13)
    assert record.shrink["num_images"] == 100
    child = hf_dash.load_model(str(tmp_path / "child"))
    assert list(child.config.id2label.values()) == [*names, "9"]


def test_a_challenger_is_promoted_refused_and_rolled_back(tmp_path, digits_test, fresh):
    source = hf_dash.report.read_evidence(REPOSITORY / "recipes" / "results" / "digits")
    settings = source.settings["settings"]
    history = hf_dash.History(tmp_path / "run" / "history.jsonl", settings)
    history.path.parent.mkdir()
    # The champion knows no digit, so it is right on none; any answer of the challenger is better.
    for index, names in ((1, ["cat", "dog"]), (2, hf_dash.data.label_names(digits_test))):
        one = next(r for r in source.records if r.round_index == index)
        # Not of this model, and not measured on what it is compared on.
        history.append(replace(one, weights_sha256=None, held_out_fingerprint=None))
        model = hf_dash.create_model("test_resnet", label_names=names, image_size=32)
        hf_dash.save_model(model, tmp_path / "run" / history.records[-1].folder)
    first, second = (record.folder for record in history.records)
    entry = hf_dash.history.Promotion("promote", first, None, "first champion", "")
    history.append_promotion(entry)
    flags = ["--output_dir", "run", "--dataset_name", "digits", "--challenger"]

    done = launch("promote.py", tmp_path, *flags, second, fresh=fresh)
    assert "promote: not worse overall, and no class drops" in done.stdout
    # A header, its rule, all examples, ten classes.
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 13
    refused = launch("promote.py", tmp_path, *flags, first, check=False, launcher=False)
    assert refused.returncode == 1
    assert "reject: significantly worse overall" in refused.stdout
    rollback = ["--output_dir", "run", "--rollback_to", first]
    launch("promote.py", tmp_path, *rollback, launcher=False)
    back = hf_dash.read_history(history.path)
    assert [p.kind for p in back.promotions] == ["promote", "promote", "reject", "rollback"]
    assert back.promotions[1].num_held_out == 360
    assert f" {back.promotions[1].accuracy:.2%} |" in table[2]
    assert back.champion == first
    assert back.records == history.records
