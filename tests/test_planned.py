"""
beyond/planned.py against exact enumeration: with 4 positions there are 24 orders, and with 3
tokens 81 texts. The search is held against the costs of all that it chooses from, and against
rules whose best order is known.
"""

import itertools
import math

import pytest
import torch
from oracle import SIZE, count, fits, make_planned, orders, randomize, seeded, texts

import a3
from beyond import planned
from beyond.planned import Rules, costs_of_places, move, needed, split, take_out

pytestmark = pytest.mark.usefixtures("float64")


def random_rules(L, H=3, seed=0):
    torch.manual_seed(seed)
    rules = Rules(L, H)
    for p in rules.parameters():
        torch.nn.init.normal_(p, std=1.5 / rules.scale)
    torch.nn.init.normal_(rules.base, mean=2 / rules.scale, std=0.3 / rules.scale)
    return rules.requires_grad_(False)


# ---- the rules ---------------------------------------------------------------------------


def test_rules_by_their_definition():
    """Equation (2), for every position and every order of four."""
    L, H = 4, 3
    rules = random_rules(L, H)
    c = rules.scale
    for order in orders(L):
        place = order.argsort()
        got = rules(place[None])[0]
        for i in range(L):
            hidden = [j for j in range(L) if place[j] > place[i]]
            want = max(0, c * (rules.base[i] + rules.base_of_all))
            for h in range(H):
                far = rules.needs_by_distance[:, h]
                logits = [c * (rules.needs[i, j, h] + far[j - i + 3]) for j in hidden]
                lacks = sum(math.log1p(math.exp(logit)) for logit in logits)
                share = torch.sigmoid(c * (rules.share[i, h] + rules.share_of_all[h]))
                want = want * (1 - share * math.exp(-lacks))
            torch.testing.assert_close(got[i], want)


def test_the_rules_can_be_fitted():
    """The costs of a text whose token 0 follows from 1 and 2 together, and 3 from 0 alone, are
    learned from all orders: to 1 of 100."""
    torch.manual_seed(0)
    rules = Rules(4)
    place = orders(4).argsort(1)
    want = torch.ones(24, 4)
    want[(place[:, 1] < place[:, 0]) & (place[:, 2] < place[:, 0]), 0] = 0
    want[place[:, 0] < place[:, 3], 3] = 0
    adam = torch.optim.Adam(rules.parameters(), 1e-3)
    for _ in range(2000):
        error = (rules(place) - want).square().mean()
        error.backward()
        adam.step()
        adam.zero_grad()
    assert error < 1e-4


# ---- the search --------------------------------------------------------------------------


def test_costs_of_all_places():
    """A piece goes to every place, and both ways round: what the rules say of the whole order."""
    L, M = 7, 4
    rules = random_rules(L)
    g = seeded(0)
    order = torch.rand(M, L, generator=g).argsort(1)
    sizes = set()
    for _ in range(40):
        is_out = take_out(order, needed(rules.numbers()), g)
        piece, rest = split(order, is_out)
        sizes.add(piece.shape[1])
        got = costs_of_places(order, is_out, rules.numbers())
        for m, p in itertools.product(range(M), range(L - piece.shape[1] + 1)):
            for way, put in enumerate((piece[m], piece[m].flip(0))):
                new = torch.cat((rest[m, :p], put, rest[m, p:]))
                torch.testing.assert_close(got[m, way, p], rules(new.argsort()[None]).sum())
    assert sizes == {1, 2, 3}


def test_what_is_needed():
    """j by i: what i costs if only j comes after it, less what it costs as the last one."""
    rules = random_rules(5)
    links = needed(rules.numbers())
    for i, j in itertools.permutations(range(5), 2):
        others = [k for k in range(5) if k not in (i, j)]
        before, last = (torch.tensor([[*others, *pair]]) for pair in ((i, j), (j, i)))
        want = rules(before.argsort(1))[0, i] - rules(last.argsort(1))[0, i]
        torch.testing.assert_close(links[j, i], want)


def test_pieces():
    """They stand in a row in the order, or they are a thread: here every position needs the one
    three places before it in the text, and each piece is all that follows from its first."""
    g = seeded(1)
    L = 16
    order = torch.rand(6, L, generator=g).argsort(1)
    links = torch.zeros(L, L)
    links[torch.arange(L - 3), torch.arange(3, L)] = 1.0
    kinds = []
    for _ in range(200):
        is_out = take_out(order, links, g)
        piece, _ = split(order, is_out)
        k = piece.shape[1]
        numbers = is_out.nonzero()[:, 1].view(6, k)
        steps = piece.sort(1).values.diff(dim=1)
        kinds.append((k, (numbers.diff(dim=1) == 1).all().item(), (steps == 3).all(1)))
    assert {k for k, _, _ in kinds} == set(range(1, 9))
    assert all(in_a_row or thread.any() for k, in_a_row, thread in kinds if k <= 3)
    for a_row in (True, False):
        assert sum(k > 1 and in_a_row == a_row for k, in_a_row, _ in kinds) > 20


def test_a_move_draws_its_choice_by_what_it_costs(monkeypatch):
    """With position 0 taken out of the order 1 0 2, there are three places, each twice, as a piece
    of one has no direction, and the order as it was."""
    rules = random_rules(3)
    order = torch.tensor([[1, 0, 2]])
    monkeypatch.setattr(planned, "take_out", lambda order, *_: order == 0)
    choices = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 0]])
    weight = (-rules(choices.argsort(1)).sum(1) / 0.7).exp() * torch.tensor([2, 3, 2])

    numbers = rules.numbers()
    found = move(order.expand(20_000, 3), numbers, needed(numbers), 0.7, seeded(0))
    assert fits(count(found, choices), weight / weight.sum())


@pytest.mark.parametrize("L", [1, 2, 3, 30])
def test_orders_stay_orders(L):
    numbers = random_rules(L).numbers()
    order = torch.rand(8, L).argsort(1)
    for _ in range(20):
        order = move(order, numbers, needed(numbers), 0.5, seeded(2))
    assert torch.equal(order.sort(1).values, torch.arange(L).expand(8, L))


def test_the_search_finds_a_known_order():
    """Every position needs the one that is at a distance of 7, round a ring of 20. Of all orders
    only those that go round the ring, from anywhere, cost no more than one position does."""
    L = 20
    needs = torch.zeros(L, L, 1)
    needs[torch.arange(L), (torch.arange(L) + 7) % L] = 20.0
    numbers = needs, torch.ones(L, 1), torch.ones(L)
    g = seeded(0)
    order = torch.rand(16, L, generator=g).argsort(1)
    for T in torch.linspace(0.3, 0.01, 300).tolist():
        order = move(order, numbers, needed(numbers), T, g)
    steps = order.diff(dim=1) % L
    assert (steps == L - 7).all(1).sum() >= 4


# ---- the model ---------------------------------------------------------------------------


def test_the_bound():
    """p(x) is a mean over the orders, sums to 1 over texts, and nelbo() is on average the mean of
    the costs, which is no less than -log p. With one order left they are the same."""
    model = make_planned()
    every = texts(4)
    place = model.orders.argsort(1)
    with torch.no_grad():
        by_order = torch.stack([model.log_prob(every, p.expand_as(every)).sum(1) for p in place])
    log_p = by_order.logsumexp(0) - math.log(len(place))
    assert log_p.exp().sum() == pytest.approx(1)

    x = every[[37]]
    draws = model.nelbo(x.expand(6000, 4), generator=seeded(0))
    mean, error = draws.mean(), draws.std() / math.sqrt(6000)
    want = -by_order[:, 37].mean()
    assert abs(mean - want) < 4 * error and want > -log_p[37] + 0.01

    model.orders[:] = model.orders[2]
    torch.testing.assert_close(model.nelbo(every), -by_order[2])


def test_texts_are_drawn_from_the_mean_over_orders():
    model = make_planned(L=3)
    every = texts(3)
    p = 0
    with torch.no_grad():
        for place in model.orders.argsort(1):
            p = p + model.log_prob(every, place.expand_as(every)).sum(1).exp() / 5
    z = torch.full((20_000, 3), model.mask_id)
    found, _ = model.sample(z, generator=seeded(1))
    assert fits(count(found, every), p)


def test_given_tokens_come_first():
    """In the order among themselves, as do the others."""
    model = make_planned(L=5)
    model.orders[:] = torch.tensor([3, 0, 4, 2, 1])
    m = model.mask_id
    z = torch.tensor([[1, m, 0, m, m], [m, m, m, m, m], [0, 1, 2, 0, 1]])
    got = a3.ranks(model.draw_groups(z)).argsort(1)
    assert got.tolist() == [[0, 2, 3, 4, 1], [3, 0, 4, 2, 1], [3, 0, 4, 2, 1]]

    # A shorter text has the same order, without what it does not have.
    assert model.draw_groups(torch.full((1, 3), m)).argsort(1).tolist() == [[0, 2, 1]]
    assert model.order_log_weights(z[:1, :3]).argsort(descending=True).tolist() == [[0, 2, 1]]


def test_rules_and_network_learn_apart():
    """The loss is A3's and the squared error of the rules. Neither's gradient reaches the other."""
    model = make_planned()
    x, groups = texts(4)[:7], orders(4)[:7].argsort(1)
    rules, network = list(model.rules.parameters()), list(model.blocks.parameters())
    loss, m = model.loss(x, groups)
    got = torch.autograd.grad(loss, [*rules, *network])

    nll = -model.log_prob(x, groups)
    error = (model.rules(groups) - nll.detach()).square().mean()
    want = (*torch.autograd.grad(error, rules), *torch.autograd.grad(nll.mean(), network))
    torch.testing.assert_close(got, want)
    assert m["nelbo"] == pytest.approx(nll.mean().item())
    assert m["rules"] == pytest.approx(error.item())


def test_what_a_step_trains_on():
    """At first a quarter of the texts is in random order, and half as many when T is half-way down.
    The others are in the orders, which move, and for the same seed alike. Late, all are in the one
    that the rules find best."""
    model = make_planned(L=6, M=8)
    same = make_planned(L=6, M=8)
    before = model.orders.clone()
    groups = model.training_groups(4000, 0.425, seed=1)
    same.training_groups(2, 0.425, seed=1)
    assert torch.equal(model.orders, same.orders) and not torch.equal(model.orders, before)
    planned_ones = (groups[:, None] == model.orders.argsort(1)).all(2).any(1).double().mean()
    assert abs(planned_ones - 0.875 - 0.125 * 8 / 720) < 0.021  # 4 standard errors

    groups = model.training_groups(50, 0.9, seed=2)
    best = model.best_order()
    assert (model.orders == best).all() and (groups == best.argsort()).all()


def test_the_temperature_falls_by_equal_factors():
    model = make_planned()
    T, fallen = zip(*(model.temperature(t) for t in (0, 0.1, 0.425, 0.75, 1)), strict=True)
    assert T == pytest.approx([0.15, 0.15, math.sqrt(0.15 * 0.05), 0.05, 0.05])
    assert fallen == pytest.approx([0, 0, 0.5, 1, 1])


def test_an_arm_can_be_loaded():
    arm = randomize(a3.A3(a3.Config(3, 4, **SIZE)))
    weights = {k: v for k, v in arm.state_dict().items() if k != "query"}
    model = make_planned()
    orders_before, rules_before = model.orders.clone(), model.rules.base.clone()
    model.load_arm(weights)
    x = texts(4)
    left = a3.chunk_groups(81, 4)
    torch.testing.assert_close(model.log_prob(x, left), arm.log_prob(x, left))
    assert torch.equal(model.orders, orders_before)
    assert torch.equal(model.rules.base, rules_before)
