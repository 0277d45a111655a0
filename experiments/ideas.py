"""
Pictures of two ideas, drawn from the code itself.

    python -m experiments.ideas masks --svg masks.svg            who sees whom, in four models
    python -m experiments.ideas heads runs/mdm_s1 --svg h.svg    where heads look, before and after
"""

import html
import math
from argparse import RawDescriptionHelpFormatter

import torch

import a3
import lomdm
from experiments import charts
from experiments.runs import Run
from plumbing import cli, pictures
from plumbing.cli import need

CELL = 16  # pixels


# ---- who sees whom -------------------------------------------------------------------------------
def mask_of(L, block_len):
    """What a row of a text of L tokens sees while it is written, (L, L) bool, by lomdm.py."""
    size = dict(vocab_size=2, seq_len=L, n_layer=1, n_head=1, n_embd=2)
    model = lomdm.LoMDM(lomdm.Config(**size, block_len=block_len))
    _, _, mask = model.inputs(torch.zeros(1, L, dtype=torch.long))
    whole = torch.ones(L, L, dtype=torch.bool)
    if mask is lomdm.CAUSAL:
        return whole.tril()
    return whole if mask is None else mask


def masks_of_a3(groups):
    """What the content and the queries of a text see, (L + 1, L + 1) and (L, L + 1) bool, by a3.py.
    The first column is the start token."""
    rank = torch.tensor([groups])
    token_rank = torch.nn.functional.pad(rank, (1, 0), value=-len(groups) - 1)
    content, query = a3.who_sees(token_rank, token_rank, rank)
    return content[0, 0], query[0, 0]


def masks(a):
    """One table for each model: a row sees a column where there is a filled cell."""
    groups = [1, 0, 2, 0]
    content, query = masks_of_a3(groups)
    names = ["start", *"abcd"]
    eight = "01234567"
    own_block = "its own block of 4, and those before"
    tables = [
        # A GPT's place i reads token i - 1, and place 0 the start token.
        ("GPT", "what comes before it", mask_of(8, 1), eight, "s0123456"),
        ("block diffusion", own_block, mask_of(8, 4), eight, eight),
        ("MDM", "everything", mask_of(8, 8), eight, eight),
        ("A3, content", "its own group and earlier ones: bd, a, c", content, names, names),
        ("A3, queries", "earlier groups, and not its own token", query, [*"abcd"], names),
    ]
    for name, what, mask, *_ in tables:
        print(f"{name}: {what}; {int(mask.sum())} of {mask.numel()} pairs")
    if a.svg:
        pictures.write(a.svg, side_by_side(tables))


def side_by_side(tables):
    """An SVG of tables (name, what it sees, mask, names of the rows, names of the columns)."""
    out = []
    x = 10
    for name, what, mask, rows, columns in tables:
        # The words, and the names of columns and rows.
        out.append(f'<text class="name" x="{x}" y="18">{html.escape(name)}</text>')
        out.append(f'<text class="what" x="{x}" y="34">{html.escape(what)}</text>')
        left, top = x + 42, 64
        for j, column in enumerate(columns):
            out.append(
                charts.text(column[:1], f'x="{left + CELL * (j + 0.5)}" y="{top - 6}"', "middle")
            )
        for i, row in enumerate(rows):
            y = top + CELL * i
            out.append(charts.text(row, f'x="{left - 6}" y="{y + 13}"', "end"))
            for j in range(len(columns)):
                sees = "sees" if mask[i, j] else "blind"
                place = f'x="{left + CELL * j}" y="{y}" width="{CELL - 1}" height="{CELL - 1}"'
                out.append(f'<rect class="{sees}" {place}/>')
        x += 42 + CELL * len(columns) + 110

    style = charts.STYLE + (
        ".name{font-weight:bold;font-size:14px}.what{fill:#777;font-size:12px}"
        ".sees{fill:#2a6fbe}.blind{fill:#8882}"
    )
    size = f"0 0 {x} {64 + CELL * 8 + 10}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{style}</style>'
    return "\n".join([head, *out, "</svg>\n"])


# ---- where heads look ----------------------------------------------------------------------------
FAR = 6  # the largest distance in the picture


@torch.no_grad()
def attention(model, z):
    """The mean share of attention (layers, heads, 2 FAR + 1) that a place of z (B, L) gives to what
    is -FAR .. FAR places away, over those places where that exists."""
    tokens, pos, mask = model.inputs(z)
    rotary = model.rotary(pos)
    h = model.wte(tokens) + model.wpe(pos)
    sees = mask
    if mask is lomdm.CAUSAL:
        sees = torch.ones(len(pos), len(pos), dtype=torch.bool, device=z.device).tril()

    found = []
    for block in model.blocks:
        q, k, _ = block.project(h, rotary)
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, n_head, L, L)
        if sees is not None:
            score = score.masked_fill(~sees, -torch.inf)
        share = score.softmax(-1).mean(0)  # (n_head, L, L)
        by_distance = [share.diagonal(d, 1, 2).mean(1) for d in range(-FAR, FAR + 1)]
        found.append(torch.stack(by_distance, 1))
        h = block(h, rotary, mask)
    return torch.stack(found)


def heads(a):
    """Where each head of the first layer looks, in half-hidden validation texts: with the weights
    with which training began, and with those that it found. For every layer it prints at which
    distance, of up to 6, a head looks most, and how much."""
    run = Run(a.out_dir, windows=a.windows)
    run.need_lomdm()
    config = run.model.config
    need(config.local_heads > 0, f"{a.out_dir} was trained without local heads")
    began = run.ckpt["settings"]["init_from"]
    need(not began, f"{a.out_dir} began with the weights of {began}, which are not here")
    torch.manual_seed(run.ckpt["settings"]["seed"])
    fresh = lomdm.LoMDM(config).eval()

    hidden = torch.rand(run.val.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    one = config.block_len in (1, config.seq_len)
    need(one, f"{a.out_dir} has several blocks; this is for an ARM or for one block")
    z = run.val if config.block_len == 1 else run.val.masked_fill(hidden, run.model.mask_id)
    series = {}
    for when, model in (("before", fresh), ("after", run.model)):
        found = attention(model, z)
        for layer, by_head in enumerate(found):
            looks = [f"{int(w.argmax()) - FAR:+d} {w.max():.2f}" for w in by_head]
            print(f"{run.name} {when} layer {layer + 1}: {', '.join(looks)}")
        for head, w in enumerate(found[0]):
            points = zip(range(-FAR, FAR + 1), w.tolist(), strict=True)
            series[f"head {head + 1}, {when} training"] = [(d, share, 0.0) for d, share in points]
    if a.svg:
        what = "mean share of attention"
        pictures.write(a.svg, charts.chart(series, "distance in the text", what))


# ---- start ---------------------------------------------------------------------------------------
def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = p.add_subparsers(metavar="command", required=True)
    for f in (masks, heads):
        command = commands.add_parser(f.__name__, description=f.__doc__, allow_abbrev=False)
        command.set_defaults(run=f)
        command.add_argument("--svg", help="draw it as well")
        if f is heads:
            command.add_argument("out_dir", help="of train_char.py")
            command.add_argument("--windows", type=int, default=64, help="of validation [64]")
    a = p.parse_args(argv)
    cli.check_range("windows", getattr(a, "windows", 1), 1, 2**20)
    return a


def main(argv=None):
    a = parse(argv)
    a.run(a)


if __name__ == "__main__":
    cli.run(main)
