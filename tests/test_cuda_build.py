"""CUDA is built where a GPU is visible or asked for, for every target and without spilling."""

import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tile_estimate as estimate

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# .ci/run compiles for the GPU of the goals alone; for a release, for all of them.
ARCHS = os.environ.get("SPARSE_KERNELS_CUDA_ARCHS", "8.0;9.0a;10.0")
TARGETS = [f"sm_{arch.replace('.', '')}" for arch in ARCHS.split(";")]
# Registers of a multiprocessor, and threads of a block: what a thread may have, in eights.
MAX_REGISTERS = 2**16 // 512
HOPPER_REGISTERS = 2**16 // 384 // 8 * 8


@pytest.fixture
def setup_module(monkeypatch, tmp_path):
    """setup.py, without running it; from another folder, since it clears the old builds."""
    import setuptools

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("sparse_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The log and the folder of a build by setup.py, in which the assembler tells what it does."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    folder = tmp_path_factory.mktemp("built")
    script = (
        "import sys, runpy, setuptools; setup = setuptools.setup\n"
        "def cuda_only(ext_modules, **rest):\n"
        "    setup(ext_modules=[e for e in ext_modules if e.name.endswith('cuda')], **rest)\n"
        "setuptools.setup = cuda_only; runpy.run_path('setup.py')"
    )
    folders = ["--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]
    environment = {"SPARSE_KERNELS_CUDA": "1", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    done = subprocess.run(
        [sys.executable, "-c", script, "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, folder


@pytest.mark.slow
def test_extension_builds_without_spilling(built):
    log, folder = built
    assert "warning" not in log, log
    for target in TARGETS:
        kernels = re.findall(rf"Compiling entry function \S+ for '{target}'", log)
        assert len(kernels) >= len(SOURCES)
    properties = r"entry function '(\S+)' for '(\S+)'\n.*\n\s*(\d+) bytes stack frame"
    stacks = re.findall(properties, log)
    kernels = re.findall(r"Used (\d+) registers(.*)", log)
    assert len(stacks) == len(kernels) > 0
    assert not [stack for stack in stacks if stack[2] != "0"]
    for (kernel, _, _), (registers, _) in zip(stacks, kernels, strict=True):
        limit = HOPPER_REGISTERS if "hopper_kernel" in kernel else MAX_REGISTERS
        assert int(registers) <= limit, kernel
    # All of it is asked for at launch, where it is held against the device's limit.
    assert not [more for _, more in kernels if "smem" in more]
    (extension,) = (folder / "lib").glob("*.so")
    libraries = subprocess.run(["ldd", extension], capture_output=True, text=True, check=True)
    assert not re.search("torch|cudart", libraries.stdout)
    program = "import _sparse_kernels_cuda as module; print(module.__name__)"
    subprocess.run([sys.executable, "-c", program], cwd=folder / "lib", check=True)


@functools.cache
def functions(folder, source):
    """The machine code of each kernel for the GPU of the goals; the first line names it."""
    triton = pytest.importorskip("triton", reason="it brings cuobjdump")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    done = subprocess.run(
        [tools / "cuobjdump", "-sass", "-arch", "sm_90a", *folder.rglob(f"{source}.o")],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return re.split(r"\n\s*Function : ", done.stdout)[1:]


def machine_code(folder, source, kernel):
    """The instructions of a kernel, with their addresses."""
    found = functions(folder, source)
    (code,) = [text for text in found if re.search(kernel, text.split("\n", 1)[0])]
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ +)?(.*?);", code)
    return [(int(address, 16), instruction) for address, instruction in found]


def innermost_loop(code, name):
    """The instructions of the shortest loop that has one of that name."""
    loops = []
    for end, branch in code:
        target = re.match(r"BRA.* 0x([0-9a-f]+)", branch)
        if target and int(target[1], 16) < end:
            loop = [text for at, text in code if int(target[1], 16) <= at <= end]
            loops += [loop] if any(text.startswith(name) for text in loop) else []
    return min(loops, key=len)


def count(instructions, *names):
    return sum(text.startswith(names) for text in instructions)


every_pair = pytest.mark.parametrize("pair", ["half2", "bfloat162"])
needs_sm_90a = pytest.mark.skipif("sm_90a" not in TARGETS, reason="counts are those of sm_90a")


@pytest.mark.slow
@needs_sm_90a
@every_pair
@pytest.mark.parametrize(
    ("change", "vectors", "limit", "all_limit"),
    [("Unchanged", 8, 92, 820), ("Gelu", 8, 92, 1950), ("Norm", 4, 58, 850)],
)
def test_abs_topk_counts_packed(built, pair, change, vectors, limit, all_limit):
    """A step of the search compares and counts 256 entries in 8 instructions.

    The rest of its loop adds up the lanes and the warps, and chooses the next bound. GELU takes two
    slow instructions (1 / x, 2^x) for each entry, once, and once more in the vectors with ties.
    """
    kernel = rf"15abs_topk_.*{pair}.*Lb1.*{change}E"
    addressed = machine_code(built[1], "topk.cu", kernel)
    code = [text for _, text in addressed]
    loop = innermost_loop(addressed, "HSET2")
    assert count(loop, "HSET2") == 4 * vectors
    assert count(loop, "HADD2", "HFMA2") == 4 * vectors
    assert count(loop, "LDG", "MUFU") == count(code, "LDL", "STL", "CALL") == 0
    assert count(code, "MUFU") == {"Unchanged": 0, "Gelu": 2 * 8 * (vectors + 1), "Norm": 2}[change]
    assert len(loop) <= limit
    assert len(code) <= all_limit


@pytest.mark.slow
@needs_sm_90a
@every_pair
def test_gradients_of_fused_abs_topk_stay_in_registers(built, pair):
    for kernel, slow in (
        (rf"abs_topk_backward.*{pair}.*Lb1", 16),
        (rf"norm_backward.*{pair}", None),
    ):
        code = [text for _, text in machine_code(built[1], "topk_backward.cu", kernel)]
        assert count(code, "LDL", "STL") == 0
        assert slow is None or count(code, "MUFU") == slow


@pytest.mark.slow
@needs_sm_90a
@pytest.mark.parametrize("dtype", ["Bf16", "Half"])
@pytest.mark.parametrize(("gathers", "jobs"), [(2, 12), (4, 8), (8, 6)])
def test_grad_weight_multiplies_matrices(built, dtype, gathers, jobs):
    """A job and tile has 256 multiply-adds in each gather."""
    kernel = rf"sddmm_unstructured_kernel.*{dtype}ELi{gathers}E"
    addressed = machine_code(built[1], "sddmm.cu", kernel)
    assert len(innermost_loop(addressed, "STSM")) <= estimate.FILL_INSTRUCTIONS
    code = [text for _, text in addressed]
    places = [i for i, text in enumerate(code) if text.startswith(("LDSM", "HMMA"))]
    inner = code[places[0] : places[-1] + 1]
    assert count(inner, "HMMA") == jobs * gathers
    assert count(inner, "LDSM") == jobs * gathers + jobs // 2
    assert count(inner, "LDL", "STL", "BAR") == 0
    assert len(inner) <= estimate.GRAD_WEIGHT_INSTRUCTIONS * jobs * gathers * 256 / 1024


@pytest.mark.slow
@needs_sm_90a
@pytest.mark.parametrize("dtype", ["Bf16", "Half"])
@pytest.mark.parametrize(("log_vectors", "gathers"), [(0, 1), (1, 2), (2, 4)])
def test_unstructured_products_multiply_matrices(built, dtype, log_vectors, gathers):
    """Four blocks of words, which are 128 weights, and the results of three octets in between."""
    addressed = machine_code(built[1], "spmm.cu", rf"gather_kernel.*{dtype}ELi{log_vectors}E")
    code = [text for _, text in addressed]
    places = [i for i, text in enumerate(code) if text.startswith(("LDSM", "HMMA"))]
    inner = code[places[0] : places[-1] + 1]
    assert count(inner, "LDSM") == 4 * gathers
    assert count(inner, "HMMA") == 4 * max(gathers, 2)
    assert count(inner, "BAR", "CALL", "FFMA") == count(code, "LDL", "STL") == 0
    assert len(inner) <= estimate.WORD_INSTRUCTIONS[8 << log_vectors]
    assert len(innermost_loop(addressed, "STSM")) <= estimate.FILL_INSTRUCTIONS


@pytest.mark.slow
@needs_sm_90a
@pytest.mark.parametrize("dtype", ["Bf16", "Half"])
@pytest.mark.parametrize(
    ("product", "side"),
    [*itertools.product(["forward", "grad_input", "grad_weight"], [64, 128]), ("grad_weight", 32)],
)
def test_blocks_are_multiplied_by_warpgroups(built, product, side, dtype):
    """A step of 64 along K: a wait for its boxes, eight matrix instructions, one for the last."""
    file = "sddmm" if product == "grad_weight" else "spmm"
    columns = "" if product == "grad_weight" else f"ELb{int(product == 'grad_input')}"
    kernel = rf"hopper_kernel.*{dtype}ELi{side}{columns}E"
    addressed = machine_code(built[1], f"{file}_hopper.cu", kernel)
    code, loop = [text for _, text in addressed], innermost_loop(addressed, "HGMMA")
    steps = count(loop, "HGMMA") // 8
    kind = f"HGMMA.64x{side}x16.F32" + (".BF16 " if dtype == "Bf16" else " ")
    assert count(loop, kind) == 8 * steps > 0
    # One wait of the threads for their instructions: none of these waits for another.
    assert count(loop, "WARPGROUP.DEPBAR") == count(loop, "WARPGROUP.ARRIVE") == steps
    assert count(loop, "SYNCS.PHASECHK") == count(loop, "SYNCS.ARRIVE") == steps
    assert count(loop, "LD", "ST", "MEMBAR", "BAR", "CALL") == 0
    assert len(loop) <= estimate.HOPPER_INSTRUCTIONS * steps
    assert count(code, "LDL", "STL", "CALL") == 0
    assert count(code, "USETMAXREG") == 2
    assert count(code, "UTMALDG.2D.MULTICAST") > 0
    assert count(code, "UTMALDG.2D ") > 0
    assert count(code, "UTMASTG") == (0 if product == "grad_weight" else side // 32)
    transposed = {"forward": "", "grad_input": "tnspB", "grad_weight": "tnspA.tnspB"}[product]
    multiplies = [text for text in code if text.startswith("HGMMA")]
    assert all((transposed or "gdesc") in text for text in multiplies)
    assert ("tnsp" in "".join(multiplies)) == bool(transposed)


@pytest.mark.slow
@needs_sm_90a
@pytest.mark.parametrize("dtype", ["Bf16", "Half"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_blocks_of_32_are_multiplied_by_warps(built, transposed, dtype):
    """A block of weights and 128 tokens: two waits for boxes, 64 matrix instructions."""
    kernel = rf"spmm_32_hopper_kernel.*{dtype}ELb{transposed}E"
    addressed = machine_code(built[1], "spmm_hopper_32.cu", kernel)
    code, loop = [text for _, text in addressed], innermost_loop(addressed, "HMMA")
    assert count(loop, "HMMA.16816.F32" + (".BF16 " if dtype == "Bf16" else " ")) == 64
    assert count(loop, "LDSM.16.MT88.4") == 4 * transposed
    assert count(loop, "LDSM.16.M88.4") == 20 - 4 * transposed
    assert count(loop, "UTMALDG.2D ") == 1
    assert count(loop, "MEMBAR", "BAR", "CALL", "STS", "STG", "LDS ") == 0
    assert len(loop) <= estimate.BLOCK_32_INSTRUCTIONS
    assert count(code, "LDL", "STL", "CALL") == 0
    assert count(code, "UTMALDG.2D.MULTICAST") > 0
    assert count(code, "UTMASTG.2D") == 4
    assert count(code, "STSM") == 16


GPU = 'case "$1" in -L) echo "GPU 0: H200";; *) echo 9.0; echo 8.6;; esac'
# It lists its architectures, and otherwise compiles whatever it is given.
NVCC = 'case "$1" in --list-gpu-code) echo sm_80 sm_86 sm_90 sm_100;; *) echo code;; esac'


@pytest.fixture
def machine(setup_module, monkeypatch, tmp_path):
    """A function that sets variables and puts scripts on an otherwise empty PATH."""

    def build(variables=(), **scripts):
        for name in ("", "_ARCHS"):
            monkeypatch.delenv(f"SPARSE_KERNELS_CUDA{name}", raising=False)
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
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]


def test_cuda_is_built_for_the_visible_gpus(machine):
    assert machine(nvidia_smi=GPU, nvcc=NVCC)[1] == code("86", "90a")


def test_cuda_is_not_built_without_a_gpu(machine, capsys):
    assert machine(nvcc=NVCC) is None
    assert machine(nvidia_smi="exit 9") is None
    assert capsys.readouterr().out == ""


def test_cuda_is_built_for_all_architectures_on_request(machine):
    ptx = ["-gencode=arch=compute_90,code=compute_90"]
    flags = machine({"SPARSE_KERNELS_CUDA": "1"}, nvcc=NVCC, nvidia_smi=GPU)[1]
    assert flags == code("80", "90a", "100") + ptx


@pytest.mark.parametrize(
    ("archs", "names"), [("90", ["90"]), ("8.0;9.0a", ["80", "90a"]), ("10.0", ["100"])]
)
def test_architectures_can_be_narrowed(machine, archs, names):
    variables = {"SPARSE_KERNELS_CUDA": "1", "SPARSE_KERNELS_CUDA_ARCHS": archs}
    assert machine(variables, nvcc=NVCC)[1] == code(*names)


def test_wrong_architectures_are_refused(machine, setup_module):
    variables = {"SPARSE_KERNELS_CUDA": "1", "SPARSE_KERNELS_CUDA_ARCHS": "hopper"}
    with pytest.raises(setup_module.CompileError, match="must be like"):
        machine(variables, nvcc=NVCC)


def test_default_leaves_out_what_an_old_nvcc_does_not_know(machine):
    old = NVCC.replace(" sm_100", "")
    assert code("100")[0] not in machine({"SPARSE_KERNELS_CUDA": "1"}, nvcc=old)[1]


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
        ("1", {"nvcc": "exit 1"}, "cannot compile: install the CUDA toolkit's headers"),
        ("yes", {}, "must be 0 or 1, got 'yes'"),
    ],
)
def test_what_cannot_be_built_is_refused(machine, setup_module, value, scripts, message):
    with pytest.raises(setup_module.CompileError, match=message):
        machine({"SPARSE_KERNELS_CUDA": value}, **scripts)


def test_missing_compiler_is_refused(setup_module):
    with pytest.raises(setup_module.CompileError, match="and no-such-compiler is none: install"):
        setup_module.cpu_commands(["no-such-compiler"], [])
