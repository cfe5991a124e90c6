"""The emulation itself: as the PTX ISA documents it, and it finds mistakes.

test_hopper_emulation.py has what compute capability 9.0 adds.
"""

import ctypes
import re

import cuda_emulation
import pytest
import torch
from emulated import ORDERS, SANITIZED, run_sanitized, use_order

pytestmark = pytest.mark.slow


def build_broken(sanitize):
    source = cuda_emulation.EMULATION.parent / "broken.cu"
    flags = cuda_emulation.SANITIZE if sanitize else []
    return cuda_emulation.build("broken", [source], flags)


@pytest.fixture(scope="module")
def broken():
    library = ctypes.CDLL(str(build_broken(SANITIZED)))
    library.run_neighbour.argtypes = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_int]
    library.run_overtake.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    for name in ("run_diverge", "run_sizes", "run_unasked", "run_vector"):
        getattr(library, name).restype = ctypes.c_char_p
    library.run_vector.argtypes = [ctypes.c_void_p]
    library.run_matrices.argtypes = [ctypes.c_void_p] * 3
    library.run_product.argtypes = [ctypes.c_bool, *[ctypes.c_void_p] * 3]
    pointers = [ctypes.c_void_p] * 2
    library.run_compare.argtypes = [ctypes.c_bool, *pointers, ctypes.c_int, *pointers]
    return library


def test_the_emulation_finds_a_missing_barrier(broken, monkeypatch):
    count = cuda_emulation.THREADS
    out, twice = torch.empty(count), torch.empty(2, count)
    right = torch.arange(1, count + 1).remainder(count).float()
    both = torch.tensor([[0.0], [1.0]]).expand(2, count)
    for order in ORDERS:
        use_order(monkeypatch, order)
        broken.run_neighbour(out.data_ptr(), True, 0)
        assert torch.equal(out, right)
        broken.run_neighbour(out.data_ptr(), False, 0)
        assert not torch.equal(out, right)
        broken.run_overtake(twice.data_ptr(), True)
        assert torch.equal(twice, both)
        broken.run_overtake(twice.data_ptr(), False)
        assert not torch.equal(twice, both)


def test_the_emulation_finds_threads_that_miss_a_barrier(broken):
    assert b"wait at different barriers: 32 at the block's" in broken.run_diverge()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((1, 1, 1, 1024, 227 << 10), b"it ran"),
        ((0, 1, 1, 32, 0), b"nothing with 0 bytes .* failed: invalid configuration argument"),
        ((2**31, 1, 1, 32, 0), b"invalid configuration argument"),
        ((1, 65536, 1, 32, 0), b"invalid configuration argument"),
        ((1, 1, 65536, 32, 0), b"invalid configuration argument"),
        ((1, 1, 1, 1056, 0), b"invalid configuration argument"),
        ((1, 1, 1, 32, (227 << 10) + 1), b"nothing needs 232449 bytes of shared memory"),
    ],
)
def test_the_emulation_refuses_what_a_device_refuses(broken, sizes, reason):
    assert re.search(reason, broken.run_sizes(*sizes))


def test_the_emulation_refuses_shared_memory_that_was_not_asked_for(broken):
    assert broken.run_unasked(48 << 10) == b"it ran"
    assert b"unasked failed: invalid argument" in broken.run_unasked((48 << 10) + 1)


def test_the_emulation_refuses_misaligned_vectors(broken):
    vectors = torch.zeros(64, dtype=torch.uint8)
    assert broken.run_vector(vectors.data_ptr()) == b"it ran"
    assert b"no multiple of 16" in broken.run_vector(vectors.data_ptr() + 8)


def fragments(matrices):
    """Of (..., 8, 8) matrices what each lane holds: (32, ..., 2), as PTX ISA documents it."""
    return matrices.unflatten(-1, (4, 2)).movedim((-3, -2), (0, 1)).flatten(0, 1).contiguous()


def test_the_emulation_moves_matrices_as_documented(broken):
    rows = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out, stored = torch.empty(32, 8, 2, dtype=torch.int16), torch.empty_like(rows)
    broken.run_matrices(rows.data_ptr(), out.data_ptr(), stored.data_ptr())
    assert torch.equal(stored, rows.mT)
    assert torch.equal(out[:, :4], fragments(rows))
    assert torch.equal(out[:, 4:], fragments(rows.mT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_emulation_multiplies_matrices_as_documented(broken, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b, d = (
        torch.randint(-8, 9, shape, generator=generator).to(dtype)
        for shape in ((16, 16), (16, 8), (16, 8))
    )
    # The quarters of a in the order of its columns, those of b transposed.
    left = fragments(torch.stack([a[i : i + 8, j : j + 8] for j in (0, 8) for i in (0, 8)]))
    right = fragments(b.view(2, 8, 8).mT)
    sums = fragments(d.float().view(2, 8, 8))
    half = dtype == torch.float16
    broken.run_product(half, left.data_ptr(), right.data_ptr(), sums.data_ptr())
    assert torch.equal(sums, fragments((a.double() @ b.double() + d).float().view(2, 8, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_emulation_compares_pairs_as_documented(broken, dtype):
    """All patterns with bounds of which one is NaN; a comparison with NaN is true."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for bounds in ((1.0, -3.0), (torch.inf, torch.nan), (0.0, 2.0**-14)):
        bound = torch.tensor(bounds, dtype=dtype)
        pairs = patterns.view(-1, 1).expand(-1, 2).contiguous()
        masks, sums = torch.empty_like(pairs), torch.empty_like(pairs)
        addresses = pairs.data_ptr(), bound.data_ptr()
        outputs = masks.data_ptr(), sums.data_ptr()
        broken.run_compare(dtype == torch.float16, *addresses, len(pairs), *outputs)
        above = ~(pairs <= bound)
        assert torch.equal(masks.view(torch.int16), -above.to(torch.int16))
        assert torch.equal(sums.nan_to_num(7), (pairs.float() + above).to(dtype).nan_to_num(7))


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized process")
def test_the_sanitizer_finds_a_step_outside_shared_memory():
    program = f"""
import ctypes
run = ctypes.CDLL({str(build_broken(True))!r}).run_neighbour
out = (ctypes.c_float * {cuda_emulation.THREADS})()
run(out, ctypes.c_bool(True), 0)
print("in bounds")
run(out, ctypes.c_bool(True), 1)
print("not found")
"""
    done = run_sanitized(["-u", "-c", program])  # what is buffered is lost when it aborts
    assert done.stdout.strip() == "in bounds", done.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
