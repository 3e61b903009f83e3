"""One way to print what a report holds: a table as text, and as HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def cell(value: float | None) -> str:
    """A number to three digits, or "-" for what is not known."""
    return "-" if value is None else f"{value:.3g}"


def text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of columns, the first flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(line, widths) for line in lines)


def _line(line: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [value.rjust(width) for value, width in zip(line[1:], widths[1:], strict=True)]
    return "  ".join([line[0].ljust(widths[0]), *numbers]).rstrip()


def to_html(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """The same as an HTML table; what the cells hold is escaped."""
    body = "".join(_row("td", row) for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead>{_row('th', header)}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    first = f'<{tag} style="text-align:left">{html.escape(cells[0])}</{tag}>'
    return (
        f"<tr>{first}{''.join(f'<{tag}>{html.escape(value)}</{tag}>' for value in cells[1:])}</tr>"
    )
