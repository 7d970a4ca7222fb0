"""Rounds: what is new, what was seen before, and the minibatches made of both.

Flow: examples in arrival order → equal arrivals → ``Round`` → shuffled training batches, and
gradient batches from the oldest to the newest example.
Source: the protocol of Shin et al. (arXiv:2410.23495, section 2): every round a new chunk from the
same distribution arrives, and training continues on all data so far.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Sampler, Subset
from torch.utils.data import Dataset as TorchDataset

from hf_dash.data.batches import EvenBatchSampler, NewShareSampler
from hf_dash.data.examples import (
    Augment,
    AugmentedExamples,
    ImageExamples,
    JoinedExamples,
    Transform,
)
from hf_dash.data.image_batch import collate, collate_values
from hf_dash.data.order import cut_arrivals
from hf_dash.data.stamps import check_unchanged, joint_stamps
from hf_dash.data.stream_loader import StreamedExamples, StreamLoader
from hf_dash.data.streams import StreamedImages, StreamGradientBatches, share_minibatches
from hf_dash.method.config import DashConfig


@dataclass(frozen=True)
class Round:
    """One round of training.

    Args:
        index: 1 for the first round.
        arrivals: everything to train on, oldest first; the last one is new in this round.
            All are map-style or all are streams.
        label_names: classes known by now, in the model's order; empty if the model knows them all
            from the first round.
        files: names of the shards that arrived in this round, if shards arrive.
        skipped: images left out of them; see :class:`Arrival`.
        overlap: number of held-out images that are trained on, where that was allowed.
        replay: what was drawn of the old images, by name: ``samples``, ``strategy`` and ``seed`` as
            they were set, ``num_drawn`` images of ``num_old``, from ``num_arrivals`` arrivals, and
            the ``sha256`` of their places; None trains on all. ``arrivals`` then hold what was
            drawn, and what is new.
        new_share: share of the new images in every training batch, in (0, 1); None mixes in
            proportion.

    Raises:
        ValueError: nothing is new, or map-style arrivals are mixed with streams.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> digits = hf_dash.load_images("digits").select(range(50))
        >>> first, second = hf_dash.data.cut_rounds(digits, 2, pil_to_tensor)
        >>> second.index, second.num_new, second.num_total
        (2, 25, 50)
    """

    index: int
    arrivals: tuple[ImageExamples | StreamedImages, ...]
    label_names: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    overlap: int = 0
    replay: dict[str, Any] | None = None
    new_share: float | None = None

    def __post_init__(self) -> None:
        kinds = sorted({type(arrival).__name__ for arrival in self.arrivals})
        if len(kinds) > 1:
            raise ValueError(f"arrivals of round {self.index} must be of one kind, got {kinds}")
        if not self.arrivals or len(self.arrivals[-1]) == 0:
            raise ValueError(f"round {self.index} is empty: a round needs at least one new example")

    @property
    def new(self) -> ImageExamples | StreamedImages:
        """The arrival of this round."""
        return self.arrivals[-1]

    @property
    def num_new(self) -> int:
        """The number of examples that arrived in this round."""
        return len(self.arrivals[-1])

    @property
    def num_total(self) -> int:
        """The number of examples to train on, old and new."""
        return sum(len(arrival) for arrival in self.arrivals)

    @property
    def streams(self) -> tuple[StreamedImages, ...]:
        """The arrivals if they are streams, else an empty tuple."""
        return tuple(a for a in self.arrivals if isinstance(a, StreamedImages))

    @property
    def seen(self) -> "ConcatDataset[dict[str, Any]] | None":
        """What is trained on of earlier rounds, oldest first; None in the first round."""
        return self._joined(self.arrivals[:-1]) if len(self.arrivals) > 1 else None

    def class_counts(self) -> list[int]:
        """Return how many old and new examples each of the model's known classes has."""
        labels = Counter(label for arrival in self.arrivals for label in arrival.labels)
        return [labels[index] for index in range(max(len(self.label_names), max(labels) + 1))]

    @property
    def fingerprint(self) -> str:
        """A checksum of all labeled images, old and new, the same on every machine."""
        return joint_fingerprint(self.arrivals)

    def check_unchanged(self) -> None:
        """Check that the files which are read while training are still those that were opened.

        Raises:
            ValueError: one was written or replaced meanwhile; the message names it.
        """
        check_unchanged(joint_stamps(arrival.stamps for arrival in self.arrivals))

    @property
    def flipped_seen(self) -> "TorchDataset[dict[str, Any]] | None":
        """The examples of earlier rounds that have a wrong label; None if there are none."""
        old = [a for a in self.arrivals[:-1] if isinstance(a, ImageExamples) and a.flipped]
        return ConcatDataset([Subset(a, a.flipped) for a in old]) if old else None

    @property
    def examples(self) -> "ConcatDataset[dict[str, Any]]":
        """Old and new examples, oldest first."""
        return self._joined(self.arrivals)

    def _joined(
        self, arrivals: Sequence[ImageExamples | StreamedImages]
    ) -> "ConcatDataset[dict[str, Any]]":
        if self.streams:
            raise TypeError(
                f"round {self.index} holds streams, whose examples have no index; use"
                " train_batches or gradient_batches"
            )
        images = [arrival for arrival in arrivals if isinstance(arrival, ImageExamples)]
        for arrival in images:
            arrival.open()
        return JoinedExamples(images)

    def order(self, seed: int, generator: torch.Generator | None = None) -> "Sampler[int]":
        """Return a sampler of the order of an epoch, which gives another one in every epoch.

        Args:
            seed: seed for the order where ``new_share`` is set.
            generator: gives the order where it is not.
        """
        num_old = self.num_total - self.num_new
        if self.new_share is None or num_old == 0:
            return RandomSampler(range(self.num_total), generator=generator)
        return NewShareSampler(num_old, self.num_new, self.new_share, seed)


def joint_fingerprint(parts: Sequence[ImageExamples | StreamedImages]) -> str:
    """Return one checksum of several sets of labeled images, in their order."""
    return hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest()


def cut_rounds(
    dataset: Dataset, num_rounds: int, transform: Transform, *, in_memory: bool = False
) -> Iterator[Round]:
    """Cut a dataset in arrival order into rounds whose sizes differ by at most one.

    Args:
        dataset: with the columns ``image`` and ``label``; see :func:`in_arrival_order`.
        num_rounds: at least 1 and at most the number of examples.
        transform: from a PIL image to a tensor.
        in_memory: see :class:`ImageExamples`.

    Raises:
        ValueError: ``num_rounds`` is out of range.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> images = hf_dash.data.in_arrival_order(hf_dash.load_images(), seed=0)
        >>> rounds = hf_dash.data.cut_rounds(images, 5, pil_to_tensor)
        >>> [round_.num_total for round_ in rounds]
        [240, 480, 720, 960, 1200]
    """
    arrivals = tuple(
        ImageExamples(part, transform, in_memory=in_memory)
        for part in cut_arrivals(dataset, num_rounds)
    )
    return (Round(index, arrivals[:index]) for index in range(1, num_rounds + 1))


def train_batches(
    round_: Round,
    batch_size: int,
    *,
    seed: int,
    num_workers: int = 0,
    augment: Augment | None = None,
    num_processes: int = 1,
    process_index: int = 0,
    buffer_size: int = 1000,
    drop_last: bool = False,
) -> "DataLoader[dict[str, Any]] | StreamLoader":
    """Return shuffled training batches of old and new examples, their sizes differ by at most one.

    Args:
        round_: the round to train on.
        batch_size: images per batch and process, at most.
        seed: seed for the order, which changes every epoch, and for the augmentation.
        num_workers: as in ``DataLoader``; workers live as long as the loader. Where all images
            are kept decoded already and nothing is augmented, none are begun: reading is quicker.
            With augmentation, results for one seed also depend on the number of workers.
        augment: returns a new view of an image at every read, such as :class:`RandomCropFlip`;
            None trains on the images as they are.
        num_processes: number of processes that share the batches. Of map-style data the loader has
            the batches of all, and Accelerate gives each process its own.
        process_index: index of this process, for streams.
        buffer_size: for streams; see :class:`StreamLoader`.
        drop_last: all batches have one size, and every epoch leaves out a rest of its own; see
            :func:`~hf_dash.data.batches.even_sizes`. Not for streams.

    Raises:
        ValueError: ``drop_last`` is set and the round holds streams.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> images = hf_dash.load_images().select(range(64))
        >>> (round_,) = hf_dash.data.cut_rounds(images, 1, pil_to_tensor)
        >>> batch = next(iter(hf_dash.data.train_batches(round_, 16, seed=0)))
        >>> batch["pixel_values"].shape, batch["labels"].shape
        (torch.Size([16, 3, 28, 28]), torch.Size([16]))
    """
    if round_.streams and drop_last:
        raise ValueError("drop_last must be False for streams")
    if round_.streams:
        return StreamLoader(
            round_.streams,
            batch_size,
            seed=seed,
            buffer_size=buffer_size,
            num_workers=num_workers,
            num_processes=num_processes,
            process_index=process_index,
            augment=augment,
            new_share=round_.new_share,
        )
    generator = torch.Generator().manual_seed(seed)
    examples: TorchDataset[dict[str, Any]] = round_.examples
    if augment is not None:
        examples = AugmentedExamples(examples, augment, generator)
    elif num_workers and all(
        isinstance(arrival, ImageExamples) and arrival.is_kept for arrival in round_.arrivals
    ):
        num_workers = 0
    order = round_.order(seed, generator)
    return DataLoader(
        examples,
        batch_sampler=EvenBatchSampler(order, batch_size, num_processes, drop_last=drop_last),
        generator=generator,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
    )


def training_stream(round_: Round, *, seed: int, buffer_size: int = 1000) -> StreamedExamples:
    """Return a round's streams as one stream for a ``Trainer``, shuffled again every epoch.

    Args:
        round_: must hold streams.
        seed: seed for the order, which also depends on the epoch given to ``set_epoch`` and on the
            number of workers.
        buffer_size: number of encoded images a worker draws the next one from, at least 1.

    Returns:
        A stream of ``{"pixel_values": [channels, h, w], "labels": int}``, mixed as the batches of
        :func:`train_batches` are.

    Raises:
        ValueError: the round does not hold streams.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> stream = hf_dash.load_images("digits", streaming=True)
        >>> arrival = hf_dash.data.StreamedImages(stream, pil_to_tensor, num_examples=1437)
        >>> images = hf_dash.data.training_stream(hf_dash.Round(1, (arrival,)), seed=0)
        >>> next(iter(images))["pixel_values"].shape
        torch.Size([3, 32, 32])
    """
    if not round_.streams:
        raise ValueError(f"round {round_.index} must hold streams")
    return StreamedExamples(
        round_.streams, seed=seed, buffer_size=buffer_size, new_share=round_.new_share
    )


def gradient_batches(
    round_: Round, config: DashConfig, *, num_processes: int = 1, process_index: int = 0
) -> "DataLoader[dict[str, Any]] | StreamGradientBatches":
    """Return the minibatches of the gradient pass, oldest examples first.

    Batches are counted backward from the newest example, so a short one is the oldest and weighs
    least. With the paper's preset every arrival is one minibatch. For streams, the result is a
    sequence; a slice of it reads only the images in that slice.

    Args:
        round_: the round whose old and new examples are read.
        config: gives the preset and the number of images per minibatch, over all processes.
        num_processes: number of processes that share each minibatch equally; a remainder is
            dropped from its old end.
        process_index: index of this process.

    Raises:
        ValueError: there are fewer examples than processes.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> images = hf_dash.load_images().select(range(100))
        >>> (round_,) = hf_dash.data.cut_rounds(images, 1, pil_to_tensor)
        >>> config = hf_dash.DashConfig(gradient_batch_size=40)
        >>> [len(batch["labels"]) for batch in hf_dash.data.gradient_batches(round_, config)]
        [20, 40, 40]
    """
    sizes = [len(arrival) for arrival in round_.arrivals]
    if config.preset == "paper":
        bounds = np.cumsum([0, *sizes]).tolist()
    else:
        bounds = sorted({0, *range(sum(sizes), 0, -config.gradient_batch_size)})
    shares = share_minibatches(bounds, num_processes, process_index)
    if not shares:
        raise ValueError(
            f"round {round_.index} has {sum(sizes)} examples, too few for {num_processes} processes"
        )
    if round_.streams:
        return StreamGradientBatches(round_.streams, shares)
    batches = [list(share) for share in shares]
    return DataLoader(round_.examples, batch_sampler=batches, collate_fn=collate_values)
