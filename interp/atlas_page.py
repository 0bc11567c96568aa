"""The atlas as one self-contained page: every neuron can be searched, sorted, filtered and looked at."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp import webpage
from interp.atlas import Atlas
from interp.neurons import STATISTICS
from othello_gpt import board
from othello_gpt.vocab import token_to_label, values_on_board

_BODY = """
<h1>Every neuron of an Othello-GPT</h1>
<p>What each neuron reads, writes and does, and the rule that describes best when it fires, found on some random
games and scored on others. {n} neurons of {layers}; {n_high} have a rule with F1 above 0.8, and {n_both}
of these act on it: silenced, they take something from the move that they write most where the rule says so, and
not elsewhere.</p>
<div class="bar" role="search">
  <input type="search" id="search" placeholder="L5N12, C0 blank, played ..." aria-label="Search names and rules">
  <label>layer <select id="layer"><option value="">all</option>{options}</select></label>
  <label>F1 <select id="quality"><option value="-1">any</option><option>0.5</option><option>0.8</option>
    <option>0.95</option></select></label>
  <label><input type="checkbox" id="acts"> acts on its rule</label>
  <output id="count" aria-live="polite"></output>
</div>
<div class="card" id="detail" hidden tabindex="-1" aria-live="polite"></div>
<div class="card"><table id="neurons"><thead><tr id="head"></tr></thead><tbody id="rows"></tbody></table>
<p><button id="more">More</button></p></div>
<p class="soft">Random weights score {span:.3f} in the probe's span, {unembed:.3f} in the unembedding's, and
cosines of about {cosine:.3f}.</p>
"""


def page(atlas: Atlas) -> str:
    """The page; about a kilobyte a neuron."""
    high = [d for d in atlas.described if d.score.f1 > 0.8]
    layers = sorted(atlas.top)
    body = _BODY.format(
        n=len(atlas.described),
        layers=f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}",
        n_high=len(high),
        n_both=sum(d.check is not None and d.check.passed for d in high),
        options="".join(f"<option>{layer}</option>" for layer in layers),
        span=atlas.table.baselines["probe_span"],
        unembed=atlas.table.baselines["unembed_span"],
        cosine=atlas.table.baselines["cosine"],
    )
    scripts = ("boards.js", "atlas.js")
    return webpage.document("Othello-GPT: every neuron", body, {"atlas": as_data(atlas)}, scripts)


def write_page(atlas: Atlas, path: str | Path) -> None:
    """Writes the page, whole or not at all."""
    webpage.write(page(atlas), path)


def as_data(atlas: Atlas) -> dict[str, Any]:
    """What the page's script reads: one list a column, in the order of `atlas.described`."""
    layer, neuron = np.array([d[:2] for d in atlas.described]).T
    scores = [d.score for d in atlas.described]
    statistics = atlas.table.statistics
    boards = torch.cat([atlas.table.reads, atlas.table.writes], 2).flatten(3)[layer, neuron]
    logits = values_on_board(atlas.table.logits[layer, neuron], 0.0).flatten(1)
    return {
        "layer": layer.tolist(),
        "neuron": neuron.tolist(),
        "rule": [str(d.rule) for d in atlas.described],
        "f1": [round(score.f1, 4) for score in scores],
        "precision": [round(score.precision, 4) for score in scores],
        "recall": [round(score.recall, 4) for score in scores],
        "explained": [round(score.explained, 4) for score in scores],
        "check": [
            d.check
            and [
                token_to_label(d.check.token),
                round(d.check.effect, 4),
                round(d.check.control, 4),
                d.check.passed,
            ]
            for d in atlas.described
        ],
        "statistics": {name: _plain(statistics[name][layer, neuron]) for name in STATISTICS},
        "words": STATISTICS,
        "boards": _packed(boards.flatten(1)),  # blank and mine read, blank and mine written
        "logits": _packed(logits),
        "top": _top(atlas),
    }


def _plain(values: Tensor) -> list[float | None]:
    return [None if value != value else float(f"{value:.4g}") for value in values.tolist()]


def _packed(values: Tensor) -> dict[str, Any]:
    """Numbers as 16-bit integers in base64: value = integer * scale, so to 1/65 534 of the range."""
    scale = values.abs().max().item() / 32767 or 1.0
    integers = (values.double() / scale).round().numpy().astype("<i2")
    return {"scale": scale, "base64": base64.b64encode(integers.tobytes()).decode()}


def _top(atlas: Atlas) -> list[list[list]]:
    """For each neuron its maximal positions: last move, who moves next, discs, activation."""
    record, discs = board.play(atlas.games), np.array([".", "b", "w"])
    letters = discs[record.state.reshape(*record.state.shape[:2], 64)]
    words = np.ascontiguousarray(letters).view("<U64")[..., 0]  # [game, ply]
    found = []
    for d in atlas.described:
        top = atlas.top[d.layer]
        places = zip(top.game[d.neuron].tolist(), top.ply[d.neuron].tolist(), strict=True)
        found.append(
            [
                [int(atlas.games[place]), int(record.to_move[place]), str(words[place]), value]
                for place, value in zip(places, _plain(top.activation[d.neuron]), strict=True)
            ]
        )
    return found
