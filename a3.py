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
given tokens are read first, one by one from left to right, like a prompt. Everything is in nats.

(1) The likelihood. Tokens of a group see the groups before, not each other:
        log p(x) = sum_k sum_{i in G_k} log p(x_i | x_{G_1}, .., x_{G_{k-1}})   -> A3.log_prob()

(2) Two streams with the same weights, as a position must know its token to be read by others and
    must not know it to be predicted:                                           -> who_sees()
        content h_i  sees the content of groups <= its own     (knows x_i)
        query   q_i  sees the content of groups <  its own     (knows i, not x_i)
    and p(x_i | ..) = softmax(W q_i). Nobody sees a query; all see a start token before the text.
    An ARM predicts token i from the slot of token i - 1. So does a query: it stands there, and
    begins as that token's embedding if it may see it. Left to right it then is the ARM's own state.

(3) Sort the tokens by group, each with its position. The text a b c d with groups 1 0 2 0:
                     start  b  d  a  c                        start  b  d  a  c
        content  b     #    #  #              query  b          #
                 d     #    #  #                     d          #
                 a     #    #  #  #                  a          #    #  #
                 c     #    #  #  #  #               c          #    #  #  #
    Leave out the last token, c, whose content nobody needs. With one token a group, what the two
    streams see is then exactly a GPT's causal mask, and no mask is built.      -> A3.features()

(4) The cache. What content i sees is settled when i is committed, so its keys and values never
    change. A group costs one call: content of the last one, queries for the next.  -> A3.step()

(5) Decoding. The next group is fixed, or chosen by looking at the predictions for all that is open.
    What is chosen together becomes one group, as in training.                  -> A3.decode()

(6) Progressive adaptation. Start from an ARM, ours or a LLaMA, whose weights fit both streams, and
    go from one token left to right, over growing chunks, to random partitions. -> Curriculum

(7) A learned order, as in LoMDM (arXiv:2602.02112), but on two streams, which score all steps of an
    order in one pass: both papers in one, and in neither. An order is drawn from q, a race with
    log-weights s(x) that see the text; the model guesses the next position from what is revealed:
        p(x) = sum_order prod_k q_hat(order_k | x_{order_<k}) p(x_{order_k} | x_{order_<k})
        -log p(x) <= E_q sum_k [ -log p(x_{order_k} | ..)                                      recon
                                 + log q(order_k | ..) - log q_hat(order_k | ..) ]   -> order_loss()
    With q and q_hat uniform it is (1) for random orders, with infinitely steep weights the ARM.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    head_dim: int | None = None  # n_embd / n_head
    hidden: int | None = None  # of the MLP; None: as many parameters as 4 n_embd without gate
    rope_base: float = 1e4
    rope_scaling: dict | None = None  # {"factor", ..}: of LLaMA 3, see rotary_tables()
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
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


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


def who_sees(keys, content, queries):
    """Equation (2) for ranks of groups: keys (B, S), content (B, n), queries (B, m). Returns the
    mask argument of scaled_dot_product_attention for each stream."""
    keys = keys[:, None, None, :]  # (B, 1, n or m, S): row sees column
    masks = keys <= content[:, None, :, None], keys < queries[:, None, :, None]
    return tuple({"attn_mask": mask} for mask in masks)


# ---- the network: LLaMA's blocks, read twice -----------------------------------------------------
def rotary_tables(pos, config):
    """cos and sin (B, 1, T, head_dim) for rotate() at pos (B, T), sin with its sign."""
    j = torch.arange(0, config.head_dim, 2, device=pos.device) / config.head_dim
    f, how = config.rope_base**-j, config.rope_scaling  # radians per position (head_dim / 2,)
    if how:  # LLaMA 3: slow turns get slower by the factor, fast ones stay, in between is a ramp
        turns = how["original_max_position_embeddings"] * f / (2 * math.pi)  # in the old context
        low, high = how["low_freq_factor"], how["high_freq_factor"]
        ramp = ((turns - low) / (high - low)).clamp(0, 1)
        f = f * (ramp + (1 - ramp) / how["factor"])
    angle = pos[:, None, :, None] * torch.cat((-f, f))  # (B, 1, T, head_dim)
    return angle.cos(), angle.sin()


def rotate(q, cos, sin):
    """Turn each pair of channels j, j + head_dim / 2 of q (B, heads, T, head_dim). roll() swaps."""
    return (q * cos + q.roll(q.shape[-1] // 2, dims=-1) * sin).type_as(q)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU: an ARM's block, applied to two streams. (The official code's
    x = norm(x + attn); x = x + mlp(x) is not the block of the LLaMA that it starts from.)"""

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
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        head_dim = self.proj.in_features // self.n_head
        return (
            F.linear(h, self.qkv.weight[rows], bias).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        )

    def keys_values(self, u, rotary):
        """What others look at, for content u (B, n, C): k, v (B, n_kv_head, n, head_dim)."""
        k, v = self.heads(u, slice(self.proj.in_features, None)).chunk(2, dim=1)
        return rotate(self.k_norm(k), *rotary), v

    def forward(self, h, u, k, v, rotary, sizes, masks):
        """h and u = norm1(h) (B, T, C): streams of these sizes side by side, as they share all
        matrices. Each looks at k and v by a mask of its own, see who_sees(). Returns (B, T, C)."""
        drop = self.dropout if self.training else 0.0
        q = self.heads(u, slice(0, self.proj.in_features))
        q = rotate(self.q_norm(q), *rotary)  # (B, n_head, T, head_dim)
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
        # slot i + 1. An ARM never reads the last one, which shares the position of the one before.
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

    def check(self, x, groups):
        if x.ndim != 2 or groups.shape != x.shape or groups.dtype != torch.long or not x.numel():
            what = f"not {tuple(x.shape)}, {tuple(groups.shape)} {groups.dtype}"
            raise ValueError(f"x and groups must both be (B, L), and groups long, {what}")
        if x.shape[1] > self.config.seq_len:
            raise ValueError(f"{x.shape[1]} tokens do not fit into seq_len {self.config.seq_len}")

    def left_of(self, x, before):
        """The token on the left of each position (B, L), the start token for the first one, and -1
        where it may not be seen: where before (B, L - 1) is False."""
        left = F.pad(x[:, :-1].masked_fill(~before, -1), (1, 0), value=self.start_id)
        return left if self.config.left_neighbour else torch.full_like(left, -1)

    def streams(self, tokens, slots, left, positions, sees, cache=None):
        """Both streams through all layers: content of tokens (B, n) in their slots (B, n), queries
        for positions (B, m) and what is left of them (B, m). sees: see who_sees(), for the keys of
        these n or of all in the cache. Returns the queries' final states (B, m, n_embd), and the
        content (B, n, n_embd) as the last layer reads it."""
        n, m = sizes = slots.shape[1], positions.shape[1]
        h = self.wte(torch.cat((tokens, left.clamp(min=0)), dim=1))  # (B, n + m, C)
        h = torch.where(F.pad(left < 0, (n, 0))[..., None], self.query, h)
        place = torch.cat((slots, positions), dim=1)  # token i - 1, on the left of i, is in slot i
        if self.wpe is not None:
            h = h + self.wpe(place.clamp(max=self.config.seq_len - 1))
        h = F.dropout(h, self.config.dropout, self.training)
        cos, sin = rotary_tables(place, self.config)
        for layer, block in enumerate(self.blocks):
            u = block.norm1(h)
            k, v = block.keys_values(u[:, :n], (cos[:, :, :n], sin[:, :, :n]))
            if cache is not None:
                k, v = remember(cache, layer, k, v)
            if layer == self.config.n_layer - 1:  # nobody reads the content any more
                content = u[:, :n]
                h, u, cos, sin = h[:, n:], u[:, n:], cos[:, :, n:], sin[:, :, n:]
                sizes, sees = (m,), sees[1:]
            h = block(h, u, k, v, (cos, sin), sizes, sees)
        return self.norm(h), content

    def logits(self, h):
        """(..., n_embd) -> (..., V), float32 at least: bfloat16 is too coarse for likelihoods."""
        logits = self.lm_head(h)[..., : self.config.vocab_size]
        return logits.to(torch.promote_types(self.wte.weight.dtype, torch.float32))

    def features(self, x, groups, single=None):
        """(3) The final query states (B, L, n_embd), each in its place, and what the content knows
        before each of them (B, L, n_embd), sorted. single: whether every group has one token; None
        finds out, for which a GPU has to stop."""
        self.check(x, groups)
        L = x.shape[1]  # given tokens come first, and are read from left to right
        rank = torch.where(groups < 0, torch.arange(L, device=x.device) - L, groups)  # (B, L)
        left = self.left_of(x, rank[:, :-1] < rank[:, 1:])
        order = rank.argsort(dim=1, stable=True)  # (B, L)
        rank = rank.gather(1, order)
        tokens = F.pad(x.gather(1, order)[:, :-1], (1, 0), value=self.start_id)  # (B, L)
        slots = F.pad(order[:, :-1] + 1, (1, 0))
        if single is None:
            single = bool((rank[:, 1:] > rank[:, :-1]).all())
        before, causal = F.pad(rank[:, :-1], (1, 0), value=-L - 1), {"is_causal": True}
        sees = (causal, causal) if single else who_sees(before, before, rank)
        h, content = self.streams(tokens, slots, left.gather(1, order), order, sees)  # sorted
        return h.gather(1, order.argsort(dim=1)[..., None].expand_as(h)), content

    def forward(self, x, groups):
        """Logits (B, L, V): what each position is predicted to be by the groups before its own."""
        return self.logits(self.features(x, groups)[0])

    def log_prob(self, x, groups, single=None):
        """Equation (1), term by term: log p(x_i | earlier groups) (B, L) in nats, 0 at given
        tokens. A row's sum is the log-likelihood of what is predicted, given the given."""
        h, _ = self.features(x, groups, single)
        return -self.nll(h.flatten(0, 1), x.flatten()).view_as(x) * (groups >= 0)

    def loss(self, x, groups=None, single=None, sigma=1.0):
        """Nats per predicted token, and a dict of detached metrics, as lomdm.py has it. Without
        groups: of the learned order, with sigma, see order_loss()."""
        if groups is None:
            return self.order_loss(x, sigma)
        predicted = (groups >= 0).sum()
        loss = -self.log_prob(x, groups, single).sum() / predicted.clamp(min=1)
        return loss, {"nelbo": loss.detach()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, size=None, generator=None):
        """-log p(x) (B,) in nats: the mean over n_draws random_groups() of this size; 0: left to
        right. None: of the order that was learned, the bound (7), or if there is none, size 1."""
        B, L = x.shape
        if size is None and self.order:
            return self.order_nelbo(x, n_draws, generator)
        size = 1 if size is None else size
        draws = [random_groups(B, L, size or 1, generator, x.device) for _ in range(n_draws)]
        draws = draws if size else [chunk_groups(B, L, 1, x.device)]
        return -sum(self.log_prob(x, groups).sum(1) for groups in draws) / len(draws)

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
    def step(self, cache, tokens, slots, rank, left, ask):
        """(4) One call of the cached network. Tokens (B, n) are committed in their slots (B, n), in
        groups of these ranks (B, n); L is for what nobody shall see. Then the positions where ask
        (B, L) bool is True are predicted from all that was ever committed; left (B, L): see
        left_of(). Returns logits (B, m, V), their positions (B, m), whether asked, see pack(), and
        the content, see streams()."""
        positions, asked = pack(ask)  # (B, m)
        (seen,) = remember(cache, "rank", rank[:, None])  # (B, 1, S)
        sees = who_sees(seen[:, 0], rank, torch.full_like(rank[:, :1], ask.shape[1]))
        left = left.gather(1, positions)
        h, content = self.streams(tokens, slots, left, positions, sees, cache)
        return self.logits(h), positions, asked, content

    # ---- decoding --------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(
        self, x, groups, per_step, by, temperature=1.0, top_k=None, generator=None, known=None
    ):
        """(5) Fill the positions of x (B, L) with groups >= 0, one group after another, and inside
        of each the per_step positions at a time that `by` is surest of, or that q_hat draws, by
        "order". Where known (B, L) is True the token is not drawn, but that of x. Returns x and the
        step that filled in each token, -1 if given, which are the groups for log_prob(x, steps)."""
        self.check(x, groups)
        if not 0 <= temperature < math.inf or per_step < 1 or (top_k is not None and top_k < 1):
            raise ValueError("temperature must be >= 0, per_step >= 1 and top_k >= 1 (or None)")
        truth, x, L = x, x.masked_fill(groups >= 0, self.mask_id), x.shape[1]
        known = torch.zeros_like(groups, dtype=torch.bool) if known is None else known
        rank = torch.where(groups < 0, -1, L)  # the step that committed a token; L: open
        given, real = pack(groups < 0)  # (B, n)
        cache, slots = {}, F.pad(given + 1, (1, 0))
        tokens = x.gather(1, given).masked_fill(~real, self.start_id)
        tokens = F.pad(tokens, (1, 0), value=self.start_id)  # what to commit next
        ranks = F.pad(torch.where(real, given - L, L), (1, 0), value=-L - 1)
        for step in range(L + 1):
            todo = rank == L
            if not todo.any():
                return x, rank
            first = groups.masked_fill(~todo, torch.iinfo(torch.long).max).amin(1, keepdim=True)
            ask = todo & (groups == first)
            left = self.left_of(x, rank[:, :-1] < L)
            logits, at, asked, content = self.step(cache, tokens, slots, ranks, left, ask)
            if by == "order":  # any of the last group knows all there is to know
                s_hat = self.order.guess(content[:, :1])[:, 0, :L]
                score = torch.where(known, s_hat, perturb(s_hat, generator)).gather(1, at)
            else:
                score = certainty(logits, by, generator)  # (B, m)
            score = score.masked_fill(~asked, -torch.inf)
            best = score.argsort(dim=1, descending=True, stable=True)[:, :per_step]
            at, asked = at.gather(1, best), asked.gather(1, best)  # (B, m), m <= per_step
            logits = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1]))
            tokens, slots = draw(logits, temperature, top_k, generator), at + 1
            tokens = torch.where(known.gather(1, at), truth.gather(1, at), tokens)
            ranks = torch.where(asked, step, L)
            x.scatter_(1, at, torch.where(asked, tokens, x.gather(1, at)))
            rank.scatter_(1, at, torch.where(asked, step, rank.gather(1, at)))

    def generate(self, x, groups, temperature=1.0, top_k=None, generator=None):
        """Fill the positions of x (B, L) with groups >= 0, a group a call, from p(x | given)."""
        return self.decode(x, groups, x.shape[-1], "confidence", temperature, top_k, generator)[0]

    def sample(self, z, temperature=1.0, top_k=None, per_step=1, by=None, generator=None):
        """Fill the mask_id positions of z (B, L), per_step a call, as one group: by "left", or what
        the model is surest of when it predicts all that is open, by "confidence" (largest top
        probability), "entropy" (smallest), "margin" (of the top two), or "random"; or by "order",
        the default if one was learned: q_hat of (7) draws the position. Nothing given, one per_step
        and "order": x is drawn from p(x). It reads given tokens one by one, too, whichever q_hat
        finds likeliest; then rest and order are drawn from p(rest, order | given, read that way),
        which is not p(rest | given). Returns x and revealed_at (B, L), the number of the call that
        filled a position, -1 if given."""
        by = by or ("order" if self.order else "left")
        if by == "order" and not self.order:
            raise ValueError("by 'order': this model has learned none")
        masked = z == self.mask_id
        place = masked.cumsum(1) - 1 if by == "left" else torch.zeros_like(z)
        groups = torch.where(masked, place // max(1, per_step), -1)
        if by == "order":
            groups += 1  # what is given is the first group, from which q_hat chooses
        rule = "confidence" if by == "left" else by  # a whole group at once: there is no choice
        x, at = self.decode(z, groups, per_step, rule, temperature, top_k, generator, ~masked)
        return x, at.masked_fill(~masked, -1)

    @torch.no_grad()
    def decoder_log_prob(self, x, by="left", per_step=1):
        """log p(x) (B,) in nats, exactly, if sample() decodes by this rule: its steps on the way to
        x (B, L), and (1) with these as groups. "order": always the likeliest position by q_hat."""
        if by == "random":
            raise ValueError("by 'random' takes other steps each time; nelbo() is their mean")
        groups = chunk_groups(*x.shape, per_step, x.device)
        if by != "left":
            known = torch.ones_like(x, dtype=torch.bool)
            _, groups = self.decode(x, torch.zeros_like(x), per_step, by, known=known)
        return self.log_prob(x, groups).sum(1)

    # ---- the learned order -----------------------------------------------------------------------
    def order_weights(self, x):
        """(7) The log-weights s (B, L) of the race q, which see all of x (B, L): to train and to
        validate, never to sample."""
        slope, local, _ = self.order(self.whole_text(x))
        return -(slope + local).cumsum(1)

    def whole_text(self, x):
        """The content (B, L, n_embd) if all of x (B, L) sees all of it. The order reads what the
        network knows, but does not shape it: no gradient."""
        slots = torch.arange(1, x.shape[1] + 1, device=x.device).expand_as(x)
        with torch.no_grad():
            return self.streams(x, slots, slots[:, :0], slots[:, :0], ({}, {}))[1]

    def order_terms(self, x, order, s, noise=0.0):
        """The parts of (7) for texts x, order and log-weights s, (B, L) each: -log p of each
        position, log q_hat and log q of each step. order[:, k] is what step k reveals. noise
        (B, 1, 1): see Order.guess()."""
        h, content = self.features(x, order.argsort(dim=1), single=True)
        nll = self.nll(h.flatten(0, 1), x.flatten()).view_as(x)
        s_hat = self.order.guess(content, noise)[..., : x.shape[1]]  # (B, step, position)
        s_hat = s_hat.gather(2, order[:, None].expand_as(s_hat))  # (B, step, step that reveals it)
        ahead = torch.ones_like(s_hat[0], dtype=torch.bool).triu()
        log_q_hat = s_hat.masked_fill(~ahead, -torch.inf).log_softmax(2).diagonal(dim1=1, dim2=2)
        return nll, log_q_hat, log_race(s, order)

    def order_log_probs(self, x, order):
        """(7) log q_hat and log q (B, L) of each step of order (B, L), for texts x (B, L)."""
        self.check(x, order)
        return self.order_terms(x, order, self.order_weights(x))[1:]

    def order_loss(self, x, sigma=1.0):
        """What training minimises, for x (B, L), B > 1: the bound (7) in nats per token, plus terms
        whose gradient counts and whose value means nothing. Returns the loss and a dict of detached
        metrics; report metrics["nelbo"], the bound at the slopes that were tried.
        Autograd cannot see how s changes the outcome of a race: REINFORCE. A choice answers for all
        costs that come after it, less what a head that sees the text but not the order expects of
        those tokens, and less what the other texts paid at those steps. For the slope, which turns
        all choices at once, that is still mostly noise. So each text is read at a slope that is a
        bit off, for q and q_hat alike, and the slope follows the texts that did better, by Stein's
        lemma: d E f(slope + noise) / d slope = E f(slope + noise) noise / variance. sigma is the
        standard deviation of that noise: let it fall from 8, when both directions are tried."""
        self.check(x, x)
        B, L = x.shape
        slope, local, expected = self.order(self.whole_text(x))
        noise, score = self.order.explore(slope.detach(), sigma)  # (B, 1) each
        s = -(slope + local + noise).cumsum(1)
        order = race(s.detach())  # (B, L)
        nll, log_q_hat, log_q = self.order_terms(x, order, s, noise[..., None])
        guess = log_q - log_q_hat
        nelbo = (nll + guess).mean()

        with torch.no_grad():
            excess = (nll - expected).gather(1, order) + guess  # of each step
            excess = (excess - excess.mean(0)) * B / max(1, B - 1)  # less the others' mean
            to_come = excess.flip(1).cumsum(1).flip(1)
        choices = log_race(-(slope.detach() + local + noise).cumsum(1), order)
        stein = to_come[:, :1] * score * slope  # (B, 1)
        reinforce = (to_come * choices).mean() + stein.mean() / L
        loss = nelbo + reinforce + (nll.detach() - expected).square().mean()
        metrics = dict(nelbo=nelbo, recon=nll.mean(), order=guess.mean(), slope=slope.mean())
        return loss, {name: value.detach() for name, value in metrics.items()}

    def order_nelbo(self, x, n_draws, generator):
        """The bound (7) of each text (B,), nats: see nelbo()."""
        s, total = self.order_weights(x), 0
        for _ in range(n_draws):
            nll, log_q_hat, log_q = self.order_terms(x, race(s, generator), s)
            total = total + (nll + log_q - log_q_hat).sum(1)
        return total / n_draws

    # ---- adaptation ------------------------------------------------------------------------------
    @torch.no_grad()
    def load_arm(self, state_dict):
        """(6) Become a trained ARM of lomdm.py, to rounding. New is only what a query begins as if
        its left neighbour is hidden: the mean embedding. ValueError for other names or shapes."""
        new = {name: p for name, p in self.state_dict().items() if name.startswith("order.")}
        new["query"] = self.query
        mine = {n: tuple(p.shape) for n, p in self.state_dict().items() if n not in new}
        got = {name: tuple(p.shape) for name, p in state_dict.items()}
        wrong = [name for name in {**mine, **got} if mine.get(name) != got.get(name)]
        if wrong:
            one = f"{wrong[0]} is {got.get(wrong[0])}, not {mine.get(wrong[0])}"
            raise ValueError(f"not an ARM of this size: {one}, and {len(wrong) - 1} more like that")
        self.load_state_dict({**new, **state_dict, "query": state_dict["wte.weight"].mean(0)})

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, folder, seq_len=None, **changes):
        """(6) The same for a LLaMA or a relative, a folder in Hugging Face's format, in float32.
        Learned positions begin as zeros. seq_len: None takes all its context; changes: fields of
        Config. ValueError, one line, for what does not fit. Needs the package safetensors."""
        from safetensors import SafetensorError, safe_open

        folder = Path(folder)
        try:
            theirs = json.loads((folder / "config.json").read_text("utf-8"))
            model = cls(Config(**(llama_config(theirs, seq_len) | changes)))
            kv = model.config.n_kv_head * model.config.head_dim
            names, index = {"": "model.safetensors"}, folder / "model.safetensors.index.json"
            if index.is_file():
                names = json.loads(index.read_text("utf-8"))["weight_map"]
            files = [safe_open(folder / name, "pt") for name in sorted(set(names.values()))]
            files = {tensor: file for file in files for tensor in file.keys()}  # noqa: SIM118
            for name, p in model.named_parameters():
                *layer, part, kind = f".{name}".split(".")  # blocks 3 qkv weight, or norm weight
                where = f"model.layers.{layer[2]}." if layer[2:] else ""
                parts = [f"{where}{their}.{kind}" for their in LLAMA_PARTS.get(part, ())]
                if parts:
                    rows = [files.pop(their).get_tensor(their) for their in parts]
                    if part == "qkv" and not len(rows[1]) == len(rows[2]) == kv:
                        raise ValueError(f"{parts[1]} and {parts[2]} must have {kv} rows")
                    rows = torch.cat(rows)
                    n = model.config.vocab_size if part in ("wte", "lm_head") else len(p)
                    if len(rows) != n or rows.shape[1:] != p.shape[1:]:
                        raise ValueError(f"{parts} is {tuple(rows.shape)}, not {tuple(p.shape)}")
                    p[: len(rows)] = rows
            spare = "rotary_emb.inv_freq", "lm_head.weight" if model.config.tied else "inv_freq"
            if files := [name for name in files if not name.endswith(spare)]:
                raise ValueError(f"no place for {files[0]} in this model")
        except (*BAD, SafetensorError) as e:
            raise ValueError(f"{folder} cannot be loaded: {type(e).__name__} {e}") from None
        model.query[:] = model.wte.weight.mean(0)
        if model.wpe is not None:
            model.wpe.weight.zero_()
        return model


BAD = OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError
LLAMA_PARTS = {
    "wte": ["model.embed_tokens"], "norm": ["model.norm"], "lm_head": ["lm_head"],
    "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "q_norm": ["self_attn.q_norm"], "k_norm": ["self_attn.k_norm"], "proj": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"],
}  # fmt: skip


LLAMA_3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"


def llama_config(c, seq_len):
    """Hugging Face's config.json, in its older or newer form, as fields of Config."""
    kind, L = c["model_type"], seq_len or c["max_position_embeddings"]
    rope = {"rope_theta": c.get("rope_theta", 1e4)} | (c.get("rope_scaling") or {})
    rope |= c.get("rope_parameters") or {}
    turn = rope.get("rope_type", rope.get("type", "default"))
    partial, bos = (
        rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1)),
        c.get("bos_token_id"),
    )
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    missing = {
        f"model_type {kind}": kind not in ("llama", "mistral", "qwen2", "qwen3"),
        f"rope_type {turn}": turn not in ("default", "llama3"),
        f"a sliding_window of {window}, below {L} tokens,": window and window < L,
        "attention_bias or mlp_bias": c.get("attention_bias") or c.get("mlp_bias"),
        f"hidden_act {c.get('hidden_act')}": c.get("hidden_act") not in (None, "silu"),
        f"partial_rotary_factor {partial}": partial != 1,
        f"bos_token_id {bos}": bos is not None and bos not in range(c["vocab_size"]),
    }
    if any(missing.values()):
        raise ValueError(f"{next(what for what in missing if missing[what])} is not supported")
    return dict(
        vocab_size=c["vocab_size"], seq_len=L, n_layer=c["num_hidden_layers"],
        n_head=c["num_attention_heads"], n_embd=c["hidden_size"], hidden=c["intermediate_size"],
        n_kv_head=c.get("num_key_value_heads"), head_dim=c.get("head_dim"),
        norm_eps=c.get("rms_norm_eps", 1e-6), tied=c.get("tie_word_embeddings", False),
        start_id=bos, rope_base=rope["rope_theta"],
        rope_scaling={name: rope[name] for name in LLAMA_3} if turn == "llama3" else None,
        qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3",
    )  # fmt: skip


def remember(cache, name, *new):
    """(4) The cache is a dict of the keys and values (B, n_kv_head, S, head_dim) of each layer, and
    the ranks (B, 1, S) of their groups. It only ever grows. Returns all under that name."""
    old = cache.get(name, [t[:, :, :0] for t in new])
    cache[name] = [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
    return cache[name]


def pack(mask):
    """The places where a row of mask (B, T) is True, first to last: (B, m), m being the most of any
    row, and (B, m) bool, False where a row has fewer and is filled up with any places."""
    real, places = mask.int().sort(dim=1, descending=True, stable=True)
    m = int(mask.sum(1).max())
    return places[:, :m], real[:, :m].bool()


def certainty(logits, by, generator=None):
    """How sure a prediction is, logits (..., V) -> (...): the rule of dynamic decoding."""
    p = F.softmax(logits, dim=-1)
    if by == "random":
        return torch.rand(p.shape[:-1], generator=generator, device=p.device)
    if by == "entropy":
        return torch.xlogy(p, p).sum(-1)  # minus the entropy
    if by not in ("confidence", "margin"):
        raise ValueError(f"by must be 'confidence', 'entropy', 'margin' or 'random', not {by!r}")
    top = p.topk(min(2, p.shape[-1])).values
    return top[..., 0] - top[..., -1] * (by == "margin")


def draw(logits, temperature, top_k, generator=None):
    """One token from each of logits (B, m, V): (B, m). Temperature 0 takes the likeliest."""
    if top_k is not None:
        worst = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)  # the best is 0: safe to divide
    p = F.softmax(logits / max(temperature, 1e-30), dim=-1).flatten(0, 1)  # (B m, V)
    return torch.multinomial(p, 1, generator=generator).view(logits.shape[:-1])


@dataclass
class Curriculum:
    """(6) Which groups to train on at which step. (Skipping to stage 3 costs the paper 4-6 points.)
    stage 1  one token a group, left to right: the query stream learns what the content stream knows
    stage 2  chunks of 1, then 2, then 4, a third of the stage each: to predict several at a time
    stage 3  random partitions into groups of group_size: any order"""

    total_steps: int
    shares: tuple = (0.2, 0.3, 0.5)  # of the steps, for each stage
    group_size: int = 1

    def __post_init__(self):
        if self.total_steps < 1 or self.group_size < 1:
            raise ValueError("total_steps and group_size must be at least 1")
        if len(self.shares) != 3 or min(self.shares) < 0 or not abs(sum(self.shares) - 1) < 1e-6:
            raise ValueError(f"shares must be three numbers >= 0 that sum to 1, not {self.shares}")

    def stage(self, step):
        """(stage, size of its groups) at step 0, 1, ..; from total_steps on it stays as it was."""
        step, (one, two, _), T = min(step, self.total_steps - 1), self.shares, self.total_steps
        first, second = round(one * T), round((one + two) * T)
        if first <= step < second:
            return 2, (1, 2, 4)[3 * (step - first) // (second - first)]
        return (1, 1) if step < first else (3, self.group_size)

    def __call__(self, step, B, L, generator=None, device=None):
        """groups (B, L) long for this step."""
        stage, size = self.stage(step)
        random = random_groups(B, L, size, generator, device)
        return random if stage == 3 else chunk_groups(B, L, size, device)


# ---- the learned order ---------------------------------------------------------------------------
class Order(nn.Module):
    """(7) Log-weights as running sums, step i of which says by how much i comes before i + 1:
        s_j = - sum_{i <= j} speed (a + b_i + g_i(x)), and s_hat_j with g_hat_i(x_revealed) for g_i
    a is the slope of all texts, left to right if positive; b, too, is the same for all; g reads the
    text, g_hat what is revealed. At first the slope is 1, so that left to right wins a tie, and all
    else 0. An optimiser moves a number by its learning rate a step, at most: hence speed.
    Give a and b an Adam with eps = 0.3, g one with 0.3 / n_embd, and do not clip their gradients:
    so they move by evidence, not by the noise that Adam blows up where there is none. And let them
    wait for the network: what is easy to learn first is not what is best."""

    speed = 80.0

    def __init__(self, config):
        super().__init__()
        C, L = config.n_embd, config.seq_len
        self.random_share = config.random_share
        self.a, self.b = nn.Parameter(torch.ones(1) / self.speed), nn.Parameter(torch.zeros(L))
        self.g = nn.Linear(C, 1, bias=False)
        self.g_hat = nn.Linear(C, L, bias=False)
        self.cost = nn.Linear(C, 1)
        for head in (self.g, self.g_hat, self.cost):
            nn.init.zeros_(head.weight)

    def forward(self, content):
        """content (B, L, n_embd) of whole texts -> their slopes (B, 1); the steps of s without them
        (B, L); nats that each token is expected to cost (B, L)."""
        both = torch.cat((self.g(content), self.cost(content)), dim=-1).type_as(self.b)
        g, cost = both.unbind(-1)  # (B, L) each; autocast made them bfloat16
        g = g / content.shape[-1]
        mean = g.mean(1, keepdim=True)
        return self.speed * (self.a + mean), self.speed * (self.b[: g.shape[1]] + g - mean), cost

    def guess(self, content, noise=0.0):
        """content (B, n, n_embd) that knows what is revealed -> s_hat (B, n, seq_len). noise
        (B, 1, 1): what the slope is off by, in s as well, see A3.order_loss()."""
        g_hat = self.g_hat(content.detach()).type_as(self.b) / content.shape[-1]
        return -(self.speed * (self.a + self.b + g_hat) + noise).cumsum(-1)

    def explore(self, slope, sigma):
        """How far off its slope (B, 1) each text is read: N(0, sigma^2), or what makes its order
        random. And noise / variance, for Stein's lemma. (B, 1) each."""
        z, at_random = torch.randn_like(slope), torch.rand_like(slope) < self.random_share
        return torch.where(at_random, -slope, sigma * z), torch.where(at_random, 0.0, z / sigma)


def log_race(s, order):
    """log q (B, L) of each step of an order (B, L): exp(s_i) / the sum of those that are left."""
    s = s.gather(1, order)
    return s - s.flip(1).logcumsumexp(1).flip(1)


def perturb(s, generator=None):
    """s (.., L) plus Gumbel noise: the largest is i with probability exp(s_i) / sum_j exp(s_j)."""
    return s - torch.empty_like(s).exponential_(generator=generator).log()


def race(s, generator=None):
    """A Plackett-Luce order of log-weights s (B, L): its positions, first to last, (B, L)."""
    return perturb(s, generator).argsort(dim=1, descending=True)
