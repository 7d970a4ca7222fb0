"""Compare starts on data that arrives in rounds, and export the last model of one of them.

Launch:  accelerate launch recipes/continual_rounds.py
         accelerate launch recipes/continual_rounds.py --dataset_name path/or/hub_id --streaming \
             --num_rounds 3 --examples_per_round 1000 --starts cold warm dash --seeds 3

Every start sees the same rounds in the same order and shares its first round's initial weights per
seed. Flags: those below, and the fields of hf_dash's DataConfig, TrainingConfig and DashConfig.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers import HfArgumentParser, PreTrainedModel

import hf_dash


@dataclass
class RunArguments:
    output_dir: str = field(default="runs/continual_rounds", metadata={"help": "Results go here."})
    starts: list[str] = field(
        default_factory=lambda: ["cold", "warm", "dash"], metadata={"help": "Starts to compare."}
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds: 0, 1, …"})
    num_rounds: int = field(default=5, metadata={"help": "Rounds in which the data arrive."})
    examples_per_round: int | None = field(
        default=None, metadata={"help": "Examples in one arrival; by default all are shared out."}
    )
    architecture: str = field(default="test_resnet", metadata={"help": "A name timm knows."})
    model_args: str = field(default="{}", metadata={"help": "For timm.create_model, as JSON."})
    image_size: int = field(default=32, metadata={"help": "Height and width of the model's input."})
    export_start: str | None = field(
        default=None, metadata={"help": "Start whose model is saved; the last of --starts."}
    )

    def __post_init__(self) -> None:
        for start in [*self.starts, *([self.export_start] if self.export_start else [])]:
            hf_dash.find_start(start)
        if self.export_start not in (None, *self.starts):
            raise ValueError(f"export_start must be among --starts, got {self.export_start!r}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")


def main() -> None:
    parser = HfArgumentParser(
        (RunArguments, hf_dash.DataConfig, hf_dash.TrainingConfig, hf_dash.DashConfig)
    )
    run, data, training, dash = parser.parse_args_into_dataclasses()
    accelerator = Accelerator()
    output_dir = Path(run.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()

    with accelerator.main_process_first():
        train, test = data.load_train(), data.load_held_out()
    wanted = run.examples_per_round and run.examples_per_round * run.num_rounds
    held_out_images = hf_dash.in_arrival_order(test, seed=0)
    settings = {
        **{k: v for group in (run, data, training, dash) for k, v in asdict(group).items()},
        "hardware": f"{accelerator.num_processes} × {accelerator.device.type}",
        "mixed_precision": accelerator.mixed_precision,
        **{f"{name} version": v for name, v in hf_dash.library_versions().items()},
    }
    path = output_dir / "history.json" if accelerator.is_main_process else None
    history = hf_dash.History(path, settings)
    export_start = run.export_start or run.starts[-1]

    for seed in range(run.seeds):
        arriving = hf_dash.in_arrival_order(train, seed=seed, num_examples=wanted)
        fresh = {
            "architecture": run.architecture,
            "label_names": hf_dash.label_names(train),
            "model_args": json.loads(run.model_args),
            "image_size": run.image_size,
            "seed": seed,
        }
        transform = hf_dash.image_transform(hf_dash.create_model(**fresh))
        rounds = list(
            hf_dash.cut_rounds(arriving, run.num_rounds, transform, in_memory=data.cache_images)
        )
        held_out = hf_dash.ImageExamples(held_out_images, transform, in_memory=data.cache_images)
        for start in run.starts:
            model = hf_dash.run_rounds(
                hf_dash.create_model(**fresh),
                rounds,
                held_out,
                hf_dash.find_start(start),
                name=start,
                seed=seed,
                history=history,
                accelerator=accelerator,
                dash=dash,
                training=training,
            )
            if accelerator.is_main_process and start == export_start and seed == 0:
                export(model, output_dir, history, data, len(held_out))

    if accelerator.is_main_process:
        hf_dash.plot_rounds(history.records, output_dir / "rounds.png")
        print(hf_dash.rounds_table(history.records), end="\n\n")
        print(hf_dash.starts_table(history.records), end="\n\n")
        print(f"history, figure and the model of the {export_start} start: {output_dir}")


def export(
    model: PreTrainedModel,
    output_dir: Path,
    history: hf_dash.History,
    data: hf_dash.DataConfig,
    num_held_out: int,
) -> None:
    """Save the model with a card of its own rounds."""
    folder = output_dir / "model"
    records = history.records
    own = history.select(start=records[-1].start, seed=records[-1].seed)
    hf_dash.save_model(model, folder)
    hf_dash.write_history(folder / "history.json", history.settings, own)
    hf_dash.plot_rounds(own, folder / "rounds.png")
    info = hf_dash.CardInfo(
        model_name=f"{model.config.architecture} on {Path(data.dataset_name).name}",
        records=own,
        settings=history.settings,
        dataset_name=data.dataset_name,
        held_out_split=data.test_split,
        num_held_out=num_held_out,
        dataset_revision=data.dataset_revision,
        parent="the model of the round before" if len(own) > 1 else None,
        figure="rounds.png",
    )
    hf_dash.write_card(folder, model, info)


if __name__ == "__main__":
    main()
