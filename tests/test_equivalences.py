"""
The claims of the papers, and the tests that hold them against enumeration in float64.

    claim                                                              test
    ---------------------------------------------------------------------------------------
    The probabilities of all texts sum to one: LoMDM                   test_lomdm_sums_to_one
        A3, in any groups and given any tokens                         test_a3_sums_to_one
        LoA3, of texts and orders together                             test_loa3_sums_to_one

    LoMDM (arXiv:2602.02112)
    p(x) is the sum over orders (1), and its bound is (2)              test_equations_1_and_2
    the six lines at the top of lomdm.py are its loss for an MDM       test_six_lines_*
    an ARM is the chain rule                                           test_arm_*
    an MDM is the mean over all orders, whatever the schedule          test_mdm_*
    all blocks in one pass are the blocks one by one                   test_block_fast_path_*
    LoMDM contains MDM: heads at zero, or c2 = 0                       test_lomdm_contains_mdm
    only c2 / c1 counts                                                test_only_c2_over_c1_*
    the race is a Plackett-Luce ranking                                test_race_*
    -log p  <=  the bound over orders  <=  the papers' bound           test_exact_below_*
    the papers' bound is an integral over time                         test_paper_bound_*
        at a random time its terms have that mean                      test_time_form_*
    the gradient of the loss is that of the bound                      test_gradient_*
        and by time, that of the papers' bound                         test_by_time_*

    A3 (arXiv:2601.13228)
    two streams in one pass are a double loop over groups              test_a3_is_the_naive_*
    two groups are one step of a masked diffusion model                test_two_groups_*
    a GPT that was loaded predicts what it predicted                   test_adapted_arm_*

    LoA3 (both)
    with a uniform order it is A3, with a steep one the ARM            test_uniform_*, steep
    its bound is -log p(x) plus what q does not know of the order      test_loa3_bound_*

What is listed, and how, stands in oracle.py. test_lomdm.py, test_a3.py and test_loa3.py test
the rest: samples, caches, leaks, chunks, compilers, bad input.
"""

import itertools
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import V, every_model, exact, orders, texts, token_log_probs

import a3
import lomdm
from beyond import loa3

pytestmark = pytest.mark.usefixtures("float64")
every_length = pytest.mark.parametrize("L", [3, 4])  # 3 is shorter than the window


def whole_blocks(kw, L):
    """L, or less so that it is whole blocks."""
    return L - L % min(L, kw.get("block_len", 4))


# ---- probabilities of all texts sum to one -----------------------------------------------


@every_model
@every_length
@torch.no_grad()
def test_lomdm_sums_to_one(kw, L):
    x = texts(whole_blocks(kw, L))

    neg_log_p, _, _ = exact(oracle.make_lomdm(**kw), x)

    assert neg_log_p.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


@torch.no_grad()
def test_a3_sums_to_one():
    """Every ordered partition of 4 positions, and random ones of 5. Where tokens are given,
    the sum is over what fills the gaps, for each choice of given ones."""
    many = torch.randint(-1, 5, (40, 5), generator=torch.Generator().manual_seed(0))
    for groups in (*oracle.partitions(4), *many[(many >= 0).any(1)], *oracle.RAGGED):
        L = len(groups)
        x = texts(L)

        log_p = oracle.make_a3(L).log_prob(x, groups.repeat(len(x), 1))

        assert (log_p[:, groups < 0] == 0).all() and (log_p[:, groups >= 0] < 0).all()
        given = (x * (groups < 0) * V ** torch.arange(L)).sum(1)  # a number for each choice
        total = torch.zeros(V**L).scatter_add(0, given, log_p.sum(1).exp())[given.unique()]
        assert len(total) == V ** int((groups < 0).sum())
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("L, vocab_size, n_layer", [(4, 2, 2), (3, 3, 1), (4, 3, 3)])
@torch.no_grad()
def test_loa3_sums_to_one(L, vocab_size, n_layer):
    model = oracle.make_loa3(L, seed=2, vocab_size=vocab_size, n_layer=n_layer)

    log_p, log_q_hat, log_q = oracle.listed(model, texts(L, vocab_size))

    assert (log_p + log_q_hat).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(log_q.exp().sum(1), torch.ones(vocab_size**L), atol=1e-10)
    assert log_q.exp().amax(1).mean() > 2 / math.factorial(L), "q is not far from uniform"
    assert (log_q - log_q_hat).abs().max() > 0.5, "nor from q_hat"


# ---- the two equations at the top of lomdm.py --------------------------------------------


@every_model
@every_length
@torch.no_grad()
def test_equations_1_and_2(kw, L):
    """By brute force: walk along each order, and add up what stands there."""
    L = whole_blocks(kw, L)
    model = oracle.make_lomdm(**kw)
    x = texts(L)
    w = model.order_weights(x)

    p = bound = 0
    for order in orders(L).tolist():
        visible = torch.zeros(L, dtype=torch.bool)
        log_q = log_q_hat = log_mu = torch.zeros(len(x))
        for i in order:
            z = torch.where(visible, x, model.mask_id)
            w_hat = model.order_weights_hat(z)
            open = oracle.frontier(model, visible)  # later blocks have no chance
            log_q = log_q + ((w * open)[:, i] / (w * open).sum(1)).log()
            log_q_hat = log_q_hat + ((w_hat * open)[:, i] / (w_hat * open).sum(1)).log()
            log_mu = log_mu + token_log_probs(model, z, x)[:, i]
            visible[i] = True
        if log_q.isfinite().all():
            p = p + (log_q_hat + log_mu).exp()  # (1)
            bound = bound + log_q.exp() * (-log_mu + log_q - log_q_hat)  # (2)

    neg_log_p, jump, _ = exact(model, x)
    torch.testing.assert_close(-p.log(), neg_log_p, rtol=0, atol=1e-12)
    torch.testing.assert_close(bound, jump, rtol=0, atol=1e-12)


def run_six_lines(model, x, turn, k):
    """The loss of the training step that lomdm.py begins with. It is taken from there and
    executed, with these draws: turn (B, L) of the positions, and counts k (B, 1)."""
    start = lomdm.__doc__.index("    turn = ")
    lines = [line.strip() for line in lomdm.__doc__[start:].splitlines()[:6]]
    assert lines[-1].startswith("loss = ")

    class Torch:  # what the six lines use of torch
        rand = staticmethod(lambda B, L: turn.argsort(1).double())  # its argsort is turn
        randint = staticmethod(lambda high, shape: k)

    B, L = x.shape
    names = dict(B=B, L=L, x=x, mask_id=model.mask_id, torch=Torch, F=F)
    names["model"] = lambda z: model.logits(model.features(z)[0])
    exec("\n".join(lines), names)
    assert torch.equal(names["turn"], turn)
    return names["loss"]


def test_six_lines_are_the_loss_of_an_mdm(monkeypatch):
    """For the same orders and counts: the same loss, and the same gradients."""
    model = oracle.make_lomdm()
    x = texts(4)[::4]
    turn = torch.rand(len(x), 4).argsort(1)
    k = torch.randint(4, (len(x), 1))
    monkeypatch.setattr(lomdm, "race", lambda w: turn.argsort(1).view(w.shape))
    monkeypatch.setattr(lomdm, "stratified_counts", lambda *shape, **how: k)

    want = run_six_lines(model, x, turn, k)
    got, _ = model.loss(x)

    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    same_gradients(model, got, want)


@torch.no_grad()
def test_six_lines_have_the_bound_as_their_mean():
    """In a batch of one text with each order and each count once, per token."""
    model = oracle.make_lomdm()
    cases = list(itertools.product(orders(4), range(4)))
    turn = torch.stack([order for order, _ in cases])
    k = torch.tensor([[k] for _, k in cases])

    for x in texts(4)[[0, 17, 58]]:
        loss = run_six_lines(model, x.expand(len(cases), 4), turn, k)
        _, jump, _ = exact(model, x[None])
        assert loss.item() == pytest.approx(jump.item() / 4, rel=0, abs=1e-9)


# ---- the members of LoMDM ----------------------------------------------------------------


@torch.no_grad()
def test_arm_is_the_chain_rule():
    """Predict each token from a text that is hidden from there on, and add up."""
    model = oracle.make_lomdm(block_len=1)
    x = texts(4)
    chain = 0
    for i in range(4):
        z = torch.where(torch.arange(4) < i, x, model.mask_id)
        chain = chain - token_log_probs(model, z, x)[:, i]

    torch.testing.assert_close(model.nelbo(x), chain)  # in one causal pass
    torch.testing.assert_close(model.loss(x)[0], chain.mean() / 4)
    torch.testing.assert_close(oracle.paper_bound_by_time(model, x), chain, rtol=1e-9, atol=0)


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
    mean = 0
    for order in orders(4).tolist():
        z = torch.full_like(x, model.mask_id)
        for i in order:
            mean = mean - token_log_probs(model, z, x)[:, i] / 24
            z[:, i] = x[:, i]

    def rate(t):
        a = alpha(t).expand(x.shape)
        velocity = (-slope(t) / (1 - alpha(t))).expand(x.shape)
        return oracle.rate_by_masks(model, x, a, velocity, lambda z: velocity)

    torch.testing.assert_close(exact(model, x)[1], mean)
    torch.testing.assert_close(oracle.time_integral(rate, power=1), mean, rtol=1e-9, atol=0)


@pytest.mark.parametrize("L", [6, 4, 2])
@torch.no_grad()
def test_block_fast_path_is_the_generic_model(L):
    """A pass over [noisy | clean] predicts every block as if it were looked at alone, behind
    clean blocks and before hidden ones."""
    model = oracle.make_lomdm(L=6, block_len=2, learn_order=True)
    x = torch.randint(V, (5, L))
    z = torch.where(torch.rand(5, L) < 0.5, model.mask_id, x)

    h, attention = model.features(z, x)
    log_mu = model.logits(h[:, :L]).log_softmax(-1)
    w_hat = model.g_hat(h, *attention, rows=L if h.shape[1] > L else None)

    for b in range(0, L, 2):
        here = slice(b, b + 2)
        rest = torch.full_like(x[:, b + 2 :], model.mask_id)
        alone = torch.cat((x[:, :b], z[:, here], rest), 1)
        torch.testing.assert_close(log_mu[:, here], model.log_probs(alone)[:, here])
        torch.testing.assert_close(w_hat[:, here], model.order_weights_hat(alone)[:, here])


@pytest.mark.parametrize("block_len", [2, 4])
@torch.no_grad()
def test_lomdm_contains_mdm(block_len):
    """With c2 = 0, or with heads whose linear maps are zero: the same likelihood, bounds and
    estimates."""
    x = texts(4)
    mdm = oracle.make_lomdm(block_len=block_len)
    no_c2 = oracle.make_lomdm(block_len=block_len, learn_order=True, c2=0.0)
    zero_heads = oracle.make_lomdm(block_len=block_len, learn_order=True)
    for model in (no_c2, zero_heads):
        model.load_state_dict(mdm.state_dict(), strict=False)
    torch.nn.init.zeros_(zero_heads.g.score.weight)
    torch.nn.init.zeros_(zero_heads.g_hat.score.weight)

    for model in (no_c2, zero_heads):
        assert torch.equal(model.order_weights(x), torch.full((81, 4), 0.7))
        for got, want in zip(exact(model, x), exact(mdm, x), strict=True):
            torch.testing.assert_close(got, want)
        got = model.nelbo(x, generator=torch.Generator().manual_seed(1))
        want = mdm.nelbo(x, generator=torch.Generator().manual_seed(1))
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

    for got, want in zip(exact(one, x), exact(doubled, x), strict=True):
        torch.testing.assert_close(got, want)
    assert (exact(one, x)[1] - exact(other, x)[1]).abs().max() > 1e-3
    by_time = oracle.paper_bound_by_time(doubled, x[:9])
    torch.testing.assert_close(by_time, exact(one, x[:9])[2], rtol=1e-7, atol=0)


def test_race_is_plackett_luce():
    """Each order is drawn with the probability that its next place has among those left, step
    by step. prefix_log_prob() tells this probability."""
    w = torch.tensor([0.2, 0.5, 1.0, 2.0])
    n = 200_000
    every = orders(4)
    probs = []
    for order in every.tolist():
        steps = [w[i] / w[order[k:]].sum() for k, i in enumerate(order)]
        probs.append(math.prod(steps).item())

    drawn = lomdm.race(w.expand(n, 4), torch.Generator().manual_seed(0))
    log_q = lomdm.prefix_log_prob(w.expand(24, 4), every, torch.full((24,), 4))

    assert oracle.fits(oracle.count(drawn, every), torch.tensor(probs))
    torch.testing.assert_close(log_q.exp(), torch.tensor(probs))


def test_race_without_weight():
    """Places of weight 0 come last, and cost nothing before."""
    drawn = lomdm.race(torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1000, 4))
    assert set(drawn[:, :2].flatten().tolist()) == {1, 3}

    w = torch.tensor([1.0, 2.0, 0.0, 0.0])
    order = torch.tensor([1, 0, 2, 3])
    log_q = [lomdm.prefix_log_prob(w, order, torch.tensor(k)).item() for k in (0, 1, 2)]
    assert log_q == pytest.approx([0, math.log(2 / 3), math.log(2 / 3)])


# ---- the bounds of LoMDM, and their gradients --------------------------------------------


@every_model
@every_length
@torch.no_grad()
def test_exact_below_jump_below_paper(kw, L):
    x = texts(whole_blocks(kw, L))

    neg_log_p, jump, paper = exact(oracle.make_lomdm(**kw), x)

    assert (neg_log_p <= jump + 1e-12).all() and (jump <= paper + 1e-12).all()
    is_learned = kw.get("learn_order", False)
    assert ((paper - jump).max() > 0.01) == is_learned  # what the times cost, or exactly 0
    is_arm = kw == oracle.MODELS["arm"]
    assert ((jump - neg_log_p).max() > 0.01) != is_arm  # an ARM's bound is its likelihood


@every_model
@every_length
@torch.no_grad()
def test_paper_bound_is_the_integral_over_time(kw, L):
    model = oracle.make_lomdm(**kw)
    x = texts(whole_blocks(kw, L))[::7]

    _, _, paper = exact(model, x)

    torch.testing.assert_close(oracle.paper_bound_by_time(model, x), paper, rtol=1e-7, atol=0)


@every_model
@torch.no_grad()
def test_time_form_has_the_papers_bound_as_its_mean(kw):
    """At one time the draws of nelbo_at() average to the integrand, of which all masks are
    listed, and the integral of that is the papers' bound (the test above)."""
    model = oracle.make_lomdm(**kw)
    x = texts(4)[[17]]
    n = 20_000
    for t in torch.tensor([0.3, 0.55, 0.9]):
        g = torch.Generator().manual_seed(0)
        got = sum(lomdm.nelbo_at(model, x.expand(n, 4), t.expand(n, 1), g))

        error = (got.mean() - oracle.rate_at(model, x, t)).abs()
        assert error < 4 * got.std() / math.sqrt(n) + 1e-9


def same_gradients(model, got, want):
    """Of two values: in the backbone and in both heads."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(got, parameters, allow_unused=True)
    want = torch.autograd.grad(want, parameters, allow_unused=True)
    for name, a, b in zip(names, got, want, strict=True):
        assert a is not None and b is not None, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
        assert b.abs().max() > 1e-6, f"{name} has no gradient"


@pytest.mark.parametrize("block_len,weights", [(3, "normsig"), (3, "exp"), (2, "normsig")])
def test_gradient_of_loss_is_that_of_the_bound(block_len, weights, monkeypatch):
    """All draws of loss() are listed: two orders, and a count for each block. The mean of
    their gradients is the gradient of the bound."""
    L = 3 if block_len == 3 else 4
    n = L // block_len
    model = oracle.make_lomdm(L=L, block_len=block_len, learn_order=True, weights=weights)
    x = torch.tensor([[2, 0, 1, 1][:L]])
    w = model.order_weights(x).view(1, n, block_len).detach()

    one_block = itertools.permutations(range(block_len))
    every = torch.tensor(list(itertools.product(one_block, repeat=n)))  # (m, n, block_len)
    whole = torch.full((len(every), n), block_len)
    q = lomdm.prefix_log_prob(w.expand(every.shape), every, whole).sum(1).exp()
    counts = torch.tensor(list(itertools.product(range(block_len), repeat=n)))
    assert q.sum().item() == pytest.approx(1)

    value = loss = 0
    for k, i, j in itertools.product(counts, range(len(every)), range(len(every))):
        monkeypatch.setattr(lomdm, "stratified_counts", lambda *_, k=k, **how: k[None])
        monkeypatch.setattr(lomdm, "race", lambda _, pair=every[[i, j]]: pair)
        one_loss, metrics = model.loss(x)
        p = q[i] * q[j] / len(counts)
        loss = loss + p * one_loss
        value = value + p * metrics["nelbo"]

    bound = exact(model, x)[1].sum() / L
    torch.testing.assert_close(value, bound)
    same_gradients(model, loss, bound)


@pytest.mark.parametrize("block_len, t", [(3, 0.3), (3, 0.8), (1, 0.5), (2, 0.6)])
def test_by_time_has_the_gradient_of_the_papers_bound(block_len, t, monkeypatch):
    """All draws of ByTime.loss() at one time are listed, two noisy texts. With block_len 1
    nothing is learned about the order, and one is enough."""
    L = 4 if block_len == 2 else 3
    learn_order = block_len > 1
    model = oracle.make_lomdm(L, 0, lomdm.ByTime, block_len=block_len, learn_order=learn_order)
    x = texts(L)[[7]]
    t = torch.tensor([[t]])
    K = min(block_len, L)
    alpha, _ = lomdm.schedule(lomdm.block_clocks(t, L, K), model.order_weights(x).detach())

    value = loss = 0
    for hidden in itertools.product(~oracle.visible_sets(L), repeat=2 if learn_order else 1):
        hidden = torch.stack(hidden)
        p = torch.where(hidden, 1 - alpha, alpha).prod()
        if p == 0:  # blocks that are not at work are visible or hidden for sure
            continue
        drawn = torch.where(hidden, 1.0, -1.0)  # to be hidden is to be above alpha
        monkeypatch.setattr(torch, "rand", lambda *_, drawn=drawn, **how: drawn)
        one_loss, metrics = model.loss(x, t)
        loss = loss + p * one_loss
        value = value + p * metrics["nelbo"]

    rate = oracle.rate_at(model, x, t).sum() / L
    torch.testing.assert_close(value, rate)
    same_gradients(model, loss, rate)


# ---- A3 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("left_neighbour", [True, False])
@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_a3_is_the_naive_double_loop(n_layer, left_neighbour):
    """One pass over two streams predicts what a loop over groups, and over the positions in
    them, predicts."""
    model = oracle.make_a3(n_layer=n_layer, left_neighbour=left_neighbour)
    x = torch.randint(V, (8, 5))
    for groups in (oracle.RAGGED, oracle.RAGGED[:2], a3.random_groups(8, 5, 1)):
        rows = x[: len(groups)]
        want = oracle.naive_batch(model, rows, groups)

        got = model(rows, groups).masked_fill(groups[..., None] < 0, torch.nan)

        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)
        log_p = want.log_softmax(-1).gather(-1, rows[..., None])[..., 0].nan_to_num(0.0)
        torch.testing.assert_close(model.log_prob(rows, groups), log_p, rtol=0, atol=1e-10)


@pytest.mark.parametrize("visible", [[1], [0, 3], [1, 2, 4]])
@torch.no_grad()
def test_two_groups_are_a_masked_diffusion_step(visible):
    """Given what is visible the rest is independent: the joint is the product of its
    marginals. And it makes no difference whether visible tokens are given or were predicted
    before, one by one from left to right."""
    model = oracle.make_a3()
    x = texts(5)
    shown = torch.zeros(5, dtype=torch.bool)
    shown[visible] = True
    hidden = (~shown).nonzero().flatten().tolist()

    log_p = model.log_prob(x, torch.where(shown, 0, 1).repeat(len(x), 1))
    given = model.log_prob(x, torch.where(shown, -1, 1).repeat(len(x), 1))
    before = torch.where(shown, torch.arange(5), 5).repeat(len(x), 1)
    one_by_one = model.log_prob(x, before)

    torch.testing.assert_close(one_by_one[:, ~shown], given[:, ~shown], rtol=0, atol=1e-12)
    joint = log_p[:, ~shown].sum(1).exp().view((V,) * 5)
    product = torch.ones(())
    for i in hidden:
        marginal = joint.sum([j for j in hidden if j != i], keepdim=True)
        assert (marginal.amax(visible) - marginal.amin(visible)).max() > 0.01  # it does look
        product = product * marginal
    torch.testing.assert_close(product, joint, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_adapted_arm_is_the_arm(dtype, tolerance, monkeypatch):
    """Left to right, for any split into given and predicted: its own log-probabilities, so its
    loss and its samples as well."""
    arm, x = oracle.trained_arm(dtype)
    B, L = x.shape
    left_to_right = a3.chunk_groups(B, L)
    model = a3.A3(a3.Config(7, L, 2, 2, 16)).eval()
    model.load_arm(arm.state_dict())
    close = dict(rtol=0, atol=tolerance)

    want = token_log_probs(arm, x, x)
    torch.testing.assert_close(model.log_prob(x, left_to_right), want, **close)
    torch.testing.assert_close(model.loss(x, left_to_right)[0], arm.loss(x)[0], **close)
    for given in range(L):  # a prompt, then one token after another
        groups = torch.where(left_to_right < given, -1, left_to_right)
        got = model.log_prob(x, groups)
        torch.testing.assert_close(got[:, given:], want[:, given:], **close)

    # Sampling, all logits on the way are the ARM's of what was drawn.
    seen = []
    keep = lambda logits, cache, x, rank, at: seen.append((logits, at))  # noqa: E731
    oracle.spy(monkeypatch, a3.Cache, "__call__", keep)
    for given in (0, 1, 5, L - 1):
        seen.clear()
        z = x.where(left_to_right < given, model.mask_id)
        done, at = model.sample(z, generator=torch.Generator().manual_seed(0))

        log_p = arm.log_probs(done)
        steps = torch.where(left_to_right < given, -1, left_to_right - given)
        assert torch.equal(at, steps) and len(seen) == L - given
        for i, (logits, where) in enumerate(seen, given):
            assert (where == i).all()
            torch.testing.assert_close(logits[:, 0].log_softmax(-1), log_p[:, i], **close)

    # An order that is not left to right is not the ARM.
    assert (model.log_prob(x, left_to_right.flip(1)) - want).abs().max() > 0.1


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

    g = torch.Generator()
    order = model.order.draw(model.order.log_q_way(x), 6, g.manual_seed(3))
    want = -model.log_prob(x, order.argsort(1)).sum(1)
    assert torch.allclose(model.nelbo(x, generator=g.manual_seed(3)), want)


def test_steep_order_is_the_arm():
    model, x = new_loa3()
    arm = lomdm.LoMDM(lomdm.Config(5, 6, 2, 2, 8, block_len=1)).eval()
    model.load_arm(arm.state_dict())
    torch.nn.init.constant_(model.order.log_weight_steps, 50.0)

    assert torch.allclose(model.nelbo(x), arm.nelbo(x), atol=1e-9)
    _, at = model.sample(torch.full((3, 6), 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(at, torch.arange(6).expand(3, 6))


def test_loa3_bound_is_the_likelihood_and_what_q_does_not_know():
    """The bound is -log p(x) + KL(q(order | x) || p(order | x)), text by text."""
    log_p, log_q_hat, log_q = oracle.listed(oracle.make_loa3(), texts(4))
    q = log_q.exp()

    neg_log_p = -(log_p + log_q_hat).logsumexp(1)
    bound = (q * (log_q - log_q_hat - log_p)).sum(1)
    posterior = log_p + log_q_hat + neg_log_p[:, None]
    gap = (q * (log_q - posterior)).sum(1)

    assert torch.allclose(bound - neg_log_p, gap, atol=1e-10)
    assert (gap > 1e-3).all()
