"""What streams read, and how well they mix: counts, ours beside plain ``datasets``.

Launch:  python recipes/benchmarks/stream_counts.py

JPEGs of noise in ten classes, sorted by class, in two arrivals, the fifth that is new and the rest;
as parquet files and as folders; by our loader, and by a ``RoundTrainer``'s. For each number of
workers: MB read in an epoch, by all workers; the standard deviation of the share of new images in a
batch, 1 being that of a full shuffle; classes in a batch, on average and at least. Then MB read for
the newest images, as the gradient pass needs them. Both also as a multiple of what they hold.
"""

import csv
import io
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import DataLoader, get_worker_info
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import HfArgumentParser, TrainingArguments

import hf_dash

NAMES = list("0123456789")
HEADER = ["way", "files", "workers", "MB an epoch", "of the images", "sd of new share"]
HEADER += ["classes a batch", "lowest", "MB of the newest", "of those images"]


@dataclass
class Arguments:
    num_images: int = 8000
    size: int = 128
    batch_size: int = 64
    newest: int = 2560
    workers: list[int] = field(default_factory=lambda: [1, 2, 4])


def write_images(args, folder):
    """Write both arrivals both ways; return the sizes of all images, oldest first."""
    generator, sizes = np.random.default_rng(0), []
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    new = args.num_images // 5
    for name, count in (("old", args.num_images - new), ("new", new)):
        rows = {"image": [], "label": [number * 10 // count for number in range(count)]}
        for number, label in enumerate(rows["label"]):
            # The first pixels tell whether an image is new.
            pixels = generator.integers(0, 256, (args.size, args.size, 3), dtype=np.uint8)
            pixels[:32, :32] = 255 if name == "new" else 0
            PILImage.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=75)
            content = buffer.getvalue()
            path = folder / "folder" / name / str(label) / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            sizes.append(path.write_bytes(content))
            rows["image"].append({"bytes": content, "path": None})
        (path := folder / "parquet" / f"{name}.parquet").parent.mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=100)
    return np.array(sizes)


bytes_read = lambda: psutil.Process().io_counters().read_chars  # noqa: E731


class Counted:
    """A transform that notes what its process has read so far."""

    def __init__(self):
        self.read = multiprocessing.Array("q", 64)

    def __call__(self, image):
        if info := get_worker_info():
            self.read[info.id] = bytes_read()
        return pil_to_tensor(image.crop((0, 0, 8, 8)))


def arrivals_of(folder, kind, transform):
    """Return the arrivals as the recipes open them with ``--streaming``."""
    paths = sorted((folder / kind).iterdir(), reverse=True)  # old, new
    config, load = hf_dash.DataConfig(str(paths[0]), streaming=True), hf_dash.data.load_arrival
    return tuple(load([p], config, root=p.parent).examples(transform) for p in paths)


def plain_stream(folder, kind, transform):
    """Return the same images as one stream of ``datasets``."""
    pattern, loader = ("*.parquet", "parquet") if kind == "parquet" else ("*/*/*", "imagefolder")
    files = sorted(map(str, (folder / kind).glob(pattern)), key=lambda p: ("/new" in p, p))
    stream = load_dataset(loader, data_files=files, streaming=True, split="train")
    named = lambda row: {"pixel_values": transform(row["image"]), "labels": int(row["label"])}  # noqa: E731
    return stream.map(named, remove_columns=["image", "label"])


def mixing(batches, args):
    """Return the spread of the share of new images, and the numbers of classes, of batches."""
    batches = [batch for batch in batches if len(batch["labels"]) >= args.batch_size - 1]
    new = [float((b["pixel_values"][:, 0, 4, 4] > 128).float().mean()) for b in batches]
    classes = [len(set(batch["labels"].tolist())) for batch in batches]
    full_shuffle = (np.mean(new) * (1 - np.mean(new)) / args.batch_size) ** 0.5
    return [f"{np.std(new) / full_shuffle:.2f}", f"{np.mean(classes):.1f}", min(classes)]


def loader_of(way, round_, workers, folder, args):
    if way == "hf_dash":
        return hf_dash.data.train_batches(round_, args.batch_size, seed=0, num_workers=workers)
    options = {"per_device_train_batch_size": args.batch_size, "report_to": "none"}
    training = TrainingArguments(folder / "run", dataloader_num_workers=workers, **options)
    trainer = hf_dash.trainer.RoundTrainer(torch.nn.Linear(1, 1), training, round_)
    return trainer.get_train_dataloader()


def measure(way, kind, folder, sizes, args):
    for workers in args.workers:
        transform = Counted()
        if way == "datasets":
            stream = plain_stream(folder, kind, transform)
            mixed = stream.shuffle(seed=0, buffer_size=1000)
            loader = DataLoader(mixed, args.batch_size, num_workers=workers)
        else:
            round_ = hf_dash.Round(2, arrivals_of(folder, kind, transform))
            loader = loader_of(way, round_, workers, folder, args)
        row = mixing(list(loader), args)
        read, before = sum(transform.read), bytes_read()
        if way == "datasets":
            list(stream.skip(args.num_images - args.newest))
        else:
            config = hf_dash.DashConfig(gradient_batch_size=args.newest)
            next(iter(hf_dash.data.gradient_batches(round_, config)[-1:]))
        counts = (read, sizes.sum()), (bytes_read() - before, sizes[-args.newest :].sum())
        epoch, newest = ([f"{n / 1e6:.1f}", f"{n / size:.2f}"] for n, size in counts)
        yield [way, kind, workers, *epoch, *row, *newest]


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows, ways = [HEADER], ("datasets", "hf_dash", "hf_dash, Trainer")
    with tempfile.TemporaryDirectory() as name:
        sizes = write_images(args, Path(name))
        for kind, way in product(("parquet", "folder"), ways):
            rows += measure(way, kind, Path(name), sizes, args)
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
