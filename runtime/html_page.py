"""Pages that people open in a browser: one file each, which needs nothing else.

Alone because a training's report and a load test's are made of the same parts: tables, and plots as inline SVG.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page; empty parts are left out."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    return f"<!doctype html>\n{head}\n<h1>{escape(title)}</h1>\n" + "\n".join(filter(None, parts))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows of values under their names; None is an empty cell."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join("<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{top}</tr>\n{body}\n</table></div>'


def plot(figure: Figure, title: str) -> str:
    """A figure of matplotlib under a headline."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    return f"<h2>{escape(title)}</h2>\n{svg[svg.index('<svg') :]}"  # without the head of a file of its own


def shown(cell: Any) -> str:
    """A value as HTML."""
    match cell:
        case None:
            return ""
        case bool():
            return str(cell).lower()
        case float():
            return f"{cell:,.6g}"
        case int():
            return f"{cell:,}"
    return escape(str(cell))
