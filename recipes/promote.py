"""Let a round's model take the place of the one in use, or go back to an earlier one.

Launch:  accelerate launch recipes/promote.py --output_dir runs/x \
             --challenger rounds/003/dash_seed0 --dataset_name path/or/hub_id
         accelerate launch recipes/promote.py --output_dir runs/x \
             --rollback_to rounds/002/dash_seed0

Challenger and champion predict the held-out images of the dataset; the decision and its reason go
into the run's history.jsonl. Ends with status 1 where the challenger is rejected, and with 2
where it is promoted but the Hub did not follow: the same command then finishes. With --push_to_hub
--hub_model_id user/name the Hub's main follows: from the branch --hub_revision, where a challenger
waits, or to the tag of the round rolled back to. Flags: those below, and the fields of hf_dash's
PromotionRules, DataConfig and HubArguments.
"""

import sys
from dataclasses import dataclass, field
from pathlib import PurePath

from accelerate import Accelerator
from transformers import HfArgumentParser

import hf_dash


@dataclass
class PromoteArguments:
    output_dir: str = field(metadata={"help": "Of a run, with its history.jsonl and rounds."})
    challenger: str | None = field(
        default=None, metadata={"help": "Folder below it, such as rounds/003/dash_seed0."}
    )
    champion: str | None = field(
        default=None, metadata={"help": "To compare with; by default the champion in use."}
    )
    force: bool = field(default=False, metadata={"help": "Promote in spite of the verdict."})
    rollback_to: str | None = field(
        default=None, metadata={"help": "Folder to go back to, in place of a comparison."}
    )

    def __post_init__(self) -> None:
        if (self.challenger is None) == (self.rollback_to is None):
            raise ValueError(
                "either challenger or rollback_to must be given, got"
                f" {self.challenger!r} and {self.rollback_to!r}"
            )


def main() -> None:
    classes = (PromoteArguments, hf_dash.runs.PromotionRules, hf_dash.DataConfig)
    args, rules, data, hub = HfArgumentParser(
        (*classes, hf_dash.hub.HubArguments)
    ).parse_args_into_dataclasses()
    hf_dash.utils.show_info()
    accelerator = Accelerator()
    if args.rollback_to is not None:
        if accelerator.is_main_process:
            entry = hf_dash.runs.read_champion(args.output_dir)
            # Already done where the push alone had failed.
            if entry is None or PurePath(args.rollback_to) != PurePath(entry.challenger):
                entry = hf_dash.rollback(args.output_dir, args.rollback_to)
            print(f"rollback: {entry.challenger} is the champion in place of {entry.champion}")
            push(hub, args.output_dir, entry.challenger, entry.reason)
        return

    with accelerator.main_process_first():
        held_out, budget = hf_dash.data.load_held_out(data), data.pixel_budget
    verdict = hf_dash.promote(
        args.output_dir,
        args.challenger,
        lambda transform: held_out.examples(transform, cache=data.cache_images, budget=budget),
        champion=args.champion,
        force=args.force,
        rules=rules,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        if verdict.comparison is not None:
            print(table(verdict.comparison), end="\n\n")
        print(f"{'promote' if verdict.promote else 'reject'}: {verdict.reason}")
        if verdict.promote:
            push(hub, args.output_dir, args.challenger, verdict.reason)
    sys.exit(0 if verdict.promote else 1)


def push(hub, output_dir, folder, reason) -> None:
    """Let the Hub follow; end with status 2 where it did not, so that the command is repeated."""
    pushed = hf_dash.hub.push_promotion(hub, output_dir, folder, reason)
    if hub.push_to_hub and pushed is None:
        sys.exit(2)


def table(comparison: hf_dash.runs.Comparison) -> str:
    header = ["class", "images", "champion", "challenger", "difference", "interval", "McNemar p"]
    rows = [
        [
            name,
            str(paired.num_examples),
            f"{paired.champion:.2%}",
            f"{paired.challenger:.2%}",
            f"{paired.difference:+.2%}",
            f"{paired.low:+.2%} to {paired.high:+.2%}",
            f"{paired.p_value:.2g}",
        ]
        for name, paired in [("all", comparison.overall), *comparison.per_class.items()]
    ]
    return hf_dash.report.markdown_table(header, rows)


if __name__ == "__main__":
    main()
