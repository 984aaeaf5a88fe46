"""Self-contained HTML pages: one file, no scripts, light and dark, readable when printed; and how
sizes and formats are written for people."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

_CSS = """
:root { color-scheme: light dark;
  --paper: #fdfdfc; --card: #ffffff; --ink: #1c1e21; --soft: #62676f; --line: #e3e4e6;
  --accent: #2f6f9f; --pale: #c9d8e4; --warm: #b8642d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --card: #1b1e22; --ink: #e4e6e9; --soft: #979da6; --line: #2e3238;
  --accent: #6cabd6; --pale: #33475a; --warm: #e0935c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 27px; line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
h2 { font-size: 17px; font-weight: 650; margin: 44px 0 4px; }
p { margin: 6px 0 14px; max-width: 72ch; } .soft, p.note { color: var(--soft); }
p.lead { font-size: 17px; margin-top: 8px; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 12px; margin: 26px 0 8px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 16px; }
.card b { display: block; font-size: 23px; font-weight: 600; line-height: 1.2; }
.card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px;
  white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.why { color: var(--soft); min-width: 170px; }
tr.total td { font-weight: 600; border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.bars td { border: 0; padding: 4px 12px 4px 0; white-space: nowrap; vertical-align: middle; }
 .bars td.b { width: 100%; }
.bar { height: 15px; border-radius: 3px; background: var(--accent); min-width: 2px; }
.bar.pale { background: var(--pale); } .bar.warm { background: var(--warm); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px;
  font-family: inherit; } svg text.ink { fill: var(--ink); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr));
  gap: 14px 20px; }
.grid figure { margin: 0; } figcaption { font-size: 12.5px; color: var(--soft); }
.axis { stroke: var(--line); } .line { stroke: var(--accent); fill: none; stroke-width: 2; }
.dot { fill: var(--accent); } .was { fill: var(--pale); } .now { fill: var(--accent); }
.thumbs { display: flex; flex-wrap: wrap; gap: 14px; } .thumbs figure { margin: 0; width: 84px; }
.thumbs img { width: 84px; height: 84px; image-rendering: pixelated; border-radius: 5px;
  display: block; margin-bottom: 3px; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media print { main { padding: 0; } h2 { break-after: avoid; } }
"""


class Bar(NamedTuple):
    """One bar: its label, its length, the text after it, and its colour class."""

    label: str
    value: float
    text: str
    style: str = ""


class Page:
    """Collects parts; `html()` gives the whole document."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def cards(self, cards: Sequence[tuple[str, str]]) -> None:
        """Key figures: (figure, what it is)."""
        inner = "".join(
            f'<div class="card"><b>{html.escape(figure)}</b><span>{html.escape(what)}</span></div>'
            for figure, what in cards
        )
        self._parts.append(f'<div class="cards">{inner}</div>')

    def section(self, title: str, body: str, note: str = "") -> None:
        """A heading, an explanation in one or two sentences, and markup."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")
        if note:
            self._parts.append(f'<p class="note">{html.escape(note)}</p>')
        self._parts.append(body)

    def footer(self, text: str) -> None:
        self._parts.append(f"<footer>{html.escape(text)}</footer>")

    def html(self) -> str:
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_CSS}</style>\n</head>\n"
            f"<body>\n<main>\n{chr(10).join(self._parts)}\n</main>\n</body>\n</html>\n"
        )


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: Sequence[int] = (),
    muted: Sequence[int] = (),
    total: bool = False,
) -> str:
    """A table; ``numeric`` columns are right-aligned, the last row may be a total."""

    def style(column: int) -> str:
        return ' class="n"' if column in numeric else ' class="why"' if column in muted else ""

    head = "".join(f"<th{style(i)}>{html.escape(h)}</th>" for i, h in enumerate(headers))
    body = "".join(
        f"<tr{' class=total' if total and i == len(rows) - 1 else ''}>"
        + "".join(f"<td{style(j)}>{html.escape(cell)}</td>" for j, cell in enumerate(row))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars on one linear scale from zero."""
    longest = max((row.value for row in rows), default=0) or 1
    inner = "".join(
        f'<tr><td>{html.escape(row.label)}</td><td class="b"><div class="bar {row.style}" '
        f'style="width:{100 * row.value / longest:.2f}%"></div></td>'
        f'<td class="n">{html.escape(row.text)}</td></tr>'
        for row in rows
    )
    return f'<table class="bars"><tbody>{inner}</tbody></table>'


def line(points: Sequence[tuple[str, float]], unit: str = "%", height: int = 190) -> str:
    """A line through labelled values, each with its figure; the axis does not start at zero."""
    width, left, right, top, bottom = 900, 30, 30, 34, 34
    values = [value for _, value in points if math.isfinite(value)]
    low, high = min(values), max(values)
    spread = max(high - low, 1e-6)
    step = (width - left - right) / max(len(points) - 1, 1)

    def place(index: int, value: float) -> tuple[float, float]:
        share = (value - low) / spread
        return left + index * step, height - bottom - 14 - share * (height - top - bottom - 14)

    spots = [(place(i, v), label, v) for i, (label, v) in enumerate(points) if math.isfinite(v)]
    path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _, _ in spots)
    marks = []
    for (x, y), label, value in spots:
        anchor = "start" if x == left else "end" if x > width - right - 1 else "middle"
        marks.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
            f'<text class="ink" x="{x:.1f}" y="{y - 11:.1f}" text-anchor="{anchor}">'
            f"{value:.2f}{unit}</text>"
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">{html.escape(label)}</text>'
        )
    base = height - bottom
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img"><line class="axis" x1="{left}" '
        f'x2="{width - right}" y1="{base}" y2="{base}"/><polyline class="line" points="{path}"/>'
        f"{''.join(marks)}</svg>"
    )


def histogram(
    before: Sequence[float], after: Sequence[float], low: float, high: float, caption: str
) -> str:
    """Two distributions over ``[low, high]`` in equal bins, scaled by their square roots."""
    width, height, base = 210, 92, 74
    tallest = math.sqrt(max([*before, *after, 1e-12]))
    step = width / max(len(before), 1)

    def columns(counts: Sequence[float], style: str, share: float) -> str:
        return "".join(
            f'<rect class="{style}" x="{i * step + step * (1 - share) / 2:.2f}" '
            f'y="{base - 70 * math.sqrt(c) / tallest:.2f}" width="{step * share:.2f}" '
            f'height="{70 * math.sqrt(c) / tallest:.2f}"/>'
            for i, c in enumerate(counts)
            if c > 0
        )

    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img">'
        f"{columns(before, 'was', 1.0)}{columns(after, 'now', 0.55)}"
        f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>'
        f'<text x="0" y="{height - 4}">{low:.3g}</text>'
        f'<text x="{width}" y="{height - 4}" text-anchor="end">{high:.3g}</text></svg>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def grid(figures: Sequence[str]) -> str:
    """Small figures side by side, as many as fit."""
    return f'<div class="grid">{"".join(figures)}</div>'


def heatmap(labels: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A square matrix of shares; the diagonal is left pale so that the rest is seen."""
    size, left, top = 40, 92, 24
    n = len(labels)
    most = max((v for i, row in enumerate(values) for j, v in enumerate(row) if i != j), default=0)
    cells = []
    for i, row in enumerate(values):
        cells.append(
            f'<text x="{left - 10}" y="{top + i * size + 25}" text-anchor="end">'
            f"{html.escape(labels[i])}</text>"
        )
        for j, value in enumerate(row):
            opacity = 0.14 if i == j else math.sqrt(value / most) if most else 0
            style = "now" if i == j else "hot"
            cells.append(
                f'<rect class="{style}" fill="var(--warm)" x="{left + j * size + 1}" '
                f'y="{top + i * size + 1}" width="{size - 2}" height="{size - 2}" rx="3" '
                f'opacity="{opacity:.2f}"/>'
            )
            if value:
                cells.append(
                    f'<text class="ink" x="{left + j * size + size / 2}" '
                    f'y="{top + i * size + 25}" text-anchor="middle">{value:.0f}</text>'
                )
    heads = "".join(
        f'<text x="{left + j * size + size / 2}" y="{top - 8}" text-anchor="middle">'
        f"{html.escape(label[:5])}</text>"
        for j, label in enumerate(labels)
    )
    width, height = left + n * size, top + n * size
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:620px" role="img">'
        f"{heads}{''.join(cells)}</svg>"
    )


def axis(choice: Any) -> str:
    """``DynamicFixedPoint(bits=6, overflow=0.0)`` as ``DynamicFixedPoint(6)`` and the like."""
    spec = choice.to_spec()
    if spec == {"type": "Float", "dtype": spec.get("dtype")}:
        return spec["dtype"]
    fields = {k: v for k, v in spec.items() if k != "type"}
    short = [str(fields.pop("bits"))] if "bits" in fields else []
    try:
        defaults = type(choice)(**({"bits": choice.bits} if short else {})).to_spec()
    except TypeError:
        defaults = {}
    for key, value in fields.items():
        if key not in defaults or defaults[key] != value:
            # A choice that is a word says by itself what it is a choice of.
            short.append(value if isinstance(value, str) else f"{key}={value}")
    return f"{spec['type']}({', '.join(short)})" if short else spec["type"]


def nbytes(count: float) -> str:
    """A number of bytes as people read it: ``152.3 KB`` (1 KB = 1000 bytes)."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("KB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.{1 if count >= 100 else 2}f} {unit}"
    return f"{count / 1000:.2f} GB"
