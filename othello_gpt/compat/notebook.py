"""What notebooks call as `transformer_lens.utils`: site names, numpy arrays, files of the hub."""

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from othello_gpt.hooks import get_act_name
from othello_gpt.weights import find_file, read_state_dict

__all__ = ["download_file_from_hf", "get_act_name", "to_numpy"]


def to_numpy(values: Any) -> np.ndarray:
    """A numpy array of a tensor on any device, with or without gradient, or of a number, list or array."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def download_file_from_hf(
    repo_name: str | Path,
    file_name: str,
    subfolder: str = ".",
    cache_dir: str | Path | None = None,
    force_is_torch: bool = False,
    **hub: Any,
) -> Any:
    """What a file of a hub repository holds: the tensors of a .pth, the data of a .json; else its path.

    A repository may also be a folder on this machine. Pickles are read with torch's restricted reader.

    Raises:
        WeightsError: it cannot be had or read, and what to do about it.
    """
    name = file_name if subfolder == "." else f"{subfolder}/{file_name}"
    path = find_file(repo_name, name, cache_dir=cache_dir, **hub)
    if force_is_torch or path.suffix in (".pth", ".pt", ".ckpt", ".safetensors"):
        return read_state_dict(path)
    return json.loads(path.read_text()) if path.suffix == ".json" else path


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(f"othello_gpt.compat.utils has no '{name}'. It has {', '.join(__all__)}.")
