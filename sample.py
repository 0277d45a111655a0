"""
Print samples from a checkpoint of train_char.py, and when each character was revealed.

    python sample.py                                     samples from out/ckpt.pt
    python sample.py --prompt "ROMEO:" --show order      continue a text, coloured by order
    python sample.py --infill "To be, ____ not to be"    fill the gaps, one character for each _
"""

import argparse
import os
import sys
import zipfile
from pathlib import Path

import torch

import a3
import lomdm

FORMAT = "lomdm char checkpoint 1"


class UserError(Exception):
    """Something the user can mend. Its message is all that is printed; the exit code is 1."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line instead of the whole usage."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def run(main):
    """Call main() as a script: one line for whatever the user can mend, and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that lacks a character prints ? instead
    try:
        main()
        sys.stdout.flush()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (
        BrokenPipeError
    ):  # python sample.py | head; nobody reads on, not even Python's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError, OverflowError) as e:
        sys.exit(f"error: {e or 'not enough memory'}")
    except RuntimeError as e:
        if "alloc" not in str(e) and "out of memory" not in str(e):
            raise
        sys.exit("error: not enough memory; take a smaller model, batch or number of samples")


def pick_device(name):
    """The torch device called `name`; None takes the best there is."""
    mps = torch.backends.mps.is_available()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is none that torch knows; try cpu or cuda") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": mps}
    n = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there.get(device.type, False) or (device.index or 0) >= n:
        raise UserError(f"--device {name} asked for, but there is none here; try --device cpu")
    return device


def load_checkpoint(path, device):
    """A checkpoint of train_char.py and its model. weights_only: loading a file never runs code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; train one: python train_char.py --out_dir {path.parent}"
        )
    try:
        with zipfile.ZipFile(path) as z:  # torch.load does not look at the checksums
            if z.testzip():
                raise zipfile.BadZipFile
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except Exception:  # torch.load fails in many ways on a file that is something else
        raise UserError(f"{path} is damaged, cut off or not a checkpoint; train again") from None
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this version of train_char.py; train again")
    try:
        module, name = (a3, "A3") if ckpt["model_name"] == "a3" else (lomdm, "LoMDM")
        model = getattr(module, name)(module.Config(**ckpt["config"]))
        model.load_state_dict(ckpt["model"])
        good = len(ckpt["vocab"]) == model.config.vocab_size
    except (ValueError, TypeError, KeyError, RuntimeError):
        good = False
    if not good or not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path} does not hold the model that it says; train again")
    return ckpt, model.to(device)


def encode(text, vocab):
    """Characters to token ids, (L,) long."""
    index = {c: i for i, c in enumerate(vocab)}
    if unknown := sorted(set(text) - set(index)):
        raise UserError(f"{unknown[0]!r} does not occur in the text that this model was trained on")
    return torch.tensor([index[c] for c in text], dtype=torch.long)


def template(prompt, infill, vocab, seq_len):
    """What is given and what is to be filled, (1, seq_len) long with len(vocab) for [MASK], and how
    much of it to print.

    A short text is followed by [MASK]s up to seq_len, as the model has only seen windows of that
    length. They get filled too: the gaps are drawn as if the text went on in every possible way.
    """
    text = prompt if infill is None else infill
    if len(text) > seq_len:
        raise UserError(f"the text has {len(text)} characters, the model's window {seq_len}")
    if infill is not None and "_" not in infill:
        raise UserError("--infill needs a gap: one _ for each character to fill in")
    if infill is None and len(text) == seq_len:
        raise UserError(f"the prompt fills the model's window of {seq_len}: nothing left to write")
    gap = torch.tensor([infill is not None and c == "_" for c in text], dtype=torch.bool)
    ids = encode(text.replace("_", vocab[0]) if infill is not None else text, vocab)
    z = torch.full((1, seq_len), len(vocab))
    z[0, : len(text)] = torch.where(gap, len(vocab), ids)
    return z, seq_len if infill is None else len(text)


# ---- printing ------------------------------------------------------------------------------------

EARLY_TO_LATE = (196, 202, 208, 220, 154, 46, 48, 45, 33, 63)  # xterm colours, red to violet


def legend(colour):
    if not colour:
        return "order: the digit below says when a character was revealed: 0 first, 9 last, . given"
    scale = "".join(f"\033[38;5;{c}m█" for c in EARLY_TO_LATE)
    return f"order: revealed first {scale}\033[0m last; plain: given; ↵ ends a line"


def printable(c):
    return c if c.isprintable() else "·"  # an escape sequence in a text must not reach a terminal


def render(text, revealed_at, colour):
    """One sample with its order: colours, or a line of digits under each line of text.

    revealed_at: for each character the number of the call that revealed it, -1 where it was given.
    """
    calls = sorted({at for at in revealed_at if at >= 0})
    scale = {at: 9 * i // max(1, len(calls) - 1) for i, at in enumerate(calls)}
    out, digits = [], []
    for c, at in zip(text, revealed_at, strict=True):
        shown, digit = "↵" if c == "\n" else printable(c), scale.get(at, ".")
        if colour and at >= 0:
            shown = f"\033[38;5;{EARLY_TO_LATE[digit]}m{shown}\033[0m"
        out.append(shown)
        digits.append(str(digit))
        if c == "\n":
            out.append("\n" if colour else f"\n{''.join(digits)}\n")
            digits = []
    return "".join(out) + ("" if colour or not digits else "\n" + "".join(digits))


def show(texts, revealed_at, order, n_shown):
    """Print samples; texts: strings, revealed_at (N, L) long, order: with colours or digits."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if order:
        print(legend(colour))
    for i, text in enumerate(texts):
        print(f"--- sample {i + 1}")
        text, at = text[:n_shown], revealed_at[i, :n_shown].tolist()
        plain = "".join(c if c in "\n\t" else printable(c) for c in text)
        print(render(text, at, colour) if order else plain)


def draw(model, z, vocab, seed, by=None, per_step=1, group_size=1, **kw):
    """Fill z (N, L), where it is len(vocab): strings, and the call that filled what, (N, L)."""
    z = z.to(next(model.parameters()).device)
    kw["generator"] = torch.Generator(z.device).manual_seed(seed)
    model.eval()
    if isinstance(model, lomdm.LoMDM):
        x, revealed_at = model.sample(z, per_step=per_step, **kw)
    elif by in (None, "left"):  # what is open in groups of group_size, from left to right
        open = z == len(vocab)
        groups = torch.where(open, (open.cumsum(1) - 1) // group_size, -1)
        x, revealed_at = model.decode(z, groups, z.shape[1], "confidence", **kw)
    else:
        x, revealed_at = model.generate_dynamic(z, z == len(vocab), per_step, by, **kw)
    return ["".join(vocab[i] for i in row) for row in x.tolist()], revealed_at.cpu()


def main(argv=None):
    p = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--out_dir", default="out", help="where train_char.py wrote ckpt.pt")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="", help="text to continue")
    what.add_argument("--infill", help="text with gaps, each _ one character to fill in")
    p.add_argument("--num_samples", type=int, default=3)
    p.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest")
    p.add_argument("--top_k", type=int, help="draw among the k likeliest characters only")
    p.add_argument("--per_step", type=int, help="characters a call [1]; more is faster but coarser")
    p.add_argument(
        "--by",
        choices=("left", "random", "confidence", "entropy", "margin"),
        help="a3: which characters come next, by default those on the left",
    )
    p.add_argument("--group_size", type=int, help="a3: characters a group with --by left [1]")
    p.add_argument("--show", choices=("text", "order"), default="text")
    p.add_argument("--seed", type=int, default=1337)
    p.add_argument("--device", help="cpu, cuda or mps; by default the best there is")
    a = p.parse_args(argv)
    if a.num_samples < 1 or not 0 <= a.seed < 2**63:
        raise UserError("--num_samples must be at least 1, and --seed in [0, 2^63)")
    ckpt, model = load_checkpoint(Path(a.out_dir) / "ckpt.pt", pick_device(a.device))
    vocab = ckpt["vocab"]
    z, n_shown = template(a.prompt, a.infill, vocab, model.config.seq_len)
    if isinstance(model, a3.A3):
        z = z[:, :n_shown]  # positions that are not decoded are not there: no [MASK]s needed
        if a.by in (None, "left") and a.per_step is not None:
            raise UserError("--per_step goes with another --by; left to right takes --group_size")
        if a.by not in (None, "left") and a.group_size is not None:
            raise UserError(f"--group_size goes with --by left; --by {a.by} takes --per_step")
    elif a.by or a.group_size is not None:
        raise UserError(f"--by and --group_size are for a3; {a.out_dir} holds {ckpt['model_name']}")
    kw = dict(temperature=a.temperature, top_k=a.top_k, by=a.by)
    kw["per_step"] = 1 if a.per_step is None else a.per_step
    kw["group_size"] = 1 if a.group_size is None else a.group_size
    if kw["group_size"] < 1:
        raise UserError("--group_size must be at least 1")
    try:
        texts, revealed_at = draw(model, z.repeat(a.num_samples, 1), vocab, a.seed, **kw)
    except ValueError as e:
        raise UserError(str(e)) from None
    show(texts, revealed_at, a.show == "order", n_shown)


if __name__ == "__main__":
    run(main)
