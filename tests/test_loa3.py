"""
beyond/loa3.py against exact enumeration: with 4 positions there are 24 orders, with 2 or 3
tokens 16 or 81 texts, and all that (2) says can be listed. The sum of the probabilities, the
bound, and the two ends (A3 and the ARM) are in test_equivalences.py.
"""

import itertools
import math

import pytest
import torch
from oracle import fits, listed, make_loa3, orders, texts

import lomdm
from a3 import chunk_groups, random_groups
from beyond import loa3
from beyond.loa3 import LoA3

pytestmark = pytest.mark.usefixtures("float64")


def make(L=4, vocab_size=2, **kw):
    return make_loa3(L, vocab_size=vocab_size, **kw)


def bounds(model, x):
    """The bound (2) of texts x (B,), and log q of all their orders (B, L!)."""
    log_p, log_q_hat, log_q = listed(model, x)
    return (log_q.exp() * (log_q - log_q_hat - log_p)).sum(1), log_q


def drawn(monkeypatch, order):
    """Every race comes out like this."""
    monkeypatch.setattr(loa3, "race", lambda s, generator=None: order)


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
    x = texts(4, 2)[5:7]
    q_hat_way = model.order.log_q_hat_way()[0]
    q_way = model.order.log_q_way(x)
    for order in orders(4):
        log_q_hat, log_q = model.order_log_probs(x, order.expand_as(x))
        for row in range(2):
            want = naive_log_q(model, q_hat_way, order.tolist())
            assert torch.allclose(log_q_hat[row], want, atol=1e-10)
            want = naive_log_q(model, q_way[row], order.tolist())
            assert torch.allclose(log_q[row], want, atol=1e-10)


def test_each_kind_of_token_has_a_vote():
    """However often it is there, and wherever. q_hat does not hear them."""
    order = make(4, 3).order
    votes = order.scale * order.token_logits
    q, q_hat = order.scale * order.q_logits, order.scale * order.q_hat_logits
    for row in ([0, 0, 1, 0], [1, 1, 0, 1]):
        want = ((votes[0] + votes[1]) / math.sqrt(2) + q).softmax(0) * 0.8
        got = order.log_q_way(torch.tensor([row]))[0].exp()
        assert torch.allclose(got, torch.cat((want, torch.tensor([0.2]))), atol=1e-12)

    got = order.log_q_hat_way()[0].exp()
    assert torch.allclose(got[:2], 0.8 * q_hat.softmax(0), atol=1e-12) and got[2] == 0.2


def test_share_in_random_order():
    """For q and q_hat alike, whatever the votes."""
    order = make(4, 3, random_share=0.3).order
    for log_way in (order.log_q_way(texts(4)), order.log_q_hat_way().expand(81, 3)):
        assert torch.allclose(log_way[:, 2].exp(), torch.full((81,), 0.3))
        assert torch.allclose(log_way.exp().sum(1), torch.ones(81))


def test_steps_of_the_weights():
    """s_j = - sum_{i <= j} scale log_weight_steps_i: where that is large, i comes long after
    i - 1. Of the two directions, that which the text's tokens vote for; and s = 0 where all is
    random."""
    model = LoA3(loa3.Config(5, 4, 1, 2, 8))
    with torch.no_grad():
        model.order.log_weight_steps[1] = torch.tensor([9.0, 0.5, -0.25, 1.0])
        model.order.token_logits[3, 1] = 1.0

    got = model.order_log_weights(torch.tensor([[0, 1, 2, 4], [0, 1, 2, 3]]))

    assert torch.allclose(got[0], -6 * torch.arange(1.0, 5.0))
    want = model.order.scale * torch.tensor([-9.0, -9.5, -9.25, -10.25])
    assert torch.allclose(got[1], want)
    assert (model.order.log_weights(4)[2] == 0).all()


def test_a_new_order_costs_nothing():
    """q = q_hat: about left to right for two texts of three, right to left for one."""
    torch.manual_seed(0)
    model = LoA3(loa3.Config(5, 6, 2, 2, 8)).eval()
    x = torch.randint(5, (7, 6))

    log_q_hat, log_q = model.order_log_probs(x, random_groups(7, 6))
    assert torch.allclose(log_q, log_q_hat, rtol=0, atol=1e-6)
    shares = torch.tensor([2 / 3, 1 / 3, 0.0])
    assert torch.allclose(model.order.log_q_way(x).exp(), shares.expand(7, 3))
    assert torch.allclose(model.order_log_weights(x), -6 * torch.arange(1, 7.0).expand(7, 6))

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
    log_way = model.order.log_q_way(x.expand(60_000, 4))
    found = model.order.draw(log_way, 4, torch.Generator().manual_seed(0))

    counts = (found[:, None] == every).all(2).sum(0)
    assert fits(counts, model.order_log_probs(x.expand_as(every), every)[1].sum(1).exp())


# ---- the bound and the loss --------------------------------------------------------------


def test_nelbo_has_the_bound_as_its_mean(monkeypatch):
    model = make(4, 3)
    x = texts(4)
    want, log_q = bounds(model, x)
    got = 0
    for i, order in enumerate(orders(4)):
        drawn(monkeypatch, order.expand_as(x))
        nats = model.nelbo(x)
        assert nats.shape == (81,)
        got = got + log_q[:, i].exp() * nats
    assert torch.allclose(got, want, atol=1e-10)


def test_nelbo_averages_over_its_draws(monkeypatch):
    model = make()
    x = texts(4, 2)
    every = orders(4)
    drawn(monkeypatch, every[3].expand_as(x))
    one = model.nelbo(x)
    drawn(monkeypatch, every[8].expand_as(x))
    other = model.nelbo(x)

    turn = itertools.cycle((3, 8))
    monkeypatch.setattr(loa3, "race", lambda s, generator=None: every[next(turn)].expand_as(x))
    assert torch.allclose(model.nelbo(x, 2), (one + other) / 2) and (one != other).all()


def gradient(loss, model):
    g = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([p.flatten() for p in g])


@pytest.mark.parametrize("random_share", [0.0, 0.2])
def test_expected_gradient_of_the_loss_is_that_of_the_bound(monkeypatch, random_share):
    """Over all pairs of orders of two texts: autograd through the bound."""
    model = make(3, 2, seed=1, random_share=random_share)
    x = torch.tensor([[0, 1, 1], [0, 0, 0]])
    every = orders(3)
    bound, log_q = bounds(model, x)
    bound = bound.mean() / 3
    q = log_q.exp().detach()

    total = value = 0
    for i, j in itertools.product(range(6), repeat=2):
        drawn(monkeypatch, every[[i, j]])
        loss, metrics = model.loss(x)
        p = (q[0, i] * q[1, j]).item()
        total = total + p * gradient(loss, model)
        value = value + p * metrics["nelbo"].item()

    want = gradient(bound, model)
    assert torch.allclose(total, want, atol=1e-9)
    assert value == pytest.approx(bound.item(), abs=1e-9)
    names = [name for name, p in model.named_parameters() for _ in p.flatten()]
    order = [f"order.{name}" for name, _ in model.order.named_parameters()]
    for part in (*order, "wte.weight", "lm_head.weight"):
        mine = torch.tensor([name == part for name in names])
        assert (want[mine].abs() > 1e-6).any(), part  # a part that matters


def test_a_choice_answers_for_what_comes_after_it(monkeypatch):
    """The loss's surrogate by hand, for an order of each of three texts: of each step, its
    cost and those after it, less the mean of the same of the other texts, times grad log q."""
    model = make(3, 2, seed=1)
    x = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    order = torch.tensor([[2, 0, 1], [1, 0, 2], [0, 1, 2]])
    drawn(monkeypatch, order)
    log_q_hat, log_q = model.order_log_probs(x, order)
    cost = log_q - log_q_hat - model.log_prob(x, order.argsort(1)).gather(1, order)

    want = 0
    for row, k in itertools.product(range(3), range(3)):
        others = sum(cost[other, k:].sum() for other in range(3) if other != row) / 2
        excess = cost[row, k:].sum() - others
        want = want + (cost[row, k] + excess.detach() * log_q[row, k]) / 9

    got = model.loss(x)[0]
    assert torch.allclose(gradient(got, model), gradient(want, model), atol=1e-12)


def test_metrics_of_the_loss():
    model = make()
    x = torch.randint(2, (8, 4))
    loss, m = model.loss(x)
    assert loss.requires_grad and not any(v.requires_grad for v in m.values())
    assert m["nelbo"].item() == pytest.approx((m["recon"] + m["order"]).item())
    left = model.order.log_q_way(x)[:, 0].exp().mean()
    assert m["left_share"].item() == pytest.approx(left.item())


def test_order_does_not_shape_the_network():
    """The cost of guessing the order reaches the order's own weights only."""
    model = make()
    log_q_hat, log_q = model.order_log_probs(torch.randint(2, (8, 4)), random_groups(8, 4))
    (log_q - log_q_hat).sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {f"order.{name}" for name, _ in model.order.named_parameters()}
    assert len(got) == 4


def test_parameter_groups_cover_the_order_alone():
    model = make()
    (group,) = model.parameter_groups()
    names = {id(p): name for name, p in model.named_parameters()}
    got = [names[id(p)] for p in group.pop("params")]
    assert sorted(got) == sorted(name for name in names.values() if name.startswith("order."))
    assert group == {"weight_decay": 0.0, "eps": 0.3, "starts_after": 1 / 3}


# ---- sampling ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_layer", [1, 2])
@torch.no_grad()
def test_samples_are_drawn_from_the_model(n_layer):
    """Texts and their orders, together."""
    model = make(3, 2, seed=2, n_layer=n_layer)
    g = torch.Generator().manual_seed(0)
    x, at = model.sample(torch.full((60_000, 3), 2), generator=g)
    log_p, log_q_hat, _ = listed(model, texts(3, 2))

    is_text = (x[:, None] == texts(3, 2)).all(2).double()  # (n, 8)
    is_order = (at.argsort(1)[:, None] == orders(3)).all(2).double()  # (n, 6)
    counts = (is_text.T @ is_order).flatten()
    assert (at.sort(1).values == torch.arange(3)).all()
    assert fits(counts, (log_p + log_q_hat).exp().flatten())


@torch.no_grad()
def test_given_tokens_are_read_first_in_the_same_order():
    """And then the rest comes from the model, given that they were read so."""
    model = make(4, 2, seed=3)
    z = torch.tensor([[2, 1, 2, 0]]).repeat(60_000, 1)
    x, at = model.sample(z, generator=torch.Generator().manual_seed(0))
    assert (at[:, [1, 3]] == -1).all() and (x[:, [1, 3]] == torch.tensor([1, 0])).all()

    p = {}  # of the two new tokens, and whether the first of them came first
    for order in orders(4).tolist():
        log_q_hat = model.order(torch.tensor([order]), model.order.log_q_hat_way()).sum()
        read = [i for i in order if i in (1, 3)] + [i for i in order if i in (0, 2)]
        for a, b in itertools.product(range(2), range(2)):
            row = torch.tensor([[a, 1, b, 0]])
            log_p = model.log_prob(row, torch.tensor([read]).argsort(1))[0, [0, 2]].sum()
            case = a, b, read.index(0) < read.index(2)
            p[case] = p.get(case, 0) + (log_q_hat + log_p).exp().item()

    first = at[:, 0] < at[:, 2]
    counts = [((x[:, 0] == a) & (x[:, 2] == b) & (first == f)).sum() for a, b, f in p]
    assert fits(torch.stack(counts), torch.tensor(list(p.values())))


@torch.no_grad()
def test_rows_with_different_gaps_in_one_batch():
    """Greedy, by steep weights: each row as if it were alone, with a cache and without."""
    model = make(5, 3, seed=4, random_share=0.0)
    z = torch.tensor([[3, 3, 3, 3, 3], [0, 3, 2, 3, 1], [1, 2, 0, 1, 3], [0, 1, 2, 0, 1]])
    for p in (model.order.log_weight_steps, model.order.q_logits, model.order.q_hat_logits):
        p *= 1000

    together = model.sample(z, temperature=0)
    for row, cache in itertools.product(range(4), (True, False)):
        x, at = model.sample(z[row : row + 1], temperature=0, cache=cache)
        assert torch.equal(x[0], together[0][row]) and torch.equal(at[0], together[1][row])
        assert torch.equal(at[0] >= 0, z[row] == 3)


def test_several_a_call():
    x, at = make(4, 3).sample(torch.full((50, 4), 3), per_step=3)
    assert (x < 3).all() and (at.sort(1).values == torch.tensor([0, 0, 0, 1])).all()


# ---- what else it can --------------------------------------------------------------------


@torch.no_grad()
def test_it_remains_an_a3():
    """Exact in any order, cached, and adapted from an ARM."""
    model = make(4, 3)
    x = texts(4)
    left = model.log_prob(x, chunk_groups(81, 4)).sum(1)
    assert left.exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(model.nelbo(x, order="left"), -left)

    g = torch.Generator()
    want = model.nelbo(x, order="random", generator=g.manual_seed(1))
    groups = random_groups(81, 4, generator=g.manual_seed(1))
    assert torch.allclose(want, -model.log_prob(x, groups).sum(1))
    torch.testing.assert_close(model.loss(x, groups)[0], want.mean() / 4)
    for by in ("left", "confidence", "random"):
        assert (model.sample(torch.full((2, 4), 3), by=by)[0] < 3).all()


def test_load_arm_leaves_the_order():
    model = make(4, 3)
    before = {name: p.clone() for name, p in model.order.state_dict().items()}
    torch.manual_seed(9)
    arm = lomdm.LoMDM(lomdm.Config(3, 4, 2, 2, 8, block_len=1))
    model.load_arm(arm.state_dict())
    assert torch.equal(model.wte.weight, arm.wte.weight)
    assert all(torch.equal(p, before[name]) for name, p in model.order.state_dict().items())


def test_shorter_texts_than_the_window():
    model = make(6, 2)
    log_p, log_q_hat, log_q = listed(model, texts(3, 2))
    assert (log_p + log_q_hat).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(log_q.exp().sum(1), torch.ones(8), atol=1e-10)
    assert (model.sample(torch.full((2, 3), 2))[0] < 2).all()


def test_bfloat16_is_close_to_float32():
    """The running sums are in float32, or the order would be lost."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = LoA3(loa3.Config(5, 64, 2, 2, 32)).eval()
    torch.nn.init.normal_(model.order.token_logits, std=0.1)  # the steps are 6 nats each
    x = torch.randint(5, (4, 64))
    order = torch.arange(64).expand(4, 64)

    want = model.order_log_probs(x, order)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.order_log_probs(x, order)
    rounded = model.bfloat16().order_log_probs(x, order)  # its weights are rounded themselves

    for a, b, c in zip(got, want, rounded, strict=True):
        assert a.dtype == c.dtype == torch.float32
        assert torch.allclose(a, b, atol=0.02) and torch.allclose(a, c, atol=0.1)


def test_loss_compiles_to_one_graph():
    model = make(6, 3)
    x = torch.randint(3, (4, 6))
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager")
    results = []
    for loss_of in (model.loss, compiled):
        torch.manual_seed(3)
        model.zero_grad()
        loss, _ = loss_of(x)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_errors():
    model = make()
    long = torch.zeros(2, 5).long()
    with pytest.raises(ValueError, match="must both be"):
        model.order_log_probs(long[:, :4], long[:, :3])
    for method in (model.loss, model.nelbo, model.order_log_weights):
        with pytest.raises(ValueError, match="do not fit"):
            method(long)
    with pytest.raises(ValueError, match="n_draws must be at least 1, not 0"):
        model.nelbo(long[:, :4], 0)
    with pytest.raises(ValueError, match="per_step must be at least 1, not 0"):
        model.sample(long[:, :4], per_step=0)
    with pytest.raises(ValueError, match="at least 2 in a batch"):  # one has no baseline
        model.loss(long[:1, :4])
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="random_share must be in"):
            loa3.Config(3, 4, 1, 2, 8, random_share=share)
