"""From images to model inputs, in two steps: pixels that can be kept, and their normalization.

Flow: a PIL image, or the rows of one → resized and cropped, uint8 → scaled and normalized, float32,
many at once.
Source: timm's and torchvision's evaluation transforms.
Differs from them: the first step's result is a quarter as large, so it is what caches keep and
workers send; rows of the right size are taken as they are. Both steps together give the same bits,
at half the cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from hf_dash.utils.memory import empty_tensor

# Values normalized at a time: as many as stay in a processor's cache between the steps.
IN_CACHE = 1 << 18

# An image as it is decoded: one of Pillow's, or its rows, uint8 [height, width] in gray or
# [height, width, 3] in color.
Decoded: TypeAlias = Image.Image | np.ndarray


def as_image(image: Decoded) -> Image.Image:
    """Return an image as one of Pillow's."""
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def mode_of(image: Decoded) -> str:
    """Return the mode that an image has in Pillow."""
    if isinstance(image, np.ndarray):
        return "L" if image.ndim == 2 else "RGB"
    return image.mode


@dataclass(frozen=True)
class ImageTransform:
    """From a PIL image of one mode to a tensor [channels, height, width].

    Args:
        pixels: the first step; uint8 [channels, height, width] if ``normalize`` follows.
        mode: of the images; None takes any.
        takes: the same in words, for errors.
        normalize: the second step, from [..., channels, height, width] to the same shape in
            float32; None if ``pixels`` does everything.
        key: of a first step that draws nothing at random; another one has another key, in other
            processes too. None if that is not known.

    Example:
        >>> from PIL import Image
        >>> from torchvision.transforms.functional import pil_to_tensor
        >>> from hf_dash.transforms import ImageTransform
        >>> halves = ImageTransform(pil_to_tensor, "L", "it takes 'L'", lambda pixels: pixels / 510)
        >>> halves(Image.new("L", (2, 1), 255))
        tensor([[[0.5000, 0.5000]]])
    """

    pixels: Callable[[Image.Image], Tensor]
    mode: str | None
    takes: str
    normalize: Callable[[Tensor], Tensor] | None = None
    key: str | None = None

    @classmethod
    def of(cls, transform: Callable[[Any], Tensor]) -> "ImageTransform":
        """Return any transform as one of these: as it is, or else as a first step of any mode."""
        return transform if isinstance(transform, cls) else cls(transform, None, "it takes any")

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an image.

        Raises:
            ValueError: it has another mode.
        """
        if self.mode is not None:
            self.check_mode(image.mode)
        pixels = self.pixels(image)
        return pixels if self.normalize is None else self.normalize(pixels)

    def checked_pixels(self, image: Decoded) -> Tensor | np.ndarray:
        """Take the first step.

        Returns:
            [channels, height, width]; an array is a view of rows, for the caller to copy.

        Raises:
            ValueError: the image has another mode.
        """
        if self.mode is not None:
            self.check_mode(mode_of(image))
        if isinstance(self.pixels, ToPixels):
            return self.pixels.view(image)
        return self.pixels(as_image(image))

    def check_mode(self, mode: str) -> None:
        """Refuse another mode, instead of converting images silently."""
        if self.mode is not None and mode != self.mode:
            hint = f"load images with image_mode={self.mode!r}, or create a model of other in_chans"
            if mode[0] in "IF":  # which Pillow converts by clipping
                hint = "scale it to 8 bits first"
            raise ValueError(f"image mode is {mode!r}, but {self.takes}; {hint}")


@dataclass(frozen=True)
class Normalize:
    """Scale pixels from 0 … 255 to 0 … 1, then subtract the mean and divide by the deviation.

    Args:
        mean: [channels, 1, 1], float32.
        std: [channels, 1, 1], float32.
    """

    mean: Tensor
    std: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return [..., channels, height, width] in float32, contiguous, where the pixels are."""
        device, dtype = pixels.device, self.mean.dtype
        mean, std = self.mean.to(device), self.std.to(device)
        if device.type != "cpu" or pixels.dim() <= mean.dim():
            floats = torch.empty(pixels.shape, dtype=dtype, device=device).copy_(pixels)
            return floats.div_(255).sub_(mean).div_(std)
        floats = empty_tensor(pixels.shape, dtype)
        at_once = max(1, IN_CACHE * len(pixels) // max(1, pixels.numel()))
        parts = zip(torch.split(pixels, at_once), torch.split(floats, at_once), strict=True)
        for values, part in parts:
            part.copy_(values).div_(255).sub_(mean).div_(std)
        return floats

    def to(self, device: torch.device | str) -> "Normalize":
        """Return one that is on a device already, so that no call copies anything to it."""
        return Normalize(self.mean.to(device), self.std.to(device))

    def __reduce__(self) -> tuple[Any, ...]:
        # As numbers: a worker would send every tensor through a file of its own.
        return _normalize, (self.mean.tolist(), self.std.tolist())


def _normalize(mean: list[Any], std: list[Any]) -> Normalize:
    return Normalize(torch.tensor(mean), torch.tensor(std))


class CenterCrop(transforms.CenterCrop):  # type: ignore[misc]
    """A crop that leaves images of the right size alone, where torchvision copies them."""

    def forward(self, image: Image.Image) -> Image.Image:
        """Return the middle of an image."""
        wanted: Image.Image = image
        if (image.height, image.width) != tuple(self.size):
            wanted = super().forward(image)
        return wanted


class ToPixels:
    """Resize and crop an image, and lay its channels out one after the other.

    Args:
        geometry: steps from a PIL image to another.
    """

    def __init__(self, geometry: Sequence[Callable[[Image.Image], Image.Image]]) -> None:
        self.geometry = transforms.Compose(geometry)
        self.size = _size_left_alone(geometry)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an image [channels, height, width], contiguous."""
        return torch.from_numpy(np.array(self.view(image), order="C"))

    def view(self, image: Decoded) -> np.ndarray:
        """Return an image [channels, height, width] as its rows lie in memory."""
        if isinstance(image, np.ndarray) and image.shape[:2] == self.size:
            rows = image
        else:
            rows = np.asarray(self.geometry(as_image(image)))
        return rows[None] if rows.ndim == 2 else rows.transpose(2, 0, 1)

    def __repr__(self) -> str:
        return f"ToPixels({self.geometry})"


def _size_left_alone(geometry: Sequence[Any]) -> tuple[int, int] | None:
    """Return the height and width of images that are neither resized nor cropped, if known."""
    if not geometry or {*map(type, geometry)} - {transforms.Resize, CenterCrop}:
        return None
    cut = geometry[-1]
    if not isinstance(cut, CenterCrop):
        return None
    height, width = cut.size
    image = Image.new("L", (width, height))
    return (height, width) if transforms.Compose(geometry)(image) is image else None


def split_transform(
    transform: transforms.Compose, mode: str | None
) -> tuple[Callable[[Image.Image], Tensor], Normalize | None]:
    """Split a transform that ends in a conversion to floats and a normalization before these two.

    Args:
        transform: such as timm's for evaluation.
        mode: of the images.

    Returns:
        The two steps of an :class:`ImageTransform`; any other transform is a first step, whole.
    """
    *geometry, to_floats, last = transform.transforms
    is_usual = isinstance(last, transforms.Normalize) and "ToTensor" in type(to_floats).__name__
    if mode is None or not is_usual:
        return transform, None
    mean, std = (_per_channel(values) for values in (last.mean, last.std))
    cut = [CenterCrop(s.size) if type(s) is transforms.CenterCrop else s for s in geometry]
    return ToPixels(cut), Normalize(mean, std)


def _per_channel(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)
