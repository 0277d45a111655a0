"""
Muon, an optimizer for matrices (Keller Jordan and others, 2024).

The gradient of a matrix is a sum of few directions that are large and many that are small. Adam
looks at each number by itself, so its steps are mostly along the large ones, too. Muon moves as far
along the small ones: it takes the mean of the last gradients apart, U S V^T, and leaves the sizes S
out. A model that learns with Adam in 3,000 steps learns the same in 1,000 to 1,500 with Muon.

It is for the matrices inside a network. Embeddings, the last layer and vectors stay with AdamW.
torch.optim.Muon is the same, but always computes in bfloat16. A CPU that has no bfloat16 would wait
ten to a hundred times as long for it.
"""

import torch


def orthogonal(M):
    """Matrices M = U S V^T (n, a, b) -> roughly U V^T (n, a, b): their singular values become
    numbers between 0.7 and 1.2, without taking them apart.

    How? For a singular value s between 0 and 1, the polynomial p(s) = 3.4445 s - 4.775 s^3 +
    2.0315 s^5 is larger than s while s is small, and about 1 where s is about 1. Five times p
    takes 0.002 to 0.7. A polynomial of a matrix is one of its singular values: with A = X X^T,

        X  ->  3.4445 X - 4.775 A X + 2.0315 A A X  =  P X

    leaves U and V as they are. So X = P_5 P_4 .. P_1 M. The product of the P is made first, as all
    of them follow from A, which is square and small, since A becomes P A P."""
    if M.shape[-2] > M.shape[-1]:
        return orthogonal(M.mT).mT

    # Divided by a bound on the largest of them, singular values are at most 1.
    X = M / (M.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    A = X @ X.mT  # (n, a, a)
    product = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for step in range(5):
        P = 3.4445 * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        P = P - 4.775 * A + 2.0315 * (A @ A)
        product = P @ product
        if step < 4:
            A = P @ A @ P
    return product @ X


class Muon(torch.optim.Optimizer):
    """For matrices only. A step moves each number by lr / 2, as root of the mean square. Adam moves
    it by lr at the most, so both can use one learning rate."""

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

            # Once more towards the mean of the gradients, where the next step will go: Nesterov.
            directions.append(p.grad.lerp(state["mean"], group["momentum"]))

        # The mean square of an orthogonal matrix (a, b) is 1 / max(a, b).
        steps = orthogonal(torch.stack(directions)) * 0.5 * max(same[0].shape) ** 0.5
        for p, step in zip(same, steps, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(step, alpha=-group["lr"])
