"""Training batches of images that stay on the device, so that no step waits for data.

Flow: a round's images, undecoded → one tensor of pixels on the device, a byte per value where the
transform allows → every epoch a new order and new crops, drawn at once → batches cut by index,
normalized and augmented there.
Source: the order, and the sizes of batches, are those of :func:`~hf_dash.data.train_batches`.
Differs: on one device batches equal its to the bit without augmentation; crops and flips are drawn
for a whole epoch, so they are others.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler

from hf_dash.data.batches import EvenBatchSampler
from hf_dash.data.examples import ImageExamples, RandomCropFlip
from hf_dash.data.rounds import Round
from hf_dash.transforms import Normalize


class ResidentBatches:
    """Shuffled training batches cut from tensors, in a new order in every epoch.

    Args:
        pixels: [examples, channels, height, width], on the device.
        labels: [examples], int64, on the device.
        batch_size: images per batch and process, at most; sizes differ by at most one.
        seed: seed for the order and the augmentation.
        normalize: takes pixels of a batch to what the model takes; None where they are that.
        augment: crops and flips of normalized images; None trains on the images as they are.
        num_processes: that share the batches; all must be given the same images and seed.
        process_index: index of this process.
        order: gives the order of an epoch; None draws it from ``seed``.
        drop_last: all batches have ``batch_size`` images, and every epoch leaves out a rest of its
            own; see :func:`~hf_dash.data.batches.even_sizes`.

    Raises:
        ValueError: ``augment`` does not fit the channels, or there are fewer examples than
            processes.

    Example:
        >>> import torch
        >>> from hf_dash.training import ResidentBatches
        >>> pixels, labels = torch.rand(10, 3, 8, 8), torch.arange(10) % 2
        >>> batches = ResidentBatches(pixels, labels, batch_size=4, seed=0)
        >>> [len(batch["labels"]) for batch in batches]
        [3, 3, 4]
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        normalize: Callable[[Tensor], Tensor] | None = None,
        augment: RandomCropFlip | None = None,
        num_processes: int = 1,
        process_index: int = 0,
        order: "Callable[[torch.Generator], Sampler[int]] | None" = None,
        drop_last: bool = False,
    ) -> None:
        if augment is not None and len(augment.fill) != pixels.shape[1]:
            raise ValueError(
                f"augment must have one fill per channel, {pixels.shape[1]} here, got"
                f" {augment.fill}"
            )
        self.pixels, self.labels = pixels, labels
        self.normalize, self.augment = normalize, augment
        fill = () if augment is None else augment.fill
        self._fill = torch.tensor(fill).to(pixels.device)
        self.num_processes, self.process_index = num_processes, process_index
        self._generator = torch.Generator().manual_seed(seed)
        sampler: Sampler[int] = RandomSampler(range(len(labels)), generator=self._generator)
        if order is not None:
            sampler = order(self._generator)
        self._sampler = EvenBatchSampler(sampler, batch_size, num_processes, drop_last=drop_last)

    def __len__(self) -> int:
        return len(self._sampler) // self.num_processes

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # As a DataLoader, which draws a seed for its workers before the order.
        torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        own = [*self._sampler][self.process_index :: self.num_processes][: len(self)]
        # One copy to the device an epoch: none of the batches waits for another.
        device, sizes = self.pixels.device, [len(rows) for rows in own]
        order = torch.tensor([row for rows in own for row in rows]).to(device)
        views: Sequence[Tensor] = ()
        if self.augment is not None:
            views = torch.split(self._draw(len(order), self.augment).to(device), sizes)
        for number, rows in enumerate(torch.split(order, sizes)):
            images = self.pixels[rows]
            if self.normalize is not None:
                images = self.normalize(images)
            if self.augment is not None:
                images = crop_and_flip(images, views[number], self._fill, self.augment.padding)
            yield {"pixel_values": images, "labels": self.labels[rows]}

    def _draw(self, count: int, augment: RandomCropFlip) -> Tensor:
        """Return top, left and flip of a view of each image, [count, 3]."""
        offsets = torch.randint(2 * augment.padding + 1, (count, 2), generator=self._generator)
        flips = torch.randint(2, (count, 1), generator=self._generator)
        return torch.cat([offsets, flips], dim=1)


def crop_and_flip(images: Tensor, views: Tensor, fill: Tensor, padding: int) -> Tensor:
    """Return one view of each image, as :class:`RandomCropFlip` makes them one by one.

    Args:
        images: [images, channels, height, width].
        views: [images, 3]: the first row and the first column of the padded image, each in
            [0, 2 · padding], and 1 to flip it left to right.
        fill: [channels]: the value of the padding.
        padding: pixels added on every side.
    """
    count, channels, height, width = images.shape
    frame = fill.to(images.dtype).view(1, channels, 1, 1)
    padded = frame.repeat(count, 1, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    top, left, flip = views.unbind(1)
    across = torch.arange(width, device=images.device).expand(count, width)
    across = torch.where(flip[:, None] == 1, width - 1 - across, across)
    rows = (top[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left[:, None] + across)[:, None, None, :]
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows, columns]


def resident_batches(
    round_: Round,
    batch_size: int,
    *,
    seed: int,
    augment: RandomCropFlip | None = None,
    device: torch.device | str = "cpu",
    num_processes: int = 1,
    process_index: int = 0,
    drop_last: bool = False,
) -> ResidentBatches:
    """Decode the images of a round, old and new, and keep them on a device.

    Args:
        round_: of map-style images of one size.
        batch_size, seed, augment, num_processes, process_index, drop_last: see
            :class:`ResidentBatches`.
        device: where the images stay.

    Raises:
        TypeError: the round holds streams.
        ValueError: images have several sizes.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> images = hf_dash.load_images("digits").select(range(20))
        >>> (round_,) = hf_dash.data.cut_rounds(images, 1, pil_to_tensor)
        >>> batches = hf_dash.training.resident_batches(round_, 8, seed=0)
        >>> batches.pixels.dtype, len(batches)
        (torch.uint8, 3)
    """
    if round_.streams:
        raise TypeError(f"round {round_.index} holds streams, whose images cannot be kept")
    arrivals = [arrival for arrival in round_.arrivals if isinstance(arrival, ImageExamples)]
    pixels = [image for arrival in arrivals for image in arrival.pixels(range(len(arrival)))]
    shapes = {tuple(image.shape) for image in pixels}
    if len(shapes) > 1:
        raise ValueError(f"images must have one size to stay on a device, got {sorted(shapes)}")
    normalize = arrivals[0].normalize
    return ResidentBatches(
        torch.stack(pixels).to(device),
        torch.tensor([label for arrival in arrivals for label in arrival.labels]).to(device),
        batch_size,
        seed=seed,
        normalize=normalize.to(device) if isinstance(normalize, Normalize) else normalize,
        augment=augment,
        num_processes=num_processes,
        process_index=process_index,
        order=partial(round_.order, seed),
        drop_last=drop_last,
    )
