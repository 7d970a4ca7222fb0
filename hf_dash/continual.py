"""One strategy through all rounds: start, train, evaluate, record.

Flow: a fresh model → for every round: start (from the second on) → training to convergence →
held-out accuracy → one record in the history.
Source: the protocol of Shin et al. (arXiv:2410.23495, section 2) and Ash & Adams (2020).
"""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel

from hf_dash.config import DashConfig
from hf_dash.evaluation import evaluate_model
from hf_dash.history import History, RoundRecord
from hf_dash.rounds import Round, train_batches
from hf_dash.starts import Start, StartContext
from hf_dash.training import TrainingConfig, train_round


def run_rounds(
    model: PreTrainedModel,
    rounds: Iterable[Round],
    held_out: "TorchDataset[dict[str, Any]]",
    start: Start,
    *,
    name: str,
    seed: int,
    history: History,
    accelerator: Accelerator,
    dash: DashConfig | None = None,
    training: TrainingConfig | None = None,
) -> PreTrainedModel:
    """Take a model through all rounds in place.

    Args:
        model: freshly initialised; the first round trains it as it is.
        rounds: in order.
        held_out: examples never trained on.
        start: called before every round but the first.
        name: of the start, for the history.
        seed: of the run; the data order and the start of every round derive from it.
        history: gets one record per round; written by the main process only.
        accelerator: gives devices, processes and precision.
        dash: settings of the gradient pass.
        training: settings of the training.

    Returns:
        The same model, trained on the last round.
    """
    dash = dash or DashConfig()
    training = training or TrainingConfig()
    model.to(accelerator.device)
    for round_ in rounds:
        round_seed = seed_of_round(seed, round_.index)
        set_seed(round_seed)
        report, start_seconds = None, 0.0
        if round_.index > 1:
            started = time.perf_counter()
            started_ = start(
                model, StartContext(round_, round_seed, seed, dash, accelerator=accelerator)
            )
            report = None if started_ is None else started_.report
            start_seconds = time.perf_counter() - started
        batches = train_batches(round_, training.train_batch_size, seed=round_seed)
        result = train_round(
            model, batches, training, accelerator, description=f"{name} round {round_.index}"
        )
        metrics = evaluate_model(model, held_out, accelerator)
        per_class = {
            str(model.config.id2label[label]): accuracy
            for label, accuracy in metrics["per_class_accuracy"].items()
        }
        history.append(
            RoundRecord(
                start=name,
                seed=seed,
                round_index=round_.index,
                num_new=len(round_.new),
                num_total=len(round_.examples),
                accuracy=metrics["accuracy"],
                per_class_accuracy=per_class,
                train_accuracy=result.train_accuracy,
                converged=result.converged,
                epochs=result.epochs,
                steps=result.steps,
                start_seconds=start_seconds,
                train_seconds=result.seconds,
                shrink=None if report is None else report.to_dict(),
            )
        )
    return model


def seed_of_round(seed: int, round_index: int) -> int:
    """Return a seed of its own for every run and round, the same on every process."""
    return int(np.random.SeedSequence([seed, round_index]).generate_state(1)[0])
