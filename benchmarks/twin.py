"""The model with every `tap` taken out of its source: the same mathematics without hook sites.

Each module becomes one of a subclass, whose methods that tap are compiled anew with `tap("site", value)` replaced by
`value`, `tap = self.tap` by nothing, and nothing else changed.
"""

import ast
import functools
import inspect
import textwrap
from types import FunctionType

import torch

from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt import model as source
from othello_gpt.hooks import Tapped

TINY = GPTConfig(n_layers=8, d_model=16, n_heads=2, d_head=8, d_mlp=32)


def model_and_twin(cfg: GPTConfig = GPTConfig(), seed: int = 0) -> tuple[OthelloGPT, OthelloGPT]:
    """A model with random weights and its tapless twin, which has the same parameters; on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, twin = OthelloGPT(cfg), OthelloGPT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    take_taps_out(twin)
    tokens = torch.randint(1, 61, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens), twin(tokens))
    return model, twin


class _TapsOut(ast.NodeTransformer):
    """`self.tap("site", value)` and `tap("site", value)` become `value`; `tap = self.tap` goes."""

    def __init__(self) -> None:
        self.removed = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.func) in ("self.tap", "tap"):
            self.removed += 1
            return node.args[1]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        self.generic_visit(node)
        return None if ast.unparse(node.value) == "self.tap" else node


def take_taps_out(model: OthelloGPT) -> None:
    """Gives the modules of this one model classes without taps, the same for all twins."""
    for module in model.modules():
        if isinstance(module, Tapped):
            module.__class__ = _tapless(type(module))


@functools.cache
def _tapless(cls: type[Tapped]) -> type[Tapped]:
    methods = {name: _without_taps(f) for name, f in vars(cls).items() if inspect.isfunction(f)}
    tapless = {name: method for name, method in methods.items() if method is not None}
    assert tapless, f"{cls.__name__} taps nowhere"
    return type(cls.__name__, (cls,), tapless)


def _without_taps(method: FunctionType) -> FunctionType | None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    taps_out = _TapsOut()
    tree = ast.fix_missing_locations(taps_out.visit(tree))
    if not taps_out.removed:
        return None
    made: dict[str, FunctionType] = {}
    exec(compile(tree, source.__file__, "exec"), vars(source), made)
    return made[method.__name__]
