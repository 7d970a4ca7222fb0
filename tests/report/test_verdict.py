import math
from dataclasses import replace

import pytest
from helpers import REPOSITORY, record

import hf_dash
from hf_dash.report import NothingToCompareError, read_evidence, start_verdict


def runs(start, accuracies, steps=100, rounds=3, **changes):
    """Records of ``rounds`` rounds per seed, with its accuracy from the second round on."""
    return [
        record(
            start,
            seed=seed,
            round_index=index,
            accuracy=0.3 if index == 1 else accuracy,
            steps=steps,
            **changes,
        )
        for seed, accuracy in enumerate(accuracies)
        for index in range(1, rounds + 1)
    ]


COLD = runs("cold", [0.50, 0.40, 0.60])

# Below cold by 3, 4 and 5 points; by 4 … on average, and 4 ± 2.484 with t(0.975, 2) / √3 = 2.484.
WARM = runs("warm", [0.47, 0.36, 0.55], steps=25)

# Above cold by 2.0, 2.1 and 2.2 points: 2.1 ± 0.248.
DASH = runs("dash", [0.520, 0.421, 0.622], steps=80)


def test_a_clear_winner_is_recommended_with_its_interval_and_price():
    verdict = start_verdict([*COLD, *WARM, *DASH])
    assert verdict.sentence == (
        "dash: +2.1 points (1.9 … 2.3) vs. cold in 0.80 of the steps; warm −4.0 in 0.25: use dash"
    )
    assert (verdict.start, verdict.baseline, verdict.seeds) == ("dash", "cold", (0, 1, 2))
    dash, warm = verdict.comparisons
    assert (dash.points, dash.low, dash.high) == pytest.approx((2.1, 1.8516, 2.3484), abs=1e-4)
    assert (warm.points, warm.low, warm.high) == pytest.approx((-4, -6.4841, -1.5159), abs=1e-4)
    assert (dash.steps, warm.steps) == pytest.approx((0.8, 0.25))
    assert (verdict.last_round, verdict.left_out) == (3, ())


def test_the_first_round_does_not_count():
    other = [replace(r, accuracy=0.0, steps=9) if r.round_index == 1 else r for r in DASH]
    assert start_verdict([*COLD, *WARM, *other]) == start_verdict([*COLD, *WARM, *DASH])


def test_the_order_of_records_and_seeds_does_not_matter():
    verdict = start_verdict([*COLD[::-1], *WARM, *DASH[::-1]])
    assert verdict == start_verdict([*COLD, *WARM, *DASH])


def test_overlapping_intervals_recommend_the_cheapest():
    # 1, 2 and 3 points above cold, 2 ± 2.484: zero is inside.
    dash = runs("dash", [0.51, 0.42, 0.63], steps=80)
    # 0, 1 and −1 points; dash is 1, 1 and 4 above: 2 ± 4.303.
    warm = runs("warm", [0.50, 0.41, 0.59], steps=25)
    assert start_verdict([*COLD, *warm, *dash]).sentence == (
        "warm: +0.0 points (−2.5 … 2.5) vs. cold in 0.25 of the steps; dash +2.0 in 0.80;"
        " no start differs by more than the noise: keep warm, it is the cheapest"
    )


@pytest.mark.parametrize(("count", "seeds"), [(1, "1 seed is"), (2, "2 seeds are")])
def test_fewer_than_three_seeds_recommend_the_cheapest_and_say_so(count, seeds):
    records = [r for r in (*COLD, *WARM, *DASH) if r.seed < count]
    verdict = start_verdict(records)
    assert verdict.start == "warm"
    assert verdict.sentence.endswith(
        f"; {seeds} too few to choose by, 3 are needed: keep warm, it is the cheapest"
    )
    assert verdict.sentence.startswith("warm: −")
    # Two seeds have an interval, with t(0.975, 1) = 12.706 for one degree of freedom.
    dash = verdict.comparisons[1]
    assert (dash.low is None) == (count == 1)
    if count == 2:
        assert (dash.low, dash.high) == pytest.approx((2.05 - 0.6353, 2.05 + 0.6353), abs=1e-3)


def test_a_better_start_is_recommended_even_if_it_costs_more():
    costly = [replace(r, steps=125) for r in DASH]
    assert start_verdict([*COLD, *WARM, *costly]).sentence == (
        "dash: +2.1 points (1.9 … 2.3) vs. cold in 1.25 of the steps; warm −4.0 in 0.25: use dash"
    )


def test_of_those_that_nobody_beats_the_cheapest_is_recommended():
    # As good as dash, for fewer steps than dash and more than warm.
    fire = runs("fire", [0.522, 0.420, 0.621], steps=60)
    verdict = start_verdict([*COLD, *WARM, *DASH, *fire])
    assert verdict.start == "fire"
    assert verdict.sentence.endswith(": use fire, the cheapest that no other start beats")


def test_cold_can_win():
    worse = runs("dash", [0.48, 0.379, 0.581], steps=80)
    assert start_verdict([*COLD, *WARM, *worse]).sentence == (
        "warm: −4.0 points (−6.5 … −1.5) vs. cold in 0.25 of the steps; dash −2.0 in 0.80: use cold"
    )


def test_without_warm_the_cheapest_other_start_is_used():
    verdict = start_verdict([*COLD, *runs("dash", [0.51, 0.42, 0.63], steps=80)])
    assert verdict.sentence == (
        "dash: +2.0 points (−0.5 … 4.5) vs. cold in 0.80 of the steps;"
        " no start differs by more than the noise: use dash, it is the cheapest"
    )


def test_without_cold_the_cheapest_start_is_the_baseline():
    # Dash is above warm by 5.0, 6.1 and 7.2 points: 6.1 ± 2.733.
    assert start_verdict([*WARM, *DASH]).sentence == (
        "dash: +6.1 points (3.4 … 8.8) vs. warm in 3.20 of the steps: use dash"
    )


def test_unfinished_seeds_are_left_out_and_named():
    killed = [r for r in DASH if (r.seed, r.round_index) != (2, 3)]
    verdict = start_verdict([*COLD, *WARM, *killed])
    assert (verdict.seeds, verdict.left_out, verdict.start) == ((0, 1), ("seed 2",), "warm")
    assert "; incomplete and left out: seed 2; 2 seeds are too few" in verdict.sentence


def test_a_gap_ends_what_is_finished():
    gap = [r for r in DASH if (r.seed, r.round_index) != (2, 2)]
    assert start_verdict([*COLD, *WARM, *gap]).seeds == (0, 1)


def test_a_start_that_stopped_early_is_left_out_and_named():
    begun = runs("fire", [0.9, 0.9, 0.9], rounds=2)
    verdict = start_verdict([*begun, *COLD, *WARM, *DASH])
    assert (verdict.start, verdict.left_out) == ("dash", ("fire",))
    assert "incomplete and left out: fire: use dash" in verdict.sentence


def test_rounds_that_one_start_alone_has_do_not_count():
    alone = [replace(DASH[2], seed=seed, round_index=4, accuracy=0.1) for seed in range(3)]
    verdict = start_verdict([*COLD, *WARM, *DASH, *alone])
    assert verdict == start_verdict([*COLD, *WARM, *DASH])


@pytest.mark.parametrize(
    "records",
    [
        [],
        DASH,
        [r for r in (*COLD, *DASH) if r.round_index == 1],
        [*COLD[:3], *(r for r in DASH if r.seed == 1)],
    ],
    ids=["none", "one start", "first rounds", "other seeds"],
)
def test_nothing_to_compare_is_an_error_of_its_own(records):
    with pytest.raises(NothingToCompareError, match="records must hold a second round of at least"):
        start_verdict(records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": math.nan}, r"accuracy must be in \[0, 1\], got nan for start 'dash', seed 1"),
        ({"accuracy": math.inf}, r"accuracy must be in \[0, 1\], got inf"),
        ({"accuracy": 50.0}, r"accuracy must be in \[0, 1\], got 50.0"),
        ({"steps": 0}, "steps must be at least 1, got 0 for start 'dash', seed 1 and round 3"),
        ({"steps": math.nan}, "steps must be at least 1, got nan"),
    ],
)
def test_impossible_numbers_are_refused(changes, message):
    wrong = [replace(r, **changes) if (r.seed, r.round_index) == (1, 3) else r for r in DASH]
    with pytest.raises(ValueError, match=message):
        start_verdict([*COLD, *WARM, *wrong])


@pytest.mark.parametrize("name", ["data_fingerprint", "held_out_fingerprint"])
def test_starts_on_other_images_are_not_compared(name):
    mine = [replace(r, **{name: f"a{r.round_index}"}) for r in COLD]
    theirs = [replace(r, **{name: f"b{r.round_index}"}) for r in DASH]
    with pytest.raises(ValueError, match=f"{name} must be the same for all starts, got 'b1'"):
        start_verdict([*mine, *theirs])
    # Records of older versions have none.
    assert start_verdict([*mine, *DASH, *WARM]).start == "dash"


def test_a_confidence_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 1"):
        start_verdict([*COLD, *DASH], confidence=1)
    # 2.1 ± 0.573 with t(0.995, 2) = 9.925.
    dash = start_verdict([*COLD, *DASH], confidence=0.99).comparisons[0]
    assert (dash.low, dash.high) == pytest.approx((2.1 - 0.5730, 2.1 + 0.5730), abs=1e-4)


def test_a_tie_in_steps_goes_to_fewer_images_then_to_warm_then_to_the_first():
    same = [0.5, 0.4, 0.6]

    def cheapest(*records):
        return start_verdict([one for group in records for one in group]).start

    cold = runs("cold", same, images_read=100)
    fewer, warm = runs("dash", same, images_read=90), runs("warm", same, images_read=100)
    assert cheapest(cold, warm, fewer) == "dash"
    assert cheapest(cold, runs("dash", same, images_read=100), warm) == "warm"
    assert cheapest(runs("fire", same), runs("dash", same)) == "fire"
    # What is unknown does not win.
    assert cheapest(cold, runs("warm", same)) == "cold"


def test_identical_starts_do_not_differ():
    verdict = start_verdict([*COLD, *runs("warm", [0.5, 0.4, 0.6]), *runs("dash", [0.5, 0.4, 0.6])])
    assert verdict.sentence == (
        "warm: +0.0 points (0.0 … 0.0) vs. cold in 1.00 of the steps; dash +0.0 in 1.00;"
        " no start differs by more than the noise: keep warm, it is the cheapest"
    )


def test_real_records():
    """Three starts on CIFAR-10, three seeds; the first command; the digits: nothing is gained."""
    results = REPOSITORY / "recipes" / "results"
    fashion = read_evidence(results / "fashion_mnist").records
    assert start_verdict(fashion).sentence == (
        "dash: +1.5 points (1.0 … 2.0) vs. cold in 1.00 of the steps; warm −1.1 in 0.36: use dash"
    )
    few = start_verdict([record for record in fashion if record.seed < 2])
    assert (few.start, few.seeds) == ("warm", (0, 1))
    cifar = read_evidence(results / "cifar10_5_rounds").records
    assert start_verdict(cifar).sentence == (
        "dash: +1.3 points (0.2 … 2.4) vs. cold in 0.77 of the steps; warm −1.6 in 0.76: use dash"
    )
    digits = start_verdict(hf_dash.report.read_evidence(results / "digits").records)
    assert digits.sentence.endswith(
        "no start differs by more than the noise: keep warm, it is the cheapest"
    )


def test_real_records_on_which_no_costlier_start_pays():
    """A fixed number of epochs from scratch; two seeds that have all starts."""
    results = REPOSITORY / "recipes" / "results"
    fixed = start_verdict(read_evidence(results / "scratch_fixed").records)
    assert (fixed.start, fixed.seeds) == ("warm", (0, 1, 2, 3, 4))
    # DASH is beaten, though all take the same steps.
    assert fixed.sentence.endswith(": keep warm, the cheapest that no other start beats")
    few = start_verdict(read_evidence(results / "convnext").records)
    # Warm takes the fewest steps, and two seeds are too few to prefer DASH, 1.4 points above.
    assert (few.start, few.seeds) == ("warm", (1, 2))
    assert few.sentence.endswith("3 are needed: keep warm, it is the cheapest")
