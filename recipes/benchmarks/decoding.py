"""What an image costs on each way from a file to a normalized batch, side by side in one run.

Launch:  OMP_NUM_THREADS=1 python recipes/benchmarks/decoding.py
         OMP_NUM_THREADS=1 python recipes/benchmarks/decoding.py --size 32 --image_size 32

JPEGs of smooth noise, shuffled, resized by Pillow, in batches of normalized floats: the same work,
and Pillow's decoding alone. CPU-ms an image in the second epoch: medians of repeats in which the
ways take turns, each in a process of its own. webdataset and simplejpeg where installed.
"""

import csv
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

import hf_dash

NAMES, BATCH, OPTIONAL = ["cat", "dog"], 64, ("webdataset", "simplejpeg")


@dataclass
class Arguments:
    num_images: int = 1000
    size: int = 256
    image_size: int = 224
    repeats: int = 5
    output: str | None = None


class Ways:
    """The ways from a folder of JPEGs to batches."""

    def __init__(self, args, folder):
        self.args, self.parquet, self.tar = args, folder / "a.parquet", folder / "a.tar"
        model = hf_dash.create_model("test_resnet", label_names=NAMES, image_size=args.image_size)
        self.ours = hf_dash.models.image_transform(model)
        config = timm.data.resolve_data_config(model.config.pretrained_cfg)
        self.theirs = timm.data.create_transform(**config)

    def write(self):
        rows, features = [], Features({"image": Image(), "label": ClassLabel(names=NAMES)})
        for number in range(self.args.num_images):
            coarse = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            image, file = PILImage.fromarray(coarse).resize([self.args.size] * 2), io.BytesIO()
            image.save(file, "JPEG", quality=90)
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": number % 2})
        Dataset.from_list(rows, features=features).to_parquet(self.parquet)

    def read(self, streaming=False):
        return load_dataset("parquet", data_files=str(self.parquet), streaming=streaming)["train"]

    def hf_dash(self, *options):
        kept = "kept" in options
        if "streaming" in options:
            arrival = hf_dash.data.StreamedImages(self.read(True), self.ours, cache=kept)
        else:
            arrival = hf_dash.data.ImageExamples(self.read(), self.ours, in_memory=kept)
        return hf_dash.data.train_batches(hf_dash.Round(1, (arrival,)), BATCH, seed=0)

    def datasets(self, *options):
        def transformed(rows):
            return {"pixel_values": [*map(self.theirs, rows["image"])], "labels": rows["label"]}

        if "streaming" not in options:
            return DataLoader(self.read().with_transform(transformed), BATCH, shuffle=True)
        rows = self.read(True).shuffle(seed=0, buffer_size=1000)
        return DataLoader(rows.map(transformed, batched=True, remove_columns=["image"]), BATCH)

    def webdataset(self):
        library = import_module("webdataset")
        with library.TarWriter(str(self.tar)) as tar:
            for number, content in enumerate(self.contents()):
                tar.write({"__key__": f"{number:06}", "jpg": content, "cls": number % 2})
        rows = library.WebDataset(str(self.tar), shardshuffle=False).shuffle(1000).decode("pil")
        return DataLoader(rows.to_tuple("jpg", "cls").map_tuple(self.theirs, int), BATCH)

    def contents(self):
        images = self.read().cast_column("image", Image(decode=False))["image"]
        return [image["bytes"] for image in images]

    def by_batch(self, pixels_of):
        numbers, normalize = range(self.args.num_images), self.ours.normalize
        return DataLoader(numbers, BATCH, True, collate_fn=lambda rows: normalize(pixels_of(rows)))

    def simplejpeg(self):
        decode, contents = import_module("simplejpeg").decode_jpeg, self.contents()
        pixels_of = lambda row: self.ours.pixels(PILImage.fromarray(decode(contents[row])))  # noqa: E731
        return self.by_batch(lambda rows: torch.stack([*map(pixels_of, rows)]))

    def bytes_in_memory(self):
        kept = torch.stack([self.ours.pixels(image) for image in self.read()["image"]])
        return self.by_batch(lambda rows: kept[rows])

    def pillow_alone(self):
        files = [*map(io.BytesIO, self.contents())]
        return DataLoader(files, collate_fn=lambda rows: PILImage.open(rows[0]).load())


WAYS = ["pillow_alone", "hf_dash", "hf_dash, streaming", "datasets", "datasets, streaming"]
WAYS += ["webdataset", "simplejpeg", "hf_dash, kept", "hf_dash, streaming, kept", "bytes_in_memory"]


def measure(way, ways):
    """Return the CPU-ms of an image in the second epoch."""
    torch.set_num_threads(1)
    kind, *options = way.split(", ")
    batches = getattr(ways, kind)(*options)
    for _ in range(2):
        start = time.process_time()
        for batch in batches:
            if hasattr(batch, "keys"):
                batch["pixel_values"]  # normalizes
    return 1e3 * (time.process_time() - start) / ways.args.num_images


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    names = [way for way in WAYS if way not in OPTIONAL or util.find_spec(way)]
    runs = {way: [] for way in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DASH_CACHE"] = folder
        (ways := Ways(args, Path(folder))).write()
        for _ in range(args.repeats):
            for way in names:
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    runs[way].append(pool.apply(measure, (way, ways)))
    rows = [["way", "CPU-ms per image", "lowest", "highest"]]
    for way, cpu in runs.items():
        rows.append([way, *(f"{n:.3f}" for n in (statistics.median(cpu), min(cpu), max(cpu)))])
    with open(args.output, "w", newline="") if args.output else sys.stdout as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
