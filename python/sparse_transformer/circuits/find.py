"""From a problem to its circuit: search, cut, refine, prove."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparse_transformer.circuits.masks import PruneConfig, train_edges, train_masks
from sparse_transformer.circuits.means import fingerprint
from sparse_transformer.circuits.problem import Calibration, Part, Problem, Score, calibrate, score
from sparse_transformer.circuits.proof import CONTROL_FACTOR, control, prove
from sparse_transformer.circuits.prune import cut, cut_edges, refine, size
from sparse_transformer.circuits.search import Budget, Candidate, search
from sparse_transformer.errors import UserError

# Parts are cut to this share of the target on the prompts for fitting, so that the target holds on
# others too.
_FIT_SHARE = 0.9
# Edges are chosen among those of a circuit that is cut to this share of the target; their training
# aims at the second share, as what is trained on gets better than what it is cut on.
_WIDE_SHARE, _EDGE_AIM = 0.45, 0.8
_EDGE_RATES = (3e-2, 1e-1)
# Loss targets of the curve of sizes, beside the one that is asked for.
CURVE = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Found:
    """A circuit, as numbers.

    Attributes:
        part: its nodes, and the edges that are gone.
        calibration: fitted on the prompts for fitting.
        config: how its masks were trained.
        sizes: `cut` (nodes by bisection, all edges between them, as the paper counts), `nodes`
            (single nodes taken away too, all edges between them), `edges` (single edges too); of
            each [nodes, edges].
        proof: see proof.py, with the control.
        curve: for each target of `CURVE`, [target, nodes, edges] by bisection, or null where the
            model does not reach it.
        seconds: how long it took, by stage.
    """

    part: Part
    calibration: Calibration
    config: PruneConfig
    sizes: dict[str, list[int]]
    proof: dict[str, Any]
    curve: list[list[float] | None] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def find(
    problem: Problem,
    target: float,
    budget: Budget,
    *,
    journal: Path | None = None,
    edges: bool = True,
    with_control: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> Found:
    """The smallest circuit that the budget finds.

    Args:
        target: two-way loss, in nats, that the circuit must reach on its own.
        journal: where the search is kept, to go on after an interruption.
        edges: take single edges away too.
        with_control: ask for the nonsensical task as well.

    Raises:
        UserError: the whole model does not reach the target.
    """
    need_reachable(problem, target)
    clock = _Clock()
    fit_target = _FIT_SHARE * target
    candidates = search(
        problem,
        fit_target,
        budget,
        key=_key(problem, target, budget, seed),
        journal=journal,
        seed=seed,
        progress=progress,
    )
    clock.lap("search")
    by_nodes = [
        (
            refine(
                problem,
                Part(candidate.cut.keep),
                fit_target,
                edges=False,
                seconds=budget.refine_seconds,
                progress=progress,
            ),
            candidate,
        )
        for candidate in candidates
    ]
    part, winner = min(by_nodes, key=lambda entry: size(problem, entry[0]))
    sizes = {
        "cut": [candidates[0].cut.nodes, candidates[0].cut.edges],
        "nodes": [int(part.keep.sum()), size(problem, part)],
    }
    if edges:
        part = min(
            (
                refine(
                    problem,
                    found,
                    fit_target,
                    seconds=budget.refine_seconds,
                    progress=progress,
                )
                for found in (part, *_by_edges(problem, fit_target, budget, seed, progress))
            ),
            key=lambda found: size(problem, found),
        )
        sizes["edges"] = [int(part.keep.sum()), size(problem, part)]
    clock.lap("refine")
    calibration = calibrate(*problem.margins(problem.fit, part))
    proof = prove(problem, part, calibration, target, seed=seed)
    clock.lap("proof")
    if with_control:
        limit = CONTROL_FACTOR * sizes["nodes"][1]
        tried = control(problem, limit, winner.config, target, seed=seed, progress=progress)
        proof["control"] = dict(vars(tried))
        clock.lap("control")
    curve = _curve(problem, candidates[0], seed)
    clock.lap("curve")
    return Found(part, calibration, winner.config, sizes, proof, curve, clock.laps)


def _by_edges(
    problem: Problem, target: float, budget: Budget, seed: int, progress: bool | None
) -> Iterator[Part]:
    """Parts that reach the target, by masks on the edges between more nodes than are needed."""
    wide = PruneConfig(steps=budget.steps, pairs=budget.pairs, price=3e-4, learning_rate=3e-2)
    (mask,) = train_masks(problem, [wide], seed=seed, progress=progress)
    nodes = cut(problem, mask, _WIDE_SHARE * target)
    for rate in _EDGE_RATES:
        config = replace(wide, price=1e-3, learning_rate=rate, aim=_EDGE_AIM * target)
        trained = train_edges(problem, nodes.keep, config, seed=seed, progress=progress)
        found = cut_edges(problem, nodes.keep, trained, target)
        if found is not None:
            yield found


def need_reachable(problem: Problem, target: float) -> Score:
    """The whole model's calibrated score on the prompts for fitting.

    Raises:
        UserError: it is above `target`: no part of the model can be asked for less.
    """
    margins, positive = problem.margins(problem.fit)
    found = score(margins, positive, calibrate(margins, positive))
    if found.loss > _FIT_SHARE * target:
        raise UserError(
            f"the whole model has a loss of {found.loss:.3f} on {problem.task.name}, so that no "
            f"circuit can have {target} to spare: ask for --target "
            f"{max(found.loss / _FIT_SHARE, target) * 1.5:.2g} or more, or train it longer"
        )
    return found


def _curve(problem: Problem, candidate: Candidate, seed: int) -> list[list[float] | None]:
    """Sizes at other targets, cut from one mask."""
    (mask,) = train_masks(problem, [candidate.config], seed=seed, progress=False)
    points: list[list[float] | None] = []
    for target in CURVE:
        found = cut(problem, mask, target)
        points.append([target, found.nodes, found.edges] if found.loss <= target else None)
    return points


def _key(problem: Problem, target: float, budget: Budget, seed: int) -> str:
    """Of everything that a trial depends on."""
    digest = hashlib.sha256(
        repr((problem.task.name, target, budget.steps, budget.pairs, seed)).encode()
    )
    digest.update(fingerprint(problem.model).encode())
    digest.update(repr([pair.positive.text for pair in problem.train + problem.fit]).encode())
    return f"{problem.task.name}-{digest.hexdigest()[:16]}"


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 1), now
