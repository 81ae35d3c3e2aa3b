from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from emca_bench.report.document import Bullets, Code, Column, Details, Document, Heading, Paragraph, Strong, Table, Value
from emca_bench.report.html import to_html
from emca_bench.report.markdown import escape, inline, to_markdown
from emca_bench.report.placement import place

NASTY = r"a|b <script>alert(1)</script> *x* _y_ `z` [l](http://e.example) \ # emca_as_written"


def test_escaped_text_survives_a_markdown_renderer():
    html = MarkdownIt("commonmark").enable("table").render(f"| h |\n| --- |\n| {escape(NASTY)} |\n")
    shown = NASTY.replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{shown}</td>" in html


def test_names_stay_readable_in_markdown():
    assert escape("emca_as_written [1.0, 2.0]") == "emca_as_written [1.0, 2.0]"


def test_spans_keep_the_space_between_them():
    assert inline(("See ", Code("a|b"), ": ", Strong("now"), " or never.")) == "See `a\\|b`: **now** or never."


def test_html_escapes_everything():
    table = Table([Column(NASTY)], [[Value(NASTY, sort=NASTY)]], caption=NASTY)
    blocks = [Heading(2, NASTY), Paragraph(NASTY), Bullets([NASTY]), Details(NASTY, [Paragraph((Code(NASTY),))]), table]
    assert "<script>alert" not in to_html(Document(NASTY, blocks))


def test_numbers_carry_their_sort_keys():
    table = Table([Column("n", "right")], [[Value("1.20 [1.1, 1.3]", sort=1.2)], [Value("none", tone="muted")]])
    html = to_html(Document("t", [table]))
    assert 'data-sort="1.2"' in html
    assert '<td class="right muted">none</td>' in html


def test_markdown_aligns_numbers_right():
    assert "| --- | ---: |" in to_markdown(Document("t", [Table([Column("a"), Column("b", "right")], [])]))


def test_rows_must_fit_their_columns():
    with pytest.raises(ValueError, match="row of 1 values in a table of 2 columns"):
        Table([Column("a"), Column("b")], [[Value("x")]])


def test_names_are_placed_apart_and_within_the_frame():
    corners = place([(50, 50), (52, 50), (95, 50)], [(20, 5)] * 3, [(48, 48, 54, 52)], (0, 0, 100, 100))
    boxes = [(x, y, x + 20, y + 5) for x, y in corners]
    for index, a in enumerate(boxes):
        assert min(a[0], a[1]) >= 0
        assert max(a[2], a[3]) <= 100
        for b in boxes[:index]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
