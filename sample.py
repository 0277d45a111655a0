"""
Print samples from a checkpoint of train_char.py, and when each character was revealed.

    python sample.py                                     samples from out/, or a model from ready/
    python sample.py --prompt "ROMEO:" --show order      continue a text, coloured by order
    python sample.py --infill "To be, ____ not to be"    fill the gaps, one token for each _
    python sample.py --length 2000                       longer than the window, which slides
    python sample.py --html out.html --svg out.svg       a page that plays it, and a still
"""

import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import a3
from beyond.speculative import generate_speculative
from plumbing import checkpoint, cli, pictures
from plumbing.cli import flag, need
from plumbing.data import documents_in, sound
from plumbing.tokenizers import tokenizer_of
from train_char import make_model

READY = Path(__file__).with_name("ready")  # weights that come with the code
RULES = "left", "order", "random", "confidence", "entropy", "margin"  # which tokens come next


@dataclass
class Settings:
    out_dir: str | None = flag(None, "where train_char.py wrote ckpt.pt [out, or ready/loa3]")
    prompt: str | None = flag(None, "text to continue")
    prompt_file: str | None = flag(None, "or a file that holds it; - is standard input")
    infill: str | None = flag(
        None,
        r"text with gaps, each _ one token; \_ is a _. Most tokens of gpt2 and of LLaMAs "
        r"bring their own space: is__. not is __.",
    )
    begin: bool | None = flag(None, "begin a document [if trained on separate documents]")
    length: int | None = flag(None, "tokens in all, prompt included [the window]", least=1)
    num_samples: int = flag(3, "how many", least=1, below=2**20)
    temperature: float = flag(1.0, "0: always the likeliest", least=0)
    top_k: int | None = flag(None, "draw among the k likeliest tokens only", least=1)
    top_p: float | None = flag(None, "or among the fewest of this probability", least=1e-9)
    per_step: int = flag(1, "tokens a call; more is faster but coarser", least=1)
    drafts: int = flag(1, "two streams: tokens drafted a call, try 2 to 8", least=1, below=65)
    by: str | None = flag(None, "which tokens come next [a3: left, others: order]", RULES)
    show: str = flag("text", "or its order", ("text", "order"))
    html: str | None = flag(None, "write a page that plays how the samples came about")
    svg: str | None = flag(None, "write a picture of the samples")
    seed: int = flag(1337, "of the draws", least=0, below=2**63)
    device: str | None = flag(None, "cpu, cuda or mps [the best there is]")


# ---- what is asked for -----------------------------------------------------------------------


def folder_of(s):
    """The folder of the model: --out_dir, or out. Before anything has been trained, that is the
    LoA3 which comes with the code."""
    ready = READY / "loa3"
    is_run = any(Path("out", name).exists() for name in checkpoint.RUN_FILES)
    if s.out_dir or is_run or not ready.exists():
        return Path(s.out_dir or "out")
    print(f"no model in out/ yet, so that of {ready} writes: see --out_dir", file=sys.stderr)
    return ready


def check_flags(s):
    """Refuse what can be refused before a model is loaded."""
    cli.check(s)
    texts = [text for text in (s.prompt, s.prompt_file, s.infill) if text is not None]
    need(len(texts) < 2, "--prompt, --prompt_file or --infill: one of them")
    one = s.infill is None or s.length is None
    need(one, "--length is for what follows a prompt, not for --infill")
    need(not s.top_p or s.top_p <= 1, "--top_p must be at most 1")

    paths = [Path(path).resolve() for path in (s.html, s.svg) if path]
    for path in paths:
        free = path.name not in checkpoint.RUN_FILES and paths.count(path) == 1
        need(free, f"{path.name}: --html and --svg take two names, and none of a run's files")


def check_model(s, model, name, n):
    """Refuse what does not fit the model, for a text of n tokens."""
    L = model.config.seq_len
    if s.infill is not None:
        need(n <= L, f"the text has {n} tokens, the model's window {L}")
    elif s.length is None:
        more = f"--length {n + L} writes {L} more"
        need(n < L, f"the prompt's {n} tokens fill the window of {L}: {more}")
    else:
        need(s.length > n, f"--length {s.length}: the prompt has {n} tokens already")

    is_a3 = isinstance(model, a3.A3)
    need(s.drafts == 1 or is_a3, f"--drafts is for models on two streams, such as a3, not {name}")
    alone = s.drafts == 1 or (s.per_step == 1 and s.by in (None, "left", "order"))
    need(alone, "--drafts: with --per_step 1, by left or order")
    has_order = hasattr(model, "draw_groups") or not is_a3
    need(s.by != "order" or has_order, f"--by order: {name} has not learned one")
    K = getattr(model.config, "block_len", s.per_step)  # an A3 has no blocks, and no limit
    need(s.per_step <= K, f"--per_step: {name} fills in a block of {K} at most in one call")


def read_prompt(path):
    """The text of --prompt_file."""
    if path == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        return sound(sys.stdin.read(), sys.stdin)
    need(Path(path).is_file(), f"--prompt_file {path}: no such file in {Path.cwd()}")
    return "".join(documents_in([Path(path)]))


def template(s, tokenizer, mask_id):
    """What is given, as a list of tokens, mask_id in its gaps."""
    parts = [s.prompt or ""]
    if s.prompt_file:
        parts = [read_prompt(s.prompt_file)]
    if s.infill is not None:
        parts = [part.replace(r"\_", "_") for part in re.split(r"(?<!\\)_", s.infill)]
        need(len(parts) > 1, "--infill needs a gap: one _ for each token to fill in")

    composed = unicodedata.is_normalized("NFC", "".join(parts))
    if not composed and tokenizer.kind != "char":  # which takes either
        line = "what is given is not composed (NFC), as most texts are: the model may not know it"
        print(line, file=sys.stderr)

    ids = tokenizer.encode(parts[0]).tolist()
    for part in parts[1:]:
        ids += [mask_id, *tokenizer.encode_inside(part).tolist()]
    return ids


# ---- drawing ---------------------------------------------------------------------------------


def fill(model, s, z, generator):
    """z (N, L) with its gaps filled, and the call that revealed each token, -1 if given. With
    drafts it is the token's place in the order."""
    how = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    if s.drafts == 1:
        by = {"by": s.by} if s.by else {}
        return model.sample(z, per_step=s.per_step, generator=generator, **by, **how)

    if hasattr(model, "draw_groups") and s.by != "left":  # it has learned an order
        groups = model.draw_groups(z, generator=generator)
    else:
        is_open = z == model.mask_id
        groups = torch.where(is_open, is_open.cumsum(dim=1) - 1, -1)
    x, _ = generate_speculative(model, z, groups, s.drafts, generator, **how)
    return x, groups.clamp(min=-1)


def write(model, s, x, length, end, generator):
    """x (N, n) with its gaps filled, and written on up to `length`: tokens (N, length), or
    fewer if all have come to their end, and the call that revealed each, -1 if given. Beyond
    its window the model reads the last half of one, in whole blocks, and fills the other.

    A short text is followed by [MASK]s up to the end of its block, as a diffusion model has
    only seen whole ones. They get filled, too, and thrown away. For an ARM and an A3, K = 1, so
    there is nothing to throw away."""
    L = model.config.seq_len
    given = x.shape[1]
    K = getattr(model.config, "block_len", 1)
    # What the next window reads again: half a window in whole blocks, or half of its only block.
    keep = L // 2 // K * K or L // 2
    revealed_at = torch.full_like(x, -1)
    calls = 0

    while True:
        # The window begins where the text does, as long as that is in reach, and later `keep`
        # tokens before the end of what is there. It reaches to its full length L or to the end
        # of what is wanted, and then to the end of a block.
        n = x.shape[1]
        begin = 0 if n < L or length <= L else n - keep
        wanted = min(L, length - begin)
        whole_blocks = math.ceil(wanted / K) * K
        z = x.new_full((len(x), whole_blocks), model.mask_id)
        z[:, : n - begin] = x[:, begin:]

        # Fill it, and put it where it belongs.
        y, at = fill(model, s, z, generator)
        y, at = y[:, :wanted], at[:, :wanted]
        x = torch.cat((x[:, :begin], y), dim=1)
        revealed_at = F.pad(revealed_at, (0, x.shape[1] - n), value=-1)
        revealed_at[:, begin:] = torch.where(at < 0, revealed_at[:, begin:], at + calls)
        calls += int(at.max()) + 1

        all_ended = end is not None and (x[:, given:] == end).any(1).all()
        if x.shape[1] >= length or all_ended:
            return x, revealed_at


def cut(x, revealed_at, n, tokenizer, first=0):
    """[(pieces of text, when each was revealed)] of tokens (N, length), each from the token
    `first` to its end of text. An end among the n tokens that were given does not count."""
    samples = []
    for row, when in zip(x.tolist(), revealed_at.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token == tokenizer.end and i >= n]
        stop = ends[0] if ends else len(row)
        samples.append((tokenizer.pieces(row[first:stop]), when[first:stop]))
    return samples


def main(argv=None):
    s = Settings(**cli.parse(Settings, argv, __doc__))
    check_flags(s)
    device = cli.pick_device(s.device)
    ckpt, model = checkpoint.load(folder_of(s) / "ckpt.pt", make_model, device)
    tokenizer = tokenizer_of(**ckpt["tokenizer"])
    name, L = ckpt["model_name"], model.config.seq_len

    # Behind the end of a text, which is not shown, a document begins.
    begin = ckpt.get("separate", False) if s.begin is None else s.begin
    has_end = tokenizer.end is not None
    need(has_end or not begin, "--begin: this model's tokenizer has no end of a text")
    ids = [tokenizer.end] * begin + template(s, tokenizer, model.mask_id)
    n = len(ids)
    check_model(s, model, name, n)
    length = n if s.infill is not None else s.length or L
    if n >= L and s.infill is None:
        line = f"the model's window has {L} tokens: it reads the end of the prompt only"
        print(line, file=sys.stderr)

    x = torch.tensor([ids] * s.num_samples, dtype=torch.long, device=device)  # (N, n)
    generator = torch.Generator(device).manual_seed(s.seed)
    x, revealed_at = write(model.eval(), s, x, length, tokenizer.end, generator)

    samples = cut(x, revealed_at, n, tokenizer, first=int(begin))
    pictures.show(samples, s.show == "order")
    if s.html:
        best = f"validation {ckpt['best']:.3f} {tokenizer.unit} after {ckpt['step']:,} steps"
        pictures.write(s.html, pictures.page(samples, f"Written by {name}, {best}."))
    if s.svg:
        pictures.write(s.svg, pictures.svg(samples))


if __name__ == "__main__":
    cli.run(main)
