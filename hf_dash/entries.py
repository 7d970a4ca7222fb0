"""What a history records: rounds, promotions, changes of settings, and rounds that were dropped.

Flow: a dataclass, or a mapping that anybody may have written → kinds and ranges of all its fields
checked → an entry. Every entry holds the digest of the one before.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias, get_args

from hf_dash.utils.checks import check_count, check_folder_name, check_number, check_types
from hf_dash.utils.reports import REPORT_NAME, check_report

PromotionKind = Literal["promote", "reject", "force", "rollback"]


@dataclass(frozen=True)
class RoundRecord:
    """What one start did in one round.

    Args:
        start: name of the strategy.
        seed: of the run.
        round_index: 1 for the first round.
        num_new: examples that arrived in this round.
        num_total: examples trained on.
        accuracy: on the held-out examples, in [0, 1].
        per_class_accuracy: the same by label.
        train_accuracy: over the last epoch; None where it was not measured.
        converged: whether training reached its threshold; None where it had none.
        epochs: of training.
        steps: optimizer steps.
        start_seconds: duration of the start itself, the gradient pass included.
        train_seconds: duration of the training.
        shrink: ``ShrinkReport.to_dict()``, or None where nothing was shrunk. Of a round that is
            kept, what is listed by tensor is in its folder's ``dash_report.json`` alone.
        parent: where the start's weights came from: a round's folder below the output directory,
            ``user/name@commit`` on the Hub, or the name of a folder outside; None for a first
            round that began with fresh weights.
        parent_sha256: of the weights there, where they lie outside the output directory.
        weights_sha256: of the final weights' file.
        data_fingerprint: of the labeled images trained on, old and new.
        files: names of the files that arrived in this round, where arrivals are files.
        skipped: images left out of these: corrupt ones as ``"file:row"`` or path; others why.
        overlap: number of held-out images among those trained on, where that was allowed.
        images_read: by the start's pass and the training together.
        memorization: what was measured right ``"before"`` and ``"after"`` the start.
        versions: of the libraries, by name.
        hardware: processes, device and precision.
        held_out_fingerprint: of the images that ``accuracy`` was measured on.
        file_sha256: of the report and of every file in the round's folder that the next round may
            load.
        replay: which old images were trained on, where these were not all; see ``Round``.
        previous: digest of the entry before in the history it was recorded in.
    """

    start: str
    seed: int
    round_index: int
    num_new: int
    num_total: int
    accuracy: float
    per_class_accuracy: dict[str, float]
    train_accuracy: float | None
    converged: bool | None
    epochs: float
    steps: int
    start_seconds: float
    train_seconds: float
    shrink: dict[str, Any] | None = None
    parent: str | None = None
    weights_sha256: str | None = None
    data_fingerprint: str | None = None
    files: list[str] | None = None
    skipped: list[str] | None = None
    images_read: int | None = None
    memorization: dict[str, dict[str, float]] | None = None
    versions: dict[str, str] | None = None
    hardware: str | None = None
    held_out_fingerprint: str | None = None
    parent_sha256: str | None = None
    overlap: int | None = None
    file_sha256: dict[str, str] | None = None
    replay: dict[str, Any] | None = None
    previous: str | None = field(default=None, compare=False)

    @property
    def folder(self) -> str:
        """The round's folder below the output directory."""
        return self.folder_of(self.start, self.seed, self.round_index)

    @staticmethod
    def folder_of(start: str, seed: int, round_index: int) -> str:
        """Return the round's folder name, whether or not it exists."""
        return f"rounds/{round_index:03d}/{start}_seed{seed}"

    @property
    def seconds(self) -> float:
        """The whole cost: start and training."""
        return self.start_seconds + self.train_seconds


@dataclass(frozen=True)
class Promotion:
    """One decision about which model is in use, the champion.

    Args:
        kind: ``"promote"`` or ``"reject"`` as the comparison said, ``"force"`` where the challenger
            was promoted in spite of it, ``"rollback"`` to an earlier model.
        challenger: folder, below the output directory, of the model put forward; in a rollback, of
            the model rolled back to.
        champion: folder of the model it was compared with; None where there was none.
        reason: of the decision, in plain words.
        time: of the decision in UTC, ISO 8601.
        accuracy: of the challenger on the held-out examples, in [0, 1]; None in a rollback.
        comparison: ``Comparison.to_dict()``; None where nothing was compared.
        num_held_out: number of held-out examples; None in a rollback.
        held_out_fingerprint: of the held-out examples; None in a rollback.
        previous: digest of the entry before in the history.

    Raises:
        ValueError: an unknown kind.
    """

    kind: PromotionKind
    challenger: str
    champion: str | None
    reason: str
    time: str
    accuracy: float | None = None
    comparison: dict[str, Any] | None = None
    num_held_out: int | None = None
    held_out_fingerprint: str | None = None
    previous: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(PromotionKind):
            raise ValueError(f"kind must be one of {get_args(PromotionKind)}, got {self.kind!r}")


@dataclass(frozen=True)
class SettingsChange:
    """Settings that a run continued with in place of others.

    Args:
        changes: by name, the value before and after.
        time: of the first entry recorded with them, in UTC, ISO 8601.
        previous: digest of the entry before in the history.
    """

    changes: dict[str, list[Any]]
    time: str
    previous: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Dropped:
    """Rounds whose weights were removed; their records stay.

    Args:
        folders: of the rounds, below the output directory.
        limit: the ``save_total_limit`` of the run.
        time: of the removal in UTC, ISO 8601.
        previous: digest of the entry before in the history.
    """

    folders: list[str]
    limit: int
    time: str
    previous: str | None = field(default=None, compare=False)


Entry: TypeAlias = RoundRecord | Promotion | SettingsChange | Dropped


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def starts_of(records: Iterable[RoundRecord]) -> list[str]:
    """Return the starts among records, in order of appearance."""
    return list(dict.fromkeys(record.start for record in records))


SHA256 = re.compile("[0-9a-f]{64}")

# Smallest and largest values of a record's numbers.
_RANGES: dict[str, tuple[float, float]] = {
    "round_index": (1, math.inf),
    **dict.fromkeys(("accuracy", "train_accuracy"), (0, 1)),
    **dict.fromkeys(("seed", "num_new", "num_total", "epochs", "steps"), (0, math.inf)),
    **dict.fromkeys(("start_seconds", "train_seconds", "images_read"), (0, math.inf)),
    "num_held_out": (1, math.inf),
}


def check_entry(entry: Entry) -> None:
    """Check the kinds and ranges of all fields.

    Raises:
        TypeError: a field is of the wrong kind.
        ValueError: a field is out of its range.
    """
    check_types(entry)
    if isinstance(entry, Dropped):
        _check_dropped(entry)
    for name, (low, high) in _RANGES.items():
        value = getattr(entry, name, None)
        if value is not None and not low <= value <= high:
            check_number(name, value, f"[{low}, {high}]", low, high)
    if not isinstance(entry, RoundRecord):
        return
    check_folder_name("start", entry.start)
    for label, accuracy in entry.per_class_accuracy.items():
        if not 0 <= accuracy <= 1:
            check_number(f"per_class_accuracy of {label!r}", accuracy, "[0, 1]", 0, 1)
    sums = {"weights_sha256": entry.weights_sha256, **(entry.file_sha256 or {})}
    for name, value in sums.items():
        if value is not None and not SHA256.fullmatch(value):
            raise ValueError(f"the SHA-256 of {name} must be 64 hexadecimal digits, got {value!r}")
    if entry.shrink is not None:
        check_report(entry.shrink, summary=REPORT_NAME in (entry.file_sha256 or {}))


def _check_dropped(entry: Dropped) -> None:
    check_count("limit", entry.limit)
    for folder in entry.folders:
        if not re.fullmatch(r"rounds/\d{3,}/[^/.][^/]*", folder):
            raise ValueError(f"folders must be those of rounds, got {folder!r}")
