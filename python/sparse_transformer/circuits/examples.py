"""Example prompts of a circuit, and where its attention heads look on them.

Chosen from the held-out prompts: the shortest pair, the pair with most distractors, and a prompt
that the circuit gets wrong, where there is one. Each is run through the whole model and through the
circuit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from sparse_transformer import hooks
from sparse_transformer.circuits.ablation import keep_nodes, remove_edges
from sparse_transformer.circuits.activations import attention_of
from sparse_transformer.circuits.circuit import Example, Trace
from sparse_transformer.circuits.objective import Calibration, Subgraph, TaskLoss
from sparse_transformer.tasks import Batch, Pair, collate

# Pairs over which it is averaged where a head looks.
_PAIRS = 64
# What a head looks at: at most so many tokens, each with at least this multiple of the attention
# that it would have if the head looked everywhere alike, and together at least this share.
_MOST_TOKENS, _LIFT, _SHARE = 3, 2.0, 0.2

# Layer and number of an attention head.
Head = tuple[int, int]


def head_id(head: Head) -> str:
    """The id of a head's node."""
    return f"{head[0]}.attn.head:{head[1]}"


def deciding_tokens(pairs: Sequence[Pair]) -> list[int]:
    """Tokens that one prompt of a pair has more often than the other, the most frequent first."""
    counts: Counter[int] = Counter()
    for pair in pairs:
        positive, negative = Counter(pair.positive.tokens), Counter(pair.negative.tokens)
        counts.update(set(positive - negative) | set(negative - positive))
    return [token for token, _ in counts.most_common()]


@torch.no_grad()
def examples(
    task: TaskLoss,
    subgraph: Subgraph,
    calibration: Calibration,
    located: Sequence[tuple[str, int]],
    heads: Sequence[Head],
    texts: Sequence[str],
) -> tuple[Example, ...]:
    """The chosen prompts with the activations of `located` and the patterns of `heads`."""
    chosen = _chosen(task, subgraph, calibration)
    if not chosen:
        return ()
    batch = collate([task.test[number] for number, _, _ in chosen], task.pad)
    model = _traces(task, batch, None, located, heads)
    circuit = _traces(task, batch, subgraph, located, heads)
    diffs = torch.tensor([trace.logit_difference for trace in circuit])
    diffs = calibration.apply(diffs, batch.positive)
    return tuple(
        Example(
            tokens=tuple(texts[token] for token in batch.tokens[row, : batch.last[row] + 1]),
            right=texts[int(batch.right[row])],
            wrong=texts[int(batch.wrong[row])],
            positive=bool(batch.positive[row]),
            note=note,
            model=model[row],
            circuit=replace(circuit[row], logit_difference=float(diffs[row])),
        )
        for place, (_, note, rows) in enumerate(chosen)
        for row in (2 * place + side for side in rows)
    )


@torch.no_grad()
def looks_at(
    task: TaskLoss, subgraph: Subgraph, heads: Sequence[Head]
) -> dict[Head, tuple[list[int], float]]:
    """The tokens that each head of the circuit attends to from the last token, and their share.

    Shares are of what does not go to the sink. No tokens where attention is spread over many.
    """
    found: dict[Head, tuple[list[int], float]] = {}
    batch = collate(task.test[:_PAIRS], task.pad)
    real = torch.arange(batch.tokens.shape[1]) <= batch.last.unsqueeze(1)
    size = task.model.config.vocab_size
    everywhere = mass_of(batch.tokens, real / real.sum(1, keepdim=True) / len(real), size)
    for head, pattern in _forward(task, batch, subgraph, (), heads)[2].items():
        weights = pattern / pattern.sum(1, keepdim=True).clamp_min(1e-9) / len(pattern)
        found[head] = strongest(mass_of(batch.tokens, weights, size), everywhere)
    return found


def strongest(mass: Tensor, everywhere: Tensor) -> tuple[list[int], float]:
    """The tokens that have most of the attention, if it is not spread over many, and their share.

    Args:
        mass: `(V,)`, the share of each token.
        everywhere: `(V,)`, what it were if the head looked everywhere alike.
    """
    top = (mass * (mass >= _LIFT * everywhere)).topk(min(_MOST_TOKENS, len(mass)))
    share = float(top.values.sum())
    return top.indices[top.values > 0].tolist() if share >= _SHARE else [], share


def mass_of(tokens: Tensor, weights: Tensor, size: int) -> Tensor:
    """`(V,)`: what each token has of `weights`, which are like `tokens (rows, T)`."""
    return torch.zeros(size).index_add_(0, tokens.flatten(), weights.flatten())


def _chosen(
    task: TaskLoss, subgraph: Subgraph, calibration: Calibration
) -> list[tuple[int, str, tuple[int, ...]]]:
    """Number of a test pair, why it is shown, and which of its two prompts are."""
    pairs = task.test
    length = [len(pair.positive.tokens) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda at: (length[at], pairs[at].positive.text))
    if not order:
        return []
    chosen: list[tuple[int, str, tuple[int, ...]]] = [(order[0], "the shortest prompts", (0, 1))]
    answers = {token for pair in pairs for token in (pair.positive.right, pair.positive.wrong)}
    decisive = answers | set(deciding_tokens(pairs))
    count = [sum(token in decisive for token in pair.positive.tokens) for pair in pairs]
    most = max(order, key=lambda at: count[at])
    if count[most] > count[order[0]]:
        chosen.append((most, "most distractors", (0, 1)))
    right = calibration.apply(*task.logit_diffs(pairs, subgraph)) > 0
    wrong = (~right).view(-1, 2)
    # Of the failures rather one that the whole model gets right.
    known = (task.logit_diffs(pairs)[0] > 0).view(-1, 2)
    failed = [(at, side) for known_too in (known, ~known) for at in order for side in (0, 1)
              if wrong[at, side] and known_too[at, side]]  # fmt: skip
    if failed:
        at, side = failed[0]
        chosen.append((at, "the circuit is wrong", (side,)))
    return chosen


def _traces(
    task: TaskLoss,
    batch: Batch,
    subgraph: Subgraph | None,
    located: Sequence[tuple[str, int]],
    heads: Sequence[Head],
) -> list[Trace]:
    diffs, seen, patterns = _forward(task, batch, subgraph, [hook for hook, _ in located], heads)
    traces = []
    for row, last in enumerate(batch.last.tolist()):
        values = {
            f"{hook}:{channel}": seen[hook][row, : last + 1, channel] for hook, channel in located
        }
        weights = {head_id(head): found[row, : last + 1] for head, found in patterns.items()}
        traces.append(Trace(float(diffs[row]), _rounded(values), _rounded(weights)))
    return traces


def _rounded(found: dict[str, Tensor]) -> dict[str, tuple[float, ...]]:
    return {id: tuple(round(one, 4) for one in values.tolist()) for id, values in found.items()}


def _forward(
    task: TaskLoss,
    batch: Batch,
    subgraph: Subgraph | None,
    places: Sequence[str],
    heads: Sequence[Head],
) -> tuple[Tensor, dict[str, Tensor], dict[Head, Tensor]]:
    """Right minus wrong logit `(2P,)`, activations, and patterns `(2P, T)` from the last token."""
    wanted = {*places, *(f"{layer}.attn.{kind}" for layer, _ in heads for kind in "qk")}
    with ExitStack() as stack:
        if subgraph is not None:
            stack.enter_context(keep_nodes(task.model, subgraph.keep, task.means))
            edges = remove_edges(task.model, task.edges, subgraph.removed, task.means)
            stack.enter_context(edges)
        seen = stack.enter_context(hooks.recording(task.model, sorted(wanted)))
        logits = task.model(batch.tokens, at=batch.last)[:, 0]
    right, wrong = logits.gather(1, batch.answers).unbind(1)
    rows, patterns = torch.arange(len(logits)), {}
    for layer, number in heads:
        q, k = (seen[f"{layer}.attn.{kind}"] for kind in "qk")
        pattern = attention_of(task.model, layer, q, k, [number])
        patterns[layer, number] = pattern[rows, 0, batch.last]
    return right - wrong, seen, patterns
