import html.parser
import random

import pytest
from markdown_it import MarkdownIt

from hf_dash.report.markdown import Markdown, code_span, escape_markdown, markdown_table


def test_a_table_is_laid_out():
    assert markdown_table(["a", "number"], [["x|y", "1"], ["z", "23"]]).splitlines() == [
        "| a    | number |",
        "| ---- | -----: |",
        "| x\\|y |      1 |",
        "| z    |     23 |",
    ]


class Page(html.parser.HTMLParser):
    """What a reader sees of Markdown: its text, and the tags it is in."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_any_text_is_shown_as_it_is_in_a_line_and_in_a_table():
    # Everything that is markup somewhere, often enough beside itself to mean something.
    alphabet = [*"\\`*_[]<>()|~$@&#;:!-+.='\"{}^/?%, ab1é漢\n\r\t", "&lt;", "www.", "http://"]
    generator = random.Random(0)
    for _ in range(1500):
        text = "".join(generator.choices(alphabet, k=generator.randint(1, 12)))
        line = " ".join(text.split())
        page = Page(f"x{escape_markdown(text)}x")
        assert (page.text.strip(), page.tags) == (f"x{line}x", ["p"]), text
        page = Page(f"x {escape_markdown(text)} x")
        assert (page.text.strip(), page.tags) == (f"x {line} x", ["p"]), text
        for cell in (text, code_span(text)):
            page = Page(markdown_table(["a", "b"], [[cell, "end"]]))
            assert " ".join(page.text.split()) == " ".join(["a b", *line.split(), "end"]), text
            assert [tag for tag in page.tags if tag in ("tr", "td")] == ["tr", "tr", "td", "td"]
            assert not set(page.tags) & {"em", "strong", "s", "a", "img"}, text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("learning_rate", "learning_rate"),
        ("__init__", "\\_\\_init\\_\\_"),
        ("C# and #1", "C# and \\#1"),
        ("$x$ at 5 %, a@b", "\\$x\\$ at 5 %, a\\@b"),
        ("https://a.b or www.a.b", "https\\://a.b or www\\.a.b"),
        ("R&D &lt;", "R&D \\&lt;"),
        ("nul \0, half \ud800, turned \u202e", "nul \ufffd, half \ufffd, turned \ufffd"),
    ],
)
def test_only_markup_is_escaped(text, escaped):
    assert escape_markdown(text) == escaped
    # Once: what is Markdown already stays.
    assert escape_markdown(escape_markdown(text)) == escaped
    escaped.encode()


def test_code_that_cannot_be_code_is_escaped():
    assert code_span("conv.weight") == "`conv.weight`"
    assert code_span("a|`b`") == "a\\|\\`b\\`"
    assert code_span("") == ""


def test_a_cell_of_markdown_stays():
    assert "| **1** |" in markdown_table(["a"], [[Markdown("**1**")]])
