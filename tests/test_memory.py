"""No dense matrix, ever: memory follows the weights that exist.

Each case runs in a process of its own and reports by how much its peak of resident memory grew.
"""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor

import forked
import pytest
import torch

import sparse_kernels as sk


def status_mb(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 2**10 for line in file if line.startswith(field))


def reset_peak():
    # ru_maxrss would start at the peak of the process that started this one.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status_mb("VmRSS")


def measure(program):
    torch.set_num_threads(2)
    layer = sk.SparseLinear(32, 32, fan_in=4)
    optimizer = torch.optim.Adam(layer.parameters(), foreach=False)
    layer(torch.randn(70, 32)).sum().backward()
    optimizer.step()  # libraries are loaded, threads started
    del layer, optimizer
    names = {"torch": torch, "sk": sk, "reset_peak": reset_peak, "before": reset_peak()}
    exec(program, names)
    return status_mb("VmHWM") - names["before"]


def grown_mb(program):
    """How many megabytes the peak grows by while the program runs."""
    with ProcessPoolExecutor(1, forked.context) as pool:
        return pool.submit(measure, program).result()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="reads /proc, which only Linux has"
    ),
]

TRAIN = """
torch.manual_seed(0)
layer = sk.SparseLinear({K}, {N}, {fan}, block={block}, bias=False)
optimizer = torch.optim.Adam(layer.parameters(), foreach=False)
for _ in range(2):
    x = torch.randn({M}, {K}, requires_grad=True)
    layer(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize("fan", ["fan_in=4", "fan_out=4"])
@pytest.mark.parametrize("size", [50_000, 200_000])
def test_a_training_step_of_a_huge_layer(size, fan):
    """Dense fp32 would be 10 GB and 160 GB for the weight alone."""
    rows = 8
    grown = grown_mb(TRAIN.format(K=size, N=size, fan=fan, block=(1, 1), M=rows))
    weights_mb = 4 * size * 4 / 2**20
    # Tokens are worked on in tiles of up to 64, in each of two threads: that much activation memory
    # is needed for any number of tokens; x, y and their gradients with temporaries are far less.
    tile_mb = 2 * 2 * 64 * size * 4 / 2**20
    # value, gradient, two moments, indices, the transposed list, schedules of three products, draws
    assert grown < 60 + 100 * weights_mb + tile_mb


def test_memory_does_not_grow_with_the_product_of_the_sides():
    """Eight times the features with the same fan-in: about eight times the memory, not 64."""
    base, wide = (
        grown_mb(TRAIN.format(K=size, N=size, fan="fan_in=4", block=(1, 1), M=8))
        for size in (50_000, 400_000)
    )
    assert wide < 12 * base


def test_memory_follows_fan_in():
    """At one size, the weights decide."""
    thin, thick = (
        grown_mb(TRAIN.format(K=4096, N=4096, fan=f"fan_in={fan_in}", block=(1, 1), M=64))
        for fan_in in (4, 64)
    )
    dense_mb = 4096 * 4096 * 4 / 2**20
    assert thin < dense_mb / 2  # even with activations and working memory
    assert thick < 2 * dense_mb  # 1.6% of the weights: 4 copies of dense would be 256 MB


def test_rewiring_stays_sparse():
    size = 200_000
    program = (
        TRAIN.format(K=size, N=size, fan="fan_in=4", block=(1, 1), M=2)
        + f"""
sk.rewire_(layer, optimizer, sk.FanInLayout.random({size}, {size}, 4))
layer.load_state_dict(layer.state_dict())
"""
    )
    assert grown_mb(program) < 60 + 100 * 4 * size * 4 / 2**20 + 200


def test_many_layouts_do_not_pile_up():
    """Rewiring again and again leaves no old layout, schedule or working memory behind."""
    program = """
layer = sk.SparseLinear(3000, 3000, fan_in=100, bias=False)
optimizer = torch.optim.Adam(layer.parameters())
x = torch.randn(16, 3000)
def step():
    layer(x).sum().backward()
    optimizer.step()
    sk.rewire_(layer, optimizer, sk.FanInLayout.random(3000, 3000, 100))
for _ in range(5):
    step()
before = reset_peak()
for _ in range(20):
    step()
"""
    # One layout with its schedules is about 8 MB: twenty of them would be 160.
    assert grown_mb(program) < 60


def test_a_call_keeps_nothing_but_its_inputs_for_backward():
    """Saved for backward: x and the values themselves, no copies."""
    program = """
layer = sk.SparseLinear(4096, 4096, fan_in=8, bias=False)
x = torch.randn(4096, 4096)
layer(x[:70])
kept = []
torch.autograd.graph.saved_tensors_hooks.__enter__(
    torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t))
y = layer(x.requires_grad_())
assert set(kept) == {x.data_ptr(), layer.weight.data_ptr()}, kept
"""
    grown_mb(program)


def count_faults(kept):
    torch.set_num_threads(1)
    sk.cpu.keep_results(kept)
    layer = sk.SparseLinear(64, 8192, fan_in=8, bias=False)
    x = torch.randn(2048, 64)
    for _ in range(3):
        layer(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        layer(x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_results_serve_the_next_ones():
    """A plain call pays no page faults; 64 MiB afresh are 32 of them in huge pages, or 16,384."""
    with ProcessPoolExecutor(1, forked.context) as pool:
        assert pool.submit(count_faults, 512 << 20).result() < 100
    with ProcessPoolExecutor(1, forked.context) as pool:
        assert pool.submit(count_faults, 0).result() > 200


def test_results_over_the_limit_drive_nothing_out():
    """And are not kept themselves."""
    with ProcessPoolExecutor(1, forked.context) as pool:
        assert pool.submit(count_faults, (64 << 20) - 1).result() > 200
        assert pool.submit(count_faults, 64 << 20).result() < 100


def call_with_little_memory():
    """A result of 300 MiB where 448 of 700 are kept."""
    layer = sk.SparseLinear(16, 4096, fan_in=1, bias=False)
    layer(torch.ones(70, 16))
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) for line in file if line.startswith("VmSize")) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
    x = torch.ones(19200, 16)
    with torch.no_grad():
        kept = [layer(x[:4096]) for _ in range(7)]
        kept.clear()
        return layer(x).shape


def test_what_is_kept_is_given_back_where_memory_runs_out():
    with ProcessPoolExecutor(1, forked.context) as pool:
        assert pool.submit(call_with_little_memory).result() == (19200, 4096)


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [(-1, ValueError, "size must be at least 0"), (1.5, TypeError, "size must be an int")],
)
def test_a_wrong_limit(size, error, words):
    with pytest.raises(error, match=words):
        sk.cpu.keep_results(size)


def test_what_is_kept_is_limited():
    """Results of many sizes do not pile up, and those of one size are kept once."""
    program = """
layer = sk.SparseLinear(16, 4096, fan_in=1, bias=False)
def run(rows):
    with torch.no_grad():
        return layer(torch.ones(rows, 16))
run(70)
before = reset_peak()
for rows in range(1000, 30000, 1000):
    run(rows)
"""
    assert grown_mb(program) < 512 + 30000 * 4096 * 4 / 2**20 + 60


def test_the_measurement_sees_a_dense_matrix():
    """The helper of this file would notice what the other tests must not find."""
    assert grown_mb("dense = torch.ones(5000, 5000)") > 80
