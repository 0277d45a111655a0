"""
Print samples from a checkpoint of train_char.py, and when each character was revealed.

    python sample.py                                     samples from out/ckpt.pt
    python sample.py --prompt "ROMEO:" --show order      continue a text, coloured by order
    python sample.py --infill "To be, ____ not to be"    fill the gaps, one token for each _
    python sample.py --html out.html --svg out.svg       a page that plays it, and a still
"""

import argparse
import codecs
import contextlib
import html
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import a3
import lomdm

FORMAT = "lomdm checkpoint 2"
PAGE = Path(__file__).with_name("page.html")  # what --html fills in


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
        # of several processes on a machine, one speaks
        sys.exit(f"error: {e}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (
        BrokenPipeError
    ):  # python sample.py | head; nobody reads on, not even Python's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError, OverflowError) as e:
        sys.exit(f"error: {str(e) or 'not enough memory'}")
    except RuntimeError as e:
        if not any(word in str(e).lower() for word in ("alloc", "out of memory", "overflow")):
            raise
        sys.exit("error: not enough memory; take a smaller model, batch or number of samples")


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
            raise UserError(f"cannot write {path}: is the disk full? ({str(e)[:60]})") from None
        raise


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
        good = ckpt["vocab"] == "gpt2" or len(ckpt["vocab"]) == model.config.vocab_size
    except (ValueError, TypeError, KeyError, RuntimeError):
        good = False
    if not good or not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path} does not hold the model that it says; train again")
    return ckpt, model.to(device)


class Characters:
    """vocab: all characters there are, by code point."""

    def __init__(self, vocab):
        self.vocab, self.size = vocab, len(vocab)
        self.codes = np.array([ord(c) for c in vocab], np.uint32)

    def encode(self, text):
        """(L,) uint16"""
        codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=self.size - 1)
        if (self.codes[ids] != codes).any():
            unknown = chr(codes[self.codes[ids] != codes][0])
            raise UserError(
                f"{unknown!r} does not occur in the text that this model was trained on"
            )
        return ids.astype(np.uint16)

    def encode_all(self, batch):
        """Tokens of (begins another document?, text) pairs; a line end between documents."""
        return self.encode("".join("\n" * begins + text for begins, text in batch))

    def pieces(self, ids):
        """The text of each token."""
        return [self.vocab[i] for i in ids]


class GPT2:
    """GPT-2's byte pairs, by tiktoken, which downloads them once, or has them in the folder that
    the environment variable TIKTOKEN_CACHE_DIR names."""

    def __init__(self):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:  # no network, a proxy, a full disk, a damaged file
            raise UserError(
                f"no GPT-2 vocabulary ({type(e).__name__}): tiktoken needs network once, or "
                "TIKTOKEN_CACHE_DIR set to a folder that has its files"
            ) from None
        self.size = self.bpe.n_vocab

    def encode(self, text):
        text = text.encode("utf-8", "replace").decode()  # a terminal may hand over half characters
        return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def encode_all(self, batch):
        """Tokens of (begins another document?, text) pairs; <|endoftext|> between documents. One
        call for all is fastest, but for texts that happen to contain that word."""
        end = "<|endoftext|>"
        if any(end in text for _, text in batch):
            each = [np.array([self.bpe.eot_token] * begins, np.uint16) for begins, _ in batch]
            texts = [self.encode(text) for _, text in batch]
            return np.concatenate([ids for pair in zip(each, texts, strict=True) for ids in pair])
        text = "".join(end * begins + text for begins, text in batch)
        return self.bpe.encode_to_numpy(text, allowed_special={end}).astype(np.uint16)

    def pieces(self, ids):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may need several
        pieces = [decoder.decode(self.bpe.decode_single_token_bytes(i)) for i in ids]
        pieces[-1] += decoder.decode(b"", final=True)
        return pieces


def tokenizer_of(vocab):
    """vocab as in a checkpoint: a list of characters, or "gpt2"."""
    return GPT2() if vocab == "gpt2" else Characters(vocab)


def template(prompt, infill, tokenizer, seq_len):
    """What is given and what is to be filled, (1, seq_len) long with tokenizer.size for [MASK], and
    how much of it to print.

    A short text is followed by [MASK]s up to seq_len, as the model has only seen windows of that
    length. They get filled too: the gaps are drawn as if the text went on in every possible way.
    """
    if infill is not None and "_" not in infill:
        raise UserError("--infill needs a gap: one _ for each token to fill in")
    parts = [prompt] if infill is None else infill.split("_")
    ids = tokenizer.encode(parts[0]).tolist()
    for part in parts[1:]:
        ids += [tokenizer.size, *tokenizer.encode(part).tolist()]
    if len(ids) > seq_len:
        raise UserError(f"the text has {len(ids)} tokens, the model's window {seq_len}")
    if infill is None and len(ids) == seq_len:
        raise UserError(f"the prompt fills the model's window of {seq_len}: nothing left to write")
    z = torch.full((1, seq_len), tokenizer.size)
    z[0, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return z, seq_len if infill is None else len(ids)


# ---- printing ------------------------------------------------------------------------------------

EARLY_TO_LATE = (196, 202, 208, 220, 154, 46, 48, 45, 33, 63)  # xterm colours, red to violet


def legend(colour):
    if not colour:
        return "order: the digit below says when a character was revealed: 0 first, 9 last, . given"
    scale = "".join(f"\033[38;5;{c}m█" for c in EARLY_TO_LATE)
    return f"order: revealed first {scale}\033[0m last; plain: given; ↵ ends a line"


def printable(c):
    return c if c.isprintable() else "·"  # an escape sequence in a text must not reach a terminal


def tenths(revealed_at):
    """{number of a call: 0 for the first .. 9 for the last}, without -1, which is given."""
    calls = sorted({at for at in revealed_at if at >= 0})
    return {at: 9 * i // max(1, len(calls) - 1) for i, at in enumerate(calls)}


def render(pieces, revealed_at, colour):
    """One sample with its order: colours, or a line of digits under each line of text.

    pieces: the text of each token; revealed_at: the number of the call that revealed it, -1 where
    it was given.
    """
    scale = tenths(revealed_at)
    out, digits = [], []
    for piece, at in zip(pieces, revealed_at, strict=True):
        for c in piece:
            shown, digit = "↵" if c == "\n" else printable(c), scale.get(at, ".")
            if colour and at >= 0:
                shown = f"\033[38;5;{EARLY_TO_LATE[digit]}m{shown}\033[0m"
            out.append(shown)
            digits.append(str(digit))
            if c == "\n":
                out.append("\n" if colour else f"\n{''.join(digits)}\n")
                digits = []
    return "".join(out) + ("" if colour or not digits else "\n" + "".join(digits))


def show(samples, order):
    """Print samples, (pieces, revealed_at) each; order: with colours or digits."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if order:
        print(legend(colour))
    for i, (pieces, at) in enumerate(samples):
        print(f"--- sample {i + 1}")
        plain = "".join(c if c in "\n\t" else printable(c) for c in "".join(pieces))
        print(render(pieces, at, colour) if order else plain)


def page(samples, about):
    """One HTML file that plays how the samples were written. It needs nothing but a browser."""
    rows = [dict(pieces=pieces, at=at) for pieces, at in samples]
    data = json.dumps(dict(about=about, samples=rows)).replace("<", "\\u003c")  # no </script>
    return PAGE.read_text("utf-8").replace('"DATA"', data)


def svg(samples, width=72):
    """The samples as a picture, coloured by order, on light and dark grounds alike."""
    cells, row = [], 0  # (row, column, character, tenth or None)
    for pieces, revealed_at in samples:
        scale, column = tenths(revealed_at), 0
        for piece, at in zip(pieces, revealed_at, strict=True):
            for c in piece:
                if column == width:
                    row, column = row + 1, 0
                shown = "↵" if c == "\n" else printable(c)
                cells.append((row, column, shown, scale.get(at)))
                row, column = (row + 1, 0) if c == "\n" else (row, column + 1)
        row += 2
    hues = "".join(f".c{i}{{fill:hsl({15 + 265 * i // 9} 85% 38%)}}" for i in range(10))
    dark = hues.replace("38%", "70%")
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {9 * width + 20} {18 * row + 24}">',
        f"<style>text{{font:15px monospace;fill:#222}}{hues}",
        f"@media(prefers-color-scheme:dark){{text{{fill:#ddd}}{dark}}}</style>",
        '<text x="10" y="16">first</text><text x="160" y="16">last</text>',
        *(f'<rect class="c{i}" x="{60 + 9 * i}" y="6" width="9" height="11"/>' for i in range(10)),
    ]
    for row, column, c, tenth in cells:
        if c != " ":
            style = "" if tenth is None else f' class="c{tenth}"'
            at = f'x="{10 + 9 * column}" y="{42 + 18 * row}"'
            out.append(f"<text{style} {at}>{html.escape(c)}</text>")
    return "\n".join([*out, "</svg>\n"])


def write(path, text):
    write_file(Path(path), lambda temporary: temporary.write_text(text, "utf-8"))
    print(f"wrote {path}")


def draw(model, z, tokenizer, seed, n_shown, by=None, per_step=1, group_size=1, **kw):
    """Fill z (N, L), where it is tokenizer.size. Returns N samples of n_shown tokens: the text of
    each token, and the number of the call that filled it in, -1 if given."""
    z = z.to(next(model.parameters()).device)
    kw["generator"] = torch.Generator(z.device).manual_seed(seed)
    model.eval()
    open = z == tokenizer.size
    if isinstance(model, lomdm.LoMDM):
        x, at = model.sample(z, per_step=per_step, **kw)
    elif by in (None, "left"):  # what is open in groups of group_size, from left to right
        groups = torch.where(open, (open.cumsum(1) - 1) // group_size, -1)
        x, at = model.decode(z, groups, z.shape[1], "confidence", **kw)
    else:
        x, at = model.generate_dynamic(z, open, per_step, by, **kw)
    rows = zip(x[:, :n_shown].tolist(), at[:, :n_shown].tolist(), strict=True)
    return [(tokenizer.pieces(ids), at) for ids, at in rows]


def parse(argv):
    p = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--out_dir", default="out", help="where train_char.py wrote ckpt.pt")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="", help="text to continue")
    what.add_argument("--infill", help="text with gaps, each _ one token to fill in")
    p.add_argument("--num_samples", type=int, default=3)
    p.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest")
    p.add_argument("--top_k", type=int, help="draw among the k likeliest tokens only")
    p.add_argument("--per_step", type=int, help="tokens a call [1]; more is faster but coarser")
    p.add_argument(
        "--by",
        choices=("left", "random", "confidence", "entropy", "margin"),
        help="a3: which tokens come next, by default those on the left",
    )
    p.add_argument("--group_size", type=int, help="a3: tokens a group with --by left [1]")
    p.add_argument("--show", choices=("text", "order"), default="text")
    p.add_argument("--html", help="write a page that plays how the samples came about")
    p.add_argument("--svg", help="write a picture of the samples")
    p.add_argument("--seed", type=int, default=1337)
    p.add_argument("--device", help="cpu, cuda or mps; by default the best there is")
    return p.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    if a.html and Path(a.html).resolve() == PAGE.resolve():
        raise UserError(f"--html {a.html} is the template of that page; take another name")
    if a.num_samples < 1 or not 0 <= a.seed < 2**63:
        raise UserError("--num_samples must be at least 1, and --seed in [0, 2^63)")
    ckpt, model = load_checkpoint(Path(a.out_dir) / "ckpt.pt", pick_device(a.device))
    tokenizer = tokenizer_of(ckpt["vocab"])
    z, n_shown = template(a.prompt, a.infill, tokenizer, model.config.seq_len)
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
        samples = draw(model, z.repeat(a.num_samples, 1), tokenizer, a.seed, n_shown, **kw)
    except ValueError as e:
        raise UserError(str(e)) from None
    show(samples, a.show == "order")
    if a.html:
        best = f"validation {ckpt['best']:.3f} nats per token after {ckpt['step']:,} steps"
        write(a.html, page(samples, f"Written by {ckpt['model_name']}, {best}."))
    if a.svg:
        write(a.svg, svg(samples))


if __name__ == "__main__":
    run(main)
