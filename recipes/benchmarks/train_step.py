"""What a training step costs, side by side in one run, against a loop without anything around it.

Launch:  accelerate launch recipes/benchmarks/train_step.py
         accelerate launch recipes/benchmarks/train_step.py --model test_resnet --mode default

(a) a bare PyTorch loop over images on the device; (b) hf_dash with ``on_device``; (c) the same,
compiled; (d) hf_dash with its loader; (e) transformers' Trainer; on CUDA (f) as (b), with
``cuda_graphs``, and (g) compiled too. Images are random.
The ways take turns, each for some epochs; the first is not timed: it compiles. On the CPU
seconds are those that this process computes, on an accelerator those of the clock. Medians over
the repeats, after one that is not counted.
"""

import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from datasets import ClassLabel, Dataset, Features, Image
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import hf_dash

HEADER = ["way", "ms a step", "of (a)", "lowest", "highest"]
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}


@dataclass
class Arguments:
    model: str = "resnet18"
    num_examples: int = 2048
    batch_size: int = 128
    epochs: int = 3
    repeats: int = 5
    image_size: int = 32
    channels_last: bool = False
    time_limit: float = field(default=math.inf, metadata={"help": "Begins no more after these."})
    mode: str = field(default="reduce-overhead", metadata={"help": "torch.compile's; '' skips it"})


def clock(device):
    hf_dash.utils.distributed.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


class Clocked(TrainerCallback):
    """Notes how many seconds every epoch took, of batches or of a Trainer."""

    def __init__(self, device, batches=()):
        self.device, self.batches, self.seconds = device, batches, []

    def __iter__(self):
        self.on_epoch_begin()
        yield from self.batches
        self.on_epoch_end()

    def on_epoch_begin(self, *args, **kwargs):
        self.begun = clock(self.device)

    def on_epoch_end(self, *args, **kwargs):
        self.seconds.append(clock(self.device) - self.begun)


def resident(own, round_, device):
    return hf_dash.training.resident_batches(round_, own.batch_size, seed=0, device=device)


def bare(own, model, round_, accelerator):
    device = accelerator.device
    batches = Clocked(device, resident(own, round_, device))
    weights, fused = model.to(device).train().parameters(), device.type == "cuda" or None
    optimizer = torch.optim.SGD(weights, 0.01, 0.9, fused=fused)
    for _ in range(own.epochs):
        for batch in batches:
            with accelerator.autocast():
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return batches.seconds


def ours(own, model, round_, accelerator, *, on_device=True, mode=None, cuda_graphs=False):
    device = accelerator.device
    loader = hf_dash.data.train_batches(round_, own.batch_size, seed=0)
    batches = Clocked(device, resident(own, round_, device) if on_device else loader)
    settings = {"learning_rate": 0.01, "disable_tqdm": True, "channels_last": own.channels_last}
    config = hf_dash.TrainingConfig(max_epochs=own.epochs, cuda_graphs=cuda_graphs, **settings)
    backend = "inductor" if mode else "no"
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=backend, mode=mode)
    hf_dash.training.train_round(model, batches, config, accelerator)
    return batches.seconds


def trainer(own, model, round_, accelerator):
    epochs = Clocked(accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_train_epochs": own.epochs, "per_device_train_batch_size": own.batch_size}
        half, cpu = accelerator.mixed_precision == "bf16", accelerator.device.type == "cpu"
        args = TrainingArguments(folder, optim="sgd", bf16=half, use_cpu=cpu, **sizes, **QUIET)
        Trainer(model, args, train_dataset=round_.examples, callbacks=[epochs]).train()
    return epochs.seconds


def random_images(count, size, names):
    pixels = np.random.default_rng(0).integers(0, 255, (count, size, size, 3), np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": list(pixels), "label": [i % len(names) for i in range(count)]}
    return Dataset.from_dict(rows, features=features)


def main():
    own = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    accelerator, size, names = Accelerator(), own.image_size, list("0123456789")
    images = random_images(own.num_examples, size, names)
    layout = torch.channels_last if own.channels_last else torch.contiguous_format
    settings = {"label_names": names, "image_size": size}
    make = lambda: hf_dash.create_model(own.model, **settings).to(memory_format=layout)  # noqa: E731
    transform = hf_dash.models.image_transform(make())
    (round_,) = hf_dash.data.cut_rounds(images, 1, transform, in_memory=True)
    ways = {"(a) bare loop": bare, "(b) on_device": ours}
    if own.mode:
        ways["(c) on_device, compiled"] = partial(ours, mode=own.mode)
    ways |= {"(d) loader": partial(ours, on_device=False), "(e) Trainer": trainer}
    if accelerator.device.type == "cuda":
        ways["(f) cuda_graphs"] = partial(ours, cuda_graphs=True)
        ways["(g) cuda_graphs, compiled"] = partial(ours, cuda_graphs=True, mode="default")
    runs, until = [], time.monotonic() + own.time_limit
    for _ in takewhile(lambda n: n < 2 or time.monotonic() < until, range(own.repeats + 1)):
        seconds = {name: way(own, make(), round_, accelerator) for name, way in ways.items()}
        runs.append({name: sum(each[1:]) / len(each[1:]) for name, each in seconds.items()})
        print({name: round(each, 3) for name, each in runs[-1].items()}, flush=True)
    steps, table = math.ceil(own.num_examples / own.batch_size), []
    for name in ways:
        ratios = sorted(run[name] / run["(a) bare loop"] for run in runs[1:])
        a_step = 1000 * statistics.median(run[name] for run in runs[1:]) / steps
        shown = [f"{ratio:.3f}" for ratio in (statistics.median(ratios), ratios[0], ratios[-1])]
        table.append([name, f"{a_step:.2f}", *shown])
    print(hf_dash.report.markdown_table(HEADER, table))


if __name__ == "__main__":
    main()
