"""From a trained mask to the subgraph that a task needs.

`threshold_nodes` and `threshold_edges` keep as few of the highest values of a mask as the target
loss allows, as published. `greedy_prune` goes further than the paper: it removes single nodes and
single edges while the loss stays below the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.edge_attribution import edge_effects, node_effects
from sparse_transformer.circuits.objective import Subgraph, TaskLoss

# Above so many candidates their effects are estimated from gradients, not measured one by one.
_MOST_MEASURED = 64


@dataclass(frozen=True)
class Thresholded:
    """The nodes with the highest mask that are enough.

    Attributes:
        keep: bool `(total,)`.
        nodes, edges: how many.
        loss: calibrated, on the prompts for fitting; above the target if nothing was enough.
    """

    keep: Tensor
    nodes: int
    edges: int
    loss: float


def threshold_nodes(
    task: TaskLoss, mask: Tensor, target: float, progress: Progress | None = None
) -> Thresholded:
    """Bisects the number of nodes, those with the highest mask first, to the target loss.

    Bisection assumes that the loss falls with the number of nodes; where it does not, the result
    still reaches the target, but a smaller one may exist.
    """
    order = mask.argsort(descending=True, stable=True)
    total = len(mask)
    losses: dict[int, float] = {}

    def keep(count: int) -> Tensor:
        nodes = torch.zeros(total, dtype=torch.bool)
        nodes[order[:count]] = True
        return nodes

    def enough(count: int) -> bool:
        losses[count] = task.calibrated_loss(Subgraph(keep(count)))
        return losses[count] <= target

    # From the number that training chose upwards, as all of them may be far too many to need.
    low, high = 0, max(1, int((mask > 0).sum()))
    while not enough(high) and high < total:
        low, high = high, min(total, 2 * high)
    high = _bisect(enough, low, high, coarse=100, progress=progress)
    return Thresholded(keep(high), high, task.edges.count(keep(high)), losses[high])


def threshold_edges(
    task: TaskLoss,
    keep: Tensor,
    mask: Tensor,
    target: float,
    progress: Progress | None = None,
) -> Subgraph | None:
    """Bisects the number of edges between the nodes of `keep`, those with the highest mask first.

    Args:
        mask: of these edges, in their order.

    Returns:
        The subgraph without nodes that have no edge; None if all edges are too few.
    """
    between = task.edges.between(keep)
    order = between.nonzero().squeeze(1)[mask.argsort(descending=True, stable=True)]

    def of(count: int) -> Subgraph:
        removed = between.clone()
        removed[order[:count]] = False
        return Subgraph(keep, removed)

    def enough(count: int) -> bool:
        return task.calibrated_loss(of(count)) <= target

    low, high = 0, len(order)
    if not enough(high):
        return None
    chosen = int((mask > 0).sum())
    if enough(chosen):
        high = chosen
    else:
        low = chosen
    return drop_isolated_nodes(task, of(_bisect(enough, low, high, progress=progress)))


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


def drop_isolated_nodes(task: TaskLoss, subgraph: Subgraph) -> Subgraph:
    """The same edges, without the nodes that have none."""
    present = task.present_edges(subgraph)
    keep = torch.zeros_like(subgraph.keep)
    keep[task.edges.source[present]] = True
    keep[task.edges.target[present]] = True
    return Subgraph(keep, ~present & task.edges.between(keep))


def greedy_prune(
    task: TaskLoss,
    subgraph: Subgraph,
    target: float,
    *,
    edges: bool = True,
    progress: Progress | None = None,
) -> Subgraph:
    """Removes nodes, then edges, then both again, until nothing can go or the time is over.

    In each round the rest is ordered by what its absence would cost: measured one by one if there
    are few, estimated from gradients if there are many. Bisection finds the largest number of the
    cheapest that can go together.

    Args:
        subgraph: reaches the target.
        target: calibrated loss on the prompts for fitting.
        edges: remove single edges too.
    """
    progress = progress or Progress()
    if subgraph.removed is None:
        subgraph = replace(subgraph, removed=torch.zeros(len(task.edges.source), dtype=torch.bool))
    changed = True
    while changed:
        changed = False
        for shrink in (_fewer_nodes, _fewer_edges) if edges else (_fewer_nodes,):
            if progress.left < 0:
                return subgraph
            smaller = shrink(task, subgraph, target, progress)
            if smaller is not None:
                subgraph, changed = smaller, True
            progress.advance(0.0, nodes=int(subgraph.keep.sum()), edges=task.size(subgraph))
    return subgraph


def _fewer_nodes(
    task: TaskLoss, subgraph: Subgraph, target: float, progress: Progress
) -> Subgraph | None:
    kept = subgraph.keep.nonzero().squeeze(1)

    def without(nodes: Tensor) -> Subgraph:
        keep = subgraph.keep.clone()
        keep[nodes] = False
        return replace(subgraph, keep=keep)

    return _fewer(task, kept, without, lambda: node_effects(task, subgraph)[kept], target, progress)


def _fewer_edges(
    task: TaskLoss, subgraph: Subgraph, target: float, progress: Progress
) -> Subgraph | None:
    present = task.present_edges(subgraph).nonzero().squeeze(1)

    def without(gone: Tensor) -> Subgraph:
        assert subgraph.removed is not None
        removed = subgraph.removed.clone()
        removed[gone] = True
        return replace(subgraph, removed=removed)

    def estimate() -> Tensor:
        return edge_effects(task, subgraph)[present]

    return _fewer(task, present, without, estimate, target, progress)


def _fewer(
    task: TaskLoss,
    candidates: Tensor,
    without: Callable[[Tensor], Subgraph],
    estimate: Callable[[], Tensor],
    target: float,
    progress: Progress,
) -> Subgraph | None:
    """The subgraph without as many candidates as the target allows; None if none can go."""
    if len(candidates) == 0:
        return None
    if len(candidates) <= _MOST_MEASURED:
        # The order may come from fewer prompts; what goes is decided on all.
        probe = task.probe()
        measured = []
        for one in candidates.unsqueeze(1):
            if progress.left < 0:
                return None
            measured.append(task.calibrated_loss(without(one), probe))
        costs = torch.tensor(measured)
    else:
        costs = estimate()
    ordered = candidates[costs.argsort(stable=True)]
    best, low, high = None, 0, len(candidates) + 1
    # Bisection, though the loss need not rise: each result that counts has been measured.
    while high - low > 1 and progress.left >= 0:
        # Large steps fail more often than not.
        middle = low + max(1, (high - low) // 3)
        smaller = without(ordered[:middle])
        if task.calibrated_loss(smaller) <= target:
            best, low = smaller, middle
        else:
            high = middle
    return best
