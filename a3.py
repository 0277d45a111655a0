"""
A language model that predicts its tokens in any order, several at a time. After A3,
arXiv:2601.13228 ("any-order, any-subset autoregression").

A masked diffusion model can write in any order, but its likelihood is only bounded, and it
reads everything anew for every token. A GPT has an exact likelihood and a cache, but one
order. A3 has any order, an exact likelihood, and a cache. Cut the positions of a text x (B, L)
into groups G_1, .., G_K and predict one group after another, the tokens of a group at once,
independently of each other:

    log p(x)  =  sum_k  sum_{i in G_k}  log p(x_i | x_{G_1}, .., x_{G_{k-1}})             (1)

Other groups, or another order of them, give another p(x).

    groups                           what it is then
    {0}, {1}, .., {L-1}              a GPT                              chunk_groups(B, L)
    contiguous chunks of s           s tokens at a time, left to right  chunk_groups(B, L, s)
    what is visible, then the rest   one step of a masked diffusion model
    a random partition               any order, any subset              random_groups(B, L, s)

In code, `groups` (B, L) holds the number of each position's group, a partition of its own for
every text. Only the order of the numbers counts. A negative number marks a token that is
given, like a prompt: it is read and not predicted. Given tokens are read one by one, each as
a group of its own: see ranks().

    log_p = model.log_prob(x, groups)  # (B, L): equation (1), term by term, in nats
    x = model.generate(x, groups)      # the same groups, drawn one after another

To be read by later groups, a position must know its token. To be predicted, it must not. So
every position is computed twice, with the same weights. These are the two streams:

    content h_i   knows x_i, and sees the content of its own and earlier groups
    query q_i     knows i but not x_i, and sees the content of earlier groups

Nobody sees a query. From its last state the output layer makes p(x_i | ..).

The sequence begins with a start token, which all may see, so that the first token is predicted
like the others. It is in slot 0, and the content of token i in slot i + 1. The query for token
i stands one slot before, in slot i. There a GPT with a start token reads token i - 1 and
predicts token i. Take the text a b c d with the groups 1 0 2 0: first b and d at once,
then a, then c. A row sees a column where there is a #:

    slot              0     1  2  3  4        slot              0     1  2  3  4
                    start   a  b  c  d             in slot    start   a  b  c  d
    content  start    #                       query  a?  0      #        #     #
             a        #     #  #     #               b?  1      #
             b        #        #     #               c?  2      #     #  #     #
             c        #     #  #  #  #               d?  3      #
             d        #        #     #

The query for token i shares its slot with token i - 1. Its input is the embedding of that token
if it may see it, otherwise one learned vector. Left to right each query then has the input of a
GPT in that slot, and sees the same, so it computes the same. So a trained GPT can be loaded, and
left to right the A3 predicts what it predicted. (In the paper the learned vector is the input of
all queries: left_neighbour=False.)

The sections of this file:

    1  groups                           the partitions of (1), and who sees whom
    2  the network                      a transformer block in two halves
    3  the model                        two streams, exact likelihood, loss
    4  decoding                         group-wise, or where the model is surest
    5  tools for sampling               how sure is a guess, and how to draw a token
    6  the same, cheaper                a causal mask by sorting, a cache, logits in chunks
    7  adaptation                       from a pretrained GPT to any order, in three stages
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def need(holds, message):
    """Raise ValueError(message) unless the condition holds."""
    if not holds:
        raise ValueError(message)


@dataclass
class Config:
    vocab_size: int  # the start token comes on top of these tokens, with the id vocab_size
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    local_heads: float = 0.75  # this share of the heads begins by looking at a neighbour
    left_neighbour: bool = True  # False: all queries begin as one vector, as in the paper

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            need(value >= 1, f"{name} must be at least 1, not {value}")

        # Rotary embeddings turn pairs of channels, so every head needs an even number of them.
        C, H = self.n_embd, self.n_head
        even = f"n_embd ({C}) must be divisible by n_head ({H}), with even quotient"
        need(C % (2 * H) == 0, even)
        need(0 <= self.local_heads <= 1, f"local_heads must be in [0, 1], not {self.local_heads}")
        need(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")


# ---- 1. groups ---------------------------------------------------------------------------


def chunk_groups(B, L, size=1, device=None):
    """Chunks of `size` neighbours, left to right, the last perhaps shorter: groups (B, L),
    int64. size is a number, or (B, 1), a number for each text."""
    # A tensor goes unchecked: to read it, the CPU would have to wait for a GPU.
    fits = torch.is_tensor(size) or size >= 1
    need(fits, f"the size of a group must be at least 1, not {size}")
    groups = torch.arange(L, device=device) // size  # (L,), or (B, L)
    return groups.expand(B, L).clone()


def random_groups(B, L, size=1, generator=None, device=None):
    """A random order for each text, cut into groups of `size`, a number or (B, 1): groups
    (B, L), int64."""
    place = torch.rand(B, L, generator=generator, device=device).argsort(dim=1)
    return chunk_groups(B, L, size, device).gather(1, place)  # position i comes as number place[i]


def ranks(groups):
    """When each token is read, (B, L): the number of its group, for a token that is predicted.
    Given tokens come before, one by one as a GPT reads a prompt, with the numbers -L, -L + 1,
    ..: in the order of their groups, and from left to right where these are equal."""
    order = groups.argsort(dim=1, stable=True)
    place = order.argsort(dim=1)  # where each token is in this order: 0 .. L - 1, given first
    return torch.where(groups < 0, place - groups.shape[1], groups)


def who_sees(key_rank, content_rank, query_rank):
    """The two masks of the picture above, (B, 1, n, S) and (B, 1, m, S) bool, in which a row
    sees a column if True. key_rank (B, S) are the ranks of what is read, content_rank (B, n)
    and query_rank (B, m) of what reads."""
    keys = key_rank[:, None, None, :]
    content_mask = keys <= content_rank[:, None, :, None]
    query_mask = keys < query_rank[:, None, :, None]
    return content_mask, query_mask


# ---- 2. the network ----------------------------------------------------------------------
# This is a GPT with the parts of LLaMA: RMSNorm, rotary embeddings, a gated MLP. In a Block the
# queries are those of attention, which both streams have, and not the query stream. Both ask, by
# queries(), but only content answers, by keys_values(). So the block is in parts.


def rotary_tables(pos, head_dim):
    """cos and sin (.., T, head_dim) for rotate(), of what is at positions pos (.., T). Pair j
    of the channels turns by 10000^(-2 j / head_dim) radians for every position."""
    j = torch.arange(head_dim // 2, device=pos.device)
    radians = 1e4 ** (-2 * j / head_dim)  # (head_dim / 2,)

    # rotate() needs -sin for the first channel of each pair, and sin for the second.
    angle = pos[..., None] * torch.cat((-radians, radians))  # (.., T, head_dim)
    return angle.cos(), angle.sin()


def rotate(q, cos, sin):
    """Rotary position embedding of q (.., T, head_dim). It turns each pair of channels a and
    b, which are head_dim / 2 apart, by its angle: a cos - b sin and b cos + a sin. The product
    of a query and a key then depends on their distance."""
    swapped = q.roll(q.shape[-1] // 2, dims=-1)  # b in the place of a, and a in that of b
    return (q * cos + swapped * sin).type_as(q)


CAUSAL = "causal"  # a mask that need not be built: row i sees the columns 0 .. i


class Block(nn.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream.
    The parameters have the names and shapes of an ARM's in lomdm.py."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        hidden = 32 * math.ceil(8 * C / 3 / 32)  # as many parameters as 4 C without a gate
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.norm1 = nn.RMSNorm(C, eps=1e-5)
        self.qkv = nn.Linear(C, 3 * C, bias=config.local_heads > 0)  # see look_at()
        self.proj = nn.Linear(C, C, bias=False)
        self.norm2 = nn.RMSNorm(C, eps=1e-5)
        self.gate_up = nn.Linear(C, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, C, bias=False)

    def look_at(self, distances):
        """Let the first heads begin by looking at neighbours, one head for each of distances.

        At first attention looks everywhere, and the input at a hidden token says little or
        nothing of what is beside it. So a model has to discover that neighbours matter, and for
        hundreds of steps it knows only how frequent characters are. Biases of q and k can tell
        it: for k the vector (c, .., c, 0, .., 0), and for q this vector as rotate() turns it at
        position d. Pair j of channels turns by f_j radians a position, so the product of the two
        begins as

            c^2 sum_j cos(f_j (position of key - position of query - d))

        which is largest for the key at the distance d, one place to the left if d is -1. Attention
        divides it by sqrt(head_dim). With c = 5 and head_dim 32, that key then weighs e^3 times
        one beside it. It is only the beginning: training may move it.
        The other heads begin without, and find what is far. (This is not in the paper.)"""
        D = self.proj.in_features // self.n_head
        k = torch.cat((torch.full((D // 2,), 5.0), torch.zeros(D // 2)))

        for head, d in enumerate(distances):  # if there are any, qkv has a bias
            bias = self.qkv.bias.data.view(3, self.n_head, D)  # of q, k and v
            bias[0, head] = rotate(k, *rotary_tables(torch.tensor(d), D))
            bias[1, head] = k

    def queries(self, u, rotary):
        """What a stream asks with, for u = norm1(h) (B, T, C): (B, n_head, T, head_dim)."""
        C = u.shape[-1]
        return rotate(self.project(u, slice(0, C)), *rotary)

    def keys_values(self, u, rotary):
        """What the content answers with, for u = norm1(h) (B, n, C): k and v, each (B, n_head,
        n, head_dim)."""
        C = u.shape[-1]
        k, v = self.project(u, slice(C, 3 * C)).chunk(2, dim=1)
        return rotate(k, *rotary), v

    def project(self, u, rows):
        """Some rows of the matrix qkv applied to u (B, T, C): (B, heads, T, head_dim)."""
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        u = F.linear(u, self.qkv.weight[rows], bias)
        head_dim = self.proj.in_features // self.n_head
        return u.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # a view for each head

    def attend(self, h, q, k, v, mask):
        """The rest of the block for a stream h (B, T, C) that asks q. mask: CAUSAL, or a table
        (B, 1, T, S) in which a row sees a column if True."""
        drop = self.dropout if self.training else 0.0

        # y (B, n_head, T, head_dim): what each head found
        if mask is CAUSAL:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, attn_mask=mask)
        h = h + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), drop)

        gate, up = self.gate_up(self.norm2(h)).chunk(2, dim=-1)  # (B, T, hidden) each
        return h + F.dropout(self.down(F.silu(gate) * up), drop)


# ---- 3. the model ------------------------------------------------------------------------


class A3(nn.Module):
    """Exact likelihoods and samples for any ordered partition of the positions.

    Texts x (B, L) and groups (B, L) are int64, L <= seq_len. Everything is in nats. If dropout is
    not 0, call eval() before nelbo() and sample()."""

    Block = Block  # beyond/llama.py has another

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        self.start_id = V
        self.mask_id = V  # what sample() fills in: the same number, as no [MASK] is ever embedded
        self.wte = nn.Embedding(V + 1, C)  # the last row is the start token

        # A query that sees just the start token puts weight 1 on it, whatever the distance.
        # With rotary embeddings alone it would not know where it is. Hence wpe, the learned
        # positions.
        self.wpe = nn.Embedding(config.seq_len, C)
        self.query = nn.Parameter(torch.empty(C))  # where the left neighbour may not be seen
        self.blocks = nn.ModuleList(self.Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(C, eps=1e-5)

        # The start token is never predicted. The rows are filled up to a multiple of 64, which
        # GPUs like, and logits() cuts off what is too much.
        self.lm_head = nn.Linear(C, 64 * math.ceil(V / 64), bias=False)

        # As in GPT-2, the residual branches begin smaller, so that their sum keeps its scale.
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2 or name == "query":
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

        # The query for token i is in slot i, and tokens i - 1 and i + 1 are in slots i and
        # i + 2, at the distances 0 and 2. Then come -1, 3, .. (For the content of token i, in slot
        # i + 1, the distance 0 is itself, and -1 its left neighbour.) With three of four heads
        # local, two look back, and one ahead, where it finds nothing if texts are read from left
        # to right.
        n = round(config.local_heads * config.n_head)
        for block in self.blocks:
            block.look_at([i // 2 + 2 if i % 2 else -(i // 2) for i in range(n)])  # 0, 2, -1, 3

    def check(self, x, groups=None):
        L, most = x.shape[-1] if x.ndim else 0, self.config.seq_len
        need(x.ndim == 2 and x.numel() > 0, f"texts must be (B, L), not {tuple(x.shape)}")
        need(L <= most, f"{L} tokens do not fit into seq_len {most}")
        if groups is not None:
            same = groups.shape == x.shape and groups.dtype == torch.long
            what = f"not {tuple(x.shape)} and {tuple(groups.shape)} {groups.dtype}"
            need(same, f"x and groups must both be (B, L), and groups int64, {what}")

    def left_neighbours(self, x, visible):
        """The token on the left of each position of x (.., L): the start token for the first
        one, and -1 where it may not be seen, as visible (.., L - 1) says."""
        left = x[..., :-1].masked_fill(~visible, -1)
        left = F.pad(left, (1, 0), value=self.start_id)
        return left if self.config.left_neighbour else torch.full_like(left, -1)

    def embed_slots(self, slots):
        """The learned positions of slots (B, n): (B, n, C). There are seq_len + 1 slots. A GPT
        never reads the last one, so it has no row of its own and shares the one before."""
        return self.wpe(slots.clamp(max=self.config.seq_len - 1))

    def embed_content(self, tokens, slots):
        """How content begins, for tokens (B, n) in their slots (B, n): (B, n, C)."""
        return self.wte(tokens) + self.embed_slots(slots)

    def embed_queries(self, left, slots):
        """How queries begin in slots (B, m), for left neighbours (B, m), -1 if hidden: (B, m,
        C)."""
        is_hidden = (left < 0)[..., None]
        q = torch.where(is_hidden, self.query, self.wte(left.clamp(min=0)))
        return q + self.embed_slots(slots)

    def rotary(self, slots):
        """cos and sin (B, 1, T, head_dim) for slots (B, T)."""
        return rotary_tables(slots[:, None], self.config.n_embd // self.config.n_head)

    def streams(self, tokens, slots, left, query_slots, content_mask, query_mask):
        """Both streams through all layers: content of tokens (B, n) in their slots (B, n),
        queries in query_slots (B, m) with left neighbours (B, m), and the two masks of
        who_sees(). Returns the queries' last states (B, m, C)."""
        drop, training = self.config.dropout, self.training
        h = F.dropout(self.embed_content(tokens, slots), drop, training)
        q = F.dropout(self.embed_queries(left, query_slots), drop, training)
        rotary, query_rotary = self.rotary(slots), self.rotary(query_slots)

        for block in self.blocks:
            u = block.norm1(h)
            k, v = block.keys_values(u, rotary)  # what both streams read

            asked = block.queries(block.norm1(q), query_rotary)
            q = block.attend(q, asked, k, v, query_mask)

            if block is not self.blocks[-1]:  # nobody reads the content after the last layer
                h = block.attend(h, block.queries(u, rotary), k, v, content_mask)
        return self.norm(q)

    def features(self, x, groups):
        """The queries' last states (B, L, C) for texts x and their groups: the picture above, as
        it stands. log_prob() uses sorted_features(), which gives the same and costs less."""
        self.check(x, groups)
        rank = ranks(groups)
        left = self.left_neighbours(x, visible=rank[:, :-1] < rank[:, 1:])

        # The start token comes before everything: no rank is as small as -L - 1.
        L = x.shape[1]
        tokens = F.pad(x, (1, 0), value=self.start_id)  # (B, L + 1)
        token_rank = F.pad(rank, (1, 0), value=-L - 1)
        slots = torch.arange(L + 1, device=x.device).expand_as(tokens)

        masks = who_sees(token_rank, token_rank, rank)
        return self.streams(tokens, slots, left, slots[:, :-1], *masks)

    def logits(self, h):
        """(.., C) -> (.., V), in float32 at least, as softmax and sums follow."""
        logits = self.lm_head(h)[..., : self.config.vocab_size]
        return logits.to(torch.promote_types(self.wte.weight.dtype, torch.float32))

    def forward(self, x, groups):
        """Logits (B, L, V): what each position is predicted to be, from the groups before its
        own."""
        return self.logits(self.features(x, groups))

    def log_prob(self, x, groups, single=None):
        """Equation (1), term by term: log p(x_i | earlier groups) (B, L) in nats, and 0 at
        given tokens. A row's sum is the log-likelihood of what is predicted, given the rest.
        single: see sorted_features(), which computes features()."""
        h = sorted_features(self, x, groups, single)
        return -nll(self, h.flatten(0, 1), x.flatten()).view_as(x) * (groups >= 0)

    def loss(self, x, groups=None, single=None):
        """What training minimises: the mean of -log p over the predicted tokens, in nats per
        token, and a dict of detached metrics. "nelbo" is the negative evidence lower bound,
        here the loss itself. Without groups, every text gets a random order."""
        self.check(x, groups)
        if groups is None:
            groups, single = random_groups(*x.shape, device=x.device), True
        loss = -self.log_prob(x, groups, single).sum() / (groups >= 0).sum().clamp(min=1)
        return loss, {"nelbo": loss.detach()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, order="random", size=1, generator=None):
        """-log p(x) (B,) in nats, in groups of `size`. In the order "left", which means from
        left to right, it is exact. For "random" it is the mean of n_draws random orders. Each
        of them is exact for itself. On average over the draws this is at least -log of the mean
        of p over all orders, so it estimates an upper bound of that."""
        need(order in ("left", "random"), f"order must be 'left' or 'random', not {order!r}")
        need(n_draws >= 1, f"n_draws must be at least 1, not {n_draws}")
        self.check(x)
        if order == "left":
            return -self.log_prob(x, chunk_groups(*x.shape, size, x.device)).sum(1)

        total = 0
        for _ in range(n_draws):
            groups = random_groups(*x.shape, size, generator, x.device)
            total = total - self.log_prob(x, groups).sum(1)
        return total / n_draws

    @torch.no_grad()
    def load_arm(self, state_dict):
        """Take the weights of a trained GPT, an ARM of lomdm.py. Left to right this then predicts
        what the GPT does, to rounding, unless left_neighbour is False. Names and shapes are the
        same. New is only the vector as which a query begins if its left neighbour is hidden: it
        becomes the mean embedding. ValueError if other names or shapes are found."""
        mine = {name: tuple(p.shape) for name, p in self.state_dict().items() if name != "query"}
        got = {name: tuple(p.shape) for name, p in state_dict.items()}

        wrong = [name for name in {**mine, **got} if mine.get(name) != got.get(name)]
        if wrong:
            first = f"{wrong[0]} is {got.get(wrong[0])}, not {mine.get(wrong[0])}"
            raise ValueError(f"not an ARM of this size: {first}, and {len(wrong) - 1} more")
        self.load_state_dict({**state_dict, "query": state_dict["wte.weight"].mean(0)})

    # ---- 4. decoding ---------------------------------------------------------------------

    def generate(self, x, groups, **how):
        """Fill what has groups >= 0 in x (B, L), one group a call: with the defaults an exact draw
        from p(x | given). how: temperature, top_k, top_p, generator, cache; see sample()."""
        # With L positions at a time, all of a group are filled at once, whatever the rule.
        return self.decode(x, groups, x.shape[-1], "left", **how)[0]

    def sample(self, z, temperature=1.0, top_k=None, per_step=1, by="left", **how):
        """Fill the mask_id positions of z (B, L), per_step of them a call: everything, what
        follows a prompt, or gaps. Given tokens are read first.

        Which positions? From "left" to right; at "random"; or those where the model is surest
        of all that are open, by "confidence", "entropy" or "margin": see certainty(). What is
        chosen together becomes one group, as in training. temperature, top_k, top_p: see
        probabilities(). how: top_p, generator, and cache, which changes nothing but the time.

        Returns the texts x (B, L) and revealed_at (B, L): the number of the call that filled a
        position, and -1 if it was given."""
        self.check(z)
        need(per_step >= 1, f"per_step must be at least 1, not {per_step}")
        is_open = z == self.mask_id
        groups = is_open.long() - 1  # given -1, open 0: one group, and `by` chooses from it

        # From left to right it is known beforehand which positions come together. They get
        # groups of their own, so that decode() predicts only these in a call, and not all that
        # are open.
        if by == "left":
            place = is_open.cumsum(dim=1) - 1  # 0, 1, .. for the open positions
            groups = torch.where(is_open, place // per_step, -1)

        return self.decode(z, groups, per_step, by, temperature, top_k, **how)

    @torch.no_grad()
    def decode(
        self, x, groups, per_step, by, temperature=1.0, top_k=None,
        top_p=None, generator=None, cache=True,
    ):  # fmt: skip
        """Fill the positions of x (B, L) with groups >= 0, one group after another, and inside
        of a group the per_step positions at a time that are first by the rule `by`.

        Returns x and revealed_at (B, L): the number of the step that filled a position, and for a
        given token its negative group. If log_prob() gets revealed_at as groups, it returns the
        log-probability with which x was drawn, for the default temperature, top_k and top_p."""
        self.check(x, groups)
        need(per_step >= 1, f"per_step must be at least 1, not {per_step}")
        L = x.shape[1]
        x = x.masked_fill(groups >= 0, self.mask_id)
        revealed_at = torch.where(groups < 0, groups, L)  # L: still open
        read = Cache(self, x) if cache else self.read

        for step in range(L):
            is_open = revealed_at == L
            if not is_open.any():
                break

            # Where? Among the open positions of the first group that has any, in each text.
            last = torch.iinfo(torch.long).max
            first = groups.masked_fill(~is_open, last).amin(dim=1, keepdim=True)
            at, real = pack(is_open & (groups == first))  # (B, m); shorter rows are padded
            logits = read(x, revealed_at, at)  # (B, m, V)
            score = self.score(logits, at, by, generator).masked_fill(~real, -torch.inf)
            best = score.argsort(dim=1, descending=True, stable=True)[:, :per_step]
            at, real = at.gather(1, best), real.gather(1, best)

            # What? Tokens from the predictions there.
            logits = logits.take_along_dim(best[..., None], dim=1)
            p = probabilities(logits, temperature, top_k, top_p).flatten(0, 1)
            token = torch.multinomial(p, 1, generator=generator).view_as(at)

            # Write. Where a row is padded, everything stays as it is.
            x.scatter_(1, at, torch.where(real, token, x.gather(1, at)))
            revealed_at.scatter_(1, at, torch.where(real, step, revealed_at.gather(1, at)))
        return x, revealed_at

    def read(self, x, revealed_at, at):
        """Logits (B, m, V) at positions `at` (B, m), from all tokens of x (B, L) that are
        revealed. The open ones, with revealed_at = L, are one last group, which nobody
        sees."""
        x = x.masked_fill(revealed_at == x.shape[1], 0)  # any token: nobody sees it
        return self.forward(x, revealed_at).take_along_dim(at[..., None], dim=1)

    def score(self, logits, at, by, generator):
        """The rule `by` as a score (B, m) for each of the positions `at` (B, m), with these
        logits (B, m, V): the largest scores come next."""
        if by == "left":
            return -at.float()
        if by == "random":
            return torch.rand(at.shape, generator=generator, device=at.device)
        return certainty(logits, by)


# ---- 5. tools for sampling ---------------------------------------------------------------


def pack(mask):
    """The places where mask (B, L) is True, from left to right, (B, m), and which of these are
    real (B, m) bool: rows with fewer than the most are padded with other places."""
    real, places = mask.int().sort(dim=1, descending=True, stable=True)
    m = int(mask.sum(1).max())
    return places[:, :m], real[:, :m].bool()


def certainty(logits, by):
    """How sure is a guess? logits (.., V) -> (..), the larger the surer: by "confidence", the
    largest probability; by "margin", how far it is above the second; by "entropy", less of
    it."""
    rules = ("confidence", "entropy", "margin")
    known = f"left, random, one of {rules}, or order if one is learned"
    need(by in rules, f"by must be {known}, not {by!r}")
    p = F.softmax(logits, dim=-1)
    if by == "entropy":
        return torch.xlogy(p, p).sum(-1)  # minus the entropy

    top = p.topk(min(2, p.shape[-1])).values  # (.., 2)
    return top[..., 0] - top[..., -1] if by == "margin" else top[..., 0]


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """What tokens are drawn from, logits (.., V) -> (.., V): softmax of logits / temperature,
    0 takes the likeliest. Of that, the top_k likeliest tokens; and of those the fewest that
    together reach top_p, or all if they do not. Both cuts go by the softmax itself: after top_k it
    is not normalised again before top_p."""
    V = logits.shape[-1]
    top_k = V if top_k is None else top_k
    top_p = 1.0 if top_p is None else top_p
    in_range = 0 <= temperature < math.inf and top_k >= 1 and 0 < top_p <= 1
    need(in_range, "temperature must be >= 0, top_k >= 1 or None, top_p in (0, 1] or None")

    logits = logits - logits.amax(-1, keepdim=True)  # the best is 0, so dividing is safe
    p = F.softmax(logits / max(temperature, 1e-30), dim=-1)
    if top_k >= V and top_p == 1:
        return p

    # Sort, cut, and put back in place. A token is kept if those before it have not reached
    # top_p.
    likely, token = p.sort(dim=-1, descending=True)
    before = likely.cumsum(-1) - likely
    likely = (likely * (before < top_p))[..., :top_k]
    likely = likely / likely.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, token[..., :top_k], likely)


# ---- 6. the same, cheaper ----------------------------------------------------------------
# Nothing in this section changes what is computed. It saves time or memory.


def sorted_features(model, x, groups, single=None):
    """model.features(x, groups), the same (B, L, C).

    The added code is so that the usual case, one token a group, needs no mask. Sort the tokens
    by group, each with its slot. In the example of the top of the file, a b c d with groups
    1 0 2 0, the order is 1 3 0 2; the content is start b d a in the slots 0 2 4 1, and the
    queries b? d? a? c? stand in the slots 1 3 0 2. The picture becomes

                   start   b  d  a                        start   b  d  a
    content start    #                             b?       #
            b        #     #  #                    d?       #
            d        #     #  #                    a?       #     #  #
            a        #     #  #  #                 c?       #     #  #  #

    and with one token a group both tables are exactly a GPT's causal mask. So no (B, L, L)
    table is made, and attention runs in its causal kernel. On a CPU that is no faster at 64
    tokens, and 1.2 times as fast at 1,024. The content of the last token, here c, is left out,
    as nobody reads it. single says whether every group has one token. If it is None, that is
    found out here, which makes the CPU wait for a GPU.
    """
    model.check(x, groups)
    L = x.shape[1]
    rank = ranks(groups)
    left = model.left_neighbours(x, visible=rank[:, :-1] < rank[:, 1:])

    # Sort the queries: place p of the sorted text holds position order[p].
    order = rank.argsort(dim=1, stable=True)
    rank = rank.gather(1, order)
    left = left.gather(1, order)

    # The content is one place behind: the start token, then all tokens but the last.
    tokens = F.pad(x.gather(1, order)[:, :-1], (1, 0), value=model.start_id)  # (B, L)
    slots = F.pad(order[:, :-1] + 1, (1, 0))

    if single is None:
        single = bool((rank[:, 1:] > rank[:, :-1]).all())
    if single:
        masks = CAUSAL, CAUSAL
    else:
        token_rank = F.pad(rank[:, :-1], (1, 0), value=-L - 1)
        masks = who_sees(token_rank, token_rank, rank)
    h = model.streams(tokens, slots, left, order, *masks)  # in sorted order

    back = order.argsort(dim=1)[..., None]
    return h.take_along_dim(back, dim=1)


class Cache:
    """A3.read() with a memory, for texts x (B, L) that are written group after group.

    The added code is so that a token is read once. What its content sees is settled when it is
    committed, so its keys and values never change. A group then costs one call of the network,
    for the content of the group before and the queries of what is asked. A model of 4 layers,
    128 wide writes 64 tokens 2.8 times as fast this way, on a CPU."""

    def __init__(self, model, x):
        self.model = model
        self.committed = torch.zeros_like(x, dtype=torch.bool)  # which tokens are in memory
        self.key_ranks = None  # (B, S): the rank, see ranks(), of each of the S places in memory
        self.keys_values = [None] * len(model.blocks)  # (2, B, n_head, S, head_dim) each

    def __call__(self, x, revealed_at, at):
        """As A3.read(): logits (B, m, V) at positions `at` (B, m), from all tokens of x (B, L)
        that are revealed."""
        L = x.shape[1]
        is_revealed = revealed_at < L
        new = is_revealed & ~self.committed
        self.committed |= new

        # What is new comes into memory, the token at position i in slot i + 1. Once it is
        # revealed, its rank stays. Rows with fewer new tokens are padded with places of rank L.
        # Queries see the ranks below L, and content its own, which is below L, and smaller ones.
        # So nothing that counts sees the padding.
        place, real = pack(new)  # (B, n)
        tokens = x.gather(1, place).masked_fill(~real, 0)
        slots = place + 1
        rank = ranks(revealed_at).gather(1, place).masked_fill(~real, L)
        if self.key_ranks is None:  # the first call begins with the start token
            tokens = F.pad(tokens, (1, 0), value=self.model.start_id)
            slots = F.pad(slots, (1, 0))
            rank = F.pad(rank, (1, 0), value=-L - 1)

        left = self.model.left_neighbours(x, visible=is_revealed[:, :-1]).gather(1, at)
        return self.step(tokens, slots, rank, at, left, torch.full_like(at, L))

    def step(self, tokens, slots, rank, at, left, seen):
        """Commit tokens (B, n) of these ranks (B, n) in their slots (B, n). Then return logits
        (B, m, V) at positions `at` (B, m) with left neighbours (B, m), from everything
        committed with a rank below seen (B, m)."""
        model, n = self.model, tokens.shape[1]
        old = self.key_ranks
        self.key_ranks = rank if old is None else torch.cat((old, rank), dim=1)
        mask = torch.cat(who_sees(self.key_ranks, rank, seen), dim=2)  # (B, 1, n + m, S)

        # Both streams side by side, as one long sequence: few large calls are faster than many
        # small ones. Only the first n places get keys and values.
        h = model.embed_content(tokens, slots)
        h = torch.cat((h, model.embed_queries(left, at)), dim=1)  # (B, n + m, C)
        cos, sin = model.rotary(torch.cat((slots, at), dim=1))

        for i, block in enumerate(model.blocks):
            u = block.norm1(h)
            k_v = torch.stack(block.keys_values(u[:, :n], (cos[:, :, :n], sin[:, :, :n])))
            k, v = self.remember(i, k_v)
            if block is model.blocks[-1]:  # keep the queries: nobody reads the content any more
                h, u, mask = h[:, n:], u[:, n:], mask[:, :, n:]
                cos, sin = cos[:, :, n:], sin[:, :, n:]
            h = block.attend(h, block.queries(u, (cos, sin)), k, v, mask)
        return model.logits(model.norm(h))

    def remember(self, layer, k_v):
        """Add k_v (2, B, n_head, n, head_dim) to the memory of a layer, and return all of
        it."""
        old = self.keys_values[layer]
        k_v = k_v if old is None else torch.cat((old, k_v), dim=3)
        self.keys_values[layer] = k_v
        return k_v


MAX_LOGITS = 2**26  # numbers, which are 256 MiB in float32


def nll(model, h, x):
    """-log p (N,) of tokens x (N,), for features h (N, C) of model: cross_entropy(logits(h),
    x).

    The added code is so that at most MAX_LOGITS logits exist at a time. With a large
    vocabulary they are most of the memory. More of them are made in chunks, and made again in
    the backward pass."""
    rows = max(1, MAX_LOGITS // model.config.vocab_size)
    if len(x) <= rows:
        # By default the id -100 is ignored. Here no id is, so that a wrong one is an error.
        return F.cross_entropy(model.logits(h), x, reduction="none", ignore_index=-(2**63))

    chunks = zip(h.split(rows), x.split(rows), strict=True)
    return torch.cat([checkpoint(nll, model, *chunk, use_reentrant=False) for chunk in chunks])


# ---- 7. adaptation -----------------------------------------------------------------------
# A3 begins as a trained GPT, by load_arm(), and learns other orders step by step.


def curriculum(step, total_steps, shares=(0.2, 0.3, 0.5), group_size=1):
    """Progressive adaptation: (stage, size of groups) at step 0, 1, .. of total_steps. In stage 3
    the size is the largest one. shares says how total_steps is cut into stages. Steps after the
    last are as the last.

        stage 1   one token a group, left to right. With left_neighbour=False the queries are
                  new, and learn here to predict. Otherwise a loaded GPT can do it already
        stage 2   chunks of 1, then 2, then 4, a third of the stage each: several at a time
        stage 3   random partitions: any order, in groups of group_size at the most"""
    positive = total_steps >= 1 and group_size >= 1
    need(positive, "total_steps and group_size must be at least 1")
    whole = len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
    need(whole, f"shares must be three numbers >= 0 that sum to 1, not {shares}")

    step = min(step, total_steps - 1)
    second = round(shares[0] * total_steps)  # where stage 2 begins
    third = round((shares[0] + shares[1]) * total_steps)
    if step < second:
        return 1, 1
    if step < third:
        return 2, (1, 2, 4)[3 * (step - second) // (third - second)]
    return 3, group_size
