"""
Samples with the order in which they were written: as text, a page and a picture; and charts.

Samples are a list of (pieces, revealed_at): the text of each token, and the number of the call that
revealed it, -1 where it was given.
"""

import html
import json
import math
import os
import sys
from pathlib import Path

from plumbing.checkpoint import write_file
from plumbing.cli import UserError

PAGE = Path(__file__).with_name("page.html")  # what page() fills in
EARLY_TO_LATE = (196, 202, 208, 220, 154, 46, 48, 45, 33, 63)  # xterm colours, red to violet


def pieces(tokenizer, x, at, n=None):
    """Samples of tokens x (N, L), revealed at (N, L): their first n tokens, or all."""
    rows = zip(x[:, :n].tolist(), at[:, :n].tolist(), strict=True)
    return [(tokenizer.pieces(ids), revealed_at) for ids, revealed_at in rows]


def write(path, text):
    path = Path(path)
    if os.path.realpath(path) == os.path.realpath(PAGE):
        raise UserError(f"{path} is the template of the page; take another name")
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8"))
    print(f"wrote {path}")


# ---- as text -------------------------------------------------------------------------------------


def legend(colour):
    if not colour:
        return "order: the digit below says when a character was revealed: 0 first, 9 last, . given"
    scale = "".join(f"\033[38;5;{c}m█" for c in EARLY_TO_LATE)
    return f"order: revealed first {scale}\033[0m last; plain: given; ↵ ends a line"


def printable(c):
    return c if c.isprintable() else "·"  # an escape sequence in a text must not reach a terminal


def tenths(revealed_at):
    """{number of a call: 0 for the first .. 9 for the last}, without -1, which is given."""
    calls = sorted({at for at in revealed_at if at >= 0})
    return {at: 9 * i // max(1, len(calls) - 1) for i, at in enumerate(calls)}


def characters(pieces, revealed_at):
    """(character to show, tenth or None if given, does a line end here?) of one sample."""
    scale = tenths(revealed_at)
    for piece, at in zip(pieces, revealed_at, strict=True):
        for c in piece:
            yield "↵" if c == "\n" else printable(c), scale.get(at), c == "\n"


def render(pieces, revealed_at, colour):
    """One sample with its order: colours, or a line of digits under each line of text."""
    out, digits = [], ""
    for shown, tenth, ends in characters(pieces, revealed_at):
        if colour and tenth is not None:
            shown = f"\033[38;5;{EARLY_TO_LATE[tenth]}m{shown}\033[0m"
        digits += "." if tenth is None else str(tenth)
        out.append(shown)
        if ends:
            out.append("\n" if colour else f"\n{digits}\n")
            digits = ""
    return "".join(out) + ("" if colour or not digits else f"\n{digits}")


def show(samples, order):
    """Print samples; order: with colours or digits."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if order:
        print(legend(colour))
    for i, (pieces, at) in enumerate(samples):
        print(f"--- sample {i + 1}")
        plain = "".join(c if c in "\n\t" else printable(c) for c in "".join(pieces))
        print(render(pieces, at, colour) if order else plain)


# ---- as a page, as a picture ---------------------------------------------------------------------


def page(samples, about):
    """One HTML file that plays how the samples were written. It needs nothing but a browser."""
    rows = [dict(pieces=pieces, at=at) for pieces, at in samples]
    data = json.dumps(dict(about=about, samples=rows)).replace("<", "\\u003c")  # no </script>
    return PAGE.read_text("utf-8").replace('"DATA"', data)


def cells(samples, width):
    """(row, column, character, tenth) of every character, in lines of width at the most."""
    row = 0
    for pieces, revealed_at in samples:
        column = 0
        for shown, tenth, ends in characters(pieces, revealed_at):
            if column == width:
                row, column = row + 1, 0
            yield row, column, shown, tenth
            row, column = (row + 1, 0) if ends else (row, column + 1)
        row += 2


def svg(samples, width=72):
    """The samples as a picture, coloured by order, on light and dark grounds alike."""
    found = list(cells(samples, width))
    height = 18 * max((row + 2 for row, *_ in found), default=0) + 24
    hues = "".join(f".c{i}{{fill:hsl({15 + 265 * i // 9} 85% 38%)}}" for i in range(10))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {9 * width + 20} {height}">',
        f"<style>text{{font:15px monospace;fill:#222}}{hues}",
        "@media(prefers-color-scheme:dark){text{fill:#ddd}" + hues.replace("38%", "70%"),
        '}</style><text x="10" y="16">first</text><text x="160" y="16">last</text>',
        *(f'<rect class="c{i}" x="{60 + 9 * i}" y="6" width="9" height="11"/>' for i in range(10)),
    ]
    for row, column, c, tenth in found:
        if c != " ":
            style = "" if tenth is None else f' class="c{tenth}"'
            at = f'x="{10 + 9 * column}" y="{42 + 18 * row}"'
            out.append(f"<text{style} {at}>{html.escape(c)}</text>")
    return "\n".join([*out, "</svg>\n"])


# ---- charts --------------------------------------------------------------------------------------

COLOURS = (
    "#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#f28e2b", "#3fa7a0", "#9c755f", "#d37295",
    "#8c8c8c", "#c9a400",
)  # fmt: skip
STYLE = (
    "text{font:13px sans-serif;fill:#222}.axis{stroke:#888;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)
WIDTH, HEIGHT = 720, 400
LEFT, TOP, RIGHT, BOTTOM = 60, 15, 530, 350  # of the axes


def ticks(low, high):
    """Round numbers between low and high, about five of them."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def spread(values, margin):
    """Their range and a margin, a share of it; never empty."""
    low, high = min(values), max(values)
    margin = margin * (high - low) if high > low else 0.5 * abs(low) or 1
    return low - margin, high + margin


def chart(series, xlabel, ylabel, names=None):
    """An SVG. series: {label: [(x, y, error)]}. names: labels for x = 0, 1, .., which turns lines
    into points."""
    points = [p for line in series.values() for p in line]
    if not points:
        raise UserError("there are no figures to draw")
    x0, x1 = (-0.5, len(names) - 0.5) if names else spread([p[0] for p in points], 0)
    y0, y1 = spread([y + sign * e for _, y, e in points for sign in (-1, 1)], 0.04)

    def at(x, y):
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + (RIGHT - LEFT) * across, BOTTOM - (BOTTOM - TOP) * up

    labels = list(enumerate(names)) if names else [(x, f"{x:,.4g}") for x in ticks(x0, x1)]
    out = axes(
        [(at(x, y0)[0], label) for x, label in labels],
        [(at(x0, y)[1], f"{y:.4g}") for y in ticks(y0, y1)],
        xlabel,
        ylabel,
    )
    for i, (label, line) in enumerate(series.items()):
        colour, y = COLOURS[i % len(COLOURS)], TOP + 14 + 20 * i
        out += curve([(*at(x, y), at(x, y - e)[1], at(x, y + e)[1]) for x, y, e in line], colour,
                     joined=not names)  # fmt: skip
        box = f'<rect x="{RIGHT + 14}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
        out += [box, text(label, f'x="{RIGHT + 30}" y="{y}"')]
    view = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
    return "\n".join([f"{view}<style>{STYLE}</style>", *out, "</svg>\n"])


def text(what, where, anchor="start"):
    return f'<text {where} text-anchor="{anchor}">{html.escape(what)}</text>'


def axes(below, beside, xlabel, ylabel):
    """Two lines, what they measure, and labels at (pixel, text)."""
    out = [f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']
    for y, label in beside:
        out.append(text(label, f'x="{LEFT - 8}" y="{y + 4:.1f}"', "end"))
        out.append(f'<path class="axis" d="M{LEFT - 4} {y:.1f}h4"/>')
    for x, label in below:
        out.append(text(label, f'x="{x:.1f}" y="{BOTTOM + 18}"', "middle"))
    turned = f'transform="translate(14 {(TOP + BOTTOM) / 2}) rotate(-90)"'
    out.append(text(xlabel, f'x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}"', "middle"))
    return [*out, text(ylabel, turned, "middle")]


def curve(points, colour, joined):
    """Points (x, y, lower and upper end of the error bar) in pixels, joined by lines or not."""
    out = []
    if joined and points:
        d = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in points)
        out.append(f'<path d="M{d}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for x, y, low, high in points:
        out.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
    return out
