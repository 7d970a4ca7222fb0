import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from helpers import heard, same_state, state_of

import hf_dash
from hf_dash._version import library_versions
from hf_dash.data.stamps import stamps_of
from hf_dash.pretrained import load_checkpoint
from hf_dash.runs.continual import _start, _Task, seed_of_round
from hf_dash.training.loop import train_round

TRAINING = hf_dash.TrainingConfig(max_epochs=2, train_batch_size=30, disable_tqdm=True)


def run(model, rounds, start, accelerator, name="mine", seed=0):
    history = hf_dash.History(None, {})
    hf_dash.run_rounds(
        model,
        rounds,
        rounds[0].new,
        start,
        hf_dash.runs.Run(
            name,
            seed,
            history,
            accelerator,
            training=TRAINING,
            dash=hf_dash.DashConfig(gradient_batch_size=30),
        ),
    )
    return history.records


def test_the_first_round_has_no_start_and_every_other_one(small_model, two_rounds, accelerator):
    calls = []

    def start(model, context):
        calls.append((context.round_.index, context.seed, state_of(model)))

    records = run(small_model, two_rounds, start, accelerator)
    assert [(index, seed) for index, seed, _ in calls] == [(2, seed_of_round(0, 2))]
    assert [(r.start, r.round_index, r.num_new, r.num_total) for r in records] == [
        ("mine", 1, 60, 60),
        ("mine", 2, 60, 120),
    ]
    assert [r.steps for r in records] == [2 * r.epochs * r.round_index for r in records]
    assert records[0].start_seconds == 0 < records[1].start_seconds
    assert set(records[0].per_class_accuracy) <= {str(digit) for digit in range(10)}


def test_the_start_gets_the_last_rounds_final_weights(small_model, two_rounds, accelerator):
    given = []

    def start(model, context):
        given.append(state_of(model))
        with torch.no_grad():
            model.timm_model.fc.weight.zero_()

    rounds = run(small_model, two_rounds[:1], start, accelerator)
    after_first = state_of(small_model)
    assert (len(rounds), given) == (1, [])
    small_model.load_state_dict(
        hf_dash.create_model(
            "test_resnet", label_names=[str(digit) for digit in range(10)], image_size=32
        ).state_dict()
    )
    run(small_model, two_rounds, start, accelerator)
    assert same_state(given[0], after_first)


def test_the_shrink_report_is_recorded(small_model, two_rounds, accelerator):
    records = run(small_model, two_rounds, hf_dash.find_start("dash"), accelerator, name="dash")
    assert records[0].shrink is None
    assert records[1].shrink["num_images"] == 120
    assert records[1].start_seconds >= records[1].shrink["seconds"]


def test_runs_repeat_by_seed(two_rounds, accelerator):
    def final(seed):
        model = hf_dash.create_model(
            "test_resnet", label_names=[str(digit) for digit in range(10)], image_size=32
        )
        run(model, two_rounds, hf_dash.find_start("dash"), accelerator, seed=seed)
        return state_of(model)

    assert same_state(final(3), final(3))
    assert not same_state(final(3), final(4))


def test_seeds_differ_between_runs_and_rounds():
    seeds = {seed_of_round(seed, index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400


def test_cold_equals_training_from_scratch(two_rounds, accelerator):
    """On the second round, cold is a new model of that round's seed trained on all data."""
    names = [str(digit) for digit in range(10)]
    model = hf_dash.create_model("test_resnet", label_names=names, image_size=32)
    run(model, two_rounds, hf_dash.find_start("cold"), accelerator)
    seed = seed_of_round(0, 2)
    scratch = hf_dash.create_model("test_resnet", label_names=names, image_size=32, seed=seed)
    batches = hf_dash.data.train_batches(two_rounds[1], 30, seed=seed)
    hf_dash.training.train_round(scratch, batches, TRAINING, accelerator)
    assert same_state(state_of(model), state_of(scratch))


def names_of(count):
    return tuple(str(digit) for digit in range(count))


def saved_run(
    folder, rounds, accelerator, settings=None, start="dash", training=TRAINING, **options
):
    """A run that keeps its rounds on disk, as the recipes make it."""
    history = hf_dash.history.open_history(folder / "history.jsonl", settings or {})
    names = rounds[0].label_names or names_of(10)
    model = hf_dash.run_rounds(
        hf_dash.create_model("test_resnet", label_names=list(names), image_size=32, seed=0),
        rounds,
        rounds[0].new,
        hf_dash.find_start(start),
        hf_dash.runs.Run(
            start,
            0,
            history,
            accelerator,
            training=training,
            dash=hf_dash.DashConfig(gradient_batch_size=30),
            output_dir=folder,
            **options,
        ),
    )
    return model, history


def test_a_record_tells_where_a_round_came_from(two_rounds, accelerator, tmp_path):
    _, history = saved_run(tmp_path, two_rounds, accelerator)
    first, second = history.records
    assert (first.parent, second.parent) == (None, "rounds/001/dash_seed0")
    assert second.data_fingerprint == two_rounds[1].fingerprint != first.data_fingerprint
    # These runs are held against the images of their own first round.
    assert second.held_out_fingerprint == first.held_out_fingerprint == first.data_fingerprint
    assert second.images_read == second.epochs * 120 + second.shrink["num_images"]
    assert second.hardware == "1 × cpu, fp32"
    assert second.versions == library_versions()


@pytest.mark.parametrize("changes", [{}, {"channels_last": True}], ids=["plain", "channels_last"])
@pytest.mark.parametrize("start", ["dash", "warm"])
def test_rounds_go_on_where_an_earlier_call_ended(
    two_rounds, accelerator, tmp_path, start, changes
):
    how = {"start": start, "training": dataclasses.replace(TRAINING, **changes)}
    whole, expected = saved_run(tmp_path / "whole", two_rounds, accelerator, **how)
    saved_run(tmp_path / "parts", two_rounds[:1], accelerator, **how)
    parts, found = saved_run(tmp_path / "parts", two_rounds, accelerator, **how)
    again, _ = saved_run(tmp_path / "parts", two_rounds, accelerator, **how)
    assert same_state(state_of(whole), state_of(parts))
    assert same_state(state_of(whole), state_of(again))
    assert [r.weights_sha256 for r in found.records] == [r.weights_sha256 for r in expected.records]


def test_a_round_that_was_saved_but_not_recorded_is_taken_over(two_rounds, accelerator, tmp_path):
    _, expected = saved_run(tmp_path, two_rounds, accelerator)
    (tmp_path / "history.jsonl").unlink()
    _, found = saved_run(tmp_path, two_rounds, accelerator)
    assert found.records == expected.records
    (tmp_path / "history.jsonl").unlink()
    with pytest.raises(ValueError, match=r"other settings \(lam was None, is 0.1\)"):
        saved_run(tmp_path, two_rounds, accelerator, {"lam": 0.1})


def test_other_data_are_refused(two_rounds, accelerator, tmp_path, digits):
    saved_run(tmp_path, two_rounds, accelerator)
    before = (tmp_path / "history.jsonl").read_bytes()
    other = hf_dash.data.in_arrival_order(digits, seed=1, num_examples=120)
    rounds = list(hf_dash.data.cut_rounds(other, 2, two_rounds[0].new.transform, in_memory=True))
    with pytest.raises(ValueError, match="round 1 of 'dash' was trained on other data"):
        saved_run(tmp_path, rounds, accelerator)
    assert (tmp_path / "history.jsonl").read_bytes() == before


def test_a_shard_that_is_replaced_in_mid_run_is_noticed(
    two_rounds, accelerator, tmp_path, monkeypatch
):
    """Else it would be trained on under the fingerprint of the one before."""
    shard, run = tmp_path / "tuesday.parquet", tmp_path / "run"
    shard.write_text("images")
    two_rounds[1].new.stamps = stamps_of([shard])

    def replaced_meanwhile(*arguments, **settings):
        shard.write_text("other images")
        return train_round(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("hf_dash.runs.continual.train_round", replaced_meanwhile)
        with pytest.raises(ValueError, match=r"tuesday\.parquet was replaced while"):
            saved_run(run, two_rounds, accelerator)
    assert [path.parent.name for path in run.glob("rounds/*/*")] == ["001"]
    two_rounds[1].new.stamps = stamps_of([shard])
    assert len(saved_run(run, two_rounds, accelerator)[1].records) == 2


def test_only_the_newest_rounds_are_kept(two_rounds, accelerator, tmp_path):
    whole, _ = saved_run(tmp_path / "whole", two_rounds, accelerator)
    saved_run(tmp_path / "newest", two_rounds, accelerator, save_total_limit=1)
    folders = [p.parent.name for p in (tmp_path / "newest").glob("rounds/*/dash_seed0")]
    assert folders == ["002"]
    again, _ = saved_run(tmp_path / "newest", two_rounds, accelerator, save_total_limit=1)
    assert same_state(state_of(again), state_of(whole))
    with pytest.raises(ValueError, match="save_total_limit must be at least 1, got 0"):
        saved_run(tmp_path / "none", two_rounds, accelerator, save_total_limit=0)


def states(folder):
    """The rounds that hold the optimizer's state."""
    paths = sorted(folder.glob("rounds/*/*/optimizer.safetensors"))
    return [f"{path.parent.parent.name} {path.parent.name}" for path in paths]


def test_optimizer_state_is_saved_where_a_start_may_load_it(two_rounds, accelerator, tmp_path):
    resets, keeps = {"starts": ["dash", "cold"]}, {"starts": ["dash", "warm"]}
    saved_run(tmp_path / "resets", two_rounds, accelerator, resets)
    assert states(tmp_path / "resets") == []
    # The first round is that of every start; of the second one dash needs the weights alone.
    saved_run(tmp_path / "keeps", two_rounds, accelerator, keeps)
    assert states(tmp_path / "keeps") == ["001 dash_seed0"]
    warm, _ = saved_run(tmp_path / "keeps", two_rounds, accelerator, keeps, start="warm")
    assert states(tmp_path / "keeps") == ["001 dash_seed0", "001 warm_seed0", "002 warm_seed0"]
    # A start that comes later, and needs what was left out, trains the first round itself.
    late, history = saved_run(tmp_path / "resets", two_rounds, accelerator, resets, start="warm")
    assert same_state(state_of(late), state_of(warm))
    assert states(tmp_path / "resets") == ["001 warm_seed0", "002 warm_seed0"]
    first, own = history.find("dash", 0, 1), history.find("warm", 0, 1)
    assert first.weights_sha256 == own.weights_sha256


def test_the_weights_that_a_run_must_return_were_dropped(two_rounds, accelerator, tmp_path):
    saved_run(tmp_path, two_rounds, accelerator, save_total_limit=1)
    with pytest.raises(ValueError, match=r"rounds/001/dash_seed0 .* save_total_limit 1 has dropp"):
        saved_run(tmp_path, two_rounds[:1], accelerator, save_total_limit=1)


def test_another_start_branches_off_a_finished_round(two_rounds, accelerator, tmp_path):
    straight, _ = saved_run(tmp_path / "straight", two_rounds, accelerator)
    saved_run(tmp_path / "branch", two_rounds[:1], accelerator, start="warm")
    first = hf_dash.read_history(tmp_path / "branch" / "history.jsonl").records[0]
    branch, history = saved_run(tmp_path / "branch", two_rounds[1:], accelerator, parent=first)
    assert same_state(state_of(branch), state_of(straight))
    assert (history.records[-1].start, history.records[-1].parent) == ("dash", first.folder)
    with pytest.raises(ValueError, match="output_dir must be given with parent"):
        hf_dash.runs.Run("dash", 0, history, accelerator, parent=first)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"name": "../dash"}, ValueError, r"name must be .*, got '\.\./dash'"),
        ({"name": "a/b"}, ValueError, "name must be .*, got 'a/b'"),
        ({"name": ""}, ValueError, "name must be .*, got ''"),
        ({"name": 3}, TypeError, "name must be .*, got 3"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer of at least 0, got 0.5"),
        ({"save_total_limit": 0}, ValueError, "save_total_limit must be at least 1, got 0"),
        ({"measure_memorization": 1}, TypeError, "measure_memorization must be True or False"),
        ({"dash": {}}, TypeError, "dash must be a DashConfig, got {}"),
        ({"start_config": []}, TypeError, r"start_config must be a StartsConfig, got \[\]"),
        ({"training": None}, TypeError, "training must be a TrainingConfig, got None"),
    ],
)
def test_a_run_checks_its_settings(wrong, error, message, accelerator):
    fields = {"name": "dash", "seed": 0, "accelerator": accelerator}
    with pytest.raises(error, match=message):
        hf_dash.runs.Run(history=hf_dash.History(None, {}), **{**fields, **wrong})


def growing_rounds(digits, transform):
    """Two rounds of digits: 0 to 6 first, then all ten."""
    labels = np.array(digits["label"][:])
    first = np.flatnonzero(labels < 7)[:60]
    second = np.setdiff1d(np.arange(200), first)[:60]
    arrivals = tuple(
        hf_dash.data.ImageExamples(digits.select(rows), transform, in_memory=True)
        for rows in (first, second)
    )
    return [
        hf_dash.Round(1, arrivals[:1], label_names=names_of(7)),
        hf_dash.Round(2, arrivals, label_names=names_of(10)),
    ]


@pytest.mark.parametrize("start", ["dash", "cold"])
def test_new_labels_grow_the_head(digits, small_model, accelerator, tmp_path, start):
    rounds = growing_rounds(digits, hf_dash.models.image_transform(small_model))
    model, history = saved_run(tmp_path / "a", rounds, accelerator, start=start)
    assert list(model.config.id2label.values()) == list(names_of(10))
    assert set(history.records[0].per_class_accuracy) <= set(names_of(7))
    # Going on in a second call grows the same head.
    saved_run(tmp_path / "b", rounds[:1], accelerator, start=start)
    again, _ = saved_run(tmp_path / "b", rounds, accelerator, start=start)
    assert same_state(state_of(model), state_of(again))


def test_old_rows_start_as_usual_and_new_ones_fresh(digits, small_model, accelerator, tmp_path):
    rounds = growing_rounds(digits, hf_dash.models.image_transform(small_model))

    def halve(model, context):
        with torch.no_grad():
            model.timm_model.fc.weight.mul_(0.5)

    model, _ = saved_run(tmp_path, rounds[:1], accelerator)
    old = state_of(model)["timm_model.fc.weight"]
    run = hf_dash.runs.Run("mine", 0, hf_dash.History(None, {}), accelerator)
    grown, rows = hf_dash.models.grow_head(model, names_of(10)[7:], seed=3)
    _start(_Task(run, halve, rounds[0].new, rounds[1], 3), grown, rows)
    weight = grown.timm_model.fc.weight.detach()
    assert torch.equal(weight[:7], 0.5 * old)
    assert torch.equal(weight[7:], rows["fc.weight"])


def test_starts_of_a_seed_train_their_first_round_once(
    two_rounds, accelerator, tmp_path, monkeypatch
):
    trained = []

    def counted(*arguments, description, **options):
        trained.append(description)
        return train_round(*arguments, description=description, **options)

    monkeypatch.setattr("hf_dash.runs.continual.train_round", counted)
    history = hf_dash.history.open_history(tmp_path / "history.jsonl", {})
    for name in ("warm", "dash", "l2_init"):
        model = hf_dash.create_model("test_resnet", label_names=names_of(10), image_size=32)
        one = hf_dash.runs.Run(
            name, 0, history, accelerator, training=TRAINING, output_dir=tmp_path
        )
        start = hf_dash.find_start(name)
        hf_dash.run_rounds(model, two_rounds[:1], two_rounds[0].new, start, one)
    # L2-init trains its first round with a penalty, so it is not the same.
    assert trained == ["warm round 1", "l2_init round 1"]
    warm, dash, l2_init = history.records
    assert dataclasses.replace(dash, start="warm") == warm
    assert l2_init.weights_sha256 != warm.weights_sha256
    for record in (warm, dash):
        content = (tmp_path / record.folder / "model.safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() == record.weights_sha256


def test_a_run_from_a_checkpoint_records_it(two_rounds, accelerator, tmp_path):
    source = hf_dash.create_model("test_resnet", label_names=["a"], image_size=32, seed=7)
    hf_dash.save_model(source, tmp_path / "lite")
    checkpoint = load_checkpoint(str(tmp_path / "lite"))
    seen = []

    def start(model, context):
        seen.append(context.checkpoint)

    history = hf_dash.History(None, {})
    one = hf_dash.runs.Run(
        "mine", 0, history, accelerator, training=TRAINING, checkpoint=checkpoint
    )
    model = checkpoint.create_model(list(names_of(10)))
    hf_dash.run_rounds(model, two_rounds, two_rounds[0].new, start, one)
    first, second = history.records
    assert (first.parent, first.parent_sha256) == ("lite", checkpoint.sha256)
    assert (second.parent, second.parent_sha256) == (first.folder, None)
    assert seen == [checkpoint]


def test_rare_classes_can_count_as_much_as_others(small_model, two_rounds, accelerator):
    losses = []

    def start(model, context):
        losses.append(context.loss_fn)

    history = hf_dash.History(None, {})
    training = dataclasses.replace(TRAINING, max_epochs=1, class_weights="balanced")
    one = hf_dash.runs.Run("mine", 0, history, accelerator, training=training)
    hf_dash.run_rounds(small_model, two_rounds, two_rounds[0].new, start, one)
    labels = [example["labels"] for example in two_rounds[1].examples]
    counts = np.bincount(labels, minlength=10)
    # By scikit-learn's formula for class_weight="balanced".
    assert losses[0].weights.tolist() == pytest.approx((len(labels) / (10 * counts)).tolist())


def test_a_round_is_told_in_one_line(small_model, two_rounds, accelerator):
    with heard() as lines:
        records = run(small_model, two_rounds, lambda model, context: None, accelerator)
    assert len(lines) == 2
    last = records[1]
    assert lines[1].startswith("mine, seed 0, round 2: 120 images (60 new), accuracy ")
    assert f" {100 * last.accuracy:.2f} %, {last.steps} steps, {last.seconds:.1f} s" in lines[1]
