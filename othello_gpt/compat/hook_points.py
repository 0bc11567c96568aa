"""What notebooks import from `transformer_lens.hook_points`."""

from typing import Any, NoReturn

from othello_gpt.hooks import HookPoint

__all__ = ["HookPoint", "HookedRootModule"]


class HookedRootModule:
    """In the import lines of many notebooks, and used by none: it can be imported, and nothing more."""

    def __init__(self, *arguments: Any) -> NoReturn:
        raise TypeError(
            "HookedRootModule is not here. A model of your own with hook sites is a subclass of "
            "`othello_gpt.hooks.Tapped`; see `othello_gpt.model`."
        )
