"""A run's folder put in order after a kill: leftovers swept away, what is finished taken over.

Flow: copies that are not whole → removed; rounds and a champion that are whole but not recorded →
the history, in the order of their digests. An entry lost in between is noticed. What is recorded is
not read again, so a run opens as fast after ten thousand rounds.
"""

import os
from pathlib import Path

from hf_dash.history import (
    LARGEST,
    History,
    Promotion,
    RoundRecord,
    check_entry,
    history_file,
    read_history,
)
from hf_dash.runs.dropped import finish_dropping
from hf_dash.runs.round_files import HISTORY, RUN_HISTORY, names_below
from hf_dash.utils.files import ASIDE, PENDING, finish_replacing, read_json, remove

CHAMPION = "champion.json"

# The record of a round that is trained but not evaluated yet: its accuracy says nothing.
TRAINED = "trained.json"

# What a kill may leave: copies that are not whole, and what a finished round no longer needs.
LEFTOVERS = (".*.tmp", f"*/{ASIDE}", "*/.*.tmp")


def recover(output_dir: str | Path, history: History) -> None:
    """Put a run's folder in order after a kill; only under its lock.

    Args:
        output_dir: of the run.
        history: gets the records of rounds, and the promotion, that are finished but missing in it.

    Raises:
        ValueError: a round is of a run with other settings, or entries before it are missing.
    """
    output_dir = Path(output_dir)
    history.cut_torn_line()
    for place in LEFTOVERS:
        for leftover in output_dir.glob(place):
            remove(leftover)
    for pending in output_dir.glob(f"*/{PENDING}"):
        finish_replacing(pending.parent)
    finish_dropping(output_dir, history)
    missing = _unrecorded(output_dir, history, _sweep_rounds(output_dir))
    while missing:
        head = history.head
        following = next((e for e in missing if e.previous in (head, None)), None)
        if following is None:
            places = [CHAMPION if isinstance(e, Promotion) else e.folder for e in missing]
            raise ValueError(
                f"{history_file(output_dir / RUN_HISTORY)} is older than {', '.join(places)}:"
                " entries recorded in between are missing; restore its newest copy"
            )
        missing.remove(following)
        if isinstance(following, Promotion):
            history.append_promotion(following)
        else:
            history.append(following)


def _sweep_rounds(output_dir: Path) -> list[str]:
    """Remove what a kill has left among the rounds; return the folders of those finished."""
    finished = []
    for name in names_below(output_dir):
        if not name.rpartition("/")[2].startswith("."):
            finished.append(name)
            half = os.path.join(output_dir, name, TRAINED)
            if os.path.exists(half):
                os.unlink(half)
        elif name.endswith(".tmp"):
            remove(output_dir / name)
    return finished


def _unrecorded(
    output_dir: Path, history: History, finished: list[str]
) -> list[RoundRecord | Promotion]:
    """Return what is finished in a folder but not in its history."""
    missing: list[RoundRecord | Promotion] = []
    recorded = {record.folder for record in history.records}
    for name in finished:
        path = output_dir / name / HISTORY
        # What is recorded is not read again, however much there is.
        if name in recorded or not path.exists():
            continue
        found = read_history(path)
        (record,) = found.records
        if record.folder not in recorded:
            history.check_same_run(found)
            missing.append(record)
    champion = read_champion(output_dir)
    known = [one for one in history.promotions if one == champion]
    if champion is not None and champion.previous not in [one.previous for one in known]:
        missing.append(champion)
    return missing


def read_champion(output_dir: str | Path) -> Promotion | None:
    """Return the entry by which a model came into use, or None where none did.

    Raises:
        ValueError: ``champion.json`` is damaged.

    Example:
        >>> import hf_dash
        >>> hf_dash.runs.read_champion("no/run") is None
        True
    """
    path = Path(output_dir) / CHAMPION
    if not path.exists():
        return None
    try:
        entry = Promotion(**read_json(path, LARGEST))
        check_entry(entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole promotion of hf_dash: {error}") from error
    return entry
