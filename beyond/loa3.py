"""
LoA3: a learned order on two streams. It joins A3 (a3.py) and LoMDM (lomdm.py, which derives the
bound below), and is in neither paper.

LoMDM draws the next position from those that are left, i with probability w_i / W, where w are
learned weights and W is their sum. A training step of it scores one step of an order, where the
token at i counts w_i / W. The more decided the order, the fewer tokens that teaches, as w_i / W
is then near 1 for one position and near 0 for the others. A pass of A3 scores all steps of an
order, but its orders are random. So draw an order from a learned distribution, and score all its
steps on A3's two streams. The model draws an order by q_hat, then a text in that order. To train,
the order is drawn by q, which has seen the text:

    p(x) = sum_order  q_hat(order)  prod_k p(x_{order_k} | x_{order_<k})                        (1)

    -log p(x)  <=  E_{order ~ q(. | x)}  sum_k [ -log p(x_{order_k} | x_{order_<k})   recon     (2)
                        + log q(order_k | order_<k, x) - log q_hat(order_k | order_<k) ]   order

Step k of an order reveals position order_k. This is the bound of lomdm.py with all L terms at
once, and with a q_hat that does not look at the tokens. With q and q_hat uniform it is, divided by
L, A3's loss for random orders. With all weight on left to right it is the loss of a GPT.

What orders are there? A text is read in one of three ways: roughly from left to right, roughly
from right to left, or, for a fixed share of the texts, in random order, which keeps the model
able to fill gaps. Each way is a race as in lomdm.py: position i, with the log-weight s_i, is next
with probability exp(s_i) / (the sum over those that are left). Along the text the log-weights
fall, rise, or are all 0. So the order that is learned is above all a choice between two
directions. REINFORCE, see loss(), found none when all log-weights began equal and each was learned:
the noise of a text's cost is a hundred times the effect (experiments/TRIED.md). So both directions
are there from the start, and REINFORCE chooses between them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import a3
from a3 import need


@dataclass
class Config(a3.Config):
    random_share: float = 0.0  # of the texts that are read in random order

    def __post_init__(self):
        super().__post_init__()
        need(0 <= self.random_share < 1, "random_share must be in [0, 1)")


class Order(nn.Module):
    """q and q_hat: a mixture of three races.

        log-weights   s_j = - sum_{i <= j} step_i     step > 0: j tends to come after j - 1
        q_hat         draws the direction with probabilities that are the same for all texts
        q             draws it with probabilities to which each kind of token in x adds a vote
        both          draw the random way with probability random_share, which is fixed

    Of the rest, left to right has at first two thirds, for q and q_hat. Runs that began so ended
    better than with even chances. Each step_i begins as 6 forwards and -6 backwards: a position
    weighs e^6 times the next in its direction. All of this is learned.

    Every parameter is a logit or a step_i divided by `scale`, 40. So its gradient is 40 times
    that of the logit, and moving it a little moves the logit 40 times as much. Without that, a
    logit could not get from 0 to 10 in a short training at the learning rate of the network. With
    40, a direction is decided in 50 to 100 steps."""

    scale = 40.0

    def __init__(self, config):
        super().__init__()
        self.random_share = config.random_share
        steps = torch.tensor([[6.0], [-6.0]]).repeat(1, config.seq_len)  # forwards, backwards
        two_to_one = torch.tensor([math.log(2), 0.0])
        self.log_weight_steps = nn.Parameter(steps / self.scale)  # (2, seq_len)
        self.token_logits = nn.Parameter(torch.zeros(config.vocab_size, 2))  # the votes, for q
        self.q_logits = nn.Parameter(two_to_one / self.scale)
        self.q_hat_logits = nn.Parameter(two_to_one / self.scale)

    def log_weights(self, L):
        """s (3, L) of the three ways, in float32 at least. In random order they are 0."""
        float32 = torch.promote_types(self.log_weight_steps.dtype, torch.float32)
        steps = self.log_weight_steps[:, :L].to(float32)
        s = -(self.scale * steps).cumsum(1)
        return F.pad(s, (0, 0, 0, 1))  # a third row, of zeros

    def log_q_way(self, x):
        """log q(way | x) (B, 3) for texts x (B, L). q has to tell texts that are easier forwards
        from those that are easier backwards, such as by a mark that is in them. So each entry
        of the vocabulary that is in a text has one vote, however often it is there. The sum of
        n votes is divided by the root of n, so that long texts are not surer just for having
        more of them."""
        there = x.new_zeros(len(x), len(self.token_logits)).scatter(1, x, 1)  # (B, V): 1 or 0
        votes = (there[..., None] * self.token_logits).sum(1)  # (B, 2)
        votes = votes / there.sum(1, keepdim=True).sqrt()
        return self.with_random(self.q_logits + votes)

    def log_q_hat_way(self):
        """log q_hat(way) (1, 3)."""
        return self.with_random(self.q_hat_logits[None])

    def with_random(self, logits):
        """Logits (B, 2) of the directions -> log-probabilities (B, 3) of the ways."""
        r = self.random_share
        directions = (self.scale * logits).log_softmax(dim=1) + math.log1p(-r)
        return F.pad(directions, (0, 1), value=math.log(r) if r else -math.inf)

    def draw(self, log_way, L, generator=None):
        """An order (B, L) for each row of log_way (B, 3)."""
        way = torch.multinomial(log_way.detach().exp(), 1, generator=generator)[:, 0]
        return race(self.log_weights(L).detach()[way], generator)

    def forward(self, order, log_way):
        """The log-probability (B, L) of each step of order (B, L), given the steps before, if
        the way is drawn by log_way (B or 1, 3). It is the difference, from one k to the next,
        of log sum_way p(way) p(first k steps | way)."""
        B, L = order.shape
        s = self.log_weights(L).expand(B, 3, L)
        s = s.gather(2, order[:, None].expand(B, 3, L))  # in the order of the steps

        # In a race, a step has probability exp(s_i) / the sum over those that are left.
        left = s.flip(2).logcumsumexp(2).flip(2)
        given_way = (s - left).cumsum(2)  # (B, 3, L): log p(first k steps | way)

        # The mixture of the three, and what each step adds to it.
        so_far = (log_way[..., None] + given_way).logsumexp(1)  # (B, L): log p(first k steps)
        return so_far.diff(dim=1, prepend=torch.zeros_like(so_far[:, :1]))


def race(s, generator=None):
    """lomdm.race() for log-weights s (B, L), which may differ by more than exp() can hold. The
    arrival times there are noise / w with noise ~ Exponential(1). Who is first has the largest
    -log(noise / w) = s - log(noise)."""
    log_noise = torch.empty_like(s).exponential_(generator=generator).log()
    return (s - log_noise).argsort(dim=1, descending=True)


class LoA3(a3.A3):
    """An A3 with a distribution of orders. All that an A3 can do, it can do, too."""

    def __init__(self, config):
        super().__init__(config)
        self.order = Order(config)

    def order_log_weights(self, x):
        """The log-weights s (B, L) of the way that q finds likeliest for texts x (B, L)."""
        self.check(x)
        return self.order.log_weights(x.shape[1])[self.order.log_q_way(x).argmax(dim=1)]

    def order_log_probs(self, x, order):
        """log q_hat and log q (B, L) of each step k, which reveals position order[:, k] of
        x."""
        self.check(x, order)
        log_q_hat = self.order(order, self.order.log_q_hat_way())
        log_q = self.order(order, self.order.log_q_way(x))
        return log_q_hat, log_q

    def likeliest_order(self, B, L):
        """The number (B, L) at which each position comes in the likeliest order of q_hat's likelier
        direction. No order of the random way is as likely, however often that is drawn."""
        direction = self.order.q_hat_logits.argmax()
        s = self.order.log_weights(L)[direction]
        return s.argsort(descending=True, stable=True).argsort().repeat(B, 1)

    def order_terms(self, x, generator=None):
        """The terms of (2) for one order of each text x (B, L), drawn by q: -log p, -log q_hat
        and log q of its steps, (B, L) each. Their sum is the cost of a step."""
        self.check(x)
        order = self.order.draw(self.order.log_q_way(x), x.shape[1], generator)
        token_nll = -self.log_prob(x, order.argsort(dim=1), single=True)
        log_q_hat, log_q = self.order_log_probs(x, order)
        return token_nll.gather(1, order), -log_q_hat, log_q

    def loss(self, x, groups=None, single=None):
        """What training minimises, for x (B, L), B > 1: a loss whose gradient counts, and a
        dict of detached metrics, of which "nelbo" is the bound (2) in nats per token. With
        groups, A3's.

        The gradient of a mean over orders drawn by q is E[grad cost] + E[cost grad log q]. The
        second part, how q changes which order is drawn, autograd cannot see (REINFORCE). So log q
        of step k gets a weight: its text's costs of the steps k, k + 1, .., as earlier ones do
        not depend on this choice. From that the mean over the other texts is subtracted. This
        text's order has no influence on it, so it lessens the noise and leaves the mean gradient
        as it is. A number less the mean of the B - 1 others is B / (B - 1) times the number less
        the mean of all. The value of the loss means nothing: see "nelbo"."""
        if groups is not None:
            return super().loss(x, groups, single)
        B = len(x)
        need(B >= 2, "a learned order compares texts: at least 2 in a batch")
        token_nll, nll_hat, log_q = self.order_terms(x)
        cost = token_nll + nll_hat + log_q  # (B, L), of each step

        to_come = cost.detach().flip(1).cumsum(1).flip(1)
        excess = (to_come - to_come.mean(0)) * B / (B - 1)
        loss = cost.mean() + (excess * log_q).mean()

        metrics = {
            "nelbo": cost.mean(),
            "recon": token_nll.mean(),
            "order": (nll_hat + log_q).mean(),
            "left_share": self.order.log_q_way(x)[:, 0].exp().mean(),
        }
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def nelbo(self, x, n_draws=1, order="learned", size=1, generator=None):
        """An unbiased estimate (B,) of the bound (2) on -log p(x), in nats per text: the mean of
        n_draws orders. For the order "left" or "random" see A3. Only these have a size."""
        if order != "learned":
            return super().nelbo(x, n_draws, order, size, generator)
        need(size == 1, f"a learned order has groups of one token, not of {size}")
        need(n_draws >= 1, f"n_draws must be at least 1, not {n_draws}")
        total = 0
        for _ in range(n_draws):
            token_nll, nll_hat, log_q = self.order_terms(x, generator)
            total = total + (token_nll + nll_hat + log_q).sum(1)
        return total / n_draws

    def sample(self, z, temperature=1.0, top_k=None, per_step=1, by="order", **how):
        """As A3.sample(), and by "order", which q_hat draws. With nothing given and one
        per_step, texts are then drawn from (1). Given tokens are read first, in the same
        order."""
        if by != "order":
            return super().sample(z, temperature, top_k, per_step, by, **how)
        self.check(z)
        need(per_step >= 1, f"per_step must be at least 1, not {per_step}")
        groups = self.draw_groups(z, per_step, how.get("generator"))

        # A group has per_step tokens, so all are filled at once, whatever the rule "left" says.
        # Given tokens come back with their negative groups.
        x, revealed_at = self.decode(z, groups, per_step, "left", temperature, top_k, **how)
        return x, revealed_at.clamp(min=-1)

    def draw_groups(self, z, per_step=1, generator=None):
        """Groups (B, L) of per_step tokens for the mask_id positions of z (B, L), in an order
        that q_hat draws. Given tokens keep that order among themselves, by negative
        numbers."""
        L = z.shape[1]
        log_way = self.order.log_q_hat_way().expand(len(z), 3)
        order = self.order.draw(log_way, L, generator)  # (B, L): what comes first, second, ..
        place = order.argsort(dim=1)  # the place of each position in this order

        # The given tokens come before the open ones, and otherwise the order stays.
        is_open = z == self.mask_id
        order = torch.where(is_open, place + L, place).argsort(dim=1)
        place = order.argsort(dim=1)

        n_given = (~is_open).sum(1, keepdim=True)  # so open places count from n_given
        return torch.where(is_open, (place - n_given) // per_step, place - L)

    def load_arm(self, state_dict):
        """As A3.load_arm(). The order stays as it is: A3 refuses missing names, so it gets ours
        back."""
        mine = {name: p for name, p in self.state_dict().items() if name.startswith("order.")}
        super().load_arm({**state_dict, **mine})

    def parameter_groups(self):
        """What an optimiser should know about the order.

        There is no weight decay. eps is 0.3: where gradients are far below that, Adam is gradient
        descent with momentum, at the rate lr / 0.3, and does not blow up noise. starts_after:
        train_step() of train_char.py keeps lr at 0 for this share of the steps, in which both
        directions are read, as the one that is easy first is often the wrong one. It also leaves
        these parameters out of the clipping, as they would make the network's gradients
        smaller."""
        params = list(self.order.parameters())
        return [{"params": params, "weight_decay": 0.0, "eps": 0.3, "starts_after": 1 / 3}]
