import pytest
import torch
from datasets import ClassLabel

import hf_dash
from hf_dash import RoundData


def renamed(digits, names, rows):
    """Some digits whose labels are stored in another order, the same names."""
    part = digits.select(rows)
    feature = ClassLabel(names=names)
    labels = [feature.str2int(digits.features["label"].int2str(v)) for v in part["label"]]
    return part.remove_columns("label").add_column("label", labels).cast_column("label", feature)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_are_matched_by_name(digits, small_model, streaming):
    names = [str(digit) for digit in reversed(range(10))]
    parts = [digits.select(range(20)), renamed(digits, names, range(20, 50))]
    wanted = sorted(digits.select(range(50))["label"])
    if streaming:
        parts = [part.to_iterable_dataset() for part in parts]
    data = RoundData(tuple(parts), (), "test")
    assert data.label_names == [str(digit) for digit in range(10)]
    round_ = data.make_round(3, small_model, hf_dash.image_transform(small_model))
    assert (round_.index, round_.num_new, round_.num_total) == (3, 30, 50)
    batches = hf_dash.gradient_batches(round_, hf_dash.DashConfig())
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == wanted


def test_held_out_parts_are_joined(digits, small_model):
    names = [str(digit) for digit in reversed(range(10))]
    parts = (digits.select(range(5)), renamed(digits, names, range(5, 9)))
    held_out = RoundData((), parts, "test").held_out_examples(
        small_model, hf_dash.image_transform(small_model)
    )
    labels = sorted(held_out[index]["labels"] for index in range(len(held_out)))
    assert labels == sorted(digits.select(range(9))["label"])


def test_a_class_nobody_trained_is_refused(digits, small_model):
    names = [*(str(digit) for digit in range(10)), "ten"]
    odd = renamed(digits, names, range(3))
    with pytest.raises(ValueError, match=r"labels \['ten'\] are known neither"):
        RoundData((), (odd,), "test").held_out_examples(small_model, lambda image: image)


def test_a_stream_sorted_by_class_arrives_mixed(digits, small_model):
    by_class = sorted(range(len(digits)), key=digits["label"][:].__getitem__)
    stream = digits.select(by_class).to_iterable_dataset(num_shards=4)
    data = RoundData((stream,), (), "test")
    round_ = data.make_round(1, small_model, hf_dash.image_transform(small_model))
    rows = [label for _, label in round_.streams[0].rows()]
    assert sorted(rows) == sorted(digits["label"])
    assert len(set(rows[:40])) == 10
    # What is skipped to is what would have followed.
    assert [label for _, label in round_.streams[0].rows(1000)] == rows[1000:]
