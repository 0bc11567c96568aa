"""The model with every `tap` taken out of its source: the same mathematics without hook sites.

Each module becomes one of a subclass, whose methods that tap are compiled anew with `tap("site", value)` replaced by
`value`, `tap = self.tap` by nothing, and nothing else changed.
"""

import ast
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
    assert take_taps_out(twin) > 15
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


def take_taps_out(model: OthelloGPT) -> int:
    """Gives the modules of this one model classes without taps; returns how many calls of `tap` went."""
    removed = 0
    tapless: dict[type, type] = {}
    for module in model.modules():
        if not isinstance(module, Tapped):
            continue
        cls = type(module)
        if cls not in tapless:
            functions = {n: _without_taps(f) for n, f in vars(cls).items() if inspect.isfunction(f)}
            removed += sum(count for _, count in functions.values())
            methods = {name: method for name, (method, count) in functions.items() if count}
            tapless[cls] = type(cls.__name__, (cls,), methods)
        module.__class__ = tapless[cls]
    return removed


def _without_taps(method: FunctionType) -> tuple[FunctionType, int]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    taps_out = _TapsOut()
    tree = ast.fix_missing_locations(taps_out.visit(tree))
    if not taps_out.removed:
        return method, 0
    namespace = dict(vars(source))
    exec(compile(tree, source.__file__, "exec"), namespace)
    return namespace[method.__name__], taps_out.removed
