"""
The numbers and pictures of the README, from the runs of train_char.py. Each prints a table.

    python evidence.py table runs/lomdm_s1 runs/lomdm_s2     best validation, mean over seeds
    python evidence.py curves runs/* --svg curves.svg        validation during training
    python evidence.py bounds runs/lomdm runs/mdm            jump and paper bound, differences
    python evidence.py order runs/lomdm --svg order.svg      mean order weight by character class
    python evidence.py passage runs/lomdm --svg p.svg        a text coloured by its order weights
    python evidence.py fraction runs/* --svg f.svg           nats per token by share revealed
    python evidence.py variance runs/lomdm                   gradients: orders against times
    python evidence.py samples runs/lomdm --judge runs/arm   the learned order while sampling
    python evidence.py infill runs/a3 runs/lomdm             gaps in validation passages
    python evidence.py times --model mdm                     train_char.py, the time estimator

Standard errors are over windows of the validation split, or over seeds where it says so.
"""

import html
import json
import math
import statistics
import sys
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import a3
import lomdm
import prepare
import sample
import train_char
from sample import UserError

# ---- pictures ------------------------------------------------------------------------------------

COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#f28e2b", "#3fa7a0", "#9c755f", "#d37295")
STYLE = (
    "text{font:13px sans-serif;fill:#222}.axis{stroke:#888;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


def ticks(low, high):
    """Round numbers between low and high, about five of them."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(series, xlabel, ylabel, names=None):
    """An SVG. series: {label: [(x, y, error)]}. names: labels for x = 0, 1, .., which turns lines
    into points."""
    W, H, left, top, right, bottom = 720, 400, 60, 15, 190, 50
    points = [p for line in series.values() for p in line]
    xs = [p[0] for p in points]
    ys = [y + sign * e for _, y, e in points for sign in (-1, 1)]
    x0, x1 = (-0.5, len(names) - 0.5) if names else (min(xs), max(xs) or 1)
    y0, y1 = min(ys), max(ys)
    y0, y1 = y0 - 0.04 * (y1 - y0 or 1), y1 + 0.04 * (y1 - y0 or 1)

    def at(x, y):
        return (
            left + (W - left - right) * (x - x0) / (x1 - x0),
            H - bottom - (H - top - bottom) * (y - y0) / (y1 - y0),
        )

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}"><style>{STYLE}</style>']
    out.append(f'<path class="axis" d="M{left} {top}V{H - bottom}H{W - right}"/>')
    for y in ticks(y0, y1):
        px, py = at(x0, y)
        out.append(f'<text x="{px - 8:.0f}" y="{py + 4:.1f}" text-anchor="end">{y:.4g}</text>')
        out.append(f'<path class="axis" d="M{px - 4:.0f} {py:.1f}h4"/>')
    labels = list(enumerate(names)) if names else [(x, f"{x:,.4g}") for x in ticks(x0, x1)]
    for x, label in labels:
        px, py = at(x, y0)
        out.append(
            f'<text x="{px:.1f}" y="{py + 18:.0f}" text-anchor="middle">{html.escape(label)}</text>'
        )
    out.append(
        f'<text x="{(left + W - right) / 2}" y="{H - 8}" text-anchor="middle">{xlabel}</text>'
    )
    out.append(
        f'<text transform="translate(14 {(top + H - bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{ylabel}</text>'
    )
    for i, (label, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        d = "".join(
            f"{'L' if j else 'M'}{at(x, y)[0]:.1f} {at(x, y)[1]:.1f}"
            for j, (x, y, _) in enumerate(line)
        )
        if not names:
            out.append(f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, e in line:
            (px, low), (_, high) = at(x, y - e), at(x, y + e)
            out.append(f'<path d="M{px:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
            out.append(f'<circle cx="{px:.1f}" cy="{at(x, y)[1]:.1f}" r="3" fill="{colour}"/>')
        y = top + 14 + 20 * i
        out.append(
            f'<rect x="{W - right + 14}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
        )
        out.append(f'<text x="{W - right + 30}" y="{y}">{html.escape(label)}</text>')
    return "\n".join([*out, "</svg>\n"])


def save_svg(a, *what):
    if a.svg:
        sample.write(a.svg, chart(*what))


# ---- what runs left behind -----------------------------------------------------------------------


class Checkpoint:
    """The best checkpoint of a run, its settings, and its validation split in windows (N, L)."""

    def __init__(self, out_dir, a):
        self.name = Path(out_dir).name
        self.ckpt, self.model = sample.load_checkpoint(Path(out_dir) / "ckpt.pt", a.device)
        self.model.eval()
        s = self.settings = train_char.Settings(**self.ckpt["settings"])
        corpus, _ = prepare.load(s.data, s.tokenizer, s.val_data, a.data_dir or s.data_dir)
        if corpus.sha256 != self.ckpt["data_sha256"]:
            raise UserError(f"{out_dir} was not trained on --data {s.data} as it is now")
        self.tokenizer = sample.tokenizer_of(corpus.vocab)
        n = len(corpus.val) // s.seq_len
        x = np.asarray(corpus.val[: n * s.seq_len]).astype(np.int64)
        self.val = torch.from_numpy(x).view(n, -1)[: a.windows].to(a.device)

    def over_windows(self, f, rows=256):
        """f(x (B, L), generator) -> (B, ..) for all windows: (N, ..)."""
        g = torch.Generator(self.val.device).manual_seed(2)
        with torch.no_grad():
            return torch.cat([f(x, g).cpu().double() for x in self.val.split(rows)])


def validations(out_dir):
    """[(step, val, error, kind)] from log.jsonl."""
    try:
        lines = (Path(out_dir) / "log.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {Path(out_dir) / 'log.jsonl'}: {e}") from None
    return [(r["step"], r["val"], r["val_error"], r["kind"]) for r in rows if "val" in r]


def by_seed(out_dirs):
    """Runs that differ in the ending _s1, _s2, .. only belong together: {name: [out_dir, ..]}."""
    groups = defaultdict(list)
    for out_dir in out_dirs:
        groups[Path(out_dir).name.rsplit("_s", 1)[0]].append(out_dir)
    return groups


def mean_error(v):
    """Mean and standard error of (N,)."""
    v = torch.as_tensor(v, dtype=torch.double)
    return v.mean().item(), (v.std() / math.sqrt(len(v))).item() if len(v) > 1 else math.nan


def table(a):
    """Best validation figure of each run: mean over seeds, its standard error over seeds, and the
    standard error over windows of a single run."""
    print("run                kind                        seeds    mean   ± seeds  ± windows")
    for name, out_dirs in by_seed(a.out_dirs).items():
        best = defaultdict(list)
        for out_dir in out_dirs:
            rows = validations(out_dir)
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
    for name, out_dirs in by_seed(a.out_dirs).items():
        at = defaultdict(list)
        for out_dir in out_dirs:
            rows = validations(out_dir)
            for step, val, _, kind in rows:
                if kind == rows[0][3]:
                    at[step].append(val)
        series[name] = [(step, *mean_error(vals)) for step, vals in sorted(at.items())]
        series[name] = [(x, y, 0 if math.isnan(e) else e) for x, y, e in series[name]]
        print(name, " ".join(f"{x}: {y:.4f} ± {e:.4f}" for x, y, e in series[name]))
    save_svg(a, series, "steps", "nats per token, validation")


# ---- bounds --------------------------------------------------------------------------------------


def bounds(a):
    """Both bounds with the same draws, four for each window; and what one run has less than the
    next, window by window."""
    per_token = {}
    for out_dir in a.out_dirs:
        c = Checkpoint(out_dir, a)
        if isinstance(c.model, a3.A3):
            raise UserError(f"{out_dir} holds an A3, which has no bounds: it is exact")
        L = c.val.shape[1]
        jump, paper = (
            c.over_windows(lambda x, g, b=b, c=c: c.model.nelbo(x, 4, b, generator=g)) / L
            for b in ("jump", "paper")
        )
        per_token[c.name] = jump
        mean, error = mean_error(jump)
        more, more_error = mean_error(paper - jump)
        line = (
            f"{c.name:16} jump {mean:.4f} ± {error:.4f}, paper - jump {more:.5f} ± {more_error:.5f}"
        )
        if c.model.config.learn_order:
            _, order = parts(c)
            w = c.over_windows(lambda x, g, c=c: c.model.order_weights(x))
            line += f", order term {mean_error(order)[0]:.4f}, w {w.min():.2f}..{w.max():.2f}"
            line += f", spread {w.std() / w.mean():.3f}"
        print(line)
    names = list(per_token)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if len(per_token[one]) == len(per_token[other]):
                mean, error = mean_error(per_token[one] - per_token[other])
                print(f"{one} - {other}: {mean:+.4f} ± {error:.4f}")


def parts(c):
    """The two terms of the jump bound, (N,) nats per token each."""
    m, (_, L) = c.model, c.val.shape

    def both(x, g):
        w = lomdm.to_blocks(m.order_weights(x), m.config.block_len)
        k = lomdm.spread_counts(*x.shape, m.config.block_len, g, x.device)
        recon, order, _, _ = m.estimate(x, w, k, x.numel(), g)
        return torch.stack((recon.sum(-1), order.sum(-1)), 1) / L

    return c.over_windows(both).unbind(1)


def fraction(a):
    """Nats per token at the next position to be revealed, by the share that is revealed already."""
    series = {}
    for out_dir in a.out_dirs:
        c = Checkpoint(out_dir, a)
        m, L = c.model, c.val.shape[1]
        rows = []
        for share in range(10):
            k = share * L // 10

            def cost(x, g, k=k, m=m, L=L):
                if isinstance(m, a3.A3):
                    groups = a3.random_groups(*x.shape, 1, g, x.device)
                    return -(m.log_prob(x, groups) * (groups == k)).sum(1)
                w = lomdm.to_blocks(m.order_weights(x), L)
                counts = torch.full((len(x), 1), k, device=x.device)
                recon, order, _, _ = m.estimate(x, w, counts, x.numel(), g)
                return (recon + order)[:, 0] / L

            if isinstance(m, lomdm.LoMDM) and m.config.block_len < L:
                raise UserError(
                    f"{out_dir}: fraction is for one block, --model mdm or lomdm, or a3"
                )
            rows.append((share / 10, *mean_error(c.over_windows(cost))))
        series[c.name] = rows
        print(c.name, " ".join(f"{x:.1f}: {y:.3f} ± {e:.3f}" for x, y, e in rows))
    save_svg(a, series, "share already revealed", "nats at the next position")


# ---- the order -----------------------------------------------------------------------------------

CLASSES = {
    "line end": lambda c: c == "\n",
    "space": lambda c: c == " ",
    "punctuation": lambda c: not c.isalnum() and not c.isspace(),
    "capital": str.isupper,
    "vowel": lambda c: c in "aeiou",
    "consonant": lambda c: c.islower() and c not in "aeiou",
}


def order(a):
    """Mean of w / (mean w) by character class: above 1 is revealed earlier than average. Errors are
    over windows."""
    series = {}
    for out_dir in a.out_dirs:
        c = Checkpoint(out_dir, a)
        if isinstance(c.model, a3.A3) or not c.model.config.learn_order:
            raise UserError(f"{out_dir} holds a model without a learned order")
        w = c.over_windows(lambda x, g, c=c: c.model.order_weights(x))
        text = c.tokenizer.pieces(range(c.tokenizer.size))
        rows = []
        for i, belongs in enumerate(CLASSES.values()):
            member = torch.tensor([bool(t) and belongs(t[0]) for t in text])[c.val.cpu()]  # (N, L)
            there = member.any(1)
            per_window = (w * member).sum(1)[there] / member.sum(1)[there] / w[there].mean(1)
            rows.append((i, *mean_error(per_window)))
        series[c.name] = rows
        print(
            c.name,
            ", ".join(f"{n} {y:.3f} ± {e:.3f}" for n, (_, y, e) in zip(CLASSES, rows, strict=True)),
        )
    save_svg(a, series, "", "order weight / mean", list(CLASSES))


def passage(a):
    """A passage of the validation text, coloured by its order weights: in each window the largest
    weight first. Prints it with digits, 0 for the largest."""
    for out_dir in a.out_dirs:
        c = Checkpoint(out_dir, a)
        if isinstance(c.model, a3.A3) or not c.model.config.learn_order:
            raise UserError(f"{out_dir} holds a model without a learned order")
        x = c.val[len(c.val) // 2 :][:8]
        with torch.no_grad():
            w = c.model.order_weights(x)
        rank = w.argsort(1, descending=True).argsort(1)  # 0: the largest weight of its window
        shown = [(c.tokenizer.pieces(x.flatten().tolist()), rank.flatten().tolist())]
        print(c.name)
        sample.show(shown, True)
        if a.svg:
            sample.write(a.svg, sample.svg(shown))


def samples(a):
    """Texts drawn in the learned order and in a uniformly random one, by tokens a call: their cost
    under the model's own bound and under an ARM, and the entropy of their characters."""
    judge = Checkpoint(a.judge, a) if a.judge else None
    print("run              order    a call   own bound      judge by ARM   unigram entropy")
    for out_dir in a.out_dirs:
        c = Checkpoint(out_dir, a)
        if isinstance(c.model, a3.A3):
            raise UserError(f"{out_dir} holds an A3; samples is for the models of lomdm.py")
        L, m = c.val.shape[1], c.model
        learned = m.weigh
        z = torch.full((a.samples, L), c.tokenizer.size, device=a.device)
        real = c.val[:: max(1, len(c.val) // a.samples)][: a.samples]
        ways = [("learned", n) for n in (1, 2, 4, 8, 16)] * m.config.learn_order
        for how, n in [("(text)", 0), *ways, *(("uniform", n) for n in (1, 2, 4, 8, 16))]:
            g = torch.Generator(a.device).manual_seed(3)
            if how == "uniform":
                m.weigh = lambda head, h, *_: torch.ones_like(h[..., 0])
            x = m.sample(z, per_step=n, generator=g)[0] if n else real
            m.weigh = learned
            p = x.flatten().bincount(minlength=c.tokenizer.size).double() / x.numel()
            entropy = -torch.xlogy(p, p).sum().item()
            own = mean_error(m.nelbo(x, 4, generator=g) / L)
            by_judge = mean_error(judge.model.nelbo(x) / L) if judge else (math.nan, math.nan)
            print(
                f"{c.name:16} {how:8} {n:6}   {own[0]:.4f} ± {own[1]:.4f} {by_judge[0]:.4f} ± "
                f"{by_judge[1]:.4f} {entropy:9.4f}"
            )


def infill(a):
    """What the true middle of a validation window costs, given both sides of it: nats per token of
    the gap, a quarter of the window."""
    for out_dir in a.out_dirs:
        c = Checkpoint(out_dir, a)
        m, L = c.model, c.val.shape[1]
        gap = torch.zeros(L, dtype=torch.bool, device=a.device)
        gap[3 * L // 8 : 5 * L // 8] = True
        n = int(gap.sum())

        def cost(x, g, m=m, gap=gap, n=n, L=L):
            if isinstance(
                m, a3.A3
            ):  # exact, for one random order: first what is given, then the gap
                place = torch.rand(x.shape, generator=g, device=x.device) + 2.0 * gap
                groups = place.argsort(1).argsort(1)
                return -(m.log_prob(x, groups) * gap).sum(1)
            w = lomdm.to_blocks(m.order_weights(x) * gap, L)  # what is given is not in the race
            k = lomdm.spread_counts(len(x), n, n, g, x.device)
            # the race is over the gap: what has weight 0 comes last, and is not masked
            recon, order, _, _ = m.estimate(x, w, k, x.numel(), g)
            return (recon + order)[:, 0] * n / L

        what = "exact" if isinstance(m, a3.A3) else "bound"
        mean, error = mean_error(c.over_windows(cost) / n)
        print(f"{c.name:16} {mean:.4f} ± {error:.4f} nats per token in gaps of {n} ({what})")


# ---- orders against times ------------------------------------------------------------------------


def loss_at_times(model, x, k=None, t=None):
    """LoMDM.loss with the estimator of the papers: equation (2) at one time t (B, 1) for each text,
    spread over the batch, and RLOO over two z_t of the same time. For one block."""
    (B, L), K = x.shape, model.config.block_len
    draws = 2 if model.config.learn_order else 1
    if t is None:
        t = (torch.arange(B, device=x.device) + torch.rand(1, device=x.device))[:, None] / B
    t, x = t.repeat(draws, 1), x.repeat(draws, 1)
    w = model.order_weights(x[:B]).repeat(draws, 1)  # (draws B, L)
    alpha, velocity = lomdm.schedule(t, L, K, w)
    masked = torch.rand_like(alpha) >= alpha
    h, attention = model.features(x.masked_fill(masked, model.mask_id))
    w_hat = model.weigh(model.g_hat, h, attention, L) if draws == 2 else torch.ones_like(w)
    _, velocity_hat = lomdm.schedule(t, L, K, w_hat)
    log_mu = model.logits(h).log_softmax(-1)
    recon, order = lomdm.nelbo_rate(log_mu, x, masked, velocity, velocity_hat)
    per_token = 1 / (draws * B * L)
    loss = nelbo = (recon + order).sum() * per_token
    if draws == 2:
        visible = alpha.clamp(1e-6, 1 - 1e-6)
        log_q = torch.where(masked, (1 - visible).log(), visible.log()).sum(1)
        (l1, l2), (q1, q2) = (recon + order).detach().chunk(2), log_q.chunk(2)
        loss = nelbo + ((l1 - l2) * (q1 - q2)).sum() * per_token
    metrics = {"nelbo": nelbo, "recon": recon.sum() * per_token, "order": order.sum() * per_token}
    metrics["w_spread"] = w.std(correction=0) / w.mean()
    return loss, {name: value.detach() for name, value in metrics.items()}


def variance(a):
    """The two estimators on the same 16 windows, many draws each: the standard deviation of the
    loss, and the noise of the gradient, E |g - E g|^2 / |E g|^2."""
    for out_dir in a.out_dirs:
        c = Checkpoint(out_dir, a)
        if isinstance(c.model, a3.A3) or c.model.config.block_len < c.val.shape[1]:
            raise UserError(f"{out_dir}: variance is for one block, --model mdm or lomdm")
        x = c.val[:: max(1, len(c.val) // 16)][:16]
        torch.manual_seed(4)
        for how, loss_of in (
            ("orders", c.model.loss),
            ("times", lambda x, c=c: loss_at_times(c.model, x)),
        ):
            losses, gradients = [], []
            for _ in range(a.draws):
                c.model.zero_grad()
                loss, metrics = loss_of(x)
                loss.backward()
                losses.append(metrics["nelbo"].item())
                grads = [p.grad for p in c.model.parameters() if p.grad is not None]
                gradients.append(torch.cat([g.flatten() for g in grads]))
            g = torch.stack(gradients)  # (draws, parameters)
            spread = g.var(0).sum()
            size = g.mean(0).square().sum() - spread / len(g)  # unbiased for |E g|^2
            print(
                f"{c.name:16} {how:7} loss {statistics.mean(losses):.4f}, standard deviation "
                f"{statistics.stdev(losses):.4f}; gradient noise {spread / size:.2f}"
            )


def times(argv):
    """train_char.py, but for the estimator."""
    lomdm.LoMDM.loss = loss_at_times
    train_char.main(argv)


COMMANDS = (table, curves, bounds, order, passage, fraction, variance, samples, infill)


def parse(argv):
    p = sample.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("command", choices=[f.__name__ for f in COMMANDS] + ["times"])
    p.add_argument("out_dirs", nargs="+", help="of train_char.py")
    p.add_argument("--svg", help="draw a picture as well")
    p.add_argument("--judge", help="out_dir of an ARM that reads the samples")
    p.add_argument("--windows", type=int, help="of validation; by default all")
    p.add_argument("--samples", type=int, default=256, help="texts to draw [256]")
    p.add_argument("--draws", type=int, default=100, help="gradients to take [100]")
    p.add_argument("--device", default="cpu")
    p.add_argument("--data_dir", help="as train_char.py")
    return p.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["times"]:
        return times(argv[1:])
    a = parse(argv)
    a.device = sample.pick_device(a.device)
    {f.__name__: f for f in COMMANDS}[a.command](a)


if __name__ == "__main__":
    sample.run(main)
