"""All rows of an arrival looked at once: labels, corrupt images, and what tells images apart.

Flow: a dataset of encoded images → every row read, and decoded unless that was done before → a
``Survey`` → corrupt images refused or left out.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features
from PIL import Image as PILImage
from PIL import ImageOps

from hf_dash.data.columns import (
    BATCH_SIZE,
    AnyDataset,
    Fingerprint,
    label_names,
    map_columns,
    stored_bytes,
    undecoded,
)
from hf_dash.data.shards import RowNames, reading


class Flaw(NamedTuple):
    """Why an image cannot be used: what it is, and how that was found out."""

    what: str
    detail: str


@dataclass(frozen=True)
class Survey:
    """What was found in the rows of a dataset.

    Args:
        example_ids: of all rows, int64.
        labels: of all rows, int64; −1 where there is none.
        content: a number for each image, uint64; equal images have equal ones.
        bad: flaws of the images that cannot be used, by id.
        modes: PIL modes of the decoded images, each with the id of the first one.
        fingerprint: of the good rows, see :func:`~hf_dash.data.columns.fingerprint`; None for a
            part of the rows.
    """

    example_ids: np.ndarray
    labels: np.ndarray
    content: np.ndarray
    bad: dict[int, Flaw] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    fingerprint: str | None = None

    def of(self, example_ids: Sequence[int] | np.ndarray) -> "Survey":
        """Return the survey of some of the rows, in the order given."""
        order = np.argsort(self.example_ids)
        places = order[np.searchsorted(self.example_ids, example_ids, sorter=order)]
        columns = self.example_ids[places], self.labels[places], self.content[places]
        return Survey(*columns, modes=self.modes)

    @property
    def good(self) -> "Survey":
        """The survey without the rows that cannot be used."""
        kept = self.example_ids[~np.isin(self.example_ids, list(self.bad))]
        return replace(self.of(kept), fingerprint=self.fingerprint)


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
    found = _Found(dataset.features["image"].mode, known_bad, by_pixels)
    digest = Fingerprint(label_names(dataset))
    rows = _rows(dataset, names)
    for value, label, example_id in rows:
        content = found.add(value, label, example_id)
        if content is not None:
            digest.add(-1 if label is None else label, content)
    survey = found.survey(digest.hexdigest())
    _check(survey, names, refuse=known_bad is None and on_bad_example == "error")
    return survey


def _rows(dataset: AnyDataset, names: RowNames) -> Any:
    """Yield images as stored, labels and ids; an error names the shard that was being read."""
    expected = 0
    batches = iter(undecoded(dataset).iter(batch_size=BATCH_SIZE))
    while True:
        with reading(names.shard(expected)):
            batch = next(batches, None)
        if batch is None:
            return
        yield from zip(batch["image"], batch["label"], batch["example_id"], strict=True)
        expected = batch["example_id"][-1] + 1


def _check(survey: Survey, names: RowNames, *, refuse: bool) -> None:
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
            got = None if label == _NO_LABEL else label
            raise ValueError(f"{names.name(example_id)} has no label among its classes, got {got}")


_NO_LABEL = -2


class _Found:
    """What a survey has found so far."""

    def __init__(self, mode: str | None, known: frozenset[int] | None, by_pixels: bool) -> None:
        self.mode = mode
        self.by_pixels = by_pixels
        self.decodes = known is None
        self.bad = dict.fromkeys(known or (), Flaw("is known to be corrupt", ""))
        self.modes: dict[str, int] = {}
        self.columns: list[tuple[int, int, int]] = []

    def add(self, value: Any, label: int | None, example_id: int) -> bytes | None:
        """Take one row in; return its encoded image unless it cannot be used."""
        content, number = None, 0
        try:
            content = stored_bytes(value)
            number = _number(content)
            if example_id not in self.bad and (self.decodes or self.by_pixels):
                number = self._decode(value, content, example_id) or number
        except Exception as error:  # a decoder may raise anything for a broken file
            self.bad[example_id] = Flaw("is a corrupt image", f"{type(error).__name__}: {error}")
        self.columns.append((example_id, _NO_LABEL if label is None else label, number))
        return None if example_id in self.bad else content

    def _decode(self, value: Any, content: bytes, example_id: int) -> int | None:
        """Decode an image; return the number of its pixels if they tell images apart."""
        in_memory = isinstance(value, PILImage.Image)
        image = value if in_memory else PILImage.open(io.BytesIO(content))
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            detail = f"mode {image.mode}: scale it to 8 bits first, since converting it would clip"
            self.bad[example_id] = Flaw("has more than 8 bits a pixel", detail)
            return None
        self.modes.setdefault(self.mode or image.mode, example_id)
        if not self.by_pixels:
            return None
        image = ImageOps.exif_transpose(image)
        image = image if self.mode is None else image.convert(self.mode)
        return _number(f"{image.mode} {image.size} ".encode() + image.tobytes())

    def survey(self, fingerprint: str) -> Survey:
        """Return the survey of the rows so far."""
        ids, labels, content = zip(*self.columns, strict=True) if self.columns else ((), (), ())
        return Survey(
            np.array(ids, dtype=np.int64),
            np.array(labels, dtype=np.int64),
            np.array(content, dtype=np.uint64),
            self.bad,
            self.modes,
            fingerprint,
        )


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def drop_rows(dataset: AnyDataset, example_ids: Sequence[int] | frozenset[int]) -> AnyDataset:
    """Return a dataset without the rows of these ids."""
    if not example_ids:
        return dataset
    if isinstance(dataset, Dataset):
        ids = np.array(dataset["example_id"][:], dtype=np.int64)
        return dataset.select(np.flatnonzero(~np.isin(ids, list(example_ids))))
    features = Features(dataset.features)
    settings = {"example_ids": frozenset(example_ids)}
    return map_columns(undecoded(dataset), _without, features, fn_kwargs=settings)


def _without(columns: dict[str, list[Any]], example_ids: frozenset[int]) -> dict[str, list[Any]]:
    kept = [n for n, number in enumerate(columns["example_id"]) if number not in example_ids]
    return {name: [values[n] for n in kept] for name, values in columns.items()}
