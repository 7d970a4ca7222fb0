"""Typed CSV files: what is read back, and errors that say where."""

import pytest

from hf_dash.report.csv_files import read_csv, read_wide, write_csv, write_wide

COLUMNS = {"start": str, "seed": int}


def test_wide_numbers_come_back_where_they_were(tmp_path):
    rows = {("cold", 0): {"a": 0.1, "b": 2.0}, ("dash", 1): {"b": 1e-9}}
    write_wide(tmp_path / "x.csv", COLUMNS, rows)
    assert (tmp_path / "x.csv").read_text() == "start,seed,a,b\ncold,0,0.1,2\ndash,1,,1e-09\n"
    assert read_wide(tmp_path / "x.csv", COLUMNS) == rows


def test_no_numbers_are_no_file(tmp_path):
    write_wide(tmp_path / "x.csv", COLUMNS, {("cold", 0): {"a": 0.1}})
    write_wide(tmp_path / "x.csv", COLUMNS, {("cold", 0): {}})
    assert list(tmp_path.iterdir()) == []
    assert read_wide(tmp_path / "x.csv", COLUMNS) == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["cold", "0", "1"]], "line 2 must have 2 cells, got 3"),
        ([["cold", "zero"]], "line 2, seed"),
    ],
)
def test_an_error_says_where(tmp_path, rows, message):
    write_csv(tmp_path / "x.csv", COLUMNS, rows)
    with pytest.raises(ValueError, match=message):
        list(read_csv(tmp_path / "x.csv", COLUMNS))


def test_other_columns_are_refused(tmp_path):
    write_csv(tmp_path / "x.csv", ["seed", "start"], [])
    with pytest.raises(ValueError, match=r"must have the columns start, seed, got \['seed', 'sta"):
        list(read_csv(tmp_path / "x.csv", COLUMNS))
