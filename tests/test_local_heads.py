"""Heads that begin by looking at a neighbour: Block.look_at() of both model files."""

import oracle
import pytest
import torch

import a3
import lomdm
from beyond import loa3

pytestmark = pytest.mark.usefixtures("float64")

L, V, C, H = 12, 5, 64, 4
SIZE = {"vocab_size": V, "seq_len": L, "n_layer": 2, "n_head": H, "n_embd": C}


def lomdm_scores(block):
    """Scores (n_head, L, L) of the block's attention where the residual stream is 0, so that
    only the biases count."""
    rotary = lomdm.rotary_tables(torch.arange(L), C // H)
    q, k, _ = block.project(torch.zeros(1, L, C), rotary)
    return (q @ k.transpose(-1, -2))[0]


@pytest.mark.parametrize(
    "model, distances",
    [
        ({}, [-1, 1, -2, 2]),
        ({"block_len": 4}, [-1, 1, -2, 2]),
        ({"learn_order": True}, [-1, 1, -2, 2]),
        # place i of an ARM holds token i - 1, so the tokens before it are 0, 1, 2, .. behind
        ({"block_len": 1}, [0, -1, -2, -3]),
    ],
)
def test_each_head_begins_at_its_neighbour(model, distances):
    """Every block, those of the order included, and wherever the neighbour exists."""
    model = lomdm.LoMDM(lomdm.Config(**SIZE, **model, local_heads=1.0))
    blocks = [m for m in model.modules() if isinstance(m, lomdm.Block)]
    assert len(blocks) == 2 + model.config.learn_order
    for block in blocks:
        for scores, d in zip(lomdm_scores(block), distances, strict=True):
            for i in range(max(0, -d), min(L, L - d)):
                assert scores[i].argmax() == i + d
                first, second = scores[i].topk(2).values / (C // H) ** 0.5
                assert first > second + 2  # e^2 times as much attention


@torch.no_grad()
def test_the_free_heads_begin_without_preference():
    for cls, Config in ((lomdm.LoMDM, lomdm.Config), (a3.A3, a3.Config)):
        bias = cls(Config(**SIZE, local_heads=0.5)).blocks[0].qkv.bias.view(3, H, -1)
        assert (bias[:2, : H // 2].flatten(2).norm(dim=-1) > 1).all()
        assert not bias[:2, H // 2 :].any() and not bias[2].any()
        plain = cls(Config(**SIZE, local_heads=0.0))
        assert all(block.qkv.bias is None for block in plain.blocks)


def test_a_query_of_a3_begins_at_the_tokens_beside_it():
    """Token j is in slot j + 1, and the query for token i in slot i."""
    for cls, Config in ((a3.A3, a3.Config), (loa3.LoA3, loa3.Config)):
        model = cls(Config(**SIZE, local_heads=1.0))
        rotary = model.rotary(torch.arange(L + 1)[None])
        u = torch.zeros(1, L + 1, C)
        for block in model.blocks:
            q = block.queries(u, rotary)
            k, _ = block.keys_values(u, rotary)
            for scores, d in zip((q @ k.transpose(-1, -2))[0], [-1, 1, -2, 2], strict=True):
                for i in range(max(0, -d), min(L, L - d)):
                    assert scores[i].argmax() == i + d + 1


def test_what_look_at_says_of_the_score():
    """c^2 sum_j cos(f_j (distance - d)), in float64."""
    block = lomdm.Block(lomdm.Config(**SIZE, local_heads=0.5), 0.0).double()
    torch.nn.init.zeros_(block.qkv.bias)
    block.look_at([3])
    f = 1e4 ** (-2 * torch.arange(C // H // 2, dtype=torch.float64) / (C // H))
    pos = torch.arange(L, dtype=torch.float64)
    q, k, _ = block.project(torch.zeros(1, L, C, dtype=torch.float64), lomdm.rotary_tables(pos, 16))
    distance = pos[None] - pos[:, None]
    want = 25 * torch.cos(f * (distance - 3)[..., None]).sum(-1)
    torch.testing.assert_close((q @ k.transpose(-1, -2))[0, 0], want, rtol=0, atol=1e-10)


@torch.no_grad()
def test_what_is_tied_together_stays_so_with_biases():
    """Block diffusion in blocks of one is the ARM, a loaded ARM is the ARM, a cache changes
    nothing, and the naive loop has the same logits, when the biases are no longer zero."""
    x = torch.randint(oracle.V, (3, 6))
    arm = oracle.make_lomdm(L=6, block_len=1, local_heads=1.0)
    a3_model = oracle.make_a3(6, local_heads=1.0)
    groups = a3.random_groups(3, 6)
    want = oracle.naive_batch(a3_model, x, groups)
    torch.testing.assert_close(a3_model(x, groups), want, rtol=1e-10, atol=1e-10)

    z = x.masked_fill(groups % 2 == 1, a3_model.mask_id)
    plain, cached = (
        a3_model.sample(z, generator=torch.Generator().manual_seed(0), cache=cache)[0]
        for cache in (False, True)
    )
    assert torch.equal(plain, cached)

    a3_model.load_arm(arm.state_dict())
    torch.testing.assert_close(a3_model.nelbo(x, order="left"), arm.nelbo(x))


def test_a_plain_checkpoint_does_not_fit_and_says_so():
    plain = oracle.make_lomdm(L=6, block_len=1, local_heads=0.0)
    with pytest.raises(ValueError, match="blocks.0.qkv.bias is None, not"):
        oracle.make_a3(6, local_heads=1.0).load_arm(plain.state_dict())
