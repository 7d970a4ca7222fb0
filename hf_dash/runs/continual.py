"""One strategy through all rounds: start, train, evaluate, save, record; each round exactly once.

Flow: a fresh model → for every round: the parent round's saved final weights → start (from the
second round on) → training to convergence → held-out accuracy → the round's folder → the history.
Source: the protocol of Shin et al. (arXiv:2410.23495, section 2) and Ash & Adams (2020).
Exactly once: a start works on weights read from the parent's folder, which are final by then; what
was trained is kept before it is evaluated; and a round ends when its folder is renamed into place.
A run that was killed anywhere continues there, and everything random derives from a round's seed.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel

from hf_dash._version import library_versions
from hf_dash.data.batches import balanced_weights, even_sizes
from hf_dash.data.examples import ImageExamples, RandomCropFlip
from hf_dash.data.rounds import Round, joint_fingerprint, train_batches
from hf_dash.history import History, RoundRecord
from hf_dash.method.config import DashConfig
from hf_dash.method.loss import WeightedLoss
from hf_dash.method.shrink import ShrinkReport
from hf_dash.models import black_pixel, grow_head
from hf_dash.pretrained import Checkpoint
from hf_dash.runs.dropped import check_kept, drop_rounds, starts_named
from hf_dash.runs.recovery import recover
from hf_dash.runs.round_files import check_finite, recorded_shrink, size_of
from hf_dash.runs.start_folders import adopt_rounds, record_round, shared_first_round
from hf_dash.runs.store import (
    agree_on,
    find_trained,
    finished_round,
    load_optimizer_state,
    load_trained_,
    load_weights_,
    save_trained,
)
from hf_dash.starts import STARTS, Start, StartContext, Started, StartsConfig, need_state
from hf_dash.training.config import TrainingConfig
from hf_dash.training.evaluation import check_readable, evaluate_model
from hf_dash.training.loop import TrainingResult, train_round
from hf_dash.training.memorization import measure_round
from hf_dash.training.optimizers import copies_kept
from hf_dash.training.recorded import check_recordable, records_itself
from hf_dash.training.resident import resident_batches
from hf_dash.utils.checks import check_count, check_flag, check_folder_name, check_kind
from hf_dash.utils.distributed import by_main, hardware, synchronize
from hf_dash.utils.files import check_free_space, check_output_dir
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)


def has_every_round(start: Start) -> bool:
    """Tell whether a start is called in the first round too."""
    return bool(getattr(start, "every_round", False))


# Starts whose first round follows from seed and data alone.
ALIKE = frozenset(name for name, start in STARTS.items() if not has_every_round(start))


@dataclass(frozen=True)
class Run:
    """What stays the same through all rounds of one run.

    Args:
        name: of the start, for the history and the folders; without a slash, and not beginning with
            a dot.
        seed: of the run, at least 0; the data order and the start of every round derive from it.
        history: gets one record per round; written by the main process only.
        accelerator: gives devices, processes and precision.
        dash: settings of the gradient pass.
        start_config: settings of the other starts.
        training: settings of the training.
        output_dir: every round is saved below it, in ``RoundRecord.folder``; None keeps nothing.
        save_total_limit: keep the weights of this many newest rounds, at least 1, and the
            champion's; None keeps all. What is dropped is recorded, and its record stays.
        measure_memorization: measure right before and after every start what the model remembers
            (:func:`~hf_dash.training.memorization.measure_round`); not counted in the seconds.
        checkpoint: the pretrained weights that the run began from: the model given to
            :func:`run_rounds` is theirs, with a fresh head, and so is a cold start.
        parent: a round of any start, saved below ``output_dir``, whose weights the first of the
            rounds starts from; None begins with the model as it is.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range, ``parent`` comes without ``output_dir``, or
            ``training`` asks for ``cuda_graphs`` where a step cannot be recorded.

    Example:
        >>> import hf_dash
        >>> from accelerate import Accelerator
        >>> run = hf_dash.runs.Run("dash", 0, hf_dash.History(None, {}), Accelerator(cpu=True))
        >>> run.training.max_epochs
        100
    """

    name: str
    seed: int
    history: History
    accelerator: Accelerator
    dash: DashConfig = field(default_factory=DashConfig)
    start_config: StartsConfig = field(default_factory=StartsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output_dir: str | Path | None = None
    save_total_limit: int | None = 3
    measure_memorization: bool = False
    checkpoint: Checkpoint | None = None
    parent: RoundRecord | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be the name of a start, got {self.name!r}")
        check_folder_name("name", self.name)
        check_count("seed", self.seed, at_least=0)
        if self.save_total_limit is not None:
            check_count("save_total_limit", self.save_total_limit)
        check_flag("measure_memorization", self.measure_memorization)
        kinds = {"dash": DashConfig, "start_config": StartsConfig, "training": TrainingConfig}
        for name, kind in kinds.items():
            check_kind(name, getattr(self, name), kind)
        # A process for a start sets its accelerator later.
        if self.training.cuda_graphs and self.accelerator is not None:
            check_recordable(self.accelerator)
        if self.parent is not None and self.output_dir is None:
            raise ValueError("output_dir must be given with parent, whose weights lie below it")

    def finished(self, round_: Round, parent: RoundRecord | None) -> RoundRecord | None:
        """Return the record of a round that an earlier call has finished, or None."""
        if self.output_dir is None:
            return None
        key = (self.name, self.seed, round_.index)
        return finished_round(self.output_dir, self.history, key, round_.fingerprint, parent)

    def drop(self) -> None:
        """Drop the weights of older rounds; of other starts too, which no longer wait for this."""
        if self.save_total_limit is not None and self.output_dir is not None:
            chains = [(name, self.seed) for name in (self.name, *starts_named(self.history))]
            drop_rounds(self.output_dir, self.history, self.save_total_limit, chains)


def run_rounds(
    model: PreTrainedModel,
    rounds: Iterable[Round],
    held_out: ImageExamples,
    start: Start,
    run: Run,
) -> PreTrainedModel:
    """Take a model through all rounds; continue where an earlier call on the same folder ended.

    Args:
        model: freshly initialized with ``run.seed``; the first round trains it as it is.
        rounds: in order, from the first, or from the one after ``run.parent``.
        held_out: examples never trained on; a label the model does not know yet counts as wrong.
        start: called before every round but the first; before the first too if its attribute
            ``every_round`` is true.
        run: name, seed, settings, and where the rounds are kept.

    Returns:
        The model, trained on the last round: the given one, unless new labels made it grow.

    Raises:
        ValueError: what is recorded was made with other data or settings, or its weights are gone.
        OSError: a round could not be saved; the rounds before it are whole.

    Example:
        >>> import hf_dash
        >>> from accelerate import Accelerator
        >>> digits = hf_dash.load_images("digits").select(range(40))
        >>> names = hf_dash.data.label_names(digits)
        >>> model = hf_dash.create_model("test_resnet", label_names=names, image_size=32)
        >>> transform = hf_dash.models.image_transform(model)
        >>> rounds = list(hf_dash.data.cut_rounds(digits, 2, transform))
        >>> config = hf_dash.TrainingConfig(max_epochs=1, disable_tqdm=True)
        >>> history, accelerator = hf_dash.History(None, {}), Accelerator(cpu=True)
        >>> run = hf_dash.runs.Run("dash", 0, history, accelerator, training=config)
        >>> model = hf_dash.run_rounds(model, rounds, rounds[0].new, hf_dash.STARTS["dash"], run)
        >>> [(record.round_index, record.num_total) for record in history.records]
        [(1, 20), (2, 40)]
    """
    model.to(run.accelerator.device)
    if run.output_dir is not None:
        by_main(partial(_open, run.output_dir, run))
    agree_on(run.history)
    parent, trained = run.parent, False
    kept: dict[str, Tensor] = {}
    for round_ in rounds:
        done = run.finished(round_, parent)
        if done is not None:
            model, _ = _with_classes_of(round_, model, run.seed)
            parent, trained = done, False
            continue
        for name in ("on_device", "drop_last"):
            if getattr(run.training, name) and round_.streams:
                raise ValueError(f"{name} must be False for streams, which are read as they come")
        if not trained:
            check_readable("held_out", held_out)
        if run.output_dir is not None and parent is not None:
            check_kept(run.history, parent, f"start round {round_.index} from")
            load_weights_(model, run.output_dir, parent)
            kept = load_optimizer_state(run.output_dir, parent)
        task = _Task(run, start, held_out, round_, seed_of_round(run.seed, round_.index))
        shared = _first_round_of_another(task)
        if shared is None:
            model, parent, kept = _train_one(task, model, parent, kept)
        else:
            parent, kept = _take_over(task, model, shared)
        trained = True
    if parent is not None and not trained and run.output_dir is not None:
        check_kept(run.history, parent, "return")
        load_weights_(model, run.output_dir, parent)
    by_main(run.drop)
    return model


def _open(output_dir: str | Path, run: Run) -> None:
    check_output_dir(output_dir)
    recover(output_dir, run.history)
    adopt_rounds(output_dir, run.history, run.name, run.seed, run.save_total_limit)


@dataclass(frozen=True)
class _Task:
    """One round to be trained, with the seed of everything random in it."""

    run: Run
    start: Start
    held_out: ImageExamples
    round_: Round
    seed: int

    @property
    def loss(self) -> WeightedLoss | None:
        """The loss to train with, if it is not the model's own."""
        if self.run.training.class_weights is None:
            return None
        return WeightedLoss(balanced_weights(self.round_.class_counts()))

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Measure what the model remembers, where that was asked for."""
        if not self.run.measure_memorization:
            return {}
        return measure_round(model, self.round_, self.held_out, self.run.accelerator)

    def origin(self, parent: RoundRecord | None) -> dict[str, str | None]:
        """Return what the round is trained on and from, by the names of its record."""
        names = {"data_fingerprint": self.round_.fingerprint, "parent_sha256": None}
        if parent is not None:
            return {**names, "parent": parent.folder}
        checkpoint = self.run.checkpoint
        if checkpoint is None:
            return {**names, "parent": None}
        return {**names, "parent": checkpoint.name, "parent_sha256": checkpoint.sha256}


def _first_round_of_another(task: _Task) -> RoundRecord | None:
    """Return the record of the same first round, trained by another start, while it is kept.

    Without a start of its own a first round follows from seed and data alone.
    """
    run, round_ = task.run, task.round_
    if round_.index > 1 or run.output_dir is None or has_every_round(task.start):
        return None
    return shared_first_round(
        *(run.history, run.output_dir, ALIKE, run.seed, round_.fingerprint),
        with_state=need_state(run.start_config, {run.name: task.start}),
    )


def _take_over(
    task: _Task, model: PreTrainedModel, shared: RoundRecord
) -> tuple[RoundRecord, dict[str, Tensor]]:
    """Save the same first round, trained by another start, as this one's too."""
    output_dir = task.run.output_dir
    assert output_dir is not None
    load_weights_(model, output_dir, shared)
    kept = load_optimizer_state(output_dir, shared)
    record = _keep(task, model, kept, replace(shared, start=task.run.name))
    return _finish(task.run, record), kept


def _with_classes_of(
    round_: Round, model: PreTrainedModel, seed: int
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Grow the head by the labels that are new in a round; return the new rows too."""
    new = round_.label_names[model.config.num_labels :]
    return grow_head(model, new, seed=seed) if new else (model, {})


def _batches(task: _Task, augment: RandomCropFlip | None) -> Any:
    """Return the batches to train a round on, as its settings say."""
    training, accelerator = task.run.training, task.run.accelerator
    options: dict[str, Any] = {
        "seed": task.seed,
        "augment": augment,
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
    }
    if not task.round_.streams:
        options["drop_last"] = training.drop_last
        _tell_sizes(task)
    if training.on_device:
        device = accelerator.device
        return resident_batches(task.round_, training.train_batch_size, device=device, **options)
    workers = training.num_workers
    return train_batches(task.round_, training.train_batch_size, num_workers=workers, **options)


def _tell_sizes(task: _Task) -> None:
    """Say which images an epoch leaves out, or that a recorded step needs several shapes."""
    training, accelerator, count = task.run.training, task.run.accelerator, task.round_.num_total
    sizes = even_sizes(
        count, training.train_batch_size, accelerator.num_processes, drop_last=training.drop_last
    )
    if not accelerator.is_main_process:
        return
    if sum(sizes) < count:
        told = (count - sum(sizes), f"{count:,}", sizes[0])
        logger.info("every epoch leaves out %d of %s images, for batches of %d", *told)
    recorded = training.cuda_graphs or records_itself(accelerator)
    if recorded and len(set(sizes)) > 1:
        logger.warning(
            "batches of %d and %d images: CUDA graphs are recorded for both; drop_last, or a"
            " train_batch_size that divides every round, needs one",
            *(min(sizes), max(sizes)),
        )


def _train_one(
    task: _Task, model: PreTrainedModel, parent: RoundRecord | None, kept: dict[str, Tensor]
) -> tuple[PreTrainedModel, RoundRecord, dict[str, Tensor]]:
    """Start, train, keep, evaluate and record one round."""
    run, round_ = task.run, task.round_
    set_seed(task.seed)
    model, rows = _with_classes_of(round_, model, task.seed)
    record: RoundRecord | None = None
    if run.output_dir is not None:
        folder = RoundRecord.folder_of(run.name, run.seed, round_.index)
        record = find_trained(run.output_dir, run.history, folder, task.origin(parent))
    if record is not None and run.output_dir is not None:
        kept = load_trained_(model, run.output_dir, record)
    else:
        record, kept = _train(task, model, rows, parent, kept)
        # Before anything that can fail: the same command then evaluates what was trained.
        record = _keep(task, model, kept, record)
    metrics = evaluate_model(model, task.held_out, run.accelerator)
    names = cast("dict[int, str]", model.config.id2label)
    per_class = metrics["per_class_accuracy"].items()
    record = replace(
        record,
        accuracy=metrics["accuracy"],
        per_class_accuracy={str(names[label]): a for label, a in per_class if label in names},
        held_out_fingerprint=joint_fingerprint([task.held_out]),
    )
    return model, _finish(run, record), kept


def _train(
    task: _Task,
    model: PreTrainedModel,
    rows: dict[str, Tensor],
    parent: RoundRecord | None,
    kept: dict[str, Tensor],
) -> tuple[RoundRecord, dict[str, Tensor]]:
    """Start and train one round; return its record, without an accuracy, and what is kept."""
    run, round_ = task.run, task.round_
    if run.output_dir is not None:
        state = list(model.state_dict().values())
        check_free_space(Path(run.output_dir), size_of(state) * copies_kept(run.training))
    measured = {} if parent is None else {"before": task.measure(model)}
    begun, start_seconds = _start(task, model, rows)
    if parent is not None:
        measured["after"] = task.measure(model)
    result = train_round(
        model,
        _batches(task, RandomCropFlip(black_pixel(model)) if run.training.augment else None),
        run.training,
        run.accelerator,
        penalty=begun.penalty,
        loss=task.loss,
        optimizer_state=kept if begun.keep_optimizer else None,
        description=f"{run.name} round {round_.index}",
    )
    by_main(round_.check_unchanged)
    check_finite(model.state_dict())
    record = replace(
        _record(task, result, begun.report),
        start_seconds=start_seconds,
        memorization=measured if run.measure_memorization and measured else None,
        **task.origin(parent),  # type: ignore[arg-type]
    )
    return record, result.optimizer_state


def _record(task: _Task, result: TrainingResult, report: ShrinkReport | None) -> RoundRecord:
    """Return the record of a training; its accuracy is not known yet."""
    run, round_ = task.run, task.round_
    return RoundRecord(
        start=run.name,
        seed=run.seed,
        round_index=round_.index,
        num_new=round_.num_new,
        num_total=round_.num_total,
        accuracy=0.0,
        per_class_accuracy={},
        train_accuracy=result.train_accuracy,
        converged=result.converged,
        epochs=result.epochs,
        steps=result.steps,
        start_seconds=0.0,
        train_seconds=result.seconds,
        shrink=None if report is None else recorded_shrink(report.to_dict()),
        files=list(round_.files) or None,
        skipped=list(round_.skipped) or None,
        overlap=round_.overlap or None,
        replay=round_.replay,
        images_read=result.images + (report.num_images if report else 0),
        versions=library_versions(),
        hardware=hardware(run.accelerator),
    )


def _start(task: _Task, model: PreTrainedModel, rows: dict[str, Tensor]) -> tuple[Started, float]:
    """Call the start where the round has one, and time it; rows of new classes stay fresh."""
    run, round_ = task.run, task.round_
    if round_.index == 1 and not has_every_round(task.start):
        return Started(), 0.0
    synchronize(run.accelerator.device)
    started = time.perf_counter()
    context = StartContext(
        round_,
        task.seed,
        init_seed=run.seed,
        dash=run.dash,
        start_config=run.start_config,
        accelerator=run.accelerator,
        checkpoint=run.checkpoint,
        loss_fn=task.loss,
    )
    begun = task.start(model, context) or Started()
    state = model.get_submodule("timm_model").state_dict()
    with torch.no_grad():
        for name, fresh in rows.items():
            state[name][-len(fresh) :] = fresh
    synchronize(run.accelerator.device)
    return begun, time.perf_counter() - started


def _keep(
    task: _Task, model: PreTrainedModel, optimizer_state: dict[str, Tensor], record: RoundRecord
) -> RoundRecord:
    """Let the main process keep a trained round aside; all get its record, or stop with it."""
    output_dir, settings = task.run.output_dir, task.run.history.settings
    if output_dir is None:
        return record
    # The first round is every start's, as far as the run names them.
    others = starts_named(task.run.history, STARTS) if record.round_index == 1 else ()
    needed = need_state(task.run.start_config, {task.run.name: task.start}, others)
    state = optimizer_state if needed else {}
    return by_main(lambda: save_trained(output_dir, model, state, record, settings))


def _finish(run: Run, record: RoundRecord) -> RoundRecord:
    """Let the main process finish and record a round; all get its history, or stop with it."""

    def finish() -> RoundRecord:
        whole = record_round(run.output_dir, run.history, record)
        run.drop()
        return whole

    record = by_main(finish)
    agree_on(run.history)
    if run.accelerator.is_main_process:
        logger.info(
            "%s, seed %d, round %d: %s images (%s new), accuracy %.2f %%, %s steps, %.1f s",
            *(record.start, record.seed, record.round_index),
            *(f"{record.num_total:,}", f"{record.num_new:,}", 100 * record.accuracy),
            *(f"{record.steps:,}", record.seconds),
        )
    return record


def seed_of_round(seed: int, round_index: int) -> int:
    """Return a seed of its own for every run and round, the same on every process."""
    return int(np.random.SeedSequence([seed, round_index]).generate_state(1)[0])
