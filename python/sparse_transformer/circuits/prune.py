"""Cutting a model to the nodes and edges that a task needs.

`cut` and `cut_edges` keep as few of the highest ones of a trained mask as the target loss allows,
as published. `refine` goes further than the paper: it removes single nodes and single edges
while the loss stays below the target.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_transformer.circuits.gradients import EdgeGradients
from sparse_transformer.circuits.nodes import masked
from sparse_transformer.circuits.problem import Part, Problem, margin

# Above so many candidates their effects are estimated from gradients, not measured one by one.
_MOST_MEASURED = 64


@dataclass(frozen=True)
class Cut:
    """The first nodes of an order that are enough.

    Attributes:
        keep: bool `(total,)`.
        nodes, edges: how many.
        loss: calibrated, on the prompts for fitting; above the target if nothing was enough.
    """

    keep: Tensor
    nodes: int
    edges: int
    loss: float


def cut(problem: Problem, mask: Tensor, target: float) -> Cut:
    """Bisects the number of nodes, those of the highest mask first, to the target loss.

    The loss is taken to fall with the number of nodes; where it does not, what is found is enough
    all the same, though not always the least.
    """
    order = mask.argsort(descending=True, stable=True)
    total = len(mask)

    def of(count: int) -> Tensor:
        keep = torch.zeros(total, dtype=torch.bool)
        keep[order[:count]] = True
        return keep

    def loss(count: int) -> float:
        return problem.calibrated_loss(Part(of(count)))

    # From the number that training chose upwards, as all of them may be far too many to need.
    high = max(1, int((mask > 0).sum()))
    value = loss(high)
    low = 0
    while value > target and high < total:
        low, high = high, min(total, 2 * high)
        value = loss(high)
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        found = loss(middle)
        if found <= target:
            high, value = middle, found
        else:
            low = middle
    keep = of(high)
    return Cut(keep, high, problem.edges.count(keep), value)


def cut_edges(problem: Problem, keep: Tensor, mask: Tensor, target: float) -> Part | None:
    """Bisects the number of edges, those of the highest mask first; None if all are too few."""
    between = problem.edges.between(keep)
    order = mask.argsort(descending=True, stable=True)[: int(between.sum())]

    def of(count: int) -> Part:
        removed = between.clone()
        removed[order[:count]] = False
        return Part(keep, removed)

    low, high = 0, len(order)
    if problem.calibrated_loss(of(high)) > target:
        return None
    chosen = int((mask > 0).sum())
    if problem.calibrated_loss(of(chosen)) <= target:
        high = chosen
    else:
        low = chosen
    while high - low > 1:
        middle = (low + high) // 2
        if problem.calibrated_loss(of(middle)) <= target:
            high = middle
        else:
            low = middle
    return without_loose_ends(problem, of(high))


def without_loose_ends(problem: Problem, part: Part) -> Part:
    """The same edges, without the nodes that have none."""
    present = alive(problem, part)
    keep = torch.zeros_like(part.keep)
    keep[problem.edges.source[present]] = True
    keep[problem.edges.target[present]] = True
    return Part(keep, ~present & problem.edges.between(keep))


def refine(
    problem: Problem,
    part: Part,
    target: float,
    *,
    edges: bool = True,
    seconds: float = math.inf,
    progress: bool | None = None,
) -> Part:
    """Takes away nodes, then edges, then both again, until nothing can go.

    In each round what is left is ordered by what its absence would cost, measured one by one if
    there are few, estimated from gradients if there are many; the largest number of the cheapest
    that can go together is found by bisection.

    Args:
        part: what reaches the target.
        target: loss on the prompts for fitting, calibrated.
        edges: take single edges away too.
        seconds: no round begins after that.

    Returns:
        Nodes that each have an edge, where `edges`, and the edges that are gone.
    """
    if part.removed is None:
        part = replace(part, removed=torch.zeros(len(problem.edges.source), dtype=torch.bool))
    disable = None if progress is None else not progress
    with tqdm(desc="refine", unit=" rounds", disable=disable, leave=False) as bar:
        end = time.monotonic() + seconds
        changed = True
        while changed:
            changed = False
            for shrink in (_fewer_nodes, _fewer_edges) if edges else (_fewer_nodes,):
                if time.monotonic() > end:
                    return part
                smaller = shrink(problem, part, target)
                bar.update()
                bar.set_postfix(nodes=int(part.keep.sum()), edges=size(problem, part))
                if smaller is not None:
                    part, changed = smaller, True
    return part


def alive(problem: Problem, part: Part) -> Tensor:
    """bool `(E,)`: the edges of a part."""
    between = problem.edges.between(part.keep)
    return between if part.removed is None else between & ~part.removed


def size(problem: Problem, part: Part) -> int:
    """How many edges a part has."""
    return int(alive(problem, part).sum())


def _fewer_nodes(problem: Problem, part: Part, target: float) -> Part | None:
    kept = part.keep.nonzero().squeeze(1)

    def without(nodes: Tensor) -> Part:
        keep = part.keep.clone()
        keep[nodes] = False
        return replace(part, keep=keep)

    def estimate() -> Tensor:
        return node_effects(problem, part)[kept]

    return _fewer(problem, kept, without, estimate, target)


def _fewer_edges(problem: Problem, part: Part, target: float) -> Part | None:
    present = alive(problem, part).nonzero().squeeze(1)

    def without(gone: Tensor) -> Part:
        assert part.removed is not None
        removed = part.removed.clone()
        removed[gone] = True
        return replace(part, removed=removed)

    def estimate() -> Tensor:
        return edge_effects(problem, part)[present]

    return _fewer(problem, present, without, estimate, target)


def _fewer(
    problem: Problem,
    candidates: Tensor,
    without: Callable[[Tensor], Part],
    estimate: Callable[[], Tensor],
    target: float,
) -> Part | None:
    """The part without as many candidates as the target allows; None if none can go."""
    if len(candidates) == 0:
        return None
    if len(candidates) <= _MOST_MEASURED:
        # The order may come from fewer prompts; what goes is decided on all.
        probe = problem.probe()
        costs = torch.tensor(
            [problem.calibrated_loss(without(one), probe) for one in candidates.unsqueeze(1)]
        )
    else:
        costs = estimate()
    ordered = candidates[costs.argsort(stable=True)]
    best, low, high = None, 0, len(candidates) + 1
    # Bisection, though the loss need not rise: each result that counts has been measured.
    while high - low > 1:
        # Large steps fail more often than not.
        middle = low + max(1, (high - low) // 3)
        smaller = without(ordered[:middle])
        if problem.calibrated_loss(smaller) <= target:
            best, low = smaller, middle
        else:
            high = middle
    return best


def node_effects(problem: Problem, part: Part) -> Tensor:
    """First-order estimate of what the loss rises by if a node is frozen, `(total,)`."""
    mask = torch.where(part.keep, 1.0, -1.0).unsqueeze(0).requires_grad_(True)
    # At 1 the derivative of the sigmoid is a positive constant, which the order does not see.
    _backward(problem, part, mask)
    assert mask.grad is not None
    slope = 1 / (2 + 2 * math.cosh(1.0))
    return -mask.grad.squeeze(0) / slope


def edge_effects(problem: Problem, part: Part) -> Tensor:
    """First-order estimate of what the loss rises by if an edge is removed, `(E,)`."""
    mask = torch.where(part.keep, 1.0, -1.0).unsqueeze(0)
    with EdgeGradients(problem) as gradients:
        _backward(problem, part, mask)
        return -gradients.take()


def _backward(problem: Problem, part: Part, mask: Tensor) -> None:
    """Gradients of the calibrated loss on the prompts for fitting."""
    for batch, calibration in problem.fit_batches(part):
        count = 2 * len(problem.fit)
        removed = part.removed
        with problem.removing(removed), masked(problem.model, mask, problem.means, 1.0):
            margins = margin(problem.model, batch)
            calibrated = calibration.apply(margins, batch.positive)
            (torch.nn.functional.softplus(-calibrated).sum() / count).backward()
