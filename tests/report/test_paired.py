import math

import pytest
from helpers import record

from hf_dash import History
from hf_dash.history import write_history
from hf_dash.report import (
    join_histories,
    order_table,
    paired_difference,
    paired_table,
    price_table,
)
from hf_dash.report.paired import share_of_steps


def runs(start, accuracies, steps=((10, 20),)):
    """Records of two rounds per seed: its accuracies and steps in both."""
    steps = steps * len(accuracies) if len(steps) == 1 else steps
    return [
        record(
            start,
            seed=seed,
            round_index=index + 1,
            accuracy=accuracies[seed][index],
            steps=steps[seed][index],
            images_read=100 * steps[seed][index],
        )
        for seed in range(len(accuracies))
        for index in range(2)
    ]


def last_accuracy(run):
    return 100 * run[-1].accuracy


def row(table, start):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


COLD = runs("cold", [(0.3, 0.50), (0.3, 0.40), (0.3, 0.60)])


DASH = runs("dash", [(0.3, 0.51), (0.3, 0.42), (0.3, 0.63)])


def test_a_hand_worked_interval():
    # Differences 1, 2, 3: standard deviation 1, t(0.975, 2 degrees) = 4.302653, over √3.
    difference = paired_difference([*COLD, *DASH], "dash", "cold", last_accuracy)
    assert difference.num_seeds == 3
    assert difference.mean == pytest.approx(2)
    assert difference.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert difference.high == pytest.approx(2 + 2.484138, abs=1e-6)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_intervals_of_two_and_three_seeds_are_those_of_the_closed_quantiles(confidence):
    # Student's quantile is tan(πc / 2) for one degree of freedom and c √(2 / (1 − c²)) for two.
    two = paired_difference(
        [*COLD[:4], *DASH[:4]], "dash", "cold", last_accuracy, confidence=confidence
    )
    reach = math.tan(math.pi * confidence / 2) * 0.5
    assert (two.low, two.high) == pytest.approx((1.5 - reach, 1.5 + reach), abs=1e-12, rel=1e-12)
    three = paired_difference([*COLD, *DASH], "dash", "cold", last_accuracy, confidence=confidence)
    reach = confidence * math.sqrt(2 / (1 - confidence**2)) / math.sqrt(3)
    assert (three.low, three.high) == pytest.approx((2 - reach, 2 + reach), abs=1e-12, rel=1e-12)


def test_what_all_starts_owe_to_a_seed_cancels():
    lucky = runs("dash", [(0.3, 0.52), (0.3, 0.42), (0.3, 0.62)])
    difference = paired_difference([*COLD, *lucky], "dash", "cold", last_accuracy)
    assert (difference.low, difference.high) == pytest.approx((2, 2))


def test_seeds_are_paired_by_number_and_unfinished_ones_left_out():
    records = [*reversed(DASH[:4]), *COLD]
    assert paired_difference(records, "dash", "cold", last_accuracy).mean == pytest.approx(1.5)
    unfinished = [*COLD, *DASH[:-1]]
    assert paired_difference(unfinished, "dash", "cold", last_accuracy).num_seeds == 2


@pytest.mark.parametrize(
    ("records", "start"), [([*COLD, *DASH[:2]], "dash"), (COLD, "dash"), ([], "dash")]
)
def test_one_seed_tells_nothing(records, start):
    with pytest.raises(ValueError, match=r"must have all rounds of at least two seeds in common"):
        paired_difference(records, start, "cold", last_accuracy)


def test_a_bad_confidence_is_refused():
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 1"):
        paired_difference([*COLD, *DASH], "dash", "cold", last_accuracy, confidence=1)


def test_the_paired_table_has_points_and_ratios():
    half = runs("fast", [(0.3, 0.50), (0.3, 0.40), (0.3, 0.60)], ((10, 10),))
    table = paired_table([*COLD, *DASH, *half, *runs("once", [(0.1, 0.1)])], "cold")
    assert row(table, "dash")[1:3] == ["3", "+2.00 (-0.48 … +4.48)"]
    assert row(table, "fast")[2:] == [
        "+0.00 (+0.00 … +0.00)",
        "+0.00 (+0.00 … +0.00)",
        "× 0.50 (0.50 … 0.50)",
        "× 0.50 (0.50 … 0.50)",
    ]
    assert "once" not in table  # one seed
    assert "| cold " not in table


def test_a_table_without_a_pair_is_refused():
    with pytest.raises(ValueError, match=r"records must hold baseline 'warm' .* got \['cold'\]"):
        paired_table(COLD, "warm")


def test_the_price_is_counted_until_the_goal():
    early = runs("early", [(0.5, 0.6)], ((3, 9),))
    never = runs("never", [(0.1, 0.2)])
    table = price_table([*COLD, *early, *never], "cold")
    # Cold ends at 50 % after 30 steps, 5 seconds, 3,000 images; early is there after round 1.
    assert row(table, "cold")[2:6] == ["2", "20", "30", "100%"]
    assert row(table, "early")[2:] == ["1", "10", "3", "10%", "2", "50%", "300", "10%"]
    assert row(table, "never")[2:] == ["never", *["–"] * 7]


def test_the_order_of_starts_is_counted_by_seed():
    low = runs("low", [(0.3, 0.4), (0.3, 0.5), (0.9, 0.5)])
    high = runs("high", [(0.3, 0.5), (0.3, 0.5), (0.2, 0.6), (0.3, 0.9)])
    *table, _, count = order_table([*low, *high, *COLD], ["low", "high"]).splitlines()
    # Round 1 does not count, a tie is not in order, and seed 3 has one start only.
    assert [[cell.strip() for cell in line.strip("| ").split("|")] for line in table[2:]] == [
        ["0", "40.00 %", "50.00 %", "yes"],
        ["1", "50.00 %", "50.00 %", "no"],
        ["2", "50.00 %", "60.00 %", "yes"],
    ]
    assert count.replace("\\", "") == "low < high in 2 of 3 seeds"


def test_an_order_needs_two_starts_and_a_whole_seed():
    with pytest.raises(ValueError, match=r"starts must name at least two, got \['cold'\]"):
        order_table(COLD, ["cold"])
    with pytest.raises(ValueError, match=r"all rounds of \['cold', 'warm'\]"):
        order_table(COLD, ["cold", "warm"])


def test_the_share_of_steps_counts_until_the_start_is_near_the_baseline():
    # Cold ends at 50 % after 30 steps in each seed.
    near = runs("near", [(0.47, 0.49), (0.37, 0.41)], ((3, 9), (5, 15)))
    assert share_of_steps([*COLD, *near], "near", "cold", points=5.01) == pytest.approx(16 / 30)
    assert share_of_steps([*COLD, *near], "near", "cold", points=4.9) is None
    assert share_of_steps([*COLD, *near], "near", "cold", points=8) == pytest.approx(4 / 30)


def test_a_price_needs_a_finished_baseline():
    with pytest.raises(ValueError, match="baseline must be a start with all rounds of a seed"):
        price_table(DASH, "cold")


def test_ledgers_of_one_protocol_are_joined(tmp_path):
    settings = {"lam": 0.3, "starts": ["cold"], "seeds": 2}
    write_history(tmp_path / "a.json", settings, COLD)
    write_history(tmp_path / "b.json", {**settings, "starts": ["dash"]}, DASH)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    joined = join_histories(paths)
    assert joined.records == [*COLD, *DASH]
    assert joined.settings == {"lam": 0.3}
    assert isinstance(joined, History)
    assert joined.path is None
    assert {r.seed for r in join_histories(paths, skip_seeds=[0]).records} == {1, 2}


def test_histories_that_runs_have_written_are_joined(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, records in zip(paths, (COLD, DASH), strict=True):
        history = History(path, {})
        for one in records:
            history.append(one)
    assert join_histories(paths).records == [*COLD, *DASH]
    assert {r.seed for r in join_histories(paths, skip_seeds=[0]).records} == {1, 2}


def test_workers_are_shared_where_they_matter(tmp_path):
    for name, workers, start in (("a", 0, COLD), ("b", 0, DASH), ("c", 2, DASH)):
        settings = {"streaming": True, "num_workers": workers}
        write_history(tmp_path / f"{name}.json", settings, start)
    joined = join_histories([tmp_path / "a.json", tmp_path / "b.json"])
    assert joined.settings == {"streaming": True, "num_workers": 0}
    with pytest.raises(ValueError, match="num_workers was 2, is 0"):
        join_histories([tmp_path / "a.json", tmp_path / "c.json"])


def test_histories_that_do_not_belong_together_are_refused(tmp_path):
    write_history(tmp_path / "a.json", {"lam": 0.3}, COLD)
    write_history(tmp_path / "b.json", {"lam": 0.1}, DASH)
    with pytest.raises(ValueError, match=r"lam was 0\.1, is 0\.3"):
        join_histories([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(ValueError, match="already has a record"):
        join_histories([tmp_path / "a.json"] * 2)
    with pytest.raises(ValueError, match="paths must name at least one history"):
        join_histories([])
