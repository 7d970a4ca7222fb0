"""Records as Markdown tables.

Flow: records of a history → rows of numbers → Markdown, for terminals, READMEs and cards alike.
"""

from collections.abc import Callable, Sequence

import numpy as np

from hf_dash.history import RoundRecord, starts_of


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out as a Markdown table, first column left, the others right."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    lines = []
    for row in [table[0], rule, *table[1:]]:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rounds_table(records: Sequence[RoundRecord]) -> str:
    """Return one row per record: start, seed, round, sizes, accuracy, steps, seconds."""
    header = ["start", "seed", "round", "images", "accuracy", "steps", "seconds", "of these start"]
    rows = [
        [
            r.start,
            str(r.seed),
            str(r.round_index),
            str(r.num_total),
            f"{r.accuracy:.2%}",
            str(r.steps) + ("*" if r.converged is False else ""),
            f"{r.seconds:.1f}",
            f"{r.start_seconds:.2f}",
        ]
        for r in records
    ]
    table = markdown_table(header, rows)
    if all(record.converged is not False for record in records):
        return table
    return table + "\n\n\\* stopped at the largest number of epochs, before convergence"


def starts_table(records: Sequence[RoundRecord]) -> str:
    """Return one row per start: mean ± sample standard deviation over seeds.

    The accuracy and the steps are those of the last round and, per seed, the mean over the rounds
    that have a start (all but the first); seconds are those of all rounds together.
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
    rows = []
    for start in starts_of(records):
        runs = _runs([record for record in records if record.start == start])
        rows.append(
            [
                start,
                str(len(runs)),
                _spread(runs, lambda run: 100 * run[-1].accuracy, "{:.2f}", " %"),
                _spread(runs, lambda run: 100 * _mean(run, lambda r: r.accuracy), "{:.2f}", " %"),
                _spread(runs, lambda run: run[-1].steps, "{:.0f}"),
                _spread(runs, lambda run: _mean(run, lambda r: r.steps), "{:.0f}"),
                _spread(runs, lambda run: sum(r.seconds for r in run), "{:.1f}"),
                _spread(runs, lambda run: sum(r.start_seconds for r in run), "{:.2f}"),
            ]
        )
    return markdown_table(header, rows)


Run = list[RoundRecord]


def _runs(records: Sequence[RoundRecord]) -> list[Run]:
    seeds = dict.fromkeys(record.seed for record in records)
    return [[record for record in records if record.seed == seed] for seed in seeds]


def _mean(run: Run, value: Callable[[RoundRecord], float]) -> float:
    started = [record for record in run if record.round_index > 1] or run
    return float(np.mean([value(record) for record in started]))


def _spread(runs: list[Run], value: Callable[[Run], float], form: str, unit: str = "") -> str:
    values = [value(run) for run in runs]
    text = form.format(np.mean(values))
    if len(values) > 1:
        text += " ± " + form.format(np.std(values, ddof=1))
    return text + unit
