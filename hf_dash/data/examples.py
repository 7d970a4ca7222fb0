"""Labeled images as model inputs: decoded, labeled, and augmented where asked for.

Flow: a HF dataset with the columns ``image`` and ``label`` → a torch dataset of ``pixel_values``
and ``labels``, decoded on every use or once, some labels wrong where that is asked for → randomly
cropped and flipped.
Source: the usual augmentation of CIFAR-sized images (padding 4, random crop, horizontal flip).
Differs from torchvision's ``RandomCrop``: the draws come from a given generator, and padding is
black as the model sees it, after normalization.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as vision

from hf_dash.data.columns import fingerprint
from hf_dash.method.batches import check_labels

# Called with one image [channels, height, width] and where to draw from; None is torch's own state.
Augment = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class RandomCropFlip:
    """Pad an image, cut its old size out at random, and mirror every second one left to right.

    Args:
        fill: value of the padding per channel, in the units of the image; for black under a
            model's normalization see :func:`~hf_dash.models.black_pixel`.
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


class AugmentedExamples(TorchDataset[dict[str, Any]]):
    """Examples whose ``pixel_values`` are another view of the image each time they are read.

    Args:
        examples: mappings with ``pixel_values``.
        augment: makes the view.
        generator: drawn from in this process. A worker process of a ``DataLoader`` draws from its
            own random state, which the loader seeds from its generator.
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
        example = self.examples[index]
        generator = self.generator if get_worker_info() is None else None
        return {**example, "pixel_values": self.augment(example["pixel_values"], generator)}


Transform = Callable[[Any], Tensor]


class ImageExamples(TorchDataset[dict[str, Any]]):
    """One arrival as model inputs: ``{"pixel_values": [channels, h, w], "labels": int}``.

    Args:
        dataset: with the columns ``image`` and ``label``.
        transform: from a PIL image to a tensor; deterministic where ``in_memory`` is set.
        in_memory: decode every image once, on first use of the dataset, and keep the tensors.
        label_ids: the model's index of every class of the dataset, in the order of the dataset's
            labels; −1 where the model does not know the class. None where both are the same.
        label_noise: share of the examples to be trained with a wrong label, in [0, 1]; see
            :func:`flip_labels`. ``flipped`` holds their indices.
        noise_seed: of the choice.
        fingerprint: of the dataset, where it is known; see ``hf_dash.data.columns.fingerprint``.

    Raises:
        ValueError: a label is none of the dataset's classes, ``label_ids`` does not fit them, or
            ``label_noise`` is out of its range.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        *,
        in_memory: bool = False,
        label_ids: Sequence[int] | None = None,
        label_noise: float = 0.0,
        noise_seed: int = 0,
        fingerprint: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.in_memory = in_memory
        self._decoded: Tensor | None = None
        labels = torch.tensor(dataset["label"][:], dtype=torch.int64)
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
        self._labels: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> list[int]:
        """The model's label of every example, as trained."""
        return self._labels

    @property
    def fingerprint(self) -> str:
        """A checksum of the images and their true labels; reads them all once, not decoded."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.dataset)
        return self._fingerprint

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.in_memory:
            pixels = self.transform(self.dataset[index]["image"])
        else:
            if self._decoded is None:
                self._decoded = torch.stack([self.transform(i) for i in self.dataset["image"]])
            pixels = self._decoded[index]
        return {"pixel_values": pixels, "labels": self._labels[index]}


def flip_labels(
    labels: Sequence[int] | np.ndarray, share: float, num_classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replace the labels of a random share of the examples by other ones: symmetric label noise.

    The wrong label is any of the other classes, each as likely. Which examples are flipped, and to
    what, follows from the seed and the number of examples: flip an arrival once, by its own seed,
    and it is the same in every round.

    Args:
        labels: integers in [0, num_classes), one an example.
        share: of the examples to flip, in [0, 1]; exactly ``round(share * len(labels))`` are.
        num_classes: at least 2.
        seed: of the choice; the global random state is left alone.

    Returns:
        The labels (int64, a copy) and a mask that is True where they were flipped, both [examples].

    Raises:
        TypeError: the labels are no integers.
        ValueError: an argument is out of its range.
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
    # A step of 1 … classes − 1 around the circle of classes never comes back to the same one.
    changed[chosen] += generator.integers(1, num_classes, size=len(chosen))
    changed[chosen] %= num_classes
    flipped = np.zeros(len(changed), dtype=bool)
    flipped[chosen] = True
    return changed, flipped
