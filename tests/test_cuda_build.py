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


@pytest.mark.slow
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


GPU = 'case "$1" in -L) echo "GPU 0: H200";; *) echo 9.0; echo 8.6;; esac'
# It lists its architectures, and otherwise compiles whatever it is given.
NVCC = 'case "$1" in --list-gpu-code) echo sm_80 sm_86 sm_90 sm_100;; esac'


@pytest.fixture
def machine(setup_module, monkeypatch, tmp_path):
    """A function that sets variables and puts scripts on an otherwise empty PATH."""

    def build(variables=(), **scripts):
        for name in ("", "_ARCHS"):
            monkeypatch.delenv(f"SPARSE_KERNELS_CUDA{name}", raising=False)
        for name in ("CUDA_PATH", "SPARSE_KERNELS_SANITIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        for name, value in dict(variables).items():
            monkeypatch.setenv(name, value)
        for name, script in scripts.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        return setup_module.find_cuda()

    return build


def code(*names):
    """The flags for machine code of these architectures."""
    pairs = ((name, f"arch=compute_{name},code=sm_{name}") for name in names)
    return [word for _, flag in pairs for word in ("-gencode", flag)]


def test_cuda_is_built_for_the_visible_gpus(machine):
    assert machine(nvidia_smi=GPU, nvcc=NVCC)[1] == code("86", "90a")


def test_cuda_is_not_built_without_a_gpu(machine, capsys):
    assert machine(nvcc=NVCC) is None
    assert machine(nvidia_smi="exit 9") is None
    assert capsys.readouterr().out == ""


def test_cuda_is_built_for_all_architectures_on_request(machine):
    ptx = ["-gencode", "arch=compute_90,code=compute_90"]
    flags = machine({"SPARSE_KERNELS_CUDA": "1"}, nvcc=NVCC, nvidia_smi=GPU)[1]
    assert flags == code("80", "90a", "100") + ptx


@pytest.mark.parametrize(
    ("archs", "names"), [("90", ["90"]), ("8.0;9.0a", ["80", "90a"]), ("10.0", ["100"])]
)
def test_architectures_can_be_narrowed(machine, archs, names):
    variables = {"SPARSE_KERNELS_CUDA": "1", "SPARSE_KERNELS_CUDA_ARCHS": archs}
    assert machine(variables, nvcc=NVCC)[1] == code(*names)


@pytest.mark.parametrize(
    ("archs", "message"), [("hopper", "must be like"), ("12.0", "knows no architecture 12.0")]
)
def test_wrong_architectures_are_refused(machine, setup_module, archs, message):
    variables = {"SPARSE_KERNELS_CUDA": "1", "SPARSE_KERNELS_CUDA_ARCHS": archs}
    with pytest.raises(setup_module.CompileError, match=message):
        machine(variables, nvcc=NVCC)


def test_cuda_is_left_out_on_request(machine):
    assert machine({"SPARSE_KERNELS_CUDA": "0"}, nvcc=NVCC, nvidia_smi=GPU) is None


def test_gpu_without_nvcc_is_one_sentence(machine, capsys):
    assert machine(nvidia_smi=GPU) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "nvcc was not found: install the CUDA toolkit" in line


@pytest.mark.parametrize(
    ("value", "scripts", "message"),
    [
        ("1", {}, "CUDA=1, but nvcc was not found: install"),
        ("1", {"nvcc": "exit 1"}, "cannot build a program: install the CUDA toolkit's headers"),
        ("yes", {}, "must be 0 or 1, got 'yes'"),
    ],
)
def test_what_cannot_be_built_is_refused(machine, setup_module, value, scripts, message):
    with pytest.raises(setup_module.CompileError, match=message):
        machine({"SPARSE_KERNELS_CUDA": value}, **scripts)


def test_missing_compiler_is_refused(setup_module, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(setup_module.CompileError, match="needs a C\\+\\+17 compiler"):
        setup_module.find_compiler()
