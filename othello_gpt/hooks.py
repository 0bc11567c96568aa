"""The hook registry: sites are named where they are made, and hooks live inside a `with`.

A module of the model calls `self.tap("hook_z", z)` where it makes `z`. Nothing listens: the value comes
straight back, at the cost of one test. Something listens: the functions attached to that site are called
in the order of attaching, each sees the value, and may change it in place or return another in its place.

A site's full name is the path of its module in the model plus the literal: `blocks.3.attn.hook_z`.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from jaxtyping import Shaped
from torch import Tensor, nn


class HookPoint(NamedTuple):
    """Where a hook was called: `name` is the site's full name."""

    name: str

    def layer(self) -> int:
        """The block that the site belongs to, 0 for the first."""
        match = re.match(r"blocks\.(\d+)\.", self.name)
        if match is None:
            raise ValueError(f"'{self.name}' belongs to no block, so it has no layer.")
        return int(match[1])


# What can be attached: called as `fn(activation, hook=point)`, so its second parameter must be named `hook`.
# It may change the activation in place, return another tensor to replace it, or return None having only looked.
HookFn = Callable[..., Tensor | None]

SiteFilter = str | Callable[[str], bool] | Iterable[str]


class UnknownSite(KeyError):
    """A name that is no hook site, with the nearest ones that are."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0])


class HookRegistry:
    """The hooks attached to one model, by the full name of their site.

    The registry belongs to the model, so two threads must not hook one model at once. A copied or
    unpickled model starts with an empty one.
    """

    def __init__(self) -> None:
        self.hooks: dict[str, tuple[HookFn, ...]] = {}

    def run(self, site: str, value: Tensor) -> Tensor:
        """The value that leaves the site, after all its hooks."""
        point = HookPoint(site)
        for hook in self.hooks.get(site, ()):
            try:
                replacement = hook(value, hook=point)
            except Exception as error:
                error.add_note(f"raised by a hook on '{site}'")
                raise
            if replacement is not None:
                value = _same_kind(replacement, value, site)
        return value

    @contextmanager
    def attached(self, hooks: Iterable[tuple[str, HookFn]]) -> Iterator[None]:
        """Attaches (full name, function) pairs after those already there, and restores the state on leaving."""
        before = self.hooks
        self.hooks = dict(before)
        for site, hook in hooks:
            self.hooks[site] = (*self.hooks.get(site, ()), hook)
        try:
            yield
        finally:
            self.hooks = before

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return HookRegistry, ()


def _same_kind(replacement: object, value: Tensor, site: str) -> Tensor:
    if not isinstance(replacement, Tensor):
        raise TypeError(
            f"a hook on '{site}' returned {type(replacement).__name__}. "
            "Return a tensor to replace the activation, or None to keep it."
        )
    kinds = [(tuple(t.shape), t.dtype, t.device) for t in (replacement, value)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"a hook on '{site}' returned {kind(replacement)}, but the activation there is {kind(value)}. "
            "A replacement must have the same shape, dtype and device: "
            "use `.expand_as(activation)` or `.to(activation)`."
        )
    return replacement


def kind(tensor: Tensor) -> str:
    """Shape, dtype and device in words, for messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


class Tapped(nn.Module):
    """A module whose activations can be seen and changed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = HookRegistry()
        self.path = ""

    def tap(self, site: str, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The value that goes on from this site: `value` itself unless a hook replaces it."""
        if self.registry.hooks:
            return self.registry.run(self.path + site, value)
        return value

    def is_hooked(self, site: str) -> bool:
        """Whether somebody listens to this site: for values that are made only on request."""
        return self.path + site in self.registry.hooks


def share_registry(root: Tapped) -> None:
    """Gives every tapped module below `root` the root's registry, and its own path as the prefix of its sites."""
    for path, module in root.named_modules():
        if isinstance(module, Tapped):
            module.registry = root.registry
            module.path = f"{path}." if path else ""


class EverySite(dict[str, tuple[HookFn, ...]]):
    """Stands in for a registry's hooks during a dry run: listens to every site and keeps its name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __bool__(self) -> bool:
        return True

    def __contains__(self, site: object) -> bool:
        return True

    def get(self, site: str, default: object = None) -> tuple[HookFn, ...]:
        self.names.append(site)
        return ()


def select_sites(which: SiteFilter, names: Sequence[str]) -> list[str]:
    """The full names that `which` stands for: a name, several, or a predicate on names.

    Short names (`"resid_post3"`, `"k6"`) are understood. A name that is no site, or a predicate that holds
    for none, is an error: a silent nothing is the worst answer.
    """
    if isinstance(which, str):
        return [_full_name(which, names)]
    if not callable(which):
        return [_full_name(name, names) for name in which]
    selected = [name for name in names if which(name)]
    if not selected:
        raise ValueError(
            "the predicate holds for none of the model's hook sites. "
            f"They look like '{names[0]}' and '{names[len(names) // 2]}'; `model.hook_names` lists them."
        )
    return selected


def _full_name(name: str, names: Sequence[str]) -> str:
    for candidate in (name, get_act_name(name)):
        if candidate in names:
            return candidate
    raise UnknownSite(unknown_site_message(name, names))


def unknown_site_message(name: str, names: Sequence[str]) -> str:
    """Says that `name` is no site, and which names come near it."""
    near = difflib.get_close_matches(name, names, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"no hook site named '{name}'.{hint} `model.hook_names` lists every site."


_ATTENTION_SITES = ("q", "k", "v", "z", "attn_scores", "pattern", "result")
_MLP_SITES = ("pre", "post")
_SITE_ALIASES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
_PART_ALIASES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}


def get_act_name(name: str, layer: int | None = None, part: str | None = None) -> str:
    """The full name of a site from its short one, as TransformerLens spells them.

    Args:
        name: a short name (`"resid_post"`, `"q"`, `"pattern"`), a short name with its layer and part
            (`"k6"`, `"resid_post0"`, `"scale4ln1"`), or a full name, which comes back as it is.
        layer: block 0 to n_layers - 1; None for sites outside the blocks.
        part: `"ln1"` or `"ln2"` for `"scale"` and `"normalized"`; elsewhere it follows from the name.

    Example:
        >>> get_act_name("attn_out", 3), get_act_name("post", 5), get_act_name("scale", 0, "ln1")
        ('blocks.3.hook_attn_out', 'blocks.5.mlp.hook_post', 'blocks.0.ln1.hook_scale')
        >>> get_act_name("k6"), get_act_name("normalized")
        ('blocks.6.attn.hook_k', 'ln_final.hook_normalized')

    Source: TransformerLens 3.9, `utils.get_act_name`.
    """
    if "." in name or name.startswith("hook_"):
        return name
    if layer is None and (match := re.fullmatch(r"([a-z_]+?)(\d+)(\w*)", name)):
        name, layer, part = match[1], int(match[2]), match[3] or part
    name = _SITE_ALIASES.get(name, name)
    if layer is None:
        return f"ln_final.hook_{name}" if name in ("scale", "normalized") else f"hook_{name}"
    if name in _ATTENTION_SITES:
        part = "attn"
    elif name in _MLP_SITES:
        part = "mlp"
    part = _PART_ALIASES.get(part, part) if part else ""
    return f"blocks.{layer}.{part}.hook_{name}" if part else f"blocks.{layer}.hook_{name}"
