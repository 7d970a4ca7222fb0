"""One shard of an arrival: loaded, read through once, its examples numbered.

Flow: a parquet file, a tar file or a folder of images → the library's loader → standard columns →
all labels and the corrupt images, found in one reading → examples with ids, corrupt ones left out.
"""

import glob
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from pyarrow.parquet import ParquetFile

from hf_dash.arrivals import LOADERS, DataConfig
from hf_dash.columns import (
    BATCH_SIZE,
    AnyDataset,
    label_kind,
    label_names,
    map_columns,
    standard_columns,
    stored_bytes,
)

# Bytes of the two empty blocks that end a tar file.
TAR_END = 1024
# What the loaders raise where a file is not what its name says; Arrow's own errors derive from
# the built-in ones.
READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    NotImplementedError,
    tarfile.TarError,
    DatasetsError,
)


@dataclass(frozen=True)
class Shard:
    """One shard of an arrival.

    Args:
        name: below the root.
        dataset: of standard columns.
        types: of the source's two columns.
        labels: of all rows, the dataset's own.
        bad: rows that hold corrupt images.
    """

    name: str
    dataset: AnyDataset
    types: dict[str, str]
    labels: list[int | None] = field(default_factory=list)
    bad: frozenset[int] = frozenset()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def shard_kind(path: Path) -> str | None:
    """Return the library's loader for a shard; None for what is no shard."""
    return "imagefolder" if path.is_dir() else LOADERS.get(path.suffix.lower())


def load_shard(path: Path, name: str, config: DataConfig) -> Shard:
    """Open a shard; its rows are not read yet, except where labels have no names.

    Raises:
        ValueError: the shard cannot be read or lacks a column.
    """
    with _reading(name):
        source = _load_source(path, config.streaming)
        dataset = standard_columns(
            source, config.image_column_name, config.label_column_name, config.image_mode
        )
    features = source.features
    record, _, part = config.label_column_name.partition(".")
    label = features.get(config.label_column_name) or features[record][part]
    image = type(features[config.image_column_name]).__name__
    types = {config.image_column_name: image, config.label_column_name: label_kind(label)}
    return Shard(name, dataset, types)


def _load_source(path: Path, streaming: bool) -> AnyDataset:
    kind = shard_kind(path)
    if kind is None:
        raise ValueError(f"a shard must be a folder or end in {' or '.join(LOADERS)}")
    if kind != "imagefolder":
        if kind == "webdataset":
            _check_tar_end(path)
        files = {"train": glob.escape(str(path))}
        if kind == "parquet" and not streaming and ParquetFile(path).metadata.num_rows == 0:
            # The library refuses to prepare nothing; its stream knows the columns all the same.
            stream = load_dataset(kind, data_files=files, split="train", streaming=True)
            return Dataset.from_dict(
                {name: [] for name in stream.features}, features=stream.features
            )
        return load_dataset(kind, data_files=files, split="train", streaming=streaming)
    suffixes = PILImage.registered_extensions()
    loose = [file.name for file in path.iterdir() if file.suffix.lower() in suffixes]
    if loose and not list(path.glob("metadata.*")):
        raise ValueError(f"images must lie in folders of classes, got {loose[0]!r} outside of them")
    files = {"train": glob.escape(str(path)) + "/**"}
    # Without drop_labels=False a single class would have no label. Only paths are prepared, so
    # that a stream of the library's own, with a shard an image, would save nothing.
    dataset = load_dataset("imagefolder", data_files=files, split="train", drop_labels=False)
    return dataset.to_iterable_dataset() if streaming else dataset


def _check_tar_end(path: Path) -> None:
    # An archive ends in two empty blocks; readers take one cut off between two members as whole.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAR_END))
        if file.read() != bytes(TAR_END):
            raise ValueError("the archive has no end: it was cut short or is still being written")


def check_schema(
    name: str, types: Mapping[str, str], first_name: str, first: Mapping[str, str]
) -> None:
    """Raise a ``ValueError`` where a column is of another type than in the first shard."""
    for column, type_ in types.items():
        if type_ != first[column]:
            raise ValueError(
                f"{name}: column {column!r} holds {type_}, but {first[column]} in {first_name}"
            )


def survey(shard: Shard, config: DataConfig, known: frozenset[int] | None) -> Shard:
    """Read a shard once: all its labels, and its corrupt images where they are not known.

    Raises:
        ValueError: it cannot be read; an image is corrupt and none is to be skipped; an example
            has no label; a known row does not exist.
    """
    image = Image(mode=config.image_mode)
    labels: list[int | None] = []
    errors: dict[int, str] = dict.fromkeys(known or (), "known")
    columns = ["label"] if known is not None else ["image", "label"]
    encoded = shard.dataset.cast_column("image", Image(decode=False)).select_columns(columns)
    with _reading(shard.name):
        for batch in encoded.iter(batch_size=BATCH_SIZE):
            for row, value in enumerate(batch.get("image", []), start=len(labels)):
                if error := _decoding_error(image, value):
                    errors[row] = error
            labels += batch["label"]
    if known is None and errors and config.on_bad_example == "error":
        row = min(errors)
        raise ValueError(
            f"{shard.name}:{row} is a corrupt image, one of {len(errors)} in {shard.name}"
            f" ({errors[row]}); on_bad_example='skip' leaves them out"
        )
    if max(errors, default=-1) >= len(labels):
        raise ValueError(
            f"skip must name rows of {shard.name}, which has {len(labels)}, got {max(errors)}"
        )
    num_classes = len(label_names(shard.dataset))
    for row, label in enumerate(labels):
        if row not in errors and (label is None or not 0 <= label < num_classes):
            raise ValueError(f"{shard.name}:{row} has no label among its classes, got {label}")
    return replace(shard, labels=labels, bad=frozenset(errors))


def _decoding_error(image: Image, value: Any) -> str | None:
    try:
        # From bytes: given a path, the library would leave the file of a corrupt image open.
        image.decode_example({"bytes": stored_bytes(value), "path": None}).load()
    except Exception as error:  # a broken file makes decoders fail in any way
        return f"{type(error).__name__}: {error}"
    return None


def numbered_examples(
    shard: Shard, features: Features, label_ids: list[int], first_id: int
) -> AnyDataset:
    """Return the sound examples of a surveyed shard, numbered from ``first_id`` over all rows.

    Args:
        shard: as :func:`survey` returns it.
        features: of the result.
        label_ids: the result's index of every class of the shard.
        first_id: of the shard's first row.
    """
    if not isinstance(shard.dataset, Dataset):
        settings = {"first_id": first_id, "label_ids": label_ids, "bad": shard.bad}
        encoded = shard.dataset.cast_column("image", Image(decode=False))
        return map_columns(encoded, _number_rows, features, with_indices=True, fn_kwargs=settings)
    rows = np.arange(len(shard.labels))
    # The label of a row that is left out may be none at all.
    labels = [0 if r in shard.bad else label_ids[x or 0] for r, x in enumerate(shard.labels)]
    images = shard.dataset.select_columns(["image"]).cast_column("image", features["image"])
    numbered = images.add_column("label", labels, feature=features["label"]).add_column(
        "example_id", first_id + rows
    )
    return numbered.select(np.delete(rows, sorted(shard.bad))) if shard.bad else numbered


def _number_rows(
    columns: dict[str, list[Any]],
    rows: list[int],
    first_id: int,
    label_ids: list[int],
    bad: frozenset[int],
) -> dict[str, list[Any]]:
    kept = [n for n, row in enumerate(rows) if row not in bad]
    return {
        "image": [columns["image"][n] for n in kept],
        "label": [label_ids[columns["label"][n]] for n in kept],
        "example_id": [first_id + rows[n] for n in kept],
    }
