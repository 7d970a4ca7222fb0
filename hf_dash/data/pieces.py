"""Parts of a shard that can be read without the rest: a row group, members of a tar, single files.

Flow: a shard → its pieces, from a footer, the headers of an archive or a list of files; no image is
read → encoded images of some rows of a piece. Files on the Hub are read where they are, by ranges.
Source: parquet's row groups, as ``pyarrow`` reads them; the members of webdataset's archives.
Differs from ``IterableDataset.skip``: what comes before a piece is not read.
"""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset
from datasets.packaged_modules.webdataset.webdataset import base_plus_ext
from datasets.table import table_cast
from fsspec import AbstractFileSystem
from pyarrow.parquet import FileMetaData, ParquetFile

from hf_dash.data.archives import note_use
from hf_dash.data.columns import BATCH_SIZE, AnyDataset, undecoded
from hf_dash.hub.client import HubError, reach

# Fields of an archive that ``datasets`` unpacks.
PACKED_FIELDS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

# Files or row groups that are asked for at the same time, where only little of each is read.
AT_ONCE = 16

Result = TypeVar("Result")


class Piece(Protocol):
    """Rows of a shard that can be read without the rest of it.

    Args:
        num_rows: number of rows, including those that are left out later.
        scattered: each row can be read alone, at the price of that row.
    """

    @property
    def num_rows(self) -> int: ...  # noqa: D102

    @property
    def scattered(self) -> bool: ...  # noqa: D102

    def images(self, rows: Sequence[int]) -> Iterator[Any]:
        """Yield the images of these rows as ``Image(decode=False)`` does, in any order."""
        ...


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file; whichever rows are wanted, its images are read together.

    Args:
        path: of the file.
        number: of the row group, counted from 0.
        column: of the images.
        footer: of the file, so that it is read once for all row groups.
        files: where the file is, if it is not on this machine.
    """

    path: Path | str
    number: int
    column: str
    footer: FileMetaData
    files: AbstractFileSystem | None = field(default=None, repr=False)  # it may hold a token
    scattered: bool = field(default=False, init=False)

    @property
    def num_rows(self) -> int:
        """See :class:`Piece`."""
        return int(self.footer.row_group(self.number).num_rows)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Return some columns, as they are stored.

        Raises:
            HubError: the file is on the Hub and cannot be read; the message names it.
        """

        def read(file: ParquetFile) -> pa.Table:
            return file.read_row_group(self.number, columns=list(columns))

        size = self.footer.row_group(self.number).total_byte_size
        return _with_parquet(read, self.path, self.files, self.footer, size)

    def images(self, rows: Sequence[int]) -> Iterator[Any]:
        """Yield the images of these rows; see :class:`Piece`."""
        stored, image = self.read([self.column]).column(0), Image(decode=False)
        # By chunk: together they may be too large for one array.
        found = pa.chunked_array([image.cast_storage(chunk) for chunk in stored.chunks])
        for row in rows:
            yield found[int(row)].as_py()


def _with_parquet(
    action: Callable[[ParquetFile], Result],
    path: Path | str,
    files: AbstractFileSystem | None,
    footer: FileMetaData | None = None,
    size: int = 0,
) -> Result:
    """Do something with an open parquet file of this machine or the Hub, which takes such bytes."""
    if files is None:
        with ParquetFile(path, metadata=footer) as file:
            return action(file)

    def act() -> Result:
        # A cache would read on behind all that is asked for; ``pre_buffer`` asks for it at once.
        with (
            files.open(str(path), cache_type="none") as source,
            ParquetFile(source, metadata=footer, pre_buffer=True) as file,
        ):
            return action(file)

    try:
        return reach(act, size=size)
    except HubError as error:
        raise HubError(f"{path} cannot be read: {error}") from None


@dataclass(frozen=True)
class Members:
    """The images of a tar file that is not compressed.

    Args:
        path: of the file.
        offsets: [rows] of the images, in bytes from the beginning; −1 where a row has none.
        sizes: [rows] in bytes.
        is_copy: the file is a copy that we keep while it is used.
    """

    path: Path
    offsets: np.ndarray
    sizes: np.ndarray
    is_copy: bool = False
    scattered: bool = field(default=True, init=False)

    @property
    def num_rows(self) -> int:
        """See :class:`Piece`."""
        return len(self.offsets)

    def images(self, rows: Sequence[int]) -> Iterator[Any]:
        """Yield the images of these rows; see :class:`Piece`.

        Raises:
            ValueError: the file was cut off meanwhile.
        """
        if self.is_copy:
            note_use(self.path)
        # Without a buffer, which would read on behind each image.
        with open(self.path, "rb", buffering=0) as file:
            for row in rows:
                file.seek(int(self.offsets[row]))
                content = file.read(int(self.sizes[row]))
                if len(content) < self.sizes[row]:
                    raise ValueError(f"{self.path} was cut off: it ends before the image {row}")
                yield {"bytes": content, "path": None}


@dataclass(frozen=True)
class Rows:
    """All rows of a map-style dataset that stays on the disk: a list of files, a saved dataset.

    Args:
        dataset: with the column ``image``.
    """

    dataset: Dataset
    scattered: bool = field(default=True, init=False)

    @property
    def num_rows(self) -> int:
        """See :class:`Piece`."""
        return len(self.dataset)

    def images(self, rows: Sequence[int]) -> Iterator[Any]:
        """Yield the images of these rows; see :class:`Piece`."""
        for begin in range(0, len(rows), BATCH_SIZE):
            own = [int(row) for row in rows[begin : begin + BATCH_SIZE]]
            yield from self._encoded[own]["image"]

    @cached_property
    def _encoded(self) -> AnyDataset:
        return undecoded(self.dataset.select_columns("image"))


@dataclass(frozen=True)
class Together:
    """Pieces whose rows can each be read alone, as one, so that rows in any order are in one.

    Args:
        pieces: in order, at least one.
    """

    pieces: tuple[Piece, ...]
    scattered: bool = field(default=True, init=False)

    @property
    def num_rows(self) -> int:
        """See :class:`Piece`."""
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(piece.num_rows for piece in self.pieces)])

    def images(self, rows: Sequence[int]) -> Iterator[Any]:
        """Yield the images of these rows; see :class:`Piece`. A piece is opened once in a while."""
        for begin in range(0, len(rows), BATCH_SIZE):
            own = np.asarray(rows[begin : begin + BATCH_SIZE], dtype=np.int64)
            numbers = np.searchsorted(self._starts, own, side="right") - 1
            images: list[Any] = [None] * len(own)
            for number in np.unique(numbers).tolist():
                places = np.flatnonzero(numbers == number).tolist()
                found = self.pieces[number].images((own[places] - self._starts[number]).tolist())
                for place, image in zip(places, found, strict=True):
                    images[place] = image
            yield from images


def together(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return pieces as one if each of their rows can be read alone, else as they are."""
    if len(pieces) > 1 and all(piece.scattered for piece in pieces):
        return (Together(tuple(pieces)),)
    return tuple(pieces)


def row_groups(
    path: Path | str, column: str, files: AbstractFileSystem | None = None
) -> tuple[RowGroup, ...]:
    """Return the row groups of a parquet file that hold rows; reads its footer alone.

    Args:
        path: of the file.
        column: of the images.
        files: where the file is, if it is not on this machine.

    Raises:
        HubError: the file is on the Hub and cannot be read; the message names it.
    """
    footer = _with_parquet(lambda file: file.metadata, path, files)
    numbers = range(footer.num_row_groups)
    groups = [RowGroup(path, number, column, footer, files) for number in numbers]
    return tuple(group for group in groups if group.num_rows)


def remote_row_groups(
    paths: Sequence[str], column: str, files: AbstractFileSystem
) -> tuple[RowGroup, ...]:
    """Return the row groups of several files, in order; see :func:`row_groups`."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = [*pool.map(partial(row_groups, column=column, files=files), paths)]
    return tuple(group for part in parts for group in part)


def stream_of_groups(groups: Sequence[RowGroup], features: Features) -> IterableDataset:
    """Return a stream of some columns of row groups, with a shard for each; no other is read.

    Args:
        groups: at least one.
        features: of these columns, to which all files are cast.
    """
    settings = {"groups": list(groups), "features": features}
    return IterableDataset.from_generator(_group_rows, features=features, gen_kwargs=settings)


def _group_rows(groups: Sequence[RowGroup], features: Features) -> Iterator[dict[str, Any]]:
    for group in groups:
        table = table_cast(group.read([*features]).select([*features]), features.arrow_schema)
        for batch in table.to_batches(BATCH_SIZE):
            yield from batch.to_pylist()


def distinct_values(groups: Sequence[RowGroup], column: str) -> list[Any]:
    """Return the values that occur in a column of numbers or text, sorted; None is not a value.

    Args:
        groups: of one or more files.
        column: or a field of a column of records, such as ``"json.label"``. Only it is read.
    """

    def values_of(group: RowGroup) -> list[Any]:
        stored = group.read([column]).column(0)
        if pa.types.is_struct(stored.type):
            stored = pc.struct_field(stored, column.partition(".")[2])
        return stored.unique().to_pylist()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        values = {value for part in pool.map(values_of, groups) for value in part}
    return sorted(value for value in values if value is not None)


def members(path: Path, column: str, *, is_copy: bool = False) -> Members | None:
    """Return where the images of a webdataset lie; reads the headers of its tar file alone.

    Args:
        path: of the file.
        column: the field that holds the images, such as ``"jpg"``.
        is_copy: see :class:`Members`.

    Returns:
        None if the images cannot be read where they lie, since the archive or they are compressed.
    """
    if path.suffix.lower() != ".tar" or column.lower().endswith(PACKED_FIELDS):
        return None
    places: list[tuple[int, int]] = []
    last = None
    with open(path, "rb", buffering=0) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            # As ``datasets`` does: hidden files are skipped, and members of one key in a row are
            # one example.
            if not member.isreg() or PurePosixPath(member.name).name.startswith((".", "__")):
                continue
            key, name = base_plus_ext(member.name)
            if key is None:
                continue
            if key != last:
                places.append((-1, 0))
                last = key
            if name == column:
                if member.sparse is not None:
                    return None
                places[-1] = member.offset_data, member.size
    offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return Members(path, offsets, sizes, is_copy)


@dataclass(frozen=True)
class Run:
    """Rows that follow one another in an arrival and are in one piece.

    Args:
        piece: number of the piece.
        rows: [rows] in the piece.
        first: where the run begins in the arrival.
    """

    piece: int
    rows: np.ndarray
    first: int


def runs_of(pieces: Sequence[Piece], ids: np.ndarray) -> list[Run]:
    """Cut the rows of an arrival where the next one is in another piece.

    Args:
        pieces: of all shards, in order.
        ids: [rows] positions over all pieces, in the order of the arrival.

    Raises:
        ValueError: the pieces do not hold as many rows.
    """
    starts = np.cumsum([0, *(piece.num_rows for piece in pieces)])
    if len(ids) and ids.max() >= starts[-1]:
        raise ValueError(f"the shards hold {starts[-1]} rows, but row {ids.max()} is wanted")
    numbers = np.searchsorted(starts, ids, side="right") - 1
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(ids)]
    return [
        Run(int(numbers[begin]), ids[begin:end] - starts[numbers[begin]], begin)
        for begin, end in pairwise(bounds)
        if end > begin
    ]


def drawn(pieces: Sequence[Piece], ids: np.ndarray, seed: int) -> np.ndarray:
    """Return rows in a random order in which no piece is read twice.

    Rows that can be read one by one come in the order of map-style data. Others stay with those of
    their piece: pieces come in a random order, and so do the rows of each.

    Args:
        pieces: of all shards, in order.
        ids: [rows] positions over all pieces.
        seed: seed for the order.
    """
    generator = np.random.default_rng(seed)
    if all(piece.scattered for piece in pieces):
        return ids[generator.permutation(len(ids))]
    runs = runs_of(pieces, ids)
    order = [runs[number] for number in generator.permutation(len(runs)).tolist()]
    places = [run.first + generator.permutation(len(run.rows)) for run in order]
    return ids[np.concatenate(places)] if places else ids
