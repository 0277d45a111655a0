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

(3) Sort the tokens by group, each with its position. The text a b c d with groups 1 0 2 0:
                     start  b  d  a  c                        start  b  d  a  c
        content  b     #    #  #              query  b          #
                 d     #    #  #                     d          #
                 a     #    #  #  #                  a          #    #  #
                 c     #    #  #  #  #               c          #    #  #  #
    Leave out the last token, c, whose content nobody needs. With one token a group, what the two
    streams see is then exactly a GPT's causal mask, and no mask is built.      -> A3.features()

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

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
        C, H = self.n_embd, self.n_head
        if C % (2 * H):  # rotary embeddings turn pairs of channels
            raise ValueError(f"n_embd ({C}) must be divisible by n_head ({H}), with even quotient")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


# ---- groups --------------------------------------------------------------------------------------
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


def who_sees(keys, content, queries):
    """Equation (2) for ranks of groups: keys (B, S), content (B, n), queries (B, m). Returns the
    mask argument of scaled_dot_product_attention for each stream."""
    keys = keys[:, None, None, :]
    content_mask = keys <= content[:, None, :, None]  # (B, 1, n, S): row sees column
    query_mask = keys < queries[:, None, :, None]  # (B, 1, m, S)
    return {"attn_mask": content_mask}, {"attn_mask": query_mask}


# ---- the network: LLaMA's blocks, read twice -----------------------------------------------------
def rotary_tables(pos, head_dim):
    """cos and sin (B, 1, T, head_dim) of the angles pos / 10000^(2 j / head_dim), pos (B, T)."""
    j = torch.arange(0, head_dim, 2, device=pos.device)
    angle = pos[:, None, :, None] * 1e4 ** (-j / head_dim)  # (B, 1, T, head_dim / 2)
    return angle.cos().repeat(1, 1, 1, 2), torch.cat((-angle.sin(), angle.sin()), dim=-1)


def rotate(q, cos, sin):
    """Rotary position embedding of q (B, n_head, T, head_dim): turn each pair of channels j and
    j + head_dim / 2 by its angle. roll() swaps the two."""
    return (q * cos + q.roll(q.shape[-1] // 2, dims=-1) * sin).type_as(q)


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

    def keys_values(self, h, rotary):
        """What others look at: content h (B, n, C) -> k, v (B, n_head, n, head_dim)."""
        B, n, C = h.shape
        kv = F.linear(self.norm1(h), self.qkv.weight[C:])  # (B, n, 2 C)
        k, v = kv.view(B, n, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)
        return rotate(k, *rotary), v

    def forward(self, h, k, v, rotary, sizes, masks):
        """h (B, T, C): streams of these sizes side by side, as they share every matrix product.
        Each looks at k and v by a mask of its own, see who_sees(). Returns (B, T, C)."""
        drop = self.dropout if self.training else 0.0
        q = F.linear(self.norm1(h), self.qkv.weight[: h.shape[-1]])  # (B, T, C)
        q = rotate(q.unflatten(-1, (self.n_head, -1)).transpose(1, 2), *rotary)
        y = [  # (B, n_head, n, head_dim) each
            F.scaled_dot_product_attention(rows, k, v, dropout_p=drop, **sees)
            for rows, sees in zip(q.split(sizes, dim=2), masks, strict=True)
        ]
        y = torch.cat(y, dim=2).transpose(1, 2).flatten(2)  # (B, T, C)
        h = h + F.dropout(self.proj(y), drop)
        gate, up = self.gate_up(self.norm2(h)).chunk(2, dim=-1)  # (B, T, hidden) each
        return h + F.dropout(self.down(F.silu(gate) * up), drop)


class A3(nn.Module):
    """Exact likelihoods and samples for any ordered partition of the positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.start_id = self.mask_id = config.vocab_size  # sample() asks for tokens with it
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
        for name, p in self.named_parameters():
            if p.ndim == 2 or name == "query":  # as GPT-2: residual branches keep their scale
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def check(self, x, groups):
        if x.ndim != 2 or groups.shape != x.shape or groups.dtype != torch.long or not x.numel():
            what = f"{tuple(x.shape)}, {tuple(groups.shape)} {groups.dtype}"
            raise ValueError(f"x and groups must both be (B, L), and groups long; they are {what}")
        if x.shape[1] > self.config.seq_len:
            raise ValueError(f"{x.shape[1]} tokens do not fit into seq_len {self.config.seq_len}")

    def streams(self, tokens, slots, positions, sees, cache=None):
        """Both streams through all layers: content of the tokens (B, n) in their slots (B, n),
        queries for the positions (B, m). sees: see who_sees(), for the keys of these n or of all in
        the cache. Returns the final query states (B, m, n_embd)."""
        n, m = slots.shape[1], positions.shape[1]
        content = self.wte(tokens) + self.wpe(slots)  # (B, n, C)
        queries = self.query + self.wpe_query(positions)  # (B, m, C)
        h = F.dropout(torch.cat((content, queries), 1), self.config.dropout, self.training)
        place = torch.cat((slots, positions + 1), dim=1)  # a query stands where its token will
        cos, sin = rotary_tables(place, self.config.n_embd // self.config.n_head)
        for layer, block in enumerate(self.blocks):
            k, v = block.keys_values(h[:, :n], (cos[:, :, :n], sin[:, :, :n]))
            if cache is not None:
                k, v = cache.append(layer, k, v)
            if block is not self.blocks[-1]:
                h = block(h, k, v, (cos, sin), (n, m), sees)
            else:  # nobody reads the content any more
                h = block(h[:, n:], k, v, (cos[:, :, n:], sin[:, :, n:]), (m,), sees[1:])
        return self.norm(h)

    def logits(self, h):
        """(..., n_embd) -> (..., V), float32 at least: bfloat16 is too coarse for likelihoods."""
        logits = self.lm_head(h)[..., : self.config.vocab_size]
        return logits.to(torch.promote_types(self.wte.weight.dtype, torch.float32))

    def features(self, x, groups, single=None):
        """(3) The final query states (B, L, n_embd) of all positions, each in its place. single:
        whether every group has one token; None finds out, for which a GPU has to stop."""
        self.check(x, groups)
        rank = groups.clamp(min=-1)  # (B, L): all given tokens are one group, before the others
        order = rank.argsort(dim=1, stable=True)  # (B, L)
        rank = rank.gather(1, order)
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
        groups before its own (at a given token: nothing of use). ValueError for bad shapes."""
        return self.logits(self.features(x, groups))

    def log_prob(self, x, groups, single=None):
        """Equation (1), term by term: log p(x_i | earlier groups) (B, L) in nats, 0 at given
        tokens. A row's sum is the log-likelihood of what is predicted, given the given."""
        h = self.features(x, groups, single)
        return -self.nll(h.flatten(0, 1), x.flatten()).view_as(x) * (groups >= 0)

    def loss(self, x, groups, single=None):
        """Nats per predicted token, the mean of -log_prob over all of them, and a dict of detached
        metrics, as in lomdm.py."""
        predicted = (groups >= 0).sum()
        loss = -self.log_prob(x, groups, single).sum() / predicted.clamp(min=1)
        return loss, {"nelbo": loss.detach()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, size=1, generator=None):
        """-log p(x) (B,), nats per sequence: its mean over n_draws random orders, cut into groups
        of `size`; size 0 is left to right."""
        total = 0
        for _ in range(n_draws):
            groups = random_groups(*x.shape, size or 1, generator, x.device)
            total = total - self.log_prob(x, groups if size else ar_groups(*x.shape, x.device))
        return total.sum(1) / n_draws

    max_logits = 2**26  # 256 MiB

    def nll(self, h, x):
        """-log p(x) for query states h (N, n_embd) and tokens x (N,): (N,). The added code is so
        that no more than max_logits exist at a time, most of the memory with a large vocabulary:
        beyond that they come in chunks, and again in the backward pass."""
        rows = max(1, self.max_logits // self.config.vocab_size)
        if len(x) <= rows:  # ignore_index: by default a token -100 would cost nothing
            return F.cross_entropy(self.logits(h), x, reduction="none", ignore_index=-(2**63))
        chunks = zip(h.split(rows), x.split(rows), strict=True)
        return torch.cat([checkpoint(self.nll, *chunk, use_reentrant=False) for chunk in chunks])

    # ---- the cache -------------------------------------------------------------------------------
    def step(self, cache, tokens, slots, rank, ask):
        """(4) One call of the cached network. The tokens (B, n) of groups of these ranks (B, n) are
        committed in their slots (B, n), slot i + 1 for token i; rank L means that nobody is to see
        it. Then the positions where ask (B, L) bool is True are predicted from all that was ever
        committed. Returns logits (B, m, V), their positions (B, m), whether asked: see pack()."""
        positions, asked = pack(ask)  # (B, m)
        cache.rank = torch.cat((cache.rank, rank), dim=1)  # (B, S)
        sees = who_sees(cache.rank, rank, torch.full_like(rank[:, :1], ask.shape[1]))
        return self.logits(self.streams(tokens, slots, positions, sees, cache)), positions, asked

    # ---- decoding --------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(self, x, groups, per_step, by, temperature=1.0, top_k=None, generator=None):
        """(5) Fill the positions of x (B, L) with groups >= 0, one group after another, and inside
        of each the per_step positions at a time that `by` is surest of. Rows may differ in what is
        given, and finish at different times. Returns x and the step that filled in each token, -1
        if given: (B, L) both. The steps are the groups that were decoded: log_prob(x, steps)."""
        self.check(x, groups)
        if not 0 <= temperature < math.inf or per_step < 1 or (top_k is not None and top_k < 1):
            raise ValueError("temperature must be >= 0, per_step >= 1 and top_k >= 1 (or None)")
        x, L = x.masked_fill(groups >= 0, self.mask_id), x.shape[1]
        rank = torch.where(groups < 0, -1, L)  # the step that committed a token; L: open
        given, real = pack(groups < 0)  # (B, n)
        cache = Cache(x[:, :0])
        tokens = F.pad(x.gather(1, given), (1, 0), value=self.start_id)  # what to commit next
        slots, ranks = F.pad(given + 1, (1, 0)), F.pad(torch.where(real, -1, L), (1, 0), value=-2)
        for step in range(L + 1):
            left = rank == L
            if not left.any():
                return x, rank
            first = groups.masked_fill(~left, torch.iinfo(torch.long).max).amin(1, keepdim=True)
            ask = left & (groups == first)
            logits, at, asked = self.step(cache, tokens, slots, ranks, ask)
            score = certainty(logits, by, generator).masked_fill(~asked, -torch.inf)
            best = score.argsort(dim=1, descending=True, stable=True)[:, :per_step]
            at, asked = at.gather(1, best), asked.gather(1, best)  # (B, m), m <= per_step
            logits = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1]))
            tokens, slots = draw(logits, temperature, top_k, generator), at + 1
            ranks = torch.where(asked, step, L)
            x.scatter_(1, at, torch.where(asked, tokens, x.gather(1, at)))
            rank.scatter_(1, at, torch.where(asked, step, rank.gather(1, at)))

    def generate(self, x, groups, temperature=1.0, top_k=None, generator=None):
        """Fill the positions of x (B, L) with groups (B, L) >= 0, one call of the network a group:
        an exact draw from p(x | given) at temperature 1. Returns x (B, L)."""
        return self.decode(x, groups, x.shape[-1], "confidence", temperature, top_k, generator)[0]

    def sample(self, z, temperature=1.0, top_k=None, per_step=1, by="left", generator=None):
        """Fill the mask_id positions of z (B, L), per_step a call, which become one group: from
        left to right, or in an order of the model's own. Then each call predicts all that is open
        and commits what it is surest of, by "confidence" (largest top probability), "entropy"
        (smallest), "margin" (largest distance of the top two) or "random". Returns x and
        revealed_at (B, L), the number of the call that filled a position, -1 if given."""
        masked = z == self.mask_id
        place = masked.cumsum(1) - 1 if by == "left" else torch.zeros_like(z)
        groups = torch.where(masked, place // max(1, per_step), -1)
        by = "confidence" if by == "left" else by  # a whole group at once: there is no choice
        return self.decode(z, groups, per_step, by, temperature, top_k, generator)

    # ---- adaptation ------------------------------------------------------------------------------
    @torch.no_grad()
    def load_arm(self, state_dict):
        """(6) Start from a trained ARM of lomdm.py (block_len = 1), its weights in both streams.
        Returns a line that says what was new. ValueError if names or shapes are not those of an ARM
        of this size (but an MDM has the same: that it is an ARM, only its Config can tell).
        New are the last token's slot, a copy of the one before, and what queries start from: the
        ARM's start token, which is how it asks for a token without knowing another, and its
        positions, slot i of which asks for token i. So the first prediction is the ARM's."""
        mine = self.state_dict().items()
        want = {name: tuple(p.shape) for name, p in mine if "query" not in name}
        want["wpe.weight"] = (self.config.seq_len, self.config.n_embd)
        got = {name: tuple(p.shape) for name, p in state_dict.items()}
        wrong = [f"no {name}" for name in want if name not in got]
        wrong += [f"unexpected {name}" for name in got if name not in want]
        wrong += [f"{n} is {got[n]}, not {want[n]}" for n in want if got.get(n, want[n]) != want[n]]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"not an ARM of this size: {', '.join(wrong[:4])}{more}")
        wpe = state_dict["wpe.weight"]
        new = {"query": state_dict["wte.weight"][-1], "wpe_query.weight": wpe}
        self.load_state_dict({**state_dict, **new, "wpe.weight": torch.cat((wpe, wpe[-1:]))})
        return "loaded an ARM; new: query, wpe_query, the last row of wpe (copies of the ARM's)"


class Cache:
    """Keys and values of the committed content, and the rank of each one's group. Append-only."""

    def __init__(self, rank):
        self.rank, self.layers = rank, {}  # rank (B, S), beginning with S = 0

    def append(self, layer, k, v):
        """Add k, v (B, n_head, n, head_dim), return all keys and all values of the layer."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.layers[layer] = k, v
        return k, v


def pack(mask):
    """The places where a row of mask (B, T) is True, first to last: (B, m), m being the most of any
    row, and (B, m) bool, False where a row has fewer and is filled up with any places."""
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
        good = all(share >= 0 for share in self.shares) and abs(sum(self.shares) - 1) <= 1e-6
        if len(self.shares) != 3 or not good:
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
