"""What the callback costs in a Trainer, side by side in one run, decoding in workers included.

Launch:  accelerate launch recipes/benchmarks/callback.py
         accelerate launch recipes/benchmarks/callback.py --model resnet50 --batch_size 16

(a) forward and backward of the K batches that the callback reads, from the same loader; (b) the
whole of ``on_train_begin``. Every image is decoded from a JPEG by the loader's workers. In a repeat
(a) comes before and after (b), so that a machine that becomes slower does not count against one of
them. On the CPU seconds are those that this process and its workers compute, on an accelerator
those of the clock. Medians over the repeats; the lowest seconds are those with the least noise.
"""

import io
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import hf_dash


@dataclass
class Arguments:
    model: str = "resnet18"
    image_size: int = 64
    batch_size: int = 32
    workers: int = field(default=2, metadata={"help": "Processes that decode."})
    repeats: int = 10


class Jpegs(torch.utils.data.Dataset):
    """Random images, decoded whenever they are read."""

    def __init__(self, count, size):
        pixels = np.random.default_rng(0).integers(0, 255, (64, size, size, 3), dtype=np.uint8)
        self.count, self.files = count, []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "jpeg")
            self.files.append(buffer.getvalue())

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = Image.open(io.BytesIO(self.files[index % 64]))
        return {"pixel_values": pil_to_tensor(image).float() / 255, "labels": index % 10}


def clock(device):
    """Return seconds; the workers' count where they have ended."""
    if device.type == "cpu":
        return sum(os.times()[:4])
    hf_dash.utils.distributed.synchronize(device)
    return time.perf_counter()


def forward_and_backward(model, loader, args, newest):
    model.eval()
    for batch in hf_dash.trainer.batches.training_batches(loader, args, newest):
        inputs = {name: value.to(args.device) for name, value in batch.items()}
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)
    model.train()


class Timed(hf_dash.DashCallback):
    """Measures its own hook, and the bare pass before and after it."""

    def on_train_begin(self, args, state, control, *, model, train_dataloader, **kwargs):
        def bare():
            forward_and_backward(model, train_dataloader, args, self.config.newest)

        def whole():
            kwargs.update(model=model, train_dataloader=train_dataloader)
            super(Timed, self).on_train_begin(args, state, control, **kwargs)

        self.seconds = []
        for way in (bare, whole, bare):
            begun = clock(args.device)
            way()
            self.seconds.append(clock(args.device) - begun)


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


def measure(own, folder):
    names = [str(number) for number in range(10)]
    model = hf_dash.create_model(own.model, label_names=names, image_size=own.image_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.01
            )  # trained networks have no norms of zero, whose gradients end there
    args = TrainingArguments(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=own.batch_size,
        dataloader_num_workers=own.workers,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Jpegs(40 * own.batch_size, own.image_size)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[Stop()])
    callback = Timed(trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    return callback.seconds


def main():
    own = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        measure(own, folder)  # warms up
        for _ in range(own.repeats):
            rows.append(measure(own, folder))
            print("(a), (b), (a) took", *(f"{seconds:.2f} s" for seconds in rows[-1]), flush=True)
    before, whole, after = zip(*rows, strict=True)
    ratios = sorted(2 * b / (a + c) for a, b, c in rows)
    lowest = min(*before, *after), min(whole)
    row = [own.model, f"{own.batch_size} × {own.image_size}²", str(own.repeats)]
    row += [f"{seconds:.2f}" for seconds in lowest]
    ends = (lowest[1] / lowest[0], statistics.median(ratios), ratios[0], ratios[-1])
    row += [f"{ratio:.3f}" for ratio in ends]
    header = ["network", "images", "repeats", "lowest (a), s", "lowest (b), s", "lowest b / a"]
    header += ["median b / a", "from", "to"]
    print(hf_dash.report.markdown_table(header, [row]))


if __name__ == "__main__":
    main()
