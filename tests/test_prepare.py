"""prepare.py: the right tokens, whatever the pieces; and nothing half-written, ever.

The tokenizer here has GPT-2's rule for cutting text into words and a few merges of its own, so that
no vocabulary needs to be there.
"""

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
import torch

import prepare
import sample
import train_char
from sample import UserError

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


def load(data, tokenizer=None, **kw):
    corpus, _ = prepare.load(data, tokenizer, folder="tokens", **kw)
    return corpus


def tokens(corpus):
    return np.concatenate((corpus.train, corpus.val)).tolist()


# ---- the right tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 10**6])
def test_pieces_change_no_token(work, monkeypatch, size):
    """A text read in pieces of any size has the tokens of the whole, and comes back from them."""
    monkeypatch.setattr(prepare, "PIECE", size)
    rng = random.Random(size)
    parts = [
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\r\n",
        "the",
        "a",
        "ab",
        "'s",
        "7",
        "é",
        "—",
        "日本",
        "\x1c",
    ]
    text = "".join(rng.choices(parts, k=3000))
    Path("a.txt").write_bytes(text.encode())
    assert "".join(piece for _, piece in prepare.read_text(Path("a.txt"))) == text
    corpus = load("a.txt", "gpt2")
    assert tokens(corpus) == NAME.encode_ordinary(text)
    assert len(corpus.train) == int(0.9 * (len(corpus.train) + len(corpus.val)))
    assert "".join(sample.GPT2().pieces(tokens(corpus))) == text
    char = load("a.txt", "char")
    assert char.vocab == sorted(set(text))
    assert "".join(char.vocab[i] for i in tokens(char)) == text


def test_a_text_without_spaces_is_cut_anyway(work, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 10)
    monkeypatch.setattr(prepare, "LONGEST", 80)
    Path("a.txt").write_text("abc" * 1000)
    assert max(len(piece) for _, piece in prepare.read_text(Path("a.txt"))) == 80
    char = load("a.txt", "char")
    assert "".join(char.vocab[i] for i in tokens(char)) == "abc" * 1000


@pytest.mark.parametrize("piece", [1, 10**6])
def test_documents_are_separated(work, monkeypatch, piece):
    """Lines of a .jsonl, and files of a folder in the order of their names: the end-of-text token,
    or a line end, stands between documents and nowhere else. What looks like it is plain text."""
    monkeypatch.setattr(prepare, "PIECE", piece)
    Path("docs/deep").mkdir(parents=True)
    Path("docs/b.txt").write_text("the the")
    Path("docs/deep/c.txt").write_text("ab")
    Path("docs/ignored.md").write_text("zzz")
    rows = [{"text": "a<|endoftext|>b", "id": 1}, {"text": ""}, {"text": "\ud800 the"}]
    lines = [json.dumps(row) for row in rows]
    Path("docs/a.jsonl").write_text("\n\n".join(lines) + "\n")
    texts = ["a<|endoftext|>b", "", "? the", "the the", "ab"]
    want = []
    for text in texts:
        want += [300] * bool(want) + NAME.encode_ordinary(text)
    assert tokens(load("docs", "gpt2")) == want
    char = load("docs", "char")
    assert "".join(char.vocab[i] for i in tokens(char)) == "\n".join(texts)


def test_validation_from_another_text(work):
    Path("a.txt").write_text("the ab" * 50)
    Path("b.txt").write_text("xyz" * 5)
    corpus = load("a.txt", "char", val_data="b.txt")
    assert corpus.vocab == sorted(set("the abxyz"))
    assert (len(corpus.train), len(corpus.val)) == (300, 15)
    assert "".join(corpus.vocab[i] for i in corpus.val) == "xyz" * 5


def test_validation_text_is_not_trained_on(work):
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("the ab" * 50)
    Path("docs/val.txt").write_text("xyz" * 5)
    corpus = load("docs", "char", val_data="docs/val.txt")
    assert (len(corpus.train), len(corpus.val)) == (300, 15)
    with pytest.raises(
        UserError, match="--data docs/val.txt has no .txt or .jsonl files of its own"
    ):
        load("docs/val.txt", "char", val_data="docs")
    with pytest.raises(UserError, match="--val_data nowhere: no such file"):
        load("docs", "char", val_data="nowhere")


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
    assert corpus.val.tolist() == NAME.encode("a\n") and corpus.vocab == "gpt2"
    assert asked[0] == (("Skylion007/openwebtext",), {"split": "train"})
    assert asked[1] == dict(test_size=0.0005, seed=2357, shuffle=True)  # nanoGPT's
    assert sorted(os.listdir("tokens/openwebtext")) == ["meta.json", "train.bin", "val.bin"]

    Path("mine.txt").write_text("ab ab")
    mine = load("openwebtext", val_data="mine.txt")
    assert mine.train.tolist() == corpus.train.tolist()
    assert mine.val.tolist() == NAME.encode("ab ab")

    def no_network(*a, **kw):
        raise ConnectionError("could not reach the hub\nmany\nlines")

    fake.load_dataset = no_network
    assert load("openwebtext").sha256 == corpus.sha256  # no need to ask again
    with pytest.raises(UserError, match="openwebtext could not be downloaded: could not reach the"):
        prepare.load("openwebtext", folder="elsewhere")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets: pip install it"):
        prepare.load("openwebtext", folder="elsewhere")
    assert os.listdir("elsewhere") == ["openwebtext.lock"]


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
def test_damage_is_noticed(work, name, how):
    Path("a.txt").write_text("the ab" * 50)
    load("a.txt")
    path = next(Path("tokens").glob(f"a-*/{name}"))
    raw = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[: len(raw) // 2] if how == "cut" else b"\xff\xff" + raw[2:])
    with pytest.raises(UserError, match="delete") as e:
        load("a.txt")
    assert "\n" not in str(e.value)


def test_killed_preparation_starts_again(work):
    """kill -9 at random moments: no folder of tokens, or a whole one; the next start makes the same
    tokens as a first one."""
    rng = random.Random(0)
    with open("a.jsonl", "w") as f:
        for _ in range(40_000):
            f.write(json.dumps({"text": " ".join(rng.choices(["to", "be", "or", "not"], k=40))}))
            f.write("\n")
    want = load("a.jsonl", "char").sha256
    argv = [sys.executable, str(ROOT / "prepare.py"), "--data", "a.jsonl", "--data_dir", "again"]
    caught = 0
    for _ in range(4):
        run = subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while run.poll() is None and not list(Path("again").glob("*.tmp")):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        caught += run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait()
        done = [p for p in Path("again").glob("a-*") if p.is_dir() and p.suffix != ".tmp"]
        for folder in done:
            assert prepare.Corpus(folder).sha256 == want
    assert caught
    assert prepare.load("a.jsonl", "char", folder="again")[0].sha256 == want
    assert not list(Path("again").glob("*.tmp"))


def test_bad_texts(work, monkeypatch):
    for name, raw, message in [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2: not a JSON object with"),
        ("b.jsonl", b'{"text": 7}\n', "b.jsonl, line 1: not a JSON object"),
        ("c.jsonl", b"[1]\n", "c.jsonl, line 1"),
        ("d.jsonl", b'{"text": "caf\xe9"}\n', "d.jsonl is not UTF-8 text"),
        ("e.txt", b"caf\xe9", "e.txt is not UTF-8 text"),
        ("f.txt", "".join(map(chr, range(0xE000, 0x1F000))).encode(), "characters, more than"),
    ]:
        Path(name).write_bytes(raw)
        with pytest.raises(UserError, match=message):
            load(name, "char")
        assert not list(Path("tokens").glob("*/meta.json"))

    def no_vocabulary(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", no_vocabulary)
    Path("g.txt").write_text("the")
    with pytest.raises(UserError, match=r"no GPT-2 vocabulary \(ConnectionError\).*TIKTOKEN_CACHE"):
        load("g.txt", "gpt2")


# ---- from tokens to models -----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lomdm", "a3"])
def test_training_on_tokens(work, capsys, model):
    Path("a.jsonl").write_text('{"text": "the ab the ab the"}\n' * 300)
    flags = "--data a.jsonl --data_dir tokens --tokenizer gpt2 --n_layer 1 --n_head 2 --n_embd 16 "
    flags += "--seq_len 16 --device cpu --max_iters 60 --learning_rate 1e-2 --eval_interval 60"
    train_char.main([*flags.split(), "--model", model])
    out = capsys.readouterr().out
    assert "301 different" in out and "nats/token, perplexity" in out and "--- sample 2" in out
    vals = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert next(v["val"] for v in vals if "val" in v) < 3  # log 301 is 5.7
    sample.main(["--device", "cpu", "--num_samples", "1", "--infill", "the ab__ab"])
    text = capsys.readouterr().out.split("--- sample 1\n")[1]
    assert text.startswith("the ab") and text.rstrip("\n").endswith("ab")


def test_validation_windows_are_spread(work):
    """--eval_windows of them at even distances, the same for every model; all, and what is left
    over, if there are fewer."""
    seen = []

    def nats_of(x, generator):
        seen.extend(x.tolist())
        return x.double().sum(1)

    cpu = torch.device("cpu")
    s = train_char.Settings(seq_len=4, eval_windows=5, dtype="float32")
    val = np.arange(42, dtype=np.uint16)
    mean, _ = train_char.evaluate(nats_of, val, s, cpu)
    assert [row[0] for row in seen] == [0, 8, 16, 24, 32] and mean == np.mean(seen)
    seen.clear()
    s.eval_windows = 10
    mean, _ = train_char.evaluate(nats_of, val, s, cpu)
    assert [row[0] for row in seen] == [*range(0, 40, 4), 40] and mean == val.mean()
