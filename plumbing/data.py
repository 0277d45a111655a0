"""
Text to tokens on disk: train.bin, val.bin and meta.json, in a folder of their own.

    python -m plumbing.data --data openwebtext              GPT-2 tokens, about 17 GB on disk
    python -m plumbing.data --data FILE_OR_FOLDER --tokenizer gpt2

train_char.py calls load() with the same flags, so that running this is never needed, only possible.
A source of texts is a function and its entry in SOURCES. Texts are read, encoded and written piece
by piece: memory does not grow with the corpus.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import stat
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

from plumbing import cli
from plumbing.checkpoint import lock, write_file
from plumbing.cli import UserError, flag
from plumbing.tokenizers import TOKENIZERS, learn, tokenizer_of

DATA = Path(__file__).parents[1] / "data"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FORMAT = 2  # of the folder; one of another format is prepared again
PIECE = 2**20  # characters that are encoded at a time
LONGEST = 2**23  # without a place to cut; then anywhere
CHECKED = 2**27  # tokens whose checksum is looked at on each start: it takes a second at the most


@dataclass
class Text:
    """What a source gives. Pieces of text are (begins a document?, text)."""

    name: str  # what --data says for it
    source: dict  # what tells whether it has changed since its tokens were made
    parts: Callable  # () -> train, val: functions that return pieces; val None: a tenth of train
    tokenizer: str = "char"  # unless a flag says otherwise
    kept_as: str | None = None  # in a folder of that name, if not its own


# ---- sources -------------------------------------------------------------------------------------
# Each is called with the folder that holds all data.


def shakespeare(root):
    """tinyshakespeare, downloaded once; without network, a text that every Python has."""
    path = root / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=15) as response:
                raw = response.read()
        except (OSError, http.client.HTTPException) as e:  # no network, or the connection broke off
            print(f"no tinyshakespeare ({e}); training on Python's own documentation instead")
            return python_docs(root)
        if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
            raise UserError(f"the download of {SHAKESPEARE_URL} has a wrong checksum; try again")
        write_file(path, lambda temporary: temporary.write_bytes(raw))
    if checksum(path) != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path} has a wrong checksum: delete it to download it again, "
            f"or pass --data {path} to train on it as it is"
        )
    return Text("shakespeare", describe([path]), lambda: (pieces_in([path]), None))


def python_docs(root):
    """Python's own documentation, as help() shows it."""
    from pydoc_data.topics import topics

    def pieces():
        yield True, "\n\n".join(topics[name] for name in sorted(topics))

    return Text("python-docs", dict(data="python-docs"), lambda: (pieces, None))


def openwebtext(root):
    """OpenWebText from the Hugging Face hub, with the same split as nanoGPT's."""

    def parts():
        try:
            import datasets
        except ImportError:
            raise UserError(
                "--data openwebtext needs the package datasets: pip install it"
            ) from None
        try:
            whole = datasets.load_dataset("Skylion007/openwebtext", split="train")
        except Exception as e:  # whatever the hub, the network or the disk may say
            why = (str(e) or type(e).__name__).splitlines()[0]
            raise UserError(f"openwebtext could not be downloaded: {why}") from None
        split = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        return (
            lambda: ((True, row["text"]) for row in split["train"]),
            lambda: ((True, row["text"]) for row in split["test"]),
        )

    return Text("openwebtext", dict(data="openwebtext"), parts, "gpt2")


def automaton(root, both=False):
    """Films of a cellular automaton, rule 30 on a ring of 16 cells, 4 rows, a line each: 20,000 to
    train on and 2,000 to validate, made on the spot. The last row comes first: a cell follows from
    three in the line below it, and left to right is the wrong order. A film costs at least 16 ln 2
    = 11.09 nats, .1631 a character. both: only every other row, and each film in one of two
    directions, marked before each row: v, time runs down, or ^, up. 17 ln 2 = 11.78 nats, .1637."""

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
    return Text(name, dict(data=name), lambda: (lambda: films(20000, 1), lambda: films(2000, 2)))


SOURCES = {
    "shakespeare": shakespeare,
    "python-docs": python_docs,
    "openwebtext": openwebtext,
    "automaton": automaton,
    "automaton-both": lambda root: automaton(root, both=True),
}
TEXT_LEN = {"automaton": 4 * 17, "automaton-both": 4 * 18}  # of sources that are lists of texts


def text_at(data, held_out):
    """The text in a file or folder, without the files that --val_data names."""
    files = files_of(data, "--data", held_out)
    parts = lambda: (pieces_in(files), None)  # noqa: E731
    return Text(data, describe(files), parts, kept_as=kept_as(data))


def kept_as(data):
    """A name for a folder: the one of the text, and which of all texts of that name it is."""
    path = os.path.realpath(data)
    return f"{Path(path).stem[:60]}-{crc32(os.fsencode(path)):08x}"


# ---- files ---------------------------------------------------------------------------------------


def files_of(data, name, held_out=()):
    """The files that a flag names: one, or all .txt and .jsonl in a folder and below, by name; but
    not those of another flag, as nothing is to be in both."""
    try:
        files = texts_in(data) if stat.S_ISDIR(os.stat(data).st_mode) else [Path(data)]
        taken = {os.path.realpath(p) for p in held_out}
        files = [p for p in files if os.path.realpath(p) not in taken]
        for path in files:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UserError(f"{name} {path} is no regular file; save the text as one")
    except FileNotFoundError as e:
        raise UserError(f"{name} {e.filename}: no such file or folder") from None
    except OSError as e:
        raise UserError(f"{name}: cannot read {e.filename}: {e.strerror}") from None
    if not files:
        raise UserError(f"{name} {data} has no .txt or .jsonl files" + " of its own" * bool(taken))
    return files


def texts_in(folder):
    """Its .txt and .jsonl files, sorted. Hidden ones, such as those in .git, are not meant; links
    to folders are not followed."""

    def fail(e):
        raise e  # what cannot be read must not be left out silently

    found = []
    for here, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(here, name) for name in names if name[0] != "."]
    return sorted(p for p in found if p.suffix.lower() in (".txt", ".jsonl"))


def describe(files):
    """What tells whether files have changed since they were prepared."""
    stats = [(os.path.realpath(p), p.stat()) for p in files]
    return dict(
        files=[[name, st.st_size, st.st_mtime_ns] for name, st in stats],
        bytes=sum(st.st_size for _, st in stats),
    )


def pieces_in(files):
    """A function that returns a new generator of the pieces (begins a document?, text) of files."""

    def pieces():
        for path in files:
            try:
                yield from (read_jsonl if path.suffix.lower() == ".jsonl" else read_text)(path)
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8 text") from None
            except OSError as e:
                raise UserError(f"cannot read {path}: {e.strerror or e}") from None

    return pieces


def read_jsonl(path):
    with open(path, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    text = json.loads(line)["text"].encode("utf-8", "replace").decode()
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise UserError(
                        f'{path}, line {number}: not a JSON object with a string "text"'
                    ) from None
                yield True, text


def read_text(path):
    """A text file is one document, read in pieces. They end before a lone space or line end, where
    GPT-2's tokenizer always cuts: the tokens are those of the whole."""
    begins, rest = True, ""
    with open(path, encoding="utf-8-sig", newline="") as f:
        while more := f.read(PIECE):
            if "\0" in more:  # UTF-16, or no text at all
                raise UserError(f"{path} is not UTF-8 text")
            rest += more
            cut = re.match(r"(?s).*\S(?=[ \n]\S)", rest)
            end = cut.end() if cut else len(rest) if len(rest) >= LONGEST else 0
            if end:
                yield begins, rest[:end]
                begins, rest = False, rest[end:]
    if rest:
        yield begins, rest


# ---- tokens --------------------------------------------------------------------------------------


def batches(pieces, bar):
    """Lists of (goes a separator before it?, text) with PIECE characters or more."""
    batch, size = [], 0
    for n, (begins, text) in enumerate(pieces):
        bar.update(len(text.encode("utf-8", "replace")))
        batch.append((begins and n > 0, text))
        size += len(text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    yield batch


def write_tokens(path, pieces, tokenizer, bar):
    """The number of tokens written."""
    n = 0
    with open(path, "wb") as f:
        for batch in batches(pieces, bar):
            ids = tokenizer.encode_all(batch)
            f.write(ids.tobytes())
            n += len(ids)
    return n


def split_off(folder, n, itemsize):
    """Move the last tenth of train.bin's n tokens to val.bin; {part: tokens}."""
    counts = {"train": int(0.9 * n), "val": n - int(0.9 * n)}
    with open(folder / "train.bin", "r+b") as f, open(folder / "val.bin", "wb") as g:
        f.seek(itemsize * counts["train"])
        shutil.copyfileobj(f, g)
        f.truncate(itemsize * counts["train"])
    return counts


def checksum(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while raw := f.read(2**20):
            digest.update(raw)
    return digest.hexdigest()


@contextlib.contextmanager
def in_one_go(folder):
    """Another folder to write to, which takes the place of `folder` once all is done."""
    work, old = (folder.with_name(folder.name + ending) for ending in (".tmp", ".old"))
    clear = lambda: [shutil.rmtree(p, ignore_errors=True) for p in (work, old)]  # noqa: E731
    clear()  # a preparation that was killed left them
    work.mkdir(parents=True)
    try:
        yield work
        if folder.exists():  # tokens of a text that has changed
            os.rename(folder, old)
        os.rename(work, folder)
    finally:
        clear()


def prepare(work, source, train, val, kind):
    """Write {train,val}.bin and meta.json."""
    began, parts = time.perf_counter(), {"train": train, "val": val or (lambda: ())}
    progress = dict(total=source.get("bytes"), unit="B", unit_scale=True, delay=2)
    with tqdm(desc="vocabulary", **progress) as bar:
        texts = (batch for part in parts.values() for batch in batches(part(), bar))
        tokenizer = learn(kind, texts)
    with tqdm(desc="tokens", **progress) as bar:
        counts = {
            name: write_tokens(work / f"{name}.bin", part(), tokenizer, bar)
            for name, part in parts.items()
        }
    if val is None:
        counts = split_off(work, counts["train"], tokenizer.dtype.itemsize)
    meta = dict(source=source, tokenizer=tokenizer.state)
    meta |= dict(dtype=tokenizer.dtype.name, text_bytes=bar.n)
    for name, n in counts.items():
        meta[name] = dict(tokens=n, sha256=checksum(work / f"{name}.bin"))
    meta |= dict(sha256=digest(meta), seconds=round(time.perf_counter() - began, 1))
    (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def digest(meta):
    """A checksum of all tokens and what they mean."""
    both = [meta["train"]["sha256"], meta["val"]["sha256"], meta["tokenizer"], meta["dtype"]]
    return hashlib.sha256(json.dumps(both).encode()).hexdigest()


class Corpus:
    """train and val, arrays of tokens on disk; their tokenizer; a checksum of all three; the name
    of the data. UserError if files are missing, cut off or changed."""

    def __init__(self, folder, name):
        self.name = name
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            self.sha256 = meta["sha256"]
            if digest(meta) != self.sha256:
                raise ValueError
            self.train, self.val = (
                tokens_in(folder / f"{part}.bin", np.dtype(meta["dtype"]), **meta[part])
                for part in ("train", "val")
            )
        except PermissionError as e:
            raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"the tokens in {folder} are cut off or damaged; delete that folder, "
                "and they will be prepared again"
            ) from None
        self.tokenizer = tokenizer_of(**meta["tokenizer"])

    def __str__(self):
        n = f"{len(self.train):,} + {len(self.val):,} tokens"
        return f"{n}, {self.tokenizer.size:,} different"


def tokens_in(path, dtype, tokens, sha256):
    """A memory-mapped array; ValueError if it is not what was written."""
    if path.stat().st_size != dtype.itemsize * tokens:
        raise ValueError
    if tokens < CHECKED and checksum(path) != sha256:
        raise ValueError
    return np.memmap(path, dtype.newbyteorder("<"), "r") if tokens else np.empty(0, dtype)


# ---- all of it -----------------------------------------------------------------------------------


def load(data, tokenizer=None, val_data=None, folder=None, text_len=None, but=None, least=0):
    """The Corpus that these flags name, prepared if it is not there yet. text_len: it is a list of
    texts of so many tokens; val begins with one, too. but: a folder that must not be among the
    texts, as a run writes its log to it. least: how many tokens it must have."""
    root = Path(folder) if folder else DATA
    refuse_overlap(data, val_data, but)
    held_out = files_of(val_data, "--val_data") if val_data else []
    text = SOURCES[data](root) if data in SOURCES else text_at(data, held_out)
    kept, source, kind = text.kept_as or text.name, text.source, tokenizer or text.tokenizer
    if val_data:
        more = describe(held_out)
        source["bytes"] = source.get("bytes", 0) + more["bytes"]
        source["val_files"] = more["files"]
        kept += f"-{kept_as(val_data)[-8:]}"
    source |= dict(tokenizer=kind, format=FORMAT)
    if kind not in TOKENIZERS:
        path = Path(kind, "tokenizer.json")
        if not path.is_file():
            names = ", ".join(TOKENIZERS)
            raise UserError(f"--tokenizer {kind}: neither {names} nor a folder with {path.name}")
        source |= dict(tokenizer=describe([path])["files"])
    target = root / f"{kept}-{kind if kind in TOKENIZERS else kept_as(kind)}"
    try:
        if not is_current(target, source):
            with contextlib.closing(lock(Path(f"{target}.lock"), wait=True)):
                if not is_current(target, source):  # or another process has just done it
                    train, val = text.parts()
                    with in_one_go(target) as work:
                        val = pieces_in(held_out) if val_data else val
                        prepare(work, source, train, val, kind)
    except OSError as e:
        raise UserError(f"cannot prepare {target}: {e.strerror or e}") from None
    corpus = Corpus(target, text.name)
    if text_len:
        n = [len(corpus.train), len(corpus.val)]
        if (n[0] if val_data else sum(n)) % text_len or (val_data and n[1] % text_len):
            raise UserError(
                f"--data {corpus.name} has {n[0]:,} + {n[1]:,} tokens: that is no list of texts of "
                f"--text_len {text_len}"
            )
        corpus.val = corpus.val[-n[0] % text_len :]  # the last tenth may begin amid a text
    if min(len(corpus.train), len(corpus.val)) < least:
        raise UserError(
            f"--data {corpus.name} has {len(corpus.train)} + {len(corpus.val)} tokens to train and "
            f"validate on, too few for a window of {least}: take a longer text or a smaller "
            "--seq_len"
        )
    return corpus


def refuse_overlap(data, val_data, but):
    """Nothing is to be text twice, nor the log of the run itself."""
    if val_data and data not in SOURCES and os.path.realpath(data) == os.path.realpath(val_data):
        raise UserError("--val_data is the same as --data; without it, the last tenth is kept back")
    above = [Path(os.path.realpath(but)), *Path(os.path.realpath(but)).parents] if but else []
    for name, text in (("--data", data), ("--val_data", val_data)):
        if text and text not in SOURCES and Path(os.path.realpath(text)) in above:
            raise UserError(
                f"--out_dir must not lie inside {name} {text}: its log would become text"
            )


def is_current(folder, source):
    """Whether the folder's tokens come from these files as they are now. Damage is not judged here:
    it is for the user to see."""
    if not folder.exists():
        return False
    try:
        return json.loads((folder / "meta.json").read_text("utf-8"))["source"] == source
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder} holds no prepared tokens; delete it or move it away") from None


@dataclass
class Flags:
    data: str = flag("shakespeare", f"{', '.join(SOURCES)}, a .txt, a .jsonl, or their folder")
    val_data: str | None = flag(None, "text to validate on, by default the last tenth of --data")
    tokenizer: str | None = flag(
        None, "char, gpt2 [for openwebtext] or a folder with tokenizer.json"
    )
    data_dir: str | None = flag(None, "where tokens are kept, by default data")


def main(argv=None):
    a = Flags(**cli.parse(Flags, argv, __doc__))
    corpus = load(a.data, a.tokenizer, a.val_data, a.data_dir)
    n_train, n_val = len(corpus.train), len(corpus.val)
    print(f"{corpus.name}: {n_train:,} tokens to train on, {n_val:,} to validate")


if __name__ == "__main__":
    cli.run(main)
