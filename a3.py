"""
Any order, any subset: A3 (arXiv:2601.13228) in one file, a language model that predicts its tokens
in any order you like, several at a time if you like, with an exact likelihood and an exact cache.

Cut the positions of a text x (B, L) into groups G_1, .., G_K, in the order of their prediction:

    {0}, {1}, .., {L-1}              ARM, the GPT you know                      -> ar_groups()
    contiguous chunks                multi-token prediction, left to right      -> chunk_groups()
    what is visible, then the rest   one step of a masked diffusion model
    a random partition               any order, any subset                      -> random_groups()

`groups` (B, L) long holds the rank of each position's group, a partition of its own for every row.
Only the order of the numbers counts. A negative one marks a given token: visible to all, not
predicted. Everything is in nats.

(1) The likelihood. Tokens of a group do not see each other, only the groups before:
        log p(x) = sum_k sum_{i in G_k} log p(x_i | x_{G_1}, .., x_{G_{k-1}})   -> A3.log_prob()

(2) Two streams with the same weights, as a position must know its token to be read by others and
    must not know it to be predicted:                                           -> who_sees()
        content h_i  sees the content of groups <= its own     (knows x_i)
        query   q_i  sees the content of groups <  its own     (knows i, not x_i)
    and p(x_i | ..) = softmax(W q_i). Nobody sees a query. A start token stands before everything,
    so that every row of the attention has something to see.

(3) Sort the tokens by group, each with its position. Put the start token first and drop the last
    token, which nobody needs: with one token a group, what the two streams see is then exactly a
    GPT's causal mask, and no mask is built.                                    -> A3.features()

(4) The cache. What content i sees is settled when i is committed, so its keys and values never
    change. A group costs one call: content of what was just committed, queries for what comes next.
                                                                                -> A3.step()
(5) Decoding. The next group is fixed, or chosen by looking at the predictions for all that is open.
    What is chosen together becomes one group, as in training.                  -> A3.decode()

(6) Progressive adaptation. Start from an ARM, whose weights fit both streams, and go from one token
    left to right, over growing chunks, to random partitions.   -> A3.load_arm(), Curriculum
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**26  # that are in memory at a time: 256 MiB


@dataclass
class Config:
    vocab_size: int  # the start token comes on top of these, with the id vocab_size
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):  # rotary embeddings turn pairs of channels
            raise ValueError(
                f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head}) with an even "
                "quotient"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


# --------------------------------------------------------------------------------------------------
# Groups


def ar_groups(B, L, device=None):
    """One token a group, left to right: groups (B, L) long."""
    return chunk_groups(B, L, 1, device)


def chunk_groups(B, L, size, device=None):
    """Chunks of `size` neighbours, left to right, the last perhaps shorter: groups (B, L) long."""
    if size < 1:
        raise ValueError(f"the size of a group must be at least 1, not {size}")
    return (torch.arange(L, device=device) // size).repeat(B, 1)  # each row its own memory


def random_groups(B, L, size, generator=None, device=None):
    """A random order cut into groups of `size`, the last perhaps smaller; every row draws its own.
    groups (B, L) long. size 1 is a random order of single tokens."""
    place = torch.rand(B, L, generator=generator, device=device).argsort(dim=1)  # a permutation
    return chunk_groups(B, L, size, device).gather(1, place)


@dataclass
class Curriculum:
    """(6) Which groups to train on at which step. (Skipping to stage 3 costs the paper 4-6 points.)

    stage 1  one token a group, left to right: the query stream learns what the content stream knows
    stage 2  chunks of 1, then 2, then 4, a third of the stage each: to predict several at a time
    stage 3  random partitions into groups of group_size: any order
    """

    total_steps: int
    shares: tuple = (0.2, 0.3, 0.5)  # of the steps, for each stage
    group_size: int = 1

    def __post_init__(self):
        if self.total_steps < 1 or self.group_size < 1:
            raise ValueError("total_steps and group_size must be at least 1")
        if len(self.shares) != 3 or not (
            all(share >= 0 for share in self.shares) and abs(sum(self.shares) - 1) <= 1e-6
        ):
            raise ValueError(f"shares must be three numbers >= 0 that sum to 1, not {self.shares}")

    def stage(self, step):
        """(stage, size of its groups) at step 0, 1, ..; from total_steps on it stays as it was."""
        step = min(step, self.total_steps - 1)
        first = round(self.shares[0] * self.total_steps)
        second = round((self.shares[0] + self.shares[1]) * self.total_steps)
        if step < first:
            return 1, 1
        if step < second:
            return 2, (1, 2, 4)[3 * (step - first) // (second - first)]
        return 3, self.group_size

    def __call__(self, step, B, L, generator=None, device=None):
        """groups (B, L) long for this step."""
        stage, size = self.stage(step)
        if stage < 3:
            return chunk_groups(B, L, size, device)
        return random_groups(B, L, size, generator, device)


# --------------------------------------------------------------------------------------------------
# The network: LLaMA's blocks, read twice


def rotate(q, cos, sin):
    """Rotary position embedding. q (B, n_head, T, head_dim); cos, sin (B, 1, T, head_dim / 2)."""
    q1, q2 = q.chunk(2, dim=-1)
    return torch.cat((q1 * cos - q2 * sin, q1 * sin + q2 * cos), dim=-1).type_as(q)


def who_sees(keys, content, queries):
    """Equation (2) for ranks of groups: keys (B, S), content (B, n), queries (B, m). Returns the
    mask arguments of scaled_dot_product_attention for each stream."""
    keys = keys[:, None, None, :]
    content_mask = keys <= content[:, None, :, None]  # (B, 1, n, S): row sees column
    query_mask = keys < queries[:, None, :, None]  # (B, 1, m, S)
    return {"attn_mask": content_mask}, {"attn_mask": query_mask}


class Block(nn.Module):
    """Pre-norm attention and SwiGLU without biases: an ARM's block, applied to two streams."""

    # Each half adds to the residual stream and leaves it as it is. The official code slips here:
    # x = norm(x + attn); x = x + mlp(x) is not the block of the LLaMA that it loads weights from.

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        hidden = 32 * math.ceil(8 * C / 3 / 32)  # as many parameters as a 4 C wide MLP without gate
        self.n_head, self.dropout = config.n_head, config.dropout
        self.norm1 = nn.RMSNorm(C, eps=1e-5)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.norm2 = nn.RMSNorm(C, eps=1e-5)
        self.gate_up = nn.Linear(C, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, C, bias=False)

    def forward(self, h, n, rotary, sees, cache=None, last=False):
        """h (B, n + m, C): n content states, then m queries, so that both share every matrix
        product. rotary: cos, sin (B, 1, n + m, head_dim / 2). sees: the mask arguments of the two
        streams, for the keys of these n or, with a cache, of all its slots. Returns (B, n + m, C).

        In the last layer nobody reads the content but through its keys and values. It has no query
        there, no attention and no MLP, and (B, m, C) comes back."""
        B, _, C = h.shape
        drop = self.dropout if self.training else 0.0
        cos, sin = rotary
        skip = n if last else 0
        u = self.norm1(h)
        w_q, w_kv = self.qkv.weight.split((C, 2 * C))  # no k and v for queries: nobody sees them
        q = F.linear(u[:, skip:], w_q).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k, v = F.linear(u[:, :n], w_kv).view(B, n, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q = rotate(q, cos[:, :, skip:], sin[:, :, skip:])  # (B, n_head, n + m - skip, head_dim)
        k = rotate(k, cos[:, :, :n], sin[:, :, :n])  # (B, n_head, n, head_dim), as v
        if cache is not None:
            k, v = cache.add(self, k, v)  # (B, n_head, L + 2, head_dim)
        streams = [(q, sees[1])] if last else [(q[:, :, :n], sees[0]), (q[:, :, n:], sees[1])]
        attend = partial(F.scaled_dot_product_attention, key=k, value=v, dropout_p=drop)
        y = torch.cat([attend(rows, **mask) for rows, mask in streams], dim=2)  # as q
        y = self.proj(y.transpose(1, 2).flatten(2))
        h = h[:, skip:] + F.dropout(y, drop)
        gate, up = self.gate_up(self.norm2(h)).chunk(2, dim=-1)  # (B, n + m - skip, hidden) each
        return h + F.dropout(self.down(F.silu(gate) * up), drop)


class Cache:
    """Keys and values of the committed content in slots: the start token's is 0, token i's is
    i + 1. The last is a dummy that nobody sees, for rows with less to commit to write to."""

    def __init__(self, B, L, device=None):
        self.rank = torch.full((B, L + 2), L, device=device)  # of what is in a slot; L for nothing
        self.slots = None  # (B, n): where the next content goes
        self.layers = {}

    def add(self, layer, k, v):
        """Write k, v (B, n_head, n, head_dim), return all keys and all values of the layer."""
        if layer not in self.layers:
            shape = (*k.shape[:2], self.rank.shape[1], k.shape[3])
            self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)  # 0 * garbage may be NaN
        slots = self.slots[:, None, :, None].expand_as(k)
        old_k, old_v = self.layers[layer]
        return old_k.scatter_(2, slots, k), old_v.scatter_(2, slots, v)


def pack(mask):
    """The places where a row of mask (B, T) is True, first to last: (B, m), m being the most of any
    row, and (B, m) bool, False where a row has fewer and is filled up with places of no meaning."""
    real, places = mask.int().sort(dim=1, descending=True, stable=True)
    m = int(mask.sum(1).max())
    return places[:, :m], real[:, :m].bool()


def certainty(logits, by, generator=None):
    """How sure a prediction is, logits (..., V) -> (...): the rule of dynamic decoding."""
    p = F.softmax(logits, dim=-1)
    if by == "confidence":
        return p.amax(-1)
    if by == "entropy":
        return torch.xlogy(p, p).sum(-1)  # minus the entropy
    if by == "margin":
        top = p.topk(min(2, p.shape[-1])).values
        return top[..., 0] - top[..., -1]
    if by == "random":
        return torch.rand(p.shape[:-1], generator=generator, device=p.device)
    raise ValueError(f"by must be 'confidence', 'entropy', 'margin' or 'random', not {by!r}")


def draw(logits, temperature, top_k, generator=None):
    """One token from each of logits (B, m, V): (B, m). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        worst = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    logits = logits - logits.amax(-1, keepdim=True)  # safe to divide by any temperature
    p = F.softmax(logits / temperature, dim=-1).flatten(0, 1)  # (B m, V)
    return torch.multinomial(p, 1, generator=generator).view(logits.shape[:-1])


class A3(nn.Module):
    """Exact likelihoods and samples for any ordered partition of the positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.start_id = config.vocab_size
        C = config.n_embd
        # Names, shapes and layout of the content stream are those of lomdm.py's ARM: behind the
        # start token, token i is in slot i + 1. (An ARM never reads its last token; others may.)
        self.wte = nn.Embedding(config.vocab_size + 1, C)  # the last row is the start token
        self.wpe = nn.Embedding(config.seq_len + 1, C)
        # All queries start from one vector. Those that see the start token only put weight 1 on it,
        # whatever its distance, so that rotary embeddings cannot tell them apart: hence wpe_query.
        self.query = nn.Parameter(torch.empty(C))
        self.wpe_query = nn.Embedding(config.seq_len, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(C, eps=1e-5)
        # The start token is never predicted, nor is what fills the rows up to a multiple of 64.
        self.lm_head = nn.Linear(C, 64 * math.ceil(config.vocab_size / 64), bias=False)

        half = C // config.n_head // 2
        angle = torch.outer(torch.arange(config.seq_len + 1), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)  # (seq_len + 1, head_dim / 2)
        self.register_buffer("sin", angle.sin(), persistent=False)

        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # GPT-2: residuals keep their scale
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2 or name == "query":
                nn.init.normal_(p, std=0.02)

    def check(self, x, groups):
        if x.ndim != 2 or groups.shape != x.shape or groups.dtype != torch.long:
            raise ValueError(
                f"x and groups must both be (B, L), and groups long: x is {tuple(x.shape)}, "
                f"groups {tuple(groups.shape)} {groups.dtype}"
            )
        if x.shape[1] > self.config.seq_len:
            raise ValueError(f"{x.shape[1]} tokens do not fit into seq_len {self.config.seq_len}")

    def streams(self, tokens, slots, positions, sees, cache=None):
        """Both streams through all layers: content of the tokens (B, n) in their slots (B, n),
        queries for the positions (B, m). Returns the final query states (B, m, n_embd)."""
        n = tokens.shape[1]
        h = torch.cat(
            (self.wte(tokens) + self.wpe(slots), self.query + self.wpe_query(positions)), dim=1
        )
        h = F.dropout(h, self.config.dropout, self.training)  # (B, n + m, C)
        place = torch.cat((slots, positions + 1), dim=1)  # a query stands where its token will
        rotary = self.cos[place][:, None], self.sin[place][:, None]  # (B, 1, n + m, head_dim / 2)
        for block in self.blocks:
            h = block(h, n, rotary, sees, cache, last=block is self.blocks[-1])
        return self.norm(h)

    def logits(self, h):
        """(..., n_embd) -> (..., V)"""
        return self.lm_head(h)[..., : self.config.vocab_size]

    def nll(self, h, x):
        """-log p(x) for query states h (N, n_embd) and tokens x (N,): (N,). With a large vocabulary
        logits are most of the memory, so no more than MAX_LOGITS exist at a time: beyond that they
        come in chunks, and again in the backward pass."""
        rows = max(1, MAX_LOGITS // self.config.vocab_size)
        if len(x) <= rows:
            return F.cross_entropy(self.logits(h), x, reduction="none")
        chunks = zip(h.split(rows), x.split(rows), strict=True)
        return torch.cat(
            [
                checkpoint(self.nll, *chunk, use_reentrant=False, preserve_rng_state=False)
                for chunk in chunks
            ]
        )

    def features(self, x, groups, single=None):
        """(3) The final query states (B, L, n_embd) of all positions, each in its place. single:
        whether every group has one token; None finds out, for which a GPU has to stop."""
        self.check(x, groups)
        rank = groups.clamp(min=-1)  # (B, L): all given tokens are one group, before the others
        order = rank.argsort(dim=1, stable=True)  # (B, L)
        rank = rank.gather(1, order)
        # Behind the start token. The last token in the order is seen by no query: leave it out.
        tokens = F.pad(x.gather(1, order)[:, :-1], (1, 0), value=self.start_id)  # (B, L)
        slots = F.pad(order[:, :-1] + 1, (1, 0))
        if single is None:
            single = bool((rank[:, 1:] > rank[:, :-1]).all())
        if single:
            sees = {"is_causal": True}, {"is_causal": True}
        else:
            content = F.pad(rank[:, :-1], (1, 0), value=-2)
            sees = who_sees(content, content, rank)
        h = self.streams(tokens, slots, order, sees)  # sorted
        return h.gather(1, order.argsort(dim=1)[..., None].expand_as(h))

    def forward(self, x, groups):
        """x, groups (B, L) long -> logits (B, L, V): what each position is predicted to be by the
        groups before its own (at a given token: by the start token alone, which nobody needs).

        ValueError for groups of another shape or dtype than (B, L) long, and for L > seq_len."""
        return self.logits(self.features(x, groups))

    def log_prob(self, x, groups, single=None):
        """Equation (1), term by term: log p(x_i | earlier groups) (B, L) in nats, 0 at given
        tokens. A row's sum is the exact log-likelihood of what is predicted, given the given.
        single: see features()."""
        h = self.features(x, groups, single)
        return -self.nll(h.flatten(0, 1), x.flatten()).view_as(x) * (groups >= 0)

    def loss(self, x, groups, single=None):
        """Nats per predicted token: the mean of -log_prob over all of them, and 0 if there are
        none."""
        predicted = (groups >= 0).sum()
        return -self.log_prob(x, groups, single).sum() / predicted.clamp(min=1)

    def step(self, cache, x, rank, ask):
        """(4) One call of the cached network. rank (B, L) says when each token of x was committed:
        -1 for a given one, L for one that is open, whose token is ignored. What is committed but
        not in the cache goes in; the positions where ask (B, L) bool is True are predicted from all
        of it. Returns logits (B, m, V), their positions (B, m), whether asked for: see pack()."""
        L = x.shape[1]
        rank = F.pad(F.pad(rank, (1, 0), value=-2), (0, 1), value=L)  # (B, L + 2), as the slots
        slots, real = pack((rank < L) & (cache.rank == L))  # (B, n)
        positions, asked = pack(ask)  # (B, m)
        tokens = F.pad(x, (1, 1), value=self.start_id).gather(1, slots)
        tokens = tokens.masked_fill(~real, self.start_id)
        cache.rank, cache.slots = rank, slots.masked_fill(~real, L + 1)
        sees = who_sees(rank, rank.gather(1, slots), rank[:, -1:])
        return self.logits(self.streams(tokens, slots, positions, sees, cache)), positions, asked

    @torch.no_grad()
    def decode(self, x, groups, per_step, by, temperature=1.0, top_k=None, generator=None):
        """(5) Fill the positions of x (B, L) with groups >= 0, one group after another, and inside
        of each the per_step positions at a time that `by` is surest of. Rows may differ in what is
        given, and finish at different times. Returns x and the step that filled in each token, -1
        if given: (B, L) both. The steps are the groups that were decoded, and log_prob(x, steps) is
        what the model thought of the tokens as it drew them."""
        self.check(x, groups)
        if not 0 <= temperature < math.inf or per_step < 1 or (top_k is not None and top_k < 1):
            raise ValueError("temperature must be >= 0, per_step >= 1 and top_k >= 1 (or None)")
        if (groups < 0).all():
            raise ValueError("all tokens are given: nothing to predict")
        x, L = x.clone(), x.shape[1]
        rank = torch.where(groups < 0, -1, L)
        cache = Cache(*x.shape, x.device)
        for step in count():
            open = rank == L
            if not open.any():
                return x, rank
            first = groups.masked_fill(~open, torch.iinfo(torch.long).max).amin(1, keepdim=True)
            logits, at, asked = self.step(cache, x, rank, open & (groups == first))
            # scored at temperature 1 with all tokens: how the token is drawn is another matter
            score = certainty(logits, by, generator).masked_fill(~asked, -torch.inf)
            best = score.argsort(dim=1, descending=True, stable=True)[:, :per_step]
            at, asked = at.gather(1, best), asked.gather(1, best)  # (B, m), m <= per_step
            logits = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1]))
            token = draw(logits, temperature, top_k, generator)
            x.scatter_(1, at, torch.where(asked, token, x.gather(1, at)))
            rank.scatter_(1, at, torch.where(asked, step, rank.gather(1, at)))

    def generate(self, x, groups, temperature=1.0, top_k=None, generator=None):
        """Fill the positions of x (B, L) with groups (B, L) >= 0, ignoring the tokens there: one
        call of the network a group. An exact draw from p(x | given) at temperature 1. temperature 0
        takes the likeliest token; top_k draws from the k likeliest. Returns x (B, L).

        ValueError for bad groups, see forward(), and if all tokens are given."""
        return self.decode(x, groups, x.shape[-1], "confidence", temperature, top_k, generator)[0]

    def generate_dynamic(
        self, x, open, per_step=1, by="confidence", temperature=1.0, top_k=None, generator=None
    ):
        """Fill the positions of x (B, L) where open (B, L) bool is True, in an order of the model's
        own: each call predicts all that is open, and commits the per_step positions of each row
        where it is surest, as one group: ceil(n / per_step) calls for n open positions. by:
        "confidence" (largest top probability), "entropy" (smallest), "margin" (largest distance of
        the top two) or "random". Returns x and revealed_at (B, L), the number of the call that
        filled a position, -1 if given. ValueError as generate(), for per_step < 1, unknown by."""
        if open.dtype != torch.bool:
            raise ValueError(f"open must be a bool tensor, not {open.dtype}")
        groups = torch.where(open, 0, -1)  # one group, taken apart as we go
        return self.decode(x, groups, per_step, by, temperature, top_k, generator)

    @torch.no_grad()
    def load_arm(self, state_dict):
        """(6) Start from a trained ARM of lomdm.py (block_len = 1), its weights in both streams.
        Returns a line that says what was new. ValueError if names or shapes are not those of an ARM
        of this size (but an MDM has the same: that it is an ARM, only its Config can tell).

        New are the last token's slot, whose position is a copy of the one before, and what queries
        start from: the ARM's start token, which is how it asks for a token without knowing another,
        and its positions, slot i of which asks for token i. So the first token's prediction is the
        ARM's from the outset."""
        new = {"query", "wpe_query.weight"}
        want = {name: tuple(p.shape) for name, p in self.state_dict().items() if name not in new}
        want["wpe.weight"] = (self.config.seq_len, self.config.n_embd)
        got = {name: tuple(p.shape) for name, p in state_dict.items()}
        wrong = [f"no {name}" for name in want if name not in got]
        wrong += [f"unexpected {name}" for name in got if name not in want]
        wrong += [
            f"{name} is {got[name]}, not {want[name]}"
            for name in want
            if got.get(name, want[name]) != want[name]
        ]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"not an ARM of this size: {', '.join(wrong[:4])}{more}")
        wpe = state_dict["wpe.weight"]
        grown = {
            "wpe.weight": torch.cat((wpe, wpe[-1:])),
            "query": state_dict["wte.weight"][-1],
            "wpe_query.weight": wpe,
        }
        self.load_state_dict({**state_dict, **grown})
        return "loaded an ARM; new: query, wpe_query, the last row of wpe (copies of the ARM's)"
