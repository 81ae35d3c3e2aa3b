"""A report as a small tree, which `markdown` and `html` print."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["plain", "good", "bad", "open", "muted"]
Align = Literal["left", "right"]


@dataclass(frozen=True)
class Code:
    """Text set as code."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Text set in bold."""

    text: str


Span = str | Code | Strong
Text = Span | tuple[Span, ...]
"""Literal text; renderers escape it."""


@dataclass(frozen=True)
class Value:
    """A table cell: what is shown, what it sorts by, and how it is toned."""

    text: Text
    sort: float | str | None = None
    tone: Tone = "plain"


@dataclass(frozen=True)
class Column:
    """Head of a table column; `note` explains it on hover, `wide` columns hold sentences."""

    title: str
    align: Align = "left"
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of as many values as there are columns; `breaks` are the indices of rows that begin a new group."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    caption: Text = ""
    breaks: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row of {len(row)} values in a table of {len(self.columns)} columns: {row!r}")


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    level: int
    text: str

    @property
    def anchor(self) -> str:
        """Target for links, made from the text."""
        return re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")


@dataclass(frozen=True)
class Paragraph:
    """Running text; a toned one is set off as a notice."""

    text: Text
    tone: Tone = "plain"


@dataclass(frozen=True)
class Bullets:
    """An unordered list."""

    items: Sequence[Text]


@dataclass(frozen=True)
class CodeBlock:
    """A command or other literal lines."""

    text: str


@dataclass(frozen=True)
class Figure:
    """An image that is written beside the report: file suffix (svg, png) to content."""

    name: str
    alt: str
    caption: Text
    files: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away under a summary line."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Bullets | CodeBlock | Table | Figure | Details


@dataclass(frozen=True)
class Document:
    """Blocks in reading order."""

    title: str
    blocks: Sequence[Block]

    def figures(self) -> Iterator[Figure]:
        """Every figure, folded ones included."""
        yield from _figures(self.blocks)

    def headings(self, level: int) -> list[Heading]:
        """Headings of a level, for a list of contents."""
        return [block for block in self.blocks if isinstance(block, Heading) and block.level == level]


def _figures(blocks: Sequence[Block]) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figure):
            yield block
        elif isinstance(block, Details):
            yield from _figures(block.blocks)
