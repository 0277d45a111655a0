"""
An order that nobody listed: A3 (a3.py) with one order for all texts, found by search among
all L! orders. It is in neither paper.

    python -m experiments.puzzles scrambled
    python train_char.py --model planned --data data/puzzles/scrambled.txt --text_len 68

A text x of L tokens can be written in L! orders, and every order is a model of its own:

    log p(x | order)  =  sum_k  log p(x_{order_k} | x_{order_<k})                           (1)

Which order is the best to learn? LoA3 (loa3.py) chooses between two that are on a menu, by
the cost of whole texts. But a pass of A3 says more than what a text costs. It says what each
token costs, given those that came before it. So learn from that what a token at position i
will cost if the positions in the set S are revealed, in the mean over texts. The model of
these costs consists of rules, such as "i costs nothing once j and k are there":

    c_i(S)  =  base_i  prod_h  ( 1 - share_ih exp( - sum_{j not in S, j != i} needs_ihj ) ) (2)

If all that rule h needs is in S, the sum is 0, and the cost is multiplied by 1 - share_ih. It
needs every position j whose needs_ihj is large: without one of these exp() is near 0, and the
rule does nothing. base, needs >= 0 and 0 <= share <= 1, so that to see more never costs more.
The rules are fitted to the costs that come up in training, by least squares.

With the rules an order can be judged without reading a single text:

    C(order)  =  sum_i  c_i( what comes before i )                                          (3)

This is how the order of the variables of a Bayesian network is found, too (Teyssier and
Koller, 2005). Here 64 orders change during the training. Three times in each step of it a
piece is taken out of every order and put back where C is small. Its slot is drawn with a
probability in proportion to

    exp( - C(order) / T )              with the temperature T in nats of a text             (4)

The training has three parts, which are shares of its steps:

    0 to 0.1       the orders are random, as the rules know nothing yet
    0.1 to 0.75    T falls from 0.15 to 0.05; orders in which rules apply become frequent, and
                   the network practises them, beside random ones (a quarter, and then fewer)
    0.75 to 1      after one more search, of 2,000 moves from T = 0.15 down to 0.003, all 64
                   become the one that the rules find cheapest, and the network practises it

Why 64? What has been practised is cheap. A single order would soon look better than all
others, for no other reason. That is less likely to happen to 64 that keep changing.

At any time this is a model of texts. It draws one of the 64 orders, all equally likely,
without looking at the text. So p(x) is the mean of p(x | order) over them. The choice costs
nothing, and

    -log p(x)  <=  mean over the 64 orders of  -log p(x | order)                            (5)

is the bound of lomdm.py with order terms of 0. When all orders are the same, so are both
sides.

After 3,000 steps on scrambled films, two runs of an earlier form, without the last search,
had found orders whose texts cost the least that is possible. One of today's form was 0.45 nats
above it, and an ARM 1.92 (experiments/TRIED.md).

What it cannot do: all texts have the same order. (Where each text has its own, see loa3.py.)
And texts have to be short: the rules are H L^2 numbers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import a3
from a3 import need

# ---- what a token costs, given which positions are revealed ------------------------------


class Rules(nn.Module):
    """Equation (2), with H rules for each of L positions.

    What is alike everywhere in a text, such as that the left neighbour is needed, should not
    be learned anew for every position. So each number is a sum of two: one of its own, and
    one that is shared by all positions. For needs_ihj the latter depends on the distance j -
    i.

    Every parameter is the number divided by `scale`. So one step of Adam moves the number 30
    times as far as a weight of the network, at the same learning rate. base ends at 0 for a
    character that is always the same, and may stay there."""

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

    def table(self):
        """The numbers of (2): needs (L, L, H) with needs_ihj at [i, j, h], share (L, H) and
        base (L,). needs at [i, i] is not used."""
        i = torch.arange(len(self.base), device=self.base.device)
        distance = i - i[:, None] + len(i) - 1  # j - i, counted from 0
        needs = F.softplus(self.scale * (self.needs + self.needs_by_distance[distance]))
        share = torch.sigmoid(self.scale * (self.share + self.share_of_all))
        base = F.relu(self.scale * (self.base + self.base_of_all))
        return needs, share, base

    def forward(self, place):
        """c_i (B, L) of (3), in nats, if position i comes as number place[:, i] of (B, L)."""
        return costs(place, self.table())


def costs(place, table):
    """c_i (B, L) of (3), in nats, by a table of Rules, if i comes as number place[:, i] (B,
    L)."""
    needs, share, base = table
    return by_rules(missing(later(place), needs), share, base)


def later(place):
    """(B, L, L): whether j comes later than i, at [:, i, j]."""
    return place[:, None, :] > place[:, :, None]


def missing(hidden, needs):
    """What each rule lacks, (B, L, H): the sum in (2), over the j in hidden (B, L, L)."""
    return torch.einsum("bij,ijh->bih", hidden.to(needs.dtype), needs)


def by_rules(lacks, share, base):
    """Equation (2), for what each rule lacks (.., H), with share (.., H) and base (..)."""
    return base * (1 - share * torch.exp(-lacks)).prod(-1)


def needed(table):
    """Who needs j? At [j, i] of (L, L), in nats: what i costs if of all others only j is
    hidden, less what it costs if nothing is."""
    needs, share, base = table
    without = by_rules(needs, share[:, None], base[:, None])  # (i, j)
    return (without - by_rules(0 * share, share, base)[:, None]).T


# ---- the search --------------------------------------------------------------------------


def costs_of_slots(order, is_out, table):
    """C (M, 2, L - k + 1) of (3), if a piece of k is taken out of each order (M, L), where
    is_out (M, L), and put back before number p of the rest, for each p: as it is, and
    reversed.

    To compute all of them takes hardly longer than for one. The piece comes before a position
    or after it, so each of the rest has two costs. And what a rule of the piece lacks is a
    sum over what comes after it, which for all p is one cumulative sum."""
    needs, share, base = table
    piece, rest = split(order, is_out)
    of_piece = torch.zeros_like(order, dtype=torch.bool).scatter(1, piece, True)  # by position

    # What the rest costs, in its order: after the piece, and before it, where it lacks that.
    lacks = missing(later(order.argsort(1)) & ~of_piece[:, None], needs)  # (M, L, H)
    lacks_piece = torch.einsum("mj,ijh->mih", of_piece.to(needs.dtype), needs)
    if_after = by_rules(lacks, share, base).gather(1, rest)  # (M, L - k)
    if_before = by_rules(lacks + lacks_piece, share, base).gather(1, rest)

    # With the piece in slot p, numbers 0 .. p - 1 of the rest are before it, and p .. after.
    others = F.pad(if_before.cumsum(1), (1, 0)) + F.pad(sum_from(if_after, 1), (0, 1))

    # The piece lacks what comes after it: of the rest, from number p on, and in itself.
    rows = piece[:, :, None]
    from_p = sum_from(needs[rows, rest[:, None]], 2)  # (M, k, L - k, H)
    lacks = F.pad(from_p, (0, 0, 0, 1))  # and nothing of the rest in the last slot
    within = needs[rows, piece[:, None]]  # (M, k, k, H): one needs another
    comes_later = torch.ones_like(within[0, :, :, 0]).triu(1)  # (k, k): in the piece as it is

    both = []
    for hidden in (comes_later, comes_later.T):
        inside = (within * hidden[:, :, None]).sum(2)  # (M, k, H)
        own = by_rules(lacks + inside[:, :, None], share[rows], base[rows])
        both.append(others + own.sum(1))
    return torch.stack(both, 1)


def split(order, is_out):
    """A piece (M, k) and the rest (M, L - k) of each order (M, L)."""
    M = len(order)
    return order[is_out].view(M, -1), order[~is_out].view(M, -1)


def sum_from(v, dim):
    """Sums of v from each index to the end of this dimension."""
    return v.flip(dim).cumsum(dim).flip(dim)


def take_out(order, links, generator=None):
    """Which piece of each order (M, L) to move, as a mask (M, L).

    It has k positions, as many in every order: half of the time one, and otherwise up to half
    of all, where log k is even. They stand in a row in the order. Or they are a thread: a
    position, one that needs it, one that needs either of them, and so on, by links = needed()
    (L, L). A thread may be written by turns with others. On Shakespeare that is what happens
    first, to whole passages, and no piece of the order would bring one together."""
    M, L = order.shape
    device = order.device
    how = torch.rand(3, generator=generator, device=device).tolist()
    k = int((L // 2 + 1) ** how[0]) if how[1] < 0.5 else 1
    if how[2] < 0.5:
        first = torch.randint(L - k + 1, (M, 1), generator=generator, device=device)
        number = torch.arange(L, device=device).expand(M, L)
        return (number >= first) & (number < first + k)

    j = torch.randint(L, (M, 1), generator=generator, device=device)
    thread = torch.zeros_like(order, dtype=torch.bool).scatter(1, j, True)  # by position
    pull = 1e-6  # if nobody needs them, anyone comes next
    for _ in range(k - 1):
        pull = pull + links[j[:, 0]]  # (M, L)
        j = torch.multinomial(pull.masked_fill(thread, 0), 1, generator=generator)
        thread.scatter_(1, j, True)
    return thread.gather(1, order)


@torch.no_grad()
def move(order, table, links, T, generator=None):
    """One step of the search for M orders (M, L), by a table of Rules, at temperature T.
    (links = needed(table), which is the same for many moves.) A piece of each order goes to
    another slot, as it is or reversed, drawn by (4). One more choice is to leave the order as
    it was.

    This is a search, and does not draw orders by (4): a thread, once it stands in a row, has
    no way back."""
    is_out = take_out(order, links, generator)
    piece, rest = split(order, is_out)
    n = rest.shape[1] + 1  # slots

    put_back = costs_of_slots(order, is_out, table).flatten(1)  # (M, 2 n)
    as_it_was = costs(order.argsort(1), table).sum(1, keepdim=True)
    logits = torch.cat((put_back, as_it_was), 1) / -T
    choice = torch.multinomial(logits.softmax(1), 1, generator=generator)  # (M, 1)
    return torch.where(choice == 2 * n, order, put(piece, rest, choice))


def put(piece, rest, choice):
    """The pieces (M, k) in the rest (M, n - 1), where choice (M, 1) says: below n it is the
    slot, and then the slot of a reversed piece. In slot 1, x y and a b c become a x y b c, by
    sorting the keys 0.33 and 0.67 of x and y among the keys 0, 1, 2 of a, b, c."""
    n = rest.shape[1] + 1
    piece = torch.where(choice >= n, piece.flip(1), piece)
    between = torch.linspace(-1, 0, piece.shape[1] + 2, device=rest.device)[1:-1]
    number = torch.arange(n - 1, device=rest.device).expand_as(rest)
    keys = torch.cat((number, choice % n + between), 1)
    return torch.cat((rest, piece), 1).gather(1, keys.argsort(1))


# ---- the model ---------------------------------------------------------------------------


class Planned(a3.A3):
    """An A3 with one order, which it finds in training. It can do what an A3 can, but is
    trained on whole windows and in groups of one token."""

    M = 64  # orders at once
    moves = 3  # of each, in a step of training
    last_moves = 2000  # in a search of its own, when T has fallen
    random_share = 0.25  # of the texts are in random order at first, and fewer as T falls
    begin, end = 0.1, 0.75  # T falls between these shares of the training
    hot, cold, frozen = 0.15, 0.05, 0.003  # T at first, at the end, and after the last moves

    def __init__(self, config):
        super().__init__(config)
        self.rules = Rules(config.seq_len)
        orders = torch.rand(self.M, config.seq_len).argsort(1)
        self.register_buffer("orders", orders)  # (M, seq_len): what comes first, second, ..

    def fallen(self, progress):
        """How much of its way T has gone, from 0 to 1, at this share of the training."""
        return min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)

    def temperature(self, progress):
        """T at this share of the training. It falls from `hot` to `cold` by equal factors."""
        return self.hot * (self.cold / self.hot) ** self.fallen(progress)

    def plan(self, progress, seed):
        """Move the orders, once in each step of training, at this share of it. seed: of this
        step, the same for all processes, so that they have the same orders."""
        generator = torch.Generator(self.orders.device).manual_seed(seed)
        if self.fallen(progress) < 1:
            self.search([self.temperature(progress)] * self.moves, generator)
        elif not (self.orders == self.orders[0]).all():
            self.settle(generator)

    def settle(self, generator=None):
        """One more search, by the rules as they are now, and all take the best order. It
        begins as hot as the first search, so that nothing stays which was chosen when the
        rules were not yet known."""
        steps = torch.linspace(0, 1, self.last_moves).tolist()
        self.search([self.hot * (self.frozen / self.hot) ** t for t in steps], generator)
        self.orders[:] = self.best_order()

    @torch.no_grad()
    def search(self, temperatures, generator=None):
        """A move of all orders at each of these temperatures."""
        table = self.rules.table()
        links = needed(table)
        for T in temperatures:
            self.orders[:] = move(self.orders, table, links, T, generator)

    @torch.no_grad()
    def best_order(self):
        """The order (seq_len,) that the rules find the cheapest."""
        return self.orders[self.rules(self.orders.argsort(1)).sum(1).argmin()]

    def training_groups(self, B, progress):
        """Groups (B, seq_len) of one token each for B texts, at this share of the training:
        one of the orders for each, or a random one."""
        place = self.draw_places(B, self.config.seq_len)
        random = a3.random_groups(*place.shape, device=place.device)
        share = self.random_share * (1 - self.fallen(progress))
        return torch.where(torch.rand(B, 1, device=place.device) < share, random, place)

    def loss(self, x, groups=None):
        """What training minimises for x (B, seq_len), in groups of one token each, by default
        in random order: A3's loss in nats per token, and beside it the squared error of (2).
        The network gets no gradient from the rules, nor the rules from it."""
        self.check(x, groups)
        L = self.config.seq_len
        need(x.shape[1] == L, f"a planned order is for all {L} tokens of a window")
        groups = a3.random_groups(*x.shape, device=x.device) if groups is None else groups
        token_nll = -self.log_prob(x, groups, single=True)
        nelbo = token_nll.mean()

        # In float32 also where the network is in bfloat16: the search is by the same numbers.
        with torch.autocast(x.device.type, enabled=False):
            error = (self.rules(groups) - token_nll.detach()).square().mean()
        return nelbo + error, {"nelbo": nelbo.detach(), "rules": error.detach()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, order="learned", size=1, generator=None):
        """An unbiased estimate (B,) of the bound (5) on -log p(x), in nats per text: the mean
        of n_draws orders. When all orders are the same, it is exact. "left" and "random": see
        A3."""
        if order != "learned":
            return super().nelbo(x, n_draws, order, size, generator)
        need(size == 1, f"a learned order has groups of one token, not of {size}")
        need(n_draws >= 1, f"n_draws must be at least 1, not {n_draws}")
        self.check(x)
        draws = (self.draw_places(*x.shape, generator) for _ in range(n_draws))
        return -sum(self.log_prob(x, place, single=True).sum(1) for place in draws) / n_draws

    def draw_places(self, B, L, generator=None):
        """The numbers (B, L) at which the first L positions come, in an order for each
        text."""
        device = self.orders.device
        chosen = torch.randint(len(self.orders), (B,), generator=generator, device=device)
        place = self.orders[chosen].argsort(1)[:, :L]
        return place.argsort(1).argsort(1)  # without the numbers of those beyond L

    def order_log_weights(self, x):
        """Numbers (B, L) that fall along the best order."""
        self.check(x)
        place = self.best_order().argsort()[: x.shape[1]]
        return -place.to(self.wte.weight.dtype).expand(x.shape)

    def sample(self, z, temperature=1.0, top_k=None, per_step=1, by="order", **how):
        """As A3.sample(), and by "order", one of the orders found. Given tokens are read
        first, in the same order. With nothing given and one per_step, this draws from p(x)."""
        if by != "order":
            return super().sample(z, temperature, top_k, per_step, by, **how)
        self.check(z)
        need(per_step >= 1, f"per_step must be at least 1, not {per_step}")
        groups = self.draw_groups(z, per_step, how.get("generator"))
        x, revealed_at = self.decode(z, groups, per_step, "left", temperature, top_k, **how)
        return x, revealed_at.clamp(min=-1)

    def draw_groups(self, z, per_step=1, generator=None):
        """Groups (B, L) of per_step tokens for the mask_id positions of z (B, L), in one of
        the orders. Given tokens keep that order among themselves, by negative numbers."""
        L = z.shape[1]
        place = self.draw_places(*z.shape, generator)
        is_open = z == self.mask_id

        # Of the open ones, which come in the same order: 0, 1, ..
        turn = place.masked_fill(~is_open, L).argsort(1).argsort(1)
        return torch.where(is_open, turn // per_step, place - L)

    def load_arm(self, state_dict):
        """As A3.load_arm(). The rules and the orders stay as they are: A3 refuses missing
        names, so it gets ours back."""
        ours = "rules.", "orders"
        mine = {name: p for name, p in self.state_dict().items() if name.startswith(ours)}
        super().load_arm({**state_dict, **mine})

    def parameter_groups(self):
        """What an optimiser should know about the rules. There is no weight decay.
        starts_after: train_step() of train_char.py trains them from this share of the steps
        on, and leaves groups that have it out of the clipping, as the network's gradients
        would become smaller."""
        params = list(self.rules.parameters())
        return [{"params": params, "weight_decay": 0.0, "starts_after": 0.0}]
