"""CSV files of typed columns: read with errors that name file, line and column, written whole.

Flow: rows → text → a file in one step; a file → typed cells. A *wide* file has a key in its first
columns and then one column per named number, present or not. Series of numbers, such as those of
the learning framework, are wide: one row per series. Files named ``.gz`` are compressed.
"""

import csv
import gzip
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from hf_dash.utils.files import write_bytes

MAY_BE_EMPTY = {"train_accuracy", "converged", "images_read", "parent", "weights_sha256"}

# Of the learning framework: a row per point as a run writes it, a row per series as committed.
POINT = dict.fromkeys(("setting", "start", "seed", "experiment"), str)
SERIES = dict.fromkeys(("setting", "start", "seed", "number"), str)


def add_series(source: str | Path, path: str | Path) -> None:
    """Add series of numbers to a CSV file with one row per series; numbers it has are replaced.

    Args:
        source: a CSV file with one row per point, as ``write_simulations`` writes it.
        path: of the file to add to, or to write.

    Example:
        >>> from pathlib import Path
        >>> import hf_dash
        >>> header, point = "setting,start,seed,experiment,accuracy", "small,warm,0,1,0.5"
        >>> _ = Path("run.csv").write_text(f"{header}\\n{point}\\n")
        >>> hf_dash.report.add_series("run.csv", "series.csv")
        >>> Path("series.csv").read_text().splitlines()[0]
        'setting,start,seed,number,1'
    """
    series = read_wide(Path(path), SERIES, str)
    for point, numbers in read_csv(Path(source), POINT, str):
        *key, experiment = point.values()
        for name, text in numbers.items():
            series.setdefault((*key, name), {})[experiment] = text
    write_wide(Path(path), SERIES, series)


def read_series(path: str | Path) -> dict[tuple[str, ...], dict[str, list[float]]]:
    """Return, by setting, start and seed, the series that :func:`add_series` wrote, by name.

    Example:
        >>> from pathlib import Path
        >>> import hf_dash
        >>> text = "setting,start,seed,number,1,2\\nsmall,warm,0,accuracy,0.5,0.75\\n"
        >>> _ = Path("series.csv").write_text(text)
        >>> hf_dash.report.read_series("series.csv")
        {('small', 'warm', '0'): {'accuracy': [0.5, 0.75]}}
    """
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for (*key, name), numbers in read_wide(Path(path), SERIES).items():
        found.setdefault(tuple(key), {})[name] = list(numbers.values())
    return found


def cell_of(value: Any) -> str:
    """Return a value as a cell; nothing for None."""
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0")
    return "" if value is None else str(value)


def value_of(text: str, kind: type, where: str) -> Any:
    """Return a cell as a value of a type; the error says where it stands."""
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{where} must be of type {kind.__name__}, got {text!r}") from None


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Write a file in one step."""
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    content = text.getvalue().encode()
    # Without the time, so that the same rows give the same file.
    write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def read_csv(
    path: Path, columns: Mapping[str, type], more: type | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Give each row's named columns, and its further ones that are not empty.

    Args:
        path: of the file.
        columns: types of the first columns, by name.
        more: type of further columns, whatever their names; None where there must be none.
    """
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if list(columns) != (header if more is None else header[: len(columns)]):
            raise ValueError(f"{path} must have the columns {', '.join(columns)}, got {header}")
        for row in lines:
            where = f"{path}, line {lines.line_num}"
            if len(row) != len(header):
                raise ValueError(f"{where} must have {len(header)} cells, got {len(row)}")
            named = {
                name: None
                if name in MAY_BE_EMPTY and not text
                else value_of(text, kind, f"{where}, {name}")
                for (name, kind), text in zip(columns.items(), row, strict=False)
            }
            others = zip(header[len(columns) :], row[len(columns) :], strict=True)
            yield (
                named,
                {n: value_of(t, more, f"{where}, {n}") for n, t in others if more and t},
            )


def write_wide(
    path: Path, columns: Iterable[str], rows: Mapping[tuple[Any, ...], Mapping[str, Any]]
) -> None:
    """Write numbers by name, a column each; no file where there are none."""
    names = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    if not names:
        path.unlink(missing_ok=True)
        return
    body = [
        [*map(cell_of, key), *(cell_of(numbers.get(name)) for name in names)]
        for key, numbers in rows.items()
    ]
    write_csv(path, [*columns, *names], body)


def read_wide(
    path: Path, columns: Mapping[str, type], kind: type = float
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the numbers of a wide file by key and name; none where there is no file."""
    if not path.is_file():
        return {}
    return {tuple(key.values()): numbers for key, numbers in read_csv(path, columns, kind)}
