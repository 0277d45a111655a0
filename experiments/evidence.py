"""
The numbers and pictures of RESULTS.md, from runs of train_char.py. Each command prints a table.

    python -m experiments.evidence bounds runs/lomdm runs/mdm           both bounds, differences
    python -m experiments.evidence fraction runs/* --svg f.svg          cost by share revealed
    python -m experiments.evidence infill runs/a3 runs/lomdm            gaps in validation windows
    python -m experiments.evidence decoders runs/mdm --windows 500      exact costs of decoders
    python -m experiments.evidence variance runs/lomdm                  orders against times
    python -m experiments.evidence samples runs/lomdm --judge runs/arm  orders while sampling
    python -m experiments.evidence order runs/lomdm --svg order.svg     weights by character class
    python -m experiments.evidence passage runs/lomdm --svg p.svg       a text coloured by weights
    python -m experiments.evidence strips runs/mdm runs/lomdm           one text being written
    python -m experiments.evidence perplexity runs/* --val_data FILE    of a text of one's own
    python -m experiments.evidence rows runs/automaton                  films: is time found?
    python -m experiments.evidence films runs/automaton                 are its films right?
    python -m experiments.evidence found runs/scrambled                 where is each cell's turn?

Standard errors are over windows of the validation split.
"""

import dataclasses
import itertools
import math
import os
import statistics
from argparse import RawDescriptionHelpFormatter

import torch

import a3
import lomdm
import train_char
from beyond import loa3, planned
from beyond.decoders import decoder_log_prob
from experiments import charts, films
from experiments.runs import Run, mean_error, order_log_weights, shown
from plumbing import cli, pictures
from plumbing.cli import need
from sample import RULES


def point(x, v):
    """Of a chart: x, mean and standard error of (N,)."""
    mean, error = mean_error(v)
    return x, mean, 0.0 if math.isnan(error) else error


def draw(a, series, *labels):
    if a.svg:
        series = {os.path.basename(name): points for name, points in series.items()}
        pictures.write(a.svg, charts.chart(series, *labels))


# ---- bounds --------------------------------------------------------------------------------------
def draw_terms(model, x, k, g, gap=None):
    """One draw of the jump bound, (2) of lomdm.py: an order for each block of x (B, L), of which k
    (B, n) positions are revealed. Returns recon and order (B, n), nats. gap (L,) bool: all else is
    given. What is mask_id in x stays hidden throughout."""
    B, L = x.shape
    w = model.order_weights(x).view(B, -1, min(L, model.config.block_len))  # (B, n, K)
    gap = torch.ones_like(w[0], dtype=torch.bool) if gap is None else gap.view_as(w[0])  # (n, K)

    # What is given has weight 0 and comes last.
    rank = lomdm.race(w * gap, g).argsort(-1)
    hidden = (rank >= k[..., None]) & gap

    # A token that is never seen costs something, but nobody counts it.
    never = x == model.mask_id
    x = x.masked_fill(never, 0)
    nll, w_hat = model.predict_masked(x, hidden | never.view_as(hidden))
    recon, order, _ = lomdm.jump_terms(nll, w, w_hat, hidden)
    return recon, order


def bounds(runs, a):
    """Both bounds with the same draws, four for each window; and what one run has less than the
    next, window by window."""
    found = []
    for run in runs:
        run.need_lomdm()
        jump, paper = (
            run.over_windows(lambda m, x, g, bound: m.nelbo(x, 4, bound, g), bound)
            / run.val.shape[1]
            for bound in ("jump", "paper")
        )
        found.append((run, jump))
        more = shown(paper - jump, "{:.5f} ± {:.5f}")
        print(f"{run.name:16} jump {shown(jump)}, paper - jump {more}")

    for (one, nats), (other, less) in itertools.combinations(found, 2):
        what = "not on the same windows, no difference"
        if one.sha256 == other.sha256 and one.val.shape == other.val.shape:
            what = shown(nats - less, "{:+.4f} ± {:.4f}")
        print(f"{one.name} - {other.name}: {what}")


def next_cost(model, x, g, k):
    """Nats (B,) at the next position of an order, k positions of x (B, L) being revealed."""
    if isinstance(model, loa3.LoA3):
        return sum(model.order_terms(x, g))[:, k]
    if isinstance(model, a3.A3):
        if isinstance(model, planned.Planned):
            groups = model.draw_places(*x.shape, g)
        else:
            groups = a3.random_groups(*x.shape, 1, g, x.device)
        return -(model.log_prob(x, groups) * (groups == k)).sum(1)

    recon, order = draw_terms(model, x, torch.full_like(x[:, :1], k), g)
    return (recon + order)[:, 0] / x.shape[1]


def fraction(runs, a):
    """Nats per token at the next position to be revealed, by the share that is revealed already."""
    series = {}
    for run in runs:
        L = run.val.shape[1]
        whole = run.block_len == L
        need(whole, f"{run.name}: fraction is for one block, --model mdm or lomdm, or a3")

        costs = [run.over_windows(next_cost, share * L // 10) for share in range(10)]
        points = [point(i / 10, cost) for i, cost in enumerate(costs)]
        series[run.name] = points
        print(run.name, " ".join(f"{x:.1f}: {y:.3f} ± {e:.3f}" for x, y, e in points))
    draw(a, series, "share already revealed", "nats at the next position")


def gap_cost(model, x, g, gap, by=None):
    """An upper bound (B,) on -log p(the gap (L,) bool of x (B, L) | the rest), nats. A3: exact in
    the order by "left", in which sample() reads what is given, then fills the gap; by "random",
    both in random order; by "before", from left to right without what is after the gap. Others: as
    sample() does it, each block races in its own part of the gap, and what is in later blocks is
    not seen. For an ARM that is exact."""
    B, L = x.shape
    if isinstance(model, a3.A3):
        place = torch.arange(L, device=x.device).expand_as(x)
        if by == "random":
            place = torch.rand(x.shape, generator=g, device=x.device)
        if by != "before":
            place = place + L * gap  # after all that is given
        return -(model.log_prob(x, place.argsort(1).argsort(1)) * gap).sum(1)

    # k is uniform on {0 .. size - 1} in each block, of which the gap has another size.
    K = min(L, model.config.block_len)
    size = gap.view(-1, K).sum(-1)  # (n,)
    steps = math.lcm(*size[size > 0].tolist())
    k = lomdm.stratified_counts(B, len(size), steps, g, x.device) * size // steps
    recon, order = draw_terms(model, x, k, g, gap)
    return ((recon + order) * size / K).sum(-1)


def infill(runs, a):
    """What the true middle of a validation window costs, given both sides of it (blocks do not see
    later ones): nats per token of the gap, a quarter of the window."""
    for run in runs:
        L = run.val.shape[1]
        at = torch.arange(L, device=a.device)
        gap = (at >= 3 * L // 8) & (at < 5 * L // 8)
        n = gap.sum().item()

        for by in ("left", "random", "before") if run.is_a3 else ("",):
            kind = "bound" if not run.is_a3 and run.block_len > 1 else "exact"
            kind = "mean over orders" if by == "random" else kind
            nats = run.over_windows(gap_cost, gap, by) / n
            name = os.path.basename(run.name)
            print(f"{name:14} {by:7} {shown(nats)} nats per token in gaps of {n} ({kind})")


def decoders(runs, a):
    """What a decoder that goes by a rule really gives to the validation text: exact nats per token,
    one token a call; and how far that is from the bound, on the same windows."""
    for run in runs:
        L = run.val.shape[1]
        bound = run.over_windows(lambda m, x, g: m.nelbo(x, 32, generator=g)) / L
        print(f"{run.name:20} bound       {shown(bound)}")

        for by in RULES:
            if by == "random" or (by == "order" and not run.has_order):
                continue  # takes other steps each time
            nats = run.over_windows(lambda m, x, _, by: -decoder_log_prob(m, x, by), by) / L
            more = shown(nats - bound, "{:+.4f} ± {:.4f}")
            print(f"{'':20} {by:11} {shown(nats)}, {more}", flush=True)


# ---- orders against times ------------------------------------------------------------------------
def variance(runs, a):
    """Three estimators on the same 16 windows, many draws each: the standard deviation of the
    estimate of the bound, and the noise of the gradient, E |g - E g|^2 / |E g|^2. They are at
    random places of an order, at random times, and at places more often in the middle, as in
    training. The gradient of the last is not that of the bound."""
    for run in runs:
        run.need_lomdm()
        x = run.val[:: max(1, len(run.val) // 16)][:16]
        for how, cls in (("orders", lomdm.LoMDM), ("times", lomdm.ByTime), ("middle", lomdm.LoMDM)):
            config = dataclasses.replace(run.model.config, middle_steps=how == "middle")
            model = cls(config).to(a.device).eval()
            model.load_state_dict(run.model.state_dict())

            loss, noise = noise_of(model, x, a.draws)
            print(
                f"{run.name:16} {how:7} loss {statistics.mean(loss):.4f}, standard deviation "
                f"{statistics.stdev(loss):.4f}; gradient noise {noise:.2f}"
            )


def noise_of(model, x, draws):
    """The losses of so many draws, and the noise of their gradient."""
    torch.manual_seed(4)
    losses = []
    total = square = 0
    for _ in range(draws):
        # Texts change places, as times rise from the first to the last: all are to meet all times.
        loss, metrics = model.loss(x[torch.randperm(len(x))])
        g = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        g = torch.cat([p.flatten().cpu().double() for p in g])  # (parameters,)
        losses.append(metrics["nelbo"].item())
        total = total + g
        square = square + g.square().sum()

    spread = (square - total.square().sum() / draws) / (draws - 1)  # E |g - E g|^2
    size = (total / draws).square().sum() - spread / draws  # unbiased for |E g|^2
    return losses, (spread / size).item() if size > 0 else math.inf


# ---- samples -------------------------------------------------------------------------------------
def judge_of(a, runs):
    """The run at --judge, an ARM that can read what these write; or None."""
    if not a.judge:
        return None
    judge = Run(a.judge, a.device, a.windows, a.data_dir)
    is_arm = judge.ckpt["model_name"] == "arm"
    need(is_arm, f"--judge {a.judge} holds no ARM, which alone knows an exact cost")
    for run in runs:
        same = judge.ckpt["tokenizer"] == run.ckpt["tokenizer"]
        need(same, f"--judge {a.judge} has another vocabulary than {run.name}")
        L = run.val.shape[1]
        need(judge.val.shape[1] >= L, f"--judge {a.judge} has a window of less than {L}")
    return judge


def opinion(judge, x):
    """What the judge thinks of texts x (B, L): exact nats per token, as text."""
    return shown(judge.model.nelbo(x) / x.shape[1]) if judge else "-"


def entropy(x, size):
    """Of single tokens, nats."""
    p = x.flatten().bincount(minlength=size).double() / x.numel()
    return -torch.xlogy(p, p).sum().item()


def samples(runs, a):
    """Texts drawn in the learned order and in a uniformly random one, by tokens a call: their cost
    under the model's own bound and under an ARM, and the entropy of their characters."""
    judge = judge_of(a, runs)
    print("run              order    a call   own bound      judge by ARM   unigram entropy")
    for run in runs:
        run.need_lomdm()
        m = run.model
        N, L = run.val.shape
        z = torch.full((a.samples, L), m.mask_id, device=a.device)
        orders = {"learned": "order"} if run.has_order else {}
        orders["uniform"] = "random"

        for how, n in [("(text)", 0), *itertools.product(orders, (1, 2, 4, 8, 16))]:
            g = torch.Generator(a.device).manual_seed(3)
            x = run.val[:: max(1, N // a.samples)][: a.samples]  # real text
            if n:
                x, _ = m.sample(z, per_step=n, by=orders[how], generator=g)
            own = shown(m.nelbo(x, 4, generator=g) / L)
            variety = entropy(x, run.tokenizer.size)
            print(f"{run.name:16} {how:8} {n:6}   {own} {opinion(judge, x):15} {variety:9.4f}")


def groups(runs, a):
    """What the validation text costs an A3 in random groups of so many tokens, exactly, and what an
    ARM says of texts that it draws so many at a time."""
    judge = judge_of(a, runs)
    for run in runs:
        need(run.is_a3, f"{run.name} holds no A3; this is about its groups")
        L = run.val.shape[1]
        z = torch.full((a.samples, L), run.model.mask_id, device=a.device)
        for size in (1, 2, 4, 8):
            cost = run.over_windows(
                lambda model, x, g, size=size: model.nelbo(
                    x, order="random", size=size, generator=g
                )
            )
            g = torch.Generator(a.device).manual_seed(3)
            x, _ = run.model.sample(z, per_step=size, by="random", generator=g)
            variety = entropy(x, run.tokenizer.size)
            print(f"{run.name} {size} {shown(cost / L)} {opinion(judge, x)} {variety:.4f}")


# ---- the order -----------------------------------------------------------------------------------
CLASSES = {
    "line end": lambda c: c == "\n",
    "space": lambda c: c == " ",
    "punctuation": lambda c: not c.isalnum() and not c.isspace(),
    "capital": str.isupper,
    "vowel": lambda c: c in "aeiou",
    "consonant": lambda c: c.islower() and c not in "aeiou",
}


def share_after(model, x, g, K):
    """How much of its block of K comes after each position, mean of 16 races: (B, L)."""
    s = order_log_weights(model, x).view(-1, K)
    arrival = sum(loa3.race(s, g).argsort(1) for _ in range(16)) / 16  # (B * n, K)
    return 1 - arrival.view_as(x) / max(1, K - 1)


def order(runs, a):
    """How much of the text, or of its block, comes after a character, by class: 1 is first, 0 last.
    If orders were random, all would be .5. Mean of 16 races a window; errors are over windows."""
    series = {}
    for run in runs:
        run.need_order()
        after = run.over_windows(share_after, run.block_len)
        first = [text[:1] for text in run.tokenizer.pieces(range(run.tokenizer.size))]

        points = {}
        for i, (name, belongs) in enumerate(CLASSES.items()):
            member = torch.tensor([c != "" and belongs(c) for c in first])[run.val.cpu()]  # (N, L)
            there = member.any(1)
            if there.any():
                mean = (after * member).sum(1)[there] / member.sum(1)[there]
                points[name] = point(i, mean)
        series[run.name] = list(points.values())
        print(run.name, ", ".join(f"{n} {y:.3f} ± {e:.3f}" for n, (_, y, e) in points.items()))
    draw(a, series, "", "share of the text that comes later", list(CLASSES))


def passage(runs, a):
    """A passage of the validation text, coloured by its order weights: in each block, or window,
    the largest weight first. Prints it with digits, 0 for the largest."""
    passages = []
    for run in runs:
        run.need_order()
        x = run.val[len(run.val) // 2 :][:8]
        with torch.no_grad():
            w = order_log_weights(run.model, x).view(-1, run.block_len)

        rank = w.argsort(1, descending=True).argsort(1)  # 0: the largest weight of its block
        passages += pictures.pieces(run.tokenizer, x.view(1, -1), rank.view(1, -1))
        print(run.name)
        pictures.show(passages[-1:], order=True)
    if a.svg:
        pictures.write(a.svg, pictures.svg(passages))


@torch.no_grad()
def draw_order(run, x, generator):
    """When each position of x (1, L) is written, (1, L): one draw from q."""
    L = x.shape[1]
    if isinstance(run.model, loa3.LoA3):
        return run.model.order.draw(run.model.order.log_q_way(x), L, generator).argsort(-1)
    if isinstance(run.model, planned.Planned):
        return run.model.draw_places(1, L, generator)
    if run.is_a3:
        return a3.random_groups(1, L, 1, generator, x.device)

    # A race in each block, and one block after another.
    w = run.model.order_weights(x).view(-1, run.block_len)  # (n, K)
    block = torch.arange(len(w), device=x.device)[:, None]
    when = lomdm.race(w, generator).argsort(-1) + block * run.block_len
    return when.view_as(x)


def strips(runs, a):
    """One text as each model would have it written, when 3/8 and 5/8 of it are revealed: in an
    order that is drawn from its own q. The picture plays it."""
    generator = torch.Generator(a.device).manual_seed(1)  # another order for each of them
    lines = []
    for run in runs:
        L = run.val.shape[1]
        x = run.tokenizer.encode(a.text)[:L].astype("int64")
        x = torch.from_numpy(x)[None].to(a.device)  # (1, L)
        need(x.shape[1] == L, f"--text: at least {L} tokens, the window of {run.name}")

        when = draw_order(run, x, generator)[0].tolist()
        pieces = run.tokenizer.pieces(x[0].tolist())
        written = list(zip(pieces, when, strict=True))
        name = os.path.basename(run.name)
        lines.append((name, written))
        for k in (3 * L // 8, 5 * L // 8):
            print(f"{name:14}" + "".join(c if at < k else "·" * len(c) for c, at in written))
            name = ""
    if a.svg:
        pictures.write(a.svg, charts.writing(lines))


# ---- a text of one's own -------------------------------------------------------------------------
def perplexity(runs, a):
    """What --val_data costs, or else the validation text: nats and perplexity per token, word
    (between blanks) and byte (of UTF-8), in windows side by side, as train_char.py validates. What
    is left behind the last whole window is not read, and not counted."""
    for run in runs:
        x = run.val.cpu()
        ids = x.flatten().tolist()
        pieces = zip(run.tokenizer.pieces(ids), ids, strict=True)
        text = "".join("\n" if i == run.tokenizer.end else piece for piece, i in pieces)
        units = {"token": x.numel(), "word": len(text.split()), "byte": len(text.encode())}
        counts = ", ".join(f"{n:,} {unit}s" for unit, n in units.items())
        print(f"{run.name}: {counts} in {len(x)} windows of {x.shape[1]}")

        s = train_char.Settings(seq_len=x.shape[1], eval_windows=len(x))
        found = train_char.estimate_loss(run.model, x.flatten().numpy(), s, a.device)
        for figure, nats, _ in found:
            for unit, n in units.items():
                per = nats * x.numel() / max(1, n)
                how = f"nats per {unit}, perplexity {math.exp(min(per, 700)):.4g}"
                print(f"  {per:8.4f} {how:40} all nats / all {unit}s ({figure})")


# ---- start ---------------------------------------------------------------------------------------
FLAGS = {
    "svg": dict(help="draw a picture as well"),
    "judge": dict(help="out_dir of an ARM that reads the samples"),
    "samples": dict(type=int, default=256, help="texts to draw [256]"),
    "draws": dict(type=int, default=100, help="gradients to take [100]"),
    "text": dict(
        default="To be, or not to be, that is the question: whether 'tis nobler in the mind",
        help="to write, as long as a window at least [%(default)s]",
    ),
    "windows": dict(type=int, help="of validation, evenly spread; by default all"),
    "device": dict(default="cpu", help="[cpu]"),
    "data_dir": dict(help="as in train_char.py"),
    "val_data": dict(help="a file or folder to read; by default the run's validation text"),
}
COMMANDS = {  # what each takes besides out_dirs
    bounds: (),
    fraction: ("svg",),
    infill: (),
    decoders: (),
    variance: ("draws",),
    samples: ("judge", "samples"),
    groups: ("judge", "samples"),
    order: ("svg",),
    passage: ("svg",),
    strips: ("text", "svg"),
    perplexity: ("val_data",),
    films.rows: (),
    films.films: ("samples",),
    films.found: ("svg",),
}


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = p.add_subparsers(metavar="command", required=True)
    for f, flags in COMMANDS.items():
        command = commands.add_parser(f.__name__, description=f.__doc__, allow_abbrev=False)
        command.set_defaults(run=f)
        command.add_argument("out_dirs", nargs="+", help="of train_char.py")
        for name in (*flags, "windows", "device", "data_dir"):
            command.add_argument(f"--{name}", **FLAGS[name])
    a = p.parse_args(argv)
    for name, value in vars(a).items():
        need(value != "", f"--{name} is empty")
        if isinstance(value, int):
            cli.check_range(name, value, 2 if name == "draws" else 1, 2**20)
    return a


def main(argv=None):
    a = parse(argv)
    a.device = cli.pick_device(a.device)
    own = getattr(a, "val_data", None)
    runs = [Run(out_dir, a.device, a.windows, a.data_dir, own) for out_dir in a.out_dirs]
    a.run(runs, a)


if __name__ == "__main__":
    cli.run(main)
