"""What does a model with hook sites cost when nobody listens?

Against the same mathematics with every `tap` taken out of the source: each method that taps is compiled anew
with `self.tap("site", value)` replaced by `value`, and nothing else changed. Published size, random weights.
"""

import ast
import inspect
import textwrap
import types

import torch
from paired import compare, report

from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt import model as source
from othello_gpt.hooks import Tapped


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    tapped, untapped = OthelloGPT(GPTConfig()), OthelloGPT(GPTConfig())
    untapped.load_state_dict(tapped.state_dict())
    taps = take_taps_out(untapped)
    rows = []
    for batch, pos, pairs in ((1, 20, 300), (50, 59, 15)):
        tokens = torch.randint(1, 61, (batch, pos))
        assert torch.equal(tapped(tokens), untapped(tokens))
        name = f"batch {batch} x {pos}, no hooks"
        rows.append(compare(name, lambda t=tokens: tapped(t), lambda t=tokens: untapped(t), pairs))
    report("A model with sites and no hooks, against one without sites.", rows, taps_removed=taps)


class _TapsOut(ast.NodeTransformer):
    """`self.tap("site", value)` becomes `value`."""

    def __init__(self) -> None:
        self.removed = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "tap":
            self.removed += 1
            return node.args[1]
        return node


def take_taps_out(model: OthelloGPT) -> int:
    """Gives the modules of this one model methods without taps; returns how many calls of `tap` went."""
    removed = 0
    methods = {}
    for module in model.modules():
        for name, method in vars(type(module)).items():
            if not isinstance(module, Tapped) or not inspect.isfunction(method):
                continue
            if method not in methods:
                methods[method], count = _without_taps(method)
                removed += count
            if methods[method] is not None:
                setattr(module, name, types.MethodType(methods[method], module))
    return removed


def _without_taps(method: types.FunctionType):
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    taps_out = _TapsOut()
    tree = ast.fix_missing_locations(taps_out.visit(tree))
    if not taps_out.removed:
        return None, 0
    namespace = dict(vars(source))
    exec(compile(tree, source.__file__, "exec"), namespace)
    return namespace[method.__name__], taps_out.removed


if __name__ == "__main__":
    main()
