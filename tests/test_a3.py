"""
a3.py beyond its likelihood: groups, the fast path, the cache, samples, adaptation. The claims
of the paper are in test_equivalences.py, what is listed in oracle.py, and what holds for all
models in test_models.py.
"""

import ast
import inspect
import itertools
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import RAGGED, V, count, fits, make_a3, make_lomdm, orders, seeded, spy, texts

import a3
import lomdm
from a3 import A3, chunk_groups, curriculum, random_groups, sorted_features

pytestmark = pytest.mark.usefixtures("float64")
RULES = ("confidence", "entropy", "margin")


# ---- the likelihood ----------------------------------------------------------------------


def test_loss_without_groups_is_that_of_random_orders():
    model = make_a3()
    x = torch.randint(V, (4, 5))
    torch.manual_seed(3)
    loss, metrics = model.loss(x)
    torch.manual_seed(3)
    want = -model.log_prob(x, random_groups(4, 5)).mean()
    assert torch.equal(loss, want) and torch.equal(metrics["nelbo"], want)


@pytest.mark.parametrize("size", [1, 2])
def test_nelbo(size):
    """Exact from left to right, and the mean of the draws for random orders."""
    model = make_a3()
    x = torch.randint(V, (8, 5))
    left = -model.log_prob(x, chunk_groups(8, 5, size)).sum(1)
    torch.testing.assert_close(model.nelbo(x, order="left", size=size), left)

    g = seeded(1)
    draws = [-model.log_prob(x, random_groups(8, 5, size, g)).sum(1) for _ in range(3)]
    torch.testing.assert_close(
        model.nelbo(x, 3, size=size, generator=seeded(1)), sum(draws) / 3
    )


def test_groups():
    assert torch.equal(chunk_groups(2, 4), torch.tensor([[0, 1, 2, 3]] * 2))
    assert torch.equal(chunk_groups(1, 5, 2), torch.tensor([[0, 0, 1, 1, 2]]))
    for L, size in itertools.product([1, 5, 8], [1, 2, 3, 9]):
        groups = random_groups(20, L, size, seeded(0))
        assert torch.equal(groups.sort(1).values, chunk_groups(20, L, size))  # the right sizes
        assert L == 1 or size >= L or len(groups.unique(dim=0)) > 1  # each row its own

    odd_one = (random_groups(20_000, 3, 2, seeded(0)) == 1).int().argmax(1)
    assert fits(odd_one.bincount(minlength=3), torch.ones(3) / 3)


# ---- the same, cheaper -------------------------------------------------------------------


@pytest.mark.parametrize("left_neighbour", [True, False])
@pytest.mark.parametrize("n_layer", [1, 3])
@torch.no_grad()
def test_sorted_features_are_the_features(n_layer, left_neighbour):
    """And the groups may have any numbers, as long as their order is the same."""
    model = make_a3(n_layer=n_layer, left_neighbour=left_neighbour)
    x = torch.randint(V, (8, 5))
    relabel = torch.tensor([0, 1, 5, 6, 40, 41, 42, 1000, 2**40, 2**62])
    relabelled = torch.where(RAGGED < 0, 5 * RAGGED, relabel[RAGGED])
    cases = [(RAGGED, None), (RAGGED, False), (relabelled, None)]
    cases += [(random_groups(8, 5), single) for single in (None, False, True)]
    for groups, single in cases:
        got = sorted_features(model, x, groups, single)
        torch.testing.assert_close(got, model.features(x, groups), rtol=0, atol=1e-12)
    assert torch.equal(model(x, relabelled), model(x, RAGGED))


@torch.no_grad()
def test_singletons_need_no_mask(monkeypatch):
    """With one token a group both streams run through the causal kernel."""
    model = make_a3()
    calls = []
    spy(monkeypatch, F, "scaled_dot_product_attention", lambda y, *a, **kw: calls.append(kw))
    for groups, causal in ((RAGGED[:2], True), (RAGGED[2:4], False)):
        calls.clear()
        model.log_prob(torch.randint(V, (2, 5)), groups)
        assert len(calls) == 3  # two streams in one layer, the query stream alone in the last
        for kw in calls:
            assert kw.get("is_causal", False) == (kw.get("attn_mask") is None) == causal


ROWS = torch.cat((RAGGED, torch.full((1, 5), -1)))  # one is complete from the start


def decodings():
    """Ways to decode a batch of ragged rows: groups, per_step and rule of decode()."""
    yield ROWS, 5, "left"  # generate()
    yield ROWS[4:5], 5, "left"
    for by, m in itertools.product((*RULES, "random"), [1, 3]):
        yield ROWS, m, by  # inside of each group
        yield (ROWS >= 0).long() - 1, m, by  # sample()


@pytest.mark.parametrize("n_layer,left_neighbour", [(1, True), (2, False), (3, True)])
@torch.no_grad()
def test_cached_decoding_is_plain_decoding(n_layer, left_neighbour, monkeypatch):
    """The same tokens by the same steps for the same generator, and at each step the logits of
    a pass that reads everything anew. Each token is committed once."""
    model = make_a3(n_layer=n_layer, left_neighbour=left_neighbour)
    committed, asked = [], []

    def compare(logits, cache, x, rank, at):
        is_open = rank.gather(1, at) == 5  # where a row is padded it is not
        junk = x.where(rank < 5, torch.randint(V, x.shape))  # in the open places
        for text in (x, junk):
            plain = model.read(text, rank, at)
            torch.testing.assert_close(logits[is_open], plain[is_open], rtol=0, atol=1e-10)
        asked.append((logits, at, is_open))

    def keep(logits, cache, tokens, slots, rank, *a):
        real = (rank < 5) & (slots > 0)
        committed.append(torch.zeros(len(slots), 6).scatter_add(1, slots, real.double()))

    spy(monkeypatch, a3.Cache, "__call__", compare)
    spy(monkeypatch, a3.Cache, "step", keep)
    x = torch.where(ROWS < 0, torch.randint(V, (9, 5)), V + 5)
    for groups, per_step, by in decodings():
        committed.clear()
        asked.clear()
        one, other = seeded(0), seeded(0)
        how = x[: len(groups)], groups, per_step, by
        got, rank = model.decode(*how, generator=one)
        want, want_rank = model.decode(*how, generator=other, cache=False)

        assert torch.equal(got, want) and torch.equal(rank, want_rank)
        assert torch.equal(one.get_state(), other.get_state())
        assert sum(committed).max() == 1  # not twice

        # Given the steps as groups, the finished text is predicted by the same logits.
        final = model(got, rank)
        for step, (logits, at, is_open) in enumerate(asked):
            now = is_open & (rank.gather(1, at) == step)
            later = final.take_along_dim(at[..., None], dim=1)
            assert now.sum() == (rank == step).sum()  # all that was filled had been asked for
            torch.testing.assert_close(logits[now], later[now], rtol=0, atol=1e-10)


def test_a_group_may_take_several_calls():
    x = torch.zeros(3, 5).long()
    _, at = make_a3().decode(x, x, 2, "left")
    assert torch.equal(at, chunk_groups(3, 5, 2))


# ---- samples -----------------------------------------------------------------------------


@torch.no_grad()
def test_samples_follow_the_exact_distribution(monkeypatch):
    """Rows of different partitions, around different given tokens, in one batch, with one call
    for each group."""
    model = make_a3(4)
    groups = torch.tensor(
        [[0, 1, 2, 3], [1, 0, 0, 1], [0, 0, 0, 0], [-1, 2, 5, -1], [2, 0, 2, 2], [3, 1, 0, 2]]
    )
    n = len(groups)
    x = torch.full((6000 * n, 4), 2)
    calls = []
    spy(monkeypatch, a3.Cache, "step", lambda *args: calls.append(1))

    drawn = model.generate(x, groups.repeat(6000, 1), generator=seeded(0))

    assert len(calls) == 4 and (x == 2).all()
    for row, found in zip(groups, drawn.view(-1, n, 4).unbind(1), strict=True):
        every = texts(4)
        every = every[(every[:, row < 0] == 2).all(1)]
        log_p = model.log_prob(every, row.expand_as(every)).sum(1)
        assert fits(count(found, every), log_p.exp())


@torch.no_grad()
def test_random_decoding_is_the_mean_over_orders():
    model = make_a3(3)
    drawn, at = model.sample(torch.full((20_000, 3), V), by="random", generator=seeded(0))

    every = texts(3)
    each = [model.log_prob(every, order.repeat(27, 1)).sum(1).exp() for order in orders(3)]
    assert fits(count(drawn, every), sum(each) / 6)
    assert fits(count(at, orders(3)), torch.ones(6) / 6)


@pytest.mark.parametrize("by,m", [(by, 1) for by in RULES] + [("entropy", 2)])
@torch.no_grad()
def test_log_prob_of_the_steps_is_that_of_the_draw(by, m):
    """A rule that looks at nothing random finds one order for each text, and log_prob(x,
    steps) under these orders is the distribution of what it generates: it sums to 1 over the
    texts."""
    model = make_a3(4)
    z = torch.tensor([V, V, 1, V]).repeat(10_000, 1)
    drawn, at = model.sample(z, 5.0, None, m, by, generator=seeded(0))  # finds all texts
    pairs = torch.cat((drawn, at), 1).unique(dim=0)
    every, steps = pairs.split(4, 1)
    assert len(every.unique(dim=0)) == len(every) == V**3

    probs = model.log_prob(every, steps).sum(1).exp()
    drawn, at = model.sample(z, 1.0, None, m, by, generator=seeded(1))

    assert fits(count(torch.cat((drawn, at), 1) + 1, pairs + 1), probs)


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("m,how", [(1, {}), (2, dict(temperature=0)), (2, dict(top_k=1))])
@torch.no_grad()
def test_dynamic_decoding_chooses_by_the_rule(by, m, how):
    """Replayed from the finished text: at each step the m best of the open positions are
    taken, scored by the uncached forward at temperature 1, whatever tokens are drawn with."""
    model = make_a3(6, vocab_size=5)
    z = torch.randint(5, (12, 6)).masked_fill(torch.rand(12, 6) < 0.8, 5)
    x, at = model.sample(z, by=by, per_step=m, **how)

    for row, step in itertools.product(range(12), range(6)):
        logits = model(x[[row]], torch.where(at[[row]] < step, at[[row]], 6))[0]
        score = a3.certainty(logits, by).masked_fill(at[row] < step, -torch.inf)
        m_open = min(m, int((at[row] >= step).sum()))
        best = score.topk(m_open).indices
        assert sorted(best.tolist()) == (at[row] == step).nonzero().flatten().tolist()
        if how:
            assert torch.equal(x[row, best], logits[best].argmax(-1))
    assert len(at.unique(dim=0)) > 6  # not the same choice all the time


# ---- from an ARM -------------------------------------------------------------------------


def make_arm(L=5, **kw):
    return make_lomdm(L, seed=3, **(dict(block_len=1, n_layer=3) | kw))


def test_a_loaded_arm_keeps_its_parameters():
    """What it predicts is in test_equivalences.py. New is where a hidden neighbour begins."""
    arm, model = make_arm(), make_a3(n_layer=3)
    model.load_arm(arm.state_dict())
    mine = model.state_dict()
    torch.testing.assert_close(mine.pop("query"), arm.wte.weight.mean(0))
    assert mine.keys() == arm.state_dict().keys()
    assert all(torch.equal(mine[name], p) for name, p in arm.state_dict().items())


@pytest.mark.parametrize(
    "make,message",
    [
        (
            lambda: make_arm(6),
            r"^not an ARM of this size: wpe.weight is \(6, 8\), not \(5, 8\)",
        ),
        (
            lambda: make_arm(n_layer=2),
            r"blocks.2.norm1.weight is None, not \(8,\), and 6 more",
        ),
        (
            lambda: make_arm(n_layer=4),
            r"blocks.3.norm1.weight is \(8,\), not None, and 6 more",
        ),
        (lambda: make_arm(block_len=5, learn_order=True), r"g_hat.norm.weight is \(8,\)"),
        (lambda: make_a3(n_layer=3), r"query is \(8,\), not None"),
        (lambda: make_a3(n_layer=3, vocab_size=7), r"wte.weight is \(8, 8\), not \(4, 8\)"),
    ],
)
def test_wrong_checkpoints_are_refused(make, message):
    model = make_a3(n_layer=3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_arm(make().state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_curriculum_by_hand():
    stages = [curriculum(step, 120, (0.25, 0.5, 0.25), 3) for step in range(140)]
    want = [(1, 1)] * 30 + [(2, 1)] * 20 + [(2, 2)] * 20 + [(2, 4)] * 20 + [(3, 3)] * 30
    assert stages == want + [(3, 3)] * 20  # and on it goes


@pytest.mark.parametrize("total", [1, 7, 10, 100])
def test_curriculum_gives_each_stage_its_share(total):
    for shares in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.1, 0.2, 0.7), (0.5, 0, 0.5)):
        stages = [curriculum(step, total, shares) for step in range(total)]
        assert stages == sorted(stages)
        for stage, share in enumerate(shares, 1):
            steps = sum(s == stage for s, _ in stages)
            assert abs(steps - share * total) <= (1 if share else 0)
        for size in (1, 2, 4):
            assert abs(stages.count((2, size)) - shares[1] * total / 3) < 4 / 3


@pytest.mark.parametrize(
    "kw,message",
    [
        (dict(total_steps=0), "total_steps and group_size"),
        (dict(group_size=0), "total_steps and group_size"),
        (dict(shares=(0.5, 0.5)), "three numbers"),
        (dict(shares=(0.5, 0.6, -0.1)), "three numbers"),
        (dict(shares=(0.5, 0.5, 0.5)), "sum to 1"),
    ],
)
def test_bad_curriculum(kw, message):
    with pytest.raises(ValueError, match=message):
        curriculum(0, **(dict(total_steps=10) | kw))


# ---- the network -------------------------------------------------------------------------


def test_dropout_is_for_training():
    """On embeddings and in every block. None of it in eval()."""
    x = texts(5)[::30]
    groups = chunk_groups(len(x), 5)
    model = make_a3(dropout=0.5)
    assert torch.equal(model(x, groups), make_a3()(x, groups))

    model.train()
    for where in (model.config, *model.blocks):
        model.config.dropout = 0.0
        for block in model.blocks:
            block.dropout = 0.0
        assert torch.equal(model(x, groups), model(x, groups))
        where.dropout = 0.5
        assert not torch.equal(model(x, groups), model(x, groups))


@pytest.mark.parametrize("file, cls", [(a3, A3), (lomdm, lomdm.LoMDM)], ids=["a3", "lomdm"])
def test_residual_branches_begin_smaller(file, cls):
    """As GPT-2: by the root of twice the layers."""
    torch.manual_seed(0)
    model = cls(file.Config(V, 5, 8, n_head=2, n_embd=64))
    for name, std in (("qkv", 0.02), ("gate_up", 0.02), ("proj", 0.005), ("down", 0.005)):
        weight = getattr(model.blocks[3], name).weight
        assert weight.std().item() == pytest.approx(std, rel=0.05), name


# ---- what stands in lomdm.py and in a3.py ------------------------------------------------


def statements(function):
    """What is done, without the docstring."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return [ast.dump(line) for line in definition.body[1:]]


def test_what_both_files_need_stands_in_both():
    """Each file is read by itself, so it is repeated word by word."""
    for name in ("need", "rotary_tables", "rotate", "certainty", "probabilities", "nll"):
        assert inspect.getsource(getattr(a3, name)) == inspect.getsource(getattr(lomdm, name))
    assert inspect.getsource(a3.Block.look_at) == inspect.getsource(lomdm.Block.look_at)
    assert a3.MAX_LOGITS == lomdm.MAX_LOGITS
    assert statements(A3.logits) == statements(lomdm.LoMDM.logits)
    assert statements(a3.Block.attend) == statements(lomdm.Block.attend)


@pytest.mark.parametrize("file", [a3, lomdm], ids=["a3", "lomdm"])
def test_neither_file_needs_another_of_ours(file):
    found = set()
    for node in ast.walk(ast.parse(Path(file.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found == {"dataclasses", "math", "torch"}


# ---- bad input ---------------------------------------------------------------------------


def test_texts_and_groups_that_do_not_fit():
    model = make_a3()
    x = torch.randint(V, (2, 5))
    ar = chunk_groups(2, 5)
    for method in (model, model.log_prob, model.loss, model.generate):
        for bad in (ar[:, :4], ar[0], ar.int(), ar.double(), ar >= 0):
            with pytest.raises(ValueError, match=r"^x and groups must both be \(B, L\)"):
                method(x, bad)
        with pytest.raises(ValueError, match="6 tokens do not fit into seq_len 5"):
            method(x.repeat(1, 2)[:, :6], chunk_groups(2, 6))
        with pytest.raises(ValueError, match=r"^texts must be \(B, L\), not \(5,\)"):
            method(x[0], ar[0])
