"""train_char.py and sample.py as their users meet them: runs, resumption, files and mistakes."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lomdm
import prepare
import sample
import train_char
from sample import UserError

ROOT = Path(__file__).parents[1]
TINY = "--n_layer 1 --n_head 2 --n_embd 16 --seq_len 16 --batch_size 4 --device cpu --num_samples 0"
TINY += " --data_dir tokens"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder with a text of 3,000 characters in it."""
    monkeypatch.chdir(tmp_path)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog.\n", "Yes:", "no"]
    text = " ".join(random.Random(0).choices(words, k=1000))[:3000]
    Path("text.txt").write_text(text, encoding="utf-8")
    return tmp_path


def train(flags, base=f"--data text.txt {TINY}"):
    train_char.main(f"{base} {flags}".split())


def checkpoint(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal bit by bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", train_char.MODELS)
def test_training_learns_and_samples(work, capsys, model):
    Path("text.txt").write_text("to be or not\n" * 400)
    flags = "--batch_size 16 --max_iters 300 --eval_interval 100 --learning_rate 1e-2"
    block_len = "--block_len 4" if model == "block" else ""
    train(f"--model {model} {flags} --warmup_iters 10 {block_len}")
    rows = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert rows[0]["settings"]["model"] == model and rows[0]["settings"]["data"] == "text.txt"
    kind = {"arm": "exact", "a3": "exact, random order"}.get(model, "bound")
    val = [r["val"] for r in rows if r.get("kind") == kind]
    assert len(val) == 3 and val[-1] < val[0]
    assert val[-1] < (0.3 if model == "arm" else 1.8)  # character frequencies alone give 1.951
    assert f"({kind})" in capsys.readouterr().out
    if model != "a3":
        assert rows[1]["nelbo"] == pytest.approx(rows[1]["recon"] + rows[1]["order"], rel=1e-5)
    sample.main(["--device", "cpu", "--num_samples", "2", "--infill", "ot\nto __ or _ot"])
    out = capsys.readouterr().out
    assert out.count("--- sample") == 2
    for text in out.split("--- sample")[1:]:
        first, second = text.split("\n")[1:3]
        assert first == "ot" and second[:3] == "to " and second[5:9] == " or "


@pytest.mark.parametrize("model", ["lomdm", "block --block_len 4", "a3 --shares 0.3,0,0.7"])
def test_resume_is_exact(work, model):
    """20 steps are 10 and 10 more: weights, optimizer and random states, bit for bit."""
    flags = f"--model {model} --dropout 0.1 --eval_interval 10 --lr_decay_iters 20"
    train(f"{flags} --max_iters 20 --out_dir whole")
    train(f"{flags} --max_iters 10 --out_dir halves")
    train("--resume --max_iters 20 --out_dir halves", base="")
    a, b = checkpoint("whole/last.pt"), checkpoint("halves/last.pt")
    for key in ("step", "model", "optimizer", "best"):
        assert same(a[key], b[key]), key
    halves, whole = (
        [json.loads(line) for line in Path(d, "log.jsonl").read_text().splitlines()[1:]]
        for d in ("halves", "whole")
    )
    timing = ("seconds", "tokens_per_second")
    for r in halves + whole:
        [r.pop(k, None) for k in timing]
    assert halves == whole
    train(f"{flags} --max_iters 20 --out_dir other --seed 7")
    assert not same(a["model"], checkpoint("other/last.pt")["model"])


def test_resume_remembers_the_best(work):
    """A checkpoint that is worse than one before the stop does not become ckpt.pt."""
    train("--max_iters 2 --eval_interval 1")
    torch.save(checkpoint("out/last.pt") | {"best": 0.5}, "out/last.pt")
    before = Path("out/ckpt.pt").read_bytes()
    train("--resume --max_iters 4", base="")
    assert checkpoint("out/last.pt")["best"] == 0.5
    assert Path("out/ckpt.pt").read_bytes() == before


def test_ctrl_c_saves_and_resumes(work):
    flags = f"--data text.txt {TINY} --eval_interval 100000 --max_iters 100000"
    script = [sys.executable, str(ROOT / "train_char.py")]
    run = subprocess.Popen([*script, *flags.split()], stderr=subprocess.PIPE, text=True)
    log = Path("out/log.jsonl")
    for _ in range(600):  # until it trains
        if log.exists() and len(log.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and "Traceback" not in err
    assert "all saved; go on with: python train_char.py --resume --out_dir out" in err
    stopped = checkpoint("out/last.pt")["step"]
    assert stopped >= 20
    train(f"--resume --max_iters {stopped + 3} --eval_interval 2", base="")
    assert checkpoint("out/last.pt")["step"] == stopped + 3
    # and the same number of steps without a stop gives the same weights
    train(
        f"--max_iters {stopped + 3} --lr_decay_iters 100000 --eval_interval 100000 --out_dir whole"
    )
    assert same(checkpoint("out/last.pt")["model"], checkpoint("whole/last.pt")["model"])


def test_validation_covers_the_split_and_repeats(work):
    """The mean over all characters, the last short window included, and the same number each
    time."""
    train("--model arm --max_iters 3 --eval_interval 3")
    ckpt, model = sample.load_checkpoint("out/ckpt.pt", torch.device("cpu"))
    s = train_char.Settings(**ckpt["settings"])
    val = prepare.load("text.txt", folder="tokens")[0].val
    assert len(val) == 300 and len(val) % 16
    figure = train_char.figures(model.eval(), s)["exact"]
    mean, error = train_char.evaluate(figure, val, s, torch.device("cpu"))
    x = torch.from_numpy(val.astype("int64"))
    nats = [model.nelbo(x[None, i : i + 16]).item() for i in range(0, 300, 16)]
    assert mean == pytest.approx(sum(nats) / 300, rel=1e-5) == ckpt["best"]
    per_char = torch.tensor(nats[:-1]) / 16  # nearly the plain standard error of the full windows
    assert error == pytest.approx(per_char.std().item() / len(nats) ** 0.5, rel=0.1)

    train("--model lomdm --max_iters 3 --eval_interval 3")
    ckpt, model = sample.load_checkpoint("out/ckpt.pt", torch.device("cpu"))
    s = train_char.Settings(**ckpt["settings"])
    figure = train_char.figures(model.eval(), s)["bound"]
    first = train_char.evaluate(figure, val, s, torch.device("cpu"))
    torch.rand(10)
    assert train_char.evaluate(figure, val, s, torch.device("cpu")) == first
    assert first[0] == ckpt["best"]


def test_an_earlier_run_is_kept(work):
    train("--max_iters 2 --seed 1")
    before = checkpoint("out/last.pt")
    train("--max_iters 2 --seed 2")
    assert same(before, checkpoint("out.1/last.pt")) and (work / "out.1/log.jsonl").exists()
    assert not same(before["model"], checkpoint("out/last.pt")["model"])


def test_learning_rate():
    s = train_char.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    at = [train_char.learning_rate(i, s) for i in (0, 9, 10, 60, 110, 200)]
    assert at == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_shakespeare(work, monkeypatch, capsys):
    """A file that is there is checked; a download too; without network Python's own text is
    taken."""
    there = work / "tokens" / "tinyshakespeare" / "input.txt"

    def no_network(*a, **kw):
        raise OSError("no network")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", no_network)
    train("--max_iters 1", base=TINY)
    assert "no tinyshakespeare (no network)" in capsys.readouterr().out
    assert checkpoint("out/last.pt")["settings"]["data"] == "python-docs"
    header = json.loads(Path("out/log.jsonl").read_text().splitlines()[0])
    assert header["settings"]["data"] == "python-docs"
    assert not there.parent.exists()
    train("--resume --max_iters 2", base="")  # with the text it began with

    class Response:
        def __enter__(self):
            return self

        def __exit__(self, *a):
            pass

        def read(self):
            return b"First Citizen"

    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *a, **kw: Response())
    with pytest.raises(UserError, match="wrong checksum; try again"):
        train("--max_iters 1", base=TINY)
    assert not there.exists()
    digest = prepare.hashlib.sha256(b"First Citizen").hexdigest()
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", digest)
    with pytest.raises(UserError, match="has 11 . 2 tokens"):
        train("--max_iters 1", base=TINY)
    assert there.read_bytes() == b"First Citizen" and os.listdir(there.parent) == ["input.txt"]
    there.write_bytes(b"First Cit")
    with pytest.raises(UserError, match="wrong checksum: delete it"):
        train("--max_iters 1", base=TINY)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--n_head 3", "n_embd .16. must be divisible by n_head .3."),
        ("--model block --block_len 5", "seq_len .16. must be divisible by block_len .5."),
        ("--model block --block_len 16", "between 1, --model arm, and 16, --model mdm"),
        ("--model arm --block_len 4", "--block_len is for --model block or lomdm, not arm"),
        ("--c1 0.5 --c2 0.6", "c1 .0.5. must be above c2 .0.6."),
        ("--model mdm --c2 0.1", "--c2 is for --model lomdm, not mdm"),
        ("--model a3 --shares 1,1,1", "shares must be three numbers >= 0 that sum to 1"),
        ("--model a3 --shares a,b", "--shares a,b --group_size 1: could not convert"),
        ("--model a3 --group_size 0", "group_size must be at least 1"),
        ("--model a3 --init_from nowhere", "no checkpoint at nowhere.ckpt.pt"),
        ("--init_from nowhere", "--init_from is for --model a3, not lomdm"),
        ("--max_iters 0", "--max_iters must be at least 1"),
        ("--learning_rate nan", "--learning_rate must be at least"),
        ("--beta2 1", "--beta1, --beta2 and --ema must be in .0, 1."),
        ("--data missing.txt", "missing.txt: no such file or folder"),
        ("--data good", "good has no .txt or .jsonl files"),
        ("--data empty.txt", "has 0 . 0 tokens to train and validate on"),
        (
            "--data short.txt",
            "has 27 . 3 tokens to train and validate on, too few for a window of 16",
        ),
        ("--data latin1.txt", "latin1.txt is not UTF-8 text"),
        ("--device tpu9", "torch knows"),
        ("--device cuda:99", "asked for, but there is none here"),
        ("--out_dir text.txt", "cannot write"),
        ("--resume", "no checkpoint at out.last.pt; train one"),
        ("--resume --out_dir cut", "damaged, cut off or not a checkpoint"),
        ("--resume --out_dir damaged", "damaged, cut off or not a checkpoint"),
        ("--resume --out_dir keyless", "incomplete, or from another version"),
        ("--out_dir .", "a folder of its own"),
        ("--lr_decay_iters 0", "--lr_decay_iters must be at least 1"),
        ("--model block --block_len 0", "must lie between"),
        ("--seed 99999999999999999999", "--seed below"),
        ("--model a3 --shares nan,0,1", "three numbers >= 0"),
        ("--resume --out_dir foreign", "not written by this version"),
        ("--resume --out_dir good --n_layer 2", "--n_layer 2 is not what the run in good has .1."),
        ("--resume --out_dir good --data short.txt", "has 27 . 3 tokens"),
        ("--resume --out_dir good --data other.txt", "not the text that this run began with"),
        ("--resume --out_dir mixed", "does not hold the model"),
    ],
)
def test_bad_training_flags(work, flags, message):
    Path("empty.txt").touch()
    Path("short.txt").write_text("x" * 30)
    Path("latin1.txt").write_bytes(b"caf\xe9 " * 100)
    Path("other.txt").write_text("something else " * 100)
    for name in ("cut", "foreign", "mixed", "damaged", "keyless", "good"):
        Path(name).mkdir()
    if "resume" in flags:
        train("--max_iters 1 --out_dir good")
        good = Path("good/last.pt").read_bytes()
        Path("cut/last.pt").write_bytes(good[: len(good) // 2])
        middle = len(good) // 3
        Path("damaged/last.pt").write_bytes(good[:middle] + b"\xff" * 64 + good[middle + 64 :])
        torch.save(
            {k: v for k, v in checkpoint("good/last.pt").items() if k != "optimizer"},
            "keyless/last.pt",
        )
        torch.save({"model": {}}, "foreign/last.pt")
        torch.save(checkpoint("good/last.pt") | {"model": {}}, "mixed/last.pt")
    with pytest.raises(UserError, match=message) as e:
        train(flags, base="" if "resume" in flags else f"--data text.txt {TINY}")
    assert "\n" not in str(e.value)
    if "resume" in flags:
        assert Path("good/last.pt").read_bytes() == good


def test_resume_with_another_text(work):
    train("--max_iters 1")
    Path("text.txt").write_text("something else " * 100)
    with pytest.raises(UserError, match="not the text that this run began with"):
        train("--resume --max_iters 2", base="")


def test_a3_starts_from_an_arm(work, capsys):
    """The ARM's sizes are taken over and its weights are there before the first step; what is not
    an ARM, or not of this text or size, is refused."""
    train("--model arm --max_iters 20 --learning_rate 1e-2 --out_dir arm")
    flags = "--data text.txt --device cpu --num_samples 0 --batch_size 4 --max_iters 1 --model a3"
    train("--init_from arm --learning_rate 1e-9", base=flags)
    assert "loaded an ARM; new: query, wpe_query" in capsys.readouterr().out
    arm, adapted = checkpoint("arm/ckpt.pt"), checkpoint("out/ckpt.pt")
    for name in ("wte.weight", "blocks.0.qkv.weight", "lm_head.weight"):
        torch.testing.assert_close(adapted["model"][name], arm["model"][name], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="not an ARM of this size: wte.weight is .32, 16., not"):
        train("--init_from arm --n_embd 32", base=flags)
    train("--model mdm --max_iters 1 --out_dir mdm")
    with pytest.raises(UserError, match="needs an ARM; mdm holds a model mdm"):
        train("--init_from mdm", base=flags)
    Path("other.txt").write_text("abc" * 1000)
    with pytest.raises(UserError, match="has another vocabulary than --data other.txt"):
        train("--init_from arm --data other.txt", base=flags)


@pytest.mark.parametrize(
    "argv", ["--learning_rat 1", "--model gpt", "--max_iters ten", "--compile=2"]
)
def test_unknown_flags(argv, capsys):
    with pytest.raises(SystemExit) as e:
        train_char.main(argv.split())
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_nan_names_the_step_and_the_last_good_checkpoint(work, monkeypatch):
    loss = lomdm.LoMDM.loss

    def spoilt(self, x, k):
        self.calls = getattr(self, "calls", 0) + 1
        value, metrics = loss(self, x, k)
        bad = torch.nan if self.calls == 7 else 1.0
        return value * bad, {k: v * bad for k, v in metrics.items()}

    monkeypatch.setattr(lomdm.LoMDM, "loss", spoilt)
    with pytest.raises(UserError, match=r"not finite at step 7; .*: out.last.pt \(step 5\)"):
        train("--max_iters 20 --eval_interval 5")
    assert checkpoint("out/last.pt")["step"] == 5
    with pytest.raises(UserError, match="not finite at step 7; last good checkpoint: none yet"):
        train("--max_iters 20 --eval_interval 10 --out_dir out2")
    assert not Path("out2/last.pt").exists()


def test_a_full_disk_keeps_the_old_checkpoint(work, monkeypatch):
    train("--max_iters 2 --eval_interval 2")
    before = {name: Path("out", name).read_bytes() for name in ("last.pt", "ckpt.pt")}

    def full(obj, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write out.*: is the disk full"):
        train("--resume --max_iters 4", base="")
    assert all(Path("out", name).read_bytes() == before[name] for name in before)
    assert not list(work.glob("out/*.tmp"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of a small LoMDM in out/ and of an A3 in a3/."""
    where = tmp_path_factory.mktemp("trained")
    old = os.getcwd()
    os.chdir(where)
    Path("text.txt").write_text("to be, or not to be\n" * 100)
    train("--max_iters 1")
    train("--max_iters 1 --model a3 --out_dir a3")
    os.chdir(old)
    return where


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--out_dir", "nowhere"], "no checkpoint at nowhere.ckpt.pt; train one"),
        (["--prompt", "to Be"], "'B' does not occur in the text"),
        (["--seed", "-1"], "--seed in .0, 2.63."),
        (["--device", "cpu:7"], "none here"),
        (["--prompt", "to be, or not to "], "17 tokens, the model's window 16"),
        (["--prompt", "to be, or not to"], "nothing left to write"),
        (["--infill", "to be"], "needs a gap"),
        (["--infill", "to be, or not to _"], "18 tokens"),
        (["--temperature", "-1"], "temperature must be >= 0"),
        (["--temperature", "nan"], "temperature must be >= 0"),
        (["--per_step", "0"], "per_step >= 1"),
        (["--top_k", "0"], "top_k >= 1"),
        (["--num_samples", "0"], "--num_samples must be at least 1"),
        (["--html", str(ROOT / "page.html")], "is the template of that page"),
        (["--device", "cuda:99"], "none here"),
        (["--by", "left"], "--by and --group_size are for a3; out holds lomdm"),
        (["--out_dir", "a3", "--per_step", "2"], "--per_step goes with another --by"),
        (["--out_dir", "a3", "--by", "margin", "--group_size", "2"], "goes with --by left"),
        (["--out_dir", "a3", "--group_size", "0"], "--group_size must be at least 1"),
        (["--out_dir", "a3", "--by", "margin", "--per_step", "0"], "per_step >= 1"),
        (["--out_dir", "a3", "--infill", "to be, or not to _"], "18 tokens"),
    ],
)
def test_bad_sampling_flags(trained, monkeypatch, flags, message):
    monkeypatch.chdir(trained)
    with pytest.raises(UserError, match=message) as e:
        sample.main(["--device", "cpu", *flags])
    assert "\n" not in str(e.value)


def test_scripts_print_one_line_and_exit_1(trained):
    """The whole way out: no traceback, exit code 1, nothing on stdout."""
    for script, flags in [("train_char.py", "--data nope.txt"), ("sample.py", "--out_dir nope")]:
        argv = [sys.executable, str(ROOT / script), *flags.split()]
        got = subprocess.run(argv, capture_output=True, text=True, cwd=trained)
        assert got.returncode == 1 and got.stdout == ""
        assert got.stderr.startswith("error: ") and got.stderr.count("\n") == 1


# ---- sampling ------------------------------------------------------------------------------------


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


def test_a3_decoding(trained, monkeypatch, capsys):
    """--group_size and --per_step are characters a call; gaps are filled and the rest is kept."""
    monkeypatch.chdir(trained)
    flags = ["--device", "cpu", "--num_samples", "1", "--out_dir", "a3", "--show", "order"]
    for how, calls in [
        ([], "0123"),
        (["--group_size", "2"], "0011"),
        (["--by", "random", "--per_step", "4"], "0000"),
    ]:
        sample.main([*flags, "--infill", "to ____", *how])
        text, revealed_at = sampled(capsys.readouterr().out)
        tenths = {call: str(9 * int(call) // max(1, len(set(calls)) - 1)) for call in calls}
        assert text[:3] == "to " and "_" not in text and len(text) == 7
        assert revealed_at == "..." + "".join(tenths[call] for call in calls)
    sample.main([*flags, "--infill", "to __ or", "--by", "entropy"])
    text, revealed_at = sampled(capsys.readouterr().out)
    assert text[:3] == "to " and text[5:] == " or" and revealed_at in ("...09...", "...90...")


def sampled(out):
    """The text and the digits of the one sample printed, a line end as a character."""
    lines = out.splitlines()[2:]
    return "".join(lines[::2]), "".join(lines[1::2])


def test_render():
    """0 is the first call, 9 the last; line ends show and break; given characters are dots or
    plain, and what is not printable never reaches the terminal."""
    assert sample.render("ab\nc", [-1, 0, 9, 5], colour=False) == "ab↵\n.09\nc\n4"
    assert sample.render("ab", [3, 7], colour=False) == "ab\n09"
    assert sample.render("\x1b[", [1, 1], colour=False) == "·[\n00"
    coloured = sample.render("abc", [-1, 0, 99], colour=True)
    assert coloured == "a\033[38;5;196mb\033[0m\033[38;5;63mc\033[0m"


def test_damaged_weights_are_refused(trained, monkeypatch):
    """NaN weights pass every checksum, and would make sampling wait for ever."""
    monkeypatch.chdir(trained)
    ckpt = checkpoint("out/ckpt.pt")
    ckpt["model"]["g_hat.score.weight"][:] = torch.nan
    Path("nan").mkdir()
    torch.save(ckpt, "nan/ckpt.pt")
    with pytest.raises(UserError, match="does not hold the model"):
        sample.main(["--device", "cpu", "--out_dir", "nan"])


def test_resume_survives_a_move_and_a_torn_log(work, capsys):
    """A folder that was renamed goes on where it is, and a half-written log never blocks
    weights."""
    train("--max_iters 4 --eval_interval 2 --lr_decay_iters 6 --out_dir before")
    Path("before").rename("after")
    Path("text.txt").rename("moved.txt")
    with open("after/log.jsonl", "a") as f:
        f.write('1}\n{"step": 99}\n{"step": 3, "loss"')
    train("--resume --out_dir after --max_iters 6 --data moved.txt", base="")
    assert checkpoint("after/last.pt")["step"] == 6 and not Path("before").exists()
    steps = [
        json.loads(line).get("step", 0) for line in Path("after/log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps) and steps[-1] == 6
    capsys.readouterr()
    train("--resume --out_dir after --max_iters 2", base="")
    assert "already at step 6" in capsys.readouterr().out
    train("--resume --out_dir after --max_iters 7 --learning_rate 1e-5", base="")
    assert checkpoint("after/last.pt")["settings"]["min_lr"] == pytest.approx(1e-6)


# ---- several processes, and sudden ends ----------------------------------------------------------


def losses(out_dir):
    rows = [json.loads(line) for line in Path(out_dir, "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["nelbo"] for row in rows[1:] if "nelbo" in row}


@pytest.mark.parametrize("model", ["lomdm", "a3 --shares 0.3,0,0.7"])
def test_two_processes_do_what_one_does(work, model):
    """Gradients, and so weights, losses and validation, of torchrun with two processes and of one
    with the same four micro-batches a step; dropout, races and partitions included. Windows, orders
    and counts differ between micro-batches."""
    flags = f"--model {model} --data text.txt {TINY} --gradient_accumulation_steps 4 --dropout 0.1 "
    flags += "--max_iters 4 --eval_interval 4 --log_interval 1 --warmup_iters 0 --grad_clip 1e9"
    train(flags + " --out_dir one", base="")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*run, str(ROOT / "train_char.py"), *flags.split(), "--out_dir", "two"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    got = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=240)
    assert got.returncode == 0, got.stderr
    assert got.stdout.count("parameters") == 1  # one process prints
    one, two = checkpoint("one/last.pt"), checkpoint("two/last.pt")
    assert one["step"] == two["step"] == 4
    # Adam divides by the size of the gradient: its moments say how large the gradients were
    for a, b in zip(*(c["optimizer"]["state"].values() for c in (one, two)), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5 * float(a[key].max()))
    for name, p in one["model"].items():
        torch.testing.assert_close(p, two["model"][name], rtol=0, atol=1e-4)
    assert losses("one") == pytest.approx(losses("two"), rel=1e-5) and len(losses("two")) == 4
    assert one["best"] == pytest.approx(two["best"], rel=1e-5)

    # and one process with a single micro-batch has other gradients
    train(flags.replace("steps 4", "steps 1") + " --out_dir less", base="")
    assert losses("less")[1] != pytest.approx(losses("one")[1], rel=1e-4)


def test_micro_batches_share_a_step(work):
    """Four micro-batches draw their windows and counts together: as one batch four times as
    large."""
    s = train_char.Settings(data="text.txt", data_dir="tokens", model="mdm", seq_len=16)
    s.batch_size, s.n_layer, s.n_head, s.n_embd = 4, 1, 2, 16
    train_char.settle(s, torch.device("cpu"))
    s.gradient_accumulation_steps = 4
    run = train_char.Run(s, torch.device("cpu"))
    x, k = (torch.cat(parts) for parts in zip(*(run.batch(m) for m in range(4)), strict=True))
    assert k.flatten().sort().values.tolist() == list(range(16))
    assert len(x.unique(dim=0)) == 16
    run.step = 1
    assert not torch.equal(x[:4], run.batch(0)[0])


def test_accumulation_needs_equal_shares(work, monkeypatch):
    monkeypatch.setattr(train_char, "WORLD", 2)
    s = train_char.Settings(gradient_accumulation_steps=3)
    with pytest.raises(UserError, match="3 must be divisible by the 2 processes"):
        train_char.settle(s, torch.device("cpu"))


def test_averaged_weights(work):
    """--ema: the exponential average of the weights after each step, saved for use, and carried on
    by --resume."""
    flags = "--model arm --eval_interval 1 --ema 0.8 --lr_decay_iters 4 --learning_rate 1e-2"
    average = None
    for step in range(1, 5):  # stopped after every step
        train("--resume --max_iters 4".replace("4", str(step)), base="") if step > 1 else train(
            f"{flags} --max_iters 1"
        )
        raw, name = checkpoint("out/last.pt")["model"], "lm_head.weight"
        average = raw[name] if average is None else 0.8 * average + 0.2 * raw[name]
        ckpt = checkpoint("out/last.pt")
        torch.testing.assert_close(ckpt["ema"][f"module.{name}"], average)
    used = checkpoint("out/ckpt.pt")
    assert used["step"] == 4 and "optimizer" not in used
    torch.testing.assert_close(used["model"][name], average)
    assert (used["model"][name] - raw[name]).abs().max() > 1e-3
    train(f"{flags} --max_iters 4 --out_dir whole")
    assert same(checkpoint("whole/last.pt")["ema"], ckpt["ema"])


def test_presets():
    """--preset gpt2 is GPT-2 small, 12 layers x 768 and half a million tokens a step."""
    s = train_char.Settings(preset="gpt2", model="arm", n_layer=1)
    train_char.settle(s, torch.device("cpu"))
    assert s.batch_size * s.gradient_accumulation_steps * s.seq_len == 2**19
    assert (s.n_layer, s.n_embd, s.learning_rate, s.dtype, s.compile) == (
        1,
        768,
        6e-4,
        "float32",
        0,
    )
    with torch.device("meta"):
        model = train_char.make_model(s, 50257)
    n = {name: p.numel() for name, p in model.named_parameters()}
    block = sum(v for name, v in n.items() if name.startswith("blocks."))
    assert block == 768 * 768 * 4 + 3 * 768 * 2048 + 2 * 768
    assert model.lm_head.weight.shape == (50304, 768) and model.config.vocab_size == 50257


KILLS = int(os.environ.get("KILLS", 3))  # 20 in the long version


def test_kill_at_any_moment(work):
    """kill -9 while it trains, validates and writes: both checkpoints always load, training goes on
    from the last one, and in the end it is the run that was never killed, step by step."""
    rng = random.Random(1)
    flags = f"--data text.txt {TINY} --model lomdm --n_embd 64 --eval_interval 1 --log_interval 1"
    flags += " --eval_windows 2"
    script, first = [sys.executable, str(ROOT / "train_char.py")], True
    for _ in range(KILLS):
        how = flags.split() if first else ["--resume"]
        begun = checkpoint("out/last.pt")["step"] if not first else 0
        started = time.time()
        argv = [*script, *how, "--max_iters", "100000", "--lr_decay_iters", "300"]
        run = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        os.set_blocking(run.stderr.fileno(), False)
        log, deadline = Path("out/log.jsonl"), time.monotonic() + 60
        while time.monotonic() < deadline:  # until it trains, and then a while
            if log.exists() and log.stat().st_mtime > started:
                with contextlib.suppress(ValueError):  # a line that is being written
                    if max(losses("out"), default=0) > begun:
                        break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        assert run.poll() is None, run.stderr.read()
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stderr.close()
        if Path("out/last.pt").exists():
            first = False
            assert sample.load_checkpoint("out/ckpt.pt", "cpu")
            assert sample.load_checkpoint("out/last.pt", "cpu")[0]["step"] >= begun
    last = checkpoint("out/last.pt")["step"]
    assert last > KILLS and not any(p.name != "out" for p in work.glob("out*"))
    train(f"--resume --max_iters {last + 2}", base="")
    train(f"{flags} --max_iters {last + 2} --lr_decay_iters 300 --out_dir whole", base="")
    for key in ("step", "model", "optimizer", "best"):
        assert same(checkpoint("out/last.pt")[key], checkpoint("whole/last.pt")[key]), key
    assert losses("out") == losses("whole")


def test_a_really_full_disk(work):
    """Files may not grow beyond 60 kB: the error is one line, the earlier run still there, and
    nothing half-written besides it."""
    resource = pytest.importorskip("resource")
    train("--max_iters 1")
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    argv = [sys.executable, str(ROOT / "train_char.py"), "--resume", "--max_iters", "2"]
    got = subprocess.run(argv, capture_output=True, text=True, preexec_fn=limit)
    assert got.returncode == 1 and "Traceback" not in got.stderr
    assert "error: cannot write out/" in got.stderr.splitlines()[-1]
    for name in ("out/ckpt.pt", "out/last.pt"):
        assert Path(name).read_bytes() == before[Path(name)]
    assert not list(Path("out").glob("*.tmp"))
