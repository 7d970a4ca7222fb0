"""Accuracy by the size of the replay, from runs of continual_rounds.py that differ in nothing else.

Launch:  for size in 0.5 1.0 2.0; do
             accelerate launch recipes/continual_rounds.py --replay_samples $size \
                 --starts cold warm dash --seeds 2 --output_dir runs/replay/$size
         done
         accelerate launch recipes/continual_rounds.py --starts cold warm dash --seeds 2 \
             --output_dir runs/replay/all
         python recipes/benchmarks/replay_accuracy.py --histories runs/replay/*/history.jsonl

Writes output_dir/rounds_by_size.csv, a line per round, and output_dir/replay.csv: per start and
size the mean over its seeds, in the last round and in rounds from the second on; the difference to
another size on the seeds of both, its mean and its lowest and highest; images read in all rounds.
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
    baseline: str = field(default=ALL, metadata={"help": "Size that others are compared with."})
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
    return {key: runs[key] for key in sorted(runs, key=order) if len(runs[key]) == last}


def summary(runs, baseline):
    """Yield a row per start and size."""
    for start, size in dict.fromkeys(key[:2] for key in runs):
        own = {key[2]: records for key, records in runs.items() if key[:2] == (start, size)}
        last = np.mean([100 * records[-1].accuracy for records in own.values()])
        means = np.mean([mean_of(records) for records in own.values()])
        gains = [
            mean_of(records) - mean_of(runs[start, baseline, seed])
            for seed, records in own.items()
            if (start, baseline, seed) in runs and size != baseline
        ]
        told = f"{np.mean(gains):+.2f} ({min(gains):+.2f} … {max(gains):+.2f})" if gains else ""
        read = np.mean([sum(record.images_read for record in r) for r in own.values()])
        row = [start, size, len(own), f"{last:.2f}", f"{means:.2f}", told]
        yield [*row, next(iter(own.values()))[-1].num_total, f"{read:,.0f}"]


def order(key):
    start, size, seed = key
    return start, float("inf") if size == ALL else float(size), seed


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
        for key, records in runs.items()
        for r in records
    ]
    write(folder / "rounds_by_size.csv", header, rows)
    header = ["start", "replay", "seeds", "accuracy, last round", "mean of rounds ≥ 2"]
    header += [f"vs. {args.baseline}", "images, last round", "images read, all rounds"]
    write(folder / "replay.csv", header, summary(runs, args.baseline))


if __name__ == "__main__":
    main()
