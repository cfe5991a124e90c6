"""A circuit on one prompt as an attribution graph, for Neuronpedia and circuit-tracer.

    python -m sparse_transformer.circuits.neuronpedia \\
        --circuit circuit.json --checkpoint python-small --out graphs
    python -m circuit_tracer start-server --graph_file_dir graphs

writes `graphs/SLUG.json`, lists it in `graphs/graph-metadata.json`, and serves both. Neuronpedia
takes the first file by upload.

The circuit is unrolled over the prompt: a graph node is a circuit node at one token, and its
`activation` is that in the whole model. The weight of a link is what flows: activation times
weight. Norms, and which values AbsTopK keeps, are held fixed.

- From a token or a write to a read: times the norm's weight, over the root mean square.
- From v at token s to a write at token t: times the attention of t to s.
- From q and k of a head to what it writes: the first-order change of the attention, of which
  channel c has the share `q_c[t] k_c[s] / sqrt(d)` of the score.
- From a write, or the last token itself, to an answer: the part of its logit, the bigram table's
  part included.

Inactive nodes are left out, and so are links that are small or do not lead to an answer. `layer`
counts the hook points that the circuit has, so that every link goes up; `clerp` has the label.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from sparse_transformer import hooks, program
from sparse_transformer.circuits.activations import attention_of
from sparse_transformer.circuits.circuit import PARTS, Circuit, Node
from sparse_transformer.circuits.graph import Nodes, rows_of
from sparse_transformer.circuits.words import visible
from sparse_transformer.errors import UserError, writing
from sparse_transformer.files import write_atomically
from sparse_transformer.functional import RMS_EPS
from sparse_transformer.generation import prompt_tokens
from sparse_transformer.model import Transformer
from sparse_transformer.run import load_model

# Of the links into a node, those below this share of the strongest are left out.
LEAST_SHARE = 0.01


@torch.no_grad()
def to_neuronpedia(
    circuit: Circuit,
    model: Transformer,
    prompt: str | None = None,
    *,
    slug: str | None = None,
    least_share: float = LEAST_SHARE,
) -> dict[str, Any]:
    """The graph as an object of the JSON schema 1.0.0 of attribution graphs.

    Args:
        circuit: found in `model`.
        model: with its tokenizer.
        prompt: of a longer one than the context only the end is read; by default the first example
            of the circuit.
        slug: the name of the graph, of letters, digits and hyphens; by default that of the task.
        least_share: links below this share of the strongest into the same node are left out.

    Raises:
        UserError: a circuit of another model, or without an example where there is no prompt; a
            share outside [0, 1].
    """
    if not 0 <= least_share <= 1:
        raise UserError(f"least_share must be in [0, 1], got {least_share}")
    if prompt is None:
        if not circuit.examples:
            raise UserError("the circuit has no example: give a prompt")
        prompt = "".join(circuit.examples[0].tokens)
    tokens, _ = prompt_tokens(model, prompt)
    assert model.tokenizer is not None
    texts = [model.tokenizer.decode([token]) for token in tokens]
    name = slug or re.sub(r"[^a-zA-Z0-9]+", "-", circuit.task).strip("-")
    flow = _Flow(circuit, model, tokens)
    links = _leading_to(flow.answers, flow.links(least_share))
    used = {place for source, target, _ in links for place in (source, target)}
    used |= {(id, len(tokens) - 1) for id in flow.answers}
    used |= {(f"token:{token}", at) for at, token in enumerate(tokens)}
    nodes = {place: flow.graph_node(*place) for place in sorted(used, key=flow.order)}
    ids = {place: node["node_id"] for place, node in nodes.items()}
    return {
        "metadata": {
            "slug": name,
            "scan": str(circuit.model.get("run", "sparse-transformer")),
            "transcoder_list": [],
            "prompt_tokens": texts,
            "prompt": "".join(texts),
            "info": {"description": circuit.description, "generator": {"name": "sparse-kernels"}},
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": next((ids[id, len(tokens) - 1] for id in flow.answers), ""),
            "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in links
        ],
    }


# A node of the circuit at a token.
_Place = tuple[str, int]
_Link = tuple[_Place, _Place, float]


class _Flow:
    """What flows through a circuit on one prompt of T tokens."""

    def __init__(self, circuit: Circuit, model: Transformer, tokens: Sequence[int]) -> None:
        known = Nodes.of(model.config)
        self.circuit, self.model, self.tokens = circuit, model, tokens
        self.nodes = {node.id: node for node in circuit.nodes if node.kind in PARTS}
        try:
            order = {id: known.index(id) for id in self.nodes}
        except KeyError as error:
            raise UserError(
                f"the model has no node {error}: give the checkpoint that the circuit is of"
            ) from None
        ids = torch.tensor([list(tokens)], device=model.norm.weight.device)
        with hooks.recording(model) as seen:
            logits = model(ids)[0, -1]
        self.seen = {name: value[0].float().cpu() for name, value in seen.items()}
        self.probability = logits.float().cpu().softmax(-1)
        self.embedding = model.embed(ids)[0].float().cpu()  # (T, D)
        self.scales = self._scales()
        answers = [node for node in circuit.nodes if node.kind == "answer"]
        answers.sort(key=lambda node: -float(self.probability[node.channel]))
        # The likeliest first.
        self.answers = {node.id: node for node in answers}
        # Rows of the picture: tokens, the hook points that the circuit has, answers.
        places = sorted({node.place for node in self.nodes.values()}, key=known.names.index)
        self.rows = {place: row for row, place in enumerate(places)}
        self._order = order

    def _scales(self) -> dict[str, Tensor]:
        """By hook point that reads the stream: the norm's weight over the rms, `(T, D)`."""
        model, x, found = self.model, self.embedding, {}
        if model.config.added_positions and model.positions is not None:
            x = x + model.positions[: len(x)].float().cpu()
        for layer in range(model.config.n_layer):
            for part in ("attn", "mlp"):
                weight = model.get_parameter(f"blocks.{layer}.{part}.norm.weight")
                found[f"{layer}.{part}.act_in"] = _scale(x, weight)
                x = x + self.seen[f"{layer}.{part}.resid_delta"]
        return found | {"final_resid": _scale(x, model.norm.weight)}

    def activation(self, id: str) -> Tensor:
        """`(T,)`."""
        node = self.nodes[id]
        return self.seen[node.place][:, node.channel]

    def links(self, least_share: float) -> list[_Link]:
        """Nonzero links into active nodes, the small ones left out."""
        found: list[_Link] = []
        for target, flows in self._flows().items():
            if target in self.nodes:
                active = self.activation(target) != 0
            else:
                active = torch.arange(len(self.tokens)) == len(self.tokens) - 1
            strongest = torch.stack([flow.abs().amax(1) for flow in flows.values()]).amax(0)
            for source, flow in flows.items():
                kept = (flow != 0) & (flow.abs() >= least_share * strongest[:, None])
                for t, s in (kept & active[:, None]).nonzero().tolist():
                    start = source or f"token:{self.tokens[s]}"
                    found.append(((start, s), (target, t), float(flow[t, s])))
        return found

    def _flows(self) -> dict[str, dict[str, Tensor]]:
        """By target and source, `(T, T)`: into each token, from each; the source "" is a token."""
        T, D = len(self.tokens), self.model.config.d_model
        flows: dict[str, dict[str, Tensor]] = defaultdict(
            lambda: defaultdict(lambda: torch.zeros(T, T))
        )
        for edge in self.circuit.edges:
            if edge.kind == "weight" and self.nodes[edge.source].kind == "v":
                self._attend(flows[edge.target], self.nodes[edge.source], edge.weight)
            elif edge.kind == "weight":
                flows[edge.target][edge.source] += (
                    self.activation(edge.source) * edge.weight
                ).diag()
            elif edge.kind == "residual":
                read = self.nodes[edge.target]
                scale = self.scales[read.place][:, read.channel]
                flows[edge.target][edge.source] += (self.activation(edge.source) * scale).diag()
            elif edge.kind == "unembedding":
                # The edge has the unembedding times the norm's weight.
                rms = _scale(self.seen["final_resid"], torch.ones(1))[:, 0]
                value = self.activation(edge.source) * edge.weight * rms
                flows[edge.target][edge.source] += value.diag()
        for id, node in self.nodes.items():
            if node.kind == "read" and node.channel < D:
                value = self.embedding[:, node.channel] * self.scales[node.place][:, node.channel]
                flows[id][""] += value.diag()
        for id, answer in self.answers.items():
            flows[id][""] += self._direct(answer.channel).diag()
        return flows

    def _attend(self, flows: dict[str, Tensor], v: Node, weight: float) -> None:
        """Adds what v, and q and k of its head, do to one write through `weight`."""
        assert v.head is not None
        q, k = (self.seen[f"{v.layer}.attn.{kind}"] for kind in "qk")
        pattern = attention_of(self.model, v.layer, q[None], k[None], [v.head])[0, 0]  # (T, T)
        value = self.activation(v.id)
        flows[v.id] += pattern * value * weight
        y = self.seen[f"{v.layer}.attn.y"][:, v.channel]
        slope = pattern * (value - y[:, None]) * weight
        for node in self.nodes.values():
            if node.kind in ("q", "k") and (node.layer, node.head) == (v.layer, v.head):
                share = q[:, None, node.channel] * k[None, :, node.channel]
                change = slope * share * self.model.config.d_head**-0.5
                flows[node.id] += change if node.kind == "k" else change.sum(1).diag()

    def _direct(self, answer: int) -> Tensor:
        """`(T,)`: what each token itself does to the logit of an answer after it."""
        row = rows_of(self.model.unembed or self.model.embed, [answer])[0].float().cpu()
        value = (self.embedding * self.scales["final_resid"]) @ row
        if self.model.bigram is not None:
            value = value + self.model.bigram[list(self.tokens), answer].float().cpu()
        return value

    def order(self, place: _Place) -> tuple[int, int]:
        """Tokens, then nodes in the order of a forward, then answers; each by token."""
        id, at = place
        last = max(self._order.values(), default=0) + 1
        return self._order.get(id, last if id in self.answers else -1), at

    def graph_node(self, id: str, at: int) -> dict[str, Any]:
        """A node of the schema, named as in circuit-tracer, with what that adds to it."""
        layer, kind, activation, label = "E", "embedding", None, ""
        extra: dict[str, Any] = {}
        if id in self.nodes:
            node = self.nodes[id]
            layer, feature = str(self.rows[node.place]), node.channel
            kind, label = "cross layer transcoder", f"{node.label} ({id})"
            activation = float(self.seen[node.place][at, node.channel])
        elif id in self.answers:
            layer, kind, feature = str(len(self.rows)), "logit", self.answers[id].channel
            share = float(self.probability[feature])
            label = f'Output "{visible(self.answers[id].label)}" (p={share:.3f})'
            extra = {"token_prob": share, "is_target_logit": id == next(iter(self.answers))}
        else:
            feature = self.tokens[at]
            assert self.model.tokenizer is not None
            label = f'Token "{visible(self.model.tokenizer.decode([feature]))}"'
        return {
            "node_id": f"{layer}_{feature}_{at}",
            "feature": feature,
            "layer": layer,
            "ctx_idx": at,
            "feature_type": kind,
            "jsNodeId": f"{layer}_{feature}-{at}",
            "clerp": label,
            "influence": None,
            "activation": activation,
            **extra,
        }


def _scale(x: Tensor, weight: Tensor) -> Tensor:
    """What RMSNorm multiplies `x (T, D)` by."""
    rms = (x.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
    return rms * weight.detach().float().cpu()


def _leading_to(answers: Collection[str], links: list[_Link]) -> list[_Link]:
    """The links from which a path leads to an answer."""
    into: dict[_Place, list[_Link]] = defaultdict(list)
    for link in links:
        into[link[1]].append(link)
    waiting = [place for place in into if place[0] in answers]
    reached, found = set(waiting), []
    while waiting:
        for link in into[waiting.pop()]:
            found.append(link)
            if link[0] not in reached:
                reached.add(link[0])
                waiting.append(link[0])
    return found


@dataclass(frozen=True)
class GraphConfig:
    """Writes a circuit on one prompt as a graph for Neuronpedia and circuit-tracer."""

    circuit: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """A circuit.json."""
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The circuit's model: the folder of a run or exported model, or the name of a model."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Output folder; graphs already in it are kept."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Prompt, "-" reads it from standard input; by default the circuit's first example."""
    slug: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the graph; by default that of the task."""
    least_share: float = LEAST_SHARE
    """Leave out links below this share of the strongest into the same node."""


def run(config: GraphConfig) -> None:
    """Writes the graph and lists it."""
    if config.slug is not None and not re.fullmatch(r"[a-zA-Z0-9-]+", config.slug):
        raise UserError(f"--slug must have letters, digits and hyphens, got {config.slug!r}")
    try:
        circuit = Circuit.from_json(config.circuit.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{config.circuit} cannot be read ({error}): give a circuit.json"
        ) from error
    prompt = None if config.prompt is None else program.read_text(config.prompt)
    graph = to_neuronpedia(
        circuit,
        load_model(config.checkpoint),
        prompt,
        slug=config.slug,
        least_share=config.least_share,
    )
    with writing(config.out, "choose another --out"):
        config.out.mkdir(parents=True, exist_ok=True)
    slug, index = graph["metadata"]["slug"], config.out / "graph-metadata.json"
    path, listed = config.out / f"{slug}.json", _listed(index, slug)
    write_atomically(path, json.dumps(graph, allow_nan=False))
    write_atomically(index, json.dumps({"graphs": [*listed, graph["metadata"]]}, indent=1))
    print(f"{path}: {len(graph['nodes'])} nodes, {len(graph['links'])} links")
    print(f"python -m circuit_tracer start-server --graph_file_dir {config.out}")


def _listed(index: Path, slug: str) -> list[Any]:
    """The other graphs of the folder."""
    try:
        graphs = json.loads(index.read_text(encoding="utf-8"))["graphs"]
        return [graph for graph in graphs if graph["slug"] != slug]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} cannot be read ({error}): choose another --out") from error


main = program.entry(GraphConfig, "circuits.neuronpedia", run)


if __name__ == "__main__":
    sys.exit(main())
