"""Tar archives: whether they are whole; compressed ones unpacked once, so that parts can be read.

Flow: a compressed archive → a plain copy in the cache folder, written aside, checked for its end on
the way, moved into place → read as any tar file.
Differs from reading through the compression: no image costs what comes before it in the archive.
"""

import errno
import gzip
import hashlib
import io
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from hf_dash.data.pixel_cache import cache_folder
from hf_dash.data.stamps import stamp_of
from hf_dash.utils.logging import get_logger, warn_once

logger = get_logger(__name__, main_process_only=True)

# Bytes of the two empty blocks that end a tar file.
TAR_END = 1024

NO_END = "the archive has no end: it was cut off or is still being written"

# Bytes that are unpacked at a time.
BLOCK = 1 << 20

# Bytes that a disk keeps free for others.
RESERVE = 1 << 30

# Seconds without use after which a copy goes: always, and where room is needed or its archive has
# changed. A command uses it when it opens the archive and at every read.
DAY = 24 * 3600
WEEK = 7 * DAY


class _NoCopyError(Exception):
    """There is nowhere to write a copy."""


def plain_archive(path: Path, *, known: bool = False, anew: bool = False) -> Path:
    """Return an archive, checked for its end, as a tar file that is not compressed.

    A compressed one is unpacked into the folder of caches, unless an earlier command has done so.
    Processes that want it at the same time wait for the first one. The copy is as large as all that
    the archive holds.

    Args:
        path: of a ``.tar``, ``.tar.gz`` or ``.tgz`` file.
        known: it was checked before, and has not changed since.
        anew: unpack it although there is a copy.

    Returns:
        The archive itself if it is plain, or if there is nowhere to unpack it, which is said once.

    Raises:
        ValueError: the archive was cut off, or replaced while it was unpacked.
        EOFError: it was cut off within its compression.
        OSError: it cannot be read.
        zlib.error: it is damaged.
    """
    if path.suffix.lower() == ".tar":
        if not known and not _has_end(path):
            raise ValueError(NO_END)
        return path
    copy = copy_of(path)
    try:
        if anew or not _is_whole(copy):
            _unpack_alone(path, copy)
        note_use(copy)
        return copy
    except _NoCopyError as error:
        warn_once(
            logger,
            "%s: nothing can be unpacked there, so compressed archives are read from their"
            " beginning, and again for every part: %s",
            *(cache_folder(), str(error)),
        )
    if not known:
        for _ in _unpacked(path):
            pass
    return path


def copy_of(path: Path) -> Path:
    """Return where an archive is unpacked to; what replaces it has another place."""
    names = (
        hashlib.sha256(repr(part).encode()).hexdigest()[:32]
        for part in (str(path.resolve()), stamp_of(path))
    )
    return cache_folder() / f"{'-'.join(names)}.tar"


def note_use(copy: Path) -> None:
    """Note that a copy is used now, so that it stays; its time of change stays the archive's."""
    with suppress(OSError):  # of another user, or removed by hand
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))


def _has_end(path: Path) -> bool:
    # An archive ends in two empty blocks. Readers do not notice one cut off between two members.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAR_END))
        return file.read() == bytes(TAR_END)


def _is_whole(copy: Path) -> bool:
    return copy.is_file() and _has_end(copy)


def _unpacked(path: Path) -> Iterator[bytes]:
    """Yield the content of a compressed archive; raise a ``ValueError`` if its end is missing."""
    end = b""
    with gzip.open(path) as packed:
        while block := packed.read(BLOCK):
            end = (end + block)[-TAR_END:]
            yield block
    if end != bytes(TAR_END):
        raise ValueError(NO_END)


@contextmanager
def _copying() -> Iterator[None]:
    """Tell errors of the folder of caches from those of an archive."""
    try:
        yield
    except OSError as error:
        raise _NoCopyError(error.strerror or str(error)) from error


def _unpack_alone(path: Path, copy: Path) -> None:
    """Unpack an archive, unless another process has just done so."""
    found = _number(copy)
    with _copying():
        copy.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(copy.with_suffix(".lock"))
        lock.acquire()
    try:
        if _number(copy) != found and _is_whole(copy):
            return
        _remove_unused(copy, WEEK)
        logger.info("%s is unpacked, which is done once: to %s", path, copy)
        try:
            _unpack(path, copy)
        except _NoCopyError:
            if not _remove_unused(copy, DAY):
                raise
            _unpack(path, copy)
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _number(copy: Path) -> int | None:
    """Return what tells a file from the one that replaces it."""
    return copy.stat().st_ino if copy.exists() else None


def _unpack(path: Path, copy: Path) -> None:
    aside = copy.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        with _copying():
            file = aside.open("xb", buffering=0)
        with file:
            for block in _unpacked(path):
                with _copying():
                    _write(file, block)
            with _copying():
                os.fsync(file.fileno())
        if copy_of(path) != copy:
            raise ValueError(f"{path} was replaced while it was unpacked")
        with _copying():
            # The loaders of ``datasets`` know a file by its path and time.
            os.utime(aside, ns=(time.time_ns(), path.stat().st_mtime_ns))
            os.replace(aside, copy)
    finally:
        aside.unlink(missing_ok=True)


def _write(file: io.FileIO, content: bytes) -> None:
    if shutil.disk_usage(file.fileno()).free < RESERVE:
        raise OSError(errno.ENOSPC, "the disk is full but for the last GB")
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _remove_unused(wanted: Path, seconds: float) -> bool:
    """Remove copies that were not used for so long; return whether there were any.

    Args:
        wanted: one that is about to be written, whose archive may have had other copies.
        seconds: for others; what a killed process has left, and other copies of its archive, go
            after a day.
    """
    place, removed = wanted.name.partition("-")[0], False
    for file in (*wanted.parent.glob("*-*.tar"), *wanted.parent.glob("*-*.part")):
        with suppress(OSError):  # another process has removed it
            status, is_copy = file.stat(), file.suffix == ".tar"
            used = status.st_atime if is_copy else status.st_mtime
            limit = seconds if is_copy and not file.name.startswith(place) else DAY
            if file != wanted and time.time() - used > limit:
                file.unlink()
                removed = True
    return removed
