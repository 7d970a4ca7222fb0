"""Batches of images that stay bytes until they are where they are used.

Flow: pixels as a transform's first step returns them → one tensor per batch → from a worker to the
training process and to the device, a quarter as large as floats → normalized there, when asked for.
Source: the protocols of torch's custom batches (``pin_memory``) and of transformers'
``BatchFeature`` (``to``), which ``DataLoader`` and Accelerate follow.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from hf_dash.utils.memory import empty_tensor


class ImageBatch(Mapping[str, Tensor]):
    """A batch: ``pixel_values`` [b, channels, h, w] and ``labels`` [b].

    Args:
        pixels: [b, channels, h, w], before ``normalize``.
        labels: [b], int64.
        normalize: takes the pixels to what the model takes, on the device where they are then; None
            if they are that.

    Example:
        >>> import torch
        >>> from hf_dash.data.image_batch import ImageBatch
        >>> pixels = torch.full((2, 1, 1, 1), 51, dtype=torch.uint8)
        >>> batch = ImageBatch(pixels, torch.tensor([0, 1]), lambda pixels: pixels / 255)
        >>> batch.to("cpu")["pixel_values"].flatten().tolist()
        [0.20000000298023224, 0.20000000298023224]
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, normalize: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.pixels, self.labels, self.normalize = pixels, labels, normalize

    def __getitem__(self, name: str) -> Tensor:
        if name == "labels":
            return self.labels
        if name != "pixel_values":
            raise KeyError(name)
        if self.normalize is not None:
            self.pixels, self.normalize = self.normalize(self.pixels), None
        return self.pixels.contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(("pixel_values", "labels"))

    def __len__(self) -> int:
        return 2

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ImageBatch":
        """Return the batch on a device."""
        pixels, labels = (
            part.to(device, non_blocking=non_blocking) for part in (self.pixels, self.labels)
        )
        return ImageBatch(pixels, labels, self.normalize)

    def pin_memory(self) -> "ImageBatch":
        """Return the batch in memory from which it can be copied to a device in the background."""
        return ImageBatch(self.pixels.pin_memory(), self.labels.pin_memory(), self.normalize)


class Examples(Sequence[dict[str, Any]]):
    """The examples of a batch: ``{"pixel_values": [channels, h, w], "labels": int}`` each."""

    def __init__(self, batch: ImageBatch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        pixels, labels = self.batch.values()
        return {"pixel_values": pixels[index], "labels": int(labels[index])}


def collate(examples: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
    """Return examples as a batch; those that are one already are not copied."""
    if isinstance(examples, Examples):
        return examples.batch
    batch: Mapping[str, Any] = default_collate(list(examples))
    return batch


def collate_values(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return examples as a batch of plain tensors, normalized."""
    return dict(collate(examples))


def stacked(images: Iterable[Tensor | np.ndarray], count: int) -> Tensor | list[Tensor]:
    """Return so many images as one tensor, each copied once; a list if they have several sizes."""
    images = iter(images)
    first = next(images, None)
    if first is None:
        return []
    batch = empty_tensor((count, *first.shape), _tensor(first).dtype)
    places: Any = batch if isinstance(first, Tensor) else batch.numpy()
    for place, image in enumerate(chain([first], images)):
        if image.shape != first.shape or image.dtype != first.dtype:
            return [*batch[:place], *map(_tensor, chain([image], images))]
        places[place] = image
    return batch


def _tensor(image: Tensor | np.ndarray) -> Tensor:
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image, order="C"))


def put_together(
    parts: Sequence[tuple[Sequence[int] | np.ndarray, Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Put the images and labels of parts of a batch in their places.

    Args:
        parts: the places of a part, its images [images, channels, height, width] and its labels.

    Raises:
        ValueError: images have several shapes.
    """
    _, first, labels = parts[0]
    count = sum(len(places) for places, _, _ in parts)
    pixels = empty_tensor((count, *first.shape[1:]), first.dtype)
    labels = torch.empty(count, dtype=labels.dtype)
    for places, images, own in parts:
        if images.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"images of a batch must have one shape, got {tuple(first.shape[1:])} and"
                f" {tuple(images.shape[1:])}"
            )
        at = np.asarray(places)
        pixels[at], labels[at] = images, own
    return pixels, labels


def joined(
    parts: Sequence[tuple[Sequence[int], Sequence[dict[str, Any]]]],
) -> Sequence[dict[str, Any]]:
    """Put parts of a batch together.

    Args:
        parts: the place of each example of a part, and its examples.
    """
    count = sum(len(places) for places, _ in parts)
    batches = [part.batch for _, part in parts if isinstance(part, Examples)]
    kinds = {(b.pixels.shape[1:], b.pixels.dtype, id(b.normalize)) for b in batches}
    if len(batches) == len(parts) and len(kinds) == 1:
        pairs = zip(parts, batches, strict=True)
        placed = [(places, batch.pixels, batch.labels) for (places, _), batch in pairs]
        return Examples(ImageBatch(*put_together(placed), batches[0].normalize))
    examples: list[dict[str, Any]] = [{}] * count
    for places, part in parts:
        for place, example in zip(places, part, strict=True):
            examples[place] = example
    return examples
