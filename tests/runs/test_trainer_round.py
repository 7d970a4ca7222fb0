import json
from dataclasses import replace

import pytest
from helpers import SHRINK, record, same_state, state_of, tiny_processor, tiny_vit
from transformers import Trainer, TrainingArguments

import hf_dash
from hf_dash import DashCallback
from hf_dash._version import library_versions
from hf_dash.data import ImageExamples
from hf_dash.data.rounds import joint_fingerprint
from hf_dash.data.stamps import stamps_of
from hf_dash.history import write_history
from hf_dash.runs import TrainerRound
from hf_dash.runs.round_files import report_of

SETTINGS = {"lam": 0.3}


def make_trainer(folder, model, round_, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 40,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
            **options,
        },
    )
    callback = DashCallback(num_batches=1)
    return Trainer(model, args, train_dataset=round_.examples, callbacks=[callback])


def make_task(folder, rounds, **changes):
    fields = {"settings": SETTINGS, "past": [], "parent": "a", "parent_sha256": "0" * 64}
    return TrainerRound(folder, rounds[1], rounds[0].new, **{**fields, **changes})


def export(task, model, one):
    """Write the finished folder, as the recipe does."""
    info = hf_dash.report.CardInfo(
        "a resnet", [*task.past, one], dict(task.settings), "digits", "test", 60
    )
    info = hf_dash.report.write_model_folder(model, task.output_dir, info, files=task.kept)
    task.clear()
    return info.records


@pytest.mark.parametrize("steps", [2, 6])
def test_the_record_of_a_trainers_round(two_rounds, small_model, tmp_path, steps):
    round_, held_out = two_rounds[1], two_rounds[0].new
    trainer = make_trainer(tmp_path, small_model, round_, max_steps=steps)
    task = make_task(tmp_path, two_rounds, parent="runs/a")
    model, made = task.train_(trainer)
    assert model is small_model
    metrics = {"accuracy": 0.5, "per_class_accuracy": {3: 0.25, 0: 0.75}}
    made = task.evaluated(made, model, metrics)
    assert (made.start, made.seed, made.round_index, made.parent) == ("dash", 7, 2, "runs/a")
    assert (made.num_new, made.num_total, made.steps) == (60, 120, steps)
    assert (made.accuracy, made.per_class_accuracy) == (0.5, {"3": 0.25, "0": 0.75})
    report = json.loads((tmp_path / "dash_report.json").read_text())
    assert report_of(task.kept, made) == report
    # What is listed by tensor lies beside the weights alone.
    assert made.shrink == {name: v for name, v in report.items() if not isinstance(v, list)}
    assert made.seconds >= report["seconds"]
    # Two steps are no whole epoch of three, of which alone it is known what they read.
    expected = None if steps == 2 else 2 * 120 + report["num_images"]
    assert made.images_read == expected
    assert (made.hardware, made.versions) == ("1 × cpu, fp32", library_versions())
    assert made.data_fingerprint == round_.fingerprint
    # One arrival or one part of several: the same images are the same.
    assert made.held_out_fingerprint == joint_fingerprint([held_out])
    names = {"model.safetensors", "config.json", "dash_report.json"}
    assert set(made.file_sha256) == names


def test_what_is_trained_is_not_trained_again(two_rounds, small_model, tmp_path):
    task = make_task(tmp_path, two_rounds)
    model, first = task.train_(make_trainer(tmp_path, small_model, two_rounds[1]))
    expected = state_of(model)
    # Nothing came after training: the next call, with a fresh model, takes up what was kept.
    again, second = task.train_(None)
    assert same_state(state_of(again), expected)
    assert second == first
    assert task.finished() is None
    records = export(task, again, replace(second, accuracy=0.5))
    assert task.finished() == records
    assert not task.kept.exists()
    # Of other data or settings it is not this round, and would be lost.
    for other in ({"settings": {"lam": 0.1}}, {"parent_sha256": "1" * 64}):
        with pytest.raises(ValueError, match="holds another history, with round 2 of 'dash'"):
            make_task(tmp_path, two_rounds, **other).finished()
    other = [two_rounds[0], replace(two_rounds[0], index=2)]
    with pytest.raises(ValueError, match="holds another history"):
        make_task(tmp_path, other).finished()


@pytest.mark.parametrize(
    "other", [{"settings": {"lam": 0.1}}, {"parent": "b"}, {"parent_sha256": "1" * 64}]
)
def test_what_was_trained_otherwise_is_trained_again(two_rounds, small_model, tmp_path, other):
    make_task(tmp_path, two_rounds).train_(make_trainer(tmp_path, small_model, two_rounds[1]))
    task = make_task(tmp_path, two_rounds, **other)
    trainer = make_trainer(tmp_path, small_model, two_rounds[1], max_steps=3)
    assert task.train_(trainer)[1].steps == 3


def test_a_round_that_took_its_parents_place_is_finished(two_rounds, small_model, tmp_path):
    task = make_task(tmp_path, two_rounds)
    model, one = task.train_(make_trainer(tmp_path, small_model, two_rounds[1]))
    records = export(task, model, replace(one, accuracy=0.5))
    # The same command finds its own round as the parent.
    in_place = make_task(
        tmp_path,
        [two_rounds[0], replace(two_rounds[1], index=3)],
        past=records,
        parent=tmp_path.name,
        parent_sha256=records[-1].weights_sha256,
    )
    assert in_place.finished() == records
    # With other settings it is another round, which continues this one.
    assert replace(in_place, settings={"lam": 0.1}).finished() is None


def test_a_diverged_model_is_not_kept(two_rounds, small_model, tmp_path):
    trainer = make_trainer(tmp_path, small_model, two_rounds[1], learning_rate=1e30)
    task = make_task(tmp_path, two_rounds)
    with pytest.raises(FloatingPointError, match="the weights are not finite"):
        task.train_(trainer)
    assert not task.kept.exists()


def test_a_shard_that_is_replaced_in_mid_run_is_noticed(two_rounds, small_model, tmp_path):
    shard = tmp_path / "tuesday.parquet"
    shard.write_text("images")
    two_rounds[1].new.stamps = stamps_of([shard])

    def begin():
        shard.write_text("other images")
        return 0.0

    task = make_task(tmp_path, two_rounds)
    trainer = make_trainer(tmp_path, small_model, two_rounds[1])
    with pytest.raises(ValueError, match=r"tuesday\.parquet was replaced while"):
        task.train_(trainer, begin=begin)
    assert not task.kept.exists()


def test_inputs_are_checked_before_training(two_rounds, small_model, tmp_path, monkeypatch):
    class Broken(list):
        def __getitem__(self, index):
            raise OSError("image file is truncated")

    task = make_task(tmp_path, two_rounds)
    trainer = make_trainer(tmp_path, small_model, two_rounds[1])
    before = state_of(small_model)
    broken = Broken([0])
    broken.fingerprint = "broken"
    with pytest.raises(ValueError, match=r"held_out .* example 0 cannot: image file is truncated"):
        replace(task, held_out=broken).train_(trainer)
    write_history(tmp_path / "history.json", {}, [record()])
    with pytest.raises(ValueError, match="holds another history"):
        task.train_(trainer)
    (tmp_path / "history.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("hf_dash.utils.files.shutil.disk_usage", lambda folder: Free())
        with pytest.raises(OSError, match=r"has 1\.0 MB left, but about"):
            task.train_(trainer)
    trainer.remove_callback(DashCallback)
    with pytest.raises(ValueError, match="trainer must have a DashCallback"):
        task.train_(trainer)
    assert same_state(state_of(small_model), before)


class Free:
    free = 1_000_000


def test_a_full_disk_leaves_nothing_of_a_round(two_rounds, small_model, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    task = make_task(tmp_path, two_rounds)
    monkeypatch.setattr("hf_dash.runs.trainer_round.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        task.train_(make_trainer(tmp_path, small_model, two_rounds[1]))
    assert not task.kept.exists()
    assert not (tmp_path / ".aside").exists()


def fresh_model():
    names = [str(digit) for digit in range(10)]
    return hf_dash.create_model("test_resnet", label_names=names, image_size=32, seed=0)


def test_a_resumed_round_has_the_shrink_of_its_checkpoint(two_rounds, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    first = make_trainer(tmp_path / "first", fresh_model(), two_rounds[1], **options)
    first.train()
    checkpoint = str(tmp_path / "first" / "checkpoint-1")
    # A later run in the same folder, with another shrink.
    (tmp_path / "first" / "dash_report.json").write_text(json.dumps(SHRINK))
    task = make_task(tmp_path / "second", two_rounds)
    trainer = make_trainer(tmp_path / "second", fresh_model(), two_rounds[1], max_steps=3)
    model, one = task.train_(trainer, resume_from_checkpoint=checkpoint)
    report = report_of(task.kept, one)
    assert report == json.loads(
        (tmp_path / "first" / "checkpoint-1" / "dash_report.json").read_text()
    )
    assert report != SHRINK
    assert same_state(state_of(model), state_of(first.model))


def test_a_checkpoint_that_was_shrunk_otherwise_is_refused(two_rounds, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "first", fresh_model(), two_rounds[1], **options).train()
    checkpoint = tmp_path / "first" / "checkpoint-1"
    model = fresh_model()
    trainer = make_trainer(tmp_path / "second", model, two_rounds[1])
    trainer.remove_callback(DashCallback)
    trainer.add_callback(DashCallback(lam=0.9, num_batches=1))
    before, task = state_of(model), make_task(tmp_path / "second", two_rounds)
    with pytest.raises(ValueError, match=r"was shrunk with lam 0\.3, but lam is 0\.9"):
        task.train_(trainer, resume_from_checkpoint=str(checkpoint))
    (checkpoint / "dash_report.json").unlink()
    (tmp_path / "first" / "dash_report.json").unlink()
    with pytest.raises(ValueError, match=r"must hold the dash_report\.json of its shrink"):
        task.train_(trainer, resume_from_checkpoint=str(checkpoint))
    assert same_state(state_of(model), before)


def test_a_native_model_is_kept_with_its_image_processor(two_rounds, tmp_path):
    model, round_ = tiny_vit([str(digit) for digit in range(10)]), two_rounds[1]
    transform = hf_dash.models.image_transform(model, tiny_processor())
    rounds = [
        replace(one, arrivals=tuple(ImageExamples(a.dataset, transform) for a in one.arrivals))
        for one in two_rounds
    ]
    task = make_task(tmp_path, rounds)
    trainer = make_trainer(tmp_path, model, rounds[1])
    _, one = task.train_(trainer, image_processor=tiny_processor())
    names = {"model.safetensors", "config.json", "preprocessor_config.json", "dash_report.json"}
    assert set(one.file_sha256) == names
    again, _ = task.train_(None)
    assert same_state(state_of(again), state_of(model))
    export(task, again, one)
    assert names < {path.name for path in tmp_path.iterdir()}
    assert task.finished()[-1].round_index == round_.index
