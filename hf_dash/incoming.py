"""Arrivals that are files: shards that appear in a directory over time.

Flow: a directory or a glob → shards in the order of their names → those not seen before → one
``Arrival`` with the columns ``image``, ``label`` and ``example_id``, its corrupt images found and
its labels merged by name, with a fingerprint of what it holds.
Source: the loaders of ``datasets`` (parquet, webdataset, imagefolder), one call a shard.
Differs from one ``load_dataset`` over all files: shards may know different labels, an error names
the shard and the row, and examples keep their ids where one is left out, streamed or not.
"""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from datasets import ClassLabel, Features, Image, Value, concatenate_datasets

from hf_dash._shards import Shard, check_schema, load_shard, numbered_examples, shard_kind, survey
from hf_dash.arrivals import DataConfig
from hf_dash.columns import AnyDataset, fingerprint, label_names

TEMPORARY_SUFFIXES = (".tmp", ".part", ".crdownload")


@dataclass(frozen=True)
class Arrival:
    """One round's new shards as one dataset.

    Args:
        files: names of the shards below the root, oldest first.
        dataset: with the columns ``image``, ``label`` (``ClassLabel``) and ``example_id`` (int64):
            the example's position over the shards of this arrival, counted from 0 and including
            what was skipped, so that it stays the same. An ``IterableDataset`` where streamed.
        num_examples: in ``dataset``.
        skipped: what was left out as corrupt, as ``"monday.parquet:17"``: shard and row, from 0.
        fingerprint: of ``dataset``; see :func:`fingerprint`. None where it is not computed yet.
        types: what the source's two columns hold.
    """

    files: tuple[str, ...]
    dataset: AnyDataset
    num_examples: int
    skipped: tuple[str, ...]
    fingerprint: str | None
    types: Mapping[str, str] = field(default_factory=dict)


class EmptyArrivalError(ValueError):
    """An arrival holds no example."""


def arrivals_root(pattern: str) -> Path:
    """Return the directory below which shards are named: the part of a pattern before any glob."""
    path = Path(pattern)
    if path.is_dir():
        return path
    fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    return Path(*fixed) if len(fixed) < len(path.parts) else path.parent


def list_arrivals(pattern: str) -> list[Path]:
    """List the shards that have arrived, in the order of their names.

    Args:
        pattern: a directory, whose parquet files, webdataset ``.tar`` files or subfolders (each an
            imagefolder with one folder a class) are the shards, or a glob of such. Names that begin
            with ``.`` or ``_`` or end in ``.tmp``, ``.part`` or ``.crdownload`` are left out: they
            are still being written. Names are sorted as text: ``day-10`` comes before ``day-9``.

    Raises:
        ValueError: nothing matches, or shards of several kinds do, or one lies in another.
    """
    shards = _find(pattern)
    if not shards:
        raise ValueError(f"no parquet file, tar file or folder of images matches {pattern!r}")
    kinds = {shard_kind(path): path.name for path in shards}
    if len(kinds) > 1:
        raise ValueError(f"{pattern!r} must match shards of one kind, got {kinds}")
    for path in shards:
        if set(path.parents) & set(shards):
            raise ValueError(f"{pattern!r} must not match {path}, which lies in another match")
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
    """List the shards that have arrived since, in the order of their names.

    Args:
        pattern: as for :func:`list_arrivals`.
        seen: names of the shards of earlier rounds, as in ``Arrival.files``: relative to
            :func:`arrivals_root`, with forward slashes.

    Returns:
        The new shards; an empty list where there are none.

    Raises:
        ValueError: a seen shard has disappeared, or as for :func:`list_arrivals`.
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

    Every image is decoded once to find corrupt ones, which costs about as much as an epoch's
    reading, unless ``skip`` tells them; labels are read once more where they have no names, and
    the encoded images once for the fingerprint. Nothing is kept in memory but the labels.

    Args:
        files: shards of one kind, oldest first; see :func:`list_arrivals`.
        config: columns, image mode, streaming and what to do about corrupt images.
        root: below which shards are named; see :func:`arrivals_root`.
        skip: corrupt images known from an earlier ``Arrival.skipped`` of the same files.

    Returns:
        The arrival. Labels are merged by name: its classes are those of all shards, in the order
        in which shards first name them.

    Raises:
        ValueError: a shard cannot be read, lacks a column, or has other types of columns than the
            first; an image is corrupt and ``config.on_bad_example`` is ``"error"``; an example has
            no label; ``skip`` names no row of these files; no example is left.
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
    """Put shards in a row, labels translated by name, corrupt images left out."""
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
