from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from helpers import heard

import hf_dash
from hf_dash import History, promote, read_history, rollback
from hf_dash.history import RoundRecord, chained, write_history
from hf_dash.runs import HeldOut, PromotionRules

DIGITS = [str(digit) for digit in range(10)]


# No class is too much worse to be promoted.
ANY_CLASS = PromotionRules(max_class_drop=1.0)


FIRST, SECOND, THIRD = (f"rounds/{index:03d}/dash_seed0" for index in (1, 2, 3))


def save_constant(folder: Path, answer: str, label_names=DIGITS, image_size=32):
    """Save a model whose every prediction is the class ``answer``."""
    model = hf_dash.create_model("test_resnet", label_names=label_names, image_size=image_size)
    head = model.timm_model.get_classifier()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.eye(len(label_names))[label_names.index(answer)])
    hf_dash.save_model(model, folder)


def record(round_index, start="dash"):
    return RoundRecord(
        start=start,
        seed=0,
        round_index=round_index,
        num_new=10,
        num_total=10 * round_index,
        accuracy=0.5,
        per_class_accuracy={},
        train_accuracy=1.0,
        converged=True,
        epochs=1,
        steps=1,
        start_seconds=0.0,
        train_seconds=1.0,
        parent=None if round_index == 1 else f"rounds/{round_index - 1:03d}/{start}_seed0",
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models that always say 3 and always say 5, once for all tests."""
    folder = tmp_path_factory.mktemp("models")
    for answer in ("3", "5"):
        save_constant(folder / answer, answer)
    return folder


@pytest.fixture
def run(tmp_path, models):
    """A run of three rounds, whose models say 5, 3 and 5."""
    history = History(tmp_path / "history.jsonl", {"output_dir": "run"})
    for index, answer in ((1, "5"), (2, "3"), (3, "5")):
        history.append(record(index))
        folder = tmp_path / history.records[-1].folder
        folder.parent.mkdir(parents=True)
        copy(models / answer, folder)
    return tmp_path


def copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def held_out(digits_test):
    """30 threes and 10 fives, for any transform."""
    labels = digits_test["label"][:]
    rows = [i for i, label in enumerate(labels) if label == 3][:30]
    rows += [i for i, label in enumerate(labels) if label == 5][:10]
    images = digits_test.select(rows)
    return lambda transform: hf_dash.data.ImageExamples(images, transform, in_memory=True)


def entries(run):
    return read_history(run / "history.jsonl").promotions


def test_the_first_challenger_is_the_first_champion(run, held_out, accelerator):
    verdict = promote(run, FIRST, held_out, accelerator=accelerator)
    assert (verdict.promote, verdict.reason, verdict.comparison) == (True, "first champion", None)
    (entry,) = entries(run)
    assert (entry.kind, entry.challenger, entry.champion) == ("promote", FIRST, None)
    assert (entry.accuracy, entry.num_held_out, entry.comparison) == (0.25, 40, None)
    assert datetime.fromisoformat(entry.time).utcoffset() == timedelta(0)
    assert read_history(run / "history.jsonl").champion == FIRST


def test_a_better_challenger_takes_over_and_a_worse_one_does_not(run, held_out, accelerator):
    promote(run, FIRST, held_out, accelerator=accelerator)
    # Alone right: 30 threes against 10 fives. The class of the fives is lost, significantly.
    refused = promote(run, SECOND, held_out, accelerator=accelerator)
    assert not refused.promote
    assert "max_class_drop, 5.00%, on '5' -100.00%" in refused.reason
    taken = promote(run, SECOND, held_out, rules=ANY_CLASS, accelerator=accelerator)
    assert taken.promote
    overall = taken.comparison.overall
    assert (overall.champion, overall.challenger, overall.difference) == (0.25, 0.75, 0.5)
    assert taken.comparison.per_class["3"].difference == 1.0
    assert read_history(run / "history.jsonl").champion == SECOND

    worse = promote(run, THIRD, held_out, accelerator=accelerator)
    assert not worse.promote
    assert worse.reason.startswith("significantly worse overall")
    found = entries(run)
    assert [(e.kind, e.challenger, e.champion) for e in found] == [
        ("promote", FIRST, None),
        ("reject", SECOND, FIRST),
        ("promote", SECOND, FIRST),
        ("reject", THIRD, SECOND),
    ]
    assert [e.reason for e in found[1:]] == [refused.reason, taken.reason, worse.reason]
    assert found[2].comparison == taken.comparison.to_dict()
    assert len({e.held_out_fingerprint for e in found}) == 1
    assert read_history(run / "history.jsonl").champion == SECOND
    assert len(read_history(run / "history.jsonl").records) == 3


def test_of_two_promotions_at_once_the_second_is_compared_with_the_first(
    run, held_out, accelerator
):
    def meanwhile(transform):
        if not entries(run):  # in the comparison that would make FIRST the first champion
            promote(run, SECOND, held_out, accelerator=accelerator)
        return held_out(transform)

    with heard() as messages:
        verdict = promote(run, FIRST, meanwhile, accelerator=accelerator)
    assert not verdict.promote
    assert verdict.reason.startswith("significantly worse overall")
    found = [(e.kind, e.challenger, e.champion) for e in entries(run)]
    assert found == [("promote", SECOND, None), ("reject", FIRST, SECOND)]
    assert messages == ["another model became champion meanwhile: compared again"]


def test_a_comparison_that_others_always_overtake_is_given_up(run, held_out, accelerator):
    calls = []

    def meanwhile(transform):
        calls.append(transform)
        if len(calls) in (1, 2, 4):  # once in each of the comparisons
            other = THIRD if read_history(run / "history.jsonl").champion == SECOND else SECOND
            promote(run, other, held_out, force=True, accelerator=accelerator)
        return held_out(transform)

    with pytest.raises(ValueError, match=f"challenger '{FIRST}' was compared 3 times"):
        promote(run, FIRST, meanwhile, accelerator=accelerator)
    assert FIRST not in {entry.challenger for entry in entries(run)}


def test_a_model_that_contradicts_its_record_is_refused(run, held_out, accelerator):
    history = read_history(run / "history.jsonl")
    images = hf_dash.data.rounds.joint_fingerprint([held_out(None)])

    def recorded(accuracy, **changes):
        changed = [replace(r, accuracy=accuracy, **changes) for r in history.records]
        write_history(run / "history.jsonl", history.settings, chained(changed))
        (run / "champion.json").unlink(missing_ok=True)

    recorded(0.339, held_out_fingerprint=images)
    with pytest.raises(ValueError, match=r"accuracy of 25\.00%, but its record says 33\.90%"):
        promote(run, FIRST, held_out, accelerator=accelerator)
    assert entries(run) == []
    # Other images say nothing about the record, and a little is the device's.
    recorded(0.339, held_out_fingerprint="0" * 64)
    assert promote(run, FIRST, held_out, accelerator=accelerator).promote
    recorded(0.26, held_out_fingerprint=images)
    assert promote(run, FIRST, held_out, accelerator=accelerator).promote


def test_a_forced_promotion_is_recorded_with_the_verdict_against_it(run, held_out, accelerator):
    promote(run, SECOND, held_out, force=True, accelerator=accelerator)
    verdict = promote(run, THIRD, held_out, force=True, accelerator=accelerator)
    assert verdict.promote
    assert verdict.reason.startswith("forced, in spite of: significantly worse overall")
    # Nothing had to be forced the first time.
    assert [e.kind for e in entries(run)] == ["promote", "force"]
    assert entries(run)[1].reason == verdict.reason
    assert read_history(run / "history.jsonl").champion == THIRD


def test_another_round_may_be_compared_with(run, held_out, accelerator):
    promote(run, FIRST, held_out, accelerator=accelerator)
    verdict = promote(run, THIRD, held_out, champion=SECOND + "/", accelerator=accelerator)
    assert not verdict.promote
    assert entries(run)[1].champion == SECOND
    assert read_history(run / "history.jsonl").champion == FIRST


def test_labels_are_compared_by_name(run, held_out, accelerator):
    # A grown head, its classes in another order, and another size of image.
    save_constant(run / SECOND, "3", ["dog", "5", "3"], image_size=40)
    promote(run, FIRST, held_out, accelerator=accelerator)
    verdict = promote(run, SECOND, held_out, rules=ANY_CLASS, accelerator=accelerator)
    assert (verdict.comparison.overall.champion, entries(run)[1].accuracy) == (0.25, 0.75)
    assert set(verdict.comparison.per_class) == {"3", "5"}
    # A class the champion does not know is one it is wrong about.
    save_constant(run / FIRST, "0", ["0", "1"])
    verdict = promote(run, SECOND, held_out, champion=FIRST, accelerator=accelerator)
    assert verdict.comparison.overall.champion == 0.0


def test_examples_may_be_given_with_the_names_of_their_labels(run, digits_test, accelerator):
    transform = hf_dash.models.image_transform(hf_dash.load_model(str(run / FIRST)))
    pixels = transform(digits_test[0]["image"])
    # Labels 0 and 1 mean 3 and 5; −1 means neither and is wrong.
    examples = [{"pixel_values": pixels, "labels": label} for label in (0, 0, 1, -1)]
    names = ["3", "5"]
    shown = HeldOut(examples, label_names=names)
    promote(run, FIRST, shown, accelerator=accelerator)
    promote(run, SECOND, replace(shown, fingerprint="given"), accelerator=accelerator)
    assert [e.accuracy for e in entries(run)] == [0.25, 0.5]
    assert entries(run)[0].held_out_fingerprint != entries(run)[1].held_out_fingerprint == "given"
    save_constant(run / THIRD, "5", image_size=40)
    with pytest.raises(ValueError, match="held_out must be a callable from a transform"):
        promote(run, THIRD, shown, accelerator=accelerator)
    assert len(entries(run)) == 2


def test_other_examples_change_the_fingerprint_and_must_not_differ_between_models(
    run, held_out, digits_test, accelerator
):
    promote(run, FIRST, held_out, accelerator=accelerator)
    others = [digits_test.select(range(5)), digits_test.select(range(5, 10))]
    with pytest.raises(ValueError, match="held_out must give both models the same examples"):
        promote(
            run,
            SECOND,
            lambda transform: hf_dash.data.ImageExamples(others.pop(), transform),
            accelerator=accelerator,
        )
    few = digits_test.select(range(5))
    promote(run, SECOND, lambda t: hf_dash.data.ImageExamples(few, t), accelerator=accelerator)
    first, second = entries(run)
    assert first.held_out_fingerprint != second.held_out_fingerprint


def test_rollback_goes_to_an_earlier_round_or_a_former_champion(run, held_out, accelerator):
    with pytest.raises(ValueError, match=r"to is .*, but .* has no champion to go back from"):
        rollback(run, FIRST)
    promote(run, SECOND, held_out, accelerator=accelerator)
    entry = rollback(run, FIRST, reason="complaints about threes")
    assert entries(run)[-1] == entry
    assert (entry.kind, entry.challenger, entry.champion) == ("rollback", FIRST, SECOND)
    assert entry.reason == "complaints about threes"
    assert read_history(run / "history.jsonl").champion == FIRST
    # Forward again only to what was champion: a round never promoted would pass by the comparison.
    with pytest.raises(ValueError, match="to must be of an earlier round than the champion"):
        rollback(run, THIRD)
    rollback(run, SECOND)
    assert read_history(run / "history.jsonl").champion == SECOND
    with pytest.raises(ValueError, match="to must not be the champion itself"):
        rollback(run, SECOND)
    assert [e.kind for e in entries(run)] == ["promote", "rollback", "rollback"]


@pytest.mark.parametrize("name", ["rounds/009/dash_seed0", "../other", "/etc", "rounds/001", ""])
def test_what_was_never_recorded_is_refused(run, held_out, accelerator, name):
    promote(run, SECOND, held_out, accelerator=accelerator)
    (run.parent / "other").mkdir(exist_ok=True)
    before = (run / "history.jsonl").read_bytes()
    for argument, call in {
        "to": lambda: rollback(run, name),
        "challenger": lambda: promote(run, name, held_out, accelerator=accelerator),
        "champion": lambda: promote(run, THIRD, held_out, champion=name, accelerator=accelerator),
    }.items():
        with pytest.raises(ValueError, match=f"{argument} must be the folder of a round recorded"):
            call()
    assert (run / "history.jsonl").read_bytes() == before


def test_folders_that_lead_out_or_are_gone_are_refused(run, held_out, accelerator):
    promote(run, THIRD, held_out, accelerator=accelerator)
    history = read_history(run / "history.jsonl")
    outside = record(1, start="../../../outside")
    assert not (run / outside.folder).resolve().is_relative_to(run)
    with pytest.raises(ValueError, match=r"start must be .*, got '\.\./\.\./\.\./outside'"):
        history.append(outside)
    # Not even where somebody else has recorded it.
    content = (run / "history.jsonl").read_bytes()
    linked = [*history.records, replace(outside, previous=history.head)]
    write_history(run / "history.jsonl", {}, linked, history.promotions)
    for call in (rollback, lambda *where: promote(*where, held_out, accelerator=accelerator)):
        with pytest.raises(ValueError, match=r"history\.jsonl is not a whole .* start must be"):
            call(run, outside.folder)
    (run / "history.jsonl").write_bytes(content)
    (run / SECOND).rename(run.parent / f"{run.name}_moved")
    (run / SECOND).symlink_to(run.parent / f"{run.name}_moved")
    with pytest.raises(ValueError, match=r"to must lie below .*, but .* leads out of it"):
        rollback(run, SECOND)
    with pytest.raises(ValueError, match="challenger must lie below"):
        promote(run, SECOND, held_out, accelerator=accelerator)
    (run / FIRST / "config.json").unlink()
    with pytest.raises(ValueError, match="its model is gone"):
        rollback(run, FIRST)
    with pytest.raises(TypeError, match="to must be a folder's name, got 3"):
        rollback(run, 3)
    assert len(entries(run)) == 1


def test_bad_input_is_refused_before_a_model_is_loaded(run, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dash.runs.promotion.load_model", None)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        promote(run, FIRST, held_out, rules=PromotionRules(confidence=95))
    with pytest.raises(ValueError, match=r"max_loss must be in \[0, 1\], got 2"):
        promote(run, FIRST, held_out, rules=PromotionRules(max_loss=2))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        promote(run, FIRST, HeldOut(held_out, batch_size=0))
    with pytest.raises(ValueError, match="challenger must not be the champion itself"):
        promote(run, FIRST, held_out, champion=FIRST)
    with pytest.raises(ValueError, match=r"output_dir must hold the history.jsonl of a run, got"):
        rollback(tmp_path / "nowhere", FIRST)
    assert entries(run) == []
