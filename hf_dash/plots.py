"""Figures of a history, and of the paper's learning framework.

Flow: records → mean and spread over seeds per round or length of pre-training, or factors per
tensor → one PNG; simulations → mean and spread over seeds per experiment → one PNG.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from hf_dash._files import write_bytes
from hf_dash.framework import Simulation
from hf_dash.history import RoundRecord, starts_of
from hf_dash.pretraining import SCRATCH, records_by_length
from hf_dash.shrink import ShrinkReport

# Of Okabe and Ito, for readers who see fewer colours; grey instead of yellow, pale on white.
COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#7F7F7F",
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]

# More starts than this hide the lines under a legend inside a panel.
LEGEND_INSIDE = 4
# More markers than about this many run into each other.
MARKERS_PER_LINE = 12


def plot_rounds(records: Sequence[RoundRecord], path: str | Path) -> None:
    """Draw accuracy, training steps and the cost so far over rounds, one line per start.

    The cost is in seconds and includes the starts, the gradient pass among them. With several seeds
    a line is their mean and the band around it ± one sample standard deviation. Colours and markers
    tell eight starts apart, dashes eight more; of more than four the legend is below the panels.

    Args:
        records: of one or more starts and seeds.
        path: of the PNG file to write.

    Raises:
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).
    """
    from matplotlib.figure import Figure

    starts = starts_of(records)
    outside = len(starts) > LEGEND_INSIDE
    figure = Figure(figsize=(11, 4.5 if outside else 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw(left, records, lambda record: 100 * record.accuracy)
    _draw(middle, records, lambda record: record.steps)
    _draw(right, records, lambda record: _seconds_so_far(records, record))
    left.set(title="Held-out accuracy", xlabel="round", ylabel="accuracy (%)")
    middle.set(title="Training until convergence", xlabel="round", ylabel="steps")
    right.set(title="Cost so far, starts included", xlabel="round", ylabel="seconds")
    for axes in (middle, right):
        axes.set_ylim(bottom=0)
    if outside:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    else:
        left.legend(title="start")
    _save(figure, path)


def plot_pretraining(records: Sequence[RoundRecord], path: str | Path) -> None:
    """Draw what each start makes of ever longer pre-training on the old half of the data.

    Panels: held-out accuracy after training on all data, beside training from scratch; how many of
    the old half's labels, and of the wrong ones among them where there are any, the model answers
    right before any start and right after each. With several seeds a line is their mean and the
    band around it ± one sample standard deviation.

    Args:
        records: as :func:`~hf_dash.pretraining.run_pretraining` made them.
        path: of the PNG file to write.

    Raises:
        ValueError: they are others.
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).
    """
    runs = records_by_length(records)
    from matplotlib.figure import Figure

    scratch = runs.pop(SCRATCH)[0]
    titles = {"accuracy_old": "Old labels known", "flipped_reproduced": "Wrong ones reproduced"}
    measures = [name for name in titles if _has(records, name)]
    figure = Figure(figsize=(4 + 3.6 * len(measures), 4), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(measures), squeeze=False)[0]
    lengths = sorted({epochs for by_length in runs.values() for epochs in by_length})
    accuracies = [[100 * record.accuracy for record in scratch]] * len(lengths)
    _draw_line(left, 0, f"{SCRATCH}, from scratch", lengths, accuracies, "--")
    for number, (start, by_length) in enumerate(runs.items(), start=1):
        groups = list(by_length.values())
        values = [[100 * record.accuracy for record in group] for group in groups]
        _draw_line(left, number, start, list(by_length), values)
        for axes, name in zip(others, measures, strict=True):
            after = [_measured(group, "after", name) for group in groups]
            _draw_line(axes, number, start, list(by_length), after)
    for axes, name in zip(others, measures, strict=True):
        # The same for every start. Drawn last: the warm start changes nothing and lies below.
        before = [_measured(group, "before", name) for group in groups]
        _draw_line(axes, len(COLOURS) - 1, "before any start", list(by_length), before, ":")
        axes.set(title=titles[name], ylabel="right after the start (%)", ylim=(-4, 104))
    left.set(title="Held-out accuracy", ylabel="accuracy, trained on all (%)")
    for axes in (left, *others):
        axes.set_xscale("log")
        axes.set_xticks(lengths, [f"{epochs:g}" for epochs in lengths])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("epochs of pre-training on half")
        axes.grid(alpha=0.3)
    lines = [*left.lines, *(axes.lines[-1] for axes in others[:1])]
    figure.legend(handles=lines, loc="outside lower center", ncols=4)
    _save(figure, path)


def _has(records: Sequence[RoundRecord], name: str) -> bool:
    return any(name in side for r in records for side in (r.memorisation or {}).values())


def _measured(records: Sequence[RoundRecord], side: str, name: str) -> list[float]:
    return [100 * (record.memorisation or {})[side][name] for record in records]


def plot_factors(shrink: RoundRecord | ShrinkReport | Mapping[str, Any], path: str | Path) -> None:
    """Draw the factors of one shrink: mean and range of every tensor, in the order of the model.

    The figure grows with the number of tensors. Dots are the means over a tensor's vectors, bars
    reach from the smallest factor to the largest; a dashed line marks λ.

    Args:
        shrink: a report, its ``to_dict()``, or the record of a round that began with a shrink.
        path: of the PNG file to write.

    Raises:
        ValueError: the record has no shrink, or the mapping is no report.
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).
    """
    report = _report(shrink)
    from matplotlib.figure import Figure

    tensors, lam = report["tensors"], report["config"]["lam"]
    names = [tensor["name"].removeprefix("timm_model.") for tensor in tensors]
    mean, low, high = (
        np.array([tensor[f"{which}_factor"] for tensor in tensors])
        for which in ("mean", "min", "max")
    )
    rows = np.arange(len(tensors))
    figure = Figure(figsize=(7, 1.6 + 0.18 * len(tensors)), layout="constrained")
    axes = figure.subplots()
    # Drawn in this order, so that the mean is always on top.
    axes.axvline(lam, color=COLOURS[1], linestyle="--", linewidth=1.2, label=f"λ = {lam:g}")
    axes.hlines(rows, low, high, color=COLOURS[4], linewidth=3, label="smallest to largest")
    axes.plot(mean, rows, "o", color=COLOURS[0], markersize=5, label="mean", zorder=3)
    axes.set_yticks(rows, names, fontsize=7.5)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(tensors) - 0.4, -0.6), xlabel="factor")
    axes.set_title(
        f"Factors of the shrink: mean {report['mean_factor']:.3f},"
        f" {report['share_at_lam']:.0%} of the vectors at λ",
        fontsize=10,
    )
    axes.tick_params(axis="x", top=True, labeltop=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, path)


def plot_simulations(simulations: Mapping[str, Sequence[Simulation]], path: str | Path) -> None:
    """Draw the paper's figure of its learning framework: one line per start over experiments.

    Panels: test accuracy, learned features, points with a gradient when an experiment begins. With
    several seeds a line is their mean and the band around it ± one sample standard deviation.

    Args:
        simulations: by setting; every setting is a row of panels with its name above. In a setting
            all have as many experiments.
        path: of the PNG file to write.

    Raises:
        ValueError: there is no simulation, or those of a setting differ in length.
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).
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
    _save(figure, path)


def _draw_simulations(
    axes: Any, group: Sequence[Simulation], value: Callable[[Simulation], np.ndarray[Any, Any]]
) -> None:
    for number, start in enumerate(dict.fromkeys(one.start for one in group)):
        by_experiment = np.stack([value(one) for one in group if one.start == start], axis=1)
        experiments = list(range(1, len(by_experiment) + 1))
        # The ideal start lies on the random one, which shows through its gaps.
        style = "--" if start == "ideal" else "-"
        _draw_line(axes, number, start, experiments, by_experiment.tolist(), style)
    _dress(axes)


def _report(shrink: RoundRecord | ShrinkReport | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(shrink, ShrinkReport):
        return shrink.to_dict()
    if isinstance(shrink, RoundRecord):
        if shrink.shrink is None:
            raise ValueError(
                f"shrink must be the record of a round that began with a shrink, got start"
                f" {shrink.start!r}, round {shrink.round_index}"
            )
        return shrink.shrink
    missing = {"tensors", "config", "mean_factor", "share_at_lam"} - set(shrink)
    if missing:
        raise ValueError(f"shrink must be a ShrinkReport.to_dict(), but has no {sorted(missing)}")
    return shrink


def _seconds_so_far(records: Sequence[RoundRecord], last: RoundRecord) -> float:
    return sum(
        record.seconds
        for record in records
        if (record.start, record.seed) == (last.start, last.seed)
        and record.round_index <= last.round_index
    )


def _draw(axes: Any, records: Sequence[RoundRecord], value: Callable[[RoundRecord], float]) -> None:
    for number, start in enumerate(starts_of(records)):
        own = [record for record in records if record.start == start]
        rounds = sorted({record.round_index for record in own})
        by_round = [[value(r) for r in own if r.round_index == index] for index in rounds]
        _draw_line(axes, number, start, rounds, by_round)
    _dress(axes)


def _draw_line(
    axes: Any,
    number: int,
    label: str,
    rounds: Sequence[float],
    by_round: list[list[float]],
    style: str = "-",
) -> None:
    """Draw the mean of every round's values, and a band where each has several."""
    mean = np.array([np.mean(values) for values in by_round])
    colour = COLOURS[number % len(COLOURS)]
    line = "--" if number >= len(COLOURS) else style
    every = -(-len(rounds) // MARKERS_PER_LINE)
    marks = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "markevery": every}
    axes.plot(rounds, mean, color=colour, linestyle=line, label=label, **marks)
    if all(len(values) > 1 for values in by_round):
        spread = np.array([np.std(values, ddof=1) for values in by_round])
        band = {"color": colour, "alpha": 0.15, "linewidth": 0}
        axes.fill_between(rounds, mean - spread, mean + spread, **band)


def _dress(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _save(figure: Any, path: str | Path) -> None:
    png = BytesIO()
    figure.savefig(png, dpi=150, format="png")
    write_bytes(Path(path), png.getvalue())
