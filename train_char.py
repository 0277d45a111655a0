"""
Train a character model on tinyshakespeare, or on any text, and watch it learn an order.

    python train_char.py                                 LoMDM, at a size that fits the device
    python train_char.py --model arm --out_dir out_arm   or mdm, or block: the same loss
    python train_char.py --model a3 --init_from out_arm  adapt that ARM to any order
    python train_char.py --resume                        go on after Ctrl-C, as if nothing happened

Settings left out follow the device (PRESETS). --help lists them all.
"""

import contextlib
import hashlib
import http.client
import json
import math
import os
import shlex
import signal
import sys
import time
import urllib.request
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import a3
import lomdm
import sample
from sample import FORMAT, Parser, UserError

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE = Path(__file__).parent / "data" / "tinyshakespeare" / "input.txt"
PYTHON_DOCS = "python-docs"  # a text that comes with every Python, for machines without network

MODELS = ("arm", "mdm", "block", "lomdm", "a3")

SMALL = dict(  # nanoGPT's laptop size
    n_layer=4, n_head=4, n_embd=128, seq_len=64, dropout=0.0, batch_size=16, max_iters=800,
    eval_interval=200, dtype="float32", compile=False,
)  # fmt: skip
LARGE = dict(  # nanoGPT's size for tinyshakespeare on one GPU
    n_layer=6, n_head=6, n_embd=384, seq_len=256, dropout=0.2, batch_size=64, max_iters=5000,
    eval_interval=250, dtype="bfloat16", compile=True,
)  # fmt: skip
PRESETS = {"cpu": SMALL, "mps": SMALL, "cuda": LARGE}


def flag(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Settings:
    """All that a run depends on; every field is a flag. None: follows the device or other flags."""

    model: str = flag("lomdm", "what to train", MODELS)
    data: str = flag("shakespeare", "shakespeare, python-docs, or the path of a UTF-8 text file")
    out_dir: str = flag("out", "ckpt.pt (best), last.pt (for --resume) and log.jsonl go here")
    resume: bool = flag(False, "go on with the run in out_dir")
    device: str | None = flag(None, "cpu, cuda or mps; by default the best there is")
    seed: int = flag(1337, "of weights, batches and orders")
    # model
    seq_len: int | None = flag(None, "characters in a window")
    n_layer: int | None = flag(None, "blocks")
    n_head: int | None = flag(None, "attention heads")
    n_embd: int | None = flag(None, "width")
    dropout: float | None = flag(None, "0 on CPU, 0.2 on CUDA")
    block_len: int | None = flag(None, "block: characters in a block (16); lomdm: one block")
    c1: float = flag(0.7, "lomdm: w = c1 + c2 (sigmoid - mean sigmoid)")
    c2: float = flag(0.65, "lomdm: 0 keeps the order uniform")
    weights: str = flag("normsig", "lomdm: as above, or w = exp(g - mean g)", ("normsig", "exp"))
    group_size: int = flag(1, "a3: of the random partitions in stage 3")
    shares: str = flag("0.2,0.3,0.5", "a3: of the steps in stages 1, 2, 3")
    init_from: str | None = flag(None, "a3: out_dir of an ARM to start from")
    # optimisation
    batch_size: int | None = flag(None, "windows a step; lomdm draws two orders for each")
    max_iters: int | None = flag(None, "steps")
    learning_rate: float = flag(1e-3, "the highest; linear warm-up, then a cosine")
    min_lr: float | None = flag(None, "the lowest, by default a tenth of the highest")
    warmup_iters: int | None = flag(None, "steps of warm-up, by default 100 or a tenth of all")
    lr_decay_iters: int | None = flag(None, "end of cosine and curriculum [max_iters]")
    weight_decay: float = flag(0.1, "")
    beta1: float = flag(0.9, "")
    beta2: float = flag(0.99, "")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    # running
    eval_interval: int | None = flag(None, "steps between validations and checkpoints")
    eval_draws: int = flag(1, "orders drawn for each validation window")
    log_interval: int = flag(10, "steps between lines in log.jsonl")
    dtype: str | None = flag(None, "of the forward pass", ("float32", "bfloat16"))
    compile: bool | None = flag(None, "torch.compile the loss")
    num_samples: int = flag(2, "samples printed at the end")


MAY_CHANGE = {  # on --resume; the rest is what makes it the same run
    "resume", "device", "out_dir", "data", "max_iters", "learning_rate", "min_lr", "lr_decay_iters",
    "grad_clip", "eval_interval", "eval_draws", "log_interval", "dtype", "compile", "num_samples",
}  # fmt: skip


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


def settle(s, device):
    """Fill in what follows the device and other flags, and refuse what cannot be."""
    for name, value in PRESETS[device.type].items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    if s.lr_decay_iters is None:
        s.lr_decay_iters = s.max_iters
    if s.warmup_iters is None:
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
    for least, names in (
        (1e-12, ("learning_rate", "grad_clip")),
        (
            1,
            (
                "batch_size",
                "max_iters",
                "lr_decay_iters",
                "eval_interval",
                "eval_draws",
                "log_interval",
            ),
        ),
        (0, ("warmup_iters", "weight_decay", "num_samples", "min_lr", "seed")),
    ):
        for name in names:
            if not getattr(s, name) >= least:  # NaN is caught as well
                raise UserError(f"--{name} must be at least {least}")
    if not (0 <= s.beta1 < 1 and 0 <= s.beta2 < 1 and s.seed < 2**63):
        raise UserError("--beta1 and --beta2 must be in [0, 1), and --seed below 2^63")


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


# ---- data ----------------------------------------------------------------------------------------


def write_file(path, write):
    """Call write(temporary path), then rename: path is the old file or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError):
            raise UserError(f"cannot write {path}: {e.strerror}") from None
        if isinstance(e, RuntimeError):  # how torch.save reports it
            raise UserError(f"cannot write {path}: is the disk full?") from None
        raise


def shakespeare():
    """The bytes of tinyshakespeare, downloaded once; None without network."""
    if not SHAKESPEARE.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=15) as response:
                raw = response.read()
        except (OSError, http.client.HTTPException) as e:  # no network, or the connection broke off
            print(f"no tinyshakespeare ({e}); training on Python's own documentation instead")
            return None
        if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
            raise UserError(f"the download of {SHAKESPEARE_URL} has a wrong checksum; try again")
        write_file(SHAKESPEARE, lambda path: path.write_bytes(raw))
    raw = SHAKESPEARE.read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"{SHAKESPEARE} has a wrong checksum: delete it to download it again, "
            f"or pass --data {SHAKESPEARE} to train on it as it is"
        )
    return raw


def load_text(s):
    """The text that --data names. Sets s.data to what was taken in the end."""
    if s.data == "shakespeare":
        raw = shakespeare()
        if raw is not None:
            return raw.decode()
        s.data = PYTHON_DOCS
    if s.data == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        text = Path(s.data).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"--data {s.data}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--data {s.data} is not UTF-8 text: see byte {e.start}") from None
    if not text:
        raise UserError(f"--data {s.data} is empty")
    return text


def encode(text, s):
    """vocab, a list of characters; train and val, (N,) long: the first 90% and the rest."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    vocab, ids = np.unique(codes, return_inverse=True)
    ids = torch.from_numpy(ids.astype(np.int64))
    n = int(0.9 * len(ids))
    if min(n, len(ids) - n) < s.seq_len:
        raise UserError(
            f"--data {s.data} has {len(ids)} characters; a window of {s.seq_len} needs "
            f"at least {10 * s.seq_len}: take a longer text or a smaller --seq_len"
        )
    return [chr(c) for c in vocab], ids[:n], ids[n:]


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
    """Mean and standard error, nats per character, over all of val in consecutive windows.

    Every call draws the same orders, so one checkpoint has one number. The last window is what is
    left over. The standard error is that of a ratio, sum of nats over sum of characters: it
    covers the choice of windows and of orders, not that of the training seed.
    """
    generator = torch.Generator(device).manual_seed(1)
    L = s.seq_len
    n = len(val) // L
    batches = list(val[: n * L].view(n, L).split(max(1, 2**14 // L)))  # 16k characters a pass
    if n * L < len(val):
        batches.append(val[None, n * L :])
    nats, length = [], []
    for x in batches:
        with autocast(s, device):
            nats.append(nats_of(x.to(device), generator).double().cpu())
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


class Run:
    """One training run: what is in a checkpoint, and how it goes on."""

    def __init__(self, s, device):
        self.s, self.device = s, device
        self.out = Path(s.out_dir)
        text = load_text(s)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.vocab, self.train, self.val = encode(text, s)
        torch.manual_seed(s.seed)
        self.model = make_model(s, len(self.vocab)).to(device)
        self.loss_of = self.model.loss
        if s.compile:
            self.loss_of = torch.compile(self.model.loss, dynamic=False)
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
        self.windows = torch.Generator().manual_seed(s.seed)  # which windows make up the batches
        self.step, self.best, self.seconds = 0, math.inf, 0.0
        self.saved_at = None  # the step in last.pt

    def batch(self):
        """Random windows of the training text: (batch_size, seq_len)."""
        start = torch.randint(
            len(self.train) - self.s.seq_len + 1, (self.s.batch_size, 1), generator=self.windows
        )
        x = self.train[start + torch.arange(self.s.seq_len)]
        return x.to(self.device)

    def loss(self):
        """The loss of the next batch, and what to log of it: "nelbo" is exact for an ARM and A3."""
        x = self.batch()
        if self.s.model != "a3":
            return self.loss_of(x)
        loss = self.loss_of(x, self.curriculum(self.step, *x.shape, device=self.device))
        return loss, {"nelbo": loss.detach()}

    def state(self):
        rng = {"cpu": torch.get_rng_state(), "windows": self.windows.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return dict(
            format=FORMAT, model_name=self.s.model, config=asdict(self.model.config),
            vocab=self.vocab, settings=asdict(self.s), data_sha256=self.sha256,
            step=self.step, best=self.best, seconds=self.seconds, rng=rng,
            model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
        )  # fmt: skip

    def restore(self, ckpt):
        if ckpt["data_sha256"] != self.sha256:
            raise UserError(f"--data {self.s.data} is not the text that this run began with")
        self.model.load_state_dict(ckpt["model"])
        self.optimizer.load_state_dict(ckpt["optimizer"])
        self.step, self.best, self.seconds = ckpt["step"], ckpt["best"], ckpt["seconds"]
        self.saved_at = self.step
        torch.set_rng_state(ckpt["rng"]["cpu"].cpu())
        self.windows.set_state(ckpt["rng"]["windows"].cpu())
        if self.device.type == "cuda" and "cuda" in ckpt["rng"]:
            torch.cuda.set_rng_state(ckpt["rng"]["cuda"].cpu(), self.device)

    def save(self, best=False):
        """last.pt, and ckpt.pt if this is the best so far."""
        for name in ("ckpt.pt", "last.pt") if best else ("last.pt",):
            write_file(self.out / name, lambda path: torch.save(self.state(), path))
        self.saved_at = self.step

    def log(self, **values):
        try:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(dict(step=self.step, **values)) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {self.out / 'log.jsonl'}: {e.strerror}") from None

    def validate(self):
        """Print and log the validation figures, and save what they call for."""
        self.model.eval()
        found = {
            kind: evaluate(nats_of, self.val, self.s, self.device)
            for kind, nats_of in figures(self.model, self.s).items()
        }
        self.model.train()
        val, _ = next(iter(found.values()))
        if not math.isfinite(val):
            raise UserError(self.nan_message(self.step))
        better, self.best = val < self.best, min(val, self.best)
        self.save(better)
        for kind, (val, error) in found.items():
            self.log(val=val, val_error=error, kind=kind, seconds=self.seconds)
            tqdm.write(f"step {self.step}: val {val:.4f} ± {error:.4f} nats/char ({kind})")

    def go(self):
        """Train up to max_iters; Ctrl-C stops between two steps, with everything saved."""
        s, stop = self.s, []
        old = signal.signal(signal.SIGINT, lambda *_: stop.append(1) if not stop else sys.exit(1))
        if self.step >= s.max_iters:  # stopped before, or nothing left to do
            print(f"already at step {self.step}; a larger --max_iters goes on")
            self.validate()
        bar = tqdm(total=s.max_iters, initial=self.step, unit="step", dynamic_ncols=True)
        pending, began = [], time.perf_counter()  # the losses since the last log line
        self.model.train()
        while self.step < s.max_iters:
            lr = learning_rate(self.step, s)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with autocast(s, self.device):
                loss, metrics = self.loss()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            # kept on the device: reading a number makes the CPU wait for the GPU
            pending.append(torch.stack((norm.detach(), *metrics.values())))
            self.step += 1
            bar.update()

            due = self.step % s.eval_interval == 0 or self.step == s.max_iters
            if due or stop or self.step % s.log_interval == 0:
                numbers = torch.stack(pending).double().cpu()  # (steps, 1 + metrics)
                if not numbers.isfinite().all():
                    first = int((~numbers.isfinite()).any(1).nonzero()[0])
                    raise UserError(self.nan_message(self.step - len(numbers) + 1 + first))
                took = time.perf_counter() - began
                self.seconds += took
                speed = len(pending) * s.batch_size * s.seq_len / took
                mean = dict(zip(("grad_norm", *metrics), numbers.mean(0).tolist(), strict=True))
                bar.set_postfix_str(f"loss {mean['nelbo']:.4f}, {speed:,.0f} tok/s")
                self.log(**mean, lr=lr, tokens_per_second=speed, seconds=self.seconds)
                pending = []
            if due:
                self.validate()
            if stop:
                self.save()
                bar.close()
                raise UserError(
                    f"stopped at step {self.step}, all saved; go on with: "
                    f"python train_char.py --resume --out_dir {shlex.quote(s.out_dir)}"
                )
            if not pending:
                began = time.perf_counter()
        bar.close()
        signal.signal(signal.SIGINT, old)

    def nan_message(self, step):
        what = f"the loss or its gradient is not finite at step {step}; last good checkpoint: "
        if not self.saved_at:
            return what + "none yet; try a lower --learning_rate or --grad_clip"
        last = f"{self.out / 'last.pt'} (step {self.saved_at})"
        return what + f"{last}; --resume with a lower --learning_rate or --grad_clip"


def load_arm(s, device):
    """The ARM's checkpoint that --init_from names. Sizes not given as flags become the ARM's."""
    ckpt, _ = sample.load_checkpoint(Path(s.init_from) / "ckpt.pt", device)
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
    arm = load_arm(s, device) if s.init_from is not None and s.model == "a3" else None
    settle(s, device)
    run = Run(s, device)
    if run.out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError("--out_dir must be a folder of its own, not the one you are in")
    if arm:
        if arm["vocab"] != run.vocab:
            raise UserError(f"the ARM in {s.init_from} has another vocabulary than --data {s.data}")
        try:
            print(run.model.load_arm(arm["model"]))
        except ValueError as e:
            raise UserError(f"--init_from {s.init_from}: {e}") from None
    if any((run.out / name).exists() for name in ("ckpt.pt", "last.pt", "log.jsonl")):
        n = next(n for n in range(1, 10**6) if not Path(f"{run.out}.{n}").exists())
        try:
            os.rename(run.out, f"{run.out}.{n}")
        except OSError as e:
            raise UserError(
                f"cannot move the earlier run in {run.out} aside: {e.strerror}"
            ) from None
        print(f"{run.out} held an earlier run; it is now {run.out}.{n}")
    header = dict(settings=asdict(s), data_sha256=run.sha256, torch=torch.__version__)
    write_file(run.out / "log.jsonl", lambda path: path.write_text(json.dumps(header) + "\n"))
    return run


def resume(given):
    """The run in out_dir, as it was at its last checkpoint."""
    path = Path(given.get("out_dir", Settings.out_dir)) / "last.pt"
    ckpt, _ = sample.load_checkpoint(path, "cpu")
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
        s = Settings(**(saved | given))
        device = sample.pick_device(s.device)
        settle(s, device)
        run = Run(s, device)
        run.restore(ckpt)
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise UserError(f"{path} is incomplete, or from another version; train again") from None
    if s.max_iters > s.lr_decay_iters:
        print(f"the learning rate stays at {s.min_lr:g} after step {s.lr_decay_iters}")
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


def main(argv=None):
    given = parse(argv)
    run = resume(given) if given.get("resume") else begin(given)
    s, model = run.s, run.model
    n = sum(p.numel() for p in model.parameters())
    print(
        f"{s.model} on {s.data}: {n / 1e6:.2f}M parameters, {len(run.train):,} + {len(run.val):,} "
        f"characters, {len(run.vocab)} different, {run.device}, {s.dtype}"
    )
    run.go()
    best, model = sample.load_checkpoint(run.out / "ckpt.pt", run.device)
    print(
        f"{run.step} steps in {run.seconds:.0f} s; best val {best['best']:.4f} nats/char at step "
        f"{best['step']}, in {run.out / 'ckpt.pt'}"
    )
    if s.num_samples:
        z = torch.full((s.num_samples, s.seq_len), len(run.vocab))
        texts, revealed_at = sample.draw(model, z, run.vocab, s.seed, by="random")
        sample.show(texts, revealed_at, True, s.seq_len)


if __name__ == "__main__":
    sample.run(main)
