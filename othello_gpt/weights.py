"""Checkpoints: which layout, converted, checked, folded; and where they come from and go to.

Three layouts hold the same model: TransformerLens's (`synthetic_model.pth`), minGPT's (`gpt_synthetic.ckpt`,
the original training code), and ours, whose names are TransformerLens's but for W_E, W_pos, W_U and b_U.
All are read into a plain dictionary of our names, checked as a whole, folded, and only then put into a model.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from othello_gpt.model import GPTConfig, OthelloGPT

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


class WeightsError(ValueError):
    """Weights that cannot be had or used: what was found, what was expected, how to mend it."""


class _NoSuchFile(WeightsError):
    """A repository of the hub that has other files."""


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"  # the index lists shards
_SHIPPED = ("small", "full")
_IN_CACHE = r"\bmodels--[^/]+/snapshots/[0-9a-f]{40}/"  # of the hub's client


# --- Layouts ----------------------------------------------------------------------------------------

_TL_ROOT = {
    "embed.W_E": "W_E",
    "pos_embed.W_pos": "W_pos",
    "unembed.W_U": "W_U",
    "unembed.b_U": "b_U",
}
_TL_BUFFERS = (".attn.mask", ".attn.IGNORE")


def detect_layout(state_dict: Mapping[str, Tensor]) -> str:
    """ "transformer_lens", "mingpt" or "othello_gpt", by the name of the token embedding."""
    marks = {"embed.W_E": "transformer_lens", "tok_emb.weight": "mingpt", "W_E": "othello_gpt"}
    for mark, layout in marks.items():
        if mark in state_dict:
            return layout
    raise WeightsError(
        f"the checkpoint has no token embedding under {', '.join(marks)}; its first names are "
        f"{', '.join(list(state_dict)[:4])}. Layouts of TransformerLens, minGPT and othello-gpt can be read."
    )


def convert(
    checkpoint: Mapping[str, Tensor], n_heads: int | None = None
) -> tuple[GPTConfig, StateDict]:
    """The sizes and the weights, under our names, of a checkpoint in any layout.

    Args:
        checkpoint: a state dict; buffers and the `module.` of DataParallel are dropped.
        n_heads: for the minGPT layout, which does not tell; 8 by default, as published.

    Raises:
        WeightsError: lists every tensor that is missing, extra, misshapen or not finite.
    """
    stored = {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    layout = detect_layout(stored)
    if layout == "mingpt":
        stored = _from_mingpt(stored, 8 if n_heads is None else n_heads)
    elif layout == "transformer_lens":
        stored = _from_transformer_lens(stored)
    cfg = _infer_config(stored)
    _check(stored, cfg)
    return cfg, stored


def _from_transformer_lens(stored: StateDict) -> StateDict:
    ours = {_TL_ROOT.get(k, k): v for k, v in stored.items() if not k.endswith(_TL_BUFFERS)}
    W_E = ours["W_E"]
    if not any(
        ".ln1." in name for name in ours
    ):  # LayerNorm is folded: its weight is 1, its bias 0
        blocks = {name.split(".")[1] for name in ours if name.startswith("blocks.")}
        norms = [f"blocks.{i}.{ln}" for i in blocks for ln in ("ln1", "ln2")] + ["ln_final"]
        for norm in norms:
            ours[f"{norm}.w"] = torch.ones_like(W_E[0])
            ours[f"{norm}.b"] = torch.zeros_like(W_E[0])
    return ours


_MINGPT_NAMES = {  # theirs: ours, and whether an nn.Linear's (out, in) has to be transposed
    "ln1.weight": ("ln1.w", False),
    "ln1.bias": ("ln1.b", False),
    "ln2.weight": ("ln2.w", False),
    "ln2.bias": ("ln2.b", False),
    "attn.proj.bias": ("attn.b_O", False),
    "mlp.0.weight": ("mlp.W_in", True),
    "mlp.0.bias": ("mlp.b_in", False),
    "mlp.2.weight": ("mlp.W_out", True),
    "mlp.2.bias": ("mlp.b_out", False),
}


def _from_mingpt(stored: StateDict, n_heads: int) -> StateDict:
    ours: StateDict = {}
    for name, tensor in stored.items():
        prefix, _, rest = name.rpartition("blocks.")[2].partition(".")
        block = f"blocks.{prefix}"
        if not name.startswith("blocks."):
            ours.update(_mingpt_root(name, tensor))
        elif rest in _MINGPT_NAMES:
            our_name, transposed = _MINGPT_NAMES[rest]
            ours[f"{block}.{our_name}"] = tensor.T if transposed else tensor
        elif rest.startswith("attn.") and rest != "attn.mask":
            ours.update(_mingpt_heads(block, rest.removeprefix("attn."), tensor, n_heads))
        elif rest != "attn.mask":
            ours[name] = tensor  # unknown: reported with the rest
    if "W_U" in ours:
        ours["b_U"] = torch.zeros_like(ours["W_U"][0])  # minGPT's head has no bias
    return ours


def _mingpt_root(name: str, tensor: Tensor) -> StateDict:
    if name == "pos_emb":
        return {"W_pos": tensor.reshape(-1, tensor.shape[-1])}
    if name == "head.weight":
        return {"W_U": tensor.T}
    names = {"tok_emb.weight": "W_E", "ln_f.weight": "ln_final.w", "ln_f.bias": "ln_final.b"}
    return {names.get(name, name): tensor}


def _mingpt_heads(block: str, rest: str, tensor: Tensor, n_heads: int) -> StateDict:
    if n_heads < 1 or tensor.shape[-1] % n_heads or tensor.shape[0] % n_heads:
        raise WeightsError(
            f"{block}.attn.{rest} has shape {tuple(tensor.shape)}, which {n_heads} heads do not divide. "
            "The minGPT layout does not say how many heads there are: give `n_heads=`."
        )
    if rest == "proj.weight":
        return {f"{block}.attn.W_O": rearrange(tensor, "m (i h) -> i h m", i=n_heads)}
    letters = {"query": "Q", "key": "K", "value": "V"}
    which, _, kind = rest.partition(".")
    if which not in letters or kind not in ("weight", "bias"):
        return {f"{block}.attn.{rest}": tensor}
    if kind == "bias":
        bias = rearrange(tensor, "(i h) -> i h", i=n_heads)
        return {f"{block}.attn.b_{letters[which]}": bias}
    return {f"{block}.attn.W_{letters[which]}": rearrange(tensor, "(i h) m -> i m h", i=n_heads)}


def _infer_config(ours: StateDict) -> GPTConfig:
    """The sizes, read from the shapes of the tensors that hold them."""
    needed = {
        "W_E": 2,
        "W_pos": 2,
        "blocks.0.attn.W_Q": 3,
        "blocks.0.mlp.W_in": 2,
    }  # and their axes
    if missing := [name for name in needed if name not in ours]:
        raise WeightsError(f"the checkpoint lacks {', '.join(missing)}, so its sizes are unknown.")
    if misshapen := [name for name, axes in needed.items() if ours[name].ndim != axes]:
        listed = ", ".join(f"{name} {tuple(ours[name].shape)}" for name in misshapen)
        raise WeightsError(
            f"the checkpoint's sizes are unknown, for these have too many or few axes: {listed}."
        )
    (d_vocab, d_model), n_ctx = ours["W_E"].shape, ours["W_pos"].shape[0]
    n_heads, _, d_head = ours["blocks.0.attn.W_Q"].shape
    layers = {int(match[1]) for name in ours if (match := re.match(r"blocks\.(\d+)\.", name))}
    return GPTConfig(
        max(layers) + 1,
        d_model,
        n_heads,
        d_head,
        ours["blocks.0.mlp.W_in"].shape[1],
        d_vocab,
        n_ctx,
    )


def _check(ours: StateDict, cfg: GPTConfig) -> None:
    """Every tensor there, none besides, each of the right shape and finite; else one error that lists all."""
    expected = {name: tensor.shape for name, tensor in _empty_model(cfg).state_dict().items()}
    problems = [f"missing: {name} {tuple(expected[name])}" for name in expected if name not in ours]
    for name, tensor in ours.items():
        if name not in expected:
            problems.append(f"not expected: {name} {tuple(tensor.shape)}")
        elif tensor.shape != expected[name]:
            problems.append(f"{name}: {tuple(tensor.shape)}, expected {tuple(expected[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"{name}: {tensor.dtype}, expected floating point")
        elif not tensor.isfinite().all():
            problems.append(f"{name}: holds nan or infinity")
    if problems:
        listed = "\n  ".join(problems)
        raise WeightsError(
            f"the checkpoint does not fit a model of its own sizes ({cfg}):\n  {listed}"
        )


def _empty_model(cfg: GPTConfig) -> OthelloGPT:
    with torch.device("meta"):
        return OthelloGPT(cfg)


def to_transformer_lens(model: OthelloGPT) -> StateDict:
    """The model's weights under TransformerLens's names, LayerNorm's included (configuration "LN"), and buffers."""
    theirs = {ours: name for name, ours in _TL_ROOT.items()}
    stored = {theirs.get(k, k): v.detach().contiguous() for k, v in model.state_dict().items()}
    for i, block in enumerate(model.blocks):  # what `load_state_dict` of TransformerLens insists on
        stored[f"blocks.{i}.attn.mask"] = ~block.attn.future
        stored[f"blocks.{i}.attn.IGNORE"] = torch.tensor(-torch.inf)
    return stored


# --- Folding ----------------------------------------------------------------------------------------


class FoldStep(NamedTuple):
    """One step of folding and the largest change of any weight that it made."""

    name: str
    largest_change: float


class FoldReport(NamedTuple):
    """What folding changed, step by step. Log-probabilities stay as they were."""

    steps: tuple[FoldStep, ...]

    def __str__(self) -> str:
        return "\n".join(f"{step.name:24} {step.largest_change:10.3g}" for step in self.steps)


def fold(state_dict: StateDict) -> tuple[StateDict, FoldReport]:
    """The same model with all that has no effect removed from its weights, and what that changed.

    Log-probabilities stay; logits move by a constant at each position, and every figure in weight space
    changes: those of the literature assume folded weights. Folding twice changes nothing.
    """
    steps = []
    for step in (fold_layer_norm, fold_value_biases, center_writing_weights, center_unembed):
        folded = step(state_dict)
        moved = [k for k in folded if folded[k] is not state_dict[k]]
        change = max((folded[k] - state_dict[k]).abs().max().item() for k in moved)
        steps.append(FoldStep(step.__name__, change))
        state_dict = folded
    return state_dict, FoldReport(tuple(steps))


def _reading_weights(state_dict: StateDict) -> list[tuple[str, str, str]]:
    """Every matrix that reads a normalised stream: the LayerNorm before it, its own name, its bias's."""
    n_layers = sum(name.endswith("attn.W_Q") for name in state_dict)
    reads = [("ln_final", "W_U", "b_U")]
    for i in range(n_layers):
        reads += [
            (f"blocks.{i}.ln1", f"blocks.{i}.attn.W_{x}", f"blocks.{i}.attn.b_{x}") for x in "QKV"
        ]
        reads.append((f"blocks.{i}.ln2", f"blocks.{i}.mlp.W_in", f"blocks.{i}.mlp.b_in"))
    return reads


def fold_layer_norm(state_dict: StateDict) -> StateDict:
    """LayerNorm's weight and bias moved into the matrices that read it, which are then centred.

    LayerNorm removes the mean of what it is given, so a matrix's mean over d_model never has an effect.
    """
    folded = dict(state_dict)
    for ln, W_name, b_name in _reading_weights(state_dict):
        w, b, W = state_dict[f"{ln}.w"], state_dict[f"{ln}.b"], state_dict[W_name]
        folded[b_name] = state_dict[b_name] + torch.einsum("m,...mo->...o", b, W)
        W = w[:, None] * W
        folded[W_name] = W - W.mean(-2, keepdim=True)
        folded[f"{ln}.w"], folded[f"{ln}.b"] = torch.ones_like(w), torch.zeros_like(b)
    return folded


def fold_value_biases(state_dict: StateDict) -> StateDict:
    """Value biases moved into b_O: a pattern's rows sum to 1, so they add the same everywhere."""
    folded = dict(state_dict)
    for name in [name for name in state_dict if name.endswith("attn.b_V")]:
        attn = name.removesuffix("b_V")
        b_V, W_O = state_dict[name], state_dict[f"{attn}W_O"]
        folded[f"{attn}b_O"] = state_dict[f"{attn}b_O"] + torch.einsum("ih,ihm->m", b_V, W_O)
        folded[name] = torch.zeros_like(b_V)
    return folded


_WRITING = ("W_E", "W_pos", ".W_O", ".b_O", ".W_out", ".b_out")


def center_writing_weights(state_dict: StateDict) -> StateDict:
    """What is written to the stream, without its mean over d_model, which every LayerNorm removes."""
    return {
        name: W - W.mean(-1, keepdim=True) if name.endswith(_WRITING) else W
        for name, W in state_dict.items()
    }


def center_unembed(state_dict: StateDict) -> StateDict:
    """Logits without their mean over tokens, which the softmax removes."""
    W_U, b_U = state_dict["W_U"], state_dict["b_U"]
    return state_dict | {"W_U": W_U - W_U.mean(1, keepdim=True), "b_U": b_U - b_U.mean()}


# --- Loading ----------------------------------------------------------------------------------------


def load_pretrained(
    source: str | Path | None = None,
    *,
    model_class: type[OthelloGPT] = OthelloGPT,
    filename: str | None = None,
    fold: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    n_heads: int | None = None,
    sha256: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> OthelloGPT:
    """A model with trained weights, in evaluation mode.

    Args:
        source: None or "small" for the weights that ship in the package; "full" for those of the published
            size, a file set of their own; a file (.safetensors, .pth, .ckpt, .pt); a folder made by
            `save_pretrained`; or a repository of the Hugging Face hub, "owner/name".
        filename: the file in a folder or repository, by default model.safetensors, or else the shards that
            model.safetensors.index.json lists.
        fold: fold LayerNorm and centre weights, as the literature's figures assume; see `fold`.
        n_heads: for the minGPT layout, which does not tell; 8 by default. Of a layout that tells, it must be the same.
        sha256: of the file, or of all shards one after another; another one is an error, and a wrong
            download leaves the hub's cache.
        revision, cache_dir, local_files_only, endpoint, token: as in `huggingface_hub.hf_hub_download`. A
            40-digit commit as `revision` is never looked up again; HF_HUB_OFFLINE is respected.

    Raises:
        WeightsError: whatever goes wrong, with what to do about it.
    """
    hub = dict(
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        endpoint=endpoint,
        token=token,
    )
    path = find_file(source, filename, **hub)
    check_sha256(path, sha256)
    cfg, state_dict = convert(read_state_dict(path), n_heads)
    check_n_heads(cfg, n_heads)
    cfg = with_stored_eps(cfg, path)
    state_dict = {name: tensor.double() for name, tensor in state_dict.items()}
    if fold:
        state_dict, report = _fold(state_dict)
        logger.info("folded the weights of %s; largest changes:\n%s", path.name, report)
    model = model_class(cfg).to(dtype)
    model.load_state_dict(state_dict)
    return model.to(device).eval()


_fold = fold


def find_file(source: str | Path | None, filename: str | None = None, **hub) -> Path:
    """Where the weights lie on this machine, after a download if need be."""
    path = Path(source or "small")
    if source is None or (str(source) in _SHIPPED and not path.exists()):
        path = _shipped(path.name)
    if hub.get("revision") and path.exists():
        raise WeightsError(f"'{path}' lies here and has no revisions: leave out `revision=`.")
    if path.is_file():
        if filename:
            raise WeightsError(
                f"'{path}' is a file itself: leave out `filename=`, or give its folder."
            )
        return path
    names = [filename] if filename else [_SINGLE, _INDEX]
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise WeightsError(
            f"the folder '{path}' has no {names[0]}. Give `filename=` or the file itself."
        )
    is_file_name = path.suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
    if len(path.parts) != 2 or is_file_name or str(source).startswith((".", "/", "~")):
        raise WeightsError(
            f"'{source}' is no file and no folder here, nor a repository of the hub, which is 'owner/name'."
        )
    try:
        return _from_hub(str(source), names[0], **hub)
    except WeightsError as error:
        if not isinstance(error, _NoSuchFile):  # shards may lie in the cache, but the hub was asked
            hub["local_files_only"] = True
        for name in names[1:]:
            with suppress(WeightsError):
                return _from_hub(str(source), name, **hub)
        raise


def _shipped(name: str) -> Path:
    """The folder of weights that come with the project, under their name."""
    folder = Path(str(resources.files("othello_gpt"))) / "assets" / name
    if not folder.is_dir():
        raise WeightsError(
            f"the weights '{name}' are a file set of their own, to lie in '{folder}', which is not there: "
            f"copy othello_gpt/assets/{name} of the project's repository, or give the folder where you have it."
        )
    return folder


def _from_hub(repo_id: str, filename: str, **hub) -> Path:
    from huggingface_hub import errors, hf_hub_download

    logger.info("asking the hub for %s of %s", filename, repo_id)
    try:
        path = Path(hf_hub_download(repo_id, filename, **hub))
        for shard in _shard_names(path):
            hf_hub_download(repo_id, shard, **hub)
        if filename in (_SINGLE, _INDEX):
            with suppress(errors.EntryNotFoundError):  # the tensors tell the sizes as well
                hf_hub_download(repo_id, "config.json", **hub)
        return path
    except errors.RepositoryNotFoundError as error:
        advice = "check its name; a private one needs `token=`"
        cause = error
    except errors.RevisionNotFoundError as error:
        advice, cause = f"it has no revision {hub.get('revision')!r}: check `revision=`", error
    except errors.LocalEntryNotFoundError as error:
        advice = (
            "it is not in the local cache and the hub cannot be reached or is switched off "
            "(`local_files_only`, HF_HUB_OFFLINE): go online once, or give a file"
        )
        cause = error
    except errors.EntryNotFoundError as error:
        raise _NoSuchFile(
            f"cannot have {filename} of '{repo_id}': the repository has no file {filename}: "
            "give `filename=`."
        ) from error
    except Exception as error:  # whatever HTTP library the client uses raises errors of its own
        advice, cause = f"the download failed ({type(error).__name__}: {error}): try again", error
    raise WeightsError(f"cannot have {filename} of '{repo_id}': {advice}.") from cause


def check_sha256(path: Path, expected: str | None) -> str:
    """The file's sha256; a wrong one is an error, and is removed if it lies in the hub's cache."""
    parts, digest = _parts(path), hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    found = digest.hexdigest()
    logger.info("sha256 of %s: %s", path.name, found)
    if expected is not None and found != expected.lower():
        in_cache = re.search(_IN_CACHE, path.as_posix())
        for part in parts if in_cache else []:
            part.resolve().unlink()
            part.unlink(missing_ok=True)
        note = "It was removed from the cache: load again." if in_cache else "Fetch it again."
        raise WeightsError(f"'{path.name}' has sha256 {found}, expected {expected}. {note}")
    return found


def _shard_names(path: Path) -> list[str]:
    """What an index lists; nothing for a file that holds weights itself."""
    if path.name != _INDEX:
        return []
    try:
        listed = set(json.loads(path.read_text())["weight_map"].values())
        if not listed:
            raise ValueError("it lists none")
        return sorted(path.with_name(name).name for name in listed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"'{path}' is no index of shards ({error!r}): fetch it again."
        ) from error


def _parts(path: Path) -> list[Path]:
    """The files that hold the weights: the shards of an index, or the file itself."""
    parts = [path.with_name(name) for name in _shard_names(path)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise WeightsError(
            f"'{path}' lists {', '.join(missing)}, which is not beside it: fetch all its shards."
        )
    return parts or [path]


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a file, or of all shards of an index.

    Pickles are read with torch's restricted reader, never in full.
    """
    return {name: tensor for part in _parts(path) for name, tensor in _read_file(part).items()}


def _read_file(path: Path) -> StateDict:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        with path.open("rb") as file:
            head = file.read(40)
        raise WeightsError(f"'{path}' cannot be read: {_what_it_is(head, error)}") from error
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise WeightsError(f"'{path}' holds {type(stored).__name__}, not a dictionary of tensors.")
    return stored


def _what_it_is(head: bytes, error: Exception) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file with `git lfs pull`."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, not weights; download the raw file."
    if isinstance(error, SafetensorError) or head.startswith(b"PK"):
        return f"it is damaged or cut short ({type(error).__name__}); download it again."
    return (
        "it is no safetensors file, nor a pickle that holds nothing but tensors. A pickle with code in it "
        "can do anything to your machine; ask its author for a state dict."
    )


def check_n_heads(cfg: GPTConfig, n_heads: int | None) -> None:
    """A number of heads that the tensors contradict is an error."""
    if n_heads not in (None, cfg.n_heads):
        raise WeightsError(
            f"`n_heads` is {n_heads}, but the checkpoint has {cfg.n_heads} heads: give that, or leave it out."
        )


def with_stored_eps(cfg: GPTConfig, path: Path) -> GPTConfig:
    """The sizes that the tensors of a file have, with the eps of its config.json, which must agree."""
    stored = _stored_config(path) or cfg
    if stored != replace(cfg, eps=stored.eps):
        raise WeightsError(f"config.json beside '{path}' says {stored}, but its tensors {cfg}.")
    return stored


def _stored_config(path: Path) -> GPTConfig | None:
    """The sizes in the config.json beside model.safetensors or its shards."""
    config = path.with_name("config.json")
    if path.name not in (_SINGLE, _INDEX) or not config.exists():
        return None
    try:
        sizes = json.loads(config.read_text())
    except ValueError as error:
        raise WeightsError(f"'{config}' is not JSON: {error}") from error
    if not isinstance(sizes, dict):
        raise WeightsError(f"'{config}' holds {sizes!r}, not an object of sizes by their names.")
    kinds = {field.name: (int, field.type) for field in fields(GPTConfig)}  # an int is a float
    if unknown := set(sizes) - set(kinds):
        raise WeightsError(f"'{config}' has unknown keys: {', '.join(sorted(unknown))}.")
    if wrong := [name for name, size in sizes.items() if type(size) not in kinds[name]]:
        raise WeightsError(
            f"'{config}': `{wrong[0]}` is {sizes[wrong[0]]!r}, but must be a number, whole unless it is eps."
        )
    try:
        return GPTConfig(**sizes)
    except ValueError as error:
        raise WeightsError(f"'{config}': {error}") from error


# --- Saving -----------------------------------------------------------------------------------------

_CARD = """---
license: mit
library_name: othello-gpt
tags: [othello-gpt, mechanistic-interpretability]
---
# Othello-GPT

{n_layers} layers, d_model {d_model}, {n_heads} heads of {d_head}, d_mlp {d_mlp}; {n_parameters:,} parameters.

    from othello_gpt import OthelloGPT
    model = OthelloGPT.from_pretrained("this folder or repository")
"""


def save_pretrained(
    model: OthelloGPT,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 2**32,
    card: str | None = None,
) -> None:
    """Writes config.json, README.md and model.safetensors; each appears whole or not at all.

    Args:
        dtype: of the tensors in the file; the model's own by default.
        shard_bytes: weights of more bytes than this become shards of at most as many, listed in
            model.safetensors.index.json, as on the hub.
        card: the README; one that tells the sizes by default.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for name, its_tensors in split.filename_to_tensors.items():
        save_file(
            {key: tensors[key] for key in its_tensors}, folder / f"{name}.partial", {"format": "pt"}
        )
    if split.is_sharded:
        (folder / _INDEX).unlink(missing_ok=True)  # half of the old shards must not load
    for name in split.filename_to_tensors:
        os.replace(folder / f"{name}.partial", folder / name)
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    texts = {
        "config.json": json.dumps(asdict(model.cfg), indent=2) + "\n",
        "README.md": card or _CARD.format(**asdict(model.cfg), n_parameters=n_parameters),
    } | ({_INDEX: json.dumps(index, indent=2) + "\n"} if split.is_sharded else {})
    for name, text in texts.items():
        write_text(folder / name, text)
    for old in [folder / _SINGLE, folder / _INDEX, *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in {*split.filename_to_tensors, *texts}:
            old.unlink(missing_ok=True)  # of a model that was saved here before, in other files


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def push_to_hub(
    model: OthelloGPT,
    repo_id: str,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    private: bool = False,
) -> str:
    """Uploads what `save_pretrained` writes, making the repository if need be; returns the commit's address."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder).commit_url)
