"""
The claims of the papers, and the tests that hold them against enumeration in float64.

    claim                                                              test
    ---------------------------------------------------------------------------------------
    The probabilities of all texts sum to one: LoMDM                   test_lomdm_sums_to_one_*
        A3, in any groups and given any tokens                         test_a3_sums_to_one
        LoA3, of texts and orders together                             test_loa3_sums_to_one

    LoMDM (arXiv:2602.02112)
    the six lines at the top of lomdm.py are the bound of an MDM       test_six_lines_*
    an ARM is the chain rule                                           test_arm_*
    an MDM is the mean over all orders, whatever the schedule          test_mdm_*
    all blocks in one pass are the blocks one by one                   test_block_fast_path_*
    LoMDM contains MDM: heads at zero, or c2 = 0                       test_lomdm_contains_mdm
        and begins as one                                              test_a_new_lomdm_*
    only c2 / c1 counts                                                test_only_c2_over_c1_*
    the race is a Plackett-Luce ranking                                test_race_*
    -log p  <=  the bound over orders  <=  the papers' bound           test_lomdm_sums_*, too
    the papers' bound is an integral over time                         test_paper_bound_*
    the mean of the loss, and of its gradient, is the bound's          test_loss_and_gradient_*
        and at a random time, the papers' bound's                      test_time_form_*

    A3 (arXiv:2601.13228)
    two streams in one pass are a double loop over groups              test_a3_is_the_naive_*
    two groups are one step of a masked diffusion model                test_two_groups_*
    a GPT that was loaded predicts what it predicted                   test_adapted_arm_*

    LoA3 (both)
    with a uniform order it is A3, with a steep one the ARM            test_uniform_*, steep
    the mean of the loss, and of its gradient, is the bound's          test_loa3_loss_*

oracle.py adds up the likelihood, equation (1) of lomdm.py, and the bound, equation (2), order
by order. Here all else is held against that. test_lomdm.py, test_a3.py and test_loa3.py test
the rest: samples, caches, leaks; and test_models.py what holds for all models.
"""

import itertools
import math
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    V,
    bounds,
    every_model,
    exact,
    mean_over,
    orders,
    same_gradients,
    seeded,
    texts,
    token_log_probs,
)

import a3
import lomdm
from beyond import loa3

pytestmark = pytest.mark.usefixtures("float64")
every_length = pytest.mark.parametrize("L", [3, 4])  # 3 is shorter than the window


def whole_blocks(kw, L):
    """L, or less so that it is whole blocks."""
    return L - L % min(L, kw.get("block_len", 4))


# ---- probabilities of all texts sum to one -----------------------------------------------


@torch.no_grad()
def test_a3_sums_to_one():
    """Every ordered partition of 4 positions, and some of 5. Where tokens are given, the sum
    is over what fills the gaps, for each choice of given ones."""
    for groups in (*oracle.partitions(4), *oracle.RAGGED):
        L = len(groups)
        x = texts(L)

        log_p = oracle.make_a3(L).log_prob(x, groups.repeat(len(x), 1))

        assert (log_p[:, groups < 0] == 0).all() and (log_p[:, groups >= 0] < 0).all()
        given = (x * (groups < 0) * V ** torch.arange(L)).sum(1)  # a number for each choice
        total = torch.zeros(V**L).scatter_add(0, given, log_p.sum(1).exp())[given.unique()]
        assert len(total) == V ** int((groups < 0).sum())
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("L, vocab_size, seq_len", [(4, 2, 4), (3, 3, 3), (3, 2, 6)])
@torch.no_grad()
def test_loa3_sums_to_one(L, vocab_size, seq_len):
    model = oracle.make_loa3(seq_len, seed=2, vocab_size=vocab_size)

    log_p, log_q_hat, log_q = oracle.list_loa3(model, texts(L, vocab_size))

    assert (log_p + log_q_hat).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(log_q.exp().sum(1), torch.ones(vocab_size**L), atol=1e-10)
    assert log_q.exp().amax(1).mean() > 2 / math.factorial(L), "q is not far from uniform"
    assert (log_q - log_q_hat).abs().max() > 0.5, "nor from q_hat"


# ---- the members of LoMDM ----------------------------------------------------------------


def six_lines(model, x, turn, k):
    """The loss of the training step that lomdm.py begins with. It is taken from there and
    executed, with these draws: turn (B, L) of the positions, and counts k (B, 1)."""
    start = lomdm.__doc__.index("    turn = ")
    lines = [line.strip() for line in lomdm.__doc__[start:].splitlines()[:6]]

    random = SimpleNamespace(
        rand=lambda B, L: turn.argsort(1).double(),  # its argsort is turn
        randint=lambda high, shape: k,
    )
    names = dict(B=len(x), L=x.shape[1], x=x, mask_id=model.mask_id, torch=random, F=F)
    names["model"] = lambda z: model.logits(model.features(z))
    exec("\n".join(lines), names)
    return names["loss"]


@pytest.mark.parametrize("text", [0, 17, 58])
def test_six_lines_are_the_bound_and_the_loss_of_an_mdm(text, monkeypatch):
    """In a batch of one text with each order and each count once. They are the bound per
    token, and LoMDM.loss() does the same with the same draws."""
    model = oracle.make_lomdm()
    cases = list(itertools.product(orders(4), range(4)))
    turn = torch.stack([order for order, _ in cases])
    k = torch.tensor([[k] for _, k in cases])
    monkeypatch.setattr(lomdm, "race", lambda w: turn.argsort(1).view(w.shape))
    monkeypatch.setattr(lomdm, "stratified_counts", lambda *shape, **how: k)
    one = texts(4)[[text]]
    x = one.expand(len(cases), 4)

    _, bound, _ = exact(model, one)
    loss, _ = model.loss(x)

    torch.testing.assert_close(six_lines(model, x, turn, k), bound[0] / 4)
    torch.testing.assert_close(loss, bound[0] / 4)
    same_gradients(model, six_lines(model, x, turn, k), bound[0] / 4)
    same_gradients(model, loss, exact(model, one)[1][0] / 4)


@torch.no_grad()
def test_arm_is_the_chain_rule():
    """Predict each token from a text that is hidden from there on, and add up."""
    model = oracle.make_lomdm(block_len=1)
    x = texts(4)
    chain = 0
    for i in range(4):
        z = torch.where(torch.arange(4) < i, x, model.mask_id)
        chain = chain - token_log_probs(model, z, x)[:, i]

    torch.testing.assert_close(exact(model, x)[0], chain)
    torch.testing.assert_close(model.nelbo(x), chain)  # in one causal pass
    torch.testing.assert_close(model.loss(x)[0], chain.mean() / 4)


SCHEDULES = {  # alpha(t) and its derivative
    "linear": (lambda t: 1 - t, lambda t: -torch.ones_like(t)),
    "cosine": (
        lambda t: (math.pi / 2 * t).cos(),
        lambda t: -math.pi / 2 * (math.pi / 2 * t).sin(),
    ),
    "polynomial": (lambda t: 1 - t**3, lambda t: -3 * t**2),
}


@pytest.mark.parametrize("alpha, slope", SCHEDULES.values(), ids=SCHEDULES.keys())
@torch.no_grad()
def test_mdm_is_the_mean_over_orders_whatever_the_schedule(alpha, slope):
    model = oracle.make_lomdm()
    x = texts(4)[::5]
    look = oracle.look_at(model, x)
    mean = 0
    for order in orders(4).tolist():
        z = torch.full_like(x, model.mask_id)
        for i in order:
            mean = mean - token_log_probs(model, z, x)[:, i] / 24
            z[:, i] = x[:, i]

    def rate(t):
        a = alpha(t).expand(x.shape)
        velocity = (-slope(t) / (1 - alpha(t))).expand(x.shape)
        return oracle.rate_by_masks(look, x, a, velocity, lambda w_hat: velocity)

    torch.testing.assert_close(exact(model, x)[1], mean)
    by_time = oracle.time_integral(rate, nodes=30, power=1)
    torch.testing.assert_close(by_time, mean, rtol=1e-9, atol=0)


@pytest.mark.parametrize("L", [6, 4, 2])
@torch.no_grad()
def test_block_fast_path_is_the_generic_model(L):
    """A pass over [noisy | clean] predicts every block as if it were looked at alone, behind
    clean blocks and before hidden ones."""
    model = oracle.make_lomdm(L=6, block_len=2, learn_order=True)
    x = torch.randint(V, (5, L))
    hidden = torch.rand(5, L) < 0.5

    token_nll, w_hat = model.predict_masked(x, hidden.view(5, -1, 2))

    for b in range(0, L, 2):
        here = slice(b, b + 2)
        later = torch.arange(L) >= b + 2
        is_here = ~later & (torch.arange(L) >= b)
        z = x.masked_fill(hidden & is_here | later, model.mask_id)
        want = -token_log_probs(model, z, x)[:, here] * hidden[:, here]
        torch.testing.assert_close(token_nll[:, b // 2], want)
        torch.testing.assert_close(w_hat[:, b // 2], model.order_weights_hat(z)[:, here])


@pytest.mark.parametrize("block_len", [2, 4])
@torch.no_grad()
def test_lomdm_contains_mdm(block_len):
    """With c2 = 0, or with heads whose linear maps are zero: the same likelihood, bounds and
    estimates."""
    x = texts(4)
    mdm = oracle.make_lomdm(block_len=block_len)
    no_c2 = oracle.make_lomdm(block_len=block_len, learn_order=True, c2=0.0)
    zero_heads = oracle.make_lomdm(block_len=block_len, learn_order=True)
    torch.nn.init.zeros_(zero_heads.g.score.weight)
    torch.nn.init.zeros_(zero_heads.g_hat.score.weight)

    for model in (no_c2, zero_heads):
        model.load_state_dict(mdm.state_dict(), strict=False)
        assert torch.equal(model.order_weights(x), torch.full((81, 4), 0.7))
        torch.testing.assert_close(exact(model, x), exact(mdm, x))
        got, want = (m.nelbo(x, 1, "jump", seeded(1)) for m in (model, mdm))
        torch.testing.assert_close(got, want)


def test_a_new_lomdm_is_an_mdm():
    model = lomdm.LoMDM(lomdm.Config(V, 4, 1, 1, 4, learn_order=True))

    assert torch.equal(model.order_weights(texts(4)), torch.full((81, 4), 0.7))
    assert torch.equal(model.order_weights_hat(texts(4)), torch.full((81, 4), 0.7))


@torch.no_grad()
def test_only_c2_over_c1_matters():
    x = texts(4)
    one = oracle.make_lomdm(learn_order=True, c1=0.7, c2=0.6)
    doubled = oracle.make_lomdm(learn_order=True, c1=1.4, c2=1.2)
    other = oracle.make_lomdm(learn_order=True, c1=1.4, c2=0.6)

    torch.testing.assert_close(exact(doubled, x), exact(one, x))
    by_time = oracle.paper_bound_by_time(doubled, x[:9])  # twice as fast
    torch.testing.assert_close(by_time, exact(one, x[:9])[2], rtol=1e-6, atol=0)
    assert (exact(one, x)[1] - exact(other, x)[1]).abs().max() > 1e-3


def test_race_is_plackett_luce():
    """Each order is drawn with the probability that its next place has among those left, step
    by step, and a place without weight comes last. prefix_log_prob() tells the probability of
    the first k steps."""
    w = torch.tensor([0.2, 0.5, 1.0, 2.0, 0.0])
    every = F.pad(orders(4), (0, 1), value=4)
    steps = [[w[i] / w[order[k:]].sum() for k, i in enumerate(order)] for order in orders(4)]
    steps = torch.tensor(steps)  # (24, 4)

    drawn = lomdm.race(w.expand(100_000, 5), seeded(0))

    assert oracle.fits(oracle.count(drawn, every), steps.prod(1))
    for k in range(5):
        log_q = lomdm.prefix_log_prob(w.expand(24, 5), every, torch.full((24,), k))
        torch.testing.assert_close(log_q, steps[:, :k].log().sum(1))


# ---- the bounds of LoMDM, and their gradients --------------------------------------------


@every_model
@every_length
@torch.no_grad()
def test_lomdm_sums_to_one_and_is_below_its_bounds(kw, L):
    """The bound over orders is the smaller one, by what it costs to guess the times. An ARM's
    bound is its likelihood."""
    x = texts(whole_blocks(kw, L))

    neg_log_p, jump, paper = exact(oracle.make_lomdm(**kw), x)

    assert neg_log_p.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert (neg_log_p <= jump + 1e-12).all() and (jump <= paper + 1e-12).all()
    assert ((paper - jump).max() > 1e-3) == kw.get("learn_order", False)
    assert ((jump - neg_log_p).max() > 1e-3) == (kw.get("block_len") != 1)


@every_model
@every_length
@torch.no_grad()
def test_paper_bound_is_the_integral_over_time(kw, L):
    model = oracle.make_lomdm(**kw)
    x = texts(whole_blocks(kw, L))[::7]

    _, _, paper = exact(model, x)

    torch.testing.assert_close(oracle.paper_bound_by_time(model, x), paper, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "L,block_len,weights", [(3, 3, "normsig"), (3, 3, "exp"), (4, 2, "normsig")]
)
def test_loss_and_gradient_have_the_bounds_mean(L, block_len, weights, monkeypatch):
    """All draws of loss() are listed: two orders, and a count for each block."""
    model = oracle.make_lomdm(L=L, block_len=block_len, learn_order=True, weights=weights)
    x = torch.tensor([[2, 0, 1, 1][:L]])
    bound = exact(model, x)[1].sum() / L

    def values():
        loss, metrics = model.loss(x)
        return loss, metrics["nelbo"]

    loss, value = mean_over(list(oracle.lomdm_draws(model, x)), monkeypatch, values)

    torch.testing.assert_close(value, bound)
    same_gradients(model, loss, bound)


@pytest.mark.parametrize("weights", ["normsig", "exp"])
def test_weights_learn_from_texts_in_two_orders(weights, monkeypatch):
    """Of a text that is in the batch twice, one copy is drawn in two orders. All draws of the
    three rows are listed. The loss has the gradient of the bound, but for w: that comes from
    two rows of three."""
    model = oracle.make_lomdm(L=3, learn_order=True, weights=weights)
    x = torch.tensor([[2, 0, 1]])
    w = model.order_weights(x)[0].detach()

    draws = []
    for k in range(3):
        rows = [  # an order for each way to begin with k places, and its probability
            (order, lomdm.prefix_log_prob(w, order, torch.tensor(k)).exp())
            for order in orders(3)[:: math.factorial(3 - k)]
        ]
        for three in itertools.product(rows, repeat=3):
            order, q = (torch.stack(each) for each in zip(*three, strict=True))
            counts = {(lomdm, "stratified_counts"): torch.full((2, 1), k)}
            draws.append((q.prod() / 3, {(lomdm, "race"): order[:, None]} | counts))

    loss, _ = mean_over(draws, monkeypatch, lambda: (model.loss(x.repeat(2, 1))[0], w))

    bound = exact(model, x)[1].sum() / 3
    reads_w = [p for name, p in model.named_parameters() if name.startswith(("g.", "g_block."))]
    others = [p for name, p in model.named_parameters() if not name.startswith(("g.", "g_block."))]
    for parameters, share in ((reads_w, 2 / 3), (others, 1)):
        got = torch.autograd.grad(loss, parameters, retain_graph=True)
        want = torch.autograd.grad(bound, parameters, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, share * b, rtol=1e-9, atol=1e-11)


def test_more_of_the_middle(monkeypatch):
    """With middle_steps each step of the bound counts as often as it comes, in the loss and in
    its gradient. The metric is the bound as ever."""
    model = oracle.make_lomdm(L=3, learn_order=True)
    x = torch.tensor([[2, 0, 1]])
    often = torch.tensor([2 / 3, 5 / 3, 2 / 3])
    weighed = []
    for p, returns in oracle.lomdm_draws(model, x):
        (k,) = returns[lomdm, "stratified_counts"].flatten().tolist()
        weighed.append((p * often[k], returns))

    want, _ = mean_over(weighed, monkeypatch, lambda: (model.loss(x)[0], x))

    model.config.middle_steps = True
    monkeypatch.setattr(lomdm, "middle_counts", lambda k, K: (k, often))

    def values():
        loss, metrics = model.loss(x)
        return loss, metrics["nelbo"]

    loss, nelbo = mean_over(weighed, monkeypatch, values)
    torch.testing.assert_close(nelbo, exact(model, x)[1].sum() / 3)
    same_gradients(model, loss, want)


@pytest.mark.parametrize("block_len, t", [(3, 0.3), (3, 0.8), (1, 0.5), (2, 0.6)])
def test_time_form_has_the_papers_bound_as_its_mean(block_len, t, monkeypatch):
    """All draws at one time are listed. Their mean is the integrand of the papers' bound, and
    so is the mean of their gradients."""
    L = 4 if block_len == 2 else 3
    how = dict(block_len=block_len, learn_order=block_len > 1)
    model = oracle.make_lomdm(L, 0, lomdm.ByTime, **how)
    x = texts(L)[[7]]
    t = torch.tensor([[t]])
    rate = oracle.rate_of(model, x)(t).sum()

    def values():
        loss, metrics = model.loss(x, t)
        both = x.expand(1 + model.config.learn_order, L)  # as many noisy texts as in loss()
        nats = sum(lomdm.nelbo_at(model, both, t.expand(len(both), 1)))
        return loss, metrics["nelbo"], nats.mean()

    draws = list(oracle.by_time_draws(model, x, t))
    loss, value, nats = mean_over(draws, monkeypatch, values)

    torch.testing.assert_close(value, rate / L)
    torch.testing.assert_close(nats, rate)
    same_gradients(model, loss, rate / L)


# ---- A3 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("left_neighbour", [True, False])
@pytest.mark.parametrize("n_layer,seq_len", [(1, 5), (2, 5), (3, 9)])
def test_a3_is_the_naive_double_loop(n_layer, seq_len, left_neighbour):
    """One pass over two streams predicts what a loop over groups, and over the positions in
    them, predicts."""
    model = oracle.make_a3(seq_len, n_layer=n_layer, left_neighbour=left_neighbour)
    x = torch.randint(V, (8, 5))
    for groups in (oracle.RAGGED, a3.random_groups(8, 5)):
        want = oracle.naive_batch(model, x, groups)

        got = model(x, groups).masked_fill(groups[..., None] < 0, torch.nan)

        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)
        log_p = want.log_softmax(-1).gather(-1, x[..., None])[..., 0].nan_to_num(0.0)
        torch.testing.assert_close(model.log_prob(x, groups), log_p, rtol=0, atol=1e-10)
        mean = -log_p.sum() / (groups >= 0).sum()
        torch.testing.assert_close(model.loss(x, groups)[0], mean)


@pytest.mark.parametrize("visible", [[1], [0, 3], [1, 2, 4]])
@torch.no_grad()
def test_two_groups_are_a_masked_diffusion_step(visible):
    """Given what is visible the rest is independent: what predicts one token is the same,
    whatever the other hidden ones are. And it makes no difference whether visible tokens are
    given, or were predicted before, one by one from left to right."""
    model = oracle.make_a3()
    x = texts(5)
    shown = torch.zeros(5, dtype=torch.bool)
    shown[visible] = True

    def probs(groups):  # of the texts that agree in what is visible, one a row
        logits = model(x, groups.repeat(len(x), 1))[:, ~shown]
        same = (x[:, shown] * V ** torch.arange(len(visible))).sum(1).argsort(stable=True)
        return logits.softmax(-1)[same].unflatten(0, (V ** len(visible), -1))

    step = probs(torch.where(shown, 0, 1))
    torch.testing.assert_close(step, step[:, :1].expand_as(step), rtol=0, atol=1e-12)
    assert (step[0] - step[1]).abs().max() > 0.01  # it does look
    given = probs(torch.where(shown, -1, 1))
    one_by_one = probs(torch.where(shown, torch.arange(5), 5))
    torch.testing.assert_close(one_by_one, given, rtol=0, atol=1e-12)


def test_adapted_arm_is_the_arm(monkeypatch):
    """Left to right, for any split into given and predicted: its own log-probabilities, so its
    loss and its samples as well."""
    L = 6
    arm = oracle.make_lomdm(L, block_len=1, n_layer=3)
    model = oracle.make_a3(L, seed=1, n_layer=3)
    model.load_arm(arm.state_dict())
    x = texts(L)[::40]
    left_to_right = a3.chunk_groups(len(x), L)

    want = token_log_probs(arm, x, x)
    torch.testing.assert_close(model.log_prob(x, left_to_right), want)
    torch.testing.assert_close(model.loss(x, left_to_right)[0], arm.loss(x)[0])
    assert (model.log_prob(x, left_to_right.flip(1)) - want).abs().max() > 0.1

    # Sampling behind a prompt, all logits on the way are the ARM's of what was drawn.
    seen = []
    oracle.spy(monkeypatch, a3.Cache, "__call__", lambda logits, *a: seen.append(logits))
    for given in range(L):
        seen.clear()
        groups = torch.where(left_to_right < given, -1, left_to_right)
        torch.testing.assert_close(model.log_prob(x, groups)[:, given:], want[:, given:])

        done, at = model.sample(x.where(groups < 0, model.mask_id), generator=seeded(0))

        got = torch.cat(seen, 1).log_softmax(-1)
        torch.testing.assert_close(got, arm.log_probs(done)[:, given:])
        assert torch.equal(at, torch.where(groups < 0, -1, groups - given))


# ---- LoA3 --------------------------------------------------------------------------------


def new_loa3():
    torch.manual_seed(0)
    return loa3.LoA3(loa3.Config(5, 6, 2, 2, 8)).eval(), torch.randint(5, (7, 6))


def test_uniform_order_is_that_of_a3():
    """All orders are equally likely, and the bound is A3's for the order that is drawn."""
    model, x = new_loa3()
    torch.nn.init.zeros_(model.order.log_weight_steps)

    log_q_hat, log_q = model.order_log_probs(x, a3.random_groups(7, 6))
    assert torch.allclose(log_q, log_q_hat, rtol=0, atol=1e-12)
    assert torch.allclose(log_q, -torch.arange(6, 0, -1.0).log().expand(7, 6))

    order = model.order.draw(model.order.log_q_way(x), 6, seeded(3))
    want = -model.log_prob(x, order.argsort(1)).sum(1)
    assert torch.allclose(model.nelbo(x, generator=seeded(3)), want)


def test_steep_order_is_the_arm():
    model, x = new_loa3()
    arm = lomdm.LoMDM(lomdm.Config(5, 6, 2, 2, 8, block_len=1)).eval()
    model.load_arm(arm.state_dict())
    torch.nn.init.constant_(model.order.log_weight_steps, 50.0)

    assert torch.allclose(model.nelbo(x), arm.nelbo(x), atol=1e-9)
    _, at = model.sample(torch.full((3, 6), 5), generator=seeded(0))
    assert torch.equal(at, torch.arange(6).expand(3, 6))


@pytest.mark.parametrize("random_share", [0.0, 0.2])
def test_loa3_loss_and_gradient_have_the_bounds_mean(random_share, monkeypatch):
    """All draws of loss() are listed: pairs of orders of two texts. nelbo() has that mean, and
    is more than -log p."""
    model = oracle.make_loa3(3, seed=1, vocab_size=2, random_share=random_share)
    x = torch.tensor([[0, 1, 1], [0, 0, 0]])
    neg_log_p, bound = bounds(*oracle.list_loa3(model, x))

    def values():
        loss, metrics = model.loss(x)
        return loss, metrics["nelbo"], model.nelbo(x)

    draws = list(oracle.loa3_draws(model, x))
    loss, value, nelbo = mean_over(draws, monkeypatch, values)

    torch.testing.assert_close(nelbo, bound.detach())
    torch.testing.assert_close(value, bound.mean().detach() / 3)
    assert (neg_log_p < bound).all()
    same_gradients(model, loss, bound.mean() / 3)
