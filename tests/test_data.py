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

from plumbing import data, tokenizers
from plumbing.cli import UserError

ROOT = Path(__file__).parents[1]
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MERGES = [b"\n\n", b"  ", b"\n ", b" t", b" th", b" the", b"ab", b" a", b"\r\n", b"a\n", b"\n\n\n"]
NAME = tiktoken.Encoding(
    "toy",
    pat_str=WORDS,
    mergeable_ranks={
        **{bytes([i]): i for i in range(256)},
        **{merge: 256 + i for i, merge in enumerate(MERGES)},
    },
    special_tokens={"<|endoftext|>": 300},
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: NAME)
    return tmp_path


@pytest.fixture
def nobody(work):
    """Someone whom permissions keep out, as they do not keep root."""
    work.chmod(0o777)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    yield
    os.seteuid(me)


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
    rng = random.Random(size)
    parts = ["\n", "\n\n", " ", "  ", "\t", "\r\n", "the", "a", "ab", "'s", "7", "é", "—", "日本"]
    text = "".join(rng.choices([*parts, "\x1c"], k=3000))
    Path("a.txt").write_bytes(text.encode())
    assert "".join(piece for _, piece in data.read_text(Path("a.txt"))) == text
    corpus = load("a.txt", "gpt2")
    assert tokens(corpus) == NAME.encode_ordinary(text)
    assert len(corpus.train) == int(0.9 * (len(corpus.train) + len(corpus.val)))
    assert text_of(corpus) == text
    assert (corpus.tokenizer.kind, corpus.tokenizer.size, corpus.tokenizer.end) == (
        "gpt2",
        301,
        300,
    )
    char = load("a.txt", "char")
    assert char.tokenizer.vocab == sorted(set(text)) and char.tokenizer.end is None
    assert text_of(char) == text


def test_a_text_without_spaces_is_cut_anyway(work, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 10)
    monkeypatch.setattr(data, "LONGEST", 80)
    Path("a.txt").write_text("abc" * 1000)
    assert max(len(piece) for _, piece in data.read_text(Path("a.txt"))) == 80
    assert text_of(load("a.txt", "char")) == "abc" * 1000


@pytest.mark.parametrize("piece", [1, 10**6])
def test_documents_are_separated(work, monkeypatch, piece):
    """Lines of a .jsonl, and files of a folder in the order of their names: the end-of-text token,
    or a line end, stands between documents and nowhere else. What looks like it is plain text."""
    monkeypatch.setattr(data, "PIECE", piece)
    Path("docs/deep").mkdir(parents=True)
    Path("docs/b.TXT").write_text("the the")
    Path("docs/deep/c.txt").write_text("ab")
    Path("docs/ignored.md").write_text("zzz")
    for hidden in ("docs/.git", "docs/deep/.cache"):
        Path(hidden).mkdir()
        Path(hidden, "zzz.txt").write_text("zzz")
    Path("docs/._b.txt").write_bytes(b"\xff")
    rows = [{"text": "a<|endoftext|>b", "id": 1}, {"text": ""}, {"text": "\ud800 the"}]
    lines = [json.dumps(row) for row in rows]
    Path("docs/a.JsonL").write_text("\n\n".join(lines) + "\n")
    texts = ["a<|endoftext|>b", "", "? the", "the the", "ab"]
    want = []
    for text in texts:
        want += [300] * bool(want) + NAME.encode_ordinary(text)
    assert tokens(load("docs", "gpt2")) == want
    assert text_of(load("docs", "char")) == "\n".join(texts)


def test_validation_from_another_text(work):
    Path("a.txt").write_text("the ab" * 50)
    Path("b.txt").write_text("xyz" * 5)
    corpus = load("a.txt", "char", val_data="b.txt")
    assert corpus.tokenizer.vocab == sorted(set("the abxyz"))
    assert (len(corpus.train), len(corpus.val)) == (300, 15)
    assert text_of(corpus, corpus.val) == "xyz" * 5
    assert load("a.txt", "char").sha256 != corpus.sha256  # both are kept
    assert load("a.txt", "char", val_data="b.txt").sha256 == corpus.sha256


def test_validation_text_is_not_trained_on(work):
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("the ab" * 50)
    Path("docs/val.txt").write_text("xyz" * 5)
    corpus = load("docs", "char", val_data="docs/val.txt")
    assert (len(corpus.train), len(corpus.val)) == (300, 15)
    fails("--data docs/val.txt has no .txt or .jsonl files of its own", "docs/val.txt", "char",
          val_data="docs")  # fmt: skip
    fails("--val_data nowhere: no such file", "docs", "char", val_data="nowhere")
    Path("link").symlink_to("docs")
    for same in ("docs", "docs/", "./docs", "link"):
        fails("--val_data is the same as --data; without it, the last tenth", "docs", val_data=same)


def test_many_characters_need_four_bytes(work):
    """Two for each token are enough up to 65,536 of them."""
    for n, name in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        vocab = [chr(i) for i in range(0x20, 0xD800)] + [chr(i) for i in range(0xE000, 0x1F000)]
        text = "".join(vocab[:n])
        Path("a.txt").write_bytes(text.encode())
        corpus = load("a.txt")
        assert corpus.train.dtype == corpus.val.dtype == name and corpus.tokenizer.size == n
        assert tokens(corpus) == list(range(n)) and text_of(corpus) == text
        folder = next(Path("tokens").glob("a-*-char"))
        assert json.loads((folder / "meta.json").read_text())["dtype"] == name
        sizes = [(folder / f"{part}.bin").stat().st_size for part in ("train", "val")]
        assert sum(sizes) == np.dtype(name).itemsize * n


def test_openwebtext(work, monkeypatch):
    """Through datasets: its split, GPT-2's tokens, a separator between documents."""
    parts = {"train": [{"text": "the"}, {"text": "ab"}], "test": [{"text": "a\n"}]}
    asked = []

    class Whole:
        def train_test_split(self, **kw):
            asked.append(kw)
            return parts

    fake = types.SimpleNamespace(load_dataset=lambda *a, **kw: asked.append((a, kw)) or Whole())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    corpus = load("openwebtext")
    assert corpus.train.tolist() == [*NAME.encode("the"), 300, *NAME.encode("ab")]
    assert corpus.val.tolist() == NAME.encode("a\n") and corpus.tokenizer.kind == "gpt2"
    assert asked[0] == (("Skylion007/openwebtext",), {"split": "train"})
    assert asked[1] == dict(test_size=0.0005, seed=2357, shuffle=True)  # nanoGPT's
    assert sorted(os.listdir("tokens/openwebtext-gpt2")) == ["meta.json", "train.bin", "val.bin"]

    Path("mine.txt").write_text("ab ab")
    mine = load("openwebtext", val_data="mine.txt")
    assert mine.train.tolist() == corpus.train.tolist()
    assert mine.val.tolist() == NAME.encode("ab ab")

    def no_network(*a, **kw):
        raise ConnectionError("could not reach the hub\nmany\nlines")

    fake.load_dataset = no_network
    assert load("openwebtext").sha256 == corpus.sha256  # no need to ask again
    with pytest.raises(UserError, match="openwebtext could not be downloaded: could not reach the"):
        data.load("openwebtext", folder="elsewhere")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets: pip install it"):
        data.load("openwebtext", folder="elsewhere")
    assert os.listdir("elsewhere") == ["openwebtext-gpt2.lock"]


def test_shakespeare(work, monkeypatch, capsys):
    """A file that is there is checked; a download too; without network Python's own text is
    taken."""
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
    there.write_bytes(b"First Cit")
    fails("wrong checksum: delete it", "shakespeare")


def test_sources_are_entries_of_a_table(work, monkeypatch):
    def mine(root):
        assert root == Path("tokens")
        pieces = lambda: iter([(True, "ab"), (False, "ba"), (True, "ab")])  # noqa: E731
        return data.Text("mine", dict(data="mine"), lambda: (pieces, None), tokenizer="gpt2")

    monkeypatch.setitem(data.SOURCES, "mine", mine)
    corpus = load("mine")
    assert corpus.name == "mine" and tokens(corpus) == [*NAME.encode_ordinary("abba"), 300, 262]


def test_the_command(work, capsys):
    Path("a.txt").write_text("ab" * 50)
    data.main(["--data", "a.txt", "--tokenizer", "gpt2", "--data_dir", "tokens"])
    assert capsys.readouterr().out == "a.txt: 45 tokens to train on, 5 to validate\n"
    assert load("a.txt", "gpt2").train.tolist() == [262] * 45


# ---- tokenizers ----------------------------------------------------------------------------------


def test_tokenizers_from_what_json_kept(work):
    for kind, vocab in (("char", ["a", "b", "—"]), ("gpt2", None)):
        tokenizer = tokenizers.tokenizer_of(**json.loads(json.dumps(dict(kind=kind, vocab=vocab))))
        assert (tokenizer.kind, tokenizer.vocab) == (kind, vocab)
        assert tokenizer.unit == {"char": "nats/char", "gpt2": "nats/token"}[kind]
        assert tokenizer.encode("ab—").dtype == np.uint16
        assert tokenizer.pieces(tokenizer.encode("").tolist()) == []
        assert "".join(tokenizer.pieces(tokenizer.encode("ab—").tolist())) == "ab—"
    with pytest.raises(UserError, match="there is no tokenizer 'bpe'; there are char, gpt2"):
        tokenizers.tokenizer_of("bpe", None)


@pytest.mark.parametrize(
    "vocab", [None, 7, "abc", [1, 2], ["ab"], ["b", "a"], ["a", "a"], [""], {"a": 1}, [None]]
)
def test_vocabularies_that_were_changed(vocab):
    with pytest.raises(UserError, match="the vocabulary is no sorted list of characters"):
        tokenizers.tokenizer_of("char", vocab)


def test_half_characters(work):
    """Lone surrogates, which a terminal or a file name may hold."""
    assert tokenizers.GPT2().encode("a\ud800").tolist() == NAME.encode_ordinary("a?")
    learnt = tokenizers.Characters.learn([[(False, "a\udcff")], [(True, "b")]])
    assert learnt.vocab == ["\n", "?", "a", "b"]
    assert learnt.encode_all([(True, "\ud800b")]).tolist() == [0, 1, 3]
    with pytest.raises(UserError, match=r"'\?' does not occur in the text that this model was"):
        tokenizers.Characters(["a"]).encode("a\ud800")
    with pytest.raises(UserError, match="'z' does not occur"):
        tokenizers.Characters(["a"]).encode("az")
    with pytest.raises(UserError, match="'a' does not occur"):
        tokenizers.Characters([]).encode("a")


def test_gpt2_is_not_learnt(work):
    def texts():
        raise AssertionError("read for nothing")
        yield

    assert tokenizers.GPT2.learn(texts()).size == 301


def test_a_character_of_several_tokens(work):
    """It stands with the last of them; what is no character at all shows as such."""
    ids = list("a€".encode())
    assert tokenizers.GPT2().pieces(ids) == ["a", "", "", "€"]
    assert tokenizers.GPT2().pieces(ids[:-1]) == ["a", "", "�"]


# ---- nothing half-written ------------------------------------------------------------------------


def test_kept_until_the_text_changes(work):
    Path("a.txt").write_text("the ab" * 50)
    first = load("a.txt")
    made = Path("tokens").glob("a-*/train.bin").__next__()
    before = made.stat().st_mtime_ns
    assert load("a.txt").sha256 == first.sha256 and made.stat().st_mtime_ns == before
    Path("a.txt").write_text("the ba" * 50)
    assert load("a.txt").sha256 != first.sha256
    assert [p.name for p in Path("tokens").iterdir() if p.suffix in (".old", ".tmp")] == []


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_damage_is_noticed(work, monkeypatch, name, how):
    Path("a.txt").write_text("the ab" * 50)
    load("a.txt")
    path = next(Path("tokens").glob(f"a-*/{name}"))
    raw = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[: len(raw) // 2] if how == "cut" else b"\xff\xff" + raw[2:])
    fails("delete", "a.txt")
    if how == "cut":  # is noticed of any file, however large
        monkeypatch.setattr(data, "CHECKED", 0)
        fails("delete", "a.txt")


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta["tokenizer"]["vocab"].reverse(),  # the text would be another
        lambda meta: meta["tokenizer"].update(kind=7),
        lambda meta: meta.update(dtype="uint8"),
        lambda meta: meta["train"].update(tokens="many"),
        lambda meta: meta["val"].update(more=1),
        lambda meta: meta.update(val=[]),
        lambda meta: meta.pop("sha256"),
    ],
)
def test_edited_metadata_is_noticed(work, change):
    Path("a.txt").write_text("the ab" * 50)
    load("a.txt")
    path = next(Path("tokens").glob("a-*/meta.json"))
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    fails("are cut off or damaged; delete that folder", "a.txt")
    for other in ("[]", "7", "[" * 10**5, '{"source": 7}'):
        path.write_text(other)
        if other != '{"source": 7}':
            fails("holds no prepared tokens; delete it", "a.txt")
    assert load("a.txt").tokenizer.size == 6  # of another text, as far as it says: made again


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
    env, caught = os.environ | {"PYTHONPATH": str(ROOT)}, 0
    for _ in range(4):
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
        ("h.jsonl", b'{"text": "a"}\n' + b'{"text":' * 10**5, "h.jsonl, line 2: not a JSON object"),
    ],
)
def test_bad_texts(work, name, raw, message):
    Path(name).write_bytes(raw)
    fails(message, name, "char")
    assert [p.suffix for p in Path("tokens").iterdir()] == [".lock"]  # nothing half-written
    Path("docs").mkdir()
    Path(name).rename(f"docs/{name}")
    fails(f"docs/{message}", "docs", "char")


def test_no_vocabulary(work, monkeypatch):
    def no_vocabulary(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", no_vocabulary)
    Path("g.txt").write_text("the")
    fails(r"no GPT-2 vocabulary \(ConnectionError\).*TIKTOKEN_CACHE", "g.txt", "gpt2")


def test_what_is_no_file(work, monkeypatch):
    """A pipe would be waited for without end, or read once and then be empty."""
    Path("docs").mkdir()
    fails("--data docs has no .txt or .jsonl files$", "docs")
    Path("loop.txt").symlink_to("loop.txt")
    fails("--data: cannot read loop.txt: ", "loop.txt")
    os.mkfifo("docs/pipe.txt")
    with monkeypatch.context() as m:
        m.setattr(data, "open", lambda *a, **kw: pytest.fail("waits"), raising=False)
        for name in ("docs", "docs/pipe.txt"):
            fails("--data docs/pipe.txt is no regular file; save the text as one", name)
        fails("--data /dev/null is no regular file", "/dev/null")
    fails("no such file or folder", "missing.txt")
    os.remove("docs/pipe.txt")
    Path("docs/a.txt").write_text("the ab" * 50)
    Path("docs/again").symlink_to(".")  # a loop of folders
    Path("docs/folder.txt").mkdir()
    assert text_of(load("docs")) == "the ab" * 50
    Path("docs/broken.txt").symlink_to("nowhere")
    fails("--data docs/broken.txt: no such file or folder", "docs")


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
    assert load("b.txt", but="out")


def test_no_permission_is_said_so(nobody):
    """Not "damaged", and nothing is left out silently."""
    Path("docs/closed").mkdir(parents=True)
    Path("docs/a.txt").write_text("the ab" * 50)
    Path("docs/closed").chmod(0)
    fails("--data: cannot read docs/closed: Permission denied", "docs")
    Path("docs/closed").rmdir()
    load("docs")
    Path("docs/a.txt").chmod(0)
    Path("docs/b.txt").write_text("ab")
    fails("cannot read docs/a.txt: Permission denied", "docs")
    os.remove("docs/b.txt")
    Path("docs/a.txt").chmod(0o600)
    made = next(Path("tokens").glob("docs-*-char"))
    for path, message in [
        (made / "train.bin", "cannot read tokens/docs-.*train.bin: Permission denied"),
        (made / "meta.json", "cannot prepare tokens/docs-.*: Permission denied"),
        (made, "cannot prepare tokens/docs-.*: Permission denied"),
        (Path("tokens"), "cannot prepare tokens/docs-.*: Permission denied"),
    ]:
        mode = path.stat().st_mode
        path.chmod(0)
        try:
            fails(message, "docs")
        finally:
            path.chmod(mode)
    assert load("docs")


# ---- films ---------------------------------------------------------------------------------------
RULE_30 = {
    "###": ".",
    "##.": ".",
    "#.#": ".",
    "#..": "#",
    ".##": "#",
    ".#.": "#",
    "..#": "#",
    "...": ".",
}


def next_row(row):
    return "".join(RULE_30[row[i - 1] + row[i] + row[(i + 1) % len(row)]] for i in range(len(row)))


def films(corpus, n):
    """The texts of both splits, of n characters each."""
    for ids in (corpus.train, corpus.val):
        text = text_of(corpus, ids.tolist())
        yield [text[i : i + n] for i in range(0, len(text), n)]


def test_an_automaton_runs_upwards(work):
    corpus = data.load("automaton", folder="tokens", text_len=68)
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


def test_an_automaton_in_both_directions(work):
    train, val = films(data.load("automaton-both", folder="tokens", text_len=72), 72)
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


def test_films_are_the_same_every_time(work):
    one = data.load("automaton", folder="tokens")
    assert one.sha256 == data.load("automaton", folder="again").sha256
