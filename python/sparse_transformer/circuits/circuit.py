"""A circuit as data: what `circuit.json` holds and what the pictures are drawn from.

`circuit.json` is `Circuit.to_json()`: an object with the fields of `Circuit`, in which a `Node`,
an `Edge`, an `Example` and a `Snippet` are objects with theirs; `proof` has the validation.
`Circuit.from_json` is the inverse. The file is node-link data: networkx makes a graph of it with
`node_link_graph(data, directed=True, multigraph=False, edges="edges")`.
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
        place: its hook point; "" for the ends.
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
class Ablated:
    """What is left of the task when a part of the model is ablated.

    Attributes:
        loss: binary cross-entropy over the two answers, in nats; guessing has ln 2 = 0.69.
        accuracy: share of correct answers.
        recalibrated_loss: the loss after the best scale and shift for these very prompts: what is
            still known of the answer.
    """

    loss: float
    accuracy: float
    recalibrated_loss: float | None = None


@dataclass(frozen=True)
class Control:
    """What the same procedure makes of random labels.

    Attributes:
        loss: the least, calibrated, of all thresholds with at most `limit` edges, on prompts that
            the masks were trained on, which favours the control.
        nodes, edges: of that threshold.
        limit: the most edges that it was given.
        reached: the target.
        passed: not reached, as it should be.
        trained: share of the training steps for which there was time; None for all of them.
    """

    loss: float
    nodes: int
    edges: int
    limit: int
    reached: bool
    passed: bool
    trained: float | None = None


@dataclass(frozen=True)
class Validation:
    """Held-out validation of a circuit.

    Attributes:
        pairs: number of held-out prompt pairs.
        model_loss, model_accuracy: of the whole model.
        circuit: the circuit alone, the rest ablated: by ablation (mean, zero, resample).
        without: the model without the circuit, which is ablated.
        sufficient: the circuit alone reaches the target under mean ablation.
        necessary: the task is lost without it, under mean ablation.
        control: with random labels; None if it was not asked for.
    """

    pairs: int
    model_loss: float
    model_accuracy: float
    circuit: Mapping[str, Ablated]
    without: Mapping[str, Ablated]
    sufficient: bool
    necessary: bool
    control: Control | None = None

    def to_dict(self) -> dict[str, Any]:
        """The `proof` of the JSON files; what is None is left out."""

        def given(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in items if value is not None}

        return dataclasses.asdict(self, dict_factory=given)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Validation:
        """The inverse of `to_dict`.

        Raises:
            AttributeError, KeyError, TypeError: it is no validation.
        """
        parts = {
            part: {name: Ablated(**found) for name, found in data[part].items()}
            for part in ("circuit", "without")
        }
        control = data.get("control")
        return cls(**{**data, **parts, "control": None if control is None else Control(**control)})


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
        validation: on held-out prompts; None if there was none. `proof` in JSON.
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
    validation: Validation | None = None
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
        del data["validation"]
        data["proof"] = {} if self.validation is None else self.validation.to_dict()
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
            names = {field.name for field in dataclasses.fields(cls)} - {"validation"}
            proof = data["proof"]
            return cls(
                **{name: data[name] for name in names}
                | {
                    "validation": Validation.from_dict(proof) if proof else None,
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
