"""experiments/evidence.py, films.py, speed.py and bench.py: their numbers against enumeration and
against figures by hand, and the commands as their users meet them."""

import itertools
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import oracle
import pytest
import torch

import lomdm
import plumbing.films
import train_char
from beyond.decoders import decoder_log_prob
from experiments import bench, charts, evidence, films, ideas, speed
from experiments.runs import Run, mean_error
from plumbing.cli import UserError


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


# ---- bounds, against all orders ------------------------------------------------------------------
def all_orders(model, x, gap):
    """The bound on -log p(gap | rest) in full: each block's orders with the probabilities that w
    gives them, one position after another."""
    K = model.config.block_len
    w = model.order_weights(x[None])[0]
    z = x.masked_fill(gap, model.mask_id)
    total = 0
    for block in range(0, len(x), K):
        places = [i for i in range(block, block + K) if gap[i]]
        for order in itertools.permutations(places):
            now = z.clone()
            q, cost = 1.0, 0.0
            for j, i in enumerate(order):
                left = list(order[j:])
                w_hat = model.order_weights_hat(now[None])[0]
                share = w[i] / w[left].sum()
                share_hat = w_hat[i] / w_hat[left].sum()
                q = q * share
                cost = cost + (share / share_hat).log() - model.log_probs(now[None])[0, i, x[i]]
                now[i] = x[i]
            total = total + q * cost
        z[places] = x[places]
    return total


@torch.no_grad()
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"block_len": 1},
        {"block_len": 6},
        {"block_len": 6, "learn_order": True, "weights": "exp"},
        {"block_len": 3, "learn_order": True, "weights": "exp"},
        {"block_len": 3, "learn_order": True},
    ],
)
def test_a_gap_costs_the_mean_over_all_orders(float64, how, ends):
    """And what is [MASK] at the end of a text stays hidden."""
    model = oracle.make_lomdm(6, n_layer=1, **how)
    x = torch.tensor([1, 0, 2, 2, 0, 1])
    gap = torch.tensor([False, True, True, False, True, False])
    if ends and how["block_len"] > 1:
        x[5] = model.mask_id

    costs = evidence.gap_cost(model, x.expand(12_000, 6), generator(), gap)
    mean, error = mean_error(costs)
    assert abs(mean - all_orders(model, x, gap)) < 4 * error + 1e-9
    assert error < 0.02 * mean  # and that says something


@torch.no_grad()
def test_a_gap_in_a3_is_exact(float64):
    """By "left" what is given comes first, then the gap, both from left to right. By "before" the
    gap does not see what follows. By "random" the costs of all 2! x 4! orders have that mean."""
    model = oracle.make_a3(6)
    x = torch.tensor([[0, 2, 1, 1, 2, 0]])
    gap = torch.arange(6) // 2 == 1

    def cost(order):
        return -model.log_prob(x, torch.tensor([order]).argsort(1))[0, gap].sum()

    for by, order in (("left", (0, 1, 4, 5, 2, 3)), ("before", (0, 1, 2, 3, 4, 5))):
        torch.testing.assert_close(evidence.gap_cost(model, x, None, gap, by)[0], cost(order))

    orders = itertools.product(itertools.permutations((0, 1, 4, 5)), itertools.permutations((2, 3)))
    costs = torch.stack([cost(one + other) for one, other in orders])
    drawn = evidence.gap_cost(model, x.expand(4000, 6), generator(), gap, "random")
    error = costs.std() / 4000**0.5
    assert abs(drawn.mean() - costs.mean()) < 4 * error < 0.1 * costs.std()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["mdm", "lomdm", "a3"])
def test_costs_by_share_add_up(float64, kind):
    """Over all k they are the bound."""
    model = oracle.make_a3(4) if kind == "a3" else oracle.make_lomdm(learn_order=kind == "lomdm")
    x = torch.tensor([[0, 2, 1, 1]]).expand(20_000, 4)
    g = generator()
    costs = torch.stack([evidence.next_cost(model, x, g, k) for k in range(4)])  # (4, 20000)
    want = model.nelbo(x, generator=g).mean()
    error = (costs.var(1) / 20_000).sum().sqrt()
    assert abs(costs.mean(1).sum() - want) < 6 * error < 0.05 * want


@torch.no_grad()
def test_share_after(float64):
    """What comes after i is what i beats: each j with probability w_i / (w_i + w_j)."""
    model = oracle.make_lomdm(6, block_len=3, learn_order=True, weights="exp")
    x = torch.tensor([[0, 2, 1, 1, 2, 0]])
    w = model.order_weights(x).view(2, 3)
    wins = w[:, :, None] / (w[:, :, None] + w[:, None])  # (2, 3, 3), 1/2 against itself
    want = ((wins.sum(2) - 0.5) / 2).flatten()
    assert want.std() > 0.1  # and that says something
    got = evidence.share_after(model, x.expand(2000, 6), generator(), 3).mean(0)
    torch.testing.assert_close(got, want, atol=0.01, rtol=0)


# ---- noise, films, operations --------------------------------------------------------------------
class Known(torch.nn.Module):
    """Its gradient is that of the first text, and noise of these variances."""

    def __init__(self, *variances):
        super().__init__()
        self.p = torch.nn.Parameter(torch.ones(2))
        self.spread = torch.tensor(variances).sqrt()

    def loss(self, x):
        g = x[0] + torch.randn(2) * self.spread
        return g @ self.p, {"nelbo": g.sum()}


@pytest.mark.slow
def test_noise_of_a_known_gradient():
    """With the mean (3, 0) and the variances 1 and 2 it is 3 / 9. And a text that is always first
    does not count more: (2, 0) or (0, 2) is (1, 1) and, squared, 2 of noise."""
    losses, noise = evidence.noise_of(Known(1.0, 2.0), torch.tensor([[3.0, 0.0]] * 2), 10_000)
    assert len(losses) == 10_000 and noise == pytest.approx(3 / 9, rel=0.05)
    _, noise = evidence.noise_of(Known(0.0, 0.0), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), 10_000)
    assert noise == pytest.approx(2 / 2, rel=0.05)


@pytest.mark.parametrize("both", [False, True])
def test_films_are_checked(both):
    """What the data are is right; a wrong cell, mark or length is not."""
    for film in plumbing.films.films(20, 1, both):
        assert films.follows_the_rule(film) and not films.follows_the_rule(film[:-3])
        rows = film.splitlines()
        last = rows[-1] if film[0] == "v" else rows[0]  # in time
        for i in range(16):
            cell = ".#"[last[i + both] == "."]
            wrong = last[: i + both] + cell + last[i + both + 1 :]
            assert not films.follows_the_rule(film.replace(last, wrong))
        if both:
            assert not films.follows_the_rule("v^"[film[0] == "v"] + film[1:])


def test_kendall_by_hand():
    """Of 6 pairs of rows, with 2 cells each. All right is 1, all wrong -1. If only the rows 0 and 1
    change places, one pair of six is wrong: 1 - 2 / 6."""
    right = torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None].repeat(1, 2)
    changed = right[[1, 0, 2, 3]]
    tau = films.kendall(torch.stack((right, right.flip(0), changed)))
    assert tau.tolist() == pytest.approx([1, -1, 4 / 6])


def test_cells_after_their_parents():
    """In order of time all 48 come after the three that they follow from. If one of the first
    moment comes last, its three children do not. Backwards none does."""
    time = torch.arange(64.0).view(1, 4, 16).neg()
    late = time.clone()
    late[0, 0, 0] = -100
    film = torch.cat((time, late, -time))
    assert films.after_parents(film).tolist() == [48, 45, 0]


def test_operations_are_those_of_the_formula(capsys):
    """6 FLOP a token for each weight of a matrix product, and attention."""
    bench.main(["--device", "cpu", "--what", "count", "--models", "mdm"])
    head, _, arm, mdm, _ = capsys.readouterr().out.splitlines()
    assert "n_embd 128" in head and mdm.startswith("mdm ")
    C, L = 128, 64
    matrices = 4 * (4 * C * C + 3 * C * 352) + C * 128  # 4 layers; 352 inside, 128 rows for logits
    attention = 4 * 2 * C * L * 7 / 6  # two products; backward, five instead of four
    parameters, flop = arm[22:].split()[:2]
    model = lomdm.LoMDM(lomdm.Config(65, L, 4, 4, C, block_len=1))
    assert parameters == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"
    assert float(flop) == pytest.approx((6 * matrices + 6 * attention) / 1e6, abs=0.1)


def test_bench_times_a_step(capsys):
    bench.main(["--device", "cpu", "--repeats", "1", "--batch_size", "2", "--models", "mdm"])
    arm, mdm = (line.split() for line in capsys.readouterr().out.splitlines()[2:])
    assert arm[0] == "arm" and arm[4] == "1.00" and mdm[0] == "mdm"
    assert float(mdm[4]) == pytest.approx(float(mdm[1]) / float(arm[1]), rel=0.1)
    assert float(arm[3].replace(",", "")) == pytest.approx(2 * 64 / float(arm[1]) * 1e3, rel=0.1)


# ---- the commands --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Small models, trained for three steps on a text of which all windows are alike."""
    where = tmp_path_factory.mktemp("runs")
    (where / "text.txt").write_text("to be or not\n" * 300)
    (where / "other.txt").write_text("to be or not, to be\n" * 195)
    flags = f"--data_dir {where}/tokens --n_layer 1 --n_head 2 --n_embd 16 --seq_len 16 "
    flags += "--device cpu --num_samples 0 --max_iters 3 --eval_interval 3"
    for out, model in {
        "arm": "arm",
        "mdm": "mdm",
        "blocks": "lomdm --block_len 4",
        "lomdm": "lomdm",
        "a3": "a3",
        "loa3": "loa3",
        "other": "arm",
    }.items():
        text = where / ("other.txt" if out == "other" else "text.txt")
        more = f"--data {text} --out_dir {where / out} --model {model}"
        train_char.main([*flags.split(), *more.split()])
    return where


@pytest.fixture
def at_runs(runs, monkeypatch):
    monkeypatch.chdir(runs)


def test_bounds_are_those_of_nelbo(at_runs, capsys):
    """An ARM's is exact, so both are one. Differences are of the same windows only."""
    evidence.main(["bounds", "arm", "lomdm", "other"])
    arm, lomdm_line, _, one, two, _ = capsys.readouterr().out.splitlines()
    run = Run("arm")
    exact = run.model.nelbo(run.val).mean() / 16
    assert f"jump {exact:.4f} ±" in arm and "paper - jump 0.00000" in arm
    jump, other = (float(line.split("jump ")[1].split()[0]) for line in (arm, lomdm_line))
    assert float(one.split()[3]) == pytest.approx(jump - other, abs=2e-4)
    assert two == "arm - other: not on the same windows, no difference"


def test_decoders_are_exact(at_runs, capsys):
    """What is printed are means of decoder_log_prob. An MDM by "order" has none."""
    evidence.main(["decoders", "mdm", "--windows", "5"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:2] == ["mdm", "bound"]
    found = {row[0]: float(row[1]) for row in rows[1:]}
    assert list(found) == ["left", "confidence", "entropy", "margin"]
    run = Run("mdm", windows=5)
    for by, nats in found.items():
        want = -decoder_log_prob(run.model, run.val, by).mean().item() / 16
        assert nats == pytest.approx(want, abs=1e-4)


def test_passage_in_blocks(at_runs, capsys):
    """Ranks begin again in each block of 4, with 0 for the largest weight, then 3, 6, 9."""
    evidence.main(["passage", "blocks"])
    digits = "".join(capsys.readouterr().out.splitlines()[4::2])
    run = Run("blocks")
    w = run.model.order_weights(run.val[len(run.val) // 2 :][:8])  # (8, 16)
    blocks = [digits[i : i + 4] for i in range(0, 8 * 16, 4)]
    assert {"".join(sorted(block)) for block in blocks} == {"0369"}
    assert [block.index("0") for block in blocks] == w.view(-1, 4).argmax(1).tolist()


def test_strips_reveal_what_they_say(at_runs, capsys):
    """Of 16 characters 6 and then 10, the first ones by an ARM, and in blocks of 4 one by one."""
    evidence.main(["strips", "arm", "blocks", "--text", "to be or not to be"])
    arm, arm_later, blocks, later = (s[14:] for s in capsys.readouterr().out.splitlines())
    assert arm == "to be " + "·" * 10 and arm_later == "to be or n" + "·" * 6
    assert blocks[:4] == "to b" and blocks.count("·") == 10 and blocks[8:] == "·" * 8
    assert later[:8] == "to be or" and later.count("·") == 6


def test_a_picture_that_writes(at_runs, runs):
    """Each character appears at the moment of its call, all are there at the end, and where
    nothing moves."""
    evidence.main(["strips", "arm", "loa3", "--text", "to be or not to be", "--svg", "w.svg"])
    source = Path("w.svg").read_text()
    ns = "{http://www.w3.org/2000/svg}"
    cells = [e for e in ET.fromstring(source).iter(f"{ns}text") if e.get("class").startswith("k")]
    arm, loa3 = cells[:16], cells[16:]
    assert [e.get("class") for e in arm] == [f"k{i}" for i in range(16)]
    assert sorted(e.get("class") for e in loa3) == sorted(e.get("class") for e in arm)
    assert "".join(e.text for e in arm) == "to be or not to ".replace(" ", "\u00a0")

    shows = re.findall(
        r"@keyframes k(\d+)\{0%,[\d.]+%\{opacity:0\}([\d.]+)%,to\{opacity:1\}\}", source
    )
    assert [int(k) for k, _ in shows] == list(range(16))
    moments = [float(percent) * (16 * 0.14 + 3) / 100 for _, percent in shows]
    assert moments == pytest.approx([0.14 * (k + 1) for k in range(16)], abs=1e-3)
    # A piece of several letters takes their room.
    lines = [("mdm_s1", [("ab", 1), ("c", 0)])]
    pieces = [e for e in ET.fromstring(charts.writing(lines)).iter(f"{ns}text")][2:]
    assert [e.get("x") for e in pieces] == ["10", "28"]

    still, moving = source.split("@media(prefers-reduced-motion")
    assert "opacity" not in still and "animation" in moving


@pytest.mark.parametrize(
    "argv,says",
    [
        ("fraction mdm lomdm a3 loa3 --svg f.svg", "loa3 0.0: "),
        ("order loa3 lomdm blocks --svg o.svg", "line end 0."),
        ("passage loa3 lomdm --svg p.svg", "--- sample 1"),
        ("samples lomdm mdm --judge arm --samples 4", "mdm              uniform      16"),
        ("groups a3 loa3 --judge arm --samples 4", "loa3 8 "),
        ("infill a3 loa3 mdm blocks", "in gaps of 4 (bound)"),
        ("infill arm --windows 1", "in gaps of 4 (exact)"),
        ("variance mdm lomdm --draws 3", "times   loss"),
        ("decoders blocks arm a3 loa3 --windows 3", "order "),
    ],
)
def test_commands_run(at_runs, runs, capsys, argv, says):
    evidence.main(argv.split())
    out = capsys.readouterr().out
    assert says in out
    assert "--windows 1" in argv or " nan" not in out  # one window has no error
    for path in runs.glob("*.svg"):
        ET.parse(path)


@pytest.mark.slow
def test_speed(at_runs, capsys):
    """Every way of every model. The judge's cost is that of an ARM. Drafts need fewer calls."""
    flags = "--judge arm --samples 4 --repeats 1 --windows 9"
    speed.main(["arm", "mdm", "a3", "loa3", "blocks", *flags.split()])
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


def test_entropy_by_hand():
    """Of 1/2, 1/4 and 1/4 it is 3/2 ln 2."""
    x = torch.tensor([[0, 0, 1, 2]])
    assert evidence.entropy(x, 5) == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize(
    "argv,message",
    [
        ("order mdm", "without a learned order"),
        ("passage a3", "without a learned order"),
        ("rows loa3", "not trained on an automaton"),
        ("films mdm", "not trained on an automaton"),
        ("bounds arm a3", "holds an A3"),
        ("fraction blocks", "fraction is for one block"),
        ("strips mdm --text to", "--text: at least 16 tokens"),
        ("samples lomdm --judge mdm", "holds no ARM"),
        ("samples lomdm --judge other", "another vocabulary than lomdm"),
        ("samples lomdm --judge nowhere", "no checkpoint at nowhere"),
        ("variance mdm --draws 1", "--draws must be at least 2"),
        ("bounds mdm --windows 0", "--windows must be at least 1"),
        ("bounds mdm --device nothing", "--device nothing"),
        ("fraction mdm --svg=", "--svg is empty"),
    ],
)
def test_mistakes(at_runs, argv, message):
    with pytest.raises(UserError, match=message):
        evidence.main(argv.split())


@pytest.mark.parametrize(
    "main,argv,message",
    [
        (bench.main, "--models arm,foo", "--models: no foo; there are arm, mdm"),
        (bench.main, "--batch_size 1", "--batch_size must be at least 2"),
        (bench.main, "--device nothing", "--device nothing"),
        (speed.main, "arm --repeats 0", "--repeats must be at least 1"),
        (speed.main, "arm --judge mdm", "holds no ARM"),
    ],
)
def test_mistakes_of_bench_and_speed(at_runs, main, argv, message):
    with pytest.raises(UserError, match=message):
        main(argv.split())


# ---- pictures of ideas ---------------------------------------------------------------------------
def test_who_sees_whom_by_hand(tmp_path, capsys):
    """The tables at the top of lomdm.py and a3.py, from their code."""
    drawn = lambda mask: ["".join(".#"[cell] for cell in row) for row in mask.tolist()]  # noqa: E731
    assert drawn(ideas.mask_of(4, 1)) == ["#...", "##..", "###.", "####"]
    assert drawn(ideas.mask_of(4, 2)) == ["##..", "##..", "####", "####"]
    assert drawn(ideas.mask_of(4, 4)) == 4 * ["####"]
    content, query = ideas.masks_of_a3([1, 0, 2, 0])
    assert drawn(content) == ["#....", "###.#", "#.#.#", "#####", "#.#.#"]
    assert drawn(query) == ["#.#.#", "#....", "###.#", "#...."]

    ideas.main(["masks", "--svg", str(tmp_path / "m.svg")])
    source = (tmp_path / "m.svg").read_text()
    assert ET.fromstring(source) is not None
    assert source.count('class="sees"') == 36 + 48 + 64 + 16 + 9
    assert "A3, queries" in capsys.readouterr().out


@torch.no_grad()
def test_where_heads_look(at_runs, runs, capsys):
    """The shares of attention are those of the model's own attention, and add up to 1 over all
    distances. Fresh local heads look at their neighbours."""
    model = lomdm.LoMDM(lomdm.Config(5, 7, 2, 4, 64))
    z = torch.randint(5, (3, 7))
    found = ideas.attention(model, z)  # all distances of 7 places are within 6
    places = 7 - torch.arange(-6, 7).abs()
    torch.testing.assert_close((found * places).sum(-1), torch.full((2, 4), 7.0))
    assert (found[0].argmax(-1)[:2] - 6).tolist() == [-1, 1]

    ideas.main(["heads", "mdm", "--svg", "h.svg"])
    out = capsys.readouterr().out
    assert re.search(r"^mdm before layer 1: -1 ", out) and "mdm after layer 1: " in out
    ET.parse("h.svg")
    with pytest.raises(UserError, match="a3 holds an A3"):
        ideas.main(["heads", "a3"])


def test_whose_heads_are_not_drawn(at_runs):
    """Blocks have masks of their own, and where others have trained, the beginning is not here."""
    with pytest.raises(UserError, match="blocks has several blocks"):
        ideas.main(["heads", "blocks"])

    again = "--init_from mdm --model mdm --data text.txt --data_dir tokens --out_dir again"
    train_char.main([*again.split(), "--max_iters", "1", "--num_samples", "0", "--device", "cpu"])
    with pytest.raises(UserError, match="again began with the weights of mdm, which are not here"):
        ideas.main(["heads", "again"])
