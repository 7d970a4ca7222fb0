"""Records and simulations as Markdown tables.

Flow: records of a history, or simulations → rows of numbers → Markdown, for terminals, READMEs and
cards alike. Whatever comes from data, such as the names of classes, shows as the text it is.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hf_dash.framework import Simulation
from hf_dash.history import RoundRecord, starts_of
from hf_dash.pretraining import records_by_length

MISSING = "–"

# Of each number of measure_memorisation: the column's name, whether it is a share, how to write it.
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


# What would be markup within a line: also entities, mathematics, addresses that become links,
# underscores that are not inside a word, and a number sign that would end a heading.
_MARKUP = re.compile(
    r"[\\`*\[\]<|~$@]|&(?=#?\w+;)|:(?=//)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])|(?<!\w)#",
    re.IGNORECASE,
)
# They would turn around or hide what stands beside them.
_BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class Markdown(str):
    """Text that is Markdown already, and is not escaped again; in a table it needs ``\\|``."""


def escape_markdown(text: str) -> str:
    """Return text as GitHub's Markdown that shows it as it is, within one line.

    Runs of white space, line breaks among them, become one space; what cannot be shown or written
    to a file becomes ``\ufffd``. A :class:`Markdown` stays as it is.
    """
    if isinstance(text, Markdown):
        return text
    return Markdown(_MARKUP.sub(r"\\\g<0>", _one_line(text)))


def code_span(text: str) -> Markdown:
    """Return text as inline code, or escaped where it holds what a code span cannot."""
    plain = bool(text) and _one_line(text) == text and not re.search(r"[`|\\$]", text)
    return Markdown(f"`{text}`" if plain else escape_markdown(text))


def _one_line(text: str) -> str:
    return "".join(
        "\ufffd"
        if unicodedata.category(character) in ("Cc", "Cs")
        or unicodedata.bidirectional(character) in _BIDIRECTIONAL
        else character
        for character in " ".join(text.split())
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markdown:
    """Lay rows out as a Markdown table, first column left, the others right.

    Cells are shown as they are (:func:`escape_markdown`) unless they are :class:`Markdown`.
    """
    table = [[escape_markdown(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    lines = []
    for row in [table[0], rule, *table[1:]]:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def rounds_table(records: Sequence[RoundRecord]) -> Markdown:
    """Return one row per record: start, seed, round, sizes, accuracy, steps, seconds."""
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
    rounds together, and so are the images read by starts and training. The column of the images is
    there where any record has them; a start with a round that has none shows "–".
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
    rows = []
    for start in starts_of(records):
        runs = _runs([record for record in records if record.start == start])
        row = [
            start,
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


def _images_read(runs: "list[Run]") -> str:
    if any(record.images_read is None for run in runs for record in run):
        return MISSING
    return _spread(runs, lambda run: sum(r.images_read or 0 for r in run), "{:,.0f}")


def memorisation_table(records: Sequence[RoundRecord]) -> Markdown:
    """Return one row per start: what it remembered right before → right after the start.

    Every number is the mean over the records of rounds from the second on, of all seeds, that have
    it; see ``measure_memorisation`` for what the columns mean. "–" where there is none. Before the
    start the model has the weights of the last round, whatever the start.

    Raises:
        ValueError: no record of a round from the second on has measurements.
    """
    measured = [r for r in records if r.round_index > 1 and r.memorisation]
    names = dict.fromkeys(
        name for r in measured for side in (r.memorisation or {}).values() for name in side
    )
    if not names:
        raise ValueError(
            "records must hold measurements of memorisation in a round from the second on, got"
            f" {len(records)} records without any"
        )
    rows = []
    for start in starts_of(measured):
        sides = [r.memorisation or {} for r in measured if r.start == start]
        rows.append([start, *(_before_and_after(sides, name) for name in names)])
    return markdown_table(["start", *(_measure(name)[0] for name in names)], rows)


def pretraining_table(records: Sequence[RoundRecord]) -> Markdown:
    """Return one row per start and length of pre-training: mean ± sample deviation over seeds.

    The last columns are means of what the model knew right before → right after the start, of the
    labels and of the wrong labels it was pre-trained on; "–" where nothing was measured.

    Raises:
        ValueError: the records are not those of ``run_pretraining``.
    """
    header = ["start", "epochs before", "seeds", "accuracy, held out", "steps"]
    header += ["old labels known", "wrong labels reproduced"]
    rows = []
    for start, by_length in records_by_length(records).items():
        for epochs, own in by_length.items():
            sides = [record.memorisation or {} for record in own]
            cells = [
                _mean_and_spread([100 * record.accuracy for record in own], "{:.2f}", " %"),
                _mean_and_spread([record.steps for record in own], "{:.0f}"),
                *(
                    _before_and_after(sides, name)
                    for name in ("accuracy_old", "flipped_reproduced")
                ),
            ]
            rows.append([start, f"{epochs:g}", str(len(own)), *cells])
    return markdown_table(header, rows)


def simulations_table(simulations: Mapping[str, Sequence[Simulation]]) -> Markdown:
    """Return one row per setting and start: mean ± sample standard deviation over seeds.

    Accuracy, learned features and memorised points are those after the last experiment, points with
    a gradient those when it begins; the last column adds these up over all experiments.
    """
    header = [
        "setting",
        "start",
        "seeds",
        "accuracy, last experiment",
        "learned features",
        "memorised points",
        "points with a gradient",
        "of all experiments",
    ]
    rows = []
    for setting, group in simulations.items():
        for start in dict.fromkeys(one.start for one in group):
            own = [one for one in group if one.start == start]
            cells = [
                _mean_and_spread([100 * one.accuracy[-1] for one in own], "{:.2f}", " %"),
                _mean_and_spread([one.learned_features[-1] for one in own], "{:.1f}"),
                _mean_and_spread([one.memorised_points[-1] for one in own], "{:,.0f}"),
                _mean_and_spread([one.nonzero_points[-1] for one in own], "{:,.0f}"),
                _mean_and_spread([one.nonzero_points.sum() for one in own], "{:,.0f}"),
            ]
            rows.append([setting, start, str(len(own)), *cells])
    return markdown_table(header, rows)


def _measure(name: str) -> tuple[str, bool, str]:
    return MEASURES.get(name, (name, False, "{:.3g}"))


def _before_and_after(sides: list[dict[str, dict[str, float]]], name: str) -> str:
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
    return _mean_and_spread([value(run) for run in runs], form, unit)


def _mean_and_spread(values: Sequence[float], form: str, unit: str = "") -> str:
    text = form.format(np.mean(values))
    if len(values) > 1:
        text += " ± " + form.format(np.std(values, ddof=1))
    return text + unit
