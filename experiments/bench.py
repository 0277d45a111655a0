"""
Time, memory and arithmetic of every model, beside the ARM's.

    python -m experiments.bench                               CPU: training and sampling, small
    python -m experiments.bench --preset base --batch_size 4  nanoGPT's size for tinyshakespeare
    python -m experiments.bench --device cuda --compile       the same on a GPU, with its defaults
    python -m experiments.bench --preset gpt2 --what count    operations, an estimate for one H100
    python -m experiments.bench --preset gpt2 --batch_size 2 --what memory    of two training steps

The models take turns, so a machine that slows down slows all of them; a figure is the median of
--repeats, (min-max) beside it. Tokens are those of the batch: LoMDM reads each of them in two
orders. Sampling writes batch_size texts from nothing.
"""

import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import a3
import train_char
from beyond.speculative import generate_speculative
from plumbing import cli
from plumbing.cli import UserError, flag, refuse

MODELS = {  # its name in train_char.py; more of its Config; A3's groups and their size
    "arm": ("arm", dict(), None),
    "mdm": ("mdm", dict(), None),
    "block 4": ("block", dict(block_len=4), None),
    "block 16": ("block", dict(block_len=16), None),
    "lomdm": ("lomdm", dict(), None),
    "lomdm in blocks of 16": ("lomdm", dict(block_len=16), None),
    "a3 left to right": ("a3", dict(), (a3.chunk_groups, 1)),
    "a3 random order": ("a3", dict(), (a3.random_groups, 1)),
    "a3 groups of 4": ("a3", dict(), (a3.random_groups, 4)),
    "loa3": ("loa3", dict(), None),
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, FLOP/s, by NVIDIA
SHARE = 0.4  # of the peak that a well-tuned training run reaches; an assumption


@dataclass
class Settings:
    """None: follows the preset or the device."""

    device: str | None = flag(None, "cpu, cuda or mps; default: the best")
    preset: str | None = flag(None, "size: small on CPU, base on CUDA", tuple(train_char.PRESETS))
    what: str = flag("all", "to measure", ("all", "train", "sample", "memory", "count"))
    models: str = flag(",".join(MODELS), "with commas between")
    batch_size: int | None = flag(None, "texts, otherwise the preset's", least=1, below=2**20)
    seq_len: int | None = flag(None, "otherwise the preset's", least=1, below=2**20)
    n_layer: int | None = flag(None, "otherwise the preset's", least=1, below=2**10)
    n_head: int | None = flag(None, "otherwise the preset's", least=1, below=2**10)
    n_embd: int | None = flag(None, "otherwise the preset's", least=1, below=2**16)
    per_step: int | None = flag(None, "sampling: tokens a call, otherwise 1, 2, 4, 8, 16", least=1)
    vocab_size: int | None = flag(None, "65, and 50257 for gpt2", least=1, below=2**24)
    dtype: str | None = flag(None, "bfloat16 on CUDA", ("float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the loss, to train")
    repeats: int = flag(9, "how often each is timed", least=1, below=2**20)
    threads: int = flag(torch.get_num_threads(), "of the CPU", least=1, below=2**10)


def make(name, s):
    """A model, and its loss as a function of x (B, L)."""
    kind, more, partition = MODELS[name]
    sizes = {size: getattr(s, size) for size in ("vocab_size", *train_char.SIZES)}
    torch.manual_seed(0)
    try:
        with torch.device(s.device):
            model = train_char.make_model(kind, sizes | train_char.MODELS[kind][2] | more)
    except ValueError as e:
        raise UserError(f"{name}: {e}; --models can leave it out") from None
    loss_of = torch.compile(model.loss, dynamic=False) if s.compile else model.loss

    def loss(x):
        inputs = ()
        if partition:
            groups_of, size = partition
            inputs = groups_of(*x.shape, size, device=x.device), size == 1
        with torch.autocast(x.device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            return loss_of(x, *inputs)[0]

    return model, loss


def make_step(name, s):
    """A function that makes one training step: forward, backward, AdamW."""
    model, loss = make(name, s)
    device = torch.device(s.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    x = torch.randint(s.vocab_size, (s.batch_size, s.seq_len), device=device)

    def step():
        loss(x).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- time ----------------------------------------------------------------------------------------
def timed(functions, s, warm_up):
    """{name: times in seconds, s.repeats of each}, taking turns."""
    times = {name: [] for name in functions}
    for repeat in range(s.repeats + warm_up):
        for name, f in functions.items():
            began = time.perf_counter()
            f()
            if torch.device(s.device).type != "cpu":
                torch.accelerator.synchronize()
            if repeat >= warm_up:
                times[name].append(time.perf_counter() - began)
    return times


def training(names, s):
    memory = memories(names, s)
    times = timed({name: make_step(name, s) for name in names}, s, warm_up=2)
    arm = statistics.median(times["arm"])
    card = torch.cuda.get_device_name(s.device) if s.device.startswith("cuda") else ""
    peak = next((flops for name, flops in PEAK.items() if name in card), None)
    print("training                  ms/step       (min-max)    tok/s  / arm  peak MB", end="")
    print("  of peak FLOP/s" if peak else "")
    for name, t in times.items():
        m, spread = statistics.median(t), f"({min(t) * 1e3:.0f}-{max(t) * 1e3:.0f})"
        speed = s.batch_size * s.seq_len / m
        print(
            f"{name:22}{m * 1e3:11.1f}{spread:>16}{speed:9,.0f}{m / arm:7.2f}"
            f"{memory[name] / 2**20:9,.0f}",
            f"{speed * operations(name, s)[1] / peak:15.1%}" if peak else "",
        )


def drafted(model, z, k):
    groups = a3.chunk_groups(*z.shape, device=z.device)
    return generate_speculative(model, z, groups, k)


@torch.no_grad()
def sampling(names, s):
    z = torch.full((s.batch_size, s.seq_len), s.vocab_size, device=s.device)  # all [MASK]
    blank = torch.zeros_like(z)  # tokens that A3 ignores
    used = [n for n in ("arm", "mdm", "block 16", "lomdm", "loa3", "a3 random order") if n in names]
    models = {name: make(name, s)[0].eval() for name in used}
    three, arm = models.pop("a3 random order", None), None
    print("sampling, tok/s (min-max) and ratio to the arm's, by tokens a call")
    for m in (s.per_step,) if s.per_step else (1, 2, 4, 8, 16):
        ways = {name: partial(model.sample, z, per_step=m) for name, model in models.items()}
        if m > 1 and arm:
            ways.pop("arm", None)  # it has no other order
        else:
            for name in {"arm", "block 16"} & models.keys():
                ways[f"{name} without cache"] = partial(models[name].sample, z, cache=False)
            for k in (2, 4) if three else ():
                ways[f"a3, {k} drafts"] = partial(drafted, three, z, k)
        if three:
            groups = a3.random_groups(*z.shape, m, device=z.device)
            ways["a3 in groups"] = partial(three.generate, blank, groups)
            ways["a3 by confidence"] = partial(three.sample, z, per_step=m, by="confidence")
        for name, t in timed(ways, s, warm_up=1).items():
            arm = arm or statistics.median(t)
            speed = [z.numel() / seconds for seconds in (statistics.median(t), max(t), min(t))]
            spread = f"({speed[1]:,.0f}-{speed[2]:,.0f})"
            ratio = arm / statistics.median(t)
            print(f"{m:2} {name:27}{speed[0]:9,.0f}{spread:>18}{ratio:8.2f}")


# ---- memory --------------------------------------------------------------------------------------
def resident():
    """The most memory this process has held, in bytes."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(name, s):
    """Bytes that two steps need in all. Runs in a process of its own: the peak never falls
    again."""
    torch.set_num_threads(s.threads)
    before = resident()
    step = make_step(name, s)
    step(), step()
    if s.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(s.device)
    return resident() - before


def memories(names, s):
    """{name: bytes}. Before anything else: a new process inherits its parent's peak."""
    memory = {}
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                memory[name] = pool.submit(peak_memory, name, s).result()
            except BrokenProcessPool:  # the system has ended it
                raise UserError(f"not enough memory for {name}") from None
        if s.what == "memory":
            print(f"{name:22}{memory[name] / 2**20:9,.0f} MB")
    return memory


# ---- arithmetic ----------------------------------------------------------------------------------
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


def operations(name, s):
    """Parameters; FLOP of forward and backward per token, matrix products and attention (all of it,
    also where it is causal), and per byte moved. Tensors are fake: nothing is computed."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {  # of shapes; torch has them for CUDA only
        cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FakeTensorMode():
        model, loss = make(name, replace(s, compile=False, device="cpu"))
        x = torch.randint(s.vocab_size, (s.batch_size, s.seq_len))
        flops = FlopCounterMode(display=False, custom_mapping=formulas)
        with flops, CountBytes() as moved:
            loss(x).backward()
    flop = flops.get_total_flops()
    return sum(p.numel() for p in model.parameters()), flop / x.numel(), flop / moved.total


def count(names, s):
    print("                      parameters  MFLOP/token  FLOP/byte   estimate for one H100, bf16")
    for name in names:
        n, flop, intensity = operations(name, s)
        speed = SHARE * PEAK["H100"] / flop
        print(
            f"{name:22}{n / 1e6:9.1f}M{flop / 1e6:13,.1f}{intensity:11.1f}   {speed:9,.0f} tok/s, "
            f"10B tokens {1e10 / speed / 3600:5.1f} h, 300B {3e11 / speed / 86400:5.1f} days"
        )
    print(f"The estimate is {SHARE:.0%} of {PEAK['H100'] / 1e12:.0f} TFLOP/s, nothing measured.")


# ---- start ---------------------------------------------------------------------------------------
def parse(argv):
    """Settings with everything filled in, and the names of the models."""
    s = Settings(**cli.parse(Settings, argv, __doc__, train_char.PRESETS))
    cli.check(s)
    device = cli.pick_device(s.device)
    cuda, s.device = device.type == "cuda", str(device)
    s.preset = s.preset or ("base" if cuda else "small")
    known = dict(train_char.PRESETS[s.preset], dtype="bfloat16" if cuda else "float32")
    known |= dict(vocab_size=50257 if s.preset == "gpt2" else 65, per_step=None)
    for name, value in vars(s).items():
        setattr(s, name, known[name] if value is None else value)
    names = s.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    refuse(unknown, f"--models: no {', '.join(unknown)}; there are {', '.join(MODELS)}")
    few = s.batch_size < 2 and "loa3" in names and s.what != "sample"
    refuse(few, "loa3 compares texts: --batch_size 2 at least, or --models without it")
    return s, names


def main(argv=None):
    s, names = parse(argv)
    beside = ["arm", *(name for name in names if name != "arm")]  # to which times are compared
    for name in beside:  # does it fit these sizes? On this device it takes no memory
        make(name, replace(s, device="meta", compile=False))
    torch.set_num_threads(s.threads)
    print(
        f"{s.n_layer} layers, {s.n_embd} wide, {s.seq_len} context, {s.vocab_size} tokens, batch "
        f"{s.batch_size}, {s.dtype}, {s.device}, {s.threads} threads, torch {torch.__version__}; "
        f"medians of {s.repeats}"
    )
    if s.what in ("all", "train"):
        training(beside, s)
    if s.what in ("all", "sample"):
        sampling(beside, s)
    if s.what == "memory":
        memories(names, s)
    if s.what == "count":
        count(names, s)


if __name__ == "__main__":
    cli.run(main)
