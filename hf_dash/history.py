"""The history of a run: a JSON file that only grows.

Flow: one ``RoundRecord`` per round and start → appended to ``history.json`` in one step → read back
for tables, plots and cards, or to continue, without training again. Every entry holds the digest of
the one before, so a history that was cut or is older than the folders of its rounds shows it; a
digest over the whole content shows whether anything else has changed the file.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from hf_dash.utils.chain import BEGINNING, digest_of, entry_digest, head_of, in_order
from hf_dash.utils.checks import check_folder_name, check_number, check_types
from hf_dash.utils.files import public, read_json, write_text
from hf_dash.utils.reports import check_report

FORMAT = 3

# Of a file, in bytes; a thousand rounds of a large model are a tenth of it.
LARGEST = 64 * 2**20

PromotionKind = Literal["promote", "reject", "force", "rollback"]

# Not worth a record of their change.
UNRECORDED = ("output_dir", "disable_tqdm", "num_parallel_starts")

# Settings of ``recipes/continual_rounds.py`` that say nothing about the rounds recorded: a run may
# continue with others, and runs that differ in nothing else are one protocol.
MAY_DIFFER = frozenset(
    {
        *UNRECORDED,
        "starts",
        "seeds",
        "num_rounds",
        "export_start",
        "save_total_limit",
        "cache_images",
        "cache_gb",
        "files_per_round",
        "allow_missing",
        "allow_overlap",
        "allow_disjoint_classes",
        "compare_images_by",
        # The same batches, in smaller pieces or by other processes.
        "micro_batch_size",
        "num_workers",
        # Repairs a round that failed.
        "on_bad_example",
    }
)

# Where one of these is set, the number of workers decides which images are drawn.
WORKERS_MATTER = ("augment", "streaming")


def free_settings(settings: Mapping[str, Any], may_differ: Collection[str]) -> set[str]:
    """Return the names of the settings that may differ from run to run, whatever else is set."""
    matter = any(settings.get(name) for name in WORKERS_MATTER)
    return set(may_differ) - ({"num_workers"} if matter else set())


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
        shrink: ``ShrinkReport.to_dict()``, or None where nothing was shrunk.
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
        file_sha256: of every file in the round's folder that the next round may load.
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


Entry: TypeAlias = RoundRecord | Promotion | SettingsChange


@dataclass
class History:
    """What a run has recorded; it only grows.

    Args:
        path: of the JSON file, or None to keep it in memory only.
        settings: everything that was set for the run.
        records: so far, oldest first; use :meth:`append`.
        promotions: decisions so far, oldest first; use :meth:`append_promotion`.
        changes: of settings so far, oldest first.
        may_differ: names of settings that say nothing about what has been recorded.

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> history = hf_dash.History(None, {"lam": 0.3})
        >>> history.append(RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0))
        >>> history.find("dash", 0, 1).folder
        'rounds/001/dash_seed0'
    """

    path: Path | None
    settings: dict[str, Any]
    records: list[RoundRecord] = field(default_factory=list)
    promotions: list[Promotion] = field(default_factory=list)
    changes: list[SettingsChange] = field(default_factory=list)
    may_differ: Collection[str] = ()
    # What has changed since the last entry, to be recorded with the next one.
    _changed: dict[str, list[Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def entries(self) -> list[Entry]:
        """Records, promotions and changes of settings in the order in which they were recorded."""
        entries: list[Entry] = [*self.records, *self.promotions, *self.changes]
        return in_order(entries)

    @property
    def head(self) -> str:
        """What the next entry holds as ``previous``."""
        return head_of(self.entries)

    @property
    def taken(self) -> list[Promotion]:
        """The decisions that brought a model into use: all but rejections, oldest first."""
        return [entry for entry in self.promotions if entry.kind != "reject"]

    @property
    def champion(self) -> str | None:
        """Folder of the model in use; None before the first decision."""
        return self.taken[-1].challenger if self.taken else None

    @property
    def digest(self) -> str:
        """What the file holds as ``"digest"``: the SHA-256 of everything else in it."""
        return digest_of(_content(self.settings, self.records, self.promotions, self.changes))

    def check_same_run(self, other: "History") -> None:
        """Check that another history has the same settings, except those that may differ.

        Raises:
            ValueError: some differ that change what a round results in; the message names them.
        """
        changes = self._changes_since(other)
        free = free_settings(self.settings, self.may_differ)
        same = [name for name in changes if name not in free]
        if same:
            told = [f"{name} was {changes[name][0]!r}, is {changes[name][1]!r}" for name in same]
            raise ValueError(
                f"{other.path} belongs to a run with other settings ({', '.join(told)}): give"
                " its settings again to continue it, or another output_dir"
            )

    def _changes_since(self, other: "History") -> dict[str, list[Any]]:
        # As they go on record today, whoever recorded them.
        mine, theirs = (
            {name: public(value) for name, value in json.loads(json.dumps(h.settings)).items()}
            for h in (self, other)
        )
        return {
            name: [theirs.get(name), mine.get(name)]
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        }

    def continue_from(self, recorded: "History") -> None:
        """Take over what an earlier call has recorded.

        Settings that may differ keep the values given now; that they changed is recorded together
        with the next entry.

        Raises:
            ValueError: the earlier call had other settings; the message names them.
        """
        self.check_same_run(recorded)
        self.records, self.promotions = list(recorded.records), list(recorded.promotions)
        self.changes = list(recorded.changes)
        changes = self._changes_since(recorded)
        self._changed = {name: both for name, both in changes.items() if name not in UNRECORDED}

    def append(self, record: RoundRecord) -> None:
        """Add a record; the file is replaced in one step.

        Raises:
            ValueError: the same start, seed and round is recorded already, or a field is out of
                its range.
            TypeError: a field is of the wrong kind.
        """
        key = (record.start, record.seed, record.round_index)
        if any((r.start, r.seed, r.round_index) == key for r in self.records):
            raise ValueError(f"history already has a record of (start, seed, round) = {key}")
        self._append(record)

    def append_promotion(self, promotion: Promotion) -> None:
        """Add a decision; the file is replaced in one step.

        Raises:
            ValueError: a field is out of its range.
            TypeError: a field is of the wrong kind.
        """
        self._append(promotion)

    def note_changes(self) -> None:
        """Record which settings have changed since the last entry, where any have."""
        if self._changed:
            change = SettingsChange(self._changed, now())
            self._changed = {}
            self._append(change)

    def _append(self, entry: Entry) -> None:
        check_entry(entry)
        if entry.previous is None:
            self.note_changes()
            entry = replace(entry, previous=self.head)
        elif entry.previous != self.head:
            raise ValueError("the entry does not follow the newest one of the history")
        kinds = {RoundRecord: "records", Promotion: "promotions", SettingsChange: "changes"}
        name = kinds[type(entry)]
        grown = [*getattr(self, name), entry]
        if self.path is not None:
            kept = {one: getattr(self, one) for one in kinds.values()}
            write_history(self.path, self.settings, **{**kept, name: grown})
        setattr(self, name, grown)

    def find(self, start: str, seed: int, round_index: int) -> RoundRecord | None:
        """Return the record of one round, or None."""
        records = self.select(start, seed)
        return next((r for r in records if r.round_index == round_index), None)

    def select(self, start: str | None = None, seed: int | None = None) -> list[RoundRecord]:
        """Return the records of one start, one seed, or both, oldest first."""
        return [
            record
            for record in self.records
            if (start is None or record.start == start) and (seed is None or record.seed == seed)
        ]


def write_history(
    path: str | Path,
    settings: dict[str, Any],
    records: Iterable[RoundRecord],
    promotions: Iterable[Promotion] = (),
    changes: Iterable[SettingsChange] = (),
) -> None:
    """Write a whole history in one step, in place of the file at ``path``."""
    content = _content(settings, records, promotions, changes)
    content["digest"] = digest_of(content)
    write_text(Path(path), json.dumps(content, indent=1) + "\n")


def _content(settings: dict[str, Any], *lists: Iterable[Entry]) -> dict[str, Any]:
    names = ("records", "promotions", "changes")
    entries = {n: [asdict(entry) for entry in one] for n, one in zip(names, lists, strict=True)}
    return {"format": FORMAT, "settings": settings, **entries}


def chained(records: Iterable[RoundRecord]) -> list[RoundRecord]:
    """Return records as a history of their own, each holding the digest of the one before."""
    head, own = BEGINNING, []
    for record in records:
        own.append(replace(record, previous=head))
        head = entry_digest(own[-1])
    return own


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _respelled(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its fields as they are spelled since version 0.2."""
    return {{"memorisation": "memorization"}.get(name, name): v for name, v in record.items()}


def read_history(path: str | Path) -> History:
    """Read a history back, whoever wrote it.

    Raises:
        ValueError: the file is not a whole history, a value is out of its range, an entry is
            missing, or the file was changed by hand or is too large.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.history.write_history(f"{folder}/history.json", {"lam": 0.3}, [])
        ...     hf_dash.read_history(f"{folder}/history.json").settings
        {'lam': 0.3}
    """
    path = Path(path)
    try:
        content = read_json(path, LARGEST)
        if content["format"] not in (2, FORMAT):
            raise ValueError(f"format {content['format']!r} is not {FORMAT}")
        if content.pop("digest") != digest_of(content):
            raise ValueError("it was changed by something else; restore it from a copy")
        history = History(
            path,
            content["settings"],
            [RoundRecord(**_respelled(record)) for record in content["records"]],
            # Histories written before there were promotions have none.
            [Promotion(**entry) for entry in content.get("promotions", [])],
            [SettingsChange(**entry) for entry in content.get("changes", [])],
        )
        history.settings.items()  # by name
        for entry in history.entries:
            check_entry(entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole hf_dash history: {error}") from error
    return history


def open_history(
    path: str | Path | None, settings: dict[str, Any], *, may_differ: Collection[str] = ()
) -> History:
    """Continue the history at ``path``, or begin one.

    Args:
        path: of the JSON file; None keeps it in memory only.
        settings: of the run, as plain JSON types.
        may_differ: names of settings that say nothing about what has been recorded, such as the
            number of rounds; the values given now take the place of the recorded ones.

    Raises:
        ValueError: the history is damaged, or of a run with other settings; the message names them.
    """
    history = History(None if path is None else Path(path), settings, may_differ=may_differ)
    if path is not None and Path(path).exists():
        history.continue_from(read_history(path))
    return history


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
    for name, (low, high) in _RANGES.items():
        value = getattr(entry, name, None)
        if value is not None:
            check_number(name, value, f"[{low}, {high}]", low, high)
    if not isinstance(entry, RoundRecord):
        return
    check_folder_name("start", entry.start)
    for label, accuracy in entry.per_class_accuracy.items():
        check_number(f"per_class_accuracy of {label!r}", accuracy, "[0, 1]", 0, 1)
    sums = {"weights_sha256": entry.weights_sha256, **(entry.file_sha256 or {})}
    for name, value in sums.items():
        if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
            raise ValueError(f"the SHA-256 of {name} must be 64 hexadecimal digits, got {value!r}")
    if entry.shrink is not None:
        check_report(entry.shrink)


def starts_of(records: Iterable[RoundRecord]) -> list[str]:
    """Return the starts among records, in order of appearance."""
    return list(dict.fromkeys(record.start for record in records))
