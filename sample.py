"""
Print samples from a checkpoint of train_char.py, and when each character was revealed.

    python sample.py                                     samples from out/ckpt.pt
    python sample.py --prompt "ROMEO:" --show order      continue a text, coloured by order
    python sample.py --infill "To be, ____ not to be"    fill the gaps, one token for each _
    python sample.py --html out.html --svg out.svg       a page that plays it, and a still
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from plumbing import checkpoint, cli, pictures
from plumbing.cli import UserError, flag, refuse
from plumbing.tokenizers import tokenizer_of
from train_char import make_model

RULES = ("left", "order", "random", "confidence", "entropy", "margin")


@dataclass
class Settings:
    out_dir: str = flag("out", "where train_char.py wrote ckpt.pt")
    prompt: str | None = flag(None, "text to continue")
    infill: str | None = flag(None, r"text with gaps, each _ one token to fill in; \_ is a _")
    num_samples: int = flag(3, "how many", least=1, below=2**20)
    temperature: float = flag(1.0, "0: always the likeliest", least=0)
    top_k: int | None = flag(None, "draw among the k likeliest tokens only", least=1)
    per_step: int = flag(1, "tokens a call; more is faster but coarser", least=1)
    by: str | None = flag(None, "a3, loa3: which tokens come next [left, order]", RULES)
    show: str = flag("text", "or order", ("text", "order"))
    html: str | None = flag(None, "write a page that plays how the samples came about")
    svg: str | None = flag(None, "write a picture of the samples")
    seed: int = flag(1337, "of the draws", least=0, below=2**63)
    device: str | None = flag(None, "cpu, cuda or mps [the best there is]")


def template(prompt, infill, tokenizer, seq_len, mask_id):
    """What is given and what is to be filled, (1, seq_len) long with mask_id for [MASK], and how
    much of it to print.

    A short text is followed by [MASK]s up to seq_len, as a diffusion model has only seen windows of
    that length. They get filled too: the gaps are drawn as if the text went on in every possible
    way."""
    parts = [prompt or ""]
    if infill is not None:
        parts = [part.replace("\0", "_") for part in infill.replace(r"\_", "\0").split("_")]
        refuse(len(parts) == 1, "--infill needs a gap: one _ for each token to fill in")
    ids = tokenizer.encode(parts[0]).tolist()
    for part in parts[1:]:
        ids += [mask_id, *tokenizer.encode(part).tolist()]
    refuse(len(ids) > seq_len, f"the text has {len(ids)} tokens, the model's window {seq_len}")
    full = infill is None and len(ids) == seq_len
    refuse(full, f"the prompt fills the model's window of {seq_len}: nothing left to write")
    z = torch.full((1, seq_len), mask_id)
    z[0, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return z, seq_len if infill is None else len(ids)


def main(argv=None):
    s = Settings(**cli.parse(Settings, argv, __doc__))
    cli.check(s)
    refuse(s.prompt and s.infill, "--prompt or --infill: one of the two")
    device = cli.pick_device(s.device)
    ckpt, model = checkpoint.load(Path(s.out_dir) / "ckpt.pt", make_model, device)
    tokenizer, name = tokenizer_of(**ckpt["tokenizer"]), ckpt["model_name"]
    z, n = template(s.prompt, s.infill, tokenizer, model.config.seq_len, model.mask_id)
    how = {}
    if name in ("a3", "loa3"):
        z = z[:, :n]  # positions that are not decoded are not there: no [MASK]s needed
        how = dict(by=s.by)
    refuse(s.by and not how, f"--by is for a3 and loa3; {s.out_dir} holds a model {name}")
    generator = torch.Generator(device).manual_seed(s.seed)
    try:
        x, at = model.eval().sample(
            z.repeat(s.num_samples, 1).to(device), s.temperature, s.top_k, s.per_step,
            generator=generator, **how,
        )  # fmt: skip
    except ValueError as e:
        raise UserError(str(e)) from None
    samples = pictures.pieces(tokenizer, x, at, n)
    pictures.show(samples, s.show == "order")
    if s.html:
        best = f"validation {ckpt['best']:.3f} nats per token after {ckpt['step']:,} steps"
        pictures.write(s.html, pictures.page(samples, f"Written by {name}, {best}."))
    if s.svg:
        pictures.write(s.svg, pictures.svg(samples))


if __name__ == "__main__":
    cli.run(main)
