"""
How fast, and how good: tokens a second of every way to sample from trained models, beside what an
ARM of another seed thinks of the texts, so that a faster sampler cannot hide a worse one.

    python -m experiments.speed runs/arm runs/block runs/a3 --judge runs/judge

All ways take turns; a figure is the median of --repeats. Ratios are to the first way of the first
run, so let that be an ARM. calls: of the network, a token, one text at a time. judge: exact nats
per token under the judge, the lower the better unless the texts have lost their variety; entropy:
of single tokens, nats. First come the figures of the validation text.
"""

import statistics
import time
from argparse import RawDescriptionHelpFormatter

import torch

import a3
from beyond import loa3
from beyond.speculative import generate_speculative
from experiments.evidence import FLAGS, entropy, judge_of, load, shown
from plumbing import cli
from plumbing.cli import refuse


def ways(name):
    """{what it is called: arguments of sample()} for a model of this name."""
    several = {f"{m} a call": dict(per_step=m) for m in (1, 2, 4)}
    if name == "arm":
        return {"1 a call": dict(), "without cache": dict(cache=False)}
    if name == "block":
        return several | {"without cache": dict(cache=False)}
    surest = {f"{m} by confidence": dict(per_step=m, by="confidence") for m in (1, 2, 4)}
    if name in ("a3", "loa3"):
        drafted = {f"{k} drafts": dict(drafts=k) for k in (2, 4, 8)}
        return several | drafted | surest
    return several | surest


def draw(model, z, drafts=1, **how):
    if drafts == 1:
        return model.sample(z, **how)
    if isinstance(model, loa3.LoA3):
        groups = model.draw_groups(z, generator=how.get("generator"))
    else:
        groups = a3.chunk_groups(*z.shape, device=z.device)
    return generate_speculative(model, z, groups, drafts, **how)


def tokens_a_second(model, batch, how, a):
    """A function that samples once and returns the seconds it took."""
    z = torch.full((batch, model.config.seq_len), model.mask_id, device=a.device)

    def once():
        began = time.perf_counter()
        draw(model, z, **how)
        if torch.device(a.device).type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    return once


def calls(model, how):
    """Of the network, a token: one text at a time, eight of them."""
    seen, g = [], torch.Generator(model.wte.weight.device).manual_seed(3)
    hook = model.norm.register_forward_hook(lambda *_: seen.append(1))
    z = torch.full((1, model.config.seq_len), model.mask_id, device=g.device)
    for _ in range(8):
        draw(model, z, generator=g, **how)
    hook.remove()
    return len(seen) / (8 * z.shape[1])


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("out_dirs", nargs="+", help="of train_char.py")
    for name in ("judge", "samples", "windows", "device", "data_dir"):
        p.add_argument(f"--{name}", **FLAGS[name])
    p.add_argument("--repeats", type=int, default=3, help="[3]")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="[1 16]")
    a = p.parse_args(argv)
    for name in ("samples", "repeats"):
        cli.check_range(name, getattr(a, name), 1, 2**20)
    refuse(min(a.batches) < 1, "--batches must be at least 1")
    return a


def main(argv=None):
    a = parse(argv)
    a.device = cli.pick_device(a.device)
    runs = [load(out_dir, a) for out_dir in a.out_dirs]
    judge = judge_of(a, runs)
    found = [(run, way, how) for run in runs for way, how in ways(run.ckpt["model_name"]).items()]
    speeds = []  # for each batch, that of each way
    with torch.no_grad():
        for batch in a.batches:
            once = [tokens_a_second(run.model, batch, how, a) for run, _, how in found]
            times = [[f() for f in once] for _ in range(a.repeats + 1)][1:]
            tokens = [batch * run.val.shape[1] for run, *_ in found]
            medians = [statistics.median(t) for t in zip(*times, strict=True)]
            speeds.append([n / t for n, t in zip(tokens, medians, strict=True)])
        head = "".join(f"{f'tok/s x {batch}':>12}{'ratio':>7}" for batch in a.batches)
        print(f"{'run':20} {'way':16}{head}  calls   judge             entropy")
        if judge:
            x, size = judge.val, judge.tokenizer.size
            rest = f"{shown(judge.model.nelbo(x) / x.shape[1])}   {entropy(x, size):.4f}"
            print(f"{'(the text itself)':20} {'':16}{'':{19 * len(a.batches)}}          {rest}")
        for i, (run, way, how) in enumerate(found):
            L, g = run.val.shape[1], torch.Generator(a.device).manual_seed(3)
            z = torch.full((a.samples, L), run.model.mask_id, device=a.device)
            x, _ = draw(run.model, z, generator=g, **how)
            cost = shown(judge.model.nelbo(x) / L) if judge else "-"
            fast = "".join(f"{v[i]:12,.0f}{v[i] / v[0]:7.2f}" for v in speeds)
            rest = f"{cost}   {entropy(x, run.tokenizer.size):.4f}"
            n = calls(run.model, how)
            print(f"{run.name:20} {way:16}{fast}  {n:.3f}   {rest}", flush=True)


if __name__ == "__main__":
    cli.run(main)
