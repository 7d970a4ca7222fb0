import pytest
from helpers import record

from hf_dash.report.card_tables import (
    cost_table,
    data_table,
    factors_table,
    from_scratch_of,
    lineage_table,
    parent_of,
    per_class_table,
    same_held_out,
    settings_table,
)

MEASURED = {"data_fingerprint": "trained", "held_out_fingerprint": "frozen"}


FIRST = record("dash", accuracy=0.75, images_read=30, held_out_fingerprint="frozen")


SECOND = record("dash", 0, 2, accuracy=0.875, parent=FIRST.folder, images_read=60, **MEASURED)


COLD = record("cold", 0, 2, accuracy=0.5, parent="rounds/001/cold_seed0", **MEASURED)


def rows_of(table):
    """Return the cells of every line but the header and its rule, by the first one."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in lines[2:]}


def test_the_parent_is_found_by_its_folder_and_else_is_the_round_before():
    branch = record("warm", 0, 1)
    assert parent_of([FIRST, branch, SECOND]) is FIRST
    elsewhere = record("dash", 0, 2, parent="user/model@1234")
    assert parent_of([FIRST, elsewhere]) is FIRST
    assert parent_of([SECOND]) is None
    assert parent_of([FIRST, record("dash", 0, 2)]) is None


def test_from_scratch_is_the_same_data_seed_and_round():
    others = [record("cold", 1, 2, **MEASURED), record("cold", 0, 3, **MEASURED)]
    others += [record("cold", 0, 2, data_fingerprint="other"), record("warm", 0, 2, **MEASURED)]
    assert from_scratch_of([SECOND], [*others, COLD]) is COLD
    assert from_scratch_of([SECOND], others) is None
    assert from_scratch_of([COLD], []) is COLD
    # Nothing is known of data without a fingerprint, not even that two of them are the same.
    assert from_scratch_of([record("dash", 0, 2)], [record("cold", 0, 2)]) is None


def test_what_is_replayed_is_told():
    replay = {"strategy": "recency", "seed": 3, "num_drawn": 500, "num_old": 12000}
    rows = rows_of(data_table(record(replay=replay), "digits", None, "test", 360))
    (told,) = rows["of the old images"]
    assert told.startswith("500 of 12,000 replayed (recency, seed 3)")
    assert "of the old images" not in rows_of(data_table(record(), "digits", None, "test", 360))


def test_held_out_images_are_the_same_by_their_fingerprint_alone():
    assert same_held_out(FIRST, SECOND)
    assert not same_held_out(FIRST, record(held_out_fingerprint="other"))
    assert not same_held_out(record(), record())


def test_accuracies_stand_side_by_side_only_on_the_same_images():
    rows = rows_of(lineage_table([FIRST, SECOND], [COLD]))
    assert rows["**held-out accuracy**"] == ["75.00%", "**87.50%**", "50.00%"]
    assert rows["start"] == ["–", "dash", "cold"]
    other = record("dash", accuracy=0.75, held_out_fingerprint="other")
    rows = rows_of(lineage_table([other, SECOND], []))
    assert rows["**held-out accuracy**"] == ["not measured", "**87.50%**", "not measured"]
    assert rows["seconds"] == ["2.5", "2.5", "–"]


def test_classes_of_comparable_models_are_columns():
    header = per_class_table([FIRST, SECOND], [COLD]).splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        *("class", "this model", "parent", "from scratch"),
    ]
    other = record("dash", held_out_fingerprint="other")
    assert rows_of(per_class_table([other, SECOND], [])) == {"a": ["40.00%"], "b": ["60.00%"]}


def test_costs_are_of_the_last_round_and_of_all():
    rows = rows_of(cost_table([FIRST, SECOND]))
    assert rows["images read"] == ["60", "90"]
    assert rows["optimizer steps"] == ["30", "60"]
    assert rows_of(cost_table([record(), SECOND]))["images read"] == ["60", "not recorded"]


def test_data_are_those_recorded_and_what_is_not_says_so():
    rows = rows_of(data_table(record(files=["a_b.parquet"]), "user/images", None, "test", 1234))
    assert rows["dataset"] == ["`user/images`"]
    assert rows["revision"] == ["none given"]
    assert rows["held out"] == ["1,234 images: test"]
    assert rows["their fingerprint"] == ["not recorded"]
    assert rows["new files"] == ["a_b.parquet"]
    assert "left out" not in rows


def test_factors_are_those_of_every_tensor():
    assert factors_table(SECOND) == ""
    tensor = {"name": "fc.weight", "num_vectors": 4, "mean_factor": 0.5, "min_factor": 0.25}
    tensor |= {"max_factor": 1.0, "share_at_lam": 0.25}
    rows = rows_of(factors_table(record(shrink={"tensors": [tensor]})))
    assert rows == {"`fc.weight`": ["4", "0.500", "0.250", "1.000", "25.0%"]}


@pytest.mark.parametrize("value", [0.05, None, [1, 2], "a|b"])
def test_settings_are_shown_as_they_are(value):
    ((shown,),) = rows_of(settings_table({"learning_rate": str(value).replace("|", "")})).values()
    assert shown.replace("\\", "") == str(value).replace("|", "")
