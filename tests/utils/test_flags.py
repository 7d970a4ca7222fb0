from dataclasses import dataclass, field, fields

import pytest

from hf_dash.utils.flags import documented


def helps(cls):
    return {entry.name: entry.metadata["help"] for entry in fields(cls)}


def test_a_field_is_helped_by_its_entry():
    @documented
    @dataclass
    class Settings:
        """Some settings.

        Args:
            first: What ``first`` is: 50 % of it,
                over two lines.
            second: Another one.

        Raises:
            ValueError: never.
        """

        first: int = 0
        second: int = field(default=1, metadata={"aliases": ["--two"]})

    assert helps(Settings) == {
        "first": "What first is: 50 %% of it, over two lines.",
        "second": "Another one.",
    }
    assert fields(Settings)[1].metadata["aliases"] == ["--two"]

    @documented
    @dataclass
    class More(Settings):
        """More settings.

        Args:
            third: One more.
        """

        third: int = 2

    assert helps(More) == {**helps(Settings), "third": "One more."}


def test_a_field_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="docstring of Bare must have an entry for first"):

        @documented
        @dataclass
        class Bare:
            """Nothing."""

            first: int = 0
