"""
Samples with the order in which they were written: as text, as a page, as a picture.

Samples are a list of (pieces, revealed_at): the text of each token, and the number of the
call that revealed it, -1 where it was given.
"""

import html
import json
import os
import sys
from pathlib import Path

from plumbing.checkpoint import write_file

PAGE = Path(__file__).with_name("page.html")  # what page() fills in
EARLY_TO_LATE = (196, 202, 208, 220, 154, 46, 48, 45, 33, 63)  # xterm colours, red to violet


def pieces(tokenizer, x, at):
    """Samples of tokens x (N, L), revealed at (N, L)."""
    rows = zip(x.tolist(), at.tolist(), strict=True)
    return [(tokenizer.pieces(ids), revealed_at) for ids, revealed_at in rows]


def write(path, text):
    """UserError if it cannot be written."""
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8"))
    print(f"wrote {path}")


# ---- as text -------------------------------------------------------------------------------
def render(pieces, revealed_at, colour):
    """One sample with its order: colours, or a line of digits under each line of text."""
    out = []
    digits = ""
    for shown, tenth, ends in characters(pieces, revealed_at):
        if colour and tenth is not None:
            shown = f"\033[38;5;{EARLY_TO_LATE[tenth]}m{shown}\033[0m"
        out.append(shown)
        digits += "." if tenth is None else str(tenth)
        if ends:
            out.append("\n" if colour else f"\n{digits}\n")
            digits = ""

    if digits and not colour:
        out.append(f"\n{digits}")
    return "".join(out)


def characters(pieces, revealed_at):
    """(character to show, tenth or None if given, does a line end here?) of one sample.
    Tenths are those of the calls: 0 for the first .. 9 for the last."""
    calls = sorted({at for at in revealed_at if at >= 0})
    tenths = {at: 9 * i // max(1, len(calls) - 1) for i, at in enumerate(calls)}
    for piece, at in zip(pieces, revealed_at, strict=True):
        for c in piece:
            yield "↵" if c == "\n" else printable(c), tenths.get(at), c == "\n"


def printable(c):
    return c if c.isprintable() else "·"  # an escape sequence in a text must not reach a terminal


def show(samples, order):
    """Print samples; order: with colours or digits."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if order and colour:
        scale = "".join(f"\033[38;5;{c}m█" for c in EARLY_TO_LATE)
        print(f"order: revealed first {scale}\033[0m last; plain: given; ↵ ends a line")
    if order and not colour:
        print("order: the digit below says when a character was revealed: 0 first, 9 last, . given")

    for i, (pieces, at) in enumerate(samples):
        print(f"--- sample {i + 1}")
        plain = "".join(c if c in "\n\t" else printable(c) for c in "".join(pieces))
        print(render(pieces, at, colour) if order else plain)


# ---- as a page, as a picture ---------------------------------------------------------------
def page(samples, about):
    """One HTML file that plays how the samples were written. It needs nothing but a
    browser."""
    rows = [dict(pieces=pieces, at=at) for pieces, at in samples]
    data = json.dumps(dict(about=about, samples=rows)).replace("<", "\\u003c")  # no </script>
    return PAGE.read_text("utf-8").replace('"DATA"', data)


def svg(samples, width=72):
    """The samples as a picture, coloured by order, on light and dark grounds alike."""
    cells = list(cells_of(samples, width))
    height = 18 * max((row + 2 for row, *_ in cells), default=0) + 24
    hues = "".join(f".c{i}{{fill:hsl({15 + 265 * i // 9} 85% 38%)}}" for i in range(10))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {9 * width + 20} {height}">',
        f"<style>text{{font:15px monospace;fill:#222}}{hues}",
        "@media(prefers-color-scheme:dark){text{fill:#ddd}" + hues.replace("38%", "70%"),
        '}</style><text x="10" y="16">first</text><text x="160" y="16">last</text>',
    ]

    # The scale between "first" and "last", and then the text.
    for i in range(10):
        out.append(f'<rect class="c{i}" x="{60 + 9 * i}" y="6" width="9" height="11"/>')
    for row, column, c, tenth in cells:
        if c != " ":
            style = "" if tenth is None else f' class="c{tenth}"'
            at = f'x="{10 + 9 * column}" y="{42 + 18 * row}"'
            out.append(f"<text{style} {at}>{html.escape(c)}</text>")
    return "\n".join([*out, "</svg>\n"])


def cells_of(samples, width):
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
