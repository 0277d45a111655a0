"""
What all models have in common, LoMDM with its members, A3 and LoA3: calls of the network, how
tokens are drawn, generators, chunks, compilers, and what they refuse.
"""

import math

import pytest
import torch
from oracle import MODELS, V, fits, make_a3, make_loa3, make_lomdm, make_planned, seeded, spy

import a3
import lomdm
from beyond import loa3
from beyond.decoders import decoder_log_prob

pytestmark = pytest.mark.usefixtures("float64")
every_model = pytest.mark.parametrize("name", [*MODELS, "a3", "loa3", "planned"])


def make(name, L=4, **kw):
    if name in MODELS:
        return make_lomdm(L, **MODELS[name], **kw)
    make = {"a3": make_a3, "loa3": make_loa3, "planned": make_planned}[name]
    return make(L, **kw)


# ---- sampling ----------------------------------------------------------------------------

CALLED = [
    ("lomdm", "order"),
    ("mdm", "left"),
    ("a3", "left"),
    ("a3", "random"),
    ("loa3", "order"),
    ("planned", "order"),
]


@pytest.mark.parametrize("m", [1, 3, 9])
@pytest.mark.parametrize("name,by", CALLED)
def test_per_step_calls(name, by, m, monkeypatch):
    """Each row takes m positions a call, and the network is called for the one with most."""
    model = make(name, 8)
    calls = []
    spy(monkeypatch, type(model), "logits", lambda *a: calls.append(1))
    z = torch.full((3, 8), V)
    z[0, 1] = z[0, 6] = 2  # six are open
    z[1, :] = 1  # none

    x, at = model.sample(z, per_step=m, by=by, generator=seeded(0))

    assert len(calls) == math.ceil(8 / m)
    assert (x < V).all() and (x[z < V] == z[z < V]).all()
    assert torch.equal(at == -1, z < V)
    for row, n in [(0, 6), (2, 8)]:
        sizes = at[row][at[row] >= 0].bincount()
        assert sizes.tolist() == [m] * (n // m) + [n % m] * (n % m > 0)
    if by == "left":
        assert torch.equal(at[2], torch.arange(8) // m)
    calls.clear()
    again, at = model.sample(x, by=by)
    assert torch.equal(again, x) and (at == -1).all() and not calls


@pytest.mark.parametrize("by", ["left", "confidence"])
@pytest.mark.parametrize("name", ["arm", "mdm", "a3"])
@torch.no_grad()
def test_temperature_top_k_and_top_p(name, by):
    model = make(name)
    z = torch.tensor([[0, 1, 2, V]])
    if name == "a3":
        logits = model(z.clamp(max=2), (z == V).long() - 1)[0, 3]
    else:
        logits = model.log_probs(z)[0, 3]
    likely = logits.argsort(descending=True)

    def drawn(**how):
        x, _ = model.sample(z.expand(10_000, 4), by=by, generator=seeded(0), **how)
        return x[:, 3].bincount(minlength=V)

    assert drawn(temperature=0)[likely[0]] == 10_000 == drawn(top_k=1)[likely[0]]
    assert fits(drawn(temperature=2.0), (logits / 2).softmax(-1))
    enough = logits.softmax(-1)[likely[:2]].sum().item() - 1e-9
    for how, scale in ((dict(temperature=5.0, top_k=2), 5), (dict(top_p=enough), 1)):
        two = drawn(**how)
        assert two[likely[2]] == 0
        assert fits(two[likely[:2]], (logits[likely[:2]] / scale).softmax(-1))


@every_model
def test_generators_decide_everything(name):
    """The same generator gives the same draws, and the global one is left alone."""
    model = make(name)
    x = torch.randint(V, (20, 4))
    calls = [
        lambda g: model.sample(torch.full((20, 4), V), generator=g)[0],
        lambda g: model.nelbo(x, generator=g),
    ]
    if name in MODELS:
        calls.append(lambda g: lomdm.nelbo_at(model, x, torch.full((20, 1), 0.6), g)[0])

    state = torch.get_rng_state()
    for call in calls:
        assert torch.equal(call(seeded(0)), call(seeded(0)))
    assert not torch.equal(calls[0](seeded(0)), calls[0](seeded(1)))
    assert torch.equal(state, torch.get_rng_state())


# ---- large vocabularies and compilers ----------------------------------------------------


def loss_and_gradients(model, loss_of, x):
    torch.manual_seed(3)
    loss, _ = loss_of(x)
    parameters = list(model.parameters())
    return [loss, *torch.autograd.grad(loss, parameters, materialize_grads=True)]


@pytest.mark.parametrize("name", ["arm", "block", "block lomdm", "a3", "loa3"])
def test_logits_in_chunks(name, monkeypatch):
    """The same loss and the same gradients whether logits are made at once or few at a time,
    and never more of them than that. Every parameter has a gradient."""
    model = make(name, 8)
    x = torch.randint(V, (4, 8))
    sizes = []
    spy(monkeypatch, type(model), "logits", lambda out, model, h: sizes.append(len(h)))
    want = loss_and_gradients(model, model.loss, x)
    assert max(sizes) >= 32 and all(t.abs().max() > 1e-6 for t in want)

    sizes.clear()
    for file in (lomdm, a3):
        monkeypatch.setattr(file, "MAX_LOGITS", 5 * V)
    torch.testing.assert_close(loss_and_gradients(model, model.loss, x), want)
    assert max(sizes) == 5


@pytest.mark.parametrize("name", ["arm", "block lomdm", "a3", "loa3"])
def test_loss_compiles_to_one_graph(name):
    model = make(name, 8)
    x = torch.randint(V, (4, 8))
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager")
    want = loss_and_gradients(model, model.loss, x)
    torch.testing.assert_close(loss_and_gradients(model, compiled, x), want)


# ---- what is refused ---------------------------------------------------------------------

FIELDS = [
    (dict(n_embd=10, n_head=3), "n_embd .* divisible by n_head"),
    (dict(n_embd=6, n_head=2), "even quotient"),
    (dict(dropout=1.0), "dropout"),
    (dict(n_layer=0), "n_layer must be at least 1"),
]
FIELDS_OF_LOMDM = [
    (dict(seq_len=10, block_len=4), "seq_len .10. must be divisible by block_len .4."),
    (dict(c1=0.5, c2=0.5), "c1 .* above c2"),
    (dict(c2=-0.1), "c2 not negative"),
    (dict(weights="softmax"), "normsig"),
    (dict(learn_order=True, block_len=1), "only one order"),
]
FIELDS_OF_LOA3 = [
    (dict(random_share=share), "random_share must be in") for share in (-0.1, 1.0)
]


@pytest.mark.parametrize(
    "Config,kw,message",
    [
        *((a3.Config, *case) for case in FIELDS),
        *((lomdm.Config, *case) for case in FIELDS + FIELDS_OF_LOMDM),
        *((loa3.Config, *case) for case in FIELDS_OF_LOA3),
    ],
)
def test_bad_config(Config, kw, message):
    with pytest.raises(ValueError, match=message):
        Config(**(dict(vocab_size=3, seq_len=4, n_layer=1, n_head=1, n_embd=4) | kw))


CALLS = [  # of all, and of one
    *((None, "sample", dict(temperature=t), "^temperature") for t in (-1, math.nan, math.inf)),
    (None, "sample", dict(top_k=0), "top_k >= 1"),
    (None, "sample", dict(top_p=0), "top_p in"),
    (None, "sample", dict(top_p=1.1), "top_p in"),
    (None, "sample", dict(per_step=0), "^per_step must be at least 1, not 0"),
    (None, "sample", dict(by="luck"), "^by must be left, .* learned, not 'luck'"),
    (None, "nelbo", dict(n_draws=0), "^n_draws must be at least 1, not 0"),
    ("lomdm", "nelbo", dict(bound="elbo"), "bound must be 'jump' or 'paper', not 'elbo'"),
    ("a3", "nelbo", dict(order="order"), "^order must be 'left' or 'random', not 'order'"),
    ("a3", "sample", dict(by="order"), "^by must be left, .* learned, not 'order'"),
]


@pytest.mark.parametrize("only,ask,how,message", CALLS)
def test_bad_calls(only, ask, how, message):
    for name in [only] if only else ["lomdm", "a3", "loa3"]:
        with pytest.raises(ValueError, match=message):
            getattr(make(name), ask)(torch.full((2, 4), V if ask == "sample" else 0), **how)


@every_model
def test_texts_that_do_not_fit(name):
    """By whatever is asked. test_lomdm.py has more of them."""
    model = make(name)
    for call in (model.loss, model.nelbo, model.sample):
        for shape in ((2, 6), (8,), (2, 0)):
            with pytest.raises(ValueError, match=r"^texts must be|^6 tokens do not fit"):
                call(torch.zeros(shape).long())


@every_model
def test_tokens_out_of_range(name):
    """Not even PyTorch's own ignore_index, -100, costs nothing. From left to right the last
    token is not read, and only predicted."""
    model = make(name)
    for token in (-100, -1, V + 1, 50):
        x = torch.tensor([[0, 0, 0, token]])
        for call in (model.nelbo, lambda x: decoder_log_prob(model, x, "left")):
            with pytest.raises((IndexError, RuntimeError)):
                call(x)
