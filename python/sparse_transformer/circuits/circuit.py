"""A circuit as data: what `circuit.json` holds and what the pictures are drawn from.

`circuit.json` is `Circuit.to_json()`: an object with the fields of `Circuit`, in which a `Node`,
an `Edge`, an `Example` and a `Snippet` are objects with theirs; `proof` has the validation.
`Circuit.from_json` is the inverse. The file is node-link data: networkx makes a graph of it with
`node_link_graph(data, directed=True, multigraph=False, edges="edges")`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sparse_transformer.errors import UserError

SCHEMA = "sparse_transformer.circuit/3"

# The nodes that count in the size of a circuit.
PARTS = ("read", "q", "k", "v", "neuron", "write")
# What else is drawn: the ends, the heads whose q and k decide where v is read, and a head's q or k
# where it is frozen at its mean. No edge of theirs counts.
KINDS = ("token", *PARTS, "head", "frozen", "answer")
# What an edge is. "weight" is a nonzero weight between two nodes of a block, the only kind that
# counts. "residual" joins a write to a later read of the same channel; "attention" q and k to their
# head, and the head to its v; "embedding" a token to a read; "unembedding" a write to an answer.
EDGE_KINDS = ("weight", "residual", "attention", "embedding", "unembedding")


@dataclass(frozen=True)
class Node:
    """A neuron, a channel, or one of the ends.

    Attributes:
        id: `place:channel` for what is in a block, such as `0.mlp.post_act:137`; `1.attn.head:5`
            for a head, `1.attn.q:mean of 5` for what is frozen; `token:ID`, `tokens:ID+ID` and
            `answer:ID` for the ends.
        kind: of `KINDS`.
        label: what a reader may call it: what it does, or its kind and channel.
        place: its hook point; "" for what has none.
        layer: of the block; -1 for tokens, n_layer for answers.
        channel: in the place, or the token's id.
        head: which attention head a q, k or v channel belongs to.
        mean: the activation over the corpus at which the node is frozen where it is ablated.
        importance: loss of the circuit without this node, minus that of the circuit.
        score: balanced accuracy with which the label says, on held-out text, where the node is
            active; None if the label does not say that.
        sources: of a read: the tokens of the prompts that the embedding has most of in its channel,
            with their weights.
        promotes, suppresses: of a write: the tokens whose logits it raises and lowers most where it
            is positive, through the last norm and the unembedding.
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
    score: float | None = None
    sources: tuple[tuple[str, float], ...] = ()
    promotes: tuple[str, ...] = ()
    suppresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edge:
    """From the node whose activation is read to the node that reads it; `weight` has its sign."""

    source: str
    target: str
    weight: float
    kind: str = "weight"


@dataclass(frozen=True)
class Trace:
    """What happens on a prompt.

    Attributes:
        logit_difference: right over wrong; of a circuit calibrated.
        activations: by node id, one for each token.
        attention: by id of the head, the weight of each token as the last one sees it; what is
            missing to 1 goes to the head's sink.
    """

    logit_difference: float
    activations: Mapping[str, tuple[float, ...]]
    attention: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Example:
    """A prompt, token by token, in the whole model and in the circuit.

    Attributes:
        tokens: their texts.
        right, wrong: the answers' texts.
        positive: which member of its pair it is.
        note: why it is shown.
        model, circuit: what happens in each.
    """

    tokens: tuple[str, ...]
    right: str
    wrong: str
    positive: bool
    note: str
    model: Trace
    circuit: Trace


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
            other draws of prompts under this ablation; guessing has ln 2 = 0.69.
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
        """The inverse of `to_dict`; an error of `_build` if it is none."""
        found: Validation = _build(cls, data)
        return found


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
        return sum(node.kind in PARTS for node in self.nodes)

    @property
    def edge_count(self) -> int:
        return sum(edge.kind == "weight" for edge in self.edges)

    def node(self, id: str) -> Node:
        """The node of that id; a KeyError if there is none."""
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
        """The inverse of `to_json`; a UserError if it is no circuit, or one of another schema."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA!r}")
            found: Circuit = _build(cls, data | {"validation": data["proof"] or None})
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"this release cannot read the circuit ({error}): "
                f"create it again with python -m sparse_transformer.circuits"
            ) from error


def _build(kind: Any, data: Any) -> Any:
    """The inverse of `dataclasses.asdict` through JSON, for a type of this file; all fields given.

    An AttributeError, KeyError, TypeError or ValueError if it is not of that type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _build(hint, data[name]) for name, hint in hints.items()})
    if origin is tuple and parts[-1] is ...:
        return tuple(_build(parts[0], value) for value in data)
    if origin is tuple:
        return tuple(_build(part, value) for part, value in zip(parts, data, strict=True))
    if origin is Mapping:
        return {name: _build(parts[1], value) for name, value in data.items()}
    if origin is UnionType and data is not None:
        return _build(parts[0], data)
    return data
