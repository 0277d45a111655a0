"""
Print samples from a checkpoint of train_char.py, and when each character was revealed.

    python sample.py                                     samples from out/ckpt.pt
    python sample.py --prompt "ROMEO:" --show order      continue a text, coloured by order
    python sample.py --infill "To be, ____ not to be"    fill the gaps, one token for each _
    python sample.py --length 2000                       longer than the window, which slides
    python sample.py --html out.html --svg out.svg       a page that plays it, and a still
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from a3 import RULES
from plumbing import checkpoint, cli, pictures
from plumbing.cli import flag, refuse
from plumbing.tokenizers import tokenizer_of
from train_char import make_model


@dataclass
class Settings:
    out_dir: str = flag("out", "where train_char.py wrote ckpt.pt")
    prompt: str | None = flag(None, "text to continue")
    infill: str | None = flag(None, r"text with gaps, each _ one token to fill in; \_ is a _")
    length: int | None = flag(None, "tokens in all, prompt included [the window]", least=1)
    num_samples: int = flag(3, "how many", least=1, below=2**20)
    temperature: float = flag(1.0, "0: always the likeliest", least=0)
    top_k: int | None = flag(None, "draw among the k likeliest tokens only", least=1)
    top_p: float | None = flag(None, "or among the fewest of this probability together", least=1e-9)
    per_step: int = flag(1, "tokens a call; more is faster but coarser", least=1)
    drafts: int = flag(
        1, "a3, loa3: tokens drafted a call, try 2 to 8; the distribution stays", least=1, below=65
    )
    by: str | None = flag(None, "which tokens come next [a3: left, others: order]", RULES)
    show: str = flag("text", "or its order", ("text", "order"))
    html: str | None = flag(None, "write a page that plays how the samples came about")
    svg: str | None = flag(None, "write a picture of the samples")
    seed: int = flag(1337, "of the draws", least=0, below=2**63)
    device: str | None = flag(None, "cpu, cuda or mps [the best there is]")


def template(prompt, infill, tokenizer, mask_id):
    """What is given, as a list of tokens, mask_id in its gaps."""
    parts = [prompt or ""]
    if infill is not None:
        parts = [part.replace("\0", "_") for part in infill.replace(r"\_", "\0").split("_")]
        refuse(len(parts) == 1, "--infill needs a gap: one _ for each token to fill in")
    ids = tokenizer.encode(parts[0]).tolist()
    for part in parts[1:]:
        ids += [mask_id, *tokenizer.encode(part).tolist()]
    return ids


def write(model, x, length, end, how):
    """x (N, n) with its gaps filled, and written on up to length: tokens (N, length), or fewer if
    all have come to their end, and the call that revealed each, -1 if given. Beyond its window the
    model reads the last half of one, in whole blocks, and fills the other.

    A short text is followed by [MASK]s up to the end of its block, as a diffusion model has only
    seen whole ones. They get filled too: it is drawn as if the text went on in every possible way.
    An ARM and an A3 have blocks of one: what is not asked for is not there."""
    L, K = model.config.seq_len, getattr(model.config, "block_len", 1)
    keep, n = L // 2 // K * K or L // 2, x.shape[1]
    at, done, calls = torch.full_like(x, -1), False, 0
    while not done:
        begin = 0 if n < L or n == length else n - keep
        wanted = min(L, length - begin)
        z = x.new_full((len(x), -(-wanted // K) * K), model.mask_id)  # whole blocks
        z[:, : n - begin] = x[:, begin:n]
        y, when = (t[:, :wanted] for t in model.sample(z, **how))
        x = torch.cat((x[:, :begin], y), dim=1)
        at = torch.nn.functional.pad(at, (0, x.shape[1] - n), value=-1)
        at[:, begin:] = torch.where(when < 0, at[:, begin:], when + calls)
        n, calls = x.shape[1], calls + int(when.max()) + 1
        done = n >= length or (end is not None and (x == end).any(1).all())
    return x, at


def main(argv=None):
    s = Settings(**cli.parse(Settings, argv, __doc__))
    cli.check(s)
    refuse(s.prompt and s.infill, "--prompt or --infill: one of the two")
    refuse(s.top_p and s.top_p > 1, "--top_p must be at most 1")
    twice = s.html and s.svg and Path(s.html).resolve() == Path(s.svg).resolve()
    for what, path in (("html", s.html), ("svg", s.svg)):
        taken = path and (Path(path).name in checkpoint.RUN_FILES or twice)
        refuse(taken, f"--{what} {path}: take another name, this one is a run's or there twice")
    device = cli.pick_device(s.device)
    ckpt, model = checkpoint.load(Path(s.out_dir) / "ckpt.pt", make_model, device)
    tokenizer, name, L = tokenizer_of(**ckpt["tokenizer"]), ckpt["model_name"], model.config.seq_len
    ids = template(s.prompt, s.infill, tokenizer, model.mask_id)
    n, gaps = len(ids), s.infill is not None
    refuse(gaps and n > L, f"the text has {n} tokens, the model's window {L}")
    refuse(gaps and s.length, "--length is for what follows a prompt, not for --infill")
    refuse(
        not gaps and not s.length and n >= L, f"the prompt fills the window: --length above {n}?"
    )
    refuse(s.length and s.length <= n, f"--length {s.length}: the prompt has {n} tokens already")
    length = n if gaps else s.length or L
    refuse(s.drafts > 1 and name not in ("a3", "loa3"), f"--drafts is for a3 and loa3, not {name}")
    K = getattr(model.config, "block_len", s.per_step)
    refuse(s.per_step > K, f"--per_step: {name} fills in a block of {K} at most in one call")
    how = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, per_step=s.per_step)
    how |= dict(by=s.by) if s.by else {}
    how |= dict(drafts=s.drafts) if s.drafts > 1 else {}
    generator = torch.Generator(device).manual_seed(s.seed)
    x = torch.tensor([ids] * s.num_samples, dtype=torch.long, device=device)  # (N, n)
    if n >= L and not gaps:
        print(f"the model's window has {L} tokens: it reads the end of the prompt only")
    with cli.one_line(ValueError):
        x, at = write(model.eval(), x, length, tokenizer.end, how | dict(generator=generator))
    samples = []
    for row, when in zip(x.tolist(), at.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token == tokenizer.end and i >= n]
        stop = ends[0] if ends else len(row)
        samples.append((tokenizer.pieces(row[:stop]), when[:stop]))
    pictures.show(samples, s.show == "order")
    if s.html:
        best = f"validation {ckpt['best']:.3f} nats per token after {ckpt['step']:,} steps"
        pictures.write(s.html, pictures.page(samples, f"Written by {name}, {best}."))
    if s.svg:
        pictures.write(s.svg, pictures.svg(samples))


if __name__ == "__main__":
    cli.run(main)
