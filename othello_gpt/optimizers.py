"""The optimizers of a training run: Muon for the matrices of the blocks, AdamW for the rest."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from othello_gpt.model import OthelloGPT
from othello_gpt.recipe import Recipe


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each step changes a matrix by about its learning rate in every direction.

    A group is matrices of one shape, all layers', stepped together. (`torch.optim.Muon` takes 2-D parameters,
    one by one, but the weights of all heads act as one matrix: `acts_as` is the einops pattern that says how.)

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **defaults: float) -> None:
        super().__init__(groups, {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1} | defaults)
        self.dtype = dtype  # of the orthogonalisation

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradient = torch.stack([p.grad for p in parameters])  # [layer, ...]
            state = self.state[parameters[0]]  # the whole group's
            if not state:
                state["velocity"] = torch.zeros_like(gradient)
            velocity = state["velocity"].lerp_(gradient, 1 - momentum)
            change = self._orthogonalised(gradient.lerp_(velocity, momentum), group["acts_as"])
            for parameter, its_change in zip(parameters, change, strict=True):
                parameter.mul_(1 - lr * group["weight_decay"]).sub_(its_change, alpha=lr)

    def _orthogonalised(self, stacked: Tensor, acts_as: str) -> Tensor:
        shape, matrix = acts_as.split("->")
        sizes = dict(zip(shape.split(), stacked.shape[1:], strict=True))
        change = orthogonalise(rearrange(stacked, f"l {shape} -> l {matrix}").to(self.dtype))
        n_in, n_out = change.shape[1:]
        change = change * max(1, n_out / n_in) ** 0.5
        return rearrange(change, f"l {matrix} -> l {shape}", **sizes).to(stacked.dtype)


def orthogonalise(matrices: Float[Tensor, "layer d_in d_out"]) -> Float[Tensor, "layer d_in d_out"]:
    """Matrices with the singular vectors of these and all singular values near 1, within 0.7 to 1.2.

    Source: as `Muon`; five steps of Newton and Schulz's iteration with the coefficients given there.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    X = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # X <- a X + b (X X') X + c (X X')^2 X
        gram = X @ X.mT
        odd = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, odd, X, beta=3.4445)
    return X if wide is matrices else X.mT


_ACTS_AS = {  # the matrices of a block
    ("attn.W_Q", "attn.W_K", "attn.W_V"): "head d_model d_head -> d_model (head d_head)",
    ("attn.W_O",): "head d_head d_model -> (head d_head) d_model",
    ("mlp.W_in",): "d_model d_mlp -> d_model d_mlp",
    ("mlp.W_out",): "d_mlp d_model -> d_mlp d_model",
}


def optimizers(model: OthelloGPT, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """What trains the model's parameters: every one of them, by exactly one optimizer."""
    rest, made = dict(model.named_parameters()), []
    if recipe.optimizer == "muon":
        groups = []
        for names, acts_as in _ACTS_AS.items():
            matrices = [rest.pop(name) for name in list(rest) if name.endswith(names)]
            groups.append({"params": matrices, "acts_as": acts_as})
        made.append(Muon(groups, torch.bfloat16 if recipe.bf16 else torch.float32, lr=recipe.lr))
    made.append(torch.optim.AdamW(rest.values(), lr=recipe.adam_lr, betas=(0.9, 0.95)))
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["full_lr"] = group["lr"]
    return made
