"""plumbing/data.py and tokenizers.py: the right tokens, whatever the pieces; and nothing
half-written, ever.

The tokenizer here has GPT-2's rule for cutting text into words and a few merges of its own, so that
no vocabulary needs to be there.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from plumbing import cli, data, tokenizers
from plumbing.cli import UserError

ROOT = Path(__file__).parents[1]
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MERGES = [b"\n\n", b"  ", b"\n ", b" t", b" th", b" the", b"ab", b" a", b"\r\n", b"a\n", b"\n\n\n"]
RANKS = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(MERGES)}
TOY = tiktoken.Encoding(
    "toy", pat_str=WORDS, mergeable_ranks=RANKS, special_tokens={"<|endoftext|>": 300}
)


@pytest.fixture
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


# ---- the right tokens ----------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 10**6])
def test_pieces_change_no_token(work, monkeypatch, size):
    """A text read in pieces of any size has the tokens of the whole, and comes back from them."""
    monkeypatch.setattr(data, "PIECE", size)
    monkeypatch.setattr(data, "BATCH", 3 * size)
    rng = random.Random(size)
    parts = ["\n", "\n\n", " ", "  ", "\t", "\r\n", "the", "a", "ab", "'s", "7", "é", "—", "日本"]
    text = "".join(rng.choices([*parts, "\x1c"], k=3000))
    Path("a.txt").write_bytes(text.encode())
    assert "".join(piece for _, piece in data.read_text(Path("a.txt"))) == text

    corpus = load("a.txt", "gpt2")
    assert tokens(corpus) == TOY.encode_ordinary(text) and text_of(corpus) == text
    assert len(corpus.train) == int(0.9 * (len(corpus.train) + len(corpus.val)))
    found = corpus.tokenizer
    assert (found.kind, found.size, found.end, found.unit) == ("gpt2", 301, 300, "nats/token")
    char = load("a.txt", "char")
    assert char.tokenizer.vocab == sorted(set(text)) and char.tokenizer.end is None
    assert text_of(char) == text and char.tokenizer.unit == "nats/char"


def test_a_text_without_spaces_is_cut_anyway(work, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 10)
    monkeypatch.setattr(data, "LONGEST", 80)
    Path("a.txt").write_text("abc" * 1000)
    assert max(len(piece) for _, piece in data.read_text(Path("a.txt"))) == 80
    assert text_of(load("a.txt", "char")) == "abc" * 1000


@pytest.mark.parametrize("size", [1, 10**6])
def test_documents_are_separated(work, monkeypatch, size):
    """Lines of a .jsonl, and files of a folder in the order of their names: the end-of-text token,
    or a line end, stands between documents and nowhere else. What looks like it is plain text."""
    monkeypatch.setattr(data, "BATCH", size)
    Path("docs/deep").mkdir(parents=True)
    Path("docs/b.TXT").write_text("the the")
    Path("docs/deep/c.txt").write_text("ab")
    Path("docs/ignored.md").write_text("zzz")
    for hidden in ("docs/.git", "docs/deep/.cache"):
        Path(hidden).mkdir()
        Path(hidden, "zzz.txt").write_text("zzz")
    Path("docs/._b.txt").write_bytes(b"\xff")
    rows = [{"text": "a<|endoftext|>b", "id": 1}, {"text": ""}, {"text": "\ud800 the"}]
    Path("docs/a.JsonL").write_text("\n\n".join(map(json.dumps, rows)) + "\n")

    texts = ["a<|endoftext|>b", "", "? the", "the the", "ab"]
    want = []
    for text in texts:
        want += [300] * bool(want) + TOY.encode_ordinary(text)
    assert tokens(load("docs", "gpt2")) == want
    assert text_of(load("docs", "char")) == "\n".join(texts)


def test_validation_from_another_text(work):
    """Which may lie among the others, and is not trained on."""
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("the ab" * 50)
    Path("docs/val.txt").write_text("xyz" * 5)
    for place in ("docs/a.txt", "docs"):
        corpus = load(place, "char", val_data="docs/val.txt")
        assert corpus.tokenizer.vocab == sorted(set("the abxyz"))
        assert (len(corpus.train), len(corpus.val)) == (300, 15)
        assert text_of(corpus, corpus.val) == "xyz" * 5
        assert load(place, "char").sha256 != corpus.sha256  # both are kept
        assert load(place, "char", val_data="docs/val.txt").sha256 == corpus.sha256
    fails("--val_data nowhere: no such file", "docs", "char", val_data="nowhere")
    Path("link").symlink_to("docs")
    for same in ("docs", "docs/", "./docs", "link", "docs/a.txt"):
        fails("has no .txt or .jsonl files of its own", "docs/a.txt", val_data=same)


def test_many_characters_need_four_bytes(work):
    """Two for each token are enough up to 65,536 of them."""
    vocab = [chr(i) for i in range(0x20, 0xD800)] + [chr(i) for i in range(0xE000, 0x1F000)]
    for n, name in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        text = "".join(vocab[:n])
        Path("a.txt").write_bytes(text.encode())
        corpus = load("a.txt")
        assert corpus.train.dtype == corpus.val.dtype == name and corpus.tokenizer.size == n
        assert tokens(corpus) == list(range(n)) and text_of(corpus) == text


def test_openwebtext(work, monkeypatch):
    """With the real package, and a folder in place of the hub: nanoGPT's split, GPT-2's tokens, a
    separator between documents."""
    monkeypatch.setenv("HF_HOME", str(work / "cache"))
    datasets = pytest.importorskip("datasets")
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", work / "cache")
    texts = [f"the {i} ab\n" * (i % 3) for i in range(2500)]
    folder = work / "Skylion007" / "openwebtext" / "plain_text" / "train"
    folder.mkdir(parents=True)
    for i in range(2):  # as the hub has it, in several files
        rows = arrow.table({"text": texts[i::2]})
        arrow.parquet.write_table(rows, folder / f"000{i}.parquet")

    corpus = load("openwebtext")
    order = texts[::2] + texts[1::2]
    split = datasets.Dataset.from_dict({"text": order}).train_test_split(0.0005, seed=2357)
    for ids, part in ((corpus.train, "train"), (corpus.val, "test")):
        want = [[300, *TOY.encode_ordinary(text)] for text in split[part]["text"]]
        assert ids.tolist() == list(itertools.chain.from_iterable(want))[1:]
    assert corpus.tokenizer.kind == "gpt2" and len(corpus.val) > 2
    assert [p.name[:17] for p in Path("tokens").glob("*-*") if p.is_dir()] == ["openwebtext-gpt2-"]

    Path("mine.txt").write_text("ab ab")
    mine = load("openwebtext", val_data="mine.txt")
    assert mine.train.tolist() == corpus.train.tolist()
    assert mine.val.tolist() == TOY.encode("ab ab")


def test_openwebtext_is_not_to_be_had(work, monkeypatch):
    def no_network(name, **kw):
        assert name == "Skylion007/openwebtext"
        assert kw == dict(split="train", revision="refs/convert/parquet")
        raise ConnectionError("could not reach the hub\nmany\nlines")

    fake = types.SimpleNamespace(load_dataset=no_network)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    fails("openwebtext could not be downloaded: could not reach the hub$", "openwebtext")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("needs a package: pip install datasets", "openwebtext")
    assert [p.suffix for p in Path("tokens").iterdir()] == [".lock"]


def test_shakespeare(work, monkeypatch, capsys):
    """Downloaded once and checked; without network Python's own text is taken."""
    there = work / "tokens" / "tinyshakespeare" / "input.txt"

    def no_network(*a, **kw):
        raise OSError("no network")

    monkeypatch.setattr(data.urllib.request, "urlopen", no_network)
    corpus = load("shakespeare")
    assert "no tinyshakespeare (no network)" in capsys.readouterr().out
    assert corpus.name == "python-docs" and corpus.sha256 == load("python-docs").sha256
    assert not there.parent.exists()

    response = contextlib.nullcontext(types.SimpleNamespace(read=lambda: b"First Citizen"))
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *a, **kw: response)
    fails("wrong checksum; try again", "shakespeare")
    assert not there.exists()
    digest = hashlib.sha256(b"First Citizen").hexdigest()
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", digest)
    corpus = load("shakespeare")
    assert corpus.name == "shakespeare" and text_of(corpus) == "First Citizen"
    assert there.read_bytes() == b"First Citizen" and os.listdir(there.parent) == ["input.txt"]
    monkeypatch.setattr(data.urllib.request, "urlopen", no_network)
    assert load("shakespeare").sha256 == corpus.sha256


def test_sources_are_entries_of_a_table(work, monkeypatch):
    def mine(root):
        assert root == Path("tokens")
        pieces = lambda: iter([(True, "ab"), (False, "ba"), (True, "ab")])  # noqa: E731
        return data.Text("mine", lambda: (pieces, None), tokenizer="gpt2")

    monkeypatch.setitem(data.SOURCES, "mine", mine)
    corpus = load("mine")
    assert corpus.name == "mine" and tokens(corpus) == [*TOY.encode_ordinary("abba"), 300, 262]


def test_the_command(work, capsys):
    Path("a.txt").write_text("ab" * 50)
    data.main(["--data", "a.txt", "--tokenizer", "gpt2", "--data_dir", "tokens"])
    assert capsys.readouterr().out == "a.txt: 45 tokens to train on, 5 to validate\n"
    assert load("a.txt", "gpt2").train.tolist() == [262] * 45


# ---- tokenizers ----------------------------------------------------------------------------------
def test_tokenizers_from_what_json_kept(work):
    for kind, vocab in (("char", ["a", "b", "—"]), ("gpt2", None)):
        tokenizer = tokenizers.tokenizer_of(**json.loads(json.dumps(dict(kind=kind, vocab=vocab))))
        assert tokenizer.state == dict(kind=kind, vocab=vocab)
        assert tokenizer.encode("ab—").dtype == np.uint16
        assert tokenizer.pieces(tokenizer.encode("").tolist()) == []
        assert "".join(tokenizer.pieces(tokenizer.encode("ab—").tolist())) == "ab—"


def test_half_characters(work):
    """Lone surrogates, which a terminal or a file name may hold."""
    assert tokenizers.GPT2().encode("a\ud800").tolist() == TOY.encode_ordinary("a?")
    learnt = tokenizers.learn("char", [[(False, "a\udcff")], [(True, "b")]])
    assert learnt.vocab == ["\n", "?", "a", "b"]
    assert learnt.encode_all([(True, "\ud800b")]).tolist() == [0, 1, 3]
    for vocab, text, unknown in (["a"], "a\ud800", r"\?"), (["a"], "az", "z"), ([], "a", "a"):
        with pytest.raises(UserError, match=f"'{unknown}' does not occur in the text that this"):
            tokenizers.Characters(vocab).encode(text)


def test_a_character_of_several_tokens(work):
    """It stands with the last of them; what is no character at all shows as such."""
    ids = list("a€b".encode())
    assert tokenizers.GPT2().pieces(ids) == ["a", "", "", "€", "b"]
    assert tokenizers.GPT2().pieces(ids[:3]) == ["a", "", "�"]


# ---- nothing half-written ------------------------------------------------------------------------
def test_kept_until_the_text_changes(work):
    Path("a.txt").write_text("the ab" * 50)
    first = load("a.txt")
    [made] = Path("tokens").glob("a-*/train.bin")
    before = made.stat().st_mtime_ns
    for name in ("a.txt", "./a.txt", str(work / "a.txt")):
        assert load(name).sha256 == first.sha256 and made.stat().st_mtime_ns == before
    assert len(list(Path("tokens").glob("a-*.lock"))) == 1
    Path("a.txt").write_text("the ba" * 50)
    assert load("a.txt").sha256 != first.sha256
    assert not list(Path("tokens").glob("*.tmp"))


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_tokens_that_are_cut_off(work, name):
    Path("a.txt").write_text("the ab" * 50)
    load("a.txt")
    [path] = Path("tokens").glob(f"a-*/{name}")
    os.truncate(path, path.stat().st_size // 4 * 2)
    fails("are cut off; delete it", "a.txt")


def test_killed_preparation_starts_again(work):
    """kill -9 at random moments: no folder of tokens, or a whole one; the next start makes the same
    tokens as a first one."""
    rng = random.Random(0)
    with open("a.jsonl", "w") as f:
        for _ in range(40_000):
            f.write(json.dumps({"text": " ".join(rng.choices(["to", "be", "or", "not"], k=40))}))
            f.write("\n")
    want = load("a.jsonl", "char").sha256
    argv = [sys.executable, "-m", "plumbing.data", "--data", "a.jsonl", "--data_dir", "again"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    caught = 0
    for _ in range(3):
        run = subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env)
        while run.poll() is None and not list(Path("again").glob("*.tmp")):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        caught += run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait()
        done = [p for p in Path("again").glob("a-*") if p.is_dir() and p.suffix != ".tmp"]
        for folder in done:
            assert data.Corpus(folder, "a.jsonl").sha256 == want
    assert caught
    assert data.load("a.jsonl", "char", folder="again").sha256 == want
    assert not list(Path("again").glob("*.tmp"))


# ---- texts that are none -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name,raw,message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2: not a JSON object with"),
        ("b.jsonl", b'{"text": 7}\n', "b.jsonl, line 1: not a JSON object"),
        ("c.jsonl", b"[1]\n", "c.jsonl, line 1"),
        ("d.jsonl", b'{"text": "caf\xe9"}\n', "d.jsonl is not UTF-8 text"),
        ("e.txt", b"caf\xe9", "e.txt is not UTF-8 text"),
        ("f.txt", "the ab".encode("utf-16-le"), "f.txt is not UTF-8 text"),
        ("g.JSONL", b"the ab", "g.JSONL, line 1: not a JSON object"),
    ],
)
def test_bad_texts(work, name, raw, message):
    Path(name).write_bytes(raw)
    fails(message, name, "char")
    assert [p.suffix for p in Path("tokens").iterdir()] == [".lock"]  # nothing half-written
    Path("docs").mkdir()
    Path(name).rename(f"docs/{name}")
    fails(f"docs/{message}", "docs", "char")


def test_no_tokenizer(work, monkeypatch):
    def no_vocabulary(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", no_vocabulary)
    Path("g.txt").write_text("the")
    fails(r"no GPT-2 vocabulary \(ConnectionError\).*TIKTOKEN_CACHE", "g.txt", "gpt2")
    fails("--tokenizer bpe: neither char, gpt2 nor a folder with tokenizer.json", "g.txt", "bpe")
    fails("--tokenizer .: neither char, gpt2 nor a folder with tokenizer.json", "g.txt", ".")


def test_too_short_texts(work):
    Path("a.txt").write_text("the ab")
    fails("--data a.txt has 5 . 1 tokens to train and validate on, too few for", "a.txt", least=2)
    fails("that is no list of texts of --text_len 4", "a.txt", text_len=4)
    Path("empty.txt").touch()
    fails("--data empty.txt has 0 . 0 tokens", "empty.txt", least=2)


def test_what_is_no_file(work, monkeypatch):
    """A pipe would be waited for without end, or read once and then be empty."""
    Path("docs").mkdir()
    fails("--data docs has no .txt or .jsonl files$", "docs")
    os.mkfifo("docs/pipe.txt")
    for name in ("docs", "docs/pipe.txt"):
        fails("--data docs/pipe.txt is no regular file; save the text as one", name)
    fails("--data /dev/null is no regular file", "/dev/null")
    fails("--data missing.txt: no such file or folder", "missing.txt")
    os.remove("docs/pipe.txt")
    Path("docs/a.txt").write_text("the ab" * 50)
    Path("docs/again").symlink_to(".")  # a loop of folders
    Path("docs/folder.txt").mkdir()
    assert text_of(load("docs")) == "the ab" * 50
    Path("docs/broken.txt").symlink_to("nowhere")
    fails("--data docs/broken.txt is no regular file", "docs")  # nothing is left out silently


def test_names_of_any_bytes(work):
    folder = os.fsdecode(b"caf\xe9")
    Path(folder).mkdir()
    Path(folder, os.fsdecode(b"\xff.txt")).write_text("the ab" * 50)
    assert text_of(load(folder)) == "the ab" * 50
    Path("a" * 250 + ".txt").write_text("ab")
    assert text_of(load("a" * 250 + ".txt")) == "ab"


def test_the_log_of_a_run_is_no_text(work):
    """A run must not write its log into the folder that it learns from."""
    Path("docs/deep").mkdir(parents=True)
    Path("docs/a.txt").write_text("the ab" * 50)
    Path("b.txt").write_text("the ab" * 50)
    Path("link").symlink_to("docs/deep")
    for out in ("docs", "docs/out", "link/out", "docs/deep/../out"):
        fails("--out_dir must not lie inside --data docs: its log", "docs", but=out)
        fails("--out_dir must not lie inside --val_data docs", "b.txt", val_data="docs", but=out)
    for out in ("out", "docs2", "b.txt.out"):
        assert load("docs", but=out)
    assert load("python-docs", but="python-docs/out")


def test_no_permission_is_one_line(work, capsys):
    """Here for someone whom permissions keep out, as they do not keep root."""
    Path("a.txt").write_text("the ab" * 50)
    Path("a.txt").chmod(0)
    work.chmod(0o777)
    me = os.geteuid()
    os.seteuid(me or 65534)
    try:
        with pytest.raises(SystemExit) as e:
            cli.run(lambda: load("a.txt"))
    finally:
        os.seteuid(me)
    assert e.value.code == 1
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'a.txt'\n"


# ---- films ---------------------------------------------------------------------------------------
CELLS = ("###", "##.", "#.#", "#..", ".##", ".#.", "..#", "...")
RULE_30 = dict(zip(CELLS, "...####.", strict=True))


def next_row(row):
    return "".join(RULE_30[row[i - 1] + row[i] + row[(i + 1) % len(row)]] for i in range(len(row)))


def films(corpus, n):
    """The texts of both splits, of n characters each."""
    for ids in (corpus.train, corpus.val):
        text = text_of(corpus, ids.tolist())
        yield [text[i : i + n] for i in range(0, len(text), n)]


def test_an_automaton_runs_upwards(work):
    corpus = load("automaton", text_len=68)
    train, val = films(corpus, 68)
    assert len(train) == 20000 and len(val) == 2000 and corpus.tokenizer.size == 3
    for film in (*train[:200], *val[:200]):
        *lines, end = film.split("\n")
        assert [len(line) for line in lines] == [16] * 4 and end == ""
        for late, early in itertools.pairwise(lines):
            assert late == next_row(early)
    assert len({film[-17:] for film in train}) > 15000  # of 65,536 first rows
    assert 0.49 < "".join(f[-17:-1] for f in train).count("#") / (16 * 20000) < 0.51
    assert train[:2000] != val
    assert data.load("automaton", folder="again").sha256 == corpus.sha256  # the same every time


def test_an_automaton_in_both_directions(work):
    train, val = films(load("automaton-both", text_len=72), 72)
    assert len(train) == 20000 and len(val) == 2000
    down = 0
    for film in train[:400]:
        lines = film.split("\n")[:4]
        [mark] = {line[0] for line in lines}
        assert mark in "v^"
        rows = [line[1:] for line in (lines if mark == "v" else lines[::-1])]
        assert all(next_row(next_row(a)) == b for a, b in itertools.pairwise(rows))
        down += mark == "v"
    assert 150 < down < 250
