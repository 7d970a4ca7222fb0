"""Which rounds keep their weights: the newest of every start, and those that somebody still needs.

Flow: a round is recorded → older rounds of its start go on record as dropped → their folders are
emptied, except for the report of a shrink. Records stay, with all that was measured. A kill in the
middle leaves files that the next call removes: what is recorded as dropped is never read again.
"""

from collections.abc import Iterable
from pathlib import Path

from hf_dash.history import History, RoundRecord
from hf_dash.utils.files import remove
from hf_dash.utils.logging import get_logger
from hf_dash.utils.reports import REPORT_NAME

logger = get_logger(__name__)


def drop_rounds(
    output_dir: str | Path,
    history: History,
    limit: int,
    chains: Iterable[tuple[str, int]] | None = None,
) -> list[str]:
    """Drop the weights of all but the newest rounds of some starts; only under the run's lock.

    The champion's stay, and those of a seed's first round while a start of the run has not begun
    from it yet.

    Args:
        output_dir: of the run.
        history: of the run; gets an entry where something is dropped.
        limit: rounds of each start and seed that stay, at least 1.
        chains: start and seed of each; by default all that are recorded.

    Returns:
        The folders of the rounds dropped.

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.runs.drop_rounds(folder, hf_dash.History(None, {}), 3)
        []
    """
    own: dict[tuple[str, int], list[RoundRecord]] = {}
    for record in history.records:
        own.setdefault((record.start, record.seed), []).append(record)
    dropped = history.dropped
    old = [
        record
        for chain in (own if chains is None else dict.fromkeys(chains))
        for record in own.get(chain, [])[:-limit]
        if record.folder not in dropped and record.folder != history.champion
    ]
    names = starts_named(history)
    awaited = {seed for _, seed in own if any((name, seed) not in own for name in names)}
    folders = [r.folder for r in old if not (r.round_index == 1 and r.seed in awaited)]
    if folders:
        history.append_dropped(folders, limit)
        # The usual one needs no warning; many at once do, such as those of an older version.
        say = logger.info if len(folders) == 1 else logger.warning
        say("save_total_limit %s drops the weights of %s", limit, ", ".join(folders))
        _empty(Path(output_dir), folders)
    return folders


def starts_named(history: History, otherwise: Iterable[str] = ()) -> list[str]:
    """Return the starts that the settings of a run name, or others where they name none."""
    starts = history.settings.get("starts")
    return list(starts if isinstance(starts, list | tuple) else otherwise)


def finish_dropping(output_dir: Path, history: History) -> None:
    """Remove what a kill has left of the rounds dropped last."""
    if history.drops:
        _empty(output_dir, history.drops[-1].folders)


def check_kept(history: History, record: RoundRecord, use: str) -> None:
    """Check that the weights of a round were not dropped.

    Args:
        history: of the run.
        record: of the round.
        use: what they are needed for; begins with a verb.

    Raises:
        ValueError: they were; the message names ``save_total_limit``.
    """
    limit = history.dropped.get(record.folder)
    if limit is not None:
        raise ValueError(
            f"{record.folder} has no weights to {use}: save_total_limit {limit} has dropped them;"
            " a larger one keeps those of later rounds"
        )


def _empty(output_dir: Path, folders: Iterable[str]) -> None:
    for folder in (output_dir / name for name in folders):
        # What a link leads to is not the run's.
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            for path in folder.iterdir():
                if path.name != REPORT_NAME:
                    remove(path)
            for emptied in (folder, folder.parent):
                if not any(emptied.iterdir()):
                    emptied.rmdir()
        except OSError as error:
            logger.warning("%s could not be removed: %s", folder, error)
