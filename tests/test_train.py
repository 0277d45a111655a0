"""train_char.py as its users meet it: runs, resumption, files and mistakes."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import a3
import lomdm
import sample
import train_char
from plumbing import checkpoint as checkpoints
from plumbing import data
from plumbing.cli import UserError

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
    kind = next(iter(train_char.MODELS[model][3]))
    assert kind == {"arm": "exact", "a3": "exact, random order"}.get(model, "bound")
    val = [r["val"] for r in rows if r.get("kind") == kind]
    assert len(val) == 3 and val[-1] < val[0]
    assert val[-1] < (0.3 if model == "arm" else 1.8)  # character frequencies alone give 1.951
    assert f"({kind})" in capsys.readouterr().out
    if model != "a3":
        assert rows[1]["nelbo"] == pytest.approx(rows[1]["recon"] + rows[1]["order"], rel=1e-5)
    flags = ["--device", "cpu", "--num_samples", "2"]
    sample.main([*flags, "--temperature", "0", "--infill", "ot\nto __ or _ot"])
    out = capsys.readouterr().out
    assert out.count("--- sample") == 2
    for text in out.split("--- sample")[1:]:
        drawn = text.partition("\n")[2]  # a line end may be drawn, too
        assert drawn[:6] == "ot\nto " and drawn[8:12] == " or " and drawn[13:15] == "ot"


@pytest.mark.parametrize("model", ["lomdm", "block --block_len 4", "a3 --shares 0.3,0,0.7", "loa3"])
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


def wait_for_log(lines=3):
    log = Path("out/log.jsonl")
    for _ in range(600):  # until it trains
        if log.exists() and len(log.read_text().splitlines()) >= lines:
            return
        time.sleep(0.1)


def start(flags, **kw):
    argv = [sys.executable, str(ROOT / "train_char.py"), *flags.split()]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, **kw)


LONG = f"--data text.txt {TINY} --eval_interval 100000 --max_iters 100000"


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP", "SIGINT twice"])
def test_a_signal_saves_and_resumes(work, how):
    """Acknowledged at once, a clean end without "error", and exit code 128 + signal; two presses of
    Ctrl-C within 50 ms are one."""
    run = start(LONG)
    wait_for_log()
    number = getattr(signal, how.split()[0])
    run.send_signal(number)
    if "twice" in how:
        time.sleep(0.05)
        run.send_signal(number)
    err = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + number and "Traceback" not in err and "error" not in err
    assert "stopping after this step; saving" in err
    assert "all saved; go on with: python train_char.py --resume --out_dir out" in err
    stopped = checkpoint("out/last.pt")["step"]
    assert stopped >= 20
    train(f"--resume --max_iters {stopped + 3} --eval_interval 2", base="")
    assert checkpoint("out/last.pt")["step"] == stopped + 3
    if how == "SIGINT":  # and the same number of steps without a stop gives the same weights
        more = "--lr_decay_iters 100000 --eval_interval 100000 --out_dir whole"
        train(f"--max_iters {stopped + 3} {more}")
        assert same(checkpoint("out/last.pt")["model"], checkpoint("whole/last.pt")["model"])


def test_two_runs_do_not_share_a_folder(work):
    """Neither a new run nor a resumed one enters a folder that another is writing to, and what is
    there stays; when that one is killed, the folder is free."""
    run = start(LONG)
    wait_for_log()
    for flags, base in [("--max_iters 2", f"--data text.txt {TINY}"), ("--resume", "")]:
        if base:
            with pytest.raises(UserError, match="another run is writing to out"):
                train(flags, base=base)
        assert not Path("out.1").exists()
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    again = start("--resume --max_iters 200000")
    before = len(Path("out/log.jsonl").read_text().splitlines())
    wait_for_log(before + 2)
    with pytest.raises(UserError, match="another run is writing to out"):
        train("--resume", base="")
    again.kill()
    again.communicate()
    step = checkpoint("out/last.pt")["step"]
    train(f"--resume --max_iters {step + 1} --eval_interval 1", base="")


def test_a_finished_run_is_not_validated_again(work, capsys):
    """--resume of it changes neither its log nor its checkpoints."""
    train("--max_iters 4 --eval_interval 2")
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    train("--resume", base="")
    assert "already at step 4" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before


def test_stopped_before_its_first_validation(work):
    """Then there is no best checkpoint, and the message says how to get one."""
    run = start(LONG)
    wait_for_log()
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    with pytest.raises(UserError, match="only last.pt: no validation yet: --resume goes on"):
        train("--resume --max_iters 1", base="")


def test_validation_covers_the_split_and_repeats(work):
    """The mean over all whole windows, and the same number each time."""
    train("--model arm --max_iters 3 --eval_interval 3")
    cpu = torch.device("cpu")
    ckpt, model = checkpoints.load("out/ckpt.pt", train_char.make_model)
    s = train_char.Settings(**ckpt["settings"])
    val = data.load("text.txt", folder="tokens").val
    assert len(val) == 300 and len(val) % 16
    [(kind, mean, error)] = train_char.estimate_loss(model.eval(), val, s, cpu)
    x = torch.from_numpy(val.astype("int64"))[:288].view(18, 16)
    nats = model.nelbo(x).double() / 16
    assert kind == "exact" and mean == pytest.approx(nats.mean().item(), rel=1e-5) == ckpt["best"]
    assert error == pytest.approx(nats.std().item() / 18**0.5, rel=1e-5)

    train("--model lomdm --max_iters 3 --eval_interval 3")
    ckpt, model = checkpoints.load("out/ckpt.pt", train_char.make_model)
    s = train_char.Settings(**ckpt["settings"])
    first = train_char.estimate_loss(model.eval(), val, s, cpu)
    torch.rand(10)
    assert train_char.estimate_loss(model, val, s, cpu) == first
    assert first[0][1] == ckpt["best"]


def test_validation_windows_are_spread(work, monkeypatch):
    """--eval_windows of them at even distances, the same for every model; all if there are
    fewer."""
    seen = []

    class Sum:
        def nelbo(self, x, draws, generator, times):
            seen.extend(x.tolist())
            return x.double().sum(1) * times

    monkeypatch.setitem(train_char.MODELS, "mdm", ("", {}, (), {"sum": dict(times=1)}))
    s = train_char.Settings(model="mdm", seq_len=4, eval_windows=5)
    val, cpu = np.arange(42, dtype=np.uint16), torch.device("cpu")
    [(_, mean, _)] = train_char.estimate_loss(Sum(), val, s, cpu)
    assert [row[0] for row in seen] == [0, 8, 16, 24, 32] and mean == np.mean(seen)
    seen.clear()
    s.eval_windows = 10
    [(_, mean, _)] = train_char.estimate_loss(Sum(), val, s, cpu)
    assert [row[0] for row in seen] == [*range(0, 40, 4)] and mean == val[:40].mean()


@pytest.mark.parametrize(
    "name,sizes",
    [
        (
            "a3",
            {"exact, random order": 1, "exact, left to right": 0, "exact, random groups of 4": 4},
        ),
        ("loa3", {"bound": None, "exact, random order": 1, "exact, left to right": 0}),
    ],
)
def test_figures_of_two_streams_are_what_they_say(work, name, sizes):
    train(f"--model {name} --max_iters 3 --eval_draws 2")
    ckpt, model = checkpoints.load("out/ckpt.pt", train_char.make_model)
    s = train_char.Settings(**ckpt["settings"])
    val = data.load("text.txt", folder="tokens").val
    found = train_char.estimate_loss(model.eval(), val, s, torch.device("cpu"))
    assert [figure for figure, _, _ in found] == list(sizes)
    x = torch.from_numpy(val.astype("int64"))[:288].view(18, 16)
    for (_, mean, _), size in zip(found, sizes.values(), strict=True):
        g, nats = torch.Generator().manual_seed(1), []
        for _ in range(2):
            if size is None:
                order = model.order.draw(model.order.ways(x), 16, g)
                log_q_hat, log_q = model.order_log_probs(x, order)
                nats.append((log_q - log_q_hat - model.log_prob(x, order.argsort(1))).mean())
            else:
                groups = a3.random_groups(18, 16, size, g) if size else a3.chunk_groups(18, 16)
                nats.append(-model.log_prob(x, groups).mean())
        assert mean == pytest.approx(torch.stack(nats).mean().item(), rel=1e-5)


@pytest.mark.parametrize("max_iters,moves", [(3, False), (4, True)])
def test_an_order_waits_for_a_third_of_the_steps(work, max_iters, moves):
    """Of those that are planned now: a resumed run that takes longer waits on."""
    train("--model loa3 --max_iters 1 --lr_decay_iters 4")
    train(f"--resume --max_iters {max_iters} --lr_decay_iters 10", base="")
    got = checkpoint("out/last.pt")["model"]
    new = a3.Order(a3.Config(len(got["order.votes"]), 16, 1, 2, 8)).state_dict()
    for name, p in new.items():
        assert torch.equal(got["order." + name], p) != moves, name


def test_choices_move_by_evidence(work, monkeypatch):
    """The order has a large eps, no decay and no clipping; all else is as ever."""
    seen, clipped, real = [], [], torch.optim.AdamW

    def optimizer(groups, *a, **kw):
        seen.extend(groups)
        return real(groups, *a, **kw)

    def clip(weights, most):
        clipped.extend(weights)
        return torch.zeros(())

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train("--model loa3 --max_iters 1")
    *rest, choices = seen
    assert choices["eps"] == 0.3 and choices["weight_decay"] == 0 and len(choices["params"]) == 3
    ids = [{id(p) for group in groups for p in group["params"]} for groups in (rest, [choices])]
    assert {id(p) for p in clipped} == ids[0] and not ids[0] & ids[1]
    assert [group.get("eps", 1e-8) for group in rest] == [1e-8, 1e-8]


# ---- lists of texts ------------------------------------------------------------------------------


def test_windows_of_a_list_begin_with_its_texts(work, monkeypatch):
    """In training and in validation, though the last tenth of the file begins amid a text."""
    texts = [f"{i:03d}:" + "ab" * 6 for i in range(305)]  # 16 characters each
    Path("list.txt").write_text("".join(texts))
    seen = []
    real = train_char.windows

    def windows(*a):
        seen.append(real(*a))
        return seen[-1]

    monkeypatch.setattr(train_char, "windows", windows)
    train("--data list.txt --text_len 16 --max_iters 3 --batch_size 16", base=TINY)
    colon = data.load("list.txt", folder="tokens").tokenizer.encode(":")[0]
    rows = torch.cat(seen)
    assert (rows[:, 3] == colon).all() and len(rows) == 3 * 16 + 30
    assert len(seen[-1]) == 30  # of the 31 texts in 488 characters, the first is cut


@pytest.mark.parametrize(
    "flags", ["--data text.txt --text_len 17", "--data text.txt --val_data b.txt"]
)
def test_what_is_no_list_of_texts(work, flags):
    Path("text.txt").write_text("to be or not\n" * 170)  # 17 times 130
    Path("b.txt").write_text("or not\n" * 100)
    with pytest.raises(UserError, match="no list of texts of --text_len"):
        n = 16 if "17" in flags else 13
        train(f"{flags} --text_len {n} --seq_len {n} --max_iters 1", base=TINY)


def test_windows_hold_whole_texts(work):
    with pytest.raises(UserError, match="--seq_len must hold whole texts, of 68"):
        train("--data automaton --seq_len 70 --max_iters 1", base=TINY)


def test_films_are_lists_of_texts(work):
    train(
        "--model arm --data automaton --max_iters 1 --eval_windows 10",
        base=TINY.replace("--seq_len 16", ""),
    )
    s = checkpoint("out/ckpt.pt")["settings"]
    assert s["seq_len"] == s["text_len"] == 68


def test_an_earlier_run_is_kept(work):
    train("--max_iters 2 --seed 1")
    before = checkpoint("out/last.pt")
    train("--max_iters 2 --seed 2")
    assert same(before, checkpoint("out.1/last.pt")) and (work / "out.1/log.jsonl").exists()
    assert not same(before["model"], checkpoint("out/last.pt")["model"])


def test_learning_rate():
    s = train_char.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    at = [train_char.get_lr(i, s) for i in (0, 9, 10, 60, 110, 200)]
    assert at == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_without_network(work, monkeypatch, capsys):
    """Python's own text is trained on, and the run goes on with that."""

    def no_network(*a, **kw):
        raise OSError("no network")

    monkeypatch.setattr(data.urllib.request, "urlopen", no_network)
    train("--max_iters 1", base=TINY)
    assert "no tinyshakespeare (no network)" in capsys.readouterr().out
    assert checkpoint("out/last.pt")["settings"]["data"] == "python-docs"
    header = json.loads(Path("out/log.jsonl").read_text().splitlines()[0])
    assert header["settings"]["data"] == "python-docs"
    train("--resume --max_iters 2", base="")  # with the text it began with


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--n_head 3", "n_embd .16. must be divisible by n_head .3."),
        ("--model block --block_len 5", "seq_len .16. must be divisible by block_len .5."),
        ("--model block --block_len 16", "above 1 .--model arm., below 16 .--model mdm."),
        (
            "--model arm --block_len 4",
            "--block_len is for --model block or lomdm or lomdm.*, not arm",
        ),
        ("--c1 0.5 --c2 0.6", "c1 .0.5. must be above c2 .0.6."),
        ("--model mdm --c2 0.1", "--c2 is for --model lomdm or lomdm-by-time, not mdm"),
        ("--model a3 --shares 1,1,1", "shares must be three numbers >= 0 that sum to 1"),
        ("--model a3 --group_size 0", "group_size must be at least 1"),
        ("--model a3 --init_from nowhere", "--init_from nowhere: no LLaMA, no ARM there"),
        ("--warmup_iters 900", "--warmup_iters exceeds 800 steps"),
        ("--batch_size 2000000000", "--batch_size must be below 1048576"),
        (
            "--resume --out_dir good --eval_windows 7",
            "--eval_windows 7 is not what .* good has .2000",
        ),
        ("--resume --out_dir old", "not written by this version of train_char.py; train again"),
        ("--data= --val_data good", "--data is empty"),
        ("--init_from nowhere", "--init_from is for --model a3, not lomdm"),
        ("--weights exp --c2 0", "--c1, --c2: for --weights normsig"),
        ("--max_iters 0", "--max_iters must be at least 1"),
        ("--learning_rate nan", "--learning_rate must be at least"),
        ("--beta2 1", "--beta2 must be below 1"),
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
        ("--out_dir text.txt", "cannot write to --out_dir text.txt: it is a file"),
        ("--resume", "no checkpoint at out.last.pt; train one"),
        ("--resume --out_dir cut", "damaged, cut off or not a checkpoint"),
        ("--resume --out_dir damaged", "damaged, cut off or not a checkpoint"),
        ("--resume --out_dir keyless", "does not hold the model that it says; train again"),
        ("--out_dir .", "a folder of its own"),
        ("--lr_decay_iters 0", "--lr_decay_iters must be at least 1"),
        ("--model block --block_len 0", "--block_len must be at least 1"),
        ("--model block --block_len 1", "above 1 .--model arm."),
        ("--seed 99999999999999999999", "--seed must be below"),
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
    for name in ("cut", "foreign", "mixed", "damaged", "keyless", "good", "old"):
        Path(name).mkdir()
    if "resume" in flags:
        train("--max_iters 1 --out_dir good")
        good = Path("good/last.pt").read_bytes()
        Path("cut/last.pt").write_bytes(good[: len(good) // 2])
        middle = len(good) // 3
        Path("damaged/last.pt").write_bytes(good[:middle] + b"\xff" * 64 + good[middle + 64 :])
        torch.save(
            {k: v for k, v in checkpoint("good/last.pt").items() if k != "settings"},
            "keyless/last.pt",
        )
        torch.save(checkpoint("good/last.pt") | dict(format="lomdm checkpoint 2"), "old/last.pt")
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
    """The ARM's sizes and dropout are taken over, its weights are there before the first step; what
    is not an ARM, or not of this text or size, is refused."""
    train("--model arm --max_iters 20 --learning_rate 1e-2 --dropout 0.1 --out_dir arm")
    flags = "--data text.txt --data_dir tokens --device cpu --num_samples 0 --batch_size 4 "
    flags += "--max_iters 1 --model a3"
    train("--init_from arm --learning_rate 1e-9", base=flags)
    arm, adapted = checkpoint("arm/ckpt.pt"), checkpoint("out/ckpt.pt")
    for name in ("wte.weight", "blocks.0.qkv.weight", "lm_head.weight"):
        torch.testing.assert_close(adapted["model"][name], arm["model"][name], rtol=0, atol=1e-6)
    assert adapted["config"]["dropout"] == adapted["settings"]["dropout"] == 0.1
    train("--init_from arm --dropout 0.2", base=flags)
    assert checkpoint("out/ckpt.pt")["config"]["dropout"] == 0.2
    with pytest.raises(UserError, match="--n_embd is not that of arm; leave it out"):
        train("--init_from arm --n_embd 32", base=flags)
    train("--model mdm --max_iters 1 --out_dir mdm")
    with pytest.raises(UserError, match="--init_from mdm: neither a LLaMA nor an ARM"):
        train("--init_from mdm", base=flags)
    Path("other.txt").write_text("abc" * 1000)
    with pytest.raises(UserError, match="arm has another vocabulary"):
        train("--init_from arm --data other.txt", base=flags)


@pytest.mark.parametrize(
    "argv",
    ["--learning_rat 1", "--model gpt", "--max_iters ten", "--compile=2", "--shares a,b"],
)
def test_unknown_flags(argv, capsys):
    with pytest.raises(SystemExit) as e:
        train_char.main(argv.split())
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_list_of_texts_for_an_arm(work):
    """Windows are the ARM's, and must hold whole texts."""
    train("--model arm --max_iters 1 --text_len 8 --out_dir arm")
    adapt = "--data text.txt --data_dir tokens --device cpu --num_samples 0 --max_iters 1 "
    adapt += "--model a3 --init_from arm"
    train("--text_len 8", base=adapt)
    assert checkpoint("out/ckpt.pt")["config"]["seq_len"] == 16
    with pytest.raises(UserError, match="--seq_len must hold whole texts, of 68"):
        train("--data automaton", base=adapt.replace("--data text.txt", ""))
    with pytest.raises(UserError, match="--text_len must be at least 1"):
        train("--text_len 0", base=adapt)


def test_a_bad_figure_is_saved_all_the_same(work, monkeypatch):
    """More nats than a perplexity can be made of."""
    monkeypatch.setattr(lomdm.LoMDM, "nelbo", lambda _, x, *a, **kw: x.new_full((len(x),), 16_000))
    train("--max_iters 2")
    rows = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert rows[-1]["val"] == 1000 and checkpoint("out/ckpt.pt")["step"] == 2


def test_a_run_that_is_ending_is_waited_for(work, monkeypatch):
    """--resume reads last.pt when nobody can write to it any more."""
    train("--max_iters 2")
    load, order = checkpoints.load, []
    monkeypatch.setattr(checkpoints, "load", lambda *a: order.append("load") or load(*a))
    lock = checkpoints.only_run
    monkeypatch.setattr(checkpoints, "only_run", lambda out: order.append("lock") or lock(out))
    train("--resume --max_iters 3", base="")
    assert order[:2] == ["lock", "load"] and order.count("lock") == 1


def test_nan_names_the_step_and_the_last_good_checkpoint(work, monkeypatch):
    loss = lomdm.LoMDM.loss

    def spoilt(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        value, metrics = loss(self, x)
        bad = torch.nan if self.calls == 7 else 1.0
        return value * bad, {k: v * bad for k, v in metrics.items()}

    monkeypatch.setattr(lomdm.LoMDM, "loss", spoilt)
    with pytest.raises(UserError, match=r"not finite at step 7; .*last.pt \(step 5\)"):
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


def test_scripts_print_one_line_and_exit_1(work):
    """The whole way out: no traceback, exit code 1, nothing on stdout."""
    for script, flags in [("train_char.py", "--data nope.txt"), ("sample.py", "--out_dir nope")]:
        argv = [sys.executable, str(ROOT / script), *flags.split()]
        got = subprocess.run(argv, capture_output=True, text=True, cwd=work)
        assert got.returncode == 1 and got.stdout == ""
        assert got.stderr.startswith("error: ") and got.stderr.count("\n") == 1


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


def test_what_is_random_follows_from_seed_step_and_micro_batch(work):
    """Windows and all later draws: the same for the same three, others otherwise. The seeds of a
    step's micro-batches are not those of another step's, nor 0's that of no micro-batch at all."""
    text, cpu = np.arange(3000, dtype=np.uint16), torch.device("cpu")
    s = train_char.Settings(seq_len=16, batch_size=4)

    def draw(seed, step, m):
        s.seed = seed
        x = train_char.get_batch(s, text, step, m, cpu)
        assert x.shape == (4, 16) and torch.equal(x, x[:, :1] + torch.arange(16))
        return *x[:, 0].tolist(), *torch.rand(3).tolist()

    keys = list(itertools.product((0, 1, 7), (0, 1, 2), (0, 1, 2)))
    drawn = [draw(*key) for key in keys]
    assert len(set(drawn)) == len(set(d[-3:] for d in drawn)) == len(keys)
    assert [draw(*key) for key in keys] == drawn
    plain = np.random.SeedSequence((7, 1)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(plain))
    assert torch.randint(2985, (4,)).tolist() != list(draw(7, 1, 0)[:4])


def test_accumulation_needs_equal_shares(monkeypatch):
    monkeypatch.setattr(train_char, "WORLD", 2)
    s = train_char.Settings(preset="small", gradient_accumulation_steps=3)
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
        torch.testing.assert_close(ckpt["used"][name], average)
    used = checkpoint("out/ckpt.pt")
    assert used["step"] == 4 and "optimizer" not in used
    torch.testing.assert_close(used["model"][name], average)
    assert (used["model"][name] - raw[name]).abs().max() > 1e-3
    train(f"{flags} --max_iters 4 --out_dir whole")
    assert same(checkpoint("whole/last.pt")["used"], ckpt["used"])


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
        model = train_char.new_model(s, 50257)
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
            assert checkpoints.load("out/ckpt.pt", train_char.make_model)
            assert checkpoints.load("out/last.pt", train_char.make_model)[0]["step"] >= begun
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


@pytest.mark.parametrize("model", ["lomdm", "a3"])
def test_training_on_tokens(work, capsys, monkeypatch, model):
    """GPT-2's rule for cutting text, here with no merges: no vocabulary needs to be there."""
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    ranks = {**{bytes([i]): i for i in range(256)}, b" t": 256, b" th": 257, b" the": 258}
    toy = tiktoken.Encoding(
        "toy", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: toy)
    Path("a.jsonl").write_text('{"text": "the ab the ab the"}\n' * 300)
    flags = "--data a.jsonl --data_dir tokens --tokenizer gpt2 --n_layer 1 --n_head 2 --n_embd 16 "
    flags += "--seq_len 16 --device cpu --max_iters 60 --learning_rate 1e-2 --eval_interval 60"
    train(f"{flags} --model {model}", base="")
    out = capsys.readouterr().out
    assert "301 different" in out and "nats/token, perplexity" in out and "--- sample 2" in out
    vals = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert next(v["val"] for v in vals if "val" in v) < 3  # log 301 is 5.7
    sample.main(["--device", "cpu", "--num_samples", "1", "--infill", "the ab__ab"])
    text = capsys.readouterr().out.split("--- sample 1\n")[1]
    assert text.startswith("the ab") and text.rstrip("\n").endswith("ab")


def test_compile_errors_are_one_line(work):
    """Without a C++ compiler, or whatever inductor may stumble over."""
    env = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(work / "cache")}
    run = start(f"--data text.txt {TINY} --max_iters 1 --compile", env=env)
    last = run.communicate(timeout=120)[1].splitlines()[-1]
    assert run.returncode == 1
    assert last.startswith("error: torch.compile failed (") and "--compile=False" in last
