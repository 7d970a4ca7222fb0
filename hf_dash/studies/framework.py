"""The paper's learning framework: why a warm start generalizes worse, without a network.

Flow: seed → probabilities of features → points, test points → experiments → counts and accuracy →
a table and a figure.
Source: section 3 of Shin et al., NeurIPS 2024 (arXiv:2410.23495), and the authors' notebook
(commit dcac4c2): sizes, order among equally frequent features, coin flips of the test.
Differs: frequencies are updated when points lose their gradient instead of counted again, which is
the same process; a test point keeps its coin through all experiments; ``"partial"`` is ours.
Symbols: C classes, K features a class, N points arrive per experiment, J experiments; γ points that
have a gradient teach a feature, τ learned features explain a point. M = J·N / C points a class.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hf_dash.report.markdown import Markdown, markdown_table
from hf_dash.report.plots import draw_line, dress, save_figure
from hf_dash.report.tables import mean_and_spread
from hf_dash.utils.checks import check_count, check_number, with_settings
from hf_dash.utils.files import write_text

FrameworkStart = Literal["random", "warm", "ideal", "partial"]

# Each draws from a generator of its own, so that changing the number of one changes no other.
PROBABILITIES, POINTS, TEST_POINTS, COINS, FORGETTING = range(5)

Bools = NDArray[np.bool_]

Integers = NDArray[np.int64]

Floats = NDArray[np.float64]

Features = NDArray[np.bool_] | NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Simulation:
    """What one start did in J experiments; entry j is of experiment j + 1.

    Args:
        start: its name.
        seed: of the data.
        accuracy: [J] on test points after the experiment, in [0, 1].
        learned_features: [J] known after the experiment, of all C·K.
        nonzero_points: [J] with a gradient when the experiment begins: the paper's training time.
        memorized_points: [J] whose noise the model holds after the experiment.

    Example:
        >>> import hf_dash
        >>> sizes = {"num_points": 100, "num_experiments": 3, "num_test_points": 0}
        >>> hf_dash.studies.simulate("random", **sizes).accuracy.shape
        (3,)
    """

    start: FrameworkStart
    seed: int
    accuracy: Floats
    learned_features: Integers
    nonzero_points: Integers
    memorized_points: Integers


@dataclass(frozen=True)
class FrameworkConfig:
    """Sizes of the learning framework; the defaults are the paper's.

    Args:
        num_classes: C, at least 2.
        num_features: K, of each class, at least 1.
        num_points: N, arriving per experiment, over all classes: a multiple of C.
        num_experiments: J, at least 1.
        gamma: γ, points that teach a feature, at least 1.
        tau: τ, learned features that explain a point, at least 1.
        max_probability: largest probability of a feature, in (0, 1].
        forget_share: probability, in [0, 1], that ``"partial"`` forgets the noise of a memorized
            point when an experiment begins; 0 is ``"warm"``, 1 ``"ideal"``. Other starts ignore it.
        num_test_points: over all classes, a multiple of C; drawn once, as are their coins. 0 gives
            the expected accuracy, computed from the probabilities, without the noise of a draw.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range.

    Example:
        >>> import hf_dash
        >>> hf_dash.studies.FrameworkConfig(tau=2).gamma
        50
    """

    num_classes: int = 2
    num_features: int = 50
    num_points: int = 1000
    num_experiments: int = 50
    gamma: int = 50
    tau: int = 3
    max_probability: float = 0.2
    forget_share: float = 0.5
    num_test_points: int = 10_000

    def __post_init__(self) -> None:
        check_count("num_test_points", self.num_test_points, at_least=0)
        check_count("num_classes", self.num_classes, at_least=2)
        for name in ("num_features", "num_points", "num_experiments", "gamma", "tau"):
            check_count(name, getattr(self, name))
        check_number("max_probability", self.max_probability, "(0, 1]", 0.0, 1.0)
        check_number("forget_share", self.forget_share, "[0, 1]", 0.0, 1.0)
        for name in ("num_points", "num_test_points"):
            if getattr(self, name) % self.num_classes:
                raise ValueError(
                    f"{name} must be a multiple of num_classes={self.num_classes}, got"
                    f" {getattr(self, name)!r}"
                )


def simulate(
    start: FrameworkStart,
    *,
    seed: int = 0,
    config: FrameworkConfig | None = None,
    **settings: Any,
) -> Simulation:
    """Run J experiments of the paper's learning framework (section 3).

    Every class has K features of its own. A point of the class has each with that feature's
    probability, drawn once from U(0, ``max_probability``) and sorted, largest first. In experiment
    j the points of experiments 1 … j are the training data. A point has a gradient unless τ of its
    features are learned or its noise is memorized. As long as γ points that have a gradient share a
    feature that is not learned, the most frequent such feature is learned; of equals the first
    class's, and in a class the more probable one. Then the noise of the points left is memorized.

    The starts differ in what an experiment inherits: ``"random"`` nothing; ``"warm"`` features and
    memorized noise; ``"ideal"`` features only; ``"partial"``, like DASH, features and the noise it
    did not forget. A test point with τ learned features is right; otherwise a coin decides, which
    falls right with probability 1 / C.

    Args:
        start: one of the four.
        seed: at least 0. It alone fixes probabilities, points, test points, coins, and the
            numbers that decide what is forgotten, each from a generator of its own: the starts
            see the same data, whatever γ and τ, and fewer experiments are the first of more.
        config: the sizes; by default the paper's.
        **settings: fields of :class:`FrameworkConfig` that differ from ``config``.

    Raises:
        TypeError: an argument is of the wrong kind, or a setting is unknown.
        ValueError: an argument is out of its range.

    Example:
        >>> import hf_dash
        >>> sizes = {"num_points": 100, "num_experiments": 3, "gamma": 5, "num_test_points": 0}
        >>> warm = hf_dash.studies.simulate("warm", **sizes)
        >>> ideal = hf_dash.studies.simulate("ideal", **sizes)
        >>> bool(ideal.accuracy[-1] >= warm.accuracy[-1])
        True
    """
    if start not in get_args(FrameworkStart):
        raise ValueError(f"start must be one of {get_args(FrameworkStart)}, got {start!r}")
    check_count("seed", seed, at_least=0)
    sizes = with_settings(config or FrameworkConfig(), settings)
    probabilities, points = _draw_data(seed, sizes)
    history, nonzero_points, memorized_points = _run(points, start, seed, sizes)
    if sizes.num_test_points:
        accuracy = _drawn_accuracy(probabilities, history, sizes.tau, seed, sizes.num_test_points)
    else:
        accuracy = _expected_accuracy(probabilities, history, sizes.tau)
    features = history.sum((1, 2), dtype=np.int64)
    return Simulation(start, seed, accuracy, features, nonzero_points, memorized_points)


def learn_(
    points: Features,
    columns: Bools,
    nonzero: Bools,
    learned: Bools,
    counts: NDArray[np.integer[Any]],
    gamma: int,
    tau: int,
) -> None:
    """Train until no feature is left to learn; changes ``nonzero``, ``learned`` and ``counts``.

    Args:
        points: [C, M, K] 1 where a point has the feature, 0 where not; of any type, but float32
            is the fastest.
        columns: [C, K, M] the same by feature.
        nonzero: [C, M] which points have a gradient; each has fewer than τ learned features.
        learned: [C, K] which features are learned.
        counts: [C, M] learned features of each point, with a gradient or not.
        gamma: γ, points with a gradient that teach a feature, at least 1.
        tau: τ, learned features at which a point loses its gradient, at least 1.
    """
    classes, _, features = points.shape
    frequency = np.stack(
        [_occurrences(points[c], np.flatnonzero(nonzero[c])) for c in range(classes)]
    )
    frequency[learned] = -1
    while True:
        c, k = divmod(int(frequency.argmax()), features)  # the first of equals
        if frequency[c, k] < gamma:
            return
        learned[c, k] = True
        frequency[c, k] = -1
        counts[c] += columns[c, k]
        # Among all points, not only those that have k: going through bytes in order is faster.
        explained = np.flatnonzero(nonzero[c] & (counts[c] >= tau))
        nonzero[c, explained] = False
        # What is learned falls further below γ, which does no harm.
        frequency[c] -= _occurrences(points[c], explained)


def write_simulations(simulations: Mapping[str, Sequence[Simulation]], path: str | Path) -> None:
    """Write one line per setting, start, seed and experiment as CSV, in full precision.

    Args:
        simulations: by the setting they share, a text for the first column.
        path: of the file to write.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> sizes = {"num_points": 100, "num_experiments": 2, "num_test_points": 0}
        >>> runs = [hf_dash.studies.simulate("warm", **sizes)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.studies.write_simulations({"small": runs}, f"{folder}/simulations.csv")
    """
    text = StringIO()
    lines = csv.writer(text, lineterminator="\n")
    numbers = ("accuracy", "learned_features", "nonzero_points", "memorized_points")
    lines.writerow(["setting", "start", "seed", "experiment", *numbers])
    for setting, group in simulations.items():
        for one in group:
            columns = zip(*(getattr(one, name).tolist() for name in numbers), strict=True)
            lines.writerows(
                [setting, one.start, one.seed, j, *row] for j, row in enumerate(columns, start=1)
            )
    write_text(Path(path), text.getvalue())


def _occurrences(points: Features, which: Integers) -> Integers:
    # A product is many times faster than a sum of booleans; float32 counts exactly up to 2²⁴.
    counted = np.ones(len(which), np.float32) @ points.take(which, axis=0)
    return counted.astype(np.int64)


def _draw_data(seed: int, sizes: FrameworkConfig) -> tuple[Floats, Bools]:
    """Return the probabilities [C, K] and the points [C, M, K], in order of arrival."""
    classes, features = sizes.num_classes, sizes.num_features
    uniform = np.random.default_rng([seed, PROBABILITIES]).random((classes, features))
    probabilities = np.sort(sizes.max_probability * uniform, axis=1)[:, ::-1]
    generator = np.random.default_rng([seed, POINTS])
    shape = (classes, sizes.num_points // classes, features)
    arrivals = [
        generator.random(shape) < probabilities[:, None] for _ in range(sizes.num_experiments)
    ]
    return probabilities, np.concatenate(arrivals, axis=1)


def _run(
    points: Bools, start: FrameworkStart, seed: int, sizes: FrameworkConfig
) -> tuple[Bools, Integers, Integers]:
    """Return [J, C, K] what is learned, [J] points with a gradient, [J] points memorized."""
    experiments, gamma, tau = sizes.num_experiments, sizes.gamma, sizes.tau
    classes, total, features = points.shape
    arriving = total // experiments
    numbers, columns = points.astype(np.float32), points.transpose(0, 2, 1).copy()
    forgetting = np.random.default_rng([seed, FORGETTING])
    learned = np.zeros((classes, features), bool)
    counts = np.zeros((classes, total), np.min_scalar_type(features))
    memorized = np.zeros((classes, total), bool)
    history = np.zeros((experiments, classes, features), bool)
    nonzero_points, memorized_points = (np.zeros(experiments, np.int64) for _ in range(2))
    for j in range(experiments):
        if start == "random":
            learned[:], counts[:] = False, 0
        if start in ("random", "ideal"):
            memorized[:] = False
        elif start == "partial":
            old = memorized[:, : j * arriving]
            old &= forgetting.random(old.shape) >= sizes.forget_share
        new, seen = slice(j * arriving, (j + 1) * arriving), slice((j + 1) * arriving)
        counts[:, new] = (points[:, new] & learned[:, None]).sum(2)
        nonzero = ~memorized[:, seen] & (counts[:, seen] < tau)
        nonzero_points[j] = nonzero.sum()
        learn_(numbers[:, seen], columns[:, :, seen], nonzero, learned, counts[:, seen], gamma, tau)
        memorized[:, seen] |= nonzero
        history[j], memorized_points[j] = learned, memorized.sum()
    return history, nonzero_points, memorized_points


def _drawn_accuracy(
    probabilities: Floats, history: Bools, tau: int, seed: int, num_test_points: int
) -> Floats:
    classes, features = probabilities.shape
    shape = (classes, num_test_points // classes)
    uniform = np.random.default_rng([seed, TEST_POINTS]).random((*shape, features))
    points = uniform < probabilities[:, None]
    coins = np.random.default_rng([seed, COINS]).random(shape) < 1 / classes
    # Whole numbers of features, which float32 holds exactly and multiplies faster than integers.
    counts = points.astype(np.float32) @ history.transpose(1, 2, 0).astype(np.float32)
    right = (counts >= tau) | coins[:, :, None]
    accuracy: Floats = right.mean((0, 1))
    return accuracy


def _expected_accuracy(probabilities: Floats, history: Bools, tau: int) -> Floats:
    # [J, C, τ]: the probabilities that a point has 0 … τ − 1 of the learned features seen so far.
    fewer = np.zeros((*history.shape[:2], tau))
    fewer[:, :, 0] = 1
    for k in range(history.shape[2]):
        present = (history[:, :, k] * probabilities[:, k])[:, :, None]
        one_more = np.zeros_like(fewer)
        one_more[:, :, 1:] = fewer[:, :, :-1]
        fewer = (1 - present) * fewer + present * one_more
    unexplained = fewer.sum(2).mean(1)
    accuracy: Floats = 1 - unexplained * (1 - 1 / history.shape[1])
    return accuracy


def simulations_table(simulations: Mapping[str, Sequence[Simulation]]) -> Markdown:
    """Return one row per setting and start: mean ± sample standard deviation over seeds.

    Accuracy, learned features and memorized points are those after the last experiment, points with
    a gradient those when it begins; the last column adds these up over all experiments.

    Example:
        >>> import hf_dash
        >>> sizes = {"num_points": 100, "num_experiments": 2, "num_test_points": 0}
        >>> table = hf_dash.studies.simulations_table(
        ...     {"small": [hf_dash.studies.simulate("warm", **sizes)]}
        ... )
        >>> [cell.strip() for cell in table.splitlines()[2].split("|")][1:4]
        ['small', 'warm', '1']
    """
    header = [
        "setting",
        "start",
        "seeds",
        "accuracy, last experiment",
        "learned features",
        "memorized points",
        "points with a gradient",
        "of all experiments",
    ]
    rows = []
    for setting, group in simulations.items():
        for start in dict.fromkeys(one.start for one in group):
            own = [one for one in group if one.start == start]
            cells = [
                mean_and_spread([100 * one.accuracy[-1] for one in own], "{:.2f}", " %"),
                mean_and_spread([one.learned_features[-1] for one in own], "{:.1f}"),
                mean_and_spread([one.memorized_points[-1] for one in own], "{:,.0f}"),
                mean_and_spread([one.nonzero_points[-1] for one in own], "{:,.0f}"),
                mean_and_spread([one.nonzero_points.sum() for one in own], "{:,.0f}"),
            ]
            rows.append([setting, start, str(len(own)), *cells])
    return markdown_table(header, rows)


def plot_simulations(simulations: Mapping[str, Sequence[Simulation]], path: str | Path) -> None:
    """Draw the paper's figure of its learning framework: one line per start over experiments.

    Panels: test accuracy, learned features, points with a gradient when an experiment begins. With
    several seeds a line is their mean and the band around it ± one sample standard deviation.

    Args:
        simulations: by setting; every setting is a row of panels with its name above. In a setting
            all have as many experiments.
        path: of the PNG file to write.

    Raises:
        ValueError: ``simulations`` are empty, or those of a setting differ in length.
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> sizes = {"num_points": 100, "num_experiments": 2, "num_test_points": 0}
        >>> runs = [hf_dash.studies.simulate("warm", **sizes)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.studies.plot_simulations({"small": runs}, f"{folder}/simulations.png")
    """
    for setting, group in simulations.items():
        lengths = {len(one.accuracy) for one in group}
        if len(lengths) != 1:
            raise ValueError(
                f"simulations[{setting!r}] must be simulations of one number of experiments, got"
                f" {sorted(lengths)}"
            )
    if not simulations:
        raise ValueError(f"simulations must hold at least one setting, got {simulations!r}")
    from matplotlib.figure import Figure

    # A strip above the panels of a row holds its name.
    figure = Figure(figsize=(11, 3.6 * len(simulations)), layout="constrained")
    rows = figure.subfigures(len(simulations), 1, squeeze=False)[:, 0]
    for row, (setting, group) in zip(rows, simulations.items(), strict=True):
        row.suptitle(setting, fontsize=9)
        left, middle, right = row.subplots(1, 3)
        _draw_simulations(left, group, lambda one: 100 * one.accuracy)
        _draw_simulations(middle, group, lambda one: one.learned_features)
        _draw_simulations(right, group, lambda one: one.nonzero_points)
        left.set(title="Test accuracy", ylabel="accuracy (%)")
        middle.set(title="Learned features", ylabel="features")
        right.set(title="Training time", ylabel="points with a gradient")
        for axes in (left, middle, right):
            axes.set(xlabel="experiment")
        for axes in (middle, right):
            axes.set_ylim(bottom=0)
        right.legend(title="start", loc="upper left")  # the one corner that no line comes near
    save_figure(figure, path)


def _draw_simulations(
    axes: Any, group: Sequence[Simulation], value: Callable[[Simulation], np.ndarray[Any, Any]]
) -> None:
    for number, start in enumerate(dict.fromkeys(one.start for one in group)):
        by_experiment = np.stack([value(one) for one in group if one.start == start], axis=1)
        experiments = list(range(1, len(by_experiment) + 1))
        # The ideal start lies on the random one, which shows through its gaps.
        style = "--" if start == "ideal" else "-"
        draw_line(axes, number, start, experiments, by_experiment.tolist(), style)
    dress(axes)
