"""
The exact likelihood of a decoder, for the models of lomdm.py and of a3.py.

A decoder that chooses its positions by a fixed rule, such as "most confident first", writes a
given text on one path only. So walk it through that text: let it choose, write the true token
there, and add up the logarithms of its guesses. The sum is log p(x) for that decoder. This is
another p than the one whose bound nelbo() gives, as nelbo() is about orders that are drawn.
"""

import torch

import a3
import lomdm
from a3 import need
from beyond import loa3


@torch.no_grad()
def decoder_log_prob(model, x, by="left", per_step=1):
    """log p(x) (B,) in nats, exactly, of the decoder sample(by=by, per_step=per_step), for
    texts x (B, L). Where a learned order would be drawn, the decoder takes the likeliest: the
    largest w_hat or q_hat. It takes as many calls as the decoder, and for an A3 from "left" or by
    "order" just one. ValueError for rules that are random."""
    need(per_step >= 1, f"per_step must be at least 1, not {per_step}")
    is_a3 = isinstance(model, a3.A3)
    uniform = not is_a3 and not model.config.learn_order and model.config.block_len > 1
    is_random = by == "random" or (by == "order" and uniform)
    need(not is_random, f"by {by!r} takes other steps each time; nelbo() bounds their mean")

    if not is_a3:
        by = "left" if by == "order" and not model.config.learn_order else by  # blocks of one
        return walk_blocks(model, x, by, per_step)
    has_order = by != "order" or isinstance(model, loa3.LoA3)
    need(has_order, "by 'order' is for LoMDM and LoA3: this model has not learned one")
    if by == "left":
        steps = a3.chunk_groups(*x.shape, per_step, x.device)
    elif by == "order":
        steps = model.likeliest_order(*x.shape) // per_step
    else:
        steps = walk_groups(model, x, by, per_step)
    return model.log_prob(x, steps).sum(1)


def walk_blocks(model, x, by, per_step):
    """log p(x) (B,) of a decoder of lomdm.py: LoMDM.sample(), but the true tokens are
    written."""
    model.check(x)
    L = x.shape[1]
    K = min(L, model.config.block_len)
    read = lomdm.CachedReader(model, x)
    z = torch.full_like(x, model.mask_id)
    log_p = 0

    for end in range(K, L + 1, K):
        here = slice(end - K, end)
        for left in range(K, 0, -per_step):  # as many positions are hidden in every text
            h = read(z[:, :end])  # (B, K, C)
            score = model.score(h, by)
            score = score.masked_fill(z[:, here] != model.mask_id, -torch.inf)
            pick = score.argsort(dim=1, descending=True, stable=True)[:, : min(left, per_step)]

            token = x[:, here].gather(1, pick)  # (B, m)
            log_mu = model.logits(h.take_along_dim(pick[..., None], dim=1)).log_softmax(-1)
            log_p = log_p + log_mu.gather(2, token[..., None]).sum((1, 2))
            z[:, here].scatter_(1, pick, token)
    return log_p


def walk_groups(model, x, by, per_step):
    """The step (B, L) at which a decoder of a3.py fills each position, if it is to write x."""
    model.check(x)
    B, L = x.shape
    revealed_at = torch.full_like(x, L)  # L: still open
    read = a3.Cache(model, x)

    for step in range(-(-L // per_step)):
        is_open = revealed_at == L  # as many in every text
        at = is_open.nonzero()[:, 1].view(B, -1)
        score = model.score(read(x, revealed_at, at), at, by, None)
        best = score.argsort(dim=1, descending=True, stable=True)[:, :per_step]
        revealed_at.scatter_(1, at.gather(1, best), step)
    return revealed_at
