"""Rows of a layered drawing: in which order, and where along the row.

The method of Sugiyama, Tagawa and Toda (1981): sweeps over the rows put each block at the
barycenter of its neighbours in the row before, the order with the fewest crossings is kept, and
within it each block goes as near to its neighbours as the others let it. Nothing in it is random.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Lane(NamedTuple):
    """Where edges of one source, kind and sign pass the row of that number on their way up."""

    source: str
    kind: str
    negative: bool
    row: int


# A node's id, or a lane.
Key = str | Lane
# Links between two rows: from the lower to the upper, with how much it should be straight.
Link = tuple[Key, Key, float]

SWEEPS = 12


@dataclass
class Block:
    """What moves along a row as one: a box, a lane, or the frame of a head with its boxes.

    Attributes:
        groups: its members; order is free within a group, and the groups stay in theirs.
        widths: of each member.
        gap, group_gap: between members, and between groups.
        padding: at either end.
        margin: to what stands next to it.
        label: of its frame; "" without one.
        x: its centre.
        offsets: centre of each member, from that of the block; kept by `pack`.
    """

    groups: list[list[Key]]
    widths: dict[Key, float]
    gap: float = 0.0
    group_gap: float = 0.0
    padding: float = 0.0
    margin: float = 0.0
    label: str = ""
    x: float = 0.0

    def __post_init__(self) -> None:
        self.offsets: dict[Key, float] = {}
        self.width = 0.0
        self.pack()

    def pack(self) -> None:
        """Sets `width` and `offsets` from the order in the groups."""
        at = self.padding
        ends: list[tuple[Key, float]] = []
        for group in self.groups:
            for key in group:
                ends.append((key, at + self.widths[key] / 2))
                at += self.widths[key] + (self.group_gap if key == group[-1] else self.gap)
        self.width = at - self.group_gap + self.padding
        self.offsets = {key: centre - self.width / 2 for key, centre in ends}


def arrange(rows: Sequence[list[Block]], links: Sequence[Link]) -> None:
    """Orders each row in place, then sets the `x` of all blocks; the leftmost edge is at 0.

    Args:
        rows: from the lowest up.
        links: each between members of two rows that follow one another.
    """
    graph = _Graph(rows, links)
    best, fewest = graph.order(), graph.crossings()
    for sweep in range(SWEEPS):
        graph.sort(upward=sweep % 2 == 0)
        crossings = graph.crossings()
        if crossings < fewest:
            best, fewest = graph.order(), crossings
    graph.restore(best)
    for sweep in range(2 * SWEEPS):
        graph.straighten(upward=sweep % 2 == 0)
    graph.align()
    left = min((block.x - block.width / 2 for row in rows for block in row), default=0.0)
    for row in rows:
        for block in row:
            block.x -= left


# The blocks of each row, and the groups of each block.
_Order = list[list[tuple[Block, list[list[Key]]]]]


class _Graph:
    """The rows with what leads from one to the next."""

    def __init__(self, rows: Sequence[list[Block]], links: Sequence[Link]) -> None:
        self.rows = rows
        self.block = {key: block for row in rows for block in row for key in block.widths}
        self.above: dict[Key, list[tuple[Key, float]]] = {key: [] for key in self.block}
        self.below: dict[Key, list[tuple[Key, float]]] = {key: [] for key in self.block}
        for low, high, weight in links:
            self.above[low].append((high, weight))
            self.below[high].append((low, weight))
        for row in rows:
            _close(row)

    def centre(self, key: Key) -> float:
        block = self.block[key]
        return block.x + block.offsets[key]

    def order(self) -> _Order:
        return [[(block, [list(g) for g in block.groups]) for block in row] for row in self.rows]

    def restore(self, order: _Order) -> None:
        for row, blocks in zip(self.rows, order, strict=True):
            row[:] = [block for block, _ in blocks]
            for block, groups in blocks:
                block.groups = groups
                block.pack()
            _close(row)

    def sort(self, *, upward: bool) -> None:
        """Each row by the barycenters of its neighbours in the row before it."""
        near = self.below if upward else self.above
        for row in self.rows if upward else reversed(self.rows):
            for block in row:
                # Without a neighbour a member stays about where it is.
                for group in block.groups:
                    group.sort(key=lambda key: self._barycenter([key], near))
                block.pack()
            row.sort(key=lambda block: self._barycenter(block.widths, near))
            _close(row)

    def _barycenter(self, keys: Iterable[Key], near: dict[Key, list[tuple[Key, float]]]) -> float:
        at = [self.centre(other) for key in keys for other, _ in near[key]]
        return sum(at) / len(at) if at else self.centre(next(iter(keys)))

    def crossings(self) -> int:
        """How many pairs of links between two rows cross."""
        count = 0
        for row in self.rows:
            ends = sorted(
                (self.centre(key), self.centre(other))
                for block in row
                for key in block.widths
                for other, _ in self.above[key]
            )
            passed: list[float] = []
            for _, end in ends:
                count += len(passed) - bisect.bisect_right(passed, end)
                bisect.insort(passed, end)
        return count

    def straighten(self, *, upward: bool) -> None:
        """Each block to the mean of its neighbours, as far as its row's order and widths allow."""
        for row in self.rows if upward else reversed(self.rows):
            wanted, weights = [], []
            for block in row:
                pulls = [
                    (self.centre(other) - block.offsets[key], weight)
                    for key in block.widths
                    for near in (self.below, self.above)
                    for other, weight in near[key]
                ]
                total = sum(weight for _, weight in pulls)
                wanted.append(sum(x * w for x, w in pulls) / total if total else block.x)
                weights.append(total or 0.1)
            gaps = [_distance(left, right) for left, right in itertools.pairwise(row)]
            for block, x in zip(row, spread(wanted, weights, gaps), strict=True):
                block.x = x

    def align(self) -> None:
        """Lanes that continue each other get one x wherever what stands beside them allows it."""
        where = {
            key: (row, at)
            for row in self.rows
            for at, block in enumerate(row)
            for key in block.widths
            if isinstance(key, Lane)
        }
        aligned: set[Lane] = set()
        for lane in where:
            run: list[Block] = []
            low, high = -math.inf, math.inf
            while lane in where and lane not in aligned:
                least, most = _room(*where[lane])
                if run and max(low, least) > min(high, most):
                    break
                low, high = max(low, least), min(high, most)
                run.append(self.block[lane])
                aligned.add(lane)
                lane = lane._replace(row=lane.row + 1)
            x = sum(block.x for block in run) / max(1, len(run))
            for block in run:
                block.x = min(max(x, low), high)


def _room(row: Sequence[Block], at: int) -> tuple[float, float]:
    """Between which x a block can stand while the others stay."""
    low, high = -math.inf, math.inf
    if at > 0:
        low = row[at - 1].x + _distance(row[at - 1], row[at])
    if at + 1 < len(row):
        high = row[at + 1].x - _distance(row[at], row[at + 1])
    return low, high


def spread(wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """The `x` that minimises `sum(weights (x - wanted)^2)` while `x[i+1] - x[i] >= gaps[i]`.

    Pool adjacent violators: without the gaps it is isotonic regression.
    """
    shifts = [0.0]
    for gap in gaps:
        shifts.append(shifts[-1] + gap)
    # Pools of neighbours that touch: mean, weight, how many.
    pools: list[tuple[float, float, int]] = []
    for target, weight, shift in zip(wanted, weights, shifts, strict=False):
        pools.append((target - shift, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (x1, w1, n1), (x2, w2, n2) = pools[-2:]
            pools[-2:] = [((x1 * w1 + x2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    flat = [x for x, _, count in pools for _ in range(count)]
    return [x + shift for x, shift in zip(flat, shifts, strict=False)]


def _distance(left: Block, right: Block) -> float:
    """Least distance of two neighbours' centres."""
    return (left.width + right.width) / 2 + max(left.margin, right.margin)


def _close(row: list[Block]) -> None:
    """Puts the blocks of a row side by side, around 0."""
    at = 0.0
    for place, block in enumerate(row):
        at += _distance(row[place - 1], block) if place else 0.0
        block.x = at
    for block in row:
        block.x -= at / 2
