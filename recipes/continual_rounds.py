"""Compare starts on data that arrives in rounds, and export the last model of one of them.

Launch:  accelerate launch recipes/continual_rounds.py
         accelerate launch recipes/continual_rounds.py --dataset_name path/or/hub_id --streaming \
             --num_rounds 3 --examples_per_round 1000 --starts all --seeds 3
         accelerate launch recipes/continual_rounds.py --arrive_by files --starts dash \
             --dataset_name 'incoming/*.parquet' --test_dataset_name held_out.parquet

Every start sees the same rounds in the same order and shares its first round's initial weights per
seed. The last line says which start to use; recommendation.json holds the same. The same command
continues where it was stopped or killed, and with files that have arrived since. With --push_to_hub
--hub_model_id user/name every round of one start goes to the Hub. With --model_name_or_path (a
model folder or Hub id; with --pretrained a timm name) round 1 begins from that checkpoint, cold
means the checkpoint again, and DASH shrinks towards it. Flags: those below, and the fields of the
classes that main lists.
"""

import gc
import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from transformers import HfArgumentParser

import hf_dash


@dataclass
class RunArguments:
    output_dir: str = field(default="runs/continual_rounds", metadata={"help": "Results go here."})
    starts: list[str] = field(
        default_factory=lambda: ["cold", "warm", "dash"],
        metadata={"help": "Starts to compare, or 'all'."},
    )
    seeds: str = field(default="1", metadata={"help": "3 for seeds 0, 1 and 2; 1-5 for these."})
    num_rounds: int = field(default=8, metadata={"help": "Rounds one dataset is cut into."})
    examples_per_round: int | None = field(
        default=None, metadata={"help": "Examples in one arrival; by default all are dealt out."}
    )
    architecture: str | None = field(default=None, metadata={"help": "timm's; or a small ResNet."})
    model_args: str = field(default="{}", metadata={"help": "For timm.create_model, as JSON."})
    image_size: int = field(default=32, metadata={"help": "Height and width of the model's input."})
    export_start: str | None = field(
        default=None, metadata={"help": "Start whose model is saved and pushed; the last."}
    )
    num_parallel_starts: int = field(
        default=1, metadata={"help": "Starts of a seed that train at once, a process each."}
    )
    save_total_limit: int | None = field(default=3, metadata={"help": "Newest weights to keep."})
    label_noise: float = field(default=0.0, metadata={"help": "Share of wrong training labels."})
    measure_memorization: bool = field(
        default=False, metadata={"help": "Measure what each start forgets and keeps."}
    )

    def __post_init__(self) -> None:
        if self.architecture is None and self.model_args == "{}":
            self.architecture, self.model_args = hf_dash.data.embedded.SMALL_RESNET
        if self.starts == ["all"]:
            self.starts = list(hf_dash.STARTS)
        self.export_start = self.export_start or self.starts[-1]
        for start in [*self.starts, self.export_start]:
            hf_dash.find_start(start)
        if self.export_start not in self.starts:
            raise ValueError(f"export_start must be among --starts, got {self.export_start!r}")
        if not re.fullmatch(r"\d+(-\d+)?", self.seeds) or not self.seed_range:
            raise ValueError(
                f"seeds must be at least 1, or a range such as 1-5, got {self.seeds!r}"
            )

    @property
    def seed_range(self) -> range:
        first, _, last = self.seeds.partition("-")
        return range(int(first), int(last) + 1) if last else range(int(first))


def main() -> None:
    configs = (
        hf_dash.pretrained.CheckpointArguments,
        hf_dash.DataConfig,
        hf_dash.TrainingConfig,
        hf_dash.DashConfig,
        hf_dash.starts.StartsConfig,
    )
    classes = (RunArguments, *configs, hf_dash.hub.HubArguments)
    groups = HfArgumentParser(classes).parse_args_into_dataclasses()
    hf_dash.utils.show_info()
    accelerator = Accelerator()
    hf_dash.runs.check_parallel(groups[0].num_parallel_starts, accelerator)
    settings = hf_dash.runs.recorded_settings(*groups[:-1])
    with hf_dash.runs.open_run(groups[0].output_dir, settings) as history:
        compare(accelerator, history, *groups)


def compare(accelerator, history, run, source, data, training, dash, start_config, hub) -> None:
    output_dir, exported = Path(run.output_dir), (run.export_start, run.seed_range[0])
    with accelerator.main_process_first():
        checkpoint = source.load()
        gc.freeze()  # what was imported is no garbage, and Accelerate collects after every round
        schedules = hf_dash.data.load_schedules(
            data, run.seed_range, run.num_rounds, run.examples_per_round, history.records
        )
    for seed, schedule in zip(run.seed_range, schedules, strict=True):
        first = {"label_names": list(schedule.label_names(1)), "image_size": run.image_size}
        args = json.loads(run.model_args)
        fresh = partial(hf_dash.create_model, run.architecture, model_args=args)
        create = partial(checkpoint.create_model if checkpoint else fresh, **first, seed=seed)
        transform = hf_dash.models.image_transform(create())
        rounds = schedule.rounds(transform, label_noise=run.label_noise, noise_seed=seed)
        rounds = data.replay.rounds(rounds, seed)
        held_out = schedule.held_out_examples(transform)
        runs = [
            hf_dash.runs.Run(
                start,
                seed,
                history,
                accelerator,
                dash=dash,
                start_config=start_config,
                training=training,
                output_dir=output_dir,
                save_total_limit=None if hub.push_to_hub else run.save_total_limit,
                measure_memorization=run.measure_memorization,
                checkpoint=checkpoint,
            )
            for start in run.starts
        ]
        hf_dash.runs.run_starts(create, rounds, held_out, runs, run.num_parallel_starts)
        for start, one in zip(run.starts, runs, strict=True):
            model = hf_dash.run_rounds(create(), rounds, held_out, hf_dash.find_start(start), one)
            if accelerator.is_main_process and (start, seed) == exported:
                images = hf_dash.report.CardData(
                    data.source, schedule.held_out_split, len(held_out), data.dataset_revision
                )
                chain = hf_dash.report.Chain(history, start, seed, images)
                hf_dash.report.export_round(model, output_dir, chain)
    if accelerator.is_main_process:
        print(hf_dash.report.write_results(history, output_dir), end="\n\n")
        print(f"history, figures and the model of the {run.export_start} start: {output_dir}")
        folders, names = [output_dir, output_dir / "model"], schedule.label_names()
        sentence = hf_dash.report.recommend(history, folders, names)
        # After everything else: no other process waits for a slow Hub.
        hf_dash.hub.push_rounds(hub, output_dir, chain, save_total_limit=run.save_total_limit)
        print(sentence)


if __name__ == "__main__":
    main()
