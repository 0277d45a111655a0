"""
Muon, an optimizer for matrices (Keller Jordan and others, 2024).

The gradient with respect to a matrix is U S V^T: directions u v^T, one for each singular value in
S, which says how large it is. A few are large and most are small. Adam's steps are mostly along
the large ones. But small directions may matter as much, only more rarely. Muon takes the mean of
the last gradients, and steps along U V^T, equally far in all of its directions. What that saves
is in experiments/TRIED.md.

It is for the matrices inside a network. Embeddings, the output layer and vectors stay with AdamW.
torch.optim.Muon is the same up to the length of a step, but computes in bfloat16, which a CPU that
was not made for it does very slowly.
"""

import torch


def orthogonal(M):
    """Matrices M = U S V^T (n, a, b) -> roughly U V^T (n, a, b): all singular values but the
    tiniest become 0.7 to 1.2, and no singular value is computed.

    How? Take the polynomial p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5. A small s becomes 3.4 times
    as large, and what is between 0.7 and 1.2 stays about there. So p applied five times brings
    every s in [0.0016, 1] to about [0.7, 1.2]. With X = U S V^T and A = X X^T,

        A X = U S^3 V^T        A A X = U S^5 V^T

    so p is applied to all singular values of X by

        X  ->  3.4445 X - 4.775 A X + 2.0315 A A X  =  P X,        P = 3.4445 - 4.775 A + 2.0315 A A

    As P is symmetric, A becomes P A P. So all five P follow from the first A alone, which is
    smaller than X unless X is square, and X is multiplied once, by their product."""
    if M.shape[-2] > M.shape[-1]:
        return orthogonal(M.mT).mT

    # The root of the sum of squares is at least the largest singular value, so all are now <= 1.
    X = M / (M.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    A = X @ X.mT  # (n, a, a)
    P = product = polynomial(A)
    for _ in range(4):
        A = P @ A @ P
        P = polynomial(A)
        product = P @ product
    return product @ X


def polynomial(A):
    """P for A (n, a, a): p(s) / s, with A in the place of s^2."""
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return 3.4445 * one - 4.775 * A + 2.0315 * (A @ A)


class Muon(torch.optim.Optimizer):
    """For matrices only. The root mean square of a step is about lr / 2. AdamW's is of that order,
    so both can use one learning rate."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Matrices of one shape are made orthogonal at once, as a GPU likes large products.
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                self.move(same, group)

    def move(self, same, group):
        """Step with parameters of one shape."""
        directions = []
        for p in same:
            state = self.state[p]
            if not state:
                state["mean"] = torch.zeros_like(p)
            state["mean"].lerp_(p.grad, 1 - group["momentum"])

            # Nesterov: the mean as it would be if this gradient came once more.
            directions.append(p.grad.lerp(state["mean"], group["momentum"]))

        # An (a, b) matrix whose singular values are all 1 has the sum of squares min(a, b), so the
        # mean square 1 / max(a, b). This factor makes the root of that 0.5.
        steps = orthogonal(torch.stack(directions)) * 0.5 * max(same[0].shape) ** 0.5
        for p, step in zip(same, steps, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(step, alpha=-group["lr"])
