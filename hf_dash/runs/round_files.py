"""The files of a finished round: which there are, and that they are what was recorded.

Flow: a model → finite weights, or an error → its files and their checksums → the round's record;
a folder and its record → the same checksums, or an error, before anything is loaded.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_dash.history import LARGEST, RoundRecord, read_history
from hf_dash.utils.files import public, read_json, sha256_of, write_text
from hf_dash.utils.reports import REPORT_NAME, check_report, summary_of

WEIGHTS, CONFIG, OPTIMIZER = "model.safetensors", "config.json", "optimizer.safetensors"

PROCESSOR, HISTORY, CARD = "preprocessor_config.json", "history.json", "README.md"

# Of a run: it grows.
RUN_HISTORY = "history.jsonl"

FIGURE, FACTORS, ROUNDS = "rounds.png", "factors.png", "rounds"

# What the next round may load; a record holds the checksum of each.
LOADED = (WEIGHTS, CONFIG, PROCESSOR, OPTIMIZER)

# All that a model folder holds of a round. Whatever else lies there is not ours.
MODEL_FOLDER = (WEIGHTS, CONFIG, PROCESSOR, HISTORY, REPORT_NAME, CARD, FIGURE, FACTORS)


def names_below(output_dir: Path) -> list[str]:
    """Return what lies in ``rounds/001`` and the others, by its name below ``output_dir``."""
    rounds = os.path.join(output_dir, ROUNDS)
    indices = [e.name for e in os.scandir(rounds) if e.is_dir()] if os.path.isdir(rounds) else []
    return [
        f"{ROUNDS}/{index}/{name}"
        for index in sorted(indices)
        for name in sorted(os.listdir(os.path.join(rounds, index)))
    ]


def checksums_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the report, and of every file that the next round may load, by name."""
    names = (*LOADED, REPORT_NAME)
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}


def recorded_checksums(record: RoundRecord) -> dict[str, str]:
    """Return the SHA-256 of a round's files by name, as far as its record holds them."""
    sums = dict(record.file_sha256 or {})
    if record.weights_sha256 is not None:
        sums[WEIGHTS] = record.weights_sha256
    return sums


def check_files(folder: Path, record: RoundRecord, *, exported: bool = False) -> None:
    """Check that the files that the next round may load are those a record was written for.

    Records from before there were checksums of all files are checked as far as they go.

    Args:
        folder: of the round.
        record: of the round.
        exported: the folder is a copy for others, which holds no optimizer state.

    Raises:
        ValueError: a file is gone or has changed; the message names it.
    """
    for name, checksum in recorded_checksums(record).items():
        if name != REPORT_NAME and not (exported and name == OPTIMIZER):
            check_file(folder / name, checksum)


def check_file(
    path: Path, checksum: str, without: str = "the next round cannot start without it"
) -> None:
    """Check one file of a round.

    Args:
        path: of the file.
        checksum: as recorded.
        without: what cannot be done without the file; ends the error.

    Raises:
        ValueError: it is gone, or its checksum differs.
    """
    if not path.is_file():
        raise ValueError(f"{path} is gone: {without}")
    if sha256_of(path) != checksum:
        raise ValueError(f"{path} is not what its round's record describes: its checksum differs")


def check_replaceable(folder: Path, records: Iterable[RoundRecord]) -> None:
    """Check that nothing recorded in a folder is lost where these records take its place.

    Args:
        folder: of a model; it need not exist.
        records: that the folder will hold, and those that are kept elsewhere.

    Raises:
        ValueError: the folder is that of a run, its history is damaged, or it has other records.
    """
    if (folder / ROUNDS).is_dir():
        raise ValueError(f"output_dir {str(folder)!r} is the folder of a run: give another one")
    if not (folder / HISTORY).exists():
        return
    found, kept = read_history(folder / HISTORY), list(records)
    lost = [record for record in found.records if record not in kept]
    if lost or found.promotions:
        told = f"round {lost[-1].round_index} of {lost[-1].start!r}" if lost else "promotions"
        raise ValueError(
            f"output_dir {str(folder)!r} holds another history, with {told}, which would be lost:"
            " give another output_dir"
        )


@torch.no_grad()
def check_finite(state: Mapping[str, Tensor]) -> None:
    """Check that no tensor of a model holds NaN or an infinite number.

    Raises:
        FloatingPointError: one does; the message names the first.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(
                f"the weights are not finite, {name!r} for one: the training has diverged, and"
                " nothing of it is saved"
            )


def recorded_shrink(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of a shrink as it goes on record: of a local base its name alone."""
    config = {name: public(value) for name, value in report["config"].items()}
    return {**report, "config": config}


def keep_report(folder: Path, record: RoundRecord) -> RoundRecord:
    """Write the report of a round's shrink into its folder; return the record with the rest."""
    if record.shrink is None or "tensors" not in record.shrink:
        return record
    write_text(folder / REPORT_NAME, json.dumps(record.shrink, indent=1))
    return replace(record, shrink=summary_of(record.shrink))


def report_of(folder: Path, record: RoundRecord) -> dict[str, Any] | None:
    """Return the whole report of the shrink that a round began with; None where it had none.

    Args:
        folder: of the round.
        record: of the round.

    Raises:
        ValueError: the report is gone, or not the one recorded.
    """
    if record.shrink is None or "tensors" in record.shrink:
        return record.shrink
    path, checksum = folder / REPORT_NAME, (record.file_sha256 or {})[REPORT_NAME]
    check_file(path, checksum, "the factors of a shrink cannot be shown without it")
    report: dict[str, Any] = read_json(path, LARGEST)
    check_report(report)
    return report


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the number of bytes that tensors take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
