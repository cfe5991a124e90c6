"""Shared by all tests: hypothesis profiles, and a process state that no test can leave behind.

Profiles: `dev` explores new examples on each run; `ci` (chosen when the environment has CI set)
always draws the same ones, and prints how to replay a failure.
"""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU the Triton kernels are interpreted, which sparse_kernels and triton decide when
# they are imported: not before this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The dense products that results are held against need it to be deterministic; read once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("dev", max_examples=10, **_COMMON)
settings.register_profile("ci", max_examples=10, derandomize=True, print_blob=True, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# The workers of pytest-xdist share the processors, and so do the processes that their tests start.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // _workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    """Tests of the instruction sets below the best one are slow.

    `benchmarks.gpu` shares the tests among processes: SPARSE_KERNELS_TEST_SHARD=0/10 is the first.
    """
    from sparse_kernels import cpu

    shard, count = map(int, os.environ.get("SPARSE_KERNELS_TEST_SHARD", "0/1").split("/"))
    items[:] = items[shard::count]
    lower = set(cpu.isas()[:-1])
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        target = params.get("isa", params.get("target"))
        isa = getattr(target, "isa", target)
        if isinstance(isa, str) and isa.removeprefix("cpu-") in lower:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def clean_state():
    """Uninitialised tensors are NaN (a forgotten store shows), and threads and seed are put back.

    In the deterministic mode `torch.empty` fills its memory: NaN for floats, the largest value for
    integers. `torch.use_deterministic_algorithms` would import the compiler for it, in seconds.
    """
    threads = torch.get_num_threads()
    rng = torch.get_rng_state()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")
    torch.set_rng_state(rng)
    torch.set_num_threads(threads)
    # Code that failed to compile is not traced again.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
