"""train_char.py as its users meet it: runs, resumption and files. What they do wrong, and what
goes wrong around them, is in test_mistakes.py."""

import contextlib
import gc
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch

import a3
import lomdm
import sample
import train_char
from beyond import loa3
from plumbing import checkpoint as checkpoints
from plumbing import cli, data
from plumbing.cli import UserError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUIET = "--device cpu --num_samples 0 --data_dir tokens "
TINY = QUIET + "--n_layer 1 --n_head 2 --n_embd 16 --seq_len 16 --batch_size 4 "
BASE = "--data text.txt " + TINY
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder with a text of 3,000 characters in it."""
    monkeypatch.chdir(tmp_path)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog.\n", "Yes:"]
    text = " ".join(random.Random(0).choices([*words, "no"], k=1000))[:3000]
    Path("text.txt").write_text(text, encoding="utf-8")
    return tmp_path


def train(flags, base=BASE):
    train_char.main(f"{base} {flags}".split())


@contextlib.contextmanager
def signals_in(n, *numbers):
    """In the midst of step n of a run, these signals come."""
    handlers = {each: signal.getsignal(each) for each in STOPS}
    train_step = train_char.train_step

    def step(s, at, *rest):
        if at + 1 == n:
            for number in numbers:
                signal.raise_signal(number)
        return train_step(s, at, *rest)

    try:
        with mock.patch.object(train_char, "train_step", step):
            yield
    finally:  # a run that was stopped leaves signals ignored
        for each, handler in handlers.items():
            signal.signal(each, handler)


def stopped(n, flags, base=BASE):
    """A run that a signal stops in the midst of step n."""
    line = f"stopped at step {n}, all saved; go on with"
    with signals_in(n, signal.SIGTERM), pytest.raises(cli.Stopped, match=line):
        train(flags, base)
    gc.collect()  # the lock of the folder lives as long as the traceback


def checkpoint(path):
    return torch.load(path, weights_only=True)


def rows(out_dir="out"):
    """The lines of a log, the header first."""
    return [json.loads(line) for line in Path(out_dir, "log.jsonl").read_text().splitlines()]


def figures(out_dir, name):
    """{step: figure} of the lines of a log that have it."""
    return {row["step"]: row[name] for row in rows(out_dir)[1:] if name in row}


def same(a, b):
    """Equal bit by bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_runs(a, b):
    """Two runs with the same weights, optimizer, best checkpoint and log, bit for bit."""
    for name in ("last.pt", "ckpt.pt"):
        one, two = checkpoint(f"{a}/{name}"), checkpoint(f"{b}/{name}")
        for key in ("step", "model", "best", "optimizer")[: 4 if name == "last.pt" else 3]:
            assert same(one[key], two[key]), (name, key)
    logs = [rows(a)[1:], rows(b)[1:]]
    for row in itertools.chain(*logs):
        row.pop("seconds", None)
        row.pop("tokens_per_second", None)
    assert logs[0] == logs[1]


def reload():
    """The settings and the model of out/ckpt.pt."""
    ckpt, model = checkpoints.load("out/ckpt.pt", train_char.make_model)
    return train_char.Settings(**ckpt["settings"]), model.eval(), ckpt


# ---- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", train_char.TO_TRAIN)
def test_training_learns_and_samples(work, capsys, model):
    """Each model gets below the frequencies of the characters, 1.951 nats, and fills gaps."""
    Path("text.txt").write_text("to be or not\n" * 400)
    flags = "--batch_size 16 --max_iters 300 --eval_interval 100 --learning_rate 1e-2"
    block_len = "--block_len 4" if model == "block" else ""
    train(f"--model {model} {flags} --warmup_iters 10 {block_len}")

    header, first, *_ = rows()
    assert header["settings"]["model"] == model and header["settings"]["data"] == "text.txt"
    if model != "a3":
        assert first["nelbo"] == pytest.approx(first["recon"] + first["order"], rel=1e-5)
    kind = {"arm": "exact", "a3": "exact, random order"}.get(model, "bound")
    val = [row["val"] for row in rows() if row.get("kind") == kind]
    assert len(val) == 3 and val[-1] < val[0]
    assert val[-1] < (0.3 if model == "arm" else 1.8)
    assert checkpoint("out/ckpt.pt")["best"] == min(val)
    assert f"({kind})" in capsys.readouterr().out

    flags = ["--device", "cpu", "--num_samples", "2"]
    sample.main([*flags, "--temperature", "0", "--infill", "ot\nto __ or _ot"])
    out = capsys.readouterr().out
    assert out.count("--- sample") == 2
    for text in out.split("--- sample")[1:]:
        drawn = text.partition("\n")[2]  # a line end may be drawn, too
        assert drawn[:6] == "ot\nto " and drawn[8:12] == " or " and drawn[13:15] == "ot"


@pytest.mark.parametrize("model", ["lomdm", "a3"])
def test_training_on_tokens(work, capsys, monkeypatch, model):
    """GPT-2's rule for cutting text, here with three merges: no vocabulary is needed."""
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    ranks = {bytes([i]): i for i in range(256)} | {b" t": 256, b" th": 257, b" the": 258}
    toy = tiktoken.Encoding(
        "toy", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: toy)
    Path("a.jsonl").write_text('{"text": "the ab the ab the"}\n' * 300)
    flags = f"--model {model} --data a.jsonl --tokenizer gpt2 --num_samples 2"
    train(f"{flags} --max_iters 60 --learning_rate 1e-2 --eval_interval 60 --batch_size 16")
    out = capsys.readouterr().out
    assert "301 different" in out and "nats/token, perplexity" in out and "--- sample 2" in out
    assert next(row["val"] for row in rows() if "val" in row) < 3  # log 301 is 5.7

    sample.main(["--device", "cpu", "--num_samples", "1", "--infill", "the ab__ab"])
    text = capsys.readouterr().out.split("--- sample 1\n")[1]
    assert text.startswith("the ab") and text.rstrip("\n").endswith("ab")


def test_learning_rate():
    """A linear warmup, and a cosine to a tenth at max_iters."""
    s = train_char.Settings(learning_rate=1.0, warmup_iters=10, max_iters=110)
    at = [train_char.get_lr(i, s) for i in (0, 9, 10, 60, 110, 200)]
    assert at == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_what_is_random_follows_from_seed_step_and_micro_batch():
    """Windows and later draws are the same for the same three, and others otherwise. The seeds
    of a step's micro-batches are not those of another step, nor that of no micro-batch."""
    text = np.arange(3000, dtype=np.uint16)
    s = train_char.Settings(seq_len=16, batch_size=4)

    def draw(seed, step, m):
        s.seed = seed
        x = train_char.get_batch(s, text, step, m, CPU)
        assert x.shape == (4, 16) and torch.equal(x, x[:, :1] + torch.arange(16))
        return *x[:, 0].tolist(), *torch.rand(3).tolist()

    keys = list(itertools.product((0, 1, 7), (0, 1, 2), (0, 1, 2)))
    drawn = [draw(*key) for key in keys]
    assert len(set(drawn)) == len(set(d[-3:] for d in drawn)) == len(keys)
    assert [draw(*key) for key in keys] == drawn
    plain = np.random.SeedSequence((7, 1)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(plain))
    assert torch.randint(2985, (4,)).tolist() != list(draw(7, 1, 0)[:4])


def test_the_optimizer_knows_what_parameters_are(monkeypatch):
    """Matrices decay, vectors do not. An order has a large eps, no decay and no clipping."""
    s = train_char.Settings("loa3", "small", seq_len=16, n_layer=1, n_head=2, n_embd=16)
    train_char.settle(s, CPU)
    model = train_char.new_model(s, 9)
    optimizer = train_char.make_optimizer(model, s)
    matrices, vectors, order = optimizer.param_groups
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8, 1e-8, 0.3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0, 0]
    assert all(group["betas"] == (0.9, 0.99) for group in optimizer.param_groups)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert set(order["params"]) == set(model.order.parameters())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == len(set(params)) and set(params) == set(model.parameters())

    clipped = []
    clip = lambda params, most: clipped.append((params, most)) or torch.zeros(())  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    text = np.arange(99, dtype=np.uint16) % 9
    train_char.train_step(s, 0, model, model.loss, optimizer, text, CPU)
    [(params, most)] = clipped
    assert set(params) == set(model.parameters()) - set(model.order.parameters()) and most == 1


@pytest.mark.parametrize("n,moves", [(4, False), (5, True)])
def test_an_order_waits_for_a_third_of_the_steps(work, n, moves):
    """A resumed run that is to take longer waits for a third of its own steps."""
    stopped(1, "--model loa3 --max_iters 4")
    stopped(n, "--resume --max_iters 12", base="")
    got = checkpoint("out/last.pt")
    new = loa3.Order(loa3.Config(**got["config"])).state_dict()
    for name, p in new.items():
        assert torch.equal(got["model"]["order." + name], p) != moves, name


def test_an_adaptation_goes_through_its_stages():
    """An A3's groups are left to right one by one, then in chunks, and then random."""
    s = train_char.Settings(model="a3", max_iters=10, shares=(0.2, 0.3, 0.5), group_size=2)
    x = torch.zeros(3, 8, dtype=torch.long)
    size = {0: 1, 1: 1, 2: 1, 3: 2, 4: 4}
    for step in range(10):
        given = train_char.loss_arguments(s, step, x)
        chunks = a3.chunk_groups(3, 8, size.get(step, 2))
        assert torch.equal(given["groups"], chunks) == (step < 5)
        assert torch.equal(given["groups"].sort(1).values, chunks)
        assert given["single"] == (size.get(step) == 1)
    s.model = "loa3"
    assert train_char.loss_arguments(s, 0, x) == {}


def test_presets():
    """gpt2 is GPT-2 small, of half a million tokens a step; film has windows of one film."""
    s = train_char.Settings(preset="gpt2", model="arm", n_layer=1)
    train_char.settle(s, CPU)
    assert s.batch_size * s.gradient_accumulation_steps * s.seq_len == 2**19
    assert (s.n_layer, s.n_embd, s.learning_rate) == (1, 768, 6e-4)
    assert (s.dtype, s.compile) == ("float32", False)
    with torch.device("meta"):
        model = train_char.new_model(s, 50257)
    n = {name: p.numel() for name, p in model.named_parameters()}
    block = sum(v for name, v in n.items() if name.startswith("blocks."))
    assert block == 768 * 768 * 4 + 3 * 768 * 2048 + 2 * 768
    assert model.lm_head.weight.shape == (50304, 768) and model.config.vocab_size == 50257

    s = train_char.Settings(preset="film", model="loa3", text_len=68)
    train_char.settle(s, CPU)
    assert (s.n_layer, s.n_embd, s.seq_len) == (3, 64, 68)


# ---- resumption -----------------------------------------------------------------------------

SIX = "arm", "mdm", "block --block_len 4", "lomdm", "a3 --shares 0.3,0.3,0.4", "loa3"


@pytest.mark.parametrize("model", SIX)
def test_resume_is_exact(work, model):
    """A run that a signal stopped in step 7 and again in step 13 is the unbroken run, bit for
    bit. Another seed is another run."""
    flags = f"--model {model} --dropout 0.1 --max_iters 20 --eval_interval 5 --log_interval 1"
    train(f"{flags} --out_dir whole")
    stopped(7, f"{flags} --out_dir parts")
    assert checkpoint("parts/last.pt")["step"] == 7
    stopped(13, "--resume --out_dir parts", base="")
    train("--resume --out_dir parts", base="")
    same_runs("whole", "parts")
    assert len(figures("parts", "nelbo")) == 20 and len(figures("parts", "val")) == 4

    train(f"{flags} --out_dir other --seed 7")
    weights = [checkpoint(f"{out}/last.pt")["model"] for out in ("whole", "other")]
    assert not same(*weights)


def test_resume_remembers_the_best(work):
    """A checkpoint that is worse than one before the stop does not become ckpt.pt."""
    train("--max_iters 2 --eval_interval 1")
    torch.save(checkpoint("out/last.pt") | {"best": 0.5}, "out/last.pt")
    before = Path("out/ckpt.pt").read_bytes()
    train("--resume --max_iters 4", base="")
    assert checkpoint("out/last.pt")["best"] == 0.5
    assert Path("out/ckpt.pt").read_bytes() == before


def test_a_finished_run_is_not_validated_again(work, capsys):
    """--resume of it changes neither its log nor its checkpoints."""
    train("--max_iters 4 --eval_interval 2")
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    train("--resume", base="")
    assert "already at step 4" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before


def test_resume_survives_a_move_and_a_torn_log(work, capsys):
    """A folder that was renamed goes on where it is, and a half-written log never blocks
    weights."""
    train("--max_iters 4 --eval_interval 2 --out_dir before")
    Path("before").rename("after")
    Path("text.txt").rename("moved.txt")
    with open("after/log.jsonl", "a") as f:
        f.write('1}\n{"step": 99}\n{"step": 3, "loss"')
    train("--resume --out_dir after --max_iters 6 --data moved.txt", base="")
    assert checkpoint("after/last.pt")["step"] == 6 and not Path("before").exists()
    steps = [row.get("step", 0) for row in rows("after")]
    assert steps == sorted(steps) and steps[-1] == 6

    capsys.readouterr()
    train("--resume --out_dir after --max_iters 2", base="")
    assert "already at step 6" in capsys.readouterr().out
    train("--resume --out_dir after --max_iters 7 --learning_rate 1e-5", base="")
    assert checkpoint("after/last.pt")["settings"]["learning_rate"] == 1e-5
    assert figures("after", "lr")[7] <= 1e-5


def test_an_earlier_run_is_kept(work):
    """A new run in its folder moves it to out.1."""
    train("--max_iters 2 --seed 1")
    before = checkpoint("out/last.pt")
    train("--max_iters 2 --seed 2")
    assert same(before, checkpoint("out.1/last.pt")) and Path("out.1/log.jsonl").exists()
    assert not same(before["model"], checkpoint("out/last.pt")["model"])


def test_a_run_that_is_ending_is_waited_for(work, monkeypatch):
    """--resume reads last.pt when nobody can write to it any more."""
    train("--max_iters 2")
    order = []
    load, lock = checkpoints.load, checkpoints.only_run
    monkeypatch.setattr(checkpoints, "load", lambda *a: order.append("load") or load(*a))
    monkeypatch.setattr(checkpoints, "only_run", lambda out: order.append("lock") or lock(out))
    train("--resume --max_iters 3", base="")
    assert order[:2] == ["lock", "load"] and order.count("lock") == 1


# ---- validation -----------------------------------------------------------------------------


def test_validation_covers_the_split_and_repeats(work):
    """It is the mean over all whole windows, and the same number each time."""
    train("--model arm --max_iters 3 --eval_interval 3")
    s, model, ckpt = reload()
    val = data.load("text.txt", folder="tokens").val
    assert len(val) == 300 and len(val) % 16
    [(figure, mean, error)] = train_char.estimate_loss(model, val, s, CPU)
    x = torch.from_numpy(val.astype("int64"))[:288].view(18, 16)
    nats = model.nelbo(x).double() / 16
    assert figure == "exact"
    assert mean == pytest.approx(nats.mean().item(), rel=1e-5) == ckpt["best"]
    assert error == pytest.approx(nats.std().item() / 18**0.5, rel=1e-5)

    train("--model lomdm --max_iters 3 --eval_interval 3")
    s, model, ckpt = reload()
    first = train_char.estimate_loss(model, val, s, CPU)
    torch.rand(10)
    assert train_char.estimate_loss(model, val, s, CPU) == first
    assert first[0][1] == ckpt["best"]


def test_validation_windows_are_spread(monkeypatch):
    """--eval_windows of them at even distances, the same for every model; all if there are
    fewer. A model is in eval mode meanwhile, and in train mode afterwards."""
    seen = []

    class Sum(torch.nn.Module):
        def nelbo(self, x, generator, times):
            assert not self.training
            seen.extend(x.tolist())
            return x.double().sum(1) * times

    monkeypatch.setattr(train_char, "figures_of", lambda model: {"sum": {"times": 1}})
    s = train_char.Settings(model="mdm", seq_len=4, eval_windows=5)
    val, model = np.arange(42, dtype=np.uint16), Sum()
    [(_, mean, _)] = train_char.estimate_loss(model, val, s, CPU)
    assert [row[0] for row in seen] == [0, 8, 16, 24, 32] and mean == np.mean(seen)
    assert model.training

    seen.clear()
    s.eval_windows = 10
    [(_, mean, _)] = train_char.estimate_loss(model, val, s, CPU)
    assert [row[0] for row in seen] == [*range(0, 40, 4)] and mean == val[:40].mean()


EXACT = {"exact, random order": 1, "exact, left to right": 0}  # size of random groups, or 0
TWO_STREAMS = {
    "a3": EXACT | {"exact, random groups of 4": 4},
    "loa3": {"bound": None} | EXACT,
}


@pytest.mark.parametrize("name", TWO_STREAMS)
def test_figures_of_two_streams_are_what_they_say(work, name):
    """Each is computed here anew, with the draws of the same generator."""
    train(f"--model {name} --max_iters 3")
    s, model, _ = reload()
    val = data.load("text.txt", folder="tokens").val
    found = train_char.estimate_loss(model, val, s, CPU)
    assert [figure for figure, _, _ in found] == list(TWO_STREAMS[name])

    x = torch.from_numpy(val.astype("int64"))[:288].view(18, 16)
    for (_, mean, _), size in zip(found, TWO_STREAMS[name].values(), strict=True):
        g = torch.Generator().manual_seed(1)
        if size is None:
            order = model.order.draw(model.order.log_q_way(x), 16, g)
            log_q_hat, log_q = model.order_log_probs(x, order)
            nats = log_q - log_q_hat - model.log_prob(x, order.argsort(1))
        else:
            groups = a3.random_groups(18, 16, size, g) if size else a3.chunk_groups(18, 16)
            nats = -model.log_prob(x, groups)
        assert mean == pytest.approx(nats.mean().item(), rel=1e-5)


def test_a_bad_figure_is_saved_all_the_same(work, monkeypatch):
    """It may be more nats than a perplexity can be made of."""
    many = lambda _, x, **how: x.new_full((len(x),), 16_000)  # noqa: E731
    monkeypatch.setattr(lomdm.LoMDM, "nelbo", many)
    train("--max_iters 2")
    assert rows()[-1]["val"] == 1000 and checkpoint("out/ckpt.pt")["step"] == 2


# ---- lists of texts -------------------------------------------------------------------------


def test_windows_of_a_list_begin_with_its_texts(work, monkeypatch):
    """In training and in validation, though the last tenth of the file begins amid a text."""
    texts = [f"{i:03d}:" + "ab" * 6 for i in range(305)]  # 16 characters each
    Path("list.txt").write_text("".join(texts))
    seen = []
    real = train_char.windows
    monkeypatch.setattr(train_char, "windows", lambda *a: seen.append(real(*a)) or seen[-1])
    train("--data list.txt --text_len 16 --max_iters 3 --batch_size 16", base=TINY)
    colon = data.load("list.txt", folder="tokens").tokenizer.encode(":")[0]
    x = torch.cat(seen)
    assert (x[:, 3] == colon).all() and len(x) == 3 * 16 + 30
    assert len(seen[-1]) == 30  # of the 31 texts in 488 characters, the first is cut


@pytest.mark.parametrize("text_len,more", [(16, ""), (13, "--val_data b.txt")])
def test_what_is_no_list_of_texts(work, text_len, more):
    Path("text.txt").write_text("to be or not\n" * 170)  # 17 times 130
    Path("b.txt").write_text("or not\n" * 100)
    with pytest.raises(UserError, match="no list of texts of --text_len"):
        train(f"--text_len {text_len} --seq_len {text_len} --max_iters 1 {more}")


def test_films_are_lists_of_texts(work):
    """The preset takes the films and their length."""
    train("--model arm --preset film --max_iters 1 --eval_windows 10", base=QUIET)
    s = checkpoint("out/ckpt.pt")["settings"]
    assert s["data"] == "automaton" and s["seq_len"] == s["text_len"] == 68


# ---- from an ARM ----------------------------------------------------------------------------

ADAPT = f"--data text.txt {QUIET} --batch_size 4 --max_iters 1 --model a3 --init_from arm "


def test_a3_starts_from_an_arm(work):
    """The ARM's sizes, dropout and weights are there before the first step. What is not of its
    size, or another text, is refused."""
    train("--model arm --max_iters 20 --learning_rate 1e-2 --dropout 0.1 --out_dir arm")
    train("--learning_rate 1e-9", base=ADAPT)
    arm, adapted = checkpoint("arm/ckpt.pt"), checkpoint("out/ckpt.pt")
    for name in ("wte.weight", "blocks.0.qkv.weight", "lm_head.weight"):
        weights = adapted["model"][name], arm["model"][name]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert adapted["config"]["dropout"] == adapted["settings"]["dropout"] == 0.1
    train("--dropout 0.2", base=ADAPT)
    assert checkpoint("out/ckpt.pt")["config"]["dropout"] == 0.2

    with pytest.raises(UserError, match="--n_embd is not that of arm; leave it out"):
        train("--n_embd 32", base=ADAPT)
    Path("other.txt").write_text("abc" * 1000)
    with pytest.raises(UserError, match="arm has another vocabulary"):
        train("--data other.txt", base=ADAPT)


def test_a_list_of_texts_for_an_arm(work):
    """Windows are the ARM's, and must hold whole texts."""
    train("--model arm --max_iters 1 --text_len 8 --out_dir arm")
    train("--text_len 8", base=ADAPT)
    assert checkpoint("out/ckpt.pt")["config"]["seq_len"] == 16
    with pytest.raises(UserError, match="--seq_len must hold whole texts, of 68"):
        train("--data automaton", base=ADAPT)
    with pytest.raises(UserError, match="--text_len must be at least 1"):
        train("--text_len 0", base=ADAPT)


# ---- several processes ----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lomdm", "a3 --shares 0.3,0,0.7"])
def test_two_processes_do_what_one_does(work, model):
    """torchrun with two processes has the gradients, and so the weights, losses and figures,
    of one with the same four micro-batches a step, dropout, races and partitions included."""
    flags = f"{BASE} --model {model} --gradient_accumulation_steps 4 --dropout 0.1 "
    flags += "--max_iters 4 --eval_interval 4 --log_interval 1 --warmup_iters 0"
    train(f"{flags} --out_dir one", base="")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*run, str(ROOT / "train_char.py"), *flags.split(), "--out_dir", "two"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    got = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=240)
    assert got.returncode == 0, got.stderr
    assert got.stdout.count("parameters") == 1  # one process prints

    one, two = checkpoint("one/last.pt"), checkpoint("two/last.pt")
    assert one["step"] == two["step"] == 4
    assert one["best"] == pytest.approx(two["best"], rel=1e-5)
    assert figures("one", "nelbo") == pytest.approx(figures("two", "nelbo"), rel=1e-5)
    for name, p in one["model"].items():
        torch.testing.assert_close(p, two["model"][name], rtol=0, atol=1e-4)

    # Adam divides by the size of the gradient, and clipping hides it as well. The moments, and
    # the norm before clipping, say how large the gradients were.
    norms = figures("two", "grad_norm")
    assert figures("one", "grad_norm") == pytest.approx(norms, rel=1e-4) and len(norms) == 4
    for a, b in zip(*(c["optimizer"]["state"].values() for c in (one, two)), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            close = {"rtol": 1e-3, "atol": 1e-5 * float(a[key].max())}
            torch.testing.assert_close(a[key], b[key], **close)

    # One process with a single micro-batch has other gradients.
    train(f"{flags} --gradient_accumulation_steps 1 --out_dir less", base="")
    less = figures("less", "nelbo")[1]
    assert less != pytest.approx(figures("one", "nelbo")[1], rel=1e-4)


def test_accumulation_needs_equal_shares(monkeypatch):
    monkeypatch.setattr(train_char, "WORLD", 2)
    s = train_char.Settings(preset="small", gradient_accumulation_steps=3)
    with pytest.raises(UserError, match=re.escape("3 must be divisible by the 2 processes")):
        train_char.settle(s, CPU)
