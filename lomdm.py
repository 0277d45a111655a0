"""
One objective from autoregression to a learned generation order: OeMDM and LoMDM, arXiv:2602.02112.

A masked diffusion model hides tokens and learns to fill them in. Give every position its own noise
schedule, and the same loss trains, by its arguments alone,

    ARM              block_len = 1              left to right, the GPT you know
    MDM              block_len = seq_len        any order, all equally likely (MDLM, LLaDA)
    block diffusion  1 < block_len < seq_len    blocks left to right, any order inside (BD3-LM)
    LoMDM            learn_order = True         an order that is learned, and depends on the text

x is a clean text (B, L), z the same text with some tokens replaced by [MASK], and mu(. | z) the
network's token distribution at each position. Everything is in nats.

(1) The noise. Position i is still visible at time t with probability alpha^i(t), which falls from 1
    at t = 0 to 0 at t = 1. Backwards in time, a masked i is revealed at the rate
        A^i = -d_t alpha^i / (1 - alpha^i).                                     -> schedule()

(2) The bound. In a short time dt two coins are tossed for a masked i: the noise, run backwards,
    reveals it with probability A^i dt, the model with A_hat^i dt. The KL divergence of these coins
    is (A log(A / A_hat) - A + A_hat) dt, and naming the revealed token costs -log mu. All of it
    added up is at least -log p(x):                                             -> nelbo_rate()
        -log p(x) <= int_0^1 E_z sum_{i masked} [ A^i (-log mu^i(x_i))                        recon
                                                + A^i log(A^i / A_hat^i) - A^i + A_hat^i ] dt order

(3) The order. Take alpha^i = 1 - t^{w_i}: all masked positions S have rates w_i / t, so the next
    one revealed is i with probability w_i / W, W = sum_S w. On the clock -log t, which runs
    forward, i arrives at the time Exponential(1) / w_i: a Plackett-Luce ranking.  -> race()
    In LoMDM one head of the network reads w off the clean x, to train and evaluate, never to
    sample; another guesses w_hat from z: A_hat = w_hat / t, W_hat = sum_S w_hat.  -> Order

(4) Time drops out. The text depends on the order of its positions only, so the part of (2) that
    compares *when* they are revealed, [W log(W / W_hat) - W + W_hat] / t >= 0, can go. What is
    left, the jump bound, is never looser. Nor does it need a time: reveal the first k positions of
    a race, k uniform on {0..L-1}, let S be the rest, and                       -> jump_terms()
        L sum_S (w_i / W) [ -log mu^i(x_i) + log(w_i / W) - log(w_hat_i / W_hat) ]
    has the same expectation. For w = 1 it is the familiar (L / |S|) sum_S -log mu^i(x_i).

(5) The gradient in w. Autograd cannot see how w changes the outcome of a race: draw two for each x,
    and let that with the smaller loss become likelier (REINFORCE, leave one out). -> LoMDM.loss()

(6) n = L / K blocks of length K are revealed one after another. Each has its own clock, its own
    race and its own term (4), with K for L; the terms add up.                  -> block_clocks()
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    weights: str = "normsig"  # or "exp", see Order
    c1: float = 0.7
    c2: float = 0.65

    def __post_init__(self):
        self.block_len = self.seq_len if self.block_len is None else self.block_len
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "block_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        C, H, L, K = self.n_embd, self.n_head, self.seq_len, self.block_len
        c1, c2, w = self.c1, self.c2, self.weights
        for wrong, message in (  # rotary embeddings turn pairs of channels
            (C % (2 * H), f"n_embd ({C}) must be divisible by n_head ({H}), with even quotient"),
            (L % K, f"seq_len ({L}) must be divisible by block_len ({K})"),
            (self.learn_order and K == 1, "learn_order at block_len 1: there is only one order"),
            (not c1 > c2 >= 0, f"c1 ({c1}) must be above c2 ({c2}), and c2 not negative"),
            (w not in ("normsig", "exp"), f"weights must be 'normsig' or 'exp', not {w!r}"),
            (not 0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}"),
        ):
            if wrong:
                raise ValueError(message)


# ---- the definition, (1) and (2) -----------------------------------------------------------------
# The tests hold everything else to it; training uses (4).
def schedule(tau, w=1.0, speed=1):
    """Equation (1) on a clock tau in [0, 1], which for one block is the time t itself:
        alpha^i = 1 - tau^{w_i},   A^i = speed w_i / tau,   speed = d tau / dt.
    tau (B, 1) or (B, L); w a number or (B, L). Returns alpha and the velocity A, of their common
    shape. A is 0 where the clock stands still: nothing is about to be revealed."""
    running = (tau > 0) & (tau < 1)
    velocity = torch.where(running, speed * w / torch.where(running, tau, 1.0), 0.0)
    return 1 - tau**w, velocity


def nelbo_rate(log_probs, x, masked, velocity, velocity_hat):
    """The integrand of the bound (2) for one z_t. log_probs (B, L, V) are log mu at z_t; all else
    is (B, L): the clean tokens x, where z_t hides them, the rates A of the noise and A_hat of the
    model. Returns recon and order (B,), nats per unit of time; order >= 0, and 0 if they agree.
    At random times A has the second moment int w^2 t^{w-2} dt, infinite if w <= 1: hence (4)."""
    nll = -log_probs.gather(-1, x[..., None]).squeeze(-1)  # (B, L)
    A, A_hat = velocity, velocity_hat
    order = torch.xlogy(A, A) - torch.xlogy(A, A_hat) - A + A_hat  # xlogy: 0 log 0 is 0
    return (A * nll * masked).sum(-1), (order * masked).sum(-1)


# ---- the same bound without a clock, (3) and (4) -------------------------------------------------
def race(w, generator=None):
    """Draw a Plackett-Luce order (3): i arrives at the time Exponential(1) / w_i. w (..., K) >= 0.
    Returns the positions in order of arrival, (..., K), those of weight 0 last."""
    return (torch.empty_like(w).exponential_(generator=generator) / w).argsort(dim=-1)


def prefix_log_prob(w, order, k):
    """log q of the first k (...,) places of a race: sum_{j < k} log(w_{order_j} / weight that is
    still in the race at j). w, order (..., K). Returns (...,)."""
    w = w.gather(-1, order)
    remaining = w.flip(-1).cumsum(-1).flip(-1)
    prefix = torch.arange(w.shape[-1], device=w.device) < k[..., None]
    return torch.where(prefix, w / remaining, 1.0).log().sum(-1)


def jump_terms(nll, w, w_hat, masked):
    """Equation (4) for one set S of masked positions. nll -log mu^i(x_i), weights w and w_hat,
    masked bool: (..., K) each. Returns (...,) each, in nats for all K steps of the order, of which
    this is one: recon; order >= 0; and timing >= 0, which (2) has on top of (4): jumps come at the
    rate W / t, so an integral over time of g(S) / t is the mean of a sum over jumps of g(S) / W."""
    K, W, W_hat = w.shape[-1], (w * masked).sum(-1, True), (w_hat * masked).sum(-1, True)
    p = torch.where(masked, w / W, 1.0)  # who is next: 1 where visible, as log 1 = 0
    p_hat = torch.where(masked, w_hat / W_hat, 1.0)
    recon, order = (p * nll * masked).sum(-1), (p * (p.log() - p_hat.log())).sum(-1)
    timing = (W_hat / W - 1 - (W_hat / W).log()).squeeze(-1)
    return K * recon, K * order, K * timing


# ---- blocks, (6) ---------------------------------------------------------------------------------
def block_clocks(t, L, K):
    """While t (B, 1) falls from 1 to 0, n = L / K blocks take turns, block 0 first, each on a clock
    that runs n times as fast: tau_b(t) = clamp(n t - (n - 1 - b), 0, 1). Returns (B, L)."""
    n, b = L // K, torch.arange(L, device=t.device) // K  # b (L,)
    return (n * t - (n - 1 - b)).clamp(0, 1)


def spread_counts(B, n, K, generator=None, device=None):
    """How many positions of each block are revealed: k (B, n), each uniform on {0..K-1}, together
    spread evenly: a batch that is all hard or all easy is mere noise. The N = B n blocks are
    numbered, those of a text about B apart, and number j reveals ((j K + turn) mod N K) // N."""
    N = B * n
    row, b = torch.arange(B, device=device)[:, None], torch.arange(n, device=device)
    number = (row + b * B // n) % B * n + b  # (B, n): 0 .. N - 1
    turn = torch.randint(N * K, (1,), generator=generator, device=device)
    return (number * K + turn) % (N * K) // N


# ---- the learned order, (3) ----------------------------------------------------------------------
class Order(nn.Module):
    """Weights from features: one more block of the network, a linear map to a number v_i for each
    position, and one of two ways to make a weight of it. The mean is over i's block.
        normsig  w_i = c1 + c2 (sigmoid(v_i) - mean_j sigmoid(v_j)), the paper's. Only c2 / c1
                 matters to the bound, since t -> t^c1 is a change of clock; c2 = 0 is MDM
        exp      w_i = exp(u_i - mean_j u_j), u = 8 tanh(v / 8)
    The zero map at the start makes all w equal, which is exactly MDM: training leaves the uniform
    order only if that pays. The order reads the backbone's features but does not shape them, hence
    stop-gradient. No dropout of its own: w_hat is to match w, and noise in either costs nats."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.block = Block(config, dropout=0.0)
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    def forward(self, h, rotary, sees, L, cache=None):
        """h (B, T, n_embd), and how a block attends to it -> weights (B, L) of the first L."""
        v = self.score(self.norm(self.block(h.detach(), rotary, sees, L, cache)))  # (B, L, 1)
        v = v.to(torch.promote_types(v.dtype, torch.float32))  # (B, L, 1)
        return self.squash(v.view(len(v), -1, min(L, self.config.block_len))).flatten(1)  # (B, L)

    def squash(self, v):  # (B, n, K) -> (B, n, K)
        c = self.config
        if c.weights == "exp":
            u = 8 * torch.tanh(v / 8)
            return (u - u.mean(-1, keepdim=True)).exp()
        s = torch.sigmoid(v)
        return c.c1 + c.c2 * (s - s.mean(-1, keepdim=True))


def uniform(h, rotary, sees, L, cache=None):
    """What stands for an Order where none is learned: w = 1."""
    return h.new_ones(len(h), L, dtype=torch.promote_types(h.dtype, torch.float32))


# ---- the network: LLaMA's blocks -----------------------------------------------------------------
def rotary_tables(pos, head_dim):
    """cos and sin (T, head_dim) for rotate() at pos (T,), the first sin of each pair negated."""
    j = torch.arange(0, head_dim, 2, device=pos.device)
    f = 1e4 ** (-j / head_dim)  # radians per position
    angle = pos[:, None] * torch.cat((-f, f))  # (T, head_dim)
    return angle.cos(), angle.sin()


def rotate(q, cos, sin):
    """Rotary position embedding of q (..., T, head_dim): turn each pair of channels j and
    j + head_dim / 2 by its angle. roll() swaps the two."""
    return (q * cos + q.roll(q.shape[-1] // 2, dims=-1) * sin).type_as(q)


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

    def forward(self, h, rotary, sees, rows=None, cache=None):
        """h (B, T, C) -> its first `rows` places, (B, rows, C), None: all. sees: the mask argument
        of scaled_dot_product_attention, {} if all see all. cache (keys and values of each layer,
        begin): these T places come after its first `begin`, see them too, and are added to it."""
        B, T, _ = h.shape
        drop = self.dropout if self.training else 0.0
        qkv = self.qkv(self.norm1(h)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(qkv[:2], *rotary), qkv[2]  # (B, n_head, T, head_dim) each
        if cache is not None:
            held, begin = cache
            held[self][:, :, :, begin : begin + T] = torch.stack((k, v))
            k, v = held[self][:, :, :, : begin + T]  # (B, n_head, begin + T, head_dim) each
        sees = {name: m if m is True else m[:rows] for name, m in sees.items()}  # a mask's rows
        y = F.scaled_dot_product_attention(q[:, :, :rows], k, v, dropout_p=drop, **sees)
        h = h[:, :rows] + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), drop)
        gate, up = self.gate_up(self.norm2(h)).chunk(2, dim=-1)  # (B, rows, hidden) each
        return h + F.dropout(self.down(F.silu(gate) * up), drop)


def certainty(logits, by):
    """Which positions come next, logits (B, K, V) -> (B, K): those with the largest of these."""
    p = F.softmax(logits, dim=-1)
    if by == "entropy":
        return torch.xlogy(p, p).sum(-1)  # minus the entropy
    if by not in ("confidence", "margin"):
        raise ValueError(f"by must be order, left, random, confidence, entropy or margin: {by!r}")
    top = p.topk(min(2, p.shape[-1])).values
    return top[..., 0] - top[..., -1] * (by == "margin")


def draw(logits, generator=None, temperature=1.0, top_k=None, top_p=None):
    """One token from each of logits (B, m, V): (B, m). Temperature 0 takes the likeliest. Of the
    top_k likeliest only; of the fewest that together have the probability top_p."""
    k, mass = logits.shape[-1] if top_k is None else top_k, 1.0 if top_p is None else top_p
    if not (0 <= temperature < math.inf and k >= 1 and 0 < mass <= 1):
        raise ValueError("temperature must be >= 0, top_k >= 1 or None, top_p in (0, 1] or None")
    logits = logits - logits.amax(-1, keepdim=True)  # the best is 0: safe to divide
    p = F.softmax(logits / max(temperature, 1e-30), dim=-1)
    if k < p.shape[-1] or mass < 1:
        likely, i = p.sort(dim=-1, descending=True)
        likely = (likely * (likely.cumsum(-1) - likely < mass))[..., :k]
        p = torch.zeros_like(p).scatter(-1, i[..., :k], likely)
    return torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(logits.shape[:-1])


class LoMDM(nn.Module):
    """The network and its bound. One class is ARM, MDM, block diffusion and LoMDM: see Config."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mask_id = config.vocab_size
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size + 1, C)  # the last row is [MASK]
        # Rotary embeddings tell distances. If all tokens are [MASK], every position sees the same
        # at all distances, and no order could prefer a place to start: hence wpe besides.
        self.wpe = nn.Embedding(config.seq_len, C)
        self.blocks = nn.ModuleList(Block(config, config.dropout) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(C, eps=1e-5)
        # [MASK] is never predicted, nor is what fills the rows up to a multiple of 64, for speed.
        self.lm_head = nn.Linear(C, 64 * math.ceil(config.vocab_size / 64), bias=False)
        self.g = Order(config) if config.learn_order else uniform  # w(x)
        self.g_hat = Order(config) if config.learn_order else uniform  # w_hat(z)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # as GPT-2: the sum of all residual branches keeps its scale
                residual = name.endswith(("proj.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02
                nn.init.normal_(p, std=0 if name.endswith("score.weight") else std)

    def check(self, x):
        L, K = x.shape[-1] if x.ndim else 0, self.config.block_len
        if x.ndim != 2 or not x.numel() or L > self.config.seq_len or L % min(K, L):
            limit = f"L <= seq_len = {self.config.seq_len} in whole blocks of {K}"
            raise ValueError(f"texts must be (B, L), B >= 1, {limit}, not {tuple(x.shape)}")

    def stream(self, z, x=None):
        """What the network reads to predict the masked of z (B, L) when the blocks before theirs
        hold x, or z itself: tokens (B, T), their positions (T,), and who sees whom, the mask
        argument of the attention. Predictions come out at the first L of the T places.
        one block    z, all see all, T = L
        block_len 1  the tokens before each position, behind a start token, causal: a GPT, T = L
        in between   a block sees itself and the blocks before it. To train all blocks at once, each
                     is there twice, noisy to be predicted and clean to be looked back at, T = 2 L:
                              z0 z1 z2 x0 x1 x2
                          z0  #                     a noisy block sees itself
                          z1     #     #            and the clean blocks before it,
                          z2        #  #  #
                          x0           #            a clean block sees itself
                          x1           #  #         and the clean blocks before it
                          x2           #  #  #"""
        self.check(z)
        L, K, pos = z.shape[1], self.config.block_len, torch.arange(z.shape[1], device=z.device)
        if K == 1:
            shifted = F.pad((z if x is None else x)[:, :-1], (1, 0), value=self.mask_id)
            return shifted, pos, {"is_causal": True}
        if K >= L:
            return z, pos, {}
        b = pos // K
        if x is None:
            return z, pos, {"attn_mask": b[:, None] >= b}
        b, clean = b.repeat(2), torch.arange(2 * L, device=z.device) >= L  # (2 L,)
        mask = torch.where(clean, b < (b + clean)[:, None], (b == b[:, None]) & ~clean[:, None])
        return torch.cat((z, x), 1), pos.repeat(2), {"attn_mask": mask}  # row sees column

    def features(self, z, x=None, cache=None):
        """The backbone f on stream(z, x): h (B, T, n_embd), and how an Order's layer attends to it.
        If no order is learned, the last layer leaves out what is only there to be looked at.
        cache: of Block.forward(); T counts the places that come after its first `begin`."""
        tokens, pos, sees = self.stream(z, x)
        if cache is not None:  # a block alone sees all there is
            begin, b = cache[1], pos // self.config.block_len
            alone = z.shape[1] - begin <= self.config.block_len
            sees = {} if alone else {"attn_mask": b[begin:, None] >= b}
            tokens, pos = tokens[:, begin:], pos[begin:]
        rotary = rotary_tables(pos, self.config.n_embd // self.config.n_head)
        h = F.dropout(self.wte(tokens) + self.wpe(pos), self.config.dropout, self.training)
        for block in self.blocks[:-1]:
            h = block(h, rotary, sees, cache=cache)
        rows = None if self.config.learn_order else z.shape[1]
        h = self.blocks[-1](h, rotary, sees, rows, cache)
        return self.norm(h), (rotary, sees)

    def logits(self, h):
        """(..., n_embd) -> (..., V). What follows, softmax and sums, is in float32 at least."""
        logits = self.lm_head(h)[..., : self.config.vocab_size]
        return logits.to(torch.promote_types(self.wte.weight.dtype, torch.float32))

    def log_probs(self, z):
        """log mu (B, L, V) for any z (B, L) of tokens and mask_id. Position i reads its own block
        and those before it, and is meant for a masked i. An ARM's reads the tokens before i."""
        return F.log_softmax(self.logits(self.features(z)[0]), dim=-1)

    def order_weights(self, x):
        """w(x) (B, L), the noise's weights (3), which see the clean x up to their own block."""
        self.check(x)
        if not self.config.learn_order:
            dtype = torch.promote_types(self.wte.weight.dtype, torch.float32)
            return torch.ones_like(x, dtype=dtype)
        with torch.no_grad():
            h, attention = self.features(x)
        return self.g(h, *attention, x.shape[1])

    def order_weights_hat(self, z):
        """w_hat(z) (B, L), the model's weights (3), which see z only."""
        h, attention = self.features(z)
        return self.g_hat(h, *attention, z.shape[1])

    def look(self, x, masked):
        """One pass, masked (B, n, K) of x (B, L) hidden: -log mu(x) there, and w_hat, (B, n, K)."""
        L, z = x.shape[1], x.masked_fill(masked.view_as(x), self.mask_id)
        h, attention = self.features(z, x)
        nll = self.nll(h[:, :L].flatten(0, 1), x.flatten()).view_as(masked) * masked
        return nll, self.g_hat(h, *attention, L).view_as(masked)

    def loss(self, x):
        """What training minimises, for x (B, L): the jump bound (4) in nats per token, plus, with a
        learned order, the surrogate of (5), whose gradient counts and whose value means nothing.
        Returns the loss and a dict of detached metrics; report metrics["nelbo"], the bound.
        (5) Let l_1, l_2 be (4) for two independent orders with the same k. The gradient of E l is
                E[ grad (l_1 + l_2) / 2  +  (l_1 - l_2) grad (log q_1 - log q_2) / 2 ]
            log q being that of the revealed prefix, as l depends on no more of the order. Each
            block has an equation of its own."""
        weights = self.order_weights(x)  # (B, L)
        (B, L), K = x.shape, min(x.shape[1], self.config.block_len)
        draws = 2 if self.config.learn_order else 1
        w = weights.view(B, -1, K).repeat(draws, 1, 1)  # (draws B, n, K)
        k = spread_counts(B, L // K, K, device=x.device).repeat(draws, 1)  # (draws B, n)
        ranking = race(w)
        masked = ranking.argsort(-1) >= k[..., None]  # all but the first k
        nll, w_hat = self.look(x.repeat(draws, 1), masked)
        recon, order, _ = jump_terms(nll, w, w_hat, masked)  # (draws B, n) each

        per_token = 1 / (draws * B * L)
        loss = nelbo = (recon + order).sum() * per_token
        if self.config.learn_order:
            l1, l2 = (recon + order).detach().chunk(2)
            log_q1, log_q2 = prefix_log_prob(w, ranking, k).chunk(2)
            loss = nelbo + ((l1 - l2) * (log_q1 - log_q2)).sum() * per_token
        metrics = dict(nelbo=nelbo, recon=recon.sum() * per_token, order=order.sum() * per_token)
        metrics["w_spread"] = weights.std(correction=0) / weights.mean()  # 0: uniformly random
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, bound="jump", generator=None):
        """Unbiased estimate (B,) of a bound on -log p(x), nats per sequence, the mean of n_draws.
        bound: "jump" (4), or "paper" (2), never smaller. For an ARM both are -log p(x) itself."""
        if bound not in ("jump", "paper") or n_draws < 1:
            raise ValueError(f"bound {bound!r}: 'jump' or 'paper'; n_draws {n_draws}: at least 1")
        w, (B, L), total = self.order_weights(x), x.shape, 0  # w (B, L)
        w = w.view(B, -1, K := min(L, self.config.block_len))  # (B, n, K)
        for _ in range(n_draws):
            k = spread_counts(B, L // K, K, generator, x.device)  # (B, n)
            masked = race(w, generator).argsort(-1) >= k[..., None]
            nll, w_hat = self.look(x, masked)
            recon, order, timing = jump_terms(nll, w, w_hat, masked)
            total = total + recon + order + (timing if bound == "paper" else 0)
        return total.sum(-1) / n_draws

    def sample(self, z, temperature=1.0, top_k=None, per_step=1, by="order", **how):
        """Fill the mask_id positions of z (B, L): all of it, what follows a prompt, gaps in a text.
        A call picks per_step masked positions of the first unfinished block, and their tokens from
        mu, blind to each other: by the "order" of the race (3) with w_hat, "left" to right, at
        "random", or by "confidence" (largest top probability), "entropy" (smallest) or "margin" (of
        the top two). With "order", one per_step, and nothing given but whole blocks in front, it
        draws from p exactly. Other given tokens let it start midway, near p(rest | given) but not
        it, and blind to those in later blocks. how: top_p, generator, cache. Returns x and
        revealed_at (B, L), the call that filled in a position, -1 if given."""
        return self.decode(z, per_step, by, temperature=temperature, top_k=top_k, **how)[:2]

    def decoder_log_prob(self, x, by="left", per_step=1):
        """log p(x) (B,) in nats, exactly, if sample() decodes by this rule: the decoder is walked
        through x (B, L). "order" always takes the largest w_hat. L / per_step calls."""
        if by == "random" or (by == "order" and self.config.block_len > 1 and self.g is uniform):
            raise ValueError(f"by {by!r} takes other steps each time; nelbo() bounds their mean")
        return self.decode(torch.full_like(x, self.mask_id), per_step, by, x)[2]

    @torch.no_grad()
    def decode(self, z, per_step, by, truth=None, generator=None, cache=True, **how):
        """What sample() does, and log mu of all it filled in, (B,) nats. truth (B, L): copied, not
        drawn. cache: keep keys and values of finished blocks; a single one has none to keep."""
        self.check(z)
        if per_step < 1:
            raise ValueError(f"per_step must be at least 1, not {per_step}")
        x, revealed_at, call, begin, c = z.clone(), torch.full_like(z, -1), 0, 0, self.config
        L, K, log_p = z.shape[1], min(z.shape[1], c.block_len), torch.zeros(len(z), device=z.device)
        room = 2, len(z), c.n_head, L, c.n_embd // c.n_head
        held = defaultdict(lambda: self.wte.weight.new_empty(room))  # of each layer
        for end in range(K, L + 1, K):  # block after block
            while (masked := x[:, end - K : end] == self.mask_id).any():  # (B, K)
                kept = (held, begin) if cache and K < L else None
                h, attention = self.features(x[:, :end], cache=kept)
                begin = end if K == 1 else end - K  # an ARM has read finished tokens only
                if by in ("order", "random", "left"):
                    weigh = self.g_hat if by == "order" else uniform  # all equal: left to right
                    score = weigh(h, *attention, h.shape[1], kept)[:, -K:]
                    if by != "left" and truth is None:  # race()
                        score = score / torch.empty_like(score).exponential_(generator=generator)
                else:
                    score = certainty(self.logits(h[:, -K:]), by)
                h = h[:, -K:]
                score = score.masked_fill(~masked, -torch.inf)
                pick = score.argsort(dim=1, descending=True, stable=True)[:, :per_step]  # (B, m)
                logits = self.logits(h.take_along_dim(pick[..., None], 1))  # (B, m, V)
                drawn, pick = masked.gather(1, pick), pick + end - K  # False: fewer were masked
                token = draw(logits, generator, **how) if truth is None else truth.gather(1, pick)
                log_mu = logits.log_softmax(-1).gather(2, token[..., None])[..., 0]  # (B, m)
                log_p = log_p + (log_mu * drawn).sum(1)
                for t, new in ((x, token), (revealed_at, call)):
                    t.scatter_(1, pick, torch.where(drawn, new, t.gather(1, pick)))
                call += 1
        return x, revealed_at, log_p

    max_logits = 2**26  # 256 MiB

    def nll(self, h, x):
        """-log mu(x) for features h (N, n_embd) and tokens x (N,): (N,). The added code is so that
        no more than max_logits exist at a time, most of the memory with a large vocabulary: beyond
        that they come in chunks, and again in the backward pass."""
        rows = max(1, self.max_logits // self.config.vocab_size)
        if len(x) <= rows:  # ignore_index: by default a token -100 would cost nothing
            return F.cross_entropy(self.logits(h), x, reduction="none", ignore_index=-(2**63))
        chunks = zip(h.split(rows), x.split(rows), strict=True)
        return torch.cat([checkpoint(self.nll, *chunk, use_reentrant=False) for chunk in chunks])
