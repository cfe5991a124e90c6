"""What a GPU would refuse is refused before a launch, in one sentence; no GPU is needed here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import cuda, ops
from sparse_kernels.layout import Problem

FORWARD = Problem("cuda", torch.float32, "forward", 8, 8, 2)


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [
        (13000, 13000, None),
        (13000, 13020, None),
        (13010, 12080, None),
        (12080, 13000, "built with CUDA 13.0, and the GPU driver serves only 12.8: install"),
    ],
)
def test_a_driver_that_is_too_old_is_named(monkeypatch, driver, runtime, reason):
    extension = ModuleType("extension")
    extension.driver_version, extension.runtime_version = lambda: driver, lambda: runtime
    monkeypatch.setitem(sys.modules, "_sparse_kernels_cuda", extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # The backend as a process imports it that has this extension.
    spec = importlib.util.spec_from_file_location("cuda_with_extension", cuda.__file__)
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    found = backend.why_not(FORWARD)
    assert found is None if reason is None else reason in found


def test_other_streams_may_read_what_a_layout_caches(monkeypatch):
    """The lists are complete before they are cached: no stream that reads them has to wait."""
    events = []

    class Stream:
        def synchronize(self):
            events.append("waited")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(sk.FanInLayout, "device", torch.device("cuda", 0))
    layout = sk.FanInLayout.random(8, 6, 2)

    def build(this):
        assert "cuda.rows" not in this.cache
        events.append("built")
        return (this.indices,)

    layout.derive("cuda.rows", build)
    layout.derive("cuda.rows", build)
    assert events == ["built", "waited"]


def test_other_streams_may_read_the_pattern_of_an_op(monkeypatch):
    waited = []
    monkeypatch.setattr(ops.checks, "finish", waited.append)
    indices = torch.tensor([[0, 2], [1, 2]], dtype=torch.int32)
    for _ in range(2):
        ops.layout_of(indices, 3, (1, 1))
    assert waited == [torch.device("cpu")]


def emulated(program, **variables):
    """What a fresh process says that runs the emulated kernels."""
    lines = [
        "import cuda_emulation, os, torch, sparse_kernels as sk",
        "from sparse_kernels import cuda",
        "layout = sk.FanInLayout.random(256, 256, 128, (128, 128))",
        "x, values = torch.ones(3, 256), torch.ones(layout.values_shape)",
        "def run():",
        "    try:",
        "        sk.sparse_linear(x, values, layout, backend='cuda')",
        "        print('ran')",
        "    except RuntimeError as error:",
        "        print(error)",
        "with cuda._emulated(cuda_emulation.emulated()):",
        *(f"    {line}" for line in program),
    ]
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_first_use_while_a_graph_is_captured_is_refused():
    name = "SK_EMULATION_CAPTURE"
    after = [f"del os.environ['{name}']", "run()", f"os.environ['{name}'] = '1'", "run()"]
    first, *rest = emulated(["run()", *after], **{name: "1"})
    assert first.startswith("the kernel of forward (3 tokens, 256 inputs")
    assert first.endswith("while a CUDA graph is captured, when it cannot be loaded: run the step "
                          "once before the capture")  # fmt: skip
    assert rest == ["ran", "ran"]


@pytest.mark.slow
def test_shared_memory_that_does_not_suffice_is_named():
    (said,) = emulated(["run()"], SK_EMULATION_SHARED="1024")
    assert said.startswith("the kernel of forward (3 tokens, 256 inputs")
    assert "bytes of shared memory, and a block of threads has at most 1024 on device 0" in said
