"""
Text to tokens on disk: train.bin, val.bin and meta.json, in a folder of their own.

    python -m plumbing.data --data openwebtext              GPT-2 tokens, about 17 GB on disk
    python -m plumbing.data --data FILE_OR_FOLDER --tokenizer gpt2

train_char.py calls load() with the same flags, so that running this is never needed, only
possible. A source of texts is a function and its entry in SOURCES. Texts are read, encoded and
written piece by piece: memory does not grow with the corpus. The folder's name holds a hash of
the files' names, sizes and times, so that a text that has changed gets a folder anew.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing import cli
from plumbing.checkpoint import lock, write_file
from plumbing.cli import UserError, flag, need
from plumbing.tokenizers import TOKENIZERS, learn, tokenizer_of

DATA = Path(__file__).parents[1] / "data"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FORMAT = 3  # of the folder; one of another format is prepared again
PIECE = 2**16  # characters of a file that are read at a time
LONGEST = 2**20  # characters without a place to cut; then anywhere
BATCH = 2**22  # characters that are encoded at a time, on all cores


@dataclass
class Text:
    """What a source gives. parts() returns two functions, for train and for val, each of which
    returns an iterator of (does a document begin here?, text). Instead of val, None stands for the
    last tenth of train. files are those whose change makes the tokens old."""

    name: str  # what --data says for it
    parts: Callable
    tokenizer: str = "char"  # unless a flag says otherwise
    files: list | tuple = ()


# ---- sources, each called with the folder that holds all data -----------------------------------
def shakespeare(root):
    """tinyshakespeare, downloaded once; without network, a text that every Python has."""
    path = root / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=15) as response:
                raw = response.read()
        except (OSError, http.client.HTTPException) as e:  # no network, or it broke off
            print(f"no tinyshakespeare ({e}); training on Python's own documentation instead")
            return python_docs(root)
        right = hashlib.sha256(raw).hexdigest() == SHAKESPEARE_SHA256
        need(right, f"the download of {SHAKESPEARE_URL} has a wrong checksum; try again")
        write_file(path, lambda temporary: temporary.write_bytes(raw))
    return Text("shakespeare", lambda: (pieces_in([path]), None), files=[path])


def python_docs(root):
    """Python's own documentation, as help() shows it."""
    from pydoc_data.topics import topics

    def pieces():
        yield True, "\n\n".join(topics[name] for name in sorted(topics))

    return Text("python-docs", lambda: (pieces, None))


def openwebtext(root):
    """OpenWebText from the Hugging Face hub, with the same split as nanoGPT's."""

    def documents_of(dataset):
        for rows in dataset.iter(batch_size=1000):
            for text in rows["text"]:
                yield True, text

    def parts():
        try:
            from datasets import load_dataset
        except ImportError:
            raise UserError("--data openwebtext needs a package: pip install datasets") from None
        try:
            # The main branch holds a script, which datasets 4 and later do not run.
            name, parquet = "Skylion007/openwebtext", "refs/convert/parquet"
            whole = load_dataset(name, revision=parquet, split="train")
        except Exception as e:  # whatever the hub, the network or the disk may say
            why = next(iter(str(e).splitlines()), type(e).__name__)
            raise UserError(f"openwebtext could not be downloaded: {why}") from None

        print(f"openwebtext has {len(whole):,} documents; nanoGPT found 8,013,769")
        split = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        return lambda: documents_of(split["train"]), lambda: documents_of(split["test"])

    return Text("openwebtext", parts, "gpt2")


def automaton(root, both=False):
    """Films of a cellular automaton, rule 30 on a ring of 16 cells, made on the spot: 4 rows, a
    line each, 20,000 to train on and 2,000 to validate. The last row comes first: a cell follows
    from three in the line below it, and left to right is the wrong order. A film costs at least
    16 ln 2 = 11.09 nats, .1631 a character.

    both: only every other row is shown, and a film has one of two directions, which a mark before
    each row tells: v, time runs down, or ^, up. Such a film costs 17 ln 2 = 11.78 nats, .1637 a
    character."""

    def films(n, seed):
        g = np.random.default_rng(seed)
        rows = [g.integers(0, 2, (n, 16))]
        for _ in range(6 if both else 3):
            old = rows[-1]
            rows.append(np.roll(old, 1, 1) ^ (old | np.roll(old, -1, 1)))
        film = np.stack(rows[:: 2 if both else 1], 1)  # (n, 4, 16), first row first

        down = g.random(n) < 0.5 if both else np.zeros(n, bool)
        film = np.where(down[:, None, None], film, film[:, ::-1])
        for rows, mark in zip(film, np.where(down, "v", "^"), strict=True):
            lines = ["".join(".#"[cell] for cell in row) for row in rows]
            yield False, "".join(f"{mark if both else ''}{line}\n" for line in lines)

    name = "automaton-both" if both else "automaton"
    return Text(name, lambda: (lambda: films(20000, 1), lambda: films(2000, 2)))


SOURCES = {
    "shakespeare": shakespeare,
    "python-docs": python_docs,
    "openwebtext": openwebtext,
    "automaton": automaton,
    "automaton-both": lambda root: automaton(root, both=True),
}
TEXT_LEN = {"automaton": 4 * 17, "automaton-both": 4 * 18}  # of sources that are lists of texts


# ---- files ---------------------------------------------------------------------------------------
def files_of(name, data, but=()):
    """The files that the flag `name` means: one, or all .txt and .jsonl in a folder and below,
    sorted, without hidden ones. but: files that another flag names, as nothing is to be in both.
    UserError if there are none, or something else."""
    data = Path(data)
    need(data.exists(), f"{name} {data}: no such file or folder")
    files = [data]
    if data.is_dir():
        found = [p for p in data.rglob("*") if p.suffix.lower() in (".txt", ".jsonl")]
        hidden = [p for p in found if any(part[0] == "." for part in p.relative_to(data).parts)]
        files = sorted(p for p in set(found) - set(hidden) if not p.is_dir())

    taken = {p.resolve() for p in but}
    files = [p for p in files if p.resolve() not in taken]
    need(files, f"{name} {data} has no .txt or .jsonl files{' of its own' * bool(but)}")
    for path in files:
        need(path.is_file(), f"{name} {path} is no regular file; save the text as one")
    return files


def pieces_in(files):
    """A function that returns a new iterator of (does a document begin here?, text)."""

    def pieces():
        for path in files:
            try:
                yield from (read_jsonl if path.suffix.lower() == ".jsonl" else read_text)(path)
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8 text") from None

    return pieces


def read_jsonl(path):
    with open(path, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"].encode("utf-8", "replace").decode()
            except UnicodeDecodeError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError):
                message = f'{path}, line {number}: not a JSON object with a string "text"'
                raise UserError(message) from None
            yield True, text


def read_text(path):
    """A text file is one document, read in pieces. They end before a lone space or line end, where
    GPT-2's tokenizer always cuts: the tokens are those of the whole."""
    begins = True
    rest = ""
    with open(path, encoding="utf-8-sig", newline="") as f:
        while more := f.read(PIECE):
            need("\0" not in more, f"{path} is not UTF-8 text")  # but UTF-16, or no text at all
            rest += more
            cut = re.match(r"(?s).*\S(?=[ \n]\S)", rest)
            end = cut.end() if cut else len(rest) if len(rest) >= LONGEST else 0
            if end:
                yield begins, rest[:end]
                begins = False
                rest = rest[end:]
    if rest:
        yield begins, rest


# ---- tokens --------------------------------------------------------------------------------------
def batches(pieces, what):
    """Lists of (does a separator go before it?, text) with BATCH characters or more."""
    batch = []
    size = 0
    with tqdm(desc=what, unit="char", unit_scale=True, delay=2) as bar:
        for n, (begins, text) in enumerate(pieces):
            batch.append((begins and n > 0, text))
            size += len(text)
            bar.update(len(text))
            if size >= BATCH:
                yield batch
                batch = []
                size = 0
        yield batch


def prepare(target, train, val, kind):
    """Make the folder with {train,val}.bin and meta.json: all of it, or nothing."""
    work = Path(f"{target}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # a preparation that was killed left it
    work.mkdir(parents=True)
    try:
        write_tokens(work, train, val, kind)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_tokens(folder, train, val, kind):
    """The three files of prepare()."""
    parts = {"train": train, "val": val or (lambda: ())}
    paths = [folder / f"{name}.bin" for name in parts]
    texts = (batch for part in parts.values() for batch in batches(part(), "vocabulary"))
    tokenizer = learn(kind, texts)
    for path, part in zip(paths, parts.values(), strict=True):
        with open(path, "wb") as f:
            for batch in batches(part(), path.name):
                f.write(tokenizer.encode_all(batch).tobytes())

    # Without a text to validate on, that is the last tenth.
    if val is None:
        tokens = tokens_in(paths[0], tokenizer.dtype)
        end = int(0.9 * len(tokens))
        tokens[end:].tofile(paths[1])
        del tokens
        os.truncate(paths[0], end * tokenizer.dtype.itemsize)

    # One checksum stands for all tokens and what they mean.
    train, val = (tokens_in(path, tokenizer.dtype) for path in paths)
    about = [tokenizer.state, tokenizer.dtype.name]
    whole = json.dumps([hashlib.sha256(tokens).hexdigest() for tokens in (train, val)] + about)
    meta = dict(train=len(train), val=len(val), tokenizer=tokenizer.state)
    meta["sha256"] = hashlib.sha256(whole.encode()).hexdigest()

    # On disk before meta.json is: a machine may stop at any time.
    for path in paths:
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
    write_file(folder / "meta.json", lambda path: path.write_text(json.dumps(meta), "utf-8"))


def tokens_in(path, dtype):
    """A memory-mapped array, as far as a file that is empty can be one."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


class Corpus:
    """train and val, arrays of tokens on disk; their tokenizer; a checksum of all three; the name
    of the data. UserError if files were cut off."""

    def __init__(self, folder, name):
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        self.name = name
        self.sha256 = meta["sha256"]
        self.tokenizer = tokenizer_of(**meta["tokenizer"])
        self.train = tokens_in(folder / "train.bin", self.tokenizer.dtype)
        self.val = tokens_in(folder / "val.bin", self.tokenizer.dtype)
        whole = (len(self.train), len(self.val)) == (meta["train"], meta["val"])
        need(whole, f"the tokens in {folder} are cut off; delete it, and they are prepared again")

    def __str__(self):
        n = f"{len(self.train):,} + {len(self.val):,} tokens"
        return f"{n}, {self.tokenizer.size:,} different"


# ---- all of it -----------------------------------------------------------------------------------
def load(data, tokenizer=None, val_data=None, folder=None, text_len=None, but=None, least=0):
    """The Corpus that these flags name, prepared if it is not there yet. text_len: it is a list
    of texts of so many tokens; val begins with one, too. but: a folder that must not be among the
    texts, as a run writes its log to it. least: how many tokens it must have.

    UserError for what cannot be read, and for too few tokens."""
    root = Path(folder or DATA)
    for name, place in (("--data", data), ("--val_data", val_data)):
        if but and place and place not in SOURCES:
            among = Path(but).resolve().is_relative_to(Path(place).resolve())
            why = "its log would become text"
            need(not among, f"--out_dir must not lie inside {name} {place}: {why}")

    # The text to validate on may lie among the others, which are then without it.
    held_out = files_of("--val_data", val_data) if val_data else []
    if data in SOURCES:
        text = SOURCES[data](root)
    else:
        files = files_of("--data", data, held_out)
        text = Text(data, lambda: (pieces_in(files), None), files=files)
    kind = tokenizer or text.tokenizer
    target = root / folder_for(text, held_out, kind)

    # Of several processes that want the same, one prepares it.
    if not target.exists():
        with contextlib.closing(lock(Path(f"{target}.lock"), wait=True)):
            if not target.exists():
                train, val = text.parts()
                prepare(target, train, pieces_in(held_out) if val_data else val, kind)

    corpus = Corpus(target, text.name)
    if text_len:
        begin_with_a_text(corpus, text_len, bool(val_data))
    need(
        min(len(corpus.train), len(corpus.val)) >= least,
        f"--data {corpus.name} has {len(corpus.train)} + {len(corpus.val)} tokens to train and "
        f"validate on, too few for a window of {least}: take a longer text or a smaller --seq_len",
    )
    return corpus


def folder_for(text, held_out, kind):
    """A name that changes with the text, the tokenizer, and the files of both. UserError if
    there is no such tokenizer."""
    files = [*text.files, *held_out]
    if kind not in TOKENIZERS:
        parts = [Path(kind, name) for name in ("tokenizer.json", "tokenizer_config.json")]
        names = f"{', '.join(TOKENIZERS)} nor a folder with tokenizer.json"
        need(parts[0].is_file(), f"--tokenizer {kind}: neither {names}")
        files += [path for path in parts if path.is_file()]

    about = [FORMAT, len(held_out)]
    for path in files:
        found = path.stat()
        about += [os.path.realpath(path), found.st_size, found.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return f"{Path(text.name).stem[:60]}-{Path(kind).name[:40]}-{digest[:12]}"


def begin_with_a_text(corpus, text_len, apart):
    """Let val begin with a text, as the last tenth may begin amid one. apart: val is a text of its
    own. UserError unless all texts have text_len tokens."""
    train, val = len(corpus.train), len(corpus.val)
    whole = train % text_len == val % text_len == 0 if apart else (train + val) % text_len == 0
    need(
        whole,
        f"--data {corpus.name} has {train:,} + {val:,} tokens: that is no list of texts of "
        f"--text_len {text_len}",
    )
    corpus.val = corpus.val[-train % text_len :]


@dataclass
class Flags:
    data: str = flag("shakespeare", f"{', '.join(SOURCES)}, a .txt, a .jsonl, or their folder")
    val_data: str | None = flag(None, "text to validate on, by default the last tenth of --data")
    tokenizer: str | None = flag(None, "char, gpt2 [openwebtext] or a folder with tokenizer.json")
    data_dir: str | None = flag(None, "where tokens are kept, by default data")


def main(argv=None):
    a = Flags(**cli.parse(Flags, argv, __doc__))
    corpus = load(a.data, a.tokenizer, a.val_data, a.data_dir)
    n_train, n_val = len(corpus.train), len(corpus.val)
    print(f"{corpus.name}: {n_train:,} tokens to train on, {n_val:,} to validate")


if __name__ == "__main__":
    cli.run(main)
