"""Figures of a history.

Flow: records → mean and spread over seeds per round → one PNG.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_dash.history import RoundRecord, starts_of


def plot_rounds(records: Sequence[RoundRecord], path: str | Path) -> None:
    """Draw held-out accuracy and training steps over rounds, one line per start.

    With several seeds a line is their mean and the band around it ± one sample standard deviation.

    Args:
        records: of one or more starts and seeds.
        path: of the PNG file to write.

    Raises:
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, records, lambda record: 100 * record.accuracy)
    _draw(right, records, lambda record: record.steps)
    left.set(title="Held-out accuracy", xlabel="round", ylabel="accuracy (%)")
    right.set(title="Training until convergence", xlabel="round", ylabel="steps")
    right.set_ylim(bottom=0)
    left.legend(title="start")
    figure.savefig(path, dpi=150)


def _draw(axes: Any, records: Sequence[RoundRecord], value: Callable[[RoundRecord], float]) -> None:
    rounds = sorted({record.round_index for record in records})
    for start in starts_of(records):
        by_round = [
            [value(r) for r in records if r.start == start and r.round_index == index]
            for index in rounds
        ]
        mean = np.array([np.mean(values) for values in by_round])
        (line,) = axes.plot(rounds, mean, marker="o", label=start)
        if all(len(values) > 1 for values in by_round):
            spread = np.array([np.std(values, ddof=1) for values in by_round])
            band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
            axes.fill_between(rounds, mean - spread, mean + spread, **band)
    axes.set_xticks(rounds)
    axes.grid(alpha=0.3)
