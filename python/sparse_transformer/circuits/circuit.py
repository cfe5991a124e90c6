"""A circuit as data: what `circuit.json` holds and what the pictures are drawn from.

`circuit.json` is `Circuit.to_json()`: an object with the fields of `Circuit`, in which a `Node`,
an `Edge`, an `Example` and a `Snippet` are objects with theirs. `Circuit.from_json` is the inverse;
picture/graph.py makes a `networkx.DiGraph` of it, and the reverse.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_transformer.errors import UserError

SCHEMA = "sparse_transformer.circuit/1"

# What a node is. Tokens, embedding and answers are the ends: they are drawn, and no edge of theirs
# counts in the size of a circuit.
KINDS = ("token", "read", "q", "k", "v", "neuron", "write", "answer")
# What an edge is. "weight" is a nonzero weight between two nodes of a block, the only kind that
# counts. "residual" joins a write to a later read of the same channel; "attention" a head's q and k
# to its v; "embedding" a token to a read; "unembedding" a write to an answer.
EDGE_KINDS = ("weight", "residual", "attention", "embedding", "unembedding")


@dataclass(frozen=True)
class Node:
    """A neuron, a channel, or one of the ends.

    Attributes:
        id: `place:channel` for what is in a block, such as `0.mlp.post_act:137`; `token:ID` and
            `answer:ID` for the ends.
        kind: of `KINDS`.
        label: what a reader may call it.
        place: the hook point's name, as in hooks.py; "" for the ends.
        layer: of the block; -1 for tokens, n_layer for answers.
        channel: in the place, or the token's id.
        head: which attention head a q, k or v channel belongs to.
        mean: the activation over the corpus at which the node is frozen where it is ablated.
        importance: loss of the circuit without this node, minus that of the circuit.
    """

    id: str
    kind: str
    label: str
    place: str = ""
    layer: int = -1
    channel: int = 0
    head: int | None = None
    mean: float = 0.0
    importance: float | None = None


@dataclass(frozen=True)
class Edge:
    """From the node whose activation is read to the node that reads it; `weight` has its sign."""

    source: str
    target: str
    weight: float
    kind: str = "weight"


@dataclass(frozen=True)
class Example:
    """A prompt, token by token, with the activation of each node at each token.

    Attributes:
        tokens: their texts.
        right, wrong: the answers' texts.
        positive: which member of its pair it is.
        logit_difference: right over wrong, of the circuit, calibrated.
        activations: by node id, one for each token, in the whole model.
    """

    tokens: tuple[str, ...]
    right: str
    wrong: str
    positive: bool
    logit_difference: float
    activations: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Snippet:
    """A piece of the corpus in which a node is most active, at `tokens[at]`."""

    tokens: tuple[str, ...]
    at: int
    activations: tuple[float, ...]


@dataclass(frozen=True)
class Circuit:
    """Everything that is known of one circuit.

    Attributes:
        task: name of the task.
        description: what the task asks, in a sentence.
        model: facts about the model, for the reader: checkpoint, linear, d_model, n_layer, ...
        target_loss: what it was pruned to.
        scale, shift: calibrated logit difference = scale * difference + shift (answer order of the
            task).
        nodes, edges: all, the ends included.
        node_count, edge_count: the published size: nodes of blocks, edges of kind "weight".
        edges_before: all nonzero weights between its nodes, those that were pruned included.
        proof: losses by name; see proof.py.
        examples: a few prompts of the test split.
        snippets: by node id, the most active first.
    """

    task: str
    description: str
    model: Mapping[str, Any]
    target_loss: float
    scale: float
    shift: float
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    edges_before: int
    proof: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    snippets: Mapping[str, tuple[Snippet, ...]] = field(default_factory=dict)

    @property
    def node_count(self) -> int:
        return sum(node.kind not in ("token", "answer") for node in self.nodes)

    @property
    def edge_count(self) -> int:
        return sum(edge.kind == "weight" for edge in self.edges)

    def node(self, id: str) -> Node:
        """The node of that id.

        Raises:
            KeyError: there is none.
        """
        for node in self.nodes:
            if node.id == id:
                return node
        raise KeyError(id)

    def to_json(self) -> str:
        """Text that `from_json` reads."""
        data = dataclasses.asdict(self)
        sizes = {"node_count": self.node_count, "edge_count": self.edge_count}
        return json.dumps({"schema": SCHEMA, **sizes, **data}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Circuit:
        """The inverse of `to_json`.

        Raises:
            UserError: it is no circuit, or one of another schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA!r}")
            known = {name: data[name] for name in (f.name for f in dataclasses.fields(cls))}
            return cls(
                **known
                | {
                    "nodes": tuple(Node(**node) for node in data["nodes"]),
                    "edges": tuple(Edge(**edge) for edge in data["edges"]),
                    "examples": tuple(_example(example) for example in data["examples"]),
                    "snippets": {
                        id: tuple(_snippet(snippet) for snippet in found)
                        for id, found in data["snippets"].items()
                    },
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"this release cannot read the circuit ({error}): "
                f"create it again with python -m sparse_transformer.circuits"
            ) from error


def _example(data: dict[str, Any]) -> Example:
    activations = {id: tuple(values) for id, values in data["activations"].items()}
    return Example(**data | {"tokens": tuple(data["tokens"]), "activations": activations})


def _snippet(data: dict[str, Any]) -> Snippet:
    def fixed(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values)

    return Snippet(fixed(data["tokens"]), data["at"], fixed(data["activations"]))
