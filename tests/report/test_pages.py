"""Pages whose tables and figures are made by functions."""

import pytest
from helpers import record
from matplotlib.figure import Figure
from PIL import Image

from hf_dash.history import History
from hf_dash.report import render_page, write_evidence

from_folders = {
    "names": lambda folders, of=(): f"| {' | '.join([f.name for f in folders] + list(of))} |"
}


@pytest.fixture
def page(tmp_path):
    return tmp_path / "README.md"


def write(page, text):
    page.write_text(text, encoding="utf-8")
    return page


def test_tables_are_written_between_their_markers(page):
    text = "# A\n\n<!-- table: names folder=x,y of=λ=1,b -->\nstale\n<!-- end -->\n\nText stays.\n"
    stale = render_page(write(page, text), from_folders, {})
    assert stale == [f"{page}: table names folder=x,y of=λ=1,b"]
    assert page.read_text(encoding="utf-8") == text.replace("stale", "| x | y | λ=1 | b |")
    assert render_page(page, from_folders, {}, check=True) == []


def test_a_check_writes_nothing(page):
    text = "<!-- table: names -->\n<!-- end -->\n<!-- figure: one -->\n![One](one.png)\n"
    write_evidence(History(None, {}, [record()]), page.parent)
    stale = render_page(write(page, text), from_folders, {"one": None}, check=True)
    assert stale == [f"{page}: table names", f"{page.parent / 'one.png'}: figure one"]
    assert page.read_text() == text
    assert not (page.parent / "one.png").exists()


def test_columns_pick_cells_as_they_are(page):
    table = "| a     | b |    c |\n| ----- | - | ---: |\n| x\\|\\_ | 1 | 2\\* |"
    text = "<!-- table: t columns=3,1 -->\n<!-- end -->"
    render_page(write(page, text), {"t": lambda folders: table}, {})
    lines = page.read_text().splitlines()[1:-1]
    assert lines == ["| c   |     a |", "| --- | ----: |", "| 2\\* | x\\|\\_ |"]


def test_a_figure_is_drawn_again_when_its_data_or_marker_change(page):
    drawn = []

    def draw(folders, path, start):
        drawn.append((folders, start))
        Figure(figsize=(1, 1)).savefig(path)

    data = page.parent / "data"
    write_evidence(History(None, {}, [record()]), data)
    text = "<!-- figure: one folder=data start=a -->\n![One](one.png)\n"
    for changes in range(2):
        assert len(render_page(write(page, text), {}, {"one": draw})) == 1
        with Image.open(page.parent / "one.png") as image:
            assert image.size == (100, 100)
        assert render_page(page, {}, {"one": draw}, check=True) == []
        assert render_page(page, {}, {"one": draw}) == []
        assert drawn == [([data], ["a"])] * (changes + 1)
        write_evidence(History(None, {"changed": changes}, [record()]), data)
    stale = render_page(write(page, text.replace("start=a", "start=b")), {}, {"one": draw})
    assert stale == [f"{page.parent / 'one.png'}: figure one folder=data start=b"]
    assert drawn[2:] == [([data], ["b"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: other -->\n<!-- end -->", r"must be one of \['names'\], got 'other'"),
        ("<!-- table: names -->\n", "must end every table with '<!-- end -->'"),
        ("<!-- figure: other -->\n![](a.png)", r"must be one of \[\], got 'other'"),
    ],
)
def test_markers_that_make_no_sense_are_refused(page, text, message):
    with pytest.raises(ValueError, match=message):
        render_page(write(page, text), from_folders, {})
    assert page.read_text() == text
