"""The atlas: its answers are those of the calls it is made of, and its page lets people find them."""

import base64

import numpy as np
import pytest
import torch
from browsing import browse
from model_strategies import random_model

from interp import atlas_page
from interp.atlas import AtlasGames, describe_neurons, make_atlas
from interp.causal_checks import causal_checks
from interp.neurons import logit_weights
from interp.positions import stream_neurons
from interp.probes import LinearProbe
from interp.rules import find_rules, score_rule
from othello_gpt import GPTConfig, board, cli
from othello_gpt.vocab import PLAYABLE

SMALL = GPTConfig(n_layers=2, d_model=160, n_heads=2, d_head=4, d_mlp=130)
MODEL = random_model(SMALL, dtype=torch.float32)
GAMES = AtlasGames.random(16, seed=6)


@pytest.fixture(scope="module")
def atlas():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(160, 8, 8, 3, generator=generator)
    return make_atlas(MODEL, LinearProbe(W, torch.zeros(8, 8, 3), layer=0), GAMES)


@pytest.fixture(scope="module")
def path(atlas, tmp_path_factory):
    where = tmp_path_factory.mktemp("atlas") / "atlas.html"
    atlas_page.write_page(atlas, where)
    return where


def test_games_for_finding_scoring_and_checking_are_others():
    """So that no rule is scored on what it was found on."""
    sizes = [len(games) for games in GAMES]
    moves = {tuple(game) for games in GAMES for game in games.tolist()}

    assert sizes == [16, 8, 4]
    assert len(moves) == 28


def test_neurons_are_described_by_the_calls_that_it_is_made_of(atlas):
    """Rule, score and check of a drawn neuron, found again by hand, alone as among all others."""
    n = int(np.random.default_rng().integers(SMALL.d_mlp))
    described = describe_neurons(MODEL, 1, GAMES, [n])[0]
    (positions, post), (held_out, later) = (
        next(stream_neurons(MODEL, games, [1], 99)) for games in GAMES[:2]
    )
    rule = find_rules(positions, post[0, :, [n]].numpy())[0]

    assert described == atlas.described[SMALL.d_mlp + n]
    assert described.rule == rule
    assert described.score == score_rule(rule, held_out, later[0, :, n].numpy())
    assert described.check == causal_checks(MODEL, GAMES.checked, 1, {n: rule}).get(n)


def test_the_page_s_figures_are_the_atlas_s(atlas):
    """Of drawn neurons: statistics, scores, boards to a 65 534th of their range, positions with their boards."""
    data, record = atlas_page.as_data(atlas), board.play(GAMES.rules)
    boards, logits = (
        np.frombuffer(base64.b64decode(data[name]["base64"]), "<i2") * data[name]["scale"]
        for name in ("boards", "logits")
    )
    for i in np.random.default_rng().choice(len(atlas.described), 5, replace=False).tolist():
        d = atlas.described[i]
        place = d.layer, d.neuron
        assert (data["layer"][i], data["neuron"][i], data["rule"][i]) == (*place, str(d.rule))
        assert data["f1"][i] == pytest.approx(d.score.f1, abs=5e-5)
        for name, values in data["statistics"].items():
            exact = atlas.table.statistics[name][place].item()
            assert values[i] == pytest.approx(exact, rel=1e-3, nan_ok=True)
        shown = boards[256 * i : 256 * i + 256].reshape(4, 8, 8)
        exact = torch.cat([atlas.table.reads[place], atlas.table.writes[place]])
        assert shown == pytest.approx(exact.numpy(), abs=data["boards"]["scale"])
        on_moves = logits[64 * i : 64 * i + 64][list(PLAYABLE)]
        direct = logit_weights(MODEL, *place).numpy()
        assert on_moves == pytest.approx(direct, abs=data["logits"]["scale"])
        last, mover, discs, activation = data["top"][i][0]
        positions, post = next(stream_neurons(MODEL, GAMES.rules, [d.layer], 99))
        row = int(post[0, :, d.neuron].argmax())
        where = positions.game[row], positions.ply[row]
        assert activation == pytest.approx(post[0, row, d.neuron].item(), rel=1e-3)
        assert (last, mover) == (GAMES.rules[where], record.to_move[where])
        assert discs == "".join(".bw"[int(disc)] for disc in record.state[where].ravel())


@pytest.mark.slow
def test_search_sort_and_filters_change_what_is_shown(atlas, path):
    """In a browser, by keys and pointer, against the same choice made in Python."""
    with browse(path) as page:
        count, names = page.locator("#count"), "#rows tr td:first-child"
        assert count.text_content() == "260 neurons"
        assert page.locator("#rows tr").count() == 100
        page.locator("#more").click()
        assert page.locator("#rows tr").count() == 200

        by_f1 = sorted(atlas.described, key=lambda d: -round(d.score.f1, 4))
        shown = page.locator("#rows tr td:nth-child(3)").all_text_contents()
        assert [float(f1) for f1 in shown[:50]] == pytest.approx(
            [d.score.f1 for d in by_f1[:50]], abs=0.0051
        )
        page.get_by_role("button", name="std").press("Enter")
        spread = atlas.table.statistics["std"]
        first = max(atlas.described, key=lambda d: float(f"{spread[d[:2]].item():.4g}"))
        assert page.locator(names).first.text_content() == f"L{first.layer}N{first.neuron}"
        page.get_by_role("button", name="std").click()
        assert page.locator("th[aria-sort=ascending]").text_content().startswith("std")
        assert page.locator(names).first.text_content() != f"L{first.layer}N{first.neuron}"

        page.locator("#search").fill("l1n12")
        assert page.locator(names).all_text_contents() == ["L1N12"]
        state = str(by_f1[0].rule.conditions[0])
        page.locator("#search").fill(state)
        expected = [d for d in atlas.described if f"{d.rule},".find(f"{state},") >= 0]
        assert count.text_content() == f"{len(expected)} neurons"
        page.locator("#search").fill("")
        page.locator("#layer").select_option("1")
        page.locator("#quality").select_option("0.5")
        high = [d for d in atlas.described if d.layer == 1 and d.score.f1 > 0.5]
        assert count.text_content() == f"{len(high)} neurons"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_neuron_is_opened_and_can_be_linked(path, width):
    """By keys: boards with the neuron's own figures; the address names it; nothing is cut off sideways."""
    with browse(path, width) as page:
        page.locator("#search").fill("L0N7")
        page.locator("#rows tr").first.press("Enter")
        assert page.locator("#detail h2").text_content() == "L0N7"
        assert page.locator("#detail svg").count() == 5 + 3
        assert page.evaluate("location.hash") == "#L0N7"
        assert page.locator("#rows tr").first.get_attribute("aria-selected") == "true"
        words = page.locator("#detail svg:nth-of-type(5) > rect > title").all_text_contents()
        shown = [float(words[square].split(": ")[1]) for square in PLAYABLE]
        assert shown == pytest.approx(logit_weights(MODEL, 0, 7).tolist(), abs=2e-3)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_layers_that_are_none_and_no_games_are_refused(tmp_path, capsys):
    """By the command and by the call, before any rule is looked for."""
    out = ["--out", str(tmp_path / "a.html")]
    assert cli.main(["atlas", "--layer", "8", "--games", "4", *out]) == 1
    assert "layers are 0 to 7" in capsys.readouterr().err
    assert cli.main(["atlas", "--games", "0", *out]) == 1
    assert "give at least one game to find rules on" in capsys.readouterr().err
    probe = LinearProbe(torch.zeros(160, 8, 8, 3), torch.zeros(8, 8, 3), layer=0)
    with pytest.raises(ValueError, match=r"`layers` is \[\]: layers are 0 to 1"):
        make_atlas(MODEL, probe, GAMES, layers=[])
