"""Checks of arguments: the error names the argument, its value, and what is allowed."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import Field, fields, replace
from functools import lru_cache
from numbers import Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def refuse_unless(allowed: bool, message: str, remedy: str, logger: logging.Logger) -> None:
    """Refuse what the user has to allow; where it is allowed, say it.

    Args:
        allowed: by a flag of the user's.
        message: what was found.
        remedy: ends the error, and says how to allow it.
        logger: of the module that has found it.

    Raises:
        ValueError: it is not allowed.
    """
    if not allowed:
        raise ValueError(f"{message}{remedy}")
    logger.warning(message)


def check_number(name: str, value: object, allowed: str, low: float, high: float) -> float:
    """Return an argument as a float.

    Args:
        name: of the argument.
        value: given for it.
        allowed: the range as text, such as ``"(0, 1]"``; its brackets say whether an end belongs
            to it.
        low: lower end of the range.
        high: upper end.

    Raises:
        TypeError: the value is not a real number.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name} must be a number in {allowed}, got {value!r}")
    number = float(value)
    inside_low = number >= low if allowed.startswith("[") else number > low
    inside_high = number <= high if allowed.endswith("]") else number < high
    if not (inside_low and inside_high):
        raise ValueError(f"{name} must be in {allowed}, got {value!r}")
    return number


def check_flag(name: str, value: object) -> None:
    """Refuse an argument that is neither True nor False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: object, *, at_least: int = 1) -> None:
    """Refuse an argument that is not an integer of at least ``at_least``.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse an argument that is not an instance of ``kind``.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")


def check_class_weights(class_weights: object) -> None:
    """Refuse weights of classes that are neither ``"balanced"`` nor None."""
    if class_weights not in (None, "balanced"):
        raise ValueError(f"class_weights must be 'balanced' or None, got {class_weights!r}")


def check_folder_name(name: str, value: str) -> None:
    """Refuse a text that cannot be part of a folder's name.

    Raises:
        ValueError: it is empty, has a slash, or begins with a dot.
    """
    if not value or value.startswith(".") or set(value) & {"/", "\\", "\0"}:
        raise ValueError(
            f"{name} must be part of a folder's name: without a slash and not beginning with a dot,"
            f" got {value!r}"
        )


def check_confidence(confidence: float) -> None:
    """Check the confidence of an interval.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")


def check_types(item: object) -> None:
    """Check the fields of a dataclass against its own annotations; numbers must be finite.

    Raises:
        TypeError: a field is of another kind.
    """
    kind: Any = type(item)
    for entry, plain, fits in _fitting(kind):
        value = getattr(item, entry.name)
        if type(value) not in plain and not fits(value):
            expected = getattr(entry.type, "__name__", str(entry.type))
            shown = f"{value!r}"[:80]
            raise TypeError(f"{entry.name} must be {expected}, got {shown}")


@lru_cache
def _fitting(kind: Any) -> list[tuple[Field[Any], set[type[Any]], Callable[[Any], bool]]]:
    """Return the fields of a dataclass, the types that fit each, and what tells it of others."""
    hints = get_type_hints(kind)
    found = []
    for entry in fields(kind):
        hint = hints[entry.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        # Of a float it takes more than its type: it must be finite.
        plain = {bool, int, str, type(None)} & {one for one in kinds if isinstance(one, type)}
        found.append((entry, plain, _fits(hint)))
    return found


def _fits(kind: Any) -> Callable[[Any], bool]:
    """Return what tells whether a value is of a kind; made once, for it is asked often."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: True
    if origin is Literal:
        return lambda value: value in parts
    inner = [_fits(part) for part in parts]
    if origin in (Union, UnionType) and len(inner) == 2:
        first, second = inner
        return lambda value: first(value) or second(value)
    if origin in (Union, UnionType):
        return lambda value: any(fits(value) for fits in inner)
    if origin is dict:
        key_fits, value_fits = inner
        return lambda value: (
            isinstance(value, dict)
            and all(map(key_fits, value))
            and all(map(value_fits, value.values()))
        )
    if origin is list:
        return lambda value: isinstance(value, list) and all(map(inner[0], value))
    if kind in (int, float):
        allowed = int if kind is int else (int, float)
        return lambda value: (
            isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
        )
    if kind is str:
        return lambda value: isinstance(value, str)
    return lambda value: isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a copy of a dataclass with some of its fields changed.

    Raises:
        TypeError: a setting is not a field; the message lists the fields.
    """
    known = [entry.name for entry in fields(config)]  # type: ignore[arg-type]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TypeError(f"settings must be among {known}, got {unknown}")
    return replace(config, **settings)  # type: ignore[type-var]
