"""Compare the starts of finished runs over their seeds: tables and a figure, without training.

Launch:  accelerate launch recipes/compare_starts.py --histories runs/x/history.jsonl
         accelerate launch recipes/compare_starts.py --histories runs/x/history.jsonl \
             runs/y/history.jsonl --baseline dash --skip_seeds 0 --output_dir runs/compared

The histories must be of one protocol: the same data and settings, other starts or seeds. Prints
each start's mean and spread, with several seeds its paired difference from the baseline and a
confidence interval, and its cost until it is as good as the baseline in the end.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

import hf_dash


@dataclass
class CompareArguments:
    histories: list[str] = field(metadata={"help": "history.jsonl of one or more runs."})
    baseline: str = field(default="cold", metadata={"help": "Start to compare the others with."})
    confidence: float = field(default=0.95, metadata={"help": "Of the intervals, in (0, 1)."})
    skip_seeds: list[int] = field(
        default_factory=list, metadata={"help": "Seeds left out: those settings were tuned on."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "For rounds.png and the history of all records together."}
    )


def main() -> None:
    (args,) = HfArgumentParser(CompareArguments).parse_args_into_dataclasses()
    history = hf_dash.report.join_histories(args.histories, skip_seeds=args.skip_seeds)
    print(hf_dash.report.starts_table(history.records), end="\n\n")
    if len({record.seed for record in history.records}) > 1:
        paired = hf_dash.report.paired_table(
            history.records, args.baseline, confidence=args.confidence
        )
        print(paired, end="\n\n")
    print(hf_dash.report.price_table(history.records, args.baseline))
    if args.output_dir is not None:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        hf_dash.history.write_history(folder / "history.json", history.settings, history.records)
        hf_dash.report.plot_rounds(history.records, folder / "rounds.png")


if __name__ == "__main__":
    main()
