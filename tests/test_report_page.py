"""The report in a browser: the slider changes what is shown, and every figure is what Python's calls give."""

import json
import re

import numpy as np
import pytest
import torch
from browsing import browse

from interp import report
from interp.attribution import direct_logit_attribution, head_contributions
from interp.story import shipped_probes
from othello_gpt import OthelloGPT, board
from othello_gpt.games import example_game, games_to_tokens
from othello_gpt.vocab import label_to_square, square_to_label, square_to_token

pytestmark = pytest.mark.slow
MODEL = OthelloGPT.from_pretrained()
GAME = example_game()
RECORD = board.play(GAME)


@pytest.fixture(scope="module")
def path(story, tmp_path_factory):
    where = tmp_path_factory.mktemp("page") / "report.html"
    report.write_page(story, where)
    return where


@pytest.fixture(scope="module")
def run():
    with torch.no_grad():
        return MODEL.run_with_cache(games_to_tokens(GAME[None]))


def titles(page, selector: str) -> dict[str, str]:
    """What the parts of a picture say when pointed at, by their names."""
    words = page.locator(f"{selector} svg > * > title").all_text_contents()
    return dict(word.split(": ", 1) for word in words)


def test_the_page_s_data_are_what_the_calls_give(path, run):
    """Boards, legal moves, probabilities, beliefs and contributions of drawn plies."""
    stored = re.search(r'id="story">(.*?)</script>', path.read_text())[1]
    story, (logits, cache) = json.loads(stored), run
    probabilities = logits[0].softmax(-1)
    for ply in np.random.default_rng().choice(len(story["moves"]), 6, replace=False).tolist():
        discs = "".join({0: ".", 1: "b", -1: "w"}[int(d)] for d in RECORD.state[ply].ravel())
        assert story["state"][ply] == discs
        assert story["legal"][ply] == np.flatnonzero(RECORD.legal[ply]).tolist()
        square = story["legal"][ply][0]
        shown = story["probabilities"][ply][square]
        assert shown == pytest.approx(probabilities[ply, square_to_token(square)].item(), abs=6e-5)
        token = square_to_token(story["explained"][ply])
        whole = direct_logit_attribution(MODEL, cache, token, ply)
        assert story["parts"][ply] == pytest.approx(whole.values[:, 0].tolist(), abs=1e-3)
        direction = MODEL.ln_final.w * MODEL.W_U[:, token]
        one = cache.select(pos=ply)
        scale = one["ln_final.hook_scale"].item()
        heads = head_contributions(MODEL, one, direction - direction.mean(), 3).values[:-1, 0, 0]
        assert story["heads"][ply][3] == pytest.approx((heads / scale).tolist(), abs=1e-3)
        for layer, probe in enumerate(shipped_probes()):
            belief = probe.probabilities(cache["resid_post", layer][0, ply])
            expected = (belief[..., 2] - belief[..., 1]).flatten().tolist()
            assert story["believed"][ply][layer] == pytest.approx(expected, abs=1e-3)


def test_the_slider_moves_through_the_whole_game(path):
    """By pointer, buttons and keys; boards, legal moves, beliefs and contributions follow."""
    with browse(path) as page:
        status, slider = page.locator("#status"), page.locator("#move")
        assert status.text_content() == "After move 21, E0: white to move"
        assert slider.get_attribute("max") == str(58 - 1 + (RECORD.to_move[58] != 0))
        for ply in (0, 8, 40):
            slider.fill(str(ply))
            assert f"After move {ply + 1}, {square_to_label(GAME[ply])}" in status.text_content()
            shown = titles(page, "#board")
            legal = {label_to_square(k) for k, v in shown.items() if v.endswith(", legal")}
            assert legal == set(np.flatnonzero(RECORD.legal[ply]).tolist())
            black = {label_to_square(k) for k, v in shown.items() if v.startswith("black")}
            assert black == set(np.flatnonzero(RECORD.state[ply] == 1).tolist())
        before = page.locator("#believed").inner_html(), page.locator("#heads").inner_html()
        slider.press("ArrowRight")
        assert status.text_content().startswith("After move 42,")
        page.locator("#back").click()
        page.locator("#back").click()
        assert status.text_content().startswith("After move 40,")
        assert page.locator("#believed svg").count() == 8
        assert page.locator("#believed").inner_html() != before[0]
        assert page.locator("#heads").inner_html() != before[1]
        page.locator("body").press("ArrowLeft")
        assert status.text_content().startswith("After move 39,")


def test_what_is_legal_is_compared_with_what_is_predicted(path, run):
    """The likeliest moves in order with their probabilities, as many as are legal."""
    probabilities = run[0][0, 8].softmax(-1)
    n = int(RECORD.legal[8].sum())
    top = probabilities[1:].topk(n)
    with browse(path) as page:
        page.locator("#move").fill("8")
        chips = page.locator("#moves li").all_text_contents()
        legality = page.locator("#legality").text_content()

    right = sum(RECORD.legal[8].flat[s] for s in [label_to_square(chip[:2]) for chip in chips])
    assert [float(chip[3:-1]) for chip in chips] == pytest.approx(
        (100 * top.values).tolist(), abs=0.06
    )
    assert legality.startswith(f"{right} of the {n} legal moves")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_its_window_light_and_dark(path, width, dark):
    """Nothing is cut off sideways, and the colours follow the reader's."""
    with browse(path, width, dark) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 200) is dark
