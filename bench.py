"""
Time, memory and arithmetic of every model, beside the ARM's.

    python bench.py                                 CPU: training and sampling, small size
    python bench.py --preset base --batch_size 4    nanoGPT's size for tinyshakespeare
    python bench.py --device cuda --compile         the same on a GPU, with its defaults
    python bench.py --preset gpt2 --what count      operations, and an estimate for one H100
    python bench.py --preset gpt2 --batch_size 1 --what memory      peak of two training steps

The models take turns, so a machine that slows down slows all of them; a figure is the median of
--repeats, (min-max) beside it. Tokens are those of the batch: LoMDM reads each of them in two
orders. Sampling writes batch_size texts from nothing.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import a3
import lomdm
import sample
from train_char import PRESETS

MODELS = {
    "arm": dict(block_len=1),
    "mdm": dict(),
    "block 4": dict(block_len=4),
    "block 16": dict(block_len=16),
    "lomdm": dict(learn_order=True),
    "lomdm in blocks of 16": dict(block_len=16, learn_order=True),
    "a3 left to right": ("ar", 1),
    "a3 random order": ("random", 1),
    "a3 groups of 4": ("random", 4),
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, FLOP/s, by NVIDIA
SHARE = 0.4  # of the peak that a well-tuned training run reaches; an assumption


def make(name, a):
    """A model, and its loss as a function of x (B, L)."""
    device, how = torch.device(a.device), MODELS[name]
    size = a.vocab_size, a.seq_len, a.n_layer, a.n_head, a.n_embd
    torch.manual_seed(0)
    is_a3 = isinstance(how, tuple)
    with device:
        model = a3.A3(a3.Config(*size)) if is_a3 else lomdm.LoMDM(lomdm.Config(*size, **how))
    loss_of = torch.compile(model.loss, dynamic=False) if a.compile else model.loss

    def loss(x):
        with torch.autocast(device.type, torch.bfloat16, enabled=a.dtype == "bfloat16"):
            if not is_a3:
                return loss_of(x)[0]
            kind, n = how
            groups = (a3.chunk_groups if kind == "ar" else a3.random_groups)(
                *x.shape, n, device=device
            )
            return loss_of(x, groups, n == 1)

    return model, loss


def make_step(name, a):
    """A function that makes one training step: forward, backward, AdamW."""
    model, loss = make(name, a)
    device = torch.device(a.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type != "mps")
    x = torch.randint(a.vocab_size, (a.batch_size, a.seq_len), device=device)

    def step():
        loss(x).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(functions, a, warm_up):
    """{name: times in seconds, a.repeats of each}, taking turns."""
    times = {name: [] for name in functions}
    for repeat in range(a.repeats + warm_up):
        for name, f in functions.items():
            began = time.perf_counter()
            f()
            if torch.device(a.device).type == "cuda":
                torch.cuda.synchronize()
            if repeat >= warm_up:
                times[name].append(time.perf_counter() - began)
    return times


def resident():
    """The most memory this process has held, in bytes."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(name, a):
    """Bytes that two steps need in all. Runs in a process of its own: the peak never falls
    again."""
    torch.set_num_threads(a.threads)
    before = resident()
    step = make_step(name, a)
    step(), step()
    if torch.device(a.device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident() - before


class CountBytes(TorchDispatchMode):
    """What all operations read and write, each on its own as without torch.compile."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            both = (*args, *(out if isinstance(out, tuple) else (out,)))
            tensors = [t for t in both if isinstance(t, torch.Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return out


def operations(name, a):
    """Parameters; FLOP of forward and backward per token, matrix products and attention (all of it,
    also where it is causal), and per byte moved. Tensors are fake: nothing is computed."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {  # of shapes; torch has them for CUDA only
        cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    eager = argparse.Namespace(**vars(a) | dict(compile=False, device="cpu"))
    with FakeTensorMode():
        model, loss = make(name, eager)
        x = torch.randint(a.vocab_size, (a.batch_size, a.seq_len))
        flops = FlopCounterMode(display=False, custom_mapping=formulas)
        with flops, CountBytes() as moved:
            loss(x).backward()
    flop = flops.get_total_flops()
    return sum(p.numel() for p in model.parameters()), flop / x.numel(), flop / moved.total


def count(names, a):
    print("                      parameters  MFLOP/token  FLOP/byte   estimate for one H100, bf16")
    for name in names:
        n, flop, intensity = operations(name, a)
        speed = SHARE * PEAK["H100"] / flop
        print(
            f"{name:22}{n / 1e6:9.1f}M{flop / 1e6:13,.0f}{intensity:11.1f}   {speed:9,.0f} tok/s, "
            f"10B tokens {1e10 / speed / 3600:5.1f} h, 300B {3e11 / speed / 86400:5.1f} days"
        )
    print(f"The estimate is {SHARE:.0%} of {PEAK['H100'] / 1e12:.0f} TFLOP/s, nothing measured.")


def memories(names, a):
    """{name: bytes}. Before anything else: a new process inherits its parent's peak."""
    memory = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[name] = pool.apply(peak_memory, (name, a))
        if a.what == "memory":
            print(f"{name:22}{memory[name] / 2**20:9,.0f} MB")
    return memory


def training(names, a):
    memory = memories(names, a)
    times = timed({name: make_step(name, a) for name in names}, a, warm_up=2)
    median = {name: statistics.median(t) for name, t in times.items()}
    card = torch.cuda.get_device_name() if a.device.startswith("cuda") else ""
    peak = next((v for k, v in PEAK.items() if k in card), None)
    print("training                  ms/step       (min-max)    tok/s  / arm  peak MB", end="")
    print("  of peak FLOP/s" if peak else "")
    for name, t in times.items():
        m, spread = median[name], f"({min(t) * 1e3:.0f}-{max(t) * 1e3:.0f})"
        speed = a.batch_size * a.seq_len / m
        print(
            f"{name:22}{m * 1e3:11.1f}{spread:>16}{speed:9,.0f}{m / median['arm']:7.2f}"
            f"{memory[name] / 2**20:9,.0f}",
            f"{speed * operations(name, a)[1] / peak:15.1%}" if peak else "",
        )


def recompute(model, x, groups):
    """A3.generate() without a cache: the whole forward pass again for every group."""
    x = x.clone()
    for group in range(int(groups.max()) + 1):
        p = model(x, groups)[groups == group].softmax(-1)  # (group, V)
        x[groups == group] = torch.multinomial(p, 1)[:, 0]
    return x


@torch.no_grad()
def sampling(a):
    z = torch.full((a.batch_size, a.seq_len), a.vocab_size, device=a.device)
    empty, everywhere = torch.zeros_like(z), torch.ones_like(z, dtype=torch.bool)
    model = {name: make(name, a)[0].eval() for name in MODELS}
    three = model["a3 random order"]
    arm = None
    print("sampling, tok/s (min-max) and ratio to the arm's, by tokens a call")
    for m in (1, 2, 4, 8, 16):
        groups = a3.random_groups(*z.shape, m, device=z.device)
        ways = {
            name: partial(model[name].sample, z, per_step=m)
            for name in ("arm", "mdm", "block 16", "lomdm")
            if m == 1 or name != "arm"
        }
        ways["a3 in groups, cached"] = partial(three.generate, empty, groups)
        ways["a3 in groups, recomputed"] = partial(recompute, three, empty, groups)
        ways["a3 by confidence"] = partial(three.generate_dynamic, empty, everywhere, m)
        for name, t in timed(ways, a, warm_up=1).items():
            arm = arm or statistics.median(t)
            speed = [z.numel() / seconds for seconds in (statistics.median(t), max(t), min(t))]
            spread = f"({speed[1]:,.0f}-{speed[2]:,.0f})"
            ratio = arm / statistics.median(t)
            print(f"{m:2} {name:27}{speed[0]:9,.0f}{spread:>18}{ratio:8.2f}")


def parse(argv):
    p = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default=sample.pick_device(None).type)
    p.add_argument("--preset", choices=tuple(PRESETS), help="small on CPU, base on CUDA")
    p.add_argument("--what", choices=("all", "train", "sample", "memory", "count"), default="all")
    p.add_argument("--models", default=",".join(MODELS), help="with commas between: %(default)s")
    for name in ("batch_size", "seq_len", "n_layer", "n_head", "n_embd"):
        p.add_argument(f"--{name}", type=int, help="otherwise the preset's")
    p.add_argument("--vocab_size", type=int, help="65, and 50257 for gpt2")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on CUDA")
    p.add_argument("--compile", action="store_true", help="for training")
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    return p.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    cuda = sample.pick_device(a.device).type == "cuda"
    a.preset = a.preset or ("base" if cuda else "small")
    a.dtype = a.dtype or ("bfloat16" if cuda else "float32")
    if a.vocab_size is None:
        a.vocab_size = 50257 if a.preset == "gpt2" else 65
    for name in ("batch_size", "seq_len", "n_layer", "n_head", "n_embd"):
        if getattr(a, name) is None:
            setattr(a, name, PRESETS[a.preset][name])
    if min(a.repeats, a.batch_size, a.threads) < 1:
        raise sample.UserError("--repeats, --batch_size and --threads must be at least 1")
    names = a.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise sample.UserError(f"--models: no {unknown[0]!r}; there are {', '.join(MODELS)}")
    try:
        lomdm.Config(a.vocab_size, a.seq_len, a.n_layer, a.n_head, a.n_embd)
    except ValueError as e:
        raise sample.UserError(str(e)) from None
    torch.set_num_threads(a.threads)
    print(
        f"{a.n_layer} layers, {a.n_embd} wide, {a.seq_len} context, {a.vocab_size} tokens, batch "
        f"{a.batch_size}, {a.dtype}, {a.device}, {a.threads} threads, torch {torch.__version__}; "
        f"medians of {a.repeats}"
    )
    if a.what in ("all", "train"):
        training(["arm", *(name for name in names if name != "arm")], a)
    if a.what in ("all", "sample"):
        sampling(a)
    if a.what == "memory":
        memories(names, a)
    if a.what == "count":
        count(names, a)


if __name__ == "__main__":
    sample.run(main)
