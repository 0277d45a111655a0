"""
a3.py against exact enumeration and a naive double loop over groups, in float64.

With 3 tokens and up to 5 positions every text, partition and order can be listed. naive() is a
second implementation, written from equations (1) and (2) alone: one group, one position at a time.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import a3
import lomdm
from a3 import A3, Config, chunk_groups, curriculum, random_groups

V = 3
BY = ("confidence", "entropy", "margin", "random")


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomize(model):
    """Weights that are all random and large: nothing is near 0 or 1."""
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    return model.eval()


def make(L=5, seed=0, n_layer=2, vocab_size=V, **kw):
    torch.manual_seed(seed)
    return randomize(A3(Config(vocab_size, L, n_layer, n_head=2, n_embd=8, **kw)))


def texts(L):
    return torch.tensor(list(itertools.product(range(V), repeat=L)))  # (V^L, L)


def partitions(L):
    """Every ordered partition of L positions, with every set of given ones, as groups (N, L)."""
    rows = []
    for row in itertools.product(range(-1, L), repeat=L):
        ranks = set(row) - {-1}
        if ranks and ranks == set(range(len(ranks))):
            rows.append(row)
    return torch.tensor(rows)


RAGGED = torch.tensor(  # sizes and numbers of groups that differ, gaps between ranks, given tokens
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


def spy(monkeypatch, owner, name, record):
    """Call owner.name as before, and then record(result, *args, **kw)."""
    real = getattr(owner, name)

    def wrapper(*args, **kw):
        result = real(*args, **kw)
        record(result, *args, **kw)
        return result

    monkeypatch.setattr(owner, name, wrapper)


@torch.no_grad()
def naive(model, x, groups):
    """Equation (2) for one text x and its groups, lists of L numbers, one position at a time:
    logits (L, V) at predicted positions, and nan at the given ones."""
    heads, d = model.config.n_head, model.config.n_embd // model.config.n_head

    def norm(layer, h):
        return layer.weight * h / (h.square().mean() + 1e-5).sqrt()

    def turn(vectors, place):  # a rotation of the complex plane for each pair of channels
        angle = place * 1e4 ** (-torch.arange(d // 2) / (d // 2))
        z = torch.complex(vectors[:, : d // 2], vectors[:, d // 2 :])
        z = z * torch.polar(torch.ones(1), angle)
        return torch.cat((z.real, z.imag), 1)

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

    def qkv(block, h, place):
        q, k, v = (block.qkv.weight @ norm(block.norm1, h)).view(3, heads, d)
        return turn(q, place), turn(k, place), v

    def embed(vector, slot):  # the last slot, which an ARM never reads, shares its position
        return vector + model.wpe.weight[min(slot, model.config.seq_len - 1)]

    memory = [[] for _ in model.blocks]  # (k, v) of the content so far, for each layer

    def commit(tokens, slots):
        """Content of one group: its members see each other and all that came before."""
        h = [embed(model.wte.weight[t], s) for t, s in zip(tokens, slots, strict=True)]
        for block, mem in zip(model.blocks, memory, strict=True):
            parts = [qkv(block, h_i, s) for h_i, s in zip(h, slots, strict=True)]
            mem += [(k, v) for _, k, v in parts]
            h = [
                rest_of_layer(block, h_i, attend(q, mem))
                for h_i, (q, _, _) in zip(h, parts, strict=True)
            ]

    logits = torch.full((len(x), V), torch.nan)
    commit([V], [0])
    for i in sorted((i for i in range(len(x)) if groups[i] < 0), key=lambda i: groups[i]):
        commit([x[i]], [i + 1])
    for rank in sorted({g for g in groups if g >= 0}):
        members = [i for i in range(len(x)) if groups[i] == rank]
        for i in members:
            known = i == 0 or max(groups[i - 1], -1) < rank
            left = V if i == 0 else x[i - 1]
            neighbour = known and model.config.left_neighbour
            q_i = embed(model.wte.weight[left] if neighbour else model.query, i)
            for block, mem in zip(model.blocks, memory, strict=True):
                q_i = rest_of_layer(block, q_i, attend(qkv(block, q_i, i)[0], mem))
            logits[i] = model.lm_head.weight[:V] @ norm(model.norm, q_i)
        commit([x[i] for i in members], [i + 1 for i in members])
    return logits


# 1 ---- a likelihood ------------------------------------------------------------------------------


@torch.no_grad()
def test_probabilities_sum_to_one():
    """Every ordered partition of 4 positions, and random ones of 5: over all texts without given
    tokens, and over all ways to fill the gaps for each choice of given ones."""
    g = torch.Generator().manual_seed(0)
    many = torch.randint(-1, 5, (40, 5), generator=g)
    for groups in (*partitions(4), *many[(many >= 0).any(1)], *RAGGED):
        L = len(groups)
        x, model = texts(L), make(L)
        p = model.log_prob(x, groups.repeat(len(x), 1))
        assert (p[:, groups < 0] == 0).all() and (p[:, groups >= 0] < 0).all()
        given = (x * (groups < 0) * V ** torch.arange(L)).sum(1)  # a number for each choice
        total = torch.zeros(V**L).scatter_add(0, given, p.sum(1).exp())[given.unique()]
        assert len(total) == V ** int((groups < 0).sum())
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@torch.no_grad()
def test_loss_is_the_mean_over_predicted_tokens():
    model, x = make(), texts(5)[[3, 50, 77, 100, 120, 150, 200, 242]]
    want = -model.log_prob(x, RAGGED).sum() / (RAGGED >= 0).sum()
    torch.testing.assert_close(model.loss(x, RAGGED)[0], want)
    logits = model(x, RAGGED).log_softmax(-1).gather(-1, x[..., None])[..., 0]
    torch.testing.assert_close(model.log_prob(x, RAGGED), torch.where(RAGGED < 0, 0.0, logits))


def test_every_parameter_learns():
    """and no row of the attention is empty: no nan, even where all but one are given."""
    model, x = make(), torch.randint(V, (8, 5))
    model.loss(x, RAGGED)[0].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 1e-6, name


# 2 ---- no leak -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layer", [1, 2, 3])
@torch.no_grad()
def test_predictions_see_exactly_the_earlier_groups(n_layer):
    """x_j moves the prediction of i if group(j) < group(i), and not otherwise. Given tokens are the
    first groups, one by one from left to right."""
    model = make(n_layer=n_layer, seed=n_layer)
    x = torch.randint(V, (8, 5))
    for groups in (RAGGED, chunk_groups(8, 5), random_groups(8, 5, 1), random_groups(8, 5, 2)):
        reading = groups * 9 + torch.arange(5) - 100  # given tokens: by number, then left to right
        before, rank = model(x, groups), torch.where(groups < 0, reading, groups)
        for j in range(5):
            other = x.clone()
            other[:, j] = (x[:, j] + 1) % V
            moved = (model(other, groups) - before).abs().amax(-1) > 1e-9  # (B, L)
            assert torch.equal(moved, rank[:, j : j + 1] < rank), j


# 3 ---- partitions --------------------------------------------------------------------------------


@torch.no_grad()
def test_each_row_has_its_own_partition():
    model, x = make(), torch.randint(V, (8, 5))
    together = model(x, RAGGED)
    for b in range(8):
        torch.testing.assert_close(together[b : b + 1], model(x[b : b + 1], RAGGED[b : b + 1]))
    assert (together[0] - model(x, RAGGED.roll(1, 0))[0]).abs().max() > 1e-3  # it does matter


@torch.no_grad()
def test_only_the_order_of_the_ranks_counts():
    model, x = make(), torch.randint(V, (8, 5))
    want = model(x, RAGGED)
    relabel = torch.tensor([0, 1, 5, 6, 40, 41, 42, 1000, 2**40, 2**62])
    assert torch.equal(model(x, torch.where(RAGGED < 0, 5 * RAGGED, relabel[RAGGED])), want)


@torch.no_grad()
def test_order_inside_a_group_does_not_count(monkeypatch):
    """Break the ties of the sort the other way round, which also drops another last token."""
    model, x = make(), torch.randint(V, (8, 5))
    groups = torch.where(RAGGED < 0, 9 * RAGGED + torch.arange(5), RAGGED)  # given: no ties
    want, real = model(x, groups), torch.Tensor.argsort

    def argsort(self, dim, stable=False):
        if not stable:
            return real(self, dim=dim)
        return self.shape[dim] - 1 - real(self.flip(dim), dim=dim, stable=True)

    monkeypatch.setattr(torch.Tensor, "argsort", argsort)
    assert RAGGED.argsort(dim=1, stable=True)[3].tolist() == [4, 3, 2, 1, 0]
    torch.testing.assert_close(model(x, groups), want)


def test_groups():
    assert torch.equal(chunk_groups(2, 4), torch.tensor([[0, 1, 2, 3]] * 2))
    assert torch.equal(chunk_groups(1, 5, 2), torch.tensor([[0, 0, 1, 1, 2]]))
    for L, size in itertools.product([1, 5, 8], [1, 2, 3, 9]):
        groups = random_groups(20, L, size, torch.Generator().manual_seed(0))
        assert torch.equal(groups.sort(1).values, chunk_groups(20, L, size))  # the right sizes
        assert groups.dtype == torch.long
        assert L == 1 or size >= L or len(groups.unique(dim=0)) > 1  # each row its own
    groups = random_groups(20_000, 3, 2, torch.Generator().manual_seed(0))
    odd_one = (groups == 1).int().argmax(1).bincount(minlength=3)
    assert chi_square(odd_one, torch.ones(3) / 3) < 4
    for make_groups in (chunk_groups, random_groups):
        with pytest.raises(ValueError, match="size of a group must be at least 1, not 0"):
            make_groups(2, 4, 0)


# 4 ---- one kernel or the other, and neither ------------------------------------------------------


@torch.no_grad()
def test_singletons_need_no_mask(monkeypatch):
    """With one token a group both streams run through the causal kernel, and agree with the masks
    that the same rows get in the company of a row that has larger groups."""
    model, x, calls = make(), torch.randint(V, (5, 5)), []
    spy(monkeypatch, F, "scaled_dot_product_attention", lambda y, *args, **kw: calls.append(kw))
    single = torch.cat((chunk_groups(1, 5), RAGGED[1:2], torch.tensor([[9, -4, 3, 5, 0]])))
    fast = model(x[:3], single)
    assert len(calls) == 3  # two streams in one layer, the query stream alone in the last
    assert all(kw["is_causal"] and kw.get("attn_mask") is None for kw in calls)
    calls.clear()
    masked = model(x, torch.cat((single, RAGGED[2:4])))
    assert all(not kw.get("is_causal") and kw["attn_mask"] is not None for kw in calls)
    torch.testing.assert_close(fast, masked[:3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("left_neighbour", [True, False])
@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_forward_is_the_naive_double_loop(n_layer, left_neighbour):
    model = make(n_layer=n_layer, left_neighbour=left_neighbour)
    x = torch.randint(V, (8, 5))
    for groups in (RAGGED, RAGGED[:2], random_groups(8, 5, 1)):
        rows = x[: len(groups)]
        pairs = zip(rows.tolist(), groups.tolist(), strict=True)
        want = torch.stack([naive(model, *pair) for pair in pairs])
        got = model(rows, groups).masked_fill(groups[..., None] < 0, torch.nan)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_shorter_than_seq_len():
    """L < seq_len: the same predictions as from the naive loop, which knows no seq_len."""
    model, x = make(L=9), torch.randint(V, (8, 5))
    got = model(x, RAGGED).masked_fill(RAGGED[..., None] < 0, torch.nan)
    pairs = zip(x.tolist(), RAGGED.tolist(), strict=True)
    torch.testing.assert_close(got, torch.stack([naive(model, *p) for p in pairs]), equal_nan=True)


# 5 ---- the cache ---------------------------------------------------------------------------------


def ask_shape(steps):
    return steps[0][-1].shape


def committed_now(slots, tokens, rank):
    """Rows, slots, tokens and ranks of what a call really commits, but for the start token."""
    real = (rank < 5) & (slots > 0)
    rows = torch.arange(len(slots))[:, None].expand_as(slots)
    return rows[real], slots[real], tokens[real], rank[real]


GIVEN_ROW = torch.tensor([[-1, -1, -1, -1, -1]])


def decodings():
    """Ways to decode a batch of ragged rows, one of which is complete from the start."""
    groups = torch.cat((RAGGED, GIVEN_ROW))
    yield "groups", lambda model, x: (model.generate(x, groups), groups)
    yield "one row", lambda model, x: (model.generate(x[:1], groups[4:5]), groups[4:5])
    for by, m in itertools.product((*BY, "left"), [1, 2, 3]):
        kw = dict(per_step=m, by=by)
        yield f"{by} {m}", lambda model, x, kw=kw: model.sample(x.where(groups < 0, V), **kw)


@pytest.mark.parametrize("n_layer,left_neighbour", [(1, True), (2, True), (3, True), (2, False)])
@torch.no_grad()
def test_cached_logits_are_those_of_forward(n_layer, left_neighbour, monkeypatch):
    """At every step: the cached call's logits, and forward's on what is committed by then with
    anything in the open places. And afterwards: log_prob of the finished text, given the steps as
    its groups."""
    model = make(n_layer=n_layer, left_neighbour=left_neighbour)
    for name, decode in decodings():
        steps, asked = [], []
        with monkeypatch.context() as m:

            def record(
                logits, cache, tokens, slots, rank, at, left, seen, steps=steps, asked=asked
            ):
                assert (seen == 5).all(), "a query sees all that is committed"
                steps.append((logits, at, asked[-1][0][1], tokens, slots, rank, asked[-1][1]))

            spy(m, a3, "pack", lambda *a, asked=asked: asked.append(a))
            spy(m, model, "step", record)
            x = torch.where(torch.cat((RAGGED, GIVEN_ROW)) < 0, torch.randint(V, (9, 5)), V + 5)
            done, groups = decode(model, x)
        assert len(steps) > 1
        final = model(done, groups)
        x, rank = torch.zeros(ask_shape(steps), dtype=torch.long), torch.full(ask_shape(steps), 5)
        for s, (logits, at, asked, tokens, slots, committed, ask) in enumerate(steps):
            for row, slot, token, when in zip(
                *committed_now(slots, tokens, committed), strict=True
            ):
                assert rank[row, slot - 1] == 5, "committed twice"
                x[row, slot - 1], rank[row, slot - 1] = token, when
            assert torch.equal(torch.zeros_like(ask).scatter(1, at, asked), ask), "asked elsewhere"
            assert (ask.sum(1) == asked.sum(1)).all() and ((rank == x.shape[1]) | ~ask).all()
            at = at[..., None].expand_as(logits)
            now = model(x, rank).gather(1, at)
            message = f"{name}, step {s}"
            torch.testing.assert_close(logits[asked], now[asked], rtol=0, atol=1e-10, msg=message)
            if name not in ("groups", "one row"):  # of all that dynamic decoding asks for
                asked = asked & (groups.gather(1, at[..., 0]) == s)
            later = final.gather(1, at)
            torch.testing.assert_close(logits[asked], later[asked], rtol=0, atol=1e-10)


# 6 ---- sampling ----------------------------------------------------------------------------------


def chi_square(counts, probs):
    """The chi-square statistic as a normal deviate (Wilson-Hilferty), after pooling the rare."""
    n, rare = counts.sum(), counts.sum() * probs < 10
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        probs = torch.cat((probs[~rare], probs[rare].sum()[None]))
        assert probs[-1] < 0.05, "expected counts too small for the test"
        counts, probs = counts[n * probs > 5], probs[n * probs > 5]
    dof = len(probs) - 1
    statistic = ((counts - n * probs) ** 2 / (n * probs)).sum()
    return ((statistic / dof) ** (1 / 3) - 1 + 2 / (9 * dof)) / math.sqrt(2 / (9 * dof))


def codes(x):
    return (x * V ** torch.arange(x.shape[1])).sum(1)


SAMPLED = {
    "ar": [0, 1, 2, 3],
    "chunk": [0, 0, 1, 1],
    "random": [3, 1, 0, 2],
    "random pairs": [1, 0, 0, 1],
    "ragged": [2, 0, 2, 2],
    "given": [1, -1, 0, 1],
}


@pytest.mark.parametrize("groups", SAMPLED.values(), ids=SAMPLED.keys())
@torch.no_grad()
def test_samples_follow_the_exact_distribution(groups, monkeypatch):
    model, n, groups = make(4), 20_000, torch.tensor(groups)
    calls = []
    spy(monkeypatch, model, "step", lambda *args: calls.append(1))
    x = torch.full((n, 4), 1)
    drawn = model.generate(x, groups.expand(n, 4), generator=torch.Generator().manual_seed(0))
    assert len(calls) == len(set(groups.tolist()) - {-1})  # one call a group
    assert (drawn[:, groups < 0] == 1).all() and (x == 1).all()
    every = texts(4)
    every = every[(every[:, groups < 0] == 1).all(1)]
    probs = model.log_prob(every, groups.repeat(len(every), 1)).sum(1).exp()
    counts = codes(drawn).bincount(minlength=V**4)[codes(every)]
    assert counts.sum() == n and probs.sum().item() == pytest.approx(1)
    assert chi_square(counts, probs) < 4


@torch.no_grad()
def test_rows_of_different_partitions_are_sampled_together():
    model, n = make(4), 10_000
    groups = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 1], [0, 0, 0, 0], [-1, 2, 5, -1]])
    x = torch.full((4 * n, 4), 2)
    drawn = model.generate(x, groups.repeat(n, 1), generator=torch.Generator().manual_seed(0))
    for b, row in enumerate(groups):
        every = texts(4)
        every = every[(every[:, row < 0] == 2).all(1)]
        probs = model.log_prob(every, row.repeat(len(every), 1)).sum(1).exp()
        counts = codes(drawn[b::4]).bincount(minlength=V**4)[codes(every)]
        assert counts.sum() == n and chi_square(counts, probs) < 4


@torch.no_grad()
def test_random_dynamic_decoding_is_the_mean_over_orders():
    model, n, every = make(3), 20_000, texts(3)
    drawn, at = model.sample(
        torch.full((n, 3), V), by="random", generator=torch.Generator().manual_seed(0)
    )
    orders = list(itertools.permutations(range(3)))
    each = [model.log_prob(every, torch.tensor(o).repeat(27, 1)).sum(1).exp() for o in orders]
    assert chi_square(codes(drawn).bincount(minlength=27)[codes(every)], sum(each) / 6) < 4
    at = codes(at).bincount(minlength=27)[codes(torch.tensor(orders))]
    assert at.sum() == n and chi_square(at, torch.ones(6) / 6) < 4


@pytest.mark.parametrize("by", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("m", [1, 2])
@torch.no_grad()
def test_log_prob_of_the_steps_is_that_of_the_draw(by, m):
    """A rule that looks at nothing random finds one order for each text, and log_prob(x, steps)
    under these orders is the distribution of what it generates: it sums to 1 over the texts."""
    model, n = make(4), 20_000
    x = torch.full((n, 4), 1)
    open = torch.tensor([True, True, False, True]).expand(n, 4)

    def decode(temperature):
        g = torch.Generator().manual_seed(0)
        z = x.masked_fill(open, V)
        drawn = torch.cat(model.sample(z, temperature, None, m, by, generator=g), 1)
        return drawn.unique(dim=0, return_counts=True)  # ordered by text

    pairs, _ = decode(temperature=5.0)  # finds them all: the choice of positions does not mind
    every, at = pairs.split(4, 1)
    assert len(every.unique(dim=0)) == len(every) == V**3
    probs = model.log_prob(every, at).sum(1).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-12)
    pairs_1, counts_1 = decode(temperature=1.0)
    counts = torch.stack([counts_1[(pairs_1 == pair).all(1)].sum() for pair in pairs])
    assert counts.sum() == n and chi_square(counts, probs) < 4


@pytest.mark.parametrize("by", (*BY, "left"))
@pytest.mark.parametrize("m", [1, 2, 3, 5, 9])
def test_per_step_calls(by, m, monkeypatch):
    """ceil(n / m) calls of the network for the row with most to do, m tokens in each."""
    model, calls = make(8), []
    spy(monkeypatch, model, "step", lambda *args: calls.append(1))
    x = torch.randint(V, (3, 8))
    open = torch.ones(3, 8, dtype=torch.bool)
    open[0, [1, 6]] = False  # six are open
    open[1] = False  # none
    done, at = model.sample(x.masked_fill(open, V), per_step=m, by=by)
    assert len(calls) == math.ceil(8 / m)
    assert torch.equal(at == -1, ~open) and torch.equal(done[~open], x[~open])
    for row, n in [(0, 6), (2, 8)]:
        sizes = at[row][at[row] >= 0].bincount().tolist()
        assert sizes == [m] * (n // m) + [n % m] * (n % m > 0)


@torch.no_grad()
def test_temperature_and_top_k():
    model = make(4, vocab_size=V)
    n, groups = 20_000, torch.tensor([[-1, -1, -1, 0]])
    x = torch.tensor([[0, 1, 2, 0]])
    logits = model(x, groups)[0, 3]
    likely = logits.argsort(descending=True)

    def tokens(**kw):
        g = torch.Generator().manual_seed(0)
        drawn = model.generate(x.expand(n, 4), groups.expand(n, 4), generator=g, **kw)[:, 3]
        open = groups.expand(n, 4) >= 0
        for by in ("left", "confidence"):
            z = x.expand(n, 4).masked_fill(open, V)
            same, _ = model.sample(z, by=by, generator=g.manual_seed(0), **kw)
            assert torch.equal(drawn, same[:, 3])  # for one token there is no choice of order
        return drawn.bincount(minlength=V)

    assert tokens(temperature=0)[likely[0]] == n and tokens(top_k=1)[likely[0]] == n
    assert chi_square(tokens(temperature=2.0), (logits / 2).softmax(-1)) < 4
    two = tokens(temperature=2.0, top_k=2)
    assert two[likely[2]] == 0
    assert chi_square(two[likely[:2]], (logits[likely[:2]] / 2).softmax(-1)) < 4


# 7 ---- the choice of positions -------------------------------------------------------------------


def score(probs, by):
    """By hand, for one position's list of probabilities."""
    high = sorted(probs, reverse=True)
    if by == "confidence":
        return high[0]
    return high[0] - high[1] if by == "margin" else sum(p * math.log(p) for p in probs)


@pytest.mark.parametrize("by", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"temperature": 5.0, "top_k": 1}])
@torch.no_grad()
def test_dynamic_decoding_chooses_by_the_rule(by, m, how):
    """Replayed from the finished text: at each step the m best of the open positions are taken,
    scored by the uncached forward at temperature 1, whatever the tokens are drawn with."""
    model, seen = make(6, vocab_size=5), set()
    open = torch.rand(12, 6) < 0.8
    x, at = model.sample(torch.randint(5, (12, 6)).masked_fill(open, 5), by=by, per_step=m, **how)
    for row in range(12):
        seen.add(tuple(at[row].tolist()))
        for step in range(at[row].max() + 1):
            committed = at[row : row + 1] < step
            groups = torch.where(committed, at[row : row + 1], 6)
            probs = model(x[row : row + 1], groups).softmax(-1)[0].tolist()
            rest = [i for i in range(6) if not committed[0, i]]
            best = sorted(rest, key=lambda i: -score(probs[i], by))[:m]
            assert sorted(best) == (at[row] == step).nonzero().flatten().tolist()
            if how == {"temperature": 0}:
                assert all(x[row, i] == max(range(5), key=probs[i].__getitem__) for i in best)
    assert len(seen) > 6  # not the same choice all the time


def test_rules_differ():
    """A case for each pair, so that no rule can stand in for another."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.52, 0.47, 0.01], [0.42, 0.42, 0.16]]).log()
    best = {by: a3.certainty(logits[:2], by).argmax().item() for by in BY[:3]}
    assert best == {"confidence": 1, "entropy": 1, "margin": 0}
    best = {by: a3.certainty(logits[[0, 2]], by).argmax().item() for by in BY[:3]}
    assert best == {"confidence": 0, "entropy": 1, "margin": 0}


# 8 ---- masked diffusion --------------------------------------------------------------------------


@pytest.mark.parametrize("visible", [[1], [0, 3], [1, 2, 4]])
@torch.no_grad()
def test_two_groups_are_a_masked_diffusion_step(visible):
    """Given what is visible the rest is independent: the joint is the product of its marginals. And
    it makes no difference whether the visible tokens are given or were predicted before, one by one
    from left to right."""
    model, x = make(), texts(5)
    shown = torch.zeros(5, dtype=torch.bool)
    shown[visible] = True
    groups = torch.where(shown, 0, 1).repeat(len(x), 1)
    log_p = model.log_prob(x, groups)
    infill = model.log_prob(x, torch.where(groups == 0, -1, 1))
    one_by_one = model.log_prob(x, torch.where(groups == 0, torch.arange(5), 5))
    torch.testing.assert_close(one_by_one[:, ~shown], infill[:, ~shown], rtol=0, atol=1e-12)
    joint = log_p[:, ~shown].sum(1).exp().view((V,) * 5)
    hidden = [i for i in range(5) if not shown[i]]
    product = torch.ones(())
    for i in hidden:
        marginal = joint.sum([j for j in hidden if j != i], keepdim=True)
        assert (marginal.amax(visible) - marginal.amin(visible)).max() > 0.01  # it does look
        product = product * marginal
    torch.testing.assert_close(product, joint, rtol=0, atol=1e-12)


# 9 ---- from an ARM -------------------------------------------------------------------------------


def make_arm(L=5, **kw):
    torch.manual_seed(3)
    kw = dict(block_len=1, n_layer=3, n_head=2, n_embd=8) | kw
    return randomize(lomdm.LoMDM(lomdm.Config(V, L, **kw)))


@pytest.mark.parametrize("L", [3, 5])
@torch.no_grad()
def test_both_streams_are_the_arm(L, monkeypatch):
    """Left to right both streams are the ARM on every layer, up to where nobody reads the content
    any more."""
    arm, model, x = make_arm(), make(n_layer=3), texts(L)[::5]
    model.load_arm(arm.state_dict())
    inputs = {"arm": [], "content": [], "both": []}
    for block in arm.blocks:
        block.register_forward_pre_hook(lambda block, args: inputs["arm"].append(args[0]))
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: inputs["both"].append(args[0]))
        spy(monkeypatch, block, "keys_values", lambda kv, u, rotary: inputs["content"].append(u))
    arm.log_probs(x), model(x, chunk_groups(len(x), L))
    assert [len(h) for h in inputs.values()] == [3, 3, 3]
    for block, h_arm, content, both in zip(arm.blocks, *inputs.values(), strict=True):
        torch.testing.assert_close(content, block.norm1(h_arm), rtol=0, atol=1e-12)
        for half in both.split(L, dim=1):
            torch.testing.assert_close(half, h_arm, rtol=0, atol=1e-12)
    for name, p in arm.state_dict().items():
        assert torch.equal(model.state_dict()[name], p), name
    torch.testing.assert_close(model.query, arm.wte.weight.mean(0))


def trained_arm(dtype, steps=30, L=12, vocab_size=7):
    """An ARM that has learnt something, and texts of the kind it was trained on."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    arm = lomdm.LoMDM(lomdm.Config(vocab_size, L, 2, 2, 16, block_len=1))
    optimizer = torch.optim.AdamW(arm.parameters(), 1e-2)
    for _ in range(steps):
        x = (torch.arange(L) + torch.randint(7, (16, 1))) % 7 * (torch.rand(16, L) < 0.9)
        loss, _ = arm.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.7  # guessing is 1.95
    return arm.eval(), x


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_an_adapted_arm_is_the_arm(dtype, tolerance, monkeypatch):
    """Left to right, in place and cached, for any split into given and predicted: its own
    log-probabilities, so its loss and its samples as well."""
    with torch.enable_grad():
        arm, x = trained_arm(dtype)
    B, L = x.shape
    model = A3(Config(7, L, 2, 2, 16)).eval()
    model.load_arm(arm.state_dict())
    want = arm.log_probs(x).gather(-1, x[..., None])[..., 0]  # (B, L)
    groups = chunk_groups(B, L)
    torch.testing.assert_close(model.log_prob(x, groups), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(model.loss(x, groups)[0], arm.loss(x)[0], rtol=0, atol=tolerance)
    for given in range(L):  # a prompt, then one token after another
        split = torch.where(groups < given, -1, groups)
        got = model.log_prob(x, split)[:, given:]
        torch.testing.assert_close(got, want[:, given:], rtol=0, atol=tolerance)
    for given in (0, 1, 5, L - 1):  # cached: all logits on the way are the ARM's of what was drawn
        seen = []
        with monkeypatch.context() as m:
            spy(m, model, "step", lambda out, *args, seen=seen: seen.append((out, args[4])))
            z = x.where(groups < given, model.mask_id)
            done, at = model.sample(z, generator=torch.Generator().manual_seed(0))
        assert torch.equal(at, torch.where(groups < given, -1, groups - given))
        log_p = arm.log_probs(done)
        assert len(seen) == L - given
        for i, (logits, where) in enumerate(seen, given):
            assert (where == i).all()
            torch.testing.assert_close(
                logits[:, 0].log_softmax(-1), log_p[:, i], rtol=0, atol=tolerance
            )
    # and an order that is not left to right is not the ARM
    assert (model.log_prob(x, groups.flip(1)) - want).abs().max() > 0.1


def test_loaded_weights_are_a_copy():
    arm, model = make_arm(), make(n_layer=3)
    before = {name: p.clone() for name, p in arm.state_dict().items()}
    model.load_arm(arm.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(p, before[name]) for name, p in arm.state_dict().items())


@pytest.mark.parametrize(
    "kw,message",
    [
        (dict(L=6), r"^not an ARM of this size: wpe.weight is \(6, 8\), not \(5, 8\), and 0 more"),
        (dict(n_layer=2), r"blocks.2.norm1.weight is None, not \(8,\), and 5 more"),
        (dict(n_layer=4), r"blocks.3.norm1.weight is \(8,\), not None, and 5 more"),
        (dict(n_embd=16), r"wte.weight is \(4, 16\), not \(4, 8\)"),
        (dict(block_len=5, learn_order=True), r"g.block.norm1.weight is \(8,\), not None"),
    ],
)
def test_wrong_checkpoints_are_refused(kw, message):
    model = make(n_layer=3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        model.load_arm(make_arm(**kw).state_dict())
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_shared_vector_forgets_the_arm():
    """The paper's query, reachable by one field of Config: the reason not to use it."""
    arm, x = trained_arm(torch.float64)
    losses = {}
    for left_neighbour in (True, False):
        model = A3(Config(7, 12, 2, 2, 16, left_neighbour=left_neighbour)).eval()
        model.load_arm(arm.state_dict())
        losses[left_neighbour] = model.loss(x, chunk_groups(*x.shape))[0]
    torch.testing.assert_close(losses[True], arm.loss(x)[0])
    assert losses[False] > losses[True] + 0.1


def test_a_checkpoint_of_its_own_or_of_another_vocabulary_is_no_arm():
    model = make(n_layer=3)
    with pytest.raises(ValueError, match=r"query is \(8,\), not None"):
        model.load_arm(model.state_dict())
    with pytest.raises(ValueError, match=r"wte.weight is \(4, 8\), not \(8, 8\)"):
        make(n_layer=3, vocab_size=7).load_arm(make_arm().state_dict())


# 10 ---- the curriculum ---------------------------------------------------------------------------


def test_curriculum_stages():
    stages = [curriculum(step, 120, (0.25, 0.5, 0.25), 3) for step in range(140)]
    want = [(1, 1)] * 30 + [(2, 1)] * 20 + [(2, 2)] * 20 + [(2, 4)] * 20 + [(3, 3)] * 30
    assert stages == want + [(3, 3)] * 20  # and on it goes


@pytest.mark.parametrize(
    "shares", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.1, 0.2, 0.7), (0.5, 0, 0.5)]
)
@pytest.mark.parametrize("total", [1, 7, 10, 3000])
def test_curriculum_shares(shares, total):
    stages = [curriculum(step, total, shares) for step in range(2 * total)]
    assert stages == sorted(stages) and stages[total:] == [stages[total - 1]] * total
    for stage, share in enumerate(shares, 1):
        steps = sum(s == stage for s, _ in stages[:total])
        assert abs(steps - share * total) <= 1
        assert (share > 0) or steps == 0
    for size in (1, 2, 4):
        steps = sum(s == (2, size) for s in stages[:total])
        assert abs(steps - shares[1] * total / 3) < 4 / 3


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


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kw,message",
    [
        (dict(n_embd=10, n_head=3), "n_embd .* divisible by n_head"),
        (dict(n_embd=6, n_head=2), "even quotient"),
        (dict(dropout=1.0), "dropout"),
        (dict(n_layer=0), "n_layer must be at least 1"),
    ],
)
def test_bad_config(kw, message):
    with pytest.raises(ValueError, match=message):
        Config(**(dict(vocab_size=3, seq_len=4, n_layer=1, n_head=1, n_embd=4) | kw))


def test_bad_calls():
    model, x = make(), torch.randint(V, (2, 5))
    ar, given = chunk_groups(2, 5), torch.full((2, 5), -1)
    for method in (model, model.log_prob, model.loss, model.generate):
        for bad in (ar[:, :4], ar[0], ar.int(), ar.double(), ar >= 0):
            with pytest.raises(ValueError, match=r"^x and groups must both be \(B, L\)"):
                method(x, bad)
        with pytest.raises(ValueError, match="6 tokens do not fit into seq_len 5"):
            method(x.repeat(1, 2)[:, :6], chunk_groups(2, 6))
    with pytest.raises(ValueError, match="both be"):
        model(x[0], ar[0])
    assert (model.log_prob(x, given) == 0).all() and model.loss(x, given)[0] == 0
    assert torch.equal(model.generate(x, given), x)  # nothing to do
    done, at = model.sample(x)
    assert torch.equal(done, x) and (at == -1).all()
    z = torch.full((2, 5), V)
    with pytest.raises(ValueError, match=r"^by must be one of \('left'.* not 'luck'"):
        model.sample(z, by="luck")
    for bad in (dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)):
        with pytest.raises(ValueError, match="^temperature must be >= 0, top_k >= 1"):
            model.sample(z, **bad)
    with pytest.raises(ValueError, match="^per_step must be at least 1"):
        model.sample(z, per_step=0)
    with pytest.raises(ValueError, match="^per_step must be at least 1"):
        model.decode(z, ar, 0, "left")
    with pytest.raises(ValueError, match="^drafts must be 1, or more by"):
        model.sample(z, drafts=0)
    with pytest.raises(ValueError, match="^temperature must be >= 0"):
        model.generate(x, ar, temperature=-1.0)


# 11 --- for large vocabularies and compilers ------------------------------------------------------


def test_logits_in_chunks(monkeypatch):
    """The same loss and gradients whether logits are made at once or few at a time."""
    model, x = make(), torch.randint(V, (8, 5))
    results, most, real = [], [], A3.logits
    for limit in (2**26, 7 * V):
        sizes = []
        monkeypatch.setattr(A3, "max_logits", limit)
        monkeypatch.setattr(
            A3, "logits", lambda self, h, sizes=sizes: sizes.append(len(h)) or real(self, h)
        )
        model.zero_grad()
        loss, _ = model.loss(x, RAGGED)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        most.append(max(sizes))
    assert most == [40, 7]
    torch.testing.assert_close(*results)


def test_loss_compiles_to_one_graph():
    """When the caller says whether every group has one token, nothing depends on the data."""
    model, x = make(), torch.randint(V, (8, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager")
    for size in (1, 2):
        for groups in (random_groups(8, 5, size), random_groups(8, 5, size)):
            want, _ = model.loss(x, groups)
            torch.testing.assert_close(compiled(x, groups, size == 1)[0], want)
    compiled(x)  # random_groups() of one token, which it knows


def test_decoding_a_truth_draws_nothing():
    model, x = make(), torch.randint(V, (8, 5))
    state = torch.get_rng_state()
    for by in ("left", "confidence", "entropy", "margin"):
        model.decoder_log_prob(x, by)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_for_training():
    """On embeddings and in every block; none of it in eval()."""
    plain, x = make(), texts(5)[::30]
    model, groups = make(dropout=0.5), chunk_groups(len(x), 5)
    assert torch.equal(model(x, groups), plain(x, groups))
    model.train()

    def is_random():
        return not torch.equal(model(x, groups), model(x, groups))

    assert is_random()
    for block in model.blocks:
        block.dropout = 0.0
    assert is_random()  # on embeddings it goes on
    model.config.dropout = 0.0
    assert not is_random()
    for block in model.blocks:
        block.dropout = 0.5
        assert is_random()
        block.dropout = 0.0


def test_residual_branches_begin_smaller():
    """As GPT-2: by the root of twice the layers."""
    torch.manual_seed(0)
    model = A3(Config(V, 5, 8, n_head=2, n_embd=64))
    for name, std in (("qkv", 0.02), ("gate_up", 0.02), ("proj", 0.005), ("down", 0.005)):
        weight = getattr(model.blocks[3], name).weight
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
