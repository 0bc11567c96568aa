"""Optimizers: what Muon makes of gradients, and that everything is trained once."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import random_model

from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.optimizers import Muon, optimizers, orthogonalise
from othello_gpt.recipe import Recipe


@given(st.integers(0, 2**16), st.sampled_from([(6, 6), (4, 9), (9, 4)]))
def test_orthogonalising_keeps_singular_vectors_and_evens_the_values(seed, shape):
    """All singular values come near 1, in the same basis."""
    generator = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(
        torch.randn(3, *shape, generator=generator).double(), full_matrices=False
    )
    values = 0.3 + torch.rand(3, min(shape), generator=generator).double()
    rotated = U.mT @ orthogonalise(U * values[:, None] @ Vh) @ Vh.mT
    found = rotated.diagonal(dim1=-2, dim2=-1)

    assert (rotated - torch.diag_embed(found)).abs().max() < 1e-9
    assert found.min() > 0.65
    assert found.max() < 1.25


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has one from 2.9 on")
def test_heads_are_stepped_as_the_one_matrix_that_they_act_as():
    """Like torch's own Muon on the matrices of all heads (as it wants them, out by in), to bfloat16."""
    model = random_model(GPTConfig(2, 32, 2, 16, 96), dtype=torch.float32)
    (ours, _), attn, mlp = (
        optimizers(model, Recipe(games=1)),
        model.blocks[1].attn,
        model.blocks[1].mlp,
    )
    acting = {
        attn.W_Q: lambda W: torch.cat([*W], 1),  # heads side by side
        attn.W_O: lambda W: torch.cat([*W], 0),
        mlp.W_in: lambda W: W,
        mlp.W_out: lambda W: W,
    }
    theirs = {W: act(W).T.detach().clone().requires_grad_() for W, act in acting.items()}
    reference = torch.optim.Muon(theirs.values(), lr=0.02)
    before = {W: W.detach().clone() for W in acting}
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for W, act in acting.items():
            theirs[W].grad = act(W.grad).T.contiguous()
        ours.step()
        reference.step()

    for W, act in acting.items():
        moved = act(before[W]).T - act(W.detach()).T
        assert (act(W).T - theirs[W]).norm() < 0.03 * moved.norm()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_trained_by_one_optimizer(optimizer):
    """None is left out and none is stepped twice; Muon has the blocks' matrices and nothing else."""
    model = OthelloGPT(GPTConfig(2, 16, 2, 4, 24))
    made = optimizers(model, Recipe(games=1, optimizer=optimizer))
    ids = [[id(p) for group in each.param_groups for p in group["params"]] for each in made]
    matrices = [
        p for name, p in model.named_parameters() if name.split(".")[-1][:2] == "W_" and "." in name
    ]

    assert sorted(chain(*ids)) == sorted(map(id, model.parameters()))
    assert [isinstance(each, Muon) for each in made] == (
        [True, False] if optimizer == "muon" else [False]
    )
    if optimizer == "muon":
        assert sorted(ids[0]) == sorted(map(id, matrices))
