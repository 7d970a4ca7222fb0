import numpy as np
import pytest
from helpers import record

from hf_dash.report.tables import memorization_table, rounds_table, starts_table
from hf_dash.studies import Simulation, pretraining_table, simulations_table


def cells_of(table):
    """Return the cells of every line but the rule."""
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in line] for line in lines[:1] + lines[2:]]


def test_rounds_show_their_numbers_and_mark_what_did_not_converge():
    text = rounds_table([record(), record(round_index=2, converged=False, accuracy=0.25)])
    lines = text.splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["warm", "0", "2", "20", "25.00%", "30*", "2.5", "0.50"]
    assert lines[-1].endswith("before convergence")
    assert "*" not in rounds_table([record(converged=None)])


def test_starts_are_averaged_over_seeds():
    records = [
        record("dash", seed, index, accuracy=0.1 * index + 0.2 * seed, steps=10 * index)
        for seed in (0, 1)
        for index in (1, 2, 3)
    ]
    cells = [cell.strip() for cell in starts_table(records).splitlines()[2].strip("|").split("|")]
    # Last round: 0.3 and 0.5, whose sample standard deviation is 0.2 / √2; rounds 2, 3: means of
    # 0.2, 0.3 and of 0.4, 0.5. Steps of rounds 2, 3: 25. Seconds: three rounds of 2.5 and 0.5.
    assert cells == [
        "dash",
        "2",
        "40.00 ± 14.14 %",
        "35.00 ± 14.14 %",
        "30 ± 0",
        "25 ± 0",
        "7.5 ± 0.0",
        "1.50 ± 0.00",
    ]


def test_one_seed_has_no_spread():
    assert "±" not in starts_table([record(), record(round_index=2)])


def test_a_start_that_ended_earlier_says_where():
    rounds = {"cold": {0: 3, 1: 2}, "dash": {0: 4, 1: 4}, "warm": {0: 3, 1: 3}}
    records = [
        record(start, seed, index)
        for start, seeds in rounds.items()
        for seed, last in seeds.items()
        for index in range(1, last + 1)
    ]
    named = [row[0] for row in cells_of(starts_table(records))[1:]]
    assert named == ["cold, to rounds 2 to 3", "dash", "warm, to round 3"]


def test_images_read_are_summed_over_rounds_where_every_round_has_them():
    records = [
        record("dash", seed, n, images_read=1000 * n + seed) for seed in (0, 2) for n in (1, 2)
    ]
    records += [record("warm", 0, 1, images_read=500), record("warm", 0, 2)]
    old = [record(one.start, one.seed, one.round_index) for one in records]
    header, dash, warm = cells_of(starts_table(records))
    # 1,000 + 2,000 and 1,002 + 2,002: 3,002 ± 4 / √2.
    assert [header[-1], dash[-1], warm[-1]] == ["images read, all rounds", "3,002 ± 3", "–"]
    assert cells_of(starts_table(old)) == [header[:-1], dash[:-1], warm[:-1]]


def test_memorization_is_averaged_over_seeds_and_rounds_that_have_a_start():
    def measured(start, seed, index, before, after):
        sides = {
            "before": {"accuracy_old": before, "gradient_norm_new": 100 * before},
            "after": {"accuracy_old": after, "gradient_norm_new": 1e-4 * after, "mine": 1234.5},
        }
        return record(start, seed, index, memorization=sides)

    records = [
        measured("dash", 0, 1, 0.0, 0.0),
        measured("dash", 0, 2, 1.0, 0.5),
        measured("dash", 1, 2, 0.9, 0.3),
        measured("dash", 1, 3, 0.8, 0.1),
        record("cold"),
        record("cold", round_index=2, memorization={"after": {"accuracy_old": 0.25}}),
        record("warm", round_index=2),
    ]
    assert cells_of(memorization_table(records)) == [
        ["start", "accuracy, old", "gradient norm, new", "mine"],
        ["dash", "90.00 → 30.00 %", "90 → 3e-05", "– → 1.23e+03"],
        ["cold", "– → 25.00 %", "–", "–"],
    ]


@pytest.mark.parametrize("records", [[], [record(memorization={"after": {"accuracy_new": 1.0}})]])
def test_no_measurements_make_no_table(records):
    with pytest.raises(ValueError, match="records must hold measurements of memorization"):
        memorization_table(records)


def test_every_length_of_pretraining_is_averaged_over_seeds():
    def measured(seed, index, accuracy, known):
        sides = {"before": {"accuracy_old": known}, "after": {"accuracy_old": known / 2}}
        stage = f"rounds/{index - 1:03d}/pretraining_seed{seed}"
        parts = {"parent": stage, "accuracy": accuracy, "memorization": sides}
        return record("dash", seed, index, **parts)

    records = [record("cold", 0, accuracy=0.5), record("cold", 1, accuracy=0.7)]
    for seed in (0, 1):
        records += [
            record("pretraining", seed, 1, epochs=2),
            record("pretraining", seed, 2, epochs=3, parent=f"rounds/001/pretraining_seed{seed}"),
            measured(seed, 3, 0.3, 1.0),
            measured(seed, 2, 0.2 + seed / 10, 0.25 + seed / 2),
        ]
    table = cells_of(pretraining_table(records))
    assert table[0][:5] == ["start", "epochs before", "seeds", "accuracy, held out", "steps"]
    assert table[1:] == [
        ["cold", "0", "2", "60.00 ± 14.14 %", "30 ± 0", "–", "–"],
        ["dash", "2", "2", "25.00 ± 7.07 %", "30 ± 0", "50.00 → 25.00 %", "–"],
        ["dash", "5", "2", "30.00 ± 0.00 %", "30 ± 0", "100.00 → 50.00 %", "–"],
    ]


def test_simulations_are_averaged_over_seeds():
    def simulation(start, seed, accuracy, points):
        counts = np.array([points, 2 * points])
        return Simulation(start, seed, np.array([0.1, accuracy]), counts, counts + 1, counts + 2)

    runs = [simulation("warm", seed, 0.5 + 0.2 * seed, 1000 * (seed + 1)) for seed in (0, 1)]
    runs.append(simulation("ideal", 0, 0.25, 10))
    rows = cells_of(simulations_table({"γ=50": runs}))
    # Last features 2000 and 4000: their sample standard deviation is 2000 / √2.
    assert [" ".join(row) for row in rows[1:]] == [
        "γ=50 warm 2 60.00 ± 14.14 % 3000.0 ± 1414.2 3,002 ± 1,414 3,001 ± 1,414 4,502 ± 2,121",
        "γ=50 ideal 1 25.00 % 20.0 22 21 32",
    ]
    assert len(rows[0]) == len(rows[1])
