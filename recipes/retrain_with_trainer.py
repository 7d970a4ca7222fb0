"""One production round with transformers' Trainer: the last model, old and new images, DASH.

Launch:  accelerate launch recipes/retrain_with_trainer.py --output_dir runs/next_round \
             --model_name_or_path runs/continual_rounds/model \
             --seen_dataset_names images/monday images/tuesday --dataset_name images/wednesday

Flags have the names of transformers' run_image_classification.py (`--train_dir`,
`--validation_dir`, `--max_train_samples`, …, `--help` lists them), with hf_dash's DashConfig and
TrainingArguments. The model is a timm wrapper or any image classifier of transformers. Without
`--do_train` and `--do_eval` the recipe does both; with `--do_eval` alone it only evaluates. With
`--push_to_hub --hub_model_id user/name` the finished folder goes to the Hub, and from there
`--model_name_or_path user/name --revision round-002` continues. `--start warm` and others replace
DASH; `--start auto` follows the recommendation.json that `continual_rounds.py` wrote. The same
command finishes what was killed or failed, without training again what is trained.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

import hf_dash


def main() -> None:
    parser = HfArgumentParser(
        (
            hf_dash.trainer.ModelArguments,
            hf_dash.trainer.DataTrainingArguments,
            hf_dash.trainer.StartArguments,
            hf_dash.DashConfig,
            hf_dash.trainer.RoundTrainingArguments,
        )
    )
    *groups, args = parser.parse_args_into_dataclasses()
    # The finished folder is pushed once; the Trainer would push on the way, and save the token.
    hub = hf_dash.hub.HubArguments.taken_from(args)
    args.remove_unused_columns = False
    hf_dash.utils.show_info()
    with hf_dash.runs.open_model_folder(args.output_dir):
        retrain(*groups, args, hub)


def retrain(source, data, choice, dash, args, hub) -> None:
    parent = hf_dash.hub.find_parent(
        source.model_name_or_path,
        revision=source.model_revision,
        cache_dir=source.cache_dir,
        token=source.token,
    )
    # As it goes on record, and as it is loaded: the verified files of one exact commit.
    source = replace(source, model_revision=parent.commit or source.model_revision)
    local = replace(source, model_name_or_path=str(parent.folder))
    with args.main_process_first(desc="loading images"):
        schedule = data.load(seed=args.seed, cache_dir=source.cache_dir, token=source.token)
    start = hf_dash.report.choose_start(
        choice.start,
        dash,
        recommendation=choice.recommendation or source.model_name_or_path,
        label_names=schedule.label_names(),
    )
    schedule = schedule.after(local.label_names(), data)
    model = local.load_model(schedule.label_names(), seed=args.seed)
    schedule = replace(schedule, first_names=tuple(hf_dash.models.model_labels(model)))
    processor = local.load_image_processor(model)
    transform = hf_dash.models.image_transform(model, processor)
    index = parent.records[-1].round_index + 1 if parent.records else 1
    round_ = replace(schedule.rounds(transform)[-1], index=index)
    (round_,) = data.replay.rounds([round_], args.seed)
    held_out = schedule.held_out_examples(transform, allow_unknown=False)

    trainer = make_trainer(model, args, round_, held_out, start)
    if args.only_evaluate:
        metrics = hf_dash.training.evaluate_model(model, held_out, trainer.accelerator)
        trainer.save_metrics("eval", {"eval_accuracy": metrics["accuracy"]}, combined=False)
        trainer.log_metrics("eval", {"eval_accuracy": metrics["accuracy"]})
        return
    told = hf_dash.runs.training_settings(args)
    settings = hf_dash.runs.recorded_settings(source.settings, data, start.settings, told)
    origin = parent.records, parent.name, parent.weights_sha256
    one = hf_dash.runs.TrainerRound(args.output_dir, round_, held_out, settings, *origin)
    records = one.finished()
    if records is None:
        begin = partial(start.begin_, model, round_, args.seed)
        model, record = one.train_(
            trainer, start.name, begin, processor, args.resume_from_checkpoint
        )
        metrics = hf_dash.training.evaluate_model(model, held_out, trainer.accelerator)
        if not trainer.is_world_process_zero():
            return
        split, count = schedule.held_out_split, len(held_out)
        info = hf_dash.report.card_info(
            model,
            [*parent.records, one.evaluated(record, model, metrics)],
            settings,
            hf_dash.report.CardData(data.source, split, count, data.dataset_revision),
            base=parent.base,
            hub_model_id=hub.card_id,
        )
        info = replace(info, followed=start.followed)
        records = hf_dash.report.write_model_folder(
            model, args.output_dir, info, files=one.kept
        ).records
        one.clear()
    if trainer.is_world_process_zero():
        print(hf_dash.report.rounds_table(records))
        hf_dash.hub.push_folder(hub, args.output_dir)


def make_trainer(
    model: PreTrainedModel,
    args: TrainingArguments,
    round_: hf_dash.Round,
    held_out: Any,
    start: hf_dash.report.ChosenStart,
) -> Trainer:
    """Return a Trainer over the round's images; DASH shrinks first, from oldest to newest image."""
    trainer = hf_dash.trainer.RoundTrainer(model, args, round_, eval_dataset=held_out)
    if hf_dash.starts.is_dash(start.name):
        batches = hf_dash.data.gradient_batches(
            round_, start.dash, num_processes=args.world_size, process_index=args.process_index
        )
        callback = hf_dash.DashCallback(config=start.dash, batches=batches)
        trainer.add_callback(callback.bind(trainer))
    return trainer


if __name__ == "__main__":
    main()
