"""
Samples with the order in which they were written: as text, as a page, as a picture.

Samples are a list of (pieces, revealed_at): the text of each token, and the number of the
call that revealed it, -1 where it was given.
"""

import html
import itertools
import json
import os
import re
import sys
import unicodedata
from pathlib import Path

from plumbing.checkpoint import write_text

PAGE = Path(__file__).with_name("page.html")  # what page() fills in
# Control characters, and what overrides the direction of a text. XML lacks the last two.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
JOINERS = set("\u200d\ufe0f🏻🏼🏽🏾🏿")  # of emoji
EARLY_TO_LATE = (196, 202, 208, 220, 154, 46, 48, 45, 33, 63)  # xterm colours, red to violet


def pieces(tokenizer, x, at):
    """Samples of tokens x (N, L), revealed at (N, L)."""
    rows = zip(x.tolist(), at.tolist(), strict=True)
    return [(tokenizer.pieces(ids), revealed_at) for ids, revealed_at in rows]


def write(path, text):
    """UserError if it cannot be written."""
    write_text(path, text)
    print(f"wrote {path}")


# ---- as text -------------------------------------------------------------------------------
def directions(text):
    """Of each letter: L, or R or AL from right to left."""
    return [d for c in text if (d := unicodedata.bidirectional(c)) in ("L", "R", "AL")]


def columns(c, before):
    """How many columns of a terminal a character takes after what stands before it; 0: it
    joins that, as an accent, a later part of a Korean syllable or of an emoji."""
    is_mark = unicodedata.category(c) in ("Mn", "Me", "Cf") or "\u1160" <= c <= "\u11ff"
    is_wide = unicodedata.east_asian_width(c) in "WF"
    return 0 if is_mark or (is_wide and before.endswith("\u200d")) else 1 + is_wide


def cells(pieces, revealed_at):
    """[what it shows, columns, tenth or None if given, does a line end here?] of each place
    in one sample. What takes no column stands with the character before it. Tenths are those
    of the calls: 0 for the first .. 9 for the last."""
    calls = sorted({at for at in revealed_at if at >= 0})
    tenths = {at: 9 * i // max(1, len(calls) - 1) for i, at in enumerate(calls)}
    found = [["", 0, None, True]]
    column = 0
    for piece, at in zip(pieces, revealed_at, strict=True):
        for c in COMMANDS.sub("·", piece):
            before, _, _, ended = found[-1]
            n = 8 - column % 8 if c == "\t" else columns(c, before)
            if n == 0 and not ended:
                found[-1][0] += c
                continue

            found.append([{"\n": "↵", "\t": " " * n}.get(c, c), n, tenths.get(at), c == "\n"])
            column = 0 if c == "\n" else column + n
    return found[1:]


def render(pieces, revealed_at, colour):
    """One sample with its order: colours, or a line of digits under each line of text."""
    out = []
    digits = ""
    for shown, n, tenth, ends in cells(pieces, revealed_at):
        if colour and tenth is not None:
            shown = f"\033[38;5;{EARLY_TO_LATE[tenth]}m{shown}\033[0m"
        out.append(shown)
        digits += ("." if tenth is None else str(tenth)).ljust(n)[:n]
        if ends:
            out.append("\n" if colour else f"\n{digits}\n")
            digits = ""

    if digits and not colour:
        out.append(f"\n{digits.rstrip()}")
    return "".join(out)


def show(samples, order):
    """Print samples; order: with colours or digits. A file gets the text as it is."""
    is_terminal = sys.stdout.isatty()
    colour = is_terminal and "NO_COLOR" not in os.environ
    if order and colour:
        scale = "".join(f"\033[38;5;{c}m█" for c in EARLY_TO_LATE)
        print(f"order: revealed first {scale}\033[0m last; plain: given; ↵ ends a line")
    if order and not colour:
        print("order: the digit below says when a character was revealed: 0 first, 9 last, . given")
        text = "".join(piece for pieces, _ in samples for piece in pieces)
        if {"R", "AL"} & {*directions(text)} or JOINERS & {*text}:
            print("order: letters from right to left, and what is joined, may leave their digits")

    for i, (pieces, at) in enumerate(samples):
        print(f"--- sample {i + 1}")
        text = render(pieces, at, colour) if order else "".join(pieces)
        print(text if order or not is_terminal else COMMANDS.sub("·", text))


# ---- as a page, as a picture ---------------------------------------------------------------
def page(samples, about):
    """One HTML file that plays how the samples were written. It needs nothing but a
    browser."""
    rows = [dict(pieces=pieces, at=at) for pieces, at in samples]
    data = json.dumps(dict(about=about, samples=rows)).replace("<", "\\u003c")  # no </script>
    return PAGE.read_text("utf-8").replace('"DATA"', data)


def svg(samples, width=72):
    """The samples as a picture, coloured by order, on light and dark grounds alike."""
    rows = list(rows_of(samples, width))
    hues = "".join(f".c{i}{{fill:hsl({15 + 265 * i // 9} 85% 38%)}}" for i in range(10))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {9 * width + 20} '
        f'{18 * len(rows) + 24}"><style>text{{font:15px monospace;fill:#222}}{hues}',
        "@media(prefers-color-scheme:dark){text{fill:#ddd}" + hues.replace("38%", "70%"),
        '}</style><text x="10" y="16">first</text><text x="160" y="16">last</text>',
    ]

    # The scale between "first" and "last", and then the text.
    for i in range(10):
        out.append(f'<rect class="c{i}" x="{60 + 9 * i}" y="6" width="9" height="11"/>')
    out += [line_of(row, 42 + 18 * i) for i, row in enumerate(rows) if row]
    return "\n".join([*out, "</svg>\n"])


def line_of(row, y):
    """One text element. Its runs of one colour have no places of their own, so that letters
    join, wide ones take their room, and each script runs in its direction."""
    runs = []
    for tenth, run in itertools.groupby(row, key=lambda cell: cell[2]):
        text = html.escape("".join(shown for shown, *_ in run))
        runs.append(text if tenth is None else f'<tspan class="c{tenth}">{text}</tspan>')

    # Where the first letter runs from right to left, the line does.
    text = "".join(runs)
    if directions("".join(shown for shown, *_ in row))[:1] not in ([], ["L"]):
        text = f"\u2067{text}\u2069"
    return f'<text x="10" y="{y}" xml:space="preserve">{text}</text>'


def rows_of(samples, width):
    """Rows of cells, of so many columns at the most; an empty one follows each sample."""
    for sample in samples:
        row = []
        for cell in cells(*sample):
            if row and (row[-1][3] or sum(n for _, n, *_ in row) + cell[1] > width):
                yield row
                row = []
            row.append(cell)
        yield row
        yield []
