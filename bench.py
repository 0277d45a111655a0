"""
Time and memory of a training step of each model, beside the ARM's, and A3's decoding speed.

    python bench.py                    nanoGPT's size, 6 layers, 384 wide, 256 context
    python bench.py --generate         A3: cached generation against recomputing everything
    python bench.py --compile --dtype bfloat16 --batch_size 64 --device cuda

The models take turns, so a machine that slows down slows all of them; a row is the median of
--repeats steps. Tokens are those of the batch: LoMDM reads each of them twice, in two orders.
"""

import multiprocessing
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter

import torch

import a3
import lomdm
import sample

MODELS = {
    "arm": dict(block_len=1),
    "mdm": dict(),
    "block 4": dict(block_len=4),
    "block 16": dict(block_len=16),
    "lomdm": dict(learn_order=True),
    "lomdm in blocks of 16": dict(block_len=16, learn_order=True),
    "a3, left to right": a3.ar_groups,
    "a3, random order": lambda B, L, device: a3.random_groups(B, L, 1, device=device),
    "a3, random groups of 4": lambda B, L, device: a3.random_groups(B, L, 4, device=device),
}


def fits(seq_len, block_len=1, **_):
    return seq_len % block_len == 0


def make_step(name, a):
    """A function that makes one training step: forward, backward, AdamW."""
    device, how = torch.device(a.device), MODELS[name]
    size = a.vocab_size, a.seq_len, a.n_layer, a.n_head, a.n_embd
    torch.manual_seed(0)
    if callable(how):
        model = a3.A3(a3.Config(*size)).to(device)
    else:
        model = lomdm.LoMDM(lomdm.Config(*size, **how)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type != "mps")
    loss_of = torch.compile(model.loss, dynamic=False) if a.compile else model.loss
    x = torch.randint(a.vocab_size, (a.batch_size, a.seq_len), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=a.dtype == "bfloat16"):
            loss = loss_of(x, how(*x.shape, device=device)) if callable(how) else loss_of(x)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def recompute(model, x, groups):
    """generate() without a cache: the whole forward pass again for every group."""
    x = x.clone()
    for group in range(int(groups.max()) + 1):
        p = model(x, groups)[groups == group].softmax(-1)  # (group, V)
        x[groups == group] = torch.multinomial(p, 1)[:, 0]
    return x


@torch.no_grad()
def generation(a):
    """Tokens per second of A3: batch_size texts of seq_len tokens, each in an order of its own."""
    device = torch.device(a.device)
    torch.manual_seed(0)
    model = a3.A3(a3.Config(a.vocab_size, a.seq_len, a.n_layer, a.n_head, a.n_embd)).to(device)
    model.eval()
    x = torch.zeros(a.batch_size, a.seq_len, dtype=torch.long, device=device)

    def seconds(f):
        times = []
        for _ in range(a.repeats):
            began = time.perf_counter()
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def dynamic(size):
        return model.generate_dynamic(x, torch.ones_like(x, dtype=torch.bool), size)

    print("tokens a call   cached tok/s   recomputed tok/s   ratio   dynamic, by confidence tok/s")
    for size in (1, 2, 4, 8):
        groups = a3.random_groups(*x.shape, size, device=device)
        t = seconds(lambda groups=groups: model.generate(x, groups))
        t_recompute = seconds(lambda groups=groups: recompute(model, x, groups))
        t_dynamic = seconds(lambda size=size: dynamic(size))
        print(
            f"{size:13}{x.numel() / t:15,.0f}{x.numel() / t_recompute:19,.1f}"
            f"{t_recompute / t:8.1f}{x.numel() / t_dynamic:31,.0f}"
        )


def resident():
    """The most memory this process has held, in bytes."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(name, a):
    """Bytes that two steps need in all. Runs in a process of its own: the peak never falls
    again."""
    if torch.device(a.device).type == "cuda":
        step = make_step(name, a)
        step(), step()
        return torch.cuda.max_memory_allocated()
    torch.set_num_threads(a.threads)
    before = resident()
    step = make_step(name, a)
    step(), step()
    return resident() - before


def main():
    p = sample.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--device", default=sample.pick_device(None).type)
    p.add_argument("--batch_size", type=int, default=4)
    p.add_argument("--seq_len", type=int, default=256)
    p.add_argument("--n_layer", type=int, default=6)
    p.add_argument("--n_head", type=int, default=6)
    p.add_argument("--n_embd", type=int, default=384)
    p.add_argument("--vocab_size", type=int, default=65)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--generate", action="store_true")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = p.parse_args()
    if a.repeats < 1 or a.batch_size < 1 or a.threads < 1:
        raise sample.UserError("--repeats, --batch_size and --threads must be at least 1")
    sample.pick_device(a.device)
    try:
        lomdm.Config(a.vocab_size, a.seq_len, a.n_layer, a.n_head, a.n_embd)
    except ValueError as e:
        raise sample.UserError(str(e)) from None
    names = [n for n, how in MODELS.items() if callable(how) or fits(a.seq_len, **how)]
    torch.set_num_threads(a.threads)
    print(
        f"{a.n_layer} layers, {a.n_embd} wide, {a.seq_len} context, {a.vocab_size} tokens, "
        f"{a.dtype}, {a.device}, {a.threads} threads, torch {torch.__version__}"
    )
    print(f"batch {a.batch_size}, medians of {a.repeats}")
    if a.generate:
        return generation(a)
    memory = {}
    for name in names:  # first: a new process inherits its parent's peak
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[name] = pool.apply(peak_memory, (name, a))
    steps = {name: make_step(name, a) for name in names}
    times = {name: [] for name in names}
    for repeat in range(a.repeats + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat >= 2:  # the first ones warm up
                times[name].append(time.perf_counter() - began)

    print("                         ms/step       (min-max)   tokens/s   / arm   / mdm  peak MB")
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, t in times.items():
        m, spread = median[name], f"({min(t) * 1e3:.0f}-{max(t) * 1e3:.0f})"
        print(
            f"{name:22}{m * 1e3:10.1f}{spread:>16}{a.batch_size * a.seq_len / m:11,.0f}"
            f"{m / median['arm']:8.2f}{m / median['mdm']:8.2f}{memory[name] / 2**20:9,.0f}"
        )


if __name__ == "__main__":
    sample.run(main)
