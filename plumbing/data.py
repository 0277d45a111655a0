"""
Text to tokens on disk: tokens.bin and meta.json, in a folder of their own.

A text is a list of documents: a .txt file is one, and each line of a .jsonl file. They are
read, encoded and written a few at a time, so that a corpus may be larger than the memory. The
folder's name holds a hash of the files' names, sizes and times, so that a text that has
changed gets a folder anew.

Of several documents each stands behind the end-of-text token, if there is one, the first too.
"""

import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.checkpoint import lock, write_file, write_text
from plumbing.cli import UserError, need
from plumbing.films import CELLS, ROWS, films
from plumbing.processes import RANK
from plumbing.tokenizers import TOKENIZERS, Tokenizer, clean, learn, place, tokenizer_of

DATA = Path(__file__).parents[1] / "data"
SHAKESPEARE = "tinyshakespeare/input.txt"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FORMAT = 5  # of the folder; one of another format is prepared again
BATCH = 256  # documents that are encoded at a time, on all cores
JSON = (".jsonl", ".ndjson", ".json")
NO_TEXT = (".gz", ".zip", ".xz", ".bz2", ".zst", ".csv", ".tsv", ".parquet", ".pdf", ".docx")


# ---- sources -------------------------------------------------------------------------------
# Each is called with the folder that holds all data. It returns two functions, for train and
# for val, each of which returns an iterable of documents. Instead of the second, None stands
# for the last tenth.
def shakespeare(root):
    return functools.partial(documents_in, [root / SHAKESPEARE]), None


def python_docs(root):
    """Python's own documentation, as help() shows it."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    return lambda: [whole], None


def openwebtext(root):
    """OpenWebText from the Hugging Face hub, with the same split as nanoGPT's. Its tokens
    take about 17 GB on disk."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("--data openwebtext needs a package: pip install datasets") from None
    try:
        # The main branch holds a script, which datasets 4 and later do not run.
        name, parquet = "Skylion007/openwebtext", "refs/convert/parquet"
        whole = load_dataset(name, revision=parquet, split="train")
    except Exception as e:  # whatever the hub, the network or the disk may say
        why = str(e).partition("\n")[0]
        raise UserError(f"openwebtext could not be downloaded: {why}") from None

    split = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    texts = lambda part: (clean(row["text"]) for row in split[part])  # noqa: E731
    return functools.partial(texts, "train"), functools.partial(texts, "test")


def automaton(root, both=False):
    """Films that are made on the spot: 20,000 to train on and 2,000 to validate."""
    texts = lambda n, seed: ["".join(films(n, seed, both))]  # noqa: E731
    return functools.partial(texts, 20000, 1), functools.partial(texts, 2000, 2)


SOURCES = {
    "shakespeare": shakespeare,
    "python-docs": python_docs,
    "openwebtext": openwebtext,
    "automaton": automaton,
    "automaton-both": functools.partial(automaton, both=True),
}
# Of a film: a row ends with a line end, and may begin with a mark.
TEXT_LEN = {"automaton": ROWS * (CELLS + 1), "automaton-both": ROWS * (CELLS + 2)}


def download_shakespeare(root):
    """Whether tinyshakespeare is there, downloaded once. Without network it is not."""
    path = root / SHAKESPEARE
    if path.is_file():
        return True
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=15) as response:
            raw = response.read()
    except (OSError, http.client.HTTPException) as e:  # no network, or it broke off
        print(f"no tinyshakespeare ({e}); training on Python's own documentation instead")
        return False

    right = hashlib.sha256(raw).hexdigest() == SHAKESPEARE_SHA256
    need(right, f"the download of {SHAKESPEARE_URL} has a wrong checksum; try again")
    write_file(path, lambda temporary: temporary.write_bytes(raw))
    return True


# ---- files ---------------------------------------------------------------------------------
def files_of(name, data, but=()):
    """The files that the flag `name` means: one, or all texts in a folder and below, sorted,
    without hidden ones. Others there are named. but: files and folders that are no part of
    it, such as the text to validate on. UserError if there are none."""
    data = Path(data)
    need(data.exists(), f"{name} {data}: no such file or folder in {Path.cwd()}")
    files = [data]
    if data.is_dir():
        shown = (p for p in data.rglob("*") if "/." not in f"/{p.relative_to(data).as_posix()}")
        files = sorted(p for p in shown if not p.is_dir())

    real = {path: Path(os.path.realpath(path)) for path in (*files, *but)}
    files = [p for p in files if not any(real[p].is_relative_to(real[q]) for q in but)]
    texts = [p for p in files if p.suffix.lower() in (".txt", *JSON) or p == data]
    out = [p.name for p in files if p not in texts]
    if out and RANK == 0:
        print(f"{name} {data}: {len(out)} files left out, no .txt or JSON:", *out[:9])
    apart = "those of --val_data and --out_dir do not count"
    need(texts, f"{name} {data} has no .txt or .jsonl files ({apart})")
    return texts


def documents_in(files):
    """The documents in these files, one by one."""
    for path in files:
        end = path.suffix.lower()
        how = 'unpack it, or write a .jsonl with lines like {"text": ".."}'
        need(end not in NO_TEXT, f"{path} is no plain text: {how}")
        try:
            with open(str(path), encoding="utf-8-sig", errors="surrogateescape") as f:
                yield from read_json(f) if end in JSON else [sound(f.read(), f)]
        except OSError as e:  # in the middle of a file, it does not name the file
            raise UserError(f"cannot read {path}: {e.strerror}") from None


def sound(text, f, line=1):
    """The text, clean, that begins at this line of file f. UserError for a NUL, or a byte
    that is no UTF-8, which is a lone surrogate here."""
    bad = re.search("[\0\ud800-\udfff]", text)
    if not bad:
        return clean(text)

    below, column = place(text, bad.start())
    how = "tr -d '\\0' <" if bad[0] == "\0" else "iconv -f cp1252 -t utf-8"
    if re.match("\udcff\udcfe|\udcfe\udcff", text) or text.count("\0") > len(text) / 4:
        how = "iconv -f utf-16 -t utf-8"
    at = f"{f.name}, line {line + below - 1}, character {column}"
    raise UserError(f"{at}: no UTF-8 text; perhaps {how} {f.name} > new.txt makes it one")


def read_json(f):
    """The string "text" of each object: one a line, or in a .json also an array of them."""
    what = "line"
    rows = f
    if f.name.lower().endswith(".json"):
        with contextlib.suppress(json.JSONDecodeError):
            whole = json.loads(sound(f.read(), f))
            rows = whole if isinstance(whole, list) else [whole]
            what = "object"
        f.seek(0)

    for number, row in enumerate(rows, 1):
        try:
            if what == "object":
                yield clean(row["text"])
            elif row.strip():
                yield clean(json.loads(sound(row, f, number))["text"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            message = f'{f.name}, {what} {number}: not a JSON object with a string "text"'
            raise UserError(message) from None


# ---- tokens --------------------------------------------------------------------------------
def batches(documents, what):
    """Lists of BATCH documents."""
    bar = iter(tqdm(documents, what, unit=" documents", delay=2, disable=None))
    while batch := list(itertools.islice(bar, BATCH)):
        yield batch


def prepare(target, train, val, kind, separate):
    """Make the folder with tokens.bin and meta.json: all of it, or nothing."""
    work = Path(f"{target}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # a preparation that was killed left it
    work.mkdir(parents=True)
    try:
        parts = [train, val] if val else [train]
        texts = (batch for part in parts for batch in batches(part(), "vocabulary"))
        tokenizer = learn(kind, texts)
        n_train, *rest = write_tokens(work / "tokens.bin", parts, tokenizer, separate)
        if not rest:
            n_train = int(0.9 * n_train)

        sha256 = checksum(work, tokenizer, n_train)
        meta = json.dumps(dict(n_train=n_train, tokenizer=tokenizer.state, sha256=sha256))
        write_text(work / "meta.json", meta)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_tokens(path, parts, tokenizer, separate):
    """The tokens of all parts, one after another. Returns how many each part has. separate:
    an end of text, if there is such a token, stands before the first document, too."""
    counts = []
    separate = separate and tokenizer.end is not None
    with open(path, "wb") as f:
        for part in parts:
            begin = f.tell()
            for batch in batches(part(), "tokens"):
                if separate or f.tell() > begin:
                    f.write(tokenizer.separator().tobytes())
                f.write(tokenizer.encode_all(batch).tobytes())
            counts.append((f.tell() - begin) // tokenizer.dtype.itemsize)

        # On disk before meta.json is: a machine may stop at any time.
        f.flush()
        os.fsync(f.fileno())
    return counts


def tokens_in(folder, dtype):
    """A memory-mapped array, as far as a file that is empty can be one."""
    path = folder / "tokens.bin"
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def checksum(folder, tokenizer, n_train):
    """Of the tokens to train on, those to validate on, and what they mean."""
    halves = np.split(tokens_in(folder, tokenizer.dtype), [n_train])
    digests = [hashlib.sha256(half).hexdigest() for half in halves]
    whole = json.dumps([*digests, tokenizer.state, tokenizer.dtype.name])
    return hashlib.sha256(whole.encode()).hexdigest()


class Corpus:
    """train and val, arrays of tokens on disk; their tokenizer; a checksum of all three;
    the name of the data; separate, whether documents begin behind the end of a text."""

    def __init__(self, folder, name):
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        self.name = name
        self.sha256 = meta["sha256"]
        self.tokenizer = tokenizer_of(**meta["tokenizer"])
        tokens = tokens_in(folder, self.tokenizer.dtype)
        self.train = tokens[: meta["n_train"]]
        self.val = tokens[meta["n_train"] :]
        self.separate = bool(len(tokens)) and tokens[0].item() == self.tokenizer.end

    def __str__(self):
        n = f"{len(self.train):,} + {len(self.val):,} tokens"
        return f"{n}, {self.tokenizer.size:,} different"


# ---- all of it -----------------------------------------------------------------------------
def load(data, tokenizer=None, val_data=None, folder=None, text_len=None, but=None, least=0):
    """The Corpus that these flags name, prepared if it is not there yet. tokenizer: a name, a
    folder or a Tokenizer. text_len: it is a list of texts of so many tokens; val begins with
    one, too. but: a folder that is not among the texts, as a run writes its log to it. least:
    how many tokens it must have.

    UserError for what cannot be read, and for too few tokens."""
    root = Path(folder or DATA)
    if data == "shakespeare" and not download_shakespeare(root):
        data = "python-docs"

    # The text to validate on may lie among the others, which are then without it.
    apart = [but] if but else []
    held_out = files_of("--val_data", val_data, apart) if val_data else []
    files = [] if data in SOURCES else files_of("--data", data, apart + held_out)
    kind = tokenizer or ("gpt2" if data == "openwebtext" else "char")
    target = root / folder_for(data, kind, files, held_out)
    single = [Path(data)] == files and Path(data).suffix.lower() not in JSON
    separate = data == "openwebtext" if data in SOURCES else not single

    # Of several processes that want the same, one prepares it.
    if not target.exists():
        with contextlib.closing(lock(Path(f"{target}.lock"), wait=True)):
            if not target.exists():
                train, val = functools.partial(documents_in, files), None
                if data in SOURCES:
                    train, val = SOURCES[data](root)
                if held_out:
                    val = functools.partial(documents_in, held_out)
                prepare(target, train, val, kind, separate)

    corpus = Corpus(target, data)
    if text_len and not held_out:  # the last tenth may begin amid a text
        corpus.val = corpus.val[-len(corpus.train) % text_len :]
    n_train, n_val = len(corpus.train), len(corpus.val)
    need(
        min(n_train, n_val) >= least,
        f"--data {data} has {n_train} + {n_val} tokens to train and validate on, too few for "
        f"a window of {least}: take a longer text or a smaller --seq_len",
    )
    return corpus


def folder_for(data, kind, files, held_out):
    """A name that changes with the text, the tokenizer, and the files of both. UserError if
    there is no such tokenizer."""
    parts = []
    about = [FORMAT, len(held_out)]
    if isinstance(kind, Tokenizer):
        about.append(kind.state)
        kind = kind.kind
    elif kind not in TOKENIZERS:
        names = f"{', '.join(TOKENIZERS)} nor a folder with tokenizer.json"
        parts = sorted(Path(kind).glob("tokenizer*.json"))
        how = "the package transformers writes one: AutoTokenizer.save_pretrained(FOLDER)"
        need(Path(kind, "tokenizer.json") in parts, f"--tokenizer {kind}: neither {names}; {how}")

    for path in (*files, *held_out, *parts):
        found = path.stat()
        about += [os.path.realpath(path), found.st_size, found.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return f"{Path(data).stem[:60]}-{Path(kind).name[:40]}-{digest[:12]}"
