"""
Train a model on tinyshakespeare, OpenWebText or any text, and watch it learn an order.

    python train_char.py                                 LoMDM, at a size that fits the device
    python train_char.py --model arm --out_dir out_arm   or mdm, or block: the same loss
    python train_char.py --model a3 --init_from out_arm  adapt that ARM to any order
    python train_char.py --model loa3 --preset film      which way does this text run?
    python train_char.py --resume                        go on after Ctrl-C, as if nothing happened
    python train_char.py --preset gpt2 --data openwebtext
    torchrun --standalone --nproc_per_node=8 train_char.py --preset gpt2 --data openwebtext

Settings left out follow the preset, and the preset follows the device. last.pt is written at each
validation and on Ctrl-C. --resume goes on from it, and ends where the unbroken run would: on a CPU
bit for bit, as all that is random in a step follows from the seed, the step and the micro-batch. N
processes do what one does with the same --gradient_accumulation_steps, up to rounding.
"""

import inspect
import math
import os
import shlex
import time
import traceback
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import a3
import lomdm
from beyond import init_from, llama, loa3, planned
from plumbing import checkpoint, cli, data, pictures, processes
from plumbing.cli import flag, need
from plumbing.muon import Muon
from plumbing.processes import RANK, WORLD
from plumbing.tokenizers import TOKENIZERS

# ---- models ----------------------------------------------------------------------------------

# The first lines of this table are LoMDM's claim: one class and one objective, and fields of its
# Config make it an ARM, an MDM or a learned order. Each line is the name of a model, its class,
# its Config, and the fields that are fixed in this model. The others come from the flags of the
# same name or keep their default, and vocab_size comes from the tokenizer.
MODELS = {
    "arm": (lomdm.LoMDM, lomdm.Config, {"block_len": 1}),  # blocks of one, left to right: a GPT
    "mdm": (lomdm.LoMDM, lomdm.Config, {}),  # one block as long as the window, in any order
    "block": (lomdm.LoMDM, lomdm.Config, {}),  # --block_len is between the two, by default 16
    "lomdm": (lomdm.LoMDM, lomdm.Config, {"learn_order": True}),  # some orders are likelier
    "a3": (a3.A3, a3.Config, {}),  # groups on two streams
    "loa3": (loa3.LoA3, loa3.Config, {}),  # a learned order on two streams
    "planned": (planned.Planned, a3.Config, {}),  # one order on two streams, found by search
    "mdm-by-time": (lomdm.ByTime, lomdm.Config, {}),  # as the papers train it, with a clock
    "lomdm-by-time": (lomdm.ByTime, lomdm.Config, {"learn_order": True}),
    "llama": (llama.Llama, llama.Config, {}),  # what --model a3 becomes with --init_from a LLaMA
}
TO_TRAIN = tuple(name for name in MODELS if name != "llama")


def make_model(name, config):
    """The model called `name`, for a dict of its Config's fields."""
    cls, Config, _ = MODELS[name]
    return cls(Config(**config))


def figures_of(model):
    """What estimate_loss() measures of a model, and how: {name: arguments of model.nelbo()}.
    The name says whether the figure is exactly -log p of a model that writes in that order, or
    a bound on it. The mean of exact costs of random orders is also a bound on -log of their
    mixture. The first figure decides which checkpoint is the best."""
    exact = {
        "exact, random order": {"order": "random"},
        "exact, left to right": {"order": "left"},
    }
    if isinstance(model, (loa3.LoA3, planned.Planned)):
        return {"bound": {}} | exact
    if isinstance(model, a3.A3):
        return exact | {"exact, random groups of 4": {"order": "random", "size": 4}}
    return {"exact" if model.config.block_len == 1 else "bound": {}}


def code_of(name, adapted=False):
    """The files whose digest goes into the log, to tell whether a figure was made by today's
    code: those of the model's classes, this one, Muon's, and with --init_from what loads a model.
    (The run in that folder has a digest in its own log.)"""
    cls, _, _ = MODELS[name]
    classes = cls.__mro__[:-2]  # without nn.Module and object, whose files are not ours
    files = {inspect.getfile(c) for c in (*classes, Muon)} | {__file__}
    if adapted:
        files |= {init_from.__file__, llama.__file__}
    return files


# ---- settings --------------------------------------------------------------------------------

SMALL = {  # nanoGPT's laptop size; the presets below say only where they differ from this
    "data": "shakespeare",
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "seq_len": 64,
    "dropout": 0.0,
    "batch_size": 16,
    "max_iters": 600,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "beta2": 0.99,
    "warmup_iters": 100,
    "eval_interval": 300,
}
FILM = {  # films of a cellular automaton, last moment first; a window is as long as a film
    "dtype": "float32",  # in bfloat16 models end worse
    "data": "automaton",
    "n_layer": 3,
    "n_embd": 64,
    "batch_size": 64,
    "max_iters": 1000,
    "eval_interval": 250,
}
BASE = {  # nanoGPT's size for tinyshakespeare on one GPU
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "seq_len": 256,
    "dropout": 0.2,
    "batch_size": 64,
    "max_iters": 5000,
    "eval_interval": 250,
}
GPT2 = {  # GPT-2 small: 16 windows x 32 micro-batches x 1,024 tokens a step, 10 billion in all
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "seq_len": 1024,
    "gradient_accumulation_steps": 32,
    "learning_rate": 6e-4,
    "beta2": 0.95,
    "warmup_iters": 700,
    "max_iters": 20000,
    "eval_interval": 1000,
}
PRESETS = {"small": SMALL, "film": SMALL | FILM, "base": SMALL | BASE, "gpt2": SMALL | GPT2}
COMMAND = "python train_char.py" if WORLD == 1 else "the same torchrun command and"
DATA = f"{', '.join(data.SOURCES)}, a file or a folder [shakespeare]"

# The models that some flags are for.
HAVE_BLOCKS = "block lomdm lomdm-by-time"
LEARN_ORDER = "lomdm lomdm-by-time"
TWO_STREAMS = "a3 loa3 planned"
DRAW_A_STEP = "mdm block lomdm"  # an ARM's blocks have one step, and by-time draws a time


@dataclass
class Settings:
    # All that a run depends on. Every field is also a flag of the command line, made by
    # flag(default, help, choices). What is None follows the preset, the device or other flags,
    # and a help text that says [x] says what it then is.
    #     least, below   the range of a number
    #     only           the models that it is for
    #     resume         whether --resume may change it
    model: str = flag("lomdm", "what to train", TO_TRAIN)
    preset: str | None = flag(None, "small on CPU and MPS, base on CUDA", tuple(PRESETS))
    data: str | None = flag(None, DATA, resume=True)
    text_len: int | None = flag(None, "if the data is many texts of one length: this", least=1)
    val_data: str | None = flag(None, "[the last tenth, or the source's own]", resume=True)
    tokenizer: str | None = flag(None, "char, gpt2 or a folder [openwebtext: gpt2; else char]")
    data_dir: str | None = flag(None, "where tokens are kept [data beside this]", resume=True)
    out_dir: str = flag("out", "for ckpt.pt (best), last.pt (to go on), log.jsonl", resume=True)
    resume: bool = flag(False, "go on with the run in out_dir", resume=True)
    device: str | None = flag(None, "cpu, cuda or mps; default: the best", resume=True)
    seed: int = flag(1337, "of weights, batches and orders", least=0, below=2**63)
    # the model
    seq_len: int | None = flag(None, "tokens in a window")
    n_layer: int | None = flag(None, "blocks")
    n_head: int | None = flag(None, "attention heads")
    n_embd: int | None = flag(None, "width")
    local_heads: float | None = flag(None, "this share of heads [.5; a3, ..: .75]", least=0)
    dropout: float | None = flag(None, "[0; preset base: 0.2; --init_from: as it had, or 0]")
    block_len: int | None = flag(None, "[block: 16; else the window]", least=1, only=HAVE_BLOCKS)
    weights: str = flag("normsig", "or exp, far steeper", ("normsig", "exp"), only=LEARN_ORDER)
    c2: float = flag(0.65, "0: a uniform order", least=0, below=0.7, only=LEARN_ORDER)
    middle_steps: bool = flag(True, "train more on the middle of an order", only=DRAW_A_STEP)
    group_size: int = flag(1, "stage 3 draws sizes from 1 to this", least=1, only="a3")
    shares: tuple = flag((0.2, 0.3, 0.5), "of the steps in stages 1, 2, 3", only="a3")
    left_share: float = flag(0.0, "of stage 3, left to right", least=0, below=1, only="a3")
    init_from: str | None = flag(None, "out_dir of a run to go on with; a3: of an ARM, or a LLaMA")
    left_neighbour: bool = flag(True, "False: one vector for all queries", only=TWO_STREAMS)
    random_share: float = flag(0.0, "of texts in random order", least=0, below=1, only="loa3")
    # optimisation
    batch_size: int | None = flag(None, "windows a micro-batch", least=1, below=2**20)
    gradient_accumulation_steps: int | None = flag(None, "of all processes together", least=1)
    max_iters: int | None = flag(None, "steps, and the end of the cosine", least=1, resume=True)
    optimizer: str | None = flag(None, "of matrices [muon; a LLaMA: adamw]", ("muon", "adamw"))
    learning_rate: float | None = flag(None, "the highest", least=1e-12, resume=True)
    warmup_iters: int | None = flag(None, "[100; gpt2: 700; a tenth of the steps at most]", least=0)
    weight_decay: float = flag(0.1, "of matrices", least=0)
    beta2: float | None = flag(None, "of AdamW", least=0, below=1)
    eval_interval: int | None = flag(None, "steps between validations", least=1, resume=True)
    eval_windows: int = flag(2000, "to validate on, evenly spread", least=1)
    log_interval: int = flag(10, "steps between lines in log.jsonl", least=1, resume=True)
    dtype: str | None = flag(None, "[by the device]", ("float32", "bfloat16"), resume=True)
    compile: bool | None = flag(None, "torch.compile the loss [by the device]", resume=True)
    num_samples: int = flag(2, "samples printed at the end", least=0, resume=True)


def fill_in(s, device):
    """Fill in the rest of what follows the preset, the device or other flags. What a loaded model
    says (--init_from) has been set by then."""
    known = dict(PRESETS[s.preset])
    steps = s.max_iters or known["max_iters"]
    known["warmup_iters"] = min(known["warmup_iters"], steps // 10)
    known["compile"] = cli.is_modern(device)  # a GPU with bfloat16 and triton
    known.setdefault("dtype", "bfloat16" if known["compile"] else "float32")
    known["block_len"] = 16 if s.model == "block" else None
    known["optimizer"] = "muon"

    for name, value in known.items():
        if getattr(s, name) is None:
            setattr(s, name, value)


def refuse(s):
    """UserError for settings that cannot be. Each need() is told what must hold, and what to
    say if it does not."""
    cli.check(s)  # each on its own

    with cli.one_line(ValueError):  # curriculum() refuses wrong shares
        a3.curriculum(0, s.max_iters, s.shares, s.group_size)
    between = s.model != "block" or 1 < s.block_len < s.seq_len
    blocks = f"blocks of {s.block_len} in a window of {s.seq_len}: --block_len is"
    need(between, f"{blocks} above 1 (--model arm) and below the window (--model mdm)")
    need(s.weights == "normsig" or s.c2 == 0.65, "--c2 is for --weights normsig")
    see = "--max_iters" if s.resume else "--warmup_iters, --max_iters"
    long = f"a warmup of {s.warmup_iters} steps in {s.max_iters}: see {see}"
    need(s.warmup_iters <= s.max_iters, long)
    whole = f"a window of {s.seq_len} tokens must hold whole texts of {s.text_len}; see --seq_len"
    need(s.seq_len % (s.text_len or 1) == 0, whole)
    pairs = s.model != "loa3" or s.batch_size >= 2
    need(pairs, "loa3 compares texts: --batch_size 2 at least")
    M = s.gradient_accumulation_steps
    shared = f"{WORLD} processes share the micro-batches of a step, here {M}"
    fair = f"{shared}: --gradient_accumulation_steps must be a multiple of {WORLD}"
    need(M % WORLD == 0, fair)


# ---- batches, learning rate, validation ------------------------------------------------------


def windows(text, starts, L, device):
    """The windows of L tokens of `text` that begin at starts: (len(starts), L)."""
    x = text[np.asarray(starts)[:, None] + np.arange(L)].astype(np.int64)
    x = torch.from_numpy(x)

    # From pinned memory, the CPU need not wait until a GPU has them.
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def spread(n, L, most):
    """Where windows of L tokens begin in a text of n: all n // L of them side by side, or
    `most` of them, evenly spread."""
    whole = n // L
    count = min(whole, most)
    return np.arange(count) * whole // count * L


def next_document(text, start, L, mark):
    """Where the next document begins, if that is in reach and leaves room for a window."""
    near = text[start : min(start + 2**16, len(text) - L + 1)]
    found = np.flatnonzero(near == mark)
    return start + int(found[0]) if len(found) else start


def seed_all(s, step, m):
    """Seed all that is random in micro-batch m of a step: its windows, and the orders and the
    dropout that the loss draws."""
    entropy = (s.seed, step, m + 1)  # a 0 at the end would not count: (a, b, 0) seeds as (a, b)
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed))


def get_batch(s, text, device, mark=None):
    """Draw the windows (batch_size, seq_len) of a micro-batch.

    mark: the token with which documents begin, None if they have none. A sample begins with it,
    but few random windows do. So a quarter of the windows is moved on to the next mark. Then the
    model expects a mark too often at the first place. That costs a window which begins with
    something else at most -log(3/4) = 0.29 nats in all. (A document behind a long one is drawn
    more often. That does no harm if the length of a document says nothing about the next.)"""
    each = s.text_len or 1  # windows begin where texts begin
    starts = torch.randint((len(text) - s.seq_len) // each + 1, (s.batch_size,)) * each
    if mark is not None and not s.text_len:
        for i in torch.nonzero(torch.rand(s.batch_size) < 0.25)[:, 0].tolist():
            starts[i] = next_document(text, int(starts[i]), s.seq_len, mark)
    return windows(text, starts, s.seq_len, device)


def get_lr(step, s):
    """Linear warmup, then a cosine down to a tenth at max_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    cosine = (1 + math.cos(math.pi * min(1, done))) / 2  # from 1 to 0
    return s.learning_rate * (0.1 + 0.9 * cosine)


@torch.no_grad()
def estimate_loss(model, val, s, device):
    """[(figure, mean, standard error)] of figures_of(model), in nats per token, over windows
    of val. They are in float32, and with the same orders every time, so that one checkpoint
    has one number. The error is that of windows and orders, not of seeds. One window has
    none."""
    was_training = model.training
    model.eval()
    starts = spread(len(val), s.seq_len, s.eval_windows)
    n = len(starts)
    rows = max(1, 2**14 // s.seq_len)  # 16k tokens a pass

    found = []
    for figure, how in figures_of(model).items():
        generator = torch.Generator(device).manual_seed(1)
        nats = []
        for some in np.split(starts, range(rows, n, rows)):
            x = windows(val, some, s.seq_len, device)
            nats.append(model.nelbo(x, generator=generator, **how))
        per_token = torch.cat(nats).cpu().double() / s.seq_len  # (n,)
        error = (per_token.std() / math.sqrt(n)).item() if n > 1 else None
        found.append((figure, per_token.mean().item(), error))

    model.train(was_training)
    return found


# ---- training --------------------------------------------------------------------------------


def make_optimizers(model, s):
    """Muon for the matrices in model.blocks. AdamW for the rest: embeddings, output layer, vectors,
    LoMDM's block that reads w, and a model's own parameter_groups(). Matrices decay, vectors do
    not."""
    own = model.parameter_groups() if hasattr(model, "parameter_groups") else []
    apart = {id(p) for group in own for p in group["params"]}
    if s.optimizer == "muon":
        inner = [p for p in model.blocks.parameters() if p.ndim == 2]
        apart |= {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in apart]

    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": s.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        *own,
    ]
    adamw = torch.optim.AdamW(groups, s.learning_rate, (0.9, s.beta2), fused=True)
    if s.optimizer == "adamw":
        return [adamw]
    return [Muon(inner, s.learning_rate, s.weight_decay), adamw]


def loss_arguments(s, step, x, model=None):
    """What the loss is given besides x: for A3, groups by the stage of its curriculum, and
    whether all of them have one token. For a planned order, groups by what is planned so far."""
    if s.model == "planned":
        return {"groups": model.training_groups(len(x), step / s.max_iters)}
    if s.model != "a3":
        return {}

    # most: the size of groups in this step, and in stage 3 the largest.
    stage, most = a3.curriculum(step, s.max_iters, s.shares, s.group_size)
    if stage < 3:
        groups = a3.chunk_groups(*x.shape, most, x.device)
    else:  # each text has groups of a size of its own
        size = torch.randint(1, most + 1, (len(x), 1), device=x.device) if most > 1 else 1
        groups = a3.random_groups(*x.shape, size, device=x.device)
        if s.left_share:  # some of them go on as an ARM, so that this is not forgotten
            left = torch.rand(len(x), 1, device=x.device) < s.left_share
            groups = torch.where(left, a3.chunk_groups(*x.shape, 1, x.device), groups)
    return {"groups": groups, "single": most == 1}


def train_step(s, step, model, loss_of, optimizers, text, device, mark=None):
    """One step of training. Returns its metrics, {name: number on the device}. They stay
    there, because the CPU would have to wait for the GPU to read a number."""
    # A planned order is searched for between the steps of the network.
    if s.model == "planned":
        model.plan(step / s.max_iters, step)

    # The gradient of the mean loss over all M micro-batches. This process has every WORLD-th
    # of them. average_gradients() then divides the sum over processes by WORLD, so each loss
    # counts WORLD / M.
    M = s.gradient_accumulation_steps
    each = []
    for m in range(RANK, M, WORLD):
        seed_all(s, step, m)
        x = get_batch(s, text, device, mark)
        with torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            loss, metrics = loss_of(x, **loss_arguments(s, step, x, model))
        (loss * WORLD / M).backward()
        each.append(metrics)
    processes.average_gradients(model)

    # LoA3's order and the rules of a planned order have a group of parameters with starts_after: it
    # does not move before that share of the steps, and is never clipped. No other model has one.
    all_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    plain = [group for group in all_groups if "starts_after" not in group]
    norm = torch.nn.utils.clip_grad_norm_([p for g in plain for p in g["params"]], 1.0)
    for group in all_groups:
        started = step >= int(group.get("starts_after", 0) * s.max_iters)
        group["lr"] = get_lr(step, s) if started else 0.0
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    mean = {name: sum(metrics[name] for metrics in each) / len(each) for name in each[0]}
    return {"grad_norm": norm} | mean


def exchange(pending, stop):
    """The metrics of some steps, `pending`, a list of dicts: their mean over all processes, (steps,
    metrics), on the CPU. And whether any process was asked to stop. A GPU works behind the CPU's
    back, and this waits for it."""
    numbers = torch.stack([torch.stack(list(metrics.values())) for metrics in pending])
    return processes.mean_and_any(numbers, stop)


def report(s, step, mean, steps, took, seconds, bar):
    """Log and show the mean metrics of the last `steps` steps, which took `took` seconds. seconds:
    all training so far, without validating and saving."""
    speed = steps * s.batch_size * s.gradient_accumulation_steps * s.seq_len / took
    bar.set_postfix_str(f"loss {mean['nelbo']:.4f}, {speed:,.0f} tok/s")
    mean = mean | {"lr": get_lr(step - 1, s), "tokens_per_second": speed, "seconds": seconds}
    checkpoint.log(Path(s.out_dir), step=step, **mean)


def as_text(figure, nats, error, unit):
    """A figure of estimate_loss()."""
    noise = " of one window" if error is None else f" ± {error:.4f}"
    below = ", below 0 as few orders were drawn" if nats < 0 else ""
    perplexity = math.exp(min(nats, 700))
    return f"{nats:.4f}{noise} {unit}, perplexity {perplexity:.4g} ({figure}{below})"


def validate(s, step, model, corpus, device, saved_at):
    """Print and log the figures of a model, and return the first one. Of several processes only the
    first validates, saves and logs. The others get inf, go on, and wait in the next step."""
    if RANK:
        return math.inf
    found = estimate_loss(model, corpus.val, s, device)
    cli.refuse_nan([found[0][1]], step, saved_at)
    for figure, nats, error in found:
        checkpoint.log(Path(s.out_dir), step=step, val=nats, val_error=error, kind=figure)
        tqdm.write(f"step {step}: val {as_text(figure, nats, error, corpus.tokenizer.unit)}")
    return found[0][1]


def save(s, state, model, optimizers, is_best):
    """ckpt.pt, if this is the best model so far, and last.pt, which has the optimizers, too. state:
    what both hold besides the weights."""
    out = Path(s.out_dir)
    state = state | {"model": model.state_dict()}
    if is_best:
        checkpoint.save(out / "ckpt.pt", state)
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    checkpoint.save(out / "last.pt", state)


def restore(s, optimizers, ckpt):
    """The optimizers as they were in ckpt. Returns its step, the best figure and seconds."""
    for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    if ckpt["step"] >= s.max_iters:
        done = f"already at step {ckpt['step']}; a larger --max_iters goes on"
        need(Path(s.out_dir, "ckpt.pt").is_file(), f"{done}, as nothing was validated yet")
        print(done)
    return ckpt["step"], ckpt["best"], ckpt["seconds"]


def train(s, device, corpus, model, ckpt, about):
    """Up to max_iters, from ckpt if there is one. Ctrl-C and SIGTERM stop it between two steps,
    all saved. about: what else checkpoints hold. Returns steps and seconds in all."""
    optimizers = make_optimizers(model, s)
    step, best, seconds = restore(s, optimizers, ckpt) if ckpt else (0, math.inf, 0.0)
    saved_at = step

    loss_of = torch.compile(model.loss, dynamic=False) if s.compile else model.loss
    unit = {"unit": "step", "dynamic_ncols": True, "disable": True if RANK else None}
    bar = tqdm(total=s.max_iters, initial=step, **unit)
    model.train()
    text = corpus.train
    mark = corpus.tokenizer.end if corpus.separate else None  # with which documents begin
    pending, since = [], time.perf_counter()
    with processes.stop_signals() as stop, bar:
        while step < s.max_iters:
            # Learn.
            metrics = train_step(s, step, model, loss_of, optimizers, text, device, mark)
            pending.append(metrics)
            step += 1
            bar.update()

            # Most steps end here. Several processes hear of a signal when they report, as all
            # have to stop at one step.
            due = step % s.eval_interval == 0 or step == s.max_iters
            if not (due or step % s.log_interval == 0 or (stop and WORLD == 1)):
                continue

            # Report.
            numbers, stopping = exchange(pending, stop)
            cli.refuse_nan(numbers.sum(1).tolist(), step - len(pending) + 1, saved_at)
            mean = dict(zip(pending[0], numbers.mean(0).tolist(), strict=True))
            took = time.perf_counter() - since
            seconds += took
            report(s, step, mean, len(pending), took, seconds, bar)

            # From time to time validate and save.
            val = validate(s, step, model, corpus, device, saved_at) if due else math.inf
            if due or stopping:
                is_best = val < best
                best = min(val, best)
                state = about | {"step": step, "best": best, "seconds": seconds}
                save(s, state, model, optimizers, is_best)
                saved_at = step
            if stopping:
                # All wait until the first has saved, as torchrun ends all once one has ended. stop
                # is a list, and holds the signal that came.
                processes.leave()
                resume = f"--resume --out_dir {shlex.quote(s.out_dir)}"
                line = f"stopped at step {step}, all saved; go on with: {COMMAND} {resume}"
                raise cli.Stopped("" if RANK else line, *stop)
            pending, since = [], time.perf_counter()
    return step, seconds


# ---- start -----------------------------------------------------------------------------------


def find_paths(s, ckpt, given=()):
    """Paths in s may be relative to ckpt["cwd"], the folder where the run began. Where one is
    found from there and not from here, put the full path in its place."""
    for name in ("data", "val_data", "tokenizer", "data_dir"):
        path = getattr(s, name)
        if not path or name in given or path in {*data.SOURCES, *TOKENIZERS} or Path(path).exists():
            continue
        there = Path(ckpt.get("cwd", ""), path)
        if there.exists():
            setattr(s, name, str(there))


def new_model(s, vocab_size):
    """A model with random weights: the fields of its Config from MODELS, or flags of that
    name. A flag that nobody set leaves the field its default."""
    torch.manual_seed(s.seed)
    _, Config, fixed = MODELS[s.model]
    names = {f.name for f in fields(Config)} & {f.name for f in fields(Settings)}
    config = {name: getattr(s, name) for name in names if getattr(s, name) is not None}
    with cli.one_line(ValueError):
        return make_model(s.model, config | {"vocab_size": vocab_size} | fixed)


def go_on(given):
    """The run that --resume names: its settings, with what may be changed and is given, its
    checkpoint, its model, and the lock of its folder."""
    out = Path(given.get("out_dir", Settings.out_dir))
    # Before last.pt is read, as an ending run may be writing it. If there is no such folder, load()
    # says so.
    lock = checkpoint.only_run(out) if out.is_dir() else None
    ckpt, model = checkpoint.load(out / "last.pt", make_model)

    # On another kind of device, what follows it is filled in anew.
    saved = ckpt["settings"]
    before = saved["device"]
    now = given.get("device", before)
    if now.partition(":")[0] != before.partition(":")[0]:
        saved = saved | {"dtype": None, "compile": None}

    s = Settings(**checkpoint.resumable(saved, given, Settings))
    find_paths(s, ckpt, given)
    return s, ckpt, model, lock


def follow_device(s):
    """Fill in what has to be known before a model is loaded: the device, and what follows it, the
    preset, its text, and the window."""
    device = cli.pick_device(s.device)
    s.device = str(device)
    s.preset = s.preset or ("base" if device.type == "cuda" else "small")
    s.data = s.data or PRESETS[s.preset]["data"]
    if s.text_len is None:
        s.text_len = data.TEXT_LEN.get(s.data)
    if s.seq_len is None:
        s.seq_len = s.text_len or PRESETS[s.preset]["seq_len"]
    return device


def set_up(given):
    """The settings, the device, and what is there already: a checkpoint and its model if the run
    goes on, or a pretrained model. Also the tokenizer, as data.load() takes it, and the lock of
    the run's folder, held as long as this process lives."""
    if given.get("resume"):
        s, ckpt, model, lock = go_on(given)
        tokenizer = init_from.tokenizer_of_run(s, ckpt)
    else:
        s, ckpt, model, lock = Settings(**given), None, None, None
        tokenizer = s.tokenizer

    device = follow_device(s)
    if s.init_from and not ckpt:
        model, tokenizer = init_from.load(s, given, make_model)

    fill_in(s, device)
    refuse(s)
    lock = lock or checkpoint.only_run(Path(s.out_dir))
    return s, device, ckpt, model, tokenizer, lock


def main(argv=None):
    try:
        run(argv)
    except BaseException as e:
        # A notebook keeps tracebacks, and with them the lock of the run's folder and the model.
        # Only a defect keeps its frames, for a debugger.
        if not isinstance(e, Exception) or cli.explain(e) is not None:
            traceback.clear_frames(e.__traceback__)
        raise


def run(argv):
    given = cli.parse(Settings, argv, __doc__, PRESETS)
    given = given | processes.join(given.get("device"))

    # As long as _lock lives, no other run writes to the folder.
    s, device, ckpt, model, tokenizer, _lock = set_up(given)

    # The text.
    with processes.first_only():
        corpus = data.load(
            s.data, tokenizer, s.val_data, s.data_dir, s.text_len, but=s.out_dir, least=s.seq_len
        )
    s.data = corpus.name
    tokenizer = corpus.tokenizer
    same = not ckpt or ckpt["data_sha256"] == corpus.sha256
    need(same, f"--data {s.data} is not the text that this run began with")
    enough = model is None or model.config.vocab_size >= tokenizer.size
    need(enough, f"{s.init_from} has fewer embeddings than its tokenizer has tokens")

    # The model.
    model = model or new_model(s, tokenizer.size)
    about = {
        "model_name": "llama" if isinstance(model, llama.Llama) else s.model,
        "config": asdict(model.config),
        "settings": asdict(s),
        "tokenizer": tokenizer.state,
        "data_sha256": corpus.sha256,
        "separate": corpus.separate,
        "cwd": os.getcwd(),
        "code": checkpoint.code_digest(code_of(s.model, bool(s.init_from))),
    }
    checkpoint.begin(Path(s.out_dir), ckpt, about)
    n = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
    print(f"{s.model} on {s.data}: {n}, {corpus}, {WORLD} x {device.type}, {s.dtype}")

    # Train, then show what the best checkpoint writes.
    step, seconds = train(s, device, corpus, model.to(device), ckpt, about)
    processes.leave()
    if RANK:
        return
    path = Path(s.out_dir) / "ckpt.pt"
    best_ckpt, best_model = checkpoint.load(path, make_model, device)
    val = f"{best_ckpt['best']:.4f} {tokenizer.unit} at step {best_ckpt['step']}"
    print(f"{step} steps in {seconds:.0f} s; best val {val}, in {path}")
    if s.num_samples:
        show_samples(s, device, corpus, best_model.eval())


def show_samples(s, device, corpus, model):
    """Print texts that the model writes, and when it wrote each token."""
    z = torch.full((s.num_samples, s.seq_len), model.mask_id, device=device)
    if corpus.separate:  # a document begins behind the end of another
        z[:, 0] = corpus.tokenizer.end
    generator = torch.Generator(device).manual_seed(s.seed)
    x, revealed_at = model.sample(z, generator=generator)

    shown = slice(int(corpus.separate), None)
    samples = pictures.pieces(corpus.tokenizer, x[:, shown], revealed_at[:, shown])
    pictures.show(samples, order=True)


if __name__ == "__main__":
    cli.run(main)
