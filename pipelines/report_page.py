"""What the HTML reports share: one page without other files, for any screen, light, dark and paper."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# One colour a mode, in every plot; they can be told apart by people who see colours otherwise (Okabe and Ito).
COLOURS = {"closed": "#8c8c8c", "rag": "#d98c00", "prag": "#0072b2", "combine": "#009e73", "auto": "#cc79a7"}
CONTROL_COLOUR = "#b9b9b9"
_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--text:#1b1c1f;--quiet:#55585f;--line:#cfd2d8;--panel:#f4f5f7;
--good:#176b2c;--bad:#a8201a;--open:#7a4d00}
@media(prefers-color-scheme:dark){:root{--ground:#15171b;--text:#e7e8ea;--quiet:#b2b5bc;--line:#3b3f47;--panel:#1f2228;
--good:#7ddb95;--bad:#ffb0a8;--open:#f3c969}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem clamp(.75rem,3vw,2rem) 3rem;background:var(--ground);color:var(--text);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.quiet{color:var(--quiet);font-size:.9rem}
.verdict{list-style:none;margin:1rem 0;padding:0}
.verdict li{margin:.5rem 0;padding:.6rem .9rem;background:var(--panel)}
.verdict li{border-left:.3rem solid var(--open);border-radius:.3rem}
.verdict .good{border-color:var(--good)}.verdict .bad{border-color:var(--bad)}
.scroll{overflow-x:auto}.scroll:focus-visible{outline:3px solid var(--text)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap}
th:first-child{text-align:left}
.text{min-width:40rem}.text td,.text th{text-align:left;white-space:normal;min-width:8rem}
figure{margin:0}svg{max-width:100%;height:auto}svg text{fill:currentColor}
code,pre{background:var(--panel);border-radius:.2rem;padding:.1rem .3rem;white-space:pre-wrap}
dt{font-weight:600}dd{margin:0 0 .5rem}summary{cursor:pointer}
@media print{:root{color-scheme:light}body{max-width:none;font-size:10pt}.scroll{overflow:visible}
figure,tr,.verdict li{break-inside:avoid}h2{break-after:avoid}}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return the whole page; `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join([f"<h1>{escape(title)}</h1>", *parts])
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(text: Any) -> str:
    """Return a text as HTML shows it."""
    return html.escape(str(text))


def section(title: str, content: str) -> str:
    """Return a section with its heading; `content` is HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """Return a table that scrolls by itself where it is too wide; the first cell of a row is its name."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">'
        f'<table class="{style}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def glossary(terms: Mapping[str, str]) -> str:
    """Return a list of terms and what they mean."""
    return "<dl>" + "".join(f"<dt>{escape(t)}</dt><dd>{escape(m)}</dd>" for t, m in terms.items()) + "</dl>"


class Plot:
    """A plot under construction: `axes` are matplotlib's, and `svg()` is the finished figure as HTML."""

    def __init__(self, title: str, height: float) -> None:
        # Not pyplot, which has global state and looks for a display. Narrow, so that its words are large on a phone.
        from matplotlib.figure import Figure

        self.title = title
        self.axes: Any = Figure(figsize=(5.5, height)).subplots()
        self.axes.spines[["top", "right"]].set_visible(False)

    def svg(self) -> str:
        """Return the figure; the same plot always gives the same bytes, and takes the text's colour of the page."""
        self.axes.figure.tight_layout()
        sink = io.StringIO()
        self.axes.figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawn = sink.getvalue().partition("?>")[2].partition(">")[2].replace("#000000", "currentColor")
        # Ids are unique in a page.
        name = re.sub(r"\W+", "-", self.title.lower())
        drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
        drawn = re.sub(r"<svg ", f'<svg role="img" aria-label="{escape(self.title)}" ', drawn, count=1)
        return f"<figure>{drawn}</figure>"


@contextmanager
def plotting() -> Iterator[None]:
    """Set what all plots have in common while they are made."""
    import matplotlib

    # The salt fixes the ids in the SVG.
    with matplotlib.rc_context({"svg.hashsalt": "prag", "svg.fonttype": "none", "font.size": 10}):
        yield
