"""The names that notebooks import from TransformerLens, over the model, the hooks and the cache of this library.

Change `transformer_lens` to `othello_gpt.compat` in the import lines; the rest of the notebook stays:

    from othello_gpt.compat import HookedTransformer, HookedTransformerConfig, ActivationCache, utils
    from othello_gpt.compat.hook_points import HookPoint
    import othello_gpt.compat.patching as patching

The names and arguments are those of TransformerLens 3.9, for the one architecture that this library has.
What is not here raises an error that says so and names what to use. Where TransformerLens was wrong or
silent, the difference stands in the docstring of the class or function, under "Unlike TransformerLens".
"""

import sys
from typing import NoReturn

from othello_gpt.compat import hook_points, patching
from othello_gpt.compat import notebook as utils
from othello_gpt.compat.cache import ActivationCache
from othello_gpt.compat.factored import FactoredMatrix
from othello_gpt.compat.hook_points import HookPoint
from othello_gpt.compat.model import HookedTransformer, HookedTransformerConfig

__all__ = [
    "ActivationCache",
    "FactoredMatrix",
    "HookPoint",
    "HookedTransformer",
    "HookedTransformerConfig",
    "hook_points",
    "patching",
    "utils",
]

# `import othello_gpt.compat.utils as utils` is a line of many notebooks, and no name for a file.
sys.modules[f"{__name__}.utils"] = utils


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(
        f"othello_gpt.compat has no '{name}'. It has {', '.join(__all__)}, enough for notebooks about "
        "Othello-GPT. For other models of TransformerLens: `pip install 'transformer_lens<4'`."
    )
