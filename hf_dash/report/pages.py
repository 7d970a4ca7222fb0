"""Markdown pages whose tables and figures are made by functions, and a check that they still are.

Flow: a page → its markers → functions by kind → the page with today's tables, and its images.
A marker is ``<!-- table: KIND key=value … -->`` before a table that ``<!-- end -->`` ends, or
``<!-- figure: KIND key=value … -->`` in the line above an image.
Differs from drawing again and comparing: the bytes of a PNG depend on the version of matplotlib. So
each carries a digest of its kind, its keys and its data, which a check compares.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from hf_dash.report.evidence import evidence_digest
from hf_dash.report.markdown import Markdown, markdown_table
from hf_dash.utils.files import write_text

TABLE = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"<!-- figure: (.*?) -->\n!\[[^\]]*\]\(([^)]*)\)")
# The name of the digest in a PNG.
DIGEST = "hf_dash data"


def render_page(
    page: str | Path,
    tables: Mapping[str, Callable[..., str]],
    figures: Mapping[str, Callable[..., None]],
    *,
    check: bool = False,
) -> list[str]:
    """Bring the tables and figures of a page up to date.

    A marker's values are lists, separated by commas, and become keyword arguments of its function.
    Two keys are taken: ``folder``, relative to the page and by default its own, names the folders
    of the data; ``columns`` picks columns of a table by number, from 1.

    Args:
        page: path of the Markdown file.
        tables: by kind, functions from the folders of the data to a Markdown table.
        figures: by kind, functions from the folders and the PNG to write.
        check: write nothing.

    Returns:
        What was not up to date, one line per table or figure.

    Raises:
        ValueError: a marker names no kind there is, or has no end.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     page = Path(folder) / "README.md"
        ...     write_text(page, "<!-- table: letters --><!-- end -->".replace("><", ">\\n<"))
        ...     _ = render_page(page, {"letters": lambda folders: "| a | b |"}, {})
        ...     print(page.read_text(encoding="utf-8"))
        <!-- table: letters -->
        | a | b |
        <!-- end -->
    """
    page, stale = Path(page), []
    text = page.read_text(encoding="utf-8")
    if text.count("<!-- table: ") != len(TABLE.findall(text)):
        raise ValueError(f"{page} must end every table with '<!-- end -->'")

    def table_of(found: re.Match[str]) -> str:
        function, folders, keys = _parse(page, found[2], tables)
        columns = [int(number) - 1 for number in keys.pop("columns", ())]
        table = _pick(function(folders, **keys), columns) if columns else function(folders, **keys)
        whole = f"{found[1]}{table}\n{found[3]}"
        if whole != found[0]:
            stale.append(f"{page}: table {found[2]}")
        return whole

    rendered = TABLE.sub(table_of, text)
    if rendered != text and not check:
        write_text(page, rendered)
    for marker, name in FIGURE.findall(text):
        function, folders, keys = _parse(page, marker, figures)
        path, digest = page.parent / name, _digest(marker.split()[0], folders, keys)
        if not path.is_file() or _digest_in(path) != digest:
            stale.append(f"{path}: figure {marker}")
            if not check:
                function(folders, path, **keys)
                _stamp(path, digest)
    return stale


def _parse(
    page: Path, marker: str, functions: Mapping[str, Callable[..., Any]]
) -> tuple[Callable[..., Any], list[Path], dict[str, list[str]]]:
    kind, *options = marker.split()
    if kind not in functions:
        raise ValueError(
            f"{page}: a marker's kind must be one of {sorted(functions)}, got {kind!r}"
        )
    keys = {name: values.split(",") for name, _, values in (o.partition("=") for o in options)}
    return functions[kind], [page.parent / name for name in keys.pop("folder", ["."])], keys


def _pick(table: str, columns: Sequence[int]) -> str:
    header, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    picked = [[Markdown(row[column].strip()) for column in columns] for row in (header, *rows)]
    return markdown_table(picked[0], picked[1:])


def _digest(kind: str, folders: Iterable[Path], keys: Mapping[str, Sequence[str]]) -> str:
    """Return what a figure is made of, wherever the page is that shows it."""
    parts = [kind, *(f"{name}={','.join(keys[name])}" for name in sorted(keys))]
    parts += map(evidence_digest, folders)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest_in(path: Path) -> str | None:
    with Image.open(path) as image:
        digest = image.info.get(DIGEST)
    return None if digest is None else str(digest)


def _stamp(path: Path, digest: str) -> None:
    """Write the digest into a PNG; its pixels stay."""
    said = PngImagePlugin.PngInfo()
    said.add_text(DIGEST, digest)
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=said)
