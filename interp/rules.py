"""Rules that say when a neuron fires: short conjunctions of conditions on squares, and how much they leave unexplained.

A neuron fires where its activation is above 0, that is, where the GELU lets its input through. A rule is found
on some games by a beam search that maximises F1, and scored on others. A neuron that fires at most positions is
described by when it is silent, so a rule that is always true scores at most 2/3.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt64
from numpy import ndarray

from interp.positions import EMPTY, MINE, THEIRS, Positions
from othello_gpt.vocab import CENTRE, PLAYABLE, square_to_label

STATES = ("blank", "occupied", "theirs", "mine", "played")


class Condition(NamedTuple):
    """What one square must be; mine belongs to whoever moves next, played is the last move's square."""

    square: int
    state: str  # one of `STATES`

    def __str__(self) -> str:
        return f"{square_to_label(self.square)} {self.state}"

    def holds(self, positions: Positions) -> Bool[ndarray, " position"]:
        """At which positions the square is as it must be."""
        on_square = positions.classes[:, self.square]
        match self.state:
            case "blank":
                return on_square == EMPTY
            case "occupied":
                return on_square != EMPTY
            case "theirs":
                return on_square == THEIRS
            case "mine":
                return on_square == MINE
            case "played":
                return positions.played == self.square
        raise ValueError(f"'{self.state}' is no state of a square: states are {', '.join(STATES)}.")


class Rule(NamedTuple):
    """Conditions that all hold where a neuron fires; with `silent`, where it does not.

    A neuron that never does what its rule tells of, or hardly ever, has no conditions: there is nothing to tell.
    """

    conditions: tuple[Condition, ...]
    silent: bool = False

    def __str__(self) -> str:
        if not self.conditions:
            return f"{'nearly always' if self.silent else 'hardly ever'} fires: no rule"
        return f"{'silent' if self.silent else 'fires'} when {', '.join(map(str, self.conditions))}"

    def holds(self, positions: Positions) -> Bool[ndarray, " position"]:
        """At which positions all conditions hold."""
        every = np.ones(len(positions.ply), dtype=bool)
        for condition in self.conditions:
            every &= condition.holds(positions)
        return every

    def fires(self, positions: Positions) -> Bool[ndarray, " position"]:
        """At which positions the rule says that the neuron fires: where it holds, or with `silent`, where not."""
        return self.holds(positions) ^ self.silent


class RuleScore(NamedTuple):
    """How well a rule describes a neuron at some positions, and what it leaves unexplained."""

    precision: float  # the share of positions of the rule where the neuron does as it says
    recall: float  # the share of positions where the neuron does so that the rule foretells
    f1: float
    explained: float  # the share of the activation's variance between the rule's two cases, 0 to 1
    support: int  # positions at which the rule holds


def rays() -> list[tuple[Condition, ...]]:
    """The 960 lines of one to six theirs next to a square, closed by a mine: what makes a blank square legal."""
    found = []
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
    for row, col in (divmod(square, 8) for square in PLAYABLE):
        for down, right in steps:
            line = [(row + i * down, col + i * right) for i in range(1, 8)]
            squares = [8 * r + c for r, c in line if 0 <= r < 8 and 0 <= c < 8]
            for k in range(1, len(squares)):
                enclosed = [Condition(square, "theirs") for square in squares[:k]]
                found.append((*enclosed, Condition(squares[k], "mine")))
    return found


def vocabulary() -> list[tuple[Condition, ...]]:
    """What the search may join: every condition that is neither always nor never true, and every ray."""
    single = [
        (Condition(square, state),)
        for square in range(64)
        for state in STATES
        if square not in CENTRE or state in ("theirs", "mine")
    ]
    return single + rays()


def find_rules(
    positions: Positions,
    activations: Float[ndarray, "position neuron"],
    max_parts: int = 4,
    beam: int = 6,
    min_gain: float = 0.002,
    progress: bool = False,
) -> list[Rule]:
    """For each neuron the rule with the highest F1 that a beam search finds.

    Args:
        max_parts: how many entries of the vocabulary are joined at most; a ray is one.
        beam: how many conjunctions of each length are carried on.
        min_gain: by how much a further part must raise F1.
    """
    parts = vocabulary()
    truth = _Truth(parts, positions)
    neurons = range(activations.shape[1])
    if progress:
        from tqdm.auto import tqdm

        neurons = tqdm(neurons, desc="rules")
    rules = []
    for neuron in neurons:
        fires = activations[:, neuron] > 0
        silent = bool(fires.mean() > 0.5)
        target = _packed(fires ^ silent)
        chosen = _search(truth, target, max_parts, beam, min_gain)
        conditions = _without_implied({c for i in chosen for c in parts[i]})
        rules.append(Rule(_pruned(conditions, truth, target), silent))
    return rules


def score_rule(
    rule: Rule, positions: Positions, activations: Float[ndarray, " position"]
) -> RuleScore:
    """How well the rule describes these activations; give positions of games it was not found on."""
    holds, target = rule.holds(positions), (activations > 0) ^ rule.silent
    hits, support, wanted = (int(each.sum()) for each in (holds & target, holds, target))
    within = sum(
        part.size * part.var() for part in (activations[holds], activations[~holds]) if part.size
    )
    total = activations.size * activations.var()
    return RuleScore(
        precision=hits / support if support else 0.0,
        recall=hits / wanted if wanted else 0.0,
        f1=2 * hits / (support + wanted) if hits else 0.0,
        explained=float(1 - within / total) if total else 0.0,
        support=support,
    )


# --- The search, on bits: 64 positions a word --------------------------------------------------------


class _Truth:
    """Which part of the vocabulary holds where: one row of words a part."""

    def __init__(self, parts: Sequence[tuple[Condition, ...]], positions: Positions) -> None:
        single = {part[0]: _packed(part[0].holds(positions)) for part in parts if len(part) == 1}
        self.single = single
        self.words = np.stack([_conjunction(single[c] for c in part) for part in parts])


def _packed(truth: Bool[ndarray, " position"]) -> UInt64[ndarray, " word"]:
    padded = np.pad(truth, (0, -len(truth) % 64))
    return np.packbits(padded).view(np.uint64)


def _count(words: UInt64[ndarray, "*rows word"]) -> ndarray:
    return np.asarray(np.bitwise_count(words).sum(-1, dtype=np.int64))


def _conjunction(rows: Iterable[UInt64[ndarray, " word"]]) -> UInt64[ndarray, " word"]:
    return np.bitwise_and.reduce(list(rows), axis=0)


def _f1(holds: UInt64[ndarray, "*rows word"], target: UInt64[ndarray, " word"]) -> ndarray:
    either = _count(holds) + _count(target)
    return np.asarray(2 * _count(holds & target) / np.maximum(either, 1))


def _search(
    truth: _Truth, target: UInt64[ndarray, " word"], max_parts: int, beam: int, min_gain: float
) -> tuple[int, ...]:
    """The parts whose conjunction has the highest F1, as indices; none where the neuron never fires.

    A conjunction foretells no more than each of its parts does, so a part whose hits alone, without any
    false alarm, would not beat the best F1 so far can be left out for good.
    """
    hits, wanted = _count(truth.words & target), _count(target)
    bound = 2 * hits / np.maximum(hits + wanted, 1)
    best, best_f1, kept = (), 0.0, [()]
    for _ in range(max_parts):
        alive = np.flatnonzero(bound > best_f1 + min_gain)
        found: dict[tuple[int, ...], float] = {}
        for chosen in kept:
            holds = truth.words[alive]
            if chosen:
                holds &= _conjunction(truth.words[list(chosen)])
            f1 = _f1(holds, target)
            for i in np.argsort(-f1, kind="stable")[:beam].tolist():
                found[tuple(sorted({*chosen, int(alive[i])}))] = f1[i]
        kept = sorted(found, key=lambda parts: -found[parts])[:beam]
        if not kept or found[kept[0]] <= best_f1 + min_gain:
            return best
        best, best_f1 = kept[0], found[kept[0]]
    return best


def _without_implied(conditions: set[Condition]) -> tuple[Condition, ...]:
    """Sorted by square, without "occupied" where another condition says more."""
    discs = {c.square for c in conditions if c.state in ("theirs", "mine", "played")}
    kept = [c for c in conditions if c.state != "occupied" or c.square not in discs]
    return tuple(sorted(kept))


def _pruned(
    conditions: tuple[Condition, ...], truth: _Truth, target: UInt64[ndarray, " word"]
) -> tuple[Condition, ...]:
    """The conditions without those that can go, one after the other, and F1 does not fall."""
    for condition in conditions:
        fewer = tuple(c for c in conditions if c != condition)
        if not fewer:
            return conditions
        before, after = (
            _f1(_conjunction(truth.single[c] for c in some), target) for some in (conditions, fewer)
        )
        if after >= before:
            conditions = fewer
    return conditions
