"""Evidence to commit: a history as a folder of small CSV files, and back.

Flow: history → ``rounds.csv`` (one row per record), ``per_class.csv.gz``, ``factors.csv`` (one row
per shrink, one column per tensor), ``measurements.csv`` and ``settings.json`` (what many records
have in common, each value once) → the same records, so that every table and figure works on them.
Differs from ``history.jsonl``: that file belongs to a run, which appends to it and checks its
digest; this folder is for readers and diffs, and a sixth of the size. Seconds are rounded to
``SECONDS_DIGITS`` decimals, factors to ``FACTOR_DIGITS``, accuracies of single classes to
``CLASS_DIGITS``; everything else is exact. Promotions are not kept.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dash.history import History, RoundRecord, starts_of
from hf_dash.report.csv_files import cell_of, read_csv, read_wide, write_csv, write_wide
from hf_dash.utils.files import write_text

SECONDS_DIGITS = 5
FACTOR_DIGITS = 4
CLASS_DIGITS = 6

# Start, seed and round: the first columns of every file.
Key = tuple[str, int, int]
KEY = {"start": str, "seed": int, "round": int}
COLUMNS = KEY | {
    "num_new": int,
    "num_total": int,
    "accuracy": float,
    "train_accuracy": float,
    "converged": bool,
    "epochs": float,
    "steps": int,
    "start_seconds": float,
    "train_seconds": float,
    "images_read": int,
    "parent": str,
    "weights_sha256": str,
}
# Of a shrink. A tensor's own numbers share a cell: the mean and the largest factor, how many of its
# vectors have λ, and the smallest factor where none has.
SHRINK = {"num_batches": int, "num_images": int, "seconds": float}
MEASUREMENT = KEY | {"when": str}

# What settings.json holds of the records, of their shrinks, and of the images trained on. The last
# are by seed and number of images, as "1/2000".
OF_RECORDS = ("versions", "hardware", "held_out_fingerprint")
OF_SHRINKS = ("config", "untouched", "num_vectors", "dry_run")
OF_IMAGES = ("data_fingerprint", "files", "skipped")
PARTS = ("settings", "records", "shrinks", *OF_IMAGES)


@dataclass(frozen=True)
class Evidence:
    """The content of a folder.

    Args:
        records: of all starts, in the order of the tables.
        settings: the content of ``settings.json``. ``settings["about"]`` holds what the records do
            not say, ``settings["settings"]`` what was set for the run.

    Example:
        >>> record = RoundRecord("cold", 0, 1, 8, 8, 0.5, {"cat": 0.5}, 1.0, True, 3, 3, 0.0, 1.25)
        >>> write_evidence(History(None, {"lam": 0.3}, [record]), "digits", about={"commands": []})
        >>> evidence = read_evidence("digits")
        >>> evidence.records[0].accuracy, evidence.settings["settings"]
        (0.5, {'lam': 0.3})
    """

    records: list[RoundRecord]
    settings: dict[str, Any]


def write_evidence(
    history: History,
    folder: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
    like: str | None = None,
) -> None:
    """Write a history as a folder of CSV files and a ``settings.json``.

    Args:
        history: of one run, or of several as ``join_histories`` joins them.
        folder: to write; made where it does not exist. Other files in it stay.
        about: what the records do not say, as plain JSON types: ``"commands"``, ``"commits"``,
            ``"machine"`` and ``"network"``, say.
        like: name of another experiment's folder beside this one. Whatever that one holds as well
            is not written again: settings, fingerprints, and starts with the same records.

    Raises:
        ValueError: there is no record, or some with one seed and number of images were not trained
            on the same images; or the report of a shrink is not there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> record = RoundRecord("cold", 0, 1, 8, 8, 0.5, {"cat": 0.5}, 1.0, True, 3, 3, 0.0, 1.25)
        >>> with TemporaryDirectory() as folder:
        ...     write_evidence(History(None, {}, [record]), folder)
        ...     read_evidence(folder).records == [record]
        True
    """
    folder, own = Path(folder), history.records
    if not own:
        raise ValueError("history must have at least one record, got none")
    lacking = [one.folder for one in own if one.shrink and "tensors" not in one.shrink]
    if lacking:
        raise ValueError(
            f"history must hold the whole report of every shrink, but that of {lacking[0]} is not"
            " there: join_histories reads it from the round's folder"
        )
    base = None if like is None else read_evidence(folder.parent / like)
    there = {} if base is None else _same_starts(own, base.records)
    own = [record for record in own if record.start not in there.get("starts", ())]
    of_records = {_key(record): _facts(record) for record in own}
    of_shrinks = {_key(record): _shrink_facts(record.shrink) for record in own if record.shrink}
    settings: dict[str, Any] = {
        "about": dict(about or {}),
        "starts": starts_of(history.records),
        "settings": history.settings,
        "records": {name: _group(of_records, name) for name in OF_RECORDS},
        "shrinks": {name: _group(of_shrinks, name) for name in OF_SHRINKS},
        **{name: _by_images(own, name) for name in OF_IMAGES},
    }
    if base is not None:
        settings = {"like": {"folder": like, **there}, **_less(settings, base.settings)}
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "rounds.csv", COLUMNS, [_cells(record).values() for record in own])
    write_wide(folder / "per_class.csv.gz", KEY, {_key(record): _classes(record) for record in own})
    write_wide(folder / "measurements.csv", MEASUREMENT, _measurements_of(own))
    _write_factors(folder / "factors.csv", own)
    said = {part: value for part, value in settings.items() if value}
    write_text(folder / "settings.json", json.dumps(said, indent=1, ensure_ascii=False) + "\n")


def read_evidence(folder: str | Path) -> Evidence:
    """Read a folder back.

    Args:
        folder: as :func:`write_evidence` wrote it, beside the one it is like.

    Raises:
        FileNotFoundError: the folder has no ``rounds.csv`` or no ``settings.json``.
        ValueError: a file is damaged; the message names file, line and column.

    Example:
        >>> record = RoundRecord("cold", 0, 1, 8, 8, 0.5, {"cat": 0.5}, 1.0, True, 3, 3, 0.0, 1.25)
        >>> write_evidence(History(None, {"lam": 0.3}, [record]), "digits", about={"commands": []})
        >>> read_evidence("digits").records == [record]
        True
    """
    folder = Path(folder)
    settings = {part: {} for part in ("about", "starts", *PARTS)} | read_settings(folder)
    records = []
    if like := settings.get("like"):
        base = read_evidence(folder.parent / like["folder"])
        settings = _more(settings, base.settings)
        records = [
            record
            for record in base.records
            if record.start in like["starts"] and record.round_index <= like["last_round"]
        ]
    records += _read_records(folder, settings)
    if like and like["starts"]:
        order = settings["starts"].index
        records.sort(key=lambda record: order(record.start))
    return Evidence(records, settings)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's ``settings.json``, without that of the one it is like.

    Raises:
        ValueError: the file is not JSON.

    Example:
        >>> record = RoundRecord("cold", 0, 1, 8, 8, 0.5, {"cat": 0.5}, 1.0, True, 3, 3, 0.0, 1.25)
        >>> write_evidence(History(None, {"lam": 0.3}, [record]), "digits", about={"commands": []})
        >>> read_settings("digits")["about"]
        {'commands': []}
    """
    path = Path(folder) / "settings.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    return settings


def evidence_digest(folder: str | Path) -> str:
    """Return a digest of a folder's data, and of the folder it is like; ``"about"`` is left out.

    Example:
        >>> record = RoundRecord("cold", 0, 1, 8, 8, 0.5, {"cat": 0.5}, 1.0, True, 3, 3, 0.0, 1.25)
        >>> for name in ("digits", "again"):
        ...     write_evidence(History(None, {}, [record]), name, about={"commands": [name]})
        >>> evidence_digest("digits") == evidence_digest("again")
        True
    """
    folder = Path(folder)
    settings = read_settings(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.csv*")):
        digest.update(path.read_bytes())
    data = {part: value for part, value in settings.items() if part != "about"}
    digest.update(json.dumps(data, sort_keys=True).encode())
    if like := settings.get("like"):
        digest.update(evidence_digest(folder.parent / like["folder"]).encode())
    return digest.hexdigest()


def _read_records(folder: Path, settings: Mapping[str, Any]) -> list[RoundRecord]:
    per_class = read_wide(folder / "per_class.csv.gz", KEY)
    measured: dict[Key, dict[str, dict[str, float]]] = {}
    for (*key, when), numbers in read_wide(folder / "measurements.csv", MEASUREMENT).items():
        measured.setdefault((key[0], key[1], key[2]), {})[when] = numbers
    shrinks = _read_factors(folder / "factors.csv", settings["shrinks"])
    records = []
    for row, _ in read_csv(folder / "rounds.csv", COLUMNS):
        own = (row["start"], row["seed"], row.pop("round"))
        images = f"{row['seed']}/{row['num_total']}"
        records.append(
            RoundRecord(
                **row,
                round_index=own[2],
                per_class_accuracy=per_class.get(own, {}),
                shrink=shrinks.get(own),
                memorization=measured.get(own),
                **{name: settings[name].get(images) for name in OF_IMAGES},
                **{name: _look_up(settings["records"][name], own) for name in OF_RECORDS},
            )
        )
    keys = {_key(record) for record in records}
    for name, found in (("per_class", per_class), ("factors", shrinks), ("measurements", measured)):
        if lost := found.keys() - keys:
            raise ValueError(
                f"{folder}/{name}.csv must have rows of rounds.csv, got {sorted(lost)}"
            )
    return records


def _key(record: RoundRecord) -> Key:
    return record.start, record.seed, record.round_index


# What another experiment holds as well.


def _same_starts(own: Sequence[RoundRecord], others: Sequence[RoundRecord]) -> dict[str, Any]:
    """Return the starts all of whose records are among the others', and how many rounds they have.

    Those others may go on for more rounds.
    """
    last = max(record.round_index for record in own)

    def cells(records: Sequence[RoundRecord], start: str) -> list[dict[str, str]]:
        return [_cells(r) for r in records if r.start == start and r.round_index <= last]

    same = [start for start in starts_of(own) if cells(own, start) == cells(others, start)]
    return {"starts": same, "last_round": last}


def _less(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without what the base has as well, but with the names that it alone has."""
    less = {
        part: {n: v for n, v in settings[part].items() if n not in base[part] or base[part][n] != v}
        for part in PARTS
    }
    unset = sorted(base["settings"].keys() - settings["settings"].keys())
    return {**settings, **less, "unset": unset}


def _more(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`_less`."""
    more = {part: base[part] | settings[part] for part in PARTS}
    for name in settings.get("unset", ()):
        del more["settings"][name]
    return {**settings, **more}


# What many records share: every value once.


def _facts(record: RoundRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in OF_RECORDS}


def _shrink_facts(shrink: Mapping[str, Any]) -> dict[str, Any]:
    num_vectors = {tensor["name"]: tensor["num_vectors"] for tensor in shrink["tensors"]}
    return {**{name: shrink.get(name) for name in OF_SHRINKS}, "num_vectors": num_vectors}


def _group(facts: Mapping[Key, Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return each value of a fact with what it belongs to: whole starts, or single rounds of them.

    One value of all needs no such list.
    """
    keys_of: dict[str, list[Key]] = {}
    for key, values in facts.items():
        keys_of.setdefault(json.dumps(values[name]), []).append(key)
    groups = [{"value": json.loads(text)} for text in keys_of]
    if len(groups) > 1:
        for group, keys in zip(groups, keys_of.values(), strict=True):
            group["of"] = []
            for start in dict.fromkeys(key[0] for key in keys):
                own = [key for key in keys if key[0] == start]
                whole = len(own) == sum(key[0] == start for key in facts)
                group["of"] += [start] if whole else [list(key) for key in own]
    return groups


def _look_up(groups: Sequence[Mapping[str, Any]], key: Key) -> Any:
    for group in groups:
        if "of" not in group or key[0] in group["of"] or list(key) in group["of"]:
            return group["value"]
    return None


def _by_images(records: Sequence[RoundRecord], name: str) -> dict[str, Any]:
    """Return what is recorded of the images trained on, by seed and number of images."""
    found: dict[str, Any] = {}
    for record in records:
        value = getattr(record, name)
        images = f"{record.seed}/{record.num_total}"
        if value is not None and found.setdefault(images, value) != value:
            raise ValueError(
                f"history must have one {name} for every seed and number of images, got another for"
                f" (start, seed, round) = {_key(record)}"
            )
    return found


def _measurements_of(records: Sequence[RoundRecord]) -> dict[tuple[Any, ...], dict[str, float]]:
    return {
        (*_key(record), when): values
        for record in records
        for when, values in (record.memorization or {}).items()
    }


# Cells: nothing for None, the shortest text that reads back as the same number.


def _cells(record: RoundRecord) -> dict[str, str]:
    values = {name: getattr(record, name, record.round_index) for name in COLUMNS}
    for name in ("start_seconds", "train_seconds"):
        values[name] = round(values[name], SECONDS_DIGITS)
    return {name: cell_of(value) for name, value in values.items()}


def _write_factors(path: Path, records: Sequence[RoundRecord]) -> None:
    rows = {}
    for record in records:
        if record.shrink:
            tensors = {tensor["name"]: _factors(tensor) for tensor in record.shrink["tensors"]}
            seconds = cell_of(round(record.shrink["seconds"], SECONDS_DIGITS))
            counts = (record.shrink["num_batches"], record.shrink["num_images"])
            row = (*_key(record), *counts, seconds)
            rows[row] = tensors
    write_wide(path, KEY | SHRINK, rows)


def _classes(record: RoundRecord) -> dict[str, float]:
    return {name: round(a, CLASS_DIGITS) for name, a in record.per_class_accuracy.items()}


def _factors(tensor: Mapping[str, Any]) -> str:
    at_lam = round(tensor["share_at_lam"] * tensor["num_vectors"])
    mean, high, low = (
        cell_of(round(tensor[f"{which}_factor"], FACTOR_DIGITS)) for which in ("mean", "max", "min")
    )
    return f"{mean} {high} {at_lam}" if at_lam else f"{mean} {high} {at_lam} {low}"


def _tensor(name: str, num_vectors: int, cell: str, lam: float) -> dict[str, Any]:
    mean, high, at_lam, *low = map(float, cell.split())
    return {
        "name": name,
        "num_vectors": num_vectors,
        "mean_factor": mean,
        "min_factor": low[0] if low else lam,
        "max_factor": high,
        "share_at_lam": at_lam / num_vectors,
    }


def _read_factors(path: Path, facts: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    shrinks = {}
    for row, cells in read_csv(path, KEY | SHRINK, str) if path.is_file() else ():
        key = (row.pop("start"), row.pop("seed"), row.pop("round"))
        own = {name: _look_up(facts[name], key) for name in OF_SHRINKS}
        num_vectors, lam = own.pop("num_vectors"), own["config"]["lam"]
        try:
            tensors = [_tensor(name, n, cells[name], lam) for name, n in num_vectors.items()]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} must have the factors of {key}: {error!r}") from error
        total = sum(num_vectors.values())
        overall = {
            which: sum(t[which] * t["num_vectors"] for t in tensors) / total
            for which in ("mean_factor", "share_at_lam")
        }
        shrinks[key] = {"tensors": tensors, **own, **row, **overall}
    return shrinks
