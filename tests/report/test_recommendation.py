import json

import pytest
import torch
from helpers import record, same_state, state_of, tiny_vit

import hf_dash
from hf_dash import DashConfig, History
from hf_dash.history import read_history, write_history
from hf_dash.report import (
    choose_start,
    read_recommendation,
    recommend,
    start_verdict,
    write_recommendation,
)
from hf_dash.starts import StartsConfig

LABELS = ["cat", "dog"]

ACCURACIES = {"cold": 0.5, "warm": 0.4, "dash+alpha=0.1": 0.6}


def history(path=None, accuracies=ACCURACIES, **settings):
    """Three seeds and two rounds of each start, in order."""
    history = History(path, {"output_dir": "runs/x", **settings})
    for start, accuracy in accuracies.items():
        for seed in range(3):
            for index in (1, 2):
                history.append(record(start, seed, index, accuracy=accuracy))
    return history


def write(folder, accuracies=ACCURACIES):
    compared = history(accuracies=accuracies)
    verdict = start_verdict(compared.records)
    write_recommendation(verdict, folder, compared, LABELS)
    return folder / "recommendation.json"


def test_a_recommendation_comes_back_with_the_settings_of_its_start(tmp_path):
    compared = history(tmp_path / "history.jsonl", lam=0.2, num_batches=5, perturb_lam=0.6)
    sentence = recommend(compared, [tmp_path], LABELS)
    read = read_recommendation(tmp_path)
    assert read == read_recommendation(tmp_path / "recommendation.json")
    assert (read.start, read.sentence) == ("dash+alpha=0.1", sentence)
    assert read.dash == DashConfig(alpha=0.1, lam=0.2, num_batches=5)
    assert read.start_config == StartsConfig(perturb_lam=0.6)
    assert read.label_names == ("cat", "dog")
    assert read.history_digest == read_history(tmp_path / "history.jsonl").digest
    content = json.loads((tmp_path / "recommendation.json").read_text())
    assert (content["format"], content["seeds"], content["last_round"]) == (1, [0, 1, 2], 2)
    assert content["comparisons"][0]["points"] == pytest.approx(10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "history.jsonl",
        "recommendation.json",
    ]


def test_where_nothing_can_be_compared_nothing_is_written(tmp_path):
    text = recommend(history(accuracies={"dash": 0.5}), [tmp_path], LABELS)
    assert text.startswith("no recommendation: records must hold a second round of at least two")
    assert not list(tmp_path.iterdir())


def test_a_missing_recommendation_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "recommendation.json"):
        with pytest.raises(FileNotFoundError, match=r"recommendation '.*recommendation.json' does"):
            read_recommendation(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "Expecting|Unterminated"),
        (lambda text: "[]", "list indices"),
        (lambda text: "{}", "format"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2 is not 1"),
        (lambda text: text.replace('"lam": 0.3', '"lam": 0.4'), "something else has changed it"),
        (lambda text: text.replace('"cat"', '"cow"'), "something else has changed it"),
    ],
)
def test_a_damaged_recommendation_is_refused(tmp_path, damage, message):
    path = write(tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=f"recommendation.json is not a whole .*({message})"):
        read_recommendation(tmp_path)


def test_auto_follows_the_recommendation(tmp_path):
    path = write(tmp_path)
    chosen = choose_start("auto", DashConfig(), recommendation=path, label_names=["dog", "cat"])
    assert (chosen.name, chosen.dash.alpha) == ("dash+alpha=0.1", 0.1)
    assert chosen.followed == read_recommendation(path).sentence
    assert chosen.settings["start"] == "dash+alpha=0.1"
    assert chosen.settings["alpha"] == 0.1


def test_a_named_start_follows_nothing(tmp_path):
    dash = DashConfig(lam=0.5)
    chosen = choose_start("dash+alpha=0.1", dash, recommendation=tmp_path, label_names=LABELS)
    assert (chosen.dash, chosen.followed) == (DashConfig(alpha=0.1, lam=0.5), None)
    perturb = choose_start(
        "shrink_perturb+perturb_lam=0.6", dash, recommendation=tmp_path, label_names=LABELS
    )
    assert perturb.settings["perturb_lam"] == 0.6
    assert "alpha" not in perturb.settings


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog", "cow"], r"it lacks \['cow'\], and only it has \[\]"),
        (["cat"], r"it lacks \[\], and only it has \['dog'\]"),
        (["3", "7"], r"it lacks \['3', '7'\], and only it has \['cat', 'dog'\]"),
    ],
)
def test_a_recommendation_for_other_classes_is_refused(tmp_path, labels, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=f"recommendation must be of a comparison.*{message}"):
        choose_start("auto", DashConfig(), recommendation=tmp_path, label_names=labels)


def test_settings_that_contradict_the_recommendation_are_refused(tmp_path):
    write(tmp_path)

    def choose(**settings):
        dash = DashConfig(**settings)
        return choose_start("auto", dash, recommendation=tmp_path, label_names=LABELS).dash

    with pytest.raises(ValueError, match=r"lam must be left out .* follows lam=0.3, got 0.5"):
        choose(lam=0.5)
    assert choose(alpha=0.1).alpha == 0.1
    # Memory and places are this machine's own affair.
    assert choose(micro_batch_size=8) == DashConfig(alpha=0.1, micro_batch_size=8)
    assert choose(base="checkpoint").base == "checkpoint"


@pytest.mark.parametrize("name", ["l2_init", "l2_init+l2_init_lam=0.1", "lukewarm", "dash+alpha=2"])
def test_starts_that_no_trainer_can_begin_with_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"start must|alpha must"):
        choose_start(name, DashConfig(), recommendation=tmp_path, label_names=LABELS)
    write(tmp_path, {"cold": 0.5, "warm": 0.4, "l2_init": 0.6})
    with pytest.raises(ValueError, match=r"start must not be one of .* got 'l2_init'"):
        choose_start("auto", DashConfig(), recommendation=tmp_path, label_names=LABELS)


def begun(name, model, round_, **settings):
    dash = DashConfig(**settings)
    chosen = choose_start(name, dash, recommendation="none", label_names=LABELS)
    before = state_of(model)
    seconds = chosen.begin_(model, round_, seed=3)
    return before, state_of(model), seconds


@pytest.mark.parametrize("name", ["warm", "warm_reset_momentum", "dash"])
def test_warm_and_dash_leave_the_weights_until_training_begins(two_rounds, small_model, name):
    before, after, _ = begun(name, small_model, two_rounds[1])
    assert same_state(before, after)


def test_shrink_and_perturb_changes_the_weights_before_training(two_rounds, small_model):
    before, after, seconds = begun("shrink_perturb+perturb_sigma=0", small_model, two_rounds[1])
    name = next(name for name in before if name.endswith("fc.weight"))
    assert (after[name] - 0.3 * before[name]).abs().max() < 1e-7
    assert seconds > 0


def test_what_is_random_follows_from_seed_and_round(two_rounds, small_model):
    first = state_of(small_model)
    changed = []
    for round_ in (*two_rounds, two_rounds[1]):
        small_model.load_state_dict(first)
        changed.append(begun("shrink_perturb", small_model, round_)[1])
    assert not same_state(changed[0], changed[1])
    assert same_state(changed[1], changed[2])


@pytest.fixture
def fine_tuned(tmp_path, small_model):
    """A model that began from a checkpoint, as its history says, one point away from it."""
    hf_dash.save_model(small_model, tmp_path / "checkpoint")
    with torch.no_grad():
        for parameter in small_model.parameters():
            parameter.add_(1)
    hf_dash.save_model(small_model, tmp_path / "model")
    records = [record("warm", parent="checkpoint")]
    write_history(tmp_path / "model" / "history.json", {}, records)
    return hf_dash.load_model(str(tmp_path / "model"))


def test_starts_go_back_to_the_checkpoint_of_round_1(fine_tuned, two_rounds, tmp_path):
    checkpoint = state_of(hf_dash.load_model(str(tmp_path / "checkpoint")))
    _, perturbed, _ = begun("shrink_perturb+perturb_sigma=0", fine_tuned, two_rounds[1])
    name = next(name for name in checkpoint if "conv" in name)
    assert (perturbed[name] - checkpoint[name] - 0.3).abs().max() < 1e-6
    _, cold, _ = begun("cold", fine_tuned, two_rounds[1])
    same = [name for name in cold if torch.equal(cold[name], checkpoint[name])]
    assert {name for name in cold if name not in same} <= {n for n in cold if ".fc." in n}


def test_where_round_1_began_must_be_known(fine_tuned, two_rounds, tmp_path):
    (tmp_path / "model" / "history.json").unlink()
    for name in ("cold", "shrink_perturb"):
        with pytest.raises(ValueError, match=f"base must be given for start '{name}', since"):
            begun(name, fine_tuned, two_rounds[1])
    before, after, _ = begun(
        "shrink_perturb+perturb_sigma=0", fine_tuned, two_rounds[1], base="zero"
    )
    name = next(name for name in before if name.endswith("fc.weight"))
    assert (after[name] - 0.3 * before[name]).abs().max() < 1e-6
    begun("warm", fine_tuned, two_rounds[1])


def test_a_start_that_needs_timm_refuses_another_model(two_rounds):
    with pytest.raises(TypeError, match="timm"):
        begun("cold", tiny_vit(), two_rounds[1])
