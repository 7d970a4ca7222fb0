"""What the callback costs in a Trainer, side by side in one run, decoding in workers included.

Launch:  accelerate launch recipes/benchmarks/callback.py
         accelerate launch recipes/benchmarks/callback.py --model resnet50 --image_size 128

(a) forward and backward of the K batches that the callback reads, from the same loader; (b) the
whole of ``on_train_begin``. Every image is decoded from a JPEG by the loader's workers. The ways
take turns; every repeat prints its ratio, the last line the medians.
"""

import io
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
    repeats: int = 5


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


def bare_seconds(model, loader, args, newest):
    model.eval()
    begun = time.perf_counter()
    for batch in hf_dash.trainer.batches.training_batches(loader, args, newest):
        inputs = {name: value.to(args.device) for name, value in batch.items()}
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)
    hf_dash.utils.distributed.synchronize(args.device)
    return time.perf_counter() - begun


class Timed(hf_dash.DashCallback):
    def on_train_begin(self, args, state, control, *, train_dataloader, model, **kwargs):
        kwargs["model"], newest = model, self.config.newest
        self.bare = bare_seconds(model, train_dataloader, args, newest)
        begun = time.perf_counter()
        super().on_train_begin(args, state, control, train_dataloader=train_dataloader, **kwargs)
        self.whole = time.perf_counter() - begun


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


def measure(own, folder):
    names = [str(number) for number in range(10)]
    model = hf_dash.create_model(own.model, label_names=names, image_size=own.image_size)
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
    return callback.bare, callback.whole


def main():
    own = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    with tempfile.TemporaryDirectory() as folder:
        measure(own, folder)  # warms up
        rows = [measure(own, folder) for _ in range(own.repeats)]
    for bare, whole in rows:
        print(f"forward and backward {bare:.2f} s, hook {whole:.2f} s, ratio {whole / bare:.3f}")
    ratios = [whole / bare for bare, whole in rows]
    bare, whole = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"medians: {bare:.2f} s, {whole:.2f} s, ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
