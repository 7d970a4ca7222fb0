"""What commands read and decode before their first step: counts, beside times.

Launch:  python recipes/benchmarks/first_step.py
         python recipes/benchmarks/first_step.py --kinds parquet --num_images 32000 --num_new 500

JPEGs of smooth noise in shards; commands on each kind, each a process: the first, the same again,
one with a new shard, one with new images in an old folder. They check all images and take the first
batch. Counted: MB of all shards; MB read before it, and how often that is all shards (passes), but
not of copies that ``datasets`` maps; images decoded; MB of memory at most; CPU-s. "cut" is one
dataset cut into four rounds, of which the last is read; others arrive by shard.
"""

import csv
import io
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFile
from transformers import HfArgumentParser

import hf_dash

NAMES = ["cat", "dog"]
WAYS = ["", ", streamed", ", streamed, cut"]
KINDS = [*(f"{end}{way}" for end in ("parquet", "tar", "tar.gz") for way in WAYS), "folder"]
HEADER = ["kind", "command", "images", "MB", "MB read", "passes", "decoded", "MB held", "CPU s"]


@dataclass
class Arguments:
    num_images: int = 2000
    num_new: int = 32
    num_shards: int = 4
    size: int = 256
    kinds: list[str] = field(default_factory=KINDS.copy)


def images_of(args, kind, number, count):
    """Yield the encoded images of a shard; no two are equal."""
    generator = np.random.default_rng(number)
    for _ in range(count):
        coarse = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((args.size, args.size), Image.BICUBIC)
        image.save(buffer := io.BytesIO(), "JPEG", quality=90)
        yield buffer.getvalue()


def write_shard(args, kind, folder, number, count):
    images = images_of(args, kind, number, count)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        for row, content in enumerate(images):
            path = folder / f"{number % 1000}/{NAMES[row % 2]}/{number}-{row}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    elif kind.startswith("tar"):
        mode = "w:gz" if "gz" in kind else "w"
        with tarfile.open(folder / f"{number}.{kind.split(',')[0]}", mode) as tar:
            for row, content in enumerate(images):
                for end, data in (("jpg", content), ("txt", NAMES[row % 2].encode())):
                    info = tarfile.TarInfo(f"{row}.{end}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    else:
        rows = [{"bytes": content, "path": None} for content in images]
        labels = [NAMES[row % 2] for row in range(count)]
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
        table = pa.table({"image": rows, "label": labels}, schema=features.arrow_schema)
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=1000)


def make_transform():
    model = hf_dash.create_model("test_resnet", label_names=NAMES, image_size=32)
    return hf_dash.models.image_transform(model)


def peak():
    """Return the most MB that this process has held, pages of mapped files among them."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3


def command(kind, folder):
    """Load everything, take the first batch; return images, MB read, decoded, MB held, seconds."""
    decoded, load = multiprocessing.Value("q"), ImageFile.ImageFile.load

    def counted(image):
        if image.tile:
            with decoded.get_lock():
                decoded.value += 1
        return load(image)

    ImageFile.ImageFile.load = counted
    columns = {"image_column_name": "jpg", "label_column_name": "txt"} if "tar" in kind else {}
    (columns["test_dataset_name"],) = map(str, (folder / "held_out").iterdir())
    arrive_by, num_rounds = ("examples", 4) if "cut" in kind else ("files", 1)
    options = {"arrive_by": arrive_by, "streaming": "streamed" in kind, "cache_images": False}
    data = hf_dash.DataConfig(str(folder / "train"), image_mode="RGB", **options, **columns)
    transform = make_transform()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    held, start, before = peak(), time.process_time(), psutil.Process().io_counters().read_chars
    (schedule,) = hf_dash.data.load_schedules(data, [0], num_rounds, None, [])
    round_, held_out = schedule.rounds(transform)[-1], schedule.held_out_examples(transform)
    assert round_.fingerprint != held_out.fingerprint
    count, read = decoded.value, psutil.Process().io_counters().read_chars - before
    next(iter(hf_dash.data.train_batches(round_, 64, seed=0)))
    seconds = time.process_time() - start
    return round_.num_total + len(held_out), read / 1e6, count, peak() - held, seconds


def measure(args, kind, folder):
    train, fork = folder / "train", multiprocessing.get_context("fork")
    for number in range(args.num_shards):
        write_shard(args, kind, train, number, args.num_images // args.num_shards)
    write_shard(args, kind, folder / "held_out", 1000, max(2, args.num_images // 100))
    new = {"new shard": 1999} | ({"new images": 2000} if kind == "folder" else {})
    for name, number in ({"first": None, "again": None} | new).items():
        if number is not None:
            write_shard(args, kind, train, number, args.num_new)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        with ProcessPoolExecutor(1, mp_context=fork) as pool:
            count, read, decoded, held, seconds = pool.submit(command, kind, folder).result()
        rest = [f"{read / size:.3f}", decoded, f"{held:.0f}", f"{seconds:.1f}"]
        yield [kind, name, count, f"{size:.1f}", f"{read:.1f}", *rest]


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    make_transform()  # the processes to come find imported what it imports
    datasets.disable_progress_bars()
    (writer := csv.writer(sys.stdout, lineterminator="\n")).writerow(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DASH_CACHE"] = datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
        for number, kind in enumerate(args.kinds):
            writer.writerows(measure(args, kind, Path(folder) / f"{number}"))


if __name__ == "__main__":
    main()
