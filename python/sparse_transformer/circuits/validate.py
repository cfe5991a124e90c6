"""Validation of a circuit on held-out prompts, and the control.

Sufficient: the circuit alone, everything else ablated, performs the task. Necessary: without it the
task is lost. There are three ablations: what is ablated has its mean over the corpus, or zero, or
its activation in another prompt. The control repeats the procedure with random labels: if it finds
a circuit for them too, it finds circuits for anything, as a replication has objected.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_transformer.circuits.ablation import Baseline
from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.circuit import Ablated, Control, Validation
from sparse_transformer.circuits.masks import MaskConfig, NodeMasks, train_masks
from sparse_transformer.circuits.objective import (
    Calibration,
    Subgraph,
    TaskLoss,
    calibrate,
    score,
)

# Without the circuit the loss must be at least this; ln 2 = 0.69 is what guessing has.
NECESSARY_LOSS = 0.6
# The control may not reach the target with up to this many times the circuit's edges.
CONTROL_FACTOR = 10
# Node prices for the control, by which the best one's is multiplied.
_PRICES = (0.1, 1.0, 10.0)


def validate(
    task: TaskLoss,
    subgraph: Subgraph,
    calibration: Calibration,
    target: float,
    *,
    pairs: int | None = None,
    seed: int = 0,
) -> Validation:
    """Losses and accuracies on the test prompts, without a control.

    Args:
        calibration: of the circuit, fitted on the prompts for fitting.
        target: the loss that makes the circuit sufficient.
        pairs: how many of the test prompts; None for all.
        seed: chooses the other prompts of resample ablation.
    """
    test = task.test[:pairs]
    whole = task.score(test)
    complement = Subgraph(~subgraph.keep)
    zeros = {name: torch.zeros_like(mean) for name, mean in task.means.items()}
    ablations: dict[str, tuple[Baseline | None, Tensor | None]] = {
        "mean": (None, None),
        "zero": (zeros, None),
        "resample": (None, _others(2 * len(test), seed)),
    }
    circuit, without = {}, {}
    for name, (baseline, resample) in ablations.items():
        diffs, positive = task.logit_diffs(test, subgraph, baseline, resample)
        alone = score(diffs, positive, calibration)
        circuit[name] = Ablated(alone.loss, alone.accuracy)
        diffs, positive = task.logit_diffs(test, complement, baseline, resample)
        lost = score(diffs, positive)
        known = score(diffs, positive, calibrate(diffs, positive))
        without[name] = Ablated(lost.loss, lost.accuracy, known.loss)
    return Validation(
        pairs=len(test),
        model_loss=whole.loss,
        model_accuracy=whole.accuracy,
        circuit=circuit,
        without=without,
        sufficient=circuit["mean"].loss <= target,
        necessary=without["mean"].loss >= NECESSARY_LOSS,
    )


def control(
    task: TaskLoss,
    limit: int,
    config: MaskConfig,
    target: float,
    *,
    seconds: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Control:
    """Trains masks on random labels as `config` says, and tries all their thresholds.

    There is a mask for each of three node prices, or one mask where there is no time for three.

    Args:
        limit: edges that a threshold may keep; `CONTROL_FACTOR` times those of the task's own
            circuit, both counted as all edges between the nodes.
        seconds: that training one mask takes, about.
    """
    progress = progress or Progress()
    random = task.with_random_labels(seed)
    factors = _PRICES if len(_PRICES) * seconds <= progress.left else (1.0,)
    configs = [replace(config, price=config.price * factor) for factor in factors]
    seen = random.train[: len(random.fit)]
    best: Control | None = None
    with progress.part(0.0, 0.75):
        masks, share = train_masks(NodeMasks(random), configs, seed=seed, progress=progress)
    for mask in masks:
        order = mask.argsort(descending=True, stable=True)
        count = 1
        while count <= len(order) and (best is None or progress.left >= 0):
            keep = torch.zeros(len(order), dtype=torch.bool)
            keep[order[:count]] = True
            edges = task.edges.count(keep)
            if edges > limit:
                break
            loss = random.calibrated_loss(Subgraph(keep), seen)
            if best is None or loss < best.loss:
                reached = loss <= target
                best = Control(loss, count, edges, limit, reached, not reached)
            count = max(count + 1, count * 5 // 4)
    assert best is not None
    return best if share >= 1 else replace(best, trained=share)


def _others(count: int, seed: int) -> Tensor:
    """A permutation without fixed points: each prompt's substitute."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    others = torch.empty(count, dtype=torch.int64)
    others[order] = order.roll(1)
    return others
