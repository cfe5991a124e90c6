"""From a found subgraph to a `Circuit`: labels, tokens and answers, examples, snippets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer import hooks
from sparse_transformer.circuits.activations import top_snippets
from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.circuit import Circuit, Edge, Example, Node
from sparse_transformer.circuits.graph import rows_of
from sparse_transformer.circuits.objective import Calibration, Subgraph, TaskLoss
from sparse_transformer.circuits.pipeline import FoundCircuit
from sparse_transformer.tasks import collate

_EXAMPLE_PAIRS = 3
_MOST_TOKENS = 8
_MOST_ANSWERS = 4
# Above so many nodes nobody reads their snippets, and importances take long.
_MOST_DESCRIBED = 150


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
        found: the circuit in numbers.
        tokenizer: the model's.
        corpus: int64 `(rows, context)`, where snippets are looked for.
        target: the loss that it was pruned to.
        model: facts for the reader.
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
    nodes = [
        _node(task, hook, channel, importance.get(number))
        for number, (hook, channel) in zip(numbers, located, strict=True)
    ]
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
    edges += _residual(nodes) + _attention(nodes)
    ends, end_edges = _ends(task, nodes, texts)
    return Circuit(
        task=task.task.name,
        description=task.task.description,
        model=dict(model),
        target_loss=target,
        scale=found.calibration.scale,
        shift=found.calibration.shift,
        nodes=tuple(nodes + ends),
        edges=tuple(edges + end_edges),
        edges_before=task.edges.count(subgraph.keep),
        validation=found.validation,
        examples=_examples(task, subgraph, found.calibration, few, texts),
        snippets=top_snippets(task.model, corpus, few, texts, progress=False) if few else {},
    )


def _node(task: TaskLoss, hook: str, channel: int, importance: float | None) -> Node:
    layer = hook.split(".")[0]
    kind = task.nodes.kind(hook)
    head = channel // task.nodes.d_head if kind in ("q", "k", "v") else None
    if kind == "neuron":
        label = f"neuron {channel}"
    elif head is not None:
        label = f"{kind} {channel % task.nodes.d_head} of head {head}"
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


def _attention(nodes: list[Node]) -> list[Edge]:
    """From the q and k channels of a head to its v channels, which they decide where to look."""
    return [
        Edge(which.id, value.id, 1.0, "attention")
        for value in nodes
        if value.kind == "v"
        for which in nodes
        if which.kind in ("q", "k") and (which.layer, which.head) == (value.layer, value.head)
    ]


@torch.no_grad()
def _ends(task: TaskLoss, nodes: list[Node], texts: list[str]) -> tuple[list[Node], list[Edge]]:
    """The tokens in which the prompts of a pair differ, and the answers, with their edges."""
    model = task.model
    last = model.config.n_layer
    tokens = _deciding_tokens(task)
    answers = [token for token, _ in _answers(task).most_common(_MOST_ANSWERS)]
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


def _deciding_tokens(task: TaskLoss) -> list[int]:
    """Those that one prompt of a pair has more often than the other, the most frequent ones."""
    counts: Counter[int] = Counter()
    for pair in task.test:
        positive, negative = Counter(pair.positive.tokens), Counter(pair.negative.tokens)
        counts.update(set(positive - negative) | set(negative - positive))
    return [token for token, _ in counts.most_common(_MOST_TOKENS)]


def _answers(task: TaskLoss) -> Counter[int]:
    return Counter(prompt.right for pair in task.test for prompt in (pair.positive, pair.negative))


@torch.no_grad()
def _examples(
    task: TaskLoss,
    subgraph: Subgraph,
    calibration: Calibration,
    located: list[tuple[str, int]],
    texts: list[str],
) -> tuple[Example, ...]:
    """The shortest test prompts, with activations of the whole model."""
    shortest = sorted(task.test, key=lambda pair: (len(pair.positive.tokens), pair.positive.text))
    pairs = shortest[:_EXAMPLE_PAIRS]
    if not pairs:
        return ()
    batch = collate(pairs, task.pad)
    with hooks.recording(task.model, sorted({hook for hook, _ in located})) as seen:
        task.model(batch.tokens, at=batch.last)
    diffs, positive = task.logit_diffs(pairs, subgraph)
    diffs = calibration.apply(diffs, positive)
    found = []
    for row in range(len(batch.tokens)):
        length = int(batch.last[row]) + 1
        found.append(
            Example(
                tokens=tuple(texts[token] for token in batch.tokens[row, :length].tolist()),
                right=texts[int(batch.right[row])],
                wrong=texts[int(batch.wrong[row])],
                positive=bool(batch.positive[row]),
                logit_difference=float(diffs[row]),
                activations={
                    f"{hook}:{channel}": tuple(
                        round(value, 4) for value in seen[hook][row, :length, channel].tolist()
                    )
                    for hook, channel in located
                },
            )
        )
    return tuple(found)
