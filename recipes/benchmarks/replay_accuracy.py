"""Accuracy by the size of the replay, from runs of continual_rounds.py that differ in nothing else.

Launch:  for size in 0.5 1.0 2.0; do
             accelerate launch recipes/continual_rounds.py --replay_samples $size \
                 --starts cold warm dash --seeds 2 --output_dir runs/replay/$size
         done
         accelerate launch recipes/continual_rounds.py --starts cold warm dash --seeds 2 \
             --output_dir runs/replay/all
         python recipes/benchmarks/replay_accuracy.py --histories runs/replay/*/history.jsonl

Writes output_dir/rounds_by_size.csv, a line per round, and output_dir/replay.csv: per start and
size the mean over seeds, in the last round and in rounds from the second on; the difference to all
old images of the same seeds, its mean and its lowest and highest; images read in all rounds. Seeds
that a size lacks are left out of all.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import HfArgumentParser

import hf_dash

ALL = "all"


@dataclass
class Arguments:
    histories: list[str] = field(metadata={"help": "Of one size or of several, of any seeds."})
    output_dir: str = "runs/replay"


def runs_of(paths):
    """Return the records of each (start, size, seed), in order of rounds."""
    runs = {}
    for path in paths:
        history = hf_dash.read_history(path)
        size = history.settings["replay_samples"]
        for record in sorted(history.records, key=lambda record: record.round_index):
            key = record.start, ALL if size is None else str(size), record.seed
            runs.setdefault(key, []).append(record)
    last = max(len(records) for records in runs.values())
    return {key: records for key, records in runs.items() if len(records) == last}


def summary(runs):
    """Yield a row per start and size."""
    starts, sizes = (list(dict.fromkeys(key[place] for key in runs)) for place in (0, 1))
    sizes = [*sorted((size for size in sizes if size != ALL), key=float), ALL]
    for start in starts:
        found = [{seed for *key, seed in runs if key == [start, size]} for size in sizes]
        seeds = sorted(set.intersection(*found))
        baseline = np.array([mean_of(runs[start, ALL, seed]) for seed in seeds])
        for size in sizes:
            own = [runs[start, size, seed] for seed in seeds]
            last = np.array([100 * records[-1].accuracy for records in own])
            means = np.array([mean_of(records) for records in own])
            gains = means - baseline
            told = f"{gains.mean():+.2f} ({gains.min():+.2f} … {gains.max():+.2f})"
            read = np.mean([sum(record.images_read for record in records) for records in own])
            row = [start, size, len(seeds), f"{last.mean():.2f}", f"{means.mean():.2f}"]
            row += ["" if size == ALL else told, own[0][-1].num_total, f"{read:,.0f}"]
            yield row


def mean_of(records):
    return 100 * np.mean([record.accuracy for record in records[1:]])


def write(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    runs, folder = runs_of(args.histories), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    header = ["start", "replay", "seed", "round", "images", "accuracy", "steps", "images read"]
    rows = [
        [*key, r.round_index, r.num_total, round(r.accuracy, 4), r.steps, r.images_read]
        for key, records in sorted(runs.items())
        for r in records
    ]
    write(folder / "rounds_by_size.csv", header, rows)
    header = ["start", "replay", "seeds", "accuracy, last round", "mean of rounds ≥ 2"]
    header += ["vs. all", "images, last round", "images read, all rounds"]
    write(folder / "replay.csv", header, summary(runs))


if __name__ == "__main__":
    main()
