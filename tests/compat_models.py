"""Models of `othello_gpt.compat`: that of the TransformerLens reference, and copies of random ones."""

import json
from pathlib import Path
from typing import Any

import torch
from reference_model import load_fixture
from safetensors import safe_open

from othello_gpt import OthelloGPT
from othello_gpt.compat import HookedTransformer, HookedTransformerConfig


def reference(prefix: str) -> dict[str, torch.Tensor]:
    """The fixture's tensors under a prefix, by the rest of their name."""
    fixture = load_fixture()
    return {key.removeprefix(prefix): fixture[key] for key in fixture if key.startswith(prefix)}


def reference_metadata() -> dict[str, Any]:
    """The configuration and the labels that TransformerLens gave."""
    path = Path(__file__).parent / "reference" / "tl_small.safetensors"
    with safe_open(path, "pt") as file:
        return {key: json.loads(file.metadata()[key]) for key in ("config", "labels")}


def reference_hooked(dtype: torch.dtype = torch.float32, **folding: bool) -> HookedTransformer:
    """The reference's model, loaded as a notebook would; with keywords, processed on loading."""
    cfg = HookedTransformerConfig(**reference_metadata()["config"], dtype=dtype)
    model = HookedTransformer(cfg)
    if folding:
        model.load_and_process_state_dict(reference("sd/"), **folding)
    else:
        model.load_state_dict(reference("sd/"))
    return model


FOLD_ONLY = dict(center_writing_weights=False, center_unembed=False, fold_value_biases=False)


def hooked(model: OthelloGPT) -> HookedTransformer:
    """The same sizes, weights and precision under TransformerLens's names."""
    twin = HookedTransformer(model.cfg).to(model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin
