"""
The papers' own training loss: the bound (2) of lomdm.py at one random time for each text.

    python train_char.py --model mdm-by-time
    python train_char.py --model lomdm-by-time
    python -m experiments.evidence variance out          both losses on the same weights

It has the mean of LoMDM.loss(), plus what it costs to guess the times; and more noise, by 1 / t.
"""

import torch
import torch.nn.functional as F

import lomdm

Config = lomdm.Config  # train_char.py looks for it beside the class


def nelbo_at(model, x, t, generator=None):
    """(2) for texts x (B, L) at times t (B, 1), one z_t each: recon and order (B,), nats. The mean
    over uniform t is the paper's bound."""
    L, K = x.shape[1], min(x.shape[1], model.config.block_len)
    tau = lomdm.block_clocks(t, L, K)  # (B, L); one block: t
    alpha, velocity = lomdm.schedule(tau, model.order_weights(x), L // K)
    masked = torch.rand(x.shape, generator=generator, device=x.device) >= alpha
    z = x.masked_fill(masked, model.mask_id)
    _, velocity_hat = lomdm.schedule(tau, model.order_weights_hat(z), L // K)
    return lomdm.nelbo_rate(model.log_probs(z), x, masked, velocity, velocity_hat)


class ByTime(lomdm.LoMDM):
    """LoMDM in all but what training minimises. Its checkpoints fit LoMDM, and the other way."""

    def loss(self, x, t=None):
        """As LoMDM.loss(), for texts x (B, L) at times t (B, 1). By default these are spread evenly
        over the batch, as the papers do. (5) compares two z_t of the same time; log q is that of
        z_t, of which each position is masked on its own, with probability 1 - alpha."""
        (B, L), K = x.shape, min(x.shape[1], self.config.block_len)
        draws = 2 if self.config.learn_order else 1
        if t is None:
            turn = torch.rand(1, 1, device=x.device)
            t = (torch.arange(B, device=x.device)[:, None] + turn) / B  # (B, 1)
        weights = self.order_weights(x)  # (B, L)
        x, t, w = (each.repeat(draws, 1) for each in (x, t, weights))
        tau = lomdm.block_clocks(t, L, K)  # (draws B, L); one block: t
        alpha, velocity = lomdm.schedule(tau, w, L // K)
        masked = torch.rand_like(alpha) >= alpha
        h, attention = self.features(x.masked_fill(masked, self.mask_id))
        _, velocity_hat = lomdm.schedule(tau, self.g_hat(h, *attention, L), L // K)
        log_mu = F.log_softmax(self.logits(h), dim=-1)  # (draws B, L, V)
        recon, order = lomdm.nelbo_rate(log_mu, x, masked, velocity, velocity_hat)

        per_token = 1 / (draws * B * L)
        loss = nelbo = (recon + order).sum() * per_token
        if self.config.learn_order:
            visible = alpha.clamp(1e-6, 1 - 1e-6)  # log 0 would be chosen never, but differentiated
            log_q = torch.where(masked, (1 - visible).log(), visible.log()).sum(-1)
            (l1, l2), (log_q1, log_q2) = (recon + order).detach().chunk(2), log_q.chunk(2)
            loss = nelbo + ((l1 - l2) * (log_q1 - log_q2)).sum() * per_token
        metrics = dict(nelbo=nelbo, recon=recon.sum() * per_token, order=order.sum() * per_token)
        metrics["w_spread"] = weights.std(correction=0) / weights.mean()
        return loss, {name: value.detach() for name, value in metrics.items()}
