"""What a command costs before its first step where millions of images are known.

Launch:  python recipes/benchmarks/million_rows.py
         python recipes/benchmarks/million_rows.py --num_images 100000

Parquet files of images of one pixel, as many as ImageNet has, and two commands: the first reads
them all, the second finds them known. Each compares held-out and training images, cuts rounds,
computes fingerprints and takes the first batch. Per command a line of CSV: images; MB of shards; MB
of manifests; MB read and images decoded before the first batch; CPU s; seconds.
"""

import csv
import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage
from PIL import ImageFile
from transformers import HfArgumentParser

import hf_dash

HEADER = ["command", "images", "MB", "MB of manifests", "MB read", "decoded", "CPU s", "seconds"]

NAMES = [f"class {number}" for number in range(1000)]


@dataclass
class Arguments:
    num_images: int = 1_300_000
    num_held_out: int = 50_000
    num_rounds: int = 10
    rows_per_shard: int = 100_000


def write_shard(path, count):
    """Write images that differ in bytes which no decoder reads."""
    place = f"{path.parent.name}/{path.name}"
    buffer, generator = io.BytesIO(), np.random.default_rng(list(place.encode()))
    PILImage.new("RGB", (1, 1)).save(buffer, "BMP")
    contents = [buffer.getvalue() + generator.bytes(8) for _ in range(count)]
    rows = [{"bytes": content, "path": None} for content in contents]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    columns = {"image": rows, "label": generator.integers(0, len(NAMES), count)}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns, schema=features.arrow_schema), path, row_group_size=1000)


def command(data, args, transform, decoded):
    """Load everything and take the first batch; return MB read, images decoded, and seconds."""
    decoded.clear()
    before = psutil.Process().io_counters().read_chars
    begin, start = time.perf_counter(), time.process_time()
    (schedule,) = hf_dash.data.load_schedules(data, [0], args.num_rounds, None, [])
    rounds = schedule.rounds(transform)
    assert rounds[-1].fingerprint != schedule.held_out_examples(transform).fingerprint
    read, count = psutil.Process().io_counters().read_chars - before, len(decoded)
    next(iter(hf_dash.data.train_batches(rounds[0], 64, seed=0)))
    seconds = time.process_time() - start, time.perf_counter() - begin
    return f"{read / 1e6:.1f}", count, *(f"{value:.1f}" for value in seconds)


def megabytes(paths):
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.1f}"


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    decoded, load = [], ImageFile.ImageFile.load
    ImageFile.ImageFile.load = lambda image: (decoded.append(1), load(image))[1]
    datasets.disable_progress_bars()
    model = hf_dash.create_model("test_resnet", label_names=NAMES, image_size=32)
    transform = hf_dash.models.image_transform(model)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(HEADER)
    with tempfile.TemporaryDirectory() as name:
        folder, total = Path(name), args.num_images + args.num_held_out
        os.environ["HF_DASH_CACHE"] = datasets.config.HF_DATASETS_CACHE = f"{name}/cache"
        for number, begin in enumerate(range(0, args.num_images, args.rows_per_shard)):
            count = min(args.rows_per_shard, args.num_images - begin)
            write_shard(folder / "train" / f"{number}.parquet", count)
        write_shard(folder / "held_out" / "0.parquet", args.num_held_out)
        where = {"test_dataset_name": str(folder / "held_out"), "cache_images": False}
        data = hf_dash.DataConfig(str(folder / "train"), **where)
        for which in ("first", "second"):
            found = command(data, args, transform, decoded)
            sizes = megabytes(folder.rglob("*.parquet")), megabytes(folder.rglob("*.manifest"))
            writer.writerow([which, total, *sizes, *found])


if __name__ == "__main__":
    main()
