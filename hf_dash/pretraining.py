"""How long a model may train on part of the data before a warm start from it ends worse.

Flow: half of the data → e epochs → each start → all data, to convergence → the ledger; beside it
the same from scratch.
Source: the pre-training-length experiment of Shin et al. (arXiv:2410.23495), after Ash & Adams
(NeurIPS 2020): a warm start does no harm until the network begins to memorise noise.
Differs: one pre-training is cut into stages, whose ends are the lengths compared, instead of
beginning anew for each length; what every start remembers is measured before and after it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from hf_dash.config import DashConfig, StartsConfig, check_count
from hf_dash.continual import run_rounds
from hf_dash.examples import ImageExamples
from hf_dash.history import History, RoundRecord
from hf_dash.rounds import Round
from hf_dash.starts import Start, cold_, warm_
from hf_dash.training_config import TrainingConfig

# Names of the records that are no start's: the stages, and training on all data from scratch.
PRETRAINING, SCRATCH = "pretraining", "cold"


def run_pretraining(
    make_model: Callable[[], PreTrainedModel],
    half: Round,
    whole: Round,
    held_out: ImageExamples,
    compared: Mapping[str, Start],
    pretrain_epochs: Sequence[int],
    *,
    seed: int,
    history: History,
    accelerator: Accelerator,
    training: TrainingConfig,
    output_dir: str | Path,
    dash: DashConfig | None = None,
    starts: StartsConfig | None = None,
) -> None:
    """Train on all data from every length of pre-training by every start, and from scratch.

    A call on the same folder goes on where an earlier one ended, as ``run_rounds`` does.

    Args:
        make_model: returns the model freshly initialised with ``seed``.
        half: the first round: what the model is pre-trained on.
        whole: the second round: old and new examples; map-style.
        held_out: examples never trained on.
        compared: the starts by name; ``"cold"`` and ``"pretraining"`` are taken.
        pretrain_epochs: the lengths to compare, at least 1, rising.
        seed: of the run; see ``run_rounds``.
        history: gets a record of ``"cold"``, trained from scratch; for every length, with a
            ``round_index`` that counts them, one of the ``"pretraining"`` stage that ends with it;
            and for every start one with the next ``round_index`` and the stage as ``parent``.
        accelerator: gives devices, processes and precision.
        training: of what follows the start; pre-training has its own number of epochs.
        output_dir: keeps the stages' weights; of a start's only the newest.
        dash: settings of the gradient pass.
        starts: settings of the other starts.

    Raises:
        TypeError: a length is no integer.
        ValueError: lengths do not rise from at least 1, a start has a name that is taken, or what
            ``run_rounds`` refuses.
    """
    _check(compared, pretrain_epochs)
    shared: dict[str, Any] = {
        "seed": seed,
        "history": history,
        "accelerator": accelerator,
        "output_dir": output_dir,
        "dash": dash,
        "starts": starts,
    }

    def train(name: str, start: Start, round_: Round, config: TrainingConfig, **more: Any) -> None:
        # What is recorded is done; the weights of a start's earlier rounds need not be there.
        if history.find(name, seed, round_.index) is None:
            more = {**shared, **more, "training": config}
            run_rounds(make_model(), [round_], held_out, start, name=name, **more)

    train(SCRATCH, cold_, replace(whole, index=1), training)
    stage: RoundRecord | None = None
    done = 0
    for index, epochs in enumerate(pretrain_epochs, start=1):
        config = replace(training, max_epochs=epochs - done, accuracy_threshold=None)
        train(PRETRAINING, warm_, replace(half, index=index), config, parent=stage)
        stage, done = history.find(PRETRAINING, seed, index), epochs
        for name, start in compared.items():
            after = {"parent": stage, "measure_memorisation": True, "save_total_limit": 1}
            train(name, start, replace(whole, index=index + 1), training, **after)


def pretrained_epochs(record: RoundRecord, records: Sequence[RoundRecord]) -> float:
    """Return the epochs behind the weights a round started from: 0 where they were fresh.

    Args:
        record: of the round.
        records: of the run, its parents among them.

    Raises:
        ValueError: a parent is not among the records.
    """
    by_folder = {one.folder: one for one in records}
    epochs = 0.0
    while record.parent is not None:
        if record.parent not in by_folder:
            raise ValueError(f"records must hold the parent {record.parent!r}, but do not")
        record = by_folder[record.parent]
        epochs += record.epochs
    return epochs


def records_by_length(
    records: Sequence[RoundRecord],
) -> dict[str, dict[float, list[RoundRecord]]]:
    """Return by start, and by the epochs behind its weights, rising, the records of all seeds.

    Args:
        records: as :func:`run_pretraining` made them; its stages are left out.

    Raises:
        ValueError: no start came after a pre-training, or there is none from scratch.
    """
    found: dict[str, dict[float, list[RoundRecord]]] = {}
    for record in records:
        if record.start != PRETRAINING:
            lengths = found.setdefault(record.start, {})
            lengths.setdefault(pretrained_epochs(record, records), []).append(record)
    from_fresh_weights = [start for start, lengths in found.items() if 0 in lengths]
    if from_fresh_weights != [SCRATCH] or len(found) < 2 or len(found[SCRATCH]) > 1:
        raise ValueError(
            f"records must be of run_pretraining, with {SCRATCH!r} from scratch and another start,"
            f" got {list(found)}"
        )
    return {start: dict(sorted(lengths.items())) for start, lengths in found.items()}


def _check(compared: Mapping[str, Start], pretrain_epochs: Sequence[int]) -> None:
    for name in compared:
        if name in (PRETRAINING, SCRATCH):
            raise ValueError(f"compared must not be named {name!r}, which is recorded anyway")
    for epochs in pretrain_epochs:
        check_count("pretrain_epochs", epochs)
    if list(pretrain_epochs) != sorted(set(pretrain_epochs)) or not pretrain_epochs:
        raise ValueError(
            f"pretrain_epochs must be rising numbers of epochs, got {list(pretrain_epochs)}"
        )
