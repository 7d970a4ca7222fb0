"""The folder of a run: one writer, whole rounds, a history that is never behind them unnoticed.

Flow: a folder is opened by one writer, leftovers are swept away and rounds that were finished but
not recorded are taken over → a trained round is kept aside before anything can fail → evaluated, it
is renamed into its place → its record goes into the history, last. Promotions go the same way:
``champion.json``, then the history.
A round is finished when its folder is there. Its record is in the folder too, with the digest of
the entry before it: a history that lacks an entry in between is refused.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_dash.history import (
    MAY_DIFFER,
    History,
    Promotion,
    RoundRecord,
    history_file,
    open_history,
    read_history,
    write_history,
)
from hf_dash.models import save_model
from hf_dash.runs.recovery import CHAMPION, TRAINED, recover
from hf_dash.runs.round_files import (
    HISTORY,
    OPTIMIZER,
    RUN_HISTORY,
    WEIGHTS,
    check_file,
    check_files,
    check_finite,
    checksums_of,
    keep_report,
)
from hf_dash.utils.distributed import by_main, gather, is_main_process
from hf_dash.utils.files import (
    ASIDE,
    finish_replacing,
    flush_folder,
    one_writer,
    remove,
    write_text,
)

logger = logging.get_logger(__name__)


@contextmanager
def open_run(
    output_dir: str | Path, settings: dict[str, Any], *, may_differ: Collection[str] = MAY_DIFFER
) -> Iterator[History]:
    """Hold the folder of a run and give its history; all processes call, the main one writes.

    What an earlier call left when it was killed is put in order first: copies that are not whole
    are removed, and rounds that are whole but not recorded are taken over.

    Args:
        output_dir: of the run; made where it does not exist.
        settings: of the run, as plain JSON types.
        may_differ: names of settings that say nothing about what has been recorded.

    Raises:
        ValueError: another process is at work there; ``output_dir`` is a file or empty; the history
            is damaged, older than its rounds, or of a run with other settings.
        OSError: ``output_dir`` cannot be written.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with hf_dash.runs.open_run(folder, {"lam": 0.3}) as history:
        ...         history.records
        []
    """
    with ExitStack() as stack:

        def open_it() -> History:
            stack.enter_context(one_writer(output_dir))
            history = open_history(Path(output_dir) / RUN_HISTORY, settings, may_differ=may_differ)
            recover(output_dir, history)
            return history

        history = by_main(open_it)
        yield history if is_main_process() else replace(history, path=None)


@contextmanager
def open_model_folder(folder: str | Path) -> Iterator[None]:
    """Hold the folder of a model alone; all processes call, the main one holds it.

    An export that was killed while its files moved into place is finished first.

    Args:
        folder: made where it does not exist.

    Raises:
        ValueError: another process is at work there; or ``folder`` is a file or empty.
        OSError: it cannot be written.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with hf_dash.runs.open_model_folder(folder):
        ...         pass  # train, then write the model
    """
    with ExitStack() as stack:

        def open_it() -> None:
            stack.enter_context(one_writer(folder))
            finish_replacing(Path(folder))
            for place in (ASIDE, ".*.tmp"):
                for leftover in Path(folder).glob(place):
                    remove(leftover)

        by_main(open_it)
        yield


def read_run(output_dir: str | Path, *, wait: float = 0.0) -> History:
    """Read the history of a run that no process is at work in; the main process recovers it.

    Args:
        output_dir: of a run.
        wait: seconds to wait for a process at work there.

    Raises:
        ValueError: there is no history, it is damaged, or a process is at work there.
    """
    path = Path(output_dir) / RUN_HISTORY
    if not history_file(path).exists():
        raise ValueError(
            f"output_dir must hold the {RUN_HISTORY} of a run, got {str(output_dir)!r}"
        )
    with one_writer(output_dir, wait=wait):
        history = read_history(path)
        recover(output_dir, history)
    return history


def record_promotion(output_dir: str | Path, history: History, entry: Promotion) -> Promotion:
    """Record a decision; the model it brings into use is named in ``champion.json`` too.

    Args:
        output_dir: of the run, locked.
        history: of the run.
        entry: the decision.

    Returns:
        The entry as it was recorded.
    """
    history.note_changes()
    entry = replace(entry, previous=history.head)
    if entry.kind != "reject":
        write_text(Path(output_dir) / CHAMPION, json.dumps(asdict(entry), indent=1) + "\n")
    history.append_promotion(entry)
    return entry


def save_trained(
    output_dir: str | Path,
    model: PreTrainedModel,
    optimizer_state: dict[str, Tensor],
    record: RoundRecord,
    settings: dict[str, Any],
) -> RoundRecord:
    """Keep a trained round aside, before it is evaluated or anything else can fail.

    Args:
        output_dir: of the run; the folder below it is named by ``record.folder``.
        model: a timm wrapper with its final weights.
        optimizer_state: tensors by name; may be empty.
        record: of the round; its accuracy is not known yet and may be any.
        settings: of the run.

    Returns:
        The record with the checksums of its files.

    Raises:
        FloatingPointError: a weight is not finite.
        OSError: the files could not be written; nothing of them is left.
        ValueError: the round is there already.
    """
    target = Path(output_dir) / record.folder
    if target.exists():
        raise ValueError(f"{target} is there already: a round is saved once")
    check_finite(model.state_dict())
    aside, trained = aside_of(target), trained_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)

    def save(folder: Path) -> None:
        save_model(model, folder)
        if optimizer_state:
            save_file(optimizer_state, folder / OPTIMIZER)

    try:
        return keep_trained(aside, trained, save, replace(record, previous=None), settings)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{target} could not be saved: {error}; earlier rounds are whole, and the same command"
            " continues after them"
        ) from error


def keep_trained(
    aside: Path,
    trained: Path,
    save: Callable[[Path], None],
    record: RoundRecord,
    settings: Mapping[str, Any],
) -> RoundRecord:
    """Save a trained round with its record into one folder, in one step; both paths are replaced.

    Args:
        aside: where it is written.
        trained: where it is then.
        save: writes the round's files into a folder that it makes.
        record: of the round.
        settings: of the run.

    Returns:
        The record with the checksums of the files.

    Raises:
        OSError, SafetensorError: the files could not be written; nothing of them is left.
    """
    for leftover in (aside, trained):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        save(aside)
        record = keep_report(aside, record)
        sums = checksums_of(aside)
        record = replace(record, file_sha256=sums, weights_sha256=sums.get(WEIGHTS))
        write_history(aside / TRAINED, dict(settings), [record])
        flush_folder(aside)
        os.rename(aside, trained)
    except (OSError, SafetensorError):
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return record


def find_trained(
    output_dir: str | Path, history: History, folder: str, origin: Mapping[str, str | None]
) -> RoundRecord | None:
    """Return the record of a round that an earlier call trained but did not finish, or None.

    Args:
        output_dir: of the run.
        history: of the run; a round trained with other settings does not count.
        folder: of the round, below ``output_dir``.
        origin: what the round would be trained on and from now: ``data_fingerprint``, ``parent``
            and ``parent_sha256``.
    """
    trained = trained_of(Path(output_dir) / folder)
    if not (trained / TRAINED).is_file():
        return None
    try:
        found = read_history(trained / TRAINED)
        history.check_same_run(found)
        check_files(trained, found.records[0])
    except ValueError as error:
        logger.warning("%s is trained again: %s", folder, error)
        return None
    (kept,) = found.records
    return kept if all(getattr(kept, name) == value for name, value in origin.items()) else None


def load_trained_(
    model: PreTrainedModel, output_dir: str | Path, record: RoundRecord
) -> dict[str, Tensor]:
    """Give a model the weights of a round that :func:`find_trained` found, in place.

    Returns:
        The optimizer's state at the end of its training.
    """
    folder = trained_of(Path(output_dir) / record.folder)
    model.get_submodule("timm_model").load_state_dict(load_file(folder / WEIGHTS))
    return _optimizer_state(folder, record)


def finish_round(
    output_dir: str | Path, record: RoundRecord, settings: dict[str, Any]
) -> RoundRecord:
    """Rename a trained round into its place, with its whole record.

    Args:
        output_dir: of the run.
        record: as :func:`save_trained` returned it, with its accuracy, and with the head of the
            history as ``previous``.
        settings: of the run; go into the folder with the record.

    Raises:
        OSError: it could not be written; the trained round is still kept aside.
    """
    target = Path(output_dir) / record.folder
    trained = trained_of(target)
    try:
        write_history(trained / HISTORY, settings, [record])
        flush_folder(trained)
        os.rename(trained, target)
        flush_folder(target.parent)
        (target / TRAINED).unlink()
    except OSError as error:
        raise OSError(
            f"{target} could not be saved: {error}; the same command finishes it without training"
            " again"
        ) from error
    return record


def aside_of(target: Path) -> Path:
    """Return where a folder is written before it is whole."""
    return target.with_name(f".{target.name}.tmp")


def trained_of(target: Path) -> Path:
    """Return where a round is kept that is trained but not finished."""
    return target.with_name(f".{target.name}.trained")


def finished_round(
    output_dir: str | Path,
    history: History,
    key: tuple[str, int, int],
    fingerprint: str,
    parent: RoundRecord | None,
) -> RoundRecord | None:
    """Return the record of a round that was finished before, or None.

    Args:
        output_dir: of the run.
        history: of the run.
        key: start, seed and index of the round.
        fingerprint: of the data it would be trained on now.
        parent: record of the round before.

    Raises:
        ValueError: the round was trained on other data or from another parent.
    """
    start, seed, index = key
    done = history.find(start, seed, index)
    if done is None:
        return None
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
        ValueError: a file of the round is gone, or not the one recorded.
    """
    folder = Path(output_dir) / record.folder
    check_files(folder, record)
    model.get_submodule("timm_model").load_state_dict(load_file(folder / WEIGHTS))


def load_optimizer_state(output_dir: str | Path, record: RoundRecord) -> dict[str, Tensor]:
    """Return the optimizer's state at the end of a round; empty where there was none.

    Raises:
        ValueError: it is gone, or not the one recorded.
    """
    return _optimizer_state(Path(output_dir) / record.folder, record)


def _optimizer_state(folder: Path, record: RoundRecord) -> dict[str, Tensor]:
    path = folder / OPTIMIZER
    if record.file_sha256 is not None and OPTIMIZER in record.file_sha256:
        check_file(path, record.file_sha256[OPTIMIZER])
    state: dict[str, Tensor] = load_file(path) if path.exists() else {}
    return state


def agree_on(history: History) -> None:
    """Give every process the main one's history."""
    history.records, history.promotions, history.changes, history.drops = gather(
        (history.records, history.promotions, history.changes, history.drops)
    )[0]
