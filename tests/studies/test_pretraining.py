import numpy as np
import pytest
from helpers import record, same_state, state_of
from safetensors.torch import load_file

import hf_dash
from hf_dash.data.loading import cut_schedule
from hf_dash.studies.pretraining import pretrained_epochs, records_by_length

TRAINING = hf_dash.TrainingConfig(max_epochs=2, train_batch_size=30, disable_tqdm=True)


STARTS = {name: hf_dash.find_start(name) for name in ("warm", "dash")}


def make_model():
    names = [str(digit) for digit in range(10)]
    return hf_dash.create_model("test_resnet", label_names=names, image_size=32, seed=0)


def compare(folder, rounds, accelerator, lengths, compared=STARTS):
    history = hf_dash.history.open_history(folder / "history.jsonl", {})
    hf_dash.studies.run_pretraining(
        make_model,
        *rounds,
        rounds[0].new,
        compared,
        lengths,
        hf_dash.runs.Run("any", 0, history, accelerator, training=TRAINING, output_dir=folder),
    )
    return history


@pytest.fixture(scope="module")
def rounds(digits):
    """Two rounds of 60 digits each, some of the labels wrong."""
    schedule = cut_schedule(
        digits, digits.select(range(60)), num_rounds=2, seed=0, examples_per_round=60
    )
    return schedule.rounds(hf_dash.models.image_transform(make_model()), label_noise=0.2)


def test_every_start_goes_on_from_every_stage(rounds, accelerator, tmp_path):
    records = compare(tmp_path, rounds, accelerator, [1, 3]).records
    found = [(r.start, r.round_index, r.num_total, r.epochs, r.parent) for r in records]
    stages = [f"rounds/00{index}/pretraining_seed0" for index in (1, 2)]
    assert found == [
        ("cold", 1, 120, 2, None),
        ("pretraining", 1, 60, 1, None),
        ("warm", 2, 120, 2, stages[0]),
        ("dash", 2, 120, 2, stages[0]),
        ("pretraining", 2, 60, 2, stages[0]),
        ("warm", 3, 120, 2, stages[1]),
        ("dash", 3, 120, 2, stages[1]),
    ]
    by_length = records_by_length(records)
    assert {start: list(own) for start, own in by_length.items()} == {
        "cold": [0],
        "warm": [1, 3],
        "dash": [1, 3],
    }
    warm, dash = (by_length[start][3][0] for start in ("warm", "dash"))
    assert warm.memorization["before"] == warm.memorization["after"] == dash.memorization["before"]
    assert "flipped_reproduced" in dash.memorization["after"]
    assert dash.shrink["num_images"] == 120


def test_scratch_and_stages_are_plain_training(rounds, accelerator, tmp_path):
    compare(tmp_path, rounds, accelerator, [1], {"warm": STARTS["warm"]})
    for name, round_, epochs in (("cold", rounds[1], 2), ("pretraining", rounds[0], 1)):
        model = make_model()
        seed = int(np.random.SeedSequence([0, 1]).generate_state(1)[0])
        batches = hf_dash.data.train_batches(round_, 30, seed=seed)
        config = hf_dash.TrainingConfig(
            max_epochs=epochs, train_batch_size=30, disable_tqdm=True, accuracy_threshold=None
        )
        hf_dash.training.train_round(model, batches, config, accelerator)
        saved = load_file(tmp_path / "rounds" / "001" / f"{name}_seed0" / "model.safetensors")
        assert same_state(state_of(model.timm_model), saved)


def test_the_same_call_goes_on_where_an_earlier_one_was_stopped(rounds, accelerator, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(model, context):
        raise StoppedError

    whole = compare(tmp_path / "whole", rounds, accelerator, [1, 2])
    with pytest.raises(StoppedError):
        compare(tmp_path / "parts", rounds, accelerator, [1, 2], {**STARTS, "dash": stop})
    parts = compare(tmp_path / "parts", rounds, accelerator, [1, 2])
    assert [r.weights_sha256 for r in parts.records] == [r.weights_sha256 for r in whole.records]
    before = (tmp_path / "parts" / "history.jsonl").read_bytes()
    compare(tmp_path / "parts", rounds, accelerator, [1, 2])
    assert (tmp_path / "parts" / "history.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("lengths", "compared", "error", "message"),
    [
        ([], STARTS, ValueError, r"pretrain_epochs must be rising numbers of epochs, got \[\]"),
        ([2, 1], STARTS, ValueError, r"rising numbers of epochs, got \[2, 1\]"),
        ([1, 1], STARTS, ValueError, "rising numbers of epochs"),
        ([0, 1], STARTS, ValueError, "pretrain_epochs must be at least 1, got 0"),
        ([1.5], STARTS, TypeError, "pretrain_epochs must be an integer of at least 1, got 1.5"),
        ([1], {"cold": STARTS["warm"]}, ValueError, "compared must not be named 'cold'"),
    ],
)
def test_bad_arguments_are_named(lengths, compared, error, message, rounds, accelerator, tmp_path):
    with pytest.raises(error, match=message):
        compare(tmp_path, rounds, accelerator, lengths, compared)
    assert not list(tmp_path.iterdir())


def test_epochs_add_up_along_the_parents():
    stages = [record("pretraining", epochs=2), record("pretraining", 0, 2, epochs=5)]
    first, second = (stage.folder for stage in stages)
    stages[1] = record("pretraining", 0, 2, epochs=5, parent=first)
    start = record("dash", 0, 3, parent=second)
    assert pretrained_epochs(start, stages) == 7
    assert pretrained_epochs(stages[0], []) == 0
    with pytest.raises(ValueError, match="records must hold the parent 'rounds/002/pre"):
        pretrained_epochs(start, stages[:1])


@pytest.mark.parametrize("records", [[], [record("cold")], [record("warm")]])
def test_other_records_are_refused(records):
    with pytest.raises(ValueError, match="records must be of run_pretraining"):
        records_by_length(records)
