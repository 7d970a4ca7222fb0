"""Files that are whole or absent: written aside, renamed into place, one writer at a time."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


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
def files_written_aside(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files move into ``folder`` when all of them are whole.

    Each moves in one step; ``folder`` is made where it does not exist, other files in it stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        yield Path(aside)
        for file in sorted(Path(aside).iterdir()):
            os.replace(file, folder / file.name)


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


@contextmanager
def one_writer(output_dir: str | Path) -> Iterator[None]:
    """Keep other processes from working in the same folder; ends with the process, however.

    Raises:
        ValueError: another process is at work there.

    Example:
        >>> import hf_dash
        >>> with hf_dash.utils.one_writer("runs/today"):
        ...     with hf_dash.utils.one_writer("runs/today"):
        ...         pass
        Traceback (most recent call last):
        ValueError: output_dir 'runs/today' is in use by another process: wait for it, or give...
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(output_dir) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"output_dir {str(output_dir)!r} is in use by another process: wait for it, or give"
            " another output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()
