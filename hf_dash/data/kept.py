"""Decoded images of a stream and their labels, kept by their place in the stream.

Flow: pixels and a label → a record in the arrival's file, whichever worker decoded it → read in
later epochs instead of the stream.
Differs from a :class:`~hf_dash.data.pixel_cache.PixelCache` of map-style images: a stream tells a
label only together with its image, so both are kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_dash.data.pixel_cache import PixelCache
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

LABEL = torch.int64


class KeptExamples:
    """The decoded images of one stream.

    Args:
        count: number of images, at least 1.
        shape: of each, such as [channels, height, width].
        dtype: of each.

    Raises:
        OSError: the file cannot be made.

    Example:
        >>> import torch
        >>> from hf_dash.data.kept import KeptExamples
        >>> kept = KeptExamples(count=2, shape=(1, 2, 2), dtype=torch.uint8)
        >>> kept.write(1, torch.full((1, 2, 2), 7, dtype=torch.uint8), 3)
        >>> pixels, labels, missing = kept.read([1])
        >>> int(pixels.sum()), labels.tolist(), missing, kept.hold([0, 1])
        (28, [3], [], False)
    """

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self._size = self.shape.numel() * dtype.itemsize
        self._records = PixelCache(count, (self._size + LABEL.itemsize,), torch.uint8)

    def read(self, places: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Return images, labels [places], and which of them are not there."""
        records, missing = self._records.read(places)
        pixels = records[:, : self._size].view(self.dtype).view(len(places), *self.shape)
        # Cloned, because a label may begin at any byte.
        labels = records[:, self._size :].clone(memory_format=torch.contiguous_format)
        return pixels, labels.view(LABEL).view(-1), missing

    def write(self, place: int, pixels: Tensor, label: int) -> None:
        """Keep an image; a full disk is said once, and the image is then decoded every time.

        Raises:
            ValueError: it has another shape or type than all others.
        """
        if pixels.shape != self.shape or pixels.dtype != self.dtype:
            raise ValueError(
                f"pixels must have shape {tuple(self.shape)} and type {self.dtype} to be kept, got"
                f" {tuple(pixels.shape)} and {pixels.dtype}; images of several sizes cannot be"
            )
        parts = pixels.contiguous().view(-1), torch.tensor([label], dtype=LABEL)
        self._records.write(place, torch.cat([part.view(torch.uint8) for part in parts]))

    def hold(self, places: Sequence[int]) -> bool:
        """Check that all of these have been written."""
        return self._records.hold(places)


def open_kept(count: int, first: Tensor, label: int) -> KeptExamples | None:
    """Return where a stream's examples are kept, the first one included; None, said, if nowhere."""
    try:
        kept = KeptExamples(count, first.shape, first.dtype)
    except OSError as error:
        logger.warning("decoded images cannot be kept: %s", error)
        return None
    kept.write(0, first, label)
    return kept
