"""A document as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emca_bench.report.document import (
    Block,
    Bullets,
    Code,
    CodeBlock,
    Details,
    Document,
    Figure,
    Heading,
    Paragraph,
    Span,
    Strong,
    Table,
    Text,
)

# brackets alone are literal; only where a target follows do they make a link
_SPECIAL = re.compile(r"([\\`*<>|#~]|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def to_markdown(document: Document, *, figure_folder: str = "figures") -> str:
    """The whole document; figures are linked, `figure_folder` relative to the file."""
    return _blocks([Heading(1, document.title), *document.blocks], figure_folder) + "\n"


def escape(text: str) -> str:
    """Literal text on one line, safe in running text and in table cells."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def inline(text: Text) -> str:
    """Spans of text as Markdown."""
    return "".join(map(_span, text)) if isinstance(text, tuple) else _span(text)


def table(content: Table) -> str:
    """A pipe table."""
    lines = [_row([escape(column.title) for column in content.columns])]
    lines.append(_row(["---:" if column.align == "right" else "---" for column in content.columns]))
    lines += [_row([inline(value.text) for value in row]) for row in content.rows]
    return "\n".join(lines)


def _span(span: Span) -> str:
    match span:
        case Code(text):
            fence = "``" if "`" in text else "`"
            return f"{fence}{' '.join(text.split())}{fence}".replace("|", "\\|")
        case Strong(text):
            return f"**{escape(text)}**"
        case str():
            leading, trailing = span[: len(span) - len(span.lstrip())], span[len(span.rstrip()) :]
            return f"{' ' if leading else ''}{escape(span)}{' ' if trailing and span.strip() else ''}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _blocks(blocks: Sequence[Block], figure_folder: str) -> str:
    return "\n\n".join(_block(block, figure_folder) for block in blocks)


def _block(block: Block, figure_folder: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escape(text)}"
        case Paragraph(text, tone):
            return inline(text) if tone == "plain" else f"> {inline(text)}"
        case Bullets(items):
            return "\n".join(f"- {inline(item)}" for item in items)
        case CodeBlock(text):
            return f"```\n{text}\n```"
        case Table():
            return table(block) + (f"\n\n{inline(block.caption)}" if block.caption else "")
        case Figure(name, alt, caption, files):
            suffix = "svg" if "svg" in files else "png"
            return f"![{escape(alt)}]({figure_folder}/{name}.{suffix})" + (f"\n\n{inline(caption)}" if caption else "")
        case Details(summary, inner):
            return f"<details>\n<summary>{_html_text(summary)}</summary>\n\n{_blocks(inner, figure_folder)}\n\n</details>"


def _html_text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
