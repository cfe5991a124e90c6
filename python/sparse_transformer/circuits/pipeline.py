"""From a task to its circuit in five steps: search, prune nodes, prune edges, validate, control."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from sparse_transformer.circuits.activations import fingerprint
from sparse_transformer.circuits.budget import Budget, Progress
from sparse_transformer.circuits.circuit import Validation
from sparse_transformer.circuits.masks import EdgeMasks, MaskConfig, NodeMasks, train_masks
from sparse_transformer.circuits.objective import (
    Calibration,
    Subgraph,
    TaskLoss,
    TaskScore,
    calibrate,
    score,
)
from sparse_transformer.circuits.prune import greedy_prune, threshold_edges, threshold_nodes
from sparse_transformer.circuits.search import Candidate, search
from sparse_transformer.circuits.validate import CONTROL_FACTOR, control, validate
from sparse_transformer.errors import UserError

# Circuits are pruned to this share of the target on the prompts for fitting, so that the target
# holds on others too.
_FIT_SHARE = 0.9
# Edges are chosen among those of a circuit with this share of the target; their training aims at
# the second share, as it is measured on the prompts for training.
_WIDE_SHARE, _EDGE_AIM = 0.45, 0.8
_EDGE_RATES = (3e-2, 1e-1)
# Target losses of the size curve, beside the one that is asked for.
CURVE = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
# Which share of the time has passed at the end of each step; the rest is for annotate.py and the
# drawing.
_SEARCH, _NODES, _EDGES, _CONTROL, _CURVE = 0.35, 0.45, 0.65, 0.9, 0.95
# Validation takes about as long as so many passes over its prompts, a training step as long as so
# many over those of its batch.
_PASSES, _STEP_PASSES = 20, 3
# The share of the time that validation may take, but for the least number of pairs.
_VALIDATION, _LEAST_PAIRS = 0.25, 32


class Size(NamedTuple):
    """Of a circuit."""

    nodes: int
    edges: int


class CurvePoint(NamedTuple):
    """Size of the circuit that one mask gives at one target loss."""

    target: float
    nodes: int
    edges: int


@dataclass(frozen=True)
class FoundCircuit:
    """A circuit in numbers; annotate.py makes a `Circuit` of it.

    Attributes:
        subgraph: its nodes, and the edges that were removed between them.
        calibration: fitted on the prompts for fitting.
        config: how its masks were trained.
        sizes: `cut`: the mask's threshold, with all edges between its nodes, as the paper counts;
            `nodes`: after pruning nodes, all edges between them; `edges`: after pruning edges.
        validation: on held-out prompts, with the control.
        curve: for each target of `CURVE` the size by threshold; None where it is not reached.
        seconds: duration of each step.
    """

    subgraph: Subgraph
    calibration: Calibration
    config: MaskConfig
    sizes: dict[str, Size]
    validation: Validation
    curve: list[CurvePoint | None] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def find_circuit(
    task: TaskLoss,
    target: float,
    budget: Budget,
    *,
    journal: Path | None = None,
    edges: bool = True,
    with_control: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> FoundCircuit:
    """The smallest circuit that the budget finds.

    Args:
        target: loss that the circuit must reach alone, binary cross-entropy in nats.
        journal: keeps the search, so that it can be continued after an interruption.
        edges: prune single edges too.
        with_control: repeat the search with random labels.
        progress: keeps the time, by default that of the budget.

    Raises:
        UserError: the whole model does not reach the target.
    """
    progress = progress or Progress(budget.seconds)
    need_reachable(task, target)
    # Of one pass over one pair; not of the first, which is slower.
    began = time.monotonic()
    task.logit_diffs(task.fit)
    seconds = (time.monotonic() - began) / len(task.fit)
    affordable = _VALIDATION * progress.left / (_PASSES * seconds)
    pairs = max(_LEAST_PAIRS, int(min(affordable, len(task.test))))
    progress.reserved = _PASSES * seconds * pairs
    training = _STEP_PASSES * budget.steps * budget.pairs * seconds  # of one mask
    fit_target = _FIT_SHARE * target
    with progress.step("search", _SEARCH):
        key = _key(task, target, budget, seed)
        # Few trials with many steps are better than many with few.
        trials = max(1, int(min(progress.left / training, budget.trials)))
        budget = replace(budget, trials=trials)
        candidates = search(
            task, fit_target, budget, key=key, journal=journal, seed=seed, progress=progress
        )
    smallest = candidates[0].nodes
    with progress.step("prune nodes", _NODES):
        subgraph, config = prune_nodes(task, candidates, fit_target, progress)
    by_nodes = size_of(task, subgraph)
    sizes = {"cut": Size(smallest.nodes, smallest.edges), "nodes": by_nodes}
    if edges:
        with progress.step("prune edges", _EDGES):
            subgraph = prune_edges(task, subgraph, fit_target, budget, seed, progress)
        sizes["edges"] = size_of(task, subgraph)
    calibration = calibrate(*task.logit_diffs(task.fit, subgraph))
    with progress.step("validate", _EDGES):
        validation = validate(task, subgraph, calibration, target, pairs=pairs, seed=seed)
    progress.reserved = 0.0
    if with_control:
        with progress.step("control", _CONTROL):
            limit = CONTROL_FACTOR * by_nodes.edges
            tried = control(
                task, limit, config, target, seconds=training, seed=seed, progress=progress
            )
            validation = replace(validation, control=tried)
    with progress.step("size curve", _CURVE):
        curve = _curve(task, candidates[0].config, seed, progress)
    return FoundCircuit(
        subgraph, calibration, config, sizes, validation, curve, dict(progress.laps)
    )


def prune_nodes(
    task: TaskLoss, candidates: Sequence[Candidate], target: float, progress: Progress
) -> tuple[Subgraph, MaskConfig]:
    """Removes single nodes of each candidate; the smallest result, and how its mask was trained."""
    found = []
    for number, candidate in enumerate(candidates):
        with progress.part(number / len(candidates), (number + 1) / len(candidates)):
            whole = Subgraph(candidate.nodes.keep)
            pruned = greedy_prune(task, whole, target, edges=False, progress=progress)
            found.append((pruned, candidate.config))
    return min(found, key=lambda entry: task.size(entry[0]))


def prune_edges(
    task: TaskLoss,
    subgraph: Subgraph,
    target: float,
    budget: Budget,
    seed: int,
    progress: Progress,
) -> Subgraph:
    """Removes single edges of `subgraph` and of what masks on edges leave; the smallest result."""
    with progress.part(0.0, 0.6):
        starts = [subgraph, *_by_edge_masks(task, target, budget, seed, progress)]
    found = []
    for number, start in enumerate(starts):
        with progress.part(
            0.6 + 0.4 * number / len(starts), 0.6 + 0.4 * (number + 1) / len(starts)
        ):
            found.append(greedy_prune(task, start, target, progress=progress))
    return min(found, key=task.size)


def _by_edge_masks(
    task: TaskLoss, target: float, budget: Budget, seed: int, progress: Progress
) -> Iterator[Subgraph]:
    """Subgraphs that reach the target, by masks on the edges between more nodes than are needed."""
    wide = MaskConfig(steps=budget.steps, pairs=budget.pairs, price=3e-4, learning_rate=3e-2)
    parts = 1 + len(_EDGE_RATES)
    with progress.part(0.0, 1 / parts):
        (mask,), _ = train_masks(NodeMasks(task), [wide], seed=seed, progress=progress)
    keep = threshold_nodes(task, mask, _WIDE_SHARE * target, progress).keep
    for number, rate in enumerate(_EDGE_RATES, 1):
        config = replace(wide, price=1e-3, learning_rate=rate, aim=_EDGE_AIM * target)
        with progress.part(number / parts, (number + 1) / parts):
            (mask,), _ = train_masks(EdgeMasks(task, keep), [config], seed=seed, progress=progress)
            found = threshold_edges(task, keep, mask, target, progress)
        if found is not None:
            yield found


def size_of(task: TaskLoss, subgraph: Subgraph) -> Size:
    """How many nodes and edges it has."""
    return Size(int(subgraph.keep.sum()), task.size(subgraph))


def need_reachable(task: TaskLoss, target: float) -> TaskScore:
    """The whole model's calibrated score on the prompts for fitting.

    Raises:
        UserError: it is above `target`: no part of the model can be asked for less.
    """
    diffs, positive = task.logit_diffs(task.fit)
    found = score(diffs, positive, calibrate(diffs, positive))
    if found.loss > _FIT_SHARE * target:
        raise UserError(
            f"the whole model has a loss of {found.loss:.3f} on {task.task.name}, so that no "
            f"circuit can have {target} to spare: ask for --target "
            f"{max(found.loss / _FIT_SHARE, target) * 1.5:.2g} or more, or train it longer"
        )
    return found


def _curve(
    task: TaskLoss, config: MaskConfig, seed: int, progress: Progress
) -> list[CurvePoint | None]:
    """Sizes at other targets, all from one mask."""
    with progress.part(0.0, 0.7):
        (mask,), _ = train_masks(NodeMasks(task), [config], seed=seed, progress=progress)
    points: list[CurvePoint | None] = []
    for target in CURVE:
        found = threshold_nodes(task, mask, target, progress)
        reached = found.loss <= target
        points.append(CurvePoint(target, found.nodes, found.edges) if reached else None)
    return points


def _key(task: TaskLoss, target: float, budget: Budget, seed: int) -> str:
    """Of everything that a trial depends on."""
    digest = hashlib.sha256(
        repr((task.task.name, target, budget.steps, budget.pairs, seed)).encode()
    )
    digest.update(fingerprint(task.model).encode())
    digest.update(repr([pair.positive.text for pair in task.train + task.fit]).encode())
    return f"{task.task.name}-{digest.hexdigest()[:16]}"
