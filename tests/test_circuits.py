"""Parts of a difference close and are what each writer did; chains go down to where something new comes in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_strategies import models, random_model

from interp.circuits import find_circuit, logit_parts, neuron_parts
from interp.patching import patch_sweep, patching_metric
from othello_gpt import GPTConfig

CLEAN, CORRUPTED = torch.tensor([20, 19, 33, 5]), torch.tensor([20, 19, 33, 9])
WIDE = GPTConfig(n_layers=3, d_model=10, n_heads=2, d_head=4, d_mlp=12)


def last_moves(model):
    runs = [model.run_with_cache(tokens)[1] for tokens in (CLEAN, CORRUPTED)]
    return [run.select(pos=-1) for run in runs]


@settings(max_examples=15)
@given(models(), st.data())
def test_parts_of_a_neuron_and_of_a_logit_sum_to_the_difference(model, data):
    """Heads, neurons, embedding and the rest, whatever LayerNorm's weights; nothing writes to itself."""
    runs = last_moves(model)
    layer = data.draw(st.integers(0, model.cfg.n_layers - 1))
    neuron = data.draw(st.integers(0, model.cfg.d_mlp - 1))
    token = data.draw(st.integers(1, 60))
    read = neuron_parts(model, *runs, layer, neuron)
    pre = [run["pre", layer][0, 0, neuron] for run in runs]
    logits = [run["unembed.hook_out"][0, 0, token] for run in runs]

    assert read.total == pytest.approx((pre[0] - pre[1]).item(), abs=1e-9)
    assert read.gap < 1e-9
    assert read.neurons.shape[0] == layer
    assert read.heads.shape[0] == layer + 1
    parts = logit_parts(model, *runs, token)
    assert parts.total == pytest.approx((logits[0] - logits[1]).item(), abs=1e-9)
    assert parts.gap < 1e-9


def test_chains_start_from_the_neurons_that_restore_most():
    """Their effect is the sweep's; each link is the largest part of the next; a chain ends at no neuron."""
    model = random_model(WIDE, seed=3)
    with torch.no_grad():
        metric = patching_metric(model(CLEAN), model(CORRUPTED), 7)
    effects = patch_sweep(model, CLEAN, CORRUPTED, metric, sites=("post", "z"))
    circuit = find_circuit(model, CLEAN, CORRUPTED, 7, n_chains=4)
    ends = [chain.steps[-1] for chain in circuit.chains]

    assert [end.restored for end in ends] == pytest.approx(
        effects["post"].flatten().topk(4).values.tolist()
    )
    for chain in circuit.chains:
        assert [s.writer.kind for s in chain.steps[1:]] == ["neuron"] * (len(chain.steps) - 1)
        assert chain.steps[0].writer.kind in ("head", "embed")
        for step, later in zip(chain.steps, chain.steps[1:], strict=False):
            parts = neuron_parts(model, *last_moves(model), *later.writer[1:])
            sign = 1 if parts.total >= 0 else -1
            rivals = [parts.embed, *parts.heads.flatten().tolist()]
            rivals += parts.neurons.flatten().tolist()
            assert sign * step.handed_on == pytest.approx(max(sign * r for r in rivals))
            assert step.share == pytest.approx(step.handed_on / parts.total)
    assert str(circuit.chains[0]).endswith(str(ends[0].writer))
