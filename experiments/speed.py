"""
How fast, and how good: tokens a second of every way to sample from trained models, beside what an
ARM of another seed thinks of the texts, so that a faster sampler cannot hide a worse one.

    python -m experiments.speed runs/arm runs/block runs/a3 --judge runs/judge

All ways take turns. A figure is the median of --repeats. Ratios are to the first way of the first
run, so let that be an ARM. calls: of the network, a token, one text at a time. judge: exact nats
per token under the judge, the lower the better unless the texts have lost their variety. entropy:
of single tokens, nats. First come the figures of the validation text.
"""

import statistics
import time
from argparse import RawDescriptionHelpFormatter

import torch

import a3
from beyond import loa3
from beyond.speculative import generate_speculative
from experiments.evidence import FLAGS, entropy, judge_of, opinion
from experiments.runs import Run
from plumbing import cli

BATCHES = (1, 16)  # texts at a time


def ways(name):
    """{what it is called: arguments of write()} for a model of this name."""
    several = {f"{m} a call": {"per_step": m} for m in (1, 2, 4)}
    uncached = {"without cache": {"cache": False}}
    if name == "arm":
        return {"1 a call": {}} | uncached
    if name == "block":
        return several | uncached

    drafts = (2, 4, 8) if name in ("a3", "loa3") else ()
    drafted = {f"{k} drafts": {"drafts": k} for k in drafts}
    surest = {f"{m} by confidence": {"per_step": m, "by": "confidence"} for m in (1, 2, 4)}
    return several | drafted | surest


def write(model, batch, drafts=1, **how):
    """Texts (batch, seq_len)."""
    device = model.wte.weight.device
    z = torch.full((batch, model.config.seq_len), model.mask_id, device=device)
    if drafts == 1:
        x, _ = model.sample(z, **how)
        return x

    if isinstance(model, loa3.LoA3):
        groups = model.draw_groups(z, generator=how.get("generator"))
    else:
        groups = a3.chunk_groups(*z.shape, device=device)
    x, _ = generate_speculative(model, z, groups, drafts, **how)
    return x


def seconds(model, batch, how):
    began = time.perf_counter()
    write(model, batch, **how)
    if model.wte.weight.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def calls(model, how):
    """Of the network, a token: one text at a time, eight of them."""
    seen = []
    g = torch.Generator(model.wte.weight.device).manual_seed(3)
    hook = model.norm.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(8):
        write(model, 1, generator=g, **how)
    hook.remove()
    return len(seen) / (8 * model.config.seq_len)


def speeds(found, repeats):
    """Tokens a second of each (run, way, how), by batch: {batch: [..]}."""
    fast = {}
    for batch in BATCHES:
        times = [[seconds(run.model, batch, how) for run, _, how in found] for _ in range(repeats)]
        medians = map(statistics.median, zip(*times, strict=True))
        tokens = [batch * run.model.config.seq_len for run, *_ in found]
        fast[batch] = [n / t for n, t in zip(tokens, medians, strict=True)]
    return fast


def parse(argv):
    p = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("out_dirs", nargs="+", help="of train_char.py")
    for name in ("judge", "samples", "windows", "device", "data_dir"):
        p.add_argument(f"--{name}", **FLAGS[name])
    p.add_argument("--repeats", type=int, default=3, help="[3]")
    a = p.parse_args(argv)
    for name in ("samples", "repeats"):
        cli.check_range(name, getattr(a, name), 1, 2**20)
    return a


@torch.no_grad()
def main(argv=None):
    a = parse(argv)
    a.device = cli.pick_device(a.device)
    runs = [Run(out_dir, a.device, a.windows, a.data_dir) for out_dir in a.out_dirs]
    judge = judge_of(a, runs)
    found = [(run, way, how) for run in runs for way, how in ways(run.ckpt["model_name"]).items()]

    speeds(found, 1)  # warms up
    fast = speeds(found, a.repeats)
    head = "".join(f"{f'tok/s x {batch}':>12}{'ratio':>7}" for batch in BATCHES)
    print(f"{'run':20} {'way':16}{head}  calls   judge             entropy")
    if judge:
        rest = f"{opinion(judge, judge.val)}   {entropy(judge.val, judge.tokenizer.size):.4f}"
        print(f"{'(the text itself)':20} {'':16}{'':{19 * len(BATCHES)}}          {rest}")

    for i, (run, way, how) in enumerate(found):
        x = write(run.model, a.samples, generator=torch.Generator(a.device).manual_seed(3), **how)
        times = "".join(f"{v[i]:12,.0f}{v[i] / v[0]:7.2f}" for v in fast.values())
        rest = f"{opinion(judge, x)}   {entropy(x, run.tokenizer.size):.4f}"
        n = calls(run.model, how)
        print(f"{run.name:20} {way:16}{times}  {n:.3f}   {rest}", flush=True)


if __name__ == "__main__":
    cli.run(main)
