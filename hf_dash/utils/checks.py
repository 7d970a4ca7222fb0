"""Checks of arguments: the error names the argument, its value, and what is allowed."""

from numbers import Real


def check_number(name: str, value: object, allowed: str, low: float, high: float) -> float:
    """Return an argument as a float; refuse what is no number or outside of ``allowed``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in {allowed}, got {value!r}")
    number = float(value)
    inside_low = number >= low if allowed.startswith("[") else number > low
    inside_high = number <= high if allowed.endswith("]") else number < high
    if not (inside_low and inside_high):
        raise ValueError(f"{name} must be in {allowed}, got {value!r}")
    return number


def check_flag(name: str, value: object) -> None:
    """Refuse an argument that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Refuse an argument that is no integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def check_confidence(confidence: float) -> None:
    """Check the confidence of an interval.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
