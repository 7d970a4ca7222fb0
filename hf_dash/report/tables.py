"""Records of a history as Markdown tables, for terminals, READMEs and cards alike.

Flow: records → rows of numbers → Markdown.
"""

from collections.abc import Callable, Sequence

import numpy as np

from hf_dash.history import RoundRecord, starts_of
from hf_dash.report.markdown import MISSING, Markdown, markdown_table

# Of each number of measure_memorization: the column's name, whether it is a share, how to write it.
MEASURES = {
    "accuracy_old": ("accuracy, old", True, "{:.2f}"),
    "accuracy_new": ("accuracy, new", True, "{:.2f}"),
    "accuracy_held_out": ("accuracy, held out", True, "{:.2f}"),
    "flipped_reproduced": ("wrong labels reproduced", True, "{:.2f}"),
    "gradient_norm_old": ("gradient norm, old", False, "{:.3g}"),
    "gradient_norm_new": ("gradient norm, new", False, "{:.3g}"),
    "dormant_share": ("dormant units", True, "{:.1f}"),
    "effective_rank": ("effective rank", False, "{:.1f}"),
}


def rounds_table(records: Sequence[RoundRecord]) -> Markdown:
    """Return one row per record: start, seed, round, sizes, accuracy, steps, seconds.

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> [cell.strip() for cell in hf_dash.report.rounds_table([record]).split("|")][-6:-1]
        ['10', '50.00%', '30', '2.5', '0.50']
    """
    header = ["start", "seed", "round", "images", "accuracy", "steps", "seconds", "of these start"]
    rows = [
        [
            r.start,
            str(r.seed),
            str(r.round_index),
            str(r.num_total),
            f"{r.accuracy:.2%}",
            Markdown(f"{r.steps}*") if r.converged is False else str(r.steps),
            f"{r.seconds:.1f}",
            f"{r.start_seconds:.2f}",
        ]
        for r in records
    ]
    table = markdown_table(header, rows)
    if all(record.converged is not False for record in records):
        return table
    return Markdown(f"{table}\n\n\\* stopped at the largest number of epochs, before convergence")


def starts_table(records: Sequence[RoundRecord]) -> Markdown:
    """Return one row per start: mean ± sample standard deviation over seeds.

    The accuracy and the steps are those of the last round and, per seed, the mean over the rounds
    that have a start (all but the first); seconds, which include the starts, are those of all
    rounds together, and so are the images read by starts and training. The column of images read
    appears if any record has them; a start with a round that does not shows "–". A start of which a
    seed has ended before the last round of the table says where, since its row is of fewer rounds.

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> [cell.strip() for cell in hf_dash.report.starts_table([record]).split("|")][-9:-6]
        ['dash', '1', '50.00 %']
    """
    header = [
        "start",
        "seeds",
        "accuracy, last round",
        "mean of rounds ≥ 2",
        "steps, last round",
        "mean of rounds ≥ 2",
        "seconds, all rounds",
        "of these starts",
    ]
    with_images = any(record.images_read is not None for record in records)
    rows, last = [], max((record.round_index for record in records), default=0)
    for start in starts_of(records):
        runs = _runs([record for record in records if record.start == start])
        row = [
            start + _ended(runs, last),
            str(len(runs)),
            _spread(runs, lambda run: 100 * run[-1].accuracy, "{:.2f}", " %"),
            _spread(runs, mean_accuracy, "{:.2f}", " %"),
            _spread(runs, lambda run: run[-1].steps, "{:.0f}"),
            _spread(runs, mean_steps, "{:.0f}"),
            _spread(runs, lambda run: sum(r.seconds for r in run), "{:.1f}"),
            _spread(runs, lambda run: sum(r.start_seconds for r in run), "{:.2f}"),
        ]
        rows.append([*row, _images_read(runs)] if with_images else row)
    return markdown_table([*header, "images read, all rounds"] if with_images else header, rows)


def _ended(runs: "list[Run]", last: int) -> str:
    """Return the last rounds of runs as text, unless all of them are the last one of all."""
    ends = [run[-1].round_index for run in runs]
    first, final = min(ends), max(ends)
    if first == last:
        return ""
    return f", to round {first}" if first == final else f", to rounds {first} to {final}"


def _images_read(runs: "list[Run]") -> str:
    if any(record.images_read is None for run in runs for record in run):
        return MISSING
    return _spread(runs, lambda run: sum(r.images_read or 0 for r in run), "{:,.0f}")


def memorization_table(records: Sequence[RoundRecord]) -> Markdown:
    """Return one row per start: what it remembered right before → right after the start.

    Every number is the mean over the records of rounds from the second on, of all seeds, that have
    it; see ``measure_memorization`` for what the columns mean. "–" where there is none. Before the
    start the model has the weights of the last round, whatever the start.

    Raises:
        ValueError: no record of a round from the second on has measurements.
    """
    measured = [r for r in records if r.round_index > 1 and r.memorization]
    names = dict.fromkeys(
        name for r in measured for side in (r.memorization or {}).values() for name in side
    )
    if not names:
        raise ValueError(
            "records must hold measurements of memorization in a round from the second on, got"
            f" {len(records)} records without any"
        )
    rows = []
    for start in starts_of(measured):
        sides = [r.memorization or {} for r in measured if r.start == start]
        rows.append([start, *(before_and_after(sides, name) for name in names)])
    return markdown_table(["start", *(_measure(name)[0] for name in names)], rows)


def _measure(name: str) -> tuple[str, bool, str]:
    return MEASURES.get(name, (name, False, "{:.3g}"))


def before_and_after(sides: list[dict[str, dict[str, float]]], name: str) -> str:
    """Return the means of one measurement right before and after the starts, as text."""
    _, is_share, form = _measure(name)
    cells = []
    for side in ("before", "after"):
        values = [s[side][name] for s in sides if name in s.get(side, {})]
        mean = np.mean(values) * (100 if is_share else 1) if values else None
        cells.append(MISSING if mean is None else form.format(mean))
    if cells == [MISSING, MISSING]:
        return MISSING
    return " → ".join(cells) + (" %" if is_share else "")


Run = list[RoundRecord]


def _runs(records: Sequence[RoundRecord]) -> list[Run]:
    seeds = dict.fromkeys(record.seed for record in records)
    return [[record for record in records if record.seed == seed] for seed in seeds]


def mean_accuracy(run: Run) -> float:
    """Return the mean accuracy, in percent, of the rounds that have a start: all but the first."""
    return 100 * float(np.mean([record.accuracy for record in _started(run)]))


def mean_steps(run: Run) -> float:
    """Return the mean number of steps of the rounds that have a start: all but the first."""
    return float(np.mean([record.steps for record in _started(run)]))


def _started(run: Run) -> Run:
    return [record for record in run if record.round_index > 1] or run


def _spread(runs: list[Run], value: Callable[[Run], float], form: str, unit: str = "") -> str:
    return mean_and_spread([value(run) for run in runs], form, unit)


def mean_and_spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Return mean ± sample standard deviation as text; the mean alone of a single value."""
    text = form.format(np.mean(values))
    if len(values) > 1:
        text += " ± " + form.format(np.std(values, ddof=1))
    return text + unit
