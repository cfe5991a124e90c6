"""The GPU command: what it runs and when, its rehearsal, and on a GPU its steps."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tile_estimate as estimate
import torch

import sparse_kernels as sk
from benchmarks import baselines, cases, operations, report
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import steps
from sparse_kernels import cuda

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see -m gpu")
# What the command needs; a machine with a GPU may lack everything else.
NEEDED = ("hypothesis", "ninja", "pybind11", "pytest", "setuptools", "torch", "triton")


@NO_GPU
def test_without_a_gpu_it_is_refused_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as exit_info:
        gpu.main([])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "PyTorch finds no GPU" in line


@pytest.mark.parametrize("size", ["smoke", "default", "full"])
def test_gpu_cases_are_valid_layouts_and_have_the_headlines(size):
    found = cases.matmul_cases("cuda", size)
    for case in found:
        block_out, block_in = case.block
        assert case.fan_in <= case.in_features
        assert case.out_features % block_out == case.in_features % block_in == 0
        assert case.fan_in % block_in == 0
    if size != "smoke":
        wanted = {case for case in cases.HEADLINES if case.tokens == cases.GPU_TOKENS}
        assert len(wanted) == 6
        assert wanted <= {*found, *cases.topk_cases("cuda", size)}


def test_the_plan_ends_after_eight_minutes_and_names_what_there_is(tmp_path):
    plan = gpu.plan(tmp_path)
    ends = [until_s for until_s, _ in plan]
    assert ends == sorted(ends)
    assert ends[-1] <= 480
    names = [name for _, commands in plan for name in commands]
    assert len(names) == len(set(names))
    for _, commands in plan:
        for words in commands.values():
            if "benchmarks.gpu.steps" in words:
                assert words[words.index("benchmarks.gpu.steps") + 1] in steps.STEPS
            assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
    assert "build" not in gpu.plan(tmp_path, builds=False)[0][1]
    assert {"matmul", "tune"} <= {
        name for _, commands in gpu.plan(tmp_path, full=True) for name in commands
    }


def packages_beside(needed):
    """The modules of installed packages that none of these needs."""
    found, todo = set(), list(needed)
    while todo:
        name = re.split(r"[^\w.-]", todo.pop(), maxsplit=1)[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about = importlib.metadata.distribution(name)
            if about.name not in found:
                found.add(about.name)
                todo += [line for line in about.requires or () if "extra" not in line]
    modules = importlib.metadata.packages_distributions()
    # Those of the project are in the checkout.
    own = {"sparse-kernels"}
    return sorted(name for name, homes in modules.items() if not {*homes} & (found | own))


@pytest.mark.slow
def test_the_command_needs_no_package_that_a_gpu_machine_lacks(tmp_path):
    """The command and the tests that it runs load from a checkout, without other packages."""
    lacking = packages_beside(NEEDED)
    assert {"matplotlib", "numpy", "tyro"} <= {*lacking}
    assert not {"torch", "_pytest", "filelock", "hypothesis"} & {*lacking}
    program = f"""
import sys
from importlib.machinery import PathFinder
class Lacking:
    def find_spec(self, name, path=None, target=None):
        # What is installed of the project itself is no checkout.
        if name.partition(".")[0] in {lacking} or "editable" in name:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        if name == "sparse_transformer":
            return PathFinder.find_spec(name, [p for p in sys.path if "site-packages" not in p])
sys.meta_path[:] = [Lacking(), *(f for f in sys.meta_path if "editable" not in str(f).lower())]
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests/transformer")!r}]
import benchmarks.gpu.__main__, benchmarks.gpu.steps
import {", ".join(Path(name).stem for name in gpu.TESTS)}
print(*sorted(sys.modules.keys() & set({lacking})))
print(sys.modules["sparse_transformer"].__file__)
"""
    # Triton's interpreter needs numpy; a GPU does not.
    hidden = ("TRITON_INTERPRET", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    loaded, where = done.stdout.splitlines()
    assert loaded == ""
    assert where == str(ROOT / "python/sparse_transformer/__init__.py")


def test_estimates_follow_the_counts_and_say_what_they_are():
    tile = {"tile": (256, 64, 8, 5), "loop": 150}
    case = cases.Case(cases.GPU_TOKENS, 8192, 8192, 896, (128, 128), "bfloat16")
    once = estimate.terms_us(case, "forward", tile)
    twice = estimate.terms_us(case, "forward", {**tile, "loop": 300})
    # 64 tiles of tokens x 64 block-rows x 14 steps x 8 warps x 150 over 132 x 4 x 1.7 GHz
    assert once["issue"] == pytest.approx(64 * 64 * 14 * 8 * 150 / (132 * 4 * 1.7e3))
    assert twice == {**once, "issue": 2 * once["issue"]}
    # 16384 / 8 vectors of 4 weights for each of 4096 outputs, 8 rows of them in 1.91 passes
    unstructured = cases.Case(cases.GPU_TOKENS, 4096, 4096, 4, dtype="bfloat16")
    passes = 16384 / 8 * 4096 * 4 / 8 * 1.91
    assert estimate.terms_us(unstructured, "forward", None)["shared"] == pytest.approx(
        passes / (132 * 1.7e3)
    )
    # 512 tiles of 32 tokens x 512 blocks of 128 weights x 198, and 34 for 1024 elements of x
    wide = cases.Case(cases.GPU_TOKENS, 2048, 8192, 8, dtype="bfloat16")
    issued = 512 * 512 * 198 + 16384 * 2048 / 1024 * 34
    assert estimate.terms_us(wide, "forward", None)["issue"] == pytest.approx(
        issued / (132 * 4 * 1.7e3)
    )
    # as many bytes as the review of the kernels counted for this case: 3.76 GB with 128 tokens
    small = estimate.terms_us(case, "forward", {**tile, "tile": (128, 64, 8, 5)})
    assert small["L2"] * estimate.L2_BYTES_S == pytest.approx(3.76e9 * 1e6, rel=0.01)

    class Tiles:
        def __getitem__(self, key):
            return tile

    first, *lines = estimate.lines(Tiles())
    assert first.startswith("ESTIMATES")
    assert "nothing here was measured" in first
    assert [line for line in lines if "1x1" in line and "at least" not in line] == []
    assert sum("goal" in line for line in lines) == 2 * (5 + 3)
    assert sum("(cuda)" in line for line in lines) == 4 * 3


def test_estimates_of_the_kernels_for_hopper():
    case = cases.Case(cases.GPU_TOKENS, 8192, 8192, 896, (128, 128), "bfloat16")
    forward, grad_weight = (estimate.hopper_terms_us(case, n) for n in ("forward", "grad_weight"))
    # 32 clusters of tokens x 64 block-rows x 14 steps, in each two of 256 tokens and one of weights
    steps = 32 * 64 * 14
    assert forward["L2"] == pytest.approx(steps * (512 + 128) * 128 / 5.5e6)
    assert forward["issue"] == pytest.approx(steps * 2 * 8 * 68 / (132 * 4 * 1.7e3))
    assert forward["compute"] == pytest.approx(2 * 16384 * 8192 * 896 / 790e6)
    # 64 rows in two groups of 4 and 3 blocks, each with the row's dY
    assert grad_weight["L2"] == pytest.approx(16384 * 64 * (7 + 2) * 128 * 2 / 5.5e6)
    assert grad_weight["compute"] == pytest.approx(8 / 7 * forward["compute"])


def test_estimates_of_the_kernel_for_blocks_of_32():
    """The columns that a group reads are those of a random layout."""
    case = cases.Case(cases.GPU_TOKENS, 4096, 4096, 416, (32, 32), "bfloat16")
    layout = sk.FanInLayout.random(4096, 4096, 416, (32, 32))
    for product, lists in (("forward", "rows"), ("grad_input", "columns")):
        terms = estimate.block_32_terms_us(case, product)
        members, begins, *_ = cuda.build_groups(layout, lists)
        # 128 tiles of 128 tokens: x of each column of 6 groups, and all weights
        loaded = 128 * (begins[-1].item() * 128 * 64 + 128 * 13 * 2048)
        assert members.shape == (6, estimate.GROUP_ROWS)
        assert terms["L2"] == pytest.approx(loaded / 5.5e6, rel=0.03)
        # 12 rounds of 768 jobs, of 128 / 12 block-rows in a block of threads, 3 in 11 a scheduler
        clocks = 12 * 128 / 12 * 13 * 64 * 8 * 3 / 11
        assert terms["compute"] == pytest.approx(clocks / 1.7e3)
        assert terms["issue"] == pytest.approx(12 * 128 / 12 * 13 * 260 / 4 / 1.7e3)


# ---- running commands


def run_group(tmp_path, until_s, commands):
    return gpu.run(until_s, commands, gpu.Record(tmp_path))


def rows(tmp_path):
    return json.loads((tmp_path / "gpu.json").read_text())["rows"]


def test_rows_are_kept_apart_from_the_log_and_failures_are_named(tmp_path):
    printed = ["words", '{"step": "a", "n": 1}', "{cut", "{}", '"0","spmm","3.1"']
    printed.append('{"step": "a", "n"a warning of another thread: 2}')
    code = f"print(*{printed!r}, sep='\\n'); raise SystemExit(3)"
    commands = {"a": [sys.executable, "-c", code], "b": ["no-such-profiler"], "c": ["true"]}
    commands["d"] = ["A=1", "no-such-sanitizer", "--tool"]
    assert sorted(run_group(tmp_path, gpu.FOREVER, commands)) == [
        "exit status 3", "no-such-profiler is not installed",
        "no-such-sanitizer is not installed", "passed",
    ]  # fmt: skip
    found = rows(tmp_path)
    assert {"step": "a", "n": 1} in found
    assert {"step": "a", "ncu": ["0", "spmm", "3.1"]} in found  # a line of ncu's table
    assert [row["ended"] for row in found if row["step"] == "a" and "ended" in row] == [
        "exit status 3"
    ]
    assert (tmp_path / "a.log").read_text().splitlines()[1:] == printed


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Prints a row with the number of a child, then waits.
WAITS = """
import json, subprocess, time
child = subprocess.Popen(["sleep", "600"])
print(json.dumps({"step": "waits", "child": child.pid}), flush=True)
time.sleep(600)
"""


def gone(pid):
    """Whether the process ends within a minute."""
    for _ in range(600):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    (ended,) = run_group(tmp_path, 8, {"late": [sys.executable, "-c", WAITS]})
    assert ended.startswith("stopped after ")
    first, last = rows(tmp_path)
    assert gone(first["child"])
    assert last["ended"] == ended
    late = run_group(tmp_path, 0, {"too-late": ["true"]})
    assert late == ["not started"]


# Says where it was if it is interrupted, as pytest does, or takes no notice.
SPEAKS = """
import time
print("{\\"step\\": \\"speaks\\"}", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("it was here", flush=True)
    raise SystemExit(2)
"""


@pytest.mark.slow
def test_what_is_stopped_may_say_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 600)
    assert run_group(tmp_path, 8, {"speaks": [sys.executable, "-c", SPEAKS]})[0].startswith(
        "stopped after "
    )
    assert (tmp_path / "speaks.log").read_text().splitlines()[-1] == "it was here"


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interruption_leaves_the_rows_that_came_before(tmp_path, signal_number):
    program = f"""
import sys
from benchmarks.gpu import __main__ as gpu
gpu.plan = lambda *_, **__: [(1e6, {{"waits": [sys.executable, "-c", {WAITS!r}]}})]
sys.exit(gpu.main(["--rehearse", "--out", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    path, found = tmp_path / "gpu.json", []
    while not found:
        time.sleep(0.1)
        assert process.poll() is None
        found = rows(tmp_path) if path.exists() else []
    process.send_signal(signal_number)
    status = process.wait(timeout=60)
    content = report.read_json(path)
    assert not content["complete"]
    assert content["rows"][0] == found[0]
    if signal_number == signal.SIGKILL:
        os.killpg(os.getpgid(found[0]["child"]), signal.SIGKILL)
    else:
        assert status == report.INTERRUPTED
        assert gone(found[0]["child"])


# ---- the whole of it

SANITIZER = """#!/bin/sh
[ "$1 $2 $3" = "--error-exitcode 1 --tool" ] || exit 9
shift 4
exec "$@"
"""
PROFILER = """#!/bin/sh
[ "$1 $2 $3 $4 $5 $6" = "--profile-from-start off --clock-control none --csv --metrics" ] || exit 9
shift 7
"$@" || exit
echo '"ID","Kernel Name","Metric Name","Metric Value"'
echo '"0","spmm_kernel","dram__bytes.sum.per_second","3.1"'
"""


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path):
    """On the CPU: emulated and interpreted kernels, and programs in the place of NVIDIA's tools."""
    for name, script in (("compute-sanitizer", SANITIZER), ("ncu", PROFILER)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = report.read_json(tmp_path / "out" / "gpu.json")
    assert content["complete"]
    assert content["machine"]["command"] == "python -m benchmarks.gpu --rehearse"
    found = content["rows"]
    names = {name for _, commands in gpu.plan(tmp_path, rehearse=True) for name in commands}
    assert {row["step"]: row["ended"] for row in found if "ended" in row} == dict.fromkeys(
        names, "passed"
    )
    found = [row for row in found if "ended" not in row]
    measured = [row for row in found if row["step"] == "goal" and "block" in row]
    assert all(row["masked_dense_ms"] > 0 and row["dense_ms"] > 0 for row in measured)
    assert {(row["block"], row["product"], row["backend"]) for row in measured} == {
        (block, product, backend)
        for product in (*cases.PRODUCTS, "step")
        for block, backend in (
            ("1x1", "cuda"),
            ("32x32", "cuda"),
            ("32x32", "triton"),
            ("64x64", "cuda"),
            ("64x64", "triton"),
        )
    }
    assert all(row["correct"] and row["time_ms"] > 0 for row in measured)
    others = [row for row in found if row["step"] in ("goal", "fused") and "op" in row]
    assert all(row["correct"] and row["time_ms"] > 0 for row in others)
    assert {(row["op"], row["backend"]) for row in others} == {
        (f"{change}abs_topk", backend)
        for change in ("", "gelu_", "rms_norm_") for backend in ("cuda", "triton")
    } | {("attention", "torch")}  # fmt: skip
    assert all(row["plain_ms"] > 0 < row["without_sinks_ms"] for row in others if "B" in row)
    assert "FAILED" not in done.stdout
    assert "WRONG" not in done.stdout
    assert {row["step"] for row in found} >= {"check", "compile", "ceilings", "profile", "machine"}


def test_a_wrong_kernel_has_no_time_and_fails_the_step(monkeypatch, capsys):
    bench = steps.Bench(steps.Device(), [cases.Case(5, 8, 8, 2)], [], [], steps.Limits(0.01))
    monkeypatch.setattr(steps, "BACKENDS", ("cpu",))
    right = baselines.ours

    def wrong(operands, product, backend):
        call = right(operands, product, backend)
        return (lambda: call() + 1) if product == "grad_input" else call

    monkeypatch.setattr(baselines, "ours", wrong)
    monkeypatch.setattr(steps, "connect", lambda rehearse: bench)
    assert steps.main(["goal", "0"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["correct"] for row in found] == [True, False, True, False]
    assert ["time_ms" in row for row in found] == [True, False, True, False]
    said = list(gpu.verdicts(found))
    assert len(said) == 2
    assert said[0].startswith("WRONG: cpu 8->8 fan-in 2 1x1 float32 M=5 grad_input, error ")


def test_a_backend_that_raises_leaves_the_others(monkeypatch, capsys):
    """As a kernel does that the device refuses: each is measured alone."""
    case = cases.Case(5, 8, 8, 2)
    bench = steps.Bench(steps.Device(), [case], [], [], steps.Limits(0.01))
    monkeypatch.setattr(steps, "BACKENDS", ("cpu", "reference"))
    right = baselines.ours

    def refused(operands, product, backend):
        def raises():
            raise RuntimeError("too many resources requested for launch")

        return (
            raises
            if (product, backend) == ("grad_input", "cpu")
            else right(operands, product, backend)
        )

    monkeypatch.setattr(baselines, "ours", refused)
    monkeypatch.setattr(steps, "connect", lambda rehearse: bench)
    assert steps.main(["goal", "0"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["backend"] for row in found if "failed" in row] == ["cpu"]
    whole = [row for row in found if row.get("product") == "step"]
    assert [(row["backend"], row["correct"]) for row in whole] == [("reference", True)]
    message = "RuntimeError: too many resources requested for launch"
    assert list(gpu.verdicts(found)) == [f"FAILED: cpu {case}: {message}"]


def test_a_goal_that_no_backend_can_run_fails(monkeypatch, capsys):
    bench = steps.Bench(steps.Device(), [cases.Case(5, 8, 8, 2)], [], [], steps.Limits(0.01))
    monkeypatch.setattr(steps, "BACKENDS", ("cuda",))
    monkeypatch.setattr(steps, "connect", lambda rehearse: bench)
    assert steps.main(["goal", "0"]) == 1
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert row["failed"].startswith("no backend can run it")


@pytest.mark.parametrize("case", [*cases.REHEARSED_FUSED, cases.REHEARSED[-1]], ids=str)
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_a_wrong_fused_result_is_found(case, step):
    """One entry more or less, or one that is larger by a tenth."""
    backend = "torch" if isinstance(case, cases.AttentionCase) else "cpu"
    for operation in operations.of(case, "cpu", [backend]):
        if not operation.product.endswith(step):
            continue
        right = operation.ours[backend]()
        assert operation.check(backend, right).correct
        largest = right[-1].abs().argmax()
        for change in (0.0, 1.1):
            wrong = right.clone()
            wrong[-1].view(-1)[largest] *= change
            assert not operation.check(backend, wrong).correct
        if (dropped := right == 0).any():
            wrong = right + dropped * right.abs().max() / 8
            assert not operation.check(backend, wrong).correct


def test_verdicts_say_how_far_each_goal_is():
    row = {"step": "goal", **cases.REHEARSED[0].columns, "product": "forward", "correct": True}
    found = [
        {**row, "backend": name, "goal": 6.0, "time_ms": ms, "dense_ms": 4.0}
        for name, ms in (("triton", 2.0), ("cuda", 1.0))
    ]
    found += [
        {"step": "profile", "ended": "ncu is not installed"},
        {"step": "goal-0", "ended": "passed"},
    ]
    assert list(gpu.verdicts(found)) == [
        "FAILED: profile: ncu is not installed (see profile.log)",
        "24->40 fan-in 3 1x1 bfloat16 M=17 forward: 4.00 times with cuda, goal 6",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_small_problems_are_right_on_a_gpu(backend):
    command = [sys.executable, "-m", "benchmarks.gpu.steps", "check", backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["backend"] for row in found} == {backend}
    assert all(row["correct"] for row in found)
