"""The benchmarks' GPU half. Without a GPU it measures the CPU through a stand-in for torch.cuda."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import activation, baselines, devices, matmul, problems, report, roofline
from benchmarks.gpu import __main__ as everything
from benchmarks.gpu import baselines as gpu_baselines
from benchmarks.gpu import ceilings, clock, small
from benchmarks.gpu.machine import Gpu
from sparse_kernels import cuda

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see -m gpu")


class Event:
    """The processor's clock in the shape of an event."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.seconds - self.seconds) * 1e3


class Graph:
    """Remembers how often it was replayed."""

    made: list[Graph] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        time.sleep(1e-4)


class Context:
    """Any context of torch.cuda."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch):
    """What the clock and the machine use of torch.cuda, on the processor."""
    properties = SimpleNamespace(
        name="NVIDIA Stand-in 1", major=9, minor=0, multi_processor_count=1,
        total_memory=2**34, L2_cache_size=2**20,
    )  # fmt: skip
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Context,
        "stream": Context,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(clock, "FLUSH_MIN_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "RUNS", 2)
    Graph.made.clear()
    return Gpu(torch.device("cpu"))


def test_every_call_starts_after_the_buffer_was_written(stand_in):
    seen = []
    gpu_clock = stand_in._clock
    assert gpu_clock.flushed_bytes == 4 * 2**20
    seconds = gpu_clock.sample_s(
        lambda: (seen.append(int(gpu_clock._buffer[0])), time.sleep(2e-3)), 3
    )
    assert seen == [1, 2, 3]
    assert int(gpu_clock._buffer.min()) == int(gpu_clock._buffer.max()) == 3
    # The mean of the calls, without the writing.
    assert 2e-3 <= seconds < 1


def test_short_calls_become_graphs_and_what_cannot_is_named(stand_in, monkeypatch):
    calls = {"fast": 0, "slow": 0, "waits": 0}

    def call(name):
        def run():
            calls[name] += 1

        return run

    capture = clock.capture

    def picky(function):
        if function is candidates["waits"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(function)

    candidates = {name: call(name) for name in calls}
    monkeypatch.setattr(clock, "capture", picky)
    guesses = {"fast": 1e-5, "slow": 1e-2, "waits": 1e-3}
    timings, how = stand_in.interleave(candidates, budget_s=0, repeats=3, estimates=guesses)
    assert how == "CUDA graphs (not waits), cold L2"
    assert set(timings) == set(calls)
    # Before and during the capture; after it the graph is replayed, 20 times a sample if short.
    assert calls == {"fast": 2, "slow": 2, "waits": 3}
    assert [graph.replays for graph in Graph.made] == [3 * 20, 3]
    Graph.made.clear()
    guesses = {"fast": 1e-3, "slow": 1e-2, "waits": 1e-3}
    _, how = stand_in.interleave(candidates, budget_s=0, repeats=3, estimates=guesses)
    assert how == "events, cold L2"
    assert Graph.made == []


def test_warming_up_does_not_count(stand_in):
    """A first call that compiles for longer than the slowest candidate may take is no estimate."""
    first = [True]

    def compiles():
        if first[0]:
            first[0] = False
            time.sleep(1.2)

    assert stand_in.estimate_s({"compiles": compiles})["compiles"] < 0.5


def test_rows_of_a_gpu(stand_in, tmp_path):
    case = problems.Case(33, 64, 128, 32, (16, 16), "bfloat16")
    stand_in.prepare(smoke=True)
    with torch.no_grad():
        rows = matmul.measure_case(case, "reference", stand_in, budget_s=0.0, repeats=2)
    machine = stand_in.describe(["-m", "benchmarks.matmul", "--device", "cuda"])
    assert machine["gpu"]["capability"] == "9.0"
    assert set(machine["ceilings"]["dense_tflops"]) == {"float32", "tf32", "bfloat16", "float16"}
    for row in rows:
        assert row["correct"]
        assert row["backend"] == "reference"
        assert row["timed"].endswith("cold L2") or row is rows[-1]
        assert row["best_dense_kind"] == "cuBLAS bf16"
        for name in ("time_ms", "masked_dense_ms", "dense_ms", "bound_ms"):
            assert math.isfinite(row[name])
            assert row[name] > 0
        assert row["compiled_masked_ms"] is None
        row["device"] = "cuda"
    assert rows[-1]["time_ms"] == pytest.approx(sum(row["time_ms"] for row in rows[:-1]))
    path = tmp_path / "rows.json"
    report.write_json(path, machine, rows, complete=True)
    rows[-1]["headline"] = True
    table = report.markdown({"machine": machine, "rows": rows})
    assert "NVIDIA Stand-in 1 (16.0 GiB, 1 multiprocessors" in table
    assert "| 33 | 64, 128, 32 | 16x16 | bfloat16 |" in table
    assert report.main([str(path)]) == 0
    lines = report.full_table(json.loads(path.read_text())["rows"])
    assert max(map(len, lines)) <= 150
    assert any("BSR" in line and "compil." in line for line in lines)


def test_goals_of_a_gpu():
    rows = []
    for product, ms in (("forward", 1.0), ("step", 5.0)):
        case = problems.Case(16384, 4096, 4096, 416, (32, 32), "bfloat16")
        row = matmul.describe_row(case, product, "triton", "cuda")
        rows.append(row | {"correct": True, "time_ms": ms, "dense_ms": 4.0})
    lines = report._gpu_goals(rows)
    assert len(lines) == 2
    assert "4.00x   goal  3.00x   reached" in lines[0]
    assert "0.80x   goal  2.50x   missed" in lines[1]
    assert set(report.GPU_GOALS) == set(problems.GPU_TARGETS)


@pytest.mark.parametrize("product", problems.PRODUCTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_rivals_compute_the_product(product, dtype, block, stand_in, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    operands = baselines.Operands.draw(problems.Case(40, 64, 48, 32, block, dtype))
    truth = {
        "forward": lambda: operands.x.double() @ operands.weight.double().t(),
        "grad_input": lambda: operands.grad_output.double() @ operands.weight.double(),
        "grad_weight": lambda: operands.grad_output.double().t() @ operands.x.double(),
    }[product]()
    masked = truth * operands.mask if product == "grad_weight" else truth
    dense = gpu_baselines.dense_candidates(operands, product)
    assert gpu_baselines.same_dtype(operands) in dense
    sparse, notes = gpu_baselines.sparse_candidates(operands, product)
    forms = {
        **gpu_baselines.masked_candidates(operands, product, compiled=True),
        **{f"{kind} {name}": call for kind, of in sparse.items() for name, call in of.items()},
    }
    assert {"masked dense", "compiled masked"} <= set(forms)
    assert {"csr", "bsr"} == set(sparse) | {note[6:9] for note in notes}
    for name, call in forms.items():
        result = call()
        result = result.to_dense() if result.layout != torch.strided else result
        torch.testing.assert_close(result.double(), masked.double(), atol=0.3, rtol=0.02, msg=name)
    for name, call in dense.items():
        if call() is not None:  # those that set the precision return nothing
            torch.testing.assert_close(call().double(), truth, atol=0.3, rtol=0.02, msg=name)


def test_bound_by_hand():
    peaks = ceilings.GpuCeilings({"bfloat16": 100.0}, 1000.0)
    work = roofline.Work(flops=2e12, operand_bytes=0, read_bytes=10**9, write_bytes=10**9)
    bound = ceilings.bound(work, peaks, "bfloat16")
    assert (bound.compute_ms, bound.memory_ms) == (pytest.approx(20.0), pytest.approx(2.0))
    assert (bound.ms, bound.limit) == (bound.compute_ms, "compute")


def test_tf32_is_put_back():
    before = torch.backends.cuda.matmul.allow_tf32
    with ceilings.tf32(not before):
        assert torch.backends.cuda.matmul.allow_tf32 is not before
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_activation_rows_of_a_gpu(stand_in):
    stand_in.prepare(smoke=True)
    cases = activation.list_cases(smoke=True, device="cuda")
    assert {case.dtype for case in cases} == set(problems.DTYPES)
    rows = activation.measure_case(cases[0], stand_in, 0.0, 2)
    assert [row["error"] for row in rows] == [0, 0]
    assert all(row["timed"].endswith("cold L2") for row in rows)
    goal = activation.GOALS["cuda"]
    row = rows[0] | {"device": "cuda", "M": goal.tokens, "D": goal.width, "k": 2048}
    row |= {"dtype": goal.dtype, "time_ms": 1.0, "torch_ms": 25.0}
    assert activation.summary_lines([row])[0].endswith(
        "25.0x over torch.topk + scatter, wanted 20x: met"
    )


@NO_GPU
def test_small_shapes_find_what_is_wrong(monkeypatch):
    """The triton backend, interpreted; then one that is wrong."""
    monkeypatch.setattr(small, "DTYPES", {"float32": torch.float32})
    assert list(small.wrong_products("cpu", ("triton", "cpu"))) == []
    assert list(small.wrong_topk("cpu", ("triton", "cpu"))) == []
    right = small.run
    monkeypatch.setattr(small, "run", lambda *words: right(*words) + 1)
    # The case without tokens has nothing but zeros in grad_weight to be wrong.
    assert len(list(small.wrong_products("cpu", ("cpu",)))) == 3 * len(small.SHAPES) - 2


@NO_GPU
@pytest.mark.parametrize("main", [matmul.main, activation.main, everything.main])
def test_without_a_gpu_one_sentence(main, capsys):
    words = [] if main is everything.main else ["--device", "cuda"]
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code == 2
    assert "PyTorch finds no GPU" in capsys.readouterr().err


def test_the_plan_calls_what_there_is(tmp_path):
    commands = everything.plan(
        gpu_name="h100", day="2026-01-02", out=tmp_path, smoke=True, steps=everything.STEPS
    )
    assert [c.step for c in commands] == [
        "build", "test", *["sanitize"] * 3, "targets", "others", "activation", "break_even",
        "tune",
    ]  # fmt: skip
    by_step = {command.step: command for command in commands}
    for step in ("targets", "others", "tune"):
        words = by_step[step].words
        options = matmul.build_parser().parse_args(words[words.index("benchmarks.matmul") + 1 :])
        assert options.device == "cuda"
        assert options.smoke
        assert options.json == tmp_path / f"matmul-{step}-h100-2026-01-02.json"
    assert by_step["activation"].words[-1] == str(tmp_path / "activation-h100-2026-01-02.json")
    assert by_step["build"].words[1] == "setup.py"
    assert by_step["build"].environment == {"SPARSE_KERNELS_CUDA": "1"}
    assert "benchmarks.gpu.small" in by_step["sanitize"].words
    some = everything.plan(gpu_name="x", day="d", out=tmp_path, smoke=False, steps=["tune"])
    assert [command.step for command in some] == ["tune"]
    options = matmul.build_parser().parse_args(some[0].words[3:])
    assert (options.part, options.backend) == ("targets", "triton")
    assert some[0].environment == {"SPARSE_KERNELS_TRITON_TUNE": "1"}
    assert everything.short_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_a_failing_build_stops_what_needs_it_and_nothing_else():
    test = everything.Command("test", (sys.executable,))
    assert everything.why_not(test, []) is None
    assert everything.why_not(test, ["sanitize"]) is None
    assert everything.why_not(test, ["build"]) == "the build failed"
    missing = everything.Command("sanitize", ("no-such-sanitizer",))
    assert everything.why_not(missing, []) == "no-such-sanitizer is not installed"


def test_a_command_is_logged_judged_and_ended_in_time(tmp_path, capsys):
    log = tmp_path / "log"

    def run(code, limit_s=60.0):
        command = everything.Command("build", (sys.executable, "-c", code), {"WHERE": "here"})
        return everything.run(command, log, limit_s)

    good = run("import os; print('in', os.environ['WHERE'])")
    assert good.is_good
    assert "in here" in log.read_text()
    assert "in here" in capsys.readouterr().out
    bad = run("import sys; print('oh'); sys.exit(3)")
    assert (bad.status, bad.is_good) == (3, False)
    late = run("import time; print('waiting', flush=True); time.sleep(60)", 0.5)
    assert (late.status, late.is_good) == (None, False)
    assert late.seconds < 30
    assert "out of time" in log.read_text()


def test_a_case_that_cannot_run_does_not_end_the_run(monkeypatch, capsys):
    right = matmul.measure_case

    def measure(case, *words, **options):
        if case.block == (16, 1):
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return right(case, *words, **options)

    monkeypatch.setattr(matmul, "measure_case", measure)
    words = ["--smoke", "--tokens", "33", "--dtype", "float32", "--repeats", "1"]
    assert matmul.main(words) == 1
    printed = capsys.readouterr().out
    assert "16x1 float32: FAIL, CUDA out of memory." in printed
    assert "16x16" in printed
    assert "1 of 3 cases did not run" in printed


def test_cases_of_another_backend_are_left_out_and_named(capsys):
    words = ["--smoke", "--tokens", "33", "--backend", "triton", "--repeats", "1"]
    if torch.cuda.is_available():
        pytest.skip("the interpreted backend is for machines without a GPU")
    assert matmul.main([*words, "--block", "16x16"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        matmul.main([*words, "--block", "16x1"])
    assert "the backend triton cannot run here" in capsys.readouterr().err


def test_gpu_cases_fit_and_hold_every_promise():
    cases = problems.gpu_cases()
    assert len(set(cases)) == len(cases)
    for target in problems.GPU_TARGETS:
        assert sum(case.is_target for case in cases if case.fan_in == target[2]) >= 1
    assert sum(case.is_target for case in cases) == len(problems.GPU_TARGETS)
    for case in [*cases, *problems.gpu_full_cases(), *problems.gpu_smoke_cases()]:
        assert case.fan_in % case.block[1] == 0
        assert case.out_features % case.block[0] == 0
        assert case.in_features % case.block[1] == 0
        assert case.fan_in <= case.in_features


def test_the_readme_says_what_was_measured():
    """The GPU's table comes from a committed result, or says that nothing was measured."""
    begin, end = report.MARKS["cuda"]
    text = (ROOT / "README.md").read_text()
    table = text.partition(begin)[2].partition(end)[0].lstrip("\n")
    results = sorted((ROOT / "benchmarks" / "results").glob("matmul-*.json"))
    contents = [json.loads(path.read_text()) for path in results]
    measured = [c for c in contents if report.device_of(c["rows"]) == "cuda"]
    allowed = [report.markdown(content) for content in measured] or [report.not_measured()]
    assert table in allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_smoke_on_a_gpu(tmp_path):
    for module in ("matmul", "activation"):
        path = tmp_path / f"{module}.json"
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", "--device", "cuda", "--smoke",
             "--json", str(path)],
            cwd=ROOT, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        content = json.loads(path.read_text())
        assert content["complete"]
        assert content["machine"]["gpu"]["name"]


@pytest.mark.gpu
@pytest.mark.skipif(cuda._missing is not None, reason=f"{cuda._missing}")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_time_like_events():
    machine = devices.connect("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    call = {"product": lambda: x @ x}
    events, _ = machine.interleave(call, budget_s=0.1, repeats=5, estimates={"product": 1.0})
    graphs, how = machine.interleave(call, budget_s=0.1, repeats=5, estimates={"product": 1e-4})
    assert how.startswith("CUDA graphs")
    ratio = events["product"].median_ms / graphs["product"].median_ms
    assert 0.5 < ratio < 2
