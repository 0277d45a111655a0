"""
One web page with models inside, on which anybody can watch them write.

    python -m beyond.playground out_arm out_lomdm --html play.html

The page fills the gaps of a text, and shows which place comes next and why, the likeliest
characters there, and the price of each step in nats. It is one file that needs a browser only.
Its JavaScript, in playground.html, is a second implementation of the networks of lomdm.py, a3.py
and loa3.py. tests/test_playground.py holds one against the other.

Models of characters only. The weights are rounded to 14.6 bits, which moves the log-probabilities
of a trained model by a few thousandths of a nat at the most.
"""

import json
import re
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

from beyond import loa3
from plumbing import checkpoint, cli, pictures
from plumbing.cli import need
from plumbing.data import TEXT_LEN
from plumbing.films import films
from train_char import make_model

PAGE = Path(__file__).with_name("playground.html")  # what page() fills in
FILM_ROWS = 4


# ---- weights as letters --------------------------------------------------------------------

# A browser reads text, and a byte of base64 carries only 6 bits. Here the digits are the 91
# printable ASCII characters that mean nothing in a JSON string or in HTML. Four weights are nine
# digits: two for each, and the ninth holds four numbers of 0, 1, 2, which say in which third the
# others are. So a weight is a whole number below 3 * 91 * 91, times the scale of its group of 64,
# which is two more digits. That takes 2.28 bytes a weight, where float16 in base64 takes 2.67, and
# rounds three times as finely: on 800,000 log-probabilities of a trained ARM, the largest error
# was 0.0018 nats, and 0.0059 in float16.
DIGITS = np.array([c for c in map(chr, range(33, 127)) if c not in '"\\<'])
BASE = len(DIGITS)  # 91
THIRD = BASE**2
HALF = (3 * THIRD - 1) // 2  # whole numbers from -HALF to HALF
GROUP = 64


def pack(weight):
    """A tensor as JSON: {length, unit, digits}, or {numbers} for what is small. A weight is
    (number - HALF) * scale of its group * unit."""
    weight = weight.detach().flatten().double().cpu().numpy()
    if len(weight) < 1024:
        return {"numbers": [float(f"{value:.9g}") for value in weight]}  # as many as float32 has

    groups = np.pad(weight, (0, -len(weight) % GROUP)).reshape(-1, GROUP)
    largest = np.abs(groups).max(1, keepdims=True)  # of each group
    unit = (largest.max() or 1.0) / HALF / (THIRD - 1)
    scale = np.ceil(largest / HALF / unit).clip(1, THIRD - 1)
    number = (groups / (scale * unit)).round().clip(-HALF, HALF) + HALF

    # Nine digits for each four weights, and two for the scale in front of each group.
    thirds, rest = np.divmod(number.astype(int).reshape(-1, 4), THIRD)
    ninth = thirds @ [1, 3, 9, 27]
    nine = np.column_stack((two_digits(rest), ninth))
    scales = two_digits(scale.astype(int))
    digits = np.column_stack((scales, nine.reshape(len(groups), -1)))
    text = "".join(DIGITS[digits].flat)
    return {"length": len(weight), "unit": float(unit), "digits": text}


def two_digits(numbers):
    """(n, m) -> (n, 2 m)"""
    return np.stack(np.divmod(numbers, BASE), axis=-1).reshape(len(numbers), -1)


def weights_of(model):
    """{name: packed tensor} of all that is needed to write. What reads the clean text in training,
    LoMDM's w and LoA3's q, is left out, as are the rows that only fill up the last matrix."""
    packed = {}
    for name, p in model.named_parameters():
        if name.startswith(("g.", "g_block.", "order.token_logits", "order.q_logits", "rules.")):
            continue
        p = p[: model.config.vocab_size] if name == "lm_head.weight" else p
        packed[name] = pack(p)
    return packed


# ---- what the page knows -------------------------------------------------------------------


def load(out_dir):
    """A run as the page wants it: {name, about, kind, learned, rowLength, config, vocab,
    weights}. UserError if there is none, or it is no model of characters."""
    ckpt, model = checkpoint.load(Path(out_dir) / "ckpt.pt", make_model)
    kind = ckpt["tokenizer"]["kind"]
    need(kind == "char", f"{out_dir} has the tokenizer {kind}; the page is for characters only")

    data = ckpt["settings"]["data"]
    row = TEXT_LEN.get(data, 0) // FILM_ROWS  # 0: no film
    what = "films" if row else Path(data).name
    most = "" if ckpt["model_name"] == "arm" else "at most "  # a bound, or a mean over orders
    best = f"{most}{ckpt['best']:.2f} nats for each character of a text that it had not seen"
    about = f"Trained on {what} for {ckpt['step']:,} steps: it paid {best}."
    is_loa3 = isinstance(model, loa3.LoA3)
    return {
        "name": ckpt["model_name"],
        "about": about,
        "kind": "lomdm" if hasattr(model, "g_hat") else "a3",
        "learned": is_loa3 or getattr(model.config, "learn_order", False),
        "rowLength": row,
        "config": vars(model.config),
        "vocab": list(ckpt["tokenizer"]["vocab"]),
        "weights": weights_of(model),
    }


LABELS = {
    "arm": "ARM (GPT)",
    "mdm": "MDM",
    "block": "block diffusion",
    "lomdm": "LoMDM",
    "a3": "A3",
    "loa3": "LoA3",
}


def label(models, out_dirs):
    """Give each model a label of its own: its name, and the folder if two have the same name."""
    names = [model["name"] for model in models]
    short = [Path(out_dir).name for out_dir in out_dirs]
    folders = short if len({*short}) == len(short) else out_dirs
    for model, folder in zip(models, folders, strict=True):
        name = model["name"]
        alone = names.count(name) == 1
        model["label"] = LABELS.get(name, name) + ("" if alone else f" in {folder}")


def examples_for(model):
    """[(name, text)] to begin with, a _ for each gap."""
    L = model["config"]["seq_len"]
    if model["rowLength"]:
        return film_examples(model)

    verse = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind"[:L]
    n = len(verse)
    texts = [
        ("every second word", re.sub(r"(\w+\W+)(\w+)", lambda m: m[1] + "_" * len(m[2]), verse)),
        ("a beginning", "ROMEO:\n".ljust(L, "_")),
        ("an end", verse[: L // 3].rjust(L, "_")),
        ("a gap in the middle", verse[: n // 4] + "_" * (n // 2) + verse[3 * n // 4 :]),
        ("nothing at all", "_" * L),
    ]
    known = {*model["vocab"], "_"}
    return [(name, text) for name, text in texts if len(text) <= L and known >= set(text)]


def film_examples(model):
    """A film with nothing given, with its last row, with its first, and with a hole."""
    L, row = model["config"]["seq_len"], model["rowLength"]
    (film,) = films(1, seed=1, both=row > 17)
    texts = [
        ("a film from nothing", "_" * L),
        ("its last row given", film[-row:].rjust(len(film), "_")),
        ("its first row given", film[:row].ljust(len(film), "_")),
        ("a hole", film[: row + 4] + "_" * (2 * row - 4) + film[3 * row :]),
    ]
    return [(name, text) for name, text in texts if len(text) <= L]


def page(out_dirs):
    """The page, as text, for the runs in these folders."""
    models = [load(out_dir) for out_dir in out_dirs]
    label(models, out_dirs)
    examples = {}
    for model in models:
        examples = dict(examples_for(model)) | examples  # of one name, that of the first model
    data = {
        "models": models,
        "examples": [{"name": name, "text": text} for name, text in examples.items()],
        "made": "Made by beyond/playground.py, which rounds weights to 14.6 bits.",
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    return PAGE.read_text("utf-8").replace('"DATA"', text, 1)


def parse(argv):
    p = cli.Parser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("out_dirs", nargs="+", help="of train_char.py")
    p.add_argument("--html", default="play.html", help="where to write the page [play.html]")
    return p.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    need(a.html, "--html is empty")
    need(Path(a.html).name not in checkpoint.RUN_FILES, f"--html {a.html} is a file of a run")
    pictures.write(a.html, page(a.out_dirs))


if __name__ == "__main__":
    cli.run(main)
