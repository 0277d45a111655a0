"""plumbing/muon.py: what a step is, by singular values, and against torch's own Muon."""

import copy

import pytest
import torch

from plumbing.muon import Muon, orthogonal


def five_times(s):
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("a,b", [(4, 9), (9, 4), (6, 6)])
def test_orthogonal_keeps_directions_and_evens_out_sizes(a, b):
    """It is U p(p(p(p(p(S))))) V^T, for S divided by the norm."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(3, a, b, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)

    S = five_times(S / (S.square().sum(-1, keepdim=True).sqrt() + 1e-7))
    assert 0.68 < S.min() and S.max() < 1.21
    torch.testing.assert_close(orthogonal(M), U * S[:, None] @ Vh, rtol=0, atol=1e-9)


def test_a_matrix_of_zeros_does_not_move():
    assert torch.equal(orthogonal(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def matrices(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = (8, 8), (8, 24), (8, 24), (40, 8)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def pull(params, step):
    """Gradients that differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).type_as(p)


def test_steps_are_those_of_torch():
    """To bfloat16, in which torch computes: it rounds by 0.4%, and the steps differ by 0.6%. torch
    scales by 0.2 where this scales by 0.5, and decays by its own learning rate."""
    ours, theirs = matrices(), matrices()
    start = [p.detach().clone() for p in ours]
    one = Muon(ours, 0.01, weight_decay=0.5)
    how = {"weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    two = torch.optim.Muon(theirs, 0.025, **how)
    for step in range(4):
        for params, optimizer in ((ours, one), (theirs, two)):
            pull(params, step)
            optimizer.step()

    for p, q, p_0 in zip(ours, theirs, start, strict=True):
        moved = p - p_0
        assert (moved - (q - p_0)).norm() < 0.01 * moved.norm()


def test_a_step_has_its_length():
    """The root of the mean square of a step is lr / 2 times singular values from 0.68 to 1.21, be
    the gradient large or small. A matrix without a gradient stays."""
    params = matrices(torch.float64)
    start = [p.detach().clone() for p in params]
    optimizer = Muon(params, 0.01)
    pull(params, 0)
    params[1].grad *= 1e-3
    params[2].grad = None
    optimizer.step()
    sizes = [(p - p_0).square().mean().sqrt().item() for p, p_0 in zip(params, start, strict=True)]
    assert sizes.pop(2) == 0 and all(0.0034 < size < 0.0061 for size in sizes)


def test_a_loaded_state_goes_on_as_the_first_one_does():
    params = matrices()
    optimizer = Muon(params, 0.01)
    pull(params, 0)
    optimizer.step()

    copies = [p.detach().clone().requires_grad_() for p in params]
    again = Muon(copies, 1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(1, 3):
        for some, how in ((params, optimizer), (copies, again)):
            pull(some, step)
            how.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
