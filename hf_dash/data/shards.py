"""One file, folder or split of labeled images, opened; several of them as one dataset.

Flow: a parquet file, a tar file, a folder of images or a saved dataset → a ``Shard`` of standard
columns → several shards put together, classes matched by name, every row with an ``example_id``.
Source: the loaders of ``datasets`` (parquet, webdataset), one call per shard.
Differs from one ``load_dataset`` over all files: shards may have different classes, errors name the
shard, and a file that was replaced is never read from the cache.
"""

import glob
import hashlib
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from pyarrow.parquet import ParquetFile

from hf_dash.data.archives import plain_archive
from hf_dash.data.columns import (
    BATCH_SIZE,
    AnyDataset,
    FindValues,
    Reading,
    Values,
    all_names,
    joined,
    label_ids,
    label_kind,
    label_names,
    label_values,
    labeled,
    map_columns,
    matched,
    standard_columns,
    translated,
    undecoded,
)
from hf_dash.data.findings import Earlier
from hf_dash.data.folders import find_images, walk
from hf_dash.data.manifest import (
    Manifest,
    Origin,
    decoded_manifest,
    file_origin,
    find_earlier,
    find_manifest,
    folder_origin,
    keep_manifest,
    read_coded,
)
from hf_dash.data.pieces import (
    Piece,
    RowGroup,
    Rows,
    distinct_values,
    members,
    row_groups,
)
from hf_dash.data.stamps import Stamps, content_stamps

# The loader of ``datasets`` for each kind of file.
LOADERS = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
}

# Shards of a stream whose rows can be read in any order, so that readers see many of them at once.
NUM_SHARDS = 64

# What the loaders raise if a file is not what its name says; Arrow's own errors derive from the
# built-in ones.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    NotImplementedError,
    tarfile.TarError,
    zlib.error,
    DatasetsError,
)


@dataclass(frozen=True)
class Shard:
    """One file, folder or split, opened.

    Args:
        name: for messages and records; a path below the root of its arrival.
        dataset: with the columns ``image`` and ``label``.
        types: types of the source's two columns.
        num_rows: number of rows; None for a stream that has to be read to know.
        paths: for a folder, the path of each image below it.
        left_out: images that could not be loaded, as ``"path (reason)"``.
        stamps: of the files that are read while a model trains.
        pieces: of a stream, all rows in parts that can be read alone; None if there are none, as in
            an archive that cannot be unpacked, and in other files than parquet on the Hub.
        origin: which files these are; None for a shard that is read anew by every command.
        manifest: what an earlier command has found in them, if it is known.
        earlier: what it has found in the images of a folder that are the same, if others are not.
        values: integer or text labels of the source, sorted, if its labels are not class labels.
    """

    name: str
    dataset: AnyDataset
    types: Mapping[str, str]
    num_rows: int | None = None
    paths: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()
    stamps: Stamps = field(default_factory=dict)
    pieces: tuple[Piece, ...] | None = None
    origin: Origin | None = None
    manifest: Manifest | None = None
    earlier: Earlier | None = None
    values: Values | None = None

    @property
    def rows(self) -> Dataset | None:
        """All rows, if any of them can be taken; None of others."""
        (piece, *_) = self.pieces or [None]
        if isinstance(piece, Rows):
            return piece.dataset
        return self.dataset if isinstance(self.dataset, Dataset) else None

    def count(self) -> int:
        """Return the number of rows; reads a stream of unknown length."""
        if self.num_rows is not None:
            return self.num_rows
        with reading(self.name):
            batches = self.dataset.select_columns(["label"]).iter(BATCH_SIZE)
            return sum(len(batch["label"]) for batch in batches)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Name the shard in errors of the loaders."""
    try:
        yield
    except READ_ERRORS as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def loader_of(name: str) -> str | None:
    """Return the loader of ``datasets`` for a file of this name, or None."""
    return next((kind for end, kind in LOADERS.items() if name.lower().endswith(end)), None)


def is_saved(path: Path) -> bool:
    """Check whether a folder was written by ``save_to_disk``."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def shard_kind(path: Path) -> str | None:
    """Return what kind of shard a path is; None if it is not a shard."""
    if path.is_dir():
        return "saved dataset" if is_saved(path) else "folder of images"
    return loader_of(path.name)


def open_shard(path: Path, name: str, options: Reading) -> Shard:
    """Open a shard on disk; its images are not read yet.

    Raises:
        ValueError: the shard cannot be read or lacks a column, or too much of it is left out.
    """
    openers = {"folder of images": _open_folder, "saved dataset": _open_saved}
    with reading(name):
        kind = shard_kind(path)
        if kind is None:
            raise ValueError(f"a shard must be a folder or end in {' or '.join(LOADERS)}")
        if kind in openers:
            return openers[kind](path, name, options)
        return _open_file(path, name, options, kind)


def _open_file(path: Path, name: str, options: Reading, kind: str) -> Shard:
    origin = file_origin(name, path, [path], options)
    num_rows, find_values = None, None
    if kind == "parquet":
        num_rows, key = ParquetFile(path).metadata.num_rows, content_key(path, footer_only=True)
    manifest = find_manifest(origin, num_rows)
    plain = path
    if kind == "webdataset":
        key = f"state-{origin.state[:32]}"
        plain = plain_archive(path, known=manifest is not None, anew=options.verify)
    source = _load_file(plain, kind, options.streaming, num_rows, key)
    known: dict[str, Any] = {"num_rows": num_rows, "origin": origin}
    if options.streaming:
        stamps = content_stamps(origin.stamps)
        known |= {"stamps": stamps, **_pieces_of(plain, kind, options, plain != path)}
        if kind == "parquet":
            find_values = values_in(known["pieces"], options)
    shard = standard_shard(name, source, options, find_values, manifest=manifest, **known)
    if isinstance(source, Dataset) and num_rows not in (None, len(source)):
        raise ValueError(f"it holds {num_rows} rows, but {len(source)} were loaded")
    return shard


def _pieces_of(path: Path, kind: str, options: Reading, is_copy: bool) -> dict[str, Any]:
    """Return the pieces of a file, and their number of rows."""
    if kind == "parquet":
        pieces: Sequence[Piece] = row_groups(path, options.image_column)
    elif (found := members(path, options.image_column, is_copy=is_copy)) is not None:
        pieces = (found,)
    else:
        return {}
    return {"pieces": tuple(pieces), "num_rows": sum(piece.num_rows for piece in pieces)}


def values_in(groups: Sequence[RowGroup], options: Reading) -> FindValues:
    """Return what finds the labels of a stream of parquet files: only their column is read."""
    return lambda dataset: distinct_values(groups, options.label_column)


def standard_shard(
    name: str,
    source: AnyDataset,
    options: Reading,
    find_values: FindValues | None = None,
    *,
    manifest: Manifest | None = None,
    origin: Origin | None = None,
    **known: Any,
) -> Shard:
    """Make a shard of a dataset as its loader returned it.

    Where only a pass over a stream tells its classes, that pass finds all that a manifest holds.
    """
    values: Values | None = None
    found, codes = None, dict[int | str, int]()

    def find(dataset: AnyDataset) -> Values:
        nonlocal values, found
        if manifest is not None and manifest.values is not None:
            values = manifest.values
        elif find_values is not None or isinstance(dataset, Dataset):
            values = (find_values or label_values)(dataset)
        else:
            found = read_coded(undecoded(dataset), options, codes)
            values = sorted(codes)
        return values

    dataset = standard_columns(source, options, find)
    if found is not None and values is not None:
        manifest = decoded_manifest(found, codes, tuple(label_names(dataset)), values)
        keep_manifest(origin, manifest)
    features = source.features if source.features is not None else dataset.features
    record, _, part = options.label_column.partition(".")
    label = features.get(options.label_column) or features[record][part]
    image = type(features[options.image_column]).__name__
    types = {options.image_column: image, options.label_column: label_kind(label)}
    if isinstance(dataset, Dataset):
        known["num_rows"] = len(dataset)
    elif manifest is not None:
        known["num_rows"] = known.get("num_rows") or len(manifest.findings)
    known |= {"manifest": manifest, "origin": origin, "values": values}
    return Shard(name, dataset, types, **known)


def _open_folder(path: Path, name: str, options: Reading) -> Shard:
    found = find_images(path, options.class_folder)
    found.check(name, allow_missing=options.allow_missing)
    columns: dict[str, list[Any]] = {"image": [str(path / image) for image in found.images]}
    if not found.rows:
        columns["label"] = []
    for column in dict.fromkeys(key for row in found.rows for key in row):
        columns[column] = [row.get(column) for row in found.rows]
    if columns.keys() == {"image", "label"}:
        classes = ClassLabel(names=sorted(set(columns["label"])))
        features = Features({"image": Image(), "label": classes})
        source = Dataset.from_dict(columns, features=features)
    else:
        source = Dataset.from_dict(columns).cast_column("image", Image())
    left_out = tuple(f"{image} ({why})" for image, why in found.left_out.items())
    origin = folder_origin(name, path, found.images, options, found.rows)
    stamps = content_stamps(origin.stamps)
    known: dict[str, Any] = {"paths": found.images, "left_out": left_out, "stamps": stamps}
    manifest = find_manifest(origin, len(found.images))
    if manifest is None:
        known["earlier"] = find_earlier(origin)
    shard = standard_shard(name, source, options, manifest=manifest, origin=origin, **known)
    return streamed(shard) if options.streaming else shard


def _open_saved(path: Path, name: str, options: Reading) -> Shard:
    source = load_from_disk(str(path))
    files = (path / file for file, kind in walk(path) if kind == "file")
    origin = file_origin(name, path, files, options)
    manifest = find_manifest(origin, len(source))
    shard = standard_shard(name, source, options, manifest=manifest, origin=origin)
    return streamed(shard) if options.streaming else shard


def streamed(shard: Shard) -> Shard:
    """Return a shard whose rows are read as they are needed."""
    return replace(shard, dataset=_as_stream(shard.dataset), pieces=(Rows(shard.dataset),))


def _as_stream(dataset: Dataset) -> IterableDataset:
    return dataset.to_iterable_dataset(num_shards=max(1, min(NUM_SHARDS, len(dataset))))


def _load_file(
    path: Path, kind: str, streaming: bool, num_rows: int | None, key: str
) -> AnyDataset:
    files = {"train": glob.escape(str(path))}
    if num_rows == 0 and not streaming:
        # ``datasets`` refuses to prepare an empty file, but its stream knows the columns.
        stream = load_dataset(kind, data_files=files, split="train", streaming=True)
        return Dataset.from_dict({name: [] for name in stream.features}, features=stream.features)
    # The name becomes part of the cache's key, which otherwise is a path and a time stamp.
    name = None if streaming else key
    return load_dataset(kind, name, data_files=files, split="train", streaming=streaming)


def content_key(path: Path, *, footer_only: bool = False) -> str:
    """Return a key that changes with a file's content, or with the size and footer of parquet."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        if footer_only:
            file.seek(-8, 2)
            footer = int.from_bytes(file.read(4), "little")
            file.seek(-8 - footer, 2)
        while block := file.read(1 << 20):
            digest.update(block)
    return f"content-{digest.hexdigest()[:32]}"


def check_types(
    name: str, types: Mapping[str, str], first_name: str, first: Mapping[str, str]
) -> None:
    """Raise a ``ValueError`` if a column has another type than at first."""
    for column, type_ in types.items():
        if type_ != first[column]:
            raise ValueError(
                f"{name}: column {column!r} holds {type_}, but {first[column]} in {first_name}"
            )


@dataclass(frozen=True)
class RowNames:
    """What the rows of several shards are called, by ``example_id``.

    Args:
        shards: names of the shards, in order.
        starts: first ``example_id`` of each.
        paths: for each shard that is a folder, the paths of its images.
    """

    shards: tuple[str, ...]
    starts: tuple[int, ...]
    paths: tuple[tuple[str, ...] | None, ...]

    def shard(self, example_id: int) -> str:
        """Return the name of a row's shard."""
        return self.shards[self._number(example_id)]

    def name(self, example_id: int) -> str:
        """Return ``"shard:row"``, or the path of the image if the shard is a folder."""
        number = self._number(example_id)
        row, paths = example_id - self.starts[number], self.paths[number]
        return f"{self.shards[number]}:{row}" if paths is None else self._path(number, row)

    def _was_left_out(self, name: str) -> bool:
        """Check whether a name is of a file in a folder that could not be loaded at all."""
        folders = [shard for shard, paths in zip(self.shards, self.paths, strict=True) if paths]
        return any(name.startswith(f"{folder}/") for folder in folders)

    def _holds(self, shard: str, row: int) -> bool:
        """Check that a shard has such a row; how many the last one has is not known here."""
        number = self.shards.index(shard)
        later = self.starts[number + 1 : number + 2]
        return not later or self.starts[number] + row < later[0]

    def _number(self, example_id: int) -> int:
        return bisect_right(self.starts, example_id) - 1

    def _path(self, number: int, row: int) -> str:
        paths = self.paths[number] or ()
        return f"{self.shards[number]}/{paths[row]}" if row < len(paths) else self.shards[number]

    def find(self, names: Sequence[str]) -> frozenset[int]:
        """Return the ids of rows by their names, or by ``"shard:row"``.

        Raises:
            ValueError: a name is not of these shards.
        """
        files = {
            self._path(number, row): start + row
            for number, (start, paths) in enumerate(zip(self.starts, self.paths, strict=True))
            for row in range(len(paths or ()) if names else 0)
        }
        ids = set()
        for name in names:
            shard, _, row = name.rpartition(":")
            if name in files:
                ids.add(files[name])
            elif shard in self.shards and row.isdecimal() and self._holds(shard, int(row)):
                ids.add(self.starts[self.shards.index(shard)] + int(row))
            elif not self._was_left_out(name):
                raise ValueError(f"skip must name rows of {list(self.shards)}, got {name!r}")
        return frozenset(ids)


def merge_shards(shards: Sequence[Shard], *, numbered: bool = True) -> tuple[AnyDataset, RowNames]:
    """Put shards together, their classes matched by name.

    Args:
        shards: at least one, all map-style or all streams, with the same types of columns.
        numbered: add the column ``example_id``, the row's position over all shards.

    Returns:
        A dataset with the columns ``image`` and ``label``, and the names of its rows.

    Raises:
        ValueError: a shard has other types of columns than the first.
    """
    for shard in shards:
        check_types(shard.name, shard.types, shards[0].name, shards[0].types)
    names = all_names(shard.dataset for shard in shards)
    image = Image(mode=shards[0].dataset.features["image"].mode)
    features = Features({"image": image, "label": ClassLabel(names=names)})
    if not numbered:
        parts = [matched(shard.dataset.cast_column("image", image), names) for shard in shards]
        return joined(parts), _row_names(shards)
    features["example_id"] = Value("int64")
    row_names = _row_names(shards, count=True)
    if all(isinstance(shard.dataset, Dataset) for shard in shards):
        whole = joined([labeled(shard.dataset, features) for shard in shards])
        return whole.add_column("example_id", np.arange(len(whole))), row_names
    parts = [
        _numbered(shard, features, start)
        for shard, start in zip(shards, row_names.starts, strict=True)
    ]
    return joined(parts), row_names


def _row_names(shards: Sequence[Shard], count: bool = False) -> RowNames:
    """Name the rows; of streams that would have to be counted first, only by their position."""
    names = tuple(shard.name for shard in shards)
    if not count and any(shard.num_rows is None for shard in shards[:-1]):
        return RowNames((f"{names[0]} … {names[-1]}",), (0,), (None,))
    # The length of the last one does not matter.
    starts = [0, *accumulate(shard.count() for shard in shards[:-1])]
    return RowNames(names, tuple(starts), tuple(shard.paths for shard in shards))


def _numbered(shard: Shard, features: Features, start: int) -> AnyDataset:
    """Return a stream's rows with the classes of all shards, numbered from ``start``."""
    if shard.rows is not None:
        # Numbered before it is a stream, which would number each of its shards from 0.
        rows = labeled(shard.rows, features)
        return _as_stream(rows.add_column("example_id", start + np.arange(len(rows))))
    settings = {"start": start, "places": label_ids(shard.dataset, features["label"].names)}
    stream = undecoded(shard.dataset)
    return map_columns(stream, _number_rows, features, with_indices=True, fn_kwargs=settings)


def _number_rows(
    columns: dict[str, list[Any]], rows: list[int], start: int, places: list[int]
) -> dict[str, list[Any]]:
    return {
        "image": columns["image"],
        "label": translated(columns["label"], places),
        "example_id": [start + row for row in rows],
    }
