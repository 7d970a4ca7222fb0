"""Names of classes and splits: the same name however it was typed.

Flow: names as folders, columns and configs spell them → normalized → refused where two differ only
in a way that no reader sees, or where an arrival has nothing in common with its parent.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from hf_dash.utils.checks import refuse_unless
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

# The names by which splits go, after the one that they are known by here.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

# What transformers calls the classes of a model without names.
_NAMELESS = re.compile(r"LABEL_\d+")

# Names listed in a message.
SHOWN = 10


def canonical(split: str) -> str | None:
    """Return the name by which a split is known here: ``"train"``, ``"validation"``, ``"test"``."""
    names = {alias: name for name, aliases in SPLITS.items() for alias in aliases}
    return names.get(split.lower())


def normalized(name: str) -> str:
    """Return a name in Unicode's NFC form, without white space around it."""
    return unicodedata.normalize("NFC", name).strip()


def check_spelling(names: Iterable[str]) -> None:
    """Check that no two different names look alike.

    Raises:
        ValueError: two of them differ only by case, white space or Unicode form.
    """
    seen: dict[str, str] = {}
    for name in dict.fromkeys(names):
        key = "".join(unicodedata.normalize("NFKC", name).casefold().split())
        other = seen.setdefault(key, name)
        if other != name:
            raise ValueError(
                f"labels must differ by more than case, blanks and Unicode form, got {other!a}"
                f" and {name!a}: give both the same name"
            )


def check_shared(
    known: Sequence[str], arriving: Sequence[str], what: str, *, allow_disjoint: bool
) -> None:
    """Check that an arrival has a class in common with what a model knows.

    Args:
        known: names of the classes of the parent.
        arriving: names of the classes that arrive.
        what: the arrival, for the message.
        allow_disjoint: warn and continue.

    Raises:
        ValueError: it has none, and that is not allowed.
    """
    if not known or not arriving or set(known) & set(arriving):
        return
    if all(_NAMELESS.fullmatch(name) for name in known):
        hint = "the parent's classes have no names: put them into id2label of its config.json"
    elif all(name.isdecimal() for name in arriving):
        hint = "integer labels need names, such as a ClassLabel column, to match the parent's"
    else:
        hint = "check the names of its classes"
    message = (
        f"{what} must share a class with its parent, which knows {shown(known)}, got"
        f" {shown(arriving)}: {hint}"
    )
    remedy = "; allow_disjoint_classes=True trains on it as new classes"
    refuse_unless(allow_disjoint, message, remedy, logger)


def shown(names: Sequence[str]) -> str:
    """Return names for a message, the first few of many."""
    text = ", ".join(names[:SHOWN])
    return text if len(names) <= SHOWN else f"{text}, … ({len(names):,} in all)"
