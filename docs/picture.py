"""Draw the picture of the idea, once for a light and once for a dark page: `python docs/picture.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
WIDTH, HEIGHT = 880, 396
# Each passage has a colour, and its adapter has the same.
PASSAGES = (
    ("Ferry Marit", "built in 1987 by the Osterby yard …"),
    ("The fog bell", "cast in 1872 by Jonas Lehmbeck …"),
    ("Founder", "founded in 1911 by Aksel Tolvane …"),
)
LIGHT = {
    "text": "#1f2933", "quiet": "#5b6770", "line": "#9aa5ad", "card": "#ffffff", "edge": "#cfd6db", "model": "#eef1f3",
    "passages": ("#0f766e", "#b45309", "#6d28d9"),
}  # fmt: skip
DARK = {
    "text": "#e6eaed", "quiet": "#a3adb5", "line": "#77828a", "card": "#1b2228", "edge": "#3c474f", "model": "#2a333a",
    "passages": ("#2dd4bf", "#fbbf24", "#c4b5fd"),
}  # fmt: skip


def draw(colours: dict[str, object]) -> str:
    """Return the picture as SVG, without a background: it lies on the page's own."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\">",
        "<title>Passages become adapters; a question adds the adapters of the passages it needs to the weights</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{colours["line"]}"/></marker></defs>',
        text(20, 24, "OFFLINE: ONCE FOR EACH PASSAGE", colours["quiet"], 12, weight=600),
        text(560, 24, "ONLINE: FOR EACH QUESTION", colours["quiet"], 12, weight=600),
        f'<path d="M530 12 V{HEIGHT - 12}" stroke="{colours["edge"]}" stroke-dasharray="3 5"/>',
    ]
    for number, (title, words) in enumerate(PASSAGES):
        colour = colours["passages"][number]
        y = 52 + number * 92
        parts += [
            box(20, y, 218, 60, colours["card"], colours["edge"]),
            f'<rect x="20" y="{y}" width="5" height="60" rx="2" fill="{colour}"/>',
            text(36, y + 25, title, colours["text"], 14, weight=600),
            text(36, y + 45, words, colours["quiet"], 11),
            arrow(244, y + 30, 392, y + 30, colours["line"]),
            text(318, y + 22, "questions, answers", colours["quiet"], 11, "middle"),
            text(318, y + 46, "training", colours["quiet"], 11, "middle"),
            adapter(404, y + 6, str(colour), colours["card"]),
        ]
    parts += [
        text(128, 344, "passages", colours["text"], 13, "middle"),
        text(442, 344, "adapters B·A of rank 2", colours["text"], 13, "middle"),
        # Online.
        box(560, 40, 300, 40, colours["card"], colours["edge"], 20),
        text(710, 65, "Who cast the fog bell?", colours["text"], 14, "middle"),
        arrow(710, 84, 710, 112, colours["line"]),
        text(724, 102, "BM25 finds the passage", colours["quiet"], 11),
        box(560, 120, 300, 150, colours["model"], colours["edge"]),
        text(710, 142, "the weights, for this question alone", colours["quiet"], 12, "middle"),
        box(750, 162, 86, 86, colours["card"], colours["line"]),
        text(793, 214, "W", colours["text"], 26, "middle", 600),
        text(718, 214, "+", colours["text"], 26, "middle"),
        adapter(610, 181, str(colours["passages"][1]), colours["card"]),
        arrow(492, 176, 600, 203, colours["passages"][1], "4 4"),
        arrow(710, 274, 710, 306, colours["line"]),
        box(560, 314, 300, 40, colours["card"], colours["edge"], 20),
        text(710, 339, "Jonas Lehmbeck", colours["text"], 14, "middle", 600),
        text(710, 378, "without the passage in the prompt, or with it", colours["quiet"], 11, "middle"),
    ]
    return "\n".join([*parts, "</svg>\n"])


def text(x: int, y: int, words: str, fill: object, size: int, anchor: str = "start", weight: int = 400) -> str:
    """Return one line of text."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{fill}">{escape(words)}</text>'
    )


def box(x: int, y: int, width: int, height: int, fill: object, stroke: object, radius: int = 8) -> str:
    """Return a rectangle with round corners."""
    size = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"'
    return f'<rect {size} fill="{fill}" stroke="{stroke}"/>'


def arrow(x: int, y: int, to_x: int, to_y: int, stroke: object, dashes: str = "none") -> str:
    """Return an arrow from one point to another."""
    line = f'<path d="M{x} {y} L{to_x} {to_y}" stroke="{stroke}" stroke-width="1.5" fill="none"'
    return f'{line} stroke-dasharray="{dashes}" marker-end="url(#tip)"/>'


def adapter(x: int, y: int, colour: str, paper: object) -> str:
    """Return an adapter: the tall factor B and the wide factor A."""
    parts = [
        f'<rect x="{x}" y="{y}" width="12" height="48" rx="3" fill="{colour}"/>',
        f'<rect x="{x + 20}" y="{y + 18}" width="56" height="12" rx="3" fill="{colour}"/>',
        f'<path d="M{x + 6} {y + 3} V{y + 45} M{x + 23} {y + 24} H{x + 73}" stroke="{paper}" opacity="0.6"/>',
    ]
    return "".join(parts)


def pictures() -> dict[Path, str]:
    """Return each picture by its file."""
    return {PICTURES / f"idea-{name}.svg": draw(colours) for name, colours in (("light", LIGHT), ("dark", DARK))}


if __name__ == "__main__":
    for file, content in pictures().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")
