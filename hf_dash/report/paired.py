"""Is one start better than another over seeds, and at what price?

Flow: histories of one run's starts and seeds → one list of records → per seed, a start vs. the
baseline → mean difference with its interval → Markdown; and what each start costs until it is as
good as the baseline in the end.
Source: the paired t interval of Student (1908).
Differs from comparing means ± spread: seeds share data order and first weights, so what all starts
owe to a lucky seed cancels, and fewer seeds tell smaller differences.
"""

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hf_dash.history import (
    MAY_DIFFER,
    History,
    RoundRecord,
    free_settings,
    read_history,
    starts_of,
)
from hf_dash.report.markdown import MISSING, Markdown, escape_markdown, markdown_table
from hf_dash.report.tables import Run, mean_accuracy, mean_steps
from hf_dash.runs.round_files import report_of
from hf_dash.utils.checks import check_confidence
from hf_dash.utils.reports import REPORT_NAME


@dataclass(frozen=True)
class PairedDifference:
    """One number of a start minus the baseline's, over the seeds both have.

    Args:
        num_seeds: at least 2.
        mean: of the differences.
        low: lower end of the confidence interval of the mean.
        high: upper end.

    Example:
        >>> from hf_dash.report import PairedDifference
        >>> difference = PairedDifference(num_seeds=5, mean=2.76, low=1.81, high=3.71)
        >>> difference.low > 0  # better in the mean of all seeds, not only of these
        True
    """

    num_seeds: int
    mean: float
    low: float
    high: float


def join_histories(paths: Sequence[str | Path], *, skip_seeds: Collection[int] = ()) -> History:
    """Join the histories of one protocol, in memory, with the settings they share.

    Each record gets the whole report of its shrink, where the round's folder has it.

    Args:
        paths: of the histories, at least one.
        skip_seeds: seeds left out, such as one that settings were tuned on.

    Raises:
        ValueError: no path, a damaged history, other settings, or the same round in two of them.

    Example:
        >>> from hf_dash.history import RoundRecord, write_history
        >>> from hf_dash.report import join_histories
        >>> for start in ("cold", "dash"):
        ...     record = RoundRecord(start, 0, 1, 8, 8, 0.5, {}, 1.0, True, 3, 30, 0.0, 1.0)
        ...     write_history(f"{start}.json", {}, [record])
        >>> [record.start for record in join_histories(["cold.json", "dash.json"]).records]
        ['cold', 'dash']
    """
    if not paths:
        raise ValueError("paths must name at least one history, got none")
    first, *others = (read_history(path) for path in paths)
    # What is not shared, such as somebody's own folders, says nothing about the whole.
    free = free_settings(first.settings, MAY_DIFFER)
    shared = {name: value for name, value in first.settings.items() if name not in free}
    joined = History(None, shared, may_differ=MAY_DIFFER)
    for history in (first, *others):
        joined.check_same_run(history)
        for record in history.records:
            if record.seed not in skip_seeds:
                # Each followed another entry where it was written.
                joined.append(replace(_with_report(history, record), previous=None))
    return joined


def _with_report(history: History, record: RoundRecord) -> RoundRecord:
    """Return a record with the whole report of its shrink, where its folder still has it."""
    assert history.path is not None
    folder = history.path.parent / record.folder
    if not (folder / REPORT_NAME).is_file():
        return record
    return replace(record, shrink=report_of(folder, record))


def paired_difference(
    records: Sequence[RoundRecord],
    start: str,
    baseline: str,
    value: Callable[[Run], float],
    *,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compare one start with the baseline, seed by seed.

    Args:
        records: of both, among others.
        start: name of one.
        baseline: name of the other.
        value: from the records of one start and seed, in order of rounds, to the number compared.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: fewer than two seeds have all rounds of both, or ``confidence`` is out of range.

    Example:
        >>> from hf_dash.history import RoundRecord
        >>> from hf_dash.report import paired_difference
        >>> records = [
        ...     RoundRecord(start, seed, 1, 8, 8, accuracy, {}, 1.0, True, 3, 30, 0.0, 1.0)
        ...     for start, accuracy in {"cold": 0.5, "dash": 0.625}.items()
        ...     for seed in (0, 1, 2)
        ... ]
        >>> paired_difference(records, "dash", "cold", lambda run: run[-1].accuracy)
        PairedDifference(num_seeds=3, mean=0.125, low=0.125, high=0.125)
    """
    from scipy.stats import ttest_rel

    check_confidence(confidence)
    own, other = _finished(records, start), _finished(records, baseline)
    seeds = sorted(own.keys() & other.keys())
    if len(seeds) < 2:
        raise ValueError(
            f"start {start!r} and baseline {baseline!r} must have all rounds of at least two seeds"
            f" in common, got seeds {seeds}"
        )
    mine, theirs = (np.array([value(runs[seed]) for seed in seeds]) for runs in (own, other))
    with warnings.catch_warnings():
        # Where all differences are the same SciPy warns of cancellation; the interval is a point.
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = ttest_rel(mine, theirs).confidence_interval(confidence)
    mean = float((mine - theirs).mean())
    return PairedDifference(len(seeds), mean, float(interval.low), float(interval.high))


def paired_table(records: Sequence[RoundRecord], baseline: str, *, confidence: float = 0.95) -> str:
    """Return one row per other start: its difference from the baseline, with the interval.

    Accuracies differ in points. Steps are compared by their ratio: the interval is that of the mean
    logarithm. Starts with fewer than two seeds in common with the baseline are left out.

    Args:
        records: of the baseline and others.
        baseline: name of a start.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: no start has two seeds in common with the baseline.

    Example:
        >>> from hf_dash.history import RoundRecord
        >>> from hf_dash.report import paired_table
        >>> records = [
        ...     RoundRecord(start, seed, index, 8, 8 * index, accuracy, {}, 1.0, True, 3, 30, 0, 1)
        ...     for start, accuracy in {"cold": 0.5, "dash": 0.625}.items()
        ...     for seed in (0, 1) for index in (1, 2)
        ... ]
        >>> row = paired_table(records, "cold").splitlines()[-1]
        >>> [cell.strip() for cell in row.split("|")][1:4]
        ['dash', '2', '+12.50 (+12.50 … +12.50)']
    """
    header = [
        f"vs. {baseline}",
        "seeds",
        "accuracy, last round",
        "mean of rounds ≥ 2",
        "steps, last round",
        "mean of rounds ≥ 2",
    ]
    shared = _finished(records, baseline).keys()
    rows = []
    for start in starts_of(records):
        seeds = _finished(records, start).keys() & shared
        if start == baseline or len(seeds) < 2:
            continue

        def compare(value: Callable[[Run], float], start: str = start) -> PairedDifference:
            return paired_difference(records, start, baseline, value, confidence=confidence)

        points = [compare(lambda run: 100 * run[-1].accuracy), compare(mean_accuracy)]
        ratios = [
            compare(lambda run: math.log(run[-1].steps)),
            compare(lambda run: math.log(mean_steps(run))),
        ]
        cells = [f"{p.mean:+.2f} ({p.low:+.2f} … {p.high:+.2f})" for p in points]
        cells += [
            "× {:.2f} ({:.2f} … {:.2f})".format(*map(math.exp, (r.mean, r.low, r.high)))
            for r in ratios
        ]
        rows.append([start, str(len(seeds)), *cells])
    if not rows:
        raise ValueError(
            f"records must hold baseline {baseline!r} and another start with all rounds of at least"
            f" two seeds in common, got {starts_of(records)}"
        )
    return markdown_table(header, rows)


def order_table(records: Sequence[RoundRecord], starts: Sequence[str]) -> Markdown:
    """Return the mean accuracy of rounds ≥ 2 per seed, and how often the starts are in order.

    Args:
        records: of these starts, among others; seeds in which one lacks a round are left out.
        starts: names, from the least accurate to the most accurate; at least two.

    Raises:
        ValueError: fewer than two starts are named, or no seed has all rounds of all of them.

    Example:
        >>> from hf_dash.history import RoundRecord
        >>> from hf_dash.report import order_table
        >>> records = [
        ...     RoundRecord(start, seed, 1, 8, 8, accuracy, {}, 1.0, True, 3, 30, 0, 1)
        ...     for start, accuracy in {"cold": 0.5, "dash": 0.625}.items()
        ...     for seed in (0, 1)
        ... ]
        >>> print(order_table(records, ["cold", "dash"]).splitlines()[-1])
        cold < dash in 2 of 2 seeds
    """
    if len(starts) < 2:
        raise ValueError(f"starts must name at least two, got {list(starts)}")
    runs = {start: _finished(records, start) for start in starts}
    seeds = sorted(set.intersection(*(set(own) for own in runs.values())))
    if not seeds:
        raise ValueError(f"records must hold all rounds of {list(starts)} in one seed, got none")
    rows, count = [], 0
    for seed in seeds:
        means = [mean_accuracy(runs[start][seed]) for start in starts]
        ordered = all(lower < higher for lower, higher in pairwise(means))
        count += ordered
        rows.append([str(seed), *(f"{mean:.2f} %" for mean in means), "yes" if ordered else "no"])
    table = markdown_table(["seed", *starts, "in order"], rows)
    order = " < ".join(map(escape_markdown, starts))
    return Markdown(f"{table}\n\n{order} in {count} of {len(seeds)} seeds")


def price_table(records: Sequence[RoundRecord], baseline: str) -> str:
    """Return one row per start: its whole price until it is as good as the baseline in the end.

    The goal is the baseline's accuracy in its last round, mean over seeds. A start reaches it in
    the first round whose accuracy, mean over seeds, is no lower. The price is all it took until
    then, starts and gradient passes included, mean over seeds, and as a share of the baseline's.

    Args:
        records: of the baseline and others; seeds without all rounds are left out.
        baseline: name of a start.

    Raises:
        ValueError: the baseline has no seed with all rounds.

    Example:
        >>> from hf_dash.history import RoundRecord
        >>> from hf_dash.report import price_table
        >>> records = [
        ...     RoundRecord(start, seed, index, 8, 8 * index, accuracy, {}, 1.0, True, 3, 30, 0, 1)
        ...     for start, accuracy in {"cold": 0.5, "dash": 0.625}.items()
        ...     for seed in (0, 1) for index in (1, 2)
        ... ]
        >>> row = price_table(records, "cold").splitlines()[-1]
        >>> [cell.strip() for cell in row.split("|")][1:7]
        ['dash', '2', '1', '8', '30', '50%']
    """
    header = ["start", "seeds", "reached in round", "images seen", "steps", "of baseline"]
    header += ["seconds", "of baseline", "images read", "of baseline"]
    whole = list(_finished(records, baseline).values())
    if not whole:
        raise ValueError(f"baseline must be a start with all rounds of a seed, got {baseline!r}")
    goal = _mean([run[-1].accuracy for run in whole])
    full = _price(whole, len(whole[0]))
    rows = []
    for start in starts_of(records):
        runs = list(_finished(records, start).values())
        if not runs:
            continue
        reached = _rounds_until(runs, goal)
        if reached is None:
            rows.append([start, str(len(runs)), "never", *[MISSING] * 7])
            continue
        last = runs[0][reached - 1]
        price = _price(runs, reached)
        cells = [
            cell
            for cost, whole_cost in zip(price, full, strict=True)
            for cell in (f"{cost:,.0f}", f"{cost / whole_cost:.0%}" if whole_cost else MISSING)
        ]
        rows.append([start, str(len(runs)), str(last.round_index), f"{last.num_total:,}", *cells])
    return markdown_table(header, rows)


def share_of_steps(
    records: Sequence[RoundRecord], start: str, baseline: str, *, points: float
) -> float | None:
    """Return the steps of a start until it is about as accurate as the baseline in the end.

    Args:
        records: of both, among others; seeds without all rounds are left out.
        start: name of one, with a seed that has all rounds.
        baseline: name of the other, with a seed that has all rounds.
        points: percentage points that the mean over seeds may be below the baseline's.

    Returns:
        A share of the baseline's steps over all rounds; None if the start never gets there.

    Example:
        >>> from hf_dash.history import RoundRecord
        >>> from hf_dash.report.paired import share_of_steps
        >>> records = [
        ...     RoundRecord(start, 0, index, 8, 8 * index, accuracy, {}, 1.0, True, 3, 30, 0, 1)
        ...     for start, accuracy in {"cold": 0.5, "warm": 0.48}.items() for index in (1, 2)
        ... ]
        >>> share_of_steps(records, "warm", "cold", points=2), share_of_steps(
        ...     records, "warm", "cold", points=1
        ... )
        (0.5, None)
    """
    own, whole = (list(_finished(records, name).values()) for name in (start, baseline))
    goal = _mean([run[-1].accuracy for run in whole]) - points / 100
    # Not to be missed for a last digit.
    reached = _rounds_until(own, goal - 1e-9)
    return None if reached is None else _price(own, reached)[0] / _price(whole, len(whole[0]))[0]


def _rounds_until(runs: Sequence[Run], goal: float) -> int | None:
    """Return after how many rounds the accuracy, mean over runs, is no lower than the goal."""
    means = (_mean([run[index].accuracy for run in runs]) for index in range(len(runs[0])))
    return next((count for count, mean in enumerate(means, 1) if mean >= goal), None)


def _finished(records: Sequence[RoundRecord], start: str) -> dict[int, Run]:
    """Return the runs of a start by seed, in order of rounds; those with all rounds alone."""
    last = max((record.round_index for record in records), default=0)
    runs: dict[int, Run] = {}
    for record in sorted(records, key=lambda r: r.round_index):
        if record.start == start:
            runs.setdefault(record.seed, []).append(record)
    return {seed: run for seed, run in runs.items() if len(run) == last}


def _price(runs: Sequence[Run], num_rounds: int) -> tuple[float, float, float]:
    """Return steps, seconds and images read in the first rounds, mean over runs."""
    spent = [run[:num_rounds] for run in runs]
    return (
        _mean([sum(r.steps for r in run) for run in spent]),
        _mean([sum(r.seconds for r in run) for run in spent]),
        _mean([sum(r.images_read or 0 for r in run) for run in spent]),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
