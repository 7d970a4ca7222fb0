"""A file of JSON lines that only grows: an addition writes one line and leaves the rest alone.

Flow: mappings → one line each, with a name and the digest of its content → written whole once, in
one step → each later line at the end of the file, on the disk before the call returns. A kill in
the middle of an addition leaves a torn line: one without its line end, which readers leave out and
the next writer cuts off.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_dash.utils.chain import digest_of
from hf_dash.utils.files import write_bytes

CHANGED = "was changed by something else; restore it from a copy"


class Line(NamedTuple):
    """One line of a file.

    Args:
        name: of what it holds.
        content: of the line.
        digest: SHA-256 of the content, as :func:`~hf_dash.utils.chain.digest_of` returns it.
    """

    name: str
    content: dict[str, Any]
    digest: str


def write_lines(path: Path, lines: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
    """Write a whole file in one step, in place of the one at ``path``; return its bytes.

    Args:
        path: of the file.
        lines: each a name, and plain JSON types.
    """
    text = b"".join(_text(name, content) for name, content in lines)
    write_bytes(path, text)
    return len(text)


def append_line(path: Path, name: str, content: Mapping[str, Any], size: int) -> int:
    """Add one line to a file, and wait until it is on the disk.

    Args:
        path: of the file.
        name: of what the line holds.
        content: of the line, as plain JSON types.
        size: bytes of the file, as far as the caller knows it.

    Returns:
        The bytes of the file with the line.

    Raises:
        ValueError: the file has another size: something else has written it.
        OSError: the line could not be written; the file is as it was.
    """
    text = _text(name, content)
    with path.open("r+b", buffering=0) as file:
        found = file.seek(0, os.SEEK_END)
        if found != size:
            raise ValueError(
                f"{path} has {found:,} bytes, not the {size:,} that were read or written: something"
                " else has changed it"
            )
        try:
            if file.write(text) != len(text):
                raise OSError(28, f"No space left for a line of {len(text):,} bytes")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    return size + len(text)


def read_lines(path: Path, longest: int) -> tuple[list[Line], int]:
    """Read the whole lines of a file.

    Args:
        path: of the file.
        longest: bytes of a line, at most.

    Returns:
        The lines, and the bytes they take: less than the file has if its last line is torn.

    Raises:
        ValueError: a line is longer, not JSON, nested too deeply, or was changed; the message
            numbers it.
    """
    lines: list[Line] = []
    size = 0
    with path.open("rb") as file:
        while text := file.readline(longest + 1):
            if len(text) > longest:
                raise ValueError(f"line {len(lines) + 1} has more than {longest:,} bytes")
            if not text.endswith(b"\n"):
                break
            try:
                lines.append(_line(text))
            except RecursionError:
                raise ValueError(f"line {len(lines) + 1} is nested too deeply") from None
            except ValueError as error:
                raise ValueError(f"line {len(lines) + 1} {error}") from error
            size += len(text)
    return lines, size


def cut_torn_line(path: Path, size: int) -> bool:
    """Cut off what a kill has left of a line; tell whether there was any.

    Args:
        path: of the file, which nobody else writes.
        size: bytes of its whole lines, as :func:`read_lines` returns them.
    """
    if path.stat().st_size <= size:
        return False
    with path.open("r+b", buffering=0) as file:
        file.truncate(size)
        os.fsync(file.fileno())
    return True


def _text(name: str, content: Mapping[str, Any]) -> bytes:
    return json.dumps({"digest": digest_of(content), name: content}).encode() + b"\n"


def _line(text: bytes) -> Line:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(line, dict) or [*line][:1] != ["digest"] or len(line) != 2:
        raise ValueError(CHANGED)
    (_, digest), (name, content) = line.items()
    if digest != digest_of(content) or not isinstance(content, dict):
        raise ValueError(CHANGED)
    return Line(name, content, digest)
