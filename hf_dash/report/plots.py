"""Figures of a history: accuracy and steps over rounds, and the factors of a shrink.

Flow: records → mean and spread over seeds per round, or factors per tensor → one PNG.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from hf_dash.history import RoundRecord, starts_of
from hf_dash.method.shrink import ShrinkReport
from hf_dash.utils.files import write_bytes

# Of Okabe and Ito, for readers who see fewer colors; gray instead of yellow, pale on white.
COLORS = [
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
    a line is their mean and the band around it ± one sample standard deviation. Colors and markers
    tell eight starts apart, dashes eight more; of more than four the legend is below the panels.

    Args:
        records: of one or more starts and seeds.
        path: of the PNG file to write.

    Raises:
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.report.plot_rounds([record], f"{folder}/rounds.png")
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
    save_figure(figure, path)


def plot_factors(shrink: RoundRecord | ShrinkReport | Mapping[str, Any], path: str | Path) -> None:
    """Draw the factors of one shrink: mean and range of every tensor, in the order of the model.

    The figure grows with the number of tensors. Dots are the means over a tensor's vectors, bars
    reach from the smallest factor to the largest; a dashed line marks λ.

    Args:
        shrink: a report, its ``to_dict()``, or the record of a round that began with a shrink.
        path: of the PNG file to write.

    Raises:
        ValueError: the record has no shrink, or the mapping is not a report.
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> tensor = {"name": "fc.weight", "mean_factor": 0.5, "min_factor": 0.3, "max_factor": 1.0}
        >>> shrink = {"tensors": [tensor], "config": {"lam": 0.3}, "mean_factor": 0.5}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.report.plot_factors({**shrink, "share_at_lam": 0.1}, f"{folder}/a.png")
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
    axes.axvline(lam, color=COLORS[1], linestyle="--", linewidth=1.2, label=f"λ = {lam:g}")
    axes.hlines(rows, low, high, color=COLORS[4], linewidth=3, label="smallest to largest")
    axes.plot(mean, rows, "o", color=COLORS[0], markersize=5, label="mean", zorder=3)
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
    save_figure(figure, path)


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
        draw_line(axes, number, start, rounds, by_round)
    dress(axes)


def draw_line(
    axes: Any,
    number: int,
    label: str,
    rounds: Sequence[float],
    by_round: list[list[float]],
    style: str = "-",
) -> None:
    """Draw the mean of every round's values, and a band where each has several."""
    mean = np.array([np.mean(values) for values in by_round])
    color = COLORS[number % len(COLORS)]
    line = "--" if number >= len(COLORS) else style
    every = -(-len(rounds) // MARKERS_PER_LINE)
    marks = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "markevery": every}
    axes.plot(rounds, mean, color=color, linestyle=line, label=label, **marks)
    if all(len(values) > 1 for values in by_round):
        spread = np.array([np.std(values, ddof=1) for values in by_round])
        band = {"color": color, "alpha": 0.15, "linewidth": 0}
        axes.fill_between(rounds, mean - spread, mean + spread, **band)


def dress(axes: Any) -> None:
    """Give axes integer ticks, a light grid and no box."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG in one step."""
    png = BytesIO()
    figure.savefig(png, dpi=150, format="png")
    write_bytes(Path(path), png.getvalue())
