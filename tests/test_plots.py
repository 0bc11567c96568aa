"""Pictures are sound SVG, say the numbers they were given, and never disturb each other or their input."""

import math
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import games

from interp import svg
from interp.plots import (
    Svg,
    plot_bars,
    plot_board,
    plot_board_values,
    plot_graph,
    plot_grid,
    plot_lines,
    plot_spectrum,
)
from othello_gpt import board
from othello_gpt.vocab import square_to_label

_SVG = "{http://www.w3.org/2000/svg}"
_numbers = st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf, -np.inf])
_values = hnp.arrays(float, st.sampled_from([(8, 8), (3, 8, 8), (2, 64)]), elements=_numbers)


def _hover(picture: Svg) -> list[str]:
    """What the parts of a picture say when pointed at, its own title left out."""
    return [title.text or "" for title in ET.fromstring(picture).iter(f"{_SVG}title")][1:]


def _shown(picture: Svg) -> list[str]:
    return [text.text or "" for text in ET.fromstring(picture).iter(f"{_SVG}text")]


def _fills(picture: Svg) -> list[str]:
    """The colours of the cells, in order."""
    rects = ET.fromstring(picture).iter(f"{_SVG}rect")
    return [rect.attrib["fill"] for rect in rects if rect.find(f"{_SVG}title") is not None]


def _one_of_each() -> dict[str, Svg]:
    values = np.linspace(-1, 1, 128).reshape(2, 8, 8)
    return {
        "board": plot_board(board.START, values[0] > 0, 19, "start"),
        "values": plot_board_values(values, ["a", "b"], pieces=board.START, last_move=3),
        "lines": plot_lines({"a": [0.0, np.nan, 2.0], "b": [1, 2, 3]}, title="t", y_title="nats"),
        "grid": plot_grid([[1.0, np.nan], [-3.0, 0.0]], ["r0", "r1"], ["c0", "c1"], "t"),
        "bars": plot_bars(["up", "down", "none"], [1.0, -2.0, np.nan], "t"),
        "graph": plot_graph({"a": (0, "x"), "b": (4, "y")}, [("a", "b", 0.5)], "t"),
    }


@pytest.mark.parametrize("kind", ["board", "values", "lines", "grid", "bars", "graph"])
def test_a_picture_is_sound_alone_and_keeps_to_itself(kind):
    """It parses, has a role and a title, and holds no script, id, style rule or address."""
    picture = _one_of_each()[kind]
    root = ET.fromstring(picture)
    assert root.attrib["role"] == "img"
    assert root[0].tag == f"{_SVG}title"
    assert root[0].text
    assert not {"script", "style", "image", "use"} & {
        part.tag.removeprefix(_SVG) for part in root.iter()
    }
    assert not any("id" in part.attrib or "class" in part.attrib for part in root.iter())
    assert picture.count("http") == 1
    assert "url(" not in picture
    assert "nan" not in " ".join(str(v) for part in root.iter() for v in part.attrib.values())


def test_the_same_input_gives_the_same_picture():
    """No picture holds a counter, a date or a random name."""
    assert _one_of_each() == _one_of_each()


def test_notebooks_and_files_get_the_picture_itself(tmp_path):
    """Both notebook forms and the saved file are the text of the picture, also beyond ASCII."""
    picture = plot_bars(["Weiß ●"], [1.0])
    picture.save(tmp_path / "bars.svg")
    assert picture._repr_svg_() == picture._repr_html_() == picture
    assert (tmp_path / "bars.svg").read_text(encoding="utf-8") == picture
    assert [path.name for path in tmp_path.iterdir()] == ["bars.svg"]


@given(st.text(min_size=1))
def test_any_text_of_the_user_stays_text(words):
    """Markup, quotes and characters that XML cannot hold arrive as words or as U+FFFD."""
    marks = np.full((8, 8), words, dtype=object)
    for picture in (
        plot_board_values(np.zeros((8, 8)), [words], text=marks),
        plot_board(board.START, title=words),
        plot_lines({words: [1.0]}, [words], words, words, words),
        plot_grid([[1.0]], [words], [words], words),
        plot_bars([words], [1.0], words),
        plot_graph({words: (0, words)}, [], words),
    ):
        tags = {part.tag.removeprefix(_SVG) for part in ET.fromstring(picture).iter()}
        assert tags <= {"svg", "title", "g", "rect", "circle", "text", "line", "polyline"}


def test_markup_is_shown_as_it_was_written():
    """Signs of XML are escaped once, not dropped and not twice."""
    assert _hover(plot_bars(["<b>&\"'"], [0.5])) == ["<b>&\"': 0.5"]


def test_numbers_may_be_titles():
    """Of boards and of an axis, as their words are."""
    assert plot_board_values(np.zeros((8, 8)), [7]) == plot_board_values(np.zeros((8, 8)), ["7"])
    assert plot_lines({"a": [1.0, 2.0]}, [3, 4]) == plot_lines({"a": [1.0, 2.0]}, ["3", "4"])


@given(_values)
def test_every_square_of_every_board_says_its_label_and_value(values):
    """64 cells a board, row by row, whatever shape the boards came in and whatever they hold."""
    expected = [
        f"{square_to_label(i % 64)}: {value:.4g}" for i, value in enumerate(values.reshape(-1))
    ]
    assert _hover(plot_board_values(values)) == expected


@given(_values)
def test_a_picture_leaves_its_input_alone_and_tensors_look_like_arrays(values):
    """Nothing is written to the input; a tensor, with or without gradient, gives the same picture."""
    before, picture = values.copy(), plot_board_values(values)
    np.testing.assert_array_equal(values, before)
    assert plot_board_values(torch.from_numpy(values).requires_grad_()) == picture


def test_bfloat16_can_be_drawn():
    """numpy does not know the type; the picture is that of the same numbers in float32."""
    values = torch.linspace(-1, 1, 64).reshape(8, 8).bfloat16()
    assert plot_board_values(values) == plot_board_values(values.float())


@given(st.floats(1e-6, 1e6), st.floats(0, 2))
def test_colours_are_symmetric_around_zero(limit, share):
    """A value and its negative are equally far from white, in blue and in red; zero is white."""

    def strength(colour: str, full: str) -> float:
        part = min(range(1, 7, 2), key=lambda i: int(full[i : i + 2], 16))
        return (255 - int(colour[part : part + 2], 16)) / (255 - int(full[part : part + 2], 16))

    value = share * limit
    blue, red = (svg.colour(sign * value, limit) for sign in (1, -1))
    expected = min(share, 1)
    assert strength(blue, svg.colour(limit, limit)) == pytest.approx(expected, abs=0.003)
    assert strength(red, svg.colour(-limit, limit)) == pytest.approx(expected, abs=0.003)
    assert svg.colour(0.0, limit) == "#ffffff"


@given(_values)
def test_the_colour_bar_is_centred_on_zero_or_starts_there(values):
    """With negative values the bar runs from minus to plus its limit, otherwise from zero."""
    low, middle, high = map(float, _shown(plot_board_values(values))[-3:])
    if (values < 0).any():
        assert (low, middle) == (-high, 0)
    else:
        assert low == 0
    finite = np.abs(values[np.isfinite(values)])
    assert high == pytest.approx(finite.max(initial=0) or 1, rel=0.01)


def test_all_boards_share_one_scale():
    """The largest magnitude has full colour, and half of it on another board has half."""
    one, half = np.eye(8), np.eye(8) / 2
    fills = _fills(plot_board_values(np.stack([one, half])))
    assert fills[0] == svg.colour(1, 1)
    assert fills[64] == svg.colour(0.5, 1)
    assert _fills(plot_board_values(half, limit=1))[0] == fills[64]


def test_nan_is_neutral_and_zero_is_white():
    """Neither is mistaken for a value; an all-zero and an all-nan board can be drawn."""
    assert set(_fills(plot_board_values(np.zeros((8, 8))))) == {"#ffffff"}
    assert set(_fills(plot_board_values(np.full((8, 8), np.nan)))) == {svg.NEUTRAL}


def test_an_infinity_has_full_colour_and_does_not_bleach_the_rest():
    """Log-probabilities of minus infinity leave the scale to the finite values."""
    values = np.zeros((8, 8))
    values[0, :2] = -np.inf, -2.0
    fills = _fills(plot_board_values(values))
    assert fills[0] == fills[1] == svg.colour(-1, 1)


@given(games(max_plies=10))
def test_a_board_shows_the_rules_board(game):
    """Its cells name the stones and the legal moves of the position, and its discs count them."""
    record = board.play(game)
    state, legal = record.state[-1].flatten(), record.legal[-1].flatten()
    picture = plot_board(record.state[-1], record.legal[-1], int(game[-1]))
    names = {0: "empty", 1: "black", -1: "white"}
    expected = [
        f"{square_to_label(square)}: {names[int(stone)]}{', legal' * int(legal[square])}"
        for square, stone in enumerate(state)
    ]
    assert _hover(picture) == expected
    assert picture.count("<circle") == np.count_nonzero(state) + legal.sum()


def test_pieces_dots_marks_and_outlines_are_drawn_where_asked():
    """One layer for all boards is repeated; one for each is not."""
    values, legal = np.zeros((2, 8, 8)), np.zeros((8, 8), bool)
    legal[2, 3] = True
    plain = plot_board_values(values)
    assert plot_board_values(values, pieces=board.START).count("<circle") == 8
    assert plot_board_values(values, legal=legal).count("<circle") == 2
    assert plot_board_values(values, legal=np.stack([legal, ~legal])).count("<circle") == 64
    assert plot_board_values(values, last_move=19).count("<rect") == plain.count("<rect") + 2
    marks = np.full((8, 8), "", dtype=object)
    marks[0, 0] = "x"
    assert _shown(plot_board_values(values, text=marks)).count("x") == 2


@given(st.integers(1, 9), st.integers(1, 5))
def test_boards_are_laid_out_in_rows_of_the_asked_length(n, per_row):
    """The boards' places are a grid filled from the left, and `size` scales the whole."""
    picture = plot_board_values(np.zeros((n, 8, 8)), boards_per_row=per_row)
    places = re.findall(r'translate\(([\d.]+) ([\d.]+)\)"', picture)[:n]
    xs, ys = ({float(place[axis]) for place in places} for axis in (0, 1))
    assert len(set(places)) == n
    assert (len(xs), len(ys)) == (min(n, per_row), -(-n // per_row))
    width = float(ET.fromstring(picture).attrib["width"])
    double = plot_board_values(np.zeros((n, 8, 8)), boards_per_row=per_row, size=400)
    assert float(ET.fromstring(double).attrib["width"]) == 2 * width


@given(hnp.arrays(float, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements=_numbers))
def test_a_grid_says_and_shows_every_number(grid):
    """Row by row, each cell names its row, its column and its value."""
    rows, cols = (
        [f"{kind}{i}" for i in range(n)] for kind, n in zip("rc", grid.shape, strict=True)
    )
    picture = plot_grid(grid, rows, cols)
    expected = [
        f"{row}, {col}: {grid[i, j]:.4g}"
        for i, row in enumerate(rows)
        for j, col in enumerate(cols)
    ]
    assert _hover(picture) == expected
    assert len(_shown(picture)) == grid.size + sum(grid.shape)


@given(hnp.arrays(float, st.integers(1, 8), elements=_numbers))
def test_bars_say_their_values_and_point_to_their_sign(values):
    """Lengths are in proportion to the finite magnitudes; positive bars start where negative ones end."""
    picture = plot_bars([f"b{i}" for i in range(len(values))], values)
    assert _hover(picture) == [f"b{i}: {value:.4g}" for i, value in enumerate(values)]
    root = ET.fromstring(picture)
    zero = float(root.find(f"{_SVG}line").attrib["x1"])
    full = np.abs(values[np.isfinite(values)]).max(initial=0) or 1
    for value, rect in zip(values, root.iter(f"{_SVG}rect"), strict=True):
        x, width = float(rect.attrib["x"]), float(rect.attrib["width"])
        assert (x + width if value < 0 else x) == pytest.approx(zero, abs=0.11)
        share = 0 if np.isnan(value) else min(abs(value) / full, 1)
        assert width == pytest.approx(130 * share, abs=0.06)


@given(hnp.arrays(float, st.integers(1, 12), elements=_numbers))
def test_lines_have_a_marker_for_each_finite_value_within_the_axes(values):
    """A value that is not finite has no marker and breaks the line; markers lie between the outer ticks."""
    picture = plot_lines({"a": values})
    finite = np.flatnonzero(np.isfinite(values))
    assert _hover(picture) == [f"a, {i}: {values[i]:.4g}" for i in finite]
    root = ET.fromstring(picture)
    heights = sorted(float(line.attrib["y1"]) for line in root.iter(f"{_SVG}line"))
    marks = [part for part in root.iter(f"{_SVG}circle") if part.find(f"{_SVG}title") is not None]
    assert all(heights[0] - 0.1 <= float(m.attrib["cy"]) <= heights[-1] + 0.1 for m in marks)
    joined = sum(len(part.attrib["points"].split()) - 1 for part in root.iter(f"{_SVG}polyline"))
    assert joined == (np.diff(finite) == 1).sum()


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_few_round_and_evenly_apart(low, span):
    """Two to eight numbers, no two written alike, however small or large the values are."""
    picture = plot_lines({"a": [low, low + span]}, ["from", "to"])
    lines = [float(line.attrib["y1"]) for line in ET.fromstring(picture).iter(f"{_SVG}line")]
    ticks = _shown(picture)[: len(lines)]
    assert 2 <= len(set(ticks)) == len(lines) <= 8
    assert np.ptp(np.diff(lines)) <= 0.21


def test_zero_has_the_stronger_line():
    """Where the axis crosses zero one line is at full strength, elsewhere none."""
    assert plot_lines({"a": [-1, 1]}).count('opacity="1"') == 1
    assert plot_lines({"a": [1, 2]}).count('opacity="1"') == 0


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(-1, 3), min_size=1), st.data())
def test_boxes_stand_in_their_columns_and_never_overlap(columns, data):
    """Left to right as numbered, one above the other within; every edge has a line and its share."""
    names = list(columns)
    ends = st.tuples(st.sampled_from(names), st.sampled_from(names), st.floats(-1, 1))
    edges = [e for e in data.draw(st.lists(ends, max_size=4)) if columns[e[0]] < columns[e[1]]]
    picture = plot_graph({name: (column, "words") for name, column in columns.items()}, edges)
    root = ET.fromstring(picture)
    boxes = {}
    for rect in root.iter(f"{_SVG}rect"):
        x, y, width, height = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        boxes[rect[0].text] = x, x + width, y, y + height

    assert set(boxes) == set(names)
    for a in names:
        for b in names:
            if columns[a] < columns[b]:
                assert boxes[a][1] < boxes[b][0]
            elif a < b and columns[a] == columns[b]:
                assert boxes[a][3] < boxes[b][2] or boxes[b][3] < boxes[a][2]
    assert len(list(root.iter(f"{_SVG}polyline"))) == len(edges)
    assert all(f"{share:.0%}" in _shown(picture) for _, _, share in edges)


def test_a_spectrum_splits_the_activations_by_label():
    """Two histograms in percent; together they hold every activation."""
    pytest.importorskip("plotly")
    activations, labels = torch.linspace(-1, 3, 10), torch.arange(10) < 3
    no, yes = plot_spectrum(activations, labels).data
    assert (no.name, yes.name) == ("False (7)", "True (3)")
    assert no.histnorm == yes.histnorm == "percent"
    np.testing.assert_allclose(yes.x, activations[labels])
    np.testing.assert_allclose(no.x, activations[~labels])


def test_a_spectrum_without_plotly_says_what_to_install(monkeypatch):
    """The extra is named as pip wants it."""
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'othello-gpt[plots]'")):
        plot_spectrum([1.0], [True])


_BOARD = np.zeros((8, 8))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_board_values(np.zeros(60)), r"`values` has shape \(60,\).*values_on_board"),
        (lambda: plot_board_values(np.zeros((0, 8, 8))), r"`values` has shape \(0, 8, 8\)"),
        (lambda: plot_board_values(np.zeros((1, 1, 8, 8))), "boards are .8 8., .n 8 8. or .n 64."),
        (lambda: plot_board_values(_BOARD, ["a", "b"]), "2 titles for 1 boards: give one each"),
        (
            lambda: plot_board_values(_BOARD, boards_per_row=0),
            "`boards_per_row` is 0: give 1 or more",
        ),
        (lambda: plot_graph({}, []), "`nodes` is empty: give at least one box"),
        (
            lambda: plot_graph({"a": (0, "")}, [("a", "b", 1.0)]),
            "an edge joins 'b', but nodes are a",
        ),
        (lambda: plot_board_values(_BOARD, text=["a"]), r"`text` has shape \(1,\)"),
        (
            lambda: plot_board_values(_BOARD, legal=np.zeros((2, 64))),
            "`legal` holds 2 boards for 1",
        ),
        (lambda: plot_board_values(_BOARD, pieces=_BOARD + 2), "`pieces` holds 2 at board 0, A0"),
        (lambda: plot_board_values(_BOARD, last_move=64), "`last_move` is 64: squares are 0 to 63"),
        (lambda: plot_board_values(_BOARD, limit=-1.0), "`limit` is -1.0.*above 0"),
        (lambda: plot_board_values(_BOARD, limit=math.inf), "`limit` is inf: give the finite"),
        (lambda: plot_board(np.zeros((3, 8, 8))), r"`state` holds 3 boards.*state\[-1\]"),
        (lambda: plot_board(_BOARD + 5), "`state` holds 5 at board 0, A0. Black is .1, white -1"),
        (lambda: plot_grid([[1.0, 2.0]], ["a"], ["b"]), "1 row labels and 1 column labels"),
        (lambda: plot_bars(["a"], [1.0, 2.0]), r"1 labels for values of shape \(2,\)"),
        (lambda: plot_lines({}), "give sequences .n. of one length"),
        (lambda: plot_lines({"a": [1.0], "b": [1.0, 2.0]}), r"shapes \[\(1,\), \(2,\)\]"),
        (lambda: plot_lines({"a": [1.0]}, ["x", "y"]), "2 `x_labels` for 1 values"),
        (lambda: plot_spectrum([1.0, 2.0], [True]), r"\(2,\) activations, but \(1,\) labels"),
        (lambda: plot_spectrum([1.0], [2]), "hold more than true and false: compare first"),
    ],
)
def test_a_wrong_input_is_named_with_what_was_expected(draw, message):
    """Shapes, squares and counts are checked before anything is drawn."""
    with pytest.raises(ValueError, match=message):
        draw()
