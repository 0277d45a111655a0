"""Charts as SVG: lines or points with error bars, on light and dark grounds alike."""

import html
import math

from plumbing.cli import need

COLOURS = (
    "#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#f28e2b", "#3fa7a0", "#9c755f", "#d37295",
    "#8c8c8c", "#c9a400",
)  # fmt: skip
STYLE = (
    "text{font:13px sans-serif;fill:#222}.axis{stroke:#888;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)
WIDTH = 720
HEIGHT = 400
LEFT, TOP, RIGHT, BOTTOM = 60, 15, 530, 350  # of the axes


def ticks(low, high):
    """Round numbers between low and high, about five of them."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def spread(values, margin):
    """Their range and a margin, a share of it; never empty."""
    low = min(values)
    high = max(values)
    margin = margin * (high - low) if high > low else 0.5 * abs(low) or 1
    return low - margin, high + margin


def chart(series, xlabel, ylabel, names=None):
    """An SVG. series: {label: [(x, y, error)]}. names: labels for x = 0, 1, .., which turns lines
    into points."""
    points = [p for line in series.values() for p in line]
    need(points, "there are no figures to draw")
    x0, x1 = (-0.5, len(names) - 0.5) if names else spread([p[0] for p in points], 0)
    y0, y1 = spread([y + sign * e for _, y, e in points for sign in (-1, 1)], 0.04)

    def at(x, y):
        across = (x - x0) / (x1 - x0)
        up = (y - y0) / (y1 - y0)
        return LEFT + (RIGHT - LEFT) * across, BOTTOM - (BOTTOM - TOP) * up

    labels = list(enumerate(names)) if names else [(x, f"{x:,.4g}") for x in ticks(x0, x1)]
    out = axes(
        [(at(x, y0)[0], label) for x, label in labels],
        [(at(x0, y)[1], f"{y:.4g}") for y in ticks(y0, y1)],
        xlabel,
        ylabel,
    )
    for i, (label, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [(*at(x, y), at(x, y - e)[1], at(x, y + e)[1]) for x, y, e in line]
        out += curve(places, colour, joined=not names)

        y = TOP + 14 + 20 * i
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


# ---- texts that are written --------------------------------------------------------------------
CAPTIONS = {  # of the lines of writing(), by the model's name
    "arm": ("GPT", "left to right"),
    "block16": ("block diffusion", "block after block, and in any order inside of one"),
    "mdm": ("MDM", "in any order"),
    "lomdm": ("LoMDM", "in an order that it has learned"),
    "lomdm_exp": ("LoMDM", "in an order that it has learned, one character after another"),
    "a3": ("A3", "in any order, each with its exact probability"),
    "loa3": ("LoA3", "forwards or backwards, as it has learned"),
}
SECONDS_A_CALL = 0.14
PAUSE = 3.0  # seconds with the whole text, before it begins again
LINE = 62  # pixels from one text to the next
LETTER = 9


def writing(lines):
    """An SVG that plays how texts are written, again and again, with CSS alone. lines: [(name,
    [(piece, when)])]. Where nothing moves, all of the text is there, coloured by its order."""
    calls = 1 + max(when for _, written in lines for _, when in written)
    style = [
        "text{font:15px monospace;fill:#222}.name{font:bold 14px sans-serif}",
        ".what{font:13px sans-serif;fill:#777}",
        "@media(prefers-color-scheme:dark){text{fill:#ddd}.what{fill:#999}}",
        *(f".k{k}{{fill:{colour};text-decoration:underline}}" for k, colour in colours(calls)),
        f"@media(prefers-reduced-motion:no-preference){{{moments(calls)}}}",
    ]

    out = []
    for i, (name, written) in enumerate(lines):
        out += line_of(name, written, LINE * i)

    longest = max(sum(len(piece) for piece, _ in written) for _, written in lines)
    size = f"0 0 {LETTER * longest + 20} {LINE * len(lines)}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">'
    return "\n".join([f"{head}<style>{''.join(style)}</style>", *out, "</svg>\n"])


def moments(calls):
    """CSS: what a call has written appears at its moment, and stays until all begins again."""
    period = calls * SECONDS_A_CALL + PAUSE
    out = []
    for k in range(calls):
        shows = 100 * (k + 1) * SECONDS_A_CALL / period  # percent of the period
        hidden = f"0%,{shows - 0.01:.2f}%{{opacity:0}}"
        out.append(f"@keyframes k{k}{{{hidden}{shows:.2f}%,to{{opacity:1}}}}")
        out.append(f".k{k}{{animation:k{k} {period:.1f}s infinite}}")
    return "".join(out)


def line_of(name, written, top):
    """What a model is, and below it its text, each piece in the class of its call."""
    what, caption = CAPTIONS.get(name.rpartition("_s")[0] or name, (name, ""))
    out = [f'<text class="name" x="10" y="{top + 20}">{html.escape(what)}</text>']
    out.append(f'<text class="what" x="140" y="{top + 20}">{html.escape(caption)}</text>')

    x = 10
    for piece, when in written:
        # Of a space that is written, one sees the line below it.
        shown = html.escape(piece.replace("\n", "↵").replace(" ", "\u00a0"))
        out.append(f'<text class="k{when}" x="{x}" y="{top + 44}">{shown}</text>')
        x += LETTER * len(piece)
    return out


def colours(calls):
    """[(call, its colour)], from blue to orange by way of grey."""
    return [(k, early_to_late(k / max(1, calls - 1))) for k in range(calls)]


def early_to_late(share):
    """A colour for a share of the calls, from 0 to 1: blue, grey, orange. These can be told apart
    without red or green, and on light and dark grounds."""
    blue = (38, 110, 190)
    grey = (128, 128, 128)
    orange = (214, 106, 10)
    first, second = (blue, grey) if share < 0.5 else (grey, orange)
    part = 2 * share % 1 if share < 1 else 1
    mixed = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
