"""How images with some trait are written: functions of a path and of the first image's number.

Each returns the name to give to a recipe. Images of another first number are other images.
"""

import io
import json
import os
import shutil

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from image_files import class_folders, encoded, photo, write_folder, write_tar
from PIL import Image as PILImage

import hf_dash

TWO = ("cat", "dog")


def folders(*, classes=TWO, count=6, end="png", change=None):
    """Class folders, changed by a function of the folder and the first number."""

    def build(path, first):
        class_folders(path, classes, count, first, end)
        if change is not None:
            change(path, first)
        return str(path)

    return build


def add(files):
    """Add files to class folders."""
    return folders(change=lambda path, first: write_folder(path, files))


def replace_one(form, end, convert=None, **options):
    """Store the first cat in another way."""

    def change(path, first):
        (path / "cat" / f"a_{first:03d}.png").unlink()
        image = photo(0, first)
        image = image if convert is None else convert(image)
        (path / "cat" / f"odd.{end}").write_bytes(encoded(image, form, **options))

    return folders(change=change)


def link_a_class(path, first):
    pool = class_folders(path.with_name(f"{path.name}_pool"), ("owl",), 6, first)
    (path / "owl").symlink_to(pool / "owl")


def link_an_image(path, first):
    pool = class_folders(path.with_name(f"{path.name}_pool"), ("cat",), 1, first + 20)
    (path / "cat" / "link.png").symlink_to(next(pool.glob("cat/*")))


def link_each_other(path, first):
    (path / "cat" / "x").symlink_to(path / "dog")
    (path / "dog" / "y").symlink_to(path / "cat")


def rename_by(function):
    def change(path, first):
        for number, file in enumerate(sorted(path.glob("*/*.png"))):
            file.rename(file.with_name(function(number, file)))

    return folders(change=change)


def nested(path, first):
    for place in ("left", "right"):
        class_folders(path / "cat", (place,), 3, first + 10 * (place == "right"))
        class_folders(path / "dog", (place,), 3, first + 20 + 10 * (place == "right"))
    return str(path)


def in_a_folder_called(name):
    return lambda path, first: str(class_folders(path / name, TWO, 6, first))


def described(table, *, missing=False):
    def build(path, first):
        rows = [
            {"file_name": f"{number}.png", "kind": TWO[number % 2]}
            for number in range(12 + missing)
        ]
        files = {f"{n}.png": encoded(photo(n % 2, first + n)) for n in range(12)}
        if table == "metadata.csv":
            text = "file_name,kind\n" + "".join(f"{r['file_name']},{r['kind']}\n" for r in rows)
        else:
            text = "\n".join(json.dumps(row) for row in rows)
        return str(write_folder(path, {**files, table: text.encode()}))

    return build


def split_folders(train, held_out):
    def build(path, first):
        class_folders(path / train, TWO, 6, first)
        class_folders(path / held_out, TWO, 3, first + 300)
        return str(path)

    return build


def table_of(
    labels=(0, 1) * 6,
    feature=None,
    *,
    columns=("image", "label"),
    images=None,
    raw=False,
    name="day.parquet",
    change=None,
):
    """A parquet file of twelve images."""

    def build(path, first):
        path.mkdir(parents=True, exist_ok=True)
        contents = [encoded(photo(n % 2, first + n)) for n in range(len(labels))]
        rows = contents if raw else [{"bytes": content, "path": None} for content in contents]
        for number, value in (images or {}).items():
            rows[number] = value
        kind = Value("binary") if raw else Image()
        features = Features(
            dict(zip(columns, (kind, feature or ClassLabel(names=TWO)), strict=True))
        )
        data = dict(zip(columns, (rows, list(labels)), strict=True))
        Dataset.from_dict(data, features=features).to_parquet(path / name)
        if change is not None:
            change(path / name)
        return str(path / name)

    return build


def cut(lost):
    return lambda path: path.write_bytes(path.read_bytes()[:-lost])


def two_tables(first_names, second_names, files=("a.parquet", "b.parquet")):
    def build(path, first):
        for number, (file, names) in enumerate(
            zip(files, (first_names, second_names), strict=True)
        ):
            labels = [names.index(TWO[n % 2]) for n in range(6)]
            feature = ClassLabel(names=names)
            table_of(labels, feature, name=file)(path, first + 20 * number)
        return str(path)

    return build


def table_and_copy(path, first):
    name = table_of()(path, first)
    shutil.copy(name, path / "copy.parquet")
    return str(path)


def tables_by_split(path, first):
    table_of(name="train-00000-of-00001.parquet")(path, first)
    table_of((0, 1) * 3, name="valid-00000-of-00001.parquet")(path, first + 100)
    return str(path)


def replaced_table(path, first):
    table_of((0,) * 10, ClassLabel(names=["owl"]))(path, first + 200)
    os.utime(path / "day.parquet", (1.7e9, 1.7e9))
    hf_dash.load_images(str(path / "day.parquet"))
    name = table_of()(path, first)
    os.utime(name, (1.7e9, 1.7e9))
    return name


def archive(end="tar", mode="w", *, label="cls", lost=0, without=None):
    """A webdataset of twelve images."""

    def build(path, first):
        members = []
        for n in range(12):
            members.append((f"{n:03d}.png", encoded(photo(n % 2, first + n))))
            text = TWO[n % 2] if label == "txt" else str(n % 2)
            if n != without:
                members.append((f"{n:03d}.{label}", text.encode()))
        write_tar(path / f"day.{end}", members, mode)
        if lost:
            cut(lost)(path / f"day.{end}")
        return str(path / f"day.{end}")

    return build


def saved(path, first):
    name = table_of()(path / "table", first)
    Dataset.from_parquet(name).save_to_disk(path / "saved")
    return str(path / "saved")


def saved_without_its_data(path, first):
    name = saved(path, first)
    next((path / "saved").glob("*.arrow")).unlink()
    return name


def saved_splits(path, first):
    train = Dataset.from_parquet(table_of()(path / "1", first))
    held_out = Dataset.from_parquet(table_of((0, 1) * 3)(path / "2", first + 100))
    DatasetDict({"train": train, "test": held_out}).save_to_disk(path / "saved")
    return str(path / "saved")


def truncated_photo(path, first):
    buffer = io.BytesIO()
    photo(0, first + 90, size=(200, 200)).save(buffer, "JPEG")
    (path / "cat" / "broken photo.jpg").write_bytes(buffer.getvalue()[: buffer.tell() // 2])


def copy_of_the_first(path, first):
    """Held-out images with one that is trained on, whatever its number is here."""
    class_folders(path, TWO, 3, first)
    photo(0, 0).save(path / "cat" / "copy.png")
    return str(path)


def copy_in_another_format(path, first):
    class_folders(path, TWO, 3, first)
    photo(0, 0).save(path / "cat" / "copy.bmp")
    return str(path)


def nothing(path, first):
    return str(path / "missing")


def packed(path, first):
    path.mkdir(parents=True, exist_ok=True)
    (path / "cats.zip").write_bytes(b"PK\x03\x04")
    return str(path / "cats.zip")


DEEP = {
    "16-bit gray PNG": (np.uint16, 30_000, "PNG", "png"),
    "32-bit gray TIFF": (np.int32, 70_000, "TIFF", "tif"),
    "float TIFF": (np.float32, 0.5, "TIFF", "tif"),
}


def deep(kind, value, form, end):
    return replace_one(form, end, lambda image: deep_image(kind, value))


def deep_image(kind, value):
    return PILImage.fromarray(np.full((36, 40), value, dtype=kind))


def deep_photo(name):
    """One of these images as a table holds it."""
    kind, value, form, _ = DEEP[name]
    return {"bytes": encoded(deep_image(kind, value), form), "path": None}
