"""
The oracle of the tests: with 3 tokens and 4 positions, everything can be listed.

There are 81 texts, 24 orders and 16 sets of visible positions. So the likelihood of a small
random network, and the bounds on it, can be added up without any sampling. What stands here
uses the plainest methods of the models only: log_probs, order_weights and order_weights_hat of
LoMDM, and the parameters of A3. Everything else in lomdm.py, a3.py and beyond/ has to agree
with that.
"""

import itertools
import math

import pytest
import torch

import a3
import lomdm
from beyond import loa3

V = 3  # tokens, where nothing else is said


# ---- small random models -----------------------------------------------------------------


def randomize(model):
    """Weights that are all random and large, so that nothing is near 0 or 1."""
    for name, p in model.named_parameters():
        if name.startswith("order."):  # LoA3 stores the parameters of its order divided
            torch.nn.init.normal_(p, std=4 / model.order.scale)
        else:
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    return model.eval()


SIZE = dict(n_layer=2, n_head=2, n_embd=8)


def make_lomdm(L=4, seed=0, cls=lomdm.LoMDM, **kw):
    torch.manual_seed(seed)
    return randomize(cls(lomdm.Config(V, L, **(SIZE | kw))))


def make_a3(L=5, seed=0, vocab_size=V, **kw):
    torch.manual_seed(seed)
    return randomize(a3.A3(a3.Config(vocab_size, L, **(SIZE | kw))))


def make_loa3(L=4, seed=0, vocab_size=V, random_share=0.2, **kw):
    torch.manual_seed(seed)
    config = loa3.Config(vocab_size, L, random_share=random_share, **(SIZE | kw))
    return randomize(loa3.LoA3(config))


MODELS = {
    "arm": dict(block_len=1),
    "block": dict(block_len=2),
    "mdm": dict(),
    "lomdm": dict(learn_order=True),
    "exp": dict(learn_order=True, weights="exp"),
    "block lomdm": dict(block_len=2, learn_order=True),
}
every_model = pytest.mark.parametrize("kw", MODELS.values(), ids=MODELS.keys())


def trained_arm(dtype=torch.float64, steps=30, L=12):
    """An ARM that has learned something, and texts of the kind it was trained on."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    arm = lomdm.LoMDM(lomdm.Config(7, L, 2, 2, 16, block_len=1))
    optimizer = torch.optim.AdamW(arm.parameters(), 1e-2)
    for _ in range(steps):
        x = (torch.arange(L) + torch.randint(7, (16, 1))) % 7 * (torch.rand(16, L) < 0.9)
        loss, _ = arm.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.7  # guessing is 1.95
    return arm.eval(), x


# ---- lists of everything -----------------------------------------------------------------


def texts(L, vocab_size=V):
    """All texts (vocab_size^L, L)."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=L)))


def orders(L):
    """All orders (L!, L)."""
    return torch.tensor(list(itertools.permutations(range(L))))


def visible_sets(L):
    """All sets of visible positions, each after its subsets: (2^L, L) bool."""
    return torch.tensor([[bool(s >> i & 1) for i in range(L)] for s in range(2**L)])


def partitions(L):
    """Every ordered partition of L positions, with every set of given ones, as groups (N,
    L)."""
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


# ---- LoMDM: the likelihood and the bounds ------------------------------------------------


def token_log_probs(model, z, x):
    """log mu (N, L) of the tokens of x at z."""
    return model.log_probs(z).gather(-1, x[..., None]).squeeze(-1)


def frontier(model, visible):
    """Where the next token may go: the hidden positions of the first unfinished block, (L,)
    bool."""
    b = torch.arange(len(visible)) // model.config.block_len
    return ~visible & (b == b[~visible].min())


def exact(model, x, given=()):
    """-log p(x) (N,), and the jump and the paper's bound, by recursion over visible sets.

    p(x) is a sum over orders. Those that pass through the same visible set share their past:

        f(S + i) += f(S) (w_hat_i / W_hat) mu^i(x_i),   f(empty) = 1,   p(x) = f(all)

    and q reaches S with a probability q(S) that grows in the same way by w / W alone. With
    given positions, the recursion starts at the set of these, and p is p(rest | given)."""
    N, L = x.shape
    start = sum(1 << i for i in given)
    f = [torch.zeros(N) for _ in range(2**L)]
    q = [torch.zeros(N) for _ in range(2**L)]
    f[start] = q[start] = torch.ones(N)
    jump = timing = torch.zeros(N)
    w = model.order_weights(x)

    for s, visible in enumerate(visible_sets(L)[:-1]):
        if s & start != start:
            continue
        z = torch.where(visible, x, model.mask_id)
        log_mu = token_log_probs(model, z, x)
        w_hat = model.order_weights_hat(z)
        open = frontier(model, visible)
        W = (w * open).sum(1)
        W_hat = (w_hat * open).sum(1)
        timing = timing + q[s] * ((W / W_hat).log() - 1 + W_hat / W)

        for i in open.nonzero().flatten().tolist():
            go = w[:, i] / W
            go_hat = w_hat[:, i] / W_hat
            jump = jump + q[s] * go * (-log_mu[:, i] + go.log() - go_hat.log())
            t = s | 1 << i
            q[t] = q[t] + q[s] * go
            f[t] = f[t] + f[s] * go_hat * log_mu[:, i].exp()
    return -f[-1].log(), jump, jump + timing


# ---- LoMDM: the papers' clock ------------------------------------------------------------


def schedule(model, t, L, w=1.0):
    """lomdm.schedule() on the clocks of a model's blocks: alpha and velocity (B, L)."""
    K = min(model.config.block_len, L)
    alpha, velocity = lomdm.schedule(lomdm.block_clocks(t, L, K), w, speed=L // K)
    return alpha.expand(len(t), L), velocity.expand(len(t), L)


def rate_by_masks(model, x, alpha, velocity, velocity_hat_of):
    """The integrand of the papers' bound for texts x at one time, (N,): the mean over z, of
    which all masks are listed. velocity_hat_of(z) is the model's rate."""
    total = 0
    for visible in visible_sets(x.shape[1]):
        prob = torch.where(visible, alpha, 1 - alpha).prod(-1)  # (N,)
        if not (prob > 0).any():
            continue
        z = torch.where(visible, x, model.mask_id)
        hidden = (~visible).expand_as(x)
        velocity_hat = velocity_hat_of(z)
        rate = lomdm.nelbo_rate(model.log_probs(z), x, hidden, velocity, velocity_hat)
        total = total + prob * sum(rate)
    return total


def rate_at(model, x, t):
    """rate_by_masks() of a model's own weights, for texts x at a time t."""
    L = x.shape[1]
    t = t.expand(len(x), 1)
    alpha, velocity = schedule(model, t, L, model.order_weights(x))

    def velocity_hat_of(z):
        return schedule(model, t, L, model.order_weights_hat(z))[1]

    return rate_by_masks(model, x, alpha, velocity, velocity_hat_of)


def time_integral(rate, n=1, nodes=100, power=16):
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
    return time_integral(lambda t: rate_at(model, x, t), pieces)


# ---- A3: one position at a time ----------------------------------------------------------


@torch.no_grad()
def naive(model, x, groups):
    """Equation (1) of a3.py for one text x and its groups, lists of L numbers, written from
    the definition, one group and one position at a time: logits (L, V) at predicted positions,
    and nan at given ones."""
    heads = model.config.n_head
    d = model.config.n_embd // heads

    def norm(layer, h):
        return layer.weight * h / (h.square().mean() + 1e-5).sqrt()

    def turn(vectors, slot):  # a rotation of the complex plane for each pair of channels
        angle = slot * 1e4 ** (-torch.arange(d // 2) / (d // 2))
        z = torch.complex(vectors[:, : d // 2], vectors[:, d // 2 :])
        z = z * torch.polar(torch.ones(1), angle)
        return torch.cat((z.real, z.imag), 1)

    def qkv(block, h, slot):
        q, k, v = (block.qkv.weight @ norm(block.norm1, h)).view(3, heads, d)
        return turn(q, slot), turn(k, slot), v

    def attend(q, seen):  # q (heads, d), seen: (k, v) pairs
        y = []
        for a in range(heads):
            weight = torch.stack([q[a] @ k[a] / math.sqrt(d) for k, v in seen]).softmax(0)
            y.append(sum(w * v[a] for w, (k, v) in zip(weight, seen, strict=True)))
        return torch.cat(y)

    def rest_of_layer(block, h, y):
        h = h + block.proj.weight @ y
        gate, up = (block.gate_up.weight @ norm(block.norm2, h)).chunk(2)
        return h + block.down.weight @ (gate * torch.sigmoid(gate) * up)

    def embed(vector, slot):  # the last slot, which a GPT never reads, shares its position
        return vector + model.wpe.weight[min(slot, model.config.seq_len - 1)]

    memory = [[] for _ in model.blocks]  # (k, v) of the content so far, for each layer

    def commit(tokens, slots):
        """Content of one group: its members see each other and all that came before."""
        h = [embed(model.wte.weight[t], s) for t, s in zip(tokens, slots, strict=True)]
        for block, mem in zip(model.blocks, memory, strict=True):
            parts = [qkv(block, h_i, s) for h_i, s in zip(h, slots, strict=True)]
            mem += [(k, v) for _, k, v in parts]
            asked = [q for q, _, _ in parts]
            h = [
                rest_of_layer(block, h_i, attend(q, mem))
                for h_i, q in zip(h, asked, strict=True)
            ]

    def predict(i, rank):
        """The query for position i of the group of this rank: logits (V,)."""
        known = i == 0 or max(groups[i - 1], -1) < rank
        left = V if i == 0 else x[i - 1]
        is_token = known and model.config.left_neighbour
        h = embed(model.wte.weight[left] if is_token else model.query, i)
        for block, mem in zip(model.blocks, memory, strict=True):
            h = rest_of_layer(block, h, attend(qkv(block, h, i)[0], mem))
        return model.lm_head.weight[:V] @ norm(model.norm, h)

    # The start token, then what is given, one by one, then the groups.
    logits = torch.full((len(x), V), torch.nan)
    commit([V], [0])
    given = [i for i in range(len(x)) if groups[i] < 0]
    for i in sorted(given, key=lambda i: groups[i]):
        commit([x[i]], [i + 1])
    for rank in sorted({g for g in groups if g >= 0}):
        members = [i for i in range(len(x)) if groups[i] == rank]
        for i in members:
            logits[i] = predict(i, rank)
        commit([x[i] for i in members], [i + 1 for i in members])
    return logits


def naive_batch(model, x, groups):
    """naive() for texts x and groups (B, L): (B, L, V)."""
    pairs = zip(x.tolist(), groups.tolist(), strict=True)
    return torch.stack([naive(model, *pair) for pair in pairs])


# ---- LoA3: all orders --------------------------------------------------------------------


def listed(model, x):
    """For each order of each text: log p of the text in this order, log q_hat and log q of the
    order, (texts, orders) each."""
    every = orders(x.shape[1])
    n, m = len(x), len(every)
    rows = x.repeat_interleave(m, 0)
    order = every.repeat(n, 1)
    log_q_hat, log_q = model.order_log_probs(rows, order)
    log_p = model.log_prob(rows, order.argsort(1))
    return [t.sum(1).view(n, m) for t in (log_p, log_q_hat, log_q)]


# ---- samples -----------------------------------------------------------------------------


def count(x, every):
    """How often each row of `every` (N, L) is among the rows of x (n, L). All must be
    there."""
    base = int(max(x.max(), every.max())) + 1
    place = base ** torch.arange(x.shape[1])
    codes = (every * place).sum(1)
    counts = (x * place).sum(1).bincount(minlength=base ** x.shape[1])[codes]
    assert counts.sum() == len(x), "samples that cannot be"
    return counts


def chi_square(counts, probs):
    """The chi-square statistic of counts as a normal deviate (Wilson and Hilferty), where what
    is rare is one cell together."""
    n = counts.sum()
    rare = n * probs < 10
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        probs = torch.cat((probs[~rare], probs[rare].sum()[None]))
        assert probs[-1] < 0.05, "expected counts too small for the test"
        enough = n * probs > 5
        counts = counts[enough]
        probs = probs[enough]

    free = len(probs) - 1
    statistic = ((counts - n * probs) ** 2 / (n * probs)).sum().item()
    return ((statistic / free) ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free))


def fits(counts, probs):
    """Are counts those of draws from probs? Neither too far nor too near: within four standard
    deviations."""
    assert probs.sum().item() == pytest.approx(1, abs=1e-9)
    return abs(chi_square(counts, probs.detach())) < 4


# ---- what was called ---------------------------------------------------------------------


def spy(monkeypatch, owner, name, record):
    """Call owner.name as before, and then record(result, *args, **kw)."""
    real = getattr(owner, name)

    def wrapper(*args, **kw):
        result = real(*args, **kw)
        record(result, *args, **kw)
        return result

    monkeypatch.setattr(owner, name, wrapper)
