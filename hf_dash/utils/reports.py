"""The report of a shrink as plain JSON: what tables, figures and cards read of it.

Flow: ``ShrinkReport.to_dict()``, from a file that anybody may have written → checked once → read
without a question.
"""

import math
from collections.abc import Mapping
from typing import Any

from hf_dash.utils.checks import check_number

REPORT_NAME = "dash_report.json"

OVERALL = ("num_batches", "num_images", "seconds", "mean_factor")

OF_A_TENSOR = ("num_vectors", "mean_factor", "min_factor", "max_factor", "share_at_lam")


def summary_of(shrink: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of a shrink without what it lists by tensor."""
    return {name: value for name, value in shrink.items() if not isinstance(value, list)}


def check_report(shrink: Mapping[str, Any], *, summary: bool = False) -> None:
    """Check the report of a shrink.

    Args:
        shrink: the report.
        summary: it may lack its tensors, as :func:`summary_of` returns it.

    Raises:
        TypeError: a number is of another kind.
        ValueError: a part of it is missing, or a number is not finite.
    """
    rows = shrink.get("tensors", [] if summary else None)
    missing = {"config", *OVERALL, *(() if summary else ("tensors",))} - shrink.keys()
    if missing or not isinstance(rows, list) or not isinstance(shrink["config"], dict):
        raise ValueError(f"shrink must be a ShrinkReport.to_dict(), it lacks {sorted(missing)}")
    numbers = {name: shrink[name] for name in OVERALL}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise ValueError(f"shrink must name every tensor, got {row!r}")
        absent = [name for name in OF_A_TENSOR if name not in row]
        if absent:
            raise ValueError(f"shrink must have {absent} of tensor {row['name']!r}")
        numbers |= {f"{name} of {row['name']!r}": row[name] for name in OF_A_TENSOR}
    for name, number in numbers.items():
        check_number(f"shrink's {name}", number, "(-inf, inf)", -math.inf, math.inf)
