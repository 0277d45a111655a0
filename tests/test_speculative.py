"""
beyond/speculative.py: several tokens a call, exactly, against enumeration in float64.
"""

import itertools
import math

import pytest
import torch
from oracle import V, count, fits, make_a3, seeded, spy, texts

import a3
from a3 import chunk_groups, random_groups
from beyond.speculative import generate_speculative

pytestmark = pytest.mark.usefixtures("float64")

L = 4
ORDERS = {
    "left to right": [0, 1, 2, 3],
    "another order": [3, 0, 2, 1],
    "around what is given": [2, -1, 0, 5],
    "given in its own order": [1, -1, 0, -7],
}


def check_fit(model, order, drafts, n=8000):
    """Do samples around given tokens follow p(x | given)? All fillings are listed."""
    groups = torch.tensor(ORDERS[order])
    x = torch.tensor([1, 0, 2, 2])
    every = texts(L)
    every = every[(every == x)[:, groups < 0].all(1)]
    p = model.log_prob(every, groups.expand_as(every)).sum(1).exp()

    many, groups = x.repeat(n, 1), groups.expand(n, L)
    y, calls = generate_speculative(model, many, groups, drafts, generator=seeded(drafts))

    assert fits(count(y, every), p)
    assert 1 <= calls <= (groups[0] >= 0).sum()
    return every, y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("drafts", [1, 2, 4])
@torch.no_grad()
def test_samples_fit_p(order, drafts):
    check_fit(make_a3(L), order, drafts)


@pytest.mark.parametrize("left_neighbour", [True, False])
@torch.no_grad()
def test_samples_fit_p_whatever_the_drafts(left_neighbour, monkeypatch):
    """Drafts from another distribution, far from that of the model: all queries but the first
    of each family are made bad on purpose."""
    model = make_a3(left_neighbour=left_neighbour)
    real = a3.Cache.step

    def bad(*a):
        logits = real(*a).unflatten(1, (-1, 3)).clone()  # (B, n, 3, V)
        logits[:, :, 1:] = torch.tensor([3.0, 0.0, -3.0])
        return logits.flatten(1, 2)

    monkeypatch.setattr(a3.Cache, "step", bad)
    every, y = check_fit(model, "another order", 3, n=10_000)
    uniform = torch.full((len(every),), 1 / len(every))
    assert not fits(count(y, every), uniform), "a test that can fail"


@torch.no_grad()
def test_every_prediction_is_that_of_forward(monkeypatch):
    """Each call's logits, for each number of tokens that a query may see, are forward's on
    them."""
    model = make_a3(L)
    groups = torch.tensor(list(ORDERS.values()))
    order = a3.ranks(groups).argsort(1)
    x = torch.randint(V, (4, L))
    now = x.clone()  # the texts as of this call
    seen = []
    scatter = torch.Tensor.scatter_

    def keep(self, dim, index, value):
        out = scatter(self, dim, index, value)
        if self.shape == (4, L + 1):
            now.copy_(self[:, :L])
        return out

    def check(logits, cache, tokens, slots, rank, at, left, before):
        for row, j in itertools.product(range(4), range(at.shape[1])):
            n = int(before[row, j])
            if at[row, j] == L or n >= L:  # behind the end, where nobody reads
                continue
            first = order[row, :n]
            place = torch.full((1, L), L)
            place[0, first] = torch.arange(n)
            text = torch.zeros(1, L).long()
            text[0, first] = now[row, first]
            torch.testing.assert_close(logits[row, j], model(text, place)[0, at[row, j]])
            seen.append(n)

    spy(monkeypatch, a3.Cache, "step", check)
    monkeypatch.setattr(torch.Tensor, "scatter_", keep)
    generate_speculative(model, x, groups, 3, generator=seeded(0))
    assert len(seen) > 20 and set(seen) == set(range(L))


@torch.no_grad()
def test_rows_are_alone():
    """Greedy: rows with other orders and other given tokens, as if each were by itself, and as
    without drafts."""
    model = make_a3(L=9)
    groups = torch.cat((torch.tensor(list(ORDERS.values())), torch.full((1, L), -1)))
    x = torch.randint(V, (5, L))
    want = model.generate(x, groups, temperature=0)
    for drafts in (1, 2, 4, 9):
        got, calls = generate_speculative(model, x, groups, drafts, temperature=0)
        assert torch.equal(got, want) and calls <= L
        for row in range(5):
            alone = x[[row]], groups[[row]]
            one, _ = generate_speculative(model, *alone, drafts, temperature=0)
            assert torch.equal(one[0], want[row])


@torch.no_grad()
def test_good_drafts_save_calls():
    """Where tokens do not depend on each other every draft is accepted."""
    model = make_a3(L=12)
    torch.nn.init.zeros_(model.lm_head.weight)
    x = torch.zeros(3, 12).long()
    for drafts in (1, 3, 12):
        _, calls = generate_speculative(model, x, random_groups(3, 12), drafts)
        assert calls == 1 + math.ceil(11 / drafts)
    y, calls = generate_speculative(model, x, torch.full_like(x, -1))
    assert calls == 0 and torch.equal(y, x)


@pytest.mark.parametrize("how", [dict(temperature=0.5), dict(top_k=2), dict(top_p=0.6)])
@torch.no_grad()
def test_drafts_of_the_likely(how):
    """Every token is drawn from what temperature, top_k and top_p make of p."""
    model = make_a3(L)
    groups = torch.tensor(ORDERS["another order"])
    every = texts(L)
    steps = a3.probabilities(model(every, groups.expand_as(every)), **how)  # (81, L, V)
    p = steps.gather(2, every[..., None]).prod(1)[:, 0]

    x = torch.zeros(8000, L).long()
    y, _ = generate_speculative(model, x, groups.expand_as(x), 3, generator=seeded(1), **how)
    assert fits(count(y, every), p)


def test_bad_calls():
    model = make_a3(L)
    x = torch.zeros(2, L).long()
    for groups, drafts in ((chunk_groups(2, L, 2), 4), (chunk_groups(2, L), 0)):
        with pytest.raises(ValueError, match="every group one token"):
            generate_speculative(model, x, groups, drafts)
    with pytest.raises(ValueError, match="must both be"):
        generate_speculative(model, x, chunk_groups(2, L - 1))
