"""The history of a run: a JSON file that only grows.

Flow: one ``RoundRecord`` per round and start → appended to ``history.json`` in one step → read back
for tables, plots and cards, or to continue, without training again. A digest over the whole content
shows whether anything else has changed the file.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hf_dash.utils.files import write_text

FORMAT = 2

PromotionKind = Literal["promote", "reject", "force", "rollback"]

# Settings of ``recipes/continual_rounds.py`` that say nothing about the rounds recorded: a run may
# continue with others, and runs that differ in nothing else are one protocol.
MAY_DIFFER = frozenset(
    {
        "output_dir",
        "starts",
        "seeds",
        "num_rounds",
        "export_start",
        "save_total_limit",
        "disable_tqdm",
        "cache_images",
        "files_per_round",
        "allow_missing",
        "allow_overlap",
        "allow_disjoint_classes",
        "compare_images_by",
    }
)


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
        skipped: images among these that were left out: corrupt ones as ``"file:row"`` or by their
            path, others with the reason.
        overlap: number of held-out images among those trained on, where that was allowed.
        images_read: by the start's pass and the training together.
        memorization: what was measured right ``"before"`` and ``"after"`` the start.
        versions: of the libraries, by name.
        hardware: processes, device and precision.
        held_out_fingerprint: of the images that ``accuracy`` was measured on.
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

    def __post_init__(self) -> None:
        if self.kind not in get_args(PromotionKind):
            raise ValueError(f"kind must be one of {get_args(PromotionKind)}, got {self.kind!r}")


@dataclass
class History:
    """What a run has recorded; it only grows.

    Args:
        path: of the JSON file, or None to keep it in memory only.
        settings: everything that was set for the run.
        records: so far, oldest first; use :meth:`append`.
        promotions: decisions so far, oldest first; use :meth:`append_promotion`.
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
    may_differ: Collection[str] = ()

    @property
    def champion(self) -> str | None:
        """Folder of the model in use: of the last entry that is not a rejection; None before."""
        taken = [entry.challenger for entry in self.promotions if entry.kind != "reject"]
        return taken[-1] if taken else None

    @property
    def digest(self) -> str:
        """What the file holds as ``"digest"``: the SHA-256 of everything else in it."""
        return _digest(_content(self.settings, self.records, self.promotions))

    def check_same_run(self, other: "History") -> None:
        """Check that another history has the same settings, except those that may differ.

        Raises:
            ValueError: some differ; the message names them.
        """
        mine, theirs = (json.loads(json.dumps(h.settings)) for h in (self, other))
        names = sorted((mine.keys() | theirs.keys()) - set(self.may_differ))
        changes = [
            f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]
        if changes:
            raise ValueError(
                f"{other.path} belongs to a run with other settings ({', '.join(changes)}): give"
                " its settings again to continue it, or another output_dir"
            )

    def append(self, record: RoundRecord) -> None:
        """Add a record; the file is replaced in one step.

        Raises:
            ValueError: the same start, seed and round is recorded already.
        """
        key = (record.start, record.seed, record.round_index)
        if any((r.start, r.seed, r.round_index) == key for r in self.records):
            raise ValueError(f"history already has a record of (start, seed, round) = {key}")
        records = [*self.records, record]
        if self.path is not None:
            write_history(self.path, self.settings, records, self.promotions)
        self.records = records

    def find(self, start: str, seed: int, round_index: int) -> RoundRecord | None:
        """Return the record of one round, or None."""
        records = self.select(start, seed)
        return next((r for r in records if r.round_index == round_index), None)

    def append_promotion(self, promotion: Promotion) -> None:
        """Add a decision; the file is replaced in one step."""
        promotions = [*self.promotions, promotion]
        if self.path is not None:
            write_history(self.path, self.settings, self.records, promotions)
        self.promotions = promotions

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
) -> None:
    """Write a whole history in one step, in place of the file at ``path``."""
    content = _content(settings, records, promotions)
    content["digest"] = _digest(content)
    write_text(Path(path), json.dumps(content, indent=1) + "\n")


def _content(
    settings: dict[str, Any], records: Iterable[RoundRecord], promotions: Iterable[Promotion]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": settings,
        "records": [asdict(record) for record in records],
        "promotions": [asdict(promotion) for promotion in promotions],
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _respelled(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its fields as they are spelled since version 0.2."""
    return {{"memorisation": "memorization"}.get(name, name): v for name, v in record.items()}


def read_history(path: str | Path) -> History:
    """Read a history back.

    Raises:
        ValueError: the file is not a whole history of this format, or was changed by hand.

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
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT}")
        if content.pop("digest") != _digest(content):
            raise ValueError("it was changed by something else; restore it from a copy")
        records = [RoundRecord(**_respelled(record)) for record in content["records"]]
        # Histories written before there were promotions have none.
        promotions = [Promotion(**entry) for entry in content.get("promotions", [])]
        return History(path, content["settings"], records, promotions)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole hf_dash history: {error}") from error


def open_history(
    path: str | Path | None,
    settings: dict[str, Any],
    *,
    may_differ: Collection[str] = (),
    read_only: bool = False,
) -> History:
    """Continue the history at ``path``, or begin one.

    Args:
        path: of the JSON file; None keeps it in memory only.
        settings: of the run, as plain JSON types.
        may_differ: names of settings that say nothing about what has been recorded, such as the
            number of rounds; the values given now take the place of the recorded ones.
        read_only: never write the file: for all processes but the main one.

    Raises:
        ValueError: the history is damaged, or of a run with other settings; the message names them.
    """
    history = History(None if path is None else Path(path), settings, may_differ=may_differ)
    if path is not None and Path(path).exists():
        recorded = read_history(path)
        history.check_same_run(recorded)
        history.records, history.promotions = recorded.records, recorded.promotions
    if read_only:
        history.path = None
    return history


def starts_of(records: Iterable[RoundRecord]) -> list[str]:
    """Return the starts among records, in order of appearance."""
    return list(dict.fromkeys(record.start for record in records))
