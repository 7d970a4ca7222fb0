"""Entries that each hold the digest of the one before, so that none is lost or changed unnoticed.

Flow: an entry → SHA-256 of its fields, ``previous`` among them → the ``previous`` of the next one.
Differs from one digest over all entries: entries can be kept in several places, each with its own
copy, and still show whether one place is older than another.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

# Before the first entry; None stands for entries recorded before there were chains.
BEGINNING = ""


class Linked(Protocol):
    """A dataclass with the digest of the entry before it."""

    @property
    def previous(self) -> str | None:
        """Digest of the entry before."""


Entry = TypeVar("Entry", bound=Linked)


def digest_of(content: Any) -> str:
    """Return the SHA-256 of plain JSON types, whatever the order of their names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def recorded(entry: Linked) -> dict[str, Any]:
    """Return the fields of an entry without those that are None.

    So fields of later versions change no digest.
    """
    values: dict[str, Any] = asdict(entry)  # type: ignore[call-overload]
    return {name: value for name, value in values.items() if value is not None}


def entry_digest(entry: Linked) -> str:
    """Return the digest that the entry after this one holds as ``previous``."""
    return digest_of(recorded(entry))


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Return entries in the order in which they were recorded.

    Entries without a chain come first, in the given order; then each one follows the entry whose
    digest it holds. The first of them may continue a chain that lies elsewhere.

    Raises:
        ValueError: an entry is missing or was changed.
    """
    entries = list(entries)
    ordered = [entry for entry in entries if entry.previous is None]
    following = {entry.previous: entry for entry in entries if entry.previous is not None}
    if len(ordered) + len(following) < len(entries):
        raise ValueError("two entries follow the same one")
    if not ordered and following:
        roots = following.keys() - {entry_digest(entry) for entry in entries}
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} entries have lost the one before")
        ordered = [following.pop(roots.pop())]
    while following:
        entry = following.pop(head_of(ordered), None)
        if entry is None:
            raise ValueError("an entry has lost the one before: the one between is missing")
        ordered.append(entry)
    return ordered


def head_of(ordered: Sequence[Linked]) -> str:
    """Return what the next entry holds as ``previous``.

    Args:
        ordered: all entries, as :func:`in_order` returns them.
    """
    if not ordered:
        return BEGINNING
    if ordered[-1].previous is not None:
        return entry_digest(ordered[-1])
    return digest_of([entry_digest(entry) for entry in ordered])
