"""One round by transformers' Trainer: trained once, kept before it is evaluated.

Flow: the records behind the parent, the round's data and settings → what an earlier call finished,
or trained and did not finish → the Trainer's training otherwise → finite weights kept aside in
``.trained`` → a record, and the files that an export takes over.
Differs from :func:`~hf_dash.run_rounds`: the parent may lie anywhere, in the output directory too.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_dash._version import library_versions
from hf_dash.data.examples import ImageExamples
from hf_dash.data.rounds import Round, joint_fingerprint
from hf_dash.history import MAY_DIFFER, History, RoundRecord, read_history
from hf_dash.models import load_model, model_labels, save_model
from hf_dash.runs.recovery import TRAINED
from hf_dash.runs.round_files import (
    HISTORY,
    check_files,
    check_finite,
    check_replaceable,
    recorded_shrink,
    size_of,
)
from hf_dash.runs.store import keep_trained
from hf_dash.starts import is_dash
from hf_dash.trainer.callback import DashCallback
from hf_dash.training.evaluation import check_readable
from hf_dash.utils.distributed import by_main, hardware
from hf_dash.utils.files import ASIDE, check_free_space
from hf_dash.utils.reports import REPORT_NAME

# Settings of a shrink that a resumed training cannot change any more.
SHRINKS_BY = {"alpha", "lam", "grouping", "variant", "tolerance", "num_batches", "include_frozen"}

# Below the output directory: what was trained, until it is exported.
KEPT = ".trained"


@dataclass(frozen=True)
class TrainerRound:
    """One round that a ``Trainer`` trains in its output directory.

    Args:
        output_dir: of the Trainer; the finished model is written there.
        round_: to train on; its index is one more than that of the newest of ``past``.
        held_out: examples that it will be evaluated on.
        settings: of the command, as plain JSON types.
        past: records of the rounds behind the parent, oldest first.
        parent: name of the model it starts from, for the record.
        parent_sha256: of the parent's weights; None where they are not one file.

    Example:
        >>> import hf_dash
        >>> hf_dash.runs.TrainerRound("out", None, None, {}, [], "parent").finished() is None
        True
    """

    output_dir: str | Path
    round_: Round
    held_out: ImageExamples
    settings: Mapping[str, Any]
    past: Sequence[RoundRecord]
    parent: str
    parent_sha256: str | None = None

    @property
    def kept(self) -> Path:
        """The folder of what was trained and is not exported yet."""
        return Path(self.output_dir) / KEPT

    def finished(self) -> list[RoundRecord] | None:
        """Return the records up to this round where an earlier call has finished it, or None.

        Raises:
            ValueError: the output directory holds other rounds, or files of this one are gone or
                have changed.
        """
        folder = Path(self.output_dir)
        if not (folder / HISTORY).exists():
            return None
        found = read_history(folder / HISTORY)
        newest = found.records[-1] if found.records else None
        # Trained where its parent lay, it has taken the parent's place.
        parents = () if newest is None else (newest.parent_sha256, newest.weights_sha256)
        if newest is None or self.parent_sha256 not in parents or not self._same(found, newest):
            check_replaceable(folder, self.past)
            return None
        check_files(folder, newest, exported=True)
        self.clear()
        return found.records

    def train_(
        self,
        trainer: Trainer,
        start: str = "dash",
        begin: Callable[[], float] | None = None,
        image_processor: Any | None = None,
        resume_from_checkpoint: str | bool | None = None,
    ) -> tuple[PreTrainedModel, RoundRecord]:
        """Train in place and keep the result, or take up what an earlier call has trained.

        Everything that can be checked is checked first.

        Args:
            trainer: with a ``DashCallback`` if the start is DASH; all processes call.
            start: name of the start.
            begin: changes the model's weights before training, which is not resumed, and returns
                the seconds it took.
            image_processor: of a model that is not a timm wrapper.
            resume_from_checkpoint: as in ``Trainer.train``.

        Returns:
            The trained model, and its record, in which the accuracy is not known yet.

        Raises:
            FloatingPointError: a trained weight is not finite; nothing is kept.
            ValueError: the output directory holds other rounds, a held-out image cannot be read,
                the checkpoint was shrunk with other settings, or a file of images was replaced
                meanwhile.
            OSError: there is not enough free disk space, or the files could not be written.
        """
        kept = by_main(self._find_kept)
        if kept is not None:
            return load_model(str(self.kept)), kept
        folder, model = Path(self.output_dir), cast(PreTrainedModel, trainer.model)
        check_replaceable(folder, self.past)
        check_readable("held_out", self.held_out)
        check_free_space(folder, 2 * size_of(model.state_dict().values()))
        callback = _callback_of(trainer) if is_dash(start) else None
        shrink = None
        if callback is not None:
            shrink = self._resumed_shrink(callback, resume_from_checkpoint)
        seconds = 0.0 if begin is None or resume_from_checkpoint else begin()
        result = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        by_main(self.round_.check_unchanged)
        check_finite(model.state_dict())
        if callback is not None and callback.report is not None:
            shrink = callback.report.to_dict()
        if callback is not None and shrink is None:
            raise ValueError("trainer must have a DashCallback that shrinks, got no shrink")
        record = self._record(trainer, result.metrics["train_runtime"], shrink)
        record = replace(record, start=start, start_seconds=seconds or record.start_seconds)
        return model, by_main(partial(self._keep, model, image_processor, record))

    def evaluated(
        self, record: RoundRecord, model: PreTrainedModel, metrics: Mapping[str, Any]
    ) -> RoundRecord:
        """Return the whole record of the round.

        Args:
            record: as :meth:`train_` returned it.
            model: whose classes have names.
            metrics: ``accuracy`` and ``per_class_accuracy`` as
                :func:`~hf_dash.training.evaluate_model` returns them.
        """
        names, per_class = model_labels(model), metrics["per_class_accuracy"]
        return replace(
            record,
            accuracy=metrics["accuracy"],
            per_class_accuracy={names[index]: value for index, value in per_class.items()},
        )

    def clear(self) -> None:
        """Remove what was kept, once it is exported."""
        shutil.rmtree(self.kept, ignore_errors=True)

    def _origin(self) -> dict[str, str | None]:
        """Return what the round is trained and evaluated on, by the names of its record."""
        return {
            "data_fingerprint": self.round_.fingerprint,
            "held_out_fingerprint": joint_fingerprint([self.held_out]),
            "parent": self.parent,
            "parent_sha256": self.parent_sha256,
        }

    def _same(self, found: History, record: RoundRecord, *names: str) -> bool:
        """Tell whether a record is of this round's data and settings, and of more if named."""
        origin = self._origin()
        own = History(None, dict(self.settings), may_differ=MAY_DIFFER)
        try:
            own.check_same_run(found)
        except ValueError:
            return False
        compared = ("data_fingerprint", "held_out_fingerprint", *names)
        return all(getattr(record, name) == origin[name] for name in compared)

    def _find_kept(self) -> RoundRecord | None:
        """Return the record of what an earlier call trained, or None; other rounds are removed."""
        path = self.kept / TRAINED
        if not path.is_file():
            return None
        found = read_history(path)
        (record,) = found.records
        if not self._same(found, record, "parent", "parent_sha256"):
            return None
        check_files(self.kept, record)
        return record

    def _keep(
        self, model: PreTrainedModel, image_processor: Any | None, record: RoundRecord
    ) -> RoundRecord:
        def save(folder: Path) -> None:
            save_model(model, folder, image_processor)

        aside = Path(self.output_dir) / ASIDE
        return keep_trained(aside, self.kept, save, record, self.settings)

    def _record(
        self, trainer: Trainer, seconds: float, shrink: dict[str, Any] | None
    ) -> RoundRecord:
        shrink_seconds = 0.0 if shrink is None else float(shrink["seconds"])
        return RoundRecord(
            start="dash",
            seed=trainer.args.seed,
            round_index=self.round_.index,
            num_new=self.round_.num_new,
            num_total=self.round_.num_total,
            accuracy=0.0,
            per_class_accuracy={},
            train_accuracy=None,
            converged=None,
            epochs=trainer.state.epoch,
            steps=trainer.state.global_step,
            start_seconds=shrink_seconds,
            # Training resumed after the shrink may have taken less time than the shrink did.
            train_seconds=max(0.0, seconds - shrink_seconds),
            shrink=None if shrink is None else recorded_shrink(shrink),
            skipped=list(self.round_.skipped) or None,
            overlap=self.round_.overlap or None,
            replay=self.round_.replay,
            images_read=_images_read(trainer, self.round_, shrink),
            versions=library_versions(),
            hardware=hardware(trainer.accelerator),
            **self._origin(),  # type: ignore[arg-type]
        )

    def _resumed_shrink(
        self, callback: DashCallback, checkpoint: str | bool | None
    ) -> dict[str, Any] | None:
        """Return the report of the shrink behind a checkpoint; None where training begins anew."""
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.output_dir))  # type: ignore[no-untyped-call]
        if not checkpoint:
            return None
        # Older checkpoints have it in the output directory they lie in.
        places = [Path(str(checkpoint)) / REPORT_NAME, Path(str(checkpoint)).parent / REPORT_NAME]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise ValueError(
                f"resume_from_checkpoint must hold the {REPORT_NAME} of its shrink, got"
                f" {checkpoint!r}"
            )
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(SHRINKS_BY & report["config"].keys()):
            was, now = report["config"][name], getattr(callback.config, name)
            if was != now:
                raise ValueError(
                    f"resume_from_checkpoint {checkpoint!r} was shrunk with {name} {was!r}, but"
                    f" {name} is {now!r}: give its settings again"
                )
        return report


def _callback_of(trainer: Trainer) -> DashCallback:
    found = (c for c in trainer.callback_handler.callbacks if isinstance(c, DashCallback))
    callback = next(found, None)
    if callback is None:
        raise ValueError("trainer must have a DashCallback, which shrinks before it trains")
    return callback


def _images_read(trainer: Trainer, round_: Round, shrink: dict[str, Any] | None) -> int | None:
    """Return how many images the shrink and whole epochs read; None where it is not known."""
    epochs = trainer.state.epoch
    if round_.streams or epochs != int(epochs) or trainer.args.dataloader_drop_last:
        return None
    passed = 0 if shrink is None else int(shrink["num_images"])
    return int(epochs) * round_.num_total + passed
