"""Markdown that shows text from data, such as the names of classes, as the text it is."""

import re
import unicodedata
from collections.abc import Sequence

MISSING = "–"

# What would be markup within a line: also entities, mathematics, addresses that become links,
# underscores that are not inside a word, and a number sign that would end a heading.
_MARKUP = re.compile(
    r"[\\`*\[\]<|~$@]|&(?=#?\w+;)|:(?=//)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])|(?<!\w)#",
    re.IGNORECASE,
)

# They would turn around or hide the text next to them.
_BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class Markdown(str):
    """Text that is Markdown already, and is not escaped again; in a table it needs ``\\|``."""


def escape_markdown(text: str) -> str:
    """Return text as GitHub's Markdown that shows it as it is, within one line.

    Runs of white space, line breaks among them, become one space; what cannot be shown or written
    to a file becomes ``\ufffd``. A :class:`Markdown` stays as it is.
    """
    if isinstance(text, Markdown):
        return text
    return Markdown(_MARKUP.sub(r"\\\g<0>", _one_line(text)))


def code_span(text: str) -> Markdown:
    """Return text as inline code, or escaped where it holds what a code span cannot."""
    plain = bool(text) and _one_line(text) == text and not re.search(r"[`|\\$]", text)
    return Markdown(f"`{text}`" if plain else escape_markdown(text))


def _one_line(text: str) -> str:
    return "".join(
        "\ufffd"
        if unicodedata.category(character) in ("Cc", "Cs")
        or unicodedata.bidirectional(character) in _BIDIRECTIONAL
        else character
        for character in " ".join(text.split())
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markdown:
    """Lay rows out as a Markdown table, first column left, the others right.

    Cells are shown as they are (:func:`escape_markdown`) unless they are :class:`Markdown`.

    Example:
        >>> import hf_dash
        >>> print(hf_dash.report.markdown_table(["start", "steps"], [["dash", "90"]]))
        | start | steps |
        | ----- | ----: |
        | dash  |    90 |
    """
    table = [[escape_markdown(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    lines = []
    for row in [table[0], rule, *table[1:]]:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))
