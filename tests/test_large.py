"""More than 2^31 elements, by strides where that is enough and by memory where it is not."""

import pytest
import torch
from oracle import TARGETS

import sparse_kernels as sk

kernels = pytest.mark.parametrize(
    "target", [target for target in TARGETS if target.backend != "reference"], ids=str
)
fastest = [target for target in TARGETS if target.backend != "reference"][-1]
PAST = 2**31

pytestmark = pytest.mark.slow


def need_memory(gigabytes):
    """Skips, with the reason, where the machine has not this much free memory."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError):
        pytest.skip("this system does not say how much memory is free")
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free memory, {free:.1f} GB are free")


def lazy_zeros(*shape):
    """bfloat16 zeros whose pages exist only once they are written."""
    torch.use_deterministic_algorithms(False)
    return torch.zeros(shape, dtype=torch.bfloat16)


@kernels
def test_input_offsets_past_32_bits(target):
    """Rows of x, then rows of dY, that lie further than 2^31 elements apart from the first."""
    step = 2**24 + 1
    rows = PAST // step + 9
    memory = lazy_zeros(rows * step)
    layout = sk.FanInLayout.random(6, 5, 2, generator=torch.Generator().manual_seed(0))
    values = torch.randn(layout.values_shape).bfloat16()
    x, grad_output = torch.randn(rows, 5).bfloat16(), torch.randn(rows, 6).bfloat16()

    def far(rows_of):
        view = memory.as_strided(rows_of.shape, (step, 1))
        view.copy_(rows_of)
        assert view.storage_offset() + (len(view) - 1) * step > PAST
        return view

    with target.use():

        def run(x, grad_output):
            leaves = [x.detach().requires_grad_(), values.detach().requires_grad_()]
            y = sk.sparse_linear(*leaves, layout, backend=target.backend)
            return [y.detach(), *torch.autograd.grad(y, leaves, grad_output)]

        expected = run(x, grad_output)
        for actual in (run(far(x), grad_output), run(x, far(grad_output))):
            for mine, theirs in zip(actual, expected, strict=True):
                assert torch.equal(mine, theirs)


def test_column_offsets_past_32_bits():
    """Columns of x that lie further than 2^31 elements apart."""
    step = 2**29 + 3
    memory = lazy_zeros(5 * step + 10)
    layout = sk.FanInLayout(torch.tensor([[0, 4], [1, 5], [2, 3]]), 6)
    values = torch.randn(layout.values_shape).bfloat16()
    near = torch.randn(9, 6).bfloat16()
    far = memory.as_strided((9, 6), (1, step))
    far.copy_(near)
    with fastest.use():
        for rows in (2, 9):
            assert torch.equal(
                sk.sparse_linear(far[:rows], values, layout),
                sk.sparse_linear(near[:rows], values, layout),
            )


def test_output_past_32_bits():
    """2^31 + 48 results, and a gradient of as many elements coming back."""
    need_memory(9)
    torch.use_deterministic_algorithms(False)
    rows = PAST // 16 + 3
    layout = sk.FanInLayout(torch.zeros(16, 1, dtype=torch.int32), 1)
    values = torch.arange(1.0, 17.0).view(layout.values_shape).bfloat16()
    x = torch.arange(rows, dtype=torch.int32).remainder_(127).bfloat16().view(rows, 1)
    with fastest.use():
        y = sk.sparse_linear(x, values, layout)
        assert y.numel() > PAST
        for part in (slice(0, 70), slice(rows // 2 - 40, rows // 2 + 40), slice(rows - 70, rows)):
            expected = x[part].float() * values.view(1, 16).float()
            assert torch.equal(y[part], expected.bfloat16())
        del y
        grad_output = torch.ones(1, 1).bfloat16().expand(rows, 16)
        back = sk.sparse_linear(grad_output, values, layout, transpose=True)
        assert torch.equal(back, torch.full((1, 1), 136.0).bfloat16().expand(rows, 1))


def test_values_past_32_bits():
    """A layout that keeps more than 2^31 elements; only the last block is not zero."""
    need_memory(9)
    out_features, in_features, block = 2**15 + 256, 2**16, (256, 256)
    rows, cols = out_features // 256, in_features // 256
    layout = sk.FanInLayout(torch.arange(cols).repeat(rows, 1), in_features, block=block)
    assert layout.nnz > PAST
    values = lazy_zeros(*layout.values_shape)
    values[-1, -1] = torch.randn(256, 256).bfloat16()
    x = torch.ones(1, in_features).bfloat16()
    x[:, -256:] = torch.randn(1, 256).bfloat16()
    with fastest.use():
        y = sk.sparse_linear(x, values, layout)
    expected = x[:, -256:].float() @ values[-1, -1].float().t()
    torch.testing.assert_close(y[:, -256:].float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(y[:, :-256], torch.zeros(1, out_features - 256).bfloat16())
