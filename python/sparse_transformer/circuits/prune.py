"""From a trained mask to the subgraph that a task needs.

`NodeOrder.threshold` keeps as few of the nodes with the highest mask as the target loss allows, as
published. `greedy_prune` goes further than the paper: it removes single nodes and single edges
while the loss stays below the target, those first that cost least for each edge. Both keep only
what lies on a path from a token to an answer.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.edge_attribution import edge_effects, node_effects
from sparse_transformer.circuits.objective import Subgraph, TaskLoss

# Up to so many candidates are tried one by one, and up to so many where no more go together.
_MOST_TRIED, _MOST_LEFT = 350, 1000
# Together they go while the loss stays below a limit that rises to the target in so many rounds;
# further rounds follow while each takes this share of all away.
_ROUNDS, _LEAST_SHARE = 4, 0.01
# What takes a node away and no edge still makes a circuit a little simpler.
_LEAST_GONE = 0.5
# What has this multiple of the target on the probe is not tried on all prompts.
_HOPELESS = 2.0


class Size(NamedTuple):
    """Of a circuit."""

    nodes: int
    edges: int


def size_of(task: TaskLoss, subgraph: Subgraph) -> Size:
    """How many nodes and edges it has."""
    return Size(int(subgraph.keep.sum()), task.size(subgraph))


@dataclass(frozen=True)
class Thresholded:
    """The nodes with the highest mask that are enough, without dead ends.

    Attributes:
        keep: bool `(total,)`.
        nodes, edges: how many.
        loss: calibrated, on the prompts for fitting; above the target if nothing was enough.
    """

    keep: Tensor
    nodes: int
    edges: int
    loss: float


class NodeOrder:
    """The nodes in the order of a mask, and the losses of its first so many.

    Args:
        order: int64 `(total,)`, the most needed node first.
        chosen: how many of them the training kept.
    """

    def __init__(self, task: TaskLoss, order: Tensor, chosen: int) -> None:
        self.order, self.chosen = order, chosen
        self._task = task
        self._losses: dict[int, float] = {}

    @classmethod
    def of(cls, task: TaskLoss, mask: Tensor) -> NodeOrder:
        """That of a trained mask."""
        return cls(task, mask.argsort(descending=True, stable=True), int((mask > 0).sum()))

    def keep(self, count: int) -> Tensor:
        """bool `(total,)`: the first `count`, without dead ends."""
        nodes = torch.zeros(len(self.order), dtype=torch.bool)
        nodes[self.order[:count]] = True
        return on_paths(self._task, Subgraph(nodes)).keep

    def loss(self, count: int) -> float:
        """Calibrated, on the prompts for fitting."""
        if count not in self._losses:
            self._losses[count] = self._task.calibrated_loss(Subgraph(self.keep(count)))
        return self._losses[count]

    def threshold(self, target: float, progress: Progress | None = None) -> Thresholded:
        """Bisects the number of nodes to the target loss.

        Bisection assumes that the loss falls with the number of nodes; where it does not, the
        result still reaches the target, but a smaller one may exist.
        """
        # From the number that training chose upwards, as all of them may be far too many to need.
        low, high, total = 0, max(1, self.chosen), len(self.order)
        while self.loss(high) > target and high < total:
            low, high = high, min(total, 2 * high)
        if self.loss(high) <= target:
            high = _bisect(
                lambda count: self.loss(count) <= target, low, high, coarse=100, progress=progress
            )
        keep = self.keep(high)
        return Thresholded(keep, int(keep.sum()), self._task.edges.count(keep), self.loss(high))


def _bisect(
    enough: Callable[[int], bool],
    low: int,
    high: int,
    *,
    coarse: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Narrows `(low, high]` to one number, or to one in `coarse`; ends early when time is over."""
    while high - low > max(1, high // coarse if coarse else 1):
        if progress is not None and progress.left < 0:
            break
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


@torch.no_grad()
def on_paths(task: TaskLoss, subgraph: Subgraph) -> Subgraph:
    """The subgraph without dead ends: each node lies on a path from a token to an answer.

    A path leads from the embedding of a token of the prompts (or from a position) along edges, from
    a write to a later read of the same channel, from q and k channels to the v channels of their
    head, and from a write to the unembedding of an answer.
    """
    nodes, keep = task.nodes, subgraph.keep
    present = task.edges.split(task.present_edges(subgraph))
    edges = {
        matrix.module.removeprefix("blocks."): (matrix.source[there], matrix.target[there])
        for matrix, there in zip(task.edges.matrices, present, strict=True)
    }
    from_tokens, to_answers = task.ends()
    D = len(from_tokens)
    reached, needed = torch.zeros_like(keep), torch.zeros_like(keep)
    of = {True: nodes.split(reached), False: nodes.split(needed)}  # views
    kept = nodes.split(keep)

    def attend(parts: dict[str, Tensor], layer: int, sources: str, targets: str) -> None:
        heads = torch.stack([parts[f"{layer}.attn.{name}"] for name in sources])
        heads = heads.view(len(sources), -1, nodes.d_head).any(2).any(0)
        for name in targets:
            place = f"{layer}.attn.{name}"
            parts[place] |= kept[place] & heads.repeat_interleave(nodes.d_head)

    sublayers = [
        (layer, *names)
        for layer in range(task.model.config.n_layer)
        for names in (("attn", "qkv", "out"), ("mlp", "up", "down"))
    ]
    stream, parts = from_tokens.clone(), of[True]
    for layer, part, first, second in sublayers:
        read, write = f"{layer}.{part}.act_in", f"{layer}.{part}.resid_delta"
        parts[read] |= kept[read]
        parts[read][:D] &= stream
        source, target = edges[f"{layer}.{part}.{first}"]
        reached[target[reached[source]]] = True
        if part == "attn":
            attend(parts, layer, "qk", "v")
        source, target = edges[f"{layer}.{part}.{second}"]
        reached[target[reached[source]]] = True
        stream |= parts[write]
    stream, parts = to_answers.clone(), of[False]
    for layer, part, first, second in reversed(sublayers):
        read, write = f"{layer}.{part}.act_in", f"{layer}.{part}.resid_delta"
        parts[write] |= kept[write] & stream
        source, target = edges[f"{layer}.{part}.{second}"]
        needed[source[needed[target]]] = True
        if part == "attn":
            attend(parts, layer, "v", "qk")
        source, target = edges[f"{layer}.{part}.{first}"]
        needed[source[needed[target]]] = True
        stream |= parts[read][:D]
    return replace(subgraph, keep=reached & needed)


def greedy_prune(
    task: TaskLoss,
    subgraph: Subgraph,
    target: float,
    *,
    edges: bool = True,
    progress: Progress | None = None,
) -> Subgraph:
    """Removes nodes and edges until nothing can go or the time is over.

    While there are many, those go together that have the least effect by gradients. Then each is
    tried by itself, and one after another goes that raises the loss least for each edge that goes
    with it.

    Args:
        subgraph: reaches the target.
        target: calibrated loss on the prompts for fitting.
        edges: remove single edges too.
    """
    progress = progress or Progress()
    if edges and subgraph.removed is None:
        subgraph = replace(subgraph, removed=torch.zeros(len(task.edges.source), dtype=torch.bool))
    loss, before = task.calibrated_loss(subgraph), math.inf
    for done in itertools.count(1):
        size = size_of(task, subgraph)
        candidates = size.nodes + edges * size.edges
        slow = done > _ROUNDS and candidates > (1 - _LEAST_SHARE) * before
        if candidates <= _MOST_TRIED or slow or progress.left < 0:
            break
        before = candidates
        # Gradients say little about what many removals do together: they are taken again each time.
        limit = loss + (target - loss) * min(1.0, done / _ROUNDS)
        for kind in (_Nodes, _Edges) if edges else (_Nodes,):
            subgraph = _many(kind(task, subgraph), limit, progress)
        progress.advance(0.0, nodes=size.nodes, edges=size.edges)
    if candidates > _MOST_LEFT:
        return subgraph
    return _by_cost(task, subgraph, target, edges, progress)


class _Nodes:
    """The nodes of a subgraph as candidates for removal."""

    def __init__(self, task: TaskLoss, subgraph: Subgraph) -> None:
        self.task, self.subgraph = task, subgraph

    def left(self) -> Tensor:
        """Their numbers."""
        return self.subgraph.keep.nonzero().squeeze(1)

    def effects(self) -> Tensor:
        """By number: by how much the loss would rise, from gradients."""
        return node_effects(self.task, self.subgraph)

    def without(self, gone: Tensor) -> Subgraph:
        """The subgraph without these, and without the dead ends that they leave."""
        keep = self.subgraph.keep.clone()
        keep[gone] = False
        return on_paths(self.task, replace(self.subgraph, keep=keep))


class _Edges(_Nodes):
    """Its edges."""

    def left(self) -> Tensor:
        return self.task.present_edges(self.subgraph).nonzero().squeeze(1)

    def effects(self) -> Tensor:
        return edge_effects(self.task, self.subgraph)

    def without(self, gone: Tensor) -> Subgraph:
        assert self.subgraph.removed is not None
        removed = self.subgraph.removed.clone()
        removed[gone] = True
        return on_paths(self.task, replace(self.subgraph, removed=removed))


def _many(candidates: _Nodes, target: float, progress: Progress) -> Subgraph:
    """Without as many of those with the least effect as the target allows together."""
    left = candidates.left()
    # Removing what has a large effect changes the loss in ways that a gradient does not tell, also
    # where it promises a fall.
    ordered = left[candidates.effects()[left].abs().argsort(stable=True)]
    best, low, high = candidates.subgraph, 0, len(ordered) + 1
    # Bisection, though the loss need not rise: each result that counts has been measured.
    while high - low > 1 and progress.left >= 0:
        # Large steps fail more often than not.
        middle = low + max(1, (high - low) // 3)
        smaller = candidates.without(ordered[:middle])
        if _fits(candidates.task, smaller, target):
            best, low = smaller, middle
        else:
            high = middle
    return best


def _by_cost(
    task: TaskLoss, subgraph: Subgraph, target: float, edges: bool, progress: Progress
) -> Subgraph:
    """Without one node or edge after another, that of the least cost first.

    The cost is the rise of the loss on the probe over the number of edges that go. It is measured
    for all of them in the beginning, and again only for that which seems cheapest, until one that
    was measured in the present subgraph is.
    """
    probe, kinds = task.probe(), (_Nodes, _Edges) if edges else (_Nodes,)
    now, size = task.calibrated_loss(subgraph, probe), task.size(subgraph)

    def tried(kind: type[_Nodes], number: int) -> tuple[float, float, Subgraph]:
        smaller = kind(task, subgraph).without(torch.tensor([number]))
        loss = task.calibrated_loss(smaller, probe)
        return (loss - now) / max(size - task.size(smaller), _LEAST_GONE), loss, smaller

    # Cost, the subgraph that it was measured in, kind and number.
    queue: list[tuple[float, int, int, int]] = []
    for place, kind in enumerate(kinds):
        for number in kind(task, subgraph).left().tolist():
            if progress.left < 0:
                return subgraph
            cost, loss, _ = tried(kind, number)
            if loss <= _HOPELESS * target:
                queue.append((cost, 0, place, number))
    heapq.heapify(queue)
    removed = 0
    fresh: dict[tuple[int, int], tuple[Subgraph, float]] = {}
    while queue and progress.left >= 0:
        _, measured, place, number = heapq.heappop(queue)
        kind = kinds[place]
        if not bool((kind(task, subgraph).left() == number).any()):
            continue  # it went with another
        if measured < removed or (place, number) not in fresh:
            cost, loss, smaller = tried(kind, number)
            if loss <= _HOPELESS * target:
                fresh[place, number] = smaller, loss
                heapq.heappush(queue, (cost, removed, place, number))
            continue
        smaller, loss = fresh[place, number]
        if task.calibrated_loss(smaller) > target:
            continue
        subgraph, now, size = smaller, loss, task.size(smaller)
        removed, fresh = removed + 1, {}
        progress.advance(0.0, nodes=int(subgraph.keep.sum()), edges=size)
    return subgraph


def _fits(task: TaskLoss, subgraph: Subgraph, target: float) -> bool:
    """Whether it reaches the target; what is far from it on the probe is not tried on all."""
    if task.calibrated_loss(subgraph, task.probe()) > _HOPELESS * target:
        return False
    return task.calibrated_loss(subgraph) <= target
