import pytest
from helpers import SHRINK, record

from hf_dash.entries import Dropped, Promotion, check_entry, starts_of


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"accuracy": 97.5}, ValueError, r"accuracy must be in \[0, 1\], got 97.5"),
        ({"accuracy": float("nan")}, TypeError, "accuracy must be float, got nan"),
        ({"accuracy": "high"}, TypeError, "accuracy must be float, got 'high'"),
        ({"accuracy": True}, TypeError, "accuracy must be float, got True"),
        ({"converged": 1}, TypeError, "converged must be .*, got 1"),
        ({"round_index": 0}, ValueError, r"round_index must be in \[1, inf\], got 0"),
        ({"seed": 0.5}, TypeError, "seed must be int, got 0.5"),
        ({"steps": -1}, ValueError, r"steps must be in \[0, inf\], got -1"),
        ({"start": "../x"}, ValueError, r"start must be part of a folder's name: .*'\.\./x'"),
        ({"weights_sha256": "x"}, ValueError, "SHA-256 of weights_sha256 must be .*, got 'x'"),
        ({"file_sha256": {"a": "x"}}, ValueError, "SHA-256 of a must be 64 .*, got 'x'"),
        (
            {"per_class_accuracy": {"cat": 1.5}},
            ValueError,
            r"accuracy of 'cat' must be .*, got 1.5",
        ),
        (
            {"per_class_accuracy": {"cat": float("inf")}},
            TypeError,
            "per_class_accuracy must be dict",
        ),
        ({"files": ["a", 1]}, TypeError, r"files must be .*, got \['a', 1\]"),
        ({"shrink": {"config": {}}}, ValueError, "shrink must be a ShrinkReport"),
    ],
)
def test_a_field_of_another_kind_or_out_of_range_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        check_entry(record(**changes))


def test_whole_entries_pass():
    check_entry(record(shrink=SHRINK, train_accuracy=None, files=["a"], epochs=3))
    check_entry(Promotion("reject", "b", "a", "worse", "", 0.5, {"overall": {}}, 4, "f"))
    check_entry(Dropped(["rounds/001/warm_seed0", "rounds/1000/dash+lam=0.1_seed12"], 3, ""))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(ValueError, match=f"limit must be at least 1, got {limit}"):
        check_entry(Dropped([], limit, ""))


def test_starts_come_in_the_order_of_their_records():
    records = [record("warm"), record("cold"), record("warm", round_index=2)]
    assert starts_of(records) == ["warm", "cold"]
