"""
The learned order of a3.py against exact enumeration, in float64: with 4 positions there are 24
orders, with 2 or 3 tokens 16 or 81 texts, and everything that (7) says can be listed.
"""

import itertools
import math

import pytest
import torch

import a3
import lomdm
from a3 import A3, Config, chunk_groups, random_groups


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(L=4, V=2, seed=0, n_layer=2, **kw):
    """Weights that are all random and large, those of the order too, in all three readings."""
    torch.manual_seed(seed)
    share = {"random_share": 0.2} | kw
    model = A3(Config(V, L, n_layer, n_head=2, n_embd=8, learn_order=True, **share))
    for name, p in model.named_parameters():
        order, mean = name.startswith("order."), float(p.ndim == 1)
        torch.nn.init.normal_(p, 0.0 if order else mean, 4 / model.order.speed if order else 0.5)
    return model.eval()


def texts(L, V):
    return torch.tensor(list(itertools.product(range(V), repeat=L)))  # (V^L, L)


def orders(L):
    return torch.tensor(list(itertools.permutations(range(L))))  # (L!, L)


def listed(model, x):
    """For each order of each text: log p, log q_hat and log q of all of it, (texts, orders)."""
    every = orders(x.shape[1])
    n, m = len(x), len(every)
    rows, order = x.repeat_interleave(m, 0), every.repeat(n, 1)
    log_q_hat, log_q = model.order_log_probs(rows, order)
    log_p = model.log_prob(rows, order.argsort(1))
    return [t.sum(1).view(n, m) for t in (log_p, log_q_hat, log_q)]


def chi_square(counts, p):
    """How many standard deviations above its mean the statistic is; rare cells count as one."""
    expected = p.detach() * counts.sum()
    rare = expected < 5
    counts, expected = (torch.cat((t[~rare], t[rare].sum()[None])) for t in (counts, expected))
    assert len(expected) > 4 and expected[-1] < 0.1 * counts.sum()
    counts, expected = (t if expected[-1] >= 5 else t[:-1] for t in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    free = len(expected) - 1
    return (statistic - free) / math.sqrt(2 * free)


# ---- the model and its bound ---------------------------------------------------------------------
@pytest.mark.parametrize("L, V, n_layer", [(4, 2, 2), (3, 3, 1), (4, 3, 3)])
def test_probabilities_of_texts_and_orders_sum_to_one(L, V, n_layer):
    log_p, log_q_hat, log_q = listed(make(L, V, seed=2, n_layer=n_layer), texts(L, V))
    assert (log_p + log_q_hat).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(log_q.exp().sum(1), torch.ones(V**L), atol=1e-10)
    assert log_q.exp().amax(1).mean() > 2 / math.factorial(L), "q is not far from uniform"
    assert (log_q - log_q_hat).abs().max() > 0.5, "nor from q_hat"


def naive_log_q(model, shares, order):
    """One order (a list) of a mixture of races with these shares, by its definition: at each step
    the mean over readings, by what they now weigh, of exp(s_i) / the sum of those that are left."""
    s, weigh, steps = model.order.log_weights(len(order)), shares.exp(), []
    for k, i in enumerate(order):
        p = s[:, i].exp() / s[:, order[k:]].exp().sum(1)  # (3,)
        steps.append((weigh * p).sum().log())
        weigh = weigh * p / (weigh * p).sum()
    return torch.stack(steps)


def test_log_q_is_a_mixture_of_races_step_by_step():
    model, x = make(), texts(4, 2)[5:7]
    prior, shares = model.order.ways()[0], model.order.ways(x)
    for order in orders(4):
        log_q_hat, log_q = model.order_log_probs(x, order.expand_as(x))
        for row in range(2):
            want = naive_log_q(model, prior, order.tolist())
            assert torch.allclose(log_q_hat[row], want, atol=1e-10)
            want = naive_log_q(model, shares[row], order.tolist())
            assert torch.allclose(log_q[row], want, atol=1e-10)


def test_each_kind_of_token_has_a_vote():
    """However often it is there, and wherever. q_hat does not hear them."""
    model = make(4, 3)
    votes, favour = (model.order.speed * p for p in (model.order.votes, model.order.favour))
    for row in ([0, 0, 1, 0], [1, 1, 0, 1]):
        want = ((votes[0] + votes[1]) / math.sqrt(2) + favour[0]).softmax(0) * 0.8
        got = model.order.ways(torch.tensor([row]))[0].exp()
        assert torch.allclose(got, torch.cat((want, torch.tensor([0.2]))), atol=1e-12)
    got = model.order.ways()[0].exp()
    assert torch.allclose(got[:2], 0.8 * favour[1].softmax(0), atol=1e-12) and got[2] == 0.2


def test_bound_is_the_exact_likelihood_and_what_q_does_not_know():
    """-log p(x) = the bound - KL(q || p(order | x)), text by text."""
    log_p, log_q_hat, log_q = listed(make(4, 3), texts(4, 3))
    exact = -(log_p + log_q_hat).logsumexp(1)
    bound = (log_q.exp() * (log_q - log_q_hat - log_p)).sum(1)
    posterior = log_p + log_q_hat + exact[:, None]
    gap = (log_q.exp() * (log_q - posterior)).sum(1)
    assert torch.allclose(bound - exact, gap, atol=1e-10) and (gap > 1e-3).all()


def drawn(monkeypatch, order):
    """Every race comes out like this."""
    monkeypatch.setattr(a3, "race", lambda s, generator=None: order)


def test_nelbo_has_the_bound_as_its_mean(monkeypatch):
    model, x = make(4, 3), texts(4, 3)
    log_p, log_q_hat, log_q = listed(model, x)
    want, got = (log_q.exp() * (log_q - log_q_hat - log_p)).sum(1), 0
    for i, order in enumerate(orders(4)):
        drawn(monkeypatch, order.expand_as(x))
        nats = model.nelbo(x)
        assert nats.shape == (81,)
        got = got + log_q[:, i].exp() * nats
    assert torch.allclose(got, want, atol=1e-10)


def test_nelbo_averages_over_its_draws(monkeypatch):
    model, x, every = make(), texts(4, 2), orders(4)
    drawn(monkeypatch, every[3].expand_as(x))
    one = model.nelbo(x)
    drawn(monkeypatch, every[8].expand_as(x))
    other, turn = model.nelbo(x), itertools.cycle((3, 8))
    monkeypatch.setattr(a3, "race", lambda s, generator=None: every[next(turn)].expand_as(x))
    assert torch.allclose(model.nelbo(x, 2), (one + other) / 2) and (one != other).all()


def test_orders_are_drawn_from_q():
    model, x, every = make(), texts(4, 2)[5], orders(4)
    shares = model.order.ways(x.expand(60_000, 4))
    found = model.order.draw(shares, 4, torch.Generator().manual_seed(0))
    counts = (found[:, None] == every).all(2).sum(0).double()
    p = model.order_log_probs(x.expand_as(every), every)[1].sum(1).exp()
    assert abs(chi_square(counts, p)) < 4


# ---- training ------------------------------------------------------------------------------------
def gradient(loss, model):
    g = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([p.flatten() for p in g])


@pytest.mark.parametrize("random_share", [0.0, 0.2])
def test_expected_gradient_of_the_loss_is_that_of_the_bound(monkeypatch, random_share):
    """Over all pairs of orders of two texts: autograd through the bound."""
    model = make(3, 2, seed=1, random_share=random_share)
    x, every = torch.tensor([[0, 1, 1], [0, 0, 0]]), orders(3)
    log_p, log_q_hat, log_q = listed(model, x)
    bound = (log_q.exp() * (log_q - log_q_hat - log_p)).sum(1).mean() / 3
    want, q, total, value = gradient(bound, model), log_q.exp().detach(), 0, 0
    for i, j in itertools.product(range(6), repeat=2):
        drawn(monkeypatch, every[[i, j]])
        loss, metrics = model.order_loss(x)
        p = (q[0, i] * q[1, j]).item()
        total, value = total + p * gradient(loss, model), value + p * metrics["nelbo"]
    assert torch.allclose(total, want, atol=1e-9)
    assert value.item() == pytest.approx(bound.item(), abs=1e-9)
    names = [name for name, p in model.named_parameters() for _ in p.flatten()]
    for part in ("order.steps", "order.votes", "order.favour", "wte", "lm_head"):
        mine = torch.tensor([name == part or name.startswith(part + ".") for name in names])
        assert (want[mine].abs() > 1e-6).any(), part  # a part that matters


def test_a_choice_answers_for_what_comes_after_it(monkeypatch):
    """The loss's surrogate by hand, for an order of each of three texts: of each step, its cost and
    those after it, less the mean of the same of the other texts, times grad log q."""
    model, x = make(3, 2, seed=1), torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    order = torch.tensor([[2, 0, 1], [1, 0, 2], [0, 1, 2]])
    drawn(monkeypatch, order)
    log_q_hat, log_q = model.order_log_probs(x, order)
    nll = -model.log_prob(x, order.argsort(1)).gather(1, order)
    cost, want = (nll + log_q - log_q_hat), 0
    for row, k in itertools.product(range(3), range(3)):
        others = sum(cost[other, k:].sum() for other in range(3) if other != row) / 2
        better = cost[row, k:].sum() - others
        want = want + (cost[row, k] + better.detach() * log_q[row, k]) / 9
    got = model.order_loss(x)[0]
    assert torch.allclose(gradient(got, model), gradient(want, model), atol=1e-12)


def test_metrics_of_the_loss():
    model, x = make(), torch.randint(2, (8, 4))
    loss, m = model.order_loss(x)
    assert loss.requires_grad and not any(v.requires_grad for v in m.values())
    assert m["nelbo"].item() == pytest.approx((m["recon"] + m["order"]).item())
    assert m["left_share"].item() == pytest.approx(model.order.ways(x)[:, 0].exp().mean().item())
    torch.manual_seed(5)
    one = model.loss(x)[0]
    torch.manual_seed(5)
    assert one.item() == model.order_loss(x)[0].item()  # loss() without groups is that


def test_order_does_not_shape_the_network():
    """The cost of guessing the order reaches the order's own weights only."""
    model, x = make(), torch.randint(2, (8, 4))
    log_q_hat, log_q = model.order_log_probs(x, random_groups(8, 4))
    (log_q - log_q_hat).sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {"order.steps", "order.votes", "order.favour"}


# ---- the two ends --------------------------------------------------------------------------------
def test_a_new_order_costs_nothing():
    """q = q_hat: left to right for two texts of three, and about so, right to left for one."""
    torch.manual_seed(0)
    model = A3(Config(5, 6, 2, 2, 8, learn_order=True)).eval()
    x = torch.randint(5, (7, 6))
    log_q_hat, log_q = model.order_log_probs(x, random_groups(7, 6))
    assert torch.allclose(log_q, log_q_hat, rtol=0, atol=1e-6)
    shares = torch.tensor([2 / 3, 1 / 3, 0.0])
    assert torch.allclose(model.order.ways(x).exp(), shares.expand(7, 3))
    assert torch.allclose(model.order_log_weights(x), -6 * torch.arange(1, 7.0).expand(7, 6))
    backwards = torch.arange(5, -1, -1).expand(7, 6)
    got = model.order_log_probs(x, backwards)[1].exp()
    assert torch.allclose(got[:, 0], torch.full((7,), 1 / 3), atol=0.002)
    right = torch.sigmoid(torch.tensor(6.0))  # of two neighbours the right one first
    assert torch.allclose(got[:, 4], right.expand(7), atol=1e-6)


def test_a_uniform_order_is_that_of_a3():
    torch.manual_seed(0)
    model = A3(Config(5, 6, 2, 2, 8, learn_order=True)).eval()
    torch.nn.init.zeros_(model.order.steps)
    x = torch.randint(5, (7, 6))
    log_q_hat, log_q = model.order_log_probs(x, random_groups(7, 6))
    assert torch.allclose(log_q, log_q_hat, rtol=0, atol=1e-12)
    assert torch.allclose(log_q, -torch.arange(6, 0, -1.0).log().expand(7, 6))
    g = torch.Generator()
    order = model.order.draw(model.order.ways(x), 6, g.manual_seed(3))
    want = -model.log_prob(x, order.argsort(1)).sum(1)  # A3's, in the same random order
    assert torch.allclose(model.nelbo(x, generator=g.manual_seed(3)), want)


def test_infinitely_steep_weights_are_the_arm():
    torch.manual_seed(0)
    arm = lomdm.LoMDM(lomdm.Config(5, 6, 2, 2, 8, block_len=1)).eval()
    model = A3(Config(5, 6, 2, 2, 8, learn_order=True)).eval()
    model.load_arm(arm.state_dict())
    torch.nn.init.constant_(model.order.steps, 50.0)
    x = torch.randint(5, (7, 6))
    assert torch.allclose(model.nelbo(x), arm.nelbo(x), atol=1e-9)
    left = model.sample(torch.full((3, 6), 5), generator=torch.Generator().manual_seed(0))[1]
    assert torch.equal(left, torch.arange(6).expand(3, 6))


def test_steps_of_the_weights():
    """s_j = - sum_{i <= j} speed steps_i: where that is large, i comes long after i - 1. Of the two
    readings, that which the text's tokens vote for; and s = 0 where all is random."""
    model = A3(Config(5, 4, 1, 2, 8, learn_order=True))
    with torch.no_grad():
        model.order.steps[1] = torch.tensor([9.0, 0.5, -0.25, 1.0])
        model.order.votes[3, 1] = 1.0
    want = model.order.speed * torch.tensor([-9.0, -9.5, -9.25, -10.25])
    x = torch.tensor([[0, 1, 2, 4], [0, 1, 2, 3]])
    assert torch.allclose(model.order_log_weights(x)[1], want)
    assert torch.allclose(model.order_log_weights(x)[0], -6 * torch.arange(1.0, 5.0))
    assert (model.order.log_weights(4)[2] == 0).all()


def test_share_in_random_order():
    """For q and q_hat alike, whatever the votes."""
    model = make(4, 3, random_share=0.3)
    for shares in (model.order.ways(texts(4, 3)), model.order.ways().expand(81, 3)):
        assert torch.allclose(shares[:, 2].exp(), torch.full((81,), 0.3))
        assert torch.allclose(shares.exp().sum(1), torch.ones(81))


# ---- sampling ------------------------------------------------------------------------------------
def count(x, at, V):
    """How often each text came in each order, (V^L, L!)."""
    L, every = x.shape[1], orders(x.shape[1])
    text = (x * V ** torch.arange(L - 1, -1, -1)).sum(1)
    order = (at.argsort(1)[:, None] == every).all(2).int().argmax(1)
    return torch.zeros(V**L * len(every)).index_add(
        0, text * len(every) + order, torch.ones(len(x))
    )


@pytest.mark.parametrize("n_layer", [1, 2])
def test_samples_are_drawn_from_the_model(n_layer):
    """Texts and their orders, together."""
    model, g = make(3, 2, seed=2, n_layer=n_layer), torch.Generator().manual_seed(0)
    x, at = model.sample(torch.full((60_000, 3), 2), generator=g)
    assert torch.equal(at.sort(1).values[0], torch.arange(3))
    log_p, log_q_hat, _ = listed(model, texts(3, 2))
    assert abs(chi_square(count(x, at, 2), (log_p + log_q_hat).exp().flatten())) < 4


def test_given_tokens_are_read_first_in_the_same_order():
    """And then the rest comes from the model, given that they were read so."""
    model, g = make(4, 2, seed=3), torch.Generator().manual_seed(0)
    z, n = torch.tensor([[2, 1, 2, 0]]), 60_000
    x, at = model.sample(z.repeat(n, 1), generator=g)
    assert (at[:, [1, 3]] == -1).all() and (x[:, [1, 3]] == torch.tensor([1, 0])).all()
    prior, p = model.order.ways(), {}
    for order in orders(4).tolist():
        q_hat = model.order(torch.tensor([order]), prior).sum().exp()
        read = [i for i in order if i in (1, 3)] + [i for i in order if i in (0, 2)]
        for a, b in itertools.product(range(2), range(2)):
            row = torch.tensor([[a, 1, b, 0]])
            log_p = model.log_prob(row, torch.tensor([read]).argsort(1))[0, [0, 2]].sum()
            case = a, b, read.index(0) < read.index(2)
            p[case] = p.get(case, 0) + (q_hat * log_p.exp()).item()
    assert sum(p.values()) == pytest.approx(1, abs=1e-9)
    first = at[:, 0] < at[:, 2]
    counts = [((x[:, 0] == a) & (x[:, 2] == b) & (first == f)).sum() for a, b, f in p]
    assert abs(chi_square(torch.stack(counts).double(), torch.tensor(list(p.values())))) < 4


def test_rows_with_different_gaps_in_one_batch():
    """Greedy, by steep weights: each row as if it were alone."""
    model = make(5, 3, seed=4, random_share=0.0)
    z = torch.tensor([[3, 3, 3, 3, 3], [0, 3, 2, 3, 1], [1, 2, 0, 1, 3], [0, 1, 2, 0, 1]])
    with torch.no_grad():
        model.order.steps *= 1000
        model.order.favour *= 1000
    both = model.sample(z, temperature=0)
    for row in range(4):
        x, at = model.sample(z[row : row + 1], temperature=0)
        assert torch.equal(x[0], both[0][row])
        assert torch.equal(at[0] >= 0, z[row] == 3) and torch.equal(at[0] < 0, both[1][row] < 0)


def test_several_a_call():
    model = make(4, 3)
    x, at = model.sample(torch.full((50, 4), 3), per_step=3)
    assert (x < 3).all() and (at.sort(1).values == torch.tensor([0, 0, 0, 1])).all()


# ---- the likelihood of a decoder -----------------------------------------------------------------
RULES = ("left", "confidence", "entropy", "margin", "order")


@pytest.mark.parametrize("per_step", [1, 2, 3])
@pytest.mark.parametrize("by", RULES)
def test_what_a_decoder_may_write_sums_to_one(by, per_step):
    model = make(4, 3)
    log_p = model.decoder_log_prob(texts(4, 3), by, per_step)
    assert log_p.shape == (81,)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("by", RULES)
def test_a_decoder_is_a_walk(by):
    """One position at a time: look at all that is open, take the best, pay for its true token."""
    model, x = make(4, 3, seed=5), texts(4, 3)[[7, 40, 66]]
    for row in x:
        done, total = [], 0.0
        while len(done) < 4:
            rest = [i for i in range(4) if i not in done]
            groups = torch.full((1, 4), 9)  # what is open is one group, after what was taken
            groups[0, done] = torch.arange(len(done))
            log_p = model(row[None], groups)[0].log_softmax(-1)  # (4, 3)
            p = log_p.exp().sort(-1, descending=True).values
            reading = model.order.ways().argmax()
            s_hat = model.order.log_weights(4)[reading, rest].tolist()
            p, log_p_rest = p[rest], log_p[rest]
            score = {
                "left": [-i for i in rest],
                "confidence": p[:, 0].tolist(),
                "entropy": (log_p_rest.exp() * log_p_rest).sum(1).tolist(),
                "margin": (p[:, 0] - p[:, 1]).tolist(),
                "order": s_hat,
            }[by]
            best = score.index(max(score))
            done.append(rest[best])
            total += log_p[done[-1], row[done[-1]]].item()
        got = model.decoder_log_prob(row[None], by)
        assert got.item() == pytest.approx(total, abs=1e-9)


def test_a_random_decoder_has_no_likelihood():
    with pytest.raises(ValueError, match="see nelbo.., their bound"):
        make().decoder_log_prob(torch.zeros(1, 4).long(), "random")


# ---- what else it can ----------------------------------------------------------------------------
def test_it_remains_an_a3():
    """Exact in any order, cached, and adapted from an ARM."""
    model, x = make(4, 3), texts(4, 3)
    assert model.nelbo(x, size=0).exp().neg().shape == (81,)
    left = model.log_prob(x, chunk_groups(81, 4)).sum(1)
    assert left.exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(model.nelbo(x, size=0), -left)
    g = torch.Generator()
    want = model.nelbo(x, size=1, generator=g.manual_seed(1))
    groups = random_groups(81, 4, generator=g.manual_seed(1))
    assert torch.allclose(want, -model.log_prob(x, groups).sum(1))
    for by in ("left", "confidence", "random"):
        assert (model.sample(torch.full((2, 4), 3), by=by)[0] < 3).all()


def test_shorter_texts_than_the_window():
    model = make(6, 2)
    log_p, log_q_hat, log_q = listed(model, texts(3, 2))
    assert (log_p + log_q_hat).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(log_q.exp().sum(1), torch.ones(8), atol=1e-10)
    assert (model.sample(torch.full((2, 3), 2))[0] < 2).all()


def test_errors():
    plain = A3(Config(3, 4, 1, 2, 8))
    with pytest.raises(ValueError, match="'order' only if learned"):
        plain.sample(torch.full((1, 4), 3), by="order")
    with pytest.raises(ValueError, match="must both be"):
        make().order_log_probs(torch.zeros(2, 4).long(), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="do not fit"):
        make().order_loss(torch.zeros(2, 5).long())
    with pytest.raises(ValueError, match="do not fit"):
        make().order_log_weights(torch.zeros(2, 5).long())


def test_bfloat16_is_close_to_float32():
    """The running sums are in float32, or the order would be lost."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = A3(Config(5, 64, 2, 2, 32, learn_order=True)).eval()
    torch.nn.init.normal_(model.order.votes, std=0.1)  # the steps are 6 nats each, 384 in all
    x, order = torch.randint(5, (4, 64)), torch.arange(64).expand(4, 64)
    want = model.order_log_probs(x, order)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.order_log_probs(x, order)
    also = model.bfloat16().order_log_probs(x, order)  # its weights are rounded themselves
    for a, b, c in zip(got, want, also, strict=True):
        assert a.dtype == c.dtype == torch.float32
        assert torch.allclose(a, b, atol=0.02) and torch.allclose(a, c, atol=0.1)


def test_a_batch_of_one_is_refused():
    """It has no baseline: the order would stay as it is, without a word."""
    with pytest.raises(ValueError, match="at least 2 in a batch"):
        make(4, 3).loss(torch.randint(3, (1, 4)))


def test_no_draws_are_refused():
    x = torch.randint(3, (2, 4))
    for model in (make(4, 3), A3(Config(3, 4, 1, 2, 16))):
        with pytest.raises(ValueError, match="and n_draws, not 0"):
            model.nelbo(x, 0)


def test_without_an_order_the_loss_is_that_of_random_ones():
    model, x = A3(Config(5, 6, 1, 2, 16)), torch.randint(5, (4, 6))
    torch.manual_seed(3)
    loss, metrics = model.loss(x)
    torch.manual_seed(3)
    want = -model.log_prob(x, random_groups(4, 6)).mean()
    assert torch.equal(loss, want) and torch.equal(metrics["nelbo"], want)


def test_loss_compiles_to_one_graph():
    model, x = make(6, 3), torch.randint(3, (4, 6))
    results = []
    for loss_of in (
        model.loss,
        torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager"),
    ):
        torch.manual_seed(3)
        model.zero_grad()
        loss, _ = loss_of(x)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
