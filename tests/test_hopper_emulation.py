"""The emulation of compute capability 9.0: as the PTX ISA documents it, and it finds mistakes.

Layouts and fragments are written down here from the PTX ISA, independently of the kernels and of
the emulation.
"""

import ctypes

import cuda_emulation
import pytest
import torch
from emulated import ORDERS

pytestmark = pytest.mark.slow
DTYPES = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
HARNESS = cuda_emulation.EMULATION.parent / "hopper_harness.cu"


class WgmmaProblem(ctypes.Structure):
    """As hopper_harness.cu has it."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("columns", ctypes.c_int),
        ("transposed_a", ctypes.c_bool),
        ("transposed_b", ctypes.c_bool),
        ("accumulate", ctypes.c_bool),
        ("half", ctypes.c_bool),
        ("fenced", ctypes.c_bool),
        ("waits", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def harness():
    sources = [HARNESS, cuda_emulation.ROOT / "csrc/cuda/hopper.cu"]
    library = ctypes.CDLL(str(cuda_emulation.build("hopper_harness", sources, ["-O0"])))
    for name in ("wgmma", "ring", "store", "disagree"):
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    library.run_wgmma.argtypes = [ctypes.POINTER(WgmmaProblem)]
    matrix = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
    library.run_ring.argtypes = [*matrix, *[ctypes.c_int] * 6, ctypes.c_void_p]
    library.run_store.argtypes = [*matrix, *[ctypes.c_int] * 3, *[ctypes.c_bool] * 2]
    return library


def use(monkeypatch, seed=0, order="forward"):
    monkeypatch.setenv("SK_EMULATION_SEED", str(seed))
    monkeypatch.setenv("SK_EMULATION_ORDER", order)


def swizzle(address, row_bytes=128):
    """CuTe's Swizzle<3, 4, 3> of byte addresses, PTX's 128-byte swizzle; <2, 4, 3> is 64-byte."""
    return address ^ (address & {128: 0b111, 64: 0b11}[row_bytes] << 7) >> 3


def canonical(mn, k, transposed, leading, stride, row_bytes):
    """Byte address of element (mn, k): PTX's "Canonical Layouts" with 128- and 64-byte swizzling.

    P is 8 (128 bytes) or 4 (64). K-major: ((8, m), (T, 2k)) : ((PT, SBO), (1, T)); MN-major:
    ((T, P, m), (8, k)) : ((1, T, LBO), (PT, SBO)); T is 8 elements of 16 bits, LBO and SBO are
    bytes here.
    """
    pieces = row_bytes // 16
    if transposed:
        of_mn = mn % 8 * 2 + mn // 8 % pieces * 16 + mn // 8 // pieces * leading
        return of_mn + k % 8 * row_bytes + k // 8 * stride
    return mn % 8 * row_bytes + mn // 8 * stride + k % 8 * 2 + k // 8 * 16


def lay_out(memory, start, matrix, transposed, leading, stride, row_bytes):
    """Writes a matrix (mn, k) to `memory`, 16-bit elements at byte addresses / 2."""
    mn, k = (torch.arange(size) for size in matrix.shape)
    offsets = canonical(mn[:, None], k, transposed, leading, stride, row_bytes)
    memory[swizzle(start + offsets, row_bytes) // 2] = matrix


def describe(start, leading, stride, row_bytes=128):
    """PTX's "Matrix Descriptor Format": in 16 bytes; 1 at 62 is 128B, 2 is 64B."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {128: 1, 64: 2}[row_bytes] << 62


def thread_sums(d):
    """Of D (64, N) what each of 128 threads holds, (128, N / 2): the figure of m64nNk16."""
    warps = d.view(4, 2, 8, -1, 4, 2)  # warp, half, row, i, lane % 4, element
    return warps.permute(0, 2, 4, 3, 1, 5).reshape(128, -1).contiguous()


@pytest.mark.parametrize("row_bytes", [128, 64])
@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize("transposed_a", [False, True])
@pytest.mark.parametrize("transposed_b", [False, True])
@every_dtype
def test_wgmma_is_as_documented(
    harness, dtype, columns, row_bytes, transposed_a, transposed_b, monkeypatch
):
    use(monkeypatch, columns + transposed_a)
    generator = torch.Generator().manual_seed(0)
    a, b, d = (
        torch.randint(-8, 9, shape, generator=generator).to(dtype)
        for shape in ((64, 16), (16, columns), (64, columns))
    )
    # A K-major operand may begin within a row of an atom, an MN-major one at any atom along K.
    places = {False: (row_bytes // 2, 16, 2048), True: (2048, 6144, 8 * row_bytes)}
    starts = [places[transposed_a][0], 32768 + places[transposed_b][0]]
    strides = [places[transposed_a][1:], places[transposed_b][1:]]
    memory = torch.full((32768,), torch.nan, dtype=dtype)
    lay_out(memory, starts[0], a, transposed_a, *strides[0], row_bytes)
    lay_out(memory, starts[1], b.t(), transposed_b, *strides[1], row_bytes)
    for accumulate in (True, False):
        sums = thread_sums(d.float())
        problem = WgmmaProblem(
            memory.data_ptr(),
            sums.data_ptr(),
            describe(starts[0], *strides[0], row_bytes),
            describe(starts[1], *strides[1], row_bytes),
            columns,
            transposed_a,
            transposed_b,
            accumulate,
            dtype == torch.float16,
            fenced=True,
            waits=0,
        )
        assert harness.run_wgmma(problem) == b"it ran"
        truth = a.double() @ b.double() + (d.double() if accumulate else 0)
        assert torch.equal(sums, thread_sums(truth.float()))


def test_wgmma_that_is_used_wrongly_is_found(harness, monkeypatch):
    memory, right = torch.ones(32768, dtype=torch.bfloat16), describe(0, 16, 1024)

    def run(a=right, fenced=True, waits=0):
        sums = torch.zeros(128, 32)
        flags = (64, False, False, True, False, fenced, waits)
        problem = WgmmaProblem(memory.data_ptr(), sums.data_ptr(), a, right, *flags)
        return harness.run_wgmma(problem), sums

    early = []
    for seed in range(8):
        use(monkeypatch, seed)
        message, sums = run()
        assert message == b"it ran"
        assert (sums == 16).all()
        early.append(run(waits=1)[1])
    assert any((sums == 0).any() for sums in early)  # read before the wait
    assert b"wgmma before wgmma.fence" in run(fenced=False)[0]
    for a in (right & ~(3 << 62), right | 2 << 62, right | 1 << 49):
        assert b"only descriptors with the swizzle of 128 or 64 bytes" in run(a)[0]
    assert b"wrong bits in a descriptor" in run(right | 1 << 14)[0]
    assert b"outside shared memory" in run(describe(0, 16, 1 << 17))[0]
    assert b"warps of a warpgroup with different wgmma" in harness.run_disagree(False)
    assert b"96 for barrier 1, 32 have ended" in harness.run_disagree(True)


MISTAKES_OF_A_RING = [
    "none",
    "no wait for full",
    "no wait for empty",
    "too many bytes",
    "too few bytes",
    "no init",
    "arrives twice",
    "wrong parity",
    "ends early",
    "wrong mask",
    "too many arrivals",
]


def ring(harness, data, col, row, rounds=6, mistake="none", width=64, more=0):
    """What the blocks received, and what was said."""
    out = torch.full((2, rounds, 512), -1, dtype=torch.int16)
    message = harness.run_ring(
        data.data_ptr(),
        *data.shape,
        data.stride(0),
        width,
        col,
        row,
        rounds,
        more,
        MISTAKES_OF_A_RING.index(mistake),
        out.data_ptr(),
    )
    return out, message


def boxes(data, col, row, width, rounds=6):
    """What the ring should receive: 512 elements a round, swizzled, zeros outside."""
    count = 512 // width * rounds
    padded = torch.zeros(row + count, col + 128, dtype=data.dtype)
    rows, cols = (min(a, b) for a, b in zip(data.shape, padded.shape, strict=True))
    padded[:rows, :cols] = data[:rows, :cols]
    wanted = padded[row : row + count, col : col + width].reshape(rounds, 512)
    return wanted[:, swizzle(torch.arange(512) * 2, 2 * width) // 2]


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("col", "row"), [(0, 0), (40, 3), (64, 30), (96, 100)])
def test_boxes_arrive_as_documented(harness, order, col, row, width, monkeypatch):
    """Swizzled, with zeros outside of the tensor, in both blocks of the cluster, in any order."""
    data = torch.arange(61 * 104, dtype=torch.int16).view(61, 104)[:, :96]
    for seed in range(4):
        use(monkeypatch, seed, order)
        received, message = ring(harness, data, col, row, width=width, more=1)
        assert message == b"it ran"
        assert torch.equal(received, boxes(data, col, row, width).expand(2, -1, -1))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("no wait for full", "more arrivals at an mbarrier than a phase has"),
        ("no wait for empty", "more arrivals at an mbarrier than a phase has"),
        ("too many bytes", "66 for an mbarrier"),
        ("too few bytes", "66 for an mbarrier"),
        ("no init", "an mbarrier before its init"),
        ("arrives twice", "more arrivals at an mbarrier than a phase has"),
        ("wrong parity", "32 for an mbarrier"),
        ("ends early", "shared memory of a block that has ended"),
        ("wrong mask", "a mask of blocks that the cluster does not have"),
        ("too many arrivals", "more arrivals at an mbarrier than a phase has"),
    ],
)
def test_a_mistake_with_barriers_is_found(harness, mistake, said, monkeypatch):
    """Threads that wait for each other are reported, they do not hang."""
    data = torch.zeros(64, 64, dtype=torch.int16)
    more = int(mistake == "too many arrivals")
    messages = []
    for seed in range(12):
        use(monkeypatch, seed)
        messages.append(ring(harness, data, 0, 0, mistake=mistake, more=more)[1].decode())
    assert any(said in message for message in messages), messages


def test_a_box_is_not_there_before_it_was_awaited(harness, monkeypatch):
    data = torch.zeros(64, 64, dtype=torch.int16)
    received = []
    for seed in range(12):
        use(monkeypatch, seed)
        # Two rounds, one for each stage: no phase has more arrivals than it should.
        early, message = ring(harness, data, 0, 0, 2, "no wait for full")
        assert message == b"it ran" or b"ended" in message
        received.append(early)
    assert any((early == -1).any() for early in received)


def store(harness, col, row, rounds=4, fences=True, waits=True):
    data = torch.full((29, 104), -1, dtype=torch.int16)
    inner = data[:, :96]
    sizes = (*inner.shape, data.stride(0))
    message = harness.run_store(inner.data_ptr(), *sizes, col, row, rounds, fences, waits)
    return data, message


@pytest.mark.parametrize(("col", "row"), [(0, 0), (32, 5), (64, 40)])
def test_boxes_are_stored_as_documented(harness, col, row, monkeypatch):
    """What is outside of the tensor is not stored."""
    # Register r of lane 4 g + t: row g, columns 8 r + 2 t and 8 r + 2 t + 1.
    n, g, r, t, _ = torch.meshgrid(*map(torch.arange, (4, 8, 8, 4, 2)), indexing="ij")
    stored = (1024 * n + 32 * r + 4 * g + t).to(torch.int16).reshape(32, 64)
    wanted = torch.full((100, 200), -1, dtype=torch.int16)
    wanted[row : row + 32, col : col + 64] = stored
    wanted = wanted[:29, :104]
    wanted[:, 96:] = -1
    for seed in range(4):
        use(monkeypatch, seed)
        data, message = store(harness, col, row)
        assert message == b"it ran"
        assert torch.equal(data, wanted)


def test_a_mistake_with_stores_is_found(harness, monkeypatch):
    use(monkeypatch)
    right = store(harness, 0, 0)[0]
    assert b"a store of what was written before no fence" in store(harness, 0, 0, fences=False)[1]
    unlike = []
    for seed in range(8):
        use(monkeypatch, seed)
        unlike.append(not torch.equal(store(harness, 0, 0, waits=False)[0], right))
    assert any(unlike)


def test_the_driver_refuses_what_tma_cannot_describe(harness):
    data = torch.zeros(64 * 64 + 8, dtype=torch.int16)
    for address, cols, row in [(2, 64, 64), (0, 64, 60), (0, 64, 56)]:
        message = harness.run_store(data.data_ptr() + address, 8, cols, row, 0, 0, 1, True, True)
        assert b"the driver refused to describe a tensor of 8 x 64 (CUresult 1)" in message
