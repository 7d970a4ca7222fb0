"""What the last batch of an epoch does to a round: the steps that training takes, and its accuracy.

Launch:  accelerate launch --num_cpu_threads_per_process 1 recipes/benchmarks/last_batch.py \
             --dataset_name path/of/cifar10

Per seed one network is trained on the first images; then, for rounds of several sizes, DASH and
training to 99.9 % continue from it, with the batches of an epoch cut in three ways: even sizes, as
hf_dash cuts them; what is left over in a last batch, as a DataLoader and the authors do; or that
dropped, if anything is. The network is small, so that a training takes seconds of one core: a
perceptron of three layers with batch norms, of images halved to 16 px. Each training adds a line to
output_dir/last_batch.csv; finished ones are not repeated.
"""

import copy
import csv
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import HfArgumentParser
from transformers.modeling_outputs import ImageClassifierOutput

import hf_dash

HEADER = ["seed", "images", "batches", "left over", "steps", "epochs", "converged", "accuracy"]


class Perceptron(nn.Module):
    """Three linear layers, batch norms between them."""

    def __init__(self, image_size, hidden, num_classes):
        super().__init__()
        widths = [3 * image_size**2, hidden, hidden]
        layers = [nn.Flatten()]
        for before, width in pairwise(widths):
            layers += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, num_classes))

    def forward(self, pixel_values, labels=None):
        logits = self.layers(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


@dataclass
class Arguments:
    output_dir: str = "runs/last_batch"
    seeds: int = 3
    first: int = field(default=4000, metadata={"help": "Images of the round before."})
    sizes: list[int] = field(
        default_factory=lambda: [4992, 5000, 5001], metadata={"help": "Images of the rounds."}
    )
    num_test: int = field(default=2000, metadata={"help": "Held-out images."})
    image_size: int = 16
    hidden: int = field(default=256, metadata={"help": "Width of the layers."})


def cut(round_, way, size, seed):
    if way == "even":
        return hf_dash.data.train_batches(round_, size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    options = {"batch_size": size, "shuffle": True, "generator": generator}
    return DataLoader(round_.examples, drop_last=way == "dropped", **options)


def rounds_of(images, transform, *sizes):
    """Return rounds of so many images in all, which share their first images."""
    return [
        next(hf_dash.data.cut_rounds(images.select(range(size)), 1, transform, in_memory=True))
        for size in sizes
    ]


def main():
    classes = (Arguments, hf_dash.DataConfig, hf_dash.TrainingConfig)
    args, data, training = HfArgumentParser(classes).parse_args_into_dataclasses()
    path = Path(args.output_dir) / "last_batch.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(",".join(HEADER) + "\n")
    with path.open(newline="") as file:
        done = {tuple(row[:3]) for row in csv.reader(file)}
    accelerator = Accelerator()
    size = training.train_batch_size
    transform = transforms.Compose(
        [
            transforms.Resize(args.image_size),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    train, held_out = data.load_train(), hf_dash.data.load_held_out(data)
    for seed in range(args.seeds):
        arrived = hf_dash.data.in_arrival_order(train, seed=seed, num_examples=max(args.sizes))
        torch.manual_seed(seed)
        model = Perceptron(args.image_size, args.hidden, len(hf_dash.data.label_names(train)))
        before, *rounds = rounds_of(arrived, transform, args.first, *args.sizes)
        shown = held_out.dataset.select(range(min(args.num_test, held_out.num_examples)))
        test = hf_dash.data.ImageExamples(shown, transform, in_memory=True)
        set_seed(seed)
        hf_dash.training.train_round(model, cut(before, "even", size, seed), training, accelerator)
        for round_ in rounds:
            for way in ("even", "left over", "dropped"):
                key = str(seed), str(round_.num_total), way
                left = round_.num_total % size
                if key in done or (way == "dropped" and not left):
                    continue
                own = copy.deepcopy(model)
                hf_dash.find_start("dash")(own, hf_dash.StartContext(round_, seed))
                set_seed(seed)
                batches = cut(round_, way, size, seed)
                result = hf_dash.training.train_round(own, batches, training, accelerator)
                accuracy = hf_dash.training.evaluate_model(own, test, accelerator)["accuracy"]
                row = [*key, left, result.steps, result.epochs, result.converged, accuracy]
                with path.open("a", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerow(row)
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
