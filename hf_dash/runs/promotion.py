"""Which model of a run is in use: the champion, and how it came to be.

Flow: two recorded models of one run → predictions on the same held-out examples, by label name →
``compare_models`` → ``decide`` → an entry in ``history.jsonl``, which names the champion.
Differs from a registry's stages: nothing is copied or moved; the history alone says which folder
is in use, with the evidence for it, so that going back is one more entry.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import numpy as np
import timm
from accelerate import Accelerator
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from hf_dash.data.examples import ImageExamples, Transform
from hf_dash.data.names import check_shared
from hf_dash.data.rounds import joint_fingerprint
from hf_dash.history import History, Promotion, RoundRecord, now
from hf_dash.models import image_transform, load_model, model_labels
from hf_dash.runs.comparison import (
    Labels,
    PromotionRules,
    Verdict,
    compare_models,
    decide,
)
from hf_dash.runs.dropped import check_kept
from hf_dash.runs.round_files import CONFIG, check_files
from hf_dash.runs.store import read_run, record_promotion
from hf_dash.training.evaluation import predict
from hf_dash.utils.checks import check_count
from hf_dash.utils.distributed import by_main
from hf_dash.utils.files import one_writer

Examples: TypeAlias = TorchDataset[dict[str, Any]]

MakeExamples: TypeAlias = Callable[[Transform], Examples]

logger = logging.get_logger(__name__)

# Seconds to wait for another decision about the same run, and how often to compare anew.
WAIT, COMPARISONS = 10.0, 3

# A model measured again on the same images may differ by this much from its record: other devices
# and precisions turn some predictions around.
APART = 0.02


@dataclass(frozen=True)
class HeldOut:
    """What both models predict, where the examples alone do not say everything.

    Args:
        examples: mappings of ``pixel_values`` and ``labels``, or a callable from a model's
            transform to them, so that each model reads the images its own way; the same examples
            in the same order every time.
        label_names: of the examples' labels 0, 1, …; by default those of the dataset of
            :class:`~hf_dash.data.ImageExamples`, and of other examples the challenger's.
        fingerprint: goes into the entry; by default that of :class:`~hf_dash.data.ImageExamples`,
            and of other examples a digest of label names, labels and pixels as the challenger
            reads them, which reads them once more.
        batch_size: images per batch and process, at least 1.

    Raises:
        TypeError: ``batch_size`` is not an integer.
        ValueError: ``batch_size`` is below 1.

    Example:
        >>> import torch
        >>> import hf_dash
        >>> examples = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 1}]
        >>> hf_dash.runs.HeldOut(examples, label_names=["cat", "dog"]).batch_size
        256
    """

    examples: Examples | MakeExamples
    label_names: Sequence[str] | None = None
    fingerprint: str | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)


def promote(
    output_dir: str | Path,
    challenger: str,
    held_out: HeldOut | Examples | MakeExamples,
    *,
    champion: str | None = None,
    force: bool = False,
    rules: PromotionRules | None = None,
    accelerator: Accelerator | None = None,
) -> Verdict:
    """Compare a challenger with the champion, decide, and record the decision.

    Both predict the same held-out examples; labels are compared by name, so a model may know
    classes that the other does not. Without a champion the challenger becomes the first one, and
    where it is the champion already, nothing is done. The entry goes into ``history.jsonl`` of the
    output directory; while a run is at work there it is refused. Where another model becomes
    champion during the comparison, the challenger is compared again, with that one.

    Args:
        output_dir: of a run, with its ``history.jsonl`` and the models of its rounds.
        challenger: folder of a recorded round below it, such as ``"rounds/003/dash_seed0"``.
        held_out: the examples, or a callable from a model's transform to them; a :class:`HeldOut`
            says more about them.
        champion: folder of the recorded round to compare with; by default the champion in use.
        force: promote in spite of a verdict against it; recorded as forced, with the verdict.
        rules: of the decision; by default those of :class:`~hf_dash.runs.PromotionRules`.
        accelerator: gives devices and processes, all of which must call; by default a new one.

    Raises:
        TypeError: a folder is not given as text.
        ValueError: a folder is not that of a recorded round below the output directory, its model
            is gone or has changed, or it measures otherwise than its record says on the same
            images; challenger and champion are the same; the two models do not read the same
            examples; or a run is at work there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> record = RoundRecord("dash", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> model = hf_dash.create_model("test_resnet", label_names=["a", "b"], image_size=32)
        >>> examples = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}]
        >>> with tempfile.TemporaryDirectory() as run:
        ...     hf_dash.History(Path(run) / "history.jsonl", {}).append(record)
        ...     hf_dash.save_model(model, Path(run) / record.folder)
        ...     hf_dash.promote(run, record.folder, examples).reason
        'first champion'
    """
    rules = rules or PromotionRules()
    shown = held_out if isinstance(held_out, HeldOut) else HeldOut(held_out)
    accelerator = accelerator or Accelerator()
    for _ in range(COMPARISONS):
        history = by_main(partial(read_run, output_dir, wait=WAIT))
        record, folder = _find_round(history, output_dir, "challenger", challenger)
        if champion is None and record.folder == history.champion:
            return Verdict(True, f"the champion already: {history.taken[-1].reason}")
        rival_name = history.champion if champion is None else champion
        rival = _find_rival(history, output_dir, rival_name, record)
        entry, verdict = _compare(record, folder, rival, shown, rules, accelerator)
        if force and not verdict.promote:
            reason = f"forced, in spite of: {verdict.reason}"
            verdict = replace(verdict, promote=True, reason=reason)
            entry = replace(entry, kind="force", reason=reason)
        if by_main(partial(_swap, output_dir, history.champion, entry)):
            return verdict
        logger.warning("another model became champion meanwhile: compared again")
    raise ValueError(
        f"challenger {challenger!r} was compared {COMPARISONS} times, and each time another model"
        " became champion meanwhile"
    )


def _swap(output_dir: str | Path, champion: str | None, entry: Promotion) -> bool:
    """Record a decision where the champion still is the one it was made about."""
    with one_writer(output_dir, wait=WAIT):
        history = read_run(output_dir)
        if history.champion != champion:
            return False
        record_promotion(output_dir, history, entry)
    return True


def rollback(output_dir: str | Path, to: str, *, reason: str = "rolled back") -> Promotion:
    """Make an earlier model the champion again; nothing is compared.

    Where several processes run, one of them must call this.

    Args:
        output_dir: of a run, with its ``history.jsonl`` and the models of its rounds.
        to: folder of a recorded round below it: of an earlier round than the champion's, or of a
            model that was champion before. Others are for :func:`promote`.
        reason: goes into the entry.

    Returns:
        The entry added to the history.

    Raises:
        TypeError: the folder is not given as text.
        ValueError: there is no champion to go back from; the folder is not that of such a round,
            or its model is gone or has changed; or a run is at work there.

    Example:
        >>> import hf_dash
        >>> hf_dash.rollback("no/run", "rounds/001/dash_seed0")
        Traceback (most recent call last):
            ...
        ValueError: output_dir must hold the history.jsonl of a run, got 'no/run'
    """
    with one_writer(output_dir, wait=WAIT):
        history = read_run(output_dir)
        record, _ = _find_round(history, output_dir, "to", to)
        if history.champion is None:
            raise ValueError(f"to is {to!r}, but {output_dir} has no champion to go back from")
        if record.folder == history.champion:
            raise ValueError(f"to must not be the champion itself, got {to!r}")
        rounds = {r.folder: r.round_index for r in history.records}
        taken = {entry.challenger for entry in history.taken}
        if record.folder not in taken and record.round_index >= rounds[history.champion]:
            raise ValueError(
                f"to must be of an earlier round than the champion, {history.champion!r}, or have"
                f" been champion before, got {to!r}; promote it instead"
            )
        entry = Promotion("rollback", record.folder, history.champion, reason, now())
        return record_promotion(output_dir, history, entry)


def _find_round(
    history: History, output_dir: str | Path, argument: str, name: str
) -> tuple[RoundRecord, Path]:
    """Return the record and the folder of a round; refuse all else."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a folder's name, got {name!r}")
    # A trailing slash is the shell's.
    wanted = PurePath(name).as_posix()
    record = next((r for r in history.records if r.folder == wanted), None)
    if record is None:
        known = ", ".join([r.folder for r in history.records][-5:])
        raise ValueError(
            f"{argument} must be the folder of a round recorded in {history.path} (the last are"
            f" {known}), got {name!r}"
        )
    folder = Path(output_dir) / record.folder
    if not folder.resolve().is_relative_to(Path(output_dir).resolve()):
        raise ValueError(f"{argument} must lie below {output_dir}, but {name!r} leads out of it")
    check_kept(history, record, f"be {argument}")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{argument} is {name!r}, but its model is gone")
    check_files(folder, record)
    return record, folder


Rival: TypeAlias = tuple[RoundRecord, Path]


def _find_rival(
    history: History, output_dir: str | Path, champion: str | None, challenger: RoundRecord
) -> Rival | None:
    """Return the record and the folder of the model to compare with; None where there is none."""
    if champion is None:
        return None
    record, folder = _find_round(history, output_dir, "champion", champion)
    if record == challenger:
        raise ValueError(f"challenger must not be the champion itself, got {challenger.folder!r}")
    return record, folder


@dataclass(frozen=True)
class _Predictions:
    """One model's answers to the held-out examples, in labels that both models share."""

    examples: Any
    label_names: list[str]
    predictions: Labels
    references: Labels
    reads: dict[str, Any]

    @property
    def accuracy(self) -> float:
        return float(((self.predictions == self.references) & (self.references >= 0)).mean())

    @property
    def images_fingerprint(self) -> str | None:
        """What records call ``held_out_fingerprint``; None for examples of another kind."""
        if not isinstance(self.examples, ImageExamples):
            return None
        return joint_fingerprint([self.examples])


def _compare(
    record: RoundRecord,
    folder: Path,
    rival: Rival | None,
    held_out: HeldOut,
    rules: PromotionRules,
    accelerator: Accelerator,
) -> tuple[Promotion, Verdict]:
    """Let both models predict; return the verdict and its entry."""
    own = _predict(record, folder, held_out, accelerator, is_first=rival is None)
    verdict = Verdict(True, "first champion")
    if rival is not None:
        shown = replace(held_out, label_names=own.label_names)
        other = _predict(*rival, shown, accelerator, is_first=False)
        _check_same_examples(own, other, callable(held_out.examples))
        comparison = compare_models(
            own.predictions,
            other.predictions,
            own.references,
            label_names=own.label_names,
            confidence=rules.confidence,
        )
        verdict = decide(comparison, rules)
    entry = Promotion(
        kind="promote" if verdict.promote else "reject",
        challenger=record.folder,
        champion=None if rival is None else rival[0].folder,
        reason=verdict.reason,
        time=now(),
        accuracy=own.accuracy,
        comparison=None if verdict.comparison is None else verdict.comparison.to_dict(),
        num_held_out=len(own.references),
        held_out_fingerprint=held_out.fingerprint or own.images_fingerprint or _digest(own),
    )
    return entry, verdict


def _predict(
    record: RoundRecord,
    folder: Path,
    held_out: HeldOut,
    accelerator: Accelerator,
    *,
    is_first: bool,
) -> _Predictions:
    model, shown = load_model(str(folder)), held_out.examples
    examples: Any = shown(image_transform(model)) if callable(shown) else shown
    own_names, label_names = model_labels(model), held_out.label_names
    if label_names is None and isinstance(examples, ImageExamples):
        label_names = examples.dataset.features["label"].names
    names = list(own_names if label_names is None else label_names)
    # Compared with a champion, a model that knows none of the classes is rejected as worse.
    check_shared(own_names, names, "the held-out images", allow_disjoint=not is_first)
    predictions, references = predict(model, examples, accelerator, batch_size=held_out.batch_size)
    # A class of the model that the held-out examples do not have is never right.
    labels = {name: label for label, name in enumerate(names)}
    shared = np.array([labels.get(name, -1) for name in own_names], dtype=np.int64)
    reads = timm.data.resolve_data_config(getattr(model.config, "pretrained_cfg", None) or {})
    read = _Predictions(examples, names, shared[predictions], references, reads)
    measured_on = record.held_out_fingerprint
    same_images = measured_on is not None and measured_on == read.images_fingerprint
    if same_images and abs(read.accuracy - record.accuracy) > APART:
        raise ValueError(
            f"{folder} has an accuracy of {read.accuracy:.2%}, but its record says"
            f" {record.accuracy:.2%} of the same held-out images: it is not the model recorded, or"
            " reads images differently"
        )
    return read


def _check_same_examples(own: _Predictions, other: _Predictions, each_its_way: bool) -> None:
    if not each_its_way and own.reads != other.reads:
        raise ValueError(
            "held_out must be a callable from a transform to the examples, because the models read"
            f" images differently: challenger {own.reads}, champion {other.reads}"
        )
    if not np.array_equal(own.references, other.references):
        raise ValueError("held_out must give both models the same examples in the same order")


def _digest(read: _Predictions) -> str:
    """Return a digest of the label names, and of label and pixels of every example, in order."""
    digest = hashlib.sha256(repr(read.label_names).encode())
    for index, label in enumerate(read.references.tolist()):
        pixels = read.examples[index]["pixel_values"]
        digest.update(f"{label} {tuple(pixels.shape)}".encode())
        digest.update(pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()
