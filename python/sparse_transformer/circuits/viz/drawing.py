"""The drawing of a circuit, laid out and rendered by Graphviz.

Tokens are at the top, answers at the bottom, and between them a row for each stage of each layer
that has nodes; an attention head is a frame with its q and k, where they make it look, and its v.
Nodes and edges have the ids `n12`
and `e34`, by their index in the circuit, and their kind as a class: page.css and page.js see them.
"""

from __future__ import annotations

import html
import itertools
import re
import textwrap
from typing import Any

from sparse_transformer.circuits import words
from sparse_transformer.circuits.circuit import EDGE_KINDS, KINDS, Circuit, Edge, Node
from sparse_transformer.circuits.viz.summary import summarize

# With more numbers than this none is written at an edge: the page has them.
MOST_NUMBERS = 60
# The colours of page.css on a light background.
_INK, _SOFT, _LINE, _BAD = "#1b2027", "#5a6472", "#8a94a3", "#b3140f"
POSITIVE, NEGATIVE, _RESIDUAL, _BAND = "#1f5fa8", "#b4540a", "#a3abb6", "#f5f6f8"
_SANS, _MONO = "Helvetica", "Courier"
# Stroke of the weakest and of the strongest edge of its kind.
_STROKES = {
    "weight": (1.0, 4.2),
    "embedding": (0.6, 1.6),
    "unembedding": (0.8, 2.4),
    "attention": (1.6, 1.6),
    "residual": (1.1, 1.1),
}
_STYLES = {"residual": "dashed", "attention": "dotted"}
# The rows of a layer in the order of a forward.
_ROWS = {
    ("attn", "read"): "attention reads",
    ("attn", "qk"): "q and k",
    ("attn", "head"): "looks at",
    ("attn", "v"): "v",
    ("attn", "write"): "attention writes",
    ("mlp", "read"): "MLP reads",
    ("mlp", "neuron"): "neurons",
    ("mlp", "write"): "MLP writes",
}
_Row = tuple[int, int, int]
_LEGEND = (
    ("blue: positive weight", POSITIVE),
    ("orange: negative weight", NEGATIVE),
    ("dashed: residual stream", _SOFT),
    ("dotted: attention", _SOFT),
    ("wide: strong", _SOFT),
    ("score: balanced accuracy of the name on held-out text", _SOFT),
)


def render(circuit: Circuit, format: str, *, titled: bool) -> bytes:
    """The drawing as "svg" or "png"; `titled` with the summary and a legend above it.

    Raises:
        ValueError: an edge from or to a node that does not exist; an unknown kind.
    """
    _check(circuit)
    import pygraphviz

    graph = pygraphviz.AGraph(directed=True, strict=False)
    graph.graph_attr.update(
        rankdir="TB", newrank="true", outputorder="edgesfirst", nodesep="0.22", ranksep="0.4",
        pad="0.2", fontname=_SANS, fontcolor=_SOFT, bgcolor="white" if titled else "transparent",
    )  # fmt: skip
    graph.node_attr.update(
        shape="box", style="rounded,filled", fillcolor="white", color=_LINE, fontname=_SANS,
        fontcolor=_INK, fontsize="12", margin="0.11,0.06", height="0.3", width="0.5",
    )  # fmt: skip
    graph.edge_attr.update(arrowhead="none", fontname=_SANS, fontsize="10")
    if titled:
        graph.graph_attr.update(label=_title(circuit), labelloc="t", labeljust="l", dpi="150")
    rows = {node.id: _row(node) for node in circuit.nodes}
    _add_nodes(graph, circuit, rows)
    _add_edges(graph, circuit, rows)
    drawn: bytes = graph.draw(format=format, prog="dot")
    return drawn


def picture(circuit: Circuit) -> str:
    """The `<svg>` element for the page; errors are those of `render`."""
    drawn = render(circuit, "svg", titled=False).decode()
    element = drawn[drawn.index("<svg") :]
    # Comments and titles name the nodes of Graphviz.
    element = re.sub(r"<!--.*?-->\n?|<title>[^<]*</title>\n?", "", element, flags=re.DOTALL)
    return element.replace(
        "<svg ", '<svg id="picture" role="group" aria-labelledby="task" aria-describedby="how" ', 1
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


def _row(node: Node) -> _Row:
    """Tokens 0, layers 1, answers 2; the layer; the row in the layer."""
    if node.kind in ("token", "answer"):
        return (0 if node.kind == "token" else 2), 0, 0
    part = "mlp" if ".mlp." in node.place else "attn"
    kind = "qk" if node.kind in ("q", "k", "frozen") else node.kind
    part = {"qk": "attn", "head": "attn", "v": "attn", "neuron": "mlp"}.get(kind, part)
    return 1, node.layer, list(_ROWS).index((part, kind))


def _add_nodes(graph: Any, circuit: Circuit, rows: dict[str, _Row]) -> None:
    """Nodes, a name for each row, and a frame for each head."""
    names = {row: f"row{row[0]}-{row[1]}-{row[2]}" for row in sorted(set(rows.values()))}
    for row, name in names.items():
        graph.add_node(
            name, label=_row_name(row), shape="plaintext", style="", fontcolor=_SOFT, fontsize="11",
            **{"class": "row"},
        )  # fmt: skip
    for above, below in itertools.pairwise(names.values()):
        graph.add_edge(above, below, style="invis", weight="100")
    members: dict[_Row, list[str]] = {}
    heads: dict[tuple[int, int], list[str]] = {}
    for at, node in enumerate(circuit.nodes):
        end = node.kind in ("token", "answer")
        graph.add_node(
            f"n{at}", id=f"n{at}", label=_label(node), fontname=_MONO if end else _SANS,
            color=_INK if node.kind in ("neuron", "head") else _LINE,
            style="rounded,filled,dashed" if node.kind == "frozen" else "rounded,filled",
            fillcolor=_BAND if node.kind == "head" else "white", **{"class": node.kind},
        )  # fmt: skip
        members.setdefault(rows[node.id], []).append(f"n{at}")
        if node.head is not None and node.kind in ("q", "k", "v", "head", "frozen"):
            heads.setdefault((node.layer, node.head), []).append(f"n{at}")
    for row, inside in members.items():
        graph.add_subgraph([names[row], *inside], f"same-{names[row]}", rank="same")
    for (layer, head), inside in heads.items():
        graph.add_subgraph(
            inside, f"cluster_{layer}_{head}", label=f"head {head}", color=_LINE, fontsize="11",
            style="rounded", margin="10", labeljust="l", **{"class": "frame"},
        )  # fmt: skip


def _add_edges(graph: Any, circuit: Circuit, rows: dict[str, _Row]) -> None:
    index = {node.id: at for at, node in enumerate(circuit.nodes)}
    largest: dict[str, float] = {}
    for edge in circuit.edges:
        largest[edge.kind] = max(abs(edge.weight), largest.get(edge.kind, 0.0))
    numbered = sum(_has_number(edge) for edge in circuit.edges) <= MOST_NUMBERS
    for at, edge in enumerate(circuit.edges):
        least, most = _STROKES[edge.kind]
        stroke = least + (most - least) * abs(edge.weight) / (largest[edge.kind] or 1)
        sign = "negative" if edge.weight < 0 else "positive"
        color = NEGATIVE if edge.weight < 0 else POSITIVE
        if not _has_number(edge):
            color = _RESIDUAL if edge.kind == "residual" else _SOFT
        graph.add_edge(
            f"n{index[edge.source]}", f"n{index[edge.target]}", f"e{at}", id=f"e{at}", color=color,
            fontcolor=color, penwidth=f"{stroke:.1f}", style=_STYLES.get(edge.kind, "solid"),
            label=f" {words.signed(edge.weight)} " if numbered and _has_number(edge) else "",
            constraint="true" if rows[edge.source] < rows[edge.target] else "false",
            **{"class": f"{edge.kind} {sign}"},
        )  # fmt: skip


def _has_number(edge: Edge) -> bool:
    return edge.kind not in ("residual", "attention")


def _row_name(row: _Row) -> str:
    stage, layer, at = row
    if stage != 1:
        return "tokens" if stage == 0 else "answers"
    return _html([(list(_ROWS.values())[at], 11, _SOFT), (f"layer {layer}", 9, _SOFT)])


def _label(node: Node) -> str:
    """The name of a node, and under a name of its own its channel and the name's score."""
    name = words.visible(node.label or words.channel(node))
    # The frame has the head's number.
    name = name.removesuffix(f" of head {node.head}")
    notes = [] if name.startswith(f"{node.kind} ") else [words.channel(node)]
    notes += [f"score {node.score:.2f}"] if node.score is not None else []
    lines = [(part, 12, "") for part in _wrap(name, 20, 3)]
    note = ", ".join(filter(None, notes))
    return _html([*lines, (note, 10, _SOFT)] if note else lines)


def _title(circuit: Circuit) -> str:
    said = summarize(circuit)
    lines = [(part, 20, _INK) for part in _wrap(said.task, 60, 2)]
    lines += [(part, 13, _INK) for part in _wrap(said.description, 90, 4)]
    lines += [(part, 14, _INK) for one in said.story for part in _wrap(one, 90, 3)]
    lines += [(part, 10, _SOFT) for part in _wrap(said.size, 110, 3) + _wrap(said.model, 110, 4)]
    for verdict in said.verdicts:
        color = _SOFT if verdict.holds else _BAD
        lines += [(part, 12, color) for part in _wrap(verdict.sentence, 100, 4)]
    legend = " &#183; ".join(f'<FONT COLOR="{color}">{text}</FONT>' for text, color in _LEGEND)
    return _html(lines)[:-1] + f'<FONT POINT-SIZE="10">{legend}</FONT><BR ALIGN="LEFT"/> <BR/>>'


def _wrap(text: str, width: int, lines: int) -> list[str]:
    return textwrap.wrap(text, width, max_lines=lines, placeholder="…")


def _html(lines: list[tuple[str, int, str]]) -> str:
    """Lines of text, size and colour as a label; Graphviz reads it like HTML.

    What stands between two backquotes is code.
    """
    left = "" if len(lines) < 3 else ' ALIGN="LEFT"'
    parts = []
    for text, size, color in lines:
        # What no XML can hold becomes a question mark.
        clean = html.escape(re.sub(r"[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text))
        shade = f' COLOR="{color}"' if color else ""
        clean = re.sub("`([^`]+)`", rf'<FONT FACE="{_MONO}">\1</FONT>', clean)
        parts.append(f'<FONT POINT-SIZE="{size}"{shade}>{clean}</FONT><BR{left}/>')
    return f"<{''.join(parts).removesuffix('<BR/>')}>"
