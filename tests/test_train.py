"""train_char.py as its users meet it: runs, resumption and files. What they do wrong, and what
goes wrong around them, is in test_mistakes.py."""

import contextlib
import gc
import io
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch

import a3
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
SEVEN = "arm", "mdm", "block --block_len 4", "lomdm", "a3 --shares 0.3,0.3,0.4", "loa3", "planned"


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
    train_step = train_char.train_step

    def step(s, at, *rest):
        if at + 1 == n:
            for number in numbers:
                signal.raise_signal(number)
        return train_step(s, at, *rest)

    with mock.patch.object(train_char, "train_step", step):
        yield


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
    """Two runs with the same weights, optimizers, best checkpoint and log, bit for bit."""
    for name, keys in ("last.pt", "step model best optimizers"), ("ckpt.pt", "step model best"):
        one, two = checkpoint(f"{a}/{name}"), checkpoint(f"{b}/{name}")
        for key in keys.split():
            assert same(one[key], two[key]), (name, key)
    logs = [rows(a)[1:], rows(b)[1:]]
    for row in itertools.chain(*logs):
        row.pop("seconds", None)
        row.pop("tokens_per_second", None)
    assert logs[0] == logs[1]


def reload():
    """The settings and the model of out/ckpt.pt, and its best figure."""
    ckpt, model = checkpoints.load("out/ckpt.pt", train_char.make_model)
    return train_char.Settings(**ckpt["settings"]), model.eval(), ckpt["best"]


# ---- training ------------------------------------------------------------------------------

BY_TIME = [pytest.param(f"{name}-by-time", marks=pytest.mark.slow) for name in ("mdm", "lomdm")]


@pytest.mark.parametrize("model", [*SEVEN, *BY_TIME])
def test_training_learns_and_samples(work, capsys, model):
    """Each model gets below the frequencies of the characters, 1.951 nats, and fills gaps."""
    Path("text.txt").write_text("to be or not\n" * 100)
    flags = "--max_iters 160 --batch_size 16 --learning_rate 2e-2 --warmup_iters 10"
    train(f"--model {model} {flags} --eval_interval 80")

    name = model.split()[0]
    header, first, *_ = rows()
    assert header["settings"]["model"] == name and header["settings"]["data"] == "text.txt"
    if name not in ("a3", "planned"):
        assert first["nelbo"] == pytest.approx(first["recon"] + first["order"], rel=1e-5)
    kind = {"arm": "exact", "a3": "exact, random order"}.get(name, "bound")
    val = [row["val"] for row in rows() if row.get("kind") == kind]
    assert len(val) == 2 and val[-1] < val[0]
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


def test_training_on_tokens(work, capsys, monkeypatch):
    """GPT-2's rule for cutting text, here with three merges: no vocabulary is needed."""
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    ranks = {bytes([i]): i for i in range(256)} | {b" t": 256, b" th": 257, b" the": 258}
    toy = tiktoken.Encoding(
        "toy", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: toy)
    Path("a.jsonl").write_text('{"text": "the ab the ab the"}\n' * 300)
    train("--data a.jsonl --tokenizer gpt2 --num_samples 2 --max_iters 40 --learning_rate 2e-2")
    out = capsys.readouterr().out
    assert "301 different" in out and "nats/token, perplexity" in out and "--- sample 2" in out
    assert next(row["val"] for row in rows() if "val" in row) < 4  # log 301 is 5.7

    sample.main(["--device", "cpu", "--num_samples", "1", "--infill", "the ab__ab"])
    text = capsys.readouterr().out.split("--- sample 1\n")[1]
    assert text.startswith("the ab") and text.rstrip("\n").endswith("ab")


# ---- where there is no terminal ------------------------------------------------------------


class Stream(io.StringIO):
    """A stderr that is a terminal or not."""

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_for_a_terminal(work, monkeypatch, capsys, is_terminal):
    """It has the time left. Elsewhere a plain line remains, one a validation."""
    err = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", err)
    train("--model arm --max_iters 4 --eval_interval 2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(" val ")[0] for line in lines] == ["step 2:", "step 4:"]
    if is_terminal:
        assert re.search(r"4/4 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss .* tok/s\]", err.getvalue())
    else:
        assert err.getvalue() == ""


def test_a_thread_trains(work):
    threads = [threading.Thread(target=train, args=[f"--max_iters 1 --out_dir {i}"]) for i in "ab"]
    for thread in threads:
        thread.start()
        thread.join()
    same_runs("a", "b")


def test_a_notebook_keeps_tracebacks(work):
    """And so whatever a failed run held, such as the lock of its folder. The next cell goes
    on."""
    kept = []
    for flags, base in ("--resume", ""), ("--max_iters 3", BASE), ("--seed 2 --resume", ""):
        try:
            with signals_in(2, signal.SIGINT):
                train(flags, base)
        except (cli.Stopped, UserError) as e:
            kept.append(e)
    assert len(kept) == 3
    train("--resume", "")
    assert checkpoint("out/last.pt")["step"] == 3


def test_learning_rate():
    """A linear warmup, and a cosine to a tenth at max_iters."""
    s = train_char.Settings(learning_rate=1.0, warmup_iters=10, max_iters=110)
    at = [train_char.get_lr(i, s) for i in (0, 9, 10, 60, 110, 200)]
    assert at == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_what_is_random_follows_from_seed_step_and_micro_batch():
    """Windows and later draws are the same for the same three, and others otherwise."""
    text = np.arange(3000, dtype=np.uint16)
    s = train_char.Settings(seq_len=16, batch_size=4)

    def draw(seed, step, m):
        s.seed = seed
        train_char.seed_all(s, step, m)
        x = train_char.get_batch(s, text, CPU)
        assert x.shape == (4, 16) and torch.equal(x, x[:, :1] + torch.arange(16))
        return *x[:, 0].tolist(), *torch.rand(3).tolist()

    keys = list(itertools.product((0, 1, 7), (0, 1, 2), (0, 1, 2)))
    drawn = [draw(*key) for key in keys]
    assert len(set(drawn)) == len(set(d[-3:] for d in drawn)) == len(keys)
    assert [draw(*key) for key in keys] == drawn


def test_the_optimizers_know_what_parameters_are(monkeypatch):
    """The blocks' matrices are Muon's. Matrices decay, vectors do not. An order has a large eps, no
    decay and no clipping."""
    s = train_char.Settings("loa3", "small", seq_len=16, n_layer=1, n_head=2, n_embd=16)
    train_char.fill_in(s, CPU)
    model = train_char.new_model(s, 9)
    optimizers = muon, adamw = train_char.make_optimizers(model, s)
    [inner], (matrices, vectors, order) = muon.param_groups, adamw.param_groups
    assert [group["eps"] for group in adamw.param_groups] == [1e-8, 1e-8, 0.3]
    decay = [group["weight_decay"] for group in (inner, *adamw.param_groups)]
    assert decay == [0.1, 0.1, 0, 0]
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p].removeprefix("blocks.0.") for p in inner["params"]}
    assert found == {"qkv.weight", "proj.weight", "gate_up.weight", "down.weight"}
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert set(order["params"]) == set(model.order.parameters())
    params = [p for group in (inner, *adamw.param_groups) for p in group["params"]]
    assert len(params) == len(set(params)) and set(params) == set(model.parameters())

    clipped = []
    clip = lambda params, most: clipped.append((params, most)) or torch.zeros(())  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    text = np.arange(99, dtype=np.uint16) % 9
    train_char.train_step(s, 0, model, model.loss, optimizers, text, CPU)
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
    """An A3's groups are left to right one by one, then in chunks, and then random partitions,
    in which each text has a size of its own."""
    s = train_char.Settings(model="a3", max_iters=10, shares=(0.2, 0.3, 0.5), group_size=3)
    x = torch.zeros(20, 8, dtype=torch.long)
    for step, size in enumerate([1, 1, 1, 2, 4]):
        given = train_char.loss_arguments(s, step, x)
        assert torch.equal(given["groups"], a3.chunk_groups(20, 8, size))
        assert given["single"] == (size == 1)

    torch.manual_seed(0)
    for step in range(5, 10):
        given = train_char.loss_arguments(s, step, x)
        assert not given["single"]
        sizes = [(row == 0).sum().item() for row in given["groups"]]
        chunks = torch.cat([a3.chunk_groups(1, 8, size) for size in sizes])
        assert set(sizes) == {1, 2, 3}
        assert torch.equal(given["groups"].sort(1).values, chunks)
        assert not torch.equal(given["groups"], chunks)

    # A share of texts stays from left to right. The others are what they would be without it.
    s.group_size = 1
    x = torch.zeros(4000, 8, dtype=torch.long)
    torch.manual_seed(0)
    random = train_char.loss_arguments(s, 9, x)["groups"]
    torch.manual_seed(0)
    s.left_share = 0.25
    given = train_char.loss_arguments(s, 9, x)
    left = (given["groups"] == torch.arange(8)).all(1)
    assert given["single"] and abs(left.double().mean() - 0.25) < 0.03  # 4 standard errors
    assert torch.equal(given["groups"][~left], random[~left])

    s.model = "loa3"
    assert train_char.loss_arguments(s, 0, x) == {}


def test_presets(work, monkeypatch):
    """gpt2 is GPT-2 small, of half a million tokens a step; film has windows of one film."""
    s = train_char.Settings(preset="gpt2", model="arm")
    train_char.fill_in(s, CPU)
    assert s.batch_size * s.gradient_accumulation_steps * s.seq_len == 2**19
    assert (s.dtype, s.compile) == ("float32", False)
    with torch.device("meta"):
        model = train_char.new_model(s, 50257)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert blocks == 12 * (768 * 768 * 4 + 3 * 768 + 3 * 768 * 2048 + 2 * 768)

    films = data.films
    monkeypatch.setattr(data, "films", lambda n, *how: films(n // 100, *how))
    train("--model arm --preset film --max_iters 1", base=QUIET)
    s = checkpoint("out/ckpt.pt")["settings"]
    assert s["data"] == "automaton" and s["seq_len"] == 68

    # Films are in float32, also where other presets are not.
    monkeypatch.setattr(train_char.cli, "is_modern", lambda device: True)
    found = {}
    for preset in ("film", "base"):
        s = train_char.Settings(preset=preset, model="loa3")
        train_char.fill_in(s, CPU)
        found[preset] = s.dtype
    assert found == {"film": "float32", "base": "bfloat16"}


# ---- resumption ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", SEVEN)
def test_resume_is_exact(work, model):
    """A run that a signal stopped in step 4 and again in step 7 is the unbroken run, bit
    for bit. Another seed is another run."""
    flags = f"--model {model} --dropout 0.1 --max_iters 10 --eval_interval 3 --log_interval 1"
    train(f"{flags} --out_dir whole")
    stopped(4, f"{flags} --out_dir parts")
    stopped(7, "--resume --out_dir parts", base="")
    train("--resume --out_dir parts", base="")
    same_runs("whole", "parts")
    assert len(figures("parts", "nelbo")) == 10 and len(figures("parts", "val")) == 4

    train(f"{flags} --out_dir other --seed 7")
    assert not same(*(checkpoint(f"{out}/last.pt")["model"] for out in ("whole", "other")))


def test_resume_remembers_the_best(work, capsys):
    """A checkpoint that is worse than one before the stop does not become ckpt.pt. A
    finished run is left as it is."""
    train("--max_iters 2 --eval_interval 1")
    torch.save(checkpoint("out/last.pt") | {"best": 0.5}, "out/last.pt")
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    train("--resume", base="")
    assert "already at step 2" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before

    train("--resume --max_iters 4", base="")
    assert checkpoint("out/last.pt")["best"] == 0.5
    assert Path("out/ckpt.pt").read_bytes() == before["ckpt.pt"]


def test_resume_on_another_device(work):
    """Its dtype, and whether it compiles, follow a kind of device that changes. A second GPU
    is of the same kind."""
    train("--max_iters 1")
    ckpt = checkpoint("out/last.pt")
    ckpt["settings"] |= {"device": "cuda:0", "dtype": "bfloat16", "compile": True}
    torch.save(ckpt, "out/last.pt")
    for device, dtype in ("cuda:1", "bfloat16"), ("mps", None):
        s, *_, lock = train_char.go_on({"device": device})
        lock.close()
        assert (s.device, s.dtype) == (device, dtype)
    train("--resume --max_iters 2", base="--device cpu")
    settings = checkpoint("out/last.pt")["settings"]
    assert settings["dtype"] == "float32" and settings["compile"] is False


def test_resume_survives_a_move(work):
    """A folder that was renamed goes on where it is, and may have other steps and another
    rate."""
    train("--max_iters 4 --out_dir before")
    Path("before").rename("after")
    Path("text.txt").rename("moved.txt")
    train("--resume --out_dir after --max_iters 6 --data moved.txt --learning_rate 1e-5", base="")
    assert checkpoint("after/last.pt")["settings"]["learning_rate"] == 1e-5
    assert not Path("before").exists() and max(figures("after", "lr")) == 6
    assert figures("after", "lr")[6] <= 1e-5


# ---- validation ----------------------------------------------------------------------------


def validation_windows():
    """The 18 whole windows of 16 in the last tenth of text.txt."""
    val = data.load("text.txt", folder="tokens").val
    assert len(val) == 300
    return val, torch.from_numpy(val.astype("int64"))[:288].view(18, 16)


def test_validation_covers_the_split_and_repeats(work):
    """It is the mean over all whole windows, and the same number each time."""
    train("--model arm --max_iters 3")
    s, model, best = reload()
    val, x = validation_windows()
    [(figure, mean, error)] = train_char.estimate_loss(model, val, s, CPU)
    nats = model.nelbo(x).double() / 16
    assert figure == "exact"
    assert mean == pytest.approx(nats.mean().item(), rel=1e-5) == best
    assert error == pytest.approx(nats.std().item() / 18**0.5, rel=1e-5)

    train("--model lomdm --max_iters 3")
    s, model, best = reload()
    first = train_char.estimate_loss(model, val, s, CPU)
    torch.rand(10)
    assert train_char.estimate_loss(model, val, s, CPU) == first and first[0][1] == best


@pytest.mark.parametrize("most,begins", [(5, [0, 8, 16, 24, 32]), (10, list(range(0, 40, 4)))])
def test_validation_windows_are_spread(monkeypatch, most, begins):
    """--eval_windows of them at even distances, the same for every model; all if there are
    fewer. A model is in eval mode meanwhile, and in train mode afterwards."""
    seen = []

    class Sum(torch.nn.Module):
        def nelbo(self, x, generator, times):
            assert not self.training
            seen.extend(x[:, 0].tolist())
            return x.double().sum(1) * times

    monkeypatch.setattr(train_char, "figures_of", lambda model: {"sum": {"times": 2}})
    s = train_char.Settings(model="mdm", seq_len=4, eval_windows=most)
    val, model = np.arange(42, dtype=np.uint16), Sum()
    [(_, mean, _)] = train_char.estimate_loss(model, val, s, CPU)
    assert seen == begins and mean == 2 * np.mean([x + 1.5 for x in begins])
    assert model.training


EXACT = {"exact, random order": 1, "exact, left to right": 0}  # size of random groups, or 0
TWO_STREAMS = {
    "a3": EXACT | {"exact, random groups of 4": 4},
    "loa3": {"bound": None} | EXACT,
    "planned": {"bound": None} | EXACT,
}


@pytest.mark.parametrize("name", TWO_STREAMS)
def test_figures_of_two_streams_are_what_they_say(work, name):
    """Each is computed here anew, with the draws of the same generator."""
    train(f"--model {name} --max_iters 3")
    s, model, _ = reload()
    val, x = validation_windows()
    found = train_char.estimate_loss(model, val, s, CPU)
    assert [figure for figure, _, _ in found] == list(TWO_STREAMS[name])

    for (_, mean, _), size in zip(found, TWO_STREAMS[name].values(), strict=True):
        g = torch.Generator().manual_seed(1)
        if size is None and name == "planned":
            chosen = torch.randint(64, (18,), generator=g)
            nats = -model.log_prob(x, model.orders[chosen].argsort(dim=1))
        elif size is None:
            order = model.order.draw(model.order.log_q_way(x), 16, g)
            log_q_hat, log_q = model.order_log_probs(x, order)
            nats = log_q - log_q_hat - model.log_prob(x, order.argsort(1))
        else:
            groups = a3.random_groups(18, 16, size, g) if size else a3.chunk_groups(18, 16)
            nats = -model.log_prob(x, groups)
        assert mean == pytest.approx(nats.mean().item(), rel=1e-5)


def test_windows_of_a_list_begin_with_its_texts(work, monkeypatch):
    """In training and in validation, though the last tenth of the file begins amid a text."""
    Path("list.txt").write_text("".join(f"{i:03d}:" + "ab" * 6 for i in range(305)))
    seen = []
    real = train_char.windows
    monkeypatch.setattr(train_char, "windows", lambda *a: seen.append(real(*a)) or seen[-1])
    train("--data list.txt --text_len 16 --max_iters 3 --batch_size 16", base=TINY)
    colon = data.load("list.txt", folder="tokens").tokenizer.encode(":")[0]
    x = torch.cat(seen)
    assert (x[:, 3] == colon).all() and len(x) == 3 * 16 + 30


# ---- from an ARM ---------------------------------------------------------------------------

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

    with pytest.raises(UserError, match="--n_embd is 16 in arm; leave it out"):
        train("--n_embd 32", base=ADAPT)
    Path("other.txt").write_text("to\nbAB" * 500)
    with pytest.raises(UserError, match="'A', 'B' .first in line 2, character 2. does not occur"):
        train("--data other.txt", base=ADAPT)


# ---- several processes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["lomdm", pytest.param("a3 --shares 0.3,0,0.7", marks=pytest.mark.slow)]
)
def test_two_processes_do_what_one_does(work, model):
    """torchrun with two processes has the gradients, and so the weights, losses and figures,
    of one with the same four micro-batches a step, dropout, races and partitions included."""
    flags = f"{BASE} --model {model} --gradient_accumulation_steps 4 --dropout 0.1 "
    flags += "--max_iters 4 --eval_interval 4 --log_interval 1 --warmup_iters 0"
    train(f"{flags} --out_dir one", base="")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*run, str(ROOT / "train_char.py"), *flags.split(), "--out_dir", "two"]
    got = subprocess.run(argv, capture_output=True, text=True, timeout=240)
    assert got.returncode == 0, got.stderr
    assert got.stdout.count("parameters") == 1  # one process prints

    one, two = checkpoint("one/last.pt"), checkpoint("two/last.pt")
    assert one["step"] == two["step"] == 4
    assert one["best"] == pytest.approx(two["best"], rel=1e-5)
    assert figures("one", "nelbo") == pytest.approx(figures("two", "nelbo"), rel=1e-5)
    for name, p in one["model"].items():
        torch.testing.assert_close(p, two["model"][name], rtol=0, atol=1e-4)

    # Both optimizers divide by the size of the gradient, and clipping hides it as well. The
    # moments, and the norm before clipping, say how large the gradients were.
    norms = figures("two", "grad_norm")
    assert figures("one", "grad_norm") == pytest.approx(norms, rel=1e-4) and len(norms) == 4
    for kind, keys in enumerate((["mean"], ["exp_avg", "exp_avg_sq"])):
        states = (c["optimizers"][kind]["state"].values() for c in (one, two))
        for (a, b), key in itertools.product(zip(*states, strict=True), keys):
            close = {"rtol": 1e-3, "atol": 1e-4 * float(a[key].max())}
            torch.testing.assert_close(a[key], b[key], **close)

    # One process with a single micro-batch has other gradients.
    train(f"{flags} --gradient_accumulation_steps 1 --out_dir less", base="")
    less = figures("less", "nelbo")[1]
    assert less != pytest.approx(figures("one", "nelbo")[1], rel=1e-4)


@pytest.mark.parametrize("given,steps", [(3, 3), (None, 1)])
def test_accumulation_needs_equal_shares(monkeypatch, given, steps):
    """Also where nobody gave the flag."""
    monkeypatch.setattr(train_char, "WORLD", 2)
    s = train_char.Settings(preset="small", gradient_accumulation_steps=given)
    with pytest.raises(UserError, match=f"^2 processes share .* here {steps}: .* multiple of 2"):
        train_char.fill_in(s, CPU)
        train_char.refuse(s)
