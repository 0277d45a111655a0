"""
a3.py beyond its likelihood: leaks, groups, the fast path, the cache, samples, adaptation, bad
input. The claims of the paper are in test_equivalences.py, and what is listed in oracle.py.
"""

import ast
import inspect
import itertools
import math
import textwrap
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import RAGGED, V, count, fits, make_a3, make_lomdm, naive_batch, orders, spy, texts

import a3
import lomdm
from a3 import A3, Config, chunk_groups, curriculum, random_groups, sorted_features

pytestmark = pytest.mark.usefixtures("float64")
RULES = ("confidence", "entropy", "margin")
GIVEN_ROW = torch.tensor([[-1, -1, -1, -1, -1]])


# ---- the likelihood ----------------------------------------------------------------------


@torch.no_grad()
def test_loss_is_the_mean_over_predicted_tokens():
    model = make_a3()
    x = texts(5)[[3, 50, 77, 100, 120, 150, 200, 242]]

    want = -model.log_prob(x, RAGGED).sum() / (RAGGED >= 0).sum()
    logits = model(x, RAGGED).log_softmax(-1).gather(-1, x[..., None])[..., 0]

    torch.testing.assert_close(model.loss(x, RAGGED)[0], want)
    torch.testing.assert_close(model.log_prob(x, RAGGED), torch.where(RAGGED < 0, 0.0, logits))


def test_loss_without_groups_is_that_of_random_orders():
    model = make_a3()
    x = torch.randint(V, (4, 5))
    torch.manual_seed(3)
    loss, metrics = model.loss(x)
    torch.manual_seed(3)
    want = -model.log_prob(x, random_groups(4, 5)).mean()
    assert torch.equal(loss, want) and torch.equal(metrics["nelbo"], want)


@pytest.mark.parametrize("size", [1, 2])
def test_nelbo(size):
    """Exact from left to right, and the mean of the draws for random orders."""
    model = make_a3()
    x = torch.randint(V, (8, 5))
    left = -model.log_prob(x, chunk_groups(8, 5, size)).sum(1)
    torch.testing.assert_close(model.nelbo(x, order="left", size=size), left)

    g = torch.Generator().manual_seed(1)
    draws = [-model.log_prob(x, random_groups(8, 5, size, g)).sum(1) for _ in range(3)]
    got = model.nelbo(x, 3, size=size, generator=g.manual_seed(1))
    torch.testing.assert_close(got, sum(draws) / 3)


def test_every_parameter_learns():
    """And no row of the attention is empty: no nan, even where all but one are given."""
    model = make_a3()
    model.loss(torch.randint(V, (8, 5)), RAGGED)[0].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 1e-6, name


# ---- no leak -----------------------------------------------------------------------------


@pytest.mark.parametrize("features", [A3.features, sorted_features], ids=["plain", "sorted"])
@pytest.mark.parametrize("n_layer", [1, 2, 3])
@torch.no_grad()
def test_predictions_see_exactly_the_earlier_groups(n_layer, features):
    """x_j moves the prediction of i if group(j) < group(i), and not otherwise. Given tokens
    are the first groups, one by one from left to right."""
    model = make_a3(n_layer=n_layer, seed=n_layer)
    x = torch.randint(V, (8, 5))
    for groups in (RAGGED, chunk_groups(8, 5), random_groups(8, 5, 1), random_groups(8, 5, 2)):
        reading = groups * 9 + torch.arange(5) - 100  # by number, then from left to right
        rank = torch.where(groups < 0, reading, groups)
        before = model.logits(features(model, x, groups))
        for j in range(5):
            other = x.clone()
            other[:, j] = (x[:, j] + 1) % V
            after = model.logits(features(model, other, groups))
            moved = (after - before).abs().amax(-1) > 1e-9  # (B, L)
            assert torch.equal(moved, rank[:, j : j + 1] < rank), j


# ---- groups ------------------------------------------------------------------------------


@torch.no_grad()
def test_each_row_has_its_own_partition():
    model = make_a3()
    x = torch.randint(V, (8, 5))
    together = model(x, RAGGED)
    for b in range(8):
        alone = model(x[b : b + 1], RAGGED[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone)
    assert (together[0] - model(x, RAGGED.roll(1, 0))[0]).abs().max() > 1e-3  # it does matter


@torch.no_grad()
def test_only_the_order_of_the_numbers_counts():
    model = make_a3()
    x = torch.randint(V, (8, 5))
    relabel = torch.tensor([0, 1, 5, 6, 40, 41, 42, 1000, 2**40, 2**62])
    relabelled = torch.where(RAGGED < 0, 5 * RAGGED, relabel[RAGGED])
    for features in (A3.features, sorted_features):
        assert torch.equal(features(model, x, relabelled), features(model, x, RAGGED))


@torch.no_grad()
def test_order_inside_a_group_does_not_count(monkeypatch):
    """Break the ties of the sort the other way round, which also drops another last token."""
    model = make_a3()
    x = torch.randint(V, (8, 5))
    groups = torch.where(RAGGED < 0, 9 * RAGGED + torch.arange(5), RAGGED)  # given: no ties
    want = model.log_prob(x, groups)
    real = torch.Tensor.argsort

    def argsort(self, dim, stable=False):
        if not stable:
            return real(self, dim=dim)
        return self.shape[dim] - 1 - real(self.flip(dim), dim=dim, stable=True)

    monkeypatch.setattr(torch.Tensor, "argsort", argsort)
    assert RAGGED.argsort(dim=1, stable=True)[3].tolist() == [4, 3, 2, 1, 0]
    torch.testing.assert_close(model.log_prob(x, groups), want)


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
    assert fits(odd_one, torch.ones(3) / 3)
    for make_groups in (chunk_groups, random_groups):
        with pytest.raises(ValueError, match="size of a group must be at least 1, not 0"):
            make_groups(2, 4, 0)


def test_pack():
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    places, real = a3.pack(mask)
    assert places[0].tolist() == [1, 2] and places[1, 0] == 3 and places[1, 1] != 3
    assert real.tolist() == [[True, True], [True, False]]


# ---- the same, cheaper: sorted -----------------------------------------------------------


@pytest.mark.parametrize("left_neighbour", [True, False])
@pytest.mark.parametrize("n_layer", [1, 2, 3])
@torch.no_grad()
def test_sorted_features_are_the_features(n_layer, left_neighbour):
    model = make_a3(n_layer=n_layer, left_neighbour=left_neighbour)
    x = torch.randint(V, (8, 5))
    singletons = RAGGED[:2].repeat(4, 1)
    for groups, single in itertools.product((RAGGED, singletons), (None, False, True)):
        if single and groups is RAGGED:  # it is not
            continue
        got = sorted_features(model, x, groups, single)
        torch.testing.assert_close(got, model.features(x, groups), rtol=0, atol=1e-12)


@torch.no_grad()
def test_singletons_need_no_mask(monkeypatch):
    """With one token a group both streams run through the causal kernel, and agree with the
    masks that the same rows get in the company of a row that has larger groups."""
    model = make_a3()
    x = torch.randint(V, (5, 5))
    calls = []
    spy(monkeypatch, F, "scaled_dot_product_attention", lambda y, *a, **kw: calls.append(kw))
    single = torch.cat((chunk_groups(1, 5), RAGGED[1:2], torch.tensor([[9, -4, 3, 5, 0]])))

    fast = model.log_prob(x[:3], single)
    assert len(calls) == 3  # two streams in one layer, the query stream alone in the last
    assert all(kw["is_causal"] and kw.get("attn_mask") is None for kw in calls)

    calls.clear()
    masked = model.log_prob(x, torch.cat((single, RAGGED[2:4])))
    assert all(not kw.get("is_causal") and kw["attn_mask"] is not None for kw in calls)
    torch.testing.assert_close(fast, masked[:3], rtol=0, atol=1e-12)


@torch.no_grad()
def test_shorter_than_seq_len():
    """L < seq_len: the same predictions as from the naive loop, which knows no seq_len."""
    model = make_a3(L=9)
    x = torch.randint(V, (8, 5))
    got = model(x, RAGGED).masked_fill(RAGGED[..., None] < 0, torch.nan)
    torch.testing.assert_close(got, naive_batch(model, x, RAGGED), equal_nan=True)


# ---- the same, cheaper: the cache --------------------------------------------------------


def decodings():
    """Ways to decode a batch of ragged rows, one of which is complete from the start: groups,
    per_step and rule of decode()."""
    groups = torch.cat((RAGGED, GIVEN_ROW))
    yield groups, 5, "left"  # generate()
    yield groups[4:5], 5, "left"
    for by, m in itertools.product((*RULES, "random"), [1, 2, 3]):
        yield groups, m, by  # inside of each group
        yield (groups >= 0).long() - 1, m, by  # sample()


@pytest.mark.parametrize("left_neighbour", [True, False])
@pytest.mark.parametrize("n_layer", [1, 2, 3])
@torch.no_grad()
def test_cached_decoding_is_plain_decoding(n_layer, left_neighbour, monkeypatch):
    """The same tokens by the same steps for the same generator, and at each step the logits of
    a pass that reads everything anew. Each token is committed once."""
    model = make_a3(n_layer=n_layer, left_neighbour=left_neighbour)
    committed, steps = [], []

    def compare(logits, cache, x, rank, at):
        is_open = rank.gather(1, at) == x.shape[1]  # where a row is padded it is not
        plain = model.read(x, rank, at)
        torch.testing.assert_close(logits[is_open], plain[is_open], rtol=0, atol=1e-10)
        junk = x.where(rank < x.shape[1], torch.randint(V, x.shape))  # in the open places
        again = model(junk, rank).take_along_dim(at[..., None], dim=1)
        torch.testing.assert_close(logits[is_open], again[is_open], rtol=0, atol=1e-10)
        steps.append((logits, at, is_open))

    def keep(logits, cache, tokens, slots, rank, *a):
        real = (rank < 5) & (slots > 0)
        committed.append(torch.zeros(len(slots), 6).scatter_add(1, slots, real.double()))

    spy(monkeypatch, a3.Cache, "__call__", compare)
    spy(monkeypatch, a3.Cache, "step", keep)
    x = torch.where(torch.cat((RAGGED, GIVEN_ROW)) < 0, torch.randint(V, (9, 5)), V + 5)
    for groups, per_step, by in decodings():
        committed.clear()
        steps.clear()
        g = torch.Generator()
        how = dict(per_step=per_step, by=by, generator=g)
        got, rank = model.decode(x[: len(groups)], groups, **how, cache=True)
        state = g.get_state()
        g.manual_seed(g.initial_seed())
        cached = steps[:]
        want, want_rank = model.decode(x[: len(groups)], groups, **how, cache=False)

        assert torch.equal(got, want) and torch.equal(rank, want_rank)
        assert torch.equal(state, g.get_state()) and len(steps) == len(cached) > 1
        assert sum(committed).max() == 1  # not twice

        # Given the steps as groups, the finished text is predicted by the same logits.
        final = model(got, rank)
        for step, (logits, at, is_open) in enumerate(cached):
            now = is_open & (rank.gather(1, at) == step)
            later = final.take_along_dim(at[..., None], dim=1)
            assert now.sum() == (rank == step).sum()  # all that was filled had been asked for
            torch.testing.assert_close(logits[now], later[now], rtol=0, atol=1e-10)


def test_generate_fills_one_group_a_call():
    """The steps of decode() are the ranks of the groups, and given tokens keep their
    numbers."""
    groups = torch.cat((RAGGED, GIVEN_ROW))
    _, steps = make_a3().decode(torch.zeros_like(groups), groups, 5, "left")
    for row, got in zip(groups.tolist(), steps.tolist(), strict=True):
        numbers = sorted(set(row) - {g for g in row if g < 0})
        assert got == [g if g < 0 else numbers.index(g) for g in row]


# ---- samples -----------------------------------------------------------------------------


SAMPLED = {
    "ar": [0, 1, 2, 3],
    "chunk": [0, 0, 1, 1],
    "random": [3, 1, 0, 2],
    "random pairs": [1, 0, 0, 1],
    "ragged": [2, 0, 2, 2],
    "given": [1, -1, 0, 1],
}


def exact_fit(model, drawn, groups, given):
    """Do texts (n, L), of which groups (L,) were filled in around the token `given`, follow
    their exact distribution?"""
    every = texts(len(groups))
    every = every[(every[:, groups < 0] == given).all(1)]
    log_p = model.log_prob(every, groups.repeat(len(every), 1)).sum(1)
    return fits(count(drawn, every), log_p.exp())


@pytest.mark.parametrize("groups", SAMPLED.values(), ids=SAMPLED.keys())
@torch.no_grad()
def test_samples_follow_the_exact_distribution(groups, monkeypatch):
    model = make_a3(4)
    groups = torch.tensor(groups)
    calls = []
    spy(monkeypatch, a3.Cache, "step", lambda *args: calls.append(1))
    x = torch.full((20_000, 4), 1)

    g = torch.Generator().manual_seed(0)
    drawn = model.generate(x, groups.expand_as(x), generator=g)

    assert len(calls) == len(set(groups.tolist()) - {-1})  # one call a group
    assert (drawn[:, groups < 0] == 1).all() and (x == 1).all()
    assert exact_fit(model, drawn, groups, given=1)


@torch.no_grad()
def test_rows_of_different_partitions_are_sampled_together():
    model = make_a3(4)
    groups = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 1], [0, 0, 0, 0], [-1, 2, 5, -1]])
    x = torch.full((40_000, 4), 2)
    g = torch.Generator().manual_seed(0)
    drawn = model.generate(x, groups.repeat(10_000, 1), generator=g)
    for b, row in enumerate(groups):
        assert exact_fit(model, drawn[b::4], row, given=2)


@torch.no_grad()
def test_random_decoding_is_the_mean_over_orders():
    model = make_a3(3)
    g = torch.Generator().manual_seed(0)
    drawn, at = model.sample(torch.full((20_000, 3), V), by="random", generator=g)

    every = texts(3)
    each = [model.log_prob(every, order.repeat(27, 1)).sum(1).exp() for order in orders(3)]
    assert fits(count(drawn, every), sum(each) / 6)
    assert fits(count(at, orders(3)), torch.ones(6) / 6)


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("m", [1, 2])
@torch.no_grad()
def test_log_prob_of_the_steps_is_that_of_the_draw(by, m):
    """A rule that looks at nothing random finds one order for each text, and log_prob(x,
    steps) under these orders is the distribution of what it generates: it sums to 1 over the
    texts."""
    model = make_a3(4)
    z = torch.tensor([V, V, 1, V]).repeat(20_000, 1)

    def decode(temperature):
        g = torch.Generator().manual_seed(0)
        drawn = torch.cat(model.sample(z, temperature, None, m, by, generator=g), 1)
        return drawn.unique(dim=0, return_counts=True)  # ordered by text

    pairs, _ = decode(temperature=5.0)  # finds them all: positions are chosen as before
    every, at = pairs.split(4, 1)
    assert len(every.unique(dim=0)) == len(every) == V**3
    probs = model.log_prob(every, at).sum(1).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-12)

    pairs_1, counts_1 = decode(temperature=1.0)
    counts = torch.stack([counts_1[(pairs_1 == pair).all(1)].sum() for pair in pairs])
    assert counts.sum() == len(z) and fits(counts, probs)


@pytest.mark.parametrize("by", (*RULES, "random", "left"))
@pytest.mark.parametrize("m", [1, 2, 3, 5, 9])
def test_per_step_calls(by, m, monkeypatch):
    """ceil(n / m) calls of the network for the row with most to do, m tokens in each."""
    model = make_a3(8)
    calls = []
    spy(monkeypatch, a3.Cache, "step", lambda *args: calls.append(1))
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
    model = make_a3(4)
    x = torch.tensor([[0, 1, 2, 0]])
    groups = torch.tensor([[-1, -1, -1, 0]])
    n = 20_000
    logits = model(x, groups)[0, 3]
    likely = logits.argsort(descending=True)

    def tokens(**kw):
        g = torch.Generator().manual_seed(0)
        drawn = model.generate(x.expand(n, 4), groups.expand(n, 4), generator=g, **kw)[:, 3]
        for by in ("left", "confidence"):  # for one token there is no choice of order
            z = x.masked_fill(groups >= 0, V).expand(n, 4)
            same, _ = model.sample(z, by=by, generator=g.manual_seed(0), **kw)
            assert torch.equal(drawn, same[:, 3])
        return drawn.bincount(minlength=V)

    assert tokens(temperature=0)[likely[0]] == n and tokens(top_k=1)[likely[0]] == n
    assert fits(tokens(temperature=2.0), (logits / 2).softmax(-1))
    two = tokens(temperature=2.0, top_k=2)
    assert two[likely[2]] == 0
    assert fits(two[likely[:2]], (logits[likely[:2]] / 2).softmax(-1))


def certainty_by_hand(probs, by):
    """For one position's list of probabilities."""
    high = sorted(probs, reverse=True)
    if by == "confidence":
        return high[0]
    return high[0] - high[1] if by == "margin" else sum(p * math.log(p) for p in probs)


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"temperature": 5.0, "top_k": 1}])
@torch.no_grad()
def test_dynamic_decoding_chooses_by_the_rule(by, m, how):
    """Replayed from the finished text: at each step the m best of the open positions are
    taken, scored by the uncached forward at temperature 1, whatever tokens are drawn with."""
    model = make_a3(6, vocab_size=5)
    open = torch.rand(12, 6) < 0.8
    z = torch.randint(5, (12, 6)).masked_fill(open, 5)
    x, at = model.sample(z, by=by, per_step=m, **how)

    for row, step in itertools.product(range(12), range(6)):
        committed = at[row : row + 1] < step
        groups = torch.where(committed, at[row : row + 1], 6)
        probs = model(x[row : row + 1], groups).softmax(-1)[0].tolist()
        rest = [i for i in range(6) if not committed[0, i]]
        best = sorted(rest, key=lambda i: -certainty_by_hand(probs[i], by))[:m]
        assert sorted(best) == (at[row] == step).nonzero().flatten().tolist()
        if how == {"temperature": 0}:
            assert all(x[row, i] == max(range(5), key=probs[i].__getitem__) for i in best)
    assert len(at.unique(dim=0)) > 6  # not the same choice all the time


def test_certainty_rules_differ():
    """A case for each pair, so that no rule can stand in for another."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.52, 0.47, 0.01], [0.42, 0.42, 0.16]]).log()
    best = {by: a3.certainty(logits[:2], by).argmax().item() for by in RULES}
    assert best == {"confidence": 1, "entropy": 1, "margin": 0}
    best = {by: a3.certainty(logits[[0, 2]], by).argmax().item() for by in RULES}
    assert best == {"confidence": 0, "entropy": 1, "margin": 0}


# ---- from an ARM -------------------------------------------------------------------------


def make_arm(L=5, **kw):
    return make_lomdm(L, seed=3, **(dict(block_len=1, n_layer=3) | kw))


@pytest.mark.parametrize("features", [A3.features, sorted_features], ids=["plain", "sorted"])
@pytest.mark.parametrize("L", [3, 5])
@torch.no_grad()
def test_both_streams_are_the_arm(L, features, monkeypatch):
    """Left to right both streams are the ARM on every layer, up to where nobody reads the
    content any more."""
    arm = make_arm()
    model = make_a3(n_layer=3)
    x = texts(L)[::5]
    model.load_arm(arm.state_dict())
    want, content, asked = [], [], []
    for block, mine in zip(arm.blocks, model.blocks, strict=True):
        block.register_forward_pre_hook(lambda block, args: want.append(args[0]))
        spy(monkeypatch, mine, "keys_values", lambda kv, u, rotary: content.append(u[:, :L]))
        spy(monkeypatch, mine, "attend", lambda out, h, *args: asked.append(h[:, :L]))

    arm.log_probs(x)
    features(model, x, chunk_groups(len(x), L))

    close = dict(rtol=0, atol=1e-12)
    read = [block.norm1(h) for block, h in zip(arm.blocks, want, strict=True)]
    torch.testing.assert_close(content, read, **close)
    both = [want[layer] for layer in (0, 0, 1, 1, 2)]  # the content does not ask in the last
    torch.testing.assert_close(asked, both, **close)
    for name, p in arm.state_dict().items():
        assert torch.equal(model.state_dict()[name], p), name
    torch.testing.assert_close(model.query, arm.wte.weight.mean(0))


def test_loaded_weights_are_a_copy():
    arm = make_arm()
    model = make_a3(n_layer=3)
    before = {name: p.clone() for name, p in arm.state_dict().items()}
    model.load_arm(arm.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(p, before[name]) for name, p in arm.state_dict().items())



@pytest.mark.parametrize(
    "kw,message",
    [
        (dict(L=6), r"^not an ARM of this size: wpe.weight is \(6, 8\), not \(5, 8\), and 0 "),
        (dict(n_layer=2), r"blocks.2.norm1.weight is None, not \(8,\), and 5 more"),
        (dict(n_layer=4), r"blocks.3.norm1.weight is \(8,\), not None, and 5 more"),
        (dict(n_embd=16), r"wte.weight is \(4, 16\), not \(4, 8\)"),
        (dict(block_len=5, learn_order=True), r"g.block.norm1.weight is \(8,\), not None"),
    ],
)
def test_wrong_checkpoints_are_refused(kw, message):
    model = make_a3(n_layer=3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        model.load_arm(make_arm(**kw).state_dict())
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_checkpoint_of_its_own_is_no_arm():
    model = make_a3(n_layer=3)
    with pytest.raises(ValueError, match=r"query is \(8,\), not None"):
        model.load_arm(model.state_dict())


def test_another_vocabulary_is_no_arm_of_this_size():
    with pytest.raises(ValueError, match=r"wte.weight is \(4, 8\), not \(8, 8\)"):
        make_a3(n_layer=3, vocab_size=7).load_arm(make_arm().state_dict())


@torch.no_grad()
def test_the_papers_queries_forget_the_arm():
    """left_neighbour=False is one field of Config, and this is the reason not to use it."""
    with torch.enable_grad():
        arm, x = oracle.trained_arm()
    losses = {}
    for left_neighbour in (True, False):
        model = A3(Config(7, 12, 2, 2, 16, left_neighbour=left_neighbour)).eval()
        model.load_arm(arm.state_dict())
        losses[left_neighbour] = model.loss(x, chunk_groups(*x.shape))[0]
    torch.testing.assert_close(losses[True], arm.loss(x)[0])
    assert losses[False] > losses[True] + 0.1


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


# ---- the network, large vocabularies and compilers ---------------------------------------


def test_dropout_is_for_training():
    """On embeddings and in every block. None of it in eval()."""
    plain = make_a3()
    x = texts(5)[::30]
    model = make_a3(dropout=0.5)
    groups = chunk_groups(len(x), 5)
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


def test_logits_in_chunks(monkeypatch):
    """The same loss and gradients whether logits are made at once or few at a time."""
    model = make_a3()
    x = torch.randint(V, (8, 5))
    sizes, results = [], []
    spy(monkeypatch, A3, "logits", lambda out, model, h: sizes.append(len(h)))
    for limit, most in ((2**26, 40), (7 * V, 7)):
        sizes.clear()
        monkeypatch.setattr(a3, "MAX_LOGITS", limit)
        model.zero_grad()
        loss, _ = model.loss(x, RAGGED)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        assert max(sizes) == most
    torch.testing.assert_close(*results)


def test_loss_compiles_to_one_graph():
    """When the caller says whether every group has one token, nothing depends on the data."""
    model = make_a3()
    x = torch.randint(V, (8, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager")
    for size in (1, 2):
        for groups in (random_groups(8, 5, size), random_groups(8, 5, size)):
            want, _ = model.loss(x, groups)
            torch.testing.assert_close(compiled(x, groups, size == 1)[0], want)
    compiled(x)  # random_groups() of one token, which it knows


# ---- what stands in lomdm.py and in a3.py ------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["need", "rotary_tables", "rotate", "certainty", "probabilities", "nll"],
)
def test_functions_of_both_files_are_the_same(name):
    """Each file is read by itself, so what both need stands in both, word by word."""
    assert inspect.getsource(getattr(a3, name)) == inspect.getsource(getattr(lomdm, name))
    assert a3.MAX_LOGITS == lomdm.MAX_LOGITS


def test_methods_of_both_files_are_the_same():
    assert inspect.getsource(A3.logits) == inspect.getsource(lomdm.LoMDM.logits)

    def statements(function):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        return [ast.dump(line) for line in definition.body[1:]]  # without the docstring

    assert statements(a3.Block.attend) == statements(lomdm.Block.attend)


@pytest.mark.parametrize("file", [a3, lomdm], ids=["a3", "lomdm"])
def test_neither_file_needs_another_of_ours(file):
    found = set()
    for node in ast.walk(ast.parse(Path(file.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    assert found == {"dataclasses", "math", "torch"}


# ---- bad input ---------------------------------------------------------------------------


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


def test_texts_and_groups_that_do_not_fit():
    model = make_a3()
    x = torch.randint(V, (2, 5))
    ar = chunk_groups(2, 5)
    for method in (model, model.log_prob, model.loss, model.generate):
        for bad in (ar[:, :4], ar[0], ar.int(), ar.double(), ar >= 0):
            with pytest.raises(ValueError, match=r"^x and groups must both be \(B, L\)"):
                method(x, bad)
        with pytest.raises(ValueError, match="6 tokens do not fit into seq_len 5"):
            method(x.repeat(1, 2)[:, :6], chunk_groups(2, 6))
        with pytest.raises(ValueError, match=r"^texts must be \(B, L\), not \(5,\)"):
            method(x[0], ar[0])


def test_nothing_to_do():
    """Where all is given."""
    model = make_a3()
    x = torch.randint(V, (2, 5))
    given = torch.full((2, 5), -1)
    assert (model.log_prob(x, given) == 0).all() and model.loss(x, given)[0] == 0
    assert torch.equal(model.generate(x, given), x)
    done, at = model.sample(x)
    assert torch.equal(done, x) and (at == -1).all()


def test_bad_calls():
    model = make_a3()
    z = torch.full((2, 5), V)
    ar = chunk_groups(2, 5)
    for by in ("luck", "order"):
        with pytest.raises(ValueError, match=f"^by must be left, .* is learned, not '{by}'"):
            model.sample(z, by=by)
    for bad in (dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)):
        with pytest.raises(ValueError, match="^temperature must be >= 0, top_k >= 1"):
            model.sample(z, **bad)
    with pytest.raises(ValueError, match="^temperature must be >= 0"):
        model.generate(z, ar, temperature=-1.0)
    with pytest.raises(ValueError, match="^per_step must be at least 1"):
        model.sample(z, per_step=0)
    with pytest.raises(ValueError, match="^n_draws must be at least 1, not 0"):
        model.nelbo(torch.zeros(2, 5).long(), 0)
    with pytest.raises(ValueError, match="^order must be 'left' or 'random', not 'order'"):
        model.nelbo(torch.zeros(2, 5).long(), order="order")


@pytest.mark.parametrize("token", [-100, -1, V + 1, 50])
def test_tokens_out_of_range_are_refused(token):
    x = torch.full((1, 5), token)
    with pytest.raises((IndexError, RuntimeError)):
        make_a3().log_prob(x, chunk_groups(1, 5))
    x[:, :-1] = 0  # the last one is not read, only predicted
    with pytest.raises((IndexError, RuntimeError)):
        make_a3().log_prob(x, chunk_groups(1, 5))
