import pytest

from hf_dash.data.order import cut_arrivals, first_examples, in_arrival_order


def test_ids_that_are_there_stay(digits):
    ids = [100 + index for index in range(20)]
    numbered = digits.select(range(20)).add_column("example_id", ids)
    arrived = in_arrival_order(numbered, seed=0)
    assert sorted(arrived["example_id"]) == ids
    assert arrived["example_id"][:] != ids
    streamed = in_arrival_order(numbered.to_iterable_dataset(), seed=0)
    assert streamed["example_id"][:] == arrived["example_id"][:]


def test_parts_are_equal_but_for_one(digits):
    parts = cut_arrivals(digits.select(range(11)), 3)
    assert [len(part) for part in parts] == [4, 4, 3]
    assert [label for part in parts for label in part["label"]] == digits[:11]["label"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_examples_are_drawn_and_always_the_same(digits, streaming):
    source = digits.to_iterable_dataset() if streaming else digits
    one, two = ([row["label"] for row in first_examples(source, 60)] for _ in range(2))
    assert one == two
    assert len(one) == 60
    assert one != digits[:60]["label"]
    assert first_examples(source, None) is source
