"""What a run leaves for people: tables, figures, and a model with its card.

Flow: a history → Markdown tables and PNG figures; a model and its own records → a folder to push.
Everything is made from what was recorded, so it can be made again without training.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_dash._version import library_versions
from hf_dash.data.rounds import Round, joint_fingerprint
from hf_dash.history import History, RoundRecord, write_history
from hf_dash.models import model_labels, save_model
from hf_dash.report.card import CardData, CardInfo, card_info, write_card
from hf_dash.report.plots import plot_factors, plot_rounds
from hf_dash.report.tables import memorization_table, rounds_table, starts_table
from hf_dash.runs.store import HISTORY, WEIGHTS
from hf_dash.starts import is_dash
from hf_dash.trainer.logging import REPORT_NAME
from hf_dash.utils.distributed import hardware
from hf_dash.utils.files import sha256_of, write_text

FIGURE, FACTORS = "rounds.png", "factors.png"


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
        >>> from hf_dash import History
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("cold", 0, 1, 8, 8, 0.5, {"a": 1.0}, 1.0, True, 3, 30, 0, 1)
        >>> tables = write_results(History(None, {}, [record]), ".")
        >>> Path("rounds.png").exists()
        True
    """
    records, folder = history.records, Path(folder)
    plot_rounds(records, folder / FIGURE)
    shrunk = [record for record in records if record.shrink is not None]
    if shrunk:
        plot_factors(shrunk[-1], folder / FACTORS)
    tables = [rounds_table(records), starts_table(records)]
    if any(record.memorization is not None for record in records):
        tables.append(memorization_table(records))
    return "\n\n".join(tables)


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
        # Somebody's own folders are nobody else's business.
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
) -> None:
    """Save a model with its card, the history of its rounds, the last shrink, and figures of both.

    Where the last record does not hold the checksum of the weights, the history gets it.

    Args:
        model: an image classifier of transformers; a timm wrapper is saved in timm's layout.
        folder: made where it does not exist; other files in it stay.
        info: for the card; its records and settings make the history.
        image_processor: saved with a model that is not a timm wrapper.

    Raises:
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).

    Example:
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("cold", 0, 1, 8, 8, 0.5, {"a": 1.0}, 1.0, True, 3, 30, 0, 1)
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> info = CardInfo("mine", [record], {}, "digits", "test", 360)
        >>> write_model_folder(model, "model", info)
        >>> hf_dash.load_model("model").config.id2label
        {0: 'a', 1: 'b'}
    """
    folder = Path(folder)
    save_model(model, folder, image_processor)
    record = info.record
    if record.weights_sha256 is None and (folder / WEIGHTS).is_file():
        record = replace(record, weights_sha256=sha256_of(folder / WEIGHTS))
        info = replace(info, records=[*info.records[:-1], record])
    write_history(folder / HISTORY, info.settings, info.records)
    if record.shrink is not None:
        write_text(folder / REPORT_NAME, json.dumps(record.shrink, indent=1))
    else:
        (folder / REPORT_NAME).unlink(missing_ok=True)  # of an earlier round
    plot_rounds(info.records, folder / FIGURE)
    shrunk = info.record.shrink is not None
    if shrunk:
        plot_factors(info.record, folder / FACTORS)
    else:  # one of an earlier model would be taken for this one's
        (folder / FACTORS).unlink(missing_ok=True)
    figures = replace(info, figure=FIGURE, factors_figure=FACTORS if shrunk else None)
    write_card(folder, model, figures)


def trainer_record(
    trainer: Trainer,
    round_: Round,
    metrics: dict[str, Any],
    *,
    train_seconds: float,
    parent: str,
    held_out: Any | None = None,
    start: str = "dash",
    start_seconds: float = 0.0,
) -> RoundRecord:
    """Return the record of a round that a ``Trainer`` has trained.

    Args:
        trainer: when training has ended.
        round_: what it was trained on.
        metrics: ``accuracy`` and ``per_class_accuracy`` as
            :func:`~hf_dash.training.evaluation.evaluate_model` returns them.
        train_seconds: of training, the shrink of ``DashCallback`` included.
        parent: the model the round started from.
        held_out: the examples that ``metrics`` are of, as ``Schedule.held_out_examples`` returns
            them; without them no later record can be compared with this one.
        start: name of the start; one of DASH is read from ``dash_report.json``.
        start_seconds: duration of a start before training; ``DashCallback`` reports its own.

    Raises:
        FileNotFoundError: the start is DASH, and the output directory holds no
            ``dash_report.json``.

    Example:
        >>> import hf_dash
        >>> from transformers import Trainer, TrainingArguments
        >>> digits = hf_dash.load_images("digits").select(range(8))
        >>> names = hf_dash.data.label_names(digits)
        >>> model = hf_dash.create_model("test_resnet", label_names=names, image_size=32)
        >>> (round_,) = hf_dash.data.cut_rounds(digits, 1, hf_dash.models.image_transform(model))
        >>> args = TrainingArguments("out", report_to="none", use_cpu=True)
        >>> trainer = Trainer(model, args, train_dataset=round_.examples)
        >>> trainer.state.epoch, trainer.state.global_step = 1.0, 1  # as if it had trained
        >>> metrics = {"accuracy": 0.5, "per_class_accuracy": {}}
        >>> hf_dash.report.trainer_record(
        ...     trainer, round_, metrics, train_seconds=2.0, parent="lite0", start="warm"
        ... ).steps
        1
    """
    shrink = None
    if is_dash(start):
        # Written at the shrink, so that it is there too where this run resumed after it.
        report = Path(cast(str, trainer.args.output_dir)) / REPORT_NAME
        shrink = json.loads(report.read_text(encoding="utf-8"))
        start_seconds = shrink["seconds"]
        # Training resumed after the shrink may have taken less time than the shrink did.
        train_seconds = max(0.0, train_seconds - start_seconds)
    names = model_labels(cast(PreTrainedModel, trainer.model))
    per_class = metrics["per_class_accuracy"]
    return RoundRecord(
        start=start,
        seed=trainer.args.seed,
        round_index=round_.index,
        num_new=round_.num_new,
        num_total=round_.num_total,
        accuracy=metrics["accuracy"],
        per_class_accuracy={names[index]: value for index, value in per_class.items()},
        train_accuracy=None,
        converged=None,
        epochs=trainer.state.epoch,
        steps=trainer.state.global_step,
        start_seconds=start_seconds,
        train_seconds=train_seconds,
        shrink=shrink,
        parent=parent,
        data_fingerprint=round_.fingerprint,
        images_read=_images_read(trainer, round_, shrink),
        versions=library_versions(),
        hardware=hardware(trainer.accelerator),
        held_out_fingerprint=None if held_out is None else joint_fingerprint([held_out]),
        skipped=list(round_.skipped) or None,
        overlap=round_.overlap or None,
    )


def _images_read(trainer: Trainer, round_: Round, shrink: dict[str, Any] | None) -> int | None:
    """Return how many images the shrink and whole epochs read; None where it is not known."""
    epochs = trainer.state.epoch
    if round_.streams or epochs != int(epochs) or trainer.args.dataloader_drop_last:
        return None
    passed = 0 if shrink is None else int(shrink["num_images"])
    return int(epochs) * round_.num_total + passed


# Of TrainingArguments: places, names, secrets, and what says nothing about how it was trained.
_UNTOLD = (
    *("output_dir", "logging_", "log_", "run_name", "project", "trackio_", "report_to", "do_"),
    *("push_to_hub", "hub_", "disable_tqdm", "resume_from_checkpoint", "local_rank", "deepspeed"),
)

_TOLD = (
    *("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps", "optim"),
    *("weight_decay", "lr_scheduler_type", "seed", "bf16", "fp16"),
)


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings of a Trainer to put on record: the main ones, and all but the defaults.

    Args:
        args: of a Trainer; no token, name of a repository or place on this machine is taken.

    Returns:
        Plain JSON types by name, ``world_size`` among them.

    Example:
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments("runs/next", learning_rate=0.1, warmup_steps=5, use_cpu=True)
        >>> settings = training_settings(args)
        >>> settings["learning_rate"], settings["warmup_steps"], "output_dir" in settings
        ('0.1', '5', False)
    """
    names = [
        entry.name
        for entry in fields(args)
        if not entry.name.startswith(_UNTOLD)
        and (
            entry.name in _TOLD
            or getattr(args, entry.name) not in (entry.default, None, [], AcceleratorConfig())
        )
    ]
    values = {name: getattr(args, name) for name in names}
    told = {name: str(getattr(value, "value", value)) for name, value in values.items()}
    return {**told, "world_size": args.world_size}
