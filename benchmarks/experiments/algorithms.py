"""Test accuracy of sparse training algorithms at equal L0: an MLP on scikit-learn's digits.

    python -m benchmarks.experiments.algorithms --json FILE

The MLP (64, 256, 256, 10) keeps `fan` inputs of every output. Each seed draws a test set of 500 of
the 1,797 images and the batches, alike for all, and the first patterns and weights, alike for
static, SET and RigL. They rewire every 15 of 300 steps before step 225 and replace at most 30% at
once. The fans of AnnealedRigL start at 8 times their end and reach it at step 150: until then it
has more weights. None of these settings was tuned. `dense` is the MLP of `nn.Linear`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import sparse_kernels as sk
from benchmarks import devices, report, run
from sparse_transformer import program
from sparse_transformer.evaluation import Interval

PROGRAM = "python -m benchmarks.experiments.algorithms"
ALGORITHMS = {"static": sk.Static, "SET": sk.SET, "RigL": sk.RigL, "AnnealedRigL": sk.AnnealedRigL}
SIZES, FANS, MULTIPLE = (64, 256, 256, 10), (2, 8), 8
SEEDS = 5
T_975 = 2.776445  # Student's quantile for the mean of so many seeds
STEPS, BATCH, TEST, LEARNING_RATE = 300, 64, 500, 3e-3


@dataclass(frozen=True)
class Options:
    json: Path
    """Write the rows to this file."""
    smoke: bool = False
    """Few steps, in seconds."""
    threads: int | None = None
    """Number of CPU threads; by default those of PyTorch."""


def digits() -> tuple[Tensor, Tensor]:
    """The images, `(1797, 64)` in [0, 1], and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        report.refuse(PROGRAM, "it needs scikit-learn: pip install scikit-learn")
    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(classes)


def mlp(fan: int | None, generator: torch.Generator) -> nn.Sequential:
    """With a fan-in of at most `fan`; dense for None."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        kept = inputs if fan is None else min(fan, inputs)
        layer = sk.SparseLinear(inputs, outputs, fan_in=kept, generator=generator)
        layers += [layer.to_dense() if fan is None else layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def l0(model: nn.Module) -> int:
    """The number of weights, without biases."""
    return sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)


def train(
    name: str, fan: int | None, seed: int, steps: int, data: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """The row of an algorithm, fan-in (None: dense) and seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data[0]), generator=generator)
    (test_x, x), (test_y, y) = (part[order].split([TEST, len(order) - TEST]) for part in data)
    first = fan * MULTIPLE if fan and name == "AnnealedRigL" else fan
    model = mlp(first, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    algorithm = None
    if fan is not None:
        more: dict[str, Any] = {"fan": fan, "multiple": MULTIPLE} if first != fan else {}
        every, until = max(1, steps // 20), max(4, 3 * steps // 4)
        algorithm = ALGORITHMS[name](model, optimizer, until=until, every=every, seed=seed, **more)
    batches = torch.Generator().manual_seed(seed)
    sizes, start = [], time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        sizes.append(l0(model))
        if algorithm is not None:
            algorithm.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    return {
        "algorithm": name,
        "fan": fan,
        "seed": seed,
        "accuracy": accuracy,
        "l0": l0(model),
        "mean_l0": fmean(sizes),
        "seconds": seconds,
    }


def interval(values: Sequence[float]) -> Interval:
    """The mean over all seeds, with Student's interval of 95%."""
    mean, half = fmean(values), T_975 * stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def text(rows: Sequence[report.Row], style: report.Style = "terminal") -> str:
    """A line for each fan and algorithm. Gains over static are means of differences of a seed."""
    groups: dict[tuple[int | None, str], list[report.Row]] = {}
    for row in rows:
        groups.setdefault((row["fan"], row["algorithm"]), []).append(row)
    lines = []
    for (fan, name), found in groups.items():
        static = groups.get((fan, "static"), [])
        gains = [a["accuracy"] - b["accuracy"] for a, b in zip(found, static, strict=False)]
        lines.append(
            {
                "fan-in": fan,
                "algorithm": name,
                "L0": f"{found[0]['l0']:,}",
                "mean L0 in training": f"{fmean(row['mean_l0'] for row in found):,.0f}",
                "test accuracy": str(interval([row["accuracy"] for row in found])),
                "over static": str(interval(gains)) if gains and name != "static" else None,
            }
        )
    return report.table(lines, style)


def main(arguments: Sequence[str] | None = None) -> int:
    options, command = run.parse(Options, "experiments.algorithms", __doc__, arguments)
    data = digits()
    machine = devices.Device().describe(command)
    print(report.machine_line(machine), flush=True)

    def train_all() -> None:
        steps = 6 if options.smoke else STEPS
        models = [*product(FANS, ALGORITHMS), (None, "dense")]
        rows = [
            train(name, fan, seed, steps, data)
            for (fan, name), seed in report.progress([*product(models, range(SEEDS))])
        ]
        report.write_json(options.json, machine, rows, complete=True)
        print("", text(rows), sep="\n")

    return program.status(train_all)


if __name__ == "__main__":
    sys.exit(main())
