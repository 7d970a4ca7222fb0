"""What the last batch of an epoch does to a round: the steps that training takes, and its accuracy.

Launch:  accelerate launch --num_cpu_threads_per_process 1 recipes/benchmarks/last_batch.py \
             --dataset_name path/of/cifar10

Per seed one network is trained on the first images; then, for rounds of several sizes, DASH and
training to 99.9 % continue from it, with the batches of an epoch cut in three ways: even sizes, as
hf_dash cuts them; what is left over in a last batch, as a DataLoader and the authors do; or that
dropped, if anything is. Images are halved to 16 px, so that a training takes less than a minute of
one core; the last feature map is then one pixel, as the default network's is at 32 px.
Each training adds a line to output_dir/last_batch.csv; finished ones are not repeated.
"""

import copy
import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

import hf_dash

HEADER = ["seed", "images", "batches", "left over", "steps", "epochs", "converged", "accuracy"]

NETWORK = {
    "layers": [1, 1, 1, 0],
    "channels": [32, 64, 128, 128],
    "stem_width": 8,
    "stem_type": "deep",
    "zero_init_last": False,
}


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
    architecture: str = "resnet10t"
    model_args: str = json.dumps(NETWORK)


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
    train, held_out = data.load_train(), hf_dash.data.load_held_out(data)
    for seed in range(args.seeds):
        arrived = hf_dash.data.in_arrival_order(train, seed=seed, num_examples=max(args.sizes))
        model = hf_dash.create_model(
            args.architecture,
            label_names=hf_dash.data.label_names(train),
            model_args=json.loads(args.model_args),
            image_size=args.image_size,
            seed=seed,
        )
        transform = hf_dash.models.image_transform(model)
        before, *rounds = rounds_of(arrived, transform, args.first, *args.sizes)
        shown = held_out.dataset.select(range(min(args.num_test, held_out.num_examples)))
        test = hf_dash.data.ImageExamples(shown, transform, in_memory=True)
        size = training.train_batch_size
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
