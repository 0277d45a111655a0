"""sample.py as its users meet it: prompts, gaps, orders, files and mistakes."""

import os
from pathlib import Path

import pytest
import torch

import sample
import train_char
from plumbing.cli import UserError

TINY = "--n_layer 1 --n_head 2 --n_embd 16 --seq_len 16 --batch_size 4 --device cpu --num_samples 0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of a small LoMDM in out/, and of others by their names."""
    where = tmp_path_factory.mktemp("trained")
    old = os.getcwd()
    os.chdir(where)
    Path("text.txt").write_text("to be, or not to be\n_" * 100)
    flags = f"--data text.txt --data_dir tokens --max_iters 1 {TINY}"
    train_char.main(flags.split())
    for model in ("a3", "loa3", "arm", "mdm", "block"):
        more = ["--block_len", "4"] if model == "block" else []
        train_char.main([*flags.split(), "--model", model, "--out_dir", model, *more])
    os.chdir(old)
    return where


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--out_dir", "nowhere"], "no checkpoint at nowhere.ckpt.pt; train one"),
        (["--prompt", "to Be"], "'B' does not occur in the text"),
        (["--prompt", "to", "--infill", "t_"], "one of the two"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--device", "cpu:7"], "none here"),
        (["--prompt", "to be, or not to "], "the prompt fills the window: --length above 17"),
        (["--prompt", "to be, or not to"], "the prompt fills the window: --length above 16"),
        (["--prompt", "to be", "--length", "5"], "the prompt has 5 tokens already"),
        (["--infill", "to _e", "--length", "9"], "not for --infill"),
        (["--drafts", "2"], "--drafts is for a3 and loa3, not lomdm"),
        (["--out_dir", "a3", "--drafts", "2", "--per_step", "2"], "drafts must be 1, or more by"),
        (["--html", "x/ckpt.pt"], "take another name"),
        (["--html", "x", "--svg", "x"], "take another name"),
        (["--html", "x", "--svg", "./x"], "take another name"),
        (["--out_dir", "a3", "--by", "order"], "'order' only if learned"),
        (["--top_p", "1.5"], "--top_p must be at most 1"),
        (["--infill", "to be"], "needs a gap"),
        (["--infill", r"to\_be"], "needs a gap"),
        (["--infill", "to be, or not to _"], "18 tokens"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--temperature", "nan"], "--temperature must be at least 0"),
        (["--temperature", "inf"], "--temperature must be a finite number"),
        (["--per_step", "0"], "--per_step must be at least 1"),
        (["--per_step", "17"], "--per_step: lomdm fills in a block of 16 at most in one call"),
        (["--top_k", "0"], "--top_k must be at least 1"),
        (["--num_samples", "0"], "--num_samples must be at least 1"),
        (["--num_samples", "99999999999999999999"], "--num_samples must be below"),
        (["--html", ""], "--html is empty"),
        (["--html", str(sample.pictures.PAGE)], "is the template of the page"),
        (["--svg", str(sample.pictures.PAGE)], "is the template of the page"),
        (["--device", "cuda:99"], "none here"),
        (["--out_dir", "a3", "--by", "margin", "--per_step", "0"], "--per_step must be at least 1"),
        (["--out_dir", "a3", "--infill", "to be, or not to _"], "18 tokens"),
    ],
)
def test_bad_sampling_flags(trained, monkeypatch, flags, message):
    monkeypatch.chdir(trained)
    template = sample.pictures.PAGE.read_bytes()
    with pytest.raises(UserError, match=message) as e:
        sample.main(["--device", "cpu", *flags])
    assert "\n" not in str(e.value)
    assert sample.pictures.PAGE.read_bytes() == template


@pytest.mark.parametrize("flag", ["--by luck", "--show me", "--temp 1", "--group_size 2"])
def test_unknown_flags(flag, capsys):
    with pytest.raises(SystemExit) as e:
        sample.main(flag.split())
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_prompt_seed_and_order(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    flags = ["--device", "cpu", "--num_samples", "2", "--prompt", "not to"]

    def out(*more):
        sample.main([*flags, *more])
        return capsys.readouterr().out

    assert out() == out("--seed", "1337") != out("--seed", "1")
    text = out("--show", "order", "--per_step", "3")
    assert text.startswith("order: the digit below")
    digits = [line for line in text.splitlines() if line.startswith("......")]
    assert len(digits) == 2  # six given characters begin both samples
    assert all(line in text for line in digits)


def test_gaps_and_underscores(trained, monkeypatch, capsys):
    r"""Gaps are filled, the rest is kept; \_ stands for the character itself."""
    monkeypatch.chdir(trained)
    for out_dir in ("out", "a3"):
        flags = ["--device", "cpu", "--num_samples", "2", "--out_dir", out_dir]
        sample.main([*flags, "--infill", r"e\_\_ __ or _o"])
        texts = capsys.readouterr().out.split("--- sample")[1:]
        assert len(texts) == 2
        for text in texts:
            text = text.split("\n", 1)[1][:11]
            assert text[:4] == "e__ " and text[6:10] == " or "


def test_a3_decoding(trained, monkeypatch, capsys):
    """--per_step characters a call, from the left or by a rule."""
    monkeypatch.chdir(trained)
    flags = ["--device", "cpu", "--num_samples", "1", "--out_dir", "a3", "--show", "order"]
    for how, calls in [
        ([], "0123"),
        (["--per_step", "2"], "0011"),
        (["--by", "left", "--per_step", "3"], "0001"),
        (["--by", "random", "--per_step", "4"], "0000"),
    ]:
        sample.main([*flags, "--infill", "to ____", *how])
        text, revealed_at = sampled(capsys.readouterr().out)
        tenths = {call: str(9 * int(call) // max(1, len(set(calls)) - 1)) for call in calls}
        assert text[:3] == "to " and len(text) == 7
        assert revealed_at == "..." + "".join(tenths[call] for call in calls)
    sample.main([*flags, "--infill", "to __ or", "--by", "entropy"])
    text, revealed_at = sampled(capsys.readouterr().out)
    assert text[:3] == "to " and text[5:] == " or" and revealed_at in ("...09...", "...90...")


def sampled(out):
    """The text and the digits of the one sample printed, a line end as a character."""
    lines = out.splitlines()[2:]
    return "".join(lines[::2]), "".join(lines[1::2])


def test_files(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    sample.main(
        ["--device", "cpu", "--num_samples", "1", "--html", "new/a.html", "--svg", "new/a.svg"]
    )
    assert "Written by lomdm, validation" in Path("new/a.html").read_text()
    assert Path("new/a.svg").read_text().startswith("<svg")


def test_damaged_weights_are_refused(trained, monkeypatch):
    """NaN weights pass every checksum, and would make sampling wait for ever."""
    monkeypatch.chdir(trained)
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    ckpt["model"]["g_hat.score.weight"][:] = torch.nan
    Path("nan").mkdir()
    torch.save(ckpt, "nan/ckpt.pt")
    with pytest.raises(UserError, match="does not hold the model"):
        sample.main(["--device", "cpu", "--out_dir", "nan"])


def test_tiny_temperatures(trained, monkeypatch, capsys):
    """As good as 0, and no division by it."""
    monkeypatch.chdir(trained)
    outs = set()
    for temperature in ("0", "1e-46", "1e-300"):
        for out_dir in ("out", "a3"):
            sample.main(f"--device cpu --out_dir {out_dir} --temperature {temperature}".split())
            outs.add((out_dir, capsys.readouterr().out))
    assert len(outs) == 2


@pytest.mark.parametrize("model", ["out", "a3", "loa3", "arm", "mdm", "block"])
def test_every_model_by_every_rule(trained, monkeypatch, capsys, model):
    monkeypatch.chdir(trained)
    for by in sample.RULES:
        if (model, by) != ("a3", "order"):
            flags = (
                f"--device cpu --out_dir {model} --num_samples 2 --by {by} --top_p 0.9 --top_k 5"
            )
            sample.main([*flags.split(), "--infill", "to __, or n_"])
            texts = capsys.readouterr().out.split("--- sample")[1:]
            for text in texts:
                text = text.split("\n", 1)[1]
                assert text[:3] == "to " and text[5:11] == ", or n"


@pytest.mark.parametrize("model", ["out", "a3", "arm", "block"])
def test_texts_beyond_the_window(trained, monkeypatch, model):
    """Each window begins with the end of the text so far, half a window in whole blocks, and what
    was written stays."""
    monkeypatch.chdir(trained)
    _, net = sample.checkpoint.load(Path(model) / "ckpt.pt", train_char.make_model)
    windows, real = [], net.sample

    def spy(z, **how):
        y, at = real(z, **how)
        windows.append((z, y))
        return y, at

    monkeypatch.setattr(net, "sample", spy)
    start = torch.tensor([[3, 1, 2]] * 2)
    for given in (3, 16, 20):
        windows.clear()
        prompt = start[:, :1].repeat(1, given)
        x, at = sample.write(
            net, prompt, 45, None, dict(generator=torch.Generator().manual_seed(0))
        )
        assert x.shape == at.shape == (2, 45) and (x < net.mask_id).all()
        assert torch.equal(x[:, :given], prompt) and (at[:, :given] == -1).all()
        assert (at[:, given:] >= 0).all()
        n = given
        for z, y in list(windows):
            begin = 0 if n < 16 else n - 8
            assert torch.equal(z[:, : n - begin], x[:, begin:n])
            assert (z[:, n - begin :] == net.mask_id).all()
            n, K = min(45, begin + 16), dict(a3=1, arm=1, block=4, out=16)[model]
            assert z.shape[1] == (n - begin + K - 1) // K * K  # no more than its whole blocks
            assert torch.equal(y[:, : n - begin], x[:, begin:n])
        assert n == 45
        calls = at[0, given:].unique()  # a diffusion model fills whole windows, then they are cut
        if model not in ("a3", "arm"):
            calls = calls.argsort()
        assert torch.equal(calls, torch.arange(len(calls)))


def test_length_on_the_command_line(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    flags = ["--device", "cpu", "--num_samples", "2", "--out_dir", "arm"]
    for length in ("5", "50"):
        sample.main([*flags, "--prompt", "to b", "--length", length, "--html", "a.html"])
        texts = capsys.readouterr().out.split("--- sample")[1:]
        for text in texts:
            body = text.split("\n", 1)[1].split("\nwrote")[0].rstrip("\n")
            assert body.startswith("to b") and abs(len(body) - int(length)) <= 2  # a last line end
    sample.main([*flags, "--prompt", "to be, or not to be", "--length", "30"])
    assert "it reads the end of the prompt only" in capsys.readouterr().out


def test_texts_end_at_their_end(trained, monkeypatch):
    """With a tokenizer that has an end of text, here the letter b: nothing is written once all have
    come to it, and nothing after it is shown."""
    monkeypatch.chdir(trained)
    ckpt, net = sample.checkpoint.load(Path("arm") / "ckpt.pt", train_char.make_model)
    tokenizer = sample.tokenizer_of(**ckpt["tokenizer"])
    end = int(tokenizer.encode("b")[0])
    g = torch.Generator().manual_seed(0)
    x, _ = sample.write(net, torch.zeros(2, 1).long(), 4000, end, dict(generator=g))
    assert x.shape[1] < 400 and (x == end).any(1).all()
    monkeypatch.setattr(type(tokenizer), "end", end)
    seen = []
    monkeypatch.setattr(sample.pictures, "show", lambda samples, order: seen.extend(samples))
    sample.main(
        [
            "--device",
            "cpu",
            "--num_samples",
            "5",
            "--out_dir",
            "arm",
            "--length",
            "400",
            "--prompt",
            "b",
        ]
    )
    assert len(seen) == 5
    for pieces, at in seen:
        assert len(pieces) == len(at) < 400 and pieces[0] == "b" and "b" not in pieces[1:]


def test_drafts_on_the_command_line(trained, monkeypatch, capsys):
    """Greedy, they change nothing."""
    monkeypatch.chdir(trained)
    outs = set()
    for drafts in "1234":
        flags = f"--device cpu --out_dir a3 --temperature 0 --num_samples 2 --drafts {drafts}"
        sample.main([*flags.split(), "--prompt", "to"])
        outs.add(capsys.readouterr().out)
    assert len(outs) == 1
