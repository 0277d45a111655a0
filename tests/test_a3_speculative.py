"""
Several tokens a call, exactly: a3.py's speculative decoding against enumeration, in float64.
"""

import itertools
import math

import pytest
import torch

import a3
from a3 import A3, Config, chunk_groups, random_groups

V, L = 3, 5
ORDERS = {
    "left to right": [0, 1, 2, 3, 4],
    "another order": [3, 0, 4, 1, 2],
    "around what is given": [-1, 2, 0, -1, 5],
    "given in its own order": [2, -1, 1, 0, -7],
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(left_neighbour=True, seq_len=L, seed=0):
    torch.manual_seed(seed)
    model = A3(Config(V, seq_len, 2, n_head=2, n_embd=8, left_neighbour=left_neighbour))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.5)
    return model.eval()


def exact(model, x, groups):
    """p of all ways to fill the gaps of x (L,), and a number for each."""
    open = [i for i in range(L) if groups[0, i] >= 0]
    rows = x.repeat(V ** len(open), 1)
    rows[:, open] = torch.tensor(list(itertools.product(range(V), repeat=len(open))))
    log_p = model.log_prob(rows, groups.expand(len(rows), L)).sum(1)
    return log_p.exp(), (rows * V ** torch.arange(L)).sum(1)


def deviation(x, p, numbers):
    """Of chi-square, in standard deviations; what is expected less than five times is one cell."""
    counts = (x * V ** torch.arange(L)).sum(1).bincount(minlength=V**L)[numbers].double()
    assert counts.sum() == len(x), "given tokens have changed"
    expected = p * len(x)
    rare = expected < 5
    if rare.any():
        counts, expected = (torch.cat((t[~rare], t[rare].sum()[None])) for t in (counts, expected))
    free = len(counts) - 1
    return (((counts - expected) ** 2 / expected.clamp(min=1)).sum().item() - free) / math.sqrt(
        2 * free
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("drafts", [1, 2, 3, 4, 6])
@torch.no_grad()
def test_samples_fit_p(order, drafts):
    model, groups = make(), torch.tensor([ORDERS[order]])
    x = torch.tensor([1, 0, 2, 2, 1])
    p, numbers = exact(model, x, groups)
    assert p.sum().item() == pytest.approx(1, abs=1e-10)
    g, n = torch.Generator().manual_seed(drafts), 5_000
    y, calls = model.generate_speculative(x.repeat(n, 1), groups.expand(n, L), drafts, generator=g)
    assert deviation(y, p, numbers) < 4
    assert 1 <= calls <= (groups >= 0).sum()


@pytest.mark.parametrize("left_neighbour", [True, False])
@torch.no_grad()
def test_samples_fit_p_whatever_the_drafts(left_neighbour, monkeypatch):
    """Drafts from another distribution, far from that of the model: all queries but the first of
    each family are made bad on purpose."""
    model, groups = make(left_neighbour), torch.tensor([ORDERS["another order"]])
    real, k = model.step, 3

    def bad(cache, *a):
        logits = real(cache, *a).unflatten(1, (-1, k)).clone()  # (B, F, k, V)
        logits[:, :, 1:] = torch.tensor([3.0, 0.0, -3.0])
        return logits.flatten(1, 2)

    monkeypatch.setattr(model, "step", bad)
    p, numbers = exact(model, torch.zeros(L).long(), groups)
    g, n = torch.Generator().manual_seed(1), 10_000
    x = torch.zeros(n, L).long()
    y, _ = model.generate_speculative(x, groups.expand(n, L), k, generator=g)
    assert deviation(y, p, numbers) < 4
    uniform = torch.full_like(p, 1 / len(p))
    assert deviation(y, uniform, numbers) > 20, "a test that can fail"


@torch.no_grad()
def test_every_prediction_is_that_of_forward(monkeypatch):
    """Each call's logits, for each number of tokens that a query may see, are forward's on them."""
    model, k = make(), 3
    groups = torch.tensor(list(ORDERS.values()))
    order, x = a3.ranks(groups).argsort(1), torch.randint(V, (4, L))
    real, seen = model.step, []

    def spy(cache, tokens, slots, rank, at, left, before):
        logits = real(cache, tokens, slots, rank, at, left, before)
        for row, j in itertools.product(range(4), range(at.shape[1])):
            n = int(before[row, j])
            if at[row, j] == L or n >= L:  # behind the end: nobody reads it
                continue
            place, text = torch.full((1, L), L), torch.full((1, L), 0)
            place[0, order[row, :n]] = torch.arange(n)
            now = state["x"][row]
            text[0, order[row, :n]] = now[order[row, :n]]
            want = model(text, place)[0, at[row, j]]
            torch.testing.assert_close(logits[row, j], want)
            seen.append(n)
        return logits

    state, scatter = {"x": x.clone()}, torch.Tensor.scatter_

    def keep(self, dim, index, value):
        out = scatter(self, dim, index, value)
        if self.shape == (4, L + 1):
            state["x"] = self[:, :L].clone()
        return out

    monkeypatch.setattr(model, "step", spy)
    monkeypatch.setattr(torch.Tensor, "scatter_", keep)
    model.generate_speculative(x, groups, k, generator=torch.Generator().manual_seed(0))
    assert len(seen) > 40 and set(seen) == set(range(L))


@torch.no_grad()
def test_rows_are_alone():
    """Greedy: rows with other orders and other given tokens, as if each were by itself, and as
    without drafts."""
    model = make(seq_len=9)
    groups = torch.cat((torch.tensor(list(ORDERS.values())), torch.full((1, L), -1)))
    x = torch.randint(V, (5, L))
    want = model.generate(x, groups, temperature=0)
    for drafts in (1, 2, 4, 9):
        got, calls = model.generate_speculative(x, groups, drafts, temperature=0)
        assert torch.equal(got, want) and calls <= L
        for row in range(5):
            one, _ = model.generate_speculative(x[[row]], groups[[row]], drafts, temperature=0)
            assert torch.equal(one[0], want[row])


@torch.no_grad()
def test_good_drafts_save_calls():
    """Where tokens do not depend on each other every draft is accepted."""
    model = make(seq_len=12)
    torch.nn.init.zeros_(model.lm_head.weight)
    x = torch.zeros(3, 12).long()
    for drafts in (1, 2, 3, 4, 12):
        _, calls = model.generate_speculative(x, random_groups(3, 12), drafts)
        assert calls == 1 + math.ceil(11 / drafts)
    y, calls = model.generate_speculative(x, torch.full_like(x, -1))
    assert calls == 0 and torch.equal(y, x)


def test_errors():
    model, x = make(), torch.zeros(2, L).long()
    for groups, drafts in ((chunk_groups(2, L, 2), 4), (chunk_groups(2, L), 0)):
        with pytest.raises(ValueError, match="every group one token"):
            model.generate_speculative(x, groups, drafts)
    z = torch.full((2, L), V)
    for how in (dict(by="confidence"), dict(per_step=2)):
        with pytest.raises(ValueError, match="drafts must be 1, or more by"):
            model.sample(z, drafts=2, **how)
    y, at = model.sample(z, drafts=2)
    assert (y < V).all() and torch.equal(at, chunk_groups(2, L))


def by_hand(p, temperature=1.0, top_k=None, top_p=1.0):
    """A distribution, a list: sharpened; then its likeliest until they have top_p."""
    p = [q ** (1 / temperature) for q in p]
    p, kept, mass = [q / sum(p) for q in p], [0.0] * len(p), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i])[:top_k]:
        if mass < top_p:
            kept[i], mass = p[i], mass + p[i]
    return [q / sum(kept) for q in kept]


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("how", [dict(temperature=0.5), dict(top_k=2), dict(top_p=0.6)], ids=str)
def test_drafts_of_the_likely(how, drafts):
    """Drafted or not, every token is drawn from what temperature, top_k and top_p make of p."""
    model, groups = make(), torch.tensor([ORDERS["another order"]])
    rows = torch.tensor(list(itertools.product(range(V), repeat=L)))
    with torch.no_grad():
        each = model(rows, groups.expand(len(rows), L)).softmax(-1).tolist()
    p = torch.tensor([
        math.prod(by_hand(q, **how)[token] for q, token in zip(*row, strict=True))
        for row in zip(each, rows.tolist(), strict=True)
    ])  # fmt: skip
    assert p.sum().item() == pytest.approx(1)
    x, g = torch.zeros(5000, L).long(), torch.Generator().manual_seed(1)
    y, _ = model.generate_speculative(x, groups.expand(5000, L), drafts, generator=g, **how)
    assert deviation(y, p, (rows * V ** torch.arange(L)).sum(1)) < 4
