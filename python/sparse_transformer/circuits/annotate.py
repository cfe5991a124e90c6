"""From a found subgraph to a `Circuit`: labels, heads, tokens and answers, examples, snippets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer.circuits import words
from sparse_transformer.circuits.activations import top_snippets
from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.circuit import Circuit, Edge, Node
from sparse_transformer.circuits.examples import (
    Head,
    deciding_tokens,
    examples,
    head_id,
    looks_at,
)
from sparse_transformer.circuits.graph import rows_of
from sparse_transformer.circuits.labels import Label, label_nodes, quoted
from sparse_transformer.circuits.objective import Subgraph, TaskLoss
from sparse_transformer.circuits.pipeline import FoundCircuit
from sparse_transformer.tasks.task import prompts

_MOST_TOKENS = 8
_MOST_ANSWERS = 4
# Above so many nodes nobody reads their snippets, and importances take long.
_MOST_DESCRIBED = 150
# Tokens of the logit lens; sources of a read, from tokens in at least this share of the prompts.
_LENS, _SOURCES, _COMMON = 5, 5, 0.05
# Sources drawn for a read without other edges; names of answers in that of a write.
_DRAWN = 3
# Rows of the corpus on which labels are fitted and scored.
_LABEL_ROWS = 128
# Tokens whose unembedding is looked at together.
_CHUNK = 256


def annotate(
    task: TaskLoss,
    found: FoundCircuit,
    tokenizer: Tokenizer,
    corpus: Tensor,
    *,
    target: float,
    model: Mapping[str, Any],
    progress: Progress | None = None,
) -> Circuit:
    """The circuit with what a reader needs to understand it.

    Args:
        corpus: int64 `(rows, context)`, from which labels and snippets are.
        target: the loss that it was pruned to.
        progress: importances are left out when its time is over.
    """
    subgraph = found.subgraph
    texts = [tokenizer.decode([token]) for token in range(task.model.config.vocab_size)]
    numbers = subgraph.keep.nonzero().squeeze(1).tolist()
    located = [task.nodes.locate(number) for number in numbers]
    few = located if len(located) <= _MOST_DESCRIBED else []
    progress = progress or Progress()
    with progress.step("describe", 1.0), progress.part(0.0, 0.5):
        importance = _importance(task, subgraph, progress) if few else {}
    spread = corpus[:: max(1, len(corpus) // _LABEL_ROWS)]
    labels = label_nodes(
        task.model, spread, tokenizer, few, deciding_tokens(task.test)[:_MOST_TOKENS]
    )
    nodes = [
        _node(task, hook, channel, importance.get(number))
        for number, (hook, channel) in zip(numbers, located, strict=True)
    ]
    nodes = [_named(node, label) for node, label in zip(nodes, labels, strict=False)] or nodes
    nodes = _with_tokens(task, nodes, texts)
    present = task.present_edges(subgraph)
    edges = [
        Edge(task.nodes.id(source), task.nodes.id(target), weight)
        for source, target, weight in zip(
            task.edges.source[present].tolist(),
            task.edges.target[present].tolist(),
            task.edges.weight[present].tolist(),
            strict=True,
        )
    ]
    edges += _residual(nodes)
    ends, end_edges = _ends(task, nodes, texts)
    edges += end_edges
    nodes = [_writer(node, edges, ends) for node in nodes]
    sources, source_edges = _sources(task, nodes, edges, texts)
    heads = sorted(
        {(node.layer, node.head) for node in nodes if node.kind == "v" and node.head is not None}
    )
    head_nodes, head_edges = _heads(nodes, heads, looks_at(task, subgraph, heads), texts)
    return Circuit(
        task=task.task.name,
        description=task.task.description,
        model=dict(model),
        target_loss=target,
        scale=found.calibration.scale,
        shift=found.calibration.shift,
        nodes=tuple(sources + nodes + head_nodes + ends),
        edges=tuple(edges + source_edges + head_edges),
        edges_before=task.edges.count(subgraph.keep),
        validation=found.validation,
        examples=examples(task, subgraph, found.calibration, few, heads, texts),
        snippets=top_snippets(task.model, corpus, few, texts) if few else {},
    )


def _node(task: TaskLoss, hook: str, channel: int, importance: float | None) -> Node:
    layer = hook.split(".")[0]
    kind = task.nodes.kind(hook)
    head = channel // task.nodes.d_head if kind in ("q", "k", "v") else None
    if head is not None:
        label = f"{kind} {channel % task.nodes.d_head} of head {head}"
    elif kind == "read" and channel >= task.model.config.d_model:
        label = f"position channel {channel - task.model.config.d_model}"
    else:
        label = f"{kind} {channel}"
    return Node(
        id=f"{hook}:{channel}",
        kind=kind,
        label=label,
        place=hook,
        layer=int(layer),
        channel=channel,
        head=head,
        mean=float(task.means[hook][channel]),
        importance=importance,
    )


def _named(node: Node, label: Label) -> Node:
    """The node called by what it does, if the label is good enough."""
    if not label.text:
        return node
    return replace(node, label=words.named(node.kind, label.text), score=label.score)


def _importance(task: TaskLoss, subgraph: Subgraph, progress: Progress) -> dict[int, float]:
    """How much the calibrated loss on the prompts for fitting rises without each node."""
    before = task.calibrated_loss(subgraph)
    numbers = subgraph.keep.nonzero().squeeze(1).tolist()
    found: dict[int, float] = {}
    for number in numbers:
        if progress.left < 0:
            return {}
        progress.advance(len(found) / len(numbers))
        keep = subgraph.keep.clone()
        keep[number] = False
        found[number] = task.calibrated_loss(Subgraph(keep, subgraph.removed)) - before
    return found


def _order(node: Node) -> tuple[int, int]:
    """When in a forward a node reads or writes the residual stream."""
    return node.layer, 0 if ".attn." in node.place else 1


def _residual(nodes: list[Node]) -> list[Edge]:
    """From each write to the later reads of the same channel."""
    return [
        Edge(write.id, read.id, 1.0, "residual")
        for write in nodes
        if write.kind == "write"
        for read in nodes
        if read.kind == "read" and read.channel == write.channel and _order(read) > _order(write)
    ]


def _heads(
    nodes: list[Node],
    heads: Sequence[Head],
    looked: Mapping[Head, tuple[list[int], float]],
    texts: Sequence[str],
) -> tuple[list[Node], list[Edge]]:
    """A node for each head, called by where it looks, between its q and k and its v.

    Where the circuit has no q, or no k, of a head, one node stands for all that are frozen.
    """
    made, edges = [], []
    for layer, number in heads:
        tokens, share = looked[layer, number]
        mine = [node for node in nodes if (node.layer, node.head) == (layer, number)]
        if tokens:
            label = f"looks at {quoted(texts[token] for token in tokens)} ({share:.0%})"
        elif any(node.kind in ("q", "k") for node in mine):
            label = "looks at many tokens"
        else:
            label = "looks at all tokens alike"
        head = Node(head_id((layer, number)), "head", label, "", layer, number, number)
        made.append(head)
        for kind in ("q", "k"):
            deciding = [node for node in mine if node.kind == kind]
            if not deciding:
                id, label = f"{layer}.attn.{kind}:mean of {number}", f"{kind} at its mean"
                deciding = [Node(id, "frozen", label, "", layer, number, number)]
                made += deciding
            edges += [Edge(node.id, head.id, 1.0, "attention") for node in deciding]
        edges += [Edge(head.id, node.id, 1.0, "attention") for node in mine if node.kind == "v"]
    return made, edges


@torch.no_grad()
def _with_tokens(task: TaskLoss, nodes: list[Node], texts: Sequence[str]) -> list[Node]:
    """Reads with their sources, writes with their logit lens."""
    model, common = task.model, _common_tokens(task)
    D, V = model.config.d_model, model.config.vocab_size
    embedding = rows_of(model.embed, common)
    # Of the unembedding the channels that are written; some tokens at a time, never all of it.
    written = sorted({node.channel for node in nodes if node.kind == "write"})
    parts = torch.arange(V).split(_CHUNK)
    table = model.unembed or model.embed
    lens = torch.cat([rows_of(table, part.tolist())[:, written] for part in parts])
    lens = lens * model.norm.weight[written]  # (V, written)

    def strongest(values: Tensor) -> tuple[str, ...]:
        top = values.topk(min(_LENS, V))
        return tuple(texts[at] for at in top.indices[top.values > 0].tolist())

    found = []
    for node in nodes:
        if node.kind == "read" and node.channel < D:
            values = embedding[:, node.channel]
            top = values.abs().topk(min(_SOURCES, len(values))).indices.tolist()
            sources = [(texts[common[at]], float(values[at])) for at in top if values[at] != 0]
            node = replace(node, sources=tuple(sources))
        elif node.kind == "write":
            values = lens[:, written.index(node.channel)]
            node = replace(node, promotes=strongest(values), suppresses=strongest(-values))
        found.append(node)
    return found


def _common_tokens(task: TaskLoss) -> list[int]:
    """Tokens of not too few of the held-out prompts."""
    asked = prompts(task.test)
    counts = Counter(token for prompt in asked for token in set(prompt.tokens))
    return [token for token, count in counts.items() if count >= _COMMON * len(asked)]


def _writer(node: Node, edges: list[Edge], ends: list[Node]) -> Node:
    """A write that answers read, called by them; its sign decides if it raises both kinds."""
    texts = {end.id: end.label for end in ends if end.kind == "answer"}
    weights = {
        edge.target: edge.weight
        for edge in edges
        if edge.kind == "unembedding" and edge.source == node.id
    }
    if not weights:
        return node
    ranked = sorted(weights, key=lambda id: -weights[id])
    raised, lowered = (
        quoted(texts[id] for id in side[:_DRAWN])
        for side in ([id for id in ranked if weights[id] > 0],
                     [id for id in ranked[::-1] if weights[id] < 0])
    )  # fmt: skip
    return replace(node, label=f"writes {' or '.join(filter(None, (raised, lowered)))}", score=None)


def _sources(
    task: TaskLoss, nodes: list[Node], edges: list[Edge], texts: Sequence[str]
) -> tuple[list[Node], list[Edge]]:
    """For each read that nothing in the picture writes to: its strongest tokens, as one node."""
    fed = {edge.target for edge in edges}
    number = {texts[token]: token for token in _common_tokens(task)}
    made: dict[str, Node] = {}
    joined = []
    for node in nodes:
        if node.kind != "read" or node.id in fed or not node.sources:
            continue
        strongest = node.sources[:_DRAWN]
        numbers = [number[text] for text, _ in strongest]
        id = "tokens:" + "+".join(str(number) for number in numbers)
        label = quoted(text for text, _ in strongest)
        made[id] = Node(id, "token", label, channel=numbers[0])
        joined.append(Edge(id, node.id, strongest[0][1], "embedding"))
    return list(made.values()), joined


@torch.no_grad()
def _ends(task: TaskLoss, nodes: list[Node], texts: list[str]) -> tuple[list[Node], list[Edge]]:
    """The tokens in which the prompts of a pair differ, and the answers, with their edges."""
    model = task.model
    last = model.config.n_layer
    tokens = deciding_tokens(task.test)[:_MOST_TOKENS]
    rights = Counter(prompt.right for prompt in prompts(task.test))
    answers = [token for token, _ in rights.most_common(_MOST_ANSWERS)]
    embedding = rows_of(model.embed, tokens)
    unembedding = rows_of(model.unembed or model.embed, answers) * model.norm.weight
    edges = [
        Edge(f"token:{token}", node.id, float(row[node.channel]), "embedding")
        for token, row in zip(tokens, embedding, strict=True)
        for node in nodes
        if node.kind == "read" and node.channel < len(row) and row[node.channel] != 0
    ]
    edges += [
        Edge(node.id, f"answer:{token}", float(row[node.channel]), "unembedding")
        for token, row in zip(answers, unembedding, strict=True)
        for node in nodes
        if node.kind == "write" and row[node.channel] != 0
    ]
    used = {edge.source for edge in edges} | {edge.target for edge in edges}
    ends = [
        Node(id=f"token:{token}", kind="token", label=texts[token], channel=token)
        for token in tokens
        if f"token:{token}" in used
    ]
    ends += [
        Node(id=f"answer:{token}", kind="answer", label=texts[token], layer=last, channel=token)
        for token in answers
    ]
    return ends, edges
