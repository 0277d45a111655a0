"""experiments/: the loss by times against exact integration, bounds against enumeration, tables
against hand-made runs, and the commands as their users meet them."""

import itertools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import a3
import lomdm
import train_char
from beyond.decoders import decoder_log_prob
from experiments import bench, evidence, speed
from experiments.runs import Run
from plumbing import checkpoint, data
from plumbing.cli import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_model(cls, *size, **config):
    """With weights of which none is zero or one."""
    torch.manual_seed(0)
    model = cls(lomdm.Config(*size, 1, 2, 8, **config))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    return model


# ---- the loss by times ---------------------------------------------------------------------------


def exact_rate(model, x, t):
    """The integrand of equation (5) at one time t for one text x (1, L), from all 2^L masks."""
    L, K = x.shape[1], model.config.block_len
    masks = torch.tensor(list(itertools.product([False, True], repeat=L)))  # (2^L, L)
    x = x.expand(len(masks), L)
    z = x.masked_fill(masks, model.mask_id)
    tau = lomdm.block_clocks(torch.tensor([[t]]), L, K)  # (1, L)
    alpha, velocity = lomdm.schedule(tau, model.order_weights(x[:1]), L // K)
    _, velocity_hat = lomdm.schedule(tau, model.order_weights_hat(z), L // K)
    p = torch.where(masks, 1 - alpha, alpha).prod(1)  # (2^L,)
    velocity = velocity.expand_as(velocity_hat)
    recon, order = lomdm.nelbo_rate(model.log_probs(z), x, masks, velocity, velocity_hat)
    return (p * (recon + order)).sum()


@pytest.mark.parametrize("learn_order,block_len", [(False, 4), (True, 4), (True, 2)])
@pytest.mark.parametrize("t", [0.2, 0.45, 0.8])
def test_loss_by_time_is_the_papers_bound(float64, learn_order, block_len, t):
    """At any time its mean is the integrand of equation (5), and the mean of its gradient the
    gradient of that, the forward weights' included, within five standard errors."""
    model = random_model(lomdm.ByTime, 3, 4, block_len=block_len, learn_order=learn_order)
    x = torch.tensor([[0, 2, 1, 1]])
    rate = exact_rate(model, x, t) / 4
    names = ["lm_head.weight"] + ["g.score.weight", "g_hat.score.weight"] * learn_order
    params = [dict(model.named_parameters())[n] for n in names]
    want = [rate, *torch.autograd.grad(rate, params)]
    values = []
    for _ in range(160):
        loss, metrics = model.loss(x.expand(2000, 4), torch.full((2000, 1), t))
        values.append([metrics["nelbo"], *torch.autograd.grad(loss, params)])
    for w, *got in zip(want, *values, strict=True):
        got = torch.stack(got).flatten(1) if w.ndim else torch.stack(got)[:, None]
        error = got.std(0) / math.sqrt(len(got))
        z = (got.mean(0) - w.detach().flatten()).abs() / (error + 1e-12)
        assert z[error > 1e-9].max() < 5
        assert error.max() < 0.1 * w.detach().abs().max()  # and that says something


def test_times_are_spread_over_the_batch(monkeypatch):
    """One in each B-th of [0, 1]: without t, what t at these times gives."""
    model = random_model(lomdm.ByTime, 3, 4)
    x, seen = torch.zeros(8, 4).long(), []
    clocks = lomdm.block_clocks
    monkeypatch.setattr(lomdm, "block_clocks", lambda t, *how: seen.append(t) or clocks(t, *how))
    model.loss(x)
    assert (8 * seen[0]).floor().flatten().tolist() == list(range(8))


# ---- tables --------------------------------------------------------------------------------------


def write_log(name, rows, **settings):
    """The log of a run of these settings, rows of (step, val, val_error, kind)."""
    header = dict(settings=dict(seed=int(name[-1]), lr=1, out_dir=name) | settings)
    names = ("step", "val", "val_error", "kind")
    lines = [header, *(dict(zip(names, row, strict=True)) for row in rows)]
    Path(name).mkdir(parents=True, exist_ok=True)
    Path(name, "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


ROWS = [(1, 3.0, 0.1, "a"), (1, 9.0, 0.3, "b"), (2, 2.0, 0.1, "a")]
ROWS += [(2, 5.0, 0.3, "b"), (3, 2.5, 0.1, "a"), (3, 1.0, 0.3, "b")]


def test_table_and_curves(tmp_path, monkeypatch, capsys):
    """Seeds belong together; the other figures are those of the step that the first one chose."""
    monkeypatch.chdir(tmp_path)
    write_log("out/m_s1", ROWS)
    write_log("out/m_s2", [(1, 4.0, 0.2, "a"), (1, 7.0, 0.5, "b")])
    evidence.main(["table", "out/m_s1", "out/m_s2"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["out/m", "a", "2", "3.0000", "1.0000", "0.1500"],
        ["out/m", "b", "2", "6.0000", "1.0000", "0.4000"],
    ]
    evidence.main(["curves", "out/m_s1", "out/m_s2", "--svg", "c.svg"])
    assert "1: 3.5000 ± 0.5000 2: 2.0000 ± 0.0000 3: 2.5000 ± 0.0000" in capsys.readouterr().out
    circles = [e for e in ET.parse("c.svg").iter() if e.tag.endswith("circle")]
    assert len(circles) == 3 and len({c.get("cx") for c in circles}) == 3


def test_what_is_a_seed(tmp_path, monkeypatch, capsys):
    """Runs with other settings, data or parents are no seeds of one another, nor is a run one of
    itself."""
    monkeypatch.chdir(tmp_path)

    def names(*out_dirs):
        evidence.main(["table", *out_dirs])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        return [(name, seeds) for name, kind, seeds, *_ in lines if kind == "a"]

    write_log("out/m_s1", ROWS)
    assert names("out/m_s1") == [("out/m", "1")]
    write_log("out/m_s2", ROWS, lr=2)
    assert names("out/m_s1", "out/m_s2") == [("out/m_s1", "1"), ("out/m_s2", "1")]
    write_log("other/m_s2", ROWS)
    assert names("out/m_s1", "other/m_s2") == [("out/m", "1"), ("other/m", "1")]
    write_log("out/m_s3", ROWS, device="cuda", num_samples=7)
    assert names("out/m_s1", "out/m_s3") == [("out/m", "2")]
    write_log("out/a_s1", ROWS, init_from="out/arm_s1")
    write_log("out/a_s2", ROWS, init_from="out/arm_s2")
    write_log("out/a_s3", ROWS, init_from="out/mdm_s3")
    assert names("out/a_s1", "out/a_s2") == [("out/a", "2")]
    assert names("out/a_s1", "out/a_s3") == [("out/a_s1", "1"), ("out/a_s3", "1")]
    write_log("out/m_s4", ROWS, seed=1)
    with pytest.raises(UserError, match="both have seed 1"):
        names("out/m_s1", "out/m_s4")
    with pytest.raises(UserError, match="twice"):
        names("out/m_s1", "out/../out/m_s1")


def test_logs_without_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log("out/m_s1", [])
    for command in ("table", "curves"):
        with pytest.raises(UserError, match="log.jsonl has no validation yet"):
            evidence.main([command, "out/m_s1"])
        with pytest.raises(UserError, match="cannot read out.nowhere.log.jsonl"):
            evidence.main([command, "out/nowhere"])


# ---- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["normsig", "exp"])
def test_a_gap_in_blocks_has_a_bound(float64, weights):
    """The mean of gap_cost() is E log q(order) / p(order, gap) of the race in each block, from all
    orders, and that is above -log p(gap), from the same orders."""
    model = random_model(lomdm.LoMDM, 3, 8, block_len=4, learn_order=True, weights=weights)
    x, at = torch.tensor([[0, 2, 1, 1, 2, 0, 0, 1]]), torch.arange(8)
    gap = (at >= 2) & (at < 7)  # two of the first block, three of the second
    mean = exact = 0
    with torch.no_grad():
        w = model.order_weights(x)[0]
        for block in ((2, 3), (4, 5, 6)):
            log_p, log_q = [], []  # of each order
            for order in itertools.permutations(block):
                masked, p, q = gap & (at >= block[0]), 0, 0
                for i in order:
                    z, here = x.masked_fill(masked, model.mask_id), masked & (at <= block[-1])
                    w_hat = model.order_weights_hat(z)[0]
                    p += model.log_probs(z)[0, i, x[0, i]] + (w_hat[i] / w_hat[here].sum()).log()
                    q += (w[i] / w[here].sum()).log()
                    masked = masked & (at != i)
                log_p.append(p)
                log_q.append(q)
            log_p, log_q = torch.stack(log_p), torch.stack(log_q)
            mean += (log_q.exp() * (log_q - log_p)).sum()
            exact -= log_p.logsumexp(0)
        generator = torch.Generator().manual_seed(1)
        costs = evidence.gap_cost(model, x.expand(40_000, 8), generator, gap)
    error = costs.std() / 200
    assert mean > exact and abs(costs.mean() - mean) < 4 * error
    assert error < 0.2 * (mean - exact)  # and that says something


def random_a3(L):
    torch.manual_seed(0)
    model = a3.A3(a3.Config(3, L, 1, 2, 8))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    return model.eval()


@pytest.mark.parametrize("kind", ["mdm", "lomdm", "a3"])
def test_costs_by_share_add_up(float64, kind):
    """Over all k they are the bound."""
    model = random_a3(4)
    if kind != "a3":
        model = random_model(lomdm.LoMDM, 3, 4, learn_order=kind == "lomdm")
    x, g = torch.tensor([[0, 2, 1, 1]]).expand(20_000, 4), torch.Generator().manual_seed(1)
    with torch.no_grad():
        costs = torch.stack([evidence.next_cost(model, x, g, k) for k in range(4)])  # (4, 20000)
    want, error = model.nelbo(x, generator=g).mean(), (costs.var(1) / 20_000).sum().sqrt()
    assert abs(costs.mean(1).sum() - want) < 6 * error < 0.05 * want


def test_a_gap_in_a3_is_exact(float64):
    """By "left" what is given comes first, then the gap, both from left to right; by "before" the
    gap does not see what follows; by "random" the costs of all 2! x 4! orders have that mean."""
    model, x, gap = random_a3(6), torch.tensor([[0, 2, 1, 1, 2, 0]]), torch.arange(6) // 2 == 1

    def cost(order):
        return -model.log_prob(x, torch.tensor([order]).argsort(1))[0, gap].sum()

    with torch.no_grad():
        for by, order in (("left", (0, 1, 4, 5, 2, 3)), ("before", (0, 1, 2, 3, 4, 5))):
            torch.testing.assert_close(evidence.gap_cost(model, x, None, gap, by)[0], cost(order))
        given, hidden = itertools.permutations((0, 1, 4, 5)), itertools.permutations((2, 3))
        costs = [cost(one + other) for one, other in itertools.product(given, hidden)]
        g = torch.Generator().manual_seed(1)
        drawn = evidence.gap_cost(model, x.expand(4000, 6), g, gap, "random")
    want, spread = torch.stack(costs).mean(), torch.stack(costs).std()
    assert abs(drawn.mean() - want) < 4 * spread / 4000**0.5 < 0.1 * spread


def test_share_after(float64):
    """What comes after i is what i beats: each j with probability w_i / (w_i + w_j)."""
    torch.manual_seed(0)
    model = random_model(lomdm.LoMDM, 3, 6, block_len=3, learn_order=True, weights="exp")
    x, g = torch.tensor([[0, 2, 1, 1, 2, 0]]), torch.Generator().manual_seed(1)
    with torch.no_grad():
        w = model.order_weights(x).view(2, 3)
        wins = w[:, :, None] / (w[:, :, None] + w[:, None])  # (2, 3, 3), 1/2 against itself
        got = evidence.share_after(model, x.expand(2000, 6), g).mean(0)
    want = ((wins.sum(2) - 0.5) / 2).flatten()
    assert want.std() > 0.1  # and that says something
    torch.testing.assert_close(got, want, atol=0.01, rtol=0)


def test_without_order():
    """The same predictions, all weights 1."""
    model, z = random_model(lomdm.LoMDM, 3, 4, learn_order=True), torch.tensor([[3, 1, 3, 3]])
    blind = evidence.without_order(model)
    assert torch.equal(blind.log_probs(z), model.log_probs(z))
    assert (blind.order_weights_hat(z) == 1).all() and not (model.order_weights_hat(z) == 1).any()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Small models, trained for three steps on a text of which all windows are alike."""
    where = tmp_path_factory.mktemp("runs")
    (where / "text.txt").write_text("to be or not\n" * 300)
    (where / "other.txt").write_text("to be or not, to be\n" * 195)
    flags = f"--data_dir {where}/tokens --n_layer 1 --n_head 2 --n_embd 16 --seq_len 16 "
    flags += "--device cpu --num_samples 0 --max_iters 3 --eval_interval 3"
    for out, model in dict(
        arm="arm", mdm="mdm", lomdm="lomdm", a3="a3", by_time="lomdm-by-time", other="mdm",
        other_arm="arm", blocks="lomdm --block_len 4", loa3="loa3",
    ).items():  # fmt: skip
        text = where / ("other.txt" if out.startswith("other") else "text.txt")
        more = f"--data {text} --out_dir {where / out} --model {model}"
        train_char.main([*flags.split(), *more.split()])
    return where


def test_bounds_are_those_of_nelbo(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    evidence.main(["bounds", "arm", "lomdm", "other"])
    arm, ours, _, *differences = capsys.readouterr().out.splitlines()
    _, model = checkpoint.load("arm/ckpt.pt", train_char.make_model)
    tokens = next(p for p in Path("tokens").glob("*/val.bin") if "text" in str(p))
    raw = list(tokens.read_bytes()[::2])
    x = torch.tensor(raw[: len(raw) // 16 * 16]).view(-1, 16)
    exact = model.eval().nelbo(x).mean() / 16
    assert f"jump {exact:.4f} ±" in arm and "paper - jump 0.00000" in arm
    assert "w 0.7" in ours and differences[0].startswith("arm - lomdm: -")
    assert differences[1] == "arm - other: not on the same windows, no difference"


def test_decoders_are_exact(runs, monkeypatch, capsys):
    """What it prints are means of decoder_log_prob, and an MDM by "order" has none."""
    monkeypatch.chdir(runs)
    evidence.main(["decoders", "mdm", "--windows", "5"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:2] == ["mdm", "bound"]
    found = {row[0]: float(row[1]) for row in rows[1:]}
    assert list(found) == ["left", "confidence", "entropy", "margin"]
    run = Run("mdm", windows=5)
    for by, nats in found.items():
        want = -decoder_log_prob(run.model, run.val, by).mean().item() / 16
        assert nats == pytest.approx(want, abs=1e-4)


def test_speed(runs, monkeypatch, capsys):
    """Every way of every model; the judge's cost is that of an ARM; drafts need fewer calls."""
    monkeypatch.chdir(runs)
    flags = [
        "--judge",
        "arm",
        "--samples",
        "4",
        "--repeats",
        "1",
        "--batches",
        "1",
        "2",
        "--windows",
        "9",
    ]
    speed.main(["arm", "mdm", "a3", "loa3", "blocks", *flags])
    head, judge, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "way"] and head.count("tok/s") == 2
    exact = Run("arm", windows=9)
    want = exact.model.nelbo(exact.val).mean().item() / 16
    assert float(judge.split()[3]) == pytest.approx(want, abs=1e-4)
    ways = [speed.ways(name) for name in ("arm", "mdm", "a3", "loa3", "lomdm")]
    assert len(rows) == sum(map(len, ways)) and rows[0].split()[5] == "1.00"
    calls = {(row[:20].strip(), row[21:37].strip()): float(row[37:].split()[4]) for row in rows}
    assert calls["arm", "1 a call"] == 1 and calls["mdm", "4 a call"] == 0.25
    assert 1 / 8 <= calls["a3", "8 drafts"] <= 1
    with pytest.raises(UserError, match="holds no ARM"):
        speed.main(["arm", "--judge", "mdm"])
    with pytest.raises(UserError, match="--repeats must be at least 1"):
        speed.main(["arm", "--repeats", "0"])


@pytest.mark.parametrize(
    "argv,says",
    [
        ("fraction mdm lomdm a3 loa3 --svg f.svg", "loa3 0.0: "),
        ("order loa3", "space 0."),
        ("passage loa3", "--- sample 1"),
        ("infill loa3", "in gaps of 4 (mean over orders)"),
        ("order lomdm blocks --svg o.svg", "line end 0."),
        ("passage lomdm blocks --svg p.svg", "--- sample 1"),
        ("samples lomdm mdm --judge arm --samples 4", "mdm              uniform      16"),
        ("samples blocks by_time --samples 1", "by_time          learned      16"),
        ("infill a3 lomdm mdm blocks", "in gaps of 4 (bound)"),
        ("infill arm --windows 1", "arm                    2."),
        ("variance mdm lomdm by_time --draws 3", "times   loss"),
        ("decoders mdm blocks arm a3 loa3 --windows 3", "order "),
        ("table a3 by_time", "exact, random groups of 4       1"),
        ("bounds by_time blocks --windows 1", "by_time - blocks: "),
    ],
)
def test_commands_run(runs, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(runs)
    argv = argv.split()
    evidence.main(argv)
    out = capsys.readouterr().out
    assert says in out
    single = {"table", "1"} & set(argv)  # one seed, or window, has no error
    assert single or " nan" not in out
    for path in Path().glob("*.svg"):
        ET.parse(path)


def test_passage_in_blocks(runs, monkeypatch, capsys):
    """Ranks begin again in each block of 4, with 0 for the largest weight, then 3, 6, 9."""
    monkeypatch.chdir(runs)
    evidence.main(["passage", "blocks"])
    digits = "".join(capsys.readouterr().out.splitlines()[4::2])
    run = Run("blocks")
    w = run.model.order_weights(run.val[len(run.val) // 2 :][:8])  # (8, 16)
    blocks = [digits[i : i + 4] for i in range(0, 8 * 16, 4)]
    assert {"".join(sorted(block)) for block in blocks} == {"0369"}
    assert [block.index("0") for block in blocks] == w.view(-1, 4).argmax(1).tolist()


def test_variance_is_of_the_same_weights(runs, monkeypatch):
    monkeypatch.chdir(runs)
    models = []
    found = [1.0, 2.0], 1.0
    monkeypatch.setattr(evidence, "noise_of", lambda model, *_: models.append(model) or found)
    evidence.main(["variance", "lomdm"])
    _, trained = checkpoint.load("lomdm/ckpt.pt", train_char.make_model)
    assert [type(model) for model in models] == [lomdm.LoMDM, lomdm.ByTime]
    for model in models:
        for name, p in trained.state_dict().items():
            assert torch.equal(p, model.state_dict()[name])


class Known(torch.nn.Module):
    """Its gradient is that of the first text, and noise of these variances."""

    def __init__(self, *variances):
        super().__init__()
        self.p, self.spread = torch.nn.Parameter(torch.ones(2)), torch.tensor(variances).sqrt()

    def loss(self, x):
        g = x[0] + torch.randn(2) * self.spread
        return g @ self.p, {"nelbo": g.sum()}


def test_noise_of_a_known_gradient():
    """With the mean (3, 0) and the variances 1 and 2 it is 3 / 9. And a text that is always first
    does not count more: (2, 0) or (0, 2) is (1, 1) and, squared, 2 of noise."""
    losses, noise = evidence.noise_of(Known(1.0, 2.0), torch.tensor([[3.0, 0.0]] * 2), 10_000)
    assert len(losses) == 10_000 and noise == pytest.approx(3 / 9, rel=0.05)
    _, noise = evidence.noise_of(Known(0.0, 0.0), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), 10_000)
    assert noise == pytest.approx(2 / 2, rel=0.05)


@pytest.mark.parametrize(
    "argv,message",
    [
        ("order mdm", "without a learned order"),
        ("rows loa3", "not trained on an automaton"),
        ("passage arm", "without a learned order"),
        ("order a3", "without a learned order"),
        ("bounds arm a3", "holds an A3"),
        ("variance a3", "holds an A3"),
        ("samples a3", "holds an A3"),
        ("fraction blocks", "fraction is for one block"),
        ("samples lomdm --judge mdm", "holds no ARM"),
        ("samples lomdm --judge a3", "holds no ARM"),
        ("samples lomdm --judge other_arm", "another vocabulary than lomdm"),
        ("samples lomdm --judge nowhere", "no checkpoint at nowhere"),
        ("samples lomdm --samples 0", "--samples must be at least 1"),
        ("variance mdm --draws 1", "--draws must be at least 2"),
        ("variance mdm --draws 0", "--draws must be at least 2"),
        ("bounds mdm --windows 0", "--windows must be at least 1"),
        ("bounds mdm --windows -1", "--windows must be at least 1"),
        (f"bounds mdm --windows {10**30}", "--windows must be below"),
        ("bounds mdm ./mdm", "twice"),
        ("bounds mdm --device nothing", "--device nothing"),
        ("curves mdm --svg=", "--svg is empty"),
    ],
)
def test_mistakes(runs, monkeypatch, argv, message):
    monkeypatch.chdir(runs)
    with pytest.raises(UserError, match=message):
        evidence.main(argv.split())


@pytest.mark.parametrize("settings", [dict(colour="red")])
def test_settings_that_were_changed(runs, tmp_path, settings):
    ckpt = torch.load(runs / "mdm/ckpt.pt", weights_only=True)
    ckpt["settings"] |= settings
    torch.save(ckpt, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="of type str|does not know"):
        evidence.main(["bounds", str(tmp_path)])


def test_a_flag_belongs_to_its_command(runs, capsys):
    for argv in ("table mdm --judge arm", "bounds mdm --draws 3", "table", "times mdm"):
        with pytest.raises(SystemExit) as e:
            evidence.main(argv.split())
        assert e.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("both", [False, True])
def test_films_are_checked(both):
    """What the data are is right; a wrong cell, mark or length is not."""
    train, _ = data.automaton(None, both).parts()
    for _, film in itertools.islice(train(), 20):
        assert evidence.right(film) and not evidence.right(film[:-3])
        rows = film.splitlines()
        last = rows[-1] if film[0] == "v" else rows[0]  # in time
        for i in range(16):
            cell = ".#"[last[i + both] == "."]
            wrong = last[: i + both] + cell + last[i + both + 1 :]
            assert not evidence.right(film.replace(last, wrong))
        if both:
            assert not evidence.right("v^"[film[0] == "v"] + film[1:])


# ---- bench ---------------------------------------------------------------------------------------

SMALL = "--n_layer 1 --n_head 2 --n_embd 16 --seq_len 32 --batch_size 2 --repeats 1 --device cpu"


def test_bench_runs(capsys):
    """Each figure that was asked for, and the ARM's; parameters and operations as they are."""
    bench.main([*SMALL.split(), "--what", "sample", "--models", "mdm,a3 random order"])
    out = capsys.readouterr().out
    for way in (" 1 arm", " 1 mdm", "16 mdm", "16 a3 in groups", "16 a3 by confidence"):
        assert f"\n{way} " in out
    assert "lomdm" not in out and "block" not in out and " 2 arm" not in out
    bench.main([*SMALL.split(), "--what", "sample", "--models", "block 16", "--per_step", "2"])
    out = capsys.readouterr().out
    assert "\n 2 block 16" in out and "\n 1 " not in out and "\n 4 " not in out
    bench.main([*SMALL.split(), "--what", "count", "--n_embd", "512"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "tok/s" in line]
    assert [row[:22].strip() for row in rows] == list(bench.MODELS)
    arm = lomdm.LoMDM(lomdm.Config(65, 32, 1, 2, 512, block_len=1))
    n = sum(p.numel() for p in arm.parameters())
    parameters, flop = rows[0][22:].split()[:2]
    assert parameters == f"{n / 1e6:.1f}M"
    matrices = 4 * 512 * 512 + 3 * 512 * 1376 + 512 * 128
    attention = 2 * 512 * 32 * 7 / 6  # as two products; backward, five instead of four
    assert float(flop) == pytest.approx((6 * matrices + 6 * attention) / 1e6, abs=0.5)


def test_bench_trains_in_processes_of_their_own():
    argv = f"-m experiments.bench {SMALL} --what train --models arm".split()
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, ms, _, _, ratio, megabytes = done.stdout.splitlines()[-1].split()
    assert name == "arm" and float(ms) > 0 and ratio == "1.00" and float(megabytes) > 1


@pytest.mark.parametrize(
    "argv,message",
    [
        ("--seq_len 24", "block 16: seq_len .24. must be divisible by block_len .16.; --models"),
        ("--n_head 3", "arm: n_embd .128. must be divisible by n_head .3."),
        ("--models arm,foo", "--models: no foo; there are arm, mdm"),
        ("--repeats 0", "--repeats must be at least 1"),
        ("--threads 0", "--threads must be at least 1"),
        (f"--batch_size {10**30}", "--batch_size must be below"),
        (f"--n_layer {10**9}", "--n_layer must be below"),
        ("--device nothing", "--device nothing"),
        ("--batch_size 1 --what memory", "loa3 compares texts: --batch_size 2 at least"),
    ],
)
def test_mistakes_of_bench(argv, message):
    with pytest.raises(UserError, match=message):
        bench.main(["--device", "cpu", *argv.split()])
