"""Pictures of boards and small charts as SVG text: they show in notebooks, print, mail and open offline.

A figure is a string, an `Svg`. Each cell says its label and value when pointed at.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from torch import Tensor

from interp import svg
from interp.svg import Svg
from othello_gpt.vocab import square_to_label

__all__ = [
    "Svg",
    "plot_bars",
    "plot_board",
    "plot_board_values",
    "plot_graph",
    "plot_grid",
    "plot_lines",
    "plot_spectrum",
]

Values = ndarray | Tensor | Sequence

# Okabe and Ito's colours, which colour-blind readers can tell apart, without black and yellow.
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#808080")
_SIGNS = {1: _SERIES[0], -1: _SERIES[1]}
_LAST_MOVE = "#e6a700"
_DISCS = {1: ("#111", "#ddd"), -1: ("#fff", "#444")}  # fill, rim
_STATES = {0: "empty", 1: "black", -1: "white"}
_SIDE, _BOARD_WIDTH, _BOARD_HEIGHT = 22, 200, 214


def plot_board_values(
    values: Values,
    board_titles: Sequence[object] | None = None,
    boards_per_row: int = 4,
    text: Values | None = None,
    pieces: Values | None = None,
    last_move: int | None = None,
    legal: Values | None = None,
    limit: float | None = None,
    size: float = _BOARD_WIDTH,
) -> Svg:
    """Boards of numbers: red below zero, white at zero, blue above; nan is grey.

    All boards share one colour scale, so they can be compared. `text`, `pieces` and `legal` are boards too:
    one for all, or one for each.

    Args:
        values: [8 8], [n 8 8] or [n 64].
        board_titles: one for each board.
        text: marks to write in the cells.
        pieces: +1 black, -1 white, 0 none, drawn as small discs.
        last_move: a square, 0 to 63, to outline.
        legal: true where a dot is drawn.
        limit: the magnitude of full colour; by default the largest finite one of all boards.
        size: the width of a board, in pixels.

    Raises:
        ValueError: a shape, a square or a number is not as above; the message says which.

    Example:
        >>> "C2: 0.5" in plot_board_values(np.eye(8) / 2, ["the diagonal"])
        True
    """
    boards = _as_boards(values, "values")
    titles = [""] * len(boards) if board_titles is None else list(map(str, board_titles))
    if len(titles) != len(boards):
        raise ValueError(f"{len(titles)} titles for {len(boards)} boards: give one each.")
    if boards_per_row < 1:
        raise ValueError(f"`boards_per_row` is {boards_per_row}: give 1 or more.")
    full = _full_colour(boards, limit)
    discs, dots = _pieces_like(boards, pieces, "pieces"), _like(boards, legal, "legal", bool)
    marks = _like(boards, np.full((8, 8), "") if text is None else text, "text", object)
    drawn = []
    for i, board in enumerate(boards.reshape(-1, 64)):
        cells = [(svg.colour(value, full), f"{value:.4g}") for value in board]
        drawn.append(_board(titles[i], cells, discs[i], dots[i], marks[i], last_move, radius=5))
    bar = _colour_bar(full, signed=bool((boards < 0).any()))
    name = ", ".join(filter(None, titles)) or "board values"
    return _tiled(drawn, boards_per_row, name, size / _BOARD_WIDTH, bar)


def plot_board(
    state: Values, legal: Values | None = None, last_move: int | None = None, title: str = ""
) -> Svg:
    """A board with its discs (+1 black, -1 white), its legal moves as dots and the last move outlined.

    Raises:
        ValueError: `state` is not one board of -1, 0 and +1, or `last_move` is no square.

    Example:
        >>> "D3: white" in plot_board([[0] * 8] * 3 + [[0, 0, 0, -1, 1, 0, 0, 0]] + [[0] * 8] * 4)
        True
    """
    board = _as_boards(state, "state")
    if len(board) != 1:
        raise ValueError(
            f"`state` holds {len(board)} boards: choose one, for instance `state[-1]`."
        )
    discs, dots = _pieces_like(board, state, "state")[0], _like(board, legal, "legal", bool)[0]
    cells = [
        (svg.FELT, _STATES[int(disc)] + (", legal" if dot else ""))
        for disc, dot in zip(discs, dots, strict=True)
    ]
    drawn = _board(title, cells, discs, dots, np.full(64, ""), last_move, radius=8)
    return _tiled([drawn], 1, title or "board", 1.0)


def plot_grid(
    values: Values, row_labels: Sequence[str], col_labels: Sequence[str], title: str = ""
) -> Svg:
    """A table of numbers, each in its colour; for instance a patch sweep, head by layer.

    Raises:
        ValueError: `values` is empty or not [rows cols].
    """
    grid = _as_numpy(values)
    if grid.shape != (len(row_labels), len(col_labels)) or not grid.size:
        raise ValueError(
            f"`values` has shape {grid.shape}, but there are {len(row_labels)} row labels and "
            f"{len(col_labels)} column labels. Give [rows cols], one label each."
        )
    full = _full_colour(grid, None)
    left, width, height = (
        14 + svg.text_width(row_labels),
        max(58, 8 + svg.text_width(col_labels)),
        24,
    )
    parts = [svg.text(left + width * (j + 0.5), 40, name) for j, name in enumerate(col_labels)]
    for i, row in enumerate(row_labels):
        parts.append(svg.text(left - 6, 64 + height * i, row, anchor="end"))
        for j, col in enumerate(col_labels):
            x, y, fill = left + width * j, 48 + height * i, svg.colour(grid[i, j], full)
            words = f"{row}, {col}: {grid[i, j]:.4g}"
            parts.append(svg.rect(x, y, width, height, fill, words, svg.LINE))
            number, ink = _number(grid[i, j], full), svg.readable_on(fill)
            parts.append(svg.text(x + width / 2, y + 16, number, fill=ink))
    right, bottom = left + width * len(col_labels), 56 + height * len(row_labels)
    return _titled(right + 8, bottom, title, parts, "grid of values")


def plot_bars(labels: Sequence[str], values: Values, title: str = "") -> Svg:
    """Signed horizontal bars with their numbers; nan has no bar.

    Raises:
        ValueError: the labels and the values differ in number.
    """
    numbers = _as_numpy(values)
    if numbers.shape != (len(labels),):
        raise ValueError(
            f"{len(labels)} labels for values of shape {numbers.shape}: give one each."
        )
    full, left = _full_colour(numbers, None), 12 + svg.text_width(labels)
    zero = left + (190 if (numbers < 0).any() else 10)
    parts = []
    for i, (label, value) in enumerate(zip(labels, numbers, strict=True)):
        y, sign = 32 + 20 * i, -1 if value < 0 else 1
        length = 130 * min(abs(np.nan_to_num(value)), full) / full
        x, end = min(zero, zero + sign * length), zero + sign * (length + 4)
        parts.append(svg.text(left, y + 13, label, anchor="end"))
        parts.append(svg.rect(x, y + 2, length, 15, _SIGNS[sign], f"{label}: {value:.4g}"))
        parts.append(
            svg.text(end, y + 13, _number(value, full), anchor="end" if sign < 0 else "start")
        )
    parts.append(svg.line(zero, 30, zero, 32 + 20 * len(labels)))
    return _titled(zero + 200, 40 + 20 * len(labels), title, parts, "bars")


def plot_lines(
    series: Mapping[str, Values],
    x_labels: Sequence[object] | None = None,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
) -> Svg:
    """Lines with markers and a legend; nan and infinities leave a gap.

    Args:
        series: name to values, [n] each.
        x_labels: one for each value; by default 0, 1, 2, ...

    Raises:
        ValueError: the series are none or empty, or differ in length from each other or from `x_labels`.
    """
    lines = {name: _as_numpy(values) for name, values in series.items()}
    shapes = {line.shape for line in lines.values()}
    if len(shapes) != 1 or (0,) in shapes or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"`series` has shapes {sorted(shapes)}: give sequences [n] of one length.")
    (n,) = shapes.pop()
    names = [str(i) for i in range(n)] if x_labels is None else list(map(str, x_labels))
    if len(names) != n:
        raise ValueError(f"{len(names)} `x_labels` for {n} values: give one each.")
    axes = _Axes(names, _ticks(np.concatenate(list(lines.values()))))
    parts = [*axes.drawn(x_title, y_title)]
    for k, (name, line) in enumerate(lines.items()):
        stroke, x, y = (
            _SERIES[k % len(_SERIES)],
            axes.left + axes.width + 16,
            axes.top + 12 + 18 * k,
        )
        parts += _line(name, line, axes, stroke)
        parts.append(svg.circle(x, y - 4, 4, stroke))
        parts.append(svg.text(x + 10, y, name, anchor="start"))
    right = axes.left + axes.width + 34 + svg.text_width(lines)
    bottom = axes.top + max(axes.height, 18 * len(lines)) + 48
    return _titled(right, bottom, title, parts, ", ".join(lines))


def plot_graph(
    nodes: Mapping[str, tuple[int, str]],
    edges: Sequence[tuple[str, str, float]],
    title: str = "",
) -> Svg:
    """Boxes in columns, joined from left to right by lines as strong as their shares; for instance a circuit.

    Args:
        nodes: name to its column (any integers, closed up in order) and a second line of words.
        edges: (from, to, share), where 1 is a whole.

    Raises:
        ValueError: no nodes, or an edge whose end is no node.
    """
    if not nodes:
        raise ValueError("`nodes` is empty: give at least one box.")
    if unknown := [end for edge in edges for end in edge[:2] if end not in nodes]:
        raise ValueError(f"an edge joins '{unknown[0]}', but nodes are {', '.join(nodes)}.")
    columns = sorted({column for column, _ in nodes.values()})
    width = 24 + svg.text_width([*nodes, *(words for _, words in nodes.values())])
    step, taken, places = width + 52, dict.fromkeys(columns, 0), {}
    for name, (column, _) in nodes.items():
        places[name] = 10 + step * columns.index(column), 36 + 84 * taken[column]
        taken[column] += 1
    parts = []
    for start, end, share in edges:
        line, (x, y) = _joined(places[start], places[end], width, step)
        parts.append(svg.polyline(line, _SIGNS[-1 if share < 0 else 1], 1 + 7 * min(abs(share), 1)))
        parts.append(svg.text(x, y, f"{share:.0%}", size=11))
    for name, (x, y) in places.items():
        parts.append(svg.rect(x, y, width, 40, "var(--paper, #fff)", name, svg.LINE))
        parts.append(svg.text(x + width / 2, y + 17, name))
        parts.append(svg.text(x + width / 2, y + 33, nodes[name][1], size=11))
    right, bottom = step * len(columns) - 32, 44 + 84 * max(taken.values())
    return _titled(right, bottom, title, parts, "graph")


def _joined(start: tuple[int, int], end: tuple[int, int], width: int, step: int):
    """A line from box to box, below any box between them, and where its number goes."""
    (x1, y1), (x2, y2) = (start[0] + width, start[1] + 20), (end[0], end[1] + 20)
    if x2 - x1 < step or y1 != y2:  # the number stands nearer the start, where fewer lines meet
        return [(x1, y1), (x2, y2)], ((2 * x1 + x2) / 3, (2 * y1 + y2) / 3 - 8)
    below = y1 + 36
    return [(x1, y1), (x1 + 24, below), (x2 - 24, below), (x2, y2)], ((x1 + x2) / 2, below - 6)


def plot_spectrum(activations: Values, labels: Values, title: str = ""):
    """A neuron's activations, split by a yes-or-no label, as an interactive plotly histogram.

    Bars are percent within their class, so a rare class shows beside a common one.

    Args:
        activations: any shape.
        labels: true or false for each activation, the same shape.

    Raises:
        ImportError: plotly is not installed.
        ValueError: the shapes differ, or a label is neither true nor false.
    """
    try:
        from plotly import graph_objects as go
    except ImportError as error:
        raise ImportError("plotly is missing: `pip install 'othello-gpt[plots]'`.") from error
    values, flags = _as_numpy(activations), _as_numpy(labels)
    if values.shape != flags.shape:
        raise ValueError(f"{values.shape} activations, but {flags.shape} labels: give one each.")
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(
            "`labels` hold more than true and false: compare first, as in `state == 1`."
        )
    figure = go.Figure(layout=dict(title=title, barmode="overlay", xaxis_title="activation"))
    figure.update_yaxes(title="percent of its class")
    for flag in (False, True):
        chosen = values[flags == flag]
        name = f"{flag} ({chosen.size})"
        figure.add_histogram(
            x=chosen, name=name, histnorm="percent", nbinsx=100, bingroup="both", opacity=0.6
        )
    return figure


# --- What is given ----------------------------------------------------------------------------------


def _as_numpy(values: Values, dtype: type = float) -> ndarray:
    return np.asarray(values.tolist() if isinstance(values, Tensor) else values, dtype=dtype)


def _as_boards(values: Values, name: str, dtype: type = float) -> ndarray:
    """Boards [n 8 8] of any of the shapes that callers may give."""
    array = _as_numpy(values, dtype)
    is_flat = array.ndim == 2 and array.shape[1] == 64
    if not (is_flat or (array.ndim in (2, 3) and array.shape[-2:] == (8, 8))) or not array.size:
        raise ValueError(
            f"`{name}` has shape {array.shape}, but boards are [8 8], [n 8 8] or [n 64]. Values of the 60 "
            "moves become boards with `othello_gpt.vocab.values_on_board`."
        )
    return array.reshape(-1, 8, 8)


def _like(boards: ndarray, values: Values | None, name: str, dtype: type = float) -> ndarray:
    """What lies on the squares of each board, [n 64]; 0 where no values are given."""
    given = _as_boards(np.zeros((8, 8)) if values is None else values, name, dtype)
    if len(given) not in (1, len(boards)):
        raise ValueError(
            f"`{name}` holds {len(given)} boards for {len(boards)}: give one, or one for each."
        )
    return np.broadcast_to(given, boards.shape).reshape(-1, 64)


def _pieces_like(boards: ndarray, pieces: Values | None, name: str) -> ndarray:
    discs = _like(boards, pieces, name)
    for i, square in np.argwhere(~np.isin(discs, (-1, 0, 1))):
        raise ValueError(
            f"`{name}` holds {discs[i, square]:g} at board {i}, {square_to_label(square)}. "
            "Black is +1, white -1, an empty square 0."
        )
    return discs


def _full_colour(values: ndarray, limit: float | None) -> float:
    """The magnitude that has full colour: `limit`, or the largest finite one, or 1 where all is zero."""
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"`limit` is {limit}: give the finite magnitude of full colour, above 0.")
    return limit or float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0


# --- How it is drawn --------------------------------------------------------------------------------


def _board(
    title: str,
    cells: Sequence[tuple[str, str]],
    discs: ndarray,
    dots: ndarray,
    marks: ndarray,
    last_move: int | None,
    radius: float,
) -> list[str]:
    """One board: title, letters, digits; 64 cells (fill, words) and what lies on them."""
    parts = [svg.text(108, 12, title)]
    for i in range(8):
        parts.append(svg.text(11, 44 + _SIDE * i, "ABCDEFGH"[i], size=11))
        parts.append(svg.text(31 + _SIDE * i, 25, str(i), size=11))
    for square, (fill, words) in enumerate(cells):
        x, y = _corner(square)
        parts.append(
            svg.rect(x, y, _SIDE, _SIDE, fill, f"{square_to_label(square)}: {words}", svg.LINE)
        )
        ink = "#111" if fill == svg.FELT else svg.readable_on(fill)
        if discs[square]:
            disc, rim = _DISCS[int(discs[square])]
            parts.append(svg.circle(x + 11, y + 11, radius, disc, stroke=rim))
        if dots[square]:
            parts.append(svg.circle(x + 11, y + 11, 2.5, ink))
        parts.append(svg.text(x + 11, y + 16, str(marks[square]), size=14, fill=ink))
    if last_move is not None:
        if not 0 <= last_move < 64:
            raise ValueError(f"`last_move` is {last_move}: squares are 0 to 63, or None.")
        x, y = _corner(last_move)
        parts.append(svg.outline(x + 1, y + 1, _SIDE - 2, _LAST_MOVE))
    return parts


def _corner(square: int) -> tuple[int, int]:
    row, col = divmod(square, 8)
    return 20 + _SIDE * col, 29 + _SIDE * row


def _tiled(
    boards: Sequence[list[str]], per_row: int, name: str, scale: float, foot: Sequence[str] = ()
) -> Svg:
    places = [
        (_BOARD_WIDTH * (i % per_row), _BOARD_HEIGHT * (i // per_row)) for i in range(len(boards))
    ]
    parts = [svg.group(x, y, board) for (x, y), board in zip(places, boards, strict=True)]
    bottom = places[-1][1] + _BOARD_HEIGHT
    if foot:
        parts.append(svg.group(20, bottom, foot))
    width = _BOARD_WIDTH * min(per_row, len(boards)) + 6
    return svg.figure(width, bottom + (28 if foot else 0), name, parts, scale)


def _colour_bar(limit: float, signed: bool) -> list[str]:
    low = -limit if signed else 0.0
    shades = [svg.colour(low + (limit - low) * i / 43, limit) for i in range(44)]
    parts = [svg.rect(4 * i, 4, 4, 8, shade) for i, shade in enumerate(shades)]
    for x, value, anchor in (
        (0, low, "start"),
        (88, (low + limit) / 2, "middle"),
        (176, limit, "end"),
    ):
        parts.append(svg.text(x, 24, f"{value:.3g}", size=10, anchor=anchor))
    return parts


class _Axes(NamedTuple):
    names: Sequence[str]
    ticks: Sequence[float]
    top: int = 44
    width: int = 430
    height: int = 220

    @property
    def left(self) -> int:
        return 20 + svg.text_width(f"{tick:.10g}" for tick in self.ticks)

    def at(self, i: int, value: float) -> tuple[float, float]:
        low, high = self.ticks[0], self.ticks[-1]
        x = self.left + self.width * (i + 0.5) / len(self.names)
        return x, self.top + self.height * (high - value) / (high - low)

    def drawn(self, x_title: str, y_title: str) -> list[str]:
        """Titles, a line and a number for each tick, and as many names as have room."""
        left, bottom = self.left, self.top + self.height
        parts = [svg.text(left + self.width / 2, bottom + 38, x_title)]
        parts.append(svg.text(left, self.top - 10, y_title, anchor="start"))
        for tick in self.ticks:
            y = self.at(0, tick)[1]
            parts.append(svg.line(left, y, left + self.width, y, opacity=0.35 if tick else 1))
            parts.append(svg.text(left - 6, y + 4, f"{tick:.10g}", anchor="end"))
        n, room = len(self.names), self.width / (svg.text_width(self.names) + 4)
        for i in range(0, n, math.ceil(n / room)):
            parts.append(svg.text(self.at(i, 0)[0], bottom + 18, self.names[i]))
        return parts


def _line(name: str, line: ndarray, axes: _Axes, stroke: str) -> list[str]:
    """The line, broken where values are not finite, under a marker for each value."""
    finite = np.flatnonzero(np.isfinite(line))
    points = {i: axes.at(i, line[i]) for i in finite.tolist()}
    runs = np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1)
    parts = [
        svg.polyline([points[i] for i in run.tolist()], stroke) for run in runs if len(run) > 1
    ]
    for i, (x, y) in points.items():
        parts.append(svg.circle(x, y, 3.5, stroke, f"{name}, {axes.names[i]}: {line[i]:.4g}"))
    return parts


def _ticks(values: ndarray) -> list[float]:
    """Four to eight round numbers that span the values."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        middle, margin = (low + high) / 2, abs(high) / 2 or 0.5
        low, high = middle - margin, middle + margin
    raw = (high - low) / 5
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= 0.999 * raw)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{step * i:.12g}") for i in range(first, last + 1)]


def _number(value: float, full: float) -> str:
    """The number to three digits of the largest, so that a column of numbers compares."""
    if not 1e-6 < full < 1e6:
        return f"{value:.1e}"
    return f"{value:z.{max(2 - math.floor(math.log10(full)), 0)}f}"


def _titled(width: float, height: float, title: str, parts: list[str], name: str) -> Svg:
    heading = svg.text(width / 2, 16, title, size=14)
    return svg.figure(width, height, title or name, [heading, *parts])
