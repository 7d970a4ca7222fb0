"""Load labeled images by name: embedded samples, files, folders and the Hub, all one way.

Flow: a name → the splits found there → the shards of one split, opened → one dataset with the
columns ``image`` and ``label``.
Differs from plain ``load_dataset``: a path that exists is never a pattern, splits are folders or
shards named so and never images, columns are checked and renamed once, and the label column always
has class names.
"""

import glob
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import (
    DatasetBuilder,
    Features,
    IterableDataset,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
)
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfFileSystem

from hf_dash.data.columns import AnyDataset, Reading
from hf_dash.data.embedded import EMBEDDED, FASHION_MNIST
from hf_dash.data.folders import METADATA, is_image, unreadable, walk
from hf_dash.data.manifest import find_manifest, hub_origin
from hf_dash.data.names import canonical, shown
from hf_dash.data.pieces import RowGroup, remote_row_groups, stream_of_groups
from hf_dash.data.shards import (
    Shard,
    content_key,
    is_saved,
    loader_of,
    merge_shards,
    open_shard,
    reading,
    shard_kind,
    standard_shard,
    streamed,
    values_in,
)
from hf_dash.utils.checks import refuse_unless
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

# Bytes at the start and the end of files that are compared before the rest is.
END = 4096

# Splits of shards that are named like ``name-00000-of-00010.parquet``.
_NUMBERED = re.compile(r"(.+)-\d+-of-\d+")


@dataclass(frozen=True)
class Access:
    """How to reach the Hub.

    Args:
        token: for private datasets.
        cache_dir: where downloads are kept.
    """

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None


ANONYMOUS = Access()


@dataclass(frozen=True)
class Source:
    """A named source of images: its splits, and how to open them.

    Args:
        name: as it was given.
        splits: for a local source, the shards of each split by their names; for an embedded one
            and the Hub, None instead of shards.
        has_splits: False if all shards are in one split because nothing names any.
        revision: branch, tag or commit of a Hub dataset.
        config_name: configuration of a Hub dataset.
        access: to the Hub.
        left_out: files beside the splits that seem to hold images.
    """

    name: str
    splits: Mapping[str, Mapping[str, Path] | None]
    has_splits: bool = True
    revision: str | None = None
    config_name: str | None = None
    access: Access = ANONYMOUS
    left_out: tuple[str, ...] = ()

    def split(self, wanted: str) -> str:
        """Return the split that goes by this name.

        Raises:
            ValueError: there is none.
        """
        if wanted in self.splits:
            return wanted
        alike = [name for name in self.splits if canonical(name) == (canonical(wanted) or wanted)]
        if len(alike) == 1:
            return alike[0]
        if self.name in EMBEDDED:
            return wanted  # for its loader to refuse
        if not self.has_splits and (Path(self.name).is_file() or not Path(self.name).exists()):
            return next(iter(self.splits))  # files may be called what one likes
        raise ValueError(
            f"split must be one of {sorted(self.splits)} of {self.name!r}, got {wanted!r}"
        )

    def open(self, split: str, options: Reading) -> list[Shard]:
        """Open the shards of a split, in the order of their names.

        Raises:
            ValueError: there is no such split, or a shard cannot be read.
        """
        split = self.split(split)
        if self.left_out:
            self._check_left_out(options.allow_missing)
        shards = self.splits.get(split)
        if shards is not None:
            own = without_copies(shards)
            return [open_shard(path, name, options) for name, path in own.items()]
        label = f"{self.name}[{split}]"
        if self.name in EMBEDDED:
            images = EMBEDDED[self.name](split)
            shard = standard_shard(label, images, options)
            return [streamed(shard) if options.streaming else shard]
        with reading(label):
            return [self._open_on_hub(split, label, options)]

    def _open_on_hub(self, split: str, label: str, options: Reading) -> Shard:
        token, revision = self.access.token, self.revision
        where: dict[str, Any] = {"token": token, "cache_dir": self.access.cache_dir}
        known: dict[str, Any] = {}
        paths: list[str] = []
        if options.streaming or options.split_alone:
            builder = load_dataset_builder(self.name, self.config_name, revision=revision, **where)
            if paths := _parquet_paths(builder, split):
                revision = builder.hash  # the commit that they are of
        if options.streaming:
            source = builder.as_streaming_dataset(split)
            if paths:
                groups = remote_row_groups(paths, options.image_column, HfFileSystem(token=token))
                source = _read_in_parts(source, groups, options)
                known = {"pieces": groups, "num_rows": sum(group.num_rows for group in groups)}
                known["find_values"] = values_in(groups, options)
        elif paths:
            settings = {"data_files": {split: paths}, "features": builder.info.features, **where}
            source = load_dataset("parquet", split=split, **settings)
        else:
            source = load_dataset(
                self.name, self.config_name, split=split, revision=revision, **where
            )
        origin = hub_origin(
            *(label, self.name, split, options),
            revision=revision,
            config_name=self.config_name,
            token=token,
        )
        known["manifest"] = find_manifest(origin, known.get("num_rows"))
        return standard_shard(label, source, options, origin=origin, **known)

    def _check_left_out(self, allow_missing: bool) -> None:
        message = f"{self.name!r}: {shown(self.left_out)} belong to none of its splits and shards"
        refuse_unless(allow_missing, message, "; allow_missing=True leaves them out", logger)


def _parquet_paths(builder: DatasetBuilder, split: str) -> list[str]:
    """Return the parquet files on the Hub whose rows are those of a split, in its order.

    Returns:
        Their addresses, of one commit; none if the split is made of anything else.
    """
    config = builder.config
    is_plain = isinstance(builder, Parquet) and getattr(config, "filters", None) is None
    paths = [str(path) for path in (config.data_files or {}).get(split, ())] if is_plain else []
    return paths if all(path.startswith("hf://") for path in paths) else []


def _read_in_parts(
    stream: IterableDataset, groups: Sequence[RowGroup], options: Reading
) -> IterableDataset:
    """Return a stream's two columns, read by row groups; or the stream, if a column is missing."""
    found = stream.features
    label = options.label_column
    label = label if label in found else label.partition(".")[0]
    columns = dict.fromkeys([options.image_column, label])
    if not groups or not columns.keys() <= found.keys():
        return stream
    return stream_of_groups(groups, Features({column: found[column] for column in columns}))


def without_copies(shards: Mapping[str, Path]) -> dict[str, Path]:
    """Return the shards without those that are the same file or folder as an earlier one."""
    sizes = Counter(path.stat().st_size for path in shards.values() if path.is_file())
    alike = Counter(_ends_of(path) for path in shards.values() if _is_one_of(path, sizes))
    first: dict[str, str] = {}
    for name, path in shards.items():
        key = str(path.resolve())
        if _is_one_of(path, sizes) and alike[_ends_of(path)] > 1:
            key = content_key(path)
        if first.setdefault(key, name) != name:
            logger.warning("%s is the same as %s: counted once", name, first[key])
    return {name: shards[name] for name in first.values()}


def _is_one_of(path: Path, sizes: Mapping[int, int]) -> bool:
    """Check whether a path is a file of a size that several have."""
    return path.is_file() and sizes[path.stat().st_size] > 1


def _ends_of(path: Path) -> tuple[int, bytes, bytes]:
    """Return the size of a file and its ends, which are those of its copies only, as a rule."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(END)
        file.seek(max(0, size - END))
        return size, start, file.read()


def find_source(
    name: str,
    *,
    revision: str | None = None,
    config_name: str | None = None,
    access: Access = ANONYMOUS,
) -> Source:
    """Find out what a name means and which splits it has; no image is read.

    Args:
        name: see :func:`load_images`.
        revision: branch, tag or commit of a Hub dataset.
        config_name: configuration of a Hub dataset.
        access: to the Hub.

    Raises:
        ValueError: nothing is there, or it is not clear which split a part of it belongs to.
    """
    if name in EMBEDDED:
        return Source(name, {"train": None, "test": None})
    path = Path(name).expanduser()
    if path.exists():
        return _folder_source(name, path) if path.is_dir() else _file_source(name, [path])
    if glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        return _file_source(name, [match for match in matches if shard_kind(match)])
    if _is_path(name):
        raise ValueError(f"{name!r} does not exist")
    with reading(f"{name!r} is not on this machine and"):
        found = get_dataset_split_names(name, config_name, revision=revision, token=access.token)
    splits = dict.fromkeys(found, None)
    return Source(name, splits, True, revision, config_name, access)


def _is_path(name: str) -> bool:
    """Check whether a name can only be a path: the Hub's have at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or loader_of(name) is not None


def folder_source(folder: str) -> Source:
    """Return a folder whose images are all of one split, whatever its subfolders are called.

    Raises:
        ValueError: it is not a folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{folder!r} is not a folder of images")
    return Source(folder, {"train": {_own_name(path): path}}, has_splits=False)


def _own_name(path: Path) -> str:
    return path.name or path.resolve().name


def _file_source(name: str, paths: Sequence[Path]) -> Source:
    kinds = {str(shard_kind(path)) for path in paths}
    if not paths or len(kinds) > 1:
        raise ValueError(f"{name!r} must match shards of one kind, got {sorted(kinds)}")
    if kinds == {"None"}:
        raise ValueError(
            f"{name!r} is neither a folder nor a parquet or tar file; an archive has to be unpacked"
        )
    names = [_own_name(path) for path in paths]
    labels = names if len(set(names)) == len(names) else [path.as_posix() for path in paths]
    return Source(name, {"train": dict(zip(labels, paths, strict=True))}, has_splits=False)


def _folder_source(name: str, path: Path) -> Source:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return Source(
            name, {split: {f"{_own_name(path)}/{split}": path / split} for split in splits}
        )
    if is_saved(path):
        return Source(name, {"train": {_own_name(path): path}}, has_splits=False)
    for file, kind in walk(path):
        if kind != "file" or PurePosixPath(file).name in METADATA:
            continue
        if loader_of(file):
            return _shards_source(name, path)
        if is_image(path / file):
            return _images_source(name, path)
    raise ValueError(f"{name!r} holds no image, parquet file or tar file")


def _shards_source(name: str, path: Path) -> Source:
    """Sort the shards of a folder into splits by their names."""
    by_split: dict[str | None, dict[str, Path]] = {}
    left_out = []
    for file, kind in walk(path):
        if kind == "file" and loader_of(file):
            by_split.setdefault(_split_of(file), {})[f"{_own_name(path)}/{file}"] = path / file
        elif kind not in ("folder", "hidden") and (unreadable(file, kind) or is_image(path / file)):
            left_out.append(file)
    unnamed = by_split.pop(None, {})
    if unnamed and by_split:
        raise ValueError(
            f"{name!r} must name the split of every shard or of none:"
            f" {shown(list(unnamed))} belong to none of {sorted(map(str, by_split))}"
        )
    if unnamed:
        return Source(name, {"train": unnamed}, has_splits=False, left_out=tuple(left_out))
    splits = {str(split): shards for split, shards in by_split.items()}
    return Source(name, splits, left_out=tuple(left_out))


def _split_of(file: str) -> str | None:
    """Return the split that a shard's folder or name says it is of.

    Raises:
        ValueError: it says several.
    """
    *folders, own = file.split("/")
    stem = own.partition(".")[0]
    words = [folder for folder in folders if canonical(folder)]
    words = words or [word for word in re.split(r"[^A-Za-z]+", stem) if canonical(word)]
    found = {canonical(word) for word in words}
    if len(found) > 1:
        raise ValueError(f"the name of the shard {file!r} must name one split, got {sorted(words)}")
    if found:
        return found.pop()
    numbered = _NUMBERED.fullmatch(stem)
    return numbered[1] if numbered else None


def _images_source(name: str, path: Path) -> Source:
    """Take the folders of a folder for splits if that is what all of them are called."""
    whole = Source(name, {"train": {_own_name(path): path}}, has_splits=False)
    if not any(canonical(entry.name) for entry in path.iterdir()):
        return whole
    depths: dict[str, int] = {}
    left_out = []
    for file, kind in walk(path):
        top, *below = file.split("/")
        described = PurePosixPath(file).name in METADATA
        if kind in ("folder", "hidden") or not (
            described or is_image(path / file) or unreadable(file, kind)
        ):
            continue
        if below:
            depths[top] = max(depths.get(top, 0), 2 if described else len(below))
        else:
            left_out.append(file)
    named = [top for top in depths if canonical(top)]
    deep = [top for top in named if depths[top] > 1]
    if not deep:
        if named and len(named) == len(depths):
            raise ValueError(
                f"{name!r} holds the splits {named}, but their images are not in class folders"
            )
        return whole
    others = [top for top in depths if top not in deep]
    if others:
        raise ValueError(
            f"{name!r} must hold folders of splits or of classes, not both, got {deep} and"
            f" {shown(others)}"
        )
    splits = {top: {f"{_own_name(path)}/{top}": path / top} for top in deep}
    return Source(name, splits, left_out=tuple(left_out))


def load_images(
    name: str = FASHION_MNIST,
    *,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    image_column: str = "image",
    label_column: str = "label",
    image_mode: str | None = None,
    class_folder: str | None = None,
    allow_missing: bool = False,
    token: str | bool | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
) -> AnyDataset:
    """Load a labeled image dataset.

    Args:
        name: ``"fashion_mnist"`` (a sample of 5,000 photographs of clothes) or ``"digits"``
            (scikit-learn's 1,797 handwritten digits), which need no download; a folder of class
            folders, of splits of them, of parquet or webdataset tar files, or written by
            ``save_to_disk``; such a file, a glob of them, or a dataset on the Hub.
        split: which split; ``val``, ``valid``, ``dev`` and ``validation`` mean the same. The
            embedded datasets have ``"train"`` and ``"test"``.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read through an ``IterableDataset`` instead of preparing it on disk.
        image_column: the source's column of images.
        label_column: the source's column of labels. A stream of integers or strings is read once
            to find its classes. ``"json.label"`` is a field in a column of records.
        image_mode: PIL mode to convert every image to, such as ``"RGB"``; None leaves them alone.
        class_folder: ``"first"`` or ``"last"``: which folder names the class of an image that lies
            several folders deep.
        allow_missing: continue although a class or more than 1 % of the images cannot be read.
        token: access token for a private Hub dataset.
        config_name: configuration of a Hub dataset.
        cache_dir: where downloads are kept.

    Returns:
        A dataset with the columns ``image`` (``datasets.Image``) and ``label`` (``ClassLabel``).

    Raises:
        ValueError: nothing of this name can be read, a column is missing, or the labels are not
            class labels, integers or strings.

    Example:
        >>> import hf_dash
        >>> images = hf_dash.load_images("fashion_mnist")
        >>> images.column_names, images[0]["image"].size
        (['image', 'label'], (28, 28))
    """
    options = Reading(
        image_column, label_column, image_mode, streaming, class_folder, allow_missing
    )
    access = Access(token, cache_dir)
    source = find_source(name, revision=revision, config_name=config_name, access=access)
    return merge_shards(source.open(split, options), numbered=False)[0]


def is_local(name: str) -> bool:
    """Check whether a dataset name means embedded or local data rather than the Hub."""
    return (
        name in EMBEDDED
        or loader_of(name) is not None
        or glob.has_magic(name)
        or Path(name).exists()
    )


def first_of(names: Iterable[str], found: Iterable[str]) -> str | None:
    """Return the first found split that goes by one of these names, in their order."""
    known = {canonical(split) or split: split for split in found}
    return next((known[name] for name in names if name in known), None)
