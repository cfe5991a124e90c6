"""From a pruned part of a model to a `Circuit`: names, ends, examples, snippets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import sparse_kernels as sk
from sparse_transformer import hooks
from sparse_transformer.circuits.circuit import Circuit, Edge, Example, Node
from sparse_transformer.circuits.means import top_snippets
from sparse_transformer.circuits.problem import Calibration, Part, Problem, margin
from sparse_transformer.circuits.prune import alive
from sparse_transformer.model import Transformer
from sparse_transformer.tasks import collate

_EXAMPLE_PAIRS = 3
_MOST_TOKENS = 8
_MOST_ANSWERS = 4
# Above so many nodes nobody reads their snippets, and importances take long.
_MOST_DESCRIBED = 150


def describe(
    problem: Problem,
    part: Part,
    calibration: Calibration,
    tokenizer: Tokenizer,
    corpus: Tensor,
    *,
    target: float,
    model: Mapping[str, Any],
    proof: Mapping[str, Any],
) -> Circuit:
    """The circuit of `part`.

    Args:
        corpus: int64 `(rows, context)`, where snippets are looked for.
        target: the loss that it was pruned to.
        model: facts for the reader.
        proof: see proof.py.
    """
    texts = [tokenizer.decode([token]) for token in range(problem.model.config.vocab_size)]
    numbers = part.keep.nonzero().squeeze(1).tolist()
    located = [problem.places.locate(number) for number in numbers]
    importance = _importance(problem, part) if len(numbers) <= _MOST_DESCRIBED else {}
    nodes = [
        _node(problem, place, channel, importance.get(number))
        for number, (place, channel) in zip(numbers, located, strict=True)
    ]
    present = alive(problem, part)
    edges = [
        Edge(problem.places.id(source), problem.places.id(target), weight)
        for source, target, weight in zip(
            problem.edges.source[present].tolist(),
            problem.edges.target[present].tolist(),
            problem.edges.weight[present].tolist(),
            strict=True,
        )
    ]
    edges += _residual(nodes) + _attention(nodes)
    ends, end_edges = _ends(problem, nodes, texts)
    few = located if len(located) <= _MOST_DESCRIBED else []
    return Circuit(
        task=problem.task.name,
        description=problem.task.description,
        model=dict(model),
        target_loss=target,
        scale=calibration.scale,
        shift=calibration.shift,
        nodes=tuple(nodes + ends),
        edges=tuple(edges + end_edges),
        edges_before=problem.edges.count(part.keep),
        proof=dict(proof),
        examples=_examples(problem, part, calibration, located, texts),
        snippets=top_snippets(problem.model, corpus, few, texts) if few else {},
    )


def _node(problem: Problem, place: str, channel: int, importance: float | None) -> Node:
    layer = place.split(".")[0]
    kind = problem.places.kind(place)
    head = channel // problem.places.d_head if kind in ("q", "k", "v") else None
    if kind == "neuron":
        label = f"neuron {channel}"
    elif head is not None:
        label = f"{kind} {channel % problem.places.d_head} of head {head}"
    else:
        label = f"{kind} {channel}"
    return Node(
        id=f"{place}:{channel}",
        kind=kind,
        label=label,
        place=place,
        layer=int(layer),
        channel=channel,
        head=head,
        mean=float(problem.means[place][channel]),
        importance=importance,
    )


def _importance(problem: Problem, part: Part) -> dict[int, float]:
    """What the loss on the prompts for fitting rises by without each node, recalibrated."""
    before = problem.calibrated_loss(part)
    found = {}
    for number in part.keep.nonzero().squeeze(1).tolist():
        keep = part.keep.clone()
        keep[number] = False
        loss = problem.calibrated_loss(Part(keep, part.removed))
        found[number] = loss - before
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
def _ends(problem: Problem, nodes: list[Node], texts: list[str]) -> tuple[list[Node], list[Edge]]:
    """The tokens in which the prompts of a pair differ, and the answers, with their edges."""
    model = problem.model
    last = model.config.n_layer
    tokens = _deciding_tokens(problem)
    answers = [token for token, _ in _answers(problem).most_common(_MOST_ANSWERS)]
    embedding = _rows(model, model.embed, tokens)
    unembedding = _rows(model, model.embed if model.unembed is None else model.unembed, answers)
    unembedding = unembedding * model.norm.weight
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


def _deciding_tokens(problem: Problem) -> list[int]:
    """Those that one prompt of a pair has more often than the other, the most frequent ones."""
    counts: Counter[int] = Counter()
    for pair in problem.test:
        positive, negative = Counter(pair.positive.tokens), Counter(pair.negative.tokens)
        counts.update(set(positive - negative) | set(negative - positive))
    return [token for token, _ in counts.most_common(_MOST_TOKENS)]


def _answers(problem: Problem) -> Counter[int]:
    return Counter(
        prompt.right for pair in problem.test for prompt in (pair.positive, pair.negative)
    )


def _rows(model: Transformer, module: nn.Module, rows: list[int]) -> Tensor:
    """Rows of a `(V, D)` table, dense: few of them."""
    weight = module.get_parameter("weight").detach()
    D = model.config.d_model
    if not isinstance(module, sk.SparseLinear):
        return weight[rows]
    # Embedding: a fan-out for each token. Unembedding: a fan-in for each token. Both by token.
    columns = module.layout.indices[rows].long()
    return weight.new_zeros(len(rows), D).scatter_(1, columns, weight[rows].flatten(1))


@torch.no_grad()
def _examples(
    problem: Problem,
    part: Part,
    calibration: Calibration,
    located: list[tuple[str, int]],
    texts: list[str],
) -> tuple[Example, ...]:
    """The shortest test prompts, with activations of the whole model."""
    shortest = sorted(
        problem.test, key=lambda pair: (len(pair.positive.tokens), pair.positive.text)
    )[:_EXAMPLE_PAIRS]
    if not shortest:
        return ()
    batch = collate(shortest, problem.pad)
    shown = located if len(located) <= _MOST_DESCRIBED else []
    with hooks.recording(problem.model, sorted({place for place, _ in shown})) as seen:
        margin(problem.model, batch)
    margins, positive = problem.margins(shortest, part)
    margins = calibration.apply(margins, positive)
    found = []
    for row in range(len(batch.tokens)):
        length = int(batch.last[row]) + 1
        found.append(
            Example(
                tokens=tuple(texts[token] for token in batch.tokens[row, :length].tolist()),
                right=texts[int(batch.right[row])],
                wrong=texts[int(batch.wrong[row])],
                positive=bool(batch.positive[row]),
                logit_difference=float(margins[row]),
                activations={
                    f"{place}:{channel}": tuple(
                        round(value, 4) for value in seen[place][row, :length, channel].tolist()
                    )
                    for place, channel in shown
                },
            )
        )
    return tuple(found)
