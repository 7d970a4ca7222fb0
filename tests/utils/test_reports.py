import pytest
from helpers import SHRINK

from hf_dash.utils.reports import check_report

ROW = SHRINK["tensors"][0]


def test_a_whole_report_is_taken():
    check_report(SHRINK)
    check_report({**SHRINK, "tensors": [], "more": "later versions"})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tensors": None}, ValueError, "must be a ShrinkReport"),
        ({"config": []}, ValueError, "must be a ShrinkReport"),
        ({"tensors": [3]}, ValueError, "must name every tensor, got 3"),
        ({"tensors": [{"name": 3}]}, ValueError, "must name every tensor"),
        ({"tensors": [{"name": "a"}]}, ValueError, r"\['num_vectors', .*\] of tensor 'a'"),
        ({"mean_factor": "0.4"}, TypeError, "shrink's mean_factor must be a number"),
        ({"seconds": float("nan")}, ValueError, r"seconds must be in \(-inf, inf\), got nan"),
        ({"tensors": [{**ROW, "min_factor": None}]}, TypeError, "min_factor of 'conv.weight'"),
    ],
)
def test_a_damaged_report_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        check_report({**SHRINK, **changes})


@pytest.mark.parametrize("name", ["config", "tensors", "num_batches", "num_images"])
def test_a_missing_part_is_named(name):
    shrink = {key: value for key, value in SHRINK.items() if key != name}
    with pytest.raises(ValueError, match=rf"it lacks \['{name}'\]"):
        check_report(shrink)
