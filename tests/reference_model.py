"""The TransformerLens reference: what it put out, and our model with the same weights."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from othello_gpt import GPTConfig, OthelloGPT

ROOT_NAMES = {
    "embed.W_E": "W_E",
    "pos_embed.W_pos": "W_pos",
    "unembed.W_U": "W_U",
    "unembed.b_U": "b_U",
}


@cache
def load_fixture() -> dict[str, torch.Tensor]:
    """Every tensor of `tests/reference/tl_small.safetensors`; its README explains the keys."""
    return load_file(Path(__file__).parent / "reference" / "tl_small.safetensors")


def fixture_model(dtype: torch.dtype = torch.float32) -> OthelloGPT:
    """Our model with the reference's weights, LayerNorm unfolded."""
    weights = {
        ROOT_NAMES.get(name, name): tensor
        for key, tensor in load_fixture().items()
        if (name := key.removeprefix("sd/")) != key and not name.endswith(("mask", "IGNORE"))
    }
    model = OthelloGPT(GPTConfig(n_layers=3, d_model=48, n_heads=4, d_head=12, d_mlp=96))
    model.load_state_dict(weights)
    return model.to(dtype)
