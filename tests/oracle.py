"""
The oracle of the tests: with 3 tokens and 4 positions, everything can be listed.

There are 81 texts, 24 orders and 16 sets of visible positions. So the likelihood of a small
random network, and the bounds on it, are added up order by order, as the equations say. What
stands here uses the plainest methods of the models only: log_probs, order_weights and
order_weights_hat of LoMDM, and the parameters of A3. Everything else in lomdm.py, a3.py and
beyond/ has to agree with that.
"""

import functools
import itertools
import math

import pytest
import torch

import a3
import lomdm
from beyond import loa3, planned

V = 3  # tokens, where nothing else is said


# ---- small random models -----------------------------------------------------------------

SIZE = dict(n_layer=2, n_head=2, n_embd=8)
MODELS = {
    "arm": dict(block_len=1),
    "block": dict(block_len=2),
    "mdm": dict(),
    "lomdm": dict(learn_order=True),
    "exp": dict(learn_order=True, weights="exp"),
    "block lomdm": dict(block_len=2, learn_order=True),
}
every_model = pytest.mark.parametrize("kw", MODELS.values(), ids=MODELS.keys())


def randomize(model):
    """Weights that are all random and large, so that nothing is near 0 or 1."""
    for name, p in model.named_parameters():
        if name.startswith("order."):  # LoA3 stores the parameters of its order divided
            torch.nn.init.normal_(p, std=4 / model.order.scale)
        elif name.endswith("score.weight"):  # what LoMDM's orders read is divided by 32
            torch.nn.init.normal_(p, std=0.5 * 32)
        else:
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    return model.eval()


def make_lomdm(L=4, seed=0, cls=lomdm.LoMDM, middle_steps=False, **kw):
    torch.manual_seed(seed)
    return randomize(cls(lomdm.Config(V, L, middle_steps=middle_steps, **(SIZE | kw))))


def make_a3(L=5, seed=0, vocab_size=V, **kw):
    torch.manual_seed(seed)
    return randomize(a3.A3(a3.Config(vocab_size, L, **(SIZE | kw))))


def make_loa3(L=4, seed=0, vocab_size=V, random_share=0.2, **kw):
    torch.manual_seed(seed)
    config = loa3.Config(vocab_size, L, random_share=random_share, **(SIZE | kw))
    return randomize(loa3.LoA3(config))


def make_planned(L=4, seed=0, M=5, **kw):
    """With M random orders, one of them twice."""
    torch.manual_seed(seed)
    model = randomize(planned.Planned(a3.Config(V, L, **(SIZE | kw))))
    model.orders = torch.rand(M, L).argsort(1)
    model.orders[1] = model.orders[0]
    return model


# ---- lists of everything -----------------------------------------------------------------


def texts(L, vocab_size=V):
    """All texts (vocab_size^L, L)."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=L)))


def orders(L):
    """All orders (L!, L)."""
    return torch.tensor(list(itertools.permutations(range(L))))


def visible_sets(L):
    """All sets of visible positions: (2^L, L) bool."""
    return torch.tensor(list(itertools.product([False, True], repeat=L)))


def partitions(L):
    """Every ordered partition of L positions, with every set of given ones: groups (N, L)."""
    rows = []
    for row in itertools.product(range(-1, L), repeat=L):
        ranks = set(row) - {-1}
        if ranks and ranks == set(range(len(ranks))):
            rows.append(row)
    return torch.tensor(rows)


RAGGED = torch.tensor(  # groups of all sizes, gaps between their numbers, given tokens
    [
        [0, 1, 2, 3, 4],
        [3, 0, 4, 1, 2],
        [1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0],
        [7, 7, 2, 9, 2],
        [-1, 1, 0, 1, 2],
        [5, -1, 5, -7, 0],
        [-1, -1, -1, 3, -2],
    ]
)


# ---- the likelihood and the bounds, order by order ---------------------------------------


def bounds(log_p, log_q_hat, log_q):
    """Equations (1) and (2) of lomdm.py and of loa3.py: -log p (N,), and its bound (N,). All
    arguments are (N, orders): log p of each text in each order, and log q_hat and log q of the
    order."""
    q = log_q.exp()
    neg_log_p = -(log_q_hat + log_p).logsumexp(1)
    return neg_log_p, (q * (-log_p + log_q - log_q_hat)).sum(1)


def token_log_probs(model, z, x):
    """log mu (N, L) of the tokens of x at z."""
    return model.log_probs(z).gather(-1, x[..., None]).squeeze(-1)


def look_at(model, x):
    """What a LoMDM says of texts x (N, L) of which a set of positions is visible, a function
    of that set: log mu (N, L, V) and w_hat (N, L)."""

    @functools.cache
    def look(visible):
        shown = torch.tensor([i in visible for i in range(x.shape[1])])
        z = torch.where(shown, x, model.mask_id)
        return model.log_probs(z), model.order_weights_hat(z)

    return look


def frontier(model, visible, L):
    """Where the next token may go: the hidden positions of the first unfinished block."""
    K = model.config.block_len
    hidden = [i for i in range(L) if i not in visible]
    return [i for i in hidden if i // K == hidden[0] // K]


def list_lomdm(model, x, given=()):
    """log p, log q_hat and log q for bounds(), and the expected cost of guessing the times,
    which the papers' bound has on top: (N, orders) each. Positions `given` come first in every
    order, at no cost."""
    N, L = x.shape
    w = model.order_weights(x)
    look = look_at(model, x)

    rows = []
    for order in itertools.permutations(set(range(L)) - set(given)):
        visible = frozenset(given)
        log_p = log_q_hat = log_q = timing = torch.zeros(N)
        for i in order:
            open = frontier(model, visible, L)
            if i not in open:  # a later block has no chance
                break
            log_mu, w_hat = look(visible)
            W = w[:, open].sum(1)
            W_hat = w_hat[:, open].sum(1)

            log_p = log_p + log_mu[torch.arange(N), i, x[:, i]]
            log_q = log_q + (w[:, i] / W).log()
            log_q_hat = log_q_hat + (w_hat[:, i] / W_hat).log()
            timing = timing + (W / W_hat).log() - 1 + W_hat / W
            visible = visible | {i}
        else:
            rows.append(torch.stack((log_p, log_q_hat, log_q, timing)))
    return torch.stack(rows, dim=-1)  # (4, N, orders)


def exact(model, x, given=()):
    """For LoMDM: -log p(x) (N,), the bound (2), and the papers' bound. With given positions, p
    is p(rest | given)."""
    log_p, log_q_hat, log_q, timing = list_lomdm(model, x, given)
    neg_log_p, jump = bounds(log_p, log_q_hat, log_q)
    return neg_log_p, jump, jump + (log_q.exp() * timing).sum(1)


def list_loa3(model, x):
    """log p, log q_hat and log q for bounds(), of LoA3: (N, orders) each."""
    every = orders(x.shape[1])
    n, m = len(x), len(every)
    rows = x.repeat_interleave(m, 0)
    order = every.repeat(n, 1)
    log_q_hat, log_q = model.order_log_probs(rows, order)
    log_p = model.log_prob(rows, order.argsort(1))
    return [t.sum(1).view(n, m) for t in (log_p, log_q_hat, log_q)]


# ---- LoMDM: the papers' clock ------------------------------------------------------------


def schedule(model, t, L, w=1.0):
    """lomdm.schedule() on the clocks of a model's blocks: alpha and velocity (B, L)."""
    K = min(model.config.block_len, L)
    alpha, velocity = lomdm.schedule(lomdm.block_clocks(t, L, K), w, speed=L // K)
    return alpha.expand(len(t), L), velocity.expand(len(t), L)


def rate_by_masks(look, x, alpha, velocity, velocity_hat_of):
    """The integrand of the papers' bound for texts x at one time, (N,): the mean over z, of
    which all masks are listed. The model's rate is velocity_hat_of(w_hat)."""
    total = 0
    for visible in visible_sets(x.shape[1]):
        prob = torch.where(visible, alpha, 1 - alpha).prod(-1)  # (N,)
        if (prob > 0).any():
            log_mu, w_hat = look(frozenset(visible.nonzero().flatten().tolist()))
            hidden = (~visible).expand_as(x)
            rate = lomdm.nelbo_rate(log_mu, x, hidden, velocity, velocity_hat_of(w_hat))
            total = total + prob * sum(rate)
    return total


def rate_of(model, x):
    """The integrand (N,) for a model's own weights, a function of the time t."""
    L = x.shape[1]
    look = look_at(model, x)
    w = model.order_weights(x)

    def rate(t):
        t = t.expand(len(x), 1)
        alpha, velocity = schedule(model, t, L, w)
        velocity_hat_of = lambda w_hat: schedule(model, t, L, w_hat)[1]  # noqa: E731
        return rate_by_masks(look, x, alpha, velocity, velocity_hat_of)

    return rate


def time_integral(rate, n=1, nodes=60, power=16):
    """int_0^1 rate(t) dt by Gauss-Legendre on each n-th. There t = s^power, by which t^{w-1}
    becomes smooth."""
    j = torch.arange(1.0, nodes)
    J = torch.diag(j / (4 * j**2 - 1).sqrt(), 1)
    s, vectors = torch.linalg.eigh(J + J.T)  # Golub-Welsch
    s = (s + 1) / 2
    weights = vectors[0] ** 2

    total = 0
    for piece in range(n):
        for s_j, weight in zip(s, weights, strict=True):
            t = (piece + s_j**power) / n
            total = total + rate(t) * weight * power * s_j ** (power - 1) / n
    return total


def paper_bound_by_time(model, x):
    """The papers' bound (N,) from its definition: clocks, rates and an integral over time."""
    pieces = math.ceil(x.shape[1] / model.config.block_len)
    return time_integral(rate_of(model, x), pieces)


# ---- all draws of a loss -----------------------------------------------------------------


def lomdm_draws(model, x):
    """All that LoMDM.loss() of one text x (1, L) may draw: two orders, and a count for each
    block. Yields probabilities, and what functions of lomdm.py then return."""
    K = min(x.shape[1], model.config.block_len)
    n = x.shape[1] // K
    w = model.order_weights(x).view(1, n, K).detach()

    one_block = itertools.permutations(range(K))
    every = torch.tensor(list(itertools.product(one_block, repeat=n)))  # (m, n, K)
    whole = torch.full((len(every), n), K)
    q = lomdm.prefix_log_prob(w.expand(every.shape), every, whole).sum(1).exp()

    for k in itertools.product(range(K), repeat=n):
        count = {(lomdm, "stratified_counts"): torch.tensor([k])}
        for i, j in itertools.product(range(len(every)), repeat=2):
            yield q[i] * q[j] / K**n, {(lomdm, "race"): every[[i, j]]} | count


def by_time_draws(model, x, t):
    """Likewise for ByTime.loss() of a text x (1, L) at a time t: its noisy texts, two if an
    order is learned."""
    L = x.shape[1]
    alpha, _ = schedule(model, t, L, model.order_weights(x).detach())
    times = 2 if model.config.learn_order else 1

    for visible in itertools.product(visible_sets(L), repeat=times):
        visible = torch.stack(visible)
        p = torch.where(visible, alpha, 1 - alpha).prod()
        if p > 0:  # blocks that are not at work are visible or hidden for sure
            yield p, {(torch, "rand"): torch.where(visible, -1.0, 1.0)}  # hidden above alpha


def loa3_draws(model, x):
    """Likewise for LoA3.loss() of two texts x (2, L): an order for each."""
    every = orders(x.shape[1])
    q = list_loa3(model, x)[2].exp().detach()
    for i, j in itertools.product(range(len(every)), repeat=2):
        yield q[0, i] * q[1, j], {(loa3, "race"): every[[i, j]]}


def mean_over(draws, monkeypatch, function):
    """The means over draws of the tensors that function() returns."""
    total = 0
    means = itertools.repeat(0)
    for p, results in draws:
        for (owner, name), result in results.items():
            monkeypatch.setattr(owner, name, lambda *_, result=result, **how: result)
        means = [mean + p * t for mean, t in zip(means, function(), strict=False)]
        total += p
    assert total.item() == pytest.approx(1)
    return means


def same_gradients(model, got, want):
    """Of two values, in all parameters."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(got, parameters)
    want = torch.autograd.grad(want, parameters)
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
        assert b.abs().max() > 1e-6, f"{name} has no gradient"


# ---- A3: one position at a time ----------------------------------------------------------


@torch.no_grad()
def naive(model, x, groups):
    """Equation (1) of a3.py for one text x and its groups, lists of L numbers, from the
    definition, one group and one position at a time: logits (L, V) at predicted positions, and
    nan at given ones."""
    heads = model.config.n_head
    d = model.config.n_embd // heads
    memory = [[] for _ in model.blocks]  # (k, v) of the content so far, for each layer

    def norm(layer, h):
        return layer.weight * h / (h.square().mean() + 1e-5).sqrt()

    def turn(vectors, slot):  # a rotation of the complex plane for each pair of channels
        angle = slot * 1e4 ** (-torch.arange(d // 2) / (d // 2))
        z = torch.complex(vectors[:, : d // 2], vectors[:, d // 2 :])
        z = z * torch.polar(torch.ones(1), angle)
        return torch.cat((z.real, z.imag), 1)

    def ask(block, h, slot):
        bias = 0 if block.qkv.bias is None else block.qkv.bias
        qkv = block.qkv.weight @ norm(block.norm1, h) + bias
        q, k, v = qkv.view(3, heads, d)
        return turn(q, slot), turn(k, slot), v

    def attend(block, h, q, seen):
        keys = torch.stack([k for k, _ in seen])  # (n, heads, d)
        values = torch.stack([v for _, v in seen])
        weight = ((q * keys).sum(-1, keepdim=True) / math.sqrt(d)).softmax(0)
        h = h + block.proj.weight @ (weight * values).sum(0).flatten()
        gate, up = (block.gate_up.weight @ norm(block.norm2, h)).chunk(2)
        return h + block.down.weight @ (gate * torch.sigmoid(gate) * up)

    def run(vectors, slots, commit):
        """Places through all layers. What is committed is seen: by later ones, and inside of
        the group."""
        last = model.config.seq_len - 1  # the last slot, never a GPT's, shares its position
        h = [v + model.wpe.weight[min(s, last)] for v, s in zip(vectors, slots, strict=True)]
        for block, seen in zip(model.blocks, memory, strict=True):
            asked = [ask(block, h_i, s) for h_i, s in zip(h, slots, strict=True)]
            if commit:
                seen += [(k, v) for _, k, v in asked]
            pairs = zip(h, asked, strict=True)
            h = [attend(block, h_i, q, seen) for h_i, (q, _, _) in pairs]
        return h

    def query(i, rank):
        """How the query for position i of the group of this rank begins."""
        known = i == 0 or max(groups[i - 1], -1) < rank
        left = V if i == 0 else x[i - 1]
        is_token = known and model.config.left_neighbour
        return model.wte.weight[left] if is_token else model.query

    # The start token, then what is given, one by one, then the groups.
    logits = torch.full((len(x), V), torch.nan)
    run([model.wte.weight[V]], [0], commit=True)
    given = [i for i in range(len(x)) if groups[i] < 0]
    for i in sorted(given, key=lambda i: groups[i]):
        run([model.wte.weight[x[i]]], [i + 1], commit=True)
    for rank in sorted({g for g in groups if g >= 0}):
        members = [i for i in range(len(x)) if groups[i] == rank]
        for i in members:
            (h,) = run([query(i, rank)], [i], commit=False)
            logits[i] = model.lm_head.weight[:V] @ norm(model.norm, h)
        run([model.wte.weight[x[i]] for i in members], [i + 1 for i in members], commit=True)
    return logits


def naive_batch(model, x, groups):
    """naive() for texts x and groups (B, L): (B, L, V)."""
    pairs = zip(x.tolist(), groups.tolist(), strict=True)
    return torch.stack([naive(model, *pair) for pair in pairs])


# ---- samples -----------------------------------------------------------------------------


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def count(x, every):
    """How often each row of `every` (N, L) is among the rows of x (n, L). All must be
    there."""
    base = int(max(x.max(), every.max())) + 1
    place = base ** torch.arange(x.shape[1])
    codes = (every * place).sum(1)
    counts = (x * place).sum(1).bincount(minlength=base ** x.shape[1])[codes]
    assert counts.sum() == len(x), "samples that cannot be"
    return counts


def fits(counts, probs):
    """Are counts those of draws from probs? The chi-square statistic as a normal deviate
    (Wilson and Hilferty), where what is rare is one cell together, is neither too far nor too
    near: within four standard deviations."""
    assert probs.sum().item() == pytest.approx(1, abs=1e-9)
    n = counts.sum()
    probs = probs.detach()
    rare = n * probs < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    probs = torch.cat((probs[~rare], probs[rare].sum()[None]))
    assert probs[-1] < 0.05, "expected counts too small for the test"

    enough = n * probs > 5  # all cells are, but perhaps the last
    expected = (n * probs)[enough]
    free = len(expected) - 1
    statistic = ((counts[enough] - expected) ** 2 / expected).sum().item()
    cube_root = (statistic / free) ** (1 / 3)
    return abs(cube_root - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free)) < 4


# ---- what was called ---------------------------------------------------------------------


def spy(monkeypatch, owner, name, record):
    """Call owner.name as before, and then record(result, *args, **kw)."""
    real = getattr(owner, name)

    def wrapper(*args, **kw):
        result = real(*args, **kw)
        record(result, *args, **kw)
        return result

    monkeypatch.setattr(owner, name, wrapper)
