import json
from math import comb

import numpy as np
import pytest
from scipy.stats import bootstrap

from hf_dash.runs import Comparison, PairedAccuracy, PromotionRules, compare_models, decide


def answers(both=0, gained=0, lost=0, neither=0):
    """Return two models' predictions of examples that are all of class 1."""
    challenger = [1] * both + [1] * gained + [0] * lost + [0] * neither
    champion = [1] * both + [0] * gained + [1] * lost + [0] * neither
    return np.array(challenger), np.array(champion), np.ones(len(champion), dtype=int)


def test_a_comparison_by_hand():
    # Right: both 4, the challenger alone 5, the champion alone 1, neither 0.
    overall = compare_models(*answers(both=4, gained=5, lost=1)).overall
    assert (overall.num_examples, overall.champion, overall.challenger) == (10, 0.5, 0.9)
    assert overall.difference == pytest.approx(0.4)
    # McNemar: of 6 fair coins, at most 1 or at least 5 heads: 2·(1 + 6)/64.
    assert overall.p_value == pytest.approx(14 / 64)
    # Bonett and Price: 6/12 and 2/12, 1/3 ± 1.96·√((2/3 − 1/9)/12).
    assert overall.low == pytest.approx(1 / 3 - 1.959964 * (5 / 9 / 12) ** 0.5, abs=1e-6)
    assert overall.high == pytest.approx(1 / 3 + 1.959964 * (5 / 9 / 12) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 8), (3, 9), (20, 21)])
def test_the_exact_test_counts_coins(gained, lost):
    coins = gained + lost
    rarest = min(gained, lost)
    expected = min(1.0, 2 * sum(comb(coins, heads) for heads in range(rarest + 1)) / 2**coins)
    result = compare_models(*answers(both=7, gained=gained, lost=lost)).overall
    assert result.p_value == pytest.approx(expected)


def test_exchanging_the_models_turns_the_sign():
    challenger, champion, references = answers(both=50, gained=9, lost=4, neither=7)
    one = compare_models(challenger, champion, references).overall
    other = compare_models(champion, challenger, references).overall
    assert other.difference == -one.difference
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
    assert other.p_value == one.p_value


def test_models_that_agree_are_not_taken_for_equal_beyond_what_the_examples_tell():
    few, many = (compare_models(*answers(both=count)).overall for count in (10, 1000))
    assert few.low < many.low < 0 < many.high < few.high


def test_the_interval_covers_a_known_difference_as_often_as_it_says():
    # Of all examples the challenger alone is right on 10 %, the champion alone on 4 %.
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        both, gained, lost = generator.multinomial(150, [0.86, 0.1, 0.04])
        overall = compare_models(*answers(both, gained, lost)).overall
        covered += overall.low <= 0.06 <= overall.high
    # 95 % of 400, ± 4 standard deviations.
    assert abs(covered - 380) <= 4 * (400 * 0.95 * 0.05) ** 0.5


def test_the_interval_is_the_bootstrap_s_where_there_are_many_examples():
    challenger, champion, references = answers(both=3000, gained=250, lost=150, neither=600)
    overall = compare_models(challenger, champion, references, confidence=0.9).overall
    resampled = bootstrap(
        (challenger, champion),
        lambda a, b, axis: (a - b).mean(axis=axis),
        paired=True,
        n_resamples=2000,
        confidence_level=0.9,
        method="percentile",
        random_state=0,
    ).confidence_interval
    assert (overall.low, overall.high) == pytest.approx(tuple(resampled), abs=1e-3)


def test_classes_are_compared_one_by_one_under_their_names():
    references = np.array([0, 0, 0, 0, 2, 2, -1, -1])
    challenger = np.array([0, 0, 0, 1, 2, 0, 0, -1])
    champion = np.array([0, 1, 1, 1, 2, 2, 1, -1])
    result = compare_models(challenger, champion, references, label_names=["a", "b", "c"])
    accuracies = {
        k: (p.num_examples, p.champion, p.challenger) for k, p in result.per_class.items()
    }
    assert accuracies == {"a": (4, 0.25, 0.75), "c": (2, 1.0, 0.5)}
    # A class without a name is wrong whatever is predicted, but counts.
    assert result.overall.num_examples == 8
    assert (result.overall.champion, result.overall.challenger) == (3 / 8, 4 / 8)
    assert list(compare_models(challenger, champion, references).per_class) == ["0", "2"]


def test_the_intervals_of_the_classes_hold_together():
    # 1 − 0.05/2 each, for two classes: as wide as one class alone at 0.975.
    challenger, champion, references = answers(both=20, gained=3, lost=1)
    doubled = [np.concatenate([part, part + 2]) for part in (challenger, champion, references)]
    together = compare_models(*doubled).per_class
    alone = compare_models(challenger, champion, references, confidence=0.975).overall
    for paired in together.values():
        assert (paired.low, paired.high) == pytest.approx((alone.low, alone.high))


def test_all_of_it_goes_into_json():
    comparison = compare_models(*answers(both=4, gained=5, lost=1), label_names=["a", "b"])
    content = json.loads(json.dumps(comparison.to_dict()))
    assert content["overall"]["challenger"] == 0.9
    assert content["per_class"]["b"]["num_examples"] == 10
    assert content["confidence"] == 0.95


def paired(difference, low, high):
    return PairedAccuracy(100, 0.5, 0.5 + difference, difference, low, high, 0.5)


def comparison(difference, low, high, **classes):
    return Comparison(
        paired(difference, low, high), {k: paired(*v) for k, v in classes.items()}, 0.95
    )


@pytest.mark.parametrize(
    ("overall", "classes", "reasons"),
    [
        ((0.01, -0.01, 0.03), {}, []),
        ((0.0, -0.02, 0.02), {}, []),
        ((-0.001, -0.01, 0.01), {}, ["the gain is below min_gain, 0.00%"]),
        ((0.01, -0.021, 0.04), {}, ["a loss of more than max_loss, 2.00%, is not excluded"]),
        (
            (-0.03, -0.05, -0.01),
            {},
            [
                "significantly worse overall",
                "the gain is below min_gain, 0.00%",
                "a loss of more than max_loss, 2.00%, is not excluded",
            ],
        ),
        # Not significant; significant but small; both.
        ((0.01, 0.0, 0.02), {"cat": (-0.2, -0.4, 0.01), "dog": (-0.05, -0.08, -0.02)}, []),
        (
            (0.01, 0.0, 0.02),
            {"cat": (-0.06, -0.1, -0.02), "dog": (0.3, 0.1, 0.5), "eel": (-0.5, -0.7, -0.3)},
            [
                "significantly worse by more than max_class_drop, 5.00%, on 'cat' -6.00%, 'eel'"
                " -50.00%"
            ],
        ),
    ],
)
def test_verdicts_and_their_reasons(overall, classes, reasons):
    verdict = decide(comparison(*overall, **classes))
    assert verdict.promote == (not reasons)
    words, measured = verdict.reason.rsplit("; ", 1)
    assert words == "; ".join(reasons or ["not worse overall, and no class drops"])
    assert measured == (
        f"the difference in accuracy is {overall[0]:+.2%} (95% interval {overall[1]:+.2%} to"
        f" {overall[2]:+.2%})"
    )


def test_the_limits_may_be_set():
    close = comparison(-0.004, -0.01, 0.003, cat=(-0.1, -0.15, -0.05))
    assert decide(close, PromotionRules(min_gain=-0.005, max_class_drop=0.1)).promote
    assert "min_gain, 0.50%" in decide(close, PromotionRules(min_gain=0.005)).reason
    assert "max_loss, 0.90%" in decide(close, PromotionRules(max_loss=0.009)).reason


def test_the_verdict_on_real_counts():
    # 2 % of a thousand examples gained, 1 % lost: too good to be refused, by hand 30/1002 apart.
    good = decide(compare_models(*answers(both=970, gained=20, lost=10)))
    assert good.promote
    # As good as the champion, but twenty examples cannot exclude a loss.
    few = decide(compare_models(*answers(both=18, gained=1, lost=1)))
    assert few.reason.startswith("a loss of more than max_loss")
    worse = decide(compare_models(*answers(both=970, gained=5, lost=25), label_names=["a", "b"]))
    assert worse.reason.startswith("significantly worse overall")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"champion": np.array([0])}, r"champion must have one label .* 2, got the shape \(1,\)"),
        ({"challenger": np.zeros((2, 2), int)}, "challenger must have one label for every"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"label_names": ["a"]}, r"label_names must name the labels 0 … 1, got \['a'\]"),
        ({"label_names": ["a", "a"]}, "label_names must be different"),
    ],
)
def test_bad_input_is_refused(changes, message):
    arrays = {name: np.array([0, 1]) for name in ("challenger", "champion", "references")}
    with pytest.raises(ValueError, match=message):
        compare_models(**{**arrays, **changes})


def test_no_examples_and_no_integers_are_refused():
    empty = np.array([], dtype=int)
    with pytest.raises(ValueError, match="must have one label for every held-out example"):
        compare_models(empty, empty, empty)
    labels = np.array([0, 1])
    with pytest.raises(TypeError, match="challenger must hold integer labels, got float64"):
        compare_models(labels * 0.5, labels, labels)


@pytest.mark.parametrize(
    ("rule", "value"),
    [("min_gain", 1.5), ("max_loss", -0.1), ("max_class_drop", 2), ("max_loss", float("nan"))],
)
def test_limits_out_of_range_are_refused(rule, value):
    with pytest.raises(ValueError, match=rf"{rule} must be in \[.*, 1\], got {value}"):
        PromotionRules(**{rule: value})
