"""What speaks for a circuit, measured on prompts that nothing was fitted to.

Sufficient: the circuit alone, everything else ablated, performs the task. Necessary: without it,
and with everything else, the task is lost. Three ablations: what is ablated has its mean over the
corpus, or zero, or its activation in another prompt. The control asks the same procedure for a task
with random labels: a procedure that finds a circuit for such a task as well would find circuits for
anything, as a replication has objected.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sparse_transformer.circuits.masks import PruneConfig, train_masks
from sparse_transformer.circuits.nodes import Base
from sparse_transformer.circuits.problem import Calibration, Part, Problem, calibrate, score

# Without the circuit the loss must be at least this; ln 2 = 0.69 is what guessing has.
NECESSARY_LOSS = 0.6
# The control may not reach the target with up to this many times the circuit's edges.
CONTROL_FACTOR = 10
# Node prices for the control, by which the best one's is multiplied.
_PRICES = (0.1, 1.0, 10.0)


def prove(
    problem: Problem, part: Part, calibration: Calibration, target: float, *, seed: int = 0
) -> dict[str, Any]:
    """Losses and accuracies on the test prompts, as `Circuit.proof` holds them.

    Returns:
        `pairs`, `model_loss`, `model_accuracy`; `circuit` and `without`, the circuit alone and the
        rest alone, each by ablation (`mean`, `zero`, `resample`) with `loss` and `accuracy`;
        `sufficient` and `necessary`, judged at the mean. Without the circuit there is also a
        `recalibrated_loss`, with the best scale and shift for the very prompts that it is measured
        on: what is still known of the answer.
    """
    complement = Part(~part.keep)
    whole = problem.score(problem.test)
    circuit, without = {}, {}
    for name in ("mean", "zero", "resample"):
        base: Base | None = None
        resample = None
        if name == "zero":
            base = {place: torch.zeros_like(mean) for place, mean in problem.means.items()}
        elif name == "resample":
            resample = _others(2 * len(problem.test), seed)
        margins, positive = problem.margins(problem.test, part, base, resample)
        alone = score(margins, positive, calibration)
        circuit[name] = asdict(alone)
        margins, positive = problem.margins(problem.test, complement, base, resample)
        lost = score(margins, positive)
        known = score(margins, positive, calibrate(margins, positive))
        without[name] = {**asdict(lost), "recalibrated_loss": known.loss}
    return {
        "pairs": len(problem.test),
        "model_loss": whole.loss,
        "model_accuracy": whole.accuracy,
        "circuit": circuit,
        "without": without,
        "sufficient": circuit["mean"]["loss"] <= target,
        "necessary": without["mean"]["loss"] >= NECESSARY_LOSS,
    }


@dataclass(frozen=True)
class Control:
    """What the procedure makes of labels that nothing decides.

    Attributes:
        loss: the least, calibrated, of all cuts with at most `limit` edges, on prompts that the
            masks were trained on, which favours the control.
        nodes, edges: of that cut.
        limit: the most edges that it was given.
        reached: the target.
        passed: not reached, as it should be.
    """

    loss: float
    nodes: int
    edges: int
    limit: int
    reached: bool
    passed: bool


def control(
    problem: Problem,
    limit: int,
    config: PruneConfig,
    target: float,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Control:
    """Trains masks on random labels as `config` says, at three prices, and cuts them every way.

    Args:
        limit: edges that a cut may have; `CONTROL_FACTOR` times those of the task's own circuit,
            both counted as all edges between the nodes.
    """
    random = problem.control(seed)
    configs = [replace(config, price=config.price * factor) for factor in _PRICES]
    seen = random.train[: len(random.fit)]
    best: Control | None = None
    for mask in train_masks(random, configs, seed=seed, progress=progress):
        order = mask.argsort(descending=True, stable=True)
        count = 1
        while count <= len(order):
            keep = torch.zeros(len(order), dtype=torch.bool)
            keep[order[:count]] = True
            edges = problem.edges.count(keep)
            if edges > limit:
                break
            loss = random.calibrated_loss(Part(keep), seen)
            if best is None or loss < best.loss:
                reached = loss <= target
                best = Control(loss, count, edges, limit, reached, not reached)
            count = max(count + 1, count * 5 // 4)
    assert best is not None
    return best


def _others(count: int, seed: int) -> torch.Tensor:
    """A permutation without fixed points: each prompt's substitute."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    others = torch.empty(count, dtype=torch.int64)
    others[order] = order.roll(1)
    return others
