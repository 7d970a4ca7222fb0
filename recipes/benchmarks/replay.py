"""What a round with a bounded replay reads, while the old images grow a hundredfold.

Launch:  python recipes/benchmarks/replay.py
         python recipes/benchmarks/replay.py --num_new 100000 --rounds 2 10 100

In round r, r − 1 arrivals are old and one is new, all of the same size and of 8-pixel PNGs. Per
round and strategy: old images, those drawn, arrivals opened, images trained on and decoded in an
epoch, and CPU seconds of drawing and of the epoch. A line of CSV each.
"""

import csv
import io
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import HfArgumentParser

import hf_dash

HEADER = ["strategy", "round", "old", "drawn", "arrivals opened", "trained on", "decoded"]
HEADER += ["CPU-s to draw", "CPU-s of an epoch"]


@dataclass
class Arguments:
    num_new: int = field(default=1000, metadata={"help": "Images of every arrival."})
    rounds: list[int] = field(default_factory=lambda: [2, 10, 100])
    replay_samples: str = field(default="1.0", metadata={"help": "As in the other recipes."})
    strategies: list[str] = field(default_factory=lambda: ["uniform", "class_balanced", "recency"])
    num_classes: int = 1000
    output: str | None = None


def images_of(args):
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    PILImage.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    names = [f"class {number}" for number in range(args.num_classes)]
    rows = {
        "image": [{"bytes": buffer.getvalue(), "path": None}] * args.num_new,
        "label": generator.integers(0, args.num_classes, args.num_new).tolist(),
    }
    return Dataset.from_dict(
        rows, features=Features({"image": Image(), "label": ClassLabel(names=names)})
    )


def measure(strategy, index, dataset, args):
    decoded = []

    def counted(image):
        decoded.append(1)
        return pil_to_tensor(image)

    arrivals = tuple(hf_dash.data.ImageExamples(dataset, counted) for _ in range(index))
    replay = hf_dash.DataConfig(replay_samples=args.replay_samples, replay_strategy=strategy).replay
    begin = time.process_time()
    (round_,) = replay.rounds([hf_dash.Round(index, arrivals)], 0)
    drawing = time.process_time() - begin
    begin = time.process_time()
    for _ in hf_dash.data.train_batches(round_, 256, seed=0):
        pass
    cpu, drawn = time.process_time() - begin, round_.replay
    row = [strategy, index, drawn["num_old"], drawn["num_drawn"], drawn["num_arrivals"]]
    return [*row, round_.num_total, len(decoded), f"{drawing:.2f}", f"{cpu:.1f}"]


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    dataset, rows = images_of(args), []
    for strategy in args.strategies:
        rows += [measure(strategy, index, dataset, args) for index in args.rounds]
    csv.writer(sys.stdout).writerows([HEADER, *rows])
    if args.output:
        with open(args.output, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows])


if __name__ == "__main__":
    main()
