"""Settings documented once: the docstring of a dataclass is also the help of its flags."""

import inspect
import re
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T", bound=type[Any])


def documented(cls: T) -> T:
    """Give each field of a dataclass its entry of the docstring's ``Args:`` as help for a parser.

    Used as a decorator above ``@dataclass``, for ``transformers.HfArgumentParser``.

    Raises:
        ValueError: a field has no entry.
    """
    text = inspect.getdoc(cls) or ""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    entries = re.findall(
        r"^    (\w+): ((?:.*\n(?:        .*\n)*))", section[1] if section else "", re.M
    )
    helps = {name: " ".join(entry.split()) for name, entry in entries}
    for entry in fields(cls):
        if "help" in entry.metadata:
            continue
        if entry.name not in helps:
            raise ValueError(f"the docstring of {cls.__name__} must have an entry for {entry.name}")
        # argparse takes a percent sign for the beginning of a format.
        help_ = helps[entry.name].replace("``", "").replace("%", "%%")
        entry.metadata = MappingProxyType({**entry.metadata, "help": help_})
    return cls
