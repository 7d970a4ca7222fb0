"""Tables over whole experiments: how to repeat one, and one start on the grounds of all.

Flow: folders of evidence → records, and what is said about them → Markdown.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_dash.history import RoundRecord
from hf_dash.report.evidence import read_evidence, read_settings
from hf_dash.report.markdown import MISSING, Markdown, escape_markdown, markdown_table
from hf_dash.report.paired import PairedDifference, paired_difference, share_of_steps
from hf_dash.report.tables import Run, mean_accuracy
from hf_dash.report.verdict import start_verdict

# Points below warm that do not count as harm.
HARMLESS = 1.0


def setup_text(folder: str | Path) -> Markdown:
    """Return an experiment's commands, and what else it takes to repeat it.

    Args:
        folder: with a ``settings.json`` whose ``"about"`` holds ``"commands"``, ``"commits"``,
            ``"network"`` and ``"machine"``. Seeds, precision and versions are those of the records
            where :func:`~hf_dash.report.evidence.write_evidence` wrote the folder.

    Example:
        >>> import json
        >>> from tempfile import TemporaryDirectory
        >>> about = {"commands": ["python train.py"], "network": "ResNet", "machine": "a laptop"}
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "settings.json").write_text(json.dumps({"about": about}))
        ...     print(setup_text(folder).splitlines()[-1])
        - Hardware: a laptop
    """
    folder = Path(folder)
    about = read_settings(folder)["about"]
    records = read_evidence(folder).records if (folder / "rounds.csv").is_file() else []
    versions = [f"{n} {v}" for record in records for n, v in (record.versions or {}).items()]
    facts = {
        "Network": [about["network"]],
        "Seeds": [str(seed) for seed in sorted({record.seed for record in records})],
        "Commits": [f"`{commit}`" for commit in about.get("commits", ())],
        "Hardware": [about["machine"], *(r.hardware for r in records if r.hardware)],
        "Versions": versions,
    }
    lines = [f"- {name}: {', '.join(dict.fromkeys(of))}" for name, of in facts.items() if any(of)]
    return Markdown("\n".join(["```bash", *about["commands"], "```", "", *lines]))


def grounds_table(folders: Sequence[str | Path], start: str = "dash") -> Markdown:
    """Return one row per experiment: a start against cold, warm, and the best of the others.

    Accuracies of the last round differ in points, its steps by their ratio, as in ``paired_table``;
    one seed has no interval. The seeds counted are those shared with cold. The start's own
    variants, such as ``"dash+lam=0.1"``, are not rivals.

    Args:
        folders: as :func:`write_evidence` wrote them. ``about["ground"]`` says what is special in
            an experiment, ``about["network"]`` what was trained.
        start: name of the start.

    Raises:
        ValueError: an experiment has no such start, or none named ``"cold"`` or ``"warm"``.

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> ends = {"cold": 0.5, "warm": 0.4, "dash": 0.6, "fire": 0.55}
        >>> rest = {"per_class_accuracy": {}, "train_accuracy": 1.0, "converged": True, "epochs": 3}
        >>> rest |= {"steps": 30, "start_seconds": 0.5, "train_seconds": 2.0}
        >>> records = [RoundRecord(s, 0, 1, 10, 10, a, **rest) for s, a in ends.items()]
        >>> about = {"ground": "an example", "network": "tiny"}
        >>> hf_dash.report.write_evidence(hf_dash.History(None, {}, records), "tiny", about=about)
        >>> print(hf_dash.report.grounds_table(["tiny"]).splitlines()[0])
        | ground ... |
    """
    rows = []
    for folder in map(Path, folders):
        evidence = read_evidence(folder)
        records, about = evidence.records, evidence.settings["about"]
        last = max(record.round_index for record in records)
        ends: dict[str, list[float]] = {}
        for record in records:
            if record.round_index == last:
                ends.setdefault(record.start, []).append(record.accuracy)
        if missing := {start, "cold", "warm"} - ends.keys():
            raise ValueError(f"{folder} must have the starts {sorted(missing)}, got {list(ends)}")
        rivals = ends.keys() - {"cold", "warm"} - {name for name in ends if name.startswith(start)}
        best = max(rivals, key=lambda rival: sum(ends[rival]) / len(ends[rival]), default=None)
        points = [
            _versus(records, start, name, lambda run: 100 * run[-1].accuracy, "{:+.1f}".format)
            for name in ("cold", "warm", *([best] if best else []))
        ]
        points[2:] = [f"{points[2]} {best.split('+')[0]}"] if best else [MISSING]
        steps = _versus(records, start, "cold", lambda run: math.log(run[-1].steps), _ratio)
        seeds = {r.seed for r in records if r.start == start}
        seeds &= {r.seed for r in records if r.start == "cold"}
        link = f"[{folder.name}]({folder.name}/README.md)"
        ground = Markdown(f"{link}: {escape_markdown(about['ground'])}")
        rows.append([ground, about["network"], str(len(seeds)), *points, steps])
    header = ["ground", "network", "seeds", f"{start} vs. cold", "vs. warm", "vs. best rival"]
    return markdown_table([*header, "steps vs. cold"], rows)


def verdicts_table(folders: Sequence[str | Path], start: str = "dash") -> Markdown:
    """Return one row per experiment: does a start harm, does it help, what does the verdict say.

    Accuracies are means of rounds ≥ 2 and differ in points, paired over seeds, with 95 % intervals.
    "Within 1 point of warm" is "yes" if even the lower end of the interval is no lower than −1,
    "on average" if the mean is, "no" otherwise. The steps are those until the start is within
    1 point of what cold has in the end, as a share of cold's; "never" if it does not get there.

    Args:
        folders: as :func:`write_evidence` wrote them, each with the start, cold and warm.
        start: name of the start.

    Raises:
        ValueError: an experiment lacks a start, or has fewer than two seeds.

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> ends = {"cold": 0.5, "warm": 0.5, "dash": 0.4}
        >>> records = [
        ...     RoundRecord(start, seed, index, 8, 8, accuracy, {}, 1.0, True, 3, 30, 0.0, 1.0)
        ...     for start, accuracy in ends.items() for seed in (0, 1, 2) for index in (1, 2)
        ... ]
        >>> about = {"ground": "an example", "network": "tiny"}
        >>> hf_dash.report.write_evidence(hf_dash.History(None, {}, records), "tiny", about=about)
        >>> table = hf_dash.report.verdicts_table(["tiny"])
        >>> [cell.strip() for cell in table.splitlines()[-1].split("|")][5:8]
        ['no', 'never', 'warm']
    """
    rows = []
    for folder in map(Path, folders):
        evidence = read_evidence(folder)
        verdict = start_verdict(evidence.records)
        warm, own = (
            paired_difference(evidence.records, one, other, mean_accuracy)
            for one, other in (("warm", "cold"), (start, "warm"))
        )
        within = "yes" if own.low >= -HARMLESS else "on average" if own.mean >= -HARMLESS else "no"
        share = share_of_steps(evidence.records, start, "cold", points=HARMLESS)
        link = f"[{folder.name}]({folder.name}/README.md)"
        ground = Markdown(f"{link}: {escape_markdown(evidence.settings['about']['ground'])}")
        steps = "never" if share is None else f"{share:.2f}"
        cells = [_points(warm), _points(own), within, steps, verdict.start]
        rows.append([ground, str(own.num_seeds), *cells])
    header = ["ground", "seeds", "warm vs. cold", f"{start} vs. warm", "within 1 point of warm"]
    return markdown_table([*header, "steps to cold − 1 point", "verdict"], rows)


def verdict_text(folder: str | Path) -> Markdown:
    """Return the verdict on an experiment, as continual_rounds.py prints it.

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> records = [
        ...     RoundRecord(start, 0, index, 8, 8, 0.5, {}, 1.0, True, 3, 30, 0.0, 1.0)
        ...     for start in ("cold", "warm") for index in (1, 2)
        ... ]
        >>> hf_dash.report.write_evidence(hf_dash.History(None, {}, records), "two")
        >>> hf_dash.report.verdict_text("two")[:30]
        '> warm: +0.0 points vs. cold i'
    """
    sentence = start_verdict(read_evidence(folder).records).sentence
    return Markdown(f"> {escape_markdown(sentence)}")


def _points(difference: PairedDifference) -> str:
    return f"{difference.mean:+.1f} ({difference.low:+.1f} … {difference.high:+.1f})"


def _versus(
    records: Sequence[RoundRecord],
    start: str,
    other: str,
    value: Callable[[Run], float],
    text: Callable[[float], str],
) -> str:
    runs = [[record for record in records if record.start == name] for name in (start, other)]
    if len({r.seed for r in runs[0]} & {r.seed for r in runs[1]}) < 2:
        return text(value(runs[0]) - value(runs[1]))
    paired = paired_difference(records, start, other, value)
    return f"{text(paired.mean)} ({text(paired.low)} … {text(paired.high)})"


def _ratio(logarithm: float) -> str:
    return f"{math.exp(logarithm):.2f}"
