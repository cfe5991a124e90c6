"""The rows of a picture: which nodes stand in which, how large, and where edges pass them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_transformer.circuits.circuit import Edge, Node
from sparse_transformer.circuits.picture import text
from sparse_transformer.circuits.picture.order import Block, Key, Lane, Link

# Sizes of the fonts of names and of what stands under them, and of their lines.
LABEL, NOTE = 12.0, 10.0
LABEL_LINE, NOTE_LINE = 15.0, 12.0
BOX_PADDING = 9.0
# Around the boxes of a row, and around those of a head within it, whose name needs some height.
STRIP_PADDING, FRAME_PADDING, FRAME_LABEL = 8.0, 9.0, 15.0

STAGES = (
    ("tokens",),
    ("attention", "reads"),
    ("heads",),
    ("attention", "writes"),
    ("MLP", "reads"),
    ("neurons",),
    ("MLP", "writes"),
    ("answers",),
)
# Edges whose weight is shown as a number.
NUMBERED = ("weight", "embedding", "unembedding")

_TOKENS, _HEADS, _ANSWERS = 0, 2, 7
_MLP = 3  # between a stage of the attention and the same one of the MLP
_TEXT_LIMIT, _BOX_LEAST = 124.0, 44.0
_ROW_LIMIT = 1500.0
_TIER_GAP = 36.0
_LANE = 6.0
_BOX_GAP = 26.0

# Tokens 0, layers 1, answers 2; the layer; the place in STAGES.
Stage = tuple[int, int, int]
# Along an edge: its source, its lanes, its target.
Chain = tuple[Key, ...]


@dataclass(frozen=True)
class Caption:
    """What is written in a node's box, its name in one or two lines, and the size that needs."""

    lines: tuple[str, ...]
    note: str
    width: float
    height: float


class Row:
    """Boxes side by side; those of heads in two tiers, q and k below v.

    Attributes:
        stage: what it shows.
        captions: of its nodes, by id.
        blocks: what moves along it, lanes included.
        tier: of each node, by id.
        tiers: height of the boxes of each.
        height, top, bottom: of the whole row; `stack` sets the latter two.
    """

    def __init__(self, stage: Stage, nodes: Sequence[Node], blocks: list[Block]) -> None:
        self.stage = stage
        self.captions = {node.id: caption(node) for node in nodes}
        self.blocks = blocks
        framed = stage[2] == _HEADS
        split = framed and len({node.kind == "v" for node in nodes}) == 2
        self.tier = {node.id: int(split and node.kind == "v") for node in nodes}
        self.tiers = [
            max(self.captions[id].height for id, at in self.tier.items() if at == tier)
            for tier in range(1 + split)
        ]
        self.top = self.bottom = 0.0
        self._padding = STRIP_PADDING + (FRAME_PADDING if framed else 0)
        inner = sum(self.tiers) + _TIER_GAP * split + (FRAME_LABEL if framed else 0)
        self.height = inner + 2 * self._padding

    def floor(self, tier: int) -> float:
        """Where the boxes of a tier stand."""
        return self.bottom - self._padding - tier * (self.tiers[0] + _TIER_GAP)


def caption(node: Node) -> Caption:
    """Its words and their size."""
    fixed = node.kind in ("token", "answer")
    # The frame says it already.
    name = text.name(node).removesuffix(f" of head {node.head}")
    lines = text.wrap(name, LABEL, _TEXT_LIMIT, lines=2, fixed=fixed)
    # A name of the making of "neuron 137" is the channel.
    note = "" if name.startswith(f"{node.kind} ") else text.channel(node)
    widths = [text.width(line, LABEL, fixed=fixed) for line in lines] + [text.width(note, NOTE)]
    width = max(_BOX_LEAST, max(widths) + 2 * BOX_PADDING)
    height = len(lines) * LABEL_LINE + (NOTE_LINE if note else 0) + 2 * BOX_PADDING
    return Caption(lines, note, width, height)


def make_rows(nodes: Iterable[Node]) -> list[Row]:
    """From the lowest up, without lanes; a row that would be too wide is folded."""
    stages: dict[Stage, list[Node]] = defaultdict(list)
    for node in sorted(nodes, key=lambda node: (_stage(node), node.channel, node.id)):
        stages[_stage(node)].append(node)
    rows = []
    for stage, members in stages.items():
        if stage[2] == _HEADS:
            blocks = [_head(head, inside) for head, inside in sorted(_by_head(members).items())]
        else:
            blocks = [_block([[node]], margin=_BOX_GAP) for node in members]
        folds = math.ceil(sum(block.width + block.margin for block in blocks) / _ROW_LIMIT)
        for fold in range(folds):
            chosen = blocks[fold::folds]
            inside = {key for block in chosen for key in block.widths}
            rows.append(Row(stage, [node for node in members if node.id in inside], chosen))
    return rows


def _stage(node: Node) -> Stage:
    if node.kind == "token":
        return 0, 0, _TOKENS
    if node.kind == "answer":
        return 2, 0, _ANSWERS
    within = {"read": 1, "write": 3, "neuron": 5}.get(node.kind, _HEADS)
    if node.kind in ("read", "write") and ".mlp." in node.place:
        within += _MLP
    return 1, node.layer, within


def _by_head(nodes: Iterable[Node]) -> dict[int, list[Node]]:
    """Where the head is not told, it is -1."""
    heads: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        heads[-1 if node.head is None else node.head].append(node)
    return heads


def _head(head: int, nodes: Sequence[Node]) -> Block:
    groups = [[node for node in nodes if node.kind == kind] for kind in "qkv"]
    label = f"head {head}" if head >= 0 else "head"
    return _block(
        [group for group in groups if group],
        gap=10, group_gap=16, padding=12, margin=20, label=label,
    )  # fmt: skip


def _block(groups: Sequence[Sequence[Node]], **options: Any) -> Block:
    keys: list[list[Key]] = [[node.id for node in group] for group in groups]
    return Block(
        keys, {node.id: caption(node).width for group in groups for node in group}, **options
    )


def rows_of(rows: Sequence[Row]) -> dict[Key, int]:
    """The row of each node and lane."""
    return {key: at for at, row in enumerate(rows) for block in row.blocks for key in block.widths}


def make_chains(edges: Iterable[Edge], rows: Sequence[Row]) -> list[Chain]:
    """Where each edge passes; its lanes are added to the rows."""
    row_of = rows_of(rows)
    chains: list[Chain] = []
    made: set[Lane] = set()
    for edge in edges:
        passed = range(row_of[edge.source] + 1, row_of[edge.target])
        lanes = [Lane(edge.source, edge.kind, edge.weight < 0, place) for place in passed]
        for lane in lanes:
            if lane not in made:
                made.add(lane)
                rows[lane.row].blocks.append(Block([[lane]], {lane: _LANE}, margin=9))
        chains.append((edge.source, *lanes, edge.target))
    return chains


def links(chains: Iterable[Chain], rows: Sequence[Row]) -> list[Link]:
    """What leads from one row to the next, once each; between lanes it should be straightest."""
    row_of = rows_of(rows)
    found: dict[tuple[Key, Key], float] = {}
    for chain in chains:
        for low, high in itertools.pairwise(chain):
            if row_of[high] == row_of[low] + 1:
                lanes = isinstance(low, Lane) + isinstance(high, Lane)
                found[low, high] = (1.0, 2.0, 6.0)[lanes]
    return [(low, high, weight) for (low, high), weight in found.items()]


def stack(rows: Sequence[Row], edges: Iterable[Edge], chains: Iterable[Chain]) -> None:
    """Sets top and bottom of the rows, the uppermost at 0.

    Below each row there is room for the numbers, and so much that no edge runs flat.
    """
    row_of = rows_of(rows)
    centres = {
        key: block.x + at
        for row in rows
        for block in row.blocks
        for key, at in block.offsets.items()
    }
    numbers = [0] * len(rows)
    for edge in edges:
        numbers[row_of[edge.target]] += edge.kind in NUMBERED
    widest = [0.0] * len(rows)
    for chain in chains:
        for low, high in itertools.pairwise(chain):
            lean = abs(centres[low] - centres[high])
            widest[row_of[high]] = max(widest[row_of[high]], lean)
    at = 0.0
    for place in reversed(range(len(rows))):
        row, below = rows[place], rows[max(0, place - 1)]
        row.top, row.bottom = at, at + row.height
        at = row.bottom + 36 + min(90, max(5 * numbers[place], widest[place] / 8))
        if below.stage[:2] != row.stage[:2]:
            at += 14
