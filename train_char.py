"""
Train a model on tinyshakespeare, OpenWebText or any text, and watch it learn an order.

    python train_char.py                                 LoMDM, at a size that fits the device
    python train_char.py --model arm --out_dir out_arm   or mdm, or block: the same loss
    python train_char.py --model a3 --init_from out_arm  adapt that ARM to any order
    python train_char.py --model loa3                    any order; which way is best?
    python train_char.py --resume                        go on after Ctrl-C, as if nothing happened
    python train_char.py --preset gpt2 --data openwebtext
    torchrun --standalone --nproc_per_node=8 train_char.py --preset gpt2 --data openwebtext

Settings left out follow the preset, and the preset the device. All that is random in a step follows
from the seed, the step and the micro-batch: a run that was killed goes on exactly as it would have,
and N processes do what one does with the same --gradient_accumulation_steps.
"""

import copy
import importlib
import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import a3
from plumbing import checkpoint, cli, data, llama, pictures, processes
from plumbing.cli import flag, refuse
from plumbing.processes import RANK, WORLD

SMALL = dict(  # nanoGPT's laptop size
    n_layer=4, n_head=4, n_embd=128, seq_len=64, dropout=0.0, batch_size=16, max_iters=800,
    gradient_accumulation_steps=1, learning_rate=1e-3, beta2=0.99, warmup_iters=100,
    eval_interval=200,
)  # fmt: skip
PRESETS = {
    "small": SMALL,
    "base": SMALL | dict(  # nanoGPT's size for tinyshakespeare on one GPU
        n_layer=6, n_head=6, n_embd=384, seq_len=256, dropout=0.2, batch_size=64, max_iters=5000,
        eval_interval=250,
    ),
    "gpt2": SMALL | dict(  # GPT-2 small: 16 * 32 * 1,024 tokens a step, 10 billion in all
        n_layer=12, n_head=12, n_embd=768, seq_len=1024, max_iters=20000, eval_interval=1000,
        gradient_accumulation_steps=32, learning_rate=6e-4, beta2=0.95, warmup_iters=700,
    ),
}  # fmt: skip


# ---- models --------------------------------------------------------------------------------------
def train_groups(s, step, x):
    """Groups for A3, and whether all have one token."""
    stage, size = a3.curriculum(step, s.lr_decay_iters, s.shares, s.group_size)
    groups = (a3.random_groups if stage == 3 else a3.chunk_groups)(*x.shape, size, device=x.device)
    return dict(groups=groups, single=size == 1)


SIZES = "seq_len", "n_layer", "n_head", "n_embd"
WITH_ORDER, ORDER_FLAGS = "lomdm lomdm-by-time", ("block_len", "weights", "c1", "c2")
BOUND = dict(bound={})  # figures to validate by: {kind: arguments of nelbo()}
EXACT = {"exact, random order": dict(size=1), "exact, left to right": dict(size=0)}
FOURS = {"exact, random groups of 4": dict(size=4)}
MODELS = {  # class; Config fields: fixed, from flags; figures, of which the first picks ckpt.pt
    "arm": ("lomdm.LoMDM", dict(block_len=1), (), dict(exact={})),
    "mdm": ("lomdm.LoMDM", dict(), (), BOUND),
    "block": ("lomdm.LoMDM", dict(), ("block_len",), BOUND),
    "lomdm": ("lomdm.LoMDM", dict(learn_order=True), ORDER_FLAGS, BOUND),
    "a3": ("a3.A3", dict(), ("left_neighbour",), EXACT | FOURS),
    "loa3": ("a3.A3", dict(learn_order=True), ("left_neighbour", "random_share"), BOUND | EXACT),
    "mdm-by-time": ("experiments.by_time.ByTime", dict(), (), BOUND),  # the papers' estimator
    "lomdm-by-time": ("experiments.by_time.ByTime", dict(learn_order=True), ORDER_FLAGS, BOUND),
}  # fmt: skip
INPUTS = {"a3": train_groups}  # what the loss takes besides x, if anything


def make_model(name, config):
    module, cls = MODELS[name][0].rsplit(".", 1)
    module = importlib.import_module(module)
    return getattr(module, cls)(module.Config(**config))


# ---- settings ------------------------------------------------------------------------------------
@dataclass
class Settings:
    # All that a run depends on; every field is a flag. None: follows the device or other flags.
    model: str = flag("lomdm", "what to train", tuple(MODELS))
    preset: str | None = flag(None, "size: small on CPU and MPS, base on CUDA", tuple(PRESETS))
    data: str = flag("shakespeare", "a name, see plumbing/data.py; a file, a folder", resume=True)
    text_len: int | None = flag(None, "tokens of a text, if it is a list of such texts", least=1)
    val_data: str | None = flag(None, "to validate on; default: the last tenth", resume=True)
    tokenizer: str | None = flag(None, "char, gpt2 [openwebtext], a folder with tokenizer.json")
    data_dir: str | None = flag(None, "where tokens are kept [data beside this]", resume=True)
    out_dir: str = flag("out", "for ckpt.pt (best), last.pt (to go on), log.jsonl", resume=True)
    resume: bool = flag(False, "go on with the run in out_dir", resume=True)
    device: str | None = flag(None, "cpu, cuda or mps; default: the best", resume=True)
    seed: int = flag(1337, "of weights, batches and orders", least=0, below=2**63)
    # model
    seq_len: int | None = flag(None, "tokens in a window")
    n_layer: int | None = flag(None, "blocks")
    n_head: int | None = flag(None, "attention heads")
    n_embd: int | None = flag(None, "width")
    dropout: float | None = flag(None, "[0; preset base: 0.2; --init_from: the ARM's, or 0]")
    block_len: int | None = flag(None, "tokens [block: 16]", least=1, only="block " + WITH_ORDER)
    weights: str = flag("normsig", "or exp, far steeper", ("normsig", "exp"), only=WITH_ORDER)
    c1: float = flag(0.7, "w = c1 + c2 (sigmoid - mean sigmoid)", only=WITH_ORDER)
    c2: float = flag(0.65, "0 keeps the order uniform", only=WITH_ORDER)
    group_size: int = flag(1, "of the random partitions in stage 3", least=1, only="a3")
    shares: tuple = flag((0.2, 0.3, 0.5), "of the steps in stages 1, 2, 3", only="a3")
    init_from: str | None = flag(None, "out_dir of an ARM, or folder of a LLaMA", only="a3")
    left_neighbour: bool = flag(True, "False: the paper's queries, of one vector", only="a3 loa3")
    random_share: float = flag(0.0, "of texts read in random order", least=0, below=1, only="loa3")
    # optimisation
    batch_size: int | None = flag(None, "windows a micro-batch", least=1, below=2**20)
    gradient_accumulation_steps: int | None = flag(None, "micro-batches a step, of all", least=1)
    max_iters: int | None = flag(None, "steps", least=1, resume=True)
    learning_rate: float | None = flag(None, "the highest", least=1e-12, resume=True)
    min_lr: float | None = flag(None, "[a tenth]", least=0, resume=True, follows="learning_rate")
    warmup_iters: int | None = flag(None, "linear, to the highest [100, a tenth at most]", least=0)
    lr_decay_iters: int | None = flag(None, "end of cosine [max_iters]", least=1, resume=True)
    weight_decay: float = flag(0.1, "of matrices", least=0)
    beta1: float = flag(0.9, "", least=0, below=1)
    beta2: float | None = flag(None, "", least=0, below=1)
    grad_clip: float = flag(1.0, "largest norm of the gradient", least=1e-12, resume=True)
    ema: float = flag(0.0, "decay of averaged weights, to validate and sample", least=0, below=1)
    eval_interval: int | None = flag(None, "steps between validations", least=1, resume=True)
    eval_windows: int = flag(2000, "to validate on, evenly spread", least=1)
    eval_draws: int = flag(1, "orders for each of them", least=1)
    log_interval: int = flag(10, "steps between lines in log.jsonl", least=1, resume=True)
    dtype: str | None = flag(None, "", ("float32", "bfloat16"), resume=True, follows="device")
    compile: bool | None = flag(None, "torch.compile the loss", resume=True, follows="device")
    num_samples: int = flag(2, "samples printed at the end", least=0, resume=True)


def settle(s, device, like=None):
    """Fill in what follows the preset, a model or other flags, and refuse what cannot be."""
    s.text_len = data.TEXT_LEN.get(s.data) if s.text_len is None else s.text_len
    known = PRESETS[s.preset] | (dict(seq_len=s.text_len) if s.text_len else {})
    known |= {name: getattr(like.config, name) for name in SIZES if like}
    known["lr_decay_iters"] = steps = s.lr_decay_iters or s.max_iters or known["max_iters"]
    known["warmup_iters"] = min(known["warmup_iters"], max(0, steps // 10))
    known["min_lr"] = (s.learning_rate or known["learning_rate"]) / 10
    known["compile"] = cli.is_modern(device)
    known["dtype"] = "bfloat16" if known["compile"] else "float32"
    known["block_len"] = 16 if s.model == "block" else None
    for name, value in known.items():
        setattr(s, name, value if getattr(s, name) is None else getattr(s, name))
    cli.check(s)
    with cli.one_line(ValueError):
        a3.curriculum(0, s.lr_decay_iters, s.shares, s.group_size)
    wrong = [name for name in SIZES if like and getattr(s, name) != getattr(like.config, name)]
    refuse(wrong, f"--{[*wrong, ''][0]} is not that of {s.init_from}; leave it out")
    whole = s.model == "block" and not 1 < s.block_len < s.seq_len
    refuse(whole, f"--block_len: above 1 (--model arm), below {s.seq_len} (--model mdm)")
    refuse(s.weights == "exp" and (s.c1, s.c2) != (0.7, 0.65), "--c1, --c2: for --weights normsig")
    refuse(s.min_lr > s.learning_rate, "--min_lr must not exceed --learning_rate")
    refuse(s.warmup_iters > s.lr_decay_iters, f"--warmup_iters exceeds {s.lr_decay_iters} steps")
    refuse(s.seq_len % (s.text_len or 1), f"--seq_len must hold whole texts, of {s.text_len}")
    refuse(s.model == "loa3" and s.batch_size < 2, "loa3 compares texts: --batch_size 2 at least")
    uneven = f"{s.gradient_accumulation_steps} must be divisible by the {WORLD} processes"
    refuse(s.gradient_accumulation_steps % WORLD, f"--gradient_accumulation_steps {uneven}")
    if s.max_iters > s.lr_decay_iters:
        print(f"the learning rate stays at {s.min_lr:g} after step {s.lr_decay_iters}")


# ---- batches, learning rate, validation ----------------------------------------------------------
def windows(text, starts, L, device):
    """(len(starts), L). From pinned memory the CPU need not wait until a GPU has them."""
    x = torch.from_numpy(text[np.asarray(starts)[:, None] + np.arange(L)].astype(np.int64))
    cuda = torch.device(device).type == "cuda"
    return (x.pin_memory() if cuda else x).to(device, non_blocking=cuda)


def spread(n, L, most):
    """Where windows of L begin in n tokens: side by side, but evenly spread if more than most."""
    whole = n // L
    return np.arange(min(whole, most)) * whole // min(whole, most) * L


def get_batch(s, text, step, m, device):
    """Windows (batch_size, seq_len) for micro-batch m. Its seed also decides orders and dropout."""
    seed = np.random.SeedSequence((s.seed, step, m + 1)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed))  # m + 1: SeedSequence takes (7,) and (7, 0) for the same
    each = s.text_len or 1  # windows begin where texts begin
    starts = torch.randint((len(text) - s.seq_len) // each + 1, (s.batch_size,)) * each
    return windows(text, starts, s.seq_len, device)


def get_lr(step, s):
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    done = (step - s.warmup_iters) / max(1, s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + (s.learning_rate - s.min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2


@torch.no_grad()
def estimate_loss(model, val, s, device):
    """[(figure, mean, standard error)], nats per token, over windows of val. In float32, and with
    the same orders every time: one checkpoint has one number. The error is that of windows and
    orders, not of seeds."""
    found, starts = [], spread(len(val), s.seq_len, s.eval_windows)
    n, rows = len(starts), max(1, 2**14 // s.seq_len)  # 16k tokens a pass
    for figure, how in MODELS[s.model][3].items():
        generator, nats = torch.Generator(device).manual_seed(1), []
        for some in np.split(starts, range(rows, n, rows)):
            x = windows(val, some, s.seq_len, device)
            nats.append(model.nelbo(x, s.eval_draws, generator=generator, **how))
        per_token = torch.cat(nats).cpu().double() / s.seq_len  # (n,)
        error = per_token.std(correction=min(1, n - 1)) / math.sqrt(n)
        found.append((figure, per_token.mean().item(), error.item()))
    return found


# ---- training ------------------------------------------------------------------------------------
def train(s, device, corpus, model, ckpt, about):
    """Up to max_iters, from ckpt if there is one. Ctrl-C, SIGTERM and SIGHUP stop it between two
    steps, all saved. about: what else checkpoints hold. Returns steps and seconds in all."""
    out, named = Path(s.out_dir), dict(model.named_parameters())
    # The order of loa3 waits until the network has learned something: what is easy to learn first
    # is not what is best. No clipping, and a large eps: by itself Adam would blow up noise.
    choices = [named.pop(name) for name in list(named) if name.startswith("order.")]
    weights = list(named.values())
    matrices = dict(params=[p for p in weights if p.ndim > 1], weight_decay=s.weight_decay)
    groups = [matrices, dict(params=[p for p in weights if p.ndim < 2], weight_decay=0.0)]
    groups += [dict(params=choices, weight_decay=0.0, eps=0.3)] if choices else []
    optimizer = torch.optim.AdamW(groups, s.learning_rate, (s.beta1, s.beta2), fused=True)
    used = copy.deepcopy(model).requires_grad_(False) if s.ema else model  # to validate and sample
    step, best, seconds = 0, math.inf, 0.0
    if ckpt:
        step, best, seconds = ckpt["step"], ckpt["best"], ckpt["seconds"]
        optimizer.load_state_dict(ckpt["optimizer"])
        used.load_state_dict(ckpt["used"])
    saved_at = step
    if step >= s.max_iters:
        print(f"already at step {step}; a larger --max_iters goes on")
    loss_of = torch.compile(model.loss, dynamic=False) if s.compile else model.loss
    inputs, M = INPUTS.get(s.model, lambda *_: {}), s.gradient_accumulation_steps
    pending, began = [], time.perf_counter()  # the numbers since the last log line
    bar = tqdm(total=s.max_iters, initial=step, unit="step", dynamic_ncols=True, disable=RANK > 0)
    model.train()
    with processes.stop_signals() as stop, bar:
        while step < s.max_iters:
            lr, each = get_lr(step, s), []
            for m in range(RANK, M, WORLD):  # the micro-batches of this process
                x = get_batch(s, corpus.train, step, m, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
                    loss, metrics = loss_of(x, **inputs(s, step, x))
                (loss * WORLD / M).backward()
                each.append(torch.stack(list(metrics.values())))
            processes.average_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(weights, s.grad_clip)
            for i, group in enumerate(optimizer.param_groups):  # 2: loa3's order
                group["lr"] = lr if i < 2 or step >= s.lr_decay_iters // 3 else 0.0
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if s.ema:  # the average begins with the weights after the first step
                new, now = 1 - s.ema if step else 1.0, [p.data for p in model.parameters()]
                torch._foreach_lerp_(list(used.parameters()), now, new)
            # kept on the device: to read a number, the CPU would have to wait for the GPU
            pending.append(torch.cat((norm[None], torch.stack(each).mean(0))))
            step += 1
            bar.update()

            due = step % s.eval_interval == 0 or step == s.max_iters
            stopping = processes.any_of(stop, device)  # all stop at one step, so all wait
            if not (due or step % s.log_interval == 0 or stopping):
                continue
            numbers = processes.mean(torch.stack(pending)).cpu().double()  # (steps, numbers)
            took, n = time.perf_counter() - began, len(pending)
            cli.refuse_nan(numbers.sum(1).tolist(), step - n + 1, saved_at)
            speed, seconds = n * s.batch_size * M * s.seq_len / took, seconds + took
            mean = dict(zip(("grad_norm", *metrics), numbers.mean(0).tolist(), strict=True))
            bar.set_postfix_str(f"loss {mean['nelbo']:.4f}, {speed:,.0f} tok/s")
            mean |= dict(lr=lr, tokens_per_second=speed, seconds=seconds)
            checkpoint.log(out, step=step, **mean)
            val = math.inf
            if due and RANK == 0:  # one process validates, the others wait
                found = estimate_loss(used.eval(), corpus.val, s, device)
                model.train()
                val = found[0][1]
                cli.refuse_nan([val], step, saved_at)
                for figure, nats, error in found:
                    checkpoint.log(out, step=step, val=nats, val_error=error, kind=figure)
                    unit = f"{corpus.tokenizer.unit}, perplexity {math.exp(min(nats, 700)):.4g}"
                    tqdm.write(f"step {step}: val {nats:.4f} ± {error:.4f} {unit} ({figure})")
            if due or stopping:
                is_best, best, saved_at = val < best, min(val, best), step
                now = about | dict(step=step, best=best, seconds=seconds)
                if is_best:
                    checkpoint.save(out / "ckpt.pt", now | dict(model=used.state_dict()))
                now |= dict(optimizer=optimizer.state_dict(), used=used.state_dict())
                checkpoint.save(out / "last.pt", now | dict(model=model.state_dict()))
            if stopping:
                resume = f"python train_char.py --resume --out_dir {shlex.quote(s.out_dir)}"
                raise cli.Stopped(f"stopped at step {step}, all saved; go on with: {resume}", *stop)
            pending, began = [], time.perf_counter()
    return step, seconds


# ---- start ---------------------------------------------------------------------------------------
def pretrained(s):
    """The LLaMA or ARM that --init_from names as an A3, and the ARM's tokenizer."""
    folder, fields = Path(s.init_from), dict(left_neighbour=s.left_neighbour)
    with cli.one_line(ValueError, ImportError):
        if (folder / "config.json").is_file():
            other = s.tokenizer not in (None, s.init_from)
            refuse(other, f"--tokenizer is that of {s.init_from}; leave it out")
            s.tokenizer, s.dropout = s.init_from, s.dropout or 0.0
            L = s.seq_len or s.text_len or PRESETS[s.preset]["seq_len"]
            return llama.from_pretrained(folder, L, dropout=s.dropout, **fields), None
        refuse(not (folder / "ckpt.pt").is_file(), f"--init_from {folder}: no LLaMA, no ARM there")
        ckpt, arm = checkpoint.load(folder / "ckpt.pt", make_model)
        refuse(ckpt["model_name"] != "arm", f"--init_from {folder}: neither a LLaMA nor an ARM")
        s.dropout = arm.config.dropout if s.dropout is None else s.dropout
        sizes = {name: getattr(arm.config, name) for name in ("vocab_size", *SIZES)}
        model = a3.A3(a3.Config(**sizes, **fields, dropout=s.dropout))
        model.load_arm(ckpt["model"])
    return model, ckpt["tokenizer"]


def new_model(s, vocab_size):
    torch.manual_seed(s.seed)
    _, fixed, flags, _ = MODELS[s.model]
    config = {name: getattr(s, name) for name in (*SIZES, "dropout", *flags)} | fixed
    with cli.one_line(ValueError):
        return make_model(s.model, dict(vocab_size=vocab_size) | config)


def main(argv=None):
    given, ckpt, model = cli.parse(Settings, argv, __doc__, PRESETS), None, None
    held = wanted = None  # the lock of out_dir, the tokenizer that --init_from asks for
    out = Path(given.get("out_dir", Settings.out_dir))
    given |= processes.join(given.get("device"))
    s = Settings(**given)
    if s.resume:
        held = checkpoint.only_run(out)  # first, as a run that is just ending still saves
        ckpt, model = checkpoint.load(out / "last.pt", make_model)
        s = Settings(**checkpoint.resumable(ckpt["settings"], given, Settings))
    device = cli.pick_device(s.device)
    s.device, s.preset = str(device), s.preset or ("base" if device.type == "cuda" else "small")
    if s.init_from and not ckpt:
        cli.check(s)  # is it for this model?
        model, wanted = pretrained(s)
    settle(s, device, None if ckpt else model)
    held = held or checkpoint.only_run(out)  # a lock, as long as this process lives
    with processes.first_only():
        where = s.data, s.tokenizer, s.val_data, s.data_dir, s.text_len
        corpus = data.load(*where, s.out_dir, s.seq_len)
    s.data, tokenizer = corpus.name, corpus.tokenizer
    refuse(not processes.agree(corpus.sha256), "the processes have different texts; see --data")
    changed = ckpt and ckpt["data_sha256"] != corpus.sha256
    refuse(changed, f"--data {s.data} is not the text that this run began with")
    other = wanted and tokenizer.state != wanted
    refuse(other, f"{s.init_from} has another vocabulary than --data {s.data}")
    small = model and model.config.vocab_size < tokenizer.size
    refuse(small, f"{s.init_from} has fewer embeddings than its tokenizer has tokens")
    model = model or new_model(s, tokenizer.size)
    about = dict(model_name=s.model, config=asdict(model.config), settings=asdict(s))
    about |= dict(tokenizer=tokenizer.state, data_sha256=corpus.sha256)
    checkpoint.begin(out, ckpt, about)
    n = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
    print(f"{s.model} on {s.data}: {n}, {corpus}, {WORLD} x {device}, {s.dtype}")
    step, seconds = train(s, device, corpus, model.to(device), ckpt, about)
    processes.leave()
    if RANK:
        return
    best, model = checkpoint.load(out / "ckpt.pt", make_model, device)
    val = f"{best['best']:.4f} {tokenizer.unit} at step {best['step']}"
    print(f"{step} steps in {seconds:.0f} s; best val {val}, in {out / 'ckpt.pt'}")
    if s.num_samples:
        z = torch.full((s.num_samples, s.seq_len), model.mask_id, device=device)
        x, at = model.eval().sample(z, generator=torch.Generator(device).manual_seed(s.seed))
        pictures.show(pictures.pieces(tokenizer, x, at), order=True)


if __name__ == "__main__":
    cli.run(main)
