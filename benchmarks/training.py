"""Times a training step of the weight-sparse transformer against masked dense and dense.

    python -m benchmarks.training                    everything, in some ten minutes
    python -m benchmarks.training --part default     d_model 1024, densities 1/64 and 1/256
    python -m benchmarks.training --part l0          the cost as L0 grows at d_model 1024
    python -m benchmarks.training --part width       the cost as the width grows at the same L0
    python -m benchmarks.training --smoke            everything, tiny, in seconds
    python -m benchmarks.training --from FILE        the tables of a result file; measures nothing

The variants take turns in one process:

    sparse               the package's own way, at its final density. Every 20th step changes the
                         connections; a step is given with its share of that, at its dearest.
    masked_dense         the published recipe as released: torch.topk and scatter for activations,
                         a global torch.topk over each matrix after every step.
    masked_dense_abs_topk   the same with our abs_topk (in bfloat16).
    masked_dense_kernel  the same with our abs_topk, and with the fastest projection known.
    dense                nn.Linear, without AbsTopK: the plain model.
    masked_dense_compiled   on a GPU: masked_dense_kernel through torch.compile

All of them have our attention, norms and loss, and an allocator that keeps its pages.

Correctness comes first: the logits of each sparse model, and in float64 its gradients, must be
those of masked dense with the same weights. Else its rows say FAIL and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.timing import summarize
from benchmarks.transformer import memory, results
from benchmarks.transformer.check import check
from benchmarks.transformer.parts import PartClock, scaled, split
from benchmarks.transformer.variants import (
    COMPILED,
    DENSE,
    MASKED_DENSE,
    MASKED_DENSE_ABS_TOPK,
    MASKED_DENSE_KERNEL,
    SPARSE,
    Case,
    Shape,
    Training,
    Variant,
    state_bytes,
)
from sparse_transformer import keep_freed_memory

NAMES = ("default", "l0", "width")
ROUNDS = 3
# In each round a variant takes as many steps as fit into this, at least one.
ROUND_S = 3.0
MAX_STEPS = 6
# One that takes longer than this has one sample.
VERY_SLOW_S = 15.0
INTERRUPTED = 130

_MODEL = Shape()
_GPU = Shape(d_model=2048, n_layer=8, density=1 / 256, embedding_density=1 / 32, tokens=16384)
_SMOKE = Shape(
    d_model=64, n_layer=2, density=1 / 8, embedding_density=1 / 4, context=32, tokens=64,
    vocab_size=128, min_nonzeros=1,
)  # fmt: skip
L0_INVERSES = (1024, 512, 256, 128, 64, 32, 16)
WIDTHS = (256, 512, 1024, 2048)


@dataclass(frozen=True)
class Group:
    """Cases that take turns, all of them in memory at once.

    Args:
        name: the part it belongs to.
        memory: how many of the cases, from the first, have their peak memory measured.
        rounds: how often each has its turn.
    """

    name: str
    cases: tuple[Case, ...]
    memory: int = 0
    rounds: int = ROUNDS


def groups(parts: Sequence[str], shape: Shape, *, device: str, smoke: bool) -> list[Group]:
    """What is to be measured."""
    made = []
    rounds = 1 if smoke else ROUNDS
    if "default" in parts:
        # Masked dense and dense take as long at any density.
        sparser = replace(shape, density=shape.density / 4)
        every = [
            *_cases(shape, SPARSE, MASKED_DENSE, MASKED_DENSE_KERNEL, DENSE),
            *_cases(
                shape,
                *(SPARSE, MASKED_DENSE_ABS_TOPK, MASKED_DENSE_KERNEL, DENSE),
                dtype="bfloat16",
            ),
            *([Case(shape, COMPILED, "bfloat16")] if device != "cpu" else []),
        ]
        memory = 1 if smoke else len(every)
        made.append(Group("default", tuple(every), memory, rounds))
        others = _cases(sparser, SPARSE, MASKED_DENSE)
        made.append(Group("default", tuple(others), 0 if smoke else len(others), rounds))
    if "l0" in parts:
        inverses = (16, 8, 4) if smoke else L0_INVERSES
        # The published code keeps this ratio at this width. So all of L0 grows alike.
        ratio = shape.embedding_density / shape.density
        cases = [
            Case(replace(shape, density=1 / n, embedding_density=ratio / n, min_nonzeros=1), SPARSE)
            for n in inverses
        ]
        made.append(Group("l0", (*cases, *_cases(shape, MASKED_DENSE)), rounds=rounds))
    if "width" in parts:
        widths = (32, 64) if smoke else WIDTHS
        wide = [_of_width(shape, width) for width in widths]
        cases = [Case(one, variant) for one in wide for variant in (SPARSE, MASKED_DENSE)]
        made.append(Group("width", tuple(cases), rounds=rounds))
    return made


def _cases(shape: Shape, *variants: Variant, dtype: str = "float32") -> list[Case]:
    return [Case(shape, variant, dtype) for variant in variants]


def _of_width(shape: Shape, width: int) -> Shape:
    """The shape with another width and the same L0."""
    ratio = shape.d_model / width
    return replace(
        shape,
        d_model=width,
        density=min(1.0, shape.density * ratio**2),
        embedding_density=min(1.0, shape.embedding_density * ratio),
        min_nonzeros=1,
    )


class Measured:
    """What has been measured of a case so far."""

    def __init__(self, case: Case, device: str) -> None:
        self.training = Training(case, device)
        self.verdict = (
            check(self.training.model, case.shape) if case.variant.linear == "sparse" else None
        )
        self.steps_s: list[float] = []
        self.rewiring_s: list[float] = []
        self.parts_ms: list[dict[str, float]] = []
        self.estimate_s = 0.0

    @property
    def failure(self) -> str | None:
        """A sentence, or None."""
        if self.verdict is not None and self.verdict.failure is not None:
            return self.verdict.failure
        loss = self.training.loss
        if self.steps_s and not math.isfinite(loss):
            return f"the loss is {loss}"
        return None

    def warm_up(self) -> None:
        """The first steps pay for pages, optimizer state and lazily built schedules."""
        if self.training.changes_connections:
            self.training.step(rewires=True)
        self.estimate_s = _seconds(self.training.step)

    def take_turn(self, most: int) -> None:
        """The samples of a round, at most so many."""
        if self.estimate_s > VERY_SLOW_S and self.steps_s:
            return
        count = min(most, max(1, int(ROUND_S / max(self.estimate_s, 1e-3))))
        self.steps_s += [_seconds(self.training.step) for _ in range(count)]
        if self.training.changes_connections:
            # After a change of the connections the next step builds schedules anew: that is part
            # of its cost, so the two are timed together.
            both = (True, False)
            self.rewiring_s.append(
                sum(_seconds(partial(self.training.step, rewires=r)) for r in both)
            )

    def take_apart(self) -> None:
        """A step that is split into its parts."""
        if self.training.case.variant.compiled or (self.estimate_s > VERY_SLOW_S and self.parts_ms):
            return
        clock = PartClock(self.training.device)
        with split(self.training.model, clock):
            clock.start()
            self.training.step(at=clock.switch)
            self.parts_ms.append(clock.stop())

    def row(self, part: str, peak_mb: float | None) -> dict[str, Any]:
        """The row of the case."""
        case, shape = self.training.case, self.training.case.shape
        row: dict[str, Any] = {
            "phase": "train",
            "part": part,
            "variant": case.variant.name,
            "dtype": case.dtype,
            "d_model": shape.d_model,
            "n_layer": shape.n_layer,
            "context": shape.context,
            "density": shape.density,
            "embedding_density": shape.embedding_density,
            "tokens": shape.tokens,
            "device": self.training.device,
            "threads": torch.get_num_threads(),
            "projection": case.variant.projection,
            "l0": self.training.l0(),
            "correct": self.failure is None,
            "failure": self.failure,
            "error": self.verdict.error if self.verdict else None,
            "dense_error": self.verdict.dense_error if self.verdict else None,
            "peak_mb": peak_mb,
        }
        row |= dict.fromkeys(results.TIMED)
        if self.failure is not None or not self.steps_s:
            return row
        ordinary = summarize(self.steps_s)
        period = self.training.period
        change_ms = 0.0
        if self.rewiring_s:
            change_ms = summarize(self.rewiring_s).median_ms - 2 * ordinary.median_ms
        step_ms = ordinary.median_ms + change_ms / period
        sizes = state_bytes(self.training)
        row |= {
            "step_ms": step_ms,
            "tokens_per_s": 1e3 * shape.tokens / step_ms,
            "ordinary_ms": ordinary.median_ms,
            "rewiring_ms": ordinary.median_ms + change_ms if self.rewiring_s else None,
            "period": period if self.rewiring_s else None,
            "spread_ms": ordinary.spread_ms,
            "samples": ordinary.samples,
            "samples_ms": [round(1e3 * seconds, 2) for seconds in self.steps_s],
            "parts_ms": self._parts(ordinary.median_ms, change_ms / period),
            "instrumented_ms": min((sum(p.values()) for p in self.parts_ms), default=None),
            "state_mb": sizes["state"] / 1e6,
            "bigram_mb": sizes["bigram"] / 1e6,
            "patterns_mb": sizes["patterns"] / 1e6,
            "loss": self.training.loss,
        }
        return row

    def _parts(self, ordinary_ms: float, change_ms: float) -> dict[str, float] | None:
        """An ordinary step in parts, and what the changes of the connections add to one."""
        if not self.parts_ms:
            return None
        parts = scaled(self.parts_ms, ordinary_ms)
        parts["topology"] += change_ms
        return parts


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(group: Group, device: str, progress: report.Progress) -> list[dict[str, Any]]:
    """The rows of a group."""
    peaks: list[float | None] = []
    for number, case in enumerate(group.cases):
        peak = None
        if number < group.memory:
            progress.show(f"memory of {case.label}")
            peak = memory.measure_peak_mb(case, device=device, phase="train")
            progress.advance()
        peaks.append(peak)
    measured = []
    for case in group.cases:
        progress.show(f"checks and warms up {case.label}")
        one = Measured(case, device)
        if one.failure is None:
            one.warm_up()
        measured.append(one)
        progress.advance()
    with _without_collection():
        for turn in range(group.rounds):
            for one in measured:
                progress.show(f"round {turn + 1} of {group.rounds}: {one.training.case.label}")
                if one.failure is None:
                    one.take_turn(MAX_STEPS if group.rounds > 1 else 1)
                    one.take_apart()
                progress.advance()
    progress.clear()
    return [one.row(group.name, peak) for one, peak in zip(measured, peaks, strict=True)]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Inside, Python does not collect garbage."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _steps(chosen: Sequence[Group]) -> int:
    return sum(len(g.cases) * (1 + g.rounds) + g.memory for g in chosen)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Measures, prints and writes."""
    device = options.device
    shape = _SMOKE if options.smoke else _MODEL if device == "cpu" else _GPU
    if options.tokens is not None:
        shape = replace(shape, tokens=options.tokens)
    keeps = keep_freed_memory()
    machine = results.describe_machine(device, ["-m", "benchmarks.training", *words])
    machine |= {"keeps_freed_memory": keeps}
    chosen = groups(options.part or NAMES, shape, device=device, smoke=options.smoke)
    print(report.machine_line(machine), flush=True)
    progress = report.Progress(_steps(chosen))
    rows: list[dict[str, Any]] = []
    for group in chosen:
        group_rows = measure(group, device, progress)
        rows += group_rows
        print("", *results.table(group_rows), sep="\n", flush=True)
        if options.json is not None:
            report.write_json(options.json, machine, rows, complete=False)
    if options.json is not None:
        report.write_json(options.json, machine, rows, complete=True)
    print("", *results.goals(rows), sep="\n", flush=True)
    if options.plot is not None:
        results.draw(rows, options.plot, report.machine_line(machine))
    return 0 if all(row["correct"] for row in rows) else 1


def show(options: argparse.Namespace) -> int:
    """The tables of a result file."""
    content = json.loads(options.source.read_text())
    rows, machine = content["rows"], content["machine"]
    if options.plot is not None:
        results.draw(rows, options.plot, report.machine_line(machine))
    if options.update_readme is not None:
        report.update_readme(options.update_readme, results.markdown(content), "training")
    print(report.machine_line(machine), flush=True)
    for part in dict.fromkeys(row["part"] for row in rows):
        print("", *results.table([row for row in rows if row["part"] == part]), sep="\n")
    print("", *results.goals(rows), sep="\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = results.parser("benchmarks.training", __doc__ or "")
    parser.add_argument(
        "--part", action="append", choices=NAMES, help="only that; may be given several times"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the two sweeps there")
    parser.add_argument("--tokens", type=int, metavar="COUNT", help="tokens of a step")
    options = parser.parse_args(words)
    results.refuse(parser, options)
    if options.source is not None:
        return show(options)
    try:
        return run(options, words)
    except KeyboardInterrupt:
        print("interrupted: the groups that were complete are in --json", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
