"""When does a warm start begin to harm? Pre-train on half of the data, then train on all of them.

Launch:  accelerate launch recipes/memorization.py
         accelerate launch recipes/memorization.py --label_noise 0 --num_examples 1437 --seeds 3
         accelerate launch recipes/memorization.py --dataset_name path/or/hub_id --streaming \
             --num_examples 2000 --train_batch_size 128 --pretrain_epochs 1 5 20 80 --starts all

For every number of pre-training epochs and every start: held-out accuracy and steps after training
on all data, vs. training from scratch; and what the model knows right before and after the start
of the right and wrong labels it was pre-trained on (Shin et al. 2024). The same command continues
where it was stopped or killed. Flags: those below, and the fields of hf_dash's DataConfig,
TrainingConfig, DashConfig and StartsConfig.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from transformers import HfArgumentParser

import hf_dash


@dataclass
class Arguments:
    output_dir: str = field(default="runs/memorization", metadata={"help": "Results go here."})
    starts: list[str] = field(
        default_factory=lambda: ["warm", "dash"],
        metadata={"help": "Starts to compare with cold, or 'all'."},
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds: 0, 1, …"})
    pretrain_epochs: list[int] = field(
        default_factory=lambda: [1, 4, 16],
        metadata={"help": "Lengths of pre-training, rising."},
    )
    num_examples: int = field(default=400, metadata={"help": "In all; half of them come first."})
    label_noise: float = field(default=0.1, metadata={"help": "Share of wrong training labels."})
    architecture: str = field(default="test_resnet", metadata={"help": "A name timm knows."})
    model_args: str = field(default="{}", metadata={"help": "For timm.create_model, as JSON."})
    image_size: int = field(default=32, metadata={"help": "Height and width of the model's input."})

    def __post_init__(self) -> None:
        if self.starts == ["all"]:
            self.starts = [name for name in hf_dash.STARTS if name != "cold"]
        for start in self.starts:
            hf_dash.find_start(start)
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if self.num_examples < 2 or self.num_examples % 2:
            raise ValueError(f"num_examples must be even, at least 2, got {self.num_examples}")


def main() -> None:
    configs = (
        hf_dash.DataConfig,
        hf_dash.TrainingConfig,
        hf_dash.DashConfig,
        hf_dash.starts.StartsConfig,
    )
    groups = HfArgumentParser((Arguments, *configs)).parse_args_into_dataclasses()
    hf_dash.utils.show_info()
    accelerator = Accelerator()
    with hf_dash.runs.open_run(
        groups[0].output_dir, hf_dash.runs.recorded_settings(*groups)
    ) as history:
        compare(accelerator, history, *groups)


def compare(accelerator, history, run, data, training, dash, start_config) -> None:
    if data.arrive_by != "examples":
        raise ValueError(f"arrive_by must be 'examples', got {data.arrive_by!r}")
    output_dir = Path(run.output_dir)
    with accelerator.main_process_first():
        schedules = hf_dash.data.load_schedules(
            data, range(run.seeds), 2, run.num_examples // 2, []
        )
    for seed, schedule in enumerate(schedules):
        make_model = partial(
            hf_dash.create_model,
            architecture=run.architecture,
            label_names=list(schedule.label_names()),
            model_args=json.loads(run.model_args),
            image_size=run.image_size,
            seed=seed,
        )
        transform = hf_dash.models.image_transform(make_model())
        half, whole = schedule.rounds(transform, label_noise=run.label_noise, noise_seed=seed)
        hf_dash.studies.run_pretraining(
            make_model,
            half,
            whole,
            schedule.held_out_examples(transform),
            {name: hf_dash.find_start(name) for name in run.starts},
            run.pretrain_epochs,
            hf_dash.runs.Run(
                "pretraining",
                seed,
                history,
                accelerator,
                dash=dash,
                start_config=start_config,
                training=training,
                output_dir=output_dir,
            ),
        )
    if accelerator.is_main_process:
        hf_dash.studies.plot_pretraining(history.records, output_dir / "pretraining.png")
        print(hf_dash.studies.pretraining_table(history.records), end="\n\n")
        print(f"history and figure: {output_dir}")


if __name__ == "__main__":
    main()
