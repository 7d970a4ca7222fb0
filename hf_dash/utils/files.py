"""Files that are whole or absent: written aside, flushed, renamed; one writer at a time.

Flow: content → a hidden copy next to its place → on the disk → one rename. Several files that
belong together are written into one hidden folder, whose rename to ``.pending`` is the moment that
counts: whatever kills the process later, :func:`finish_replacing` moves the rest.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from filelock import FileLock, Timeout

# Files that belong together: being written, and whole but not all moved yet.
ASIDE, PENDING = ".aside", ".pending"

STALE = "stale.json"

# Room that is left on a disk after what is known to be needed, in bytes.
RESERVE = 2**20


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file ``path`` by ``content`` in one step."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def files_written_aside(folder: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Give a folder to write into, whose files replace those in ``folder`` together.

    ``folder`` is made where it does not exist, and other files in it stay. An error in the block
    leaves it as it was.

    Args:
        folder: where the files belong.
        stale: names of files that are removed unless they are written again.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    finish_replacing(folder)
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        replace_files(folder, aside, stale)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def replace_files(folder: Path, aside: Path, stale: Iterable[str] = ()) -> None:
    """Move all files of ``aside`` into ``folder`` and remove ``stale`` ones, as one step.

    Args:
        folder: where the files belong.
        aside: a folder on the same disk; it is gone afterwards.
        stale: names of files in ``folder`` that are removed unless ``aside`` holds them too.
    """
    names = {file.name for file in aside.iterdir()}
    (aside / STALE).write_text(json.dumps(sorted(set(stale) - names)), encoding="utf-8")
    flush_folder(aside)
    os.rename(aside, folder / PENDING)
    flush_folder(folder)
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Finish what :func:`replace_files` began, where it was killed in the middle."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    left = pending / STALE
    for name in json.loads(left.read_text(encoding="utf-8")) if left.exists() else ():
        (folder / name).unlink(missing_ok=True)
    for file in sorted(pending.iterdir()):
        if file.name != STALE:
            os.replace(file, folder / file.name)
    flush_folder(folder)
    left.unlink(missing_ok=True)
    pending.rmdir()


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path, largest: int) -> Any:
    """Read a JSON file of at most ``largest`` bytes.

    Raises:
        ValueError: it is larger, no JSON, or nested too deeply.
    """
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"it has {size:,} bytes, at most {largest:,} are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def flush_folder(folder: Path) -> None:
    """Wait until a folder's entries and the files in it are on the disk, power failure or not."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    for path in (*(entry for entry in folder.iterdir() if entry.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def public_name(name: str) -> str:
    """Return what may be told of a name: the last part of a local path, any other name whole.

    Args:
        name: a path, a glob of files, the id of a repository, or any other word.
    """
    windows = PureWindowsPath(name)
    local = windows.drive or name.startswith(("/", "~", "./", "../", "\\")) or os.path.exists(name)
    if not local and not glob.has_magic(name):
        return name
    parts = (windows if windows.drive else PurePath(name)).parts
    first = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    # Of a glob, the folder it is in and the pattern.
    shown = parts[max(0, first - 1) :]
    return "/".join(part for part in shown if part.strip("/\\")) or name.strip("/\\.~")


def public(value: Any) -> Any:
    """Return a setting as it may be told: texts, and those in a list, as :func:`public_name`."""
    if isinstance(value, str):
        return public_name(value)
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    return value


def check_output_dir(output_dir: str | Path) -> Path:
    """Make the folder that a command writes into, and return it.

    Raises:
        TypeError: it is not a path.
        ValueError: it is empty text, or a file.
        OSError: it cannot be made or written.
    """
    if not isinstance(output_dir, str | Path):
        raise TypeError(f"output_dir must be a folder's path, got {output_dir!r}")
    if not str(output_dir).strip():
        raise ValueError(f"output_dir must name a folder, got {output_dir!r}")
    folder = Path(output_dir)
    file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if file is not None:
        raise ValueError(f"output_dir must be a folder, got {str(output_dir)!r}: {file} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir must be writable, got {str(output_dir)!r}")
    return folder


def check_free_space(folder: Path, needed: int) -> None:
    """Check that a disk has room for what will be written to it.

    Args:
        folder: on the disk; it exists.
        needed: bytes.

    Raises:
        OSError: there is not enough; nothing has been written.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE:
        raise OSError(
            f"output_dir {str(folder)!r} has {free / 1e6:,.1f} MB left, but about"
            f" {(needed + RESERVE) / 1e6:,.1f} MB will be written there"
        )


@contextmanager
def one_writer(output_dir: str | Path, *, wait: float = 0.0) -> Iterator[None]:
    """Keep other processes from writing into the same folder; ends with the process, however.

    In one process the calls for a folder may be nested.

    Args:
        output_dir: made where it does not exist.
        wait: seconds to wait for another process to finish.

    Raises:
        ValueError: another process is at work there; or ``output_dir`` is a file or empty.
        OSError: ``output_dir`` cannot be written.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> with tempfile.TemporaryDirectory() as folder, hf_dash.utils.one_writer(folder):
        ...     pass  # write into the folder
    """
    folder = check_output_dir(output_dir).resolve()
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise ValueError(
            f"output_dir {str(output_dir)!r} is in use by another process: wait for it, or give"
            " another output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()
