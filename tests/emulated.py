"""Shared by the tests of the CUDA kernels that run on the CPU: tests/cuda_emulation."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest
import torch
from oracle import assert_accurate, dense_product, kept, random, sparse_product, to_dense

from sparse_kernels import checks, cuda

# In which the threads of a block run.
ORDERS = ["forward", "reversed", "shuffled"]
SANITIZED = "SK_SANITIZED_EMULATION" in os.environ


@contextlib.contextmanager
def emulated(extension):
    """The public functions run the emulated kernels, and take float16 as they do on a GPU."""
    with cuda._emulated(extension), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(checks.DTYPES, "cpu", checks.DTYPES["cuda"])
        yield


def use_order(monkeypatch, order):
    monkeypatch.setenv("SK_EMULATION_ORDER", order)


def bias_for(product, layout, dtype, generator, exact=False):
    size = {"forward": layout.out_features, "grad_input": layout.in_features}.get(product)
    return None if size is None else random((size,), dtype, generator, exact)


def check_product(product, x, grad_output, values, layout, bias=None, exact=False):
    actual = sparse_product(product, x, grad_output, values, layout, bias, "cuda")
    assert actual.dtype == values.dtype
    assert actual.is_contiguous()

    def dense(convert):
        result = dense_product(
            product,
            convert(x) if x is not None else x,
            convert(grad_output),
            convert(to_dense(values, layout)),
            None if bias is None else convert(bias),
        )
        return kept(result, layout) if product == "grad_weight" else result

    truth = dense(torch.Tensor.double)
    if exact:
        assert torch.equal(actual, truth.to(values.dtype))
    else:
        assert_accurate(actual, dense(lambda t: t), truth, dense(lambda t: t.double().abs()))
    return actual


def run_sanitized(arguments, **more):
    preload = [
        subprocess.run(
            [cuda_emulation.compiler(), f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in preload):
        pytest.skip("the compiler has no AddressSanitizer library")
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SK_SANITIZED_EMULATION": "1",
        **more,
    }
    env.pop("CI", None)
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=False
    )
