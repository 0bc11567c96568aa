"""The hook registry: sites are named where they are made, and hooks live inside a `with`.

A module of the model calls `self.tap("hook_z", z)` where it makes `z`. Nothing listens: the value comes
straight back, at the cost of one test. Something listens: the functions attached to that site are called
in the order of attaching, each sees the value, and may change it in place or return another in its place.

A site's full name is the path of its module in the model plus the literal: `blocks.3.attn.hook_z`.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn


@dataclass(eq=False)
class HookPoint:
    """Where a hook was called: `name` is the site's full name, `ctx` the hooks' own notes between calls."""

    name: str
    ctx: dict[Any, Any] = field(default_factory=dict)

    def layer(self) -> int:
        """The block that the site belongs to, 0 for the first."""
        match = re.match(r"blocks\.(\d+)\.", self.name)
        if match is None:
            raise ValueError(f"'{self.name}' belongs to no block, so it has no layer.")
        return int(match[1])


# What can be attached: called as `fn(activation, hook=point)`, so its second parameter must be named `hook`.
# It may change the activation in place, return another tensor to replace it, or return None having only looked.
# A backward hook is called in the same way with the gradient of the activation.
HookFn = Callable[..., Tensor | None]

SiteFilter = str | Callable[[str], bool] | Iterable[str]


class UnknownSite(KeyError):
    """A name that is no hook site, with the nearest ones that are."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0])


@dataclass(eq=False, slots=True)
class Hook:
    """A function that is attached, to one site or to several. One function attached twice is two hooks."""

    fn: HookFn
    backward: bool = False  # sees the gradient of the activation in place of the activation
    is_permanent: bool = False
    level: int | None = None


class HookRegistry:
    """The hooks attached to one model, by the full name of their site.

    The registry belongs to the model, so two threads must not hook one model at once. A copied or
    unpickled model starts with an empty one.
    """

    def __init__(self) -> None:
        self.hooks: dict[str, tuple[Hook, ...]] = {}
        self.points: dict[str, HookPoint] = {}

    def point(self, site: str) -> HookPoint:
        """The same object at every call of a site, until `points` is cleared."""
        if site not in self.points:
            self.points[site] = HookPoint(site)
        return self.points[site]

    def run(self, site: str, value: Tensor) -> Tensor:
        """The value that leaves the site, after all its hooks."""
        point, backward = self.points.get(site) or self.point(site), []
        for hook in self.hooks.get(site, ()):
            if hook.backward:
                backward.append(hook)
            else:
                value = _hooked(hook.fn, value, point)
        return _with_gradient_hooks(value, backward, point) if backward else value

    def add(self, site: str, hook: Hook, prepend: bool = False) -> None:
        """Attaches after those already there, or before them."""
        there = self.hooks.get(site, ())
        self.hooks[site] = (hook, *there) if prepend else (*there, hook)

    def remove(self, hooks: Collection[Hook]) -> None:
        """Detaches these from every site."""
        left = {site: [h for h in there if h not in hooks] for site, there in self.hooks.items()}
        self.hooks = {site: tuple(there) for site, there in left.items() if there}

    @contextmanager
    def attached(self, hooks: Iterable[tuple[str, Hook]]) -> Iterator[None]:
        """Attaches (full name, hook) pairs after those already there, and detaches them on leaving."""
        added = list(hooks)
        for site, hook in added:
            self.add(site, hook)
        try:
            yield
        finally:
            self.remove({hook for _, hook in added})

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return HookRegistry, ()


class HookHandle:
    """Detaches a hook: by `remove()`, or at the end of a `with` block."""

    def __init__(self, registry: HookRegistry, hook: Hook) -> None:
        self._registry, self._hook = registry, hook

    def remove(self) -> None:
        """Detaches the hook from every site; nothing if it is detached already."""
        self._registry.remove({self._hook})

    def __enter__(self) -> "HookHandle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _hooked(fn: HookFn, value: Tensor, point: HookPoint) -> Tensor:
    try:
        replacement = fn(value, hook=point)
    except Exception as error:
        error.add_note(f"raised by a hook on '{point.name}'")
        raise
    return value if replacement is None else _same_kind(replacement, value, point.name)


def _with_gradient_hooks(value: Tensor, hooks: Sequence[Hook], point: HookPoint) -> Tensor:
    """The same value, whose gradient the hooks see, in order, when somebody calls `.backward()` on this run.

    It is a tensor of its own, so that its gradient counts what comes after this site and nothing else.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"a backward hook is attached to '{point.name}', but gradients are switched off. "
            "Run the model outside `torch.no_grad()`."
        )
    own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_().clone()
    for hook in hooks:
        own.register_hook(lambda grad, fn=hook.fn: _hooked(fn, grad, point))
    return own


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
        hooks = self.registry.hooks
        if hooks and (name := self.path + site) in hooks:
            return self.registry.run(name, value)
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


class EverySite(dict[str, tuple[Hook, ...]]):
    """Stands in for a registry's hooks during a dry run: listens to every site and keeps its name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __bool__(self) -> bool:
        return True

    def __contains__(self, site: object) -> bool:
        return True

    def get(self, site: str, default: object = None) -> tuple[Hook, ...]:
        self.names.append(site)
        return ()


def select_sites(which: SiteFilter, names: Collection[str]) -> list[str]:
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
        some = list(names)[:: len(names) - 1]
        raise ValueError(
            "the predicate holds for none of the model's hook sites. "
            f"They look like {' and '.join(map(repr, some))}; `model.hook_names` lists them."
        )
    return selected


def _full_name(name: str, names: Collection[str]) -> str:
    for candidate in (name, get_act_name(name)):
        if candidate in names:
            return candidate
    raise UnknownSite(unknown_site_message(name, names))


def unknown_site_message(name: str, names: Iterable[str]) -> str:
    """Says that `name` is no site, and which names come near it."""
    near = difflib.get_close_matches(name, list(names), n=3)
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
