"""
Train a model on tinyshakespeare, OpenWebText or any text, and watch it learn an order.

    python train_char.py                                 LoMDM, at a size that fits the device
    python train_char.py --model arm --out_dir out_arm   or mdm, or block: the same loss
    python train_char.py --model a3 --init_from out_arm  adapt that ARM to any order
    python train_char.py --resume                        go on after Ctrl-C, as if nothing happened
    python train_char.py --preset gpt2 --data openwebtext
    torchrun --standalone --nproc_per_node=8 train_char.py --preset gpt2 --data openwebtext

Settings left out follow the preset, and the preset the device. --help lists them all.

All that is random in a step, which windows, orders and dropout, is a function of the seed, the step
and the number of the micro-batch. So a run that was killed goes on as if it had not been, and N
processes do together what one does alone with the same --gradient_accumulation_steps.
"""

import contextlib
import datetime
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import time
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import a3
import lomdm
import prepare
import sample
from sample import FORMAT, Parser, UserError, tokenizer_of, write_file

RANK, WORLD = 0, 1
if "LOCAL_RANK" in os.environ:  # started by torchrun
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

MODELS = ("arm", "mdm", "block", "lomdm", "a3")

PRESETS = {
    "small": dict(  # nanoGPT's laptop size
        n_layer=4, n_head=4, n_embd=128, seq_len=64, dropout=0.0, batch_size=16, max_iters=800,
        eval_interval=200, dtype="float32", compile=False,
    ),
    "base": dict(  # nanoGPT's size for tinyshakespeare on one GPU
        n_layer=6, n_head=6, n_embd=384, seq_len=256, dropout=0.2, batch_size=64, max_iters=5000,
        eval_interval=250, dtype="bfloat16", compile=True,
    ),
    "gpt2": dict(  # GPT-2 small: 16 * 32 * 1,024 tokens a step, 10 billion in all
        n_layer=12, n_head=12, n_embd=768, seq_len=1024, dropout=0.0, batch_size=16,
        max_iters=20000, gradient_accumulation_steps=32, learning_rate=6e-4, beta2=0.95,
        warmup_iters=700, eval_interval=1000, dtype="bfloat16", compile=True,
    ),
}  # fmt: skip
OTHERWISE = dict(learning_rate=1e-3, beta2=0.99, gradient_accumulation_steps=1)


def flag(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Settings:
    """All that a run depends on; every field is a flag. None: follows the device or other flags."""

    model: str = flag("lomdm", "what to train", MODELS)
    preset: str | None = flag(None, "size: small on CPU and MPS, base on CUDA", tuple(PRESETS))
    data: str = flag(
        "shakespeare", "or openwebtext, python-docs, a .txt, a .jsonl, or their folder"
    )
    val_data: str | None = flag(None, "text to validate on, by default the last tenth of --data")
    tokenizer: str | None = flag(None, "char [gpt2 for openwebtext]", ("char", "gpt2"))
    data_dir: str | None = flag(None, "where tokens are kept, by default data next to this file")
    out_dir: str = flag("out", "ckpt.pt (best), last.pt (for --resume) and log.jsonl go here")
    resume: bool = flag(False, "go on with the run in out_dir")
    device: str | None = flag(None, "cpu, cuda or mps; by default the best there is")
    seed: int = flag(1337, "of weights, batches and orders")
    # model
    seq_len: int | None = flag(None, "tokens in a window")
    n_layer: int | None = flag(None, "blocks")
    n_head: int | None = flag(None, "attention heads")
    n_embd: int | None = flag(None, "width")
    dropout: float | None = flag(None, "0 on CPU, 0.2 on CUDA")
    block_len: int | None = flag(None, "block: tokens in a block (16); lomdm: one block")
    c1: float = flag(0.7, "lomdm: w = c1 + c2 (sigmoid - mean sigmoid)")
    c2: float = flag(0.65, "lomdm: 0 keeps the order uniform")
    weights: str = flag("normsig", "lomdm: as above, or w = exp(g - mean g)", ("normsig", "exp"))
    group_size: int = flag(1, "a3: of the random partitions in stage 3")
    shares: str = flag("0.2,0.3,0.5", "a3: of the steps in stages 1, 2, 3")
    init_from: str | None = flag(None, "a3: out_dir of an ARM to start from")
    # optimisation
    batch_size: int | None = flag(None, "windows a micro-batch; lomdm draws two orders for each")
    gradient_accumulation_steps: int | None = flag(None, "micro-batches a step, of all GPUs [1]")
    max_iters: int | None = flag(None, "steps")
    learning_rate: float | None = flag(None, "the highest; linear warm-up, then a cosine [1e-3]")
    min_lr: float | None = flag(None, "the lowest, by default a tenth of the highest")
    warmup_iters: int | None = flag(None, "steps of warm-up, by default 100 or a tenth of all")
    lr_decay_iters: int | None = flag(None, "end of cosine and curriculum [max_iters]")
    weight_decay: float = flag(0.1, "")
    beta1: float = flag(0.9, "")
    beta2: float | None = flag(None, "[0.99]")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    ema: float = flag(0.0, "decay of averaged weights, 0.999 say, to validate and sample with")
    # running
    eval_interval: int | None = flag(None, "steps between validations and checkpoints")
    eval_windows: int = flag(2000, "validation windows, evenly spread, or all if there are fewer")
    eval_draws: int = flag(1, "orders drawn for each validation window")
    log_interval: int = flag(10, "steps between lines in log.jsonl")
    dtype: str | None = flag(None, "of the forward pass", ("float32", "bfloat16"))
    compile: bool | None = flag(None, "torch.compile the loss")
    num_samples: int = flag(2, "samples printed at the end")


MAY_CHANGE = {  # on --resume; the rest is what makes it the same run
    "resume", "device", "out_dir", "data", "data_dir", "val_data", "max_iters", "learning_rate",
    "min_lr", "lr_decay_iters", "grad_clip", "eval_interval", "eval_windows", "eval_draws",
    "log_interval", "dtype", "compile", "num_samples",
}  # fmt: skip
MEASURE = ("val_data", "eval_windows", "eval_draws")
FOR = {  # flags that mean nothing to the other models
    "block_len": ("block", "lomdm"), "c1": ("lomdm",), "c2": ("lomdm",), "weights": ("lomdm",),
    "group_size": ("a3",), "shares": ("a3",), "init_from": ("a3",),
}  # fmt: skip


def parse(argv):
    """The flags given, {name: value}: only those, so that --resume knows what was asked for."""
    p = Parser(
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=SUPPRESS,
    )
    for f in fields(Settings):
        kind = next(t for t in (bool, int, float, str) if t.__name__ in str(f.type))
        how = dict(type=kind, choices=f.metadata["choices"])
        if kind is bool:  # --compile, --compile=True, --compile=False
            how = dict(type=truth, nargs="?", const=True, metavar="BOOL")
        default = "" if f.default is None else f"[{f.default}]"
        p.add_argument(f"--{f.name}", help=f"{f.metadata['help']} {default}".strip(), **how)
    return vars(p.parse_args(argv))


def truth(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def is_modern(device):
    """Whether it computes in bfloat16, and torch.compile has what it needs (Windows does not)."""
    return (
        device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
        and importlib.util.find_spec("triton") is not None
    )


def settle(s, device):
    """Fill in what follows the preset and other flags, and refuse what cannot be."""
    s.preset = s.preset or ("base" if device.type == "cuda" else "small")
    for name, value in (OTHERWISE | PRESETS[s.preset]).items():
        if getattr(s, name) is None:
            if name in ("dtype", "compile") and not is_modern(device):
                value = PRESETS["small"][name]
            setattr(s, name, value)
    if s.lr_decay_iters is None:
        s.lr_decay_iters = s.max_iters
    if s.warmup_iters is None or s.warmup_iters > s.lr_decay_iters:
        s.warmup_iters = min(100, s.lr_decay_iters // 10)
    if s.min_lr is None:
        s.min_lr = s.learning_rate / 10
    for name, models in FOR.items():
        if s.model not in models and getattr(s, name) != getattr(Settings, name):
            raise UserError(f"--{name} is for --model {' or '.join(models)}, not {s.model}")
    if s.model == "block":
        s.block_len = 16 if s.block_len is None else s.block_len
        if not 1 < s.block_len < s.seq_len:
            raise UserError(
                f"--block_len must lie between 1, --model arm, and {s.seq_len}, --model mdm"
            )
    at_least = {
        1e-12: "learning_rate grad_clip",
        1: "batch_size gradient_accumulation_steps max_iters lr_decay_iters eval_interval "
        "eval_windows eval_draws log_interval",
        0: "warmup_iters weight_decay num_samples min_lr seed",
    }
    for least, names in at_least.items():
        for name in names.split():
            if not getattr(s, name) >= least:  # NaN is caught as well
                raise UserError(f"--{name} must be at least {least}")
    for name, value in asdict(s).items():
        if type(value) is int and name != "seed" and value >= 2**31:
            raise UserError(f"--{name} {value} is too large")
    if not all(0 <= x < 1 for x in (s.beta1, s.beta2, s.ema)) or s.seed >= 2**63:
        raise UserError("--beta1, --beta2 and --ema must be in [0, 1), and --seed below 2^63")
    if s.gradient_accumulation_steps % WORLD:
        raise UserError(
            f"--gradient_accumulation_steps {s.gradient_accumulation_steps} must be divisible by "
            f"the {WORLD} processes that share them"
        )


def make_model(s, vocab_size):
    """The one difference between the first four: arguments of the same class."""
    size = vocab_size, s.seq_len, s.n_layer, s.n_head, s.n_embd, s.dropout
    order = {
        "arm": dict(block_len=1),
        "mdm": dict(),
        "block": dict(block_len=s.block_len),
        "lomdm": dict(block_len=s.block_len, learn_order=True, c1=s.c1, c2=s.c2, weights=s.weights),
    }
    try:
        if s.model == "a3":
            return a3.A3(a3.Config(*size))
        return lomdm.LoMDM(lomdm.Config(*size, **order[s.model]))
    except ValueError as e:
        raise UserError(str(e)) from None


def make_curriculum(s):
    """Which groups A3 trains on, a function of the step."""
    try:
        shares = tuple(float(share) for share in s.shares.split(","))
        return a3.Curriculum(s.lr_decay_iters, shares, s.group_size)
    except ValueError as e:
        raise UserError(f"--shares {s.shares} --group_size {s.group_size}: {e}") from None


# ---- evaluation ----------------------------------------------------------------------------------


def figures(model, s):
    """What validation measures, {kind: f}, where f(x (B, L), generator) gives nats (B,). The first
    decides which checkpoint is the best."""

    def a3_figure(groups):
        def nats(x, generator):
            draws = [model.log_prob(x, groups(*x.shape, generator)) for _ in range(s.eval_draws)]
            return -sum(draws).sum(1) / s.eval_draws

        return nats

    def random(size):
        return lambda B, L, generator: a3.random_groups(B, L, size, generator, generator.device)

    if s.model == "a3":
        return {
            "exact, random order": a3_figure(random(1)),
            "exact, left to right": a3_figure(lambda B, L, g: a3.ar_groups(B, L, g.device)),
            "exact, random groups of 4": a3_figure(random(4)),
        }
    kind = "exact" if s.model == "arm" else "bound"
    return {kind: lambda x, generator: model.nelbo(x, s.eval_draws, generator=generator)}


@torch.no_grad()
def evaluate(nats_of, val, s, device):
    """Mean and standard error, nats per token, over consecutive windows of val: all of them, what
    is left over at the end included, or --eval_windows that are evenly spread.

    In float32, whatever training uses. Every call draws the same orders, so one checkpoint has one
    number. The standard error is that of a ratio, sum of nats over sum of tokens: it covers the
    choice of windows and of orders, not that of the training seed.
    """
    generator = torch.Generator(device).manual_seed(1)
    L, nats, length = s.seq_len, [], []
    whole = np.asarray(val[: len(val) // L * L]).reshape(-1, L)  # (windows, L)
    rows = max(1, 2**14 // L)  # 16k tokens a pass
    batches = np.split(whole, range(rows, len(whole), rows))
    if len(whole) > s.eval_windows:
        chosen = np.arange(s.eval_windows) * len(whole) // s.eval_windows
        batches = [whole[i] for i in np.split(chosen, range(rows, len(chosen), rows))]
    elif len(val) % L:
        batches.append(np.asarray(val[whole.size :])[None])
    for x in batches:
        x = torch.from_numpy(x.astype(np.int64)).to(device)
        nats.append(nats_of(x, generator).cpu().double())
        length.append(torch.full((len(x),), x.shape[1], dtype=torch.float64))
    nats, length = torch.cat(nats), torch.cat(length)  # (windows,) each
    mean = nats.sum() / length.sum()
    residual = nats - mean * length
    error = residual.square().sum().sqrt() * math.sqrt(len(nats) / max(1, len(nats) - 1))
    return mean.item(), (error / length.sum()).item()


def autocast(s, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16")


# ---- training ------------------------------------------------------------------------------------


def learning_rate(step, s):
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done = (step - s.warmup_iters) / max(1, s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + (s.learning_rate - s.min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2


class Objective(torch.nn.Module):
    """model.loss as a forward pass: what DistributedDataParallel wraps and torch.compile compiles,
    all of it, the gradient of the order included."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, *how):
        loss = self.model.loss(x, *how)  # "nelbo" is exact for an ARM and A3
        return loss if isinstance(loss, tuple) else (loss, {"nelbo": loss.detach()})


def seed_of(*numbers):
    """One seed from several."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Run:
    """One training run: what is in a checkpoint, and how it goes on."""

    def __init__(self, s, device):
        self.s, self.device = s, device
        self.out = Path(s.out_dir)
        self.corpus, s.data = prepare.load(s.data, s.tokenizer, s.val_data, s.data_dir)
        self.train, self.val = self.corpus.train, self.corpus.val
        if min(len(self.train), len(self.val)) < s.seq_len:
            raise UserError(
                f"--data {s.data} has {len(self.train)} + {len(self.val)} tokens to train and "
                f"validate on, too few for a window of {s.seq_len}: take a longer text or a "
                "smaller --seq_len"
            )
        self.tokenizer = tokenizer_of(self.corpus.vocab)
        torch.manual_seed(s.seed)
        self.model = make_model(s, self.tokenizer.size).to(device)
        self.ema = None
        if s.ema:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(s.ema))
        self.curriculum = make_curriculum(s) if s.model == "a3" else None
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            dict(params=matrices, weight_decay=s.weight_decay),
            dict(params=vectors, weight_decay=0.0),
        ]
        self.optimizer = torch.optim.AdamW(
            groups, s.learning_rate, betas=(s.beta1, s.beta2), fused=device.type != "mps"
        )
        self.step, self.best, self.seconds = 0, math.inf, 0.0
        self.saved_at = None  # the step in last.pt

    def batch(self, m):
        """Arguments of the loss for micro-batch m: windows of the text (batch_size, seq_len), and
        how many tokens to reveal in each, or A3's groups. What all micro-batches share, because
        windows and counts are spread over all of them, comes from one generator, the same on every
        rank; the rest from the global one, which is seeded here."""
        s, M = self.s, self.s.gradient_accumulation_steps
        shared = torch.Generator().manual_seed(seed_of(s.seed, self.step))
        n = len(self.train) - s.seq_len + 1
        start = torch.randint(n, (s.batch_size * M,), generator=shared)[m::M]
        x = np.stack([self.train[i : i + s.seq_len] for i in start.tolist()])  # (B, L)
        x = torch.from_numpy(x.astype(np.int64)).to(self.device)
        torch.manual_seed(seed_of(s.seed, self.step, m))
        if s.model == "a3":
            _, size = self.curriculum.stage(self.step)
            return x, self.curriculum(self.step, *x.shape, device=self.device), size == 1
        k = lomdm.spread_counts(*x.shape, self.model.config.block_len, shared, part=(m, M))
        return x, k.to(self.device)

    def backward(self, objective):
        """Gradients of the mean loss of all micro-batches; this process does every WORLD-th of
        them. Returns the means of the numbers to log."""
        M, numbers = self.s.gradient_accumulation_steps, []
        for m in range(RANK, M, WORLD):
            batch, more = self.batch(m), m + WORLD < M
            alone = objective.no_sync() if WORLD > 1 and more else contextlib.nullcontext()
            with alone:  # the last one's backward pass averages the gradients over all processes
                with autocast(self.s, self.device):
                    loss, metrics = objective(*batch)
                (loss * WORLD / M).backward()
            numbers.append(torch.stack(list(metrics.values())))
        return dict(zip(metrics, torch.stack(numbers).mean(0), strict=True))

    def state(self, to_resume):
        state = dict(
            format=FORMAT, model_name=self.s.model, config=asdict(self.model.config),
            vocab=self.corpus.vocab, settings=asdict(self.s), data_sha256=self.corpus.sha256,
            step=self.step, best=self.best, seconds=self.seconds,
        )  # fmt: skip
        if not to_resume:
            return state | dict(model=self.best_model().state_dict())
        return state | dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.state_dict() if self.s.ema else None,
        )

    def restore(self, ckpt):
        if ckpt["data_sha256"] != self.corpus.sha256:
            raise UserError(f"--data {self.s.data} is not the text that this run began with")
        self.model.load_state_dict(ckpt["model"])
        self.optimizer.load_state_dict(ckpt["optimizer"])
        if self.s.ema:
            self.ema.load_state_dict(ckpt["ema"])
        self.step, self.best, self.seconds = ckpt["step"], ckpt["best"], ckpt["seconds"]
        self.saved_at = self.step

    def best_model(self):
        """What to validate and to sample with."""
        return self.ema.module if self.s.ema else self.model

    def save(self, best=False):
        """last.pt to go on from, and ckpt.pt to use, if this is the best so far."""
        if RANK == 0:
            if best:
                write_file(self.out / "ckpt.pt", lambda path: torch.save(self.state(False), path))
            write_file(self.out / "last.pt", lambda path: torch.save(self.state(True), path))
        self.saved_at = self.step

    def log(self, **values):
        if RANK:
            return
        try:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(dict(step=self.step, **values)) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {self.out / 'log.jsonl'}: {e.strerror}") from None

    def validate(self):
        """Print and log the validation figures, and save what they call for. One process does it;
        the others wait for it in their next step."""
        if RANK:
            self.saved_at = self.step
            return
        model = self.best_model().eval()
        found = {
            kind: evaluate(nats_of, self.val, self.s, self.device)
            for kind, nats_of in figures(model, self.s).items()
        }
        model.train()
        val, _ = next(iter(found.values()))
        if not math.isfinite(val):
            raise UserError(self.nan_message(self.step))
        better, self.best = val < self.best, min(val, self.best)
        self.save(better)
        for kind, (val, error) in found.items():
            self.log(val=val, val_error=error, kind=kind, seconds=self.seconds)
            tqdm.write(f"step {self.step}: val {val:.4f} ± {error:.4f} {self.unit(val)} ({kind})")

    def unit(self, nats):
        if self.corpus.vocab != "gpt2":
            return "nats/char"
        return f"nats/token, perplexity {math.exp(nats):.2f}"

    def go(self):
        """Train up to max_iters. Ctrl-C, or SIGTERM, stops between two steps, all saved."""
        stop = []

        def on_signal(*_):
            if stop and WORLD == 1:  # torchrun passes one Ctrl-C on twice
                sys.exit(1)
            stop.append(1)

        old = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.loop(stop)
        finally:
            for n, handler in old.items():
                signal.signal(n, handler)

    def loop(self, stop):
        s = self.s
        objective = Objective(self.model)
        if s.compile:
            # one graph, also inside DistributedDataParallel: parts of one would draw other numbers
            torch._dynamo.config.optimize_ddp = False
            objective = torch.compile(objective, dynamic=False)
        if WORLD > 1:
            objective = DistributedDataParallel(objective)
        if self.step >= s.max_iters:  # stopped before, or nothing left to do
            print(f"already at step {self.step}; a larger --max_iters goes on")
            self.validate()
        bar = tqdm(
            total=s.max_iters, initial=self.step, unit="step", dynamic_ncols=True, disable=RANK > 0
        )
        pending, began = [], time.perf_counter()  # the losses since the last log line
        self.model.train()
        while self.step < s.max_iters:
            lr = learning_rate(self.step, s)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            metrics = self.backward(objective)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if s.ema:
                self.ema.update_parameters(self.model)
            # kept on the device: reading a number makes the CPU wait for the GPU
            pending.append(torch.stack((norm.detach(), *metrics.values())))
            self.step += 1
            bar.update()

            due = self.step % s.eval_interval == 0 or self.step == s.max_iters
            if due or (stop and WORLD == 1) or self.step % s.log_interval == 0:
                numbers = torch.stack(pending)  # (steps, 1 + metrics)
                numbers = torch.cat((numbers.flatten(), numbers.new_tensor([len(stop)])))
                if WORLD > 1:  # all processes must see the same numbers, and stop together
                    dist.all_reduce(numbers)
                    numbers /= WORLD
                *numbers, stopping = numbers.tolist()
                numbers = np.array(numbers).reshape(len(pending), -1)
                if not np.isfinite(numbers).all():
                    first = np.flatnonzero(~np.isfinite(numbers).all(1))[0]
                    raise UserError(self.nan_message(self.step - len(numbers) + 1 + first))
                took = time.perf_counter() - began
                self.seconds += took
                size = s.batch_size * s.gradient_accumulation_steps * s.seq_len
                speed = len(pending) * size / took
                mean = dict(zip(("grad_norm", *metrics), numbers.mean(0).tolist(), strict=True))
                bar.set_postfix_str(f"loss {mean['nelbo']:.4f}, {speed:,.0f} tok/s")
                self.log(**mean, lr=lr, tokens_per_second=speed, seconds=self.seconds)
                pending = []
                if due:
                    self.validate()
                if stopping:
                    self.save()
                    bar.close()
                    raise UserError(
                        f"stopped at step {self.step}, all saved; go on with: "
                        f"python train_char.py --resume --out_dir {shlex.quote(s.out_dir)}"
                    )
                began = time.perf_counter()
        bar.close()

    def nan_message(self, step):
        what = f"the loss or its gradient is not finite at step {step}; last good checkpoint: "
        if not self.saved_at:
            return what + "none yet; try a lower --learning_rate or --grad_clip"
        last = f"{self.out / 'last.pt'} (step {self.saved_at})"
        return what + f"{last}; --resume with a lower --learning_rate or --grad_clip"


def load_arm(s):
    """The ARM's checkpoint that --init_from names. Sizes not given as flags become the ARM's."""
    ckpt, _ = sample.load_checkpoint(Path(s.init_from) / "ckpt.pt", "cpu")
    if ckpt["model_name"] != "arm":  # an MDM's weights have the same names and shapes
        raise UserError(
            f"--init_from needs an ARM; {s.init_from} holds a model {ckpt['model_name']}"
        )
    for name in ("seq_len", "n_layer", "n_head", "n_embd"):
        if getattr(s, name) is None:
            setattr(s, name, ckpt["config"][name])
    return ckpt


def begin(given):
    """A new run. Files of an earlier one in out_dir are moved aside, not lost."""
    s = Settings(**given)
    device = sample.pick_device(s.device)
    s.device = str(device)
    arm = load_arm(s) if s.init_from is not None and s.model == "a3" else None
    settle(s, device)
    run = Run(s, device)
    if run.out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError("--out_dir must be a folder of its own, not the one you are in")
    if arm:
        if arm["vocab"] != run.corpus.vocab:
            raise UserError(f"the ARM in {s.init_from} has another vocabulary than --data {s.data}")
        try:
            print(run.model.load_arm(arm["model"]))
        except ValueError as e:
            raise UserError(f"--init_from {s.init_from}: {e}") from None
    if RANK == 0:
        set_aside(run.out)
        header = dict(settings=asdict(s), data_sha256=run.corpus.sha256, torch=torch.__version__)
        write_file(run.out / "log.jsonl", lambda path: path.write_text(json.dumps(header) + "\n"))
    return run


def set_aside(out):
    """Rename out if it holds a run: out.1, out.2, .."""
    if any((out / name).exists() for name in ("ckpt.pt", "last.pt", "log.jsonl")):
        n = next(n for n in range(1, 10**6) if not Path(f"{out}.{n}").exists())
        try:
            os.rename(out, f"{out}.{n}")
        except OSError as e:
            raise UserError(f"cannot move the earlier run in {out} aside: {e.strerror}") from None
        print(f"{out} held an earlier run; it is now {out}.{n}")


def resume(given):
    """The run in out_dir, as it was at its last checkpoint."""
    path = Path(given.get("out_dir", Settings.out_dir)) / "last.pt"
    ckpt, _ = sample.load_checkpoint(path, "cpu")
    broken = UserError(f"{path} is incomplete, or from another version; train again")
    try:
        saved = ckpt["settings"] | {"out_dir": str(path.parent)}  # it may have been moved
        for name, value in given.items():
            if name not in MAY_CHANGE and value != saved[name]:
                raise UserError(
                    f"--{name} {value} is not what the run in {path.parent} has ({saved[name]}); "
                    "leave it out, or start a new run without --resume"
                )
        if "learning_rate" in given:
            saved["min_lr"] = None  # a tenth of the new one
        if given.get("device", saved["device"]).split(":")[0] != saved["device"].split(":")[0]:
            saved["dtype"] = saved["compile"] = None  # as the new device has it
        s = Settings(**(saved | given))
    except (KeyError, TypeError, AttributeError):
        raise broken from None
    device = sample.pick_device(s.device)
    settle(s, device)
    run = Run(s, device)
    try:
        run.restore(ckpt)
    except (KeyError, TypeError, ValueError):
        raise broken from None
    if any(given.get(name, saved[name]) != ckpt["settings"][name] for name in MEASURE):
        run.best = math.inf  # figures of different measures do not compare
    if s.max_iters > s.lr_decay_iters:
        print(f"the learning rate stays at {s.min_lr:g} after step {s.lr_decay_iters}")
    if RANK:
        return run
    log = run.out / "log.jsonl"
    lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
    lines = [line + "\n" for line in lines if logged_by(line, run.step)]
    write_file(log, lambda path: path.write_text("".join(lines)))
    return run


def logged_by(line, step):
    """Whether a line of log.jsonl is older than the checkpoint; what is younger will come again."""
    try:
        return json.loads(line).get("step", 0) <= step
    except (ValueError, TypeError, AttributeError):  # cut off, or not ours
        return False


def join_processes(given):
    """Take a GPU for this process if there is one for each, and meet the others."""
    cuda = torch.cuda.is_available() and given.get("device") != "cpu"
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise UserError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes, but {torch.cuda.device_count()} GPUs here"
        )
    given["device"] = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(given["device"])
    dist.init_process_group(
        "nccl" if cuda and dist.is_nccl_available() else "gloo",
        timeout=datetime.timedelta(days=1),  # the others wait while one prepares or validates
        device_id=torch.device(given["device"]) if cuda else None,
    )


def main(argv=None):
    given = parse(argv)
    if WORLD > 1:
        join_processes(given)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        dist.barrier()  # the first one prepares the data, and says what is wrong with it
    run = resume(given) if given.get("resume") else begin(given)
    if WORLD > 1 and not RANK:
        dist.barrier()
    s, model = run.s, run.model
    n = sum(p.numel() for p in model.parameters())
    print(
        f"{s.model} on {s.data}: {n / 1e6:.2f}M parameters, {len(run.train):,} + {len(run.val):,} "
        f"tokens, {run.tokenizer.size:,} different, {WORLD} x {run.device}, {s.dtype}"
    )
    run.go()
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if RANK:
        return
    best, model = sample.load_checkpoint(run.out / "ckpt.pt", run.device)
    print(
        f"{run.step} steps in {run.seconds:.0f} s; best val {best['best']:.4f} "
        f"{run.unit(best['best'])} at step {best['step']}, in {run.out / 'ckpt.pt'}"
    )
    if s.num_samples:
        z = torch.full((s.num_samples, s.seq_len), run.tokenizer.size)
        sample.show(sample.draw(model, z, run.tokenizer, s.seed, s.seq_len, by="random"), True)


if __name__ == "__main__":
    sample.run(main)
