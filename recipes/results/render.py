"""Write the tables and figures of the committed evidence from its CSV files, or check them.

Launch:  python recipes/results/render.py
         python recipes/results/render.py --check
         python recipes/results/render.py --add runs/x/history.json --name x --like cifar10_small

Markers in the READMEs say what goes where; ``hf_dash/report/pages.py`` says how they are read, the
tables below what there is. ``--add`` makes a folder of one run's histories, or adds its
simulations.csv to one: then complete "about" in settings.json, write the README and render.
"""

import csv
import json
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from hf_dash import report, studies


@dataclass
class Arguments:
    check: bool = field(default=False, metadata={"help": "Write nothing, fail on a difference."})
    add: list[str] = field(default_factory=list, metadata={"help": "history.json of one protocol."})
    name: str = field(default="", metadata={"help": "The folder that --add makes."})
    like: str | None = field(default=None, metadata={"help": "A folder with much the same data."})
    root: str = field(
        default=str(Path(__file__).parents[2]), metadata={"help": "Of the repository."}
    )


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def records_of(folders, starts=None):
    """Return the records; of several folders each is a start of its own."""
    records = [
        replace(record, start=folder.name) if folders[1:] else record
        for folder in folders
        for record in report.read_evidence(folder).records
    ]
    return [record for record in records if starts is None or record.start in starts]


def simulations_of(folder, seeds=("10",), **sizes):
    """Return simulations by setting: of the first seeds, and of sizes such as ``γ=25,50``."""
    header, *rows = read_csv(folder / "simulations.csv")
    many, found = header.index("start"), {}
    for (*values, start, seed), own in groupby(rows, lambda row: row[: many + 2]):
        setting = dict(zip(header, values, strict=False))
        if int(seed) < int(seeds[0]) and all(setting[name] in sizes[name] for name in sizes):
            numbers = {row[many + 2]: np.array(row[many + 3 :], float) for row in own}
            group = found.setdefault(tuple(setting.items()), [])
            group.append(studies.Simulation(start, int(seed), **numbers))
    rising = sorted(found, key=lambda setting: [float(value) for _, value in setting])
    return {" ".join(map("=".join, setting)): found[setting] for setting in rising}


def setup(folder):
    """Return an experiment's commands, and what else one needs to repeat it."""
    about = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["about"]
    records = records_of([folder]) if (folder / "rounds.csv").is_file() else []
    facts = {
        "Network": [about["network"]],
        "Seeds": sorted({str(record.seed) for record in records}),
        "Commits": [f"`{commit}`" for commit in about["commits"]],
        "Hardware": [about["machine"], *dict.fromkeys(str(r.hardware) for r in records)],
        "Versions": dict.fromkeys(f"{n} {v}" for r in records for n, v in r.versions.items()),
    }
    lines = [f"- {name}: {', '.join(values)}" for name, values in facts.items() if values]
    return "\n".join(["```bash", *about["commands"], "```", "", *lines])


def csv_table(folders, file):
    header, *rows = read_csv(folders[0] / file[0])
    return report.markdown_table(header, [[cell or "–" for cell in row] for row in rows])


def plot_factors(folders, path, start, seed, round):  # noqa: A002
    key = (start[0], int(seed[0]), int(round[0]))
    find = {(r.start, r.seed, r.round_index): r for r in records_of(folders)}
    report.plot_factors(find[key], path)


def plot_front(folders, path):
    """Draw accuracy over the number of images: cold, warm and DASH, named at their ends."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for start, color in (("cold", "#0072B2"), ("warm", "#D55E00"), ("dash", "#009E73")):
        own = records_of(folders, [start])
        accuracies = [100 * record.accuracy for record in own]
        images = [record.num_total for record in own]
        axes.plot(images, accuracies, "o-", color=color, linewidth=2, markersize=4)
        name = f" {start.replace('dash', 'DASH')} {accuracies[-1]:.1f} %"
        axes.annotate(name, (images[-1], accuracies[-1]), color=color, va="center", weight="bold")
    axes.set(xlabel="images so far, 1,000 more in each round", ylabel="held-out accuracy (%)")
    axes.set_title("CIFAR-10 in rounds, ResNet-18 retrained in each (one seed)")
    axes.set_xlim(right=images[-1] * 1.19)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


TABLES = {
    "csv": csv_table,
    "grounds": report.grounds_table,
    "paired": lambda folders, baseline, starts=None: report.paired_table(
        records_of(folders, starts), *baseline
    ),
    "pretraining": lambda folders: studies.pretraining_table(records_of(folders)),
    "price": lambda folders, baseline: report.price_table(records_of(folders), *baseline),
    "setup": lambda folders: setup(*folders),
    "simulations": lambda folders, **sizes: studies.simulations_table(
        simulations_of(*folders, **sizes)
    ),
    "starts": lambda folders, starts=None: report.starts_table(records_of(folders, starts)),
}
FIGURES = {
    "factors": plot_factors,
    "front": plot_front,
    "pretraining": lambda folders, path: studies.plot_pretraining(records_of(folders), path),
    "rounds": lambda folders, path: report.plot_rounds(records_of(folders), path),
    "simulations": lambda folders, path, **sizes: studies.plot_simulations(
        simulations_of(*folders, **sizes), path
    ),
}


def add(paths, folder, like):
    """Make a folder of histories, whose "about" stays where there is one, or add simulations."""
    if paths[0].endswith(".csv"):
        rows = [row for path in paths for row in read_csv(Path(path))[1:]]
        ...


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    root = Path(args.root)
    results = root / "recipes" / "results"
    if args.add:
        return add(args.add, results / args.name, args.like)
    pages = [
        root / "README.md",
        root / "hf_dash" / "README.md",
        *sorted(results.rglob("README.md")),
    ]
    stale = [
        line
        for page in pages
        if page.is_file()
        for line in report.render_page(page, TABLES, FIGURES, check=args.check)
    ]
    print(*stale, sep="\n")
    if args.check and stale:
        raise SystemExit("these differ from their data: run python recipes/results/render.py")


if __name__ == "__main__":
    main()
