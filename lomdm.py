"""
From GPT to a learned generation order, in one loss. After OeMDM and LoMDM, arXiv:2602.02112.

A GPT predicts the tokens of a text from left to right. A masked diffusion model (MDM) hides
some tokens and learns to fill them in, so it can write in any order. This is its whole
training step, for texts x (B, L) and a transformer without causal mask:

    turn = torch.rand(B, L).argsort(1)  # a random order: turn[i] is the turn of position i
    k = torch.randint(L, (B, 1))  # stop this order after k tokens
    hidden = turn >= k  # (B, L): what comes later is hidden
    logits = model(x.masked_fill(hidden, mask_id))  # (B, L, V): a guess at every position
    nll = F.cross_entropy(logits.transpose(1, 2), x, reduction="none")  # (B, L)
    loss = ((nll * hidden).sum(1) / hidden.sum(1)).mean()  # the hidden ones count

Why does this loss bound -log p(x)? The model writes a text by drawing an order and then
revealing the positions one after another. Let mu be the probability that it gives a token. The
probability of a text is a sum over all orders, as it may have been written in any of them:

    p(x) = sum_order  prod_k  q_hat(order_k | revealed) mu(x at order_k | revealed)         (1)

Steps count from 0, so that at step k, k tokens are revealed. q_hat is the probability with which
the model goes to position order_k next. For an MDM all hidden positions are equally likely. The
sum has L! terms, so we bound it. Take any distribution q that gives every order some probability.
It may even have seen the text. Multiply and divide each term by q,
so that the sum becomes a mean over orders that are drawn from q. The log of a mean is at least
the mean of the logs:

    p(x) = E_{order ~ q} prod_k  (q_hat mu / q)

    -log p(x) <= E_{order ~ q} sum_k [ -log mu + log q(order_k | revealed, x)               (2)
                                               - log q_hat(order_k | revealed) ]

The first part is what the tokens cost, the rest is what the order costs. The sum has L steps,
and one step k drawn at random, times L, has the same mean. For an MDM q = q_hat is uniform,
and the order costs nothing. At step k each hidden position is equally likely to be the next
one. So the mean of -log mu over all of them, times L, estimates (2). The last of the six lines
is this divided by L, as we report nats per token.

What if some orders are better than others? LoMDM gives every position a weight, and the next
position is drawn from the hidden ones in proportion to the weights. For q, a layer with a head
of its own reads the weights w off the clean text x, in training only. For q_hat, a head of the
network guesses them from what is revealed, and that guess w_hat is used to write. So the model
pays, in (2), for every order that it cannot guess. The class LoMDM then contains four models:

    ARM              block_len = 1             one position at a time, left to right: a GPT
    MDM              block_len = seq_len       any order, all equally likely (MDLM, LLaDA)
    block diffusion  1 < block_len < seq_len   blocks left to right, any order inside (BD3-LM)
    LoMDM            learn_order = True        the order is learned, and depends on the text

Everything is in nats (divide by ln 2 for bits). The sections of this file:

    1  the network                      a transformer whose attention may see both sides
    2  orders                           drawn by weights, and heads that give these
    3  the cost of one step             equation (2), for one k
    4  the model                        what it reads, its loss, its bound, how it writes
    5  tools for sampling               how sure is a guess, and how to draw a token
    6  the same, cheaper                evenly spread k, a cache, logits in chunks
    7  not the same, and faster         training more on the middle of an order
    8  the paper's clock                its bound: an integral over time, in full
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
    vocab_size: int  # [MASK] comes on top of these tokens, with the id vocab_size
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    local_heads: float = 0.5  # this share of the heads begins by looking at a neighbour
    block_len: int | None = None  # None becomes seq_len: one block. (replace() has to set both)
    learn_order: bool = False
    weights: str = "normsig"  # the paper's weights, or "exp", far steeper ones: see Order
    c1: float = 0.7  # c1 and c2 of the paper's weights, see Order
    c2: float = 0.65
    middle_steps: bool = True  # train more on the middle of an order: see section 7

    def __post_init__(self):
        if self.block_len is None:
            self.block_len = self.seq_len

        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "block_len"):
            value = getattr(self, name)
            need(value >= 1, f"{name} must be at least 1, not {value}")

        # Rotary embeddings turn pairs of channels, so every head needs an even number of them.
        C, H = self.n_embd, self.n_head
        even = f"n_embd ({C}) must be divisible by n_head ({H}), with even quotient"
        need(C % (2 * H) == 0, even)
        L, K = self.seq_len, self.block_len
        need(L % K == 0, f"seq_len ({L}) must be divisible by block_len ({K})")
        no_choice = self.learn_order and K == 1
        need(not no_choice, "learn_order at block_len 1: there is only one order")
        c1, c2 = self.c1, self.c2
        need(c1 > c2 >= 0, f"c1 ({c1}) must be above c2 ({c2}), and c2 not negative")
        kinds = ("normsig", "exp")
        need(self.weights in kinds, f"weights must be one of {kinds}, not {self.weights!r}")
        need(0 <= self.local_heads <= 1, f"local_heads must be in [0, 1], not {self.local_heads}")
        need(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")


# ---- 1. the network ----------------------------------------------------------------------
# This is a GPT with the parts of LLaMA: RMSNorm, rotary embeddings, a gated MLP. Only the
# attention mask differs between the models, and each model says in section 4 which mask it
# wants. A Block is a layer of it. A block of text, block_len tokens long, is another thing.


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


CAUSAL = "causal"  # a mask that need not be built: each place sees itself and those before it


class Block(nn.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream h."""

    def __init__(self, config, dropout):
        super().__init__()
        C = config.n_embd
        hidden = 32 * math.ceil(8 * C / 3 / 32)  # as many parameters as 4 C without a gate
        self.n_head = config.n_head
        self.dropout = dropout
        self.norm1 = nn.RMSNorm(C, eps=1e-5)
        self.qkv = nn.Linear(C, 3 * C, bias=config.local_heads > 0)  # see look_at()
        self.proj = nn.Linear(C, C, bias=False)
        self.norm2 = nn.RMSNorm(C, eps=1e-5)
        self.gate_up = nn.Linear(C, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, C, bias=False)

    def forward(self, h, rotary, mask, rows=None):
        """h (B, T, C) -> (B, T, C). rotary comes from rotary_tables(). The mask tells who sees
        whom: None if all see all, CAUSAL, or a table (T, T) in which a row sees a column if
        True. Given `rows` (and a table), only so many places are computed, the first ones:
        (B, rows, C). They still see the others."""
        q, k, v = self.project(h, rotary)
        if rows is not None:
            return self.attend(h[:, :rows], q[:, :, :rows], k, v, mask[:rows])
        return self.attend(h, q, k, v, mask)

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

    def project(self, h, rotary):
        """Queries, keys and values of h (B, T, C): (B, n_head, T, head_dim) each."""
        B, T, C = h.shape
        qkv = self.qkv(self.norm1(h))  # (B, T, 3 C)
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], *rotary)  # both at once
        return q, k, qkv[2]

    def attend(self, h, q, k, v, mask):
        """The rest of the block, for places h (B, T, C) with queries q, given keys and
        values."""
        drop = self.dropout if self.training else 0.0

        # y (B, n_head, T, head_dim): what each head found
        if mask is CAUSAL:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, attn_mask=mask)
        h = h + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), drop)

        gate, up = self.gate_up(self.norm2(h)).chunk(2, dim=-1)  # (B, T, hidden) each
        return h + F.dropout(self.down(F.silu(gate) * up), drop)


# ---- 2. orders ---------------------------------------------------------------------------
# How do weights make an order? Position i draws the time Exponential(1) / w_i at which it
# arrives, and the positions are sorted by their times. The smallest of such times is that of i
# with probability w_i / (sum of the weights), and after each arrival the same holds for the
# rest. This is called a Plackett-Luce ranking. An order lists the positions, first to last.
# Its argsort gives the rank of each position:
#
#     w                0.5   4.0   1.0      of positions 0, 1, 2
#     arrival times    3.1   0.2   0.9
#     order            1     2     0        position 1 comes first
#     order.argsort()  2     0     1        position 0 has rank 2


def race(w, generator=None):
    """Draw an order by weights w (.., K) >= 0: the positions in order of arrival, (.., K).
    Those of weight 0 come last."""
    arrival = torch.empty_like(w).exponential_(generator=generator) / w
    return arrival.argsort(dim=-1)


def prefix_log_prob(w, order, k):
    """log of the probability (..) that a race by weights w (.., K) > 0 begins as the first k (..)
    places of order (.., K) do: the sum over j < k of log(w of order_j / sum of the weights of
    order_j, order_{j+1}, .., order_{K-1})."""
    w = w.gather(-1, order)  # in order of arrival
    remaining = w.flip(-1).cumsum(-1).flip(-1)  # the weight of each and of all that come later
    in_prefix = torch.arange(w.shape[-1], device=w.device) < k[..., None]
    return torch.where(in_prefix, w / remaining, 1.0).log().sum(-1)


class Order(nn.Module):
    """A head that reads weights off features h (B, T, C): a linear map to a number v_i at each
    position, and one of two ways to make a positive weight of it. The means are over the
    positions j of i's block.

        normsig   w_i = c1 + c2 (sigmoid(v_i) - mean_j sigmoid(v_j))       the paper's
        exp       w_i = exp(u_i - mean_j u_j)  with  u = 8 tanh(v / 8)     far steeper

    With normsig and the default c1 and c2, the largest weight is at most c1 / (c1 - c2) = 14
    times the smallest, with exp e^16 times. Subtracting the mean makes the mean of the weights c1,
    or with exp their geometric mean 1. (With exp this divides all weights of a block by one number,
    so no order gets more or less likely.)

    The linear map starts at zero. Then all weights are equal, and the model is exactly an MDM. With
    normsig and c2 = 0 it stays one, and only c2 / c1 matters, as weights that are all doubled give
    the same orders.

    What comes out of the map is divided by 32, so that a step of Adam moves v 32 times less. Adam
    ignores how large a gradient is. Where no order is better than others, the gradient of an order
    is all noise, and the order would wander off. Divided by 8 it did so on Shakespeare, and cost
    0.026 nats per token more."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    def forward(self, h):
        """Features h (B, T, C), in whole blocks -> weights (B, T)."""
        v = self.score(self.norm(h)).squeeze(-1) / 32  # (B, T)
        v = v.to(torch.promote_types(v.dtype, torch.float32))

        B, T = v.shape
        v = v.view(B, -1, min(T, self.config.block_len))  # (B, n, K): n blocks of K positions
        return self.squash(v).flatten(1)  # (B, T)

    def squash(self, v):
        """Numbers v (B, n, K) -> positive weights (B, n, K)."""
        if self.config.weights == "exp":
            u = 8 * torch.tanh(v / 8)
            return (u - u.mean(-1, keepdim=True)).exp()

        s = torch.sigmoid(v)
        return self.config.c1 + self.config.c2 * (s - s.mean(-1, keepdim=True))


class Uniform(nn.Module):
    """It stands in the place of an Order where none is learned: all weights are 1."""

    def forward(self, h):
        float32 = torch.promote_types(h.dtype, torch.float32)
        return h.new_ones(h.shape[:2], dtype=float32)


# ---- 3. the cost of one step -------------------------------------------------------------


def jump_terms(nll, w, w_hat, hidden):
    """Step k of (2), times K, for a block of K positions: its mean over a uniform k is all of (2).
    (A step from one position to the next is called a jump, hence the name.) At this step the
    positions `hidden` are left, and W and W_hat are the sums of their weights. The next position
    is i with probability w_i / W. It is not drawn: the expected cost of the step is

        sum over hidden i of  (w_i / W) [ nll_i + log(w_i / W) - log(w_hat_i / W_hat) ]

    All arguments are (.., K): nll is -log mu of the true tokens, hidden is bool with at least
    one True. Returns three tensors (..) in nats:
        recon    what the token costs
        order    what the order costs, a KL divergence: at least 0, and 0 if w_hat is w
        timing   what the paper's bound has on top, at least 0. Training leaves it out: section 8"""
    K = nll.shape[-1]
    W = (w * hidden).sum(-1, keepdim=True)
    W_hat = (w_hat * hidden).sum(-1, keepdim=True)

    # Who is next? At visible positions p is set to 1, so that its logarithm is 0.
    p = torch.where(hidden, w / W, 1.0)
    p_hat = torch.where(hidden, w_hat / W_hat, 1.0)

    recon = (p * nll * hidden).sum(-1)
    order = (p * (p.log() - p_hat.log())).sum(-1)
    timing = (W_hat / W - 1 - (W_hat / W).log()).squeeze(-1)
    return K * recon, K * order, K * timing


def reinforce(cost, log_q, m):
    """The second half of equation (3), which LoMDM.loss() explains, for m texts in two orders:

        (cost_1 - cost_2) (log q_1 - log q_2) / 2        with costs as plain numbers

    Its gradient counts, and its value means nothing. The first m rows of cost and log_q (R, ..)
    are one draw of these texts, and the last m rows are another. Returns (m, ..)."""
    difference = (cost[:m] - cost[-m:]).detach()
    return difference * (log_q[:m] - log_q[-m:]) / 2


# ---- 4. the model ------------------------------------------------------------------------


class LoMDM(nn.Module):
    """The network and its bound. One class is ARM, MDM, block diffusion and LoMDM: see Config. If
    dropout is not 0, call eval() before nelbo() and sample().

    Texts x are (B, L), L <= seq_len. L is a multiple of block_len, or less than one block. A text
    z is one in which some tokens are replaced by mask_id. K = min(L, block_len) is the length of a
    block and n = L / K their number."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mask_id = config.vocab_size
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size + 1, C)  # the last row is [MASK]

        # Rotary embeddings decide who looks at whom, not what is found. If all tokens are [MASK],
        # all positions find the same, and no order could prefer a place to start. Hence wpe.
        self.wpe = nn.Embedding(config.seq_len, C)
        self.blocks = nn.ModuleList(Block(config, config.dropout) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(C, eps=1e-5)

        # [MASK] is never predicted. The rows are filled up to a multiple of 64, which GPUs
        # like, and logits() cuts off what is too much.
        self.lm_head = nn.Linear(C, 64 * math.ceil(config.vocab_size / 64), bias=False)

        # The paper's names are g for x -> w and g_hat for z -> w_hat. There both read features of
        # the network, and send no gradient into it. Here w_hat is read off the features that
        # predict the tokens, and shapes them, which is better (experiments/TRIED.md). And w comes
        # from one block of its own on the embeddings, so that the clean text need not go through
        # the network. That block has no dropout, as noise in w costs nats.
        self.g_hat = Order(config) if config.learn_order else Uniform()
        self.g = Order(config) if config.learn_order else Uniform()
        self.g_block = Block(config, dropout=0.0) if config.learn_order else None

        # As in GPT-2, the residual branches begin smaller, so that their sum keeps its scale.
        for name, p in self.named_parameters():
            if name.endswith("score.weight"):  # of Order
                nn.init.zeros_(p)
            elif name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

        # An ARM's place i holds token i - 1, so that neighbour is at distance 0. In other models
        # it holds token i, and sees both sides.
        n = round(config.local_heads * config.n_head)
        if config.block_len == 1:
            distances = [-i for i in range(n)]  # 0, -1, -2, ..
        else:  # -1, 1, -2, 2, ..
            distances = [i // 2 + 1 if i % 2 else -(i // 2) - 1 for i in range(n)]
        for module in self.modules():
            if isinstance(module, Block):
                module.look_at(distances)

    def check(self, x):
        L = x.shape[-1] if x.ndim else 0
        K, most = self.config.block_len, self.config.seq_len
        whole = x.ndim == 2 and x.numel() > 0 and L <= most and L % min(K, L) == 0
        limit = f"L <= seq_len = {most} in whole blocks of {K}"
        need(whole, f"texts must be (B, L), B >= 1, {limit}, not {tuple(x.shape)}")

    # What does the network read, to predict the hidden tokens of z? The three functions below
    # answer for the three kinds of models: tokens (B, T), their positions (T,), and the mask.
    # The predictions come out at the first L of the T places. In training z is the text with
    # hidden tokens, and x the clean text, as each block looks back at clean blocks. While text
    # is written there is only z: all its blocks before the current one are finished. Then x is
    # None.

    def arm_inputs(self, z, x):
        """Left to right: each place reads the token before its own, and all before that.
        [MASK] serves as start token. T = L. In training all of z is hidden, as k is 0 in
        every block of one, so the clean x is read."""
        text = z if x is None else x
        shifted = F.pad(text[:, :-1], (1, 0), value=self.mask_id)
        return shifted, torch.arange(z.shape[1], device=z.device), CAUSAL

    def mdm_inputs(self, z):
        """One block: all see all. T = L."""
        return z, torch.arange(z.shape[1], device=z.device), None

    def block_inputs(self, z, x):
        """Several blocks: each sees itself and the blocks before it. While a text is written,
        these are finished, and T = L. To train all blocks at once, each is there twice, noisy
        to be predicted and clean to be looked back at, T = 2 L. A row sees a column where
        there is a #:

              z0 z1 z2 x0 x1 x2
          z0  #                     a noisy block sees itself
          z1     #     #            and the clean blocks before it
          z2        #  #  #
          x0           #            a clean block sees itself
          x1           #  #         and the clean blocks before it
          x2           #  #  #"""
        L = z.shape[1]
        pos = torch.arange(L, device=z.device)
        b = pos // self.config.block_len  # the block of each position
        if x is None:
            return z, pos, b[:, None] >= b

        itself = b[:, None] == b  # (L, L) each
        earlier = b[:, None] > b
        noisy_rows = torch.cat((itself, earlier), dim=1)
        clean_rows = torch.cat((torch.zeros_like(itself), earlier | itself), dim=1)
        return torch.cat((z, x), 1), pos.repeat(2), torch.cat((noisy_rows, clean_rows))

    def inputs(self, z, x=None):
        """tokens (B, T), positions (T,) and mask, by the kind of the model."""
        self.check(z)
        if self.config.block_len == 1:
            return self.arm_inputs(z, x)
        if self.config.block_len >= z.shape[1]:
            return self.mdm_inputs(z)
        return self.block_inputs(z, x)

    def features(self, z, x=None):
        """The network on inputs(z, x): its features h (B, L, C) of the text z."""
        tokens, pos, mask = self.inputs(z, x)
        rotary = self.rotary(pos)
        h = F.dropout(self.embed(tokens, pos), self.config.dropout, self.training)

        for block in self.blocks[:-1]:
            h = block(h, rotary, mask)

        # Nobody reads the clean copy after the last layer, so it is not computed there.
        L = z.shape[1]
        h = self.blocks[-1](h, rotary, mask, rows=L if len(pos) > L else None)
        return self.norm(h)

    def embed(self, tokens, pos):
        """What the first block reads, (B, T, C), of tokens (B, T) at positions pos (T,)."""
        return self.wte(tokens) + self.wpe(pos)

    def rotary(self, pos):
        """cos and sin (T, head_dim) for positions pos (T,)."""
        return rotary_tables(pos, self.config.n_embd // self.config.n_head)

    def logits(self, h):
        """(.., C) -> (.., V), in float32 at least, as softmax and sums follow."""
        logits = self.lm_head(h)[..., : self.config.vocab_size]
        return logits.to(torch.promote_types(self.wte.weight.dtype, torch.float32))

    def log_probs(self, z):
        """log mu (B, L, V): the guess of every token of z (B, L), from its own block and those
        before it. It is meant for hidden positions. An ARM's guess reads the tokens before."""
        return F.log_softmax(self.logits(self.features(z)), dim=-1)

    def order_weights(self, x):
        """w(x) (B, L): the weights of q. That of a position comes from the clean x up to the end
        of its block. detach() keeps the gradient of the order, which is noisy, from shaping the
        embeddings."""
        tokens, pos, mask = self.inputs(x)
        h = self.embed(tokens, pos).detach()
        if self.config.learn_order:
            h = self.g_block(h, self.rotary(pos), mask)
        return self.g(h)

    def order_weights_hat(self, z):
        """w_hat(z) (B, L): the weights of q_hat, which sees what is revealed. They are meant for
        hidden positions of a block that comes after finished ones."""
        return self.g_hat(self.features(z))

    def predict_masked(self, x, hidden):
        """Hide the positions hidden (B, n, K) of x (B, L), and look at all blocks in one pass.
        Returns -log mu of the true tokens, 0 where visible, and w_hat: (B, n, K) each."""
        z = x.masked_fill(hidden.view_as(x), self.mask_id)
        h = self.features(z, x)  # (B, L, C)

        # nll() of section 6 is cross entropy.
        token_nll = nll(self, h.flatten(0, 1), x.flatten())  # (B L,)
        w_hat = self.g_hat(h)  # (B, L)
        return token_nll.view_as(hidden) * hidden, w_hat.view_as(hidden)

    def loss(self, x):
        """What training minimises, for x (B, L): a loss for backward(), and a dict of detached
        metrics. Report metrics["nelbo"] (negative evidence lower bound), which estimates the bound
        (2) in nats per token. With a learned order the first third of the texts counts twice, so
        it is unbiased if texts come in random order. To measure given texts, take nelbo().

        Without a learned order, this is the six lines at the top of the file, up to how k is
        drawn (sections 6 and 7). With a learned order, autograd cannot see how w changes which
        order is drawn. REINFORCE can: to the gradient of the cost it adds cost * (grad log q).
        That is noisy. But E grad log q is 0, as the probabilities of all orders always sum to 1.
        So the mean stays as it is if the cost is lessened by a number that the drawn order has no
        influence on. The cost of a second order of the same text, at the same k, is such a number.
        So order 1 gives (cost_1 - cost_2) grad log q_1, order 2 gives (cost_2 - cost_1) grad log
        q_2, and we take the mean of both:

            gradient of E cost  =  E[ grad (cost_1 + cost_2) / 2                          (3)
                                      + (cost_1 - cost_2) grad (log q_1 - log q_2) / 2 ]

        This is RLOO, leave-one-out REINFORCE, with two draws. Here log q is that of the first k
        places. What comes next needs no draw, as jump_terms() averages over it. With several
        blocks, each has its own order, k, cost and equation (3): a block sees the others clean or
        not at all, so their orders do not matter to its cost."""
        self.check(x)
        B, L = x.shape
        K = min(L, self.config.block_len)
        n = L // K

        # How many positions of each block are revealed? k is uniform on {0 .. K-1}: think of
        # torch.randint(K, (B, n)). Section 6 says what it does better, and section 7 why some
        # may come more often: count k comes `often[k]` times as often.
        k = stratified_counts(B, n, K, device=x.device)  # (B, n)
        often = torch.ones(K, device=x.device)
        if self.config.middle_steps:
            k, often = middle_counts(k, K)

        # With a learned order, (3) wants each text in two rows, r and B + r. For a first reading
        # take m = B and w = self.order_weights(x). In fact only the first m = B / 3 texts have a
        # second row, and only they train w: see section 6.
        m = how_many_twice(B) if self.config.learn_order else 0

        # Neighbouring rows have neighbouring counts. Mix them, so that the first m rows have small
        # and large ones.
        k = torch.cat((k[::3], k[1::3], k[2::3]))
        w = weights_to_train(self, x, m)  # (B, L)
        x, w, k = (torch.cat((each, each[:m])) for each in (x, w, k))  # R = B + m rows each

        # Draw an order for each row, and hide what comes after its first k places.
        w = w.view(-1, n, K)  # (R, n, K)
        order = race(w)
        hidden = order.argsort(-1) >= k[..., None]  # (R, n, K)

        # Guess the hidden tokens, and the weights, in one pass of the network.
        token_nll, w_hat = self.predict_masked(x, hidden)

        # The cost of step k. Its mean over k is the bound, or with middle_steps, where k comes more
        # often from the middle, one in which the middle counts more.
        recon, order_cost, _ = jump_terms(token_nll, w, w_hat, hidden)  # (R, n) each
        cost = recon + order_cost
        per_token = 1 / x.numel()  # the mean over all rows
        loss = cost.sum() * per_token

        if m:
            log_q = prefix_log_prob(w, order, k)  # (R, n)
            loss = loss + reinforce(cost, log_q, m).sum() * 2 * per_token  # a pair is two rows

        in_bound = per_token / often[k]  # (R, n): undo that some k come more often
        metrics = {
            "nelbo": (cost * in_bound).sum(),
            "recon": (recon * in_bound).sum(),
            "order": (order_cost * in_bound).sum(),
            "w_spread": w[:B].std(correction=0) / w[:B].mean(),  # 0: all equal
        }
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, bound="jump", generator=None):
        """An unbiased estimate (B,) of a bound on -log p(x), in nats per text: the mean of
        n_draws random steps. bound is "jump", equation (2), or "paper", section 8, which is
        never smaller. For an ARM both are -log p(x) itself, and there is nothing random."""
        need(bound in ("jump", "paper"), f"bound must be 'jump' or 'paper', not {bound!r}")
        need(n_draws >= 1, f"n_draws must be at least 1, not {n_draws}")
        self.check(x)
        B, L = x.shape
        K = min(L, self.config.block_len)
        w = self.order_weights(x).view(B, L // K, K)

        total = 0
        for _ in range(n_draws):
            k = stratified_counts(B, L // K, K, generator, x.device)
            hidden = race(w, generator).argsort(-1) >= k[..., None]
            token_nll, w_hat = self.predict_masked(x, hidden)
            recon, order_cost, timing = jump_terms(token_nll, w, w_hat, hidden)
            total = total + recon + order_cost + (timing if bound == "paper" else 0)
        return total.sum(-1) / n_draws

    @torch.no_grad()
    def sample(
        self, z, temperature=1.0, top_k=None, per_step=1, by="order",
        top_p=None, generator=None, cache=True,
    ):  # fmt: skip
        """Fill the mask_id positions of z (B, L): everything, what follows a prompt, or gaps.

        Every call of the network chooses per_step hidden positions of the first unfinished
        block, and draws their tokens from mu, blind to each other. Which positions? By the
        "order" of a race with weights w_hat, from "left" to right, at "random", or those where
        the model is surest, by "confidence", "entropy" or "margin": see certainty().
        temperature, top_k, top_p: see probabilities(). cache: see CachedReader, which changes
        nothing but the time.

        Is a sample a draw from p? It is if by is "order", per_step 1, nothing is changed by
        temperature, top_k or top_p, and what is given, if anything, is whole blocks at the front.
        If other tokens are given, it is a draw from something near p(rest | given): the model
        starts midway in an order, and its own order might not have begun with the given tokens.
        Tokens that are given in later blocks are not seen.

        Returns the texts x (B, L) and revealed_at (B, L): the number of the call that filled a
        position, and -1 if it was given."""
        self.check(z)
        need(per_step >= 1, f"per_step must be at least 1, not {per_step}")
        L = z.shape[1]
        K = min(L, self.config.block_len)
        if by == "order" and not self.config.learn_order:
            by = "random"  # all weights are equal
        read = CachedReader(self, z) if cache and K < L else self.read
        x, revealed_at = z.clone(), torch.full_like(z, -1)
        call = 0

        for end in range(K, L + 1, K):
            here = slice(end - K, end)  # the current block
            while (hidden := x[:, here] == self.mask_id).any():  # (B, K)
                # Where? At the hidden positions that win the race, or have the largest score.
                h = read(x[:, :end])  # (B, K, C)
                score = self.score(h, by)  # (B, K)
                if by in ("order", "random"):  # a race, by the largest 1 / arrival
                    score = score / torch.empty_like(score).exponential_(generator=generator)
                score = score.masked_fill(~hidden, -torch.inf)
                best = score.argsort(dim=1, descending=True, stable=True)
                pick = best[:, :per_step]  # (B, m), m <= per_step

                # What? Tokens from the network's guess at these positions.
                logits = self.logits(h.take_along_dim(pick[..., None], dim=1))  # (B, m, V)
                p = probabilities(logits, temperature, top_k, top_p).flatten(0, 1)
                token = torch.multinomial(p, 1, generator=generator).view_as(pick)

                # Write. Where a text has fewer than m hidden positions, pick holds visible
                # ones, too, and these stay as they are.
                new = hidden.gather(1, pick)
                here_x, here_at = x[:, here], revealed_at[:, here]  # views: this writes into x
                here_x.scatter_(1, pick, torch.where(new, token, here_x.gather(1, pick)))
                here_at.scatter_(1, pick, torch.where(new, call, here_at.gather(1, pick)))
                call += 1
        return x, revealed_at

    def read(self, x):
        """Features h (B, K, C) of the last block of x (B, end)."""
        K = min(x.shape[1], self.config.block_len)
        return self.features(x)[:, -K:]

    def score(self, h, by):
        """A score (B, K) for each position of a block, by rule: the largest come next. For
        "order" and "random" it is the weight in a race. h: see read()."""
        if by == "order":
            return self.g_hat(h)
        if by == "random":
            return torch.ones(h.shape[:2], device=h.device)
        if by == "left":
            return -torch.arange(float(h.shape[1]), device=h.device).expand(h.shape[:2])
        return certainty(self.logits(h), by)


# ---- 5. tools for sampling ---------------------------------------------------------------


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
# Nothing in this section changes the mean of what is computed. It saves noise, time or memory.


def how_many_twice(B):
    """How many of B texts are drawn in two orders, for equation (3): one in three.

    The added code is so that a step reads more texts. Two orders of one text teach the network
    less than two texts do, and the order needs pairs. An MDM with 16 texts a step has 16 rows, and
    so has a LoMDM with 8 texts in two orders, or with 12 of which 4 are. Where all orders stay
    equally likely (c2 = 0), 8 texts in two orders are 0.016 nats per token behind the MDM after as
    many steps, and 12 texts of which 4 are twice 0.010.

    The loss is a mean over rows, so these texts count double. Texts come in random order, so that
    favours none."""
    return math.ceil(B / 3)


def weights_to_train(model, x, m):
    """LoMDM.order_weights(x), with a gradient for the first m texts only, which are drawn twice.

    The added code is so that the others need no backward pass for w. With it a step takes 1.11
    times as long as an MDM's, and if all texts gave a gradient 1.17 times.

    This is the one exception to the heading of this section. Of R = B + m rows 2 m carry a gradient
    of w, and both parts of (3) are divided by R. So the gradient of w has the direction of (3), and
    is 2 m / R times as long. Adam ignores that."""
    if m in (0, len(x)):
        return model.order_weights(x)
    return torch.cat((model.order_weights(x[:m]), model.order_weights(x[m:]).detach()))


def stratified_counts(B, n, K, generator=None, device=None):
    """How many positions of each block are revealed: k (B, n), each uniform on {0 .. K-1}.

    The added code is so that the k of a batch are spread evenly over {0 .. K-1}. With randint,
    a batch of mostly hidden texts is hard by accident, and one of mostly revealed texts is
    easy. That noise has nothing to do with the model. Without it the loss of a batch of 16
    texts, for a small trained MDM, scatters by 0.10 nats per token in place of 0.16.

    How? Put the N = B n blocks on a circle, evenly spaced, and turn it by a random amount,
    turn / K of their spacing. A block that stands at the fraction s of the circle reveals s K
    positions, rounded down. The blocks of one text stand far apart, so that each text has easy
    and hard ones. With B = 4, n = 1 and K = 4 the fractions are 0, 1/4, 1/2, 3/4 plus the turn,
    and k is 0, 1, 2, 3 in some rotation."""
    N = B * n
    row = torch.arange(B, device=device)[:, None]
    block = torch.arange(n, device=device)

    # The place of each block on the circle, (B, n): each of 0 .. N-1 once. Column j holds the
    # places j, j + n, j + 2 n, .., and begins with them in another row, so that the places in
    # a row are far apart. For B = 4 and n = 2 the rows are  0 5,  2 7,  4 1,  6 3.
    number = (row + block * B // n) % B * n + block
    turn = torch.randint(N * K, (1,), generator=generator, device=device)
    return (number * K + turn) % (N * K) // N  # the fraction (number + turn / K) / N, times K


class CachedReader:
    """LoMDM.read() with a memory, for texts z (B, L) that are written block after block.

    The added code is so that a finished block is read once and not in every call. Its keys and
    values never change, as it sees nothing that comes later. An ARM of 6 layers, 384 wide,
    writes 256 tokens 6 to 14 times as fast this way, on two kinds of CPU. A model of one block
    has nothing to keep."""

    def __init__(self, model, z):
        self.model = model
        self.begin = 0  # positions before this one are finished, and in memory
        config = model.config
        head_dim = config.n_embd // config.n_head
        room = (config.n_layer, 2, len(z), config.n_head, z.shape[1], head_dim)
        self.keys_values = model.wte.weight.new_empty(room)

    def __call__(self, x):
        """As LoMDM.read(): h (B, K, C) of the last block of x (B, end)."""
        model, begin, end = self.model, self.begin, x.shape[1]
        K = min(end, model.config.block_len)

        # Read only what was not finished when this was last called. Inside of a block that is the
        # block itself, which sees everything. When a new one begins it is two, and after a prompt
        # more. These must not see what comes later.
        tokens, pos, _ = model.inputs(x)
        b = pos // K
        mask = b[begin:, None] >= b if end - begin > K else None
        tokens, pos = tokens[:, begin:], pos[begin:]

        # This is LoMDM.features(), with keys and values from memory.
        rotary = model.rotary(pos)
        h = model.embed(tokens, pos)
        for i, block in enumerate(model.blocks):
            h = self.run(i, block, h, rotary, mask)
        h = model.norm(h)

        # An ARM reads the token before each position, so it has read finished tokens only.
        # Other models have just read their last block with hidden tokens, so its keys and values
        # will change.
        self.begin = end if K == 1 else end - K
        return h[:, -K:]

    def run(self, layer, block, h, rotary, mask):
        """One block of the network on the places h (B, T, C) behind those in memory."""
        q, k, v = block.project(h, rotary)
        end = self.begin + h.shape[1]
        memory = self.keys_values[layer]  # (2, B, n_head, L, head_dim)
        memory[0, :, :, self.begin : end] = k
        memory[1, :, :, self.begin : end] = v
        return block.attend(h, q, memory[0, :, :, :end], memory[1, :, :, :end], mask)


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


# ---- 7. not the same, and faster ---------------------------------------------------------
# The bound counts all steps k of an order alike. Are all of them worth as much in training? At
# the first steps nearly nothing is visible, and there is little to learn but how frequent
# tokens are. At the last ones few tokens are hidden, and a step that teaches from few tokens is
# noisy. So training may weigh the middle more. The best guess for a given set of visible tokens
# does not depend on how often it is asked for. But a network that is too small to be right
# everywhere is then better in the middle, and the order that it learns is the best for the middle.


def middle_counts(k, K):
    """Counts k (..) that are uniform on {0 .. K-1} -> counts (..) of which those in the middle
    come more often, and `often` (K,): how probable each count then is, times K.

    The added code is so that an MDM learns in two thirds of the steps. k / K gets a triangular
    density: 0 at 0, 2 at 1/2, 0 at 1, straight lines between. Its integral from 0 to s is
    2 s^2, and beyond the middle 1 - 2 (1 - s)^2. Setting the integral to a uniform number u and
    solving for s draws from it. For K = 4 the counts come 1/2, 3/2, 3/2 and
    1/2 times as often."""
    u = (k + torch.rand(k.shape, device=k.device)) / K  # uniform on [0, 1]
    s = torch.where(u < 0.5, (u / 2).sqrt(), 1 - ((1 - u) / 2).sqrt())

    edge = torch.arange(K + 1, device=k.device) / K  # count j lies between edges j and j + 1
    integral = torch.where(edge < 0.5, 2 * edge**2, 1 - 2 * (1 - edge) ** 2)
    return (s * K).long().clamp(max=K - 1), K * integral.diff()


# ---- 8. the paper's clock ----------------------------------------------------------------
# The paper reaches this objective, and one part more, on another road: with a clock. Its OeMDM is
# the frame below, for any rates A and A_hat. LoMDM is the case in which they are learned. Nothing
# above needs it, and the tests tie the two together:
# test_paper_bound_is_the_integral_over_time and
# test_time_form_has_the_papers_bound_as_its_mean.
#
# At time t = 0 the whole text is visible, at t = 1 all of it is hidden. Position i is still
# visible at time t with probability alpha^i(t), each on its own. Seen backwards in time, from
# noise to text, a position that is still hidden is revealed at the rate
#
#     A^i = -(d alpha^i / dt) / (1 - alpha^i)                                               (4)
#
# that is, with probability A^i dt in a short time dt. (The i of alpha^i and A^i is an
# index, as in the paper, and not a power.)
#
# LoMDM takes alpha^i = 1 - t^{w_i}, so its rate A^i is w_i / t. All hidden positions share the
# factor 1 / t, so the next one is i with probability w_i / W. That is the race of section 2,
# with -log t for its time, which grows while t falls: i is hidden with probability t^{w_i},
# and just so likely is Exponential(1) / w_i > -log t, that is, i has not arrived.
#
# The model reveals at a rate of its own, A_hat^i = w_hat_i / t. So in each dt, backwards in
# time, one coin says whether the noise reveals i, with probability A dt, and another whether
# the model does, with A_hat dt. Heads add A dt log(A / A_hat) to the KL divergence of the two
# coins, tails (1 - A dt) log((1 - A dt) / (1 - A_hat dt)), which is (A_hat - A) dt to first
# order. Added up over time,
#
#     -log p(x)  <=  int_0^1 E_z sum_{i hidden} [ A^i (-log mu^i(x_i))             token    (5)
#                            + A^i log(A^i / A_hat^i) - A^i + A_hat^i ] dt         order
#
# Part of the order's cost compares *when* something is revealed. With W and W_hat the sums
# over the hidden positions it is D / t with D = W log(W / W_hat) - W + W_hat, at least 0. When
# a token came does not change the text, only the order in which tokens came does. So a bound
# need not pay for times, and that part can go. What is left is (2), never larger. In
# jump_terms() that part is `timing`, D / W, for in dt there is a step with probability
# (W / t) dt:
#
#     int D / t dt  =  int (D / W) (W / t) dt  =  E [ sum over the steps of D / W ]
#
# Why not train on (5), at a random time? It has the weight w / t, which is large where t is
# small. Something is hidden there with probability about t^w, so the mean square is like the
# integral of t^w / t^2, which is infinite if w <= 1. In (2), where a step is drawn and not
# a time, no position weighs more than K.


def schedule(tau, w=1.0, speed=1):
    """LoMDM's alpha, and its rate A by equation (4), on a clock tau in [0, 1], which for one block
    is the time t itself:

        alpha^i = 1 - tau^{w_i}      A^i = speed w_i / tau      speed = d tau / dt

    tau is (B, 1) or (B, L), w a number or (B, L). Returns alpha and A, of their common shape.
    A is 0 where the clock stands still, as nothing is about to be revealed there, and at the two
    ends, 0 and 1, which a random time never hits."""
    running = (tau > 0) & (tau < 1)
    velocity = torch.where(running, speed * w / torch.where(running, tau, 1.0), 0.0)
    return 1 - tau**w, velocity


def block_clocks(t, L, K):
    """While t (B, 1) falls from 1 to 0, the n = L / K blocks take turns, block 0 first. Each
    has a clock that runs n times as fast: tau_b(t) = clamp(n t - (n - 1 - b), 0, 1). With two
    blocks and t = 0.75, block 0 stands at 0.5 and block 1 still at 1. Returns (B, L)."""
    n = L // K
    b = torch.arange(L, device=t.device) // K
    return (n * t - (n - 1 - b)).clamp(0, 1)


def nelbo_rate(log_probs, x, hidden, velocity, velocity_hat):
    """The integrand of (5) for one noisy text z. log_probs (B, L, V) are log mu at z. All else
    is (B, L): the clean tokens x, what z hides, the rates A of the noise and A_hat of the
    model. Returns recon and order (B,), in nats per unit of time. order is at least 0."""
    token_nll = -log_probs.gather(-1, x[..., None]).squeeze(-1)  # (B, L)
    A, A_hat = velocity, velocity_hat
    order = torch.xlogy(A, A) - torch.xlogy(A, A_hat) - A + A_hat  # xlogy: 0 log 0 is 0
    return (A * token_nll * hidden).sum(-1), (order * hidden).sum(-1)


def nelbo_terms_at(model, x, t, w, generator=None):
    """(5) for texts x (B, L) at times t (B, 1), with weights w (B, L) and one z each. model:
    any LoMDM. Returns recon and order (B,), and log q(z | x) (B,)."""
    L = x.shape[1]
    K = min(L, model.config.block_len)
    tau = block_clocks(t, L, K)  # (B, L)
    alpha, velocity = schedule(tau, w, speed=L // K)
    alpha, velocity = alpha.expand(x.shape), velocity.expand(x.shape)
    hidden = torch.rand(x.shape, generator=generator, device=x.device) >= alpha

    # One block at a time is noisy, and those before it are clean: no clean copy is needed.
    h = model.features(x.masked_fill(hidden, model.mask_id))
    _, velocity_hat = schedule(tau, model.g_hat(h), speed=L // K)
    log_mu = F.log_softmax(model.logits(h), dim=-1)  # (B, L, V)
    recon, order = nelbo_rate(log_mu, x, hidden, velocity, velocity_hat)

    # Each position is hidden on its own. where() differentiates also the side that it does not
    # take, so clamp() keeps that logarithm finite.
    visible = alpha.clamp(1e-6, 1 - 1e-6)
    log_q = torch.where(hidden, (1 - visible).log(), visible.log()).sum(-1)
    return recon, order, log_q


def nelbo_at(model, x, t, generator=None):
    """The integrand of (5) for texts x (B, L) at times t (B, 1), one noisy text each: recon
    and order (B,). The mean over uniform t is the paper's bound. model: any LoMDM."""
    recon, order, _ = nelbo_terms_at(model, x, t, model.order_weights(x), generator)
    return recon, order


class ByTime(LoMDM):
    """LoMDM, trained on the paper's bound: (5) at one random time for each text. It has the mean of
    LoMDM.loss() without middle_steps, plus the cost of guessing the times, and is noisier.
    Checkpoints of LoMDM and ByTime fit each other."""

    def loss(self, x, t=None):
        """As LoMDM.loss(), at times t (B, 1). By default these are spread evenly over the
        batch. Equation (3) compares two noisy texts of the same time."""
        self.check(x)
        B, L = x.shape
        draws = 2 if self.config.learn_order else 1
        if t is None:
            offset = torch.rand(1, 1, device=x.device)
            t = (torch.arange(B, device=x.device)[:, None] + offset) / B  # (B, 1)

        text_weights = self.order_weights(x)  # (B, L)
        repeated = (each.repeat(draws, 1) for each in (x, t, text_weights))
        recon, order, log_q = nelbo_terms_at(self, *repeated)  # (draws B,) each

        per_token = 1 / (draws * B * L)
        cost = recon + order
        loss = nelbo = cost.sum() * per_token
        if self.config.learn_order:
            loss = nelbo + reinforce(cost, log_q, B).sum() * 2 * per_token

        metrics = {
            "nelbo": nelbo,
            "recon": recon.sum() * per_token,
            "order": order.sum() * per_token,
            "w_spread": text_weights.std(correction=0) / text_weights.mean(),
        }
        return loss, {name: value.detach() for name, value in metrics.items()}
