"""The tables of a model card.

Flow: records → what is recorded in them, and "not recorded" or "not measured" where nothing is.
Two accuracies stand side by side only where both are of exactly the same held-out images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_dash.data.names import shown
from hf_dash.history import RoundRecord
from hf_dash.report.markdown import MISSING, Markdown, code_span, markdown_table

NOT_MEASURED, NOT_RECORDED, NOT_GIVEN = "not measured", "not recorded", "none given"

FROM_SCRATCH = "cold"


def parent_of(records: Sequence[RoundRecord]) -> RoundRecord | None:
    """Return the record of the round that the last of a chain of rounds started from, or None."""
    *before, record = records
    if record.parent is None or not before:
        return None
    return {r.folder: r for r in before}.get(record.parent, before[-1])


def from_scratch_of(
    records: Sequence[RoundRecord], rivals: Sequence[RoundRecord]
) -> RoundRecord | None:
    """Return the record of a training from scratch on the last record's data and seed, or None."""
    record = records[-1]
    if record.data_fingerprint is None:
        return None
    key = (FROM_SCRATCH, record.seed, record.round_index, record.data_fingerprint)
    found = (
        r for r in (record, *rivals) if (r.start, r.seed, r.round_index, r.data_fingerprint) == key
    )
    return next(found, None)


def same_held_out(record: RoundRecord, other: RoundRecord) -> bool:
    """Tell whether two records are known to be measured on the same images."""
    fingerprint = record.held_out_fingerprint
    return fingerprint is not None and fingerprint == other.held_out_fingerprint


def lineage_table(records: Sequence[RoundRecord], rivals: Sequence[RoundRecord]) -> Markdown:
    """Return the parent, the model and its rival from scratch, one a column."""
    record = records[-1]
    others = (parent_of(records), from_scratch_of(records, rivals))
    parent, scratch = (_column(other, record) for other in others)
    accuracy, *rest = _column(record, record)
    own = [Markdown(f"**{accuracy}**"), *rest]
    names = [Markdown("**held-out accuracy**"), "start", "round", "images trained on"]
    names += ["optimizer steps", "seconds"]
    rows = list(zip(names, parent, own, scratch, strict=True))
    return markdown_table(["", "parent", "this model", "from scratch"], rows)


def _column(record: RoundRecord | None, model: RoundRecord) -> list[str]:
    if record is None:
        return [NOT_MEASURED, *[MISSING] * 5]
    comparable = record is model or same_held_out(record, model)
    return [
        f"{record.accuracy:.2%}" if comparable else NOT_MEASURED,
        MISSING if record.parent is None else record.start,  # a first round has no start
        str(record.round_index),
        f"{record.num_total:,}",
        f"{record.steps:,}",
        f"{record.seconds:.1f}",
    ]


def per_class_table(records: Sequence[RoundRecord], rivals: Sequence[RoundRecord]) -> Markdown:
    """Return one row per class, with columns of other models measured on the same images."""
    record = records[-1]
    others = {"parent": parent_of(records), "from scratch": from_scratch_of(records, rivals)}
    columns = {"this model": record.per_class_accuracy}
    for name, other in others.items():
        if other is not None and other is not record and same_held_out(record, other):
            columns[name] = other.per_class_accuracy
    rows = [
        [name, *(f"{own[name]:.2%}" if name in own else MISSING for own in columns.values())]
        for name in record.per_class_accuracy
    ]
    return markdown_table(["class", *columns], rows)


def cost_table(records: Sequence[RoundRecord]) -> Markdown:
    """Return the cost of the last round and of all rounds of the chain that are recorded."""
    columns = (records[-1:], records)
    rows = [
        ["images read", *(_total([r.images_read for r in column]) for column in columns)],
        ["optimizer steps", *(f"{sum(r.steps for r in column):,}" for column in columns)],
        ["seconds of the start", *(f"{sum(r.start_seconds for r in c):.2f}" for c in columns)],
        ["seconds of training", *(f"{sum(r.train_seconds for r in c):.1f}" for c in columns)],
        ["hardware", *(_joined([r.hardware for r in column]) for column in columns)],
    ]
    return markdown_table(["", "this round", "all rounds recorded"], rows)


def _total(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known):,}" if len(known) == len(values) else NOT_RECORDED


def _joined(values: Sequence[str | None]) -> str:
    return "; ".join(dict.fromkeys(value or NOT_RECORDED for value in values))


def data_table(
    record: RoundRecord, name: str, revision: str | None, held_out_split: str, num_held_out: int
) -> Markdown:
    """Return what the last round was trained and evaluated on."""
    rows = [
        ["dataset", code_span(name)],
        ["revision", NOT_GIVEN if revision is None else code_span(revision)],
        ["trained on", f"{record.num_total:,} images, {record.num_new:,} of them new"],
        ["their fingerprint", _fingerprint(record.data_fingerprint)],
        ["held out", f"{num_held_out:,} images: {held_out_split}"],
        ["their fingerprint", _fingerprint(record.held_out_fingerprint)],
    ]
    if record.replay:
        rows.append(["of the old images", _replayed(record.replay)])
    if record.files:
        rows.append(["new files", ", ".join(record.files)])
    if record.skipped:
        rows.append(["left out", shown(record.skipped)])
    if record.overlap:
        rows.append(["held out and trained on", f"{record.overlap:,} images, on purpose"])
    return markdown_table(["", "recorded"], rows)


def _replayed(replay: Mapping[str, Any]) -> str:
    drawn, old = replay["num_drawn"], replay["num_old"]
    how = f"{replay['strategy']}, seed {replay['seed']}"
    return f"{drawn:,} of {old:,} replayed ({how}); a start from scratch sees no others either"


def _fingerprint(value: str | None) -> str:
    return NOT_RECORDED if value is None else code_span(value)


def factors_table(record: RoundRecord) -> Markdown:
    """Return one row per shrunk tensor; nothing where there was no shrink."""
    if record.shrink is None:
        return Markdown("")
    header = ["tensor", "vectors", "mean", "min", "max", "at λ"]
    rows = [
        [
            code_span(tensor["name"]),
            str(tensor["num_vectors"]),
            *(f"{tensor[key]:.3f}" for key in ("mean_factor", "min_factor", "max_factor")),
            f"{tensor['share_at_lam']:.1%}",
        ]
        for tensor in record.shrink["tensors"]
    ]
    return markdown_table(header, rows)


def settings_table(settings: dict[str, Any]) -> Markdown:
    """Return one row per setting."""
    return markdown_table(["setting", "value"], [[k, str(v)] for k, v in settings.items()])
