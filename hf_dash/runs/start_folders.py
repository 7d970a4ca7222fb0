"""A start's rounds in a folder of their own, until the run takes them over in its order.

Flow: starts that train side by side each have a whole run's folder, ``starts/dash_seed0``, with its
own lock, history and rounds → what a start needs of the run goes there → when the run comes to that
start, its rounds move into the run's folder and history, and the start's own folder goes.
Files go from folder to folder as links where the disk has them: a file of a round never changes. A
round is in both places until it is recorded in the second one, so a kill loses nothing.
"""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from hf_dash.history import History, RoundRecord, open_history
from hf_dash.runs.dropped import drop_rounds
from hf_dash.runs.recovery import recover
from hf_dash.runs.round_files import LOADED, OPTIMIZER, RUN_HISTORY, check_files, report_of
from hf_dash.runs.store import aside_of, finish_round, keep_trained, trained_of
from hf_dash.utils.files import check_free_space, one_writer
from hf_dash.utils.reports import REPORT_NAME

# Seconds in which a process whose parent was killed notices it and ends.
PATIENCE = 30.0


def start_folder(output_dir: str | Path, name: str, seed: int) -> Path:
    """Return the folder that a start trains in beside others, whether or not it exists."""
    return Path(output_dir) / "starts" / f"{name}_seed{seed}"


@contextmanager
def open_start(output_dir: str | Path, run: History, name: str, seed: int) -> Iterator[History]:
    """Hold a start's own folder and give its history; one process calls.

    Args:
        output_dir: of the run.
        run: history of the run, whose settings the start has.
        name: of the start.
        seed: of the run.

    Raises:
        ValueError: the folder is of a run with other settings, damaged, or still in use.
    """
    folder = start_folder(output_dir, name, seed)
    with one_writer(folder, wait=PATIENCE):
        own = open_history(folder / RUN_HISTORY, run.settings, may_differ=run.may_differ)
        recover(folder, own)
        yield own


def hand_over(output_dir: str | Path, run: History, own: History, name: str, seed: int) -> None:
    """Give a start's own folder what the run knows of it: its records, and its newest round.

    Args:
        output_dir: of the run.
        run: its history.
        own: history of the start's folder, which is open.
        name: of the start.
        seed: of the run.

    Raises:
        ValueError: a file of the newest round is gone or has changed.
    """
    known = run.select(name, seed)
    for record in known:
        files = Path(output_dir) / record.folder if record is known[-1] else None
        import_round(start_folder(output_dir, name, seed), own, files, record)


def adopt_rounds(
    output_dir: str | Path, run: History, name: str, seed: int, keep: int | None = None
) -> None:
    """Take over the rounds that a start has trained in its own folder, which goes afterwards.

    Args:
        output_dir: of the run, locked.
        run: its history.
        name: of the start.
        seed: of the run.
        keep: the weights of this many newest rounds, and the champion's; None keeps all.

    Raises:
        ValueError: the start's folder is of a run with other settings, damaged, still in use, or
            holds another model of a recorded round.
        OSError: the files could not be written.
    """
    folder = start_folder(output_dir, name, seed)
    if not folder.is_dir():
        return
    with open_start(output_dir, run, name, seed) as own:
        for record in own.select(name, seed):
            files = folder / record.folder
            if record.folder in own.dropped or not files.is_dir():
                # One too many to keep: its report alone is left, if it has one.
                _link_files(files, Path(output_dir) / record.folder, (REPORT_NAME,))
                import_round(output_dir, run, None, record)
            else:
                import_round(output_dir, run, files, record)
    if keep is not None:
        drop_rounds(output_dir, run, keep, [(name, seed)])
    # Gone in one step: what is left after a kill is removed with other leftovers.
    leftover = aside_of(folder)
    os.rename(folder, leftover)
    shutil.rmtree(leftover)
    with suppress(OSError):  # others' folders are there
        folder.parent.rmdir()


def import_round(
    output_dir: str | Path, history: History, files: Path | None, record: RoundRecord
) -> None:
    """Take a round of another folder into a folder and its history; nothing where it is there.

    Args:
        output_dir: where the round comes to.
        history: of that folder.
        files: folder that holds the round now; None takes over the record alone.
        record: of the round; its start may have another name than in the other folder.

    Raises:
        ValueError: a file of the round is gone or has changed, or its place holds another model.
        OSError: the files could not be written; nothing of them is left.
    """
    known = history.find(record.start, record.seed, record.round_index)
    if known is not None:
        if known.weights_sha256 != record.weights_sha256:
            raise ValueError(
                f"{record.folder} holds another model than the one trained beside other starts:"
                " remove one of the two"
            )
        return
    record = replace(record, previous=None)
    if files is not None:
        check_files(files, record)
        report_of(files, record)
        target = Path(output_dir) / record.folder
        target.parent.mkdir(parents=True, exist_ok=True)
        save = partial(_link_files, files)
        keep_trained(aside_of(target), trained_of(target), save, record, history.settings)
    record_round(None if files is None else output_dir, history, record)


def record_round(
    output_dir: str | Path | None, history: History, record: RoundRecord
) -> RoundRecord:
    """Finish a round that is kept aside, if it has a folder, and record it.

    Returns:
        The record as it is in the history.
    """
    history.note_changes()
    whole = replace(record, previous=history.head)
    if output_dir is not None:
        whole = finish_round(output_dir, whole, history.settings)
    history.append(whole)
    return whole


def shared_first_round(
    history: History,
    output_dir: str | Path,
    names: Collection[str],
    seed: int,
    fingerprint: str,
    *,
    with_state: bool = False,
) -> RoundRecord | None:
    """Return the record of a first round that any start can take over, while it is kept.

    Args:
        history: of the folder.
        output_dir: the folder.
        names: of starts without a start of their own in the first round, which then follows from
            seed and data alone.
        seed: of the run.
        fingerprint: of the round's data.
        with_state: only a round that was saved with the optimizer's state.
    """
    for record in history.select(seed=seed):
        alike = record.start.partition("+")[0] in names
        same = record.round_index == 1 and record.data_fingerprint == fingerprint
        whole = OPTIMIZER in (record.file_sha256 or {}) or not with_state
        kept = record.folder not in history.dropped and (Path(output_dir) / record.folder).is_dir()
        if alike and same and whole and kept:
            return record
    return None


def _link_files(
    source: Path, folder: Path, names: Collection[str] = (*LOADED, REPORT_NAME)
) -> None:
    for name in names:
        if not (source / name).is_file() or (folder / name).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, folder / name)
        except OSError:  # another disk, or one without links
            check_free_space(folder, (source / name).stat().st_size)
            shutil.copy2(source / name, folder / name)
