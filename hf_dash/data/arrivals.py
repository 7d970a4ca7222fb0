"""What arrives together: new shards that appear in a directory, or any other set of shards.

Flow: a directory or a glob → shards in the order of their names → those not seen before → opened,
put together and read once → one ``Arrival`` without corrupt images, with a fingerprint of its
content.
"""

import glob
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import cast
from uuid import uuid4

import numpy as np
from datasets import Dataset

from hf_dash.data.columns import AnyDataset, label_names, whole_numbers
from hf_dash.data.config import DataConfig
from hf_dash.data.examples import ImageExamples, Transform
from hf_dash.data.folders import PACKED, TEMPORARY_SUFFIXES, is_image
from hf_dash.data.names import shown
from hf_dash.data.pieces import Piece, drawn, runs_of, together
from hf_dash.data.pixel_cache import PixelBudget
from hf_dash.data.shards import LOADERS, RowNames, Shard, merge_shards, open_shard, shard_kind
from hf_dash.data.stamps import Stamps, joint_stamps
from hf_dash.data.streams import FileBlock, StreamedImages, stream_of
from hf_dash.data.survey import (
    Opened,
    Survey,
    check_survey,
    drop_rows,
    survey_opened,
    survey_rows,
)
from hf_dash.transforms import ImageTransform
from hf_dash.utils.checks import refuse_unless
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

AnyImages = ImageExamples | StreamedImages


@dataclass(frozen=True)
class Arrival:
    """One round's new images as one dataset.

    Args:
        files: names of the shards below the root, oldest first; empty if no shards arrive.
        dataset: with the columns ``image``, ``label`` (``ClassLabel``) and ``example_id`` (int64):
            the example's position over the shards of this arrival, counted from 0 and including
            skipped ones, so that it never changes. An ``IterableDataset`` if streamed.
        num_examples: number of examples in ``dataset``; None for a stream not counted yet.
        skipped: images left out: corrupt ones as ``"monday.parquet:17"`` or, in a folder, by their
            path; others with the reason.
        fingerprint: of ``dataset``, see ``hf_dash.data.columns.fingerprint``; None if not computed
            yet.
        types: types of the source's two columns.
        names: of the rows, by ``example_id``.
        survey: of the examples in ``dataset``; None if they have not been read yet.
        stamps: of the files that are read while a model trains.
        pieces: of a stream, all rows of its shards in parts that can be read alone, skipped ones
            included, in order of ``example_id``; None if a shard has none.
        opened: the shards that ``dataset`` is put together of, or was before rows were chosen.

    Example:
        >>> import hf_dash
        >>> digits = hf_dash.load_images("digits", split="test")
        >>> hf_dash.data.Arrival(files=(), dataset=digits, num_examples=len(digits)).num_examples
        360
    """

    files: tuple[str, ...]
    dataset: AnyDataset
    num_examples: int | None
    skipped: tuple[str, ...] = ()
    fingerprint: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    names: RowNames | None = None
    survey: Survey | None = None
    stamps: Stamps = field(default_factory=dict)
    pieces: tuple[Piece, ...] | None = None
    opened: Opened | None = None

    def examples(
        self,
        transform: Transform,
        label_ids: Sequence[int] | None = None,
        *,
        cache: bool = False,
        label_noise: float = 0.0,
        noise_seed: int = 0,
        budget: PixelBudget | None = None,
    ) -> AnyImages:
        """Return the images as model inputs.

        Args:
            transform: from a PIL image to a tensor.
            label_ids: see :class:`~hf_dash.data.examples.ImageExamples`.
            cache: keep decoded images.
            label_noise: see :class:`~hf_dash.data.examples.ImageExamples`; streams take none.
            noise_seed: see :class:`~hf_dash.data.examples.ImageExamples`.
            budget: for decoded images.

        Raises:
            ValueError: an image has a mode that the transform does not take, or ``label_noise`` is
                set for a stream.
        """
        self.check_mode(transform)
        if isinstance(self.dataset, Dataset):
            return ImageExamples(
                self.dataset,
                transform,
                in_memory=cache,
                label_ids=label_ids,
                label_noise=label_noise,
                noise_seed=noise_seed,
                fingerprint=self.fingerprint,
                stamps=self.stamps,
                cache_key=self.cache_key(transform),
                budget=budget,
            )
        if label_noise:
            raise ValueError(f"label_noise must be 0 for streams, got {label_noise!r}")
        images = StreamedImages(
            self.dataset,
            transform,
            num_examples=self.num_examples,
            label_ids=label_ids,
            cache=cache,
            fingerprint=self.fingerprint,
            labels=None if self.survey is None else self.survey.labels.tolist(),
            stamps=self.stamps,
            blocks=self.blocks(),
        )
        if cache and budget is not None:
            images.cache = budget.take(uuid4().hex, images.num_bytes())
        return images

    def cache_key(self, transform: Transform) -> str | None:
        """Return what tells the images and their first transform from all others, if it is known.

        Images are known by their content, in the order in which they are.
        """
        how = ImageTransform.of(transform).key
        if how is None or self.survey is None:
            return None
        mode = self.dataset.features["image"].mode
        digest = hashlib.sha256(f"{how} {mode}".encode())
        digest.update(self.survey.of(whole_numbers(self.dataset, "example_id")).content.tobytes())
        return digest.hexdigest()

    def check_mode(self, transform: Transform) -> None:
        """Check that a transform takes the images, if it can tell, as ``image_transform``'s can.

        Raises:
            ValueError: it does not; the message names an image.
        """
        if self.survey is None or self.names is None:
            return
        check = ImageTransform.of(transform).check_mode
        for mode, example_id in self.survey.modes.items():
            try:
                check(mode)
            except ValueError as error:
                raise ValueError(f"{self.names.name(example_id)}: {error}") from error

    def blocks(self) -> list[FileBlock] | None:
        """Return a stream's examples in parts that can be read alone, if it has them.

        Raises:
            ValueError: there are more rows than the shards hold.
        """
        if self.pieces is None or self.survey is None:
            return None
        labels = self.survey.labels
        return [
            FileBlock(self.pieces[run.piece], run.rows, labels[run.first :][: len(run.rows)])
            for run in runs_of(self.pieces, self.survey.example_ids)
        ]

    def with_ids(self, example_ids: np.ndarray) -> "Arrival":
        """Return a stream that was read once, and has pieces, with some of its rows in this order.

        Nothing is read.
        """
        assert self.survey is not None
        survey = self.survey.of(example_ids)
        digest = survey.fingerprint(label_names(self.dataset))
        count = len(example_ids)
        arrival = replace(self, num_examples=count, survey=survey, fingerprint=digest)
        stream = stream_of(arrival.blocks() or [], example_ids, self.dataset.features)
        return replace(arrival, dataset=stream)

    def drawn(self, seed: int, count: int | None = None) -> "Arrival":
        """Return such a stream in random order, at most ``count`` rows; see ``pieces.drawn``."""
        assert self.survey is not None
        assert self.pieces is not None
        return self.with_ids(drawn(self.pieces, self.survey.example_ids, seed)[:count])

    def with_rows(self, dataset: Dataset) -> "Arrival":
        """Return the arrival with some of its rows, in the order given."""
        survey = self.survey and self.survey.of(whole_numbers(dataset, "example_id"))
        fingerprint = None if survey is None else survey.fingerprint(label_names(dataset))
        return replace(
            self, dataset=dataset, num_examples=len(dataset), fingerprint=fingerprint, survey=survey
        )

    def without(self, example_ids: frozenset[int]) -> "Arrival":
        """Return a surveyed arrival without some of its examples."""
        if not example_ids or self.survey is None:
            return self
        dataset = drop_rows(self.dataset, example_ids)
        if isinstance(dataset, Dataset):
            return self.with_rows(dataset)
        ids = self.survey.example_ids
        kept = self.survey.of(ids[~np.isin(ids, list(example_ids))])
        return replace(
            self,
            dataset=dataset,
            num_examples=len(kept.example_ids),
            fingerprint=kept.fingerprint(label_names(dataset)),
            survey=kept,
        )


class EmptyArrivalError(ValueError):
    """An arrival does not hold any example."""


def unread(shards: Sequence[Shard], files: Sequence[str] = (), *, numbered: bool = True) -> Arrival:
    """Put shards together, before anything in them is read."""
    dataset, names = merge_shards(shards, numbered=numbered)
    arrival = Arrival(tuple(files), dataset, None, types=shards[0].types, names=names)
    stamps, opened = joint_stamps(s.stamps for s in shards), Opened(tuple(shards), dataset)
    return replace(arrival, stamps=stamps, pieces=_joint_pieces(shards), opened=opened)


def _joint_pieces(shards: Sequence[Shard]) -> tuple[Piece, ...] | None:
    parts = [shard.pieces for shard in shards]
    return None if None in parts else together([piece for part in parts for piece in part or ()])


def left_out_of(shards: Sequence[Shard]) -> tuple[str, ...]:
    """Return the images of shards that could not be loaded, each with the reason."""
    return tuple(f"{shard.name}/{entry}" for shard in shards for entry in shard.left_out)


def arrive(
    shards: Sequence[Shard],
    config: DataConfig,
    *,
    skip: Sequence[str] | None = None,
    files: Sequence[str] = (),
) -> Arrival:
    """Put shards together, read them once, and leave corrupt images out.

    Raises:
        ValueError: see :func:`load_arrival`.
    """
    arrival = unread(shards, files)
    names = cast(RowNames, arrival.names)
    known = None if skip is None else names.find(skip)
    arrival = read_once(arrival, config, known_bad=known)
    if arrival.num_examples == 0:
        raise EmptyArrivalError(
            f"{list(names.shards)} hold no example, {len(arrival.skipped)} skipped"
        )
    return replace(arrival, skipped=(*arrival.skipped, *left_out_of(shards)))


def read_once(
    arrival: Arrival,
    config: DataConfig,
    *,
    known_bad: frozenset[int] | None = None,
    example_ids: np.ndarray | None = None,
) -> Arrival:
    """Read all images of an arrival once, unless an earlier command has; leave corrupt ones out.

    Args:
        arrival: with all of its rows, or some.
        config: what to do about corrupt images, and how to compare them.
        known_bad: ids of corrupt images, if they are known.
        example_ids: of a stream of some rows, if they are known.

    Raises:
        ValueError: see :func:`load_arrival`.
    """
    names = arrival.names or RowNames(("the images",), (0,), (None,))
    by_pixels = config.compare_images_by == "pixels"
    survey = None
    if arrival.opened is not None:
        survey = survey_opened(
            arrival.opened, arrival.dataset, example_ids, known_bad=known_bad, by_pixels=by_pixels
        )
    if survey is None:
        survey = survey_rows(
            arrival.dataset,
            names,
            on_bad_example=config.on_bad_example,
            known_bad=known_bad,
            by_pixels=by_pixels,
        )
    else:
        check_survey(survey, names, known_bad is None and config.on_bad_example == "error")
    _say_lost_classes(arrival, survey, names)
    good = survey.good
    return replace(
        arrival,
        dataset=drop_rows(arrival.dataset, frozenset(survey.bad)),
        num_examples=len(good.example_ids),
        skipped=tuple(names.name(example_id) for example_id in sorted(survey.bad)),
        fingerprint=good.fingerprint(label_names(arrival.dataset)),
        names=names,
        survey=good,
    )


def _say_lost_classes(arrival: Arrival, survey: Survey, names: RowNames) -> None:
    """Name the classes of which corrupt images leave nothing."""
    found, left = ({*part.labels.tolist()} for part in (survey, survey.good))
    lost = [label_names(arrival.dataset)[label] for label in sorted(found - left) if label >= 0]
    if lost:
        logger.warning("%s: no image is left of the classes %s", names.shards[0], shown(lost))


def load_arrival(
    files: Sequence[Path],
    config: DataConfig,
    *,
    root: str | Path,
    skip: Sequence[str] | None = None,
) -> Arrival:
    """Load new shards as one arrival.

    Every image is read and decoded once to find corrupt ones, unless ``skip`` lists them. Labels
    without names are read once more. Only labels and a number per image stay in memory.

    Args:
        files: shards of one kind, oldest first; see :func:`list_arrivals`.
        config: columns, image mode, streaming and what to do about corrupt images.
        root: directory that shard names are relative to.
        skip: corrupt images from an earlier ``Arrival.skipped`` of the same shards.

    Returns:
        The arrival. Labels are merged by name: its classes are those of all shards, in the order
        in which they first appear.

    Raises:
        ValueError: a shard cannot be read, lacks a column, or has other column types than the
            first; an image is corrupt and ``config.on_bad_example`` is ``"error"``; an example has
            no label; ``skip`` lists a row that does not exist; no example is left.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hf_dash
        >>> digits = hf_dash.load_images("digits", split="test").select(range(20))
        >>> with TemporaryDirectory() as folder:
        ...     _ = digits.to_parquet(f"{folder}/monday.parquet")
        ...     shards = hf_dash.data.list_arrivals(folder)
        ...     arrival = hf_dash.data.load_arrival(shards, hf_dash.DataConfig(), root=folder)
        >>> arrival.files, arrival.num_examples
        (('monday.parquet',), 20)
    """
    names = [_name(Path(file), Path(root)) for file in files]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"files must name at least one shard, and none twice, got {names}")
    shards = [
        open_shard(Path(file), name, config.reading)
        for file, name in zip(files, names, strict=True)
    ]
    return arrive(shards, config, skip=skip, files=names)


def arrivals_root(pattern: str) -> Path:
    """Return the directory that shard names are relative to: the pattern's part before any glob."""
    path = Path(pattern)
    if path.is_dir():
        return path
    if path.exists():  # whatever its name looks like
        return path.parent
    fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    return Path(*fixed) if len(fixed) < len(path.parts) else path.parent


def list_arrivals(pattern: str, *, allow_missing: bool = False) -> list[Path]:
    """List the shards that have arrived, in the order of their names.

    Args:
        pattern: a directory whose parquet files, webdataset ``.tar`` or ``.tar.gz`` files or
            subfolders (each with one folder per class) are the shards, or a glob of them. Names
            that start with ``.`` or ``_`` or end in ``.tmp``, ``.part`` or ``.crdownload`` are
            ignored, because they are still being written. Names sort as text: ``day-10`` before
            ``day-9``.
        allow_missing: continue although a directory holds images or archives that are not shards.

    Raises:
        ValueError: nothing matches, shards of several kinds match, one contains another, or a
            directory holds images or archives that are not shards.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import hf_dash
        >>> with TemporaryDirectory() as folder:
        ...     (Path(folder) / "tuesday.parquet").touch()
        ...     (Path(folder) / "monday.parquet").touch()
        ...     [shard.name for shard in hf_dash.data.list_arrivals(folder)]
        ['monday.parquet', 'tuesday.parquet']
    """
    shards = _find(pattern)
    if not shards:
        raise ValueError(f"no parquet file, tar file or folder of images matches {pattern!r}")
    kinds = {shard_kind(path): path.name for path in shards}
    if len(kinds) > 1:
        raise ValueError(f"{pattern!r} must match shards of one kind, got {kinds}")
    for path in shards:
        if set(path.parents) & set(shards):
            raise ValueError(f"{pattern!r} must not match {path}, which is inside another match")
    _check_others(pattern, shards, allow_missing)
    return shards


def _check_others(pattern: str, shards: Sequence[Path], allow_missing: bool) -> None:
    """Name what lies in the directory, looks like data, and is not among the shards."""
    if not Path(pattern).is_dir():
        return
    others = [
        path.name
        for path in sorted(set(Path(pattern).iterdir()) - set(shards))
        if not is_hidden(path.name)
        and (not path.exists() or path.name.lower().endswith(PACKED) or is_image(path))
    ]
    if not others:
        return
    message = f"{pattern!r} holds {others[:5]}, which are not shards: {' or '.join(LOADERS)}"
    remedy = ", or a folder of images; allow_missing=True leaves them out"
    refuse_unless(allow_missing, message, remedy, logger)


def _find(pattern: str) -> list[Path]:
    root = arrivals_root(pattern)
    path = Path(pattern)
    if path.is_dir():
        matches = list(path.iterdir())
    elif path.exists():
        matches = [path]
    else:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    shards = {_name(match, root): match for match in matches}
    return [
        shards[name]
        for name in sorted(shards)
        if shard_kind(shards[name]) and shards[name].exists() and not is_hidden(name)
    ]


def is_hidden(name: str) -> bool:
    """Check whether a path is hidden or still being written, as its name says."""
    return any(part.startswith((".", "_")) for part in name.split("/")) or name.lower().endswith(
        TEMPORARY_SUFFIXES
    )


def _name(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"root must be a folder above {path}, got {root}") from error


def new_arrivals(pattern: str, seen: Sequence[str], *, allow_missing: bool = False) -> list[Path]:
    """List the shards that no earlier round has seen, in the order of their names.

    Args:
        pattern: see :func:`list_arrivals`.
        seen: names of the shards of earlier rounds, as in ``Arrival.files``: relative to
            :func:`arrivals_root`, with forward slashes.
        allow_missing: see :func:`list_arrivals`.

    Returns:
        The new shards; an empty list if there are none.

    Raises:
        ValueError: a seen shard has disappeared; or see :func:`list_arrivals`.
    """
    root = arrivals_root(pattern)
    shards = {_name(path, root): path for path in _find(pattern)}
    gone = [name for name in seen if name not in shards]
    if gone:
        raise ValueError(f"shards of earlier rounds have disappeared from {root}: {gone}")
    listed = list_arrivals(pattern, allow_missing=allow_missing)
    return [path for path in listed if _name(path, root) not in set(seen)]
