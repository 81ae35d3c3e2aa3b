"""A document as one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from emca_bench.report.document import (
    Block,
    Bullets,
    Code,
    CodeBlock,
    Column,
    Details,
    Document,
    Figure,
    Heading,
    Paragraph,
    Span,
    Strong,
    Table,
    Text,
    Value,
)

_TYPES = {"svg": "image/svg+xml", "png": "image/png"}


def to_html(document: Document) -> str:
    """The whole document, images and style included: it needs no other file and no network."""
    folder = Path(__file__).with_name("templates")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        title=document.title, contents=document.headings(2), body=_blocks(document.blocks)
    )


def inline(text: Text) -> Markup:
    """Spans of text as HTML."""
    return Markup("").join(map(_span, text)) if isinstance(text, tuple) else _span(text)


def _span(span: Span) -> Markup:
    match span:
        case Code(text):
            return Markup("<code>{}</code>").format(text)
        case Strong(text):
            return Markup("<strong>{}</strong>").format(text)
        case str():
            return Markup.escape(span)


def _blocks(blocks: Sequence[Block]) -> Markup:
    return Markup("\n").join(map(_block, blocks))


def _block(block: Block) -> Markup:
    match block:
        case Heading(level, text):
            return Markup('<h{0} id="{1}">{2}</h{0}>').format(level, block.anchor, text)
        case Paragraph(text, tone):
            kind = Markup("") if tone == "plain" else Markup(' class="notice {}"').format(tone)
            return Markup("<p{}>{}</p>").format(kind, inline(text))
        case Bullets(items):
            return Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(inline(item)) for item in items))
        case CodeBlock(text):
            return Markup("<pre><code>{}</code></pre>").format(text)
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Details(summary, inner):
            return Markup("<details><summary>{}</summary>\n{}\n</details>").format(summary, _blocks(inner))


def _table(table: Table) -> Markup:
    head = Markup("").join(map(_head, table.columns))
    rows = Markup("\n").join(_row(table.columns, row, index in table.breaks) for index, row in enumerate(table.rows))
    caption = Markup("<figcaption>{}</figcaption>").format(inline(table.caption)) if table.caption else Markup("")
    whole = '<figure class="table"><table class="sortable"><thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody></table>{}</figure>'
    return Markup(whole).format(head, rows, caption)


def _row(columns: Sequence[Column], row: Sequence[Value], begins: bool) -> Markup:
    kind = Markup(' class="begins"') if begins else Markup("")
    return Markup("<tr{}>{}</tr>").format(kind, Markup("").join(_cell(column, value) for column, value in zip(columns, row, strict=True)))


def _head(column: Column) -> Markup:
    note = Markup(' title="{}"').format(column.note) if column.note else Markup("")
    kind = column.align + (" wide" if column.wide else "")
    return Markup('<th class="{}"{} scope="col" tabindex="0">{}</th>').format(kind, note, column.title)


def _cell(column: Column, value: Value) -> Markup:
    sort = (
        Markup("")
        if value.sort is None
        else Markup(' data-sort="{}"').format(f"{value.sort:.10g}" if isinstance(value.sort, float) else value.sort)
    )
    text = inline(value.text)
    if value.tone not in ("plain", "muted"):
        text = Markup('<span class="tag {}">{}</span>').format(value.tone, text)
    muted = " muted" if value.tone == "muted" else ""
    return Markup('<td class="{}{}"{}>{}</td>').format(column.align, muted, sort, text)


def _figure(figure: Figure) -> Markup:
    suffix = "svg" if "svg" in figure.files else "png"
    data = base64.b64encode(figure.files[suffix]).decode()
    caption = Markup("<figcaption>{}</figcaption>").format(inline(figure.caption)) if figure.caption else Markup("")
    whole = '<figure class="picture"><img src="data:{};base64,{}" alt="{}">{}</figure>'
    return Markup(whole).format(_TYPES[suffix], data, figure.alt, caption)
