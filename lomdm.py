"""
One objective from autoregression to a learned generation order, in one file.

A masked diffusion model hides tokens and learns to fill them in. Give every position its own noise
schedule (OeMDM, arXiv:2602.02112) and the same loss trains, by its arguments alone,

    ARM              block_len = 1              left to right, the GPT you know
    MDM              block_len = seq_len        any order, all equally likely (MDLM, LLaDA)
    block diffusion  1 < block_len < seq_len    blocks left to right, any order inside (BD3-LM)
    LoMDM            learn_order = True         an order that is learned, and depends on the text

Read it from top to bottom. x is a clean text (B, L), z the same text with some tokens replaced by
[MASK], and mu(. | z) the network's token distribution at each position. Everything is in nats.

(1) The noise. Position i is still visible at time t with probability alpha^i(t), which falls from 1
    at t = 0 to 0 at t = 1. Backwards in time, a masked i is revealed at the rate
        A^i = -d_t alpha^i / (1 - alpha^i):                                     -> schedule()
    in a short time dt it happens with probability A^i dt. z_t is the text at time t.

(2) The bound. The model starts from all [MASK] and reveals i at its own rate A_hat^i, with a token
    from mu. The noise run backwards is such a process too, but one that ends in x. The KL
    divergence between the two is at least -log p(x):                           -> nelbo_rate()
        -log p(x) <= int_0^1 E_z sum_{i masked} [ A^i (-log mu^i(x_i))                        recon
                                                + A^i log(A^i / A_hat^i) - A^i + A_hat^i ] dt order

(3) The order. Take alpha^i = 1 - t^{w_i}: all masked positions S have rates w_i / t, so the next
    one revealed is i with probability w_i / W, W = sum_S w. On the clock -log t, which runs
    forward, i arrives at the time Exponential(1) / w_i: a Plackett-Luce ranking.  -> race()
    In LoMDM one network reads w off the clean x, to train and evaluate, never to sample; another
    guesses w_hat from z, and W_hat = sum_S w_hat.

(4) Time drops out. What is generated depends on the order of the positions only, so the part of (2)
    that compares *when* they are revealed, [W log(W / W_hat) - W + W_hat] / t >= 0, can go. What is
    left, the jump bound, is never looser. Nor does it need a time: reveal the first k positions of
    a race, k uniform on {0..L-1}, let S be the rest, and                       -> LoMDM.estimate()
        L sum_S (w_i / W) [ -log mu^i(x_i) + log(w_i / W) - log(w_hat_i / W_hat) ]
    has the same expectation. For w = 1 it is the familiar (L / |S|) sum_S -log mu^i(x_i). Blocks
    are revealed one after another and add up: S is then the masked part of a block, L its length.

(5) The gradient in w. Which order came out of the race is a discrete draw: autograd cannot see how
    w changed it. Draw two for each x, and the one with the smaller loss becomes likelier: REINFORCE
    with the other draw as its baseline, "leave one out" or RLOO.               -> LoMDM.loss()
"""

import math
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**26  # that are in memory at a time: 256 MiB


@dataclass
class Config:
    vocab_size: int  # [MASK] comes on top of these, with the id vocab_size
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    block_len: int | None = None  # None becomes seq_len, one block
    learn_order: bool = False
    c1: float = 0.7  # w = c1 + c2 * something in (-1, 1). Only c2 / c1 matters to the bound, since
    c2: float = 0.65  # t -> t^c1 is a change of clock; c2 = 0 is MDM. c1 > c2 keeps w positive
    weights: str = "normsig"  # or "exp": w = exp(g - mean g), |g| < 8, whatever c1 and c2 are

    def __post_init__(self):
        self.block_len = self.seq_len if self.block_len is None else self.block_len
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "block_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        C, H, L, K = self.n_embd, self.n_head, self.seq_len, self.block_len
        if C % (2 * H):  # rotary embeddings turn pairs of channels
            raise ValueError(f"n_embd ({C}) must be divisible by n_head ({H}), with even quotient")
        if L % K:
            raise ValueError(f"seq_len ({L}) must be divisible by block_len ({K})")
        if self.learn_order and K == 1:
            raise ValueError("learn_order needs block_len > 1: one token has only one order")
        if not self.c1 > self.c2 >= 0:
            raise ValueError(f"c1 ({self.c1}) must be above c2 ({self.c2}), and c2 not negative")
        if self.weights not in ("normsig", "exp"):
            raise ValueError(f"weights must be 'normsig' or 'exp', not {self.weights!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


# --------------------------------------------------------------------------------------------------
# The definition: a clock per position, and the bound that comes with it


def schedule(t, seq_len, block_len, w=1.0):
    """Equation (1) for the one family of schedules that this file needs.

    While t falls from 1 to 0, n blocks take turns, block 0 first, each with a clock of its own:
        tau_b(t) = clamp(n t - (n - 1 - b), 0, 1),   alpha^i = 1 - tau^{w_i},   A^i = n w_i / tau.

    t (B, 1) in [0, 1]; w a number or (B, L). Returns alpha and the velocity A, both (B, L). A is 0
    where the block's clock stands still, tau = 0 or 1: nothing there is about to be revealed.
    """
    n = math.ceil(seq_len / block_len)
    b = torch.arange(seq_len, device=t.device) // block_len  # (L,)
    tau = (n * t - (n - 1 - b)).clamp(0, 1)  # (B, L)
    running = (tau > 0) & (tau < 1)
    alpha = 1 - tau**w
    velocity = torch.where(running, n * w / torch.where(running, tau, 1.0), 0.0)
    return alpha, velocity


def nelbo_rate(log_probs, x, masked, velocity, velocity_hat):
    """The integrand of the bound (2) for one z_t: the definition, to which the tests hold the rest.

    log_probs (B, L, V) are log mu at z_t, x (B, L) the clean tokens, masked (B, L) bool where z_t
    hides them, velocity (B, L) the rates A of the noise and velocity_hat (B, L) those of the model.
    Returns recon and order (B,), nats per unit of time. order >= 0, and 0 only if the rates agree.
    """
    nll = -log_probs.gather(-1, x[..., None]).squeeze(-1)  # (B, L)
    A, A_hat = velocity, velocity_hat
    order = torch.xlogy(A, A) - torch.xlogy(A, A_hat) - A + A_hat  # xlogy: 0 log 0 is 0
    return (A * nll * masked).sum(-1), (order * masked).sum(-1)


# --------------------------------------------------------------------------------------------------
# The same bound without a clock: orders, and how much of one is revealed


def to_blocks(v, K):
    """(B, L) -> (B, n, K). A short last block is filled up with zeros."""
    K = min(K, v.shape[1])
    return F.pad(v, (0, -v.shape[1] % K)).unflatten(1, (-1, K))


def from_blocks(v, L):
    """(B, n, K) -> (B, L), the inverse of to_blocks."""
    return v.flatten(1)[:, :L]


def block_lengths(L, K, device=None):
    """(n,): K for all blocks but perhaps the last."""
    return (L - torch.arange(0, L, K, device=device)).clamp(max=K)


def race(w, generator=None):
    """Draw a Plackett-Luce order (3): position i arrives at the time Exponential(1) / w_i.

    w (..., K) >= 0. Returns the positions in order of arrival, (..., K) long. Those of weight 0
    never arrive and come last, in no particular order.
    """
    return (torch.empty_like(w).exponential_(generator=generator) / w).argsort(dim=-1)


def prefix_log_prob(w, order, prefix):
    """log q of the start of a race: sum_{j < k} log(w_{order_j} / weight still in the race at j).

    w, order (B, n, K); prefix (B, n, K) bool, True at the first k places. Returns (B, n).
    """
    w = w.gather(-1, order)
    remaining = w.flip(-1).cumsum(-1).flip(-1)
    # padding has w = remaining = 0: fill first, and nothing is ever nan
    return (w.masked_fill(~prefix, 1).log() - remaining.masked_fill(~prefix, 1).log()).sum(-1)


def spread_counts(B, L, K, generator=None, device=None, part=(0, 1)):
    """How many positions of each block are revealed: k (B, n), each uniform on {0..length-1}, but
    all together spread evenly, since a batch that happens to be all hard or all easy is mere noise.
    part (m, M): this batch is the m-th of M, drawn with equal generators.

    Number the blocks of all parts 0 .. N - 1: number j reveals the share (j / N + turn) mod 1 of
    its length, rounded down. In integers, on a grid that all lengths divide, so that one random
    turn makes each k exactly uniform. The numbers of a row, and of a column, lie far apart.
    """
    lengths = block_lengths(L, K, device)
    n = len(lengths)
    grid = min(K, L) * ((L - 1) % K + 1)
    row, b = torch.arange(B, device=device)[:, None], torch.arange(n, device=device)
    i = (row + b * B // n) % B * n + b  # (B, n): the numbers 0..B n - 1
    m, M = part
    turn = torch.randint(grid, (1,), generator=generator, device=device)
    return ((i * M + m) * grid // (B * n * M) + turn) % grid * lengths // grid


def most_masked(N, K):
    """sum_{j < N} (K - floor(j K / N)): no turn in spread_counts leaves more positions masked in N
    blocks of length K. Logits are then needed for (K + 1) / 2 of every K positions, and as the
    number depends on shapes only, no tensor changes its size (torch.compile)."""
    return N * K - ((K - 1) * (N - 1) + math.gcd(K, N) - 1) // 2


# --------------------------------------------------------------------------------------------------
# The network: LLaMA's blocks, and one more of them for each order head


def rotate(q, cos, sin):
    """Rotary position embedding. q (B, n_head, T, head_dim); cos, sin (T, head_dim / 2)."""
    q1, q2 = q.chunk(2, dim=-1)
    return torch.cat((q1 * cos - q2 * sin, q1 * sin + q2 * cos), dim=-1).type_as(q)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, without biases."""

    def __init__(self, config, dropout):
        super().__init__()
        C = config.n_embd
        hidden = 32 * math.ceil(8 * C / 3 / 32)  # as many parameters as a 4 C wide MLP without gate
        self.n_head, self.dropout = config.n_head, dropout
        self.norm1 = nn.RMSNorm(C, eps=1e-5)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.norm2 = nn.RMSNorm(C, eps=1e-5)
        self.gate_up = nn.Linear(C, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, C, bias=False)

    def forward(self, h, cos, sin, mask=None, causal=False, read=None):
        """h (B, T, C). mask (T, T) bool: a row sees a column; None: all see all, or all before.
        Returns the first `read` places, (B, read, C), all of them looking at all T."""
        B, T, _ = h.shape
        drop = self.dropout if self.training else 0.0
        q, k, v = self.qkv(self.norm1(h)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, n_head, T, head_dim), as v
        mask = None if mask is None else mask[:read]
        y = F.scaled_dot_product_attention(q[:, :, :read], k, v, mask, drop, causal)  # as q
        h = h[:, :read] + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), drop)
        gate, up = self.gate_up(self.norm2(h)).chunk(2, dim=-1)  # (B, read, hidden) each
        return h + F.dropout(self.down(F.silu(gate) * up), drop)


class OrderHead(nn.Module):
    """g: one block and a linear map to a number per position. The zero map at the start makes all w
    equal, which is exactly MDM, so training leaves the uniform order only if that pays. No dropout:
    w and w_hat are to match, and noise in them would be paid for in the order term."""

    def __init__(self, config):
        super().__init__()
        self.block = Block(config, dropout=0.0)
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    def forward(self, h, *attention):
        return self.score(self.norm(self.block(h, *attention))).squeeze(-1)  # (B, read)


class LoMDM(nn.Module):
    """ARM, MDM, block diffusion and LoMDM: which one, the Config says. Call eval() before nelbo()
    and sample(). Generators live on the model's device; None is the global one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mask_id = config.vocab_size
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size + 1, C)  # the last row is [MASK]
        # Rotary embeddings know distances only, and all [MASK]s look alike: with them alone, every
        # position of a fully masked text gets the same prediction and the same weight.
        self.wpe = nn.Embedding(config.seq_len, C)
        self.blocks = nn.ModuleList(Block(config, config.dropout) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(C, eps=1e-5)
        # [MASK] is never predicted, nor is what fills the rows up to a multiple of 64, for speed
        self.lm_head = nn.Linear(C, 64 * math.ceil(config.vocab_size / 64), bias=False)
        self.g = OrderHead(config) if config.learn_order else None  # w(x)
        self.g_hat = OrderHead(config) if config.learn_order else None  # w_hat(z)

        half = C // config.n_head // 2
        angle = torch.outer(torch.arange(config.seq_len), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)  # (seq_len, head_dim / 2)
        self.register_buffer("sin", angle.sin(), persistent=False)

        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                # as GPT-2: the sum of all residual branches keeps its scale
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name.endswith("score.weight"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def stream(self, z, x=None):
        """What the network reads to predict the masked positions of z (B, L) when the blocks before
        theirs hold x, or z itself: tokens (B, T), their positions (T,), and who sees whom: a mask
        (T, T) and whether it is causal. Predictions come out at the first L of the T places.

        one block    z, all see all: no mask, T = L
        block_len 1  the tokens before each position, behind a start token, causal: a GPT, T = L
        in between   a block sees itself and the blocks before it. Training all blocks at once takes
                     each twice, noisy to be predicted and clean to be looked back at:
                     [z | x], T = 2 L
        """
        L, K = z.shape[1], self.config.block_len
        if L > self.config.seq_len:
            raise ValueError(f"{L} tokens do not fit into seq_len = {self.config.seq_len}")
        pos = torch.arange(L, device=z.device)
        if K == 1:
            start = torch.full_like(z[:, :1], self.mask_id)
            return torch.cat((start, (z if x is None else x)[:, :-1]), 1), pos, None, True
        if K >= L:
            return z, pos, None, False
        b = pos // K
        if x is None:
            return z, pos, b[:, None] >= b, False
        b, clean = b.repeat(2), torch.arange(2 * L, device=z.device) >= L  # (2 L,)
        seen_clean = b < (b + clean)[:, None]  # earlier blocks, and a clean one itself
        seen_noisy = (b == b[:, None]) & ~clean[:, None]  # a noisy block sees itself
        mask = torch.where(clean, seen_clean, seen_noisy)  # (2 L, 2 L)
        return torch.cat((z, x), 1), pos.repeat(2), mask, False

    def features(self, z, x=None):
        """The backbone f on stream(z, x): h (B, T, n_embd), and how one more block would attend to
        it. Without a block to come, the last one need not compute more than the first L places."""
        tokens, pos, *who_sees_whom = self.stream(z, x)
        attention = self.cos[pos], self.sin[pos], *who_sees_whom
        h = F.dropout(self.wte(tokens) + self.wpe(pos), self.config.dropout, self.training)
        for block in self.blocks[:-1]:
            h = block(h, *attention)
        h = self.blocks[-1](h, *attention, None if self.config.learn_order else z.shape[1])
        return self.norm(h), attention

    def weigh(self, g, h, attention, L):
        """Weights (B, L) from an order head: w = c1 + c2 NormSig(g(f)) with the paper's
        NormSig(v)_i = sigmoid(v_i) - mean_j sigmoid(v_j), or w = exp(v_i - mean_j v_j). The mean
        is over i's block: only ratios inside it matter. The order may read the backbone's features
        but not shape them: stop-gradient on f."""
        c, K = self.config, self.config.block_len
        v = g(h.detach(), *attention, L).to(self.wte.weight.dtype)  # autocast made it bfloat16
        v = torch.sigmoid(v) if c.weights == "normsig" else 8 * torch.tanh(v / 8)  # |v| < 8
        v = to_blocks(v, K)  # (B, n, K)
        v = v - v.sum(-1, keepdim=True) / block_lengths(L, K, v.device)[:, None]
        v = from_blocks(v, L)
        return c.c1 + c.c2 * v if c.weights == "normsig" else v.exp()

    def order_weights(self, x):
        """w(x) (B, L), the noise's weights (3): they see the clean x. Ones without learn_order."""
        if not self.config.learn_order:
            return self.wte.weight.new_ones(x.shape)
        with torch.no_grad():
            h, attention = self.features(x)
        return self.weigh(self.g, h, attention, x.shape[1])

    def order_weights_hat(self, z):
        """w_hat(z) (B, L), the model's weights (3), which see z only. Ones without learn_order."""
        if not self.config.learn_order:
            return self.wte.weight.new_ones(z.shape)
        h, attention = self.features(z)
        return self.weigh(self.g_hat, h, attention, z.shape[1])

    def logits(self, h):
        """(..., n_embd) -> (..., V), in float32 under autocast: bfloat16 is too coarse for
        likelihoods."""
        return self.lm_head(h)[..., : self.config.vocab_size].to(self.wte.weight.dtype)

    def log_probs(self, z):
        """log mu (B, L, V) for any z (B, L) of tokens and mask_id. Position i reads its own block
        and those before it, and its prediction is meant for a masked i. An ARM's reads the tokens
        before i, and is meant for every i."""
        return F.log_softmax(self.logits(self.features(z)[0]), dim=-1)

    def nll(self, h, x):
        """-log mu(x) for features h (N, n_embd) and tokens x (N,): (N,). With a large vocabulary
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

    def masked_nll(self, h, x, masked, size):
        """-log mu^i(x_i) at the masked positions, 0 elsewhere: (B, L). Logits are made for `size`
        places only, no fewer than are masked."""
        masked = masked.flatten()  # (B L,)
        chosen = masked.int().argsort(descending=True, stable=True)[:size]
        nll = self.nll(h.flatten(0, 1)[chosen], x.flatten()[chosen]) * masked[chosen]  # (size,)
        return nll.new_zeros(masked.shape).scatter(0, chosen, nll).view_as(x)

    def estimate(self, x, w, k, size, generator=None):
        """Equation (4), one order for each block: x (B, L), w (B, n, K) and counts k (B, n).

        Returns recon, order, timing and log_q, (B, n) each, nats per block. recon + order estimates
        the jump bound. Adding timing, L [W_hat / W - 1 - log(W_hat / W)], gives the paper's: jumps
        come at the rate W / t, so an integral over time of g(S) / t is a sum over jumps of g(S) /
        W. log_q is the log-probability of the revealed prefix, the only part of the order that the
        loss depends on: more of it would add noise to (5)."""
        L, K = x.shape[1], w.shape[-1]
        ranking = race(w.detach(), generator)  # (B, n, K)
        masked = (ranking.argsort(dim=-1) >= k[..., None]) & (w > 0)  # padding has w = 0
        hide = from_blocks(masked, L)  # (B, L)
        h, attention = self.features(x.masked_fill(hide, self.mask_id), x)
        nll = to_blocks(self.masked_nll(h[:, :L], x, hide, size), K)  # (B, n, K)
        w_hat = torch.ones_like(w)
        if self.config.learn_order:
            w_hat = to_blocks(self.weigh(self.g_hat, h, attention, L), K)

        W = (w * masked).sum(-1, keepdim=True)  # (B, n, 1)
        W_hat = (w_hat * masked).sum(-1, keepdim=True)
        # (B, n, K): who is next. 1 where visible, as log 1 = 0, and nll = 0 there
        next_up = (w / W).masked_fill(~masked, 1)
        next_up_hat = (w_hat / W_hat).masked_fill(~masked, 1)
        length = block_lengths(L, K, x.device)  # (n,)
        recon = length * (next_up * nll).sum(-1)
        order = length * (next_up * (next_up.log() - next_up_hat.log())).sum(-1)
        ratio = (W_hat / W).squeeze(-1)
        timing = length * (ratio - 1 - ratio.log())
        prefix = torch.arange(K, device=x.device) < k[..., None]
        return recon, order, timing, prefix_log_prob(w, ranking, prefix)

    def loss(self, x, k=None):
        """What training minimises, for x (B, L): the jump bound (4) in nats per token, plus, with a
        learned order, the surrogate of (5), whose gradient counts and whose value means nothing.
        Returns the loss and a dict of detached metrics; report metrics["nelbo"], the bound. k: see
        spread_counts(); needed only if x is a part of a larger batch.

        (5) The mean of l over races with the weights w, which l depends on too, has the gradient
                E[ grad l + l grad log q ]
              = E[ grad (l_1 + l_2) / 2  +  (l_1 - l_2) grad (log q_1 - log q_2) / 2 ]
            for two independent orders with the same k. Blocks do not disturb each other, so each
            has an equation of its own. Both orders train the backbone too: no pass is wasted.
        """
        (B, L), K = x.shape, self.config.block_len
        draws = 2 if self.config.learn_order else 1
        weights = self.order_weights(x)  # (B, L)
        w = to_blocks(weights, K)  # (B, n, K)
        k = spread_counts(B, L, K, device=x.device) if k is None else k  # (B, n)
        size = draws * most_masked(k.numel(), w.shape[-1])
        recon, order, _, log_q = self.estimate(
            x.repeat(draws, 1), w.repeat(draws, 1, 1), k.repeat(draws, 1), size
        )
        per_token = 1 / (draws * B * L)
        loss = nelbo = (recon + order).sum() * per_token
        if draws == 2:
            (l1, l2), (log_q1, log_q2) = (recon + order).detach().chunk(2), log_q.chunk(2)
            loss = nelbo + ((l1 - l2) * (log_q1 - log_q2)).sum() * per_token
        metrics = {
            "nelbo": nelbo,
            "recon": recon.sum() * per_token,
            "order": order.sum() * per_token,
            "w_spread": weights.std(correction=0) / weights.mean(),  # 0: a uniformly random order
        }
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, bound="jump", generator=None):
        """Unbiased estimate (B,) of a bound on -log p(x), nats per sequence: the mean over n_draws
        of an order and a count. bound: "jump" (4), or "paper" (2), which is never smaller. For an
        ARM both are -log p(x) itself, whatever is drawn."""
        if bound not in ("jump", "paper") or n_draws < 1:
            raise ValueError(f"bound must be 'jump' or 'paper', not {bound!r}, and n_draws >= 1")
        (B, L), K = x.shape, self.config.block_len
        w = to_blocks(self.order_weights(x), K)  # (B, n, K), the same for all draws
        rows, totals = max(B, 2**14 // L), []  # a draw of all texts a pass, or 16k tokens
        many = zip(
            x.repeat(n_draws, 1).split(rows), w.repeat(n_draws, 1, 1).split(rows), strict=True
        )
        for x_, w_ in many:
            k = spread_counts(len(x_), L, K, generator, x.device)
            size = most_masked(k.numel(), w.shape[-1])
            recon, order, timing, _ = self.estimate(x_, w_, k, size, generator)
            totals.append((recon + order + (timing if bound == "paper" else 0)).sum(-1))
        return torch.cat(totals).view(n_draws, B).mean(0)

    def nelbo_at(self, x, t, generator=None):
        """The definition: the integrand (2) at the times t (B, 1), one z_t each. Its mean over
        uniform t is the paper's bound, but with a heavy tail: a position is masked with probability
        t^w and then weighs w / t, whose second moment int w^2 t^{w-2} dt is infinite for w <= 1.
        Hence (4). Returns recon and order (B,), nats per sequence."""
        L, K = x.shape[1], self.config.block_len
        alpha, velocity = schedule(t, L, K, self.order_weights(x))
        masked = torch.rand(alpha.shape, generator=generator, device=x.device) >= alpha
        z = x.masked_fill(masked, self.mask_id)
        _, velocity_hat = schedule(t, L, K, self.order_weights_hat(z))
        return nelbo_rate(self.log_probs(z), x, masked, velocity, velocity_hat)

    @torch.no_grad()
    def sample(self, z, temperature=1.0, top_k=None, per_step=1, generator=None):
        """Fill the mask_id positions of z (B, L): all of it, what follows a prompt, gaps in a text.

        A network call picks per_step positions by the race (3) with w_hat, among the masked ones of
        each row's first unfinished block, and their tokens from mu. With per_step = 1 and no given
        tokens, or whole blocks of them in front, this draws from p exactly, without a clock, as the
        network does not see the time. Other given tokens start the process midway: near p(rest |
        given), but not equal to it, and blind to what is given in later blocks. With more per_step,
        tokens revealed together do not see each other. temperature 0 takes the likeliest token.
        Returns x (B, L) and revealed_at (B, L), the number of the call that filled each position,
        counted from 0, and -1 where it was given.
        """
        if not 0 <= temperature < math.inf or per_step < 1 or (top_k is not None and top_k < 1):
            raise ValueError("temperature must be >= 0, per_step >= 1 and top_k >= 1 (or None)")
        x, revealed_at = z.clone(), torch.full_like(z, -1)
        L, K = z.shape[1], self.config.block_len
        b = torch.arange(L, device=z.device) // K  # (L,)
        for call in count():
            masked = x == self.mask_id
            if not masked.any():
                return x, revealed_at
            current = torch.where(masked, b, L).amin(1, keepdim=True)  # (B, 1), L in finished rows
            ready = masked & (b == current)  # (B, L)
            end = min(L, K * (1 + int(torch.where(ready, b, 0).max())))  # what follows is not seen
            h, attention = self.features(x[:, :end])
            w_hat = torch.ones_like(h[..., 0])
            if self.config.learn_order:
                w_hat = self.weigh(self.g_hat, h, attention, end)
            pick = race(w_hat * ready[:, :end], generator)[:, :per_step]  # (B, m)
            logits = self.logits(h.take_along_dim(pick[..., None], 1))  # (B, m, V)
            logits = logits - logits.amax(-1, keepdim=True)  # safe to divide by any temperature
            if top_k is not None:
                worst = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
                logits = logits.masked_fill(logits < worst, -torch.inf)
            if temperature == 0:
                token = logits.argmax(-1)  # (B, m)
            else:
                p = F.softmax(logits / temperature, dim=-1).flatten(0, 1)  # (B m, V)
                token = torch.multinomial(p, 1, generator=generator).view_as(pick)
            drawn = ready.gather(1, pick)  # False where fewer than per_step were ready
            x.scatter_(1, pick, torch.where(drawn, token, x.gather(1, pick)))
            revealed_at.scatter_(1, pick, torch.where(drawn, call, revealed_at.gather(1, pick)))
