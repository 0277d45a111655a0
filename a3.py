"""
Any order, any subset, A3 (arXiv:2601.13228): a language model that predicts its tokens in any order
you like, several at a time if you like, with an exact likelihood and an exact cache.

Cut the positions of a text x (B, L) into groups G_1, .., G_K, in the order of their prediction:

    {0}, {1}, .., {L-1}              ARM, the GPT you know                      -> chunk_groups()
    contiguous chunks                multi-token prediction, left to right      -> chunk_groups()
    what is visible, then the rest   one step of a masked diffusion model
    a random partition               any order, any subset                      -> random_groups()

`groups` (B, L) long holds the rank of each position's group, a partition of its own for every row.
Only the order of the numbers counts. A negative one marks a given token, which is not predicted:
given tokens are read first, one by one, from left to right where their numbers are the same, like a
prompt. Everything is in nats.

(1) The likelihood. Tokens of a group see the groups before, not each other:
        log p(x) = sum_k sum_{i in G_k} log p(x_i | x_{G_1}, .., x_{G_{k-1}})   -> A3.log_prob()

(2) Two streams with the same weights, as a position must know its token to be read by others and
    must not know it to be predicted:                                           -> who_sees()
        content h_i  sees the content of groups <= its own     (knows x_i)
        query   q_i  sees the content of groups <  its own     (knows i, not x_i)
    and p(x_i | ..) = softmax(W q_i). Nobody sees a query; all see a start token before the text.
    The start token is in slot 0, token i in slot i + 1. As in an ARM, q_i stands in slot i: token
    i - 1 is there, and q_i begins as its embedding if it may see it. Left to right that is the ARM.

(3) Sort the tokens by group, each with its position. The text a b c d with groups 1 0 2 0:
                        start  b  d  a                        start  b  d  a
        content  start    #                          query  b   #
                 b        #    #  #                         d   #
                 d        #    #  #                         a   #    #  #
                 a        #    #  #  #                      c   #    #  #  #
    The content of the last token, c, is left out: nobody needs it. With one token a group, both
    tables are exactly a GPT's causal mask, and no mask is built.               -> A3.features()

(4) The cache. What content i sees is settled when i is committed, so its keys and values never
    change. A group costs one call: content of the last one, queries for the next.  -> A3.step()

(5) Decoding. The next group is fixed, or chosen by looking at the predictions for all that is open.
    What is chosen together becomes one group, as in training.                  -> A3.decode()
    In a fixed order, a call may check some drafts and draw more.    -> A3.generate_speculative()

(6) Progressive adaptation. Start from an ARM, ours or a LLaMA, whose weights fit both streams, and
    go from one token left to right, over growing chunks, to random partitions. -> curriculum()

(7) A learned order, as in LoMDM (arXiv:2602.02112), but on two streams, which score all steps of an
    order in one pass: both papers in one, and in neither. The model draws an order by q_hat, then a
    text in that order; to train, an order is drawn by q, which has seen the text:  -> Order
        p(x) = sum_order q_hat(order) prod_k p(x_{order_k} | x_{order_<k})
        -log p(x) <= E_q sum_k [ -log p(x_{order_k} | x_{order_<k})                            recon
          + log q(order_k | order_<k, x) - log q_hat(order_k | order_<k) ]  order   -> order_loss()
    With q and q_hat uniform it is (1) for random orders; with all on left to right, the ARM.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

RULES = "left", "order", "random", "confidence", "entropy", "margin"  # which tokens come next


@dataclass
class Config:
    vocab_size: int
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    left_neighbour: bool = True  # False: all queries begin as one vector, as in the paper
    start_id: int | None = None  # BOS; None: a token on top of the others, with the id vocab_size
    n_kv_head: int | None = None  # fewer heads for keys and values, each for several queries
    head_dim: int | None = None  # None: n_embd / n_head
    hidden: int | None = None  # of the MLP; None: as many parameters as 4 n_embd without gate
    rope_base: float = 1e4
    rope_turns: tuple | None = None  # (head_dim / 2,) radians per position, for rope_base's
    norm_eps: float = 1e-5
    tied: bool = False  # the output reads the input's embeddings
    positions: bool = True  # learned ones besides the rotary; without, see A3.__init__
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3
    learn_order: bool = False  # (7)
    random_share: float = 0.0  # of texts that (7) reads in random order, to keep the others alive

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        C, H = self.n_embd, self.n_head
        if self.head_dim is None and C % (2 * H):  # rotary embeddings turn pairs of channels
            raise ValueError(f"n_embd ({C}) must be divisible by n_head ({H}), with even quotient")
        self.head_dim = C // H if self.head_dim is None else self.head_dim
        self.n_kv_head = H if self.n_kv_head is None else self.n_kv_head
        self.hidden = 32 * math.ceil(8 * C / 3 / 32) if self.hidden is None else self.hidden
        if self.n_kv_head < 1 or H % self.n_kv_head or self.head_dim % 2:
            raise ValueError(f"n_kv_head must divide n_head ({H}), and head_dim must be even")
        if not (0 <= self.dropout < 1 and 0 <= self.random_share < 1):
            raise ValueError("dropout and random_share must be in [0, 1)")


# ---- groups --------------------------------------------------------------------------------------
def chunk_groups(B, L, size=1, device=None):
    """Chunks of `size` neighbours, left to right, the last perhaps shorter: groups (B, L) long."""
    if size < 1:
        raise ValueError(f"the size of a group must be at least 1, not {size}")
    return (torch.arange(L, device=device) // size).repeat(B, 1)  # each row its own memory


def random_groups(B, L, size=1, generator=None, device=None):
    """A random order, one for each row, cut into groups of `size`: groups (B, L) long."""
    place = torch.rand(B, L, generator=generator, device=device).argsort(dim=1)  # a permutation
    return chunk_groups(B, L, size, device).gather(1, place)


def ranks(groups):
    """groups (B, L) where each given token has a number of its own, below 0, in reading order."""
    place = groups.argsort(dim=1, stable=True).argsort(dim=1)  # 0 .. L - 1
    return torch.where(groups < 0, place - groups.shape[1], groups)


def who_sees(keys, content, query):
    """Equation (2) for ranks of groups: keys (B, S), content (B, n), query (B, m). Returns the mask
    argument of scaled_dot_product_attention for each stream, (B, 1, n, S) and (B, 1, m, S)."""
    keys, content, query = keys[:, None, None], content[:, None, :, None], query[:, None, :, None]
    return {"attn_mask": keys <= content}, {"attn_mask": keys < query}  # row sees column


# ---- the network: LLaMA's blocks, read twice -----------------------------------------------------
def rotary_tables(pos, config):
    """cos, sin (B, 1, T, head_dim) for rotate() at pos (B, T), the first sin of a pair negated."""
    j = torch.arange(0, config.head_dim, 2, device=pos.device) / config.head_dim  # (head_dim / 2,)
    f = j.new_tensor(config.rope_turns) if config.rope_turns else config.rope_base**-j  # radians
    angle = pos[:, None, :, None] * torch.cat((-f, f))  # (B, 1, T, head_dim)
    return angle.cos(), angle.sin()


def rotate(q, cos, sin):
    """Turn each pair of channels j, j + head_dim / 2 of q (B, heads, T, head_dim). roll() swaps."""
    return (q * cos + q.roll(q.shape[-1] // 2, dims=-1) * sin).type_as(q)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU: an ARM's block, applied to two streams."""

    def __init__(self, config):
        super().__init__()
        C, D, eps = config.n_embd, config.head_dim, config.norm_eps
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.n_kv_head, config.dropout
        self.norm1 = nn.RMSNorm(C, eps=eps)
        self.qkv = nn.Linear(C, (self.n_head + 2 * self.n_kv_head) * D, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(D, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(self.n_head * D, C, bias=False)
        self.norm2 = nn.RMSNorm(C, eps=eps)
        self.gate_up = nn.Linear(C, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, C, bias=False)

    def heads(self, h, rows):
        """Some rows of the matrix qkv applied to h (B, T, C): (B, heads, T, head_dim)."""
        bias, head_dim = self.qkv.bias, self.proj.in_features // self.n_head
        h = F.linear(h, self.qkv.weight[rows], None if bias is None else bias[rows])
        return h.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    def keys_values(self, u, rotary):
        """What others look at, for content u (B, n, C): k, v (B, n_kv_head, n, head_dim)."""
        k, v = self.heads(u, slice(self.proj.in_features, None)).chunk(2, dim=1)
        return rotate(self.k_norm(k), *rotary), v

    def forward(self, h, u, k, v, rotary, sizes, masks):
        """h and u = norm1(h) (B, T, C): streams of these sizes side by side, as they share all
        matrices. Each looks at k and v by a mask of its own, see who_sees(). Returns (B, T, C)."""
        drop = self.dropout if self.training else 0.0
        q = rotate(self.q_norm(self.heads(u, slice(self.proj.in_features))), *rotary)
        if self.n_kv_head < self.n_head:
            k, v = (t.repeat_interleave(self.n_head // t.shape[1], dim=1) for t in (k, v))
        y = [  # (B, n_head, n, head_dim) each
            F.scaled_dot_product_attention(rows, k, v, dropout_p=drop, **sees)
            for rows, sees in zip(q.split(sizes, dim=2), masks, strict=True)
        ]
        y = torch.cat(y, dim=2).transpose(1, 2).flatten(2)  # (B, T, n_head head_dim)
        h = h + F.dropout(self.proj(y), drop)
        gate, up = self.gate_up(self.norm2(h)).chunk(2, dim=-1)  # (B, T, hidden) each
        return h + F.dropout(self.down(F.silu(gate) * up), drop)


class A3(nn.Module):
    """Exact likelihoods and samples for any ordered partition of the positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C, own = config.vocab_size, config.n_embd, config.start_id is None
        self.start_id = V if own else config.start_id
        self.mask_id = V  # sample() asks for tokens with it
        # Names and shapes are those of lomdm.py's ARM: the start token is in slot 0, token i in
        # slot i + 1. The last, which an ARM never reads, shares its wpe with the slot before.
        self.wte = nn.Embedding(V + own, C)
        # Queries that see just the start token put weight 1 on it, whatever its distance: without
        # learned positions, or while those are zero, all but the first predict the same.
        self.wpe = nn.Embedding(config.seq_len, C) if config.positions else None
        self.query = nn.Parameter(torch.empty(C))  # what begins where the left neighbour is hidden
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(C, eps=config.norm_eps)
        # The start token is never predicted, nor is what fills the rows up to a multiple of 64.
        rows = len(self.wte.weight) if config.tied else 64 * math.ceil(V / 64)
        self.lm_head = nn.Linear(C, rows, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.ndim == 2 or name == "query":  # as GPT-2: residual branches keep their scale
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        self.order = Order(config) if config.learn_order else None

    def check(self, x, groups, by="left", per_step=1):
        if x.ndim != 2 or groups.shape != x.shape or groups.dtype != torch.long or not x.numel():
            what = f"not {tuple(x.shape)}, {tuple(groups.shape)} {groups.dtype}"
            raise ValueError(f"x and groups must both be (B, L), and groups long, {what}")
        if x.shape[1] > self.config.seq_len:
            raise ValueError(f"{x.shape[1]} tokens do not fit into seq_len {self.config.seq_len}")
        if by not in RULES or (by == "order" and not self.order):
            raise ValueError(f"by must be one of {RULES}, 'order' only if learned, not {by!r}")
        if per_step < 1:
            raise ValueError(f"per_step must be at least 1, and n_draws, not {per_step}")

    def left_of(self, x, before):
        """The token on the left of each position (.., L), the start token for the first one, and -1
        where it may not be seen: where before (.., L - 1) is False."""
        left = F.pad(x[..., :-1].masked_fill(~before, -1), (1, 0), value=self.start_id)
        return left if self.config.left_neighbour else torch.full_like(left, -1)

    def streams(self, tokens, slots, positions, left, sees, cache=None):
        """Both streams through all layers: content of tokens (B, n) in their slots (B, n), queries
        for positions (B, m), left (B, m) of left_of() on their left. sees: see who_sees(), for the
        keys of these n or of all in the cache. Returns the queries' final states (B, m, n_embd)."""
        n, m = sizes = slots.shape[1], positions.shape[1]
        h = self.wte(torch.cat((tokens, left.clamp(min=0)), dim=1))  # (B, n + m, C)
        h = torch.where(F.pad(left < 0, (n, 0))[..., None], self.query, h)
        slots = torch.cat((slots, positions), dim=1)  # query i is in slot i, as token i - 1 is
        if self.wpe is not None:
            h = h + self.wpe(slots.clamp(max=self.config.seq_len - 1))
        h = F.dropout(h, self.config.dropout, self.training)
        cos, sin = rotary_tables(slots, self.config)
        for layer, block in enumerate(self.blocks):
            u = block.norm1(h)
            k, v = block.keys_values(u[:, :n], (cos[:, :, :n], sin[:, :, :n]))
            if cache is not None:
                k, v = remember(cache, layer, k, v)
            if layer == self.config.n_layer - 1:  # nobody reads the content any more
                h, u, cos, sin = h[:, n:], u[:, n:], cos[:, :, n:], sin[:, :, n:]
                sizes, sees = (m,), sees[1:]
            h = block(h, u, k, v, (cos, sin), sizes, sees)
        return self.norm(h)

    def logits(self, h):
        """(..., n_embd) -> (..., V). What follows, softmax and sums, is in float32 at least."""
        logits = self.lm_head(h)[..., : self.config.vocab_size]
        return logits.to(torch.promote_types(self.wte.weight.dtype, torch.float32))

    def features(self, x, groups, single=None):
        """(3) The final query states (B, L, n_embd). single: does every group have one token? None
        finds out, for which a GPU has to stop."""
        self.check(x, groups)
        L, rank = x.shape[1], ranks(groups)
        left = self.left_of(x, rank[:, :-1] < rank[:, 1:])
        order = rank.argsort(dim=1, stable=True)  # (B, L)
        rank = rank.gather(1, order)
        tokens = F.pad(x.gather(1, order)[:, :-1], (1, 0), value=self.start_id)  # (B, L)
        slots = F.pad(order[:, :-1] + 1, (1, 0))
        single = bool((rank[:, 1:] > rank[:, :-1]).all()) if single is None else single
        keys, causal = F.pad(rank[:, :-1], (1, 0), value=-L - 1), {"is_causal": True}
        sees = (causal, causal) if single else who_sees(keys, keys, rank)
        h = self.streams(tokens, slots, order, left.gather(1, order), sees)  # sorted
        return h.gather(1, order.argsort(dim=1)[..., None].expand_as(h))

    def forward(self, x, groups):
        """Logits (B, L, V): what each position is predicted to be by the groups before its own."""
        return self.logits(self.features(x, groups))

    def log_prob(self, x, groups, single=None):
        """Equation (1), term by term: log p(x_i | earlier groups) (B, L) in nats, 0 at given
        tokens. A row's sum is the log-likelihood of what is predicted, given the rest."""
        h = self.features(x, groups, single)
        return -self.nll(h.flatten(0, 1), x.flatten()).view_as(x) * (groups >= 0)

    def loss(self, x, groups=None, single=None):
        """Nats per predicted token, and a dict of detached metrics. No groups: those of nelbo()."""
        if groups is None and self.order:
            return self.order_loss(x)
        if groups is None:
            groups, single = random_groups(*x.shape, device=x.device), True
        loss = -self.log_prob(x, groups, single).sum() / (groups >= 0).sum().clamp(min=1)
        return loss, {"nelbo": loss.detach()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, size=None, generator=None):
        """-log p(x) (B,) in nats, the mean over n_draws random_groups() of this size; 0: left to
        right. None: the bound (7) if an order was learned, else size 1."""
        self.check(x, x, "left", n_draws)
        if size is None and self.order:
            draws = [sum(self.order_terms(x, generator)) for _ in range(n_draws)]
        elif size == 0:
            draws = [-self.log_prob(x, chunk_groups(*x.shape, device=x.device))]
        else:
            how = size or 1, generator, x.device
            draws = [-self.log_prob(x, random_groups(*x.shape, *how)) for _ in range(n_draws)]
        return torch.stack(draws).mean(0).sum(1)

    max_logits = 2**26  # 256 MiB

    def nll(self, h, x):
        """-log p(x) (N,) for query states h (N, n_embd), tokens x (N,). The added code is so that
        no more than max_logits exist at a time: they come in chunks, and again in backward."""
        rows = max(1, self.max_logits // self.config.vocab_size)
        if len(x) <= rows:  # ignore_index: by default a token -100 would cost nothing
            return F.cross_entropy(self.logits(h), x, reduction="none", ignore_index=-(2**63))
        chunks = zip(h.split(rows), x.split(rows), strict=True)
        return torch.cat([checkpoint(self.nll, *chunk, use_reentrant=False) for chunk in chunks])

    # ---- the cache -------------------------------------------------------------------------------
    def step(self, cache, tokens, slots, rank, positions, left, seen):
        """(4) One call of the cached network. Tokens (B, n) are committed in their slots (B, n), in
        groups of these ranks (B, n). Then logits (B, m, V) for positions (B, m), by all that was
        committed in groups before seen (B, m). left (B, m): see left_of()."""
        (keys,) = remember(cache, "rank", rank[:, None])  # (B, 1, S)
        sees = who_sees(keys[:, 0], rank, seen)
        return self.logits(self.streams(tokens, slots, positions, left, sees, cache))

    def given(self, x, groups):
        """Start and given tokens: tokens, slots, ranks (B, 1 + n). Padding has rank L, unseen."""
        n, L = int((groups < 0).sum(1).max()), x.shape[1]
        rank, at = (t[:, :n] for t in ranks(groups).sort(dim=1))
        tokens, rank = x.gather(1, at).masked_fill(rank >= 0, 0), rank.masked_fill(rank >= 0, L)
        parts = (tokens, self.start_id), (at + 1, 0), (rank, -L - 1)
        return [F.pad(t, (1, 0), value=start) for t, start in parts]

    # ---- decoding --------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(self, x, groups, per_step, by, truth=None, generator=None, **how):
        """(5) Fill the positions of x (B, L) with groups >= 0, one group after another, and inside
        of each the per_step positions at a time that `by` is surest of ("confidence", if `by` is
        about the order of groups). If there is a truth (B, L), tokens are not drawn, but copied.
        Returns x and groups for log_prob(): each token's step; given tokens keep theirs."""
        self.check(x, groups, by, per_step)
        x, L = x.masked_fill(groups >= 0, self.mask_id), x.shape[1]
        rank = torch.where(groups < 0, groups, L)  # the step that committed a token; L: open
        cache, (tokens, slots, new) = {}, self.given(x, groups)  # what to commit next
        for step in range(L + 1):
            todo = rank == L
            first = groups.masked_fill(~todo, torch.iinfo(torch.long).max).amin(1, keepdim=True)
            at, asked = pack(todo & (groups == first))  # (B, m)
            if not at.numel():
                return x, rank
            left, seen = self.left_of(x, rank[:, :-1] < L).gather(1, at), torch.full_like(at, L)
            logits = self.step(cache, tokens, slots, new, at, left, seen)
            score = certainty(logits, by, generator).masked_fill(~asked, -torch.inf)  # (B, m)
            best = score.argsort(dim=1, descending=True, stable=True)[:, :per_step]
            at, asked = at.gather(1, best), asked.gather(1, best)  # (B, m), m <= per_step
            logits = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1]))
            if truth is None:
                p = probabilities(logits, **how).flatten(0, 1)  # (B m, V)
                tokens = torch.multinomial(p, 1, generator=generator).view_as(at)
            else:
                tokens = truth.gather(1, at)
            slots, new = at + 1, torch.where(asked, step, L)
            for t, value in ((x, tokens), (rank, step)):
                t.scatter_(1, at, torch.where(asked, value, t.gather(1, at)))

    def generate(self, x, groups, **how):
        """Fill what has groups >= 0 in x (B, L) from p(x | given). how: see probabilities()."""
        return self.decode(x, groups, x.shape[-1], "confidence", **how)[0]

    @torch.no_grad()
    def generate_speculative(self, x, groups, drafts=4, generator=None, **how):
        """The same for groups of one token, as surely from p(x | given), in fewer calls. The next
        `drafts` tokens are drawn at once, blind to each other, from q. The next call commits them
        and predicts each from those before it, p. For the first, q = p: it is sure. Any other is
        accepted with probability min(1, p / q); the first that is not is drawn anew from
        max(0, p - q), the rest get rank L. That is a draw from p, whatever q is. As queries may
        look at any number of tokens, the same call drafts for whatever will be accepted. Returns x
        and how many calls."""
        self.check(x, groups)
        (B, L), k, V = x.shape, min(drafts, x.shape[1]), self.config.vocab_size
        numbers, order = ranks(groups).sort(dim=1)
        if k < 1 or (numbers.diff(dim=1) == 0).any():
            raise ValueError("drafts must be at least 1, and every group one token")
        done = (groups < 0).sum(1, keepdim=True)  # (B, 1): how many tokens are settled
        if done.min() == L:
            return x.clone(), 0
        cache, seen, accepted = {}, done, torch.zeros_like(done)
        tokens, slots, rank = self.given(x, groups)
        place, order = order.argsort(dim=1), F.pad(order, (0, 2 * k), value=L)
        x = F.pad(x, (0, 1))  # (B, L + 1): rows that are done before others write behind the end
        j, q = torch.arange(k, device=x.device), self.wte.weight.new_zeros(B, k, V)
        for call in range(1, L + 1):
            # seen (B, n): what may turn out to be settled: one number at first, then k of them
            at = order.gather(1, (seen[..., None] + j).flatten(1))  # (B, n k)
            left = self.left_of(x[:, None, :L], place[:, None, :-1] < seen[..., None])  # (B, n, L)
            left = left.gather(2, at.clamp(max=L - 1).view(B, -1, k)).flatten(1)  # (B, n k)
            before = seen.repeat_interleave(k, dim=1)
            logits = self.step(cache, tokens, slots, rank, at, left, before).unflatten(1, (-1, k))
            if call > 1:  # logits (B, n, k, V)
                draft, p = tokens[:, 1:, None], probabilities(logits[:, :-1, 0], **how)
                ratio = p.gather(2, draft) / q[:, 1:].gather(2, draft)  # (B, k - 1, 1)
                u = torch.rand(ratio.shape, generator=generator, device=x.device)
                accepted = 1 + (u < ratio).long().cumprod(dim=1).sum(1)  # (B, 1): 1 .. k
                cache["rank"][0][:, 0, -k:].masked_fill_(j >= accepted, L)
                done = (done + accepted).clamp(max=L)
            # the q of what was refused: 0 if nothing was, or at the first call
            refused = F.pad(q, (0, 0, 0, 1)).take_along_dim(accepted[..., None], dim=1)  # (B, 1, V)
            which = (accepted - 1).clamp(min=0)[..., None, None]
            q = logits.take_along_dim(which, dim=1)[:, 0]  # (B, k, V): all see what is done now
            q = probabilities(q, **how)
            new = (q[:, :1] - refused).clamp(min=0) + 1e-30 * q[:, :1]  # (B, 1, V), never all zero
            p = torch.cat((new, q[:, 1:]), dim=1).flatten(0, 1)  # (B k, V)
            tokens = torch.multinomial(p, 1, generator=generator).view(B, k)
            rank, seen = done + j, done + j + 1
            slots = order.gather(1, rank) + 1
            x.scatter_(1, slots - 1, tokens)
            if (done + 1 >= L).all():
                return x[:, :L], call

    def sample(self, z, temperature=1.0, top_k=None, per_step=1, by=None, drafts=1, **how):
        """Fill the mask_id positions of z (B, L), per_step a call, as one group: by "left", or what
        the model is surest of among all that is open, by "confidence" (largest top probability),
        "entropy" (smallest), "margin" (of the top two), or "random"; or by "order", the default if
        one was learned, which q_hat of (7) draws. Given tokens are read first, in the same order.
        With nothing given and one per_step, x is drawn from (1) by "left", from (7) by "order".
        Both may be drafted. how: top_p, generator. Returns x and revealed_at (B, L), the call, or
        the token's number if drafted, -1 if given."""
        by = by or ("order" if self.order else "left")
        self.check(z, z, by, per_step)
        masked, L = z == self.mask_id, z.shape[1]
        if drafts != 1 and (drafts < 1 or by not in ("left", "order") or per_step > 1):
            raise ValueError("drafts must be 1, or more by 'left' or 'order' with per_step 1")
        rank = chunk_groups(*z.shape, 1, z.device)
        if by == "order":
            ways = self.order.ways().expand(len(z), 3)
            rank = self.order.draw(ways, L, how.get("generator")).argsort(dim=1)
        rank = torch.where(masked, rank + L, rank).argsort(dim=1).argsort(dim=1)  # given ones first
        place = rank - (~masked).sum(1, keepdim=True)
        groups = torch.where(masked, place // per_step, rank - L)
        how |= dict(temperature=temperature, top_k=top_k)
        if drafts > 1:
            return self.generate_speculative(z, groups, drafts, **how)[0], groups.clamp(min=-1)
        groups = groups if by in ("left", "order") else masked.long() - 1  # one: decode() chooses
        x, at = self.decode(z, groups, per_step, by, **how)
        return x, at.clamp(min=-1)

    @torch.no_grad()
    def decoder_log_prob(self, x, by="left", per_step=1):
        """log p(x) (B,) in nats, exactly, if sample() decodes by this rule: its steps on the way to
        x (B, L), and (1) with these as groups. "order": not one drawn, but q_hat's likeliest."""
        self.check(x, x, by, per_step)
        if by == "random":
            raise ValueError("by 'random' takes other steps each time; see nelbo(), their bound")
        groups = chunk_groups(*x.shape, per_step, x.device)
        if by == "order":
            s = self.order.log_weights(x.shape[1])[self.order.ways().argmax()]
            groups = groups[:, s.argsort(descending=True, stable=True).argsort()]
        elif by != "left":
            _, groups = self.decode(x, torch.zeros_like(x), per_step, by, truth=x)
        return self.log_prob(x, groups).sum(1)

    # ---- the learned order -----------------------------------------------------------------------
    def order_log_weights(self, x):
        """(7) The log-weights s (B, L) of the reading that q finds likeliest for texts x (B, L)."""
        self.check(x, x)
        return self.order.log_weights(x.shape[1])[self.order.ways(x).argmax(dim=1)]

    def order_log_probs(self, x, order):
        """(7) log q_hat and log q (B, L) of each step k, which reveals order[:, k] of x (B, L)."""
        self.check(x, order)
        return self.order(order, self.order.ways()), self.order(order, self.order.ways(x))

    def order_terms(self, x, generator=None):
        """The terms of (7) for one order of each text x (B, L), drawn by q: -log p, -log q_hat and
        log q of its steps, (B, L) each. Their sum is the cost of a step."""
        self.check(x, x)
        order = self.order.draw(self.order.ways(x), x.shape[1], generator)
        nll = -self.log_prob(x, order.argsort(dim=1), single=True)
        log_q_hat, log_q = self.order_log_probs(x, order)
        return nll.gather(1, order), -log_q_hat, log_q

    def order_loss(self, x):
        """What training minimises, for x (B, L), B > 1: the bound (7) in nats per token, which is
        metrics["nelbo"], plus a term of which only the gradient counts. It is REINFORCE: autograd
        cannot see how q changes which order is drawn, so log q of step k is weighted by its text's
        costs from k on, less the mean of those of the other texts."""
        if len(x) < 2:
            raise ValueError("a learned order compares texts: at least 2 in a batch")
        nll, nll_hat, log_q = self.order_terms(x)
        cost = nll + nll_hat + log_q  # (B, L), of each step
        to_come = cost.detach().flip(1).cumsum(1).flip(1)
        excess = (to_come - to_come.mean(0)) * len(x) / (len(x) - 1)
        metrics = dict(nelbo=cost.mean(), recon=nll.mean(), order=(nll_hat + log_q).mean())
        metrics["left_share"] = self.order.ways(x)[:, 0].exp().mean()
        return cost.mean() + (excess * log_q).mean(), {k: v.detach() for k, v in metrics.items()}

    # ---- adaptation ------------------------------------------------------------------------------
    @torch.no_grad()
    def load_arm(self, state_dict):
        """(6) Become a trained ARM of lomdm.py, to rounding. New is only what a query begins as if
        its left neighbour is hidden: the mean embedding. ValueError for other names or shapes."""
        new = {n: p for n, p in self.state_dict().items() if n == "query" or n.startswith("order.")}
        mine = {n: tuple(p.shape) for n, p in self.state_dict().items() if n not in new}
        got = {n: tuple(p.shape) for n, p in state_dict.items()}
        names = [n for n in {**mine, **got} if mine.get(n) != got.get(n)]
        if wrong := [f"{n} is {got.get(n)}, not {mine.get(n)}" for n in names]:
            raise ValueError(f"not an ARM of this size: {wrong[0]}, and {len(wrong) - 1} more")
        self.load_state_dict({**new, **state_dict, "query": state_dict["wte.weight"].mean(0)})


def remember(cache, name, *new):
    """(4) The cache is a dict of the keys and values (B, n_kv_head, S, head_dim) of each layer, and
    the ranks (B, 1, S) of their groups. Adds new to what is under name; returns both together."""
    old = cache.get(name, [t[:, :, :0] for t in new])
    cache[name] = [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
    return cache[name]


def pack(mask):
    """Places where mask (B, T) is True, (B, m), and which are real: short rows are padded."""
    real, places = mask.int().sort(dim=1, descending=True, stable=True)
    m = int(mask.sum(1).max())
    return places[:, :m], real[:, :m].bool()


def certainty(logits, by, generator=None):
    """How sure a prediction is, logits (..., V) -> (...): the rule of dynamic decoding."""
    if by == "random":
        return torch.rand(logits.shape[:-1], generator=generator, device=logits.device)
    p = F.softmax(logits, dim=-1)
    if by == "entropy":
        return torch.xlogy(p, p).sum(-1)  # minus the entropy
    top = p.topk(min(2, p.shape[-1])).values
    return top[..., 0] - top[..., -1] * (by == "margin")


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Of tokens to be drawn, logits (.., V) -> (.., V): sharper by temperature, 0 takes the
    likeliest; of the top_k likeliest; of the fewest that together have the probability top_p."""
    k, mass = logits.shape[-1] if top_k is None else top_k, 1.0 if top_p is None else top_p
    if not (0 <= temperature < math.inf and k >= 1 and 0 < mass <= 1):
        raise ValueError("temperature must be >= 0, top_k >= 1 or None, top_p in (0, 1] or None")
    logits = logits - logits.amax(-1, keepdim=True)  # the best is 0: safe to divide
    p = F.softmax(logits / max(temperature, 1e-30), dim=-1)
    if k < p.shape[-1] or mass < 1:
        likely, i = p.sort(dim=-1, descending=True)
        likely = (likely * (likely.cumsum(-1) - likely < mass))[..., :k]
        likely = likely / likely.sum(-1, keepdim=True)
        p = torch.zeros_like(p).scatter(-1, i[..., :k], likely)
    return p


def curriculum(step, total_steps, shares=(0.2, 0.3, 0.5), group_size=1):
    """(6) Stage and size of groups at step 0, 1, ..; shares of total_steps; later ones: as the last
    stage 1  one token a group, left to right: the query stream learns what the content stream knows
    stage 2  chunks of 1, then 2, then 4, a third of the stage each: to predict several at a time
    stage 3  random partitions into groups of group_size: any order"""
    if total_steps < 1 or group_size < 1:
        raise ValueError("total_steps and group_size must be at least 1")
    if len(shares) != 3 or min(shares) < 0 or not abs(sum(shares) - 1) < 1e-6:
        raise ValueError(f"shares must be three numbers >= 0 that sum to 1, not {shares}")
    step = min(step, total_steps - 1)
    first, second = round(shares[0] * total_steps), round((shares[0] + shares[1]) * total_steps)
    if first <= step < second:
        return 2, (1, 2, 4)[3 * (step - first) // (second - first)]
    return (1, 1) if step < first else (3, group_size)


# ---- the learned order ---------------------------------------------------------------------------
class Order(nn.Module):
    """(7) A text is read in one of three ways: roughly from left to right, from right to left, or,
    a fixed share of the texts, in random order, so that the model keeps up with all orders.
    Each is a race (LoMDM's Plackett-Luce) with log-weights
        s_j = - sum_{i <= j} speed steps_i         steps_i: by how much i comes after i - 1
    Which it is, is drawn: q and q_hat both favour left to right at first, 2 to 1, and for q each
    kind of token in x has a vote. Parameters are stored divided by speed, as an optimiser's steps
    are small. train_char.py trains them late, and with a large eps in Adam, and says why."""

    speed = 40.0

    def __init__(self, config):
        super().__init__()
        self.random_share = config.random_share
        slope, favour = torch.tensor([[6.0], [-6.0]]), torch.tensor([math.log(2), 0.0])
        self.steps = nn.Parameter(slope.repeat(1, config.seq_len) / self.speed)
        self.votes = nn.Parameter(torch.zeros(config.vocab_size, 2))
        self.favour = nn.Parameter(torch.stack((favour, favour)) / self.speed)  # of q, of q_hat

    def log_weights(self, L):
        """s (3, L), float32 at least: bfloat16 cannot tell neighbours beyond a few dozen."""
        steps = self.steps[:, :L].to(torch.promote_types(self.steps.dtype, torch.float32))
        return F.pad(-(self.speed * steps).cumsum(1), (0, 0, 0, 1))

    def ways(self, x=None):
        """log q(reading | x) (B, 3), or log q_hat(reading) (1, 3): what each favours and, for q, a
        vote of each kind of token in x (B, L), their sum over the root of their number."""
        logits, r = self.favour[1:], self.random_share
        if x is not None:
            kinds = x.new_zeros(len(x), len(self.votes)).scatter(1, x, 1)  # (B, V): 1 if in x
            votes = (kinds[..., None] * self.votes).sum(1) / kinds.sum(1, keepdim=True).sqrt()
            logits = self.favour[:1] + votes  # (B, 2)
        learned = (self.speed * logits).log_softmax(dim=1) + math.log1p(-r)
        return F.pad(learned, (0, 1), value=math.log(r) if r else -math.inf)

    def draw(self, ways, L, generator=None):
        """An order (B, L) for each row of ways (B, 3)."""
        reading = torch.multinomial(ways.detach().exp(), 1, generator=generator)[:, 0]
        return race(self.log_weights(L).detach()[reading], generator)

    def forward(self, order, ways):
        """The log-probability of each step of order (B, L), given the steps before, which tell
        about the reading: (B, L). ways (B or 1, 3)."""
        B, L = order.shape
        s = self.log_weights(L).expand(B, 3, L).gather(2, order[:, None].expand(B, 3, L))
        steps = s - s.flip(2).logcumsumexp(2).flip(2)  # exp(s_i) / the sum of those that are left
        so_far = (ways[..., None] + steps.cumsum(2)).logsumexp(1)  # (B, L)
        return so_far.diff(dim=1, prepend=torch.zeros_like(so_far[:, :1]))


def race(s, generator=None):
    """A Plackett-Luce order of log-weights s (B, L), its positions, first to last, (B, L): s plus
    Gumbel noise is the largest at i with probability exp(s_i) / sum_j exp(s_j)."""
    noise = torch.empty_like(s).exponential_(generator=generator).log()
    return (s - noise).argsort(dim=1, descending=True)
