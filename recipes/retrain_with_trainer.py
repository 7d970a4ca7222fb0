"""One production round with transformers' Trainer: the last model, old and new images, DASH.

Launch:  accelerate launch recipes/retrain_with_trainer.py --output_dir runs/next_round \
             --model_name_or_path runs/continual_rounds/model \
             --seen_dataset_names images/monday images/tuesday --dataset_name images/wednesday

Every dataset is a local folder (imagefolder or parquet), a glob of parquet files or a Hub id; with
`--push_to_hub --hub_model_id user/name` the result goes to the Hub. Flags: those below, and the
fields of hf_dash's DataConfig and DashConfig and of TrainingArguments.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, Trainer, TrainingArguments

import hf_dash


@dataclass
class RoundArguments:
    model_name_or_path: str = field(metadata={"help": "Last round's model: a folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit."})
    seen_dataset_names: list[str] = field(
        default_factory=list, metadata={"help": "Earlier arrivals, oldest first."}
    )


def main() -> None:
    parser = HfArgumentParser(
        (RoundArguments, hf_dash.DataConfig, hf_dash.DashConfig, TrainingArguments)
    )
    source, data, dash, args = parser.parse_args_into_dataclasses()
    # The finished folder is pushed once; the Trainer would make the repository and push on the way.
    push_to_hub, args.push_to_hub = args.push_to_hub, False
    args.remove_unused_columns = False

    model = hf_dash.load_model(
        source.model_name_or_path, revision=source.model_revision, token=args.hub_token
    )
    ledger = Path(source.model_name_or_path) / "history.json"
    past = hf_dash.read_history(ledger).records if ledger.is_file() else []
    transform = hf_dash.image_transform(model)
    with args.main_process_first(desc="loading images"):
        loaded = [data.load_train(name) for name in [*source.seen_dataset_names, data.dataset_name]]
        held_out = data.load_held_out()
    for dataset in [*loaded, held_out]:
        hf_dash.check_label_names(model, hf_dash.label_names(dataset))
    *arrivals, held_out = (
        hf_dash.ImageExamples(
            hf_dash.in_arrival_order(part, seed=args.seed), transform, in_memory=data.cache_images
        )
        for part in [*loaded, held_out]
    )
    round_ = hf_dash.Round(past[-1].round_index + 1 if past else 1, tuple(arrivals))

    batches = hf_dash.gradient_batches(
        round_, dash, num_processes=args.world_size, process_index=args.process_index
    )
    callback = hf_dash.DashCallback(batches=batches, **dash.arguments)
    trainer = Trainer(
        model, args, train_dataset=round_.examples, eval_dataset=held_out, callbacks=[callback]
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    predicted = trainer.predict(held_out)
    if not trainer.is_world_process_zero():
        return
    record = make_record(trainer, round_, result.metrics["train_runtime"], predicted)
    settings = {**asdict(source), **asdict(data), **asdict(dash), **training_settings(args)}
    save(model, [*past, record], settings, source, data, args, len(held_out))
    if push_to_hub:
        hf_dash.push_folder(
            args.output_dir,
            args.hub_model_id or Path(args.output_dir).name,
            token=args.hub_token,
            private=args.hub_private_repo,
            commit_message=f"Round {record.round_index}: accuracy {record.accuracy:.4f}",
        )


def make_record(
    trainer: Trainer, round_: hf_dash.Round, seconds: float, predicted: Any
) -> hf_dash.RoundRecord:
    metrics = hf_dash.ClassAccuracy(keep_in_memory=True).compute(
        predictions=predicted.predictions.argmax(axis=-1), references=predicted.label_ids
    )
    names = trainer.model.config.id2label
    # Written at the shrink, so that it is there too where this run resumed after it.
    shrink = json.loads((Path(trainer.args.output_dir) / "dash_report.json").read_text())
    return hf_dash.RoundRecord(
        start="dash",
        seed=trainer.args.seed,
        round_index=round_.index,
        num_new=len(round_.new),
        num_total=len(round_.examples),
        accuracy=metrics["accuracy"],
        per_class_accuracy={names[i]: a for i, a in metrics["per_class_accuracy"].items()},
        train_accuracy=None,
        converged=None,
        epochs=trainer.state.epoch,
        steps=trainer.state.global_step,
        start_seconds=shrink["seconds"],
        train_seconds=seconds - shrink["seconds"],
        shrink=shrink,
    )


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    names = ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps")
    names += ("optim", "weight_decay", "lr_scheduler_type", "seed", "bf16", "fp16", "world_size")
    return {name: str(getattr(args, name)) for name in names}


def save(
    model: Any,
    records: list[hf_dash.RoundRecord],
    settings: dict[str, Any],
    source: RoundArguments,
    data: hf_dash.DataConfig,
    args: TrainingArguments,
    num_held_out: int,
) -> None:
    hf_dash.save_model(model, args.output_dir)
    hf_dash.write_history(Path(args.output_dir) / "history.json", settings, records)
    hf_dash.plot_rounds(records, Path(args.output_dir) / "rounds.png")
    is_hub = not Path(source.model_name_or_path).exists()
    info = hf_dash.CardInfo(
        model_name=f"{model.config.architecture} on {Path(data.dataset_name).stem}",
        records=records,
        settings=settings,
        dataset_name=data.dataset_name,
        held_out_split=data.test_split,
        num_held_out=num_held_out,
        dataset_revision=data.dataset_revision,
        parent="the model of the round before",
        base_model=source.model_name_or_path if is_hub else None,
        hub_model_id=args.hub_model_id,
        figure="rounds.png",
    )
    hf_dash.write_card(args.output_dir, model, info)


if __name__ == "__main__":
    main()
