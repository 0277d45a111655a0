"""
Answers of a model, kept in a file, so that hours of asking can be broken off and go on.
"""

import hashlib
import json
import random
from pathlib import Path

from tqdm import tqdm

import a3
from beyond import llama
from experiments import harness, packages
from plumbing import checkpoint, tokenizers
from plumbing.checkpoint import write_text
from plumbing.cli import need

WINDOW = 128  # tokens of an item at most; the runs of table.py are trained with as many


def read_lines(path):
    need(Path(path).is_file(), f"no {path}; make it: python -m experiments.tasks prepare")
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def fitting(items, length):
    """The items whose length(item) in tokens fits into WINDOW, with two to spare, as some models
    begin with a token or two of their own; in a random order that never changes."""
    items = random.Random(1).sample(items, len(items))
    return [item for item in items if length(item) <= WINDOW - 2]


def header_of(folder, by, asked, *files):
    """What answers depend on: the model, the rule, all that may be asked, and the code. files: what
    else of the code they depend on."""
    is_run = Path(folder, "ckpt.pt").is_file()
    state = Path(folder, "ckpt.pt" if is_run else "model.safetensors").stat()
    common = (m.__file__ for m in (a3, llama, tokenizers, harness, packages))
    code = checkpoint.code_digest([*common, __file__, *files])
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    model = [str(Path(folder)), state.st_size, int(state.st_mtime)]
    return {"model": model, "by": by, "code": code, "asked": digest}


def going_on(path, header, asked, load, answer):
    """[answer(model, one) for one in asked], each of them a line of the file at path. Lines that
    are there are not made again, if the file begins with this header. With another one it is kept
    as PATH.old. load() makes the model, and is called when the first answer is missing."""
    # A process that was killed may have left half a line behind the last "\n".
    lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
    if lines[:1] != [json.dumps(header)]:
        if lines:
            path.replace(f"{path}.old")
        lines = [json.dumps(header)]
    write_text(path, "\n".join(lines) + "\n")

    done = len(lines) - 1
    if done < len(asked):
        model = load()
        with open(path, "a", encoding="utf-8") as f:
            for one in tqdm(asked[done:], path.stem, len(asked), initial=done, disable=None):
                f.write(json.dumps(answer(model, one)) + "\n")
                f.flush()
    return read_lines(path)[1 : 1 + len(asked)]
