"""A training step of the transformer in parts, each beside the least time it can take here.

    python -m benchmarks.parts                                that of benchmarks.training
    python -m benchmarks.parts --model circuits --threads 1   the preset `circuits`, 4096 tokens
    python -m benchmarks.parts --smoke                        tiny, in seconds

Every kernel is timed in the step itself; what is between kernels is the optimizer, and the rest.
The parts are those of the median step, so they add up to it. docs/benchmarks.md has the bounds.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import cases, report, run
from benchmarks.devices import Device
from benchmarks.report import Row, number
from benchmarks.roofline import Peaks, Work, count_work
from benchmarks.transformer import jobs, measure
from sparse_kernels import cpu, ops, transformer_ops
from sparse_kernels.layout import FanInLayout
from sparse_transformer.presets import PRESETS

STEPS, SMOKE_STEPS = 25, 3
# Vector multiplications, with or without an addition, of an exponential and of GELU: see
# csrc/cpu/simd_math.h.
EXP, GELU = 11, 23
_KERNELS = [(cpu, op.schema.partition("(")[0]) for op in ops.TABLE]
_KERNELS += [(cpu, "try_spmm"), (cpu, "try_grad_weight"), (transformer_ops, "token_losses_")]


@dataclass(frozen=True)
class Options(run.Options):
    model: Literal["default", "circuits"] = "default"
    """That of benchmarks.training, or that of the preset."""


def plan(options: Options, _: Device) -> list[jobs.Case]:
    if options.smoke:
        return [jobs.Case(jobs.SMOKE_MODEL, "sparse", batch=2)]
    if options.model == "default":
        return [jobs.Case(jobs.MODEL, "sparse")]
    settings = PRESETS[options.model]
    batch = settings.train.batch_tokens // settings.model.context
    return [jobs.Case(settings.model, "sparse", batch=batch)]


def bytes_of(*values: Any) -> int:
    """Bytes of the distinct tensors in them."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return sum({(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}.values())


def layout_in(arguments: Sequence[Any]) -> FanInLayout | None:
    """The layout among them."""
    return next((value for value in arguments if isinstance(value, FanInLayout)), None)


def work_of(name: str, arguments: Sequence[Any], result: Any) -> Work:
    """What a call of a kernel has to do."""
    if (layout := layout_in(arguments)) is not None:
        sizes = layout.in_features, layout.out_features, layout.blocks_per_row * layout.block[1]
        dtype = next(n for n, dtype in cases.DTYPES.items() if dtype == arguments[0].dtype)
        return count_work(cases.Case(len(arguments[0]), *sizes, layout.block, dtype), name)
    products = 0
    if name.startswith("attention"):
        B, T, *_, d = arguments[0].shape  # q, or qkv
        heads = arguments[0].shape[-2]
        products = B * heads * T * (T + 1) // 2 * (EXP + d * (5 if "backward" in name else 2))
    elif name == "token_losses_":
        products = arguments[0].numel() * (EXP + 1)
    elif "gelu" in name:
        products = arguments[-1 if "backward" in name else 0].numel() * GELU
    written = bytes_of(result, arguments[0] if name.endswith("_") else ())
    return Work(2.0 * products, 0, bytes_of(arguments), written)


class Recorder(TorchDispatchMode):
    """The seconds of each kernel and of what is between them; as a mode, what each has to do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.unembedding = model.config.vocab_size, model.config.d_model
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.works: dict[str, list[Work]] = defaultdict(list)
        self.section, self.is_in_kernel, self.counts = "rest", False, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_ours = self.is_in_kernel or func.namespace == "sparse_kernels"
        if not (is_ours or func.is_view or "empty" in func.name()):
            named = zip(func._schema.arguments, args, strict=False)
            changed = [value for about, value in named if about.is_write]
            read, written = bytes_of(args, kwargs), bytes_of(changed, result)
            self.works[self.section].append(Work(0.0, 0, read, written))
        return result

    def wrap(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start, self.is_in_kernel = time.perf_counter(), True
            result = kernel(*arguments)
            seconds, self.is_in_kernel = time.perf_counter() - start, False
            if result is None:  # one that only tried
                return None
            layout = layout_in(arguments)
            is_last = layout and (layout.out_features, layout.in_features) == self.unembedding
            product = name.removeprefix("try_")
            if product == "spmm":
                product = "grad_input" if arguments[4] else "forward"
            part = f"unembed {product}" if is_last else product
            self.seconds[part] += seconds
            self.seconds[self.section] -= seconds
            if self.counts:
                self.works[part].append(work_of(product, arguments, result))
            return result

        return call

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """In the place of the profiler's: what runs in it and is no kernel is a part of its own."""
        start, outer, self.section = time.perf_counter(), self.section, name
        yield
        seconds, self.section = time.perf_counter() - start, outer
        self.seconds[name] += seconds
        self.seconds[outer] -= seconds

    def take(self, step: Callable[[], object]) -> dict[str, float]:
        """One step; the seconds of its parts."""
        self.seconds.clear()
        with contextlib.ExitStack() as stack:
            for module, name in _KERNELS:
                wrapped = self.wrap(name, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, wrapped))
            stack.enter_context(mock.patch.object(jobs, "record_function", self.range))
            start = time.perf_counter()
            step()
            self.seconds[self.section] += time.perf_counter() - start
        return dict(self.seconds)

    def count(self, step: Callable[[], object]) -> None:
        """One step, whose parts are not timed, for `works`."""
        self.counts = True
        with self:
            self.take(step)
        self.counts = False


@torch.enable_grad()
def measure_case(case: jobs.Case, options: Options, device: Device) -> list[dict[str, Any]]:
    """A row for each part."""
    job = jobs.make_job(case, device.name, checks=True)
    recorder, step = Recorder(job.model), job.calls["step"]
    step()
    recorder.count(step)
    taken = [recorder.take(step) for _ in range(SMOKE_STEPS if options.smoke else STEPS)]
    seconds = sorted(taken, key=lambda parts: sum(parts.values()))[len(taken) // 2]
    peaks = device.peaks if isinstance(device.peaks, Peaks) else None
    rows = []
    for part in sorted(seconds, key=lambda part: -seconds[part]):
        works, by = recorder.works[part], defaultdict[str, float](float)
        for work in works:
            if peaks is None:
                break
            terms = peaks.bound_ms(work, case.dtype)
            milliseconds, limit = max((terms[term], term) for term in terms)
            by[limit] += milliseconds
        rows.append(
            case.columns()
            | {
                "part": part,
                "calls": len(works),
                "time_ms": 1e3 * seconds[part],
                "bound_ms": sum(by.values()) or None,
                "limit": max(by, key=by.__getitem__, default=None),
                "correct": job.failure is None,
                "failure": job.failure,
            }
        )
    return rows


def lines(rows: Sequence[Row], style: report.Style = "terminal") -> str:
    """A line for each part, and their sum."""
    bounds = [row["bound_ms"] for row in rows if row["bound_ms"] is not None]
    total = {"part": "step", "calls": sum(row["calls"] for row in rows), "limit": None}
    total |= {"time_ms": sum(row["time_ms"] for row in rows), "bound_ms": sum(bounds) or None}
    return report.table(
        [
            {
                "part": row["part"],
                "calls": row["calls"],
                "ms": number(row["time_ms"]),
                "of the step": f"{row['time_ms'] / total['time_ms']:.0%}",
                "bound, ms": number(row["bound_ms"]),
                "by": row["limit"],
                "of the bound": row["bound_ms"] and f"{row['bound_ms'] / row['time_ms']:.0%}",
            }
            for row in (*rows, total)
        ],
        style,
    )


def closing(rows: Sequence[Row]) -> list[str]:
    """What is wrong."""
    return sorted({row["failure"] for row in rows if not row["correct"]})


text = lines
main = run.Benchmark(
    name="parts",
    description=__doc__,
    cases=plan,
    measure=measure_case,
    options=Options,
    missing=measure.missing,
)

if __name__ == "__main__":
    sys.exit(main())
