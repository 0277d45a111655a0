"""
Text to tokens on disk: train.bin, val.bin (uint16) and meta.json, in a folder of their own.

    python prepare.py --data openwebtext                    GPT-2 tokens, about 17 GB on disk
    python prepare.py --data FILE_OR_FOLDER --tokenizer gpt2

train_char.py calls load() with the same flags, so that running this is never needed, only possible.
Texts are read, encoded and written piece by piece: memory does not grow with the corpus.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.request
from argparse import RawDescriptionHelpFormatter
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

import sample
from sample import UserError, tokenizer_of, write_file

DATA = Path(__file__).parent / "data"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PIECE = 2**20  # characters that are encoded at a time
LONGEST = 2**23  # without a place to cut; then anywhere


# ---- texts ---------------------------------------------------------------------------------------
# Each source is a generator of pieces (begins a document?, text).


def shakespeare(folder):
    """The path of tinyshakespeare, downloaded once; None without network."""
    path = folder / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=15) as response:
                raw = response.read()
        except (OSError, http.client.HTTPException) as e:  # no network, or the connection broke off
            print(f"no tinyshakespeare ({e}); training on Python's own documentation instead")
            return None
        if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
            raise UserError(f"the download of {SHAKESPEARE_URL} has a wrong checksum; try again")
        write_file(path, lambda temporary: temporary.write_bytes(raw))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path} has a wrong checksum: delete it to download it again, "
            f"or pass --data {path} to train on it as it is"
        )
    return path


def python_docs():
    """A text that comes with every Python, for machines without network."""
    from pydoc_data.topics import topics

    yield True, "\n\n".join(topics[name] for name in sorted(topics))


def openwebtext():
    """OpenWebText from the Hugging Face hub: two sources, the same split as nanoGPT's."""
    try:
        import datasets
    except ImportError:
        raise UserError("--data openwebtext needs the package datasets: pip install it") from None
    try:
        whole = datasets.load_dataset("Skylion007/openwebtext", split="train")
    except Exception as e:  # whatever the hub, the network or the disk may say
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"openwebtext could not be downloaded: {why}") from None
    parts = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return [
        lambda name=name: ((True, row["text"]) for row in parts[name]) for name in ("train", "test")
    ]


def files_of(data, flag="--data", but=()):
    """The files that a flag names: one, or all .txt and .jsonl in a folder and below, by name; but
    not those of another flag, as nothing is to be in both."""
    path = Path(data)
    if not path.exists():
        raise UserError(f"{flag} {data}: no such file or folder")
    inside = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    taken = {p.resolve() for p in but}
    files = [p for p in (inside if path.is_dir() else [path]) if p.resolve() not in taken]
    if not files:
        raise UserError(f"{flag} {data} has no .txt or .jsonl files" + " of its own" * bool(taken))
    return files


def pieces_of(files):
    for path in files:
        try:
            yield from read_jsonl(path) if path.suffix == ".jsonl" else read_text(path)
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror or e}") from None


def read_jsonl(path):
    with open(path, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    text = json.loads(line)["text"].encode("utf-8", "replace").decode()
                except (ValueError, KeyError, TypeError, AttributeError):
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
        bar.update(len(text.encode()))
        batch.append((begins and n > 0, text))
        size += len(text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    yield batch


def encode(pieces, tokenizer, bar):
    """uint16 arrays of tokens, in order. Several threads encode a batch each: as fast as processes
    would be, since numpy and tiktoken let go of Python's lock, and nothing is left behind when this
    process is killed. No more than a few batches are in memory."""
    workers = min(os.cpu_count() or 1, 32)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        try:
            for batch in batches(pieces, bar):
                waiting.append(pool.submit(tokenizer.encode_all, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def write_tokens(path, arrays):
    """The number of tokens written."""
    n = 0
    with open(path, "wb") as f:
        for ids in arrays:
            f.write(ids.astype("<u2").tobytes())
            n += len(ids)
    return n


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while raw := f.read(2**20):
            digest.update(raw)
    return digest.hexdigest()


@contextlib.contextmanager
def only_one(path):
    """One process at a time; the others wait. The lock goes with its process, whatever ends it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        with contextlib.suppress(OSError):  # some network drives have no locks
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def prepare(folder, source, train, val, tokenizer):
    """Write folder/{train,val}.bin and meta.json, in a folder of another name until all is done.
    train and val are functions that return pieces; val None takes the last tenth of train."""
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)  # what an interrupted preparation left
    work.mkdir(parents=True)
    began, size = time.perf_counter(), source.get("bytes")
    if tokenizer == "char":
        characters = set()
        with tqdm(total=size, unit="B", unit_scale=True, desc="characters", delay=2) as bar:
            for part in (train, val):
                for batch in batches(part(), bar) if part else ():
                    for separate, text in batch:
                        characters.update(text, "\n" if separate else "")
        vocab = sorted(characters)
        if len(vocab) > 2**16:
            raise UserError(f"{len(vocab)} different characters, more than 65,536; use gpt2")
    else:
        vocab = tokenizer
    tokenizer = tokenizer_of(vocab)
    counts = {}
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokens", delay=2) as bar:
        for name, part in (("train", train), ("val", val)):
            if part:
                counts[name] = write_tokens(work / f"{name}.bin", encode(part(), tokenizer, bar))
    if val is None:
        n = counts["train"]
        counts = {"train": int(0.9 * n), "val": n - int(0.9 * n)}
        with open(work / "train.bin", "r+b") as f, open(work / "val.bin", "wb") as g:
            f.seek(2 * counts["train"])
            shutil.copyfileobj(f, g)
            f.truncate(2 * counts["train"])
    meta = dict(source=source, vocab=vocab, text_bytes=bar.n)
    for name, n in counts.items():
        meta[name] = dict(tokens=n, sha256=sha256(work / f"{name}.bin"))
    meta["seconds"] = round(time.perf_counter() - began, 1)
    (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if folder.exists():  # tokens of a text that has changed
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    os.rename(work, folder)


class Corpus:
    """train and val, arrays of uint16 tokens on disk; vocab, a list of characters or "gpt2"; and a
    checksum of both. UserError if files are missing, cut off or changed."""

    def __init__(self, folder):
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            self.vocab = meta["vocab"]
            digests = []
            for name in ("train", "val"):
                path, n = folder / f"{name}.bin", meta[name]["tokens"]
                if path.stat().st_size != 2 * n:
                    raise ValueError
                if n < 2**27 and sha256(path) != meta[name]["sha256"]:  # a second at the most
                    raise ValueError
                tokens = np.memmap(path, "<u2", "r") if n else np.empty(0, np.uint16)
                setattr(self, name, tokens)
                digests.append(meta[name]["sha256"])
            self.sha256 = hashlib.sha256("".join(digests).encode()).hexdigest()
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"the tokens in {folder} are cut off or damaged; delete that folder, "
                "and they will be prepared again"
            ) from None


def describe(files):
    """What tells whether files have changed since they were prepared."""
    stats = [(str(p.resolve()), p.stat()) for p in files]
    return dict(
        files=[[name, st.st_size, st.st_mtime_ns] for name, st in stats],
        bytes=sum(st.st_size for _, st in stats),
    )


def load(data, tokenizer=None, val_data=None, folder=None):
    """The Corpus that these flags name, prepared if it is not there yet, and the name of the data
    that was taken in the end: shakespeare without network becomes python-docs."""
    root = Path(folder) if folder else DATA
    tokenizer = tokenizer or ("gpt2" if data == "openwebtext" else "char")
    val_files = files_of(val_data, "--val_data") if val_data else []
    val = (lambda: pieces_of(val_files)) if val_files else None
    if data == "shakespeare":
        path = shakespeare(root)
        data = "python-docs" if path is None else data
    if data == "python-docs":
        name, source, train = data, dict(data=data), python_docs
    elif data == "openwebtext":
        name, source, train = data, dict(data=data), None
    else:
        files = [path] if data == "shakespeare" else files_of(data, but=val_files)
        source, train = describe(files), lambda: pieces_of(files)
        name = data
        if data != "shakespeare":
            name = f"{Path(data).resolve().stem}-{crc32(str(Path(data).resolve()).encode()):08x}"
    if val_data:
        more = describe(val_files)
        source["bytes"] = source.get("bytes", 0) + more["bytes"]
        source["val_files"] = more["files"]
        name += f"-{crc32(str(Path(val_data).resolve()).encode()):08x}"
    target = root / (name if tokenizer == "gpt2" else f"{name}-{tokenizer}")
    source |= dict(tokenizer=tokenizer)
    try:
        if not is_current(target, source):
            with only_one(target.with_name(target.name + ".lock")):
                if not is_current(target, source):  # or another process has just done it
                    if data == "openwebtext":
                        train, test = openwebtext()
                        val = val or test
                    prepare(target, source, train, val, tokenizer)
    except OSError as e:
        raise UserError(f"cannot prepare {target}: {e.strerror or e}") from None
    return Corpus(target), data


def is_current(folder, source):
    """Whether the folder's tokens come from these files as they are now. Damage is not judged here:
    it is for the user to see."""
    if not folder.exists():
        return False
    try:
        return json.loads((folder / "meta.json").read_text("utf-8"))["source"] == source
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} holds no prepared tokens; delete it or move it away") from None


def parse(argv):
    p = sample.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--data", default="shakespeare", help="as train_char.py")
    p.add_argument("--val_data", help="as train_char.py")
    p.add_argument("--tokenizer", choices=("char", "gpt2"), help="as train_char.py")
    p.add_argument("--data_dir", help="as train_char.py")
    return p.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    corpus, name = load(a.data, a.tokenizer, a.val_data, a.data_dir)
    print(f"{name}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate")


if __name__ == "__main__":
    sample.run(main)
