"""sample.py as its users meet it: prompts, gaps, orders and files. What they do wrong is in
test_mistakes.py."""

from pathlib import Path

import pytest
import torch

import sample
import train_char
from experiments import ready
from plumbing.cli import UserError

TINY = "--data text.txt --data_dir tokens --device cpu --max_iters 1 --num_samples 0 "
TINY += "--n_layer 1 --n_head 2 --n_embd 16 --seq_len 16 --batch_size 4"
# The lengths of blocks.
BLOCKS = {"lomdm": 16, "mdm": 16, "block": 4, "arm": 1, "a3": 1, "loa3": 1, "planned": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of each model, in a folder of its name."""
    where = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(where)
        Path("text.txt").write_text("to be, or not to be\n_" * 100)
        for model in BLOCKS:
            more = ["--block_len", "4"] if model == "block" else []
            train_char.main([*TINY.split(), "--model", model, "--out_dir", model, *more])
    return where


@pytest.fixture(autouse=True)
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)


@pytest.fixture
def draw(capsys):
    """draw(model, flags, text=..): what sample.py prints. What it says besides is in draw.said."""

    def draw(model, flags, **text):
        capsys.readouterr()
        words = [word for name, value in text.items() for word in (f"--{name}", value)]
        sample.main(["--device", "cpu", "--out_dir", model, *flags.split(), *words])
        printed, draw.said = capsys.readouterr()
        return printed

    return draw


def texts(out):
    """The samples printed, without order."""
    return [text.split("\n", 1)[1] for text in out.split("--- sample")[1:]]


def load(model):
    return sample.checkpoint.load(Path(model, "ckpt.pt"), train_char.make_model)


# ---- on the command line -------------------------------------------------------------------


def test_prompt_seed_and_order(draw):
    """The seed decides what is drawn. With --show order, dots stand below what was given."""
    flags = "--num_samples 2"
    first = draw("lomdm", flags, prompt="not to")
    assert first == draw("lomdm", f"{flags} --seed 1337", prompt="not to")
    assert first != draw("lomdm", f"{flags} --seed 1", prompt="not to")

    out = draw("lomdm", f"{flags} --show order --per_step 3", prompt="not to")
    assert out.startswith("order: the digit below")
    digits = [line for line in out.splitlines() if line.startswith("......")]
    assert len(digits) == 2  # six given characters begin both samples


@pytest.mark.parametrize(
    "flags,revealed_at",
    [
        ("", "...0369"),
        ("--per_step 2", "...0099"),
        ("--by left --per_step 3", "...0009"),
        ("--by random --per_step 4", "...0000"),
    ],
)
def test_a3_decoding(draw, flags, revealed_at):
    """An A3 reveals --per_step characters a call, from the left if nothing else is said."""
    out = draw("a3", f"--num_samples 1 --show order {flags}", infill="to ____")
    lines = out.splitlines()[2:]  # a line end may be drawn, and breaks them
    assert "".join(lines[::2]).startswith("to ") and "".join(lines[1::2]) == revealed_at


@pytest.mark.parametrize("model", BLOCKS)
def test_every_model_by_every_rule(draw, model):
    r"""Gaps are filled, the rest is kept; \_ stands for the character itself."""
    for by in sample.RULES:
        if (model, by) != ("a3", "order"):
            flags = f"--num_samples 2 --by {by} --top_p 0.9 --top_k 5"
            found = texts(draw(model, flags, infill=r"to __, or\_n_"))
            assert len(found) == 2
            assert all(text[:3] == "to " and text[5:11] == ", or_n" for text in found)


@pytest.mark.parametrize("model", ["a3", "loa3", "planned"])
def test_drafts(draw, model):
    """Greedy from the left, they change nothing. An order may be drawn with them, too."""
    greedy = "--temperature 0 --num_samples 2 --by left --prompt to --drafts"
    assert len({draw(model, f"{greedy} {drafts}") for drafts in (1, 2, 3, 4)}) == 1
    if model != "a3":
        [text] = texts(draw(model, "--num_samples 1 --drafts 3", infill="to __, or n_"))
        assert text[:3] == "to " and text[5:11] == ", or n"


def test_files(draw):
    draw("lomdm", "--num_samples 1 --html new/a.html --svg new/a.svg")
    assert "Written by lomdm, validation" in Path("new/a.html").read_text()
    assert Path("new/a.svg").read_text().startswith("<svg")


def test_length(draw):
    """The window slides; a prompt may be longer than it, which is said."""
    for length in 5, 50:
        for text in texts(draw("arm", f"--num_samples 2 --length {length}", prompt="to b")):
            body = text.rstrip("\n")
            assert body.startswith("to b") and abs(len(body) - length) <= 2  # a last line end
    out = draw("arm", "--length 30", prompt="to be, or not to be")
    assert "it reads the end of the prompt only" in draw.said
    assert all(text.startswith("to be, or not to be") for text in texts(out))


# ---- beyond the window ---------------------------------------------------------------------


@pytest.mark.parametrize("given", [3, 16, 20])
@pytest.mark.parametrize("model", ["lomdm", "a3", "arm", "block", "three blocks"])
def test_texts_beyond_the_window(monkeypatch, model, given):
    """Each window begins with the end of the text so far, half a window in whole blocks. What
    was written stays, and the calls of a window come after those of the one before."""
    if model == "three blocks":
        config = {"vocab_size": 9, "seq_len": 12, "n_layer": 1, "n_head": 2, "n_embd": 16}
        net = train_char.make_model("block", config | {"block_len": 4}).eval()
        L, K, keep = 12, 4, 4
    else:
        _, net = load(model)
        L, K, keep = 16, BLOCKS[model], 8
    windows = []
    real = net.sample

    def spy(z, **how):
        windows.append((z, *real(z, **how)))
        return windows[-1][1:]

    monkeypatch.setattr(net, "sample", spy)
    prompt = torch.full((2, given), 3)
    s = sample.Settings()
    x, at = sample.write(net, s, prompt, 45, None, torch.Generator().manual_seed(0))
    assert x.shape == at.shape == (2, 45) and (x < net.mask_id).all()
    assert torch.equal(x[:, :given], prompt)
    assert (at[:, :given] == -1).all() and (at[:, given:] >= 0).all()

    n = given
    last_call = -1
    for z, y, _ in windows:
        begin = 0 if n < L else n - keep
        assert torch.equal(z[:, : n - begin], x[:, begin:n])
        assert (z[:, n - begin :] == net.mask_id).all()
        before = n
        n = min(45, begin + L)
        assert z.shape[1] == -(-(n - begin) // K) * K  # no more than its whole blocks
        assert torch.equal(y[:, : n - begin], x[:, begin:n])
        assert at[:, before:n].min() > last_call
        last_call = at[:, before:n].max()
    assert n == 45


def test_texts_end_at_their_end(monkeypatch):
    """Here a tokenizer has an end of text, the letter b. Nothing is written once all texts
    have come to it, and nothing after it is shown."""
    ckpt, net = load("arm")
    tokenizer = sample.tokenizer_of(**ckpt["tokenizer"])
    end = int(tokenizer.encode("b")[0])
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(2, 1, dtype=torch.long)
    x, _ = sample.write(net, sample.Settings(), start, 4000, end, generator)
    assert x.shape[1] < 400 and (x == end).any(1).all()

    seen = []
    monkeypatch.setattr(type(tokenizer), "end", end)
    monkeypatch.setattr(sample.pictures, "show", lambda samples, order: seen.extend(samples))
    flags = ["--device", "cpu", "--out_dir", "arm", "--num_samples", "5"]
    sample.main([*flags, "--length", "400", "--prompt", "b"])
    assert len(seen) == 5
    for pieces, at in seen:
        assert len(pieces) == len(at) < 400 and pieces[0] == "b" and "b" not in pieces[1:]


# ---- weights that come with the code -------------------------------------------------------


def test_before_anything_is_trained(trained, tmp_path, monkeypatch, capsys):
    """Without out/, a model of ready/ writes, and says so. Its weights are the run's, rounded to
    bfloat16, in half the bytes."""
    with pytest.raises(UserError, match="would overwrite the run's"):
        ready.main(["loa3", "../" + Path.cwd().name + "/loa3"])
    ready.main(["loa3", str(tmp_path / "ready" / "loa3"), "--windows", "5"])
    printed = capsys.readouterr().out
    assert printed.startswith("loa3: ") and f"{tmp_path}/ready/loa3/ckpt.pt: " in printed

    monkeypatch.setattr(sample, "READY", tmp_path / "ready")
    monkeypatch.chdir(tmp_path)
    sample.main(["--prompt", "to", "--device", "cpu", "--num_samples", "2"])
    out, err = capsys.readouterr()
    assert all(text.startswith("to") for text in texts(out))
    assert err == f"no model in out/ yet, so that of {tmp_path}/ready/loa3 writes: see --out_dir\n"

    small, whole = load(tmp_path / "ready" / "loa3"), load(trained / "loa3")
    for name, p in whole[1].named_parameters():
        assert torch.equal(small[1].get_parameter(name), p.bfloat16().float()), name
    assert small[0]["model"]["wte.weight"].dtype == torch.bfloat16

    Path("out").mkdir()  # a start that failed
    sample.main(["--device", "cpu", "--num_samples", "1"])
    Path("out", "log.jsonl").touch()
    with pytest.raises(UserError, match="no checkpoint at out/ckpt.pt; train one"):
        sample.main(["--device", "cpu"])
