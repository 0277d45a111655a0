"""
Time, memory and arithmetic of a training step of every model, beside the ARM's.

    python -m experiments.bench                               on a CPU, small
    python -m experiments.bench --device cuda --compile       on a GPU, with its defaults
    python -m experiments.bench --preset gpt2 --what count    operations, an estimate for one H100

The models take turns, so a machine that slows down slows all of them. A figure is the median of
--repeats, (min-max) beside it. Tokens are those of the batch: LoMDM reads a third of its texts
twice. experiments/speed.py has the times of sampling.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import train_char
from plumbing import cli
from plumbing.cli import flag, need

MODELS = {  # its name in train_char.py, and more of its Config
    "arm": ("arm", {}),
    "mdm": ("mdm", {}),
    "block 4": ("block", {"block_len": 4}),
    "block 16": ("block", {"block_len": 16}),
    "lomdm": ("lomdm", {}),
    "lomdm in blocks of 16": ("lomdm", {"block_len": 16}),
    "a3": ("a3", {}),
    "loa3": ("loa3", {}),
}
SIZES = "seq_len", "n_layer", "n_head", "n_embd"
PEAK = 989e12  # FLOP/s of an H100 in dense bfloat16, by NVIDIA
SHARE = 0.4  # of the peak that a well-tuned training run reaches; an assumption


@dataclass
class Settings:
    """None: follows the preset or the device."""

    device: str | None = flag(None, "cpu, cuda or mps; default: the best")
    preset: str | None = flag(None, "size: small on CPU, base on CUDA", tuple(train_char.PRESETS))
    what: str = flag("train", "to measure", ("train", "count"))
    models: str = flag(",".join(MODELS), "with commas between")
    batch_size: int | None = flag(None, "texts, otherwise the preset's", least=2, below=2**20)
    dtype: str | None = flag(None, "bfloat16 on CUDA", ("float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the loss")
    repeats: int = flag(9, "how often each is timed", least=1, below=2**20)
    threads: int = flag(torch.get_num_threads(), "of the CPU", least=1, below=2**10)


def sizes_of(s):
    preset = train_char.PRESETS[s.preset]
    vocab_size = 50257 if s.preset == "gpt2" else 65
    return {"vocab_size": vocab_size} | {size: preset[size] for size in SIZES}


def make(name, s, device):
    """A model, and its loss as a function of texts."""
    kind, more = MODELS[name]
    _, _, fixed = train_char.MODELS[kind]
    torch.manual_seed(0)
    with torch.device(device):
        model = train_char.make_model(kind, sizes_of(s) | fixed | more)
    compiled = s.compile and s.what == "train"
    loss_of = torch.compile(model.loss, dynamic=False) if compiled else model.loss

    def loss(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            value, _ = loss_of(x)
        return value

    return model, loss


def texts(s, device):
    size = sizes_of(s)
    return torch.randint(size["vocab_size"], (s.batch_size, size["seq_len"]), device=device)


# ---- time ----------------------------------------------------------------------------------------
def make_step(name, s):
    """A function that makes one training step, as train_char.py makes it: forward, backward, Muon
    and AdamW. It returns the seconds that it took."""
    model, loss = make(name, s, s.device)
    how = train_char.Settings(optimizer="muon", learning_rate=1e-4, beta2=0.99)
    optimizers = train_char.make_optimizers(model, how)
    x = texts(s, s.device)

    def step():
        began = time.perf_counter()
        loss(x).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if torch.device(s.device).type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    return step


def memory(name, s):
    """Bytes that two training steps need on a GPU, in all. None on a CPU, which does not tell."""
    if torch.device(s.device).type != "cuda":
        return None
    before = torch.cuda.memory_allocated(s.device)
    torch.cuda.reset_peak_memory_stats(s.device)
    step = make_step(name, s)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated(s.device) - before


def train(names, s):
    needed = {name: memory(name, s) for name in names}
    steps = {name: make_step(name, s) for name in names}
    times = {name: [] for name in names}
    for repeat in range(s.repeats + 2):  # the first two warm up
        for name, step in steps.items():
            took = step()
            if repeat >= 2:
                times[name].append(took)

    print("training                  ms/step       (min-max)    tok/s  / arm  peak MB")
    arm = statistics.median(times["arm"])
    for name, t in times.items():
        m = statistics.median(t)
        spread = f"({min(t) * 1e3:.0f}-{max(t) * 1e3:.0f})"
        peak = f"{needed[name] / 2**20:9,.0f}" if needed[name] else ""
        speed = texts(s, "meta").numel() / m
        print(f"{name:22}{m * 1e3:11.1f}{spread:>16}{speed:9,.0f}{m / arm:7.2f}{peak}")


# ---- arithmetic ----------------------------------------------------------------------------------
def operations(name, s):
    """Parameters, and FLOP of forward and backward per token: matrix products and attention, all of
    it, also where it is causal. Tensors are fake: nothing is computed."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {  # of shapes; torch has them for CUDA only
        cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model, loss = make(name, s, "cpu")
        x = texts(s, "cpu")
        loss(x).backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / x.numel()


def count(names, s):
    print("                      parameters  MFLOP/token   estimate for one H100, bf16")
    for name in names:
        n, flop = operations(name, s)
        speed = SHARE * PEAK / flop
        print(
            f"{name:22}{n / 1e6:9.1f}M{flop / 1e6:13,.1f}   {speed:9,.0f} tok/s, "
            f"10B tokens {1e10 / speed / 3600:5.1f} h, 300B {3e11 / speed / 86400:5.1f} days"
        )
    print(f"The estimate is {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s, nothing measured.")


# ---- start ---------------------------------------------------------------------------------------
def parse(argv):
    """Settings with everything filled in, and the names of the models, the ARM first."""
    s = Settings(**cli.parse(Settings, argv, __doc__, train_char.PRESETS))
    cli.check(s)
    device = cli.pick_device(s.device)
    cuda = device.type == "cuda"
    s.device = str(device)
    s.preset = s.preset or ("base" if cuda else "small")

    s.batch_size = s.batch_size or train_char.PRESETS[s.preset]["batch_size"]
    s.dtype = s.dtype or ("bfloat16" if cuda else "float32")

    names = s.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    need(not unknown, f"--models: no {', '.join(unknown)}; there are {', '.join(MODELS)}")
    return s, ["arm", *(name for name in names if name != "arm")]


def main(argv=None):
    s, names = parse(argv)
    torch.set_num_threads(s.threads)
    size = ", ".join(f"{name} {value}" for name, value in sizes_of(s).items())
    print(f"{size}, batch_size {s.batch_size}, {s.dtype}, {s.device}, {s.threads} threads")
    {"train": train, "count": count}[s.what](names, s)


if __name__ == "__main__":
    cli.run(main)
