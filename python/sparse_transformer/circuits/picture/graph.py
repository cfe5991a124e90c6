"""A circuit as a `networkx.DiGraph` and back, for those who want to compute with it."""

from __future__ import annotations

import json
from typing import Any

import networkx as nx  # type: ignore[import-untyped]

from sparse_transformer.circuits.circuit import Circuit


def to_networkx(circuit: Circuit) -> nx.DiGraph:
    """The nodes by id with the fields of `Node`, the edges with those of `Edge`.

    All attributes are of the types that JSON has; an edge's `order` is its place in
    `circuit.edges`. The graph's own attributes are the other fields of `circuit.json`.

    Raises:
        ValueError: two nodes of one id, or two edges between the same nodes.
    """
    data = json.loads(circuit.to_json())
    nodes, edges = data.pop("nodes"), data.pop("edges")
    graph = nx.DiGraph(**data)
    for node in nodes:
        id = node.pop("id")
        if id in graph:
            raise ValueError(f"the circuit has more than one node {id}")
        graph.add_node(id, **node)
    for order, edge in enumerate(edges):
        source, target = edge.pop("source"), edge.pop("target")
        if graph.has_edge(source, target):
            raise ValueError(f"the circuit has more than one edge {source} -> {target}")
        graph.add_edge(source, target, order=order, **edge)
    return graph


def from_networkx(graph: nx.DiGraph) -> Circuit:
    """The inverse of `to_networkx`, also after node-link JSON.

    Edges without an `order`, which were added to the graph, come last.

    Raises:
        UserError: the graph is none that `to_networkx` made.
    """
    nodes = [{"id": id, **attributes} for id, attributes in graph.nodes(data=True)]
    edges = sorted(graph.edges(data=True), key=_order)
    listed = [
        {"source": source, "target": target}
        | {name: value for name, value in attributes.items() if name != "order"}
        for source, target, attributes in edges
    ]
    return Circuit.from_json(json.dumps({**graph.graph, "nodes": nodes, "edges": listed}))


def _order(edge: tuple[str, str, dict[str, Any]]) -> float:
    order: float = edge[2].get("order", float("inf"))
    return order
