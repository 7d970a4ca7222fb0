"""What feeding images to training reads, decodes and holds: counts, beside times.

Launch:  python recipes/benchmarks/input_counts.py
         python recipes/benchmarks/input_counts.py --num_images 20000

JPEGs of smooth noise in one parquet file, fed for some epochs, each way in a process of its own:
kept by hf_dash; decoded by hf_dash at every use; and the same work by ``datasets`` with a plain
DataLoader and timm's transform. Per epoch: images decoded and MB read, workers included; CPU-ms per
image; seconds to the first batch and for all; and the memory that processes hold at the end (PSS),
more than before the first batch; files in the system's cache do not count, nor do reads of mapped
files. First what Pillow needs
to decode the images and nothing else. A line of CSV each.
"""

import csv
import io
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

import hf_dash

NAMES = ["cat", "dog"]

HEADER = ["way", "workers", "epoch", "decoded", "MB read", "CPU-ms per image"]
HEADER += ["first batch", "seconds", "MB held"]


@dataclass
class Arguments:
    num_images: int = 2000
    size: int = field(default=256, metadata={"help": "Pixels of the JPEGs."})
    image_size: int = field(default=224, metadata={"help": "Pixels of the model's input."})
    batch_size: int = 64
    epochs: int = 2
    workers: list[int] = field(default_factory=lambda: [0, 2])
    output: str | None = None


def write_images(args, path):
    generator = np.random.default_rng(0)

    def rows():
        for number in range(args.num_images):
            coarse = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            image = PILImage.fromarray(coarse).resize((args.size, args.size), PILImage.BICUBIC)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            yield {"image": {"bytes": buffer.getvalue(), "path": None}, "label": number % 2}

    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    Dataset.from_generator(rows, features=features).to_parquet(path)


def make_loader(way, path, args, workers, decoded):
    model = hf_dash.create_model("test_resnet", label_names=NAMES, image_size=args.image_size)
    timms = hf_dash.models.image_transform(model)

    def counted(image):
        with decoded.get_lock():
            decoded.value += 1
        return timms.pixels(image)

    transform = replace(timms, pixels=counted)
    images = load_dataset("parquet", data_files=str(path), split="train")
    if way != "datasets, plain DataLoader":
        kept = way == "hf_dash, kept"
        (round_,) = hf_dash.data.cut_rounds(images, 1, transform, in_memory=kept)
        return hf_dash.data.train_batches(round_, args.batch_size, seed=0, num_workers=workers)

    def transformed(batch):
        return {"pixel_values": [*map(transform, batch["image"])], "labels": batch["label"]}

    images.set_transform(transformed)
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    return DataLoader(images, args.batch_size, shuffle=True, **options)


def usage():
    """Return what this process and its workers have read, computed and hold, in bytes and seconds.

    Pages that several of them share count once.
    """
    processes = [psutil.Process(), *psutil.Process().children()]
    read = sum(process.io_counters().read_chars for process in processes)
    times = [process.cpu_times() for process in processes]
    held = sum(process.memory_full_info().pss for process in processes)
    return read, sum(t.user + t.system for t in times), held


def measure(way, path, args, workers):
    torch.set_num_threads(1)
    decoded = multiprocessing.Value("q")
    loader, rows = make_loader(way, path, args, workers, decoded), []
    start = before = (0, *usage())
    for epoch in range(args.epochs):
        begin, first = time.perf_counter(), None
        for _ in loader:
            first = first or time.perf_counter() - begin
        seconds, after = time.perf_counter() - begin, (decoded.value, *usage())
        count, read, cpu, _ = (new - old for new, old in zip(after, before, strict=True))
        row = [count, f"{read / 1e6:.1f}", f"{1e3 * cpu / args.num_images:.3f}", f"{first:.2f}"]
        row += [f"{seconds:.2f}", f"{(after[-1] - start[-1]) / 1e6:.0f}"]
        rows.append([way, workers, epoch + 1, *row])
        before = after
    return rows


def decode_alone(path, args):
    rows = load_dataset("parquet", data_files=str(path), split="train")
    contents = [row["bytes"] for row in rows.cast_column("image", Image(decode=False))["image"]]
    begin = time.process_time()
    for content in contents:
        PILImage.open(io.BytesIO(content)).load()
    cpu = 1e3 * (time.process_time() - begin) / args.num_images
    return ["Pillow, decode alone", 0, 1, len(contents), "", f"{cpu:.3f}", "", "", ""]


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.parquet"
        os.environ["HF_DASH_CACHE"] = folder
        write_images(args, path)
        rows, fork = [decode_alone(path, args)], multiprocessing.get_context("fork")
        for way in ("hf_dash, kept", "hf_dash, not kept", "datasets, plain DataLoader"):
            for workers in args.workers:
                with ProcessPoolExecutor(1, mp_context=fork) as pool:
                    rows += pool.submit(measure, way, path, args, workers).result()
    with open(args.output, "w", newline="") if args.output else sys.stdout as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])


if __name__ == "__main__":
    main()
