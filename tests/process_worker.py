"""What one of several processes does in ``test_distributed.py``.

Called as ``process_worker.py FOLDER CASE…``. Every case writes ``FOLDER/CASE.RANK.json``.
"""

import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from helpers import (
    EveryLayer,
    make_tiny_timm,
    nearby_state,
    png,
    random_pairs,
    same_state,
    state_of,
)
from noisy_training import SETUPS, Noisy, numbers_of
from noisy_training import train as train_noisy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

import hf_dash
from hf_dash.utils.distributed import whole

REDUCES: list[int] = []
plain_all_reduce = dist.all_reduce


def counted_all_reduce(*arguments, **options):
    REDUCES.append(1)
    return plain_all_reduce(*arguments, **options)


def share(rank, world):
    return [(images[rank::world], labels[rank::world]) for images, labels in random_pairs(6)]


def shrink(case, accelerator, folder):
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = EveryLayer(norm="batch_norm" not in case, groups=1 if case.endswith("filter") else 2)
    if "fill" in case:
        model = make_tiny_timm()
    base = nearby_state(model)
    batches = share(rank, world)
    if "uneven_count" in case and rank == 1:
        batches = batches[1:]
    if "uneven_size" in case and rank == 1:
        batches[2] = tuple(part[1:] for part in batches[2])
    if "uneven_labels" in case and rank == 1:
        batches[2][1][0] = -100
    if "broken" in case and rank == 1:
        batches[2][0].fill_(float("nan"))
    prepared = accelerator.prepare(model) if "ddp" in case else model
    if "fsdp" in case:
        fully_shard(model.conv)
        fully_shard(model)
    if "tensor_parallel" in case:
        mesh = init_device_mesh("cpu", (world,))
        parallelize_module(model, mesh, {"head": ColwiseParallel()})
    before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
    settings = {
        "grouping": "filter" if "filter" in case else "kernel",
        "variant": "fill" if "fill" in case else "orthogonal" if "variant" in case else None,
        "base": base if "base" in case else None,
    }
    REDUCES.clear()
    result = {"world": world}
    try:
        report = hf_dash.dash_shrink_(prepared, batches, tolerance=0.0, **settings)
        result["report"] = report.to_dict()
    except (ValueError, RuntimeError, ArithmeticError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["all_reduces"] = len(REDUCES)
    after = [whole(parameter.detach()) for parameter in model.parameters()]
    result["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    result["weights"] = [parameter.flatten().tolist() for parameter in after]
    write(result, case, rank, folder)


class AfterShrink(TrainerCallback):
    """Keeps the weights as the shrink left them."""

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        self.weights = [p.detach().flatten().tolist() for p in model.parameters()]


class WithLoss(torch.nn.Module):
    """EveryLayer as a model of the Trainer."""

    def __init__(self):
        super().__init__()
        self.inner = EveryLayer()

    def forward(self, images, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.inner(images), labels)}


def train(case, folder, rank, world):
    torch.manual_seed(0)
    model = WithLoss()
    batches = [{"images": images, "labels": labels} for images, labels in share(rank, world)]
    after = AfterShrink()
    dash = hf_dash.DashCallback(
        batches=batches, tolerance=0.0, loss_fn=lambda m, b: m(b["images"], b["labels"])["loss"]
    )
    args = TrainingArguments(
        output_dir=f"{folder}/trainer",
        max_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    images, labels = random_pairs(1)[0]
    rows = [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[dash, after])
    REDUCES.clear()
    trainer.train()
    result = {"world": world, "weights": after.weights, "report": dash.report.to_dict()}
    result["wrapped"] = type(trainer.model_wrapped).__name__
    write(result, case, rank, folder)


class AsClassifier(torch.nn.Module):
    """EveryLayer as ``measure_memorization`` calls models, with features of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = EveryLayer()

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.inner(pixel_values))

    def forward_features(self, images):
        return self.inner.conv(images)

    def forward_head(self, features, pre_logits):
        return features.mean((2, 3)).relu()


def examples(count, seed):
    """Return ``count`` random images with labels."""
    images, labels = random_pairs(1, count, seed)[0]
    return [
        {"pixel_values": image, "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]


def memorization(accelerator):
    """Measure sets that cannot be shared out equally; one of them leaves a process without any."""
    return hf_dash.training.measure_memorization(
        AsClassifier(),
        hf_dash.training.ExampleSets(
            examples(7, 2), examples(5, 3), old=examples(23, 1), flipped=examples(1, 4)
        ),
        accelerator,
        batch_size=3,
        max_examples=11,
        with_features=True,
    )


class ReadsItsInput(torch.nn.Module):
    """Predicts the number its input is."""

    def forward(self, pixel_values):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(pixel_values, 11))


def predict(case, accelerator, folder):
    """Predict 11 examples, a number that neither processes nor batches divide."""
    examples = [{"pixel_values": number, "labels": number - 1} for number in range(11)]
    found = hf_dash.training.predict(ReadsItsInput(), examples, accelerator, batch_size=2)
    write([array.tolist() for array in found], case, accelerator.process_index, folder)


class WithLogits(torch.nn.Module):
    """EveryLayer without batch norms and dropout, whose results depend on the processes' shares."""

    def __init__(self):
        super().__init__()
        self.inner = EveryLayer(norm=False)
        self.inner.dropout = torch.nn.Identity()

    def forward(self, images, labels):
        logits = self.inner(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def train_by_sam(accelerator):
    """Train on this process's shares of the same minibatches, with a penalty."""
    torch.manual_seed(0)
    model = WithLogits()
    shares = share(accelerator.process_index, accelerator.num_processes)
    batches = [{"images": images, "labels": labels} for images, labels in shares]
    config = hf_dash.TrainingConfig(
        sam_rho=0.5, max_epochs=2, accuracy_threshold=None, disable_tqdm=True
    )
    hf_dash.training.train_round(
        model,
        batches,
        config,
        accelerator,
        penalty=lambda m: 0.1 * sum(p.square().sum() for p in m.parameters() if p.requires_grad),
    )
    return model


class Digest(torch.nn.Module):
    """A linear classifier that keeps how many of its answers were right in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(8, 4)
        self.right = []

    def forward(self, pixel_values, labels):
        logits = self.head(pixel_values)
        self.right.append(int((logits.argmax(dim=-1) == labels).sum()))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def stop_by_accuracy(case, folder, rank):
    """Train in the Trainer until both processes together answer nine in ten rightly."""
    model = Digest()
    images = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": x, "labels": int(x[:4].argmax())} for x in images]
    args = TrainingArguments(
        output_dir=f"{folder}/{case}",
        num_train_epochs=100,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    stop = hf_dash.TrainAccuracyStop(0.9)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.add_callback(stop.bind(trainer) if case == "accuracy_bound" else stop)
    trainer.train()
    history = trainer.state.log_history
    result = {
        "logged": [entry["train_accuracy"] for entry in history if "train_accuracy" in entry],
        "epoch": trainer.state.epoch,
        "right": [sum(model.right[begin : begin + 4]) for begin in range(0, len(model.right), 4)],
    }
    write(result, case, rank, folder)


def train_undisturbed(case, folder, rank, world):
    """Train with and without the callback at λ = 1, and tell whether anything differs."""
    setup = {"undisturbed": "accumulation", "undisturbed_stream": "stream of datasets"}[case]
    options = dict(SETUPS[setup])
    make_data = options.pop("data", lambda: None)
    runs = [
        train_noisy(f"{folder}/{case}_{dash}", dash, data=make_data(), **options)
        for dash in (False, True)
    ]
    (plain, notes), (with_dash, other_notes) = runs
    result = {
        "world": world,
        "wrapped": type(with_dash.model_wrapped).__name__,
        "steps": len(notes.notes),
        "same_notes": notes.notes == other_notes.notes,
        "same_numbers": numbers_of(plain) == numbers_of(with_dash),
        "same_weights": same_state(state_of(plain.model), state_of(with_dash.model)),
        "moved": not same_state(state_of(plain.model), state_of(Noisy())),
    }
    write(result, case, rank, folder)


def generate(ranges):
    for begin, end in ranges:
        yield from ({"image": number, "label": number % 2} for number in range(begin, end))


def as_tensor(number):
    return torch.tensor([float(number)])


def generated(ranges):
    features = Features({"image": Value("int64"), "label": ClassLabel(names=["a", "b"])})
    settings = {"features": features, "gen_kwargs": {"ranges": ranges}}
    return IterableDataset.from_generator(generate, **settings)


def load_stream(case, folder, rank, world):
    """One epoch of two shards: one shard for each process, or one that cannot be read."""
    second = {"stream": (9, 14), "stream_uneven": (9, 10), "stream_broken": (9, None)}[case]
    arrivals = [hf_dash.data.StreamedImages(generated([(0, 9), second]), as_tensor)]
    ranks = {"num_processes": world, "process_index": rank}
    result = {"world": world}
    try:
        loader = hf_dash.data.StreamLoader(arrivals, 4, seed=0, num_workers=2, **ranks)
        result["batches"] = [
            [batch["pixel_values"].flatten().tolist() for batch in loader] for _ in range(2)
        ]
        result["length"] = len(loader)
        new = hf_dash.data.StreamedImages(generated([(14, 16)]), as_tensor)
        loader = hf_dash.data.StreamLoader([*arrivals, new], 4, seed=0, new_share=0.5, **ranks)
        result["shared"] = [batch["pixel_values"].flatten().tolist() for batch in loader]
    except (ValueError, RuntimeError, TypeError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    write(result, case, rank, folder)


def level(image):
    return torch.tensor([float(image.getpixel((0, 0)))])


def deal_out(case, folder, rank):
    """Two epochs of a round's Trainer over 13 numbered images, in batches of at most 4."""
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(13)], "label": [0] * 13}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    images = Dataset.from_dict(rows, features=features)
    if case == "dealt_map":
        arrival = hf_dash.data.ImageExamples(images, level)
    else:
        stream = images.to_iterable_dataset()
        arrival = hf_dash.data.StreamedImages(stream, level, num_examples=13)
    args = TrainingArguments(
        f"{folder}/{case}{rank}", per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    round_ = hf_dash.Round(1, (arrival,))
    trainer = hf_dash.trainer.RoundTrainer(make_tiny_timm(), args, round_)
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([batch["pixel_values"].flatten().tolist() for batch in loader])
    write(epochs, case, rank, folder)


def go_through_rounds(folder, accelerator):
    """One round, then a second in another call; return the records and the final weights."""
    digits = hf_dash.load_images("digits")
    model = hf_dash.create_model(
        "test_resnet", label_names=hf_dash.data.label_names(digits), image_size=32, seed=0
    )
    arriving = hf_dash.data.in_arrival_order(digits, seed=0, num_examples=64)
    rounds = list(
        hf_dash.data.cut_rounds(arriving, 2, hf_dash.models.image_transform(model), in_memory=True)
    )
    for until in (1, 2):
        with hf_dash.runs.open_run(f"{folder}/run", {}) as history:
            model = hf_dash.run_rounds(
                model,
                rounds[:until],
                rounds[0].new,
                hf_dash.find_start("dash"),
                hf_dash.runs.Run(
                    "dash",
                    0,
                    history,
                    accelerator,
                    training=hf_dash.TrainingConfig(
                        max_epochs=1, train_batch_size=8, disable_tqdm=True
                    ),
                    dash=hf_dash.DashConfig(gradient_batch_size=16),
                    output_dir=f"{folder}/run",
                ),
            )
    weights = model.timm_model.fc.weight.detach().flatten().tolist()
    return {"records": [asdict(record) for record in history.records], "weights": weights}


def replay(accelerator):
    """What a process draws of the old images, and how many new ones its batches then hold."""
    digits = hf_dash.load_images("digits").select(range(64))
    transform = hf_dash.models.image_transform(make_tiny_timm())
    rounds = list(hf_dash.data.cut_rounds(digits, 4, transform))
    settings = hf_dash.data.Replay(1.0, "class_balanced", new_share=0.25)
    drawn = settings.rounds(rounds, seed=5)
    loader = hf_dash.data.train_batches(drawn[3], 8, seed=0, num_processes=2)
    old = {tuple(e["pixel_values"].flatten().tolist()) for e in drawn[3].seen}
    batches = [batch["pixel_values"].flatten(1).tolist() for batch in accelerator.prepare(loader)]
    share = [sum(tuple(image) not in old for image in batch) for batch in batches]
    return {"drawn": [one.replay for one in drawn], "new": share, "batches": batches}


def write(result, case, rank, folder):
    path = f"{folder}/{case}.{rank}.json"
    with open(path + ".tmp", "w") as file:
        json.dump(result, file)
    os.replace(path + ".tmp", path)


def main():
    folder, *cases = sys.argv[1:]
    dist.all_reduce = counted_all_reduce
    accelerator = Accelerator(cpu=True)
    for case in cases:
        if case == "replay":
            write(replay(accelerator), case, accelerator.process_index, folder)
        elif case == "memorization":
            write(memorization(accelerator), case, accelerator.process_index, folder)
        elif case == "trainer":
            train(case, folder, accelerator.process_index, accelerator.num_processes)
        elif case.startswith("accuracy"):
            stop_by_accuracy(case, folder, accelerator.process_index)
        elif case.startswith("undisturbed"):
            train_undisturbed(case, folder, accelerator.process_index, accelerator.num_processes)
        elif case == "rounds":
            result = go_through_rounds(folder, accelerator)
            write(result, case, accelerator.process_index, folder)
        elif case == "predict":
            predict(case, accelerator, folder)
        elif case == "sam":
            weights = [
                p.detach().flatten().tolist() for p in train_by_sam(accelerator).parameters()
            ]
            result = {"world": accelerator.num_processes, "weights": weights}
            write(result, case, accelerator.process_index, folder)
        elif case.startswith("dealt"):
            deal_out(case, folder, accelerator.process_index)
        elif case.startswith("stream"):
            load_stream(case, folder, accelerator.process_index, accelerator.num_processes)
        else:
            shrink(case, accelerator, folder)


if __name__ == "__main__":
    main()
