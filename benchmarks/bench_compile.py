"""Do hook sites cost anything once the model is compiled, and do hooks added afterwards act?

The graph that `torch.compile` traces has as many nodes as the tapless twin's: sites are gone. A hook added
later makes a new graph, and acts: what changes nothing costs nothing, and what keeps activations makes the
graph give them out.
"""

import torch
from paired import QUICK, compare, report
from twin import model_and_twin


@torch.no_grad()
def main() -> None:
    model, twin = model_and_twin()
    tokens = torch.randint(1, 61, (1, 20))
    nodes = {name: count_nodes(m, tokens) for name, m in (("ours", model), ("twin", twin))}
    assert nodes["ours"] == nodes["twin"], nodes

    ours, other = torch.compile(model), torch.compile(twin)
    torch.testing.assert_close(ours(tokens), other(tokens))
    rows, kept = [], {}

    def timed(label: str) -> None:
        torch.testing.assert_close(ours(tokens), other(tokens))
        pairs = 60 if QUICK else 200
        rows.append(compare(label, lambda: ours(tokens), lambda: other(tokens), pairs))

    def every(name: str) -> bool:
        return not name.endswith("hook_result")

    timed("1x20, compiled, no hooks")
    with model.hooks([(every, lambda activation, hook: None)]):
        timed("1x20, compiled, no-op on all sites")
    with model.hooks([(every, lambda activation, hook: kept.update({hook.name: activation}))]):
        timed("1x20, compiled, all sites kept")
    torch.testing.assert_close(kept["blocks.6.hook_resid_post"], model(tokens, stop_at_layer=7))
    with model.hooks([("blocks.3.hook_attn_out", lambda activation, hook: activation * 0)]):
        hooked = ours(tokens)
        torch.testing.assert_close(hooked, model(tokens))
        acts = not torch.allclose(hooked, twin(tokens))
    assert acts
    report("Compiled, against the compiled twin.", rows, graph_nodes=nodes, later_hooks_act=acts)


def count_nodes(model, tokens) -> int:
    """How many nodes the graphs have that the compiler sees."""
    counts = []

    def backend(graph, example_inputs):
        counts.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(tokens)
    torch._dynamo.reset()
    return sum(counts)


if __name__ == "__main__":
    main()
