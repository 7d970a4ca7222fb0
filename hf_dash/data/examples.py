"""Labeled images as model inputs: decoded, labeled, and augmented where asked for.

Flow: a HF dataset with the columns ``image`` and ``label`` → a torch dataset of ``pixel_values``
and ``labels``, decoded once or on every use, a batch at a time, with label noise on request →
random crops and flips.
Source: the usual augmentation of CIFAR-sized images (padding 4, random crop, horizontal flip).
Differs from torchvision's ``RandomCrop``: draws come from a given generator, and the padding is
black as the model sees it, after normalization.
"""

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import ConcatDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2 import functional as vision

from hf_dash.data.columns import fingerprint, part_of, undecoded, whole_numbers
from hf_dash.data.decoding import image_decoder
from hf_dash.data.image_batch import Examples, ImageBatch, joined, stacked
from hf_dash.data.pixel_cache import PixelBudget, PixelCache
from hf_dash.data.stamps import Stamps
from hf_dash.method.batches import check_labels
from hf_dash.transforms import ImageTransform, Normalize
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

# Takes one image [channels, height, width] and a generator; None draws from torch's global state.
Augment = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class RandomCropFlip:
    """Pad an image, crop its original size at random, and flip it left to right half of the time.

    Args:
        fill: value of the padding per channel, in the units of the image. For black under a
            model's normalization see :func:`~hf_dash.models.black_pixel`.
        padding: pixels added on every side, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from hf_dash.data import RandomCropFlip
        >>> augment = RandomCropFlip(fill=(0.0, 0.0, 0.0), padding=4)
        >>> augment(torch.rand(3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([3, 32, 32])
    """

    fill: tuple[float, ...]
    padding: int = 4

    def __post_init__(self) -> None:
        if not self.fill:
            raise ValueError("fill must hold one value per channel, got none")
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0, got {self.padding!r}")

    def __call__(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return another view of an image [channels, height, width], in the same shape."""
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


class AugmentedExamples(TorchDataset[dict[str, Any]]):
    """Examples whose ``pixel_values`` are a new view of the image at every read.

    Args:
        examples: mappings with ``pixel_values``.
        augment: creates the view.
        generator: source of randomness in this process. A ``DataLoader`` worker draws from its own
            random state, which the loader seeds.
    """

    def __init__(
        self, examples: "TorchDataset[dict[str, Any]]", augment: Augment, generator: torch.Generator
    ) -> None:
        self.examples = examples
        self.augment = augment
        self.generator = generator

    def __len__(self) -> int:
        return len(self.examples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Return several examples; a ``DataLoader`` asks for a batch at once."""
        generator = self.generator if get_worker_info() is None else None
        examples = read_examples(self.examples, indices)
        views = stacked(
            (self.augment(example["pixel_values"], generator) for example in examples),
            len(examples),
        )
        if isinstance(views, Tensor) and isinstance(examples, Examples):
            return Examples(ImageBatch(views, examples.batch.labels))
        return [
            {**example, "pixel_values": view} for example, view in zip(examples, views, strict=True)
        ]


def read_examples(
    dataset: "TorchDataset[dict[str, Any]]", indices: Sequence[int]
) -> Sequence[dict[str, Any]]:
    """Return several examples of a dataset, at once if it can."""
    at_once = getattr(dataset, "__getitems__", None)
    if at_once is None:
        return [dataset[index] for index in indices]
    examples: Sequence[dict[str, Any]] = at_once(indices)
    return examples


class JoinedExamples(ConcatDataset[dict[str, Any]]):
    """Several datasets one after the other, each asked at once for its part of a batch."""

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Return several examples; a ``DataLoader`` asks for a batch at once."""
        places: dict[int, list[int]] = {}
        numbers = [bisect_right(self.cumulative_sizes, index) for index in indices]
        for place, number in enumerate(numbers):
            places.setdefault(number, []).append(place)
        parts = []
        for number, at in places.items():
            start = self.cumulative_sizes[number - 1] if number else 0
            rows = [indices[place] - start for place in at]
            parts.append((at, read_examples(self.datasets[number], rows)))
        return parts[0][1] if len(parts) == 1 else joined(parts)


Transform = Callable[[Any], Tensor]


class ImageExamples(TorchDataset[dict[str, Any]]):
    """One arrival as model inputs: ``{"pixel_values": [channels, h, w], "labels": int}``.

    Args:
        dataset: with the columns ``image`` and ``label``.
        transform: from a PIL image to a tensor; must be deterministic if ``in_memory`` is set. None
            where only labels and the fingerprint are asked for.
        in_memory: decode every image once, on its first use, and keep it in a file that workers
            share and the system holds in memory; see
            :class:`~hf_dash.data.pixel_cache.PixelCache`. Of an ``ImageTransform`` the pixels are
            kept, a byte each, and normalized at every use.
        cache_key: tells the images and the transform from all others, so that other runs can use
            the file; None if nothing does.
        budget: for what is kept; None keeps it whatever its size.
        label_ids: the model's index for each of the dataset's classes, −1 for a class the model
            does not know. None if both use the same indices.
        label_noise: fraction of the examples that get a wrong label, in [0, 1]; see
            :func:`flip_labels`. ``flipped`` holds their indices.
        noise_seed: seed for choosing them.
        fingerprint: of the dataset, if known; see ``hf_dash.data.columns.fingerprint``.
        stamps: of the files that its images are read from.

    Raises:
        ValueError: a label is not one of the dataset's classes, ``label_ids`` does not match them,
            or ``label_noise`` is out of range.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> digits = hf_dash.load_images("digits", split="test")
        >>> examples = hf_dash.data.ImageExamples(digits, pil_to_tensor)
        >>> len(examples), examples[0]["pixel_values"].shape
        (360, torch.Size([3, 32, 32]))
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform | None,
        *,
        in_memory: bool = False,
        label_ids: Sequence[int] | None = None,
        label_noise: float = 0.0,
        noise_seed: int = 0,
        fingerprint: str | None = None,
        stamps: Stamps | None = None,
        cache_key: str | None = None,
        budget: PixelBudget | None = None,
    ) -> None:
        self.dataset = dataset
        self._encoded = undecoded(dataset)
        self._decode = image_decoder(dataset.features["image"])
        self.stamps = stamps or {}
        self.transform = transform
        self._steps = None if transform is None else ImageTransform.of(transform)
        labels = torch.tensor(whole_numbers(dataset, "label"))
        num_classes = dataset.features["label"].num_classes
        check_labels(labels, num_classes)
        self._fingerprint = fingerprint
        self.flipped: list[int] = []
        if label_noise:
            noisy, flipped = flip_labels(labels.numpy(), label_noise, num_classes, noise_seed)
            labels, self.flipped = torch.from_numpy(noisy), np.flatnonzero(flipped).tolist()
        if label_ids is not None:
            if len(label_ids) != num_classes or min(label_ids, default=0) < -1:
                raise ValueError(
                    f"label_ids must hold an index of at least -1 for each of the {num_classes}"
                    f" classes, got {list(label_ids)}"
                )
            labels = torch.tensor(label_ids, dtype=torch.int64)[labels]
        self._labels: np.ndarray = labels.numpy()
        self._cache: PixelCache | None = None
        self._keeps = in_memory and transform is not None and len(labels) > 0
        self._cache_key, self._budget = cache_key, budget
        if cache_key is None:
            self.open()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> list[int]:
        """The label each example is trained with, in the model's indices."""
        labels: list[int] = self._labels.tolist()
        return labels

    @property
    def fingerprint(self) -> str:
        """A checksum of the images and their true labels; reads all of them once, undecoded."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.dataset)
        return self._fingerprint

    def open(self) -> None:
        """Open the file for decoded images, if they are kept; workers begun later share it.

        Where it has a ``cache_key``, any worker finds it, and the first use opens it.
        """
        if self._keeps:
            self._keeps = False
            self._cache = self._open_cache(self._cache_key, self._budget)

    @property
    def is_kept(self) -> bool:
        """Whether all images are kept decoded; asked of a cache, this opens it."""
        self.open()
        return self._cache is not None and self._cache.hold(range(len(self)))

    def select(self, rows: Sequence[int] | np.ndarray) -> "ImageExamples":
        """Return some of the examples, in the order given, with the labels that they have here."""
        chosen = np.asarray(rows, dtype="<i8")
        part = copy.copy(self)
        part.dataset = self.dataset.select(chosen)
        part._encoded = undecoded(part.dataset)
        part._labels = self._labels[chosen]
        part.flipped = np.flatnonzero(np.isin(chosen, self.flipped)).tolist()
        part._fingerprint = part_of(self._fingerprint, chosen)
        part._cache, part._cache_key = None, part_of(self._cache_key, chosen)
        part._keeps = (self._keeps or self._cache is not None) and len(chosen) > 0
        if part._cache_key is None:
            part.open()
        return part

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Return several examples; a ``DataLoader`` asks for a batch at once."""
        labels = self._labels[list(indices)].tolist()
        pixels = self.pixels([index % len(self) for index in indices])
        normalize = self.normalize
        if not isinstance(pixels, Tensor):
            pixels = pixels if normalize is None else [normalize(image) for image in pixels]
            return [
                {"pixel_values": image, "labels": label}
                for image, label in zip(pixels, labels, strict=True)
            ]
        if normalize is not None and not isinstance(normalize, Normalize):
            # What is not known may not survive the way from a worker.
            pixels, normalize = normalize(pixels), None
        return Examples(ImageBatch(pixels, torch.tensor(labels, dtype=torch.int64), normalize))

    @property
    def normalize(self) -> Callable[[Tensor], Tensor] | None:
        """The second step of the transform; None if it has only one."""
        return None if self._steps is None else self._steps.normalize

    def pixels(self, rows: Sequence[int]) -> list[Tensor] | Tensor:
        """Return the pixels of images [channels, height, width], before ``normalize``."""
        self.open()
        return self._decoded(rows) if self._cache is None else self._kept(rows, self._cache)

    def _decoded(self, rows: Sequence[int]) -> list[Tensor] | Tensor:
        """Return the pixels of images, decoded now."""
        if self._steps is None:
            raise ValueError("transform must be given to read images, got None")
        step, encoded = self._steps.checked_pixels, self._encoded[list(rows)]["image"]
        return stacked((step(self._decode(image)) for image in encoded), len(rows))

    def _kept(self, rows: Sequence[int], cache: PixelCache) -> Tensor:
        """Return the pixels of images; those that are not kept yet are decoded and kept."""
        batch, missing = cache.read(rows)
        if missing:
            decoded = self._decoded([rows[place] for place in missing])
            for place, pixels in zip(missing, decoded, strict=True):
                cache.write(rows[place], pixels)
                batch[place] = pixels
        return batch

    def _open_cache(self, key: str | None, budget: PixelBudget | None) -> PixelCache | None:
        """Return where decoded images are kept; None if that is not possible, which is said."""
        (first,) = self._decoded([0])
        size = len(self) * first.nbytes
        if budget is not None and not budget.take(key or uuid4().hex, size):
            return None
        try:
            cache = PixelCache(len(self), first.shape, first.dtype, key)
        except OSError as error:
            logger.warning("decoded images cannot be kept: %s", error)
            return None
        cache.write(0, first)
        return cache


def flip_labels(
    labels: Sequence[int] | np.ndarray, share: float, num_classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Give a random fraction of the examples a wrong label: symmetric label noise.

    All other classes are equally likely. The result depends only on the seed and the number of
    examples, so an arrival with a seed of its own has the same wrong labels in every round.

    Args:
        labels: integers in [0, num_classes), one per example.
        share: fraction of the examples, in [0, 1]; exactly ``round(share * len(labels))`` change.
        num_classes: at least 2.
        seed: seed for the choice; the global random state is left alone.

    Returns:
        The labels (int64, a copy) and a mask that is True where they changed, both [examples].

    Raises:
        TypeError: the labels are not integers.
        ValueError: an argument is out of range.

    Example:
        >>> from hf_dash.data import flip_labels
        >>> labels, flipped = flip_labels([0, 1, 2, 3], 0.5, num_classes=10, seed=0)
        >>> int(flipped.sum())
        2
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes!r}")
    given = np.asarray(labels)
    if given.size and given.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {given.dtype}")
    changed = given.astype(np.int64)
    check_labels(torch.from_numpy(changed), num_classes)
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(changed), round(share * len(changed)), replace=False)
    # A step of 1 … num_classes − 1 around the circle of classes always ends at another class.
    changed[chosen] += generator.integers(1, num_classes, size=len(chosen))
    changed[chosen] %= num_classes
    flipped = np.zeros(len(changed), dtype=bool)
    flipped[chosen] = True
    return changed, flipped
