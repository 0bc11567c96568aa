"""Othello-GPT, its game, and what happens inside it.

`OthelloGPT.from_pretrained()` is the model; `othello_gpt.board` the game; `interp` the questions.
"""

from othello_gpt.cache import ActivationCache
from othello_gpt.hooks import HookPoint, get_act_name
from othello_gpt.model import GPTConfig, OthelloGPT

__version__ = "0.1.0"
__all__ = ["ActivationCache", "GPTConfig", "HookPoint", "OthelloGPT", "get_act_name"]
