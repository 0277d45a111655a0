"""
beyond/loa3.py against exact enumeration: with 4 positions there are 24 orders, with 2 or 3
tokens 16 or 81 texts, and all can be listed. The sum of the probabilities, the mean of the loss
and its gradient, and the two ends (A3 and the ARM) are in test_equivalences.py.
"""

import itertools
import math

import pytest
import torch
from oracle import bounds, count, fits, list_loa3, make_loa3, orders, seeded, texts

import lomdm
from a3 import chunk_groups, random_groups, ranks
from beyond import loa3
from beyond.loa3 import LoA3

pytestmark = pytest.mark.usefixtures("float64")


def make(L=4, vocab_size=2, **kw):
    return make_loa3(L, vocab_size=vocab_size, **kw)


def new(vocab_size=5, L=6, **kw):
    torch.manual_seed(0)
    return LoA3(loa3.Config(vocab_size, L, 2, 2, 8, **kw)).eval()


# ---- q and q_hat -------------------------------------------------------------------------


def naive_log_q(model, log_way, order):
    """One order (a list) of a mixture of races, by its definition: at each step the mean over
    ways, by what they now weigh, of exp(s_i) / the sum of those that are left."""
    s = model.order.log_weights(len(order))
    weigh = log_way.exp()
    steps = []
    for k, i in enumerate(order):
        p = s[:, i].exp() / s[:, order[k:]].exp().sum(1)  # (3,)
        steps.append((weigh * p).sum().log())
        weigh = weigh * p / (weigh * p).sum()
    return torch.stack(steps)


def test_log_q_is_a_mixture_of_races_step_by_step():
    model = make()
    x = texts(4, 2)[[5]]
    for order in orders(4):
        log_q_hat, log_q = model.order_log_probs(x, order[None])
        for got, log_way in (
            (log_q_hat, model.order.log_q_hat_way()),
            (log_q, model.order.log_q_way(x)),
        ):
            assert torch.allclose(got[0], naive_log_q(model, log_way[0], order.tolist()))


def test_each_kind_of_token_has_a_vote():
    """However often it is there, and wherever. q_hat does not hear them. The share in random
    order is as it is."""
    order = make(4, 3, random_share=0.3).order
    votes = order.scale * order.token_logits
    q, q_hat = order.scale * order.q_logits, order.scale * order.q_hat_logits

    def ways(logits):
        return torch.cat((0.7 * logits.softmax(0), torch.tensor([0.3])))

    got = order.log_q_way(torch.tensor([[0, 0, 1, 0], [1, 1, 0, 1], [2, 2, 2, 2]])).exp()
    both = ways((votes[0] + votes[1]) / math.sqrt(2) + q)
    torch.testing.assert_close(got, torch.stack((both, both, ways(votes[2] + q))))
    torch.testing.assert_close(order.log_q_hat_way().exp()[0], ways(q_hat))


def test_steps_of_the_weights():
    """s_j = - sum_{i <= j} scale log_weight_steps_i: where that is large, i comes long after
    i - 1. Of the two directions, that which the text's tokens vote for; and s = 0 where all is
    random."""
    model = new(L=4)
    with torch.no_grad():
        model.order.log_weight_steps[1] = torch.tensor([9.0, 0.5, -0.25, 1.0])
        model.order.token_logits[3, 1] = 1.0

    got = model.order_log_weights(torch.tensor([[0, 1, 2, 4], [0, 1, 2, 3]]))

    assert torch.allclose(got[0], -6 * torch.arange(1.0, 5.0))
    assert torch.allclose(got[1], -40 * torch.tensor([9.0, 9.5, 9.25, 10.25]))
    assert (model.order.log_weights(4)[2] == 0).all()


def test_a_new_order_costs_nothing():
    """q = q_hat: about left to right for two texts of three, right to left for one."""
    model = new()
    x = torch.randint(5, (7, 6))

    log_q_hat, log_q = model.order_log_probs(x, random_groups(7, 6))
    assert torch.allclose(log_q, log_q_hat, rtol=0, atol=1e-6)
    shares = torch.tensor([2 / 3, 1 / 3, 0.0])
    assert torch.allclose(model.order.log_q_way(x).exp(), shares.expand(7, 3))

    backwards = torch.arange(5, -1, -1).expand(7, 6)
    got = model.order_log_probs(x, backwards)[1].exp()
    assert torch.allclose(got[:, 0], torch.full((7,), 1 / 3), atol=0.002)
    right = torch.sigmoid(torch.tensor(6.0))  # of two neighbours the right one first
    assert torch.allclose(got[:, 4], right.expand(7), atol=1e-6)


@torch.no_grad()
def test_orders_are_drawn_from_q():
    model = make()
    x = texts(4, 2)[5]
    every = orders(4)
    log_way = model.order.log_q_way(x.expand(20_000, 4))
    found = model.order.draw(log_way, 4, seeded(0))
    log_q = model.order_log_probs(x.expand_as(every), every)[1].sum(1)
    assert fits(count(found, every), log_q.exp())


# ---- the loss ----------------------------------------------------------------------------


def test_a_choice_answers_for_what_comes_after_it(monkeypatch):
    """The loss's surrogate by hand, for an order of each of three texts: of each step, its
    cost and those after it, less the mean of the same of the other texts, times grad log q."""
    model = make(3, 2, seed=1)
    x = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    order = torch.tensor([[2, 0, 1], [1, 0, 2], [0, 1, 2]])
    monkeypatch.setattr(loa3, "race", lambda s, generator=None: order)
    log_q_hat, log_q = model.order_log_probs(x, order)
    cost = log_q - log_q_hat - model.log_prob(x, order.argsort(1)).gather(1, order)

    want = 0
    for row, k in itertools.product(range(3), range(3)):
        others = sum(cost[other, k:].sum() for other in range(3) if other != row) / 2
        excess = cost[row, k:].sum() - others
        want = want + (cost[row, k] + excess.detach() * log_q[row, k]) / 9

    loss, m = model.loss(x)
    got, want = (torch.autograd.grad(t, list(model.parameters())) for t in (loss, want))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(m["nelbo"], cost.detach().mean())
    torch.testing.assert_close(m["recon"] + m["order"], m["nelbo"])
    left = model.order.log_q_way(x)[:, 0].exp().mean()
    torch.testing.assert_close(m["left_share"], left.detach())


@torch.no_grad()
def test_nelbo_is_unbiased():
    """Orders are drawn by the q of each text. The limit is four standard errors, and less than
    5% of the bound, which orders by q_hat miss by more."""
    model = make()
    x = texts(4, 2)[[5, 14]]
    _, bound = bounds(*list_loa3(model, x))

    nats = model.nelbo(x.repeat(4000, 1), 2, generator=seeded(0)).view(4000, 2)

    error = (nats.mean(0) - bound).abs()
    limit = 4 * nats.std(0) / math.sqrt(4000)
    assert (error < limit).all() and (limit < 0.05 * bound).all()


def test_order_does_not_shape_the_network():
    """The cost of guessing the order reaches the order's own weights only, which are what
    parameter_groups() has."""
    model = make()
    log_q_hat, log_q = model.order_log_probs(torch.randint(2, (8, 4)), random_groups(8, 4))
    (log_q - log_q_hat).sum().backward()
    got = [p for p in model.parameters() if p.grad is not None and p.grad.any()]
    (group,) = model.parameter_groups()
    assert {*map(id, got)} == {*map(id, group.pop("params"))} and len(got) == 4
    assert group == {"weight_decay": 0.0, "eps": 0.3, "starts_after": 1 / 3}


# ---- sampling ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_layer", [1, 2])
@torch.no_grad()
def test_samples_are_drawn_from_the_model(n_layer):
    """Texts and their orders, together."""
    model = make(3, 2, seed=2, n_layer=n_layer)
    x, at = model.sample(torch.full((20_000, 3), 2), generator=seeded(0))
    log_p, log_q_hat, _ = list_loa3(model, texts(3, 2))

    pairs = itertools.product(texts(3, 2), orders(3))
    every = torch.stack([torch.cat(pair) for pair in pairs])  # a text, and its order
    found = count(torch.cat((x, at.argsort(1)), 1), every)
    assert fits(found, (log_p + log_q_hat).exp().flatten())


@torch.no_grad()
def test_given_tokens_are_read_first_in_the_same_order():
    """And then the rest comes from the model, given that they were read so."""
    model = make(4, 2, seed=3)
    z = torch.tensor([[2, 1, 2, 0]]).repeat(20_000, 1)
    x, at = model.sample(z, generator=seeded(0))
    assert (at[:, [1, 3]] == -1).all() and (x[:, [1, 3]] == torch.tensor([1, 0])).all()

    p = {}  # of the two new tokens, and whether the first of them came first
    for order in orders(4).tolist():
        log_q_hat = model.order(torch.tensor([order]), model.order.log_q_hat_way()).sum()
        read = [i for i in order if i in (1, 3)] + [i for i in order if i in (0, 2)]
        for a, b in itertools.product(range(2), range(2)):
            row = torch.tensor([[a, 1, b, 0]])
            log_p = model.log_prob(row, torch.tensor([read]).argsort(1))[0, [0, 2]].sum()
            case = a, b, int(read.index(0) < read.index(2))
            p[case] = p.get(case, 0) + (log_q_hat + log_p).exp().item()

    first = (at[:, 0] < at[:, 2]).long()
    found = count(torch.stack((x[:, 0], x[:, 2], first), 1), torch.tensor(list(p)))
    assert fits(found, torch.tensor(list(p.values())))


@torch.no_grad()
def test_rows_with_different_gaps_in_one_batch():
    """Greedy, by steep weights: each row as if it were alone, with a cache and without. Given
    tokens come first, and both parts in the likeliest order."""
    model = make(5, 3, seed=4, random_share=0.0)
    z = torch.tensor([[3, 3, 3, 3, 3], [0, 3, 2, 3, 1], [1, 2, 0, 1, 3], [0, 1, 2, 0, 1]])
    for p in (model.order.log_weight_steps, model.order.q_logits, model.order.q_hat_logits):
        p *= 1000

    together = model.sample(z, temperature=0)
    for row, cache in itertools.product(range(4), (True, False)):
        x, at = model.sample(z[[row]], temperature=0, cache=cache)
        assert torch.equal(x[0], together[0][row]) and torch.equal(at[0], together[1][row])
        assert torch.equal(at[0] >= 0, z[row] == 3)

    found = ranks(model.draw_groups(z)).argsort(1)
    likeliest = model.likeliest_order(1, 5)[0].argsort().tolist()
    for row, got in zip(z.tolist(), found.tolist(), strict=True):
        assert got == sorted(likeliest, key=lambda i: row[i] == 3)


@pytest.mark.parametrize("q_hat,first", [((0.0, 1.0), 3), ((1.0, 0.0), 0)])
def test_the_likeliest_order_is_that_by_enumeration(q_hat, first):
    """Whatever share is random: an order of a direction is likelier than any of the random way."""
    for share in (0.0, 0.6):
        model = new(L=4, random_share=share)
        model.order.q_hat_logits.data = torch.tensor(q_hat) / model.order.scale
        every = orders(4)
        log_q_hat = model.order(every, model.order.log_q_hat_way()).sum(1)
        assert log_q_hat.exp().sum().item() == pytest.approx(1)
        want = every[log_q_hat.argmax()]
        got = model.likeliest_order(2, 4).argsort(1)
        assert torch.equal(got, want.expand(2, 4)) and got[0, 0] == first


# ---- what else it can --------------------------------------------------------------------


@torch.no_grad()
def test_it_remains_an_a3():
    """Exact in any order, and adapted from an ARM, which leaves the order."""
    model = make(4, 3)
    before = {name: p.clone() for name, p in model.order.state_dict().items()}
    arm = lomdm.LoMDM(lomdm.Config(3, 4, 2, 2, 8, block_len=1))
    model.load_arm(arm.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.order.state_dict().items())

    x = texts(4)
    left = -model.log_prob(x, chunk_groups(81, 4)).sum(1)
    torch.testing.assert_close(arm.nelbo(x), left)
    torch.testing.assert_close(model.nelbo(x, order="left"), left)
    groups = random_groups(81, 4, generator=seeded(1))
    want = -model.log_prob(x, groups).sum(1)
    torch.testing.assert_close(model.nelbo(x, order="random", generator=seeded(1)), want)
    torch.testing.assert_close(model.loss(x, groups)[0], want.mean() / 4)
    for by in ("left", "confidence", "random"):
        assert (model.sample(torch.full((2, 4), 3), by=by)[0] < 3).all()


def test_bfloat16_is_close_to_float32():
    """The running sums are in float32, or the order would be lost."""
    torch.set_default_dtype(torch.float32)
    model = new(L=64)
    torch.nn.init.normal_(model.order.token_logits, std=0.1)  # the steps are 6 nats each
    x = torch.randint(5, (4, 64))
    order = torch.arange(64).expand(4, 64)

    want = model.order_log_probs(x, order)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.order_log_probs(x, order)
    rounded = model.bfloat16().order_log_probs(x, order)  # its weights are rounded themselves

    torch.testing.assert_close(got, want, rtol=0, atol=0.02)
    torch.testing.assert_close(rounded, want, rtol=0, atol=0.1)


def test_bad_calls():
    model = make()
    x = torch.zeros(2, 4).long()
    with pytest.raises(ValueError, match="must both be"):
        model.order_log_probs(x, x[:, :3])
    with pytest.raises(ValueError, match="at least 2 in a batch"):  # one has no baseline
        model.loss(x[:1])
    with pytest.raises(ValueError, match="groups of one token, not of 2"):
        model.nelbo(x, size=2)
