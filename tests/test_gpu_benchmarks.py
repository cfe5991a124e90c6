"""The GPU command's own logic, and on a GPU its benchmarks."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

from benchmarks import activation, cases, devices, gpu, matmul, run

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see -m gpu")


@NO_GPU
@pytest.mark.parametrize("main", [matmul.main, activation.main])
def test_without_a_gpu_it_is_refused_in_one_sentence(main, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--device", "cuda", "--smoke"])
    assert exit_info.value.code == 2
    with pytest.raises(SystemExit) as exit_info:
        gpu.main()
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("PyTorch finds no GPU" in line for line in lines)


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


def test_the_plan_fits_eight_minutes_and_its_programs_take_its_options(tmp_path):
    steps = gpu.plan(tmp_path)
    assert sum(limit_s for _, limit_s, _ in steps) <= 480
    for name, _, command in steps + gpu.plan(tmp_path, smoke=True):
        words = shlex.split(command)
        if "--device" in words:
            start = words.index("--device")
            assert words[start - 1] in ("benchmarks.matmul", "benchmarks.activation")
            options = tyro.cli(matmul.Options, args=words[start:])
            assert options.check != (options.json == tmp_path / f"{name}.json")
            assert run.why_not(options) in (None, f"--device: {devices.why_not('cuda')}")
        for word in words:
            assert not word.startswith("tests/") or (ROOT / word).is_file()


def test_a_command_is_logged_judged_and_ended_in_time(tmp_path):
    log = tmp_path / "log"

    def end(code, limit_s=60.0):
        words = ["env", "WHERE=here", sys.executable, "-c", code]
        return gpu.run(shlex.join(words), limit_s, log)

    assert end("import os; print('in', os.environ['WHERE'])") == "passed"
    assert log.read_text() == "in here\n"
    assert end("import sys; sys.exit(3)") == "exit status 3"
    start = time.monotonic()
    late = end("import time; print('waiting', flush=True); time.sleep(60)", 0.5)
    assert late == "stopped after 0 s"
    assert time.monotonic() - start < 30
    assert gpu.run("no-such-profiler", 1, log) == "no-such-profiler is not installed"


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
