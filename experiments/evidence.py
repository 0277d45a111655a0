"""
The numbers and pictures of RESULTS.md, from runs of train_char.py. Each command prints a table.

    python -m experiments.evidence table runs/lomdm_s1 runs/lomdm_s2    best figures, over seeds
    python -m experiments.evidence curves runs/* --svg curves.svg       validation during training
    python -m experiments.evidence bounds runs/lomdm runs/mdm           both bounds, differences
    python -m experiments.evidence order runs/lomdm --svg order.svg     weights by character class
    python -m experiments.evidence passage runs/lomdm --svg p.svg       a text coloured by weights
    python -m experiments.evidence rows runs/automaton                  films: is time found?
    python -m experiments.evidence films runs/automaton                 are its films right?
    python -m experiments.evidence strips runs/mdm runs/lomdm           one text being written
    python -m experiments.evidence fraction runs/* --svg f.svg          cost by share revealed
    python -m experiments.evidence variance runs/lomdm                  orders against times
    python -m experiments.evidence samples runs/lomdm --judge runs/arm  orders while sampling
    python -m experiments.evidence infill runs/a3 runs/lomdm            gaps in validation windows
    python -m experiments.evidence decoders runs/mdm --windows 500      exact costs of decoders

Standard errors are over windows of the validation split, or over seeds where it says so.
"""

import itertools
import math
import os
import statistics
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from dataclasses import replace

import torch

import a3
import lomdm
import train_char
from beyond import loa3
from beyond.decoders import decoder_log_prob
from experiments import charts
from experiments.runs import Run, by_seed
from plumbing import cli, pictures
from plumbing.cli import refuse
from sample import RULES


def load(out_dir, a):
    return Run(out_dir, a.device, a.windows, a.data_dir)


def require_lomdm(run):
    refuse(isinstance(run.model, a3.A3), f"{run.name} holds an A3; this is for lomdm.py's models")


def has_order(model):
    return isinstance(model, loa3.LoA3) or getattr(model.config, "learn_order", False)


def require_order(run):
    refuse(not has_order(run.model), f"{run.name} holds a model without a learned order")


def log_weights(model, x, *_):
    """Of the order, (B, L): large is early."""
    learned = isinstance(model, loa3.LoA3)
    return model.order_log_weights(x) if learned else model.order_weights(x).log()


def mean_error(v):
    """Mean and standard error of (N,)."""
    v = torch.as_tensor(v, dtype=torch.double)
    return v.mean().item(), (v.std() / math.sqrt(len(v))).item() if len(v) > 1 else math.nan


def shown(v):
    """As text."""
    return "{:.4f} ± {:.4f}".format(*mean_error(v))


def point(x, v):
    """Of a chart: x, mean and standard error of (N,), 0 if N = 1 does not tell."""
    mean, error = mean_error(v)
    return x, mean, 0.0 if math.isnan(error) else error


def draw(a, series, *labels):
    if a.svg:
        series = {os.path.basename(name): points for name, points in series.items()}
        pictures.write(a.svg, charts.chart(series, *labels))


# ---- logs ----------------------------------------------------------------------------------------
def table(a):
    """Best validation figure of each run: mean over seeds, its standard error over seeds, and the
    standard error over windows of a single run."""
    print("run                kind                        seeds    mean   ± seeds  ± windows")
    for name, runs in by_seed(a.out_dirs).items():
        best = defaultdict(list)
        for rows in runs:
            first = min((r for r in rows if r[3] == rows[0][3]), key=lambda r: r[1])[0]
            for step, val, error, kind in rows:  # at the step that the first figure chose
                if step == first:
                    best[kind].append((val, error))
        for kind, found in best.items():
            mean, seeds = mean_error([val for val, _ in found])
            windows = statistics.mean(error for _, error in found)
            print(f"{name:18} {kind:27} {len(found):5} {mean:8.4f} {seeds:8.4f} {windows:9.4f}")


def curves(a):
    """Validation at each step, mean over seeds."""
    series = {}
    for name, runs in by_seed(a.out_dirs).items():
        at = defaultdict(list)
        for rows in runs:
            for step, val, _, kind in rows:
                if kind == rows[0][3]:
                    at[step].append(val)
        series[name] = [point(step, vals) for step, vals in sorted(at.items())]
        print(name, " ".join(f"{x}: {y:.4f} ± {e:.4f}" for x, y, e in series[name]))
    draw(a, series, "steps", "nats per token, validation")


# ---- bounds --------------------------------------------------------------------------------------
def terms(model, x, k, g, gap=None):
    """The jump bound, (2) of lomdm.py, from one order for each block of x (B, L) of which k (B, n)
    positions are revealed: recon and order (B, n), nats. gap (L,) bool: all else is given."""
    w = model.order_weights(x).view(*k.shape, -1)  # (B, n, K)
    gap = torch.ones_like(w[0]).bool() if gap is None else gap.view_as(w[0])  # (n, K)
    ranking = lomdm.race(w * gap, g)  # what is given has weight 0 and comes last
    masked = (ranking.argsort(-1) >= k[..., None]) & gap
    nll, w_hat = model.predict_masked(x, masked)
    return lomdm.jump_terms(nll, w, w_hat, masked)[:2]


def order_term(model, x, g):
    """(B,) nats."""
    (B, L), K = x.shape, model.config.block_len
    k = lomdm.stratified_counts(B, L // K, K, g, x.device)
    return terms(model, x, k, g)[1].sum(-1)


def bounds_of(run):
    """Prints a line and returns the jump bound of each window, (N,) nats per token."""
    L = run.val.shape[1]
    jump, paper = (
        run.over_windows(lambda m, x, g, bound: m.nelbo(x, 4, bound, g), bound) / L
        for bound in ("jump", "paper")  # of the same draws
    )
    more, error = mean_error(paper - jump)
    line = f"{run.name:16} jump {shown(jump)}, paper - jump {more:.5f} ± {error:.5f}"
    if run.model.config.learn_order:
        w = run.over_windows(lambda m, x, _: m.order_weights(x))
        line += f", order term {(run.over_windows(order_term) / L).mean():.4f}, "
        line += f"w {w.min():.2f}..{w.max():.2f}, spread {w.std() / w.mean():.3f}"
    print(line)
    return jump


def bounds(a):
    """Both bounds with the same draws, four for each window; and what one run has less than the
    next, window by window."""
    runs = [load(out_dir, a) for out_dir in a.out_dirs]
    for run in runs:
        require_lomdm(run)
    found = [(run, bounds_of(run)) for run in runs]
    for (one, nats), (other, less) in itertools.combinations(found, 2):
        what = "not on the same windows, no difference"
        if one.sha256 == other.sha256 and one.val.shape == other.val.shape:
            what = "{:+.4f} ± {:.4f}".format(*mean_error(nats - less))
        print(f"{one.name} - {other.name}: {what}")


def next_cost(model, x, g, k):
    """Nats (B,) at the next position of an order, k positions of x (B, L) being revealed."""
    if isinstance(model, loa3.LoA3):
        return sum(model.order_terms(x, g))[:, k]
    if isinstance(model, a3.A3):
        groups = a3.random_groups(*x.shape, 1, g, x.device)
        return -(model.log_prob(x, groups) * (groups == k)).sum(1)
    recon, order = terms(model, x, torch.full_like(x[:, :1], k), g)
    return (recon + order)[:, 0] / x.shape[1]


def fraction(a):
    """Nats per token at the next position to be revealed, by the share that is revealed already."""
    series = {}
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        L = run.val.shape[1]
        blocks = not isinstance(run.model, a3.A3) and run.model.config.block_len < L
        refuse(blocks, f"{run.name}: fraction is for one block, --model mdm or lomdm, or a3")
        costs = [run.over_windows(next_cost, share * L // 10) for share in range(10)]
        points = series[run.name] = [point(i / 10, cost) for i, cost in enumerate(costs)]
        print(run.name, " ".join(f"{x:.1f}: {y:.3f} ± {e:.3f}" for x, y, e in points))
    draw(a, series, "share already revealed", "nats at the next position")


def gap_cost(model, x, g, gap, by=None):
    """An upper bound (B,) on -log p(the gap (L,) bool of x (B, L) | the rest), nats. A3: exact in
    the order by "left", in which sample() reads what is given, then fills the gap; by "random",
    both in random order; by "before", from left to right without what is after the gap. Others: as
    sample() does it, each block races in its own part of the gap, and what is in later blocks is
    not seen. For an ARM that is exact."""
    if isinstance(model, a3.A3):
        place = torch.arange(x.shape[1], device=x.device).expand_as(x)
        if by == "random":
            place = torch.rand(x.shape, generator=g, device=x.device)
        if by != "before":
            place = place + x.shape[1] * gap
        return -(model.log_prob(x, place.argsort(1).argsort(1)) * gap).sum(1)
    K = model.config.block_len
    size = gap.view(-1, K).sum(-1)  # (n,): how much of each block is in the gap
    steps = math.lcm(*size[size > 0].tolist())  # so that k is uniform on {0 .. size - 1}
    k = lomdm.stratified_counts(len(x), len(size), steps, g, x.device) * size // steps
    recon, order = terms(model, x, k, g, gap)
    return ((recon + order) * size / K).sum(-1)


def infill(a):
    """What the true middle of a validation window costs, given both sides of it (blocks do not see
    later ones): nats per token of the gap, a quarter of the window."""
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        L = run.val.shape[1]
        at = torch.arange(L, device=a.device)
        gap = (at >= 3 * L // 8) & (at < 5 * L // 8)
        n = gap.sum().item()
        name, what = os.path.basename(run.name), {"random": "mean over orders"}
        ways = ("left", "random", "before") if isinstance(run.model, a3.A3) else ("",)
        if ways == ("",) and run.model.config.block_len > 1:
            what[""] = "bound"
        for by in ways:
            nats = run.over_windows(gap_cost, gap, by) / n
            nats, kind = shown(nats), what.get(by, "exact")
            print(f"{name:14} {by:7} {nats} nats per token in gaps of {n} ({kind})")


# ---- the order -----------------------------------------------------------------------------------
CLASSES = {
    "line end": lambda c: c == "\n",
    "space": lambda c: c == " ",
    "punctuation": lambda c: not c.isalnum() and not c.isspace(),
    "capital": str.isupper,
    "vowel": lambda c: c in "aeiou",
    "consonant": lambda c: c.islower() and c not in "aeiou",
}


def share_after(model, x, g):
    """How much of its block comes after each position, mean of 16 races: (B, L)."""
    s = log_weights(model, x).view(-1, getattr(model.config, "block_len", x.shape[1]))
    arrival = sum(loa3.race(s, g).argsort(1) for _ in range(16)) / 16  # (B * n, K)
    return 1 - arrival.view_as(x) / max(1, s.shape[1] - 1)


def order(a):
    """How much of the text, or of its block, comes after a character, by class: 1 is first, 0 last.
    If orders were random, all would be .5. Mean of 16 races a window; errors are over windows."""
    series = {}
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        require_order(run)
        after = run.over_windows(share_after)
        first = [t[:1] for t in run.tokenizer.pieces(range(run.tokenizer.size))]
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


def rows(a):
    """--data automaton and automaton-both: mean log-weight by row of the film, in order of time,
    less that of the film, for each of the directions that it may be written in; and Kendall's tau
    between the order and time: 1 if every row is revealed before what follows from it."""
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        require_order(run)
        films = train_char.data.TEXT_LEN.get(run.ckpt["settings"]["data"])
        refuse(not films, f"{run.name} was not trained on an automaton")
        s = run.over_windows(log_weights)  # (N, L)
        s = (s - s.mean(1, keepdim=True)).unflatten(1, (4, -1))[..., :-1]  # a line each
        marks = "".join(run.tokenizer.pieces(run.val[:, 0].tolist()))
        for mark in sorted(set(marks) & {"v", "^"}) or [""]:
            chosen = torch.tensor([not mark or m == mark for m in marks])
            film = s[chosen] if mark == "v" else s[chosen].flip(1)  # (n, 4, cells), in time
            pairs = [
                (film[:, i, :, None] > film[:, j, None, :]).double().mean((1, 2))
                for i, j in itertools.combinations(range(4), 2)
            ]
            tau = 2 * torch.stack(pairs).mean(0) - 1  # (n,): of cells in different rows
            means = " ".join(shown(film[:, i].mean(1)) for i in range(4))
            print(f"{run.name} {mark} tau {shown(tau)}; rows, first in time first: {means}")


def right(film):
    """Does this text of an automaton follow its rule, forwards, or in the direction of its mark?"""
    rows = film.splitlines()[::-1]  # the last moment comes first
    marks, steps = {row[0] for row in rows} & {"v", "^"}, 1
    if marks:
        rows, steps = [row[1:] for row in (rows if marks == {"^"} else rows[::-1])], 2
    if len(marks) > 1 or len(rows) != 4 or any(len(row) != 16 for row in rows):
        return False
    rows = [[c == "#" for c in row] for row in rows]
    for now, then in itertools.pairwise(rows):
        for _ in range(steps):  # rule 30
            now = [now[i - 1] ^ (now[i] | now[(i + 1) % 16]) for i in range(16)]
        if now != then:
            return False
    return True


def films(a):
    """--data automaton and automaton-both: how many of the films that it draws follow the rule, and
    the first ones, each cell's turn below it, from 0 to 9."""
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        source = run.ckpt["settings"]["data"]
        refuse(source not in train_char.data.TEXT_LEN, f"{run.name}: not trained on an automaton")
        z = torch.full((a.samples, run.val.shape[1]), run.model.mask_id, device=a.device)
        x, at = run.model.sample(z, generator=torch.Generator(a.device).manual_seed(1))
        drawn = pictures.pieces(run.tokenizer, x, at)
        good = sum(right("".join(pieces)) for pieces, _ in drawn)
        print(f"{run.name}: {good} of {a.samples} films are right; the first:")
        pictures.show(drawn[:3], order=True)


def passage(a):
    """A passage of the validation text, coloured by its order weights: in each block, or window,
    the largest weight first. Prints it with digits, 0 for the largest."""
    passages = []
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        require_order(run)
        x, L = run.val[len(run.val) // 2 :][:8], run.val.shape[1]
        with torch.no_grad():
            w = log_weights(run.model, x).view(-1, getattr(run.model.config, "block_len", L))
        rank = w.argsort(1, descending=True).argsort(1)  # 0: the largest weight of its block
        passages += pictures.pieces(run.tokenizer, x.view(1, -1), rank.view(1, -1))
        print(run.name)
        pictures.show(passages[-1:], order=True)
    if a.svg:
        pictures.write(a.svg, pictures.svg(passages))


def strips(a):
    """One text as each model would have it written, when 3/8 and 5/8 of it are revealed: by a race
    with its own weights w, block after block."""
    generator = torch.Generator(a.device).manual_seed(a.seed)  # another race for each of them
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        require_lomdm(run)
        L, K = run.val.shape[1], run.model.config.block_len
        x = run.tokenizer.encode(a.text)[:L].astype("int64")
        x = torch.from_numpy(x)[None].to(a.device)  # (1, L)
        refuse(x.shape[1] < L, f"--text: at least {L} tokens, the window of {run.name}")
        with torch.no_grad():
            w = run.model.order_weights(x).view(-1, K)  # (n, K)
        ranking = lomdm.race(w, generator).argsort(-1)  # (n, K): when each position arrives
        when = (ranking + K * torch.arange(L // K, device=a.device)[:, None]).flatten()
        pieces = run.tokenizer.pieces(x[0].tolist())
        shown = ["".join(c if at < k else "·" * len(c) for c, at in zip(pieces, when, strict=True))
                 for k in (3 * L // 8, 5 * L // 8)]  # fmt: skip
        print(f"{os.path.basename(run.name):14}{shown[0]}")
        print(f"{'':14}{shown[1]}")


# ---- sampling ------------------------------------------------------------------------------------
def without_order(model):
    """The same network in a uniformly random order."""
    blind = lomdm.LoMDM(replace(model.config, learn_order=False)).to(model.wte.weight.device)
    blind.load_state_dict(model.state_dict(), strict=False)  # all but the two heads
    return blind.eval()


def judge_of(a, runs):
    """The run at --judge, an ARM that can read what these write; or None."""
    if not a.judge:
        return None
    judge = load(a.judge, a)
    no_arm = judge.ckpt["model_name"] != "arm"
    refuse(no_arm, f"--judge {a.judge} holds no ARM, which alone knows an exact cost")
    for run in runs:
        other = judge.ckpt["tokenizer"] != run.ckpt["tokenizer"]
        refuse(other, f"--judge {a.judge} has another vocabulary than {run.name}")
        L = run.val.shape[1]
        refuse(judge.val.shape[1] < L, f"--judge {a.judge} has a window of less than {L}")
    return judge


def entropy(x, size):
    """Of single tokens, nats."""
    p = x.flatten().bincount(minlength=size).double() / x.numel()
    return -torch.xlogy(p, p).sum().item()


def samples(a):
    """Texts drawn in the learned order and in a uniformly random one, by tokens a call: their cost
    under the model's own bound and under an ARM, and the entropy of their characters."""
    runs = [load(out_dir, a) for out_dir in a.out_dirs]
    judge = judge_of(a, runs)
    print("run              order    a call   own bound      judge by ARM   unigram entropy")
    for run in runs:
        require_lomdm(run)
        m, (N, L) = run.model, run.val.shape
        orders = {"learned": m} if m.config.learn_order else {}
        orders["uniform"] = without_order(m)
        z = torch.full((a.samples, L), m.mask_id, device=a.device)
        for how, n in [("(text)", 0), *itertools.product(orders, (1, 2, 4, 8, 16))]:
            g = torch.Generator(a.device).manual_seed(3)
            x = run.val[:: max(1, N // a.samples)][: a.samples]  # real text
            if n:
                x, _ = orders[how].sample(z, per_step=n, generator=g)
            own = shown(m.nelbo(x, 4, generator=g) / L)
            cost = shown(judge.model.nelbo(x) / L) if judge else "-"
            variety = entropy(x, run.tokenizer.size)
            print(f"{run.name:16} {how:8} {n:6}   {own} {cost:15} {variety:9.4f}")


def decoders(a):
    """What a decoder that goes by a rule really gives to the validation text: exact nats per token,
    one token a call; and how far that is from the bound, on the same windows."""
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        L = run.val.shape[1]
        bound = run.over_windows(lambda m, x, g: m.nelbo(x, 32, generator=g)) / L
        print(f"{run.name:20} bound       {shown(bound)}")
        for by in RULES:
            if by == "random" or (by == "order" and not has_order(run.model)):
                continue  # takes other steps each time
            nats = run.over_windows(lambda m, x, _, by=by: -decoder_log_prob(m, x, by)) / L
            more, error = mean_error(nats - bound)
            print(f"{'':20} {by:11} {shown(nats)}, {more:+.4f} ± {error:.4f}", flush=True)


# ---- orders against times ------------------------------------------------------------------------
def variance(a):
    """The two estimators on the same 16 windows, many draws each: the standard deviation of the
    loss, and the noise of the gradient, E |g - E g|^2 / |E g|^2."""
    for out_dir in a.out_dirs:
        run = load(out_dir, a)
        require_lomdm(run)
        x = run.val[:: max(1, len(run.val) // 16)][:16]
        for how, cls in (("orders", lomdm.LoMDM), ("times", lomdm.ByTime)):
            model = cls(run.model.config).to(a.device).eval()
            model.load_state_dict(run.model.state_dict())
            loss, noise = noise_of(model, x, a.draws)
            print(
                f"{run.name:16} {how:7} loss {statistics.mean(loss):.4f}, standard deviation "
                f"{statistics.stdev(loss):.4f}; gradient noise {noise:.2f}"
            )


def noise_of(model, x, draws):
    """The losses of so many draws, and the noise of their gradient. Texts change places, as times
    rise from the first to the last: all are to meet all times."""
    torch.manual_seed(4)
    losses, total, square = [], 0, 0
    for _ in range(draws):
        loss, metrics = model.loss(x[torch.randperm(len(x))])
        g = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        g = torch.cat([p.flatten().cpu().double() for p in g])  # (parameters,)
        losses.append(metrics["nelbo"].item())
        total, square = total + g, square + g.square().sum()
    spread = (square - total.square().sum() / draws) / (draws - 1)  # E |g - E g|^2
    size = (total / draws).square().sum() - spread / draws  # unbiased for |E g|^2
    return losses, (spread / size).item() if size > 0 else math.inf


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
    "seed": dict(type=int, default=1, help="of the races [1]"),
    "windows": dict(type=int, help="of validation, evenly spread; by default all"),
    "device": dict(default="cpu", help="[cpu]"),
    "data_dir": dict(help="as in train_char.py"),
}
OF_MODELS = ("windows", "device", "data_dir")
COMMANDS = {  # what each takes besides out_dirs
    table: (),
    curves: ("svg",),
    bounds: OF_MODELS,
    order: ("svg", *OF_MODELS),
    passage: ("svg", *OF_MODELS),
    rows: OF_MODELS,
    films: ("samples", *OF_MODELS),
    strips: ("text", "seed", *OF_MODELS),
    fraction: ("svg", *OF_MODELS),
    variance: ("draws", *OF_MODELS),
    samples: ("judge", "samples", *OF_MODELS),
    infill: OF_MODELS,
    decoders: OF_MODELS,
}


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = p.add_subparsers(metavar="command", required=True)
    for f, flags in COMMANDS.items():
        command = commands.add_parser(f.__name__, description=f.__doc__, allow_abbrev=False)
        command.set_defaults(run=f)
        command.add_argument("out_dirs", nargs="+", help="of train_char.py")
        for name in flags:
            command.add_argument(f"--{name}", **FLAGS[name])
    a = p.parse_args(argv)
    for name, value in vars(a).items():
        refuse(value == "", f"--{name} is empty")
        if isinstance(value, int):
            cli.check_range(name, value, 2 if name == "draws" else 1, 2**20)
    real = [os.path.realpath(out_dir) for out_dir in a.out_dirs]
    refuse(len(set(real)) < len(real), "a folder is there twice")
    return a


def main(argv=None):
    a = parse(argv)
    if "device" in a:
        a.device = cli.pick_device(a.device)
    a.run(a)


if __name__ == "__main__":
    cli.run(main)
