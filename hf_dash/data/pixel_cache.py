"""Decoded images in one file per arrival, which all processes on a machine fill and share.

Flow: pixels as a transform's first step returns them → a record per image, written where it was
missing → read again by other workers, ranks, starts, rounds, epochs and runs.
Differs from tensors in memory: the file is sparse and filled as images are needed, so nothing waits
for it; the system keeps it in memory while there is room and may drop it at any time. Differs from
a memory map: a file that another program cuts short is read as missing, and does not end the
process.
"""

import io
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
import xxhash
from huggingface_hub.constants import HF_HOME
from torch import Tensor

from hf_dash.utils.distributed import is_main_process
from hf_dash.utils.logging import get_logger
from hf_dash.utils.memory import empty_tensor

logger = get_logger(__name__)

# A checksum before every image; 0 is an image that was not written yet.
HEADER = 8

# Seconds for which a file stays that nobody has used.
IN_USE = 3600


def cache_folder() -> Path:
    """Return where caches lie: ``HF_DASH_CACHE``, or a folder in ``HF_HOME``."""
    return Path(os.environ.get("HF_DASH_CACHE") or Path(HF_HOME) / "hf_dash" / "pixels")


class PixelBudget:
    """How many bytes of decoded images may be kept, shared by all arrivals of a run.

    Args:
        cache_gb: so many billion bytes, at least 0; None takes a quarter of the free memory, or of
            the free disk if that is less.

    Example:
        >>> from hf_dash.data.pixel_cache import PixelBudget
        >>> budget = PixelBudget(cache_gb=1e-6)
        >>> budget.take("monday", 600), budget.take("monday", 600), budget.take("tuesday", 600)
        (True, True, False)
    """

    def __init__(self, cache_gb: float | None = None) -> None:
        self._cache_gb = cache_gb
        self._total: int | None = None
        self._taken: dict[str, int] = {}
        self._said = False

    def take(self, key: str, size: int) -> bool:
        """Reserve bytes for what has this key; False if they do not fit, which is said once."""
        if self._total is None:
            self._total = _free_quarter() if self._cache_gb is None else int(self._cache_gb * 1e9)
        if key in self._taken:
            return True
        if sum(self._taken.values()) + size > self._total:
            if not self._said and is_main_process():
                logger.warning(
                    "decoded images of %.3g GB do not fit into cache_gb %.3g, %.3g of which are in"
                    " use: they are decoded at every use, in parallel by num_workers",
                    *(size / 1e9, self._total / 1e9, sum(self._taken.values()) / 1e9),
                )
            self._said = True
            return False
        self._taken[key] = size
        _make_room(size, self._total)
        return True


def _free_quarter() -> int:
    folder = cache_folder()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    # What caches hold already can be reused or removed.
    free_disk = shutil.disk_usage(there).free + sum(size for size, _, _ in _kept_files(folder))
    return int(min(psutil.virtual_memory().available, free_disk)) // 4


def _make_room(wanted: int, budget: int) -> None:
    """Remove the files that have not been used for longest, until ``wanted`` bytes fit as well."""
    files = sorted(_kept_files(cache_folder()), key=lambda file: file[1])
    total = sum(size for size, _, _ in files)
    for size, used, path in files:
        if total + wanted <= budget or time.time() - used < IN_USE:
            return
        path.unlink(missing_ok=True)
        total -= size


def _kept_files(folder: Path) -> list[tuple[int, float, Path]]:
    """Return the size on disk, the time of the last use and the path of each file."""
    found = []
    for path in folder.glob("*.pixels"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another run has removed it
            continue
        used = max(status.st_atime, status.st_mtime)
        found.append((status.st_blocks * 512, used, path))
    return found


class PixelCache:
    """The decoded images of one arrival.

    Args:
        count: number of images, at least 1.
        shape: of each, such as [channels, height, width].
        dtype: of each.
        key: tells these images and the way they were decoded from all others; runs with the same
            key share one file. None makes a file of this process and its workers, which goes when
            it ends.

    Raises:
        OSError: the file cannot be made.

    Example:
        >>> import torch
        >>> from hf_dash.data.pixel_cache import PixelCache
        >>> cache = PixelCache(count=2, shape=(1, 2, 2), dtype=torch.uint8)
        >>> cache.write(1, torch.full((1, 2, 2), 7, dtype=torch.uint8))
        >>> images, missing = cache.read([0, 1])
        >>> missing, int(images[1].sum())
        ([0], 28)
    """

    def __init__(
        self, count: int, shape: Sequence[int], dtype: torch.dtype, key: str | None = None
    ) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self._record = HEADER + self.shape.numel() * dtype.itemsize
        self._size = count * self._record
        self.path = cache_folder() / f"{key or uuid.uuid4().hex}.pixels"
        self._file = _open(self.path, self._size)
        self._full = False
        self._written = np.zeros(count, dtype=bool)  # as far as known
        weakref.finalize(self, self._file.close)
        if key is None:
            weakref.finalize(self, _remove, self.path, os.getpid())

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return images [images, *shape], and the places of those that are not as written."""
        records = empty_tensor((len(indices), self._record), torch.uint8)
        content, file = records.view(-1).numpy().data, self._file.fileno()
        missing = []
        for place, index in enumerate(indices):
            record = content[place * self._record : (place + 1) * self._record]
            length = os.preadv(file, [record], index * self._record)
            header = int.from_bytes(record[:HEADER], "little")
            if length < self._record or header != _checksum(record[HEADER:]):
                missing.append(place)
        pixels = records[:, HEADER:].view(self.dtype)
        return pixels.view(len(indices), *self.shape), missing

    def hold(self, indices: Sequence[int]) -> bool:
        """Check that all of these images have been written; whether whole, :meth:`read` tells."""
        places, file = np.asarray(indices, dtype=np.int64), self._file.fileno()
        for index in places[~self._written[places]].tolist():
            if not any(os.pread(file, HEADER, index * self._record)):
                return False
            self._written[index] = True
        return True

    def write(self, index: int, pixels: Tensor) -> None:
        """Keep an image; a full disk is said once, and the image is then decoded every time.

        Raises:
            ValueError: it has another shape or type than all others.
        """
        if pixels.shape != self.shape or pixels.dtype != self.dtype:
            raise ValueError(
                f"pixels must have shape {tuple(self.shape)} and type {self.dtype} to be kept, got"
                f" {tuple(pixels.shape)} and {pixels.dtype}; images of several sizes cannot be"
            )
        if self._full:
            return
        content = _bytes_of(pixels.contiguous())
        header = _checksum(content).to_bytes(HEADER, "little")
        why = "the disk is full"
        try:
            length = os.pwritev(self._file.fileno(), [header, content], index * self._record)
        except OSError as error:
            length, why = 0, str(error)
        if length < self._record:
            self._full = True
            logger.warning("%s: %s; images that are not in it are decoded again", self.path, why)

    def __reduce__(self) -> tuple[object, ...]:
        # A worker that is not forked opens the file itself.
        return _reopened, (self.path, self._size, self.shape, self.dtype)


def _reopened(path: Path, size: int, shape: torch.Size, dtype: torch.dtype) -> PixelCache:
    return PixelCache(size // (HEADER + shape.numel() * dtype.itemsize), shape, dtype, path.stem)


def _open(path: Path, size: int) -> io.FileIO:
    """Open a file of this size; one that is missing, or was cut, is made anew."""
    found = path.stat().st_size if path.is_file() else None
    if found not in (None, size):
        if is_main_process():
            logger.warning("%s has %d bytes in place of %d: made anew", path, found, size)
        path.unlink(missing_ok=True)
    if found != size:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{uuid.uuid4().hex}")
        with aside.open("xb") as file:
            file.truncate(size)
        with suppress(FileExistsError):  # another process was faster: its file is taken
            os.link(aside, path)
        aside.unlink()
    return path.open("r+b", buffering=0)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked worker
        path.unlink(missing_ok=True)


def _bytes_of(pixels: Tensor) -> memoryview:
    return pixels.reshape(-1).view(torch.uint8).numpy().data


def _checksum(content: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(content) or 1
