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

SCHEMA = "sparse_transformer.circuit/2"

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
        loss: binary cross-entropy over the two answers, in nats, after the best scale and shift for
            other prompts under this ablation; guessing has ln 2 = 0.69.
        accuracy: share of correct answers, after the same.
        low, high: 95% interval of the loss, by bootstrap over pairs of prompts.
        draws: the loss on each draw of pairs.
    """

    loss: float
    accuracy: float
    low: float
    high: float
    draws: tuple[float, ...] = ()


@dataclass(frozen=True)
class Control:
    """What the same search, with the same budget, makes of something that it should not find.

    Attributes:
        name: what it was asked for.
        model_loss: of the whole model, calibrated, on the prompts for fitting.
        loss: the lowest that the search reached there.
        nodes, edges: of its circuit.
        reached: the target.
        complete: the search was not cut short by the clock.
    """

    name: str
    model_loss: float
    loss: float
    nodes: int
    edges: int
    reached: bool
    complete: bool


# What nonsense costs over what the task costs must be at least this.
CONTROL_RATIO = 10.0


@dataclass(frozen=True)
class Validation:
    """Held-out validation of a circuit. A verdict is None where the interval holds the limit.

    Attributes:
        pairs, draws: number of held-out prompt pairs, in as many draws.
        edges: of the circuit.
        model: the whole model.
        circuit: the circuit alone, the rest ablated, by ablation: mean, zero, resample (another
            prompt), pair (the other prompt of the pair), random and adversarial (parts of the rest
            at their mean), edges (all nodes, and all edges but the circuit's at their mean).
        without: the model without the circuit, which is ablated; edges: its edges alone.
        sufficient: the circuit alone reaches the target under mean ablation.
        necessary: the task is lost without its nodes, and without its edges, at their mean.
        robust: the loss is at most twice the target under pair, random and adversarial ablation.
        controls: those that ran.
    """

    pairs: int
    draws: int
    edges: int
    model: Ablated
    circuit: Mapping[str, Ablated]
    without: Mapping[str, Ablated]
    sufficient: bool | None
    necessary: bool | None
    robust: bool | None
    controls: tuple[Control, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Edges, nonsense over task, of the smallest nonsense that was found; None if none was.

        A circuit without edges counts as one edge.
        """
        found = [control.edges for control in self.controls if control.reached]
        return max(1, min(found)) / max(1, self.edges) if found else None

    @property
    def passed(self) -> bool | None:
        """No control came near; None where one was cut short, or none ran."""
        if self.ratio is not None and self.ratio < CONTROL_RATIO:
            return False
        complete = all(control.complete for control in self.controls)
        return True if self.controls and complete else None

    def to_dict(self) -> dict[str, Any]:
        """The `proof` of the JSON files."""
        return dataclasses.asdict(self) | {"ratio": self.ratio, "passed": self.passed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Validation:
        """The inverse of `to_dict`.

        Raises:
            AttributeError, KeyError, TypeError: it is no validation.
        """

        def ablated(found: Mapping[str, Any]) -> Ablated:
            return Ablated(**{**found, "draws": tuple(found["draws"])})

        names = {field.name for field in dataclasses.fields(cls)}
        parts = {
            part: {name: ablated(found) for name, found in data[part].items()}
            for part in ("circuit", "without")
        }
        model = ablated(data["model"])
        controls = tuple(Control(**control) for control in data["controls"])
        rest = {**parts, "model": model, "controls": controls}
        return cls(**{name: data[name] for name in names} | rest)


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
