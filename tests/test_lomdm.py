"""
lomdm.py beyond its losses: estimates, samples, caches, leaks, precision. The claims of the
paper are in test_equivalences.py, what is listed in oracle.py, and what holds for all models in
test_models.py.
"""

import itertools
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import MODELS, V, count, every_model, exact, fits, make_lomdm, seeded, spy, texts

import lomdm

pytestmark = pytest.mark.usefixtures("float64")


# ---- the loss and its estimates ----------------------------------------------------------


@pytest.mark.parametrize("name,L", [*((name, 4) for name in MODELS), ("lomdm", 3)])
@torch.no_grad()
def test_estimates_are_unbiased(name, L):
    """nelbo() of both bounds, and the metric of loss(). The limit is four standard errors, and
    less than 4% of the bound."""
    model = make_lomdm(**MODELS[name])
    x = texts(L)[[5, -2]]
    _, jump, paper = exact(model, x)
    many = x.repeat(200, 1)
    torch.manual_seed(1)

    def close(draws, want):  # draws (20,), each a mean of many
        limit = 4 * draws.std() / math.sqrt(20) + 1e-12
        assert abs(draws.mean() - want) < limit < 0.04 * want

    for bound, want in (("jump", jump), ("paper", paper)):
        draws = torch.stack([model.nelbo(many, 2, bound) for _ in range(20)])
        for row in range(2):
            close(draws[:, row::2].mean(1), want[row])

    found = [model.loss(many)[1] for _ in range(20)]
    close(torch.stack([m["nelbo"] for m in found]), jump.mean() / x.shape[1])
    torch.testing.assert_close(found[0]["recon"] + found[0]["order"], found[0]["nelbo"])
    assert (found[0]["order"] == 0) == (not model.config.learn_order)
    w = model.order_weights(many)
    torch.testing.assert_close(found[0]["w_spread"], w.std(correction=0) / w.mean())


def test_loss_of_a_batch_by_hand(monkeypatch):
    """Four texts, two of them in two orders, and two blocks: both orders of a text share its
    counts, each block has its own pair of losses, log q is that of the revealed prefix. The loss
    is the mean over the six rows, with the part for REINFORCE, the mean over the two pairs. w
    learns from these two texts."""
    model = make_lomdm(L=6, block_len=3, learn_order=True)
    x = torch.randint(V, (4, 6))
    counts = torch.tensor([[1, 2], [0, 1], [2, 2], [2, 0]])
    k = counts[[0, 3, 1, 2]]  # every third first
    drawn = torch.rand(6, 2, 3).argsort(-1)
    monkeypatch.setattr(lomdm, "stratified_counts", lambda *a, **kw: counts)
    monkeypatch.setattr(lomdm, "race", lambda *a: drawn)
    w = model.order_weights(x)
    w = torch.cat((w[:2], w[2:].detach()))

    def cost_and_log_q(row, text, b):
        order = drawn[row, b] + 3 * b
        revealed, open = order[: k[text, b]], order[k[text, b] :]
        z = x[[text]].clone()
        z[0, open] = V
        z[0, 3 * (b + 1) :] = V  # the generic model: what comes later is hidden
        log_mu = oracle.token_log_probs(model, z, x[[text]])[0, open]
        w_hat = model.order_weights_hat(z)[0, open]
        go = w[text, open] / w[text, open].sum()
        cost = 3 * (go * (-log_mu + go.log() - (w_hat / w_hat.sum()).log())).sum()

        left = w[text, order].sum()
        log_q = 0
        for i in revealed:
            log_q = log_q + (w[text, i] / left).log()
            left = left - w[text, i]
        return cost, log_q

    total = 0
    for b in range(2):
        rows = [cost_and_log_q(row, row % 4, b) for row in range(6)]  # texts 0 and 1 again
        total = total + sum(cost for cost, _ in rows) / (6 * 6)
        for (cost_1, log_q_1), (cost_2, log_q_2) in zip(rows[:2], rows[4:], strict=True):
            surrogate = (cost_1 - cost_2).detach() * (log_q_1 - log_q_2) / 2
            total = total + 2 * surrogate / (6 * 6)
    loss = model.loss(x)[0]
    torch.testing.assert_close(loss, total)
    oracle.same_gradients(model, loss, total)


def test_what_an_order_trains():
    """w trains its own block and head alone, and w_hat all that reads z but not what predicts
    tokens."""
    model = make_lomdm(learn_order=True)
    model.order_weights(texts(4)).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.startswith(("g.", "g_block.")), name

    model = make_lomdm(learn_order=True)
    model.order_weights_hat(texts(4)).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(("g.", "g_block.", "lm_head.")), name


@pytest.mark.parametrize("weights", ["normsig", "exp"])
def test_weights_formula(weights):
    """w = c1 + c2 (sigmoid(v) - mean sigmoid(v)) or exp(u - mean u), the mean over i's own
    block."""
    model = make_lomdm(L=6, block_len=3, learn_order=True, weights=weights)
    x = torch.randint(V, (2, 6))
    _, pos, mask = model.inputs(x)
    h = model.g_block(model.wte(x) + model.wpe(pos), model.rotary(pos), mask)
    v = model.g.score(model.g.norm(h))[..., 0] / 32

    w = model.order_weights(x)

    for row, first in itertools.product(range(2), (0, 3)):
        block = v[row, first : first + 3]
        if weights == "normsig":
            s = 1 / (1 + (-block).exp())
            expected = 0.7 + 0.65 * (s - s.mean())
        else:
            u = 8 * (block / 8).tanh()
            expected = (u - u.mean()).exp()
        torch.testing.assert_close(w[row, first : first + 3], expected)


# ---- counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_counts_are_uniform(B, n, K, monkeypatch):
    """k is uniform on {0 .. K-1} in every block of every row, if all turns are."""
    turns = range(B * n * K)
    k = []
    for turn in turns:
        monkeypatch.setattr(torch, "randint", lambda *_, turn=turn, **how: torch.tensor([turn]))
        k.append(lomdm.stratified_counts(B, n, K))
    assert (F.one_hot(torch.stack(k), K).sum(0) == len(turns) / K).all()  # (B, n, K)


def test_counts_are_spread_over_rows_and_blocks():
    """Every turn that makes a difference comes up, a batch has every count equally often, and
    those of a row lie far apart."""
    seen = {tuple(lomdm.stratified_counts(2, 1, 3).flatten().tolist()) for _ in range(200)}
    assert seen == {(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)}

    for _ in range(10):
        k = lomdm.stratified_counts(8, 4, 4)  # 8 rows, 4 blocks of 4
        assert (k.amax(1) - k.amin(1) >= 2).all()
        assert torch.equal(k.sort(0).values[:, 0], torch.arange(4).repeat_interleave(2))


@pytest.mark.parametrize(
    "K,times",
    [(1, [1]), (2, [1, 1]), (3, [2 / 3, 5 / 3, 2 / 3]), (4, [0.5, 1.5, 1.5, 0.5])],
)
def test_counts_of_the_middle_come_as_often_as_said(K, times, monkeypatch):
    """Over a fine grid of uniform numbers, and by hand."""
    grid = (torch.arange(6000) + 0.5) / 6000
    monkeypatch.setattr(torch, "rand", lambda shape, **how: grid.expand(shape))
    k, often = lomdm.middle_counts(torch.arange(K)[:, None].expand(K, 6000), K)
    torch.testing.assert_close(often.double(), torch.tensor(times).double())
    found = k.flatten().bincount(minlength=K) / 6000
    torch.testing.assert_close(found.double(), often.double(), atol=1e-3, rtol=0)


# ---- the papers' clock -------------------------------------------------------------------


def test_times_are_spread_over_the_batch(monkeypatch):
    """ByTime draws one in each B-th of [0, 1]."""
    model = make_lomdm(cls=lomdm.ByTime)
    seen = []
    spy(monkeypatch, lomdm, "block_clocks", lambda tau, t, L, K: seen.append(t))
    model.loss(torch.zeros(8, 4).long())
    assert (8 * seen[0]).floor().flatten().tolist() == list(range(8))


# ---- sampling ----------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("L,given", [(3, {}), (4, {}), (4, {2: 1})])
@torch.no_grad()
def test_samples_follow_the_exact_distribution(kw, L, given):
    """Without a prompt by the exact likelihood. Around a given token by the orders that begin
    behind it."""
    L = L - L % min(L, kw.get("block_len", 4))
    model = make_lomdm(**kw)
    z = torch.full((10_000, L), V)
    every = texts(L)
    for i, token in given.items():
        z[:, i] = token
        every = every[every[:, i] == token]

    x, revealed_at = model.sample(z, generator=seeded(0))

    assert (x != V).all() and ((revealed_at == -1) == (z != V)).all()
    assert fits(count(x, every), exact(model, every, given)[0].neg().exp())


@torch.no_grad()
def test_rows_take_their_blocks_together():
    """A row whose first block is given waits until the other has filled its own, and both
    follow their own exact distributions."""
    model = make_lomdm(block_len=2, learn_order=True)
    z = torch.full((12_000, 4), V)
    z[::2, :2] = torch.tensor([1, 2])

    x, at = model.sample(z, generator=seeded(0))

    assert at[::2, 2:].min() == 2 == at[1::2, 2:].min() and at.max() == 3
    every = texts(4)
    after = every[(every[:, :2] == torch.tensor([1, 2])).all(1)]
    assert fits(count(x[::2], after), exact(model, after, given=(0, 1))[0].neg().exp())
    assert fits(count(x[1::2], every), exact(model, every)[0].neg().exp())


GAPS = torch.tensor([[V] * 6, [1, 2, V, V, V, V], [V, 0, 1, V, V, 2], [2, 1, 0, V, V, V], [0] * 6])
CACHED = [dict(block_len=1), dict(block_len=2), dict(block_len=3, learn_order=True)]


@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize("kw", CACHED)
def test_cached_samples_are_those_without_a_cache(kw, per_step, monkeypatch):
    """And no place is read twice that was finished."""
    model = make_lomdm(L=6, **kw)
    K = kw["block_len"]
    lengths = []  # of what each block of the network reads
    spy(monkeypatch, lomdm.Block, "project", lambda qkv, _, h, *a: lengths.append(h.shape[1]))

    want = model.sample(GAPS, 1.3, None, per_step, generator=seeded(7), cache=False)
    plain = lengths.copy()
    lengths.clear()
    got = model.sample(GAPS, 1.3, None, per_step, generator=seeded(7))

    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert len(lengths) == len(plain) and sum(lengths) < sum(plain)
    assert max(lengths) <= (1 if K == 1 else 2 * K)  # the block before is read once more


@torch.no_grad()
def test_cached_reads_are_those_without_a_cache():
    """Features at each step of writing, not only what is drawn from them."""
    for kw in CACHED:
        model = make_lomdm(L=6, **kw)
        K = model.config.block_len
        z = torch.full((4, 6), V)
        cached = lomdm.CachedReader(model, z)
        for i in range(6):
            end = i - i % K + K
            got = cached(z[:, :end])
            want = model.read(z[:, :end])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
            z[:, i] = torch.randint(V, (4,))


@torch.no_grad()
def test_random_positions_of_a_learned_order():
    """by="random" is the uniform order of an MDM, whatever w_hat says."""
    model = make_lomdm(learn_order=True)
    _, at = model.sample(torch.full((8000, 4), V), by="random")
    assert fits(count(at, oracle.orders(4)), torch.full((24,), 1 / 24))


def test_top_p_by_hand():
    """The fewest of the likeliest tokens that together reach it, and the likeliest always."""
    logits = torch.tensor([0.125, 0.5, 0.0625, 0.3125]).log()
    cases = (
        (0.1, None, [0, 8, 0, 0]),
        (0.49, None, [0, 8, 0, 0]),
        (0.51, None, [0, 8, 0, 5]),
        (0.8124, None, [0, 8, 0, 5]),
        (0.8126, None, [2, 8, 0, 5]),
        (1.0, None, [2, 8, 1, 5]),
        (0.9, 2, [0, 8, 0, 5]),
        (None, 3, [2, 8, 0, 5]),
    )
    for top_p, top_k, want in cases:
        got = lomdm.probabilities(logits, top_k=top_k, top_p=top_p)
        want = torch.tensor(want) / sum(want)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert ((got == 0) == (want == 0)).all()


def test_certainty_by_hand():
    """Three positions, of which each rule takes another."""
    p = torch.tensor([[0.5, 0.45, 0.05, 0.0], [0.48, 0.18, 0.17, 0.17], [0.495, 0.495, 0.01, 0.0]])
    logits = p.log() + torch.tensor([[-3.0], [0.0], [3.0]])  # which changes no probability
    surest = {"confidence": 0, "entropy": 2, "margin": 1}
    assert {by: lomdm.certainty(logits, by).argmax().item() for by in surest} == surest


# ---- no leak -----------------------------------------------------------------------------


@pytest.mark.parametrize("block_len", [1, 2, 6])
@torch.no_grad()
def test_predictions_see_their_own_and_earlier_blocks_only(block_len):
    """An ARM's position j is read by those after it, elsewhere by the whole block and those
    after."""
    model = make_lomdm(L=6, block_len=block_len, learn_order=block_len > 1)
    b = torch.arange(6) // block_len
    z = torch.tensor([[0, V, 1, 2, V, 0]])
    for j in range(6):
        other = z.clone()
        other[0, j] = 1 if z[0, j] == 0 else 0
        expected = torch.arange(6) > j if block_len == 1 else b >= b[j]
        moved = (model.log_probs(other) - model.log_probs(z)).abs().amax(-1)[0] > 1e-9
        assert torch.equal(moved, expected), j
        if block_len > 1:
            moved = (model.order_weights_hat(other) - model.order_weights_hat(z))[0].abs() > 1e-9
            assert torch.equal(moved, expected), j


# ---- dropout and precision ---------------------------------------------------------------


def test_dropout_is_for_training_and_not_for_the_weights_of_q():
    plain = make_lomdm(learn_order=True)
    x = texts(4)
    model = make_lomdm(learn_order=True, dropout=0.5)
    torch.testing.assert_close(model.log_probs(x), plain.log_probs(x))  # eval

    model.train()
    assert not torch.equal(model.log_probs(x), model.log_probs(x))
    assert torch.equal(model.order_weights(x), plain.order_weights(x))


def test_likelihoods_and_weights_stay_in_single_precision():
    """Under autocast, and with weights in bfloat16."""
    torch.set_default_dtype(torch.float32)
    model = make_lomdm(seed=1, learn_order=True)
    x = texts(4)
    want = model.log_probs(x)

    with torch.autocast("cpu", torch.bfloat16):
        w, w_hat = model.order_weights(x), model.order_weights_hat(x)
        loss, _ = model.loss(x)
    loss.backward()
    assert w.dtype == w_hat.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    got = model.bfloat16().log_probs(x)
    assert (got.exp().sum(-1) - 1).abs().max() < 1e-5 < (got - want).abs().max() < 0.5
    for half in (model, make_lomdm().bfloat16()):
        assert half.order_weights(x).dtype == half.nelbo(x).dtype == torch.float32


# ---- bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["loss", "nelbo", "sample", "log_probs", "order_weights"])
def test_texts_that_are_no_whole_blocks_are_refused(ask):
    """By whatever is asked, and before anything is filled in. One block may be shorter."""
    model = make_lomdm(L=8, block_len=4)
    limit = r"B >= 1, L <= seq_len = 8 in whole blocks of 4, not \(\d"
    for shape in ((1, 6), (1, 10), (1, 12), (0, 8), (8,), (1, 0), (4, 4, 4)):
        with pytest.raises(ValueError, match=rf"^texts must be \(B, L\), {limit}"):
            getattr(model, ask)(torch.full(shape, V if ask == "sample" else 0))
    getattr(model, ask)(torch.zeros(7, 2).long())
