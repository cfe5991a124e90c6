"""The steps of `python -m benchmarks.gpu`, each a process that prints a row a line, as JSON.

    python -m benchmarks.gpu.steps products
    python -m benchmarks.gpu.steps check cuda        (what the sanitizers run)

With --rehearse the CPU takes the place of the device: tiny shapes, the Triton kernels interpreted
and the CUDA kernels emulated. It needs nothing beyond what builds and runs the kernels.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, cases, operations, report, timing
from benchmarks.baselines import Operands
from benchmarks.cases import GPU_TOKENS, AnyCase, Case, TopkCase
from benchmarks.devices import Device, Gpu
from benchmarks.roofline import count_work
from benchmarks.timing import Candidate
from sparse_kernels import backends, cuda
from sparse_kernels.layout import Problem

ROOT = Path(__file__).resolve().parent.parent.parent
Row = dict[str, Any]
Rows = Iterator[Row]

BACKENDS = ("cuda", "triton")
# Seconds of timing for each product, and the least samples of each candidate.
SECONDS, MIN_SAMPLES = 0.6, 20
# The working set whose reading from the second-level cache is timed.
L2_BYTES = 20 * 10**6
METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed.avg.per_cycle_active",
    "lts__t_bytes.sum.per_second",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "dram__bytes.sum.per_second",
)

HEADLINES = [case for case in cases.HEADLINES if case.tokens == GPU_TOKENS]
# How many times faster than cuBLAS, or than torch.topk and scatter, forward and step should be.
GOALS: dict[str, tuple[float, float | None]] = {
    "4096->4096 fan-in 4 1x1": (6.0, 5.0),
    "2048->8192 fan-in 8 1x1": (3.2, 3.0),
    "4096->4096 fan-in 416 32x32": (2.5, 2.2),
    "4096->4096 fan-in 256 64x64": (6.0, 5.0),
    "8192->8192 fan-in 896 128x128": (6.0, 6.0),
    "D=8192 k=2048": (10.0, None),
}


@dataclass(frozen=True)
class Bench:
    """Where the steps run, and with what."""

    device: Device
    layers: list[Case]  # the cases of the goals
    topk: TopkCase
    small: list[AnyCase]  # odd sizes, for checks
    rehearses: bool

    def able(self, problem: Problem) -> list[str]:
        """The backends that can run it, the one that users get first."""
        found = [name for name in BACKENDS if backends.why_not(name, problem) is None]
        first = found[0] if self.rehearses else backends.choose(problem)
        return sorted(found, key=lambda name: name != first)

    def synchronize(self) -> None:
        if not self.rehearses:
            torch.cuda.synchronize()


def connect(*, rehearse: bool) -> Bench:
    """The GPU and the cases of the goals, or the CPU and tiny ones."""
    if rehearse:
        layers = [Case(17, 24, 40, 3, dtype="bfloat16"), Case(9, 64, 64, 32, (32, 32), "bfloat16")]
        topk = TopkCase(3, 64, 16, "bfloat16")
        every: list[AnyCase] = [*layers, topk]
        return Bench(Device(), layers, topk, every, rehearses=True)
    layers = [case for case in HEADLINES if isinstance(case, Case)]
    (topk,) = (case for case in HEADLINES if isinstance(case, TopkCase))
    small: list[AnyCase] = [
        *cases.matmul_cases("cuda", "smoke"),
        *cases.topk_cases("cuda", "smoke"),
    ]
    return Bench(Gpu(), layers, topk, small, rehearses=False)


def goal_of(case: AnyCase, product: str) -> float | None:
    """How many times faster than the stock operation it should be, if that is promised."""
    found = [goal for name, goal in GOALS.items() if str(case).startswith(name)]
    if not found or case.tokens != GPU_TOKENS:
        return None
    return {"forward": found[0][0], "abs_topk forward": found[0][0], "step": found[0][1]}.get(
        product
    )


# ---- the steps


def machine(bench: Bench) -> Rows:
    """What the numbers were measured on, and which backends run."""
    about = bench.device.describe(["-m", "benchmarks.gpu"])
    clocks = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    query = ("nvidia-smi", f"--query-gpu={','.join(clocks)}", "--format=csv,noheader")
    said = report.output_of(*query)
    about["clocks"] = dict(zip(clocks, said.split(", "), strict=False)) if said else None
    about["nvcc"] = (report.output_of("nvcc", "--version") or "").splitlines()[-1:]
    yield {"machine": about}
    problem = bench.layers[-1].problems(bench.device.name)[0]
    for name in BACKENDS:
        yield {"step": "machine", "backend": name, "why_not": backends.why_not(name, problem)}


def build(bench: Bench) -> Rows:
    """In a rehearsal the kernels are built for the emulation: `connect_extension` did it."""
    yield {"step": "build", "extension": cuda._extension.__name__}


def check(bench: Bench, backend: str) -> Rows:
    """Every operation once on small odd sizes."""
    for case in bench.small:
        for operation in _operations(case, bench, backend):
            row = {"step": "check", **case.columns, "product": operation.product}
            yield row | {"backend": backend, **asdict(operation.check())}


def _operations(case: AnyCase, bench: Bench, backend: str) -> Iterator[operations.Operation]:
    name = bench.device.name
    if any(backends.why_not(backend, problem) for problem in case.problems(name)):
        return
    if isinstance(case, TopkCase):
        yield from operations.forward_and_backward(case, name, backend)
    else:
        yield from operations.products(case, name, backend)


def compilations(bench: Bench) -> list[tuple[AnyCase, str]]:
    """What one process each compiles: the Triton kernels that the goals need."""
    found: list[tuple[AnyCase, str]] = [(bench.topk, "")]
    for case in bench.layers:
        problems = case.problems(bench.device.name)
        able = [p.product for p in problems if backends.why_not("triton", p) is None]
        found += [(case, product) for product in able]
    return found


def compile_one(bench: Bench, number: str) -> Rows:
    """Runs one of the `compilations` once; the compiled kernel stays in Triton's cache on disk."""
    some = compilations(bench)[int(number) :][:1]
    for case, product in some:
        start = time.perf_counter()
        if isinstance(case, TopkCase):
            for operation in operations.forward_and_backward(case, bench.device.name, "triton"):
                operation.ours()
        else:
            baselines.ours(Operands.draw(case, bench.device.name), product, "triton")()
        bench.synchronize()
        seconds = time.perf_counter() - start
        yield {"step": "compile", **case.columns, "product": product, "seconds": seconds}


def ceilings(bench: Bench) -> Rows:
    """The rates on which every estimate hangs."""
    device = bench.device
    if not bench.rehearses:
        yield {"step": "ceilings", "what": "L2 read", **_l2_read()}
        device.prepare(smoke=False)
        assert device.peaks is not None
        yield {"step": "ceilings", "what": "peaks at 8192", **asdict(device.peaks)}
    for case in bench.layers:
        operands = Operands.draw(case, device.name)
        for product in cases.PRODUCTS:
            call = baselines.dense(operands, product, cases.DTYPES[case.dtype])
            row = {"step": "ceilings", "what": "dense", **case.columns, "product": product}
            yield row | _times(bench, {"dense": call})["dense"]
    forward, *_ = operations.forward_and_backward(bench.topk, device.name, None)
    for name, (call, _) in forward.rivals()[0].items():
        row = {"step": "ceilings", "what": f"torch.topk {name} + scatter", **bench.topk.columns}
        yield row | _times(bench, {name: call})[name]


def _l2_read() -> Row:
    """GB/s that all multiprocessors together read from the second-level cache."""
    if (nvcc := shutil.which("nvcc")) is None:
        return {"note": "nvcc was not found"}
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/peaks.so"
        flags = ["-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
        command = [nvcc, *flags, str(ROOT / "csrc/bench/peaks.cu"), "-o", library]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"note": f"nvcc failed: {done.stderr.strip()[-300:]}"}
        function = ctypes.CDLL(library).l2_read_gbs
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_double
        return {"gbs": function(L2_BYTES)}


@torch.no_grad()
def products(bench: Bench) -> Rows:
    """The three products of each goal: checked against float64, then timed in turns with cuBLAS."""
    if not bench.rehearses:
        bench.device.prepare(smoke=False)
    for case in bench.layers:
        operands = Operands.draw(case, bench.device.name)
        steps: dict[str, list[Row]] = {}
        for problem in case.problems(bench.device.name):
            for row in _product(bench, case, operands, problem):
                steps.setdefault(row["backend"], []).append(row)
                yield row
        for rows in steps.values():
            yield _sum(case, rows)


def _product(bench: Bench, case: Case, operands: Operands, problem: Problem) -> Rows:
    product, dtype = problem.product, cases.DTYPES[case.dtype]
    rows: dict[str, Row] = {}
    calls: dict[str, Candidate] = {
        "dense": baselines.dense(operands, product, dtype),
        "masked dense": baselines.masked_dense(operands, product),
    }
    for name in bench.able(problem):
        call = baselines.ours(operands, product, name)
        found = asdict(baselines.check(operands, product, call))
        found["same_bits"] = torch.equal(_tensor(call), _tensor(call))
        rows[name] = {"step": "products", **case.columns, "product": product, "backend": name}
        rows[name] |= found
        if bench.device.peaks is not None:
            terms = bench.device.peaks.bound_ms(count_work(case, product), case.dtype)
            rows[name]["bound_ms"] = max(terms.values())
        if found["correct"]:
            calls[name] = call
    times = _times(bench, calls)
    for name, row in rows.items():
        yield row | _compared(case, product, times, name)


def _tensor(call: Candidate) -> torch.Tensor:
    result = call()
    assert isinstance(result, torch.Tensor)
    return result


def _times(bench: Bench, calls: Mapping[str, Candidate]) -> dict[str, Row]:
    sampler = bench.device.sample_s
    found = timing.interleave(
        calls,
        budget_s=0.01 if bench.rehearses else SECONDS,
        min_samples=1 if bench.rehearses else MIN_SAMPLES,
        sampler=sampler,
    )
    return {name: asdict(row) for name, row in found.items()}


def _compared(case: AnyCase, product: str, times: Mapping[str, Row], ours: str) -> Row:
    """The times of a row, with those of the stock operation, which is called dense or torch."""
    if ours not in times:
        return {}  # it is wrong: no time
    row, stock = dict(times[ours]), "torch" if isinstance(case, TopkCase) else "dense"
    rivals = {name: found["time_ms"] for name, found in times.items() if name not in BACKENDS}
    row |= {f"{name.replace(' ', '_')}_ms": found for name, found in rivals.items()}
    return row | _over(case, product, row, stock)


def _over(case: AnyCase, product: str, row: Mapping[str, Any], stock: str) -> Row:
    over = row[f"{stock}_ms"] / row["time_ms"]
    return {f"over_{stock}": over, "goal": goal_of(case, product)}


def _sum(case: Case, rows: list[Row]) -> Row:
    """The `step` row of one backend: all products; without times if one is wrong."""
    total: Row = {name: rows[0][name] for name in ("step", *case.columns, "backend")}
    total |= {"product": "step", "correct": all(row["correct"] for row in rows)}
    if not total["correct"] or len(rows) < len(cases.PRODUCTS):
        return total
    for name in ("time_ms", "dense_ms", "masked_dense_ms"):
        total[name] = sum(row[name] for row in rows)
    return total | _over(case, "step", total, "dense")


@torch.no_grad()
def abs_topk(bench: Bench) -> Rows:
    """AbsTopK and its derivative on every backend, in turns with torch.topk and scatter."""
    case = bench.topk
    (problem,) = case.problems(bench.device.name)
    for name in bench.able(problem):
        for operation in operations.forward_and_backward(case, bench.device.name, name):
            row = {"step": "abs_topk", **case.columns, "product": operation.product}
            row |= {"backend": name, **asdict(operation.check())}
            rivals = {rival: call for rival, (call, _) in operation.rivals()[0].items()}
            if row["correct"]:
                times = _times(bench, {name: operation.ours, **rivals})
                best = min((times[rival] for rival in rivals), key=lambda found: found["time_ms"])
                times = {name: times[name], "torch": best}
                row |= _compared(case, operation.product, times, name)
            yield row


def launches(bench: Bench) -> Iterator[tuple[str, Candidate]]:
    """One launch each of the kernels that decide: unstructured, gathered blocks, AbsTopK."""
    for number, product in ((0, "forward"), (0, "grad_weight"), (2, "forward"), (-1, "forward")):
        case = bench.layers[min(number, len(bench.layers) - 1)]
        problem = case.problems(bench.device.name)[cases.PRODUCTS.index(product)]
        for name in bench.able(problem)[:1]:
            call = baselines.ours(Operands.draw(case, bench.device.name), product, name)
            yield f"{case} {product} {name}", call
    (problem,) = bench.topk.problems(bench.device.name)
    for name in bench.able(problem)[:1]:
        forward, *_ = operations.forward_and_backward(bench.topk, bench.device.name, name)
        yield f"{bench.topk} {name}", forward.ours


def launch(bench: Bench) -> Rows:
    """What the profiler runs: it looks only between start and stop."""
    for name, call in launches(bench):
        call()
        bench.synchronize()
        with contextlib.nullcontext() if bench.rehearses else torch.cuda.profiler.profile():
            call()
            bench.synchronize()
        yield {"step": "profile", "launched": name}


def profile(bench: Bench) -> Rows:
    """The profiler's metrics of each kernel of `launch`."""
    command = ["ncu", "--profile-from-start", "off", "--csv", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-m", "benchmarks.gpu.steps", "launch"]
    command += ["--rehearse"] if bench.rehearses else []
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        yield {"step": "profile", "note": "ncu is not installed"}
        raise SystemExit(1) from None
    yield from read_profile(done.stdout)
    if done.returncode:
        raise SystemExit(f"ncu ended with exit status {done.returncode}: {done.stdout[-2000:]}")


def read_profile(printed: str) -> Rows:
    """The rows of ncu's table, which stands among other lines."""
    table = [line for line in printed.splitlines() if line.startswith('"')]
    for row in csv.DictReader(table):
        names = ("Kernel Name", "Grid Size", "Block Size", *(n for n in row if "Metric" in n))
        yield {"step": "profile", **{name: row.get(name) for name in names}}


STEPS: dict[str, Callable[..., Rows]] = {
    "machine": machine,
    "build": build,
    "check": check,
    "compile": compile_one,
    "ceilings": ceilings,
    "products": products,
    "abs_topk": abs_topk,
    "launch": launch,
    "profile": profile,
}


def connect_extension(*, rehearse: bool) -> contextlib.AbstractContextManager[object]:
    """In a rehearsal the CUDA kernels run in the emulation of the tests."""
    if not rehearse:
        return contextlib.nullcontext()
    sys.path.insert(0, str(ROOT / "tests"))
    from cuda_emulation import emulated  # type: ignore[import-not-found]

    return cuda._emulated(emulated())


def main(words: list[str]) -> int:
    """Runs the step that the words name, with its arguments. Returns 1 if a row is wrong."""
    rehearse = "--rehearse" in words
    name, *arguments = (word for word in words if word != "--rehearse")
    wrong = 0
    with connect_extension(rehearse=rehearse):
        for row in STEPS[name](connect(rehearse=rehearse), *arguments):
            print(json.dumps(row, allow_nan=False), flush=True)
            wrong += not (row.get("correct", True) and row.get("same_bits", True))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
