"""Where everything of a picture stands, for the page and the images alike.

Tokens along the bottom, answers at the top, and between them a row for each stage of each layer
that has nodes. An edge that passes over rows gets a lane in each of them, and edges of one source,
kind and sign share theirs: the residual stream is seen as lines that run upward. The same circuit
always gets the same picture.

Coordinates are pixels, x to the right and y downward; `x, y` is the upper left corner.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparse_transformer.circuits.circuit import EDGE_KINDS, KINDS, Circuit, Edge
from sparse_transformer.circuits.picture import text
from sparse_transformer.circuits.picture.numbers import Point, curve, place_numbers
from sparse_transformer.circuits.picture.order import Key, arrange
from sparse_transformer.circuits.picture.rows import (
    FRAME_PADDING,
    LABEL,
    LABEL_LINE,
    NOTE,
    NOTE_LINE,
    NUMBERED,
    STAGES,
    STRIP_PADDING,
    Chain,
    Row,
    links,
    make_chains,
    make_rows,
    rows_of,
    stack,
)

__all__ = [
    "LABEL", "LABEL_LINE", "NOTE", "NOTE_LINE", "NUMBER", "SIDE",
    "Band", "Box", "Frame", "Layout", "Point", "Route", "curve", "lay_out",
]  # fmt: skip

# Sizes of the fonts of numbers on edges, and of the words beside the picture.
NUMBER, SIDE = 10.5, 11.0

_GUTTER, _EDGE = 104.0, 20.0
# Ports of a box stand this far apart, if it is wide enough.
_PORTS = 13.0
# Stroke of the weakest and of the strongest edge of its kind.
_STROKES = {
    "weight": (1.1, 4.6),
    "embedding": (0.8, 2.4),
    "unembedding": (0.8, 2.4),
    "attention": (1.5, 1.5),
    "residual": (1.1, 1.1),
}


@dataclass(frozen=True)
class Box:
    """A node: its name in one or two lines, and a smaller line under it, which may be "".

    `row` counts upward, and within it x ascends: that is how one steps through the boxes.
    """

    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]
    note: str
    row: int

    @property
    def centre(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True)
class Frame:
    """What holds the boxes of an attention head."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Band:
    """A stage, or a layer with its stages, as wide as the picture; `label` has its lines."""

    y: float
    height: float
    label: tuple[str, ...]


@dataclass(frozen=True)
class Route:
    """An edge.

    Attributes:
        points: where it goes; each is joined to the next by `curve`.
        stroke: its width.
        number: its weight in words, "" for edges of kinds without a weight.
        at: centre of the number.
        free: whether the number stands there without touching another.
    """

    points: tuple[Point, ...]
    stroke: float
    number: str
    at: Point
    free: bool


@dataclass(frozen=True)
class Layout:
    """The picture.

    Attributes:
        width, height: of all.
        gutter: width of the words at the left.
        boxes: by node id, in reading order: rows upward, each from left to right.
        frames: of heads.
        bands: of stages, upward.
        layers: of the layers of the model, upward.
        routes: of `circuit.edges`, in their order.
    """

    width: float
    height: float
    gutter: float
    boxes: Mapping[str, Box]
    frames: tuple[Frame, ...]
    bands: tuple[Band, ...]
    layers: tuple[Band, ...]
    routes: tuple[Route, ...]


def lay_out(circuit: Circuit) -> Layout:
    """Places all nodes and edges of the circuit.

    Raises:
        ValueError: an edge from or to a node that is not there; a kind of node or edge that is not
            known.
    """
    _check(circuit)
    rows = make_rows(circuit.nodes)
    chains = make_chains(circuit.edges, rows)
    arrange([row.blocks for row in rows], links(chains, rows))
    stack(rows, circuit.edges, chains)
    left = _GUTTER + _EDGE
    blocks = [block for row in rows for block in row.blocks]
    centres = {key: left + block.x + block.offsets[key] for block in blocks for key in block.widths}
    boxes = _boxes(rows, centres)
    return Layout(
        width=left + max((block.x + block.width / 2 for block in blocks), default=0) + _EDGE,
        height=rows[0].bottom if rows else 0,
        gutter=_GUTTER,
        boxes=boxes,
        frames=_frames(rows, left),
        bands=_bands(rows, lambda row: STAGES[row.stage[2]], lambda row: row.stage),
        layers=_bands(
            [row for row in rows if row.stage[0] == 1],
            lambda row: (f"layer {row.stage[1]}",),
            lambda row: row.stage[1],
        ),
        routes=_routes(circuit.edges, chains, rows, boxes, centres),
    )


def _check(circuit: Circuit) -> None:
    known = {node.id for node in circuit.nodes}
    for node in circuit.nodes:
        if node.kind not in KINDS:
            raise ValueError(
                f"the kind of the node {node.id} must be of {KINDS}, got {node.kind!r}"
            )
    for edge in circuit.edges:
        name = f"{edge.source} -> {edge.target}"
        if not {edge.source, edge.target} <= known:
            raise ValueError(f"the circuit lacks a node of the edge {name}")
        if edge.kind not in EDGE_KINDS:
            raise ValueError(
                f"the kind of the edge {name} must be of {EDGE_KINDS}, got {edge.kind!r}"
            )


def _boxes(rows: Iterable[Row], centres: Mapping[Key, float]) -> dict[str, Box]:
    boxes: dict[str, Box] = {}
    count = 0
    for row in rows:
        for tier, height in enumerate(row.tiers):
            inside = [id for id, at in row.tier.items() if at == tier]
            for id in sorted(inside, key=lambda id: centres[id]):
                own = row.captions[id]
                x, y = centres[id] - own.width / 2, row.floor(tier) - height
                boxes[id] = Box(x, y, own.width, height, own.lines, own.note, count)
            count += 1
    return boxes


def _frames(rows: Iterable[Row], left: float) -> tuple[Frame, ...]:
    return tuple(
        Frame(
            x=left + block.x - block.width / 2,
            y=row.top + STRIP_PADDING,
            width=block.width,
            height=row.height - 2 * STRIP_PADDING,
            label=block.label,
        )
        for row in rows
        for block in row.blocks
        if block.label
    )


def _bands(
    rows: Iterable[Row], label: Callable[[Row], tuple[str, ...]], same: Callable[[Row], object]
) -> tuple[Band, ...]:
    """Rows that follow one another and have the same `same` become one."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and same(groups[-1][0]) == same(row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return tuple(
        Band(group[-1].top, group[0].bottom - group[-1].top, label(group[0])) for group in groups
    )


def _ports(
    ends: Iterable[tuple[Key, Key]], boxes: Mapping[str, Box], centres: Mapping[Key, float]
) -> dict[tuple[Key, Key], float]:
    """At which x an edge leaves or reaches a box.

    Args:
        ends: the node, and the node or lane that is next along the edge.
        boxes: by node.
        centres: x of nodes and lanes.
    """
    nexts: dict[str, list[Key]] = {}
    for id, other in dict.fromkeys(ends):
        nexts.setdefault(str(id), []).append(other)
    ports: dict[tuple[Key, Key], float] = {}
    for id, others in nexts.items():
        box = boxes[id]
        step = min(_PORTS, (box.width - 16) / len(others))
        for place, other in enumerate(sorted(others, key=lambda other: centres[other])):
            ports[id, other] = box.centre + (place - (len(others) - 1) / 2) * step
    return ports


def _routes(
    edges: Sequence[Edge],
    chains: Sequence[Chain],
    rows: Sequence[Row],
    boxes: Mapping[str, Box],
    centres: Mapping[Key, float],
) -> tuple[Route, ...]:
    leaves = _ports(((chain[0], chain[1]) for chain in chains), boxes, centres)
    reaches = _ports(((chain[-1], chain[-2]) for chain in chains), boxes, centres)
    row_of = rows_of(rows)
    paths = []
    for chain in chains:
        source, *lanes, target = chain
        start, end = boxes[str(source)], boxes[str(target)]
        points = [(leaves[source, chain[1]], start.y)]
        for lane in lanes:
            row = rows[row_of[lane]]
            points += [(centres[lane], row.bottom), (centres[lane], row.top)]
        x, row = reaches[target, chain[-2]], rows[row_of[target]]
        if row.tier[str(target)] and row_of[source] != row_of[target]:
            # To a v: straight up beside q and k.
            points.append((x, row.bottom - STRIP_PADDING - FRAME_PADDING))
        points.append((x, end.y + end.height))
        paths.append(tuple(points))
    numbers = [text.signed(edge.weight) if edge.kind in NUMBERED else "" for edge in edges]
    at = _number_places(edges, chains, paths, numbers, row_of)
    strokes = _strokes(edges)
    return tuple(
        Route(path, stroke, number, *at.get(place, ((0.0, 0.0), False)))
        for place, (path, stroke, number) in enumerate(zip(paths, strokes, numbers, strict=True))
    )


def _number_places(
    edges: Sequence[Edge],
    chains: Sequence[Chain],
    paths: Sequence[tuple[Point, ...]],
    numbers: Sequence[str],
    row_of: Mapping[Key, int],
) -> dict[int, tuple[Point, bool]]:
    """By the place of the edge; the number is in the gap below the target's row."""
    crossing: dict[int, list[tuple[Point, Point]]] = defaultdict(list)
    numbered: dict[int, dict[int, int]] = defaultdict(dict)  # segment to edge, by gap
    for place, (chain, path) in enumerate(zip(chains, paths, strict=True)):
        for step, key in enumerate(chain[1:]):
            crossing[row_of[key]].append((path[2 * step], path[2 * step + 1]))
        if numbers[place]:
            gap = row_of[chain[-1]]
            numbered[gap][len(crossing[gap]) - 1] = place
    found = {}
    for gap, edge_of in numbered.items():
        sizes = {
            segment: (text.width(numbers[place], NUMBER) + 4, NUMBER + 3)
            for segment, place in edge_of.items()
        }
        # The strongest first.
        order = sorted(edge_of, key=lambda segment: -abs(edges[edge_of[segment]].weight))
        for segment, where in place_numbers(crossing[gap], sizes, order).items():
            found[edge_of[segment]] = where
    return found


def _strokes(edges: Sequence[Edge]) -> list[float]:
    """Width of each edge, by its weight among those of its kind."""
    largest: dict[str, float] = {}
    for edge in edges:
        largest[edge.kind] = max(abs(edge.weight), largest.get(edge.kind, 0.0))
    widths = []
    for edge in edges:
        least, most = _STROKES[edge.kind]
        widths.append(least + (most - least) * abs(edge.weight) / (largest[edge.kind] or 1))
    return widths
