"""Write the tables and figures of the committed evidence from its CSV files, or check them.

Launch:  python recipes/results/render.py
         python recipes/results/render.py --check
         python recipes/results/render.py --add runs/x/history.jsonl --name x --like cifar10_small
         python recipes/results/render.py --add runs/x/simulations.csv --name learning_framework

Markers in the READMEs say what goes where: ``hf_dash/report/pages.py`` explains them, ``TABLES``
and ``FIGURES`` below are the kinds. ``--add`` writes the histories of one protocol, or simulations,
into an experiment's folder. Then complete "about" in its settings.json, write its README, render.
"""

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import HfArgumentParser

import hf_dash


@dataclass
class Arguments:
    check: bool = field(default=False, metadata={"help": "Write nothing; fail on a difference."})
    add: list[str] = field(default_factory=list, metadata={"help": "Files of a run; see above."})
    name: str = field(default="", metadata={"help": "The folder that --add writes."})
    like: str | None = field(default=None, metadata={"help": "A folder with much the same data."})


def of_records(function):
    """Make a table or figure of records; of several folders each is a start of its own."""

    def make(folders, *path, starts=None, baseline=()):
        records = [
            replace(record, start=folder.name) if folders[1:] else record
            for folder in folders
            for record in hf_dash.report.read_evidence(folder).records
            if starts is None or record.start in starts
        ]
        return function(records, *baseline, *path)

    return make


def of_simulations(function):
    """Make a table or figure of the first seeds of some sizes, such as ``γ=25,50``."""

    def make(folders, *path, seeds=("10",), **sizes):
        found = {}
        series = hf_dash.report.read_series(folders[0] / "simulations.csv.gz")
        for (setting, start, seed), numbers in series.items():
            named = dict(part.split("=") for part in setting.split())
            if int(seed) < int(seeds[0]) and all(named[name] in sizes[name] for name in sizes):
                arrays = {name: np.array(values) for name, values in numbers.items()}
                group = found.setdefault((*map(int, named.values()), setting), [])
                group.append(hf_dash.studies.Simulation(start, int(seed), **arrays))
        return function({key[-1]: found[key] for key in sorted(found)}, *path)

    return make


def csv_table(folders, file):
    with (folders[0] / file[0]).open(encoding="utf-8", newline="") as lines:
        header, *rows = csv.reader(lines)
    return hf_dash.report.markdown_table(header, [[cell or "–" for cell in row] for row in rows])


def plot_factors(folders, path, start, seed, round):
    key = (start[0], int(seed[0]), int(round[0]))
    records = hf_dash.report.read_evidence(folders[0]).records
    (record,) = [r for r in records if (r.start, r.seed, r.round_index) == key]
    hf_dash.report.plot_factors(record, path)


def plot_front(folders, path):
    """Draw accuracy over the number of images, a panel per folder: dots of seeds, their mean."""
    figure = Figure(figsize=(2 + 4.5 * len(folders), 3.5), layout="constrained")
    for panel, folder in enumerate(folders, 1):
        evidence = hf_dash.report.read_evidence(folder)
        axes, ends = figure.add_subplot(1, len(folders), panel, frameon=False), []
        for name, color in (("cold", "#0072B2"), ("warm", "#D55E00"), ("DASH", "#009E73")):
            seen = {}
            for record in evidence.records:
                if record.start == name.lower():
                    seen.setdefault(record.num_total, []).append(100 * record.accuracy)
            images, means = list(seen), [np.mean(values) for values in seen.values()]
            axes.plot(images, means, "-", images, list(seen.values()), "o", color=color, ms=4)
            ends.append((means[-1], f"  {name}, {means[-1]:.0f} %", color))
        end, gap = axes.get_ylim()[0], np.ptp(axes.get_ylim()) / 16
        for mean, label, color in sorted(ends):
            end = max(mean, end + gap)  # a line apart from the label below
            axes.text(images[-1], end, label, color=color, va="center")
        axes.set_title(f"{evidence.settings['about']['network']}; seeds: {len(seen[images[-1]])}")
        axes.set(xlabel="CIFAR-10 images so far", ylabel="held-out accuracy (%)")
    figure.savefig(path, dpi=150)


TABLES = {
    "csv": csv_table,
    "grounds": hf_dash.report.grounds_table,
    "order": lambda folders, starts: hf_dash.report.order_table(
        hf_dash.report.read_evidence(*folders).records, starts
    ),
    "paired": of_records(hf_dash.report.paired_table),
    "pretraining": of_records(hf_dash.studies.pretraining_table),
    "price": of_records(hf_dash.report.price_table),
    "setup": lambda folders: hf_dash.report.setup_text(*folders),
    "simulations": of_simulations(hf_dash.studies.simulations_table),
    "starts": of_records(hf_dash.report.starts_table),
    "verdict": lambda folders: hf_dash.report.verdict_text(*folders),
    "verdicts": hf_dash.report.verdicts_table,
}
FIGURES = {
    "factors": plot_factors,
    "front": plot_front,
    "pretraining": of_records(hf_dash.studies.plot_pretraining),
    "rounds": of_records(hf_dash.report.plot_rounds),
    "simulations": of_simulations(hf_dash.studies.plot_simulations),
}


def add(paths, folder, like):
    """Write a folder; its "about" stays where there is one."""
    if paths[0].endswith(".csv"):
        return [hf_dash.report.add_series(path, folder / "simulations.csv.gz") for path in paths]
    history = hf_dash.report.join_histories(paths)
    about = {"commands": [], "commits": [], "network": "", "machine": "", "ground": ""}
    if (folder / "settings.json").is_file():
        about = hf_dash.report.read_settings(folder)["about"]
    hf_dash.report.write_evidence(history, folder, about=about, like=like)


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    results = Path(__file__).resolve().parent
    if args.add:
        return add(args.add, results / args.name, args.like)
    above = [results.parents[1] / "README.md", results.parents[1] / "hf_dash" / "README.md"]
    stale = []
    for page in (*filter(Path.is_file, above), *sorted(results.rglob("README.md"))):
        stale += hf_dash.report.render_page(page, TABLES, FIGURES, check=args.check)
    print(*stale, sep="\n")
    if args.check and stale:
        raise SystemExit("these differ from their data; run python recipes/results/render.py")


if __name__ == "__main__":
    main()
