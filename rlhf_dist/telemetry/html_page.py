"""One HTML page that needs nothing else: style inside, no script, no network; every text is shown as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

from rlhf_dist.telemetry.comparison import printable

LONGEST = 1000
"""Characters of a text that is shown; what is longer is cut, and the page says so."""
MOST_ROWS = 100
"""Rows of a table, and facts of a list; further ones are only counted."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Even what got past the escaping could run and load nothing."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --ink: #1c2430; --soft: #5d6878; --rule: #dde1e7;
  --good: #18794e; --bad: #b4232c;
  --c0: #1f6fb4; --c1: #d9692b; --c2: #3f8f50; --c3: #8656b8; --c4: #a87b12 }
@media (prefers-color-scheme: dark) { :root { --back: #14181f; --card: #1c222c; --ink: #e6eaf0; --soft: #9aa6b6;
  --rule: #303948; --good: #5cc98f; --bad: #f2777f;
  --c0: #6cb1ec; --c1: #f0965f; --c2: #7ac58a; --c3: #bb97e6; --c4: #d9b04a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1160px; padding: 20px 16px 60px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { font-size: 25px; margin: 8px 0 2px; overflow-wrap: anywhere } h2 { font-size: 19px; margin: 34px 0 6px }
h3 { font-size: 15px; margin: 18px 0 4px } p { margin: 4px 0 10px; max-width: 76ch; overflow-wrap: anywhere }
.soft, .missing, small { color: var(--soft) } small { font-size: 13px }
.missing { border-left: 3px solid var(--rule); padding-left: 10px }
.wide { overflow-x: auto } table { border-collapse: collapse; width: max-content; margin: 6px 0 12px;
  font-variant-numeric: tabular-nums }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top }
th { font-weight: 600; color: var(--soft); font-size: 13px } td.n, th.n { text-align: right; white-space: nowrap }
td { overflow-wrap: break-word; max-width: 60ch }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px }
.facts { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 8px 0 } .facts > span { overflow-wrap: anywhere }
.facts b { color: var(--soft); font-weight: 600; font-size: 13px; margin-right: 7px }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 10px 12px 4px; min-width: 0 }
figcaption { font-size: 14px; min-height: 21px } .keys { float: right; font-size: 12px; color: var(--soft) }
.key { margin-left: 10px } .key::before { content: "\\25CF"; margin-right: 4px; color: var(--k) }
svg { width: 100%; height: auto; display: block } svg text { font-size: 10.5px; fill: var(--soft) }
.grid path.grid, path.grid { stroke: var(--rule); stroke-width: .7 } path.axis { stroke: var(--soft); stroke-width: .8 }
.c0 { --k: var(--c0) } .c1 { --k: var(--c1) } .c2 { --k: var(--c2) } .c3 { --k: var(--c3) } .c4 { --k: var(--c4) }
path.line { fill: none; stroke: var(--k); stroke-width: 1.7; stroke-linejoin: round } circle { fill: var(--k) }
path.dashed { stroke-dasharray: 4 3; stroke-width: 1.1; stroke: var(--soft) }
path.bar { stroke: var(--k); stroke-width: 1.3; opacity: .45 }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0 4px }
.tile { background: var(--card); border-radius: 8px; padding: 9px 16px; min-width: 140px }
.tile b { display: block; font-size: 21px } .tile span { color: var(--soft); font-size: 13px }
.card { background: var(--card); border-radius: 8px; padding: 10px 14px; margin: 10px 0 }
.card h4 { margin: 0 0 6px; font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); gap: 6px 18px }
.side b { font-size: 13px; color: var(--soft); font-weight: 600 }
.said { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16em; overflow-y: auto }
.good { color: var(--good) } .bad { color: var(--bad) }
details { margin: 8px 0 } summary { cursor: pointer; color: var(--soft) }
"""


def shown(text: str, longest: int = LONGEST) -> str:
    """Any text as HTML that shows it: tags and control characters as they are written, cut where it is too long."""
    kept = escape(printable(text[:longest]))
    more = len(text) - longest
    return f"{kept} <small>(and {more:,} more characters)</small>" if more > 0 else kept


def missing(sentence: str) -> str:
    """What is not there, and why."""
    return f"<p class=missing>{shown(sentence)}</p>"


def paragraph(text: str) -> str:
    return f"<p>{shown(text)}</p>"


def soft(text: str) -> str:
    """A remark below a heading."""
    return f"<p><small>{shown(text)}</small></p>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """(name, value), one after the other."""
    each = (f"<span><b>{shown(name)}</b>{shown(value)}</span>" for name, value in pairs[:MOST_ROWS])
    return f"<div class=facts>{''.join(each)}{_more(pairs)}</div>"


def _more(rows: Sequence[object]) -> str:
    left = len(rows) - MOST_ROWS
    return f"<small>and {left:,} more</small>" if left > 0 else ""


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """A table of texts; the columns that are no `words` are right-aligned."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ("" if place in words else " class=n" for place in range(len(row)))
        return "".join(f"<{tag}{kind}>{shown(cell)}</{tag}>" for cell, kind in zip(row, kinds, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows[:MOST_ROWS])
    head = f"<thead><tr>{cells('th', headers)}</tr></thead>"
    return f"<div class=wide><table>{head}<tbody>{body}</tbody></table>{_more(rows)}</div>"


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """(figure, what it is), large."""
    each = (f"<div class=tile><b>{shown(figure)}</b><span>{shown(what)}</span></div>" for figure, what in facts)
    return f"<div class=tiles>{''.join(each)}</div>"


def grid(figures: Sequence[str]) -> str:
    """Figures beside each other, as many as fit."""
    return f"<div class=grid>{''.join(figures)}</div>"


def folded(title: str, inner: str) -> str:
    """Hidden until it is clicked; needs no script."""
    return f"<details><summary>{shown(title)}</summary>{inner}</details>"


def section(title: str, *parts: str) -> str:
    return f"<h2>{shown(title)}</h2>{''.join(parts)}"


def page(title: str, below: str, parts: Sequence[str]) -> str:
    """The whole document; `below`: a line below its title, `parts`: HTML."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{shown(title, 120)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{shown(title)}</h1><p class=soft>{shown(below)}</p>",
            *parts,
            "</body></html>",
            "",
        ]
    )
