"""How fast a small network trains on each way of feeding it, side by side in one run.

Launch:  accelerate launch recipes/benchmarks/input.py
         accelerate launch recipes/benchmarks/input.py --num_workers 4 \
             --dataset_name '../shared/data/cifar10/train-*.parquet'

One epoch of SGD from (a) tensors in memory, cut by index; (b) map-style examples, decoded as they
are needed; (c) streams, decoded as they are needed; (d) streams with a cache; (e) map-style
examples kept in memory. Workers serve (b), (c) and the first epoch of (d). Each way first trains an
epoch that is not timed, in which caches fill; then the ways take turns. Medians over the repeats;
the start of the workers counts, as it does in training.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from datasets import concatenate_datasets
from transformers import HfArgumentParser

import hf_dash


@dataclass
class Arguments:
    architecture: str = "test_resnet"
    image_size: int = 32
    num_examples: int = 5000
    num_rounds: int = 5
    batch_size: int = 128
    num_workers: int = 1
    num_shards: int = 4
    repeats: int = 5


class InMemory:
    """Batches cut from tensors: as little work as feeding can be."""

    def __init__(self, round_, batch_size):
        self.batch_size = batch_size
        rows = [round_.examples[index] for index in range(round_.num_total)]
        self.pixels = torch.stack([row["pixel_values"] for row in rows])
        self.labels = torch.tensor([row["labels"] for row in rows])

    def __iter__(self):
        for rows in torch.randperm(len(self.labels)).split(self.batch_size):
            yield {"pixel_values": self.pixels[rows], "labels": self.labels[rows]}


def repeated(dataset, num_examples):
    """Return the first examples of a dataset, which begins again where it ends."""
    times = -(-num_examples // len(dataset))
    return concatenate_datasets([dataset] * times).select(range(num_examples))


def as_streams(round_, transform, num_shards, cache):
    arrivals = [
        hf_dash.data.StreamedImages(
            arrival.dataset.to_iterable_dataset(num_shards=num_shards),
            transform,
            num_examples=len(arrival),
            cache=cache,
        )
        for arrival in round_.arrivals
    ]
    return hf_dash.Round(round_.index, tuple(arrivals))


def make_ways(args, dataset, transform):
    def cut(in_memory):
        return list(
            hf_dash.data.cut_rounds(dataset, args.num_rounds, transform, in_memory=in_memory)
        )[-1]

    plain, kept = cut(False), cut(True)
    rounds = {
        "(b) map-style, decoded as needed": (plain, args.num_workers),
        "(c) streams, decoded as needed": (
            as_streams(plain, transform, args.num_shards, cache=False),
            args.num_workers,
        ),
        "(d) streams, cached": (
            as_streams(plain, transform, args.num_shards, cache=True),
            args.num_workers,
        ),
        "(e) map-style, in memory": (kept, 0),
    }
    ways = {"(a) tensors in memory": InMemory(kept, args.batch_size)}
    for name, (round_, workers) in rounds.items():
        ways[name] = hf_dash.data.train_batches(
            round_, args.batch_size, seed=0, num_workers=workers
        )
    return ways


def steps_per_second(model, batches, accelerator):
    """Train one epoch and return its rate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    steps, started = 0, time.perf_counter()
    for batch in batches:
        on_device = {key: value.to(accelerator.device) for key, value in batch.items()}
        loss = model(**on_device).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    loss.item()  # waits for the device
    return steps / (time.perf_counter() - started)


def main():
    args, data = HfArgumentParser((Arguments, hf_dash.DataConfig)).parse_args_into_dataclasses()
    if data.streaming:
        raise ValueError("streaming must not be set: the streams are made of map-style data")
    images = data.load_train()
    model = hf_dash.create_model(
        args.architecture, label_names=hf_dash.data.label_names(images), image_size=args.image_size
    )
    transform = hf_dash.models.image_transform(model)
    accelerator = Accelerator()
    model.to(accelerator.device).train()
    ways = make_ways(args, repeated(images, args.num_examples), transform)
    for batches in ways.values():
        steps_per_second(model, batches, accelerator)
    # In turn, so that whatever else the machine does hits all of them.
    runs = [
        {name: steps_per_second(model, batches, accelerator) for name, batches in ways.items()}
        for _ in range(args.repeats)
    ]
    first = next(iter(ways))
    rows = []
    for name in ways:
        shares = sorted(run[name] / run[first] for run in runs)
        rate = statistics.median(run[name] for run in runs)
        spread = f"{statistics.median(shares):.3f} ({shares[0]:.3f} … {shares[-1]:.3f})"
        rows.append([name, f"{rate:.2f}", f"{rate * args.batch_size:.0f}", spread])
    print(hf_dash.report.markdown_table(["way", "steps/s", "images/s", "of (a)"], rows))


if __name__ == "__main__":
    main()
