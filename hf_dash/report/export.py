"""What a run leaves for people: tables, figures, and a model with its card.

Flow: a history → Markdown tables and PNG figures; a model and its own records → a folder to push.
Everything is made from what was recorded, so it can be made again without training.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_dash.history import History, RoundRecord, chained, write_history
from hf_dash.models import save_model
from hf_dash.report.card import CardData, CardInfo, card_info, write_card
from hf_dash.report.plots import plot_factors, plot_rounds
from hf_dash.report.tables import memorization_table, rounds_table, starts_table
from hf_dash.runs.dropped import check_kept
from hf_dash.runs.round_files import (
    FACTORS,
    FIGURE,
    HISTORY,
    LOADED,
    MODEL_FOLDER,
    OPTIMIZER,
    WEIGHTS,
    check_files,
    check_replaceable,
    checksums_of,
    recorded_checksums,
    report_of,
)
from hf_dash.utils.files import files_written_aside, one_writer, write_text
from hf_dash.utils.logging import get_logger
from hf_dash.utils.reports import REPORT_NAME

logger = get_logger(__name__)


def write_results(history: History, folder: str | Path) -> str:
    """Draw the figures of a run and return its tables.

    Args:
        history: with at least one record.
        folder: for ``rounds.png`` and, where a round was shrunk, ``factors.png`` of the last one.

    Returns:
        Markdown: one row per round, one per start, and what the starts forgot and kept where that
        was measured.

    Raises:
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tables = hf_dash.report.write_results(hf_dash.History(None, {}, [record]), folder)
        >>> tables.splitlines()[0][:14]
        '| start | seed'
    """
    records, folder = history.records, Path(folder)
    plot_rounds(records, folder / FIGURE)
    shrunk = [record for record in records if record.shrink is not None]
    report = _last_report(history, shrunk[-1]) if shrunk else None
    if report is not None:
        plot_factors(report, folder / FACTORS)
    tables = [rounds_table(records), starts_table(records)]
    if any(record.memorization is not None for record in records):
        tables.append(memorization_table(records))
    return "\n\n".join(tables)


def _last_report(history: History, record: RoundRecord) -> dict[str, Any] | None:
    """Return the report of a round below the history, or beside the history of a model."""
    beside = Path() if history.path is None else history.path.parent
    below = beside / record.folder
    folder = below if (below / REPORT_NAME).is_file() else beside
    try:
        return report_of(folder, record)
    except ValueError as error:
        logger.warning("%s is not drawn: %s", FACTORS, error)
        return None


@dataclass(frozen=True)
class Chain:
    """The rounds of one start and seed of a run: what an exported model comes from.

    Args:
        history: of the run.
        start: name of the start.
        seed: of the run.
        data: trained and evaluated on.

    Raises:
        ValueError: nothing is recorded of this start and seed.

    Example:
        >>> import hf_dash
        >>> data = hf_dash.report.CardData("digits", "test", 360)
        >>> hf_dash.report.Chain(hf_dash.History(None, {}), "dash", 0, data)
        Traceback (most recent call last):
            ...
        ValueError: history has no record of start 'dash' and seed 0
    """

    history: History
    start: str
    seed: int
    data: CardData

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError(
                f"history has no record of start {self.start!r} and seed {self.seed!r}"
            )

    @property
    def records(self) -> list[RoundRecord]:
        """The rounds, oldest first."""
        return self.history.select(self.start, self.seed)

    def until(self, record: RoundRecord) -> "Chain":
        """Return the chain as it was when ``record`` was its newest round."""
        later = self.records[self.records.index(record) + 1 :]
        kept = [one for one in self.history.records if one not in later]
        return replace(self, history=replace(self.history, path=None, records=kept))

    def info(
        self,
        model: PreTrainedModel,
        *,
        base: tuple[str, str] | None = None,
        hub_model_id: str | None = None,
    ) -> CardInfo:
        """Return what the card of the newest round says; see :func:`~hf_dash.report.card_info`."""
        settings = {k: v for k, v in self.history.settings.items() if k != "output_dir"}
        rivals = [r for r in self.history.select(seed=self.seed) if r.start != self.start]
        return card_info(
            model,
            self.records,
            settings,
            self.data,
            rivals=rivals,
            base=base,
            hub_model_id=hub_model_id,
        )


def write_model_folder(
    model: PreTrainedModel,
    folder: str | Path,
    info: CardInfo,
    *,
    image_processor: Any | None = None,
    files: str | Path | None = None,
    known: Sequence[RoundRecord] = (),
) -> CardInfo:
    """Write a model with its card, the history of its rounds, the last shrink, and figures of both.

    All files take their places together: a kill leaves those of before or these, never a mixture.

    Args:
        model: an image classifier of transformers; a timm wrapper is saved in timm's layout.
        folder: made where it does not exist; files that are not a round's stay. A round in it is
            replaced only if its history goes on in this one.
        info: for the card; its records and settings make the history. Where the last record has no
            checksums, the history gets them.
        image_processor: saved with a model that is not a timm wrapper.
        files: a folder whose weights, config and image processor are taken over as they are, such
            as that of the round; by default the model is saved.
        known: records that may be in the folder besides those of the card, because they are kept
            elsewhere too.

    Returns:
        What the card says, with the checksums.

    Raises:
        ValueError: the folder holds another history; another process is at work there; or the
            weights are not those of the last record.
        OSError: the files could not be written; the folder is as it was.
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).

    Example:
        >>> import tempfile
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> data = hf_dash.report.CardData("digits", "test", 360)
        >>> info = hf_dash.report.card_info(model, [record], {}, data)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = hf_dash.report.write_model_folder(model, folder, info)
        >>> sorted(done.record.file_sha256)
        ['config.json', 'model.safetensors']
    """
    folder = Path(folder)
    with one_writer(folder):
        check_replaceable(folder, [*info.records, *known])
        with files_written_aside(folder, stale=MODEL_FOLDER) as aside:
            if files is None:
                save_model(model, aside, image_processor)
            else:
                _copy_loaded(Path(files), aside)
            info = _with_last(info, _with_checksums(aside, info.record))
            shrink = report_of(folder if files is None else Path(files), info.record)
            if shrink is not None:
                write_text(aside / REPORT_NAME, json.dumps(shrink, indent=1))
                plot_factors(shrink, aside / FACTORS)
            write_history(aside / HISTORY, info.settings, chained(info.records))
            plot_rounds(info.records, aside / FIGURE)
            shown = _with_last(info, replace(info.record, shrink=shrink))
            factors = None if shrink is None else FACTORS
            write_card(aside, model, replace(shown, figure=FIGURE, factors_figure=factors))
    return info


def _with_last(info: CardInfo, record: RoundRecord) -> CardInfo:
    return replace(info, records=[*info.records[:-1], record])


def export_round(
    model: PreTrainedModel,
    output_dir: str | Path,
    chain: Chain,
    *,
    folder: str | Path | None = None,
    base: tuple[str, str] | None = None,
    hub_model_id: str | None = None,
) -> CardInfo:
    """Export the newest round of a chain: its own files, with a card and the chain's history.

    Args:
        model: the round's.
        output_dir: of the run, where the round's folder lies.
        chain: of the rounds.
        folder: to export to; ``model`` below ``output_dir`` by default.
        base: see :func:`~hf_dash.report.card_info`.
        hub_model_id: see :class:`~hf_dash.report.CardInfo`.

    Raises:
        ValueError: a file of the round is gone or has changed; or see :func:`write_model_folder`.
        OSError: the files could not be written; the folder is as it was.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> from hf_dash.runs.store import finish_round, save_trained
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> data = hf_dash.report.CardData("digits", "test", 360)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     record = finish_round(run, save_trained(run, model, {}, record, {}), {})
        ...     chain = hf_dash.report.Chain(hf_dash.History(None, {}, [record]), "dash", 0, data)
        ...     hf_dash.report.export_round(model, run, chain).model_name
        'test_resnet on digits'
    """
    check_kept(chain.history, chain.records[-1], "export")
    own = Path(output_dir) / chain.records[-1].folder
    check_files(own, chain.records[-1])
    return write_model_folder(
        model,
        Path(output_dir) / "model" if folder is None else folder,
        chain.info(model, base=base, hub_model_id=hub_model_id),
        files=own,
        known=chain.history.records,
    )


def _copy_loaded(source: Path, target: Path) -> None:
    for name in LOADED:
        # Momentum is nobody's who loads the model.
        if name != OPTIMIZER and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _with_checksums(folder: Path, record: RoundRecord) -> RoundRecord:
    """Return a record with the checksums of its files; refuse files of another one."""
    sums, known = checksums_of(folder), recorded_checksums(record)
    wrong = [name for name, value in sums.items() if known.get(name, value) != value]
    if wrong:
        raise ValueError(
            f"model must be the one of the last record, but {wrong[0]} differs from what was"
            " recorded"
        )
    return replace(
        record,
        weights_sha256=record.weights_sha256 or sums.get(WEIGHTS),
        file_sha256=record.file_sha256 or sums,
    )
