"""Pictures of boards and small charts as SVG text: they show in notebooks, print, mail and open offline.

A figure is a string, an `Svg`. Colours are CSS variables with fallbacks (`--ink`, `--paper`, `--line`), so a
page can show the same figure light or dark. Each cell says its value when pointed at.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

Values = ndarray | Tensor | Sequence

_INK, _LINE = "var(--ink, #222)", "var(--line, #999)"
_SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#b8860b"]
_FELT = "#3f8f5f"


class Svg(str):
    """An SVG picture, shown by notebooks as it is."""

    def _repr_svg_(self) -> str:
        return str(self)

    def save(self, path: str | Path) -> None:
        """Writes the picture as an .svg file, whole or not at all."""
        partial = Path(f"{path}.partial")
        partial.write_text(self)
        partial.replace(path)


def plot_board_values(
    values: Values,
    board_titles: Sequence[str] | None = None,
    boards_per_row: int = 4,
    text: Values | None = None,
    pieces: Values | None = None,
    last_move: int | None = None,
    limit: float | None = None,
) -> Svg:
    """Boards of numbers: red below zero, white at zero, blue above; nan is grey.

    Args:
        values: [8 8], [n 8 8] or [n 64].
        board_titles: one a board.
        text: marks to write in the cells, [8 8], the same on every board.
        pieces: +1 black, -1 white, drawn as small discs, [8 8] or [n 8 8].
        last_move: a square to outline.
        limit: the value of full colour; by default the largest magnitude of all boards.
    """
    boards = _as_boards(values, "values")
    discs = None if pieces is None else np.broadcast_to(_as_boards(pieces, "pieces"), boards.shape)
    titles = list(board_titles or [""] * len(boards))
    if len(titles) != len(boards):
        raise ValueError(f"{len(titles)} titles for {len(boards)} boards: give one each.")
    full = limit or float(np.nan_to_num(np.abs(boards)).max()) or 1.0
    marks = None if text is None else np.asarray(text, dtype=object).reshape(8, 8)
    drawn = [
        _board(
            title,
            lambda row, col, board=board: (_colour(board[row, col], full), board[row, col]),
            marks,
            None if discs is None else discs[i],
            last_move,
        )
        for i, (board, title) in enumerate(zip(boards, titles, strict=True))
    ]
    return _tiled(drawn, boards_per_row, 200, 214, _colour_bar(full, bool((boards < 0).any())))


def plot_board(
    state: Values, legal: Values | None = None, last_move: int | None = None, title: str = ""
) -> Svg:
    """A board with its discs (+1 black, -1 white), its legal moves as dots and the last move outlined."""
    discs = _as_boards(state, "state")[0]
    dots = np.zeros((8, 8), bool) if legal is None else _as_boards(legal, "legal")[0].astype(bool)
    names = {0: "empty", 1: "black", -1: "white"}
    marks = np.where(dots, "·", "").astype(object)

    def cell(row: int, col: int) -> tuple[str, str]:
        return _FELT, names[int(discs[row, col])] + (", legal" if dots[row, col] else "")

    return _tiled([_board(title, cell, marks, discs, last_move, radius=8)], 1, 200, 214)


def plot_grid(
    values: Values, row_labels: Sequence[str], col_labels: Sequence[str], title: str = ""
) -> Svg:
    """A table of numbers, each in its colour; for instance a patch sweep, site by layer."""
    grid = _as_numpy(values)
    if grid.shape != (len(row_labels), len(col_labels)):
        raise ValueError(
            f"`values` has shape {grid.shape}, but there are {len(row_labels)} row labels and "
            f"{len(col_labels)} column labels."
        )
    limit = float(np.nan_to_num(np.abs(grid)).max()) or 1.0
    left, width, height = 12 + 7 * max(map(len, row_labels)), 58, 24
    parts = [_text(left + width * (j + 0.5), 40, name) for j, name in enumerate(col_labels)]
    for i, name in enumerate(row_labels):
        y = 48 + height * i
        parts.append(_text(left - 6, y + 16, name, anchor="end"))
        for j, value in enumerate(grid[i]):
            fill = _colour(value, limit)
            label = f"{name}, {col_labels[j]}: {value:.4f}"
            parts.append(_cell(left + width * j, y, width, height, fill, label))
            dark = abs(value) > 0.6 * limit
            parts.append(
                _text(
                    left + width * (j + 0.5),
                    y + 16,
                    f"{value:.3f}",
                    fill="#fff" if dark else "#222",
                )
            )
    return _figure(left + width * len(col_labels) + 8, 56 + height * len(row_labels), title, parts)


def plot_bars(labels: Sequence[str], values: Values, title: str = "") -> Svg:
    """Signed horizontal bars with their numbers."""
    numbers = _as_numpy(values).reshape(-1)
    if len(labels) != len(numbers):
        raise ValueError(f"{len(labels)} labels for {len(numbers)} values: give one each.")
    limit = float(np.abs(numbers).max(initial=0)) or 1.0
    left = 12 + 7 * max(map(len, labels), default=0)
    middle, parts = left + 190, []
    for i, (label, value) in enumerate(zip(labels, numbers, strict=True)):
        y, length = 32 + 20 * i, 130 * abs(value) / limit
        x = middle if value >= 0 else middle - length
        parts.append(_text(left, y + 13, label, anchor="end"))
        parts.append(_cell(x, y + 2, length, 15, _SERIES[int(value < 0)], f"{label}: {value:.4f}"))
        anchor, end = ("start", middle + length + 4) if value >= 0 else ("end", middle - length - 4)
        parts.append(_text(end, y + 13, f"{value:.3f}", anchor=anchor))
    parts.append(_line(middle, 30, middle, 32 + 20 * len(labels)))
    return _figure(middle + 200, 44 + 20 * len(labels), title, parts)


def plot_lines(
    series: Mapping[str, Values],
    x_labels: Sequence[str] | None = None,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
) -> Svg:
    """Lines with markers and a legend; nan leaves a gap."""
    lines = {name: _as_numpy(values).reshape(-1) for name, values in series.items()}
    if len({len(line) for line in lines.values()}) != 1:
        raise ValueError("`series` must hold one or more sequences of one length.")
    n = len(next(iter(lines.values())))
    names = [str(i) for i in range(n)] if x_labels is None else list(x_labels)
    ticks = _ticks(np.concatenate(list(lines.values())))
    left, top, width, height = 62, 34, 430, 220

    def at(i: int, value: float) -> tuple[float, float]:
        x = left + width * (i + 0.5) / n
        return x, top + height * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    parts = [_text(left + width / 2, top + height + 38, x_title)]
    parts.append(_text(left, top - 8, y_title, anchor="start"))
    for tick in ticks:
        y = at(0, tick)[1]
        parts.append(_line(left, y, left + width, y, faint=abs(tick) > 1e-12))
        parts.append(_text(left - 6, y + 4, f"{tick:g}", anchor="end"))
    for i in range(0, n, math.ceil(n / 16)):
        parts.append(_text(at(i, 0)[0], top + height + 18, names[i]))
    for k, (name, line) in enumerate(lines.items()):
        parts += _line_of(name, line, names, at, _SERIES[k % len(_SERIES)])
        y = top + 16 + 18 * k
        parts.append(
            f'<circle cx="{left + width + 16}" cy="{y - 4}" r="4" fill="{_SERIES[k % 8]}"/>'
        )
        parts.append(_text(left + width + 26, y, name, anchor="start"))
    legend = 40 + 7 * max(map(len, lines))
    return _figure(left + width + legend, top + height + 48, title, parts)


def plot_spectrum(activations: Values, labels: Values, title: str = ""):
    """A neuron's activations, split by a yes-or-no label, as an interactive plotly histogram (percent).

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly import graph_objects as go
    except ImportError as error:
        raise ImportError("plotly is missing: `pip install 'othello-gpt[plots]'`.") from error
    values, flags = _as_numpy(activations).reshape(-1), _as_numpy(labels).reshape(-1).astype(bool)
    if values.shape != flags.shape:
        raise ValueError(f"{len(values)} activations, but {len(flags)} labels: give one each.")
    figure = go.Figure(layout=dict(title=title, barmode="overlay", xaxis_title="activation"))
    for flag in (False, True):
        figure.add_histogram(
            x=values[flags == flag], name=str(flag), histnorm="percent", nbinsx=100, opacity=0.6
        )
    return figure


# --- How it is drawn --------------------------------------------------------------------------------


def _as_numpy(values: Values) -> ndarray:
    if isinstance(values, Tensor):
        values = torch.Tensor.numpy(values.detach().cpu())
    return np.asarray(values, dtype=float)


def _as_boards(values: Values, name: str) -> ndarray:
    array = _as_numpy(values)
    if array.shape[-2:] != (8, 8) and array.ndim == 2 and array.shape[1] == 64:
        array = array.reshape(-1, 8, 8)
    if array.shape[-2:] != (8, 8) or array.ndim > 3:
        raise ValueError(
            f"`{name}` has shape {array.shape}, but boards are [8 8], [n 8 8] or [n 64]. Values of the 60 "
            "moves become boards with `othello_gpt.vocab.values_on_board`."
        )
    return array.reshape(-1, 8, 8)


def _colour(value: float, limit: float) -> str:
    """Blue for positive, red for negative, the stronger the larger; grey for nan."""
    if math.isnan(value):
        return "#bbb"
    share = min(abs(value) / limit, 1.0)
    full = (5, 80, 160) if value > 0 else (178, 24, 43)
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in full)


def _ticks(values: ndarray) -> list[float]:
    """Round numbers that span the values."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if high == low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * i, 10) for i in range(first, last + 1)]


def _line_of(name: str, line: ndarray, x_names: Sequence[str], at, colour: str) -> list[str]:
    parts, run = [], []
    for i, value in enumerate([*line, math.nan]):
        if math.isfinite(value):
            run.append((i, value))
            continue
        points = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in run)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        run = []
    for i, value in enumerate(line):
        if math.isfinite(value):
            x, y = at(i, value)
            label = html.escape(f"{name}, {x_names[i]}: {value:.4f}")
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{label}</title></circle>'
            )
    return parts


def _board(title: str, cell, marks, discs, last_move: int | None, radius: float = 5) -> list[str]:
    """One board in a field of 200 by 214: title, letters, digits, cells, marks, discs."""
    parts = [_text(108, 12, title, size=12)]
    for i in range(8):
        parts.append(_text(11, 44 + 22 * i, "ABCDEFGH"[i], size=11))
        parts.append(_text(31 + 22 * i, 25, str(i), size=11))
    for square in range(64):
        row, col = divmod(square, 8)
        fill, value = cell(row, col)
        shown = value if isinstance(value, str) else f"{value:.4f}"
        x, y = 20 + 22 * col, 29 + 22 * row
        parts.append(_cell(x, y, 22, 22, fill, f"{'ABCDEFGH'[row]}{col}: {shown}"))
        if discs is not None and discs[row, col]:
            colour = "#111" if discs[row, col] > 0 else "#fff"
            parts.append(
                f'<circle cx="{x + 11}" cy="{y + 11}" r="{radius}" fill="{colour}" stroke="#444" '
                'pointer-events="none"/>'
            )
        if marks is not None and marks[row, col]:
            parts.append(_text(x + 11, y + 16, str(marks[row, col]), size=14, fill="#111"))
    if last_move is not None:
        x, y = 20 + 22 * (last_move % 8), 29 + 22 * (last_move // 8)
        parts.append(
            f'<rect x="{x + 1}" y="{y + 1}" width="20" height="20" fill="none" stroke="#e6a700" '
            'stroke-width="2.5" pointer-events="none"/>'
        )
    return parts


def _tiled(
    boards: list[list[str]], per_row: int, width: int, height: int, foot: list[str] | None = None
) -> Svg:
    parts = []
    for i, board in enumerate(boards):
        x, y = width * (i % per_row), height * (i // per_row)
        parts.append(f'<g transform="translate({x} {y})">{"".join(board)}</g>')
    rows = math.ceil(len(boards) / per_row)
    if foot:
        parts.append(f'<g transform="translate(20 {height * rows})">{"".join(foot)}</g>')
    total = height * rows + (28 if foot else 0)
    return _figure(width * min(per_row, len(boards)) + 6, total, "", parts)


def _colour_bar(limit: float, signed: bool) -> list[str]:
    low = -limit if signed else 0.0
    parts = []
    for i in range(40):
        value = low + (limit - low) * i / 39
        parts.append(
            f'<rect x="{i * 4}" y="4" width="4" height="8" fill="{_colour(value, limit)}"/>'
        )
    for x, value in ((0, low), (80, (low + limit) / 2), (160, limit)):
        parts.append(_text(x, 24, f"{value:.3g}", size=10, anchor="middle" if x else "start"))
    return parts


def _cell(x: float, y: float, width: float, height: float, fill: str, label: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{fill}" '
        f'stroke="{_LINE}" stroke-width="0.5"><title>{html.escape(label)}</title></rect>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, faint: bool = False) -> str:
    opacity = 0.35 if faint else 1
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_LINE}" '
        f'opacity="{opacity}"/>'
    )


def _text(
    x: float, y: float, text: str, size: int = 12, anchor: str = "middle", fill: str = _INK
) -> str:
    if not text:
        return ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
        f'pointer-events="none">{html.escape(text)}</text>'
    )


def _figure(width: float, height: float, title: str, parts: list[str]) -> Svg:
    heading = _text(width / 2, 16, title, size=14)
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" role="img" font-family="system-ui, sans-serif" '
        f'style="max-width:100%;height:auto">{heading}{"".join(parts)}</svg>'
    )
