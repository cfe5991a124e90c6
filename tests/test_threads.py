"""Same inputs, same bits: whatever the number of threads, the run, and who else is calling."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, PRODUCTS, TARGETS, layouts, seeds, sparse_product, tokens

import sparse_kernels as sk

every_cpu_target = pytest.mark.parametrize(
    "target", [target for target in TARGETS if target.backend == "cpu"], ids=str
)
every_product = pytest.mark.parametrize("product", PRODUCTS)


def problem(layout, rows, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            (rows, layout.in_features),
            (rows, layout.out_features),
            layout.values_shape,
        )
    ]


def run(target, product, tensors, layout):
    with target.use():
        return sparse_product(product, *tensors, layout, None, target.backend)


@every_cpu_target
@every_product
@given(layouts(), tokens(600), st.sampled_from(DTYPES), seeds())
def test_bits_do_not_depend_on_threads(target, product, layout, rows, dtype, seed):
    tensors = problem(layout, rows, dtype, seed)
    torch.set_num_threads(1)
    expected = run(target, product, tensors, layout)
    for threads in (2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert torch.equal(run(target, product, tensors, layout), expected), threads


# Where work is cut between threads, or tokens into parts: many tokens, wide inputs, few outputs.
LARGE = [
    (5000, 7, 9, 3, (1, 1)),
    (20011, 33, 9, 3, (1, 1)),
    (600, 64, 9000, 16, (1, 1)),
    (600, 9000, 64, 16, (1, 1)),
    (2048, 256, 256, 64, (16, 1)),
    (1500, 96, 96, 32, (16, 16)),
    (3, 4000, 4000, 8, (1, 1)),
]


@every_cpu_target
@every_product
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_bits_do_not_depend_on_threads_at_large_sizes(target, product, case):
    rows, *sizes = case
    layout = sk.FanInLayout.random(*sizes, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        tensors = problem(layout, rows, dtype, 1)
        torch.set_num_threads(1)
        expected = run(target, product, tensors, layout)
        for threads in (2, 2, 3, 4):
            torch.set_num_threads(threads)
            assert torch.equal(run(target, product, tensors, layout), expected), threads


@every_cpu_target
@every_product
def test_a_token_does_not_depend_on_its_position(target, product):
    """The same row gives the same bits in every lane and tile of one call."""
    if product == "grad_weight":
        pytest.skip("grad_weight sums over the tokens: it has no result for each of them")
    layout = sk.FanInLayout.random(40, 30, 10, generator=torch.Generator().manual_seed(0))
    x, grad_output, values = problem(layout, 1, torch.float32, 2)
    many = run(target, product, [x.repeat(301, 1), grad_output.repeat(301, 1), values], layout)
    assert torch.equal(many, many[:1].expand_as(many))


@pytest.mark.slow
def test_processes_agree():
    """Nothing depends on addresses, hashes or what ran before."""
    program = """
import hashlib, torch, sparse_kernels as sk
torch.manual_seed(0)
digest = hashlib.sha256()
for block in [(1, 1), (4, 1), (8, 8)]:
    layer = sk.SparseLinear(64, 128, fan_in=16, block=block)
    x = torch.randn(700, 64, requires_grad=True)
    layer(x).square().sum().backward()
    for t in (layer.weight, layer.weight.grad, x.grad, layer.bias.grad, layer.layout.indices):
        digest.update(t.detach().numpy().tobytes())
print(digest.hexdigest())
"""
    digests = set()
    for threads, seed in [("1", "0"), ("2", "1"), ("3", "2")]:
        env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


@every_cpu_target
def test_calls_from_many_python_threads_at_once(target):
    """The lock of Python is given up in the kernels: their working memory must not be shared."""
    made = []
    for seed, (out_features, in_features, fan_in, block) in enumerate(
        [(65, 200, 8, (1, 1)), (48, 64, 16, (16, 1)), (200, 65, 5, (1, 1)), (30, 36, 12, (3, 2))]
    ):
        layout = sk.FanInLayout.random(
            out_features,
            in_features,
            fan_in,
            block,
            generator=torch.Generator().manual_seed(seed),
        )
        made.append((layout, problem(layout, 150 + 70 * seed, torch.float32, seed)))
    with target.use():
        expected = [
            [sparse_product(product, *tensors, layout, None, "cpu") for product in PRODUCTS]
            for layout, tensors in made
        ]

        def work(i):
            layout, tensors = made[i % len(made)]
            # A layout of its own: its caches are filled while others do the same.
            fresh = sk.FanInLayout(layout.indices, layout.in_features, block=layout.block)
            chosen = fresh if i % 2 else layout
            torch.use_deterministic_algorithms(True)
            return [sparse_product(product, *tensors, chosen, None, "cpu") for product in PRODUCTS]

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, range(64)))
    for i, result in enumerate(results):
        for actual, wanted in zip(result, expected[i % len(made)], strict=True):
            assert torch.equal(actual, wanted)


def test_a_layout_first_used_by_many_threads_at_once():
    layout = sk.FanInLayout.random(300, 300, 20, generator=torch.Generator().manual_seed(0))
    x, grad_output, values = problem(layout, 40, torch.float32, 0)
    expected = sparse_product("grad_input", x, grad_output, values, layout, None, "cpu")
    for _ in range(10):
        fresh = sk.FanInLayout(layout.indices, 300)
        with ThreadPoolExecutor(6) as pool:
            jobs = [
                pool.submit(
                    sparse_product, "grad_input", x, grad_output, values, fresh, None, "cpu"
                )
                for _ in range(6)
            ]
            for job in jobs:
                assert torch.equal(job.result(), expected)


@pytest.mark.slow
def test_works_in_a_forked_child_with_one_thread():
    """A DataLoader's worker: forked after kernels ran in the parent, limited to one thread."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    program = """
import os, torch, sparse_kernels as sk
torch.set_num_threads(2)
layout = sk.FanInLayout.random(64, 64, 8)
x, values = torch.randn(300, 64), torch.randn(layout.values_shape)
expected = sk.sparse_linear(x, values, layout)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(sk.sparse_linear(x, values, layout), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "0", done.stderr
