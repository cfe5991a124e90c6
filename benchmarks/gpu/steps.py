"""The steps of `python -m benchmarks.gpu`, each a process that prints a row a line, as JSON.

    python -m benchmarks.gpu.steps goal 0
    python -m benchmarks.gpu.steps check cuda        (what the sanitizers run)

With --rehearse the CPU takes the place of the device: tiny shapes, the Triton kernels interpreted
and the CUDA kernels emulated. It needs nothing beyond what builds and runs the kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import math
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, operations, report, roofline
from benchmarks.cases import GOALS, AnyCase, AttentionCase, TopkCase
from benchmarks.devices import Device, Gpu
from benchmarks.operations import Limits, Row
from sparse_kernels import backends, cuda

ROOT = Path(__file__).resolve().parent.parent.parent
Rows = Iterator[Row]

BACKENDS = ("cuda", "triton")
# The working set whose reading from the second-level cache is timed.
L2_BYTES = 20 * 10**6
# What is launched for the profiler: the number of a goal, and one of its operations.
PROFILED = ((0, "forward"), (0, "grad_weight"), (2, "forward"), (4, "forward"), (-1, "forward"))


@dataclass(frozen=True)
class Bench:
    """Where the steps run, and with what: a GPU, or in a rehearsal the CPU in its place."""

    device: Device
    goals: list[AnyCase]
    fused: list[AnyCase]  # what else a step of the model does
    small: list[AnyCase]  # odd sizes, for checks
    limits: Limits

    @property
    def on_gpu(self) -> bool:
        return self.device.name == "cuda"

    def able(self, case: AnyCase) -> list[str]:
        """The backends that can run all products of a case; attention is PyTorch's own."""
        if isinstance(case, AttentionCase):
            return ["torch"]
        problems = case.problems(self.device.name)
        return [n for n in BACKENDS if all(backends.why_not(n, p) is None for p in problems)]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def connect(*, rehearse: bool) -> Bench:
    """The GPU and the cases of the goals, or the CPU and tiny ones."""
    if rehearse:
        tiny, fused = cases.REHEARSED, cases.REHEARSED_FUSED
        return Bench(Device(), tiny, fused, [*tiny, *fused], Limits(0.01, math.inf, 1))
    small = [case for choose in cases.CASES.values() for case in choose("cuda", "smoke")]
    # In what else there is, so that a sanitizer sees the kernels of all operations.
    small += [case for case in cases.REHEARSED_FUSED if isinstance(case, TopkCase)]
    return Bench(Gpu(), list(GOALS), cases.FUSED, small, Limits(0.6, math.inf, 20))


def machine(bench: Bench) -> Rows:
    """What the numbers were measured on, and which backends run."""
    rehearsal = [] if bench.on_gpu else ["--rehearse"]
    about = bench.device.describe(["-m", "benchmarks.gpu", *rehearsal])
    about["nvcc"] = (report.output_of("nvcc", "--version") or "").splitlines()[-1:]
    yield {"machine": about}
    problem = bench.goals[1].problems(bench.device.name)[0]
    for name in BACKENDS:
        yield {"backend": name, "why_not": backends.why_not(name, problem)}


def check(bench: Bench, backend: str) -> Rows:
    """Every operation once on small odd sizes."""
    for case in bench.small:
        if backend in bench.able(case):
            yield from _measure(bench, case, [backend], None)


def compile_one(bench: Bench, number: str) -> Rows:
    """Runs one Triton kernel that the goals need; the compiled kernel stays in the cache on disk.

    Each number is for a process of its own.
    """
    name = bench.device.name
    needed = [
        (case, problem.product)
        for case in bench.goals
        for problem in case.problems(name)
        if backends.why_not("triton", problem) is None
    ]
    for case, product in needed[int(number) :][:1]:
        start = time.perf_counter()
        for operation in operations.of(case, name, ["triton"], dense_only=True):
            if operation.product.startswith(product):
                operation.ours["triton"]()
        bench.synchronize()
        yield {**case.columns, "product": product, "seconds": time.perf_counter() - start}


def ceilings(bench: Bench) -> Rows:
    """The rates on which every estimate hangs."""
    device = bench.device
    if bench.on_gpu:
        yield {"what": "L2 read", **_l2_read()}
        device.prepare(smoke=False)
        yield {"what": "peaks at 8192", **vars(device.peaks)}
    for case in bench.goals:
        for operation in operations.of(case, device.name, [], dense_only=True):
            row = {"what": "rivals", **case.columns, "product": operation.product}
            yield row | operations.time_in_turns({}, operation, device, bench.limits)[1]


def _l2_read() -> Row:
    """GB/s that all multiprocessors together read from the second-level cache."""
    if (nvcc := shutil.which("nvcc")) is None:
        return {"note": "nvcc was not found"}
    major, minor = torch.cuda.get_device_capability()
    flags = (f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC")
    library = roofline.load(nvcc, ROOT / "csrc/bench/peaks.cu", *flags)
    if isinstance(library, str):
        return {"note": f"nvcc failed: {library}"}
    library.l2_read_gbs.argtypes = [ctypes.c_size_t]
    library.l2_read_gbs.restype = ctypes.c_double
    return {"gbs": library.l2_read_gbs(L2_BYTES)}


def goal(bench: Bench, number: str) -> Rows:
    """A case with a goal, each in a process of its own: one that hangs costs no other."""
    case = bench.goals[int(number)]
    if bench.on_gpu:
        bench.device.prepare(smoke=False)
    for row in _measure(bench, case, bench.able(case), bench.limits):
        yield row | {"goal": cases.goal_of(case, row.get("product", ""))}


def fused(bench: Bench) -> Rows:
    """What has no goal: abs_topk of GELU and RMSNorm, and attention."""
    if bench.on_gpu:
        bench.device.prepare(smoke=False)
    for case in bench.fused:
        yield from _measure(bench, case, bench.able(case), bench.limits)


def _measure(bench: Bench, case: AnyCase, names: list[str], limits: Limits | None) -> Rows:
    """Each backend checked, and timed in turns with the stock operation.

    If one of several raises an error, each is measured alone.
    """
    if not names:
        yield {**case.columns, "backend": None, "failed": "no backend can run it: see `machine`"}
        return
    try:
        yield from operations.measure(case, bench.device, names, limits, dense_only=True)
    except Exception as error:  # noqa: BLE001 (whatever a kernel that never ran may raise)
        traceback.print_exc()
        if len(names) == 1:
            message = f"{type(error).__name__}: {error}"
            yield {**case.columns, "backend": names[0], "failed": message}
            return
        for name in names:
            yield from _measure(bench, case, [name], limits)


def launch(bench: Bench) -> Rows:
    """What the profiler runs: it looks only between start and stop."""
    profiled = torch.cuda.profiler.profile if bench.on_gpu else contextlib.nullcontext
    for number, product in PROFILED:
        case = bench.goals[min(number, len(bench.goals) - 1)]
        able, problem = bench.able(case), case.problems(bench.device.name)[0]
        name = backends.choose(problem) if bench.on_gpu else able[0]
        for operation in operations.of(case, bench.device.name, [name], dense_only=True):
            if operation.product.endswith(product):
                operation.ours[name]()
                bench.synchronize()
                with profiled():
                    operation.ours[name]()
                    bench.synchronize()
                yield {"launched": f"{case} {product} {name}"}


STEPS: dict[str, Callable[..., Rows]] = {
    "machine": machine,
    "check": check,
    "compile": compile_one,
    "ceilings": ceilings,
    "goal": goal,
    "fused": fused,
    "launch": launch,
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
            print(json.dumps({"step": name, **row}, allow_nan=False), flush=True)
            wrong += "failed" in row or not row.get("correct", True)
    return 1 if wrong else 0


if __name__ == "__main__":
    # Stopped in a call that does not return, it says at least in which.
    faulthandler.register(signal.SIGINT, chain=True)
    sys.exit(main(sys.argv[1:]))
