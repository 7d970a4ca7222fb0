"""A shrink's report on its way out: the numbers of each block, histograms, the file, the tags.

Flow: ShrinkReport → overall and per block → the Trainer's next log → all of ``report_to``;
→ ``dash_report.json``; → tags that the Trainer writes into a model card when it pushes.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dash.method.shrink import HISTOGRAM_BINS, ShrinkReport, TensorReport
from hf_dash.method.wrappers import base_name
from hf_dash.utils.distributed import is_main_process
from hf_dash.utils.files import write_text
from hf_dash.utils.reports import REPORT_NAME

MODEL_TAGS = ["hf_dash", "dash"]


class DeferredLog(TrainerCallback):
    """A callback bound to no Trainer: its numbers appear with the next the Trainer itself logs.

    ``Trainer.log`` is out of its reach, and reporting callbacks run before it.
    """

    def __init__(self) -> None:
        self._to_log: dict[str, float] = {}
        self._in_history = False

    def log_later(
        self, numbers: dict[str, float], state: TrainerState | None = None, **where: float | None
    ) -> None:
        """Keep numbers for the Trainer's next log.

        Args:
            numbers: to be logged.
            state: where an entry of the history of their own is made at once; without it they join
                the entry of that next log.
            where: what else that entry holds.
        """
        self._to_log = {**self._to_log, **numbers}
        self._in_history = state is not None
        if state is not None:
            entry: dict[str, Any] = {**numbers, **where, "step": state.global_step}
            state.log_history.append(entry)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the numbers with the first ones the Trainer itself logs."""
        if logs is None or not self._to_log:
            return
        logs.update(self._to_log)
        if state.log_history and not self._in_history:
            state.log_history[-1].update(self._to_log)
        self._to_log = {}


def report_blocks(
    report: ShrinkReport, model: nn.Module | None = None
) -> dict[str, list[TensorReport]]:
    """Part a report's tensors into the blocks of their model, in its order.

    A block is named by a parameter's path down to its first part with a digit in it, or by its
    first part alone if no part has one: ``layer1``, ``blocks.0``, ``encoder.layer.3``, ``fc``.

    Args:
        report: of a shrink of ``model``.
        model: where it is given, the prefix of its backbone (``timm_model``, ``vit``) is left out.
    """
    prefix = getattr(model, "base_model_prefix", "")
    blocks: dict[str, list[TensorReport]] = {}
    for tensor in report.tensors:
        path = base_name(tensor.name).removeprefix(f"{prefix}.").split(".")
        modules = path[:-1] or path
        numbered = (i for i, part in enumerate(modules, 1) if any(c.isdigit() for c in part))
        name = ".".join(modules[: next(numbered, 1)])
        blocks.setdefault(name, []).append(tensor)
    return blocks


def block_summary(report: ShrinkReport, model: nn.Module | None = None) -> dict[str, float]:
    """Return mean factor and share at λ of every block, under names like ``dash/mean_factor/fc``.

    Args:
        report, model: as :func:`report_blocks` takes them.
    """
    summary = {}
    for name, tensors in report_blocks(report, model).items():
        count = sum(tensor.num_vectors for tensor in tensors)
        means = sum(tensor.mean_factor * tensor.num_vectors for tensor in tensors)
        at_lam = sum(tensor.share_at_lam * tensor.num_vectors for tensor in tensors)
        summary[f"dash/mean_factor/{name}"] = means / count
        summary[f"dash/share_at_lam/{name}"] = at_lam / count
    return summary


def draw_histograms(trainer: Trainer, report: ShrinkReport, model: nn.Module) -> None:
    """Draw the factors of a shrink in TensorBoard, where its callback is among the Trainer's."""
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is None or not hasattr(writer, "add_histogram_raw"):
            continue
        blocks = {"": list(report.tensors)}
        blocks |= {f"/{name}": held for name, held in report_blocks(report, model).items()}
        for name, tensors in blocks.items():
            _add_histogram(writer, f"dash/factors{name}", tensors, trainer.state.global_step)


def _add_histogram(writer: object, tag: str, tensors: list[TensorReport], step: int) -> None:
    counts = [sum(column) for column in zip(*(t.histogram for t in tensors), strict=True)]
    if not counts:
        return
    centers = [(index + 0.5) / HISTOGRAM_BINS for index in range(HISTOGRAM_BINS)]
    writer.add_histogram_raw(  # type: ignore[attr-defined]
        tag,
        min=min(tensor.min_factor for tensor in tensors),
        max=max(tensor.max_factor for tensor in tensors),
        num=sum(counts),
        sum=sum(tensor.mean_factor * tensor.num_vectors for tensor in tensors),
        # Known up to the width of a bin only; TensorBoard does not show it.
        sum_squares=sum(n * center**2 for n, center in zip(counts, centers, strict=True)),
        bucket_limits=[(index + 1) / HISTOGRAM_BINS for index in range(HISTOGRAM_BINS)],
        bucket_counts=counts,
        global_step=step,
    )


def write_report(report: ShrinkReport, folder: str | Path, state: TrainerState) -> None:
    """Write ``dash_report.json`` into a folder, by the main process."""
    # Under DeepSpeed on the CPU each process of a Trainer takes itself for the first one.
    if state.is_world_process_zero and is_main_process():
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder) / REPORT_NAME, json.dumps(report.to_dict(), indent=1))


def tag_model(model: nn.Module) -> None:
    """Give a transformers model the tags that ``Trainer.push_to_hub`` writes into its card."""
    add = getattr(model, "add_model_tags", None)
    if callable(add):
        add(MODEL_TAGS)
