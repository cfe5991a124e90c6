"""What the Triton backend refuses, and what its errors name."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from oracle import PRODUCTS

import sparse_kernels as sk
from sparse_kernels import backends
from sparse_kernels import triton as backend
from sparse_kernels.layout import Problem

pytest.importorskip("triton", reason="triton is not installed")

from test_triton import DEVICE, DTYPES, make, run, topk_by_op
from triton.runtime.errors import OutOfResources

from sparse_kernels.triton import configs, sddmm, spmm, topk

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def problem(**changes):
    good = {
        "device": DEVICE,
        "dtype": torch.float32,
        "product": "forward",
        "out_features": 64,
        "in_features": 64,
        "fan_in": 32,
        "block": (16, 32),
    }
    return Problem(**{**good, **changes})


def test_every_block_and_dtype_that_is_promised_can_run():
    sides = (16, 32, 64, 128)
    for block in [(out, into) for out in sides for into in sides]:
        for dtype in DTYPES:
            for product in PRODUCTS:
                made = problem(block=block, dtype=dtype, product=product)
                assert backend.why_not(made) is None, made
    topk_problem = Problem(DEVICE, torch.bfloat16, "abs_topk")
    assert backend.why_not(topk_problem) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "meta"}, ["cuda", "meta"]),
        ({"device": "mps"}, ["cuda", "mps"]),
        ({"dtype": torch.float64}, ["float32, bfloat16 and float16", "torch.float64"]),
        ({"block": (1, 1)}, ["16, 32, 64, 128", "(1, 1)"]),
        ({"block": (16, 1)}, ["16, 32, 64, 128", "(16, 1)"]),
        ({"block": (24, 16)}, ["16, 32, 64, 128", "(24, 16)"]),
        ({"block": (16, 256)}, ["16, 32, 64, 128", "(16, 256)"]),
        ({"in_features": 2**31}, ["1073741824", "2147483648"]),
        ({"product": "abs_topk", "dtype": torch.float64}, ["float16", "torch.float64"]),
    ],
)
def test_why_not_names_what_it_got_and_needs(changes, words):
    reason = backend.why_not(problem(**changes))
    assert reason is not None
    for word in words:
        assert word in reason


class Failing:
    """A kernel whose launch fails."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            raise self.error

        return launch


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (OutOfResources(300000, 232448, "shared memory"), RuntimeError),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
)
def test_failures_name_the_product_and_the_problem(monkeypatch, error, becomes):
    layout = sk.FanInLayout.random(32, 64, 32, (16, 16))
    tensors = make(layout, 5, torch.float32, 0)
    monkeypatch.setattr(spmm, "spmm_kernel", Failing(error))
    monkeypatch.setattr(sddmm, "sddmm_kernel", Failing(error))
    monkeypatch.setattr(topk, "topk_kernel", Failing(error))
    for product in PRODUCTS:
        with pytest.raises(becomes, match=f"triton {product} of .*torch.float32") as caught:
            run(product, *tensors, layout)
        assert type(caught.value) is becomes
        assert "block=(16, 16)" in str(caught.value)
        assert str(error) in str(caught.value)
    with pytest.raises(becomes, match=r"triton abs_topk of \(5, 64\) in torch.float32"):
        topk_by_op(tensors[0], 3)


def test_a_mistake_in_a_launcher_is_not_dressed_up(monkeypatch):
    layout = sk.FanInLayout.random(32, 64, 32, (16, 16))
    monkeypatch.setattr(spmm, "spmm_kernel", Failing(AttributeError("a mistake")))
    with pytest.raises(AttributeError, match=r"^a mistake$"):
        run("forward", *make(layout, 5, torch.float32, 0), layout)


def test_too_many_programs_are_refused(monkeypatch):
    from sparse_kernels.triton import launch

    monkeypatch.setattr(launch, "_MAX_PROGRAMS", 3)
    layout = sk.FanInLayout.random(64, 64, 32, (16, 16))
    with pytest.raises(ValueError, match="x has too many rows: 4 programs, the limit is 3"):
        run("forward", *make(layout, 5, torch.float32, 0), layout)


def test_a_first_use_while_a_graph_is_captured_is_refused(monkeypatch):
    from sparse_kernels.triton import launch

    launched = []

    class Kernel:
        module = None  # as triton has it until the first launch

        def warmup(self, *arguments, grid, **constants):
            return self

        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append((grid, arguments, constants))

    x, kernel = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(3,)), Kernel()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph is captured.*: run the step once before"):
        launch.launch_kernel(kernel, 7, x, 5, BLOCK=2)
    assert launched == []
    kernel.module = object()
    launch.launch_kernel(kernel, 7, x, 5, BLOCK=2)
    kernel.module = None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch.launch_kernel(kernel, 7, x, 5, BLOCK=2)
    assert launched == 2 * [((7,), (x, 5), {"BLOCK": 2})]


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"needs compute capability 8\.0 or more.*7\.5"):
        configs.family(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
        ((10, 3), "sm_100"), ((12, 0), "sm_80"),
    ],
)  # fmt: skip
def test_every_gpu_has_a_family(monkeypatch, capability, family):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.family(torch.device("cuda", 0)) == family


def test_cpu_tensors_take_triton_only_by_name():
    layout = sk.FanInLayout.random(32, 64, 32, (16, 16))
    x = torch.ones(3, 64)
    if DEVICE == "cpu":
        assert backends.why_not("triton", backends.problem_of(x, layout, "forward")) is None
        with pytest.raises(RuntimeError, match=r"triton: .*only when asked for"):
            backends.choose(backends.problem_of(x.half(), layout, "forward"))
    assert backends.choose(backends.problem_of(x, layout, "forward")) == "cpu"


def outside(program, **changes):
    """What a fresh process prints, by default without TRITON_INTERPRET."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**env, **changes}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_cpu_tensors_need_the_interpreter():
    program = """
import sys, torch, sparse_kernels as sk
layout = sk.FanInLayout.random(32, 64, 32, (16, 16))
problem = sk.backends.problem_of(torch.ones(3, 64), layout, "forward")
print(sk.backends.why_not("triton", problem), "triton" in sys.modules)
"""
    assert outside(program) == "it runs on cuda tensors, and the device is cpu False"
    assert outside(program, TRITON_INTERPRET="1") == "None False"


@pytest.mark.parametrize(
    "missing", ["sys.modules['triton'] = None", "sys.meta_path.insert(0, Nothing())"]
)
@pytest.mark.slow
def test_a_missing_triton_is_named(missing):
    program = f"""
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
{missing}
import torch, sparse_kernels as sk
from sparse_kernels.layout import Problem
print(sk.triton.why_not(Problem("cuda", torch.float32, "abs_topk")))
try:
    sk.abs_topk(torch.ones(2, 3), 1, "triton")
except RuntimeError as error:
    print(error)
"""
    first, second = outside(program, TRITON_INTERPRET="1").splitlines()
    assert first in second
    assert "triton is not installed" in first
