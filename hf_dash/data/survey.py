"""All rows of an arrival looked at once: labels, corrupt images, and what tells images apart.

Flow: shards → the manifests of those that an earlier command has read, every row of the others read
and decoded → a ``Survey`` → corrupt images refused or left out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
from datasets import Dataset, Features, IterableDataset

from hf_dash.data.columns import (
    BATCH_SIZE,
    AnyDataset,
    fingerprint_of,
    label_ids,
    label_names,
    map_columns,
    translated,
    undecoded,
    whole_numbers,
)
from hf_dash.data.findings import NO_LABEL, Findings, Flaw, look_at
from hf_dash.data.manifest import Manifest, keep_manifest
from hf_dash.data.pieces import runs_of
from hf_dash.data.shards import RowNames, Shard, reading
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

KNOWN = Flaw("is known to be corrupt", "")


@dataclass(frozen=True)
class Survey:
    """What was found in the rows of a dataset.

    Args:
        example_ids: of all rows, int64.
        labels: of all rows, int64; −1 for one that is not a class, −2 where there is none.
        content: a number for each image, uint64; equal images have equal ones.
        sha256: of the images as stored, uint8 [rows, 32].
        own_modes: PIL modes of the decoded images, bytes; empty for one that was not decoded.
        bad: flaws of the images that cannot be used, by id.
    """

    example_ids: np.ndarray
    labels: np.ndarray
    content: np.ndarray
    sha256: np.ndarray
    own_modes: np.ndarray
    bad: dict[int, Flaw] = field(default_factory=dict)

    @classmethod
    def from_findings(cls, found: Findings, example_ids: np.ndarray) -> "Survey":
        """Return what was found, by ``example_id``."""
        bad = {int(example_ids[row]): flaw for row, flaw in found.bad.items()}
        return cls(example_ids, found.labels, found.content, found.sha256, found.modes, bad)

    def of(self, example_ids: Sequence[int] | np.ndarray) -> "Survey":
        """Return the survey of some of the rows, in the order given."""
        order = np.argsort(self.example_ids)
        places = order[np.searchsorted(self.example_ids, example_ids, sorter=order)]
        bad = {i: self.bad[i] for i in np.intersect1d(example_ids, list(self.bad)).tolist()}
        return Survey(
            self.example_ids[places],
            self.labels[places],
            self.content[places],
            self.sha256[places],
            self.own_modes[places],
            bad,
        )

    @property
    def good(self) -> "Survey":
        """The survey without the rows that cannot be used."""
        return self.of(self.example_ids[~np.isin(self.example_ids, list(self.bad))])

    @property
    def modes(self) -> dict[str, int]:
        """PIL modes of the decoded images, each with the id of the first one."""
        modes, first = np.unique(self.own_modes, return_index=True)
        found = zip(modes.tolist(), self.example_ids[first].tolist(), strict=True)
        return {mode.decode(): example_id for mode, example_id in found if mode}

    def fingerprint(self, names: Sequence[str]) -> str:
        """Return the :func:`~hf_dash.data.columns.fingerprint` of the rows.

        Args:
            names: of the classes.
        """
        return fingerprint_of(names, self.labels, self.sha256)


def survey_rows(
    dataset: AnyDataset,
    names: RowNames,
    *,
    on_bad_example: str = "error",
    known_bad: frozenset[int] | None = None,
    by_pixels: bool = False,
) -> Survey:
    """Read all rows of a dataset once.

    Args:
        dataset: with the columns ``image``, ``label`` and ``example_id``.
        names: of the rows, for errors.
        on_bad_example: ``"error"`` or ``"skip"``.
        known_bad: ids of corrupt images, if an earlier survey has found them; then no image is
            decoded.
        by_pixels: tell images apart by their pixels instead of their encoded bytes.

    Raises:
        ValueError: a row cannot be read, an image cannot be used and ``on_bad_example`` is
            ``"error"``, or an image that can be used has no label.
    """
    ids: list[int] = []
    batches = _batches(dataset, names, ids)
    mode = dataset.features["image"].mode
    found = look_at(batches, mode=mode, by_pixels=by_pixels, decodes=known_bad is None)
    survey = Survey.from_findings(found, np.array(ids, dtype=np.int64))
    if known_bad is not None:
        survey = replace(survey, bad=survey.bad | dict.fromkeys(known_bad, KNOWN))
    check_survey(survey, names, known_bad is None and on_bad_example == "error")
    return survey


def _batches(
    dataset: AnyDataset, names: RowNames, ids: list[int]
) -> Iterator[tuple[list[Any], list[int | None]]]:
    """Yield images as stored and labels, and note ids; an error names the shard being read."""
    batches = iter(undecoded(dataset).iter(batch_size=BATCH_SIZE))
    while True:
        with reading(names.shard(ids[-1] + 1 if ids else 0)):
            batch = next(batches, None)
        if batch is None:
            return
        ids += batch["example_id"]
        yield batch["image"], batch["label"]


class Opened(NamedTuple):
    """Shards, and all their rows as one dataset."""

    shards: tuple[Shard, ...]
    dataset: AnyDataset


def survey_opened(
    opened: Opened,
    dataset: AnyDataset,
    example_ids: np.ndarray | None = None,
    *,
    known_bad: frozenset[int] | None = None,
    by_pixels: bool = False,
) -> Survey | None:
    """Return what is found in rows of some shards by :func:`survey_shards`, if that pays.

    Args:
        opened: the shards.
        dataset: all of their rows, or some.
        example_ids: of some rows, if they are known; those of a map-style dataset are.
        known_bad: see :func:`survey_shards`.
        by_pixels: see :func:`survey_rows`.

    Returns:
        The survey of these rows; None if what nobody has read, and cannot be read in parts, would
        be read for less than half as many rows, or for rows that nobody knows.

    Raises:
        ValueError: see :func:`survey_shards`.
    """
    shards, whole = opened
    if dataset is not whole:
        if example_ids is None and isinstance(dataset, Dataset):
            example_ids = whole_numbers(dataset, "example_id")
        if example_ids is None:
            return None
        if 2 * len(example_ids) < sum(map(_num_unread, shards)):
            in_parts = known_bad is None and all(map(_has_parts, shards))
            return _survey_parts(opened, example_ids, by_pixels) if in_parts else None
    classes = label_names(dataset)
    survey = survey_shards(shards, classes, known_bad=known_bad, by_pixels=by_pixels)
    return survey if dataset is whole else survey.of(cast(np.ndarray, example_ids))


def _has_parts(shard: Shard) -> bool:
    """Check that a shard's stream has a shard of its own for each piece."""
    is_stream = isinstance(shard.dataset, IterableDataset) and shard.pieces is not None
    return is_stream and shard.dataset.num_shards == len(shard.pieces or ())


def _survey_parts(opened: Opened, example_ids: np.ndarray, by_pixels: bool) -> Survey:
    """Return what is found in some rows of streams; no piece without one of them is read."""
    ids = np.sort(example_ids)
    mode = opened.dataset.features["image"].mode
    found = look_at(_parts_of(opened, ids), mode=mode, by_pixels=by_pixels)
    return Survey.from_findings(found, ids).of(example_ids)


def _parts_of(opened: Opened, ids: np.ndarray) -> Iterator[tuple[list[Any], list[int | None]]]:
    """Yield images as stored and labels of rows, in ascending order."""
    shards, classes = opened.shards, label_names(opened.dataset)
    streams = [undecoded(shard.dataset) for shard in shards]
    places = [label_ids(shard.dataset, classes) for shard in shards]
    pieces = [piece for shard in shards for piece in shard.pieces or ()]
    parts = [(n, part) for n, shard in enumerate(shards) for part in range(len(shard.pieces or ()))]
    for run in runs_of(pieces, ids):
        number, part = parts[run.piece]
        stream = streams[number].shard(streams[number].num_shards, part)
        first = 0
        with reading(shards[number].name):
            for batch in stream.iter(BATCH_SIZE):
                labels = translated(batch["label"], places[number])
                end = first + len(labels)
                own = run.rows[(run.rows >= first) & (run.rows < end)] - first
                yield [batch["image"][row] for row in own], [labels[row] for row in own]
                first = end


def survey_shards(
    shards: Sequence[Shard],
    classes: Sequence[str],
    *,
    known_bad: frozenset[int] | None = None,
    by_pixels: bool = False,
) -> Survey:
    """Return what is found in all rows of some shards; those that have a manifest are not read.

    Args:
        shards: as :func:`~hf_dash.data.shards.merge_shards` puts them together.
        classes: of all of them.
        known_bad: ids of corrupt images, if an earlier survey has found them.
        by_pixels: see :func:`survey_rows`.

    Raises:
        ValueError: a shard cannot be read, was changed meanwhile, or is not what its manifest says
            where that is to be verified.
    """
    parts: list[Survey] = []
    place_of = {name: place for place, name in enumerate(classes)}
    start = 0
    for shard in shards:
        own = manifest_of(shard, by_pixels=by_pixels)
        ids = start + np.arange(len(own.findings))
        part = Survey.from_findings(own.findings, ids)
        # The last place is that of a label which is not a class.
        places = np.array([*(place_of[name] for name in own.classes), -1])
        known = (part.labels >= 0) & (part.labels < len(own.classes))
        labels = np.where(known, places[np.where(known, part.labels, -1)], -1)
        labels = np.where(part.labels == NO_LABEL, NO_LABEL, labels)
        parts.append(replace(part, labels=labels))
        start += len(ids)
    survey = _joined(parts)
    if known_bad is None:
        return survey
    unread = survey.example_ids[~survey.sha256.any(axis=1)].tolist()
    return replace(survey, bad=survey.of(unread).bad | dict.fromkeys(known_bad, KNOWN))


def _joined(parts: Sequence[Survey]) -> Survey:
    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Survey(
        column("example_ids"),
        column("labels"),
        column("content"),
        column("sha256"),
        column("own_modes"),
        {row: flaw for part in parts for row, flaw in part.bad.items()},
    )


def manifest_of(shard: Shard, *, by_pixels: bool = False) -> Manifest:
    """Return a shard's manifest; one that has none is read once, a folder only where it is new.

    Raises:
        ValueError: see :func:`survey_shards`.
    """
    if shard.manifest is not None and _fits(shard, shard.manifest):
        return shard.manifest
    with reading(shard.name):
        found = _found_in(shard, by_pixels)
    values = None if shard.values is None else tuple(shard.values)
    manifest = Manifest(tuple(label_names(shard.dataset)), values, found)
    keep_manifest(shard.origin, manifest)
    return manifest


def _found_in(shard: Shard, by_pixels: bool) -> Findings:
    """Return what is found in a shard; of a folder that has changed, what is the same is known."""
    rows, earlier = shard.rows, shard.earlier
    if rows is None or earlier is None:
        return _look_at(shard.dataset, by_pixels)
    new = earlier.others(len(rows))
    message = "%s: %s of %s images are new or changed, and are read"
    logger.info(message, shard.name, f"{len(new):,}", f"{len(rows):,}")
    labels = whole_numbers(rows, "label", NO_LABEL)
    return earlier.joined(_look_at(rows.select(new), by_pixels), labels)


def _look_at(dataset: AnyDataset, by_pixels: bool) -> Findings:
    images = undecoded(dataset)
    batches = ((b["image"], b["label"]) for b in images.iter(batch_size=BATCH_SIZE))
    return look_at(batches, mode=images.features["image"].mode, by_pixels=by_pixels)


def _num_unread(shard: Shard) -> float:
    """Return how many rows a pass would read that nobody has read; infinite if nobody knows."""
    if shard.manifest is not None:
        return 0
    known = 0 if shard.earlier is None else len(shard.earlier.now)
    return math.inf if shard.num_rows is None else shard.num_rows - known


def _fits(shard: Shard, manifest: Manifest) -> bool:
    """Check a manifest against what is known of its shard without reading images."""
    same = shard.num_rows in (None, len(manifest.findings))
    same = same and manifest.classes == tuple(label_names(shard.dataset))
    if same and isinstance(shard.dataset, Dataset):
        labels = whole_numbers(shard.dataset, "label", NO_LABEL)
        same = np.array_equal(manifest.findings.labels, labels)
    if not same:
        logger.warning("%s: its manifest has other rows or labels, and is written anew", shard.name)
    return same


def check_survey(survey: Survey, names: RowNames, refuse: bool) -> None:
    """Check that what was found can be used.

    Args:
        survey: of all rows that were read.
        names: of the rows, for errors.
        refuse: images that cannot be used.

    Raises:
        ValueError: see :func:`survey_rows`.
    """
    if survey.bad and refuse:
        first = min(survey.bad)
        shard, flaw = names.shard(first), survey.bad[first]
        alike = [
            i for i, f in survey.bad.items() if names.shard(i) == shard and f.what == flaw.what
        ]
        raise ValueError(
            f"{names.name(first)} {flaw.what}, one of {len(alike)} in {shard} ({flaw.detail});"
            " on_bad_example='skip' leaves them out"
        )
    unknown = [i for i in survey.bad if not len(survey.example_ids) or i > max(survey.example_ids)]
    if unknown:
        raise ValueError(
            f"skip must name rows of {list(names.shards)}, which have {len(survey.example_ids)}"
            f" rows, got {names.name(unknown[0])!r}"
        )
    unlabeled = survey.labels < 0
    for example_id, label in zip(
        survey.example_ids[unlabeled].tolist(), survey.labels[unlabeled].tolist(), strict=True
    ):
        if example_id not in survey.bad:
            got = None if label == NO_LABEL else label
            raise ValueError(f"{names.name(example_id)} has no label among its classes, got {got}")


def drop_rows(dataset: AnyDataset, example_ids: Sequence[int] | frozenset[int]) -> AnyDataset:
    """Return a dataset without the rows of these ids."""
    if not example_ids:
        return dataset
    if isinstance(dataset, Dataset):
        ids = whole_numbers(dataset, "example_id")
        return dataset.select(np.flatnonzero(~np.isin(ids, list(example_ids))))
    features = Features(dataset.features)
    settings = {"example_ids": frozenset(example_ids)}
    return map_columns(undecoded(dataset), _without, features, fn_kwargs=settings)


def _without(columns: dict[str, list[Any]], example_ids: frozenset[int]) -> dict[str, list[Any]]:
    kept = [n for n, number in enumerate(columns["example_id"]) if number not in example_ids]
    return {name: [values[n] for n in kept] for name, values in columns.items()}
