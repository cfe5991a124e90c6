"""The GPU command's own logic, and on a GPU its benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import devices
from benchmarks.gpu import __main__ as everything
from benchmarks.gpu import small
from benchmarks.timing import Budget
from sparse_kernels import cuda

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see -m gpu")


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
    events, _ = machine.interleave(call, Budget(0.1, 5), estimates={"product": 1.0})
    graphs, how = machine.interleave(call, Budget(0.1, 5), estimates={"product": 1e-4})
    assert how.startswith("CUDA graphs")
    ratio = events["product"].median_ms / graphs["product"].median_ms
    assert 0.5 < ratio < 2
