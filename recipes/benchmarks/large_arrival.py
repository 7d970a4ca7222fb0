"""An arrival too large for memory as floats: what the first batch waits for, and what is held.

Launch:  OMP_NUM_THREADS=1 python recipes/benchmarks/large_arrival.py
         OMP_NUM_THREADS=1 python recipes/benchmarks/large_arrival.py --num_images 2000

A few hundred JPEGs of 256 px, repeated, read at 224 px. In one row each, every one in a process of
its own: images decoded and kept, by workers and without; read again from what is kept; and a budget
that they do not fit into, where they are decoded at every use. Seconds to the first batch, CPU-ms
and ms an image, and how much more memory the processes hold at most than before the first batch,
sampled: their own and shared, and pages of the dataset's mapped file, which the system may drop.
``--max_images`` ends an epoch early where it does not fill the file.
"""

import csv
import io
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import HfArgumentParser

import hf_dash

NAMES = ["cat", "dog"]

HEADER = ["way", "workers", "images", "first batch, s", "CPU-ms per image", "ms per image"]
HEADER += ["MB held, at most", "MB mapped, at most"]


@dataclass
class Arguments:
    num_images: int = 100_000
    num_distinct: int = 300
    max_images: int = 10_000
    batch_size: int = 64
    folder: str | None = None
    output: str | None = None


def repeated_images(args, folder):
    """Return a dataset on disk."""
    generator, contents = np.random.default_rng(0), []
    for _ in range(args.num_distinct):
        coarse = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        PILImage.fromarray(coarse).resize((256, 256), PILImage.BICUBIC).save(
            file, "JPEG", quality=90
        )
        contents.append(file.getvalue())

    def rows():
        for number in range(args.num_images):
            content = contents[number % len(contents)]
            yield {"image": {"bytes": content, "path": None}, "label": number % 2}

    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_generator(rows, features=features, cache_dir=str(folder))


def usage():
    """Return CPU-seconds, MB of memory and MB of mapped files of this process and its workers."""
    cpu, held, mapped = 0.0, 0.0, 0.0
    for process in (psutil.Process(), *psutil.Process().children()):
        times = process.cpu_times()
        cpu += times.user + times.system
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split()[0]: int(line.split()[1]) / 1e3 for line in lines}
        held += sizes["Pss_Anon:"] + sizes["Pss_Shmem:"]
        mapped += sizes["Pss_File:"]
    return cpu, held, mapped


def measure(way, images, args, workers, cache_gb, count):
    torch.set_num_threads(1)
    model = hf_dash.create_model("test_resnet", label_names=NAMES, image_size=224)
    transform = hf_dash.models.image_transform(model)
    before, most = usage(), (0, 0)
    begin, first, seen = time.perf_counter(), None, 0
    budget = hf_dash.data.DataConfig(cache_gb=cache_gb).pixel_budget
    examples = hf_dash.data.ImageExamples(
        images, transform, in_memory=True, cache_key="large", budget=budget
    )
    round_ = hf_dash.Round(1, (examples,))
    batches = hf_dash.data.train_batches(round_, args.batch_size, seed=0, num_workers=workers)
    for number, batch in enumerate(batches):
        seen += len(batch["pixel_values"])
        first = first or time.perf_counter() - begin
        if number % 50 == 0:
            most = [max(pair) for pair in zip(most, usage()[1:], strict=True)]
        if seen >= count:
            break
    spent = [usage()[0] - before[0], time.perf_counter() - begin]
    numbers = [f"{1e3 * seconds / seen:.3f}" for seconds in spent]
    grown = [f"{new - old:.0f}" for new, old in zip(most, before[1:], strict=True)]
    return [way, workers, seen, f"{first:.2f}", *numbers, *grown]


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows, fork = [HEADER], multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        os.environ["HF_DASH_CACHE"] = name
        images = repeated_images(args, Path(name))
        size = args.num_images * 3 * 224 * 224 / 1e9 + 1
        few, all_ = args.max_images, args.num_images
        for way in (
            ("kept, first epoch", 0, size, few),
            ("kept, first epoch", 2, size, all_),
            ("kept, read again", 0, size, few),
            ("kept, read again", 2, size, few),
            ("beyond the budget", 0, 0, few),
            ("beyond the budget", 2, 0, few),
        ):
            name, workers, cache_gb, count = way
            with ProcessPoolExecutor(1, mp_context=fork) as pool:
                done = pool.submit(measure, name, images, args, workers, cache_gb, count)
                rows.append(done.result())
                print(rows[-1], file=sys.stderr, flush=True)
    with open(args.output, "w", newline="") if args.output else sys.stdout as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
