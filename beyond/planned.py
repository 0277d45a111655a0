"""
An order that nobody listed: A3 (a3.py) with one order for all texts, found by search. It is in
neither paper.

A text x of L tokens can be written in L! orders, and every order is a model of its own:

    log p(x | order)  =  sum_k  log p(x_{order_k} | x_{order_<k})                               (1)

Which order is the best to learn? LoA3 (loa3.py) chooses between two that are on a menu, by the cost
of whole texts. LoMDM follows a gradient, which is a few nats in several hundred of noise. But a
pass of A3 says more than what a text cost. It says what each token cost, given the set of those
that came before it. So learn from it what a token at position i will cost if the positions in the
set S have been revealed. This model of costs is made of rules, such as "i costs nothing once j and
k are there":

    c_i(S)  =  base_i  prod_h  ( 1 - share_ih exp( - sum_{j not in S} needs_ihj ) )              (2)

Rule h takes the share_ih off the cost of i. It needs each position j for which needs_ihj is large:
if one of these is missing, exp(- needs_ihj) of the rule is left. All is positive, so that to see
more never costs more. The rules are fitted to the costs in training, by least squares.

With the rules an order can be judged without reading a single text:

    C(order)  =  sum_i  c_i( what comes before i )                                              (3)

This is how orders of variables have long been searched in Bayesian networks (Friedman and Koller,
2003). Here the search goes on beside the training, with 64 orders at once. Take a piece out of an
order, and put it back where (3) is small. That is, draw its place with a probability in proportion
to

    exp( - C(order) / T )                                                                       (4)

At first T is so large that orders stay random, and the network learns what can be told from what,
whatever is known. Then T falls. Orders in which rules apply become frequent, and the network
practises them. As there are 64, it cannot get used to a bad one and hold it for good. At the end
all take the best of the 64, and the last quarter of the training has one order.

At any time this is a model of texts, p(x) = the mean of p(x | order) over the 64 orders. It draws
one of them evenly, without looking at the text. So the choice of an order costs nothing, and

    -log p(x)  <=  mean over the 64 orders of  -log p(x | order)                                (5)

is the bound of lomdm.py with order terms of 0. At the end both sides are the same.

What it cannot do: all texts have the same order. Where each text has its own, see loa3.py.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import a3
from a3 import need

# ---- what a token costs, given which positions are revealed ------------------------------


class Rules(nn.Module):
    """Equation (2), with H rules for each of L positions.

    What is alike everywhere in a text, such as that the left neighbour is needed, should not be
    learned anew for every position. So each number is a sum of two: one of this position, and one
    that all share, which for needs depends on the distance j - i only.

    Every parameter is the number divided by `scale`, so that it moves 30 times as far as a weight
    of the network at the same learning rate. Otherwise the rules would lag behind the network."""

    scale = 30.0

    def __init__(self, L, H=8):
        super().__init__()

        def noise(*shape, mean=0.0):
            return nn.Parameter((mean + 0.3 * torch.randn(*shape)) / self.scale)

        # At first every need is about softplus(-2.5) = .08, for each of L positions.
        self.needs = noise(L, L, H, mean=-2.5)
        self.needs_by_distance = noise(2 * L - 1, H)
        self.share = noise(L, H)
        self.share_of_all = noise(H)
        self.base = nn.Parameter(torch.zeros(L))
        self.base_of_all = nn.Parameter(torch.tensor(1 / self.scale))

    def numbers(self):
        """needs (L, L, H), share (L, H) and base (L,) of (2)."""
        i = torch.arange(len(self.base), device=self.base.device)
        distance = i - i[:, None] + len(i) - 1  # j - i, counted from 0
        needs = F.softplus(self.scale * (self.needs + self.needs_by_distance[distance]))
        share = torch.sigmoid(self.scale * (self.share + self.share_of_all))
        base = F.relu(self.scale * (self.base + self.base_of_all))
        return needs, share, base

    def forward(self, place):
        """c_i (B, L) of (3), in nats, if position i comes as number place[:, i] of (B, L)."""
        return costs(place, self.numbers())


def costs(place, numbers):
    """As Rules.forward(), of numbers()."""
    needs, share, base = numbers
    return cost(missing(later(place), needs), share, base)


def needed(numbers):
    """How much is j needed by i, in nats, [j, i] of (L, L): what i costs if of all others only j is
    hidden, less what it costs if nothing is."""
    needs, share, base = numbers
    without = cost(needs, share[:, None], base[:, None])  # (i, j)
    return (without - cost(0 * share, share, base)[:, None]).T


def later(place):
    """(B, L, L): whether j comes later than i, at [:, i, j]."""
    return place[:, None, :] > place[:, :, None]


def missing(hidden, needs):
    """What each rule misses, (B, L, H): the sum in (2), over the j in hidden (B, L, L)."""
    return torch.einsum("bij,ijh->bih", hidden.to(needs.dtype), needs)


def cost(missing, share, base):
    """Equation (2), for what each rule misses (.., H), with share (.., H) and base (..)."""
    return base * (1 - share * torch.exp(-missing)).prod(-1)


# ---- the search --------------------------------------------------------------------------


def costs_of_places(order, is_out, numbers):
    """C (M, 2, L - k + 1) of (3), if a piece of k is taken out of each order (M, L), where is_out
    (M, L), and put back before number p of the rest, for each p: as it is, and reversed.

    All of them cost about as much as one order. The piece is before a position or it is not, so
    each of the rest has two costs. And what a rule of the piece misses is a sum over those behind
    it, which is known for all p at once."""
    needs, share, base = numbers
    piece, rest = split(order, is_out)
    of_piece = torch.zeros_like(order, dtype=torch.bool).scatter(1, piece, True)  # by position

    # The rest, in its order: if the piece comes before it, and if it does not.
    lacks = missing(later(order.argsort(1)) & ~of_piece[:, None], needs)  # (M, L, H)
    lacks_piece = torch.einsum("mj,ijh->mih", of_piece.to(needs.dtype), needs)
    behind = cost(lacks, share, base).gather(1, rest)  # (M, L - k)
    ahead = cost(lacks + lacks_piece, share, base).gather(1, rest)

    # At place p, numbers 0 .. p - 1 are ahead of the piece, and p .. are behind it.
    others = F.pad(ahead.cumsum(1), (1, 0)) + F.pad(sum_from(behind, 1), (0, 1))

    # The piece lacks what is behind it: of the rest, from number p on, and in the piece itself.
    rows = piece[:, :, None]
    lacks = F.pad(sum_from(needs[rows, rest[:, None]], 2), (0, 0, 0, 1))  # (M, k, L - k + 1, H)
    within = needs[rows, piece[:, None]]  # (M, k, k, H): one needs another
    as_it_is = within * torch.ones_like(within[0, :, :, 0]).triu(1)[:, :, None]
    backwards = within * torch.ones_like(within[0, :, :, 0]).tril(-1)[:, :, None]

    both = []
    for inside in (as_it_is, backwards):
        own = cost(lacks + inside.sum(2)[:, :, None], share[rows], base[rows])
        both.append(others + own.sum(1))
    return torch.stack(both, 1)


def split(order, is_out):
    """A piece (M, k) and the rest (M, L - k) of each order (M, L)."""
    M = len(order)
    return order[is_out].view(M, -1), order[~is_out].view(M, -1)


def sum_from(v, dim):
    """Sums of v from each place to the end of this dimension."""
    return v.flip(dim).cumsum(dim).flip(dim)


def take_out(order, links, generator=None):
    """Which piece of each order (M, L) to move, as a mask (M, L). It has k positions: half of the
    time one, and otherwise up to half of all, with an even log of k. They stand in a row in the
    order. Or they are a thread: a position, one that needs it, one that needs either of them, and
    so on, which may be written by turns with others. links (L, L): see needed()."""
    M, L = order.shape
    device = order.device
    how = torch.rand(3, generator=generator, device=device).tolist()
    k = int((L // 2 + 1) ** how[0]) if how[1] < 0.5 else 1
    if how[2] < 0.5:
        first = torch.randint(L - k + 1, (M, 1), generator=generator, device=device)
        number = torch.arange(L, device=device)
        return ((number >= first) & (number < first + k)).expand(M, L)

    j = torch.randint(L, (M, 1), generator=generator, device=device)
    thread = torch.zeros_like(order, dtype=torch.bool).scatter(1, j, True)  # by position
    pull = 1e-6  # if nobody needs them, anyone comes next
    for _ in range(k - 1):
        pull = pull + links[j[:, 0]]  # (M, L)
        j = torch.multinomial(pull.masked_fill(thread, 0), 1, generator=generator)
        thread.scatter_(1, j, True)
    return thread.gather(1, order)


@torch.no_grad()
def move(order, numbers, links, T, generator=None):
    """One step of the search for M orders (M, L), by the numbers() of the rules and links =
    needed(numbers), at temperature T. A piece of each goes to another place, as it is or reversed,
    drawn by (4). One more choice is to leave the order as it was. (A thread that was scattered
    comes back in one piece, which could be worse.)"""
    is_out = take_out(order, links, generator)
    piece, rest = split(order, is_out)
    n = rest.shape[1] + 1  # places

    put_back = costs_of_places(order, is_out, numbers).flatten(1)  # (M, 2 n)
    as_it_was = costs(order.argsort(1), numbers).sum(1, keepdim=True)
    logits = torch.cat((put_back, as_it_was), 1) / -T
    choice = torch.multinomial(logits.softmax(1), 1, generator=generator)  # (M, 1)

    # Number r of the rest gets the key r, and the piece keys between p - 1 and p.
    p = choice % n
    piece = torch.where(choice >= n, piece.flip(1), piece)
    fractions = torch.linspace(-1, 0, piece.shape[1] + 2, device=order.device)[1:-1]
    keys = torch.cat((torch.arange(n - 1.0, device=order.device).expand_as(rest), p + fractions), 1)
    moved = torch.cat((rest, piece), 1).gather(1, keys.argsort(1))
    return torch.where(choice == 2 * n, order, moved)


# ---- the model ---------------------------------------------------------------------------


class Planned(a3.A3):
    """An A3 with one order, which it finds in training. All that an A3 can do, it can do, too."""

    M = 64  # orders at once
    moves = 3  # of each, in a step of training
    random_share = 0.25  # of the texts are in random order at first, and fewer as T falls
    begin, end = 0.1, 0.75  # T falls between these shares of the training
    hot, cold, frozen = 0.15, 0.05, 0.003  # T in nats, at the beginning, at the end, and then

    def __init__(self, config):
        super().__init__(config)
        self.rules = Rules(config.seq_len)
        orders = torch.rand(self.M, config.seq_len).argsort(1)
        self.register_buffer("orders", orders)  # (M, seq_len): what comes first, second, ..

    def temperature(self, progress):
        """T at this share of the training, and how far it has fallen, from 0 to 1. It falls from
        `hot` to `cold` by equal factors."""
        fallen = (progress - self.begin) / (self.end - self.begin)
        fallen = min(max(fallen, 0.0), 1.0)
        return self.hot * (self.cold / self.hot) ** fallen, fallen

    def training_groups(self, B, progress, seed):
        """Groups (B, seq_len) of one token each, to train on at this share of the training,
        between 0 and 1. It moves the orders. seed: of this step, the same for all processes."""
        device = self.orders.device
        generator = torch.Generator(device).manual_seed(seed)
        T, fallen = self.temperature(progress)
        if fallen < 1:
            self.search(T, self.moves, generator)
        elif not (self.orders == self.orders[0]).all():
            self.search(self.frozen, 300, generator)
            self.orders[:] = self.best_order()

        # Which order has which text is not the same for all processes.
        chosen = torch.randint(len(self.orders), (B,), device=device)
        place = self.orders[chosen].argsort(1)
        random = a3.random_groups(*place.shape, device=device)
        is_random = torch.rand(B, 1, device=device) < self.random_share * (1 - fallen)
        return torch.where(is_random, random, place)

    @torch.no_grad()
    def search(self, T, n, generator=None):
        """n moves of all orders, at temperature T."""
        numbers = self.rules.numbers()
        links = needed(numbers)
        for _ in range(n):
            self.orders[:] = move(self.orders, numbers, links, T, generator)

    @torch.no_grad()
    def best_order(self):
        """The order (seq_len,) that the rules find the cheapest."""
        return self.orders[self.rules(self.orders.argsort(1)).sum(1).argmin()]

    def loss(self, x, groups=None, single=True):
        """What training minimises for x (B, L) in groups of one token each, by default in random
        order: A3's loss in nats per token, and beside it the squared error of (2). The network
        gets no gradient from the rules, nor the rules from it."""
        self.check(x, groups)
        groups = a3.random_groups(*x.shape, device=x.device) if groups is None else groups
        token_nll = -self.log_prob(x, groups, single)
        with torch.autocast(x.device.type, enabled=False):
            error = (self.rules(groups) - token_nll.detach()).square().mean()
        nelbo = token_nll.mean()
        return nelbo + error, {"nelbo": nelbo.detach(), "rules": error.detach()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, order="learned", size=1, generator=None):
        """An unbiased estimate (B,) of the bound (5) on -log p(x), in nats per text: the mean of
        n_draws orders. When all orders are the same, it is exact. "left" and "random": see A3."""
        if order != "learned":
            return super().nelbo(x, n_draws, order, size, generator)
        need(size == 1, f"a learned order has groups of one token, not of {size}")
        need(n_draws >= 1, f"n_draws must be at least 1, not {n_draws}")
        self.check(x)
        draws = (self.draw_places(*x.shape, generator) for _ in range(n_draws))
        return -sum(self.log_prob(x, place, single=True).sum(1) for place in draws) / n_draws

    def draw_places(self, B, L, generator=None):
        """The numbers (B, L) at which the first L positions come, in an order for each text."""
        device = self.orders.device
        chosen = torch.randint(len(self.orders), (B,), generator=generator, device=device)
        return self.orders[chosen].argsort(1)[:, :L].argsort(1).argsort(1)

    def order_log_weights(self, x):
        """Numbers (B, L) that fall along the best order."""
        self.check(x)
        place = self.best_order().argsort()[: x.shape[1]]
        return -place.to(self.wte.weight.dtype).expand(x.shape)

    def sample(self, z, temperature=1.0, top_k=None, per_step=1, by="order", **how):
        """As A3.sample(), and by "order", one of the orders found. Given tokens are read first, in
        the same order. With nothing given and one per_step, this draws from p(x)."""
        if by != "order":
            return super().sample(z, temperature, top_k, per_step, by, **how)
        self.check(z)
        need(per_step >= 1, f"per_step must be at least 1, not {per_step}")
        groups = self.draw_groups(z, per_step, how.get("generator"))
        x, revealed_at = self.decode(z, groups, per_step, "left", temperature, top_k, **how)
        return x, revealed_at.clamp(min=-1)

    def draw_groups(self, z, per_step=1, generator=None):
        """Groups (B, L) of per_step tokens for the mask_id positions of z (B, L), in one of the
        orders. Given tokens keep that order among themselves, by negative numbers."""
        L = z.shape[1]
        place = self.draw_places(*z.shape, generator)
        is_open = z == self.mask_id
        place = torch.where(is_open, place + L, place).argsort(1).argsort(1)  # given first
        n_given = (~is_open).sum(1, keepdim=True)
        return torch.where(is_open, (place - n_given) // per_step, place - L)

    def load_arm(self, state_dict):
        """As A3.load_arm(). The rules and the orders stay as they are."""
        mine = {k: v for k, v in self.state_dict().items() if k.startswith(("rules.", "orders"))}
        super().load_arm({**state_dict, **mine})

    def parameter_groups(self):
        """What an optimiser should know about the rules: no weight decay; they learn from the first
        step on; and are not clipped with the network, whose gradients would become smaller."""
        return [{"params": list(self.rules.parameters()), "weight_decay": 0.0, "starts_after": 0.0}]
