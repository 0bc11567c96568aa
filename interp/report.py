"""The story of one pair of games as one HTML page: a slider through the game, the circuit, what restores what."""

from collections.abc import Sequence
from pathlib import Path

import torch

from interp import plots, webpage
from interp.atlas import Described
from interp.circuits import Circuit
from interp.playback import as_data
from interp.story import NeuronReading, Story, agreement_in_words, in_labels
from othello_gpt.vocab import square_to_label, token_to_label, values_on_board


def page(story: Story) -> str:
    """The story as one self-contained HTML page: pictures as SVG, a little script for the slider, no network."""
    answer = square_to_label(story.pair.answer)
    body = "".join(
        [
            f"<h1>Why Othello-GPT thinks {answer} is legal</h1>",
            f"<p>A transformer that only ever saw lists of moves, looked at inside. After "
            f"{in_labels(story.pair.clean)} {story.colour} can play {answer}: which board does the model "
            "believe in, who writes the move's logit, and what carries the last move there?</p>",
            _moves_section(story),
            _pair_sections(story, answer),
            _circuit_section(story, answer),
            _section(
                f"Neurons of layer {story.neurons[0].layer} that vary most",
                _neuron_table(story.neurons),
            ),
            _section(
                "How right the probes are",
                _card(
                    plots.plot_lines({"squares right": story.accuracy.by_layer}, x_title="layer")
                ),
                "Linear probes of empty, theirs and mine on random games.",
            ),
        ]
    )
    data = {"story": as_data(story.played)}
    return webpage.document(f"Othello-GPT: {answer}", body, data, ("boards.js", "report.js"))


def _moves_section(story: Story) -> str:
    """The slider and what it moves; without scripts it shows the pair's last move."""
    ply, played = len(story.pair.clean) - 1, story.played
    state, last = story.record.state[-1], int(story.pair.clean[-1])
    true = state * int(story.record.to_move[-1])
    layers = [f"layer {layer}" for layer in range(len(story.believed))]
    drawn = {
        "board": plots.plot_board(state, story.legal, last, f"{story.colour} to move"),
        "predicted": plots.plot_board_values(
            values_on_board(story.probabilities), ["the model's next move"], pieces=state
        ),
        "truth": plots.plot_board_values(true, ["the truth"], pieces=state),
        "believed": plots.plot_board_values(story.believed, layers, pieces=state, last_move=last),
        "parts": plots.plot_bars(played.labels, played.parts[ply]),
        "heads": "",
    }
    return (
        "<section><h2>The game, move by move</h2>"
        '<div class="bar" role="group" aria-label="Move"><button id="back" aria-label="Back">&#9664;</button>'
        f'<input type="range" id="move" min="0" max="{len(played.squares) - 1}" value="{ply}" '
        'aria-label="Move of the game"><button id="forward" aria-label="Forward">&#9654;</button>'
        '<button id="play">Play</button><output id="status" for="move" aria-live="polite"></output></div>'
        f'<div class="row"><div class="card fill" id="board">{drawn["board"]}</div>'
        f'<div class="card fill" id="predicted">{drawn["predicted"]}</div><div class="card">'
        '<h3>Legal moves against predicted</h3><p id="legality"></p><ul class="chips" id="moves"></ul>'
        '<p class="soft">Dots mark legal moves. Arrow keys move through the game.</p></div></div>'
        "<h3>The board that each layer believes in</h3>"
        '<p class="soft">P(mine) - P(theirs) by the linear probe of each layer: blue is mine, red theirs, of '
        "whoever moves next. Discs show the real board; a red frame is a square read wrong.</p>"
        f'<div class="card boards"><div id="truth">{drawn["truth"]}</div>'
        f'<div id="believed" style="display:contents">{drawn["believed"]}</div></div>'
        '<h3>Who writes the logit of <span id="explained"></span></h3>'
        '<p class="soft">Direct logit attribution: what each part adds to the logit, LayerNorm\'s scale held. '
        "At the pair's last move it is the answer's, elsewhere that of the likeliest move.</p>"
        f'<div class="row"><div class="card" id="parts">{drawn["parts"]}</div>'
        f'<div class="card" id="heads">{drawn["heads"]}</div></div></section>'
    )


def _pair_sections(story: Story, answer: str) -> str:
    layers = [f"layer {layer}" for layer in range(len(story.believed))]
    effects = {site: story.effects[site] for site in ("attn_out", "mlp_out")}
    averages = {site: interval.value for site, interval in story.averages.items()}
    heads = story.effects["z"]
    names = [f"head {h}" for h in range(heads.shape[1])]
    return (
        _section(
            f"What restores {answer}",
            '<div class="row">'
            + _card(plots.plot_lines(effects, x_title="layer", y_title="restored"))
            + _card(plots.plot_grid(heads.T, names, layers, "by head"))
            + "</div>",
            f"The corrupted game ends in {square_to_label(int(story.pair.corrupted[-1]))}; there {answer} has "
            f"log-probability {story.log_probs[1]:.3f}, in the clean game {story.log_probs[0]:.3f}. One activation "
            "of the last move comes from the clean run; 1 means fully restored, 0 not at all.",
        )
        + _section(
            f"What restores a reply on average over {story.n_pairs} pairs",
            '<div class="row">'
            + _card(plots.plot_lines(averages, x_title="layer", y_title="restored"))
            + f'<div class="card">{_average_table(story)}</div>'
            + "</div>",
            "Pairs that differ in the last move only, where exactly one reply changes legality: of random games those "
            "with the nearest boards, then those whose reply the model is surest of. Mean and 95 % bootstrap "
            "interval. Attribution patching, which estimates the same from one gradient, comes this near over all "
            f"pairs and layers: {agreement_in_words(story)}.",
        )
        + _section(
            "Who writes mine and theirs",
            _card(_written_boards(story)),
            f"What each layer writes along mine minus theirs of each square, up to layer {story.last_layer}, whose "
            "probe reads the board best. Blue writes mine, red theirs. The sum with what the embeddings write and "
            f"the probe's bias is its score; {square_to_label(story.turned)}, turned by the last move, has "
            f"{story.score:+.2f}.",
        )
    )


def _circuit_section(story: Story, answer: str) -> str:
    return _section(
        f"What carries {answer}",
        _card(circuit_graph(story.circuit), "wide") + _neuron_table(story.carriers),
        f"The logit of {answer} differs by {story.circuit.difference:+.2f} between the two games. From the "
        "neurons that restore most when patched alone, each line goes to the largest part of what they read; "
        "its number is the part's share of the difference, and below each name stands what patching it alone "
        "restores. A chain ends at a head, which looks at earlier moves, or at the last move itself.",
    )


def circuit_graph(circuit: Circuit) -> plots.Svg:
    """The chains as a drawing, what starts them on the left and the move on the right."""
    answer = token_to_label(circuit.token)
    nodes, edges, last = {}, {}, 0
    for chain in circuit.chains:
        names = [str(step.writer) for step in chain.steps] + [answer]
        for step, name, later in zip(chain.steps, names, names[1:], strict=False):
            column = 2 * step.writer.layer + (step.writer.kind == "neuron")
            words = "last move" if step.restored is None else f"{step.restored:z.2f}"
            nodes[name], last = (column, words), max(last, column)
            edges[name, later] = step.share
    nodes[answer] = (last + 1, f"{circuit.difference:+.2f}")
    return plots.plot_graph(nodes, [(*ends, share) for ends, share in edges.items()])


def _section(title: str, content: str, words: str = "") -> str:
    return (
        f"<section><h2>{title}</h2>" + (f"<p>{words}</p>" if words else "") + content + "</section>"
    )


def _card(svg: plots.Svg, kind: str = "") -> str:
    return f'<figure class="card {kind}">{svg}</figure>'


def _written_boards(story: Story) -> plots.Svg:
    parts = {part: story.written_by(part) for part in ("attn", "mlp")}
    titles = [f"{part} {layer}" for part, boards in parts.items() for layer in range(len(boards))]
    return plots.plot_board_values(
        torch.cat([*parts.values()]),
        titles,
        boards_per_row=story.last_layer + 1,
        pieces=story.record.state[-1],
        last_move=int(story.pair.clean[-1]),
        size=min(200, 1040 // (story.last_layer + 1)),
    )


_COLUMNS = (
    "neuron",
    "rule",
    "F1 on other games",
    "variance explained",
    "what it adds to the move it writes most",
    "reads most (cosine with the probe)",
    "writes most (logits)",
)


def _average_table(story: Story) -> str:
    rows = "".join(
        f"<tr><td>{site}<td>{layer}<td>{mean:z.3f}<td>{low:z.3f} to {high:z.3f}</tr>"
        for site, layer, mean, low, high in story.average_rows()
    )
    return f"<table><tr><th>site<th>layer<th>mean<th>interval</tr>{rows}</table>"


def _neuron_table(neurons: Sequence[NeuronReading]) -> str:
    rows = []
    for reading in neurons:
        d = reading.described
        cells = (
            f"L{reading.layer}N{reading.neuron}",
            str(d.rule),
            f"{d.score.f1:.2f}",
            f"{d.score.explained:.0%}",
            check_in_words(d),
            ", ".join(f"{name} ({cosine:.2f})" for name, cosine in reading.reads),
            ", ".join(f"{name} ({weight:+.2f})" for name, weight in reading.writes),
        )
        named = zip(_COLUMNS, cells, strict=True)
        rows.append("".join(f'<td data-label="{name}">{cell}</td>' for name, cell in named))
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="card"><table class="stacked"><tr>{head}</tr>{body}</table></div>'


def check_in_words(described: Described) -> str:
    """What the causal check found: the effect where the rule says so, against where it does not."""
    check = described.check
    if check is None:
        return "too few positions to say"
    verdict = "it acts on its rule" if check.passed else "not shown to act on it"
    return (
        f"{check.effect:+z.2f} to {token_to_label(check.token)} when it should fire, {check.control:+z.2f} "
        f"when not: {verdict}"
    )


def write_page(story: Story, path: str | Path) -> None:
    """Writes the page, whole or not at all."""
    webpage.write(page(story), path)
