"""The hook registry: sites are named where they are made, and hooks live inside a `with`.

A module of the model calls `self.tap("hook_z", z)` where it makes `z`. Nothing listens: the value comes
straight back, at the cost of one test. Something listens: the functions attached to that site are called
in the order of attaching, each sees the value, and may change it in place or return another in its place.
What a module has to call lies with the module, so that a hook costs little more than its call.

A site's full name is the path of its module in the model plus the literal: `blocks.3.attn.hook_z`.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn


class HookPoint:
    """Where a hook was called: `name` is the site's full name, `ctx` the hooks' own notes between calls."""

    # small, for what lies far apart in memory costs a tap more than all its work
    __slots__ = ("_name_and_ctx", "call")

    def __init__(self, name: str, call: "HookFn | None" = None) -> None:
        self._name_and_ctx: tuple[str, dict[Any, Any]] = name, {}
        self.call = call or _nobody  # all functions attached there, in one

    @property
    def name(self) -> str:
        return self._name_and_ctx[0]

    @property
    def ctx(self) -> dict[Any, Any]:
        return self._name_and_ctx[1]

    @ctx.setter
    def ctx(self, notes: dict[Any, Any]) -> None:
        self._name_and_ctx = self.name, notes

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r})"

    def layer(self) -> int:
        """The block that the site belongs to, 0 for the first."""
        match = re.match(r"blocks\.(\d+)\.", self.name)
        if match is None:
            raise ValueError(f"'{self.name}' belongs to no block, so it has no layer.")
        return int(match[1])


# What can be attached: called as `fn(activation, hook=point)`, so one of its parameters must be named `hook`.
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


def tap(
    points: dict[str, HookPoint], site: str, value: Shaped[Tensor, "..."]
) -> Shaped[Tensor, "..."]:
    """The value that goes on from a site: `value` itself unless a hook replaces it.

    Args:
        points: where somebody listens to this module, by the literal of its tap.
    """
    if site in points:
        point = points[site]
        try:
            replacement = point.call(value, point)
            if replacement is not None:
                return _same_kind(replacement, value, point.name)
        except Exception as error:
            error.add_note(f"raised by a hook on '{point.name}'")
            raise
    return value


class HookRegistry:
    """The hooks attached to one model, by the full name of their site.

    The registry belongs to the model, so two threads must not hook one model at once. A copied or
    unpickled model starts with an empty one.
    """

    def __init__(self, root: "Tapped") -> None:
        self.hooks: dict[str, tuple[Hook, ...]] = {}
        self.points: dict[str, HookPoint] = {}
        self._root = root

    def point(self, site: str) -> HookPoint:
        """What hooks are given at every call of a site: always the same object."""
        if site not in self.points:
            self.points[site] = HookPoint(site)
        return self.points[site]

    def clear_contexts(self) -> None:
        """Forgets the hooks' own notes."""
        for point in self.points.values():
            point.ctx.clear()

    def add(self, named: Collection[tuple[str, Hook]], prepend: bool = False) -> None:
        """Attaches (full name, hook) pairs after those already there, or before them; all or none.

        While a module runs, only those of its sites that are hooked already take more.
        """
        changed: dict[str, tuple[Hook, ...]] = {}
        for site, hook in named:
            there = changed.get(site, self.hooks.get(site, ()))
            changed[site] = (hook, *there) if prepend else (*there, hook)
        self._set(changed)

    def remove(self, hooks: Collection[Hook]) -> None:
        """Detaches these from every site."""
        changed: dict[str, tuple[Hook, ...]] = {}
        for site, there in self.hooks.items():
            left = [hook for hook in there if hook not in hooks]
            if len(left) < len(there):
                changed[site] = tuple(left)
        self._set(changed)

    def _set(self, changed: Mapping[str, tuple[Hook, ...]]) -> None:
        """Makes these all the hooks of these sites."""
        places = {site: _place(self._root, site) for site in changed}
        for site, (module, _) in places.items():
            if changed[site] and module is None:
                raise UnknownSite(
                    f"'{site}' cannot be hooked: the module that named it was exchanged for one without hook "
                    "sites. Make that a subclass of `othello_gpt.hooks.Tapped` with the same taps, or choose "
                    "other sites."
                )
        for site, hooks in changed.items():
            self.point(site).call = _as_one(hooks) if hooks else _nobody
            if hooks:
                self.hooks[site] = hooks
            else:
                del self.hooks[site]
        heard: dict[Tapped, dict[str, HookPoint]] = {}
        for site, (module, name) in places.items():
            if module is None:
                continue
            if module not in heard:
                heard[module] = dict(module.points)
            if changed[site]:
                # interned, as the literals in the model are, so that the lookup in a tap compares no letters
                heard[module][sys.intern(name)] = self.points[site]
            else:
                heard[module].pop(name, None)
        for module, points in heard.items():
            module.listen_at(points or _NOWHERE)

    @contextmanager
    def attached(self, hooks: Iterable[tuple[str, Hook]]) -> Iterator[None]:
        """Attaches (full name, hook) pairs after those already there, and detaches them on leaving."""
        added = list(hooks)
        self.add(added)
        try:
            yield
        finally:
            self.remove({hook for _, hook in added})

    def __getstate__(self) -> dict[str, Any]:
        return {"hooks": {}, "points": {}, "_root": self._root}


def _nobody(activation: Tensor, hook: HookPoint) -> None:
    """What is called at a site where nobody listens any more."""


def _as_one(hooks: Sequence[Hook]) -> HookFn:
    """What a tap calls for these; the activation's own hooks come first, so that its gradient is that after them."""
    fns = [_by_position(hook.fn) for hook in hooks if not hook.backward]
    if backward := [_by_position(hook.fn) for hook in hooks if hook.backward]:
        fns.append(partial(_with_gradient_hooks, _in_turn(backward)))
    return _in_turn(fns)


def _by_position(fn: HookFn) -> HookFn:
    """`fn` to be called as `fn(value, point)`: Python passes `hook=point` more slowly, but every hook takes that."""
    if isinstance(fn, FunctionType):
        code = fn.__code__
        if code.co_varnames[1 : code.co_argcount][:1] == ("hook",):
            return fn
    return lambda value, point: fn(value, hook=point)


def _in_turn(fns: Sequence[HookFn]) -> HookFn:
    """A function that calls these in order, each with what the one before it made of the value."""
    if len(fns) == 1:
        return fns[0]

    def call(value: Tensor, point: HookPoint) -> Tensor:
        for fn in fns:
            replacement = fn(value, point)
            if replacement is not None:
                value = _same_kind(replacement, value, point.name)
        return value

    return call


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


def _with_gradient_hooks(fn: HookFn, value: Tensor, point: HookPoint) -> Tensor:
    """The same value, whose gradient `fn` sees when somebody calls `.backward()` on this run.

    It is a tensor of its own, so that its gradient counts what comes after this site and nothing else. `fn` gets
    a copy of that, since autograd may hand one gradient to several tensors.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"a backward hook is attached to '{point.name}', but gradients are switched off. "
            "Run the model outside `torch.no_grad()`."
        )
    own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_().clone()
    points = {point.name: HookPoint(point.name, lambda gradient, _: fn(gradient, point))}
    own.register_hook(lambda gradient: tap(points, point.name, gradient.clone()))
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


_NOWHERE: dict[str, HookPoint] = {}  # what all modules share that nobody listens to; stays empty


class Tapped(nn.Module):
    """A module whose activations can be seen and changed by name."""

    points: dict[str, HookPoint]
    tap: Callable[[str, Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.listen_at(_NOWHERE)

    def listen_at(self, points: dict[str, HookPoint]) -> None:
        """Calls these from now on, by the literal of their tap.

        Between two taps the mathematics empties the processor's caches, so what a hook costs is above all how many
        objects lie between a tap and the hook: hence a function bound to a dict, which is no object of a class.
        """
        vars(self).update(points=points, tap=MethodType(tap, points))

    def is_hooked(self, site: str) -> bool:
        """Whether somebody listens to this site: for values that are made only on request."""
        return site in self.points and self.points[site].call is not _nobody

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled module is one that nobody listens to."""
        return {key: value for key, value in vars(self).items() if key not in ("points", "tap")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.listen_at(_NOWHERE)


def _place(root: Tapped, site: str) -> tuple[Tapped | None, str]:
    """The module that taps a site, None if it is there no more, and the literal of the tap."""
    *path, name = site.split(".")
    if not path or path[0] not in root._modules:
        return root, site  # the root names some of its sites with a dot
    module: Any = root
    for part in path:
        module = module._modules.get(part)
        if module is None:
            return None, name
    return (module if isinstance(module, Tapped) else None), name


def _tapped(root: nn.Module) -> Iterator[tuple[str, Tapped]]:
    """The tapped modules below `root`, itself too, each with the prefix of its sites' full names."""
    for path, module in root.named_modules():
        if isinstance(module, Tapped):
            yield f"{path}." if path else "", module


@contextmanager
def sites_recorded(root: nn.Module) -> Iterator[list[str]]:
    """The full names of all sites that are passed below `root` meanwhile, in that order; no hook is called."""
    names: list[str] = []
    before = [(module, module.points) for _, module in _tapped(root)]
    for path, module in _tapped(root):
        module.listen_at(_EverySite(path, lambda value, point: names.append(point.name)))
    try:
        yield names
    finally:
        for module, points in before:
            module.listen_at(points)


class _EverySite(dict[str, HookPoint]):
    """Points with one function at every site of a module."""

    def __init__(self, path: str, call: HookFn) -> None:
        super().__init__()
        self.path, self.call = path, call

    def __contains__(self, site: object) -> bool:
        return True

    def __missing__(self, site: str) -> HookPoint:
        return HookPoint(self.path + site, self.call)


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


@functools.lru_cache(maxsize=None, typed=True)  # typed, for 1.0 == 1
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
