"""Finished rounds on disk: final weights, optimizer state and record, whole or not there.

Flow: a trained round → a folder written aside → renamed into its place in one step → later rounds
start from what lies there.
A round is finished when its folder is there: whatever kills the process before leaves nothing but
a folder with a name of its own, which the next run sweeps away.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_dash.history import History, RoundRecord, read_history, write_history
from hf_dash.models import save_model
from hf_dash.utils.files import flush_folder, sha256_of

WEIGHTS, OPTIMIZER, HISTORY = "model.safetensors", "optimizer.safetensors", "history.json"


def save_round(
    output_dir: str | Path,
    model: PreTrainedModel,
    optimizer_state: dict[str, Tensor],
    record: RoundRecord,
    settings: dict[str, Any],
) -> RoundRecord:
    """Write a finished round into its folder, in one step.

    Args:
        output_dir: of the run; the folder below it is named by ``record.folder``.
        model: a timm wrapper with its final weights.
        optimizer_state: tensors by name; may be empty.
        record: of the round.
        settings: of the run; go into the folder with the record.

    Returns:
        The record with the checksum of the weights.

    Raises:
        OSError: the folder could not be written; nothing of it is left.
        ValueError: the round is there already.
    """
    target = Path(output_dir) / record.folder
    if target.exists():
        raise ValueError(f"{target} is there already: a round is saved once")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    try:
        save_model(model, aside)
        if optimizer_state:
            save_file(optimizer_state, aside / OPTIMIZER)
        record = replace(record, weights_sha256=sha256_of(aside / WEIGHTS))
        write_history(aside / HISTORY, settings, [record])
        flush_folder(aside)
        os.rename(aside, target)
        flush_folder(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"{target} could not be saved: {error}; earlier rounds are whole, and the same command"
            " continues after them"
        ) from error
    return record


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def find_round(output_dir: str | Path, folder: str) -> History | None:
    """Return the history of a finished round alone, or None where its folder is not there.

    Args:
        output_dir: of the run.
        folder: below it, as :attr:`RoundRecord.folder` names it; leftovers of an attempt at it
            that was killed are removed.
    """
    target = Path(output_dir) / folder
    shutil.rmtree(_aside(target), ignore_errors=True)
    if not target.exists():
        return None
    return read_history(target / HISTORY)


def finished_round(
    output_dir: str | Path,
    history: History,
    key: tuple[str, int, int],
    fingerprint: str,
    parent: RoundRecord | None,
) -> RoundRecord | None:
    """Return the record of a round that was finished before, or None.

    A round whose folder is there but whose record is not was cut off between the two: its record
    is taken over into the history.

    Args:
        output_dir: of the run.
        history: of the run.
        key: start, seed and index of the round.
        fingerprint: of the data it would be trained on now.
        parent: record of the round before.

    Raises:
        ValueError: the round was trained on other data, from another parent, or by a run with
            other settings.
    """
    start, seed, index = key
    done = history.find(start, seed, index)
    if done is None:
        found = find_round(output_dir, RoundRecord.folder_of(start, seed, index))
        if found is None:
            return None
        history.check_same_run(found)
        (done,) = found.records
        history.append(done)
    if done.data_fingerprint != fingerprint:
        raise ValueError(
            f"round {index} of {start!r} was trained on other data than are given now (fingerprint"
            f" {done.data_fingerprint}, now {fingerprint}): an arrival has changed or disappeared"
        )
    if parent is not None and done.parent != parent.folder:
        raise ValueError(
            f"round {index} of {start!r} was started from {done.parent!r}, not from"
            f" {parent.folder!r}"
        )
    return done


def load_weights_(model: PreTrainedModel, output_dir: str | Path, record: RoundRecord) -> None:
    """Give a model the final weights of a round, in place.

    Args:
        model: a timm wrapper of the same make.
        output_dir: of the run.
        record: of the round.

    Raises:
        ValueError: the weights are not there, or not those the record tells of.
    """
    path = Path(output_dir) / record.folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"{path} is gone: the next round cannot start without these weights")
    if sha256_of(path) != record.weights_sha256:
        raise ValueError(f"{path} is not what was saved there: its checksum differs")
    model.get_submodule("timm_model").load_state_dict(load_file(path))


def load_optimizer_state(output_dir: str | Path, record: RoundRecord) -> dict[str, Tensor]:
    """Return the optimizer's state at the end of a round; empty where there was none."""
    path = Path(output_dir) / record.folder / OPTIMIZER
    state: dict[str, Any] = load_file(path) if path.exists() else {}
    return state


def prune_rounds(
    output_dir: str | Path, records: list[RoundRecord], keep: int, champion: str | None = None
) -> None:
    """Remove the folders of all but the last ``keep`` of these rounds and the champion's.

    Their records stay.
    """
    for record in records[: max(0, len(records) - keep)]:
        if record.folder != champion:
            shutil.rmtree(Path(output_dir) / record.folder, ignore_errors=True)
