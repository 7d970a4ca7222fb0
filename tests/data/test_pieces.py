import io
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from helpers import as_tensor, heard, numbered, png, write_parquet
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from hf_dash import DashConfig, DataConfig, Round, load_images
from hf_dash.data import (
    StreamedImages,
    StreamLoader,
    gradient_batches,
    load_arrival,
    load_schedules,
    round_schedule,
)
from hf_dash.data.columns import fingerprint, stored_bytes
from hf_dash.data.pieces import drawn, members, row_groups, runs_of, together
from hf_dash.data.shares import sources_of
from hf_dash.data.stream_loader import cut_batches
from hf_dash.data.streams import FileBlock
from hf_dash.trainer.batches import training_batches

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TEN = ClassLabel(names=[str(digit) for digit in range(10)])

ALL = ["parquet", "tar", "tar.gz", "folder", "saved"]
# A copy of a compressed archive is read as any tar file.
KINDS = pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "tar.gz"])
SIZE = 64  # images of noise, 4 KB each
NUM_IMAGES, GROUP = 240, 20


def level(image):
    """What tells the images apart."""
    return torch.tensor([float(image.getpixel((0, 0)))])


def noise(number):
    """An image of noise that is as large as its pixels, and tells its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    pixels[0, 0] = number
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write(kind, root, numbers, per_class):
    """Write one shard; return its path."""
    images = [noise(number) for number in numbers]
    labels = [number // per_class for number in numbers]
    features = Features({"image": Image(), "label": TEN})
    rows = {"image": [{"bytes": data, "path": None} for data in images], "label": labels}
    path = root / (f"a.{kind}" if kind in ("parquet", "tar", "tar.gz") else "a")
    if kind == "parquet":
        Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=GROUP)
    if kind == "saved":
        Dataset.from_dict(rows, features=features).save_to_disk(path)
    if kind == "folder":
        for number, data, label in zip(numbers, images, labels, strict=True):
            file = path / str(label) / f"{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    if kind.startswith("tar"):
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for number, data, label in zip(numbers, images, labels, strict=True):
                for end, content in (("png", data), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:04}.{end}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """One shard of each kind, sorted by class, and the size of its images."""
    folder = tmp_path_factory.mktemp("shards")
    roots = {kind: folder / kind for kind in ALL}
    for kind, root in roots.items():
        for place in (root, folder / f"{kind}_held_out"):
            place.mkdir()
        write(kind, root, range(NUM_IMAGES), NUM_IMAGES // 10)
        write(kind, place, [250, 251], 1000)
    return roots, sum(len(noise(number)) for number in range(NUM_IMAGES))


def config(kind, root, **settings):
    columns = (
        {"image_column_name": "png", "label_column_name": "cls"} if kind.startswith("tar") else {}
    )
    (shard,) = root.iterdir()
    (held_out,) = (root.parent / f"{kind}_held_out").iterdir()
    return DataConfig(
        str(shard),
        test_dataset_name=str(held_out),
        streaming=True,
        cache_images=False,
        **columns,
        **settings,
    )


def arrival_of(kind, root):
    settings = config(kind, root)
    return load_arrival([settings.dataset_name], settings, root=root).examples(level)


def bytes_read(function):
    """Return what a function returns, and how many bytes this process read meanwhile."""
    before = psutil.Process().io_counters().read_chars
    result = function()
    return result, psutil.Process().io_counters().read_chars - before


def numbers_in(batches):
    return [int(pixels[0]) for batch in batches for pixels in batch["pixel_values"]]


@KINDS
def test_an_epoch_reads_every_file_once_for_any_number_of_readers(shards, kind):
    roots, size = shards
    arrival = arrival_of(kind, roots[kind])
    # Twelve row groups: the two of two processes are read once each, too.
    for num_processes, num_workers in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)):
        sources = [
            source
            for rank in range(num_processes)
            for share in sources_of([arrival], num_processes, rank, num_workers)
            for source in share
        ]
        rows, read = bytes_read(
            lambda own=sources: [
                (stored_bytes(image), label)
                for source in own
                for image, label in source.block.rows(range(source.begin, source.end))
            ]
        )
        assert sum(len(image) for image, _ in rows) == size
        assert Counter(label for _, label in rows) == Counter(arrival.labels)
        assert read <= 1.1 * size
        assert read >= size or kind == "saved"  # which is mapped into memory


@KINDS
def test_the_gradient_pass_reads_the_newest_images_alone(shards, kind):
    roots, size = shards
    arrival = arrival_of(kind, roots[kind])
    batches = gradient_batches(Round(1, (arrival,)), DashConfig(gradient_batch_size=25))
    found, read = bytes_read(lambda: list(batches[-2:]))
    assert numbers_in(found) == list(range(NUM_IMAGES - 50, NUM_IMAGES))
    assert read <= 1.5 * size * 50 / NUM_IMAGES


@KINDS
def test_batches_of_files_hold_each_image_once(shards, kind):
    roots, _ = shards
    arrival = arrival_of(kind, roots[kind])
    for num_workers in (0, 2) if kind == "parquet" else (0,):
        loader = StreamLoader([arrival], 32, seed=0, num_workers=num_workers, buffer_size=60)
        first, second = numbers_in(loader), numbers_in(loader)
        assert sorted(first) == sorted(second) == list(range(NUM_IMAGES))
        assert first != second
        labels = [label for batch in loader for label in batch["labels"].tolist()]
        assert Counter(labels) == Counter(arrival.labels)


@dataclass(frozen=True)
class Numbers:
    """Numbers as images; together, as in a row group, or each alone."""

    first: int
    num_rows: int
    scattered: bool

    def images(self, rows):
        return (self.first + row for row in rows)


def sorted_arrival(begin, end, group=None):
    """An arrival of numbers sorted into ten classes: files, or row groups of this size."""
    labels = (np.arange(end - begin) * 10 // (end - begin)).astype(np.int64)
    bounds = [(begin, end)] if group is None else [(n, n + group) for n in range(begin, end, group)]
    blocks = []
    for first, last in bounds:
        piece = Numbers(first, last - first, scattered=group is None)
        own = labels[first - begin : last - begin]
        blocks.append(FileBlock(piece, np.arange(last - first), own))
    stream = numbered(begin, end).cast_column("label", TEN).to_iterable_dataset()
    return StreamedImages(stream, as_tensor, blocks=blocks)


@pytest.mark.parametrize("group", [None, 50])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_new_images_come_in_proportion_and_all_classes_in_each_batch(group, num_workers):
    arrivals = [sorted_arrival(0, 3000, group), sorted_arrival(3000, 3600, group)]
    loader = StreamLoader(arrivals, 64, seed=0, num_workers=num_workers, buffer_size=2000)
    # Workers in turn, as a DataLoader has them, in this process.
    reader = loader._reader
    chunks = [list(reader.chunks(worker)) for worker in range(num_workers)]
    parts = ((c["pixel_values"], c["labels"]) for turn in zip(*chunks, strict=True) for c in turn)
    batches = list(cut_batches(parts, loader._sizes))
    share, size = 600 / 3600, len(batches[0]["labels"])
    new = [float((batch["pixel_values"] >= 3000).float().mean()) for batch in batches]
    assert np.std(new) <= 1.5 * (share * (1 - share) / size) ** 0.5
    classes = [len(set(batch["labels"].tolist())) for batch in batches]
    assert min(classes) >= 9


@pytest.mark.parametrize("kind", ALL)
def test_one_dataset_is_cut_by_parts_that_are_read_as_needed(shards, kind):
    roots, size = shards

    def schedules(seeds):
        return load_schedules(config(kind, roots[kind]), seeds, 3, 70, [])

    (one, other), (again,) = schedules([0, 1]), schedules([0])
    found, read = bytes_read(
        lambda: [[row["image"].getpixel((0, 0)) for row in a.dataset] for a in one.arrivals]
    )
    assert [len(numbers) for numbers in found] == [70, 70, 70]
    assert len({number for numbers in found for number in numbers}) == 210
    # A row group that two rounds share is read by both.
    assert read <= 1.4 * size
    for arrival in one.arrivals:
        assert arrival.fingerprint == fingerprint(arrival.dataset)
    ids = [[a.survey.example_ids.tolist() for a in s.arrivals] for s in (one, other, again)]
    assert ids[0] == ids[2] != ids[1]
    if kind != "parquet":
        whole = np.random.default_rng(0).permutation(NUM_IMAGES)[:210]
        assert np.concatenate(ids[0]).tolist() == whole.tolist()  # as of map-style data
    with pytest.raises(ValueError, match="num_examples is 300, but the dataset holds only 240"):
        load_schedules(config(kind, roots[kind]), [0], 3, 100, [])


def test_row_groups_sorted_by_class_are_warned_of(shards):
    roots, _ = shards
    with heard() as lines:
        load_schedules(config("parquet", roots["parquet"]), [0], 2, None, [])
    assert any(re.search(r"round 1 lacks \d of 10 classes: row groups", line) for line in lines)
    with heard() as lines:
        load_schedules(config("folder", roots["folder"]), [0], 2, None, [])
    assert not any("lacks" in line for line in lines)


@KINDS
def test_at_most_so_many_images_are_drawn_of_all(shards, kind):
    roots, _ = shards
    settings = config(kind, roots[kind], max_train_samples=60)
    for schedule in (load_schedules(settings, [0], 2, None, [])[0], round_schedule(settings)):
        ids = np.concatenate([arrival.survey.example_ids for arrival in schedule.arrivals])
        assert len(set(ids.tolist())) == len(ids) == 60
        (arrival, *_) = schedule.arrivals
        rows = [row["image"].getpixel((0, 0)) for row in arrival.dataset]
        assert rows == arrival.survey.example_ids.tolist()


@pytest.mark.parametrize("kind", ["folder", "saved"])
def test_the_callback_draws_across_a_folder_sorted_by_class(shards, kind):
    roots, _ = shards
    path = roots[kind] / "a"
    stream = load_images(str(path), streaming=True)
    rank = SimpleNamespace(process_index=0, world_size=1, remove_unused_columns=False)
    loader = DataLoader(stream, batch_size=32, collate_fn=list)
    batches = list(training_batches(loader, rank, 2))
    assert [len({row["label"] for row in batch}) for batch in batches] == [10, 10]


def test_a_row_group_is_never_read_twice_for_an_order(tmp_path):
    contents = [png(number) for number in range(10)]
    write_parquet(tmp_path / "a.parquet", contents, [0] * 10)
    pieces = (*row_groups(tmp_path / "a.parquet", "image"),) * 3
    ids = drawn(pieces, np.arange(30), seed=0)
    assert sorted(ids.tolist()) == list(range(30))
    assert [sorted(run.rows.tolist()) for run in runs_of(pieces, ids)] == [list(range(10))] * 3
    with pytest.raises(ValueError, match="the shards hold 30 rows, but row 30 is wanted"):
        runs_of(pieces, np.array([3, 30]))


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_members_are_those_that_datasets_reads(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("folder"))
        for name in ("folder/0.png", "folder/0.cls", "1.cls", "folder/.hidden.png", "__x.png"):
            add(archive, name, name.encode() + bytes(600))
        add(archive, "x" * 120 + "2.seg.png", b"other field")
        add(archive, "x" * 120 + "2.png", b"long name")
    found = members(path, "png")
    # The archive's rows by hand; 1 has no image, and hidden files are none.
    assert found.num_rows == 3
    assert found.offsets[1] == -1
    images = [image["bytes"][:12] for image in found.images([2, 0])]
    assert images == [b"long name", b"folder/0.png"]
    assert members(path, "png.gz") is None
    assert members(tmp_path / "a.tar.gz", "png") is None


def test_rows_of_several_files_in_any_order_are_one_block():
    """A block for each row would take minutes for a million of them."""
    pieces = together([Numbers(0, 5, True), Numbers(5, 2, True), Numbers(7, 200, True)])
    order = np.random.default_rng(0).permutation(207)
    (run,) = runs_of(pieces, order)
    assert (run.piece, run.first, run.rows.tolist()) == (0, 0, order.tolist())
    assert list(pieces[0].images(order.tolist())) == order.tolist()
    assert list(pieces[0].images([])) == []
    assert (pieces[0].num_rows, pieces[0].scattered) == (207, True)
    # Row groups are read as they are, one after the other.
    groups = [Numbers(0, 5, False), Numbers(5, 2, False)]
    assert together(groups) == tuple(groups)


def test_several_archives_are_cut_and_read_as_one(tmp_path):
    for day, numbers in (("monday", range(20)), ("tuesday", range(20, 50))):
        (tmp_path / day).mkdir()
        write("tar", tmp_path / day, numbers, 5).rename(tmp_path / f"{day}.tar")
    settings = DataConfig(
        str(tmp_path / "*.tar"),
        test_dataset_name="digits",
        streaming=True,
        image_column_name="png",
        label_column_name="cls",
        allow_disjoint_classes=True,
    )
    shards = [tmp_path / "monday.tar", tmp_path / "tuesday.tar"]
    whole = load_arrival(shards, settings, root=tmp_path)
    order = np.random.default_rng(0).permutation(50)[:31]
    part = whole.with_ids(order)
    assert len(part.blocks()) == 1
    assert [stored_bytes(image) for image, _ in part.examples(level).rows()] == [
        noise(number) for number in order.tolist()
    ]
    assert [row["label"] for row in part.dataset] == [number // 5 for number in order.tolist()]
