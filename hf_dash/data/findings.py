"""What one look at every image finds: what tells it from others, its mode, and why it is no use.

Flow: rows with encoded images → each hashed and decoded, on all cores → ``Findings``, some fifty
bytes an image.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from hf_dash.data.columns import DIGEST, stored_bytes

# The label of a row that has none.
NO_LABEL = -2

# Names of PIL modes, of at most 8 bytes; an image that was not decoded has an empty one.
MODE = np.dtype("S8")


class Flaw(NamedTuple):
    """Why an image cannot be used: what it is, and how that was found out."""

    what: str
    detail: str


@dataclass(frozen=True)
class Findings:
    """What was found in some rows.

    Args:
        labels: int64 [rows]; −1 for one that is not a class, −2 where there is none.
        sha256: of the images as stored, uint8 [rows, 32]; zeros for one that cannot be read.
        content: a number for each image, uint64 [rows]; equal images have equal ones.
        modes: PIL modes of the images, bytes [rows]; empty for one that was not decoded.
        bad: flaws of the images that cannot be used, by row.

    Example:
        >>> from hf_dash.data.findings import look_at
        >>> look_at([([{"bytes": b"no image", "path": None}], [1])]).bad[0].what
        'is a corrupt image'
    """

    labels: np.ndarray
    sha256: np.ndarray
    content: np.ndarray
    modes: np.ndarray
    bad: dict[int, Flaw] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Earlier:
    """What an earlier command has found in those rows of a shard whose files are the same.

    Args:
        found: in all rows that the shard had then.
        then: places of these rows in ``found``.
        now: places that they have today.

    Example:
        >>> import numpy as np
        >>> from hf_dash.data.findings import Earlier, look_at
        >>> found = look_at([([{"bytes": b"no image", "path": None}], [1])])
        >>> Earlier(found, then=np.array([0]), now=np.array([1])).others(3).tolist()
        [0, 2]
    """

    found: Findings
    then: np.ndarray
    now: np.ndarray

    def others(self, num_rows: int) -> np.ndarray:
        """Return the places of all other rows of a shard that has so many today."""
        return np.setdiff1d(np.arange(num_rows), self.now)

    def joined(self, others: Findings, labels: np.ndarray) -> Findings:
        """Return what is found in all rows.

        Args:
            others: in all other rows, in their order.
            labels: of all rows, int64.
        """
        places = self.others(len(labels))
        order = np.argsort(np.concatenate([self.now, places]))

        def column(name: str) -> np.ndarray:
            then = getattr(self.found, name)[self.then]
            return np.concatenate([then, getattr(others, name)])[order]

        moved = zip(self.then.tolist(), self.now.tolist(), strict=True)
        bad = {now: self.found.bad[then] for then, now in moved if then in self.found.bad}
        bad |= {int(places[row]): flaw for row, flaw in others.bad.items()}
        columns = column("sha256"), column("content"), column("modes")
        return Findings(labels, *columns, dict(sorted(bad.items())))


class _Look(NamedTuple):
    sha256: bytes
    content: int
    mode: bytes = b""
    flaw: Flaw | None = None


def look_at(
    batches: Iterable[tuple[Sequence[Any], Sequence[int | None]]],
    *,
    mode: str | None = None,
    by_pixels: bool = False,
    decodes: bool = True,
) -> Findings:
    """Hash and decode images.

    Args:
        batches: undecoded images and their labels.
        mode: PIL mode that images will be converted to; None leaves them alone.
        by_pixels: tell images apart by their pixels instead of their encoded bytes.
        decodes: False decodes only where pixels are compared.
    """
    look = partial(_look, mode=mode, by_pixels=by_pixels, decodes=decodes or by_pixels)
    labels: list[int] = []
    looks: list[_Look] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing and Pillow's decoders run at once
        for images, own in batches:
            looks += pool.map(look, images)
            labels += [NO_LABEL if label is None else label for label in own]
    return Findings(
        np.array(labels, dtype=np.int64),
        np.frombuffer(b"".join(one.sha256 for one in looks), np.uint8).reshape(-1, DIGEST),
        np.array([one.content for one in looks], dtype=np.uint64),
        np.array([one.mode for one in looks], dtype=MODE),
        {row: one.flaw for row, one in enumerate(looks) if one.flaw},
    )


def _look(value: Any, *, mode: str | None, by_pixels: bool, decodes: bool) -> _Look:
    look = _Look(bytes(DIGEST), 0)
    try:
        content = stored_bytes(value)
        digest = hashlib.sha256(content).digest()
        look = _Look(digest, _number(digest))
        return _decode(value, content, look, mode, by_pixels) if decodes else look
    except Exception as error:  # a decoder may raise anything for a broken file
        flaw = Flaw("is a corrupt image", f"{type(error).__name__}: {error}")
        return look._replace(flaw=flaw)


def _decode(value: Any, content: bytes, look: _Look, mode: str | None, by_pixels: bool) -> _Look:
    """Decode an image; its pixels may tell it from others."""
    in_memory = isinstance(value, PILImage.Image)
    image = value if in_memory else PILImage.open(io.BytesIO(content))
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        detail = f"mode {image.mode}: scale it to 8 bits first, since converting it would clip"
        return look._replace(flaw=Flaw("has more than 8 bits a pixel", detail))
    look = look._replace(mode=(mode or image.mode).encode())
    if not by_pixels:
        return look
    image = ImageOps.exif_transpose(image)
    image = image if mode is None else image.convert(mode)
    pixels = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return look._replace(content=_number(hashlib.sha256(pixels).digest()))


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
