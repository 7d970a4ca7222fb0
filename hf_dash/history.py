"""The history of a run: a file of JSON lines that only grows.

Flow: one entry per round and start → one line at the end of ``history.jsonl`` → read back for
tables, plots and cards, or to continue, without training again. The first line holds the settings.
Every entry holds the digest of the one before, so a history that was cut or is older than the
folders of its rounds shows it, and its own, so a line that was changed shows it too.
Differs from ``history.json`` beside a model: that file holds the rounds behind one model, is
written once with it, and never grows. Runs of older versions have a ``history.json`` too, which the
next entry turns into lines.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from hf_dash.entries import (
    Dropped,
    Entry,
    Promotion,
    PromotionKind,
    RoundRecord,
    SettingsChange,
    check_entry,
    now,
    starts_of,
)
from hf_dash.utils.chain import BEGINNING, digest_of, entry_digest, head_of, in_order, recorded
from hf_dash.utils.files import flush_folder, public, read_json, write_text
from hf_dash.utils.lines import CHANGED, append_line, cut_torn_line, read_lines, write_lines
from hf_dash.utils.logging import get_logger

__all__ = [
    "Dropped",
    "Entry",
    "History",
    "Promotion",
    "PromotionKind",
    "RoundRecord",
    "SettingsChange",
    "chained",
    "check_entry",
    "free_settings",
    "now",
    "open_history",
    "read_history",
    "starts_of",
    "write_history",
]

logger = get_logger(__name__)

# Of the file beside a model, and of the lines of a run.
FORMAT, LINES_FORMAT = 3, 4

LINES, WHOLE = ".jsonl", ".json"

HEADER = "run"

# Of a whole file, and of one line, in bytes.
LARGEST = 64 * 2**20

# What a line holds, by the name it goes under, and the list of a history that it belongs to.
_KINDS: dict[str, tuple[type[Any], str]] = {
    "round": (RoundRecord, "records"),
    "promotion": (Promotion, "promotions"),
    "settings": (SettingsChange, "changes"),
    "dropped": (Dropped, "drops"),
}

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
        "verify_data",
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


@dataclass
class History:
    """What a run has recorded; it only grows.

    Args:
        path: of the file, ``history.jsonl``, or None to keep it in memory only. ``history.json``
            stands for the same file.
        settings: everything that was set for the run.
        records: so far, oldest first; use :meth:`append`.
        promotions: decisions so far, oldest first; use :meth:`append_promotion`.
        changes: of settings so far, oldest first.
        drops: of rounds so far, oldest first; use :meth:`append_dropped`.
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
    drops: list[Dropped] = field(default_factory=list)
    may_differ: Collection[str] = ()
    # What has changed since the last entry, to be recorded with the next one.
    _changed: dict[str, list[Any]] = field(default_factory=dict, repr=False, compare=False)
    # Bytes of the lines that were read or written; 0 where a whole file was read, None before.
    _size: int | None = field(default=None, repr=False, compare=False)
    # The head when there were so many entries of each kind.
    _head: tuple[tuple[int, ...], str] | None = field(default=None, repr=False, compare=False)

    @property
    def entries(self) -> list[Entry]:
        """All that was recorded, in the order in which it was recorded."""
        entries: list[Entry] = [*self.records, *self.promotions, *self.changes, *self.drops]
        return in_order(entries)

    @property
    def head(self) -> str:
        """What the next entry holds as ``previous``; worked out once per entry."""
        if self._head is None or self._head[0] != self._counts:
            self._head = (self._counts, head_of(self.entries))
        return self._head[1]

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple(len(getattr(self, name)) for _, name in _KINDS.values())

    @property
    def dropped(self) -> dict[str, int]:
        """The ``save_total_limit`` by which rounds were dropped, by their folders."""
        return {folder: entry.limit for entry in self.drops for folder in entry.folders}

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
        """The SHA-256 of settings and head, and so of everything recorded."""
        return digest_of({"settings": self.settings, "head": self.head})

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
        for _, name in _KINDS.values():
            setattr(self, name, list(getattr(recorded, name)))
        self._size, self._head = recorded._size, recorded._head
        changes = self._changes_since(recorded)
        self._changed = {name: both for name, both in changes.items() if name not in UNRECORDED}

    def append(self, record: RoundRecord) -> None:
        """Add a record, as one line at the end of the file.

        Raises:
            ValueError: the same start, seed and round is recorded already, a field is out of its
                range, or something else has changed the file.
            TypeError: a field is of the wrong kind.
            OSError: the line could not be written; the file is as it was.
        """
        key = (record.start, record.seed, record.round_index)
        if self.find(*key) is not None:
            raise ValueError(f"history already has a record of (start, seed, round) = {key}")
        self._append(record)

    def append_promotion(self, promotion: Promotion) -> None:
        """Add a decision; see :meth:`append`."""
        self._append(promotion)

    def append_dropped(self, folders: list[str], limit: int) -> None:
        """Add which rounds are dropped by a ``save_total_limit``; see :meth:`append`."""
        self._append(Dropped(folders, limit, now()))

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
        if self.path is not None:
            self._write(entry)
        name = _KINDS[_name_of(entry)][1]
        setattr(self, name, [*getattr(self, name), entry])
        self._head = (self._counts, entry_digest(entry))

    def _write(self, entry: Entry) -> None:
        """Add an entry to the file, which is made where there is none, and from a whole one."""
        assert self.path is not None
        path = self.path.with_suffix(LINES)
        if self._size and path.exists():
            self._size = append_line(path, _name_of(entry), recorded(entry), self._size)
            return
        whole, found = self.path.with_suffix(WHOLE), history_file(self.path)
        if self._size is None and found.exists():
            raise ValueError(f"path must not be there yet, got {found}: open_history continues it")
        size = _write_lines(path, self.settings, (*self.entries, entry))
        flush_folder(path.parent)
        if self._size == 0 and found == whole:
            logger.warning("%s is %s now, to which every entry adds a line", whole, path.name)
            whole.unlink()
        self.path, self._size = path, size

    def cut_torn_line(self) -> None:
        """Cut off what a kill has left of a line; only for the one who writes the file."""
        path = None if self.path is None else self.path.with_suffix(LINES)
        if path is not None and self._size and cut_torn_line(path, self._size):
            logger.warning("%s ended in the middle of a line, which was cut off", path)

    def find(self, start: str, seed: int, round_index: int) -> RoundRecord | None:
        """Return the record of one round, or None."""
        key = (round_index, start, seed)
        return next((r for r in self.records if (r.round_index, r.start, r.seed) == key), None)

    def select(self, start: str | None = None, seed: int | None = None) -> list[RoundRecord]:
        """Return the records of one start, one seed, or both, oldest first."""
        return [
            record
            for record in self.records
            if (start is None or record.start == start) and (seed is None or record.seed == seed)
        ]


def _name_of(entry: Entry) -> str:
    return next(name for name, (kind, _) in _KINDS.items() if isinstance(entry, kind))


def write_history(
    path: str | Path,
    settings: dict[str, Any],
    records: Iterable[RoundRecord],
    promotions: Iterable[Promotion] = (),
    changes: Iterable[SettingsChange] = (),
) -> None:
    """Write a whole history in one step, in place of the file at ``path``.

    Args:
        path: of the file: ``history.json`` beside a model, or the lines of a run, ``.jsonl``.
        settings: of the run, as plain JSON types.
        records: oldest first.
        promotions: oldest first.
        changes: of settings, oldest first.
    """
    path = Path(path)
    if path.suffix == LINES:
        entries: list[Entry] = [*records, *promotions, *changes]
        _write_lines(path, settings, in_order(entries))
        return
    lists: dict[str, Iterable[Any]]
    lists = {"records": records, "promotions": promotions, "changes": changes}
    plain = {name: [asdict(entry) for entry in one] for name, one in lists.items()}
    content = {"format": FORMAT, "settings": settings, **plain}
    content["digest"] = digest_of(content)
    write_text(path, json.dumps(content, indent=1) + "\n")


def _write_lines(path: Path, settings: dict[str, Any], entries: Iterable[Entry]) -> int:
    header = {"format": LINES_FORMAT, "settings": settings}
    lines = [(_name_of(entry), recorded(entry)) for entry in entries]
    return write_lines(path, [(HEADER, header), *lines])


def chained(records: Iterable[RoundRecord]) -> list[RoundRecord]:
    """Return records as a history of their own, each holding the digest of the one before."""
    head, own = BEGINNING, []
    for record in records:
        own.append(replace(record, previous=head))
        head = entry_digest(own[-1])
    return own


def _respelled(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its fields as they are spelled since version 0.2."""
    return {{"memorisation": "memorization"}.get(name, name): v for name, v in record.items()}


def history_file(path: str | Path) -> Path:
    """Return where a history lies: in its lines, if there are any, else in a whole file.

    Args:
        path: of either; the other lies beside it.
    """
    path = Path(path)
    beside = (path.with_suffix(LINES), path.with_suffix(WHOLE))
    return next((one for one in beside if one.exists()), path)


def read_history(path: str | Path) -> History:
    """Read a history back, whoever wrote it.

    Args:
        path: of a run's ``history.jsonl``, or of the ``history.json`` beside a model. One stands
            for the other where that is there alone.

    Raises:
        ValueError: the file is not a whole history, a value is out of its range, an entry is
            missing, or a line was changed by hand or is too large.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.history.write_history(f"{folder}/history.json", {"lam": 0.3}, [])
        ...     hf_dash.read_history(f"{folder}/history.json").settings
        {'lam': 0.3}
    """
    path = history_file(path)
    read: Callable[[Path], History] = _read_lines if path.suffix == LINES else _read_whole
    try:
        return read(path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole hf_dash history: {error}") from error


def _read_whole(path: Path) -> History:
    content = read_json(path, LARGEST)
    if content["format"] not in (2, FORMAT):
        raise ValueError(f"format {content['format']!r} is not {FORMAT}")
    if content.pop("digest") != digest_of(content):
        raise ValueError(f"it {CHANGED}")
    history = History(
        path,
        content["settings"],
        [RoundRecord(**_respelled(record)) for record in content["records"]],
        # Histories written before there were promotions have none.
        [Promotion(**entry) for entry in content.get("promotions", [])],
        [SettingsChange(**entry) for entry in content.get("changes", [])],
        _size=0,
    )
    history.settings.items()  # by name
    for entry in history.entries:
        check_entry(entry)
    return history


def _read_lines(path: Path) -> History:
    lines, size = read_lines(path, LARGEST)
    if not lines or lines[0].name != HEADER:
        raise ValueError("line 1 must hold the settings")
    header, entries = lines[0].content, []
    if header["format"] != LINES_FORMAT:
        raise ValueError(f"format {header['format']!r} is not {LINES_FORMAT}")
    history = History(path, dict(header["settings"].items()), _size=size)
    for number, line in enumerate(lines[1:], start=2):
        try:
            kind, name = _KINDS[line.name]
            entry = kind(**{**_absent(line.name), **line.content})
            check_entry(entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: {error}") from error
        entries.append(entry)
        getattr(history, name).append(entry)
    head = _check_links(entries, [line.digest for line in lines[1:]])
    for change in history.changes:
        history.settings.update({name: new for name, (_, new) in change.changes.items()})
    history._head = (history._counts, head)
    return history


@lru_cache
def _absent(name: str) -> dict[str, None]:
    """Return the fields that a line leaves out where they are None, though they have no default."""
    needed = [one for one in fields(_KINDS[name][0]) if one.default is MISSING]
    return {one.name: None for one in needed if type(None) in get_args(one.type)}


def _check_links(entries: list[Entry], digests: list[str]) -> str:
    """Check that every entry follows the one before; return what the next one holds.

    Entries of the oldest versions, which have no chain, come first.
    """
    old = next((n for n, one in enumerate(entries) if one.previous is not None), len(entries))
    head = digest_of(digests[:old]) if old else BEGINNING
    for n in range(old, len(entries)):
        if entries[n].previous != head:
            raise ValueError(f"line {n + 2} has lost the one before: a line between is missing")
        head = digests[n]
    return head


def open_history(
    path: str | Path | None, settings: dict[str, Any], *, may_differ: Collection[str] = ()
) -> History:
    """Continue the history at ``path``, or begin one.

    Args:
        path: of the file, ``history.jsonl``; None keeps it in memory only. A ``history.json`` of
            an older version beside it is read, and becomes lines with the next entry.
        settings: of the run, as plain JSON types.
        may_differ: names of settings that say nothing about what has been recorded, such as the
            number of rounds; the values given now take the place of the recorded ones.

    Raises:
        ValueError: the history is damaged, or of a run with other settings; the message names them.
    """
    history = History(None if path is None else Path(path), settings, may_differ=may_differ)
    if path is not None and history_file(path).exists():
        history.continue_from(read_history(path))
        history.cut_torn_line()
    return history
