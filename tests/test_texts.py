"""Texts as people have them: gaps, documents, files of many kinds, and models that meet another
text. Tokenizers are of all kinds."""

import json
import math
import random
import re
import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from test_data import TOY

import sample
import train_char
from experiments import evidence
from plumbing import data
from plumbing.cli import UserError
from plumbing.tokenizers import GPT2, Characters, HuggingFace

TINY = "--data_dir tokens --device cpu --n_layer 1 --n_head 2 --n_embd 16 --seq_len 16 "
TINY += "--batch_size 4 --max_iters 2 --num_samples 0"
LINES = "to be, or\nnot to be\n"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: TOY)
    Path("text.txt").write_text(LINES * 100)
    return tmp_path


def train(flags, base=TINY):
    train_char.main([*base.split(), *flags.split()])


def load(name, tokenizer=None, **kw):
    return data.load(name, tokenizer, folder="tokens", **kw)


def text_of(corpus):
    return "".join(corpus.tokenizer.pieces(np.concatenate((corpus.train, corpus.val)).tolist()))


def fails(message, call, *a, **kw):
    with pytest.raises(UserError, match=message) as e:
        call(*a, **kw)
    assert "\n" not in str(e.value)


def write(name, text):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def read(name):
    return list(data.documents_in([Path(name)]))


# ---- gaps ----------------------------------------------------------------------------------

SCRIPTS = (
    string.printable.replace("\r", "").replace("\f", "").replace("\v", ""),
    "éüßñçœ — “quotes” \u202f\u00a0",
    "снег идёт",
    "שלום עולם",
    "می\u200cخواهم",
    "हिन्दी क़लम",
    "日本語のテキスト　です",
    "👩‍👩‍👧‍👦 😀",
    "e\u0301 o\u0308",
)


def huggingface(kind):
    """A tokenizer.json of 300 pieces or more, by the package that trains them."""
    tokenizers = pytest.importorskip("tokenizers")
    n, p, d = tokenizers.normalizers, tokenizers.pre_tokenizers, tokenizers.decoders
    t = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    special = ["<unk>", "<end>", *(f"<0x{i:02X}>" for i in range(256))]
    alphabet, limit = [], 40
    tail = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    if kind == "byte-level":
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        special, alphabet, limit = ["<end>"], p.ByteLevel.alphabet(), 256
        t.pre_tokenizer, t.decoder = p.ByteLevel(add_prefix_space=False), d.ByteLevel()
    elif kind == "normaliser":
        t.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
        t.decoder = d.Sequence(tail)
    else:
        t.pre_tokenizer = p.Metaspace(prepend_scheme="first", split=False)
        t.decoder = d.Sequence(tail)
    how = dict(special_tokens=special, initial_alphabet=alphabet, show_progress=False)

    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, limit_alphabet=limit, **how)
    t.train_from_iterator(["to be or not to be, that is the question"] * 9, trainer)
    return HuggingFace([t.to_str(), "<end>"])


def tokenizer_called(kind):
    if kind == "char":
        return Characters(sorted(set("".join(SCRIPTS))))
    return GPT2() if kind == "gpt2" else huggingface(kind)


KINDS = "char", "gpt2", "byte-level", "normaliser", "pre-tokenizer"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_comes_out(kind):
    """200 texts in many scripts, with gaps that any tokens fill, halves of characters too."""
    tokenizer = tokenizer_called(kind)
    r = random.Random(7)
    mask, size = tokenizer.size, 262 if kind == "gpt2" else tokenizer.size  # of the toy
    hole = tokenizer.encode("xb").tolist()[-1]
    for _ in range(200):
        letters = r.choices(r.choice(SCRIPTS) + " ", k=r.randint(1, 30))
        asked = "".join(letters).replace("\\", "").replace("_", "")
        for _ in range(r.randint(1, 4)):
            at = r.randint(0, len(asked))
            asked = asked[:at] + "_" * r.randint(1, 3) + asked[at:]
        ids = sample.template(sample.Settings(infill=asked), tokenizer, mask)
        row = [hole if i == mask else i for i in ids]
        assert "".join(tokenizer.pieces(row)) == asked.replace("_", "b")
        row = [r.randrange(size) if i == mask else i for i in ids]
        shown = "".join(tokenizer.pieces(row))

        # What is given stands in this order, at the ends where it was at the ends.
        parts = re.split("_+", asked)
        assert re.fullmatch(".*?".join(map(re.escape, parts)), shown, re.DOTALL), (asked, shown)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_gap_of_one_letter(kind):
    """What is in the gap is all that comes between: no space, and one where it was given."""
    tokenizer = huggingface(kind)
    hole = tokenizer.encode("xb").tolist()[-1]
    for asked in "not(_)ok", "a _ c", "_ be", "to_", "é_é", "_":
        ids = sample.template(sample.Settings(infill=asked), tokenizer, -1)
        row = [hole if i == -1 else i for i in ids]
        assert "".join(tokenizer.pieces(row)) == asked.replace("_", "b")


def test_a_tokenizer_that_cannot_do_it_says_so():
    """Words only, as BERT has them: one behind a gap would get a space."""
    tokenizers = pytest.importorskip("tokenizers")
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, "[UNK]"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain = HuggingFace([t.to_str(), None])
    settings = sample.Settings(infill="a_b")
    fails("this tokenizer cannot put 'b' behind", sample.template, settings, plain, 9)
    fails("behind another .*names no eos_token", plain.encode_all, ["a", "b"])
    assert plain.encode_all(["a b"]).tolist() == [0, 1]  # one text needs nothing between
    assert HuggingFace([t.to_str(), "[UNK]"]).encode_all(["a", "b"]).tolist() == [0, 2, 1]


# ---- a document begins ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "folder"])
def test_separate_documents_begin_behind_a_mark(name):
    """The first one, too. A single .txt has no mark."""
    lines = "".join(json.dumps({"text": f"the {i}"}) + "\n" for i in range(9))
    Path("folder").mkdir()
    for i in range(9):
        Path(f"folder/{i}.txt").write_text(f"the {i}")
    if name != "folder":
        write(name, lines)

    corpus = load(name, "gpt2")
    want = [t for i in range(9) for t in (300, *TOY.encode_ordinary(f"the {i}"))]
    assert corpus.separate and [*corpus.train, *corpus.val] == want
    assert not load("text.txt", "gpt2").separate and not load(name, "char").separate
    assert text_of(load(name, "char")) == "\n".join(f"the {i}" for i in range(9))


def test_a_quarter_of_the_windows_begin_with_a_document():
    """The others begin where they did, and so do texts of one length."""
    text = np.concatenate([[300, *[i] * n] for i, n in enumerate((5, 200, 30, 5) * 50)])
    s = train_char.Settings(seq_len=16, batch_size=4000)

    def batch(mark=None):
        train_char.seed_all(s, 0, 0)
        return train_char.get_batch(s, text, "cpu", mark)

    plain = batch()
    x = batch(300)
    begins = x[:, 0] == 300
    changed = (x != plain).any(1)
    assert 0.22 < changed.float().mean() < 0.28 and begins[changed].all()
    assert torch.equal(x[~changed], plain[~changed])
    s.text_len = 16
    assert torch.equal(batch(300), batch())


STEPS = {"arm": 100, "a3": 100, "loa3": 100, "mdm": 800, "block --block_len 4": 800, "lomdm": 400}
SLOW = [
    pytest.param(model, steps, marks=[] if model == "arm" else pytest.mark.slow)
    for model, steps in STEPS.items()
]


@pytest.mark.parametrize("model,steps", SLOW)
def test_samples_begin_as_documents_begin(capsys, model, steps):
    """After a few hundred steps of documents that begin with one word and go on with others."""
    r = random.Random(1)
    body = lambda: "".join(r.choices(["b", "ab", " a"], k=12))  # noqa: E731
    write("docs.jsonl", "".join(json.dumps({"text": "the" + body()}) + "\n" for _ in range(300)))
    flags = "--data docs.jsonl --tokenizer gpt2 --seq_len 8 --batch_size 32 --eval_windows 9"
    flags += f" --learning_rate 2e-2 --warmup_iters 5 --eval_interval 9999 --max_iters {steps}"
    train(f"{flags} --model {model}")

    def begin_so(*more):
        capsys.readouterr()
        sample.main(["--device=cpu", "--num_samples=20", "--temperature=0.5", *more])
        texts = capsys.readouterr().out.split("--- sample")[1:]
        return sum(text.split("\n", 1)[1].startswith("the") for text in texts)

    assert begin_so() >= 15 and begin_so("--infill", "___ a") >= 15
    assert begin_so("--begin=False", "--infill", "___ a") <= 5
    assert begin_so("--prompt", "abab") == 0
    if model == "arm":
        assert begin_so() == 20


def test_begin_needs_a_mark():
    train("--data text.txt")
    fails("--begin: this model's tokenizer has no end", sample.main, ["--device=cpu", "--begin"])


# ---- files ---------------------------------------------------------------------------------

ROWS = [{"text": 'say "é"\n'}, {"text": "{1}", "id": 2}]
SHAPES = {  # names, and what is in them
    "a.jsonl": "\n\n".join(map(json.dumps, ROWS)) + "\n\n",
    "b.ndjson": "\r\n".join(map(json.dumps, ROWS)),
    "c.JSON": "\n".join(map(json.dumps, ROWS)),
    "d.json": json.dumps(ROWS),
    "e.json": "\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_json_is_read_as_what_it_is(name):
    assert read(write(name, SHAPES[name])) == [row["text"] for row in ROWS]


BAD = {  # names, what is in them, and what the line says
    "a.json": ('[{"text": "a"}, {"txt": "b"}]', "a.json, object 2: not a JSON object with"),
    "b.json": ('{"vocab": {"a": 1}}', "b.json, object 1: not a JSON object with"),
    "c.ndjson": ('{"text": "a"}\n"b"\n', "c.ndjson, line 2: not a JSON object with"),
    "d.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', "d.jsonl, line 2, character 11: no UTF-8"),
    "texts.csv": ("a,b", "texts.csv is no plain text: unpack it, or write a .jsonl with"),
    "t.txt.GZ": (b"\x1f\x8b", "t.txt.GZ is no plain text"),
    "t.parquet": ("PAR1", "t.parquet is no plain text"),
    "nul.txt": ("one\r\ntw\0o", r"nul.txt, line 2, character 3: .*tr -d '\\0' < nul.txt"),
    "win.txt": ("a\nnaïve".encode("cp1252"), "win.txt, line 2, character 3: .*iconv -f cp1252"),
    "wide.txt": ("né\n".encode("utf-16"), "wide.txt, line 1, character 1: .*iconv -f utf-16"),
    "bare.txt": ("no mark\n".encode("utf-16-le"), "bare.txt, line 1, .*iconv -f utf-16"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_named_with_its_place(name):
    write(name, BAD[name][0])
    fails(BAD[name][1], read, name)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end):
    write("a.txt", f"one{end}two{end}{end}".encode())
    write("b.jsonl", json.dumps({"text": f"one{end}two{end}{end}"}))
    assert read("a.txt") == read("b.jsonl") == ["one\ntwo\n\n"]
    tokenizer = Characters(sorted(set("\nonetw")))
    assert tokenizer.pieces(tokenizer.encode(f"e{end}t").tolist()) == ["e", "\n", "t"]


def test_files_left_out_are_named(capsys):
    Path("docs/deep").mkdir(parents=True)
    for name in "a.txt", "b.md", "deep/c.csv", ".hidden":
        Path("docs", name).write_text("to be " * 20)
    load("docs")
    assert capsys.readouterr().out.startswith("--data docs: 2 files left out, no .txt or JSON: ")
    assert load("docs/b.md").train is not None  # a file that is named is a text


# ---- prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("form,other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_prompt_takes_the_form_of_the_text(form, other):
    text = unicodedata.normalize(form, "đường phố, Åström ")
    tokenizer = Characters(sorted(set(text)))
    given = tokenizer.encode(unicodedata.normalize(other, text)).tolist()
    assert "".join(tokenizer.pieces(given)) == text
    where = "'\\\\n', 'b', 'q' .first in line 1, character 2. does not"
    fails(where, tokenizer.encode, "g\r\nbqb")


def test_a_prompt_in_another_form_is_said_and_kept(capsys):
    """Tokens know no characters that are missing."""
    for text, said in ("Ä", 0), ("A\u0308", 1), ("Ä_", 0), ("A\u0308_", 1):
        which = {"infill" if "_" in text else "prompt": text}
        ids = sample.template(sample.Settings(**which), GPT2(), 98)
        assert "".join(GPT2().pieces(ids)) == text.replace("_", "b")
        assert capsys.readouterr().err.count("not composed (NFC)") == said


def test_prompts_from_files_and_with_line_ends(monkeypatch, capsys):
    train("--data text.txt")
    base = ["--device", "cpu", "--num_samples", "1"]
    write("prompt.txt", "or\r\nnot")
    sample.main([*base, "--prompt_file", "prompt.txt"])
    assert "--- sample 1\nor\nnot" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", open("prompt.txt"))  # noqa: SIM115
    sample.main([*base, "--prompt_file", "-"])
    assert "--- sample 1\nor\nnot" in capsys.readouterr().out

    write("latin1.txt", b"or\nn\xf6t")
    monkeypatch.setattr("sys.stdin", open("latin1.txt"))  # noqa: SIM115
    fails("line 2, character 2: no UTF-8", sample.main, [*base, "--prompt_file", "-"])
    fails(r"in bash, \$'one\\ntwo' has a line end", sample.main, [*base, "--prompt", r"or\nnot"])
    fails("--prompt_file nowhere: no such file in /", sample.main, ["--prompt_file", "nowhere"])
    fails("one of them", sample.main, ["--prompt", "a", "--prompt_file", "b"])
    with pytest.raises(SystemExit):
        sample.main(["--prompt", "-not"])
    assert "begins with a dash is given as --flag=-text" in capsys.readouterr().err


# ---- a model and another text --------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["arm", "mdm", "block --block_len 8", "lomdm --weights exp", "a3", "loa3"]
)
def test_every_model_goes_on_with_another_text(model):
    """With its own tokenizer and its own form, from its own weights."""
    train(f"--data text.txt --out_dir first --model {model} --dropout 0.1")
    write("less.txt", "to be to not\n" * 40)
    name = model.split()[0]
    flags = f"--model {name} --init_from first --data less.txt --learning_rate 1e-12"
    base = "--data_dir tokens --device cpu --batch_size 4 --max_iters 2 --num_samples 0"
    train(flags, base)

    one, two = (torch.load(f"{x}/ckpt.pt", weights_only=True) for x in ("first", "out"))
    assert one["tokenizer"] == two["tokenizer"] and one["config"] == two["config"]
    for key, weights in one["model"].items():
        torch.testing.assert_close(two["model"][key], weights, atol=1e-6, rtol=0)
    train("--resume --max_iters 3", base="--device cpu")

    evidence.Run("out")  # knows which tokenizer it was

    write("more.txt", "to be\n" * 9 + "Zoë\n" + "to be\n" * 40)
    where = "'Z', 'ë' .first in line 10, character 1. does not occur"
    fails(where, train, f"--model {name} --init_from first --data more.txt", base)
    fails("--n_embd is 16 in first; leave it out", train, f"{flags} --n_embd 32", base)


def test_what_a_model_cannot_go_on_as():
    train("--data text.txt --out_dir first --model mdm")
    flags = "--data text.txt --init_from first --model"
    fails("first: go on with it as --model mdm", train, f"{flags} lomdm")
    fails("first: go on with it as --model mdm", train, f"{flags} a3")
    fails("--tokenizer is that of first", train, f"{flags} mdm --tokenizer gpt2")
    Path("llama").mkdir()
    write("llama/tokenizer.json", "{}")
    write("llama/config.json", '{"model_type": "llama"}')
    fails("a LLaMA becomes --model a3", train, "--init_from llama --model mdm --data text.txt")


def test_resume_from_another_folder(monkeypatch, work):
    """Data that was named from the folder where the run began is found, or the line says where
    it was looked for."""
    write("val.txt", LINES * 2)
    train("--data text.txt --val_data val.txt --out_dir run")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    train("--resume --out_dir ../run --max_iters 3", base="--device cpu")
    evidence.Run("../run")
    (work / "text.txt").unlink()
    looked = re.escape(f"text.txt: no such file or folder in {Path.cwd()}")
    fails(looked, train, "--resume --out_dir ../run --max_iters 4", base="--device cpu")


def test_the_cost_of_a_text_of_ones_own(capsys):
    """As much as validation found, divided by what is said."""
    write("own.txt", "not to be\n" * 32)
    train("--data text.txt --val_data own.txt --model arm")
    best = torch.load("out/ckpt.pt", weights_only=True)["best"]

    capsys.readouterr()
    evidence.main(["perplexity", "out", "--val_data", "own.txt"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "out: 320 tokens, 96 words, 320 bytes in 20 windows of 16"
    for row, per, n in zip(rows, ("token", "word", "byte"), (320, 96, 320), strict=True):
        want = best * 320 / n
        assert float(row.split()[0]) == pytest.approx(want, abs=1e-4)
        assert f"nats per {per}, perplexity {math.exp(want):.4g} " in row
        assert row.endswith(f"all nats / all {per}s (exact)")
    evidence.main(["perplexity", "out"])
    assert capsys.readouterr().out.splitlines()[1:] == rows  # the run's own validation text
    own = ["perplexity", "out", "--val_data", write("short.txt", "to")]
    fails("--val_data short.txt has 2 tokens, a window 16", evidence.main, own)


# ---- figures -------------------------------------------------------------------------------


def test_one_window_has_no_error(capsys):
    write("val.txt", "to be, or not to be\n")
    train("--data text.txt --val_data val.txt --model arm")
    out = capsys.readouterr().out
    assert re.search(r"val \d\.\d{4} of one window nats/char, perplexity", out) and "±" not in out
    rows = [json.loads(row) for row in Path("out/log.jsonl").read_text().splitlines()]
    assert [row["val_error"] for row in rows if "val_error" in row] == [None]
    train("--resume --max_iters 3", base="--device cpu")


def test_a_bound_below_zero_is_explained():
    said = train_char.as_text("bound", -0.0012, 0.002, "nats/char")
    assert said.startswith("-0.0012 ± 0.0020 nats/char") and "few orders were drawn" in said
    assert "drawn" not in train_char.as_text("bound", 0.0012, 0.002, "nats/char")
