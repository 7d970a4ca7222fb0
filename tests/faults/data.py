"""Faults of the images, and of the settings that name them."""

import shutil

import datasets

from faults.table import cut, empty, fault, remove, text, to

AREA = "images"


def arriving(world):
    return world.arriving


def seen(world):
    return world.seen


def held_out(world):
    return world.held_out


def table_of(path):
    return datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent.parent / "cache"))


def with_rows(change):
    """Change the rows of a Parquet file; images stay bytes."""

    def write(path):
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(change(table), path)

    return write


def corrupt_image(table):
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:30]
    return as_table(rows, table)


def as_table(rows, table):
    import pyarrow

    return pyarrow.Table.from_pylist(rows, schema=table.schema)


def no_label(table):
    return table.drop_columns(["label"])


def label_out_of_range(table):
    rows = table.to_pylist()
    rows[3]["label"] = 99
    return as_table(rows, table)


def missing_label(table):
    rows = table.to_pylist()
    rows[3]["label"] = None
    return as_table(rows, table)


def one_row_less(table):
    return table.slice(1)


def no_rows(table):
    return table.slice(0, 0)


def seen_copied(world):
    """The held-out file is the one that was trained on."""
    shutil.copyfile(world.seen, world.held_out)


for told, change, outcomes, says in (
    ("a new shard is cut in the middle", cut, "RR--", "tuesday"),
    ("a new shard is empty", empty, "RR--", "tuesday"),
    ("a new shard is of another kind of file", text("no parquet"), "RR--", "tuesday"),
    ("a new shard has no rows", with_rows(no_rows), "-R--", "tuesday|no "),
    ("a new shard has no labels", with_rows(no_label), "RR--", "label"),
    ("a label is out of range", with_rows(label_out_of_range), "RR--", "label|tuesday"),
    ("a label is missing", with_rows(missing_label), "RR--", "label"),
    ("a new image is corrupt", with_rows(corrupt_image), "RR--", "tuesday"),
):
    fault(AREA, told, outcomes, says, damage=to(arriving, change))
for told, change, outcomes, says in (
    ("an old shard has changed", with_rows(one_row_less), "R---", "changed"),
    ("an old shard is gone", remove, "RR--", "monday|disappeared"),
):
    fault(AREA, told, outcomes, says, damage=to(seen, change))
for told, change, says in (
    ("the held-out file is gone", remove, "held_out"),
    ("the held-out file is cut", cut, "held_out"),
    ("a held-out image is corrupt", with_rows(corrupt_image), "held_out|held-out"),
    ("no held-out image", with_rows(no_rows), "held_out|held-out|no "),
    ("held-out images have no labels", with_rows(no_label), "label"),
):
    fault(AREA, told, "RRR-", says, damage=to(held_out, change))
fault(AREA, "held-out images are trained on", "RR--", "overlap|held-out", damage=seen_copied)

SETTINGS = "settings"
for told, flags, outcomes, says in (
    ("λ above 1", ("--lam", "1.5"), "RR--", "lam"),
    ("α of 0", ("--alpha", "0"), "RR--", "alpha"),
    ("an unknown grouping", ("--grouping", "row"), "RR--", "grouping"),
    ("a batch of 0 images", ("--gradient_batch_size", "0"), "RR--", "gradient_batch_size"),
    ("a confidence of 2", ("--confidence", "2"), "--R-", "confidence"),
    ("a challenger outside", ("--challenger", "../elsewhere"), "--R-", "challenger"),
    ("an unrecorded challenger", ("--challenger", "rounds/009/x"), "--R-", "challenger"),
    ("an unknown dataset", ("--dataset_name", "no_such"), "RR=-", "no_such"),
    ("a repository's name that is none", ("--hub_model_id", "a/b/c"), "RRRR", "hub_model_id"),
    ("a token of two words", ("--hub_token", "hf a"), "RRRR", "token"),
    ("a branch that is a round's tag", ("--hub_revision", "round-009"), "R-RR", "hub_revision"),
):
    fault(SETTINGS, told, outcomes, says, flags=flags)
fault(
    SETTINGS,
    "others that change the result",
    "R---",
    r"train_batch_size was 8, is 4",
    flags=("--train_batch_size", "4"),
)
fault(
    SETTINGS,
    "others that change nothing",
    "==--",
    flags=("--on_bad_example", "skip"),
    but=("history.json", "history.jsonl", "recommendation.json"),
)
