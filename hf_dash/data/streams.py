"""Arrivals read as streams, and the minibatches of their newest examples.

Flow: ``IterableDataset`` of encoded images → ``StreamedImages``, in blocks → encoded rows, decoded
last. The gradient pass reads only the blocks of the newest examples; training reads all through
``StreamLoader``.
Differs from map-style arrivals: only the images in use are in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Any, Protocol, overload

import numpy as np
import torch
from datasets import Features, IterableDataset
from torch import Tensor

from hf_dash.data.columns import fingerprint, part_of, undecoded
from hf_dash.data.decoding import image_decoder
from hf_dash.data.image_batch import stacked
from hf_dash.data.kept import KeptExamples, open_kept
from hf_dash.data.pieces import Piece
from hf_dash.data.stamps import Stamps
from hf_dash.method.batches import check_labels
from hf_dash.transforms import ImageTransform

Row = tuple[Any, int]

ROWS_AT_A_TIME = 256

# Steps of a stream that process each example on its own, whatever shard it is in.
_SHARDABLE = (
    "ExamplesIterable",
    "ArrowExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
    "FormattedExamplesIterable",
)


class Block(Protocol):
    """Examples of an arrival that follow one another and are best read together.

    Args:
        scattered: each example can be read alone, in any order, at the price of that example.
        whole: reading a part of it costs as much as reading all of it.
        labels: [examples], positions among the stream's classes; None if they are not known.
    """

    @property
    def labels(self) -> np.ndarray | None: ...  # noqa: D102

    @property
    def scattered(self) -> bool: ...  # noqa: D102

    @property
    def whole(self) -> bool: ...  # noqa: D102

    def __len__(self) -> int: ...

    def rows(self, places: Sequence[int]) -> Iterator[Row]:
        """Yield encoded images and labels; places ascend unless the block is scattered."""
        ...


@dataclass(frozen=True)
class StreamBlock:
    """A shard of a stream, which can only be read from its beginning.

    Args:
        stream: with the columns ``image``, not decoded, and ``label``; formatted as Arrow tables.
        num_shards: number of shards the stream is cut into.
        shard: index of the shard.
        size: number of examples it should hold.
    """

    stream: IterableDataset
    num_shards: int
    shard: int
    size: int
    scattered: bool = False
    whole: bool = False
    labels: None = None

    def __len__(self) -> int:
        return self.size

    def rows(self, places: Sequence[int]) -> Iterator[Row]:
        """Yield encoded images and labels at ascending places.

        If the last place is wanted, what the shard holds beyond it comes too, so that a wrong
        ``size`` is noticed; if the shard ends earlier, the rows end.
        """
        if not len(places):
            return
        part = _shard_of(self.stream, self.num_shards, self.shard)
        first, to_end = places[0], places[-1] == self.size - 1
        wanted = np.asarray(places, dtype=np.int64)
        # iter(part) would divide the stream among the workers of a DataLoader again.
        for table in (part.skip(first) if first else part).iter(ROWS_AT_A_TIME):
            end = first + table.num_rows
            taken = wanted[(wanted >= first) & (wanted < end)]
            if to_end:
                taken = np.append(taken, np.arange(max(first, self.size), end))
            rows = table.take(taken - first)
            yield from zip(rows["image"].to_pylist(), rows["label"].to_pylist(), strict=True)
            first = end
            if first > places[-1] and not to_end:
                return


@dataclass(frozen=True)
class FileBlock:
    """Rows of a piece of a file.

    Args:
        piece: holds their images.
        places: [rows] of them in the piece, in the order of the arrival.
        labels: [rows], positions among the stream's classes.
    """

    piece: Piece
    places: np.ndarray
    labels: np.ndarray

    @property
    def scattered(self) -> bool:
        """See :class:`Block`."""
        return self.piece.scattered

    @property
    def whole(self) -> bool:
        """See :class:`Block`."""
        return not self.piece.scattered

    def __len__(self) -> int:
        return len(self.places)

    def select(self, places: np.ndarray) -> "FileBlock":
        """Return some of the rows."""
        return FileBlock(self.piece, self.places[places], self.labels[places])

    def rows(self, places: Sequence[int]) -> Iterator[Row]:
        """Yield encoded images and labels."""
        at = np.asarray(places, dtype=np.int64)
        images = self.piece.images(self.places[at].tolist())
        return zip(images, self.labels[at].tolist(), strict=True)


def stream_of(
    blocks: Sequence[FileBlock], example_ids: np.ndarray, features: Features
) -> IterableDataset:
    """Return a stream of the rows of blocks, with a shard for each block.

    Args:
        blocks: at least one if the stream is to have rows.
        example_ids: [rows] of all blocks.
        features: of the columns ``image``, ``label`` and ``example_id``.
    """
    ids = np.split(example_ids, np.cumsum([len(block) for block in blocks])[:-1])
    shards = {"blocks": list(blocks), "ids": ids[: len(blocks)]}
    return IterableDataset.from_generator(_block_rows, features=features, gen_kwargs=shards)


def _block_rows(blocks: Sequence[FileBlock], ids: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    for block, own in zip(blocks, ids, strict=True):
        rows = block.rows(range(len(block)))
        for (image, label), example_id in zip(rows, own.tolist(), strict=True):
            yield {"image": image, "label": label, "example_id": example_id}


class StreamedImages:
    """One arrival held as a stream; the images stay encoded until they are needed.

    Args:
        stream: with the columns ``image`` (``datasets.Image``) and ``label`` (``ClassLabel``).
        transform: from a PIL image to a tensor; must be deterministic if ``cache`` is set.
        num_examples: number of examples in the stream; None counts them on first use, in one pass
            that decodes no image.
        label_ids: the model's index for each of the stream's classes; None if they are the same.
        cache: let loaders keep what they have decoded, as the transform's first step returns it
            (3 KiB for 32×32 RGB), in a file that workers share and the system holds in memory.
            Later epochs read the stream only for what is not there; batches are the same.
        fingerprint: of the stream, if known; see ``hf_dash.data.columns.fingerprint``.
        labels: the stream's own labels of all examples, if known, in any order.
        stamps: of the files that it reads.
        blocks: the stream's examples in their order, where parts of it can be read; by default its
            shards. If it has several, each is counted, in one pass that decodes no image.

    Raises:
        TypeError: ``stream`` is not an ``IterableDataset``.
        ValueError: a column is missing, ``num_examples`` is negative, or ``label_ids`` does not
            hold one index for each of the stream's classes.

    Example:
        >>> import hf_dash
        >>> from torchvision.transforms.v2.functional import pil_to_tensor
        >>> stream = hf_dash.load_images("digits", split="test", streaming=True)
        >>> images = hf_dash.data.StreamedImages(stream, pil_to_tensor)
        >>> len(images)
        360
    """

    def __init__(
        self,
        stream: IterableDataset,
        transform: Callable[[Any], Tensor],
        *,
        num_examples: int | None = None,
        label_ids: Sequence[int] | None = None,
        cache: bool = False,
        fingerprint: str | None = None,
        labels: Sequence[int] | None = None,
        stamps: Stamps | None = None,
        blocks: Sequence[Block] | None = None,
    ) -> None:
        if not isinstance(stream, IterableDataset):
            raise TypeError(f"stream must be an IterableDataset, got {type(stream).__name__}")
        if stream.features is None:
            # A stream without a stored schema: its first rows give the columns.
            stream = stream._resolve_features()
        features = stream.features
        for column in ("image", "label"):
            if column not in features:
                raise ValueError(f"stream must have a column {column!r}, got {list(features)}")
        if num_examples is not None and num_examples < 0:
            raise ValueError(f"num_examples must be at least 0, got {num_examples}")
        self.num_classes: int | None = getattr(features["label"], "num_classes", None)
        if label_ids is not None and len(label_ids) != self.num_classes:
            raise ValueError(
                f"label_ids must have one label for each of the stream's {self.num_classes}"
                f" classes, got {len(label_ids)}"
            )
        self.stream = stream
        self.stamps = stamps or {}
        self.transform = ImageTransform.of(transform)
        self.label_ids = None if label_ids is None else tuple(label_ids)
        self.cache = cache
        self._kept: KeptExamples | None = None
        self._num_examples = num_examples if blocks is None else sum(map(len, blocks))
        self._blocks = None if blocks is None else tuple(blocks)
        self._fingerprint = fingerprint
        self._labels = None if labels is None else list(labels)
        self._decode = image_decoder(features["image"])
        columns = undecoded(stream.select_columns(["image", "label"]))
        self._encoded = columns.with_format("arrow")
        self.num_shards: int = stream.num_shards if is_shardable(stream._ex_iterable) else 1

    def __len__(self) -> int:
        if self._num_examples is None:
            self._num_examples = sum(map(len, self.blocks))
        return self._num_examples

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The examples in their order; counts a stream's shards on first use."""
        if self._blocks is None:
            known = self._num_examples if self.num_shards == 1 else None
            sizes = [self.count(n) for n in self.uncounted] if known is None else [known]
            self._blocks = self._blocks_of(sizes)
        return self._blocks

    @property
    def uncounted(self) -> range:
        """The stream's shards of which nobody knows how many examples they hold."""
        is_known = self.num_shards == 1 and self._num_examples is not None
        return range(0 if is_known or self._blocks is not None else self.num_shards)

    def set_sizes(self, sizes: Sequence[int]) -> None:
        """Take in how many examples each of the stream's shards holds, as :meth:`count` found.

        Raises:
            ValueError: they do not add up to ``num_examples``.
        """
        self._blocks = self._blocks_of(sizes)

    def _blocks_of(self, sizes: Sequence[int]) -> tuple[Block, ...]:
        given, held = self._num_examples, sum(sizes)
        if given is not None and given != held:
            raise ValueError(
                f"num_examples is {'more' if given > held else 'less'} than a stream holds: it is"
                f" {given}, and the shards hold {held}"
            )
        shards = enumerate(sizes)
        return tuple(StreamBlock(self._encoded, len(sizes), n, size) for n, size in shards)

    def count(self, shard: int) -> int:
        """Count the examples of one of the stream's shards; reads it without decoding."""
        part = _shard_of(self._encoded, self.num_shards, shard).select_columns(["label"])
        return sum(table.num_rows for table in part.iter(ROWS_AT_A_TIME))

    @property
    def labels(self) -> list[int]:
        """The model's label of every example; reads them once if they are not known."""
        if self._labels is None:
            batches = self._encoded.select_columns(["label"]).iter(ROWS_AT_A_TIME)
            self._labels = [label for table in batches for label in table["label"].to_pylist()]
        ids = self.label_ids
        return self._labels if ids is None else [ids[label] for label in self._labels]

    @property
    def fingerprint(self) -> str:
        """A checksum of the labeled images; reads all of them once, undecoded."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.stream)
        return self._fingerprint

    @property
    def is_scattered(self) -> bool:
        """Whether each example can be read alone, at the price of that example."""
        return self._blocks is not None and all(block.scattered for block in self._blocks)

    def select(self, rows: Sequence[int] | np.ndarray) -> "StreamedImages":
        """Return some of the examples, in ascending order; nothing is read.

        Raises:
            ValueError: the stream can only be read from its beginning.
        """
        blocks = [block for block in self._blocks or () if isinstance(block, FileBlock)]
        if self._blocks is None or len(blocks) < len(self._blocks):
            raise ValueError(
                "stream must be of parquet files, tar files or folders: others on the Hub, and"
                " archives that could not be unpacked, are only read from their beginning"
            )
        chosen = np.asarray(rows, dtype=np.int64)
        starts = np.cumsum([0, *map(len, blocks)])
        cuts = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
        parts = [
            block.select(own - start)
            for block, own, start in zip(blocks, cuts, starts.tolist(), strict=False)
            if len(own)
        ]
        labels = [block.labels for block in parts]
        return StreamedImages(
            stream_of(parts, chosen, self.stream.features),
            self.transform,
            label_ids=self.label_ids,
            cache=self.cache,
            fingerprint=part_of(self._fingerprint, chosen),
            labels=np.concatenate([np.zeros(0, dtype=np.int64), *labels]).tolist(),
            stamps=self.stamps,
            blocks=parts,
        )

    def rows(self) -> Iterator[Row]:
        """Yield all encoded images and their labels among the stream's classes, in order."""
        for block in self.blocks:
            yield from block.rows(range(len(block)))

    def decode(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return pixel values [rows, channels, h, w] and labels [rows] in the model's indices.

        Raises:
            ValueError: a label is not one of the stream's classes.
        """
        pixels, labels = self.decode_pixels(rows)
        return self.normalized(pixels), labels

    def normalized(self, pixels: Tensor) -> Tensor:
        """Return pixels as the model takes them; see ``ImageTransform``."""
        normalize = self.transform.normalize
        return pixels if normalize is None else normalize(pixels)

    def num_bytes(self) -> int:
        """Return the size of all decoded images; reads the first one."""
        return len(self) * self._first[0].nbytes if len(self) else 0

    @cached_property
    def _first(self) -> tuple[Tensor, int]:
        """The pixels of the first image [channels, h, w] and its label."""
        block = next(block for block in self.blocks if len(block))
        pixels, labels = self.decode_pixels([*islice(block.rows([0]), 1)])
        return pixels[0], int(labels[0])

    @property
    def kept(self) -> KeptExamples | None:
        """What loaders keep, by its place in the stream; None without ``cache``."""
        if self.cache and self._kept is None and len(self):
            self._kept = open_kept(len(self), *self._first)
            self.cache = self._kept is not None
        return self._kept

    @cached_property
    def begins(self) -> list[int]:
        """The place of each block's first example in the stream."""
        return [*accumulate(map(len, self.blocks), initial=0)]

    def decode_pixels(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return images as caches keep them, before they are normalized, and labels.

        Raises:
            ValueError: a label is not one of the stream's classes.
        """
        labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
        check_labels(labels, self.num_classes)
        if self.label_ids is not None:
            labels = torch.tensor(self.label_ids, dtype=torch.int64)[labels]
        step = self.transform.checked_pixels
        pixels = stacked((step(self._decode(image)) for image, _ in rows), len(rows))
        # Of several sizes, torch says what is wrong.
        return pixels if isinstance(pixels, Tensor) else torch.stack(pixels), labels


def _shard_of(stream: IterableDataset, num_shards: int, shard: int) -> IterableDataset:
    if num_shards == 1:
        return stream
    return stream.shard(num_shards=num_shards, index=shard, contiguous=False)


def is_shardable(step: Any) -> bool:
    """Check that the shards of a stream together hold each of its examples exactly once.

    False is always safe; it only costs reading time.
    """
    name = type(step).__name__
    by_example = name == "MappedExamplesIterable" and not (step.with_indices or step.batched)
    if not (name in _SHARDABLE or by_example):
        return False
    return not hasattr(step, "ex_iterable") or is_shardable(step.ex_iterable)


def rows_at(
    arrivals: Sequence[StreamedImages], positions: Sequence[int]
) -> Iterator[tuple[StreamedImages, Row]]:
    """Yield the rows at ascending positions, counted over all arrivals, with their arrival.

    Only the blocks that hold one of them are read.
    """
    wanted = np.asarray(positions, dtype=np.int64)
    begin = 0
    for arrival in arrivals:
        own = wanted[(wanted >= begin) & (wanted < begin + len(arrival))] - begin
        begin += len(arrival)
        first = 0
        for block in arrival.blocks if len(own) else ():
            places = own[(own >= first) & (own < first + len(block))] - first
            rows = block.rows(places.tolist())
            for place in places:
                row = next(rows, None)
                if row is None:
                    raise ValueError(
                        f"num_examples is {len(arrival)}, but the stream ends before example"
                        f" {first + place}"
                    )
                yield arrival, row
            first += len(block)


class StreamGradientBatches(Sequence[dict[str, Any]]):
    """Minibatches at given positions of streams; a slice reads only its own images.

    Args:
        arrivals: oldest first.
        shares: positions of each minibatch, counted over all arrivals, in ascending order.
    """

    def __init__(self, arrivals: Sequence[StreamedImages], shares: Sequence[Sequence[int]]) -> None:
        self.arrivals = tuple(arrivals)
        self.shares = tuple(shares)

    def __len__(self) -> int:
        return len(self.shares)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> "StreamGradientBatches": ...

    def __getitem__(self, index: int | slice) -> "dict[str, Any] | StreamGradientBatches":
        if isinstance(index, slice):
            return StreamGradientBatches(self.arrivals, self.shares[index])
        return next(iter(StreamGradientBatches(self.arrivals, [self.shares[index]])))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = rows_at(self.arrivals, [position for share in self.shares for position in share])
        for share in self.shares:
            decoded = [
                arrival.decode([row]) for _, (arrival, row) in zip(share, rows, strict=False)
            ]
            pixels, labels = zip(*decoded, strict=True)
            yield {"pixel_values": torch.cat(pixels), "labels": torch.cat(labels)}


def share_minibatches(bounds: Sequence[int], num_processes: int, process_index: int) -> list[range]:
    """Return one process's equal share of the minibatches between ``bounds``.

    A remainder is dropped from a minibatch's old end; a minibatch with fewer examples than
    processes is dropped altogether.
    """
    shares = []
    for begin, end in pairwise(bounds):
        oldest = begin + (end - begin) % num_processes
        shares.append(range(oldest + process_index, end, num_processes))
    return [share for share in shares if len(share)]
