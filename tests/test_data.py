"""plumbing/data.py, tokenizers.py and films.py: the right tokens, and nothing half-written,
ever.

The tokenizer here has GPT-2's rule for cutting text into words and a few merges of its own,
so that no vocabulary needs to be there.
"""

import errno
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from plumbing import data, tokenizers
from plumbing.cli import UserError
from plumbing.films import films

ROOT = Path(__file__).parents[1]
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MERGES = [b"\n\n", b" t", b" th", b" the", b"ab", b" a"]
RANKS = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(MERGES)}
TOY = tiktoken.Encoding(
    "toy", pat_str=WORDS, mergeable_ranks=RANKS, special_tokens={"<|endoftext|>": 300}
)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: TOY)
    return tmp_path


def load(name, tokenizer=None, **kw):
    return data.load(name, tokenizer, folder="tokens", **kw)


def tokens(corpus):
    return np.concatenate((corpus.train, corpus.val)).tolist()


def text_of(corpus, ids=None):
    return "".join(corpus.tokenizer.pieces(tokens(corpus) if ids is None else ids))


def fails(message, *a, **kw):
    with pytest.raises(UserError, match=message) as e:
        load(*a, **kw)
    assert "\n" not in str(e.value)


# ---- the right tokens ----------------------------------------------------------------------


def test_tokens_are_those_of_the_text():
    """It comes back from them, and its last tenth is to validate on."""
    text = "the ab's 7 é — 日本\r\n\n  the\t\x1c" * 30
    Path("a.txt").write_bytes(text.encode())
    corpus = load("a.txt", "gpt2")
    text = text.replace("\r\n", "\n")
    assert tokens(corpus) == TOY.encode_ordinary(text) and text_of(corpus) == text
    assert len(corpus.train) == int(0.9 * len(tokens(corpus)))
    gpt2 = corpus.tokenizer
    assert (gpt2.kind, gpt2.size, gpt2.end, gpt2.unit) == ("gpt2", 301, 300, "nats/token")

    corpus = load("a.txt")
    assert text_of(corpus) == text and corpus.tokenizer.vocab == sorted(set(text))
    assert corpus.tokenizer.unit == "nats/char" and corpus.tokenizer.end is None


@pytest.mark.parametrize("size", [1, 2, 256])
def test_documents_are_separated(monkeypatch, size):
    """Lines of a .jsonl, and files of a folder in the order of their names: the end-of-text
    token stands before each document, or a line end between them, and nowhere else. What
    looks like it is plain text."""
    monkeypatch.setattr(data, "BATCH", size)
    Path("docs/deep").mkdir(parents=True)
    Path("docs/.git").mkdir()
    Path("docs/b.TXT").write_text("the the")
    Path("docs/deep/c.txt").write_text("ab")
    for ignored in ("docs/a.md", "docs/.git/z.txt", "docs/._b.txt"):
        Path(ignored).write_bytes(b"\xff")
    texts = ["a<|endoftext|>b", "", "\ud800 the"]
    lines = [json.dumps({"text": text, "id": 1}) + "\n" for text in texts]
    Path("docs/a.JsonL").write_text("".join(lines))

    texts = ["a<|endoftext|>b", "", "? the", "the the", "ab"]
    want = []
    for text in texts:
        want += [300, *TOY.encode_ordinary(text)]
    assert tokens(load("docs", "gpt2")) == want
    assert text_of(load("docs", "char")) == "\n".join(texts)


def test_validation_from_another_text():
    """It may lie among the others, and is not trained on. Nor is the log of the run."""
    Path("docs/out").mkdir(parents=True)
    Path("docs/a.txt").write_text("the ab" * 50)
    Path("docs/val.txt").write_text("xyz" * 5)
    Path("docs/out/log.jsonl").write_text('{"step": 1}\n')
    Path("link").symlink_to("docs")
    for place in ("docs/a.txt", "docs", "link"):
        corpus = load(place, val_data="docs/val.txt", but="docs/out")
        assert corpus.tokenizer.vocab == sorted(set("\nthe abxyz"))
        assert (len(corpus.train), text_of(corpus, corpus.val)) == (300, "xyz" * 5)
    assert load("docs", but="docs/out").sha256 != corpus.sha256  # both are kept
    fails("--val_data nowhere: no such file", "docs", val_data="nowhere")
    for same in ("docs", "./docs", "link", "docs/a.txt"):
        fails("has no .txt or .jsonl files .those", "docs/a.txt", val_data=same, but="docs/out")


def test_many_characters_need_four_bytes():
    """Two for each token are enough up to 65,536 of them."""
    vocab = [chr(i) for i in (10, *range(0x20, 0xD800), *range(0xE000, 0x1F000))]
    for n, name in (2**16, "uint16"), (2**16 + 1, "uint32"):
        Path("a.txt").write_bytes("".join(vocab[:n]).encode())
        corpus = load("a.txt")
        assert corpus.train.dtype == name and corpus.tokenizer.size == n
        assert tokens(corpus) == list(range(n))


def test_openwebtext(work, monkeypatch):
    """With the real package, and a folder in place of the hub: nanoGPT's split, GPT-2's
    tokens, a separator between documents."""
    monkeypatch.setenv("HF_HOME", str(work / "cache"))
    datasets = pytest.importorskip("datasets")
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", work / "cache")
    texts = [f"the {i} ab\n" * (i % 3) for i in range(2500)]
    folder = Path("Skylion007/openwebtext/plain_text/train")
    folder.mkdir(parents=True)
    for i in range(2):  # as the hub has it, in several files
        rows = arrow.table({"text": texts[i::2]})
        arrow.parquet.write_table(rows, folder / f"000{i}.parquet")

    corpus = load("openwebtext")
    order = texts[::2] + texts[1::2]
    split = datasets.Dataset.from_dict({"text": order}).train_test_split(0.0005, seed=2357)
    for ids, part in (corpus.train, "train"), (corpus.val, "test"):
        want = [[300, *TOY.encode_ordinary(text)] for text in split[part]["text"]]
        assert ids.tolist() == list(itertools.chain.from_iterable(want))
    assert corpus.tokenizer.kind == "gpt2" and len(corpus.val) > 2

    Path("mine.txt").write_text("ab ab")
    mine = load("openwebtext", val_data="mine.txt")
    assert mine.train.tolist() == corpus.train.tolist()
    assert mine.val.tolist() == [300, *TOY.encode("ab ab")]


def test_shakespeare(monkeypatch):
    """Downloaded once, and checked. Without network Python's own text is taken."""
    downloads = [b"First Citizen", b"half of it"]
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(downloads.pop()))
    digest = hashlib.sha256(b"First Citizen").hexdigest()
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", digest)
    fails("wrong checksum; try again", "shakespeare")
    assert not Path("tokens").exists()
    for _ in range(2):
        corpus = load("shakespeare")
        assert corpus.name == "shakespeare" and text_of(corpus) == "First Citizen"
    assert downloads == []


def test_tokenizers_from_what_json_kept():
    for kind, vocab in (("char", ["a", "b", "—"]), ("gpt2", None)):
        tokenizer = tokenizers.tokenizer_of(**json.loads(json.dumps(dict(kind=kind, vocab=vocab))))
        assert tokenizer.state == dict(kind=kind, vocab=vocab)
        ids = tokenizer.encode("ab—")
        assert ids.dtype == np.uint16 and "".join(tokenizer.pieces(ids.tolist())) == "ab—"
        assert tokenizer.encode("").tolist() == tokenizer.pieces([]) == []
    with pytest.raises(UserError, match="'z' .first in line 1, character 2. does not occur"):
        tokenizers.Characters(["a"]).encode("az")


def test_a_character_of_several_tokens():
    """It stands with the last of them; what is no character at all shows as such."""
    ids = list("a€b".encode())
    assert tokenizers.GPT2().pieces(ids) == ["a", "", "", "€", "b"]
    assert tokenizers.GPT2().pieces(ids[:3]) == ["a", "", "�"]
    assert tokenizers.GPT2().encode("a\ud800").tolist() == TOY.encode_ordinary("a?")


# ---- nothing half-written ------------------------------------------------------------------


def test_kept_until_the_text_changes():
    Path("a.txt").write_text("the ab" * 50)
    first = load("a.txt")
    [made] = Path("tokens").glob("a-*/tokens.bin")
    before = made.stat().st_mtime_ns
    for name in ("a.txt", "./a.txt", os.path.realpath("a.txt")):
        assert load(name).sha256 == first.sha256 and made.stat().st_mtime_ns == before
    Path("a.txt").write_text("the ba" * 50)
    assert load("a.txt").sha256 != first.sha256


def test_killed_preparation_starts_again():
    """kill -9 in the middle of it: no folder of tokens, and the next start makes the same
    ones as a first one. Here each document takes its time."""
    lines = [json.dumps({"text": f"to be {i}"}) + "\n" for i in range(1000)]
    Path("a.jsonl").write_text("".join(lines))
    want = load("a.jsonl").sha256
    slow = "import time; from plumbing import data; real = data.read_json; data.BATCH = 1; "
    slow += "data.read_json = lambda f: (time.sleep(.01) or text for text in real(f)); "
    argv = [sys.executable, "-c", f"{slow} data.load('a.jsonl', folder='again')"]
    run = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while run.poll() is None and not list(Path("again").glob("*.tmp")):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert [p.suffix for p in Path("again").iterdir() if p.is_dir()] == [".tmp"]

    assert data.load("a.jsonl", folder="again").sha256 == want
    assert not list(Path("again").glob("*.tmp"))


# ---- texts that are none -------------------------------------------------------------------


def test_a_file_that_cannot_be_read(monkeypatch):
    """Also in its middle, the file is named: /proc/self/mem opens, and its first byte is
    none."""
    Path("mem.txt").symlink_to("/proc/self/mem")
    if not Path("mem.txt").exists():
        pytest.skip("no file that breaks off")
    fails(f"cannot read mem.txt: {os.strerror(errno.EIO)}", "mem.txt")


# ---- films ---------------------------------------------------------------------------------

CELLS = ("###", "##.", "#.#", "#..", ".##", ".#.", "..#", "...")
RULE_30 = dict(zip(CELLS, "...####.", strict=True))


def next_row(row):
    return "".join(RULE_30[row[i - 1] + row[i] + row[(i + 1) % len(row)]] for i in range(len(row)))


def test_an_automaton_runs_upwards():
    drawn = list(films(2000, 1))
    for film in drawn[:200]:
        *rows, end = film.split("\n")
        assert [len(row) for row in rows] == [16] * 4 and end == ""
        assert all(late == next_row(early) for late, early in itertools.pairwise(rows))
    first = [film[-17:-1] for film in drawn]
    assert len(set(first)) > 1900  # of 65,536
    assert 0.48 < "".join(first).count("#") / (16 * 2000) < 0.52


def test_an_automaton_in_both_directions():
    down = 0
    for film in films(400, 1, both=True):
        lines = film.splitlines()
        [mark] = {line[0] for line in lines}
        assert mark in "v^"
        rows = [line[1:] for line in (lines if mark == "v" else lines[::-1])]
        assert all(next_row(next_row(a)) == b for a, b in itertools.pairwise(rows))
        down += mark == "v"
    assert 150 < down < 250


@pytest.mark.parametrize("name,both", [("automaton", False), ("automaton-both", True)])
def test_films_are_a_list_of_texts(monkeypatch, name, both):
    monkeypatch.setattr(data, "films", lambda n, seed, both: films(n // 100, seed, both))
    corpus = load(name, text_len=data.TEXT_LEN[name])
    assert text_of(corpus, corpus.train) == "".join(films(200, 1, both))
    assert text_of(corpus, corpus.val) == "".join(films(20, 2, both))
    assert len(corpus.val) == 20 * data.TEXT_LEN[name]
