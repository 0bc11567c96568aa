"""ActivationCache: what a run kept, found by full name or by short key."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from othello_gpt.hooks import UnknownSite, get_act_name, unknown_site_message

Index = int | slice | Sequence[int] | Shaped[Tensor, " index"]
Key = str | tuple  # a full name, or (name, layer, part) of which the last two may be missing


class ActivationCache(Mapping[str, Tensor]):
    """The activations of one run, in the order in which the forward pass made them.

    Found by full name, `cache["blocks.5.mlp.hook_post"]`, or by short key: `cache["post", 5]`,
    `cache["resid_post", -1]`, `cache["scale", 0, "ln1"]`, `cache["embed"]`. The cache holds tensors and
    nothing else: no model, and no hook can change them after they were kept.
    """

    def __init__(self, activations: Mapping[str, Tensor], n_layers: int) -> None:
        self._activations = dict(activations)
        self.n_layers = n_layers

    def __getitem__(self, key: Key) -> Tensor:
        name = self._full_name(key)
        if name not in self._activations:
            raise UnknownSite(self._missing_message(name))
        return self._activations[name]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and self._full_name(key) in self._activations

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the activations occupy; storage shared by several is counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.values()}
        return sum(storage.nbytes() for storage in storages.values())

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The same cache on another device."""
        return self._map(lambda name, activation: activation.to(device))

    def detach(self) -> "ActivationCache":
        """The same values, cut from the graph that made them (for a cache kept with `detach=False`)."""
        return self._map(lambda name, activation: activation.detach())

    def select(self, batch: Index = slice(None), pos: Index = slice(None)) -> "ActivationCache":
        """The cache of some games and some positions; every axis stays, so names and shapes keep their meaning.

        Args:
            batch: games to keep: an index, a slice or several indices.
            pos: positions to keep. For attention scores and patterns it is the query position.
        """
        return self._map(
            lambda name, activation: _take(_take(activation, 0, batch), _pos_axis(name), pos)
        )

    @staticmethod
    def concat(caches: Sequence["ActivationCache"]) -> "ActivationCache":
        """One cache of all the games, in order. The caches must hold the same sites at the same positions."""
        if not caches:
            raise ValueError("`concat` needs at least one cache.")
        first = caches[0]
        for i, other in enumerate(caches):
            if different := sorted(set(first) ^ set(other)):
                raise ValueError(
                    f"cache 0 and cache {i} hold different sites: {', '.join(different[:4])}. "
                    "Make them with the same `names_filter`."
                )
        return first._map(lambda name, _: torch.cat([cache[name] for cache in caches]))

    def _map(self, change) -> "ActivationCache":
        changed = {name: change(name, activation) for name, activation in self.items()}
        return ActivationCache(changed, self.n_layers)

    def _full_name(self, key: Key) -> str:
        if isinstance(key, str):
            return key if key in self._activations else get_act_name(key)
        return self._of_layer(*key)

    def _of_layer(self, name: str, layer: int | None = None, part: str | None = None) -> str:
        if layer is not None and layer < 0:
            layer += self.n_layers
        return get_act_name(name, layer, part)

    def _missing_message(self, name: str) -> str:
        kept = list(self._activations)
        return (
            f"the run did not keep '{name}'. {unknown_site_message(name, kept)} "
            f"It kept {len(kept)} sites: {', '.join(kept[:3])}{' ...' if len(kept) > 3 else ''}"
        )


def _pos_axis(name: str) -> int:
    return 2 if name.endswith(("hook_attn_scores", "hook_pattern")) else 1


def _take(activation: Tensor, axis: int, index: Index) -> Tensor:
    if isinstance(index, slice):
        return activation[(slice(None),) * axis + (index,)]
    chosen = torch.as_tensor(index, device=activation.device).reshape(-1)
    size = activation.shape[axis]
    if chosen.numel() and not bool(((chosen >= -size) & (chosen < size)).all()):
        raise IndexError(f"index {index} is out of range for {size} entries along axis {axis}.")
    return activation.index_select(axis, chosen % size)
