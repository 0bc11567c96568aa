"""What hypothesis draws of models: small configurations, models with nothing trivial in them, tokens."""

import torch
from hypothesis import strategies as st

from othello_gpt import GPTConfig, OthelloGPT


@st.composite
def tiny_configs(draw) -> GPTConfig:
    """One to three layers, one to four heads, every size small and drawn by itself."""
    size = st.integers(1, 4)
    return GPTConfig(
        n_layers=draw(st.integers(1, 3)),
        d_model=draw(st.integers(2, 12)),
        n_heads=draw(size),
        d_head=draw(size),
        d_mlp=draw(st.integers(1, 16)),
    )


def random_model(cfg: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> OthelloGPT:
    """A model whose every weight, bias and LayerNorm weight is random and matters."""
    generator = torch.Generator().manual_seed(seed)
    model = OthelloGPT(cfg).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if name.endswith(("ln1.w", "ln2.w", "ln_final.w")) else 0.0
            parameter.copy_(centre + 0.4 * noise)
    return model


@st.composite
def models(draw, dtype: torch.dtype = torch.float64) -> OthelloGPT:
    """Random models of tiny configurations."""
    return random_model(draw(tiny_configs()), draw(st.integers(0, 2**16)), dtype)


@st.composite
def token_batches(draw, max_batch: int = 3, min_pos: int = 1, max_pos: int = 8) -> torch.Tensor:
    """Tokens [batch pos], any of 0 to 60: the model asks for no legal games."""
    n_batch, n_pos = draw(st.integers(1, max_batch)), draw(st.integers(min_pos, max_pos))
    row = st.lists(st.integers(0, 60), min_size=n_pos, max_size=n_pos)
    return torch.tensor(draw(st.lists(row, min_size=n_batch, max_size=n_batch)))
