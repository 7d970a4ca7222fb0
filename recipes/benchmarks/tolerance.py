"""What leaving old minibatches out changes, on a network trained on real data.

Launch:  accelerate launch recipes/benchmarks/tolerance.py

A small timm ResNet is trained on the first of five rounds; then the bounded
pass is compared with the whole pass over all five, in minibatches of 32. The error is the summed
distance between the two shrunk models, relative to the summed change that the whole pass makes.
"""

import copy
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import HfArgumentParser

import hf_dash


@dataclass
class Arguments:
    architecture: str = "test_resnet"
    image_size: int = 32
    num_rounds: int = 5
    examples_per_round: int | None = None
    batch_size: int = 32
    seed: int = 0


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main():
    args, data = HfArgumentParser((Arguments, hf_dash.DataConfig)).parse_args_into_dataclasses()
    images = data.load_train()
    wanted = args.examples_per_round and args.examples_per_round * args.num_rounds
    arriving = hf_dash.data.in_arrival_order(images, seed=args.seed, num_examples=wanted)
    trained = hf_dash.create_model(
        args.architecture,
        label_names=hf_dash.data.label_names(images),
        image_size=args.image_size,
        seed=args.seed,
    )
    transform = hf_dash.models.image_transform(trained)
    rounds = list(hf_dash.data.cut_rounds(arriving, args.num_rounds, transform, in_memory=True))
    batches = hf_dash.data.train_batches(rounds[0], args.batch_size, seed=args.seed)
    hf_dash.training.train_round(trained, batches, hf_dash.TrainingConfig(), Accelerator())

    config = hf_dash.DashConfig(gradient_batch_size=args.batch_size)
    every = list(hf_dash.data.gradient_batches(rounds[-1], config))
    rows = []
    for grouping in ("kernel", "filter", "auto"):
        whole = copy.deepcopy(trained)
        hf_dash.dash_shrink_(whole, every, grouping=grouping, tolerance=0.0)
        moved = (weights(whole) - weights(trained)).abs().sum()
        for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
            model = copy.deepcopy(trained)
            report = hf_dash.dash_shrink_(model, every, grouping=grouping, tolerance=tolerance)
            error = (weights(model) - weights(whole)).abs().sum() / moved
            read = f"{report.num_batches} of {len(every)}"
            rows.append([grouping, f"{tolerance:g}", read, f"{error:.1e}"])
    print(hf_dash.report.markdown_table(["grouping", "tolerance", "minibatches", "error"], rows))


if __name__ == "__main__":
    main()
