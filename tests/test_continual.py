import torch
from conftest import same_state, state_of

import hf_dash
from hf_dash.continual import seed_of_round

TRAINING = hf_dash.TrainingConfig(max_epochs=2, train_batch_size=30, disable_tqdm=True)


def run(model, rounds, start, accelerator, name="mine", seed=0):
    history = hf_dash.History(None, {})
    hf_dash.run_rounds(
        model,
        rounds,
        rounds[0].new,
        start,
        name=name,
        seed=seed,
        history=history,
        accelerator=accelerator,
        training=TRAINING,
        dash=hf_dash.DashConfig(gradient_batch_size=30),
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
    batches = hf_dash.train_batches(two_rounds[1], 30, seed=seed)
    hf_dash.train_round(scratch, batches, TRAINING, accelerator)
    assert same_state(state_of(model), state_of(scratch))
