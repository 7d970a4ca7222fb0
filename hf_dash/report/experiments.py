"""Tables over whole experiments: how to repeat one, and one start on the grounds of all.

Flow: folders of evidence → records, and what is said about them → Markdown.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_dash.history import RoundRecord
from hf_dash.report.evidence import read_evidence, read_settings
from hf_dash.report.markdown import MISSING, Markdown, escape_markdown, markdown_table
from hf_dash.report.paired import paired_difference
from hf_dash.report.tables import Run


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
