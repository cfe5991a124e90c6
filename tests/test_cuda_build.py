"""Every CUDA source compiles for every target, without spilling and within shared memory."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = ["sm_80", "sm_90a", "sm_100"]
# Registers of a multiprocessor, and threads of a block: what a thread may have.
MAX_REGISTERS = 2**16 // 512

nvcc = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(nvcc is None, reason="nvcc was not found")


def known_targets():
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    return done.stdout.split()


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_without_spilling(source, target, tmp_path):
    if target.rstrip("a") not in known_targets():
        pytest.skip(f"this nvcc does not know {target}")
    command = [nvcc, "-std=c++17", "-O3", f"-arch={target}", "-Xptxas", "-v", "-cubin"]
    command += [str(source), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", done.stderr)
    kernels = re.findall(r"Used (\d+) registers(.*)", done.stderr)
    assert kernels
    assert len(spills) == len(kernels)
    assert set(spills) == {("0", "0", "0")}
    assert max(int(registers) for registers, _ in kernels) <= MAX_REGISTERS
    # All of it is asked for at launch, where it is held against the device's limit.
    assert not [more for _, more in kernels if "smem" in more]


@pytest.fixture
def setup_module(monkeypatch):
    """setup.py, without running it."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("sparse_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_nvcc(monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.delenv("SPARSE_KERNELS_SANITIZE", raising=False)


def test_missing_nvcc_is_one_line(setup_module, monkeypatch, tmp_path, capsys):
    without_nvcc(monkeypatch, tmp_path)
    monkeypatch.delenv("SPARSE_KERNELS_CUDA", raising=False)
    assert setup_module.CudaCompiler.find() is None
    assert (
        capsys.readouterr().out == "sparse-kernels: nvcc was not found: without the CUDA kernels\n"
    )


def test_missing_nvcc_is_an_error_where_cuda_is_asked_for(setup_module, monkeypatch, tmp_path):
    without_nvcc(monkeypatch, tmp_path)
    monkeypatch.setenv("SPARSE_KERNELS_CUDA", "1")
    with pytest.raises(setup_module.CompileError, match="CUDA=1, but nvcc was not found"):
        setup_module.CudaCompiler.find()


def test_cuda_is_left_out_on_request(setup_module, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_KERNELS_CUDA", "0")
    assert setup_module.CudaCompiler.find() is None
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("SPARSE_KERNELS_CUDA", "yes")
    with pytest.raises(setup_module.CompileError, match="must be 0 or 1, got 'yes'"):
        setup_module.CudaCompiler.find()


@needs_nvcc
def test_targets_hold_code_and_ptx(setup_module):
    targets = setup_module.CudaCompiler(nvcc).targets()
    assert {"arch=compute_80,code=sm_80", "arch=compute_90,code=compute_90"} <= set(targets)
