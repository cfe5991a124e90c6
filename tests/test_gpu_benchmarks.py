"""The GPU command's own logic, and on a GPU its benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import activation, cases, devices, matmul, run
from benchmarks.gpu import __main__ as everything
from benchmarks.gpu import small
from benchmarks.timing import Budget
from sparse_kernels import cuda

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see -m gpu")


@NO_GPU
def test_small_shapes_find_what_is_wrong(monkeypatch):
    """The triton backend, interpreted; then one that is wrong."""
    names = ("triton", "cpu")
    assert list(small.wrong_products("cpu", names, ["float32"])) == []
    assert list(small.wrong_topk("cpu", names, ["float32"])) == []
    right = small.baselines.ours
    monkeypatch.setattr(small.baselines, "ours", lambda *words: lambda: right(*words)() + 1)
    # Without tokens there are no rows that could be wrong, but for those of the weights.
    wrong = list(small.wrong_products("cpu", ("cpu",), ["float32"]))
    assert len(wrong) == 3 * len(small.SHAPES) - 2


@NO_GPU
@pytest.mark.parametrize("main", [matmul.main, activation.main])
def test_without_a_gpu_it_is_refused_in_one_sentence(main, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--device", "cuda", "--smoke"])
    assert exit_info.value.code == 2
    with pytest.raises(SystemExit) as exit_info:
        everything.main()
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("PyTorch finds no GPU" in line for line in lines)


@pytest.mark.parametrize("size", ["smoke", "default"])
def test_gpu_cases_are_valid_layouts_and_have_the_goals(size):
    found = cases.matmul_cases("cuda", size)
    for case in found:
        block_out, block_in = case.block
        assert case.fan_in <= case.in_features
        assert case.out_features % block_out == case.in_features % block_in == 0
        assert case.fan_in % block_in == 0
    if size == "default":
        assert sum(case.has_goal for case in found) == len(cases.GPU_GOALS)
        assert sum(case.has_goal for case in cases.topk_cases("cuda", size)) == 1


def test_the_plan_fits_eight_minutes_and_its_programs_take_its_options(tmp_path):
    steps = everything.plan(tmp_path)
    assert sum(step.limit_s for step in steps if step.name not in ("others", "tune")) <= 480
    for step in steps + everything.plan(tmp_path, smoke=True):
        words = list(step.command)
        if "--device" in words:
            assert words[2] in ("benchmarks.matmul", "benchmarks.activation")
            options = run.parse(matmul.BENCHMARK, words[3:])
            assert options.json == tmp_path / f"{step.name}.json"
            assert run.why_not(options) in (None, f"--device cuda: {devices.why_not('cuda')}")
        for word in words:
            assert not word.startswith("tests/") or (ROOT / word).is_file()


def test_a_step_is_logged_judged_and_ended_in_time(tmp_path):
    log = tmp_path / "log"

    def end(code, limit_s=60.0):
        step = everything.Step("test", limit_s, (sys.executable, "-c", code), {"WHERE": "here"})
        return everything.run(step, log)

    assert end("import os; print('in', os.environ['WHERE'])")["ending"] == "passed"
    assert log.read_text() == "in here\n"
    assert end("import sys; sys.exit(3)")["ending"] == "exit status 3"
    late = end("import time; print('waiting', flush=True); time.sleep(60)", 0.5)
    assert late["ending"] == "stopped after 0 s"
    assert late["seconds"] < 30
    missing = everything.run(everything.Step("profile", 1, ("no-such-profiler",)), log)
    assert missing["ending"] == "no-such-profiler is not installed"


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
    call = {"ours": lambda: x @ x}
    events, _ = machine.interleave(call, Budget(0.1, 5), estimates={"ours": 1.0})
    graphs, how = machine.interleave(call, Budget(0.1, 5), estimates={"ours": 1e-4})
    assert how.startswith("CUDA graphs")
    ratio = events["ours"].median_ms / graphs["ours"].median_ms
    assert 0.5 < ratio < 2
