"""From a task to its circuit: search, prune, validate, and the same search for the controls."""

from __future__ import annotations

import bisect
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_transformer.circuits.activations import fingerprint
from sparse_transformer.circuits.budget import Budget, Progress
from sparse_transformer.circuits.circuit import Control, Validation
from sparse_transformer.circuits.masks import MaskConfig, train_mask
from sparse_transformer.circuits.objective import (
    ROBUST_FACTOR,
    Calibration,
    Subgraph,
    TaskLoss,
    TaskScore,
    calibrate,
    score,
)
from sparse_transformer.circuits.prune import (
    NodeOrder,
    Size,
    greedy_prune,
    size_of,
)
from sparse_transformer.circuits.search import Candidate, search
from sparse_transformer.circuits.validate import control_tasks, validate, worst_rest
from sparse_transformer.errors import UserError

# Circuits are pruned to this share of the target on the prompts for fitting, so that the interval
# of the loss on others, with the default number of pairs about 14% either way, ends below the
# target.
_FIT_SHARE = 0.87
# Masks are trained for this share of that, and pruning starts from the nodes that reach another:
# more of them to choose from.
_MASK_SHARE, _WIDE_SHARE = 0.92, 0.8
# Target losses of the size curve, beside the one that is asked for.
CURVE = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
# Sizes at which faithfulness is measured, as shares of all edges.
_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Which shares of the time the searches, the task's and those of the controls, and the size curve
# may take; the rest is for annotate.py and the drawing. Of a search, masks take the third share.
_SEARCHES, _CURVE, _MASKS = 0.9, 0.95, 0.6
# Validation takes about as long as so many passes over its prompts; steps of a mask that are timed.
_PASSES, _TIMED = 40, 3
# Adversaries that a circuit gets nodes against, one after another.
_HARDENINGS = 4
# A mask under several ablations is trained this many times as long.
_MIXED_STEPS = 2
# The share of the time that validation may take, but for the least number of pairs of each draw.
_VALIDATION, _LEAST_PAIRS = 0.25, 16


class CurvePoint(NamedTuple):
    """Size of the circuit that one mask gives at one target loss."""

    target: float
    nodes: int
    edges: int


class Faithfulness(NamedTuple):
    """How much of what the model knows ever more nodes of a mask know.

    Attributes:
        points: share of all edges, and (ln 2 - loss) / (ln 2 - loss of the model), calibrated, on
            the prompts for fitting.
        cpr, cmd: areas under these values and under their distance from 1.
    """

    points: list[tuple[float, float]]
    cpr: float
    cmd: float


@dataclass(frozen=True)
class FoundCircuit:
    """A circuit in numbers; annotate.py makes a `Circuit` of it.

    Attributes:
        subgraph: its nodes, and the edges that were removed between them.
        calibration: fitted on the prompts for fitting.
        config: how its masks were trained.
        sizes: `cut`: the mask's threshold, with all edges between its nodes, as the paper counts;
            `nodes`: the circuit's nodes with all edges between them; `edges`: the circuit.
        validation: on held-out prompts, with the controls.
        curve: for each target of `CURVE` the size by threshold; None where it is not reached.
        faithfulness: of ever more nodes; None where there was no time for it.
        seconds: duration of each step.
    """

    subgraph: Subgraph
    calibration: Calibration
    config: MaskConfig
    sizes: dict[str, Size]
    validation: Validation
    curve: list[CurvePoint | None] = field(default_factory=list)
    faithfulness: Faithfulness | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """What a search and the pruning after it found.

    Attributes:
        subgraph: the smallest.
        candidate: what it was pruned from, or the trial that came nearest to the target.
        sizes: see `FoundCircuit`.
        loss: of the subgraph, calibrated, on the prompts for fitting.
        complete: the clock ended nothing early.
    """

    subgraph: Subgraph
    candidate: Candidate
    sizes: dict[str, Size]
    loss: float
    complete: bool


def find_circuit(
    task: TaskLoss,
    target: float,
    budget: Budget,
    *,
    journal: Path | None = None,
    edges: bool = True,
    controls: int = 5,
    corpus: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    on_validated: Callable[[FoundCircuit], None] | None = None,
) -> FoundCircuit:
    """The smallest circuit that the budget finds.

    Args:
        target: loss that the circuit must reach alone, binary cross-entropy in nats.
        journal: keeps the searches, so that they can be continued after an interruption.
        edges: prune single edges too.
        controls: number of nonsense answers for which the search is repeated; if there are any, so
            it is for swapped labels and permuted weights.
        corpus: int64 `(rows, context)`, for the means of the model with permuted weights; None
            leaves it out.
        progress: keeps the time, by default that of the budget.
        on_validated: is called with the circuit before the controls, which take most of the time.

    Raises:
        UserError: the whole model does not reach the target.
    """
    progress = progress or Progress(budget.seconds)
    need_reachable(task, target)
    # Of one pass over one pair; not of the first, which is slower.
    began = time.monotonic()
    task.logit_diffs(task.fit)
    seconds = (time.monotonic() - began) / len(task.fit)
    draws = len(task.draws.unique())
    affordable = _VALIDATION * progress.left / (_PASSES * seconds * draws)
    pairs = max(_LEAST_PAIRS, int(min(affordable, len(task.test))))
    progress.reserved = _PASSES * seconds * min(draws * pairs, len(task.test))
    tries = list(control_tasks(task, controls, corpus, seed))
    share = _SEARCHES / (1 + len(tries))
    timed = MaskConfig(steps=_TIMED, pairs=budget.pairs)
    began = time.monotonic()
    train_mask(task, timed, seed=seed)
    step = (time.monotonic() - began) / _TIMED
    if len(task.pruned_under) > 1:
        budget = replace(budget, steps=_MIXED_STEPS * budget.steps)
    budget = budget.within(_MASKS * share * (progress.left - progress.reserved), step)
    fit_target = _FIT_SHARE * target

    def find(asked: TaskLoss, name: str) -> Pruned:
        key = _key(asked, target, budget, seed, name)
        return _find(asked, fit_target, budget, key, journal, edges, seed, progress)

    with progress.step("search", share):
        found = find(task, "")
    subgraph, order = found.subgraph, found.candidate.order
    calibration = calibrate(*task.logit_diffs(task.fit, subgraph))
    with progress.step("validate", share):
        validation = validate(task, subgraph, target, pairs=pairs, seed=seed)
    progress.reserved = 0.0
    circuit = FoundCircuit(subgraph, calibration, found.candidate.config, found.sizes, validation)
    if on_validated is not None:
        on_validated(circuit)
    ran: list[Control] = []
    with progress.step("controls", _SEARCHES):
        for number, (name, asked) in enumerate(tries):
            if progress.left < 0:
                break
            with progress.part(number / len(tries), (number + 1) / len(tries)):
                ran.append(_control(name, asked, find(asked, name), fit_target))
    curve: list[CurvePoint | None] = []
    with progress.step("size curve", _CURVE):
        for loss in CURVE:
            point = order.threshold(loss, progress)
            reached = point.loss <= loss
            curve.append(CurvePoint(loss, point.nodes, point.edges) if reached else None)
        faithful = _faithfulness(task, order) if progress.left >= 0 else None
    return replace(
        circuit,
        validation=replace(validation, controls=tuple(ran)),
        curve=curve,
        faithfulness=faithful,
        seconds=dict(progress.laps),
    )


def _find(
    task: TaskLoss,
    target: float,
    budget: Budget,
    key: str,
    journal: Path | None,
    edges: bool,
    seed: int,
    progress: Progress,
) -> Pruned:
    """Searches and prunes to the target, on the prompts for fitting."""
    with progress.part(0.0, _MASKS):
        candidates, complete = search(
            task,
            _MASK_SHARE * target,
            budget,
            key=key,
            journal=journal,
            seed=seed,
            progress=progress,
        )
    if "adversarial" in task.pruned_under:
        hardened = [_hardened(task, candidate, target, progress) for candidate in candidates]
        task, best = min(
            hardened, key=lambda entry: (entry[1].nodes.loss > target, entry[1].nodes.edges)
        )
        candidates = [best]
    best = candidates[0]
    sizes = {"cut": Size(best.nodes.nodes, best.nodes.edges)}
    if best.nodes.loss > target:
        return Pruned(Subgraph(best.nodes.keep), best, sizes, best.nodes.loss, complete)
    with progress.part(_MASKS, 1.0):
        found = []
        for number, candidate in enumerate(candidates):
            if candidate.nodes.loss <= target:
                with progress.part(number / len(candidates), (number + 1) / len(candidates)):
                    wide = candidate.order.threshold(_WIDE_SHARE * target, progress)
                    enough = wide if wide.loss <= target else candidate.nodes
                    few = _pruned(task, Subgraph(enough.keep), target, edges, progress)
                found.append((few, candidate))
        subgraph, best = min(found, key=lambda entry: task.size(entry[0]))
        sizes["nodes"] = size_of(task, Subgraph(subgraph.keep))
        if edges:
            sizes["edges"] = size_of(task, subgraph)
        complete = complete and progress.left >= 0
    return Pruned(subgraph, best, sizes, task.calibrated_loss(subgraph), complete)


def _hardened(
    task: TaskLoss, candidate: Candidate, target: float, progress: Progress
) -> tuple[TaskLoss, Candidate]:
    """The candidate with as many nodes of its order as it needs against the adversaries found.

    Returns the task with these adversaries, too.
    """
    for _ in range(_HARDENINGS):
        adversary = _adversary(task, Subgraph(candidate.nodes.keep), target)
        if adversary is None or progress.left < 0:
            break
        task = task.against(adversary)
        order = NodeOrder(task, candidate.order.order, candidate.order.chosen)
        candidate = replace(candidate, nodes=order.threshold(target, progress), order=order)
    return task, candidate


def _pruned(
    task: TaskLoss, start: Subgraph, target: float, edges: bool, progress: Progress
) -> Subgraph:
    """`start`, pruned; once more against each adversary that the result does not stand."""
    for _ in range(_HARDENINGS):
        few = greedy_prune(task, start, target, edges=edges, progress=progress)
        adversary = _adversary(task, few, target)
        if adversary is None:
            return few
        task = task.against(adversary)
        if task.calibrated_loss(start) > target or progress.left < 0:
            break
    return start


def _adversary(task: TaskLoss, subgraph: Subgraph, target: float) -> Tensor | None:
    """bool `(total,)`: a part of the rest that takes the loss above its limit; None: none found."""
    if "adversarial" not in task.pruned_under:
        return None
    worst = worst_rest(task, subgraph)
    if task.under("mean").calibrated_loss(worst) <= ROBUST_FACTOR * target:
        return None
    return worst.keep & ~subgraph.keep


def _faithfulness(task: TaskLoss, order: NodeOrder) -> Faithfulness:
    total, guess = len(task.edges.source), math.log(2)
    known = guess - order.loss(len(order.order))
    points = [(0.0, 0.0)]
    for share in _SHARES:
        # The most nodes that have no more edges than this.
        count = bisect.bisect(
            range(len(order.order)),
            share * total,
            key=lambda nodes: task.edges.count(order.keep(nodes + 1)),
        )
        edges = task.edges.count(order.keep(count))
        points.append((edges / total, (guess - order.loss(count)) / known))
    shares, values = torch.tensor(points).unbind(1)
    cpr, cmd = (torch.trapezoid(heights, shares) for heights in (values, (1 - values).abs()))
    return Faithfulness(points, float(cpr), float(cmd))


def _control(name: str, asked: TaskLoss, found: Pruned, target: float) -> Control:
    diffs = asked.logit_diffs(asked.fit)
    nodes, edges = list(found.sizes.values())[-1]
    return Control(
        name=name,
        model_loss=score(*diffs, calibrate(*diffs)).loss,
        loss=found.loss,
        nodes=nodes,
        edges=edges,
        reached=found.loss <= target,
        complete=found.complete,
    )


def need_reachable(task: TaskLoss, target: float) -> TaskScore:
    """The whole model's calibrated score on the prompts for fitting.

    A UserError if it is above `target`: no part of the model can be asked for less.
    """
    diffs, positive = task.logit_diffs(task.fit)
    found = score(diffs, positive, calibrate(diffs, positive))
    if found.loss > _FIT_SHARE * target:
        # A target above what guessing has would ask for nothing.
        more = max(found.loss / _FIT_SHARE, target) * 1.5
        easier = f"ask for --target {more:.2g} or more, or " if more < math.log(2) else ""
        raise UserError(
            f"the whole model has a loss of {found.loss:.3f} on {task.task.name}, so that no "
            f"circuit can have {target} to spare: {easier}train it longer"
        )
    return found


def _key(task: TaskLoss, target: float, budget: Budget, seed: int, name: str) -> str:
    """Of everything that a trial depends on."""
    asked = (task.task.name, name, target, budget.steps, budget.pairs, seed, task.pruned_under)
    digest = hashlib.sha256(repr(asked).encode())
    digest.update(fingerprint(task.model).encode())
    digest.update(repr([pair.positive.text for pair in task.train + task.fit]).encode())
    return f"{task.task.name}-{digest.hexdigest()[:16]}"
