"""
Several tokens a call, without changing what is drawn: speculative decoding for any fixed order.

A call of an A3 may ask for the next k tokens of an order at once. But drawn at once, they do
not see each other, so together they are not a draw from p. Treat them as drafts, drawn from q
(here a distribution of tokens, not of orders), and let the next call check them. It commits
all k drafts, and predicts each from the tokens before it, drafts included. That is p. Go
through the drafts in order, and accept a draft with probability min(1, p / q). Draw the first
one that is refused anew, from max(0, p - q), and forget the rest. What comes out is a draw
from p, whatever q is: a token is drawn and accepted with probability min(p, q), and max(0, p -
q) is what is missing to p (Leviathan et al., arXiv:2211.17192; for any order:
arXiv:2504.20456). The first draft saw all there was, so q = p and it is always accepted.

The same call can draft the next tokens, too, as the queries of an A3 may look at any number of
committed tokens. It does not know yet how many drafts will be accepted, 1 to k, so it asks k
queries for each of these numbers: k families of k queries. Then a round costs one call, where
others need two. But that call has k^2 queries, so k should be small.

With k = 3, drafts d1 d2 d3 and ? for what is predicted:

    family 1    sees d1          and predicts    d2?  ?  ?
    family 2    sees d1 d2       and predicts    d3?  ?  ?
    family 3    sees d1 d2 d3    and predicts    ?    ?  ?

Families 1 and 2 check d2 and d3 by their first query. If 2 drafts are accepted, the queries of
family 2 are the drafts of the next round, the first of them in place of d3.
"""

import torch
import torch.nn.functional as F

import a3
from a3 import need, probabilities


@torch.no_grad()
def generate_speculative(model, x, groups, drafts=4, generator=None, **how):
    """As model.generate(x, groups), for groups of one token: fill what has groups >= 0 in x
    (B, L) with a draw from p(x | given), in fewer calls. drafts is k above. how: temperature,
    top_k and top_p of a3.probabilities(). Returns x and the number of calls."""
    model.check(x, groups)
    L = x.shape[1]
    k = min(drafts, L)
    ranks, order = a3.ranks(groups).sort(dim=1)  # order (B, L): what is read first, second, ..
    alone = (ranks.diff(dim=1) != 0).all()
    need(k >= 1 and alone, "drafts must be at least 1, and every group one token")
    done = (groups < 0).sum(1, keepdim=True)  # (B, 1): how many tokens are settled
    if done.min() == L:
        return x.clone(), 0

    # From here on the rank of a token is its place in this order. Texts that are done before
    # others go on writing behind their end. All that goes to position L, which is cut off at
    # the end.
    order = F.pad(order, (0, 2 * k), value=L)  # (B, L + 2 k)
    x = F.pad(x, (0, 1))  # (B, L + 1)
    j = torch.arange(k, device=x.device)
    cache = a3.Cache(model, x[:, :L])

    # The first call commits the start and what is given, and drafts from what the queries say.
    # Each call settles at least one token, so L calls are enough.
    given = given_tokens(model, x[:, :L], order[:, :L], done)
    logits = ask(model, cache, x, order, *given, done, k)  # (B, 1, k, V)
    q = probabilities(logits[:, 0], **how)  # (B, k, V)
    drafted = draft(q, torch.zeros_like(q[:, :1]), generator)  # (B, k)

    for call in range(1, L + 1):
        # Write the drafts. The first one always stands. If it was the last token, that is all.
        rank = done + j  # (B, k)
        slots = order.gather(1, rank) + 1  # token i is in slot i + 1
        x.scatter_(1, slots - 1, drafted)
        if (done + 1 >= L).all():
            return x[:, :L], call

        # Commit them, and ask all families at once: k families of k queries.
        seen = done + j + 1
        logits = ask(model, cache, x, order, drafted, slots, rank, seen, k)  # (B, k, k, V)

        # Check all drafts but the first by the first query of the families before the last.
        p = probabilities(logits[:, :-1, 0], **how)  # (B, k - 1, V)
        accepted = accept(drafted[:, 1:], p, q[:, 1:], generator)  # (B, 1): 1 .. k
        # The refused stay in the cache. As `seen` is at most L + k, nobody sees this rank.
        cache.key_ranks[:, -k:].masked_fill_(j >= accepted, L + 2 * k)
        done = (done + accepted).clamp(max=L)

        # Draft from the family that saw just what is settled now. Its first token is drawn
        # from max(0, p - q), if a draft was refused there, where q is what that draft was
        # drawn from. If none was refused, q is 0.
        q_refused = F.pad(q, (0, 0, 0, 1)).take_along_dim(accepted[..., None], dim=1)  # (B, 1, V)
        family = (accepted - 1)[..., None, None]
        q = probabilities(logits.take_along_dim(family, dim=1)[:, 0], **how)  # (B, k, V)
        drafted = draft(q, q_refused, generator)


def given_tokens(model, x, order, done):
    """The start token and what is given in x (B, L): tokens, slots and ranks (B, 1 + n). Short
    rows are padded with rank L + 1. Only queries behind the end, which are cut off, see it."""
    L, n = x.shape[1], int(done.max())
    at = order[:, :n]
    place = torch.arange(n, device=x.device).expand_as(at)
    tokens = F.pad(x.gather(1, at), (1, 0), value=model.start_id)
    slots = F.pad(at + 1, (1, 0))
    rank = F.pad(torch.where(place < done, place, L + 1), (1, 0), value=-1)
    return tokens, slots, rank


def ask(model, cache, x, order, tokens, slots, rank, seen, k):
    """One call: commit tokens (B, m) of these ranks (B, m) in these slots (B, m), and for each
    number of settled tokens in seen (B, n) predict the k tokens that come next: logits (B, n,
    k, V). x is (B, L + 1), with the column for what is written behind the end."""
    L = x.shape[1] - 1
    j = torch.arange(k, device=x.device)
    at = order.gather(1, (seen[..., None] + j).flatten(1))  # (B, n k)

    # A left neighbour may be seen if it comes early enough in the order.
    place = order[:, :L].argsort(dim=1)
    visible = place[:, None, :-1] < seen[..., None]  # (B, n, L - 1)
    left = model.left_neighbours(x[:, None, :L].expand(-1, seen.shape[1], -1), visible)
    left = left.gather(2, at.clamp(max=L - 1).view(len(x), -1, k)).flatten(1)  # (B, n k)

    before = seen.repeat_interleave(k, dim=1)
    logits = cache.step(tokens, slots, rank, at, left, before)
    return logits.unflatten(1, (-1, k))


def accept(drafts, p, q, generator):
    """How many drafts stand, (B, 1) from 1 to k. drafts (B, k - 1) are all but the first,
    which always stands; p and q (B, k - 1, V) are what they should be and what they were drawn
    from."""
    ratio = p.gather(2, drafts[..., None]) / q.gather(2, drafts[..., None])  # (B, k - 1, 1)
    u = torch.rand(ratio.shape, generator=generator, device=p.device)
    stands = (u < ratio).long().cumprod(dim=1)  # 0 from the first refusal on
    return 1 + stands.sum(1)


def draft(q, q_refused, generator):
    """New tokens (B, k) from q (B, k, V), the first one from max(0, q - q_refused) with
    q_refused (B, 1, V). For that one q is what it should come from, p at the top, and
    q_refused what the refused draft came from, q there."""
    first = (q[:, :1] - q_refused).clamp(min=0)

    # If the two are equal to rounding, all of that is 0, and the token is drawn from q.
    first = first + 1e-30 * q[:, :1]
    p = torch.cat((first, q[:, 1:]), dim=1)
    return torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(q.shape[:2])
