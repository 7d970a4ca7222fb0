"""What one pass over a shard has found, kept on the disk: the next command reads none of its data.

Flow: a shard's files, as the disk or the Hub describes them → what an earlier command has found in
them, if they are still the same → or one pass, kept in a file of the cache folder. Of a folder only
the images that are new or changed are read.
Differs from a checksum of each file: nothing is read to see that nothing has changed.
``verify_data`` reads all the same, and compares.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hf_dash.data.columns import BATCH_SIZE, AnyDataset, Reading, Values
from hf_dash.data.findings import MODE, NO_LABEL, Earlier, Findings, Flaw, look_at
from hf_dash.data.names import normalized
from hf_dash.data.pixel_cache import cache_folder
from hf_dash.data.stamps import Stamps, check_unchanged, stamp_of
from hf_dash.hub.client import HubError, client, reach
from hf_dash.utils.files import write_bytes
from hf_dash.utils.logging import get_logger, warn_once

logger = get_logger(__name__, main_process_only=True)

# Part of every key: a manifest of another format is not found.
FORMAT = 2

# Fields of ``Findings`` with a row for each image, and ``Origin.files`` where it is known.
ARRAYS, FILES = ("labels", "sha256", "content", "modes"), "files"

# What a manifest raises that cannot be read.
DAMAGED = (OSError, ValueError, KeyError, TypeError, SafetensorError)

# Rows named in a message.
SHOWN = 3


@dataclass(frozen=True)
class Origin:
    """Which files a shard is made of, and how they are read.

    Args:
        name: of the shard, for messages.
        key: tells the shard's place, and the way it is read, from all others.
        state: changes whenever the files do.
        stamps: of the files; empty for those that cannot change.
        verify: read the shard although its manifest is known, and compare.
        files: of a folder, a number for each row that tells its file, and its stamp, from others,
            uint64.
    """

    name: str
    key: str
    state: str
    stamps: Stamps = field(default_factory=dict)
    verify: bool = False
    files: np.ndarray | None = None

    @property
    def path(self) -> Path:
        """Where the manifest is kept."""
        return cache_folder() / f"{self.key}.manifest"


def file_origin(
    name: str, place: Path, files: Iterable[Path], options: Reading, described: Any = None
) -> Origin:
    """Return the origin of files on this machine; they are looked at, not read.

    Args:
        name: of the shard.
        place: the file, or the folder of all of them.
        files: all that are read.
        options: how they are read.
        described: what else tells about the images, such as their labels.
    """
    # A file written anew, with its old size and time, has another time of any change.
    stamps = {path: stamp_of(path) for path in files}
    key = _digest([FORMAT, str(place.resolve()), options.key])
    state = _digest([[(str(path), *stamp) for path, stamp in stamps.items()], described])
    return Origin(name, key, state, stamps, options.verify)


def folder_origin(
    name: str, folder: Path, images: Sequence[str], options: Reading, described: Any
) -> Origin:
    """Return the origin of a folder of images, each a row; they are looked at, not read.

    Args:
        name: of the shard.
        folder: of all images.
        images: their paths below the folder.
        options: how they are read.
        described: what else tells about the images, such as their labels.
    """
    paths = (folder / image for image in images)
    origin = file_origin(name, folder, paths, options, described)
    files = zip(images, origin.stamps.values(), strict=True)
    numbers = [xxhash.xxh3_64_intdigest(repr(file).encode()) for file in files]
    return replace(origin, files=np.array(numbers, dtype=np.uint64))


def hub_origin(
    name: str,
    dataset_id: str,
    split: str,
    options: Reading,
    *,
    revision: str | None = None,
    config_name: str | None = None,
    token: str | bool | None = None,
) -> Origin | None:
    """Return the origin of a split on the Hub, which knows the content of its files.

    Args:
        name: of the shard.
        dataset_id: on the Hub.
        split: of the dataset.
        options: how it is read.
        revision: branch, tag or commit.
        config_name: configuration of the dataset.
        token: for a private dataset.

    Returns:
        The origin; None where the Hub cannot be reached, and what is read comes from a cache.
    """
    try:
        info = reach(
            lambda: client(None).dataset_info(
                dataset_id, revision=revision, token=token, files_metadata=True
            )
        )
    except HubError as error:
        logger.info("%s: the Hub does not say what is in its files: %s", name, error)
        return None
    files = [(f.rfilename, f.lfs.sha256 if f.lfs else f.blob_id) for f in info.siblings or ()]
    if any(content is None for _, content in files):
        return None
    key = _digest([FORMAT, dataset_id, config_name, split, options.key])
    return Origin(name, key, _digest(sorted(files)), verify=options.verify)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What one pass over a shard has found.

    Args:
        classes: names of the shard's classes, in the order of its labels.
        values: labels as they are in the source, sorted, where these are not class labels.
        findings: of all rows, in their order.
    """

    classes: tuple[str, ...]
    values: tuple[int | str, ...] | None
    findings: Findings


def read_coded(stream: AnyDataset, options: Reading, codes: dict[int | str, int]) -> Findings:
    """Read a stream whose classes are not known yet; a label is the place of its value.

    Args:
        stream: of undecoded images, with integer or text labels.
        options: how it is read.
        codes: places of values, which are added as they occur.
    """

    def coded(labels: Sequence[int | str | None]) -> list[int | None]:
        return [None if x is None else codes.setdefault(x, len(codes)) for x in labels]

    batches = ((b["image"], coded(b["label"])) for b in stream.iter(BATCH_SIZE))
    return look_at(batches, mode=stream.features["image"].mode, by_pixels=options.by_pixels)


def decoded_manifest(
    found: Findings, codes: Iterable[int | str], classes: tuple[str, ...], values: Values
) -> Manifest:
    """Return the manifest of a stream that :func:`read_coded` has read, once its classes are known.

    Args:
        found: in the stream.
        codes: the values of its labels, in the order of their places.
        classes: names of its classes.
        values: of its labels, sorted.
    """
    texts = [normalized(str(value)) for value in codes]  # blank text is not a label
    places = [classes.index(text) if text else NO_LABEL for text in texts]
    labels = np.array([*places, NO_LABEL])[np.where(found.labels == NO_LABEL, -1, found.labels)]
    return Manifest(classes, tuple(values), replace(found, labels=labels))


def find_manifest(origin: Origin | None, num_rows: int | None = None) -> Manifest | None:
    """Return the manifest of a shard, unless there is none or it cannot be trusted.

    Args:
        origin: of the shard; None for one that is not kept.
        num_rows: of the shard, where known.
    """
    if origin is None or origin.verify or not origin.path.is_file():
        return None
    try:
        state, _, manifest = _read(origin.path)
    except DAMAGED as error:
        logger.warning("%s: its manifest is damaged, and written anew: %s", origin.name, error)
        return None
    if state != origin.state:
        if origin.files is None:
            logger.info("%s has changed since it was last read: it is read anew", origin.name)
        return None
    rows = len(manifest.findings)
    if num_rows not in (None, rows):
        message = "%s: its manifest tells of %d rows in place of %d, and is written anew"
        logger.warning(message, origin.name, rows, num_rows)
        return None
    return manifest


def find_earlier(origin: Origin) -> Earlier | None:
    """Return what was found in the images of a folder that are still the same, if it has changed.

    A manifest of the same files was refused, and is not believed here either.
    """
    if origin.files is None or origin.verify or not origin.path.is_file():
        return None
    try:
        state, files, manifest = _read(origin.path)
    except DAMAGED:  # which was said
        return None
    if state == origin.state or files is None:
        return None
    _, now, then = np.intersect1d(origin.files, files, return_indices=True)
    return Earlier(manifest.findings, then, now)


def keep_manifest(origin: Origin | None, manifest: Manifest) -> None:
    """Keep what a pass over a shard has found; what cannot be written is said.

    Raises:
        ValueError: a file was changed meanwhile, or the manifest is to be verified and differs.
    """
    if origin is None:
        return
    check_unchanged(origin.stamps, "read")
    if origin.verify and origin.path.is_file():
        _compare(origin, manifest)
    aside = origin.path.with_suffix(f".{uuid.uuid4().hex}")  # another run may be at it too
    try:
        origin.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(aside, _content(origin, manifest))
        os.replace(aside, origin.path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        message = "%s: nothing is kept there, so shards are read again: %s"
        warn_once(logger, message, origin.path.parent, str(error))


def _content(origin: Origin, manifest: Manifest) -> bytes:
    found = manifest.findings
    facts = {
        "shard": origin.name,
        "state": origin.state,
        "classes": manifest.classes,
        "values": manifest.values,
        "bad": [(row, *flaw) for row, flaw in found.bad.items()],
    }
    arrays = {
        "labels": found.labels,
        "sha256": found.sha256,
        "content": found.content,
        "modes": found.modes.view(np.uint8).reshape(len(found), MODE.itemsize),
        **({} if origin.files is None else {FILES: origin.files}),
    }
    text = json.dumps(facts)
    return save(arrays, {"facts": text, "sha256": _checksum(text, arrays)})


def _checksum(text: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


class _Kept(NamedTuple):
    """A manifest as it was kept, with the state and the numbers of its files."""

    state: str
    files: np.ndarray | None
    manifest: Manifest


def _read(path: Path) -> _Kept:
    with safe_open(path, "np") as file:
        said = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in {*ARRAYS, *file.keys()}}
    same = _checksum(said["facts"], arrays) == said["sha256"]
    if not same or len({*map(len, arrays.values())}) > 1:
        raise ValueError(f"{path} is not as it was written")
    facts = json.loads(said["facts"])
    found = Findings(
        arrays["labels"],
        arrays["sha256"],
        arrays["content"],
        arrays["modes"].reshape(-1).view(MODE),
        {row: Flaw(what, detail) for row, what, detail in facts["bad"]},
    )
    values = None if facts["values"] is None else tuple(facts["values"])
    return _Kept(
        facts["state"], arrays.get(FILES), Manifest(tuple(facts["classes"]), values, found)
    )


def _compare(origin: Origin, now: Manifest) -> None:
    """Compare a shard with its manifest, whenever that was written.

    Raises:
        ValueError: they differ; the message names the shard and what differs.
    """
    then = _read(origin.path).manifest
    if now.classes != then.classes:
        differs = f"it has the classes {list(now.classes)}, it had {list(then.classes)}"
    elif len(now.findings) != len(then.findings):
        differs = f"it has {len(now.findings)} rows, it had {len(then.findings)}"
    else:
        changed = {
            "images": np.flatnonzero((now.findings.sha256 != then.findings.sha256).any(axis=1)),
            "labels": np.flatnonzero(now.findings.labels != then.findings.labels),
        }
        found = {what: rows for what, rows in changed.items() if rows.size}
        differs = "; ".join(f"{_rows(rows)} have other {what}" for what, rows in found.items())
    if differs:
        raise ValueError(
            f"verify_data: {origin.name} is not what was read before: {differs}. Remove"
            f" {origin.path} to take it as it is"
        )


def _rows(rows: Sequence[int] | np.ndarray) -> str:
    shown = ", ".join(str(row) for row in rows[:SHOWN])
    return f"{len(rows)} rows ({shown}{', …' if len(rows) > SHOWN else ''})"
