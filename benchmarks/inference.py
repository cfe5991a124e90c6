"""Times a forward of the weight-sparse transformer, for a prompt and token by token.

    python -m benchmarks.inference                   d_model 2048, 8 layers, 1/256: some minutes
    python -m benchmarks.inference --smoke           tiny, in seconds
    python -m benchmarks.inference --from FILE       the tables of a result file; measures nothing

    prefill   one prompt of 256 tokens, without a cache
    decode    one more token for each of a batch of 1 or 16, keys and values of 128 in the cache

The variants take turns in one process, in float32 and with everything in bfloat16:

    sparse         the package's own layers
    masked_dense   dense matrices in which the zeros stand already, with our abs_topk: the best that
                   masked dense can do
    dense          nn.Linear without AbsTopK: the plain model

Correctness comes first: the logits of the sparse model, also those from the cache, must be those
of masked dense with the same weights. Else its rows say FAIL and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import report, timing
from benchmarks.problems import DTYPES
from benchmarks.timing import Timing
from benchmarks.transformer import memory, results
from benchmarks.transformer.check import Verdict, check, densified
from benchmarks.transformer.parts import PartClock, scaled, split
from benchmarks.transformer.variants import (
    DENSE,
    MASKED_DENSE_KERNEL,
    SPARSE,
    Case,
    Shape,
    make_model,
    pattern_bytes,
)
from sparse_transformer import KVCache, Transformer, keep_freed_memory

_MODEL = Shape(d_model=2048, n_layer=8, density=1 / 256, embedding_density=1 / 32, tokens=256)
_SMOKE = Shape(
    d_model=64, n_layer=2, density=1 / 8, embedding_density=1 / 4, context=32, tokens=32,
    vocab_size=128, min_nonzeros=1,
)  # fmt: skip
CPU_DTYPES = ("float32", "bfloat16")
INTERRUPTED = 130


@dataclass(frozen=True)
class Call:
    """What is timed: T tokens for each of a batch, after `before` tokens in the cache, if any."""

    phase: str
    batch: int
    tokens: int
    before: int
    repeats: int

    @property
    def label(self) -> str:
        """For a person who waits."""
        return f"{self.phase}, batch {self.batch}"


def calls(shape: Shape, *, smoke: bool) -> list[Call]:
    """Everything that is timed, in order."""
    few, many = (2, 2) if smoke else (5, 31)
    half = shape.context // 2
    return [
        Call("prefill", 1, shape.context, 0, few),
        Call("decode", 1, 1, half, many),
        Call("decode", 16, 1, half, many),
    ]


@dataclass(frozen=True)
class Rival:
    """A model of a case, ready to run."""

    case: Case
    model: Transformer

    def candidate(self, call: Call, device: str) -> Callable[[], torch.Tensor]:
        """The call on this model."""
        generator = torch.Generator().manual_seed(2)
        size = (call.batch, call.tokens)
        tokens = torch.randint(self.case.shape.vocab_size, size, generator=generator).to(device)
        cache = None
        if call.phase == "decode":
            dtype = DTYPES[self.case.dtype]
            cache = KVCache(self.model.config, call.batch, device=device, dtype=dtype)

        def run() -> torch.Tensor:
            if cache is not None:
                cache.length = call.before
            with torch.inference_mode():
                logits: torch.Tensor = self.model(tokens, cache)
            if device != "cpu":
                torch.cuda.synchronize()
            return logits

        return run


def make_rivals(shape: Shape, device: str) -> tuple[dict[str, Rival], Verdict]:
    """Every model that is timed, and whether the sparse one is right."""
    sparse = make_model(Case(shape, SPARSE), device)
    verdict = check(sparse, shape, inference=True)
    rivals = {}
    for dtype in CPU_DTYPES:
        for variant, make in (
            (SPARSE, lambda: make_model(Case(shape, SPARSE), device)),
            (MASKED_DENSE_KERNEL, lambda: densified(sparse, shape)),
            (DENSE, lambda: make_model(Case(shape, DENSE), device)),
        ):
            case = Case(shape, variant, dtype)
            rivals[f"{variant.name} {dtype}"] = Rival(case, make().to(DTYPES[dtype]).eval())
    return rivals, verdict


def measure_parts(rival: Rival, call: Call, device: str) -> list[dict[str, float]]:
    """Milliseconds of each part of the call, so many times."""
    clock = PartClock(device)
    candidate = rival.candidate(call, device)
    samples = []
    with split(rival.model, clock):
        for _ in range(call.repeats):
            clock.start()
            candidate()
            samples.append(clock.stop())
    return samples


def measure(
    call: Call,
    rivals: Mapping[str, Rival],
    verdict: Verdict,
    peaks: Mapping[str, float],
    device: str,
) -> list[dict[str, Any]]:
    """The rows of a call."""
    timed = {
        name: rival
        for name, rival in rivals.items()
        if verdict.failure is None or rival.case.variant != SPARSE
    }
    timings = timing.interleave(
        {name: rival.candidate(call, device) for name, rival in timed.items()},
        repeats=call.repeats,
    )
    rows = []
    for name, rival in rivals.items():
        row = describe(call, rival, device, peaks.get(name) if call.phase == "prefill" else None)
        is_sparse = rival.case.variant == SPARSE
        row |= {
            "correct": name in timed,
            "failure": verdict.failure if is_sparse else None,
            "error": verdict.error if is_sparse else None,
            "dense_error": verdict.dense_error if is_sparse else None,
        }
        if name in timed:
            row |= measured(call, rival, timings[name], measure_parts(rival, call, device))
        rows.append(row)
    return rows


def describe(call: Call, rival: Rival, device: str, peak_mb: float | None) -> dict[str, Any]:
    """A row with nothing measured yet."""
    shape, variant = rival.case.shape, rival.case.variant
    row = {
        "phase": call.phase,
        # Its mask is applied already, so there is but one masked dense.
        "variant": "masked_dense" if variant == MASKED_DENSE_KERNEL else variant.name,
        "dtype": rival.case.dtype,
        "d_model": shape.d_model,
        "n_layer": shape.n_layer,
        "context": shape.context,
        "density": shape.density,
        "embedding_density": shape.embedding_density,
        "tokens": call.batch * call.tokens,
        "batch": call.batch,
        "cached": call.before,
        "device": device,
        "threads": torch.get_num_threads(),
        "peak_mb": peak_mb,
    }
    return row | dict.fromkeys(results.TIMED)


def measured(
    call: Call, rival: Rival, taken: Timing, parts: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """The columns of a row that is correct; the state is the weights alone."""
    model = rival.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bigram = 0 if model.bigram is None else model.bigram.numel() * model.bigram.element_size()
    return {
        "step_ms": taken.median_ms,
        "spread_ms": taken.spread_ms,
        "samples": taken.samples,
        "tokens_per_s": 1e3 * call.batch * call.tokens / taken.median_ms,
        "parts_ms": scaled(parts, taken.median_ms),
        "instrumented_ms": min(sum(sample.values()) for sample in parts),
        "state_mb": (weights - bigram) / 1e6,
        "bigram_mb": bigram / 1e6,
        "patterns_mb": pattern_bytes(model) / 1e6,
    }


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Measures, prints and writes."""
    device, shape = options.device, _SMOKE if options.smoke else _MODEL
    keeps = keep_freed_memory()
    machine = results.describe_machine(device, ["-m", "benchmarks.inference", *words])
    machine |= {"keeps_freed_memory": keeps}
    print(report.machine_line(machine), flush=True)
    chosen = calls(shape, smoke=options.smoke)
    cases = [
        Case(shape, variant, dtype)
        for dtype in CPU_DTYPES
        for variant in (SPARSE, MASKED_DENSE_KERNEL, DENSE)
    ]
    if options.smoke:
        cases = cases[:1]
    progress = report.Progress(len(cases) + 1 + len(chosen))
    peaks = {}
    for case in cases:
        progress.show(f"memory of {case.label}")
        name = f"{case.variant.name} {case.dtype}"
        peaks[name] = memory.measure_peak_mb(case, device=device, phase="prefill")
        progress.advance()
    progress.show("makes and checks the models")
    rivals, verdict = make_rivals(shape, device)
    progress.advance()
    rows: list[dict[str, Any]] = []
    for call in chosen:
        progress.show(call.label)
        call_rows = measure(call, rivals, verdict, peaks, device)
        rows += call_rows
        progress.advance()
        progress.clear()
        print("", *results.table(call_rows), sep="\n", flush=True)
        if options.json is not None:
            report.write_json(options.json, machine, rows, complete=call is chosen[-1])
    print("", *results.goals(rows), sep="\n", flush=True)
    return 0 if all(row["correct"] for row in rows) else 1


def show(options: argparse.Namespace) -> int:
    """The tables of a result file."""
    content = json.loads(options.source.read_text())
    rows = content["rows"]
    if options.update_readme is not None:
        report.update_readme(options.update_readme, results.markdown(content), "inference")
    print(report.machine_line(content["machine"]), "", *results.table(rows), sep="\n")
    print("", *results.goals(rows), sep="\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = results.parser("benchmarks.inference", __doc__ or "")
    options = parser.parse_args(words)
    results.refuse(parser, options)
    if options.source is not None:
        return show(options)
    try:
        return run(options, words)
    except KeyboardInterrupt:
        print("interrupted: the calls that were complete are in --json", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
