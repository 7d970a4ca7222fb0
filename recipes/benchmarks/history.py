"""What recording a round and opening a run cost, by the number of rounds recorded before.

Launch:  python recipes/benchmarks/history.py
         python recipes/benchmarks/history.py --records 1000 10000 --repeats 5

Two ways, side by side: whole, a JSON file with every shrink's report, rewritten at each round, as
runs kept it until version 0.2; and lines, one more of them at each round, the report in the round's
folder. Every round began with a shrink of ResNet-18's 62 tensors. Medians over the repeats of the
clock's and of this process's own seconds, and the bytes that one addition hands to the system. A
line of CSV each.
"""

import csv
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
from transformers import HfArgumentParser

import hf_dash

HEADER = ["way", "records", "seconds to add", "CPU-seconds to add", "bytes to add"]
HEADER += ["seconds to open", "CPU-seconds to open", "MB of history", "MB of reports"]


@dataclass
class Arguments:
    records: list[int] = field(default_factory=lambda: [1000, 10_000])
    repeats: int = 5
    output: str | None = field(default=None, metadata={"help": "File for the CSV."})


def shrink_report():
    factors = {"mean_factor": 0.512345678, "min_factor": 0.3, "max_factor": 0.987654321}
    tensors = [
        {"name": f"timm_model.layer{n // 15}.{n % 15}.weight", "num_vectors": 4096, **factors}
        | {"share_at_lam": 0.123456789}
        for n in range(62)
    ]
    overall = {"num_batches": 20, "num_images": 2560, "seconds": 1.5, "mean_factor": 0.5}
    return {
        "config": asdict(hf_dash.DashConfig()),
        **overall,
        "share_at_lam": 0.1,
        "tensors": tensors,
    }


def make_records(count, shrink, sums):
    classes = {f"class {n}": 0.912 for n in range(10)}
    values = ("dash", 0, 1, 1000, 10**6, 0.912, classes, 1.0, True, 9.0, 7000, 1.5, 60.0)
    first = hf_dash.history.RoundRecord(*values)
    first = replace(
        first,
        shrink=shrink,
        parent="rounds/001/dash_seed0",
        weights_sha256="0" * 64,
        data_fingerprint="0" * 64,
        held_out_fingerprint="0" * 64,
        versions={"hf_dash": hf_dash.__version__, "torch": "2.14.0", "timm": "1.0.31"},
        hardware="1 process, cuda, bf16",
        file_sha256=dict.fromkeys(("model.safetensors", "config.json", *sums), "0" * 64),
    )
    return hf_dash.history.chained(replace(first, round_index=n + 1) for n in range(count))


def measured(repeats, call):
    """Return medians over calls: seconds, CPU-seconds, and bytes handed to the system."""
    rows = []
    for repeat in range(repeats):
        before = (time.perf_counter(), time.process_time(), written())
        call(repeat)
        after = (time.perf_counter(), time.process_time(), written())
        rows.append([new - old for new, old in zip(after, before, strict=True)])
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def written():
    return psutil.Process().io_counters().write_chars


def add_whole(path, records):
    """Add a round the old way: work out the head from all entries, then write all of them."""
    head = hf_dash.History(None, {}, records).head
    newest = replace(records[-1], round_index=len(records) + 1, previous=head)
    hf_dash.history.write_history(path, {"lam": 0.3}, [*records, newest])


def measure_whole(folder, count, repeats):
    path, shrink = folder / "history.json", shrink_report()
    records = make_records(count, shrink, ())
    seconds, cpu, size = measured(repeats, lambda _: add_whole(path, records))
    held = path.stat().st_size
    row = [f"{seconds:.4f}", f"{cpu:.4f}", int(size)]
    if held > hf_dash.history.LARGEST:
        return [*row, "refused", "refused", f"{held / 1e6:.1f}", "0.0"]
    opened = measured(repeats, lambda _: hf_dash.read_history(path))
    return [*row, *(f"{one:.3f}" for one in opened[:2]), f"{held / 1e6:.1f}", "0.0"]


def measure_lines(folder, count, repeats):
    path, shrink = folder / "history.jsonl", shrink_report()
    summary = {name: value for name, value in shrink.items() if name != "tensors"}
    records = make_records(count, summary, ["dash_report.json"])
    hf_dash.history.write_history(path, {"lam": 0.3}, records)
    history = hf_dash.history.open_history(path, {"lam": 0.3})
    newest = replace(records[-1], previous=None)

    def add(repeat):
        history.append(replace(newest, round_index=count + 1 + repeat))

    seconds, cpu, size = measured(repeats, add)
    opened = measured(repeats, lambda _: hf_dash.read_history(path))
    reports = count * len(json.dumps(shrink, indent=1))
    row = [f"{seconds:.4f}", f"{cpu:.4f}", int(size), *(f"{one:.3f}" for one in opened[:2])]
    return [*row, f"{path.stat().st_size / 1e6:.1f}", f"{reports / 1e6:.1f}"]


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    with open(args.output or os.devnull, "w", newline="", encoding="utf-8") as file:
        writers = [csv.writer(place, lineterminator="\n") for place in (sys.stdout, file)]
        for writer in writers:
            writer.writerow(HEADER)
        for count in args.records:
            for way, measure in {"whole": measure_whole, "lines": measure_lines}.items():
                with tempfile.TemporaryDirectory() as folder:
                    row = [way, count, *measure(Path(folder), count, args.repeats)]
                for writer in writers:
                    writer.writerow(row)


if __name__ == "__main__":
    main()
