"""The exercise page's functions under their own names, each a line or two over the rest.

Source of names, signatures and meanings: ARENA 1.5.3, sections 1 and 2 ("Looking for modular circuits"). A
`probe` here is a plain tensor of directions [d_model 8 8]: `LinearProbe.blank` or `LinearProbe.mine`, or
their `.normalised()` forms. Differences, each on purpose: functions read one game of a batch that the
caller names and change nothing that they are given, except `apply_scale` and `patch_final_move_output`,
which edit in place as on the page because they are the bodies of hooks.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.attribution import accumulated_scores, contributions
from interp.intervene import scale_coordinate
from interp.neurons import kurtosis
from interp.patching import Metric, patch_sweep, patching_metric
from interp.plots import Svg, plot_board_values
from interp.probes import LinearProbe
from othello_gpt import ActivationCache, HookPoint, OthelloGPT, board

__all__ = [
    "apply_scale",
    "calculate_accumulated_probe_score",
    "calculate_attn_and_mlp_probe_score_contributions",
    "calculate_neuron_input_weights",
    "calculate_neuron_output_weights",
    "get_act_patch_attn_mlp",
    "get_act_patch_resid_pre",
    "get_board_states_and_legal_moves",
    "get_w_in",
    "get_w_out",
    "kurtosis",
    "patch_final_move_output",
    "patching_metric",
    "plot_board_values",
    "plot_probe_outputs",
]


def get_board_states_and_legal_moves(
    games_square: Int[Tensor, "game ply"],
) -> tuple[Int[Tensor, "game ply 8 8"], Int[Tensor, "game ply 8 8"], list]:
    """The board after every move (+1 black, -1 white), the replies of whoever moves next (1 or 0), and these
    once more as marks "o" and "" in nested lists, for the `text` of `plot_board_values`."""
    record = board.play(games_square.numpy())
    state, legal = (torch.from_numpy(field).int() for field in (record.state, record.legal))
    return state, legal, np.where(record.legal, "o", "").tolist()


def plot_probe_outputs(
    cache: ActivationCache, linear_probe: LinearProbe, layer: int, game_index: int, move: int
) -> Svg:
    """Three boards: what the probe believes to be empty, theirs and mine after one move (probabilities)."""
    resid = cache["resid_post", layer][game_index, move]
    believed = linear_probe.probabilities(resid).movedim(-1, 0)
    return plot_board_values(believed, board_titles=[f"P({c})" for c in linear_probe.classes])


def calculate_attn_and_mlp_probe_score_contributions(
    focus_cache: ActivationCache,
    probe: Float[Tensor, "d_model 8 8"],
    layer: int,
    game_index: int,
    move: int,
) -> tuple[Float[Tensor, "layer 8 8"], Float[Tensor, "layer 8 8"]]:
    """What attention, and what the MLP, of each layer 0 to `layer` (inclusive) add to the probe's score.

    The columns leave out the embeddings, so they do not sum to the accumulated score;
    `interp.attribution.contributions` has the missing two.
    """
    run = focus_cache.select(batch=game_index, pos=move)
    values = contributions(run, probe, layer).values[2:, 0, 0]
    return values[0::2], values[1::2]


def calculate_accumulated_probe_score(
    focus_cache: ActivationCache,
    probe: Float[Tensor, "d_model 8 8"],
    layer: int,
    game_index: int,
    move: int,
) -> Float[Tensor, "layer 8 8"]:
    """The probe's score of the residual stream after each layer 0 to `layer` (inclusive)."""
    return accumulated_scores(focus_cache.select(game_index, move), probe, layer)[:, 0, 0]


def get_w_in(
    model: OthelloGPT, layer: int, neuron: int, normalize: bool = False
) -> Float[Tensor, " d_model"]:
    """A copy of the neuron's input weights, of unit length if `normalize`."""
    w_in = model.blocks[layer].mlp.W_in[:, neuron].detach().clone()
    return w_in / w_in.norm() if normalize else w_in


def get_w_out(
    model: OthelloGPT, layer: int, neuron: int, normalize: bool = False
) -> Float[Tensor, " d_model"]:
    """A copy of the neuron's output weights, of unit length if `normalize`."""
    w_out = model.blocks[layer].mlp.W_out[neuron].detach().clone()
    return w_out / w_out.norm() if normalize else w_out


def calculate_neuron_input_weights(
    model: OthelloGPT, probe: Float[Tensor, "d_model 8 8"], layer: int, neuron: int
) -> Float[Tensor, "8 8"]:
    """The unit input weights of a neuron times each square's direction (taken as it is: give a unit one)."""
    return torch.tensordot(get_w_in(model, layer, neuron, normalize=True), probe, 1)


def calculate_neuron_output_weights(
    model: OthelloGPT, probe: Float[Tensor, "d_model 8 8"], layer: int, neuron: int
) -> Float[Tensor, "8 8"]:
    """The unit output weights of a neuron times each square's direction (taken as it is: give a unit one)."""
    return torch.tensordot(get_w_out(model, layer, neuron, normalize=True), probe, 1)


def apply_scale(
    resid: Float[Tensor, "batch pos d_model"],
    flip_dir: Float[Tensor, " d_model"],
    scale: float,
    pos: int,
) -> Float[Tensor, "batch pos d_model"]:
    """Multiplies the coordinate along `flip_dir` of the first game by `-scale` at `pos`, in place."""
    resid[0, pos] = scale_coordinate(resid[0, pos], flip_dir, scale)
    return resid


def patch_final_move_output(
    activation: Float[Tensor, "batch pos d_model"], hook: HookPoint, clean_cache: ActivationCache
) -> Float[Tensor, "batch pos d_model"]:
    """A hook's body: the last position's activation becomes that of the clean run, in place."""
    activation[:, -1] = clean_cache[hook.name][:, -1]
    return activation


def get_act_patch_attn_mlp(
    model: OthelloGPT,
    clean_tokens: Int[Tensor, "*batch pos"],
    corrupted_tokens: Int[Tensor, "*batch pos"],
    patching_metric: Metric,
) -> Float[Tensor, "site=2 layer"]:
    """The metric with attn_out (row 0) or mlp_out (row 1) of each layer patched at the last move."""
    effects = patch_sweep(model, clean_tokens, corrupted_tokens, patching_metric)
    return torch.stack([effects["attn_out"], effects["mlp_out"]])


@torch.no_grad()
def get_act_patch_resid_pre(
    model: OthelloGPT,
    corrupted_tokens: Int[Tensor, "*batch pos"],
    clean_cache: ActivationCache,
    patching_metric: Metric,
) -> Float[Tensor, "site=2 layer"]:
    """The same under the page's (misleading) name and arguments: it patches attn_out and mlp_out.

    The clean run comes as a cache, so this is the page's own loop of sixteen hooked runs;
    `get_act_patch_attn_mlp` takes the clean tokens and gives the same many times faster.
    """

    def patched(site: str, layer: int) -> Tensor:
        def patch(activation: Tensor, hook: HookPoint) -> Tensor:
            return patch_final_move_output(activation, hook, clean_cache)

        logits = model.run_with_hooks(corrupted_tokens, [(f"blocks.{layer}.hook_{site}", patch)])
        return torch.as_tensor(patching_metric(logits))

    layers = range(model.cfg.n_layers)
    sites = ("attn_out", "mlp_out")
    return torch.stack([torch.stack([patched(site, layer) for layer in layers]) for site in sites])
