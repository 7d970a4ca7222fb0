import itertools
from dataclasses import dataclass, field, replace

import pytest

from hf_dash.utils.chain import BEGINNING, digest_of, entry_digest, head_of, in_order


@dataclass(frozen=True)
class Entry:
    name: str
    value: float | None = None
    previous: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class LaterEntry:
    """The same, of a version that records more."""

    name: str
    value: float | None = None
    extra: str | None = None
    previous: str | None = field(default=None, compare=False)


def chain_of(*names, head=BEGINNING):
    entries = []
    for name in names:
        entries.append(Entry(name, 0.5, head))
        head = entry_digest(entries[-1])
    return entries


def test_any_order_comes_back_as_it_was_recorded():
    entries = chain_of("a", "b", "c", "d")
    for shuffled in itertools.permutations(entries):
        assert in_order(shuffled) == entries
    assert head_of(entries) == entry_digest(entries[-1])
    assert (in_order([]), head_of([])) == ([], BEGINNING)


def test_the_part_of_a_chain_that_begins_elsewhere_is_one_too():
    entries = chain_of("a", "b", "c")
    assert in_order(entries[1:]) == entries[1:]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_missing_entry_is_noticed(lost):
    entries = chain_of("a", "b", "c", "d")
    del entries[lost]
    with pytest.raises(ValueError, match="have lost the one before"):
        in_order(entries)


def test_a_changed_entry_is_noticed():
    entries = chain_of("a", "b", "c")
    entries[1] = replace(entries[1], value=0.75)
    with pytest.raises(ValueError, match="have lost the one before"):
        in_order(entries)


def test_two_entries_do_not_follow_the_same_one():
    entries = chain_of("a", "b")
    with pytest.raises(ValueError, match="two entries follow the same one"):
        in_order([*entries, replace(entries[1], name="c")])


def test_entries_from_before_there_were_chains_come_first():
    old = [Entry("x"), Entry("y")]
    assert in_order(old) == old
    new = chain_of("a", "b", head=head_of(old))
    assert in_order([*new, *old]) == [*old, *new]
    # The first chained entry depends on all of them.
    with pytest.raises(ValueError, match="has lost the one before"):
        in_order([*new, old[0]])


def test_fields_of_later_versions_change_no_digest():
    assert entry_digest(LaterEntry("a", 0.5)) == entry_digest(Entry("a", 0.5))
    assert entry_digest(LaterEntry("a", 0.5, "more")) != entry_digest(Entry("a", 0.5))


def test_the_order_of_names_does_not_matter():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1})
