"""Text and tables for a Markdown page. Records and configurations may be from a stranger, so their text is escaped."""

import html
import re
from collections.abc import Sequence

from ..io import one_line

# Control characters, lone surrogates (which cannot be encoded), and characters that change the text direction.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def plain(text: object) -> str:
    """Escapes untrusted text, which Markdown, its tables and HTML then show literally; one line of bounded length."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(_shown(text), quote=False))


def code(text: object) -> str:
    """Formats untrusted text as Markdown code, on one line of bounded length, without backticks, which would end it."""
    return f"`{_shown(text).replace('`', chr(39)) or ' '}`"


def quoted(text: object) -> str:
    """Formats untrusted text as a Python string literal, on one line."""
    escaped = _shown(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _shown(text: object) -> str:
    return visible(one_line(text))


def visible(text: str) -> str:
    """Replaces characters that would hide or reorder what a reader sees, or cannot be written."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Formats a Markdown table.

    Args:
        rows: The first row holds the names of the columns.
        left: Number of columns, from the left, that are left-aligned; the others are right-aligned.
    """
    head, *body = rows
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    # Any bar that is not escaped ends a cell, even inside code.
    cells = ([re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in (head, rule, *body))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
