"""What a run leaves for people: tables, figures, and a model with its card.

Flow: a ledger → Markdown tables and PNG figures; a model and its own records → a folder to share.
Everything is made from what was recorded, so it can be made again without training.
"""

from pathlib import Path

from transformers import PreTrainedModel

from hf_dash.arrivals import DataConfig
from hf_dash.card import CardInfo, write_card
from hf_dash.history import History, write_history
from hf_dash.models import save_model
from hf_dash.plots import plot_factors, plot_rounds
from hf_dash.tables import memorisation_table, rounds_table, starts_table


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
    """
    records, folder = history.records, Path(folder)
    plot_rounds(records, folder / "rounds.png")
    shrunk = [record for record in records if record.shrink is not None]
    if shrunk:
        plot_factors(shrunk[-1], folder / "factors.png")
    tables = [rounds_table(records), starts_table(records)]
    if any(record.memorisation is not None for record in records):
        tables.append(memorisation_table(records))
    return "\n\n".join(tables)


def export_model(
    model: PreTrainedModel,
    folder: str | Path,
    history: History,
    start: str,
    seed: int,
    data: DataConfig,
    num_held_out: int,
) -> None:
    """Save a model with the card and the ledger of its own rounds.

    Args:
        model: a timm wrapper, trained on the last recorded round of this start and seed.
        folder: where everything goes; other files in it stay.
        history: of the run.
        start: whose model it is.
        seed: of its run.
        data: where the images came from.
        num_held_out: number of held-out examples the records' accuracies are of.

    Raises:
        ValueError: nothing is recorded of this start and seed.
    """
    folder, own = Path(folder), history.select(start=start, seed=seed)
    if not own:
        raise ValueError(f"history has no record of start {start!r} and seed {seed!r}")
    settings = {**history.settings, "hardware": own[-1].hardware}
    settings.pop("output_dir", None)  # somebody's own folders are nobody else's business
    save_model(model, folder)
    write_history(folder / "history.json", settings, own)
    plot_rounds(own, folder / "rounds.png")
    info = CardInfo(
        model_name=f"{model.config.architecture} on {Path(data.dataset_name).name}",
        records=own,
        settings=settings,
        dataset_name=data.dataset_name,
        held_out_split=data.test_split,
        num_held_out=num_held_out,
        dataset_revision=data.dataset_revision,
        parent="the model of the round before" if len(own) > 1 else None,
        figure="rounds.png",
    )
    write_card(folder, model, info)
