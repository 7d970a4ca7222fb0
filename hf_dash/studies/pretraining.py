"""How long a model may train on part of the data before a warm start from it ends worse.

Flow: half of the data → e epochs → each start → all data, to convergence → the history, with the
same from scratch → a table and a figure.
Source: the pre-training-length experiment of Shin et al. (arXiv:2410.23495), after Ash & Adams
(NeurIPS 2020): a warm start does no harm until the network begins to memorize noise.
Differs: one pre-training is cut into stages, whose ends are the lengths compared, instead of
starting over for each length; what every start remembers is measured before and after it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_dash.data.examples import ImageExamples
from hf_dash.data.rounds import Round
from hf_dash.history import RoundRecord
from hf_dash.report.markdown import Markdown, markdown_table
from hf_dash.report.plots import COLORS, draw_line, save_figure
from hf_dash.report.tables import before_and_after, mean_and_spread
from hf_dash.runs.continual import Run, run_rounds
from hf_dash.starts import Start, cold_, warm_
from hf_dash.utils.checks import check_count

# Names of the records that do not belong to a start: the stages, and training from scratch.
PRETRAINING, SCRATCH = "pretraining", "cold"


def run_pretraining(
    make_model: Callable[[], PreTrainedModel],
    half: Round,
    whole: Round,
    held_out: ImageExamples,
    compared: Mapping[str, Start],
    pretrain_epochs: Sequence[int],
    run: Run,
) -> None:
    """Train on all data from every length of pre-training by every start, and from scratch.

    A call on the same folder continues where an earlier one ended, as ``run_rounds`` does.

    Args:
        make_model: returns the model freshly initialized with ``run.seed``.
        half: the first round: what the model is pre-trained on.
        whole: the second round: old and new examples; map-style.
        held_out: examples never trained on.
        compared: the starts by name; ``"cold"`` and ``"pretraining"`` are taken.
        pretrain_epochs: the lengths to compare, at least 1, rising.
        run: seed, settings and ``output_dir``; its name, parent and limit are set here for each
            training. ``run.training`` is that after the start: pre-training has its own number of
            epochs. ``run.history`` gets a record of ``"cold"``, trained from scratch; for every
            length, with a ``round_index`` that counts them, one of the ``"pretraining"`` stage that
            ends with it; and for every start one with the next ``round_index`` and the stage as
            ``parent``. The stages' weights are kept, and of each start only the newest.

    Raises:
        TypeError: a length is not an integer.
        ValueError: lengths do not rise from at least 1, a start has a name that is taken,
            ``run.output_dir`` is missing, or what ``run_rounds`` refuses.

    Example:
        >>> import hf_dash
        >>> from accelerate import Accelerator
        >>> run = hf_dash.runs.Run("any", 0, hf_dash.History(None, {}), Accelerator(cpu=True))
        >>> hf_dash.studies.run_pretraining(None, None, None, None, {}, [1, 4], run)
        Traceback (most recent call last):
            ...
        ValueError: run must have an output_dir, which keeps the weights of the stages
    """
    _check(compared, pretrain_epochs)
    if run.output_dir is None:
        raise ValueError("run must have an output_dir, which keeps the weights of the stages")

    def train(name: str, start: Start, round_: Round, **changes: Any) -> None:
        # What is recorded is done; the weights of a start's earlier rounds need not be there.
        if run.history.find(name, run.seed, round_.index) is None:
            kept = {"parent": None, "save_total_limit": None}
            own = replace(run, name=name, **{**kept, **changes})
            run_rounds(make_model(), [round_], held_out, start, own)

    train(SCRATCH, cold_, replace(whole, index=1))
    stage: RoundRecord | None = None
    done = 0
    for index, epochs in enumerate(pretrain_epochs, start=1):
        config = replace(run.training, max_epochs=epochs - done, accuracy_threshold=None)
        train(PRETRAINING, warm_, replace(half, index=index), training=config, parent=stage)
        stage, done = run.history.find(PRETRAINING, run.seed, index), epochs
        for name, start in compared.items():
            after = {"parent": stage, "measure_memorization": True, "save_total_limit": 1}
            train(name, start, replace(whole, index=index + 1), **after)


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


def pretraining_table(records: Sequence[RoundRecord]) -> Markdown:
    """Return one row per start and length of pre-training: mean ± sample deviation over seeds.

    The last columns are means of what the model knew right before → right after the start, of the
    labels and of the wrong labels it was pre-trained on; "–" where nothing was measured.

    Raises:
        ValueError: the records are not those of ``run_pretraining``.

    Example:
        >>> import hf_dash
        >>> from dataclasses import replace
        >>> from hf_dash.history import RoundRecord
        >>> cold = RoundRecord("cold", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> stage = replace(cold, start="pretraining", epochs=4)
        >>> dash = replace(cold, start="dash", round_index=2, parent=stage.folder)
        >>> table = hf_dash.studies.pretraining_table([cold, stage, dash])
        >>> [cell.strip() for cell in table.splitlines()[-1].split("|")][1:5]
        ['dash', '4', '1', '50.00 %']
    """
    header = ["start", "epochs before", "seeds", "accuracy, held out", "steps"]
    header += ["old labels known", "wrong labels reproduced"]
    rows = []
    for start, by_length in records_by_length(records).items():
        for epochs, own in by_length.items():
            sides = [record.memorization or {} for record in own]
            cells = [
                mean_and_spread([100 * record.accuracy for record in own], "{:.2f}", " %"),
                mean_and_spread([record.steps for record in own], "{:.0f}"),
                *(before_and_after(sides, name) for name in ("accuracy_old", "flipped_reproduced")),
            ]
            rows.append([start, f"{epochs:g}", str(len(own)), *cells])
    return markdown_table(header, rows)


def plot_pretraining(records: Sequence[RoundRecord], path: str | Path) -> None:
    """Draw what each start makes of ever longer pre-training on the old half of the data.

    Panels: held-out accuracy after training on all data, vs. training from scratch; how many of
    the old half's labels, and of the wrong ones among them where there are any, the model answers
    right before any start and right after each. With several seeds a line is their mean and the
    band around it ± one sample standard deviation.

    Args:
        records: as :func:`~hf_dash.studies.pretraining.run_pretraining` made them.
        path: of the PNG file to write.

    Raises:
        ValueError: they are others.
        ImportError: matplotlib is not installed (``pip install "hf_dash[recipes]"``).

    Example:
        >>> import tempfile
        >>> from dataclasses import replace
        >>> import hf_dash
        >>> from hf_dash.history import RoundRecord
        >>> cold = RoundRecord("cold", 0, 1, 10, 10, 0.5, {}, 1.0, True, 3, 30, 0.5, 2.0)
        >>> stage = replace(cold, start="pretraining", epochs=4)
        >>> dash = replace(cold, start="dash", round_index=2, parent=stage.folder)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_dash.studies.plot_pretraining([cold, stage, dash], f"{folder}/pretraining.png")
    """
    runs = records_by_length(records)
    from matplotlib.figure import Figure

    scratch = runs.pop(SCRATCH)[0]
    titles = {"accuracy_old": "Old labels known", "flipped_reproduced": "Wrong ones reproduced"}
    measures = [name for name in titles if _has(records, name)]
    figure = Figure(figsize=(4 + 3.6 * len(measures), 4), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(measures), squeeze=False)[0]
    lengths = sorted({epochs for by_length in runs.values() for epochs in by_length})
    accuracies = [[100 * record.accuracy for record in scratch]] * len(lengths)
    draw_line(left, 0, f"{SCRATCH}, from scratch", lengths, accuracies, "--")
    for number, (start, by_length) in enumerate(runs.items(), start=1):
        groups = list(by_length.values())
        values = [[100 * record.accuracy for record in group] for group in groups]
        draw_line(left, number, start, list(by_length), values)
        for axes, name in zip(others, measures, strict=True):
            after = [_measured(group, "after", name) for group in groups]
            draw_line(axes, number, start, list(by_length), after)
    for axes, name in zip(others, measures, strict=True):
        # The same for every start. Drawn last: the warm start changes nothing and lies below.
        before = [_measured(group, "before", name) for group in groups]
        draw_line(axes, len(COLORS) - 1, "before any start", list(by_length), before, ":")
        axes.set(title=titles[name], ylabel="right after the start (%)", ylim=(-4, 104))
    left.set(title="Held-out accuracy", ylabel="accuracy, trained on all (%)")
    for axes in (left, *others):
        axes.set_xscale("log")
        axes.set_xticks(lengths, [f"{epochs:g}" for epochs in lengths])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("epochs of pre-training on half")
        axes.grid(alpha=0.3)
    lines = [*left.lines, *(axes.lines[-1] for axes in others[:1])]
    figure.legend(handles=lines, loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _has(records: Sequence[RoundRecord], name: str) -> bool:
    return any(name in side for r in records for side in (r.memorization or {}).values())


def _measured(records: Sequence[RoundRecord], side: str, name: str) -> list[float]:
    return [100 * (record.memorization or {})[side][name] for record in records]
