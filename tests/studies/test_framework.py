import csv
import itertools
from typing import get_args

import numpy as np
import pytest

from hf_dash.method.reference import SIMULATED, reference_simulation
from hf_dash.studies import simulate, write_simulations
from hf_dash.studies.framework import FrameworkStart, _expected_accuracy, learn_

STARTS = get_args(FrameworkStart)


SEEDS = range(3)


@pytest.fixture(scope="module")
def paper():
    """By start: the paper's size, accuracy in expectation."""
    return {
        start: [simulate(start, seed=seed, num_test_points=0) for seed in SEEDS] for start in STARTS
    }


def numbers_of(simulation):
    return {name: getattr(simulation, name).tolist() for name in SIMULATED}


def small_case(seed):
    """Random sizes, small enough for plain loops; many features share a frequency."""
    draw = np.random.default_rng(seed)
    classes = int(draw.integers(2, 5))
    return {
        "num_classes": classes,
        "num_features": int(draw.integers(1, 9)),
        "num_points": classes * int(draw.integers(1, 9)),
        "num_experiments": int(draw.integers(1, 7)),
        "gamma": int(draw.integers(1, 7)),
        "tau": int(draw.integers(1, 5)),
        "max_probability": float(draw.uniform(0.1, 1)),
        "forget_share": float(draw.uniform(0, 1)),
        "num_test_points": classes * int(draw.integers(1, 9)),
    }


LETTERS = {"num_classes": "C", "num_features": "K", "num_points": "N", "num_experiments": "J"}


@pytest.mark.parametrize("start", STARTS)
def test_every_number_equals_the_plain_loops(start):
    for seed in range(100):
        case = small_case(seed)
        expected = reference_simulation(
            start, seed, **{LETTERS.get(name, name): value for name, value in case.items()}
        )
        assert numbers_of(simulate(start, seed=seed, **case)) == expected, case


@pytest.mark.parametrize("start", STARTS)
def test_a_larger_case_equals_the_plain_loops(start):
    case = {"num_points": 200, "num_experiments": 4, "gamma": 12, "num_test_points": 300}
    expected = reference_simulation(start, N=200, J=4, gamma=12, num_test_points=300)
    assert numbers_of(simulate(start, **case)) == expected


def points_of(*classes, features):
    """Return [C, M, K] from the features each point has."""
    return np.array([[[k in point for k in range(features)] for point in own] for own in classes])


def learn(points, gamma, tau, nonzero=None, learned=None):
    nonzero = np.ones(points.shape[:2], bool) if nonzero is None else nonzero
    learned = np.zeros((len(points), points.shape[2]), bool) if learned is None else learned
    counts = (points & learned[:, None]).sum(2)
    learn_(points, points.transpose(0, 2, 1), nonzero, learned, counts, gamma, tau)
    assert counts.tolist() == (points & learned[:, None]).sum(2).tolist()
    return nonzero.tolist(), learned.tolist()


def test_a_hand_worked_case():
    # Class 0: feature 0 in four points, 1 in three, 2 in two; class 1: feature 0 in two.
    points = points_of([{0, 1}, {0, 1}, {0, 2}, {0, 1, 2}], [{0}, {0}, set(), {1}], features=3)
    # γ = 2, τ = 2. Feature 0 (4 points), then 1 (3): points 0, 1, 3 are explained. Feature 2 is
    # left with one point, too few. In class 1 feature 0 has two points and is learned, which
    # explains no point; feature 1 has one.
    nonzero, learned = learn(points, 2, 2)
    assert learned == [[True, True, False], [True, False, False]]
    assert nonzero == [[False, False, True, False], [True, True, True, True]]


def test_of_equally_frequent_features_the_first_is_learned():
    # τ = 1: whichever is learned first explains the point, and the other is never learned.
    points = points_of([{1, 2}, {1, 2}], [{0, 2}, {0, 2}], features=3)
    assert learn(points, 2, 1)[1] == [[False, True, False], [True, False, False]]
    # One more point breaks the tie.
    points = points_of([{1, 2}, {1, 2}, {2}], [{0, 2}, {0, 2}, {2}], features=3)
    assert learn(points, 2, 1)[1] == [[False, False, True], [False, False, True]]


def test_points_without_gradient_teach_nothing():
    points = points_of([{0}, {0}, {1}, {1}], [set()] * 4, features=2)
    nonzero = np.array([[True, False, True, True], [True] * 4])
    assert learn(points, 2, 1, nonzero)[1] == [[False, True], [False, False]]


def test_learned_features_are_not_learned_again():
    points = points_of([{0}] * 3, [{1}] * 3, features=2)
    learned = np.ones((2, 2), bool)
    nonzero, after = learn(points, 1, 2, learned=learned)
    assert np.all(after)
    assert np.all(nonzero)


@pytest.mark.parametrize("seed", range(20))
def test_partial_lies_between_warm_and_ideal(seed):
    case = small_case(seed) | {"num_features": 20, "num_experiments": 8}
    for start, share in (("warm", 0.0), ("ideal", 1.0)):
        partial = simulate("partial", seed=seed, **case | {"forget_share": share})
        assert numbers_of(partial) == numbers_of(simulate(start, seed=seed, **case))


@pytest.mark.parametrize("start", STARTS)
def test_fewer_experiments_are_the_first_of_more(start):
    small = {"num_points": 100, "gamma": 8, "num_test_points": 200}
    whole = simulate(start, seed=3, num_experiments=7, **small)
    part = simulate(start, seed=3, num_experiments=4, **small)
    assert numbers_of(part) == {name: line[:4] for name, line in numbers_of(whole).items()}


def test_starts_share_the_first_experiment_and_seeds_differ(paper):
    for seed in SEEDS:
        first = {tuple(getattr(paper[s][seed], n)[0] for n in SIMULATED) for s in STARTS}
        assert len(first) == 1
    assert len({one.accuracy[0] for one in paper["warm"]}) == len(SEEDS)


@pytest.mark.parametrize("tau", [1, 2, 3, 6])
def test_expected_accuracy_is_the_sum_over_all_points_there_can_be(tau):
    draw = np.random.default_rng(0)
    probabilities, history = draw.random((3, 5)), draw.random((4, 3, 5)) < 0.7
    for learned, accuracy in zip(
        history, _expected_accuracy(probabilities, history, tau), strict=True
    ):
        expected = 0.0
        for c in range(3):
            for point in itertools.product([False, True], repeat=5):
                chance = 1 / 3
                for p, present in zip(probabilities[c], point, strict=True):
                    chance *= p if present else 1 - p
                known = sum(has and knows for has, knows in zip(point, learned[c], strict=True))
                expected += chance * (1 if known >= tau else 1 / 3)
        assert accuracy == pytest.approx(expected)


def test_drawn_points_agree_with_the_expectation():
    exact, drawn = (simulate("ideal", seed=4, num_test_points=n) for n in (0, 90_000))
    # The standard deviation of a mean of 90,000 zeros and ones is at most 1 / 600.
    assert drawn.accuracy == pytest.approx(exact.accuracy, abs=4 / 600)


def test_every_start_and_every_point_is_accounted_for(paper):
    for start, runs in paper.items():
        for one in runs:
            assert one.start == start
            assert [len(getattr(one, name)) for name in SIMULATED] == [50] * 4
            assert np.all(one.nonzero_points <= 1000 * np.arange(1, 51))
            assert np.all(one.memorized_points <= 1000 * np.arange(1, 51))
    for one in paper["random"]:
        assert one.nonzero_points.tolist() == list(range(1000, 51_000, 1000))


def test_warm_learns_fewer_features_and_ends_lower(paper):
    for warm, random in zip(paper["warm"], paper["random"], strict=True):
        assert np.all(warm.learned_features <= random.learned_features)
        assert np.all(warm.accuracy <= random.accuracy)
        assert warm.accuracy[-1] < random.accuracy[-1] - 0.1
        assert np.all(np.diff(warm.memorized_points) >= 0), "noise is never forgotten"


def test_ideal_equals_random_with_fewer_points_to_train_on(paper):
    for ideal, random in zip(paper["ideal"], paper["random"], strict=True):
        assert np.abs(ideal.learned_features - random.learned_features).max() <= 2
        assert ideal.accuracy == pytest.approx(random.accuracy, abs=0.01)
        assert ideal.accuracy[-1] == pytest.approx(random.accuracy[-1], abs=0.001)
        assert np.all(ideal.nonzero_points[1:] < random.nonzero_points[1:])


def test_warm_trains_the_shortest(paper):
    for seed in SEEDS:
        warm, partial, ideal, random = (
            paper[start][seed].nonzero_points[1:]
            for start in ("warm", "partial", "ideal", "random")
        )
        assert np.all(warm < ideal)
        assert warm.sum() < partial.sum() < ideal.sum() < random.sum()


def test_forgetting_half_of_the_noise_wins_most_of_the_accuracy_back(paper):
    ends = {s: np.mean([one.accuracy[-1] for one in paper[s]]) for s in STARTS}
    assert ends["partial"] > ends["warm"] + 0.9 * (ends["ideal"] - ends["warm"])


def test_a_csv_holds_every_number(tmp_path):
    small = {"num_experiments": 3, "num_points": 100, "gamma": 8}
    runs = [simulate(start, seed=1, **small) for start in STARTS]
    write_simulations({"one, two": runs, "three": runs[:1]}, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5
    assert [row["setting"] for row in rows] == ["one, two"] * 12 + ["three"] * 3
    for start, own in zip(STARTS, runs, strict=True):
        found = [
            r for r in rows if (r["setting"], r["start"], r["seed"]) == ("one, two", start, "1")
        ]
        assert [int(row["experiment"]) for row in found] == [1, 2, 3]
        for name in SIMULATED:
            assert [float(row[name]) for row in found] == getattr(own, name).tolist()
    assert [file.name for file in tmp_path.iterdir()] == ["runs.csv"]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"start": "cold"}, ValueError, r"start must be one of \('random', 'warm', .*, got 'cold'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an integer of at least 0, got 1.0"),
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, got 1"),
        (
            {"num_classes": 3},
            ValueError,
            "num_points must be a multiple of num_classes=3",
        ),
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"num_points": "9"}, TypeError, "num_points must be an integer of at least 1, got '9'"),
        ({"num_experiments": 0}, ValueError, "num_experiments must be at least 1, got 0"),
        ({"gamma": 0}, ValueError, "gamma must be at least 1, got 0"),
        ({"tau": True}, TypeError, "tau must be an integer of at least 1, got True"),
        ({"max_probability": 0}, ValueError, r"max_probability must be in \(0, 1\], got 0"),
        ({"forget_share": 1.5}, ValueError, r"forget_share must be in \[0, 1\], got 1.5"),
        (
            {"num_test_points": 99},
            ValueError,
            "num_test_points must be a multiple of num_classes=2",
        ),
    ],
)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        simulate(**{"start": "warm", **wrong})
