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
from beyond.planned import Planned, Rules, costs_of_slots, move, needed, put, split, take_out

pytestmark = pytest.mark.usefixtures("float64")


def random_rules(L, H=3, seed=0):
    torch.manual_seed(seed)
    rules = Rules(L, H)
    for p in rules.parameters():
        torch.nn.init.normal_(p, std=1.5 / rules.scale)

    # Every base is positive: about 2 nats. At 0 no other number would count.
    torch.nn.init.constant_(rules.base_of_all, 2 / rules.scale)
    torch.nn.init.normal_(rules.base, std=0.3 / rules.scale)
    assert (rules.table()[2] > 0.5).all()
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


def test_costs_of_all_slots():
    """A piece goes to every slot, and both ways round: what the rules say of the whole order."""
    L, M = 7, 4
    rules = random_rules(L)
    g = seeded(0)
    order = torch.rand(M, L, generator=g).argsort(1)
    sizes = set()
    for _ in range(40):
        is_out = take_out(order, needed(rules.table()), g)
        piece, rest = split(order, is_out)
        sizes.add(piece.shape[1])
        got = costs_of_slots(order, is_out, rules.table())
        for m, p in itertools.product(range(M), range(L - piece.shape[1] + 1)):
            for way, piece_m in enumerate((piece[m], piece[m].flip(0))):
                new = torch.cat((rest[m, :p], piece_m, rest[m, p:]))
                torch.testing.assert_close(got[m, way, p], rules(new.argsort()[None]).sum())
    assert sizes == {1, 2, 3}


def test_what_is_needed():
    """j by i: what i costs if only j comes after it, less what it costs as the last one."""
    rules = random_rules(5)
    links = needed(rules.table())
    for i, j in itertools.permutations(range(5), 2):
        others = [k for k in range(5) if k not in (i, j)]
        before, last = (torch.tensor([[*others, *pair]]) for pair in ((i, j), (j, i)))
        want = rules(before.argsort(1))[0, i] - rules(last.argsort(1))[0, i]
        torch.testing.assert_close(links[j, i], want)


def test_pieces():
    """They stand in a row in the order, or they are a thread. Here 0 is needed by 1 and 3, and
    every other position by one: 1 by 2, 2 by 0, 3 by 4, 4 by 5, and 5 by 0. Against the direction
    of need, 0 would bring 2 and 5 together, which no row does."""
    order = torch.tensor([[0, 4, 1, 5, 3, 2]])
    links = torch.zeros(6, 6)
    links[[0, 0, 1, 2, 3, 4, 5], [1, 3, 2, 0, 4, 5, 0]] = 1.0
    g = seeded(1)
    found = set()
    for _ in range(200):
        pieces, _ = split(order.expand(60, 6), take_out(order.expand(60, 6), links, g))
        found |= {frozenset(piece) for piece in pieces.tolist()}

    runs = [(i, i + k) for k in (1, 2, 3) for i in range(7 - k)]
    rows = {frozenset(order[0, i:j].tolist()) for i, j in runs}
    threads = "01 03 12 20 34 45 50 012 013 034 120 201 203 345 450 501 503"
    assert found == rows | {frozenset(map(int, t)) for t in threads.split()}


def test_a_piece_is_put_into_its_slot():
    """As it is, and then reversed."""
    piece, rest = torch.tensor([[7, 8]]), torch.tensor([[0, 1, 2]])
    got = [put(piece, rest, torch.tensor([[choice]]))[0].tolist() for choice in range(8)]
    as_it_is = [[7, 8, 0, 1, 2], [0, 7, 8, 1, 2], [0, 1, 7, 8, 2], [0, 1, 2, 7, 8]]
    backwards = [[8, 7, 0, 1, 2], [0, 8, 7, 1, 2], [0, 1, 8, 7, 2], [0, 1, 2, 8, 7]]
    assert got == as_it_is + backwards


def test_a_move_draws_its_choice_by_what_it_costs(monkeypatch):
    """With position 0 taken out of the order 1 0 2, there are three slots, each twice, as a piece
    of one has no direction, and the order as it was."""
    rules = random_rules(3)
    order = torch.tensor([[1, 0, 2]])
    monkeypatch.setattr(planned, "take_out", lambda order, *_: order == 0)
    choices = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 0]])
    weight = (-rules(choices.argsort(1)).sum(1) / 0.7).exp() * torch.tensor([2, 3, 2])

    table = rules.table()
    found = move(order.expand(20_000, 3), table, needed(table), 0.7, seeded(0))
    assert fits(count(found, choices), weight / weight.sum())


@pytest.mark.parametrize("L", [1, 2, 3, 30])
def test_orders_stay_orders(L):
    table = random_rules(L).table()
    order = torch.rand(8, L).argsort(1)
    for _ in range(20):
        order = move(order, table, needed(table), 0.5, seeded(2))
    assert torch.equal(order.sort(1).values, torch.arange(L).expand(8, L))


def test_the_search_finds_a_known_order():
    """Every position needs the one that is at a distance of 7, round a ring of 20. Of all orders
    only those that go round the ring, from anywhere, cost no more than one position does."""
    L = 20
    needs = torch.zeros(L, L, 1)
    needs[torch.arange(L), (torch.arange(L) + 7) % L] = 20.0
    table = needs, torch.ones(L, 1), torch.ones(L)
    g = seeded(0)
    order = torch.rand(16, L, generator=g).argsort(1)
    for T in torch.linspace(0.3, 0.01, 300).tolist():
        order = move(order, table, needed(table), T, g)
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
    torch.testing.assert_close(model.nelbo(every, n_draws=3), -by_order[2])


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

    twos = model.draw_groups(z[1:2], per_step=2)
    assert twos.tolist() == [[0, 2, 1, 0, 1]]

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
    with pytest.raises(ValueError, match="is for all 4 tokens"):
        model.loss(x[:, :3])
    assert m["nelbo"] == pytest.approx(nll.mean().item())
    assert m["rules"] == pytest.approx(error.item())


def test_what_a_step_trains_on():
    """At first a quarter of the texts is in random order, and half as many when T is half-way down.
    The others are in the orders, all alike. These move, for the same seed in the same way."""
    model, same = make_planned(L=6, M=8), make_planned(L=6, M=8)
    before = model.orders.clone()
    model.plan(0.425, seed=1)
    same.plan(0.425, seed=1)
    assert torch.equal(model.orders, same.orders) and not torch.equal(model.orders, before)

    groups = model.training_groups(4000, 0.425)
    is_planned = (groups[:, None] == model.orders.argsort(1)).all(2)  # (B, M)
    assert abs(is_planned.any(1).double().mean() - 0.875 - 0.125 * 8 / 720) < 0.021  # 4 errors
    distinct = {tuple(order) for order in model.orders.tolist()}
    assert is_planned.any(0).all() and len(distinct) > 1


def test_the_best_order_is_left(monkeypatch):
    """When T has fallen: after one more search, the one that the rules find cheapest of all."""
    model = make_planned(L=6, M=8)
    calls = []
    real = Planned.search
    monkeypatch.setattr(
        Planned, "search", lambda self, T, g: (calls.append(T), real(self, [], g))
    )
    costs = model.rules(model.orders.argsort(1)).sum(1)
    best = model.orders[costs.argmin()].clone()
    assert costs.argmin() != 0
    model.plan(0.9, seed=2)
    [T] = calls
    assert len(T) == 2000 and (T[0], T[-1]) == pytest.approx((0.15, 0.003))
    assert T[1] / T[0] == pytest.approx(T[-1] / T[-2])
    assert (model.orders == best).all()
    assert (model.training_groups(50, 0.9) == best.argsort()).all()
    model.plan(0.95, seed=3)
    assert len(calls) == 1


def test_orders_get_cheaper():
    """By the search, the more so the colder it is."""
    hot, cold = make_planned(L=8, M=40), make_planned(L=8, M=40)
    hot.rules = cold.rules = random_rules(8)

    def mean_cost(model):
        return model.rules(model.orders.argsort(1)).sum(1).mean().item()

    before = mean_cost(hot)
    hot.search([5.0] * 30, seeded(0))
    cold.search([0.01] * 30, seeded(0))
    assert mean_cost(cold) < mean_cost(hot) - 0.1 and mean_cost(cold) < before - 0.1


def test_the_temperature_falls_by_equal_factors():
    model = make_planned()
    T = [model.temperature(t) for t in (0, 0.1, 0.425, 0.75, 1)]
    assert T == pytest.approx([0.15, 0.15, math.sqrt(0.15 * 0.05), 0.05, 0.05])


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


def test_what_an_optimizer_should_know():
    """The rules are a group of their own, from the first step on, that does not decay."""
    model = make_planned()
    [group] = model.parameter_groups()
    assert set(group.pop("params")) == set(model.rules.parameters())
    assert group == {"weight_decay": 0.0, "starts_after": 0.0}


def test_to_see_more_never_costs_more():
    """Of two orders, in which i comes after the same others or some more."""
    rules = random_rules(5)
    for order in orders(5)[::7]:
        for i in range(1, 5):
            earlier = order.tolist()
            earlier.insert(0, earlier.pop(i))
            at = order[i]
            first, later = rules(torch.tensor([earlier, order.tolist()]).argsort(1))[:, at]
            assert later <= first
