"""Times a training step of the transformer as its L0 grows, and as its width grows at the same L0.

    python -m benchmarks.experiments.scaling                  both
    python -m benchmarks.experiments.scaling --part width     one of them
    python -m benchmarks.experiments.scaling --smoke          tiny, in seconds

The model is that of `benchmarks.training`, which says how it is measured and checked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks import run, training
from benchmarks.devices import Device
from benchmarks.report import Row
from benchmarks.transformer import measure
from benchmarks.transformer.jobs import Case, Group
from benchmarks.transformer.results import closing as closing
from benchmarks.transformer.results import lines as lines
from benchmarks.transformer.results import text as text

# What grows in a part: the column, and its name.
_SWEEPS = {"l0": ("l0", "nonzero weights"), "width": ("d_model", "d_model")}
# How many times the L0, or the width, of the model.
L0_TIMES, SMOKE_L0_TIMES = tuple(2.0**n for n in range(-4, 3)), (0.5, 1.0, 2.0)
WIDTH_TIMES, SMOKE_WIDTH_TIMES = (0.25, 0.5, 1.0, 2.0), (0.5, 1.0)


@dataclass(frozen=True)
class Options(run.Options):
    part: Literal["l0", "width", "both"] = "both"
    """What to measure."""


def plan(options: Options, device: Device) -> list[Group]:
    base = training.plan(options, device)[0].cases[0]
    l0 = [_scaled(base, n, n) for n in (SMOKE_L0_TIMES if options.smoke else L0_TIMES)]
    # A matrix with n times the rows and columns has as many weights at 1 / n^2 of the density.
    width = [
        replace(_scaled(base, n**-2, 1 / n, d_model=round(n * base.model.d_model)), variant=name)
        for n in (SMOKE_WIDTH_TIMES if options.smoke else WIDTH_TIMES)
        for name in ("sparse", "masked_dense")
    ]
    groups = [
        Group("l0", (*l0, replace(base, variant="masked_dense"))),
        Group("width", tuple(width)),
    ]
    return [group for group in groups if options.part in (group.name, "both")]


def _scaled(case: Case, blocks: float, embeddings: float, **changes: Any) -> Case:
    """The case with so many times the densities of its blocks and its embeddings."""
    model = replace(
        case.model,
        density=min(1.0, case.model.density * blocks),
        embedding_density=min(1.0, case.model.embedding_density * embeddings),
        min_nonzeros=1,
        **changes,
    )
    return replace(case, model=model)


def draw(rows: Sequence[Row], figure: Any) -> None:
    """A step against L0 and against the width, log-log; masked dense has one point for all L0."""
    swept = [row for row in rows if row["correct"] and row.get("part") in _SWEEPS]
    if not swept:
        raise ValueError("there is nothing to draw: no part of them is l0 or width")
    figure.set_size_inches(11, 5.2)
    for axis, (part, (key, name)) in zip(figure.subplots(1, 2), _SWEEPS.items(), strict=True):
        for variant in ("sparse", "masked_dense"):
            found = [row for row in swept if (row["part"], row["variant"]) == (part, variant)]
            found.sort(key=lambda row: row[key])
            points = [[row[column] for row in found] for column in (key, "step_ms")]
            axis.plot(*points, "o-", label=variant)
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="a step, ms")
        axis.grid(which="both", alpha=0.25, lw=0.5)
        axis.legend()


main = run.Benchmark(
    name="experiments.scaling",
    description=__doc__,
    cases=plan,
    measure=measure.measure_group,
    options=Options,
    missing=measure.missing,
)

if __name__ == "__main__":
    sys.exit(main())
