"""Shards that appear in a directory over time.

Flow: a directory or a glob → shards in the order of their names → those not seen before → each one
loaded (a parquet file, a tar file or a folder of images) and read once for its labels and corrupt
images → one ``Arrival`` with the columns ``image``, ``label`` and ``example_id``, labels merged by
name, corrupt images left out, and a fingerprint of its content.
Source: the loaders of ``datasets`` (parquet, webdataset, imagefolder), one call per shard.
Differs from one ``load_dataset`` over all files: shards may have different labels, errors name the
shard and the row, and examples keep their ids if one is left out, streamed or not.
"""

import glob
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from pyarrow.parquet import ParquetFile

from hf_dash.data.columns import (
    BATCH_SIZE,
    AnyDataset,
    fingerprint,
    label_kind,
    label_names,
    map_columns,
    standard_columns,
    stored_bytes,
)
from hf_dash.data.sources import LOADERS, DataConfig

# Bytes of the two empty blocks that end a tar file.
TAR_END = 1024

# What the loaders raise if a file is not what its name says; Arrow's own errors derive from the
# built-in ones.
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
        name: path below the root.
        dataset: with standard columns.
        types: types of the source's two columns.
        labels: labels of all rows, in the dataset's indices.
        bad: rows with corrupt images.
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
    """Return the loader of ``datasets`` for a shard; None if the path is not a shard."""
    return "imagefolder" if path.is_dir() else LOADERS.get(path.suffix.lower())


def load_shard(path: Path, name: str, config: DataConfig) -> Shard:
    """Open a shard; its rows are not read yet, except if labels have no names.

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
            # ``datasets`` refuses to prepare an empty file, but its stream knows the columns.
            stream = load_dataset(kind, data_files=files, split="train", streaming=True)
            return Dataset.from_dict(
                {name: [] for name in stream.features}, features=stream.features
            )
        return load_dataset(kind, data_files=files, split="train", streaming=streaming)
    suffixes = PILImage.registered_extensions()
    loose = [file.name for file in path.iterdir() if file.suffix.lower() in suffixes]
    if loose and not list(path.glob("metadata.*")):
        raise ValueError(f"images must be in class folders, but {loose[0]!r} is not in one")
    files = {"train": glob.escape(str(path)) + "/**"}
    # Without drop_labels=False a single class would have no label. Only paths are prepared, so a
    # stream from ``datasets``, with one shard per image, would save nothing.
    dataset = load_dataset("imagefolder", data_files=files, split="train", drop_labels=False)
    return dataset.to_iterable_dataset() if streaming else dataset


def _check_tar_end(path: Path) -> None:
    # An archive ends in two empty blocks. Readers do not notice one cut off between two members.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAR_END))
        if file.read() != bytes(TAR_END):
            raise ValueError("the archive has no end: it was cut off or is still being written")


def check_schema(
    name: str, types: Mapping[str, str], first_name: str, first: Mapping[str, str]
) -> None:
    """Raise a ``ValueError`` if a column has another type than in the first shard."""
    for column, type_ in types.items():
        if type_ != first[column]:
            raise ValueError(
                f"{name}: column {column!r} holds {type_}, but {first[column]} in {first_name}"
            )


def survey(shard: Shard, config: DataConfig, known: frozenset[int] | None) -> Shard:
    """Read a shard once for its labels and, unless they are known, its corrupt images.

    Raises:
        ValueError: the shard cannot be read; an image is corrupt and ``on_bad_example`` is
            ``"error"``; an example has no label; a known row does not exist.
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
        # From bytes: given a path, the library leaves the file of a corrupt image open.
        image.decode_example({"bytes": stored_bytes(value), "path": None}).load()
    except Exception as error:  # a decoder may raise anything for a broken file
        return f"{type(error).__name__}: {error}"
    return None


def numbered_examples(
    shard: Shard, features: Features, label_ids: list[int], first_id: int
) -> AnyDataset:
    """Return the good examples of a surveyed shard, numbered from ``first_id`` over all rows.

    Args:
        shard: from :func:`survey`.
        features: features of the result.
        label_ids: the result's index for each of the shard's classes.
        first_id: id of the shard's first row.
    """
    if not isinstance(shard.dataset, Dataset):
        settings = {"first_id": first_id, "label_ids": label_ids, "bad": shard.bad}
        encoded = shard.dataset.cast_column("image", Image(decode=False))
        return map_columns(encoded, _number_rows, features, with_indices=True, fn_kwargs=settings)
    rows = np.arange(len(shard.labels))
    # A row that is left out may have no label.
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


TEMPORARY_SUFFIXES = (".tmp", ".part", ".crdownload")


@dataclass(frozen=True)
class Arrival:
    """One round's new shards as one dataset.

    Args:
        files: names of the shards below the root, oldest first.
        dataset: with the columns ``image``, ``label`` (``ClassLabel``) and ``example_id`` (int64):
            the example's position over the shards of this arrival, counted from 0 and including
            skipped ones, so that it never changes. An ``IterableDataset`` if streamed.
        num_examples: number of examples in ``dataset``; None for a stream not counted yet.
        skipped: corrupt images left out, as ``"monday.parquet:17"``: shard and row, from 0.
        fingerprint: of ``dataset``, see ``hf_dash.data.columns.fingerprint``; None if not computed
            yet.
        types: types of the source's two columns.

    Example:
        >>> import hf_dash
        >>> digits = hf_dash.load_images("digits", split="test")
        >>> hf_dash.data.Arrival(files=(), dataset=digits, num_examples=len(digits)).num_examples
        360
    """

    files: tuple[str, ...]
    dataset: AnyDataset
    num_examples: int | None
    skipped: tuple[str, ...] = ()
    fingerprint: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)


class EmptyArrivalError(ValueError):
    """An arrival does not hold any example."""


def arrivals_root(pattern: str) -> Path:
    """Return the directory that shard names are relative to: the pattern's part before any glob."""
    path = Path(pattern)
    if path.is_dir():
        return path
    fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    return Path(*fixed) if len(fixed) < len(path.parts) else path.parent


def list_arrivals(pattern: str) -> list[Path]:
    """List the shards that have arrived, in the order of their names.

    Args:
        pattern: a directory whose parquet files, webdataset ``.tar`` files or subfolders (each an
            imagefolder with one folder per class) are the shards, or a glob of them. Names that
            start with ``.`` or ``_`` or end in ``.tmp``, ``.part`` or ``.crdownload`` are ignored,
            because they are still being written. Names sort as text: ``day-10`` before ``day-9``.

    Raises:
        ValueError: nothing matches, shards of several kinds match, or one contains another.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import hf_dash
        >>> with TemporaryDirectory() as folder:
        ...     (Path(folder) / "tuesday.parquet").touch()
        ...     (Path(folder) / "monday.parquet").touch()
        ...     [shard.name for shard in hf_dash.data.list_arrivals(folder)]
        ['monday.parquet', 'tuesday.parquet']
    """
    shards = _find(pattern)
    if not shards:
        raise ValueError(f"no parquet file, tar file or folder of images matches {pattern!r}")
    kinds = {shard_kind(path): path.name for path in shards}
    if len(kinds) > 1:
        raise ValueError(f"{pattern!r} must match shards of one kind, got {kinds}")
    for path in shards:
        if set(path.parents) & set(shards):
            raise ValueError(f"{pattern!r} must not match {path}, which is inside another match")
    return shards


def _find(pattern: str) -> list[Path]:
    root = arrivals_root(pattern)
    is_directory = Path(pattern).is_dir()
    matches = list(root.iterdir()) if is_directory else glob.glob(pattern, recursive=True)
    shards = {_name(Path(match), root): Path(match) for match in matches}
    return [
        shards[name] for name in sorted(shards) if shard_kind(shards[name]) and not _is_hidden(name)
    ]


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/")) or name.lower().endswith(
        TEMPORARY_SUFFIXES
    )


def _name(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"root must be a folder above {path}, got {root}") from error


def new_arrivals(pattern: str, seen: Sequence[str]) -> list[Path]:
    """List the shards that no earlier round has seen, in the order of their names.

    Args:
        pattern: see :func:`list_arrivals`.
        seen: names of the shards of earlier rounds, as in ``Arrival.files``: relative to
            :func:`arrivals_root`, with forward slashes.

    Returns:
        The new shards; an empty list if there are none.

    Raises:
        ValueError: a seen shard has disappeared; or see :func:`list_arrivals`.
    """
    root = arrivals_root(pattern)
    shards = {_name(path, root): path for path in _find(pattern)}
    gone = [name for name in seen if name not in shards]
    if gone:
        raise ValueError(f"shards of earlier rounds have disappeared from {root}: {gone}")
    return [path for path in list_arrivals(pattern) if _name(path, root) not in set(seen)]


def load_arrival(
    files: Sequence[Path],
    config: DataConfig,
    *,
    root: str | Path,
    skip: Sequence[str] | None = None,
) -> Arrival:
    """Load new shards as one arrival.

    Every image is decoded once to find corrupt ones, unless ``skip`` lists them; this costs about
    as much as an epoch of reading. Labels without names are read once more, and the encoded images
    once for the fingerprint. Only the labels stay in memory.

    Args:
        files: shards of one kind, oldest first; see :func:`list_arrivals`.
        config: columns, image mode, streaming and what to do about corrupt images.
        root: directory that shard names are relative to.
        skip: corrupt images from an earlier ``Arrival.skipped`` of the same shards.

    Returns:
        The arrival. Labels are merged by name: its classes are those of all shards, in the order
        in which they first appear.

    Raises:
        ValueError: a shard cannot be read, lacks a column, or has other column types than the
            first; an image is corrupt and ``config.on_bad_example`` is ``"error"``; an example has
            no label; ``skip`` lists a row that does not exist; no example is left.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hf_dash
        >>> digits = hf_dash.load_images("digits", split="test").select(range(20))
        >>> with TemporaryDirectory() as folder:
        ...     _ = digits.to_parquet(f"{folder}/monday.parquet")
        ...     shards = hf_dash.data.list_arrivals(folder)
        ...     arrival = hf_dash.data.load_arrival(shards, hf_dash.DataConfig(), root=folder)
        >>> arrival.files, arrival.num_examples
        (('monday.parquet',), 20)
    """
    names = [_name(Path(file), Path(root)) for file in files]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"files must name at least one shard, and none twice, got {names}")
    known = None if skip is None else _rows_by_shard(skip, names)
    shards: list[Shard] = []
    for file, name in zip(files, names, strict=True):
        shard = load_shard(Path(file), name, config)
        first = shards[0] if shards else shard
        check_schema(name, shard.types, first.name, first.types)
        shards.append(survey(shard, config, None if known is None else known[name]))
    dataset = _merge(shards)
    skipped = tuple(f"{shard.name}:{row}" for shard in shards for row in sorted(shard.bad))
    num_examples = sum(len(shard.labels) - len(shard.bad) for shard in shards)
    if num_examples == 0:
        raise EmptyArrivalError(f"{names} hold no example, {len(skipped)} skipped")
    types = shards[0].types
    return Arrival(tuple(names), dataset, num_examples, skipped, fingerprint(dataset), types)


def _rows_by_shard(skip: Sequence[str], names: Sequence[str]) -> dict[str, frozenset[int]]:
    rows: dict[str, set[int]] = {name: set() for name in names}
    for entry in skip:
        name, _, row = entry.rpartition(":")
        if name not in rows or not row.isdecimal():
            raise ValueError(f"skip must name rows of {list(names)}, got {entry!r}")
        rows[name].add(int(row))
    return {name: frozenset(found) for name, found in rows.items()}


def _merge(shards: Sequence[Shard]) -> AnyDataset:
    """Concatenate shards; match labels by name and leave corrupt images out."""
    names = list(dict.fromkeys(n for shard in shards for n in label_names(shard.dataset)))
    features = Features(
        {
            "image": Image(mode=shards[0].dataset.features["image"].mode),
            "label": ClassLabel(names=names),
            "example_id": Value("int64"),
        }
    )
    parts, first_id = [], 0
    for shard in shards:
        label_ids = [names.index(name) for name in label_names(shard.dataset)]
        parts.append(numbered_examples(shard, features, label_ids, first_id))
        first_id += len(shard.labels)
    merged: AnyDataset = concatenate_datasets(parts)
    return merged
