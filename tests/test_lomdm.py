"""
lomdm.py against exact enumeration, in float64.

With 3 tokens, up to 5 positions and a small random network, every text, order and mask can be
listed. That gives the likelihood and both bounds without any sampling, as functions of the public
log_probs, order_weights and order_weights_hat alone, and everything else in lomdm.py has to agree
with them.
"""

import contextlib
import itertools
import math

import pytest
import torch

import lomdm
from experiments.by_time import nelbo_at
from lomdm import Config, LoMDM, block_clocks, nelbo_rate, race

V = 3


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(L=4, block_len=None, learn_order=False, seed=0, **kw):
    """A model whose weights are all random and large, order heads included: nothing is near 0 or
    1."""
    torch.manual_seed(seed)
    kw = dict(n_layer=2, n_head=2, n_embd=8) | kw
    model = LoMDM(Config(V, L, block_len=block_len, learn_order=learn_order, **kw)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    return model


MODELS = {
    "arm": dict(block_len=1),
    "block": dict(block_len=2),
    "mdm": dict(),
    "lomdm": dict(learn_order=True),
    "exp": dict(learn_order=True, weights="exp"),
    "block lomdm": dict(block_len=2, learn_order=True),
}
every_model = pytest.mark.parametrize("kw", MODELS.values(), ids=MODELS.keys())


def schedule(t, L, K, w=1.0):
    """lomdm.schedule() on the clocks of blocks of length K: alpha, velocity (B, L)."""
    K = min(K, L)
    alpha, velocity = lomdm.schedule(block_clocks(t, L, K), w, L // K)
    return alpha.expand(len(t), L), velocity.expand(len(t), L)


def whole(kw, L):
    """L, or less so that it is whole blocks."""
    return L - L % min(L, kw.get("block_len", 4))


def texts(L):
    return torch.tensor(list(itertools.product(range(V), repeat=L)))  # (V^L, L)


def visible_sets(L):
    """All 2^L sets of visible positions, each after its subsets: (2^L, L) bool."""
    return torch.tensor([[bool(s >> i & 1) for i in range(L)] for s in range(2**L)])


def frontier(model, visible):
    """Where the next token may go: the masked positions of the first unfinished block. (L,)
    bool."""
    b = torch.arange(len(visible)) // model.config.block_len
    return ~visible & (b == b[~visible].min())


def exact(model, x):
    """-log p(x) (N,), and the jump and paper bounds, by recursion over visible sets.

    p(x) is a sum over orders; texts that pass through the same visible set share their past:
        f(S + i) += f(S) (w_hat_i / W_hat) mu^i(x_i),   f(empty) = 1,   p(x) = f(all)
    and the noise reaches S with probability q(S): the same with w / W alone.
    """
    N, L = x.shape
    f, q = x.new_zeros(2**L, N, dtype=torch.float64), x.new_zeros(2**L, N, dtype=torch.float64)
    f[0] = q[0] = 1
    f, q = list(f), list(q)
    w, jump, paper = model.order_weights(x), 0, 0
    for s, visible in enumerate(visible_sets(L)[:-1]):
        z = torch.where(visible, x, model.mask_id)
        log_mu = model.log_probs(z).gather(-1, x[..., None]).squeeze(-1)  # (N, L)
        open = frontier(model, visible)
        w_hat = model.order_weights_hat(z)
        W, W_hat = (w * open).sum(1), (w_hat * open).sum(1)
        for i in open.nonzero().flatten().tolist():
            go, go_hat = w[:, i] / W, w_hat[:, i] / W_hat
            jump = jump + q[s] * go * (-log_mu[:, i] + go.log() - go_hat.log())
            t = s | 1 << i
            q[t] = q[t] + q[s] * go
            f[t] = f[t] + f[s] * go_hat * log_mu[:, i].exp()
        paper = paper + q[s] * ((W / W_hat).log() - 1 + W_hat / W)
    return -f[-1].log(), jump, jump + paper


def time_integral(rate, n=1, nodes=100, power=16):
    """int_0^1 rate(t) dt by Gauss-Legendre on each n-th, with t = s^power there: t^{w-1} becomes
    smooth."""
    J = torch.diag(torch.arange(1.0, nodes) / (4 * torch.arange(1.0, nodes) ** 2 - 1).sqrt(), 1)
    s, vectors = torch.linalg.eigh(J + J.T)  # Golub-Welsch
    s, weight = (s + 1) / 2, vectors[0] ** 2
    total = 0
    for piece in range(n):
        for s_j, weight_j in zip(s, weight, strict=True):
            total = (
                total + rate((piece + s_j**power) / n) * weight_j * power * s_j ** (power - 1) / n
            )
    return total


def rate_by_masks(model, x, alpha, velocity, velocity_hat_of):
    """E_z of the integrand (2), z's masks listed: recon + order (N,)."""
    total = 0
    for visible in visible_sets(x.shape[1]):
        prob = torch.where(visible, alpha, 1 - alpha).prod(-1)  # (N,)
        if (prob > 0).any():
            z, masked = torch.where(visible, x, model.mask_id), (~visible).expand_as(x)
            rate = nelbo_rate(model.log_probs(z), x, masked, velocity, velocity_hat_of(z))
            total = total + prob * sum(rate)
    return total


def paper_bound_by_time(model, x):
    """The paper's bound from its definition: clocks, rates and an integral over time."""
    L, K, w = x.shape[1], model.config.block_len, model.order_weights(x)
    w_hat_of = {}

    def rate(t):
        t = t.expand(len(x), 1)
        alpha, velocity = schedule(t, L, K, w)

        def velocity_hat(z):
            key = tuple((z[0] == model.mask_id).tolist())
            if key not in w_hat_of:
                w_hat_of[key] = model.order_weights_hat(z)
            return schedule(t, L, K, w_hat_of[key])[1]

        return rate_by_masks(model, x, alpha, velocity, velocity_hat)

    return time_integral(rate, n=math.ceil(L / K))


# 1 ---- a likelihood ------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("L", [3, 4])  # 3, or one block of 2, is shorter than seq_len
def test_probabilities_sum_to_one(kw, L):
    L = whole(kw, L)
    nll, _, _ = exact(make(**kw), texts(L))
    assert nll.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


# 2 ---- the bounds --------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("L", [3, 4])
@torch.no_grad()
def test_exact_below_jump_below_paper(kw, L):
    L = whole(kw, L)
    x = texts(L)
    nll, jump, paper = exact(make(**kw), x)
    assert (nll <= jump + 1e-12).all() and (jump <= paper + 1e-12).all()
    learned = kw.get("learn_order", False)
    assert ((paper - jump).max() > 0.01) == learned  # the timing term is there, or is exactly 0
    assert ((jump - nll).max() > 0.01) == (kw != MODELS["arm"])  # an ARM's bound is its likelihood


@every_model
@pytest.mark.parametrize("L", [3, 4])
@torch.no_grad()
def test_paper_bound_is_the_integral_over_time(kw, L):
    L = whole(kw, L)
    model, x = make(**kw), texts(L)[::7]
    _, _, paper = exact(model, x)
    torch.testing.assert_close(paper_bound_by_time(model, x), paper, rtol=1e-7, atol=0)


@every_model
@pytest.mark.parametrize("L", [3, 4])
@pytest.mark.parametrize("bound", ["jump", "paper"])
def test_nelbo_is_unbiased(kw, L, bound):
    L = whole(kw, L)
    model, x = make(**kw), texts(L)[[5, -2]]
    _, jump, paper = exact(model, x)
    g = torch.Generator().manual_seed(1)
    many = x.repeat(500, 1)
    batches = torch.stack([model.nelbo(many, 2, bound, g) for _ in range(20)])  # (20, 1000)
    batches = batches.view(20, 500, 2).mean(1)
    error = batches.mean(0) - (jump if bound == "jump" else paper)
    limit = 4 * batches.std(0) / math.sqrt(20) + 1e-12
    assert (error.abs() < limit).all(), (error, limit)
    assert (limit < 0.04 * jump).all()  # and the limit means something


def test_counts_are_uniform(monkeypatch):
    """k is uniform on {0..K-1} in every block of every row."""
    for B, n, K in itertools.product([1, 2, 3, 7, 8], [1, 2, 3, 5, 7, 8], [1, 2, 3, 4, 6, 8, 9]):
        N, turns = B * n, []
        for turn in range(N * K):
            with monkeypatch.context() as m:
                m.setattr(torch, "randint", lambda high, *a, turn=turn, **kw: torch.tensor([turn]))
                k = lomdm.spread_counts(B, n, K)
            turns.append(k)
        k = torch.stack(turns)  # (N K, B, n)
        counts = torch.nn.functional.one_hot(k, K).sum(0)  # (B, n, K)
        assert (counts == N).all()


def test_turns_are_drawn_from_all():
    """Every turn that makes a difference comes up."""
    seen = {tuple(lomdm.spread_counts(2, 1, 3).flatten().tolist()) for _ in range(200)}
    assert seen == {(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)}


def test_counts_are_spread_over_rows_and_blocks():
    for _ in range(10):
        k = lomdm.spread_counts(8, 4, 4)  # 8 rows, 4 blocks of 4
        assert (k.amax(1) - k.amin(1) >= 2).all()  # those of a row lie far apart
        assert torch.equal(
            k.sort(0).values, torch.arange(4).repeat_interleave(2)[:, None].expand(8, 4)
        )


def test_nelbo_rate_by_hand():
    """Two masked positions and one visible: 2 (ln 4) + 0.5 (ln 2), and A ln(A / A_hat) - A +
    A_hat."""
    p = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]])
    x, masked = torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]])
    velocity, velocity_hat = torch.tensor([[2.0, 0.5, 3.0]]), torch.tensor([[1.0, 0.5, 7.0]])
    recon, order = nelbo_rate(p.log(), x, masked, velocity, velocity_hat)
    assert recon.item() == pytest.approx(2 * math.log(4) + 0.5 * math.log(2))
    assert order.item() == pytest.approx(2 * math.log(2) - 2 + 1)
    still = nelbo_rate(p.log(), x, masked, torch.zeros(1, 3), torch.zeros(1, 3))
    assert still[0] == 0 and still[1] == 0  # outside the window: 0, not 0 / 0


# 3 ---- special cases and their fast paths --------------------------------------------------------


@torch.no_grad()
def test_arm_is_the_chain_rule():
    model, x = make(block_len=1), texts(4)
    chain = 0
    for i in range(4):  # the definition: predict i from a text that is masked from i on
        z = torch.where(torch.arange(4) < i, x, model.mask_id)
        chain = chain - model.log_probs(z)[:, i].gather(-1, x[:, i, None]).squeeze(-1)
    torch.testing.assert_close(paper_bound_by_time(model, x), chain, rtol=1e-9, atol=0)
    torch.testing.assert_close(model.nelbo(x), chain)  # all conditionals in one causal pass
    torch.testing.assert_close(model.loss(x)[0], chain.mean() / 4)


@pytest.mark.parametrize("L", [6, 4, 2])
@torch.no_grad()
def test_block_fast_path_is_the_generic_model(L):
    """[noisy | clean] predicts every block as if the others were looked at one by one."""
    model = make(L=6, block_len=2, learn_order=True)
    x = torch.randint(V, (5, L))
    z = torch.where(torch.rand(5, L) < 0.5, model.mask_id, x)
    h, attention = model.features(z, x)
    fast = model.logits(h[:, :L]).log_softmax(-1)
    fast_w = model.g_hat(h, *attention, L)
    for b in range(0, L, 2):
        one = torch.cat((x[:, :b], z[:, b : b + 2], torch.full_like(x[:, b + 2 :], V)), 1)
        torch.testing.assert_close(fast[:, b : b + 2], model.log_probs(one)[:, b : b + 2])
        torch.testing.assert_close(fast_w[:, b : b + 2], model.order_weights_hat(one)[:, b : b + 2])


@every_model
def test_loss_is_the_mean_of_nelbo(kw):
    """loss() adds a surrogate to what nelbo() returns, and its nelbo metric is the bound per
    token."""
    model, x = make(**kw), texts(4)
    values = torch.stack([model.loss(x)[1]["nelbo"] for _ in range(100)])
    expected = exact(model, x)[1].mean() / 4
    assert abs(values.mean() - expected) < 4 * values.std() / 10 + 1e-12
    _, metrics = model.loss(x)
    torch.testing.assert_close(metrics["recon"] + metrics["order"], metrics["nelbo"])
    assert (metrics["order"] == 0) == (not kw.get("learn_order", False))
    w = model.order_weights(x)
    torch.testing.assert_close(metrics["w_spread"], w.var(correction=0).sqrt() / w.mean())


@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_schedule(K):
    """alpha runs from 1 to 0, block 0 appears first, and velocity is -alpha' / (1 - alpha)."""
    w = torch.rand(2, 6) + 0.5
    alpha, velocity = schedule(torch.zeros(2, 1), 6, K, w)
    assert torch.equal(alpha, torch.ones(2, 6)) and torch.equal(velocity, torch.zeros(2, 6))
    alpha, velocity = schedule(torch.ones(2, 1), 6, K, w)
    assert torch.equal(alpha, torch.zeros(2, 6)) and torch.equal(velocity, torch.zeros(2, 6))
    for t in torch.rand(20):
        t = t.repeat(2, 1).requires_grad_()
        alpha, velocity = schedule(t, 6, K, w)
        running = [b for b in range(6 // K) if 1 - (b + 1) * K / 6 < t[0, 0] < 1 - b * K / 6]
        assert velocity[0].nonzero().flatten().tolist() == list(
            range(running[0] * K, (running[0] + 1) * K)
        )
        for i in velocity[0].nonzero().flatten():
            (slope,) = torch.autograd.grad(alpha[1, i], t, retain_graph=True)
            torch.testing.assert_close(velocity[1, i], -slope[1, 0] / (1 - alpha[1, i]))
        assert (alpha[:, : running[0] * K] == 0).logical_not().all() or running[0] == 0
        assert (alpha[:, (running[0] + 1) * K :] == 0).all()
        assert (alpha[:, : running[0] * K] == 1).all()


# 4 ---- MDM is the mean over orders, whatever the schedule ----------------------------------------


@torch.no_grad()
def test_mdm_is_the_mean_chain_rule_over_all_orders():
    model, x = make(), texts(4)[::5]
    orders = list(itertools.permutations(range(4)))
    mean = 0
    for order in orders:
        z = torch.full_like(x, model.mask_id)
        for i in order:
            mean = mean - model.log_probs(z)[:, i].gather(-1, x[:, i, None])[:, 0] / len(orders)
            z[:, i] = x[:, i]
    torch.testing.assert_close(exact(model, x)[1], mean)

    schedules = {  # alpha(t) and its derivative
        "linear": (lambda t: 1 - t, lambda t: -torch.ones_like(t)),
        "cosine": (
            lambda t: (math.pi / 2 * t).cos(),
            lambda t: -math.pi / 2 * (math.pi / 2 * t).sin(),
        ),
        "polynomial": (lambda t: 1 - t**3, lambda t: -3 * t**2),
    }
    for alpha, slope in schedules.values():

        def rate(t, alpha=alpha, slope=slope):
            a, velocity = alpha(t).expand(x.shape), (-slope(t) / (1 - alpha(t))).expand(x.shape)
            return rate_by_masks(model, x, a, velocity, lambda z: velocity)

        torch.testing.assert_close(time_integral(rate, power=1), mean, rtol=1e-9, atol=0)


# 5 ---- LoMDM contains MDM ------------------------------------------------------------------------


@pytest.mark.parametrize("block_len", [2, 4])
@torch.no_grad()
def test_no_c2_or_zero_heads_is_mdm(block_len):
    x = texts(4)
    mdm, flat, lomdm_ = (
        make(block_len=block_len),
        make(block_len=block_len, learn_order=True, c2=0.0),
        make(block_len=block_len, learn_order=True),
    )
    for model in (flat, lomdm_):
        model.load_state_dict(mdm.state_dict(), strict=False)
    torch.nn.init.zeros_(lomdm_.g.score.weight)
    torch.nn.init.zeros_(lomdm_.g_hat.score.weight)
    expected = exact(mdm, x)
    for model in (flat, lomdm_):
        assert torch.equal(model.order_weights(x), torch.full((81, 4), 0.7))
        for a, b in zip(exact(model, x), expected, strict=True):
            torch.testing.assert_close(a, b)
        g = [torch.Generator().manual_seed(1) for _ in range(2)]
        torch.testing.assert_close(model.nelbo(x, generator=g[0]), mdm.nelbo(x, generator=g[1]))


def test_a_new_lomdm_is_mdm():
    model = LoMDM(Config(V, 4, 1, 1, 4, learn_order=True))
    assert torch.equal(model.order_weights(texts(4)), torch.full((81, 4), 0.7))
    assert torch.equal(model.order_weights_hat(texts(4)), torch.full((81, 4), 0.7))


@torch.no_grad()
def test_only_c2_over_c1_matters():
    x = texts(4)
    a, b, c = (
        make(learn_order=True, c1=c1, c2=c2) for c1, c2 in [(0.7, 0.6), (1.4, 1.2), (1.4, 0.6)]
    )
    for i in range(3):
        torch.testing.assert_close(exact(a, x)[i], exact(b, x)[i])
    assert (exact(a, x)[1] - exact(c, x)[1]).abs().max() > 1e-3
    torch.testing.assert_close(paper_bound_by_time(b, x[:9]), exact(a, x[:9])[2], rtol=1e-7, atol=0)


@pytest.mark.parametrize("weights", ["normsig", "exp"])
def test_weights_formula(weights):
    """w = c1 + c2 (sigmoid(v) - mean sigmoid(v)) or exp(v - mean v), the mean over i's own
    block."""
    model = make(L=6, block_len=3, learn_order=True, weights=weights)
    x, seen = torch.randint(V, (2, 6)), []
    real = model.g.squash
    model.g.squash = lambda v: seen.append(v) or real(v)
    w = model.order_weights(x)
    v = seen[0].flatten(1)
    h, attention = model.features(x)
    scores = model.g.score(model.g.norm(model.g.block(h, *attention)))
    torch.testing.assert_close(v, scores[..., 0])
    for row in range(2):
        for lo, hi in [(0, 3), (3, 6)]:
            block = v[row, lo:hi]
            if weights == "normsig":
                s = 1 / (1 + (-block).exp())
                expected = 0.7 + 0.65 * (s - s.mean())
            else:
                s = 8 * (block / 8).tanh()
                expected = (s - s.mean()).exp()
            torch.testing.assert_close(w[row, lo:hi], expected)


# 6 ---- the race ----------------------------------------------------------------------------------


def chi_square(counts, probs):
    """How many standard deviations the chi-square statistic lies above its mean."""
    n = counts.sum()
    assert (n * probs).min() > 5, "expected counts too small for the test"
    statistic = ((counts - n * probs) ** 2 / (n * probs)).sum()
    dof = len(probs) - 1
    return (statistic - dof) / math.sqrt(2 * dof)


def test_race_is_plackett_luce():
    w = torch.tensor([0.2, 0.5, 1.0, 2.0])
    n = 200_000
    drawn = race(w.expand(n, 4), torch.Generator().manual_seed(0))
    codes = (drawn * torch.tensor([64, 16, 4, 1])).sum(-1).bincount(minlength=256)
    orders = list(itertools.permutations(range(4)))
    counts = torch.tensor([codes[sum(p * 4 ** (3 - j) for j, p in enumerate(o))] for o in orders])
    probs = []
    for order in orders:
        p, rest = 1.0, w.sum().item()
        for i in order:
            p, rest = p * w[i].item() / rest, rest - w[i].item()
        probs.append(p)
    assert counts.sum() == n
    assert chi_square(counts, torch.tensor(probs)) < 4
    whole = torch.full((24,), 4)
    log_q = lomdm.prefix_log_prob(w.expand(24, 4), torch.tensor(orders), whole)
    torch.testing.assert_close(log_q.exp(), torch.tensor(probs))
    zero = race(torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1000, 4))
    assert set(zero[:, :2].flatten().tolist()) == {1, 3}  # weight 0 never wins
    w, order = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([1, 0, 2, 3])
    log_q = [lomdm.prefix_log_prob(w, order, torch.tensor(k)).item() for k in (0, 1, 2)]
    assert log_q == pytest.approx([0, math.log(2 / 3), math.log(2 / 3)])


# 7 ---- the gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("block_len,weights", [(3, "normsig"), (3, "exp"), (2, "normsig")])
def test_gradient_of_loss_is_that_of_the_bound(block_len, weights, monkeypatch):
    """All draws of loss(), two orders and a count per block, listed: the mean of the gradients is
    the gradient of the enumerated bound, in the backbone and in both order heads."""
    L = 3 if block_len == 3 else 4
    model = make(L=L, block_len=block_len, learn_order=True, weights=weights)
    x = torch.tensor([[2, 0, 1, 1][:L]])
    n = L // block_len
    w = model.order_weights(x).view(1, n, block_len).detach()

    orders = list(itertools.product(itertools.permutations(range(block_len)), repeat=n))
    counts = list(itertools.product(range(block_len), repeat=n))
    whole = torch.full((1, n), block_len)
    q = [lomdm.prefix_log_prob(w, torch.tensor([o]), whole).sum().exp() for o in orders]
    assert sum(q).item() == pytest.approx(1)

    value, surrogate_mean = 0, 0
    for k, (i, a), (j, b) in itertools.product(counts, enumerate(orders), enumerate(orders)):
        all_masked = torch.tensor([k])
        monkeypatch.setattr(lomdm, "spread_counts", lambda *args, k=all_masked, **kw: k)
        monkeypatch.setattr(lomdm, "race", lambda *args, a=a, b=b: torch.tensor([a, b]))
        loss, metrics = model.loss(x)
        surrogate_mean = surrogate_mean + q[i] * q[j] / len(counts) * loss
        value = value + q[i] * q[j] / len(counts) * metrics["nelbo"]
    bound = exact(model, x)[1].sum() / L
    torch.testing.assert_close(value, bound)
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(surrogate_mean, parameters, allow_unused=True)
    want = torch.autograd.grad(bound, parameters, allow_unused=True)
    for name, a, b in zip(names, got, want, strict=True):
        assert a is not None and b is not None, name
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert b.abs().max() > 1e-6, f"{name} has no gradient to speak of"


def test_loss_of_a_batch_by_hand(monkeypatch):
    """Two texts, two blocks: both orders of a text share its counts, each block has its own pair
    of losses, log q covers the revealed prefix only, and everything is divided by B L."""
    model = make(L=6, block_len=3, learn_order=True)
    x, k = torch.randint(V, (2, 6)), torch.tensor([[1, 2], [2, 0]])
    orders = torch.stack([torch.stack([torch.randperm(3) for _ in range(2)]) for _ in range(4)])
    monkeypatch.setattr(lomdm, "spread_counts", lambda *a, **kw: k)
    monkeypatch.setattr(lomdm, "race", lambda *a: orders)
    loss, _ = model.loss(x)

    w, total = model.order_weights(x), 0
    for row, b in itertools.product(range(2), range(2)):
        losses, log_qs = [], []
        for draw in range(2):
            order, n_revealed = orders[row + 2 * draw, b] + 3 * b, k[row, b]
            z = x[row : row + 1].clone()
            z[0, order[n_revealed:]] = V
            open = z[0] == V
            go = w[row] * open / (w[row] * open).sum()
            z[0, 3 * (b + 1) :] = V  # the generic model: what comes later is masked
            w_hat = model.order_weights_hat(z)[0]
            go_hat = w_hat * open / (w_hat * open).sum()
            log_mu = model.log_probs(z)[0].gather(-1, x[row, :, None])[:, 0]
            term = go * (-log_mu + go.log() - go_hat.log())
            losses.append(3 * term[open].sum())
            rest, log_q = w[row, 3 * b : 3 * b + 3].sum(), 0
            for i in order[:n_revealed]:
                log_q = log_q + (w[row, i] / rest).log()
                rest = rest - w[row, i]
            log_qs.append(log_q)
        surrogate = (losses[0] - losses[1]).detach() * (log_qs[0] - log_qs[1]) / 2
        total = total + (losses[0] + losses[1]) / 2 + surrogate
    torch.testing.assert_close(loss, total / (2 * 6))


def test_the_order_does_not_shape_the_backbone():
    """Stop-gradient on f: w trains g alone, and w_hat trains g_hat alone."""
    for weights_of, head in [("order_weights", "g."), ("order_weights_hat", "g_hat.")]:
        model = make(learn_order=True)
        getattr(model, weights_of)(texts(4)).square().sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == name.startswith(head), name


# 8 ---- sampling ----------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("L,given", [(3, {}), (4, {}), (4, {2: 1})])
def test_samples_follow_the_exact_distribution(kw, L, given):
    """Without a prompt by the exact likelihood; around a given token by the recursion of exact(),
    which starts from a visible set with the given token in it."""
    L = whole(kw, L)
    model, n = make(**kw), 30_000
    z = torch.full((n, L), model.mask_id)
    for i, token in given.items():
        z[:, i] = token
    x, revealed_at = model.sample(z, generator=torch.Generator().manual_seed(0))
    assert (x != model.mask_id).all() and ((revealed_at == -1) == (z != model.mask_id)).all()
    all_x = torch.tensor([t for t in texts(L).tolist() if all(t[i] == v for i, v in given.items())])
    probs = infill_probs(model, all_x, given)
    assert probs.sum().item() == pytest.approx(1)
    code = 3 ** torch.arange(L)
    counts = (x * code).sum(-1).bincount(minlength=3**L)[(all_x * code).sum(-1)]
    assert counts.sum() == n
    common = n * probs > 10  # pool the rare ones
    counts = torch.cat((counts[common], counts[~common].sum(0, keepdim=True)))
    probs = torch.cat((probs[common], probs[~common].sum(0, keepdim=True)))
    assert probs[-1] < 0.05
    if n * probs[-1] < 6:
        counts, probs = counts[:-1], probs[:-1] / probs[:-1].sum()
    assert chi_square(counts, probs) < 4


@torch.no_grad()
def infill_probs(model, x, given):
    start = sum(1 << i for i in given)
    f = [torch.zeros(len(x)) for _ in range(2 ** x.shape[1])]
    f[start] = torch.ones(len(x))
    for s, visible in enumerate(visible_sets(x.shape[1])[:-1]):
        if s & start == start:
            z = torch.where(visible, x, model.mask_id)
            w_hat, mu = model.order_weights_hat(z), model.log_probs(z).exp()
            open = frontier(model, visible)
            for i in open.nonzero().flatten().tolist():
                go = w_hat[:, i] / (w_hat * open).sum(1)
                f[s | 1 << i] = f[s | 1 << i] + f[s] * go * mu[:, i].gather(-1, x[:, i, None])[:, 0]
    return f[-1]


@pytest.mark.parametrize("m", [1, 2, 3, 5, 9])
def test_per_step_calls(m, monkeypatch):
    model = make(L=8, learn_order=True)
    calls = []
    features = model.features
    monkeypatch.setattr(model, "features", lambda *a, **kw: calls.append(1) or features(*a, **kw))
    z = torch.full((3, 8), V)
    z[0, 1] = z[0, 6] = 2  # six masks
    z[1, :] = 1  # none
    x, revealed_at = model.sample(z, per_step=m)
    assert len(calls) == math.ceil(8 / m)
    assert (x < V).all() and (x[z < V] == z[z < V]).all() and (revealed_at[z < V] == -1).all()
    for row, masks in [(0, 6), (2, 8)]:
        sizes = revealed_at[row][revealed_at[row] >= 0].bincount()
        assert sizes.tolist() == [m] * (masks // m) + [masks % m] * (masks % m > 0)
    calls.clear()
    assert torch.equal(model.sample(x)[0], x) and not calls


def test_rows_take_their_blocks_together():
    """A row whose first block is given waits until the other has filled its own, and both follow
    their own exact distributions."""
    model, n = make(block_len=2, learn_order=True), 30_000
    z = torch.full((2 * n, 4), V)
    z[::2, :2] = torch.tensor([1, 2])
    x, at = model.sample(z, generator=torch.Generator().manual_seed(0))
    assert at[::2, 2:].min() == 2 == at[1::2, 2:].min() and at.max() == 3
    for rows, given in [(slice(0, None, 2), {0: 1, 1: 2}), (slice(1, None, 2), {})]:
        all_x = torch.tensor(
            [t for t in texts(4).tolist() if all(t[i] == v for i, v in given.items())]
        )
        probs = infill_probs(model, all_x, given)
        code = 3 ** torch.arange(4)
        counts = (x[rows] * code).sum(-1).bincount(minlength=81)[(all_x * code).sum(-1)]
        common = n * probs > 6
        assert counts.sum() == n and probs[~common].sum() < 0.02
        assert chi_square(counts[common], probs[common] / probs[common].sum()) < 4


GAPS = torch.tensor([[V] * 6, [1, 2] + [V] * 4, [V, 0, 1, V, V, 2], [2, 1, 0, V, V, V], [0] * 6])


@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize("z", [GAPS, GAPS[1:2], GAPS[2:3]], ids=["rows", "prompt", "gaps"])
@pytest.mark.parametrize(
    "kw", [dict(block_len=1), dict(block_len=2), dict(block_len=3, learn_order=True), dict()]
)
def test_cached_samples_are_those_without_a_cache(kw, z, per_step, monkeypatch):
    """And no place is read twice that was finished; one block has nothing to keep."""
    model, read = make(L=6, **kw), []
    forward = lomdm.Block.forward

    def spy(self, h, *a, **more):
        read.append(h.shape[1])
        return forward(self, h, *a, **more)

    monkeypatch.setattr(lomdm.Block, "forward", spy)
    generator = torch.Generator()
    want = model.sample(z, 1.3, None, per_step, generator=generator.manual_seed(7), cache=False)
    each = len(model.blocks) + kw.get("learn_order", False)  # passes of blocks in a call
    plain = read[::each]
    read.clear()
    got = model.sample(z, 1.3, None, per_step, generator=generator.manual_seed(7))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    cached = read[::each]
    assert len(cached) == len(plain)
    K = kw.get("block_len", 6)
    if K == 1:
        assert sum(cached) == max(plain)  # each place once
    elif K < 6:
        assert sum(cached) <= sum(plain) and max(cached[1:], default=0) <= 2 * K
        assert sum(cached) < sum(plain) or len(plain) < 3
    else:
        assert cached == plain


@every_model
def test_generators_decide_everything(kw):
    """The same generator gives the same draws, and the global one is left alone."""
    model, z, x = make(**kw), torch.full((20, 4), V), texts(4)[:20]
    calls = {
        "sample": lambda g: model.sample(z, generator=g)[0],
        "nelbo": lambda g: model.nelbo(x, generator=g),
        "nelbo_at": lambda g: nelbo_at(model, x, torch.full((20, 1), 0.6), g)[0],
    }
    for name, call in calls.items():
        before = torch.get_rng_state()
        first = call(torch.Generator().manual_seed(0))
        assert torch.equal(before, torch.get_rng_state()), name
        torch.rand(3)
        assert torch.equal(first, call(torch.Generator().manual_seed(0))), name
    assert not torch.equal(calls["sample"](torch.Generator().manual_seed(1)), calls["sample"](None))


def test_blocks_are_filled_left_to_right():
    model = make(L=6, block_len=2)
    _, at = model.sample(torch.full((50, 6), V))
    assert (at.view(50, 3, 2).sort(-1).values == torch.arange(6).view(3, 2)).all()
    assert (at[:, 0] == 0).any() and (at[:, 1] == 0).any()  # any order inside
    arm = make(L=6, block_len=1)
    assert (arm.sample(torch.full((5, 6), V))[1] == torch.arange(6)).all()


def test_temperature_and_top_k():
    model = make(block_len=1)
    z = torch.full((500, 4), V)
    z[:, :3] = torch.tensor([0, 1, 2])
    likely = model.log_probs(z)[0, 3].argsort(descending=True)
    assert (model.sample(z, temperature=0)[0][:, 3] == likely[0]).all()
    assert (model.sample(z, top_k=1)[0][:, 3] == likely[0]).all()
    assert set(model.sample(z, temperature=5.0, top_k=2)[0][:, 3].tolist()) == set(
        likely[:2].tolist()
    )
    p = (model.log_probs(z)[0, 3] / 2).softmax(-1)  # temperature 2
    x, _ = model.sample(
        z.repeat(40, 1), temperature=2.0, generator=torch.Generator().manual_seed(0)
    )
    assert chi_square(x[:, 3].bincount(minlength=V), p) < 4
    nan, inf = dict(temperature=math.nan), dict(temperature=math.inf)
    for bad in [dict(temperature=-1), nan, inf, dict(top_k=0), dict(top_p=0), dict(top_p=1.1)]:
        with pytest.raises(ValueError, match="temperature must be"):
            model.sample(z, **bad)
    with pytest.raises(ValueError, match="per_step must be at least 1"):
        model.sample(z, per_step=0)
    with pytest.raises(ValueError, match="by must be order, left"):
        make().sample(torch.full((1, 4), V), by="luck")


def test_top_p():
    """The fewest of the likeliest tokens that together reach it: by hand, and drawn."""
    logits, g = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(1, 20_000, 4), torch.Generator()
    for top_p, want in ((0.4, [0, 1, 0, 0]), (0.51, [0, 5, 0, 3]), (0.96, [15, 50, 5, 30])):
        got = lomdm.draw(logits, g.manual_seed(0), top_p=top_p)[0].bincount(minlength=4) / 20_000
        assert torch.allclose(got, torch.tensor(want) / sum(want), atol=0.0142)  # 4 deviations
        assert ((got == 0) == (torch.tensor(want) == 0)).all()
    model, z = make(block_len=1), torch.full((300, 4), V)
    first = model.log_probs(z[:1])[0, 0].exp().sort(descending=True)
    both = first.values[:2].sum().item()
    x = model.sample(z, top_p=both - 1e-9)[0][:, 0]
    assert set(x.tolist()) == set(first.indices[:2].tolist())


# ---- which positions come next, and the likelihood of a decoder ----------------------------------
RULES = ("left", "confidence", "entropy", "margin", "order")
DECODERS = [dict(learn_order=True), dict(learn_order=True, block_len=2), dict(block_len=1)]


def walk(model, row, by, per_step):
    """A decoder forced along one text, a naive loop: the positions it takes at each call, and log p
    of the text."""
    L, K = len(row), model.config.block_len
    z, taken, total = torch.full((1, L), V), [], 0.0
    while (z == V).any():
        b = min(i for i in range(L) if z[0, i] == V) // K
        open = [i for i in range(b * K, (b + 1) * K) if z[0, i] == V]
        seen = z.clone()
        seen[0, (b + 1) * K :] = V
        log_mu, w_hat = model.log_probs(seen)[0], model.order_weights_hat(seen)[0]
        p = log_mu.exp()
        top = p.sort(dim=-1, descending=True).values
        score = {
            "left": -torch.arange(L),
            "confidence": top[:, 0],
            "entropy": (p * log_mu).sum(-1),
            "margin": top[:, 0] - top[:, 1],
            "order": w_hat,
        }[by]
        now = sorted(open, key=lambda i: -score[i].item())[:per_step]
        total += sum(log_mu[i, row[i]].item() for i in now)
        z[0, now] = row[now]
        taken.append(now)
    return taken, total


@pytest.mark.parametrize("kw", DECODERS, ids=["one block", "blocks", "arm"])
@pytest.mark.parametrize("by", RULES)
@torch.no_grad()
def test_decoder_log_prob_is_a_walk_and_sums_to_one(kw, by):
    model = make(**kw)
    for per_step in (1, 2, 3):
        got = model.decoder_log_prob(texts(4), by, per_step)
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-10)
        for n in range(per_step - 1, 81, 3):
            want = walk(model, texts(4)[n], by, per_step)[1]
            assert got[n].item() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("kw", DECODERS, ids=["one block", "blocks", "arm"])
@pytest.mark.parametrize("by", RULES[:4])
@torch.no_grad()
def test_samples_take_the_positions_of_their_rule(kw, by):
    """In the order that the walk along the sampled text takes; and they are drawn from p of it."""
    model, g = make(**kw), torch.Generator().manual_seed(0)
    x, at = model.sample(torch.full((40_000, 4), V), by=by, generator=g)
    for n in range(20):
        taken = walk(model, x[n], by, 1)[0]
        assert [at[n, now].item() for now in taken] == list(range(len(taken)))
    p = model.decoder_log_prob(texts(4), by).exp()
    counts, rare = (x * V ** torch.arange(3, -1, -1)).sum(1).bincount(minlength=V**4), p < 3e-4
    counts, p = (torch.cat((t[~rare], t[rare].sum()[None])) for t in (counts, p))
    assert chi_square(counts, p) < 4


@torch.no_grad()
def test_random_positions_of_a_learned_order():
    """by="random" is the uniform order of an MDM, whatever w_hat says."""
    at = make(learn_order=True).sample(torch.full((24_000, 4), V), by="random")[1]
    orders = at @ 4 ** torch.arange(4)
    counts = orders.unique(return_counts=True)[1]
    assert len(counts) == 24 and chi_square(counts, torch.full((24,), 1 / 24)) < 4


def test_texts_that_are_no_whole_blocks_are_refused():
    """By whatever is asked, and before anything is filled in."""
    model = make(L=8, block_len=4)
    asks = [model.loss, model.nelbo, model.sample, model.decoder_log_prob, model.log_probs]
    for shape in ((1, 6), (1, 10), (1, 12), (8,), (1, 0), (0, 8)):
        for ask in asks:
            with pytest.raises(ValueError, match="^texts must be"):
                ask(torch.full(shape, V if ask == model.sample else 0))


def test_rules_differ():
    """By hand: three positions, of which each rule takes another."""
    p = torch.tensor([[0.5, 0.45, 0.05, 0.0], [0.48, 0.18, 0.17, 0.17], [0.495, 0.495, 0.01, 0.0]])
    best = {by: lomdm.certainty(p.log()[None], by).argmax().item() for by in RULES[1:4]}
    assert best == {"confidence": 0, "entropy": 2, "margin": 1}


def test_a_random_decoder_has_no_likelihood():
    x = texts(4)[:1]
    for model, by in ((make(learn_order=True), "random"), (make(), "order")):
        with pytest.raises(ValueError, match="other steps each time; nelbo"):
            model.decoder_log_prob(x, by)
    assert torch.allclose(
        make(block_len=1).decoder_log_prob(x, "order"), -make(block_len=1).nelbo(x)
    )


# 9 ---- no leak -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_len", [1, 2, 6])
@torch.no_grad()
def test_predictions_see_their_own_and_earlier_blocks_only(block_len):
    model = make(L=6, block_len=block_len, learn_order=block_len > 1)
    b = torch.arange(6) // block_len
    z = torch.tensor([[0, V, 1, 2, V, 0]])
    before, w_before = model.log_probs(z), model.order_weights_hat(z)
    for j in range(6):
        z2 = z.clone()
        z2[0, j] = 1 if z[0, j] == 0 else 0
        moved = (model.log_probs(z2) - before).abs().amax(-1)[0] > 1e-9
        # an ARM's position j is read by those after it, elsewhere by the whole block and those
        # after
        expected = torch.arange(6) > j if block_len == 1 else b >= b[j]
        assert torch.equal(moved, expected), j
        if block_len > 1:
            moved_w = (model.order_weights_hat(z2) - w_before).abs()[0] > 1e-9
            assert torch.equal(moved_w, expected), j


@pytest.mark.parametrize("block_len", [1, 2, 6])
@torch.no_grad()
def test_fast_path_never_sees_a_hidden_token(block_len):
    """In features(z, x) the clean text may reach a prediction from earlier blocks only."""
    model = make(L=6, block_len=block_len)
    b = torch.arange(6) // block_len
    x = torch.randint(V, (1, 6))
    z = torch.full((1, 6), V)
    before = model.logits(model.features(z, x)[0])[:, :6]
    for j in range(6):
        x2 = x.clone()
        x2[0, j] = (x[0, j] + 1) % V
        moved = (model.logits(model.features(z, x2)[0])[:, :6] - before).abs().amax(-1)[0] > 1e-9
        assert torch.equal(moved, b > b[j]), j


@torch.no_grad()
def test_loss_depends_on_masked_tokens_through_their_targets_only():
    """With everything masked, recon is linear in the targets' log-probabilities at the empty
    text."""
    model, x = make(L=4), texts(4)
    masked = torch.ones(len(x), 1, 4, dtype=torch.bool)
    nll, w_hat = model.look(x, masked)
    w = torch.ones_like(w_hat)
    recon, order, timing = lomdm.jump_terms(nll, w, w_hat, masked)
    empty = model.log_probs(torch.full((1, 4), V)).expand(len(x), 4, V)
    torch.testing.assert_close(recon[:, 0], -empty.gather(-1, x[..., None]).sum((1, 2)))
    assert (order == 0).all() and (timing == 0).all()


def test_full_mask_is_not_symmetric():
    """The learned position embedding lets the model prefer a place to start."""
    model = make(learn_order=True)
    z = torch.full((1, 4), V)
    assert model.order_weights_hat(z).std() > 1e-3
    assert model.log_probs(z).std(1).max() > 1e-3
    with torch.no_grad():
        model.wpe.weight.zero_()
    assert model.order_weights_hat(z).std() < 1e-12


# ---- the network ---------------------------------------------------------------------------------


def test_rotary_attention_knows_distances_only():
    """Moving all positions alike changes nothing, moving one does; the angles are 10000^(-2j/d)."""
    model = make(L=12)
    block, h = model.blocks[0], torch.randn(1, 5, 8)
    at = lambda pos: block(h, lomdm.rotary_tables(pos, 4), {})  # noqa: E731
    pos = torch.arange(5)
    torch.testing.assert_close(at(pos), at(pos + 7))
    assert (at(pos) - at(torch.tensor([0, 1, 2, 3, 9]))).abs().max() > 1e-3
    cos, sin = lomdm.rotary_tables(torch.arange(12), 4)
    for i, j in itertools.product(range(12), range(2)):  # head_dim 4 has two pairs
        turn = torch.polar(torch.tensor(1.0), torch.tensor(i * 10000 ** (-2 * j / 4)))
        q = torch.zeros(1, 1, 12, 4)
        q[..., j], q[..., j + 2] = 0.3, -0.8
        q = lomdm.rotate(q, cos, sin)[0, 0, i]
        want = torch.complex(torch.tensor(0.3), torch.tensor(-0.8)) * turn
        torch.testing.assert_close(torch.complex(q[j], q[j + 2]), want)
        assert q.count_nonzero() == 2


def test_dropout_is_for_training_and_not_for_the_order():
    plain, x = make(learn_order=True), texts(4)
    model = make(learn_order=True, dropout=0.5)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model.log_probs(x), plain.log_probs(x))  # eval
    model.train()
    assert not torch.equal(model.log_probs(x), model.log_probs(x))
    h, attention = plain.features(x)
    torch.testing.assert_close(model.g(h, *attention, 4), plain.g(h, *attention, 4))


def test_weights_stay_in_single_precision_under_autocast():
    torch.set_default_dtype(torch.float32)
    model, x = make(learn_order=True), texts(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.order_weights(x).dtype == model.order_weights_hat(x).dtype == torch.float32
        loss, _ = model.loss(x)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- the definition and bad input ----------------------------------------------------------------


@every_model
@torch.no_grad()
def test_time_form_has_the_papers_bound_as_its_mean(kw):
    """At one fixed time the draws of nelbo_at average to the enumerated integrand."""
    model, x = make(**kw), texts(4)[[17]]
    L, K, w = 4, model.config.block_len, model.order_weights(x)
    for t in torch.tensor([0.3, 0.55, 0.9]):
        alpha, velocity = schedule(t.view(1, 1), L, K, w)
        want = rate_by_masks(
            model,
            x,
            alpha,
            velocity,
            lambda z, t=t: schedule(t.view(1, 1), L, K, model.order_weights_hat(z))[1],
        )
        n = 20_000
        g = torch.Generator().manual_seed(0)
        got = sum(nelbo_at(model, x.expand(n, 4), t.expand(n, 1), g))
        assert abs(got.mean() - want) < 4 * got.std() / math.sqrt(n) + 1e-9


@pytest.mark.parametrize(
    "kw,message",
    [
        (dict(n_embd=10, n_head=3), "n_embd .* divisible by n_head"),
        (dict(n_embd=6, n_head=2), "even quotient"),
        (dict(seq_len=10, block_len=4), "seq_len .10. must be divisible by block_len .4."),
        (dict(c1=0.5, c2=0.5), "c1 .* above c2"),
        (dict(c2=-0.1), "c2 not negative"),
        (dict(weights="softmax"), "normsig"),
        (dict(learn_order=True, block_len=1), "only one order"),
        (dict(dropout=1.0), "dropout"),
        (dict(dropout=-0.1), "dropout"),
        (dict(n_layer=0), "n_layer must be at least 1"),
        (dict(vocab_size=0), "vocab_size must be at least 1"),
    ],
)
def test_bad_config(kw, message):
    with pytest.raises(ValueError, match=message):
        Config(**(dict(vocab_size=3, seq_len=4, n_layer=1, n_head=1, n_embd=4) | kw))


def test_bad_calls():
    model = make()
    for bad in (torch.zeros(1, 5), torch.zeros(0, 4), torch.zeros(4, 4, 4)):
        with pytest.raises(ValueError, match=r"texts must be .B, L., B >= 1, L <= seq_len = 4"):
            model.log_probs(bad.long())
    for L in (1, 3):
        with (
            pytest.raises(ValueError, match="in whole blocks of 2, not .7, 3.")
            if L == 3
            else (contextlib.nullcontext())
        ):
            make(block_len=2).features(torch.zeros(7, L, dtype=torch.long))
    with pytest.raises(ValueError, match="n_draws 0: at least 1"):
        model.nelbo(texts(4), n_draws=0)
    with pytest.raises(ValueError, match="bound 'elbo': 'jump' or 'paper'"):
        model.nelbo(texts(4), bound="elbo")


# 10 --- for large vocabularies and compilers ------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_chunks(name, monkeypatch):
    """The same loss and the same gradients whether logits are made at once or few at a time, and
    never more of them than that."""
    model, x = make(8, **MODELS[name]), torch.randint(V, (4, 8))
    results, most, real = [], [], lomdm.LoMDM.logits
    for limit in (2**26, 5 * V):
        sizes = []
        monkeypatch.setattr(LoMDM, "max_logits", limit)
        monkeypatch.setattr(
            LoMDM, "logits", lambda self, h, sizes=sizes: sizes.append(len(h)) or real(self, h)
        )
        torch.manual_seed(0)
        model.zero_grad()
        loss, _ = model.loss(x)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        most.append(max(sizes))
    assert most[0] > 5 and most[1] == 5
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", MODELS)
def test_loss_compiles_to_one_graph(name):
    model, x = make(8, **MODELS[name]), torch.randint(V, (4, 8))
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager")
    for seed in range(2):
        torch.manual_seed(seed)
        want = model.loss(x)[0]
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(x)[0], want)


@pytest.mark.parametrize("token", [-100, -1, V + 1, 50])
def test_tokens_out_of_range_are_refused(token):
    """Not even PyTorch's own ignore_index, -100, costs nothing."""
    x = torch.full((1, 4), token)
    for kw in MODELS.values():
        with pytest.raises((IndexError, RuntimeError)):
            make(**kw).nelbo(x)
        x[:, :-1] = 0  # the last one is not read, only predicted
        with pytest.raises((IndexError, RuntimeError)):
            make(**kw).decoder_log_prob(x, "left")


def test_bfloat16_weights_give_float32_likelihoods():
    torch.set_default_dtype(torch.float32)
    model = make(learn_order=True)
    want = model.log_probs(texts(4))
    got = model.bfloat16().log_probs(texts(4))
    assert model.order_weights(texts(4)).dtype == torch.float32
    assert make().bfloat16().order_weights(texts(4)).dtype == torch.float32
    assert got.dtype == torch.float32 and model.nelbo(texts(4)).dtype == torch.float32
    assert (got.exp().sum(-1) - 1).abs().max() < 1e-5 < (got - want).abs().max() < 0.5


def test_meta_then_to_empty():
    """Nothing of the network is outside the state dict."""
    plain = make()
    with torch.device("meta"):
        model = LoMDM(plain.config)
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert torch.equal(model.eval().log_probs(texts(4)), plain.log_probs(texts(4)))
