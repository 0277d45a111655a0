"""
beyond/decoders.py: the likelihood of a decoder that follows a rule, against a naive walk along
the text, for the models of lomdm.py, a3.py and beyond/loa3.py.
"""

import pytest
import torch
from oracle import V, count, fits, make_a3, make_loa3, make_lomdm, seeded, texts

import lomdm
from beyond.decoders import decoder_log_prob

pytestmark = pytest.mark.usefixtures("float64")
RULES = ("left", "confidence", "entropy", "margin", "order")
BLOCKS = {
    "one block": dict(learn_order=True),
    "blocks": dict(learn_order=True, block_len=2),
    "arm": dict(block_len=1),
}
all_blocks = pytest.mark.parametrize("kw", BLOCKS.values(), ids=BLOCKS)


# ---- a walk along a text -----------------------------------------------------------------


def look_at_blocks(model, row, taken):
    """What a LoMDM says of a text if only the positions that were taken, a list for each call,
    are known: log p (L, V), how much it prefers each position, and where the next token may
    go."""
    L = len(row)
    done = [i for positions in taken for i in positions]
    K = model.config.block_len
    b = min(i for i in range(L) if i not in done) // K

    z = torch.full((1, L), V)
    z[0, done] = row[done]
    open = [i for i in range(b * K, (b + 1) * K) if i not in done]
    return model.log_probs(z)[0], model.order_weights_hat(z)[0], open


def look_at_groups(model, row, taken):
    """The same for an A3: what is open is one group, after those that were taken."""
    L = len(row)
    groups = torch.full((1, L), 9)
    for step, positions in enumerate(taken):
        groups[0, positions] = step

    open = [i for i in range(L) if groups[0, i] == 9]
    order = torch.zeros(L)
    if hasattr(model, "order"):
        order = model.order.log_weights(L)[model.order.log_q_hat_way().argmax()]
    return model(row[None], groups)[0].log_softmax(-1), order, open


def walk(look, model, row, by, per_step):
    """A decoder forced along one text: look at all that is open, take the best, pay for their
    true tokens. Returns the positions it takes at each call, and log p of the text."""
    taken, total = [], 0.0
    while sum(map(len, taken)) < len(row):
        log_p, order, open = look(model, row, taken)

        if by in ("left", "order"):
            score = -torch.arange(len(row)) if by == "left" else order
        else:
            score = lomdm.certainty(log_p, by)

        now = sorted(open, key=lambda i: -score[i].item())[:per_step]
        total += sum(log_p[i, row[i]].item() for i in now)
        taken.append(now)
    return taken, total


def check_walk(look, model, by, per_step):
    """The likelihoods of all texts sum to one, and are those of the walk. Nothing is drawn."""
    x = texts(4)
    state = torch.get_rng_state()
    got = decoder_log_prob(model, x, by, per_step)

    assert torch.equal(torch.get_rng_state(), state)
    assert got.shape == (81,) and got.exp().sum().item() == pytest.approx(1, abs=1e-10)
    for n in range(per_step - 1, 81, 5):
        want = walk(look, model, x[n], by, per_step)[1]
        assert got[n].item() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("by", RULES)
@all_blocks
@torch.no_grad()
def test_lomdm_is_a_walk_and_sums_to_one(kw, by, per_step):
    check_walk(look_at_blocks, make_lomdm(**kw), by, per_step)


@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("by", RULES)
@torch.no_grad()
def test_a3_is_a_walk_and_sums_to_one(by, per_step):
    check_walk(look_at_groups, make_loa3(seed=5), by, per_step)
    if by != "order":
        check_walk(look_at_groups, make_a3(4), by, per_step)


@pytest.mark.parametrize("by", RULES[:4])  # by "order" a sampler draws
@all_blocks
@torch.no_grad()
def test_samples_take_the_positions_of_their_rule(kw, by):
    """In the order that the walk along the sampled text takes; and they are drawn from p of
    it."""
    model = make_lomdm(**kw)
    x, at = model.sample(torch.full((10_000, 4), V), by=by, generator=seeded(0))

    for n in range(20):
        taken, _ = walk(look_at_blocks, model, x[n], by, 1)
        assert [at[n, now].item() for now in taken] == list(range(len(taken)))
    assert fits(count(x, texts(4)), decoder_log_prob(model, texts(4), by).exp())


# ---- what has no likelihood --------------------------------------------------------------


@pytest.mark.parametrize(
    "make,by,message",
    [
        (lambda: make_lomdm(learn_order=True), "random", r"other steps each time; nelbo\(\)"),
        (lambda: make_lomdm(), "order", r"other steps each time; nelbo\(\) bounds"),
        (lambda: make_loa3(), "random", r"other steps each time; nelbo\(\) bounds"),
        (lambda: make_a3(4), "order", "this model has not learned one"),
        (lambda: make_a3(4), "luck", "by must be left, .* not 'luck'"),
        (lambda: make_lomdm(), "luck", "by must be left, .* not 'luck'"),
        (lambda: make_lomdm(3), "left", "^texts must be"),
        (lambda: make_lomdm(9, block_len=3), "left", "^texts must be"),
    ],
)
def test_bad_calls(make, by, message):
    with pytest.raises(ValueError, match=message):
        decoder_log_prob(make(), texts(4), by)


@pytest.mark.parametrize("make", [make_lomdm, make_a3])
def test_no_position_a_call(make):
    with pytest.raises(ValueError, match="per_step must be at least 1, not 0"):
        decoder_log_prob(make(), texts(4), "left", 0)
