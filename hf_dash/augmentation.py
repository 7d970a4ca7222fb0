"""Random crops and flips of images that have been transformed already.

Flow: example → its ``pixel_values`` cropped and flipped at random → the example.
Source: the usual augmentation of CIFAR-sized images (padding 4, random crop, horizontal flip).
Differs from torchvision's ``RandomCrop``: the draws come from a given generator, and padding is
black as the model sees it, after normalisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.v2 import functional as vision

# Called with one image [channels, height, width] and where to draw from; None is torch's own state.
Augment = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class RandomCropFlip:
    """Pad an image, cut its old size out at random, and mirror every second one left to right.

    Args:
        fill: value of the padding per channel, in the units of the image; for black under a
            model's normalisation see :func:`~hf_dash.models.black_pixel`.
        padding: pixels added on every side, at least 0.

    Raises:
        ValueError: an argument is out of its range.
    """

    fill: tuple[float, ...]
    padding: int = 4

    def __post_init__(self) -> None:
        if not self.fill:
            raise ValueError("fill must hold one value per channel, got none")
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0, got {self.padding!r}")

    def __call__(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return another view of an image [channels, height, width], of the same shape."""
        channels, height, width = pixels.shape
        if channels != len(self.fill):
            raise ValueError(
                f"fill must hold one value per channel, {channels} here, got {self.fill}"
            )
        offsets = torch.randint(2 * self.padding + 1, (2,), generator=generator)
        top, left = offsets.tolist()
        flip = bool(torch.randint(2, (), generator=generator))
        padded = vision.pad(pixels, [self.padding], fill=list(self.fill))
        cut: Tensor = vision.crop(padded, top, left, height, width)
        if flip:
            cut = vision.horizontal_flip(cut)
        return cut


class AugmentedExamples(Dataset[dict[str, Any]]):
    """Examples whose ``pixel_values`` are another view of the image each time they are read.

    Args:
        examples: mappings with ``pixel_values``.
        augment: makes the view.
        generator: drawn from in this process. A worker process of a ``DataLoader`` draws from its
            own random state, which the loader seeds from its generator.
    """

    def __init__(
        self, examples: "Dataset[dict[str, Any]]", augment: Augment, generator: torch.Generator
    ) -> None:
        self.examples = examples
        self.augment = augment
        self.generator = generator

    def __len__(self) -> int:
        return len(self.examples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        generator = self.generator if get_worker_info() is None else None
        return {**example, "pixel_values": self.augment(example["pixel_values"], generator)}
