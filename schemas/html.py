"""HTML for notebooks (`_repr_html_`): tables and texts in which nothing foreign is markup."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

# Categories of characters that are invisible, or that reorder or end the text around them.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
_SHOWN = {" ": "\N{MIDDLE DOT}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\u21e5"}
# Reorder text beyond the element they are in.
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def visible(token: str) -> str:
    """A token's text with blanks and control characters made visible; never empty."""
    shown = "".join(
        _SHOWN.get(c) or (_escaped(c) if unicodedata.category(c) in _HIDDEN else c) for c in token
    )
    return shown or "\N{EMPTY SET}"


def presentable(text: str) -> str:
    """Text as it is, but for characters that a page cannot hold or that reorder it."""
    return "".join(
        _escaped(c)
        if ord(c) in _BIDI or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")
        else c
        for c in text
    )


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"


def inline(text: object) -> str:
    """Foreign text within a line; notebooks must not take dollars in it for mathematics."""
    return escape(presentable(str(text))).replace("$", "<span>$</span>")


def paragraph(text: str) -> str:
    """Our own words, in which what is foreign went through `inline`."""
    return f"<p>{text}</p>"


def block(text: str) -> str:
    """Foreign text with its lines, broken where they are too long."""
    return f'<pre style="white-space:pre-wrap">{inline(text)}</pre>'


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are numbers or short words."""
    head = "".join(f'<th scope="col">{inline(heading)}</th>' for heading in headings)
    lines = []
    for first, *others in rows:
        cells = "".join(f'<td style="text-align:right">{inline(cell)}</td>' for cell in others)
        lines.append(
            f'<tr><th scope="row" style="text-align:left">{inline(first)}</th>{cells}</tr>'
        )
    header = f"<thead><tr>{head}</tr></thead>" if headings else ""
    return f"<table>{header}<tbody>{''.join(lines)}</tbody></table>"


def page(*parts: str) -> str:
    """Parts together, kept out of what a notebook takes for mathematics."""
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'
