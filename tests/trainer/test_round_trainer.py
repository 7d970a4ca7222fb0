import numpy as np
import pytest
import torch
from helpers import as_tensor, numbered, tiny_vit
from transformers import EvalPrediction, HfArgumentParser

import hf_dash
from hf_dash.data import Arrival
from hf_dash.method.loss import default_loss
from hf_dash.trainer import RoundTrainer, RoundTrainingArguments
from hf_dash.trainer.round_trainer import accuracy, step_sizes
from hf_dash.transforms import ImageTransform


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        defaults = {"per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
        options = {**defaults, "disable_tqdm": True, "use_cpu": True, **options}
        return RoundTrainingArguments(str(tmp_path), **options)

    return make


def rounds(digits, count, model, streaming):
    transform = hf_dash.models.image_transform(model)
    part = digits.select(range(count))
    dataset = part.to_iterable_dataset(num_shards=2) if streaming else part
    names = hf_dash.data.label_names(digits)
    arrival = Arrival((), dataset, count).examples(transform, list(range(10)))
    return hf_dash.Round(1, (arrival,), tuple(names))


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_of_an_epoch_differ_by_one(digits, small_model, arguments, streaming):
    trainer = RoundTrainer(small_model, arguments(), rounds(digits, 13, small_model, streaming))
    batches = [batch["labels"].tolist() for batch in trainer.get_train_dataloader()]
    assert sorted(len(batch) for batch in batches) == [3, 3, 3, 4]
    labels = [label for batch in batches for label in batch]
    assert sorted(labels) == sorted(digits[:13]["label"])
    assert labels != digits[:13]["label"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_round_trains_with_a_last_image_alone(digits, small_model, arguments, streaming):
    # 13 images in batches of 4 left one alone, which batch norm refuses.
    args = arguments(num_train_epochs=2)
    trainer = RoundTrainer(small_model, args, rounds(digits, 13, small_model, streaming))
    assert trainer.train().global_step == 8


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_read_every_image_once(digits, small_model, arguments, streaming):
    args = arguments(dataloader_num_workers=2)
    trainer = RoundTrainer(small_model, args, rounds(digits, 13, small_model, streaming))
    labels = [x for batch in trainer.get_train_dataloader() for x in batch["labels"].tolist()]
    assert sorted(labels) == sorted(digits[:13]["label"])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_batch_of_streams_mixes_what_workers_read(small_model, arguments):
    """A worker reads a shard; its batches alone would hold one class of a folder."""
    stream = numbered(40).to_iterable_dataset(num_shards=2)
    round_ = hf_dash.Round(1, (hf_dash.data.StreamedImages(stream, as_tensor),))
    args = arguments(dataloader_num_workers=2, per_device_train_batch_size=10)
    loader = RoundTrainer(small_model, args, round_).get_train_dataloader()
    batches = [batch["pixel_values"].flatten().int().tolist() for batch in loader]
    assert [sum(number < 20 for number in batch) for batch in batches] == [5, 5, 5, 5]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_epoch_has_another_order(digits, small_model, arguments, streaming):
    trainer = RoundTrainer(small_model, arguments(), rounds(digits, 40, small_model, streaming))
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([label for batch in loader for label in batch["labels"].tolist()])
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_steps_of_streams_can_be_dealt_out(num_processes):
    for num_examples in range(num_processes, 60):
        for batch_size in range(1, 9):
            sizes = step_sizes(num_examples, batch_size, num_processes)
            assert sum(sizes) == num_examples
            steps = [
                sizes[begin : begin + num_processes]
                for begin in range(0, len(sizes), num_processes)
            ]
            # Accelerate deals a step out equally, and completes the last one.
            assert all(len(set(step)) == 1 for step in steps[:-1])
            dealt = [-(-sum(step) // num_processes) for step in steps]
            assert max(dealt) - min(dealt) <= 1
            assert max(dealt) <= batch_size
            assert len(steps) == -(-num_examples // (batch_size * num_processes))


def test_accuracy_can_choose_the_best_model(digits, arguments, tmp_path):
    model = tiny_vit(tuple(hf_dash.data.label_names(digits)))
    transform = ImageTransform(
        lambda image: torch.tensor(np.asarray(image.resize((16, 16)))).permute(2, 0, 1) / 255,
        "RGB",
        "it takes RGB",
    )
    images = Arrival((), digits.select(range(20)), 20).examples(transform, list(range(10)))
    args = arguments(
        do_train=True,
        do_eval=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        num_train_epochs=2,
        metric_for_best_model="accuracy",
        load_best_model_at_end=True,
    )
    trainer = RoundTrainer(model, args, hf_dash.Round(1, (images,)), eval_dataset=images)
    trainer.train()
    logged = [
        entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry
    ]
    assert len(logged) == 2
    assert trainer.state.best_metric == max(logged)
    measured = hf_dash.training.evaluate_model(model, images, trainer.accelerator)
    assert measured["accuracy"] == max(logged)


def test_accuracy_is_the_share_of_right_predictions():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert accuracy(EvalPrediction(logits, np.array([0, 1, 1]))) == {"accuracy": 2 / 3}
    assert accuracy(EvalPrediction((logits, None), np.array([0, 1, 0]))) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("flags", "only_evaluate"),
    [
        ([], False),
        (["--do_train"], False),
        (["--do_eval"], True),
        (["--do_train", "--do_eval"], False),
        (["--eval_strategy", "epoch"], False),
        (["--do_eval", "--eval_strategy", "epoch"], True),
        (["--do_eval", "True", "--eval_strategy", "steps"], True),
        (["--do_train", "--do_eval", "--eval_strategy", "epoch"], False),
    ],
)
def test_do_eval_alone_never_trains(tmp_path, flags, only_evaluate):
    parser = HfArgumentParser(RoundTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *flags])
    assert args.only_evaluate == only_evaluate


def test_class_weights_make_rare_classes_count(digits, small_model, arguments):
    round_ = rounds(digits, 40, small_model, False)
    trainer = RoundTrainer(small_model, arguments(class_weights="balanced"), round_)
    batch = next(iter(trainer.get_train_dataloader()))
    small_model.eval()
    counts = torch.bincount(torch.tensor(digits[:40]["label"]), minlength=10)
    weights = 40 / (10 * counts[batch["labels"]])
    logits = small_model(pixel_values=batch["pixel_values"]).logits
    rows = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    loss = trainer.compute_loss(small_model, dict(batch))
    assert loss.item() == pytest.approx((weights * rows).mean().item(), rel=1e-5)
    assert loss.item() != pytest.approx(default_loss(small_model, batch).item(), rel=1e-3)
    # Of accumulated batches each adds its share.
    part = trainer.compute_loss(small_model, dict(batch), num_items_in_batch=torch.tensor(12))
    assert part.item() == pytest.approx(loss.item() * len(batch["labels"]) / 12, rel=1e-5)


def test_class_weights_are_checked(arguments):
    with pytest.raises(ValueError, match="class_weights must be 'balanced' or None, got 'some'"):
        arguments(class_weights="some")
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0 .* got 0\.1"):
        arguments(class_weights="balanced", label_smoothing_factor=0.1)
