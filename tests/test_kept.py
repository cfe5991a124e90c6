"""Results of AbsTopK, packed: the same bits come back, and what reads them saves no more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import sparse_kernels as sk
from sparse_kernels import cpu, kept, ops, reference
from sparse_kernels.transformer_ops import gelu_abs_topk, rms_norm_abs_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_isa = pytest.mark.parametrize("isa", cpu.isas())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def packed():
    with sk.packed_activations():
        yield


@pytest.mark.parametrize("wanted", [False, True])
def test_a_write_that_torch_does_not_count_is_seen_unless_packing_was_asked_for(wanted):
    kept._enabled.set(wanted)
    layer = sk.SparseLinear(64, 8, fan_in=4)
    y = gelu_abs_topk(torch.randn(5, 64, requires_grad=True), 16)
    y.data.mul_(2)
    assert (kept.packed_form(y) is not None) is wanted
    layer(y).sum().backward()
    grad = sk.grad_weight(torch.ones(5, 8), y.detach(), layer.layout)
    assert torch.allclose(layer.weight.grad, grad) is not wanted


def test_a_negated_view_is_not_its_base():
    y = gelu_abs_topk(torch.randn(5, 64, requires_grad=True), 16)
    assert kept.packed_form(y.view(64, 5)) is not None
    assert kept.packed_form(torch._neg_view(y)) is None


widths = st.one_of(st.integers(1, 140), st.sampled_from([255, 256, 257, 1000]))


@every_isa
@every_dtype
@given(rows=st.integers(0, 5), cols=widths, seed=st.integers(0, 2**31), data=st.data())
def test_what_is_packed_comes_back(isa, dtype, rows, cols, seed, data):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator).to(dtype)
    kind = data.draw(st.sampled_from(["ordinary", "ties", "zeros", "nan", "strided"]))
    if kind == "ties":
        x = x.round()
    elif kind == "zeros":
        x[:, ::2] = 0
    elif kind == "nan":
        x[:, ::3] = torch.nan
    elif kind == "strided":
        x = x.t().contiguous().t()
    k = data.draw(st.integers(1, cols))
    with cpu.use_isa(isa):
        for fused, packed in (
            (cpu.abs_topk(x, k), (*cpu.abs_topk_packed(x, k), None)),
            (cpu.gelu_abs_topk(x, k), cpu.gelu_abs_topk_packed(x, k)),
        ):
            y, bits, values = packed
            assert torch.equal(y.nan_to_num(9), fused.nan_to_num(9))
            assert torch.equal(bits, reference.pack(y, x, k)[0])
            of_gelu = values is not None
            if values is None:
                again, values = cpu.pack(y, y, k)
                assert torch.equal(bits, again)
            for backend in (cpu, reference) if not of_gelu else (cpu,):
                unpacked = backend.unpack(values, bits, cols, of_gelu)
                assert torch.equal(unpacked.nan_to_num(9), y.nan_to_num(9))


@every_isa
def test_bits_without_room_for_their_values_do_no_harm(isa):
    with cpu.use_isa(isa):
        y = torch.ones(2, 70)
        bits, values = cpu.pack(y, y, 3)
        assert torch.equal(values, torch.ones(2, 3))
        assert torch.equal(cpu.unpack(values, bits, 70, False)[:, :3], torch.ones(2, 3))


def chain(layer, x, weight):
    """A product after each fused AbsTopK."""
    for act in (
        lambda t: gelu_abs_topk(t, 20),
        lambda t: rms_norm_abs_topk(t, weight, 20, 1e-6),
    ):
        x = layer(act(x))
    return x


@pytest.mark.parametrize("fan", [{"fan_in": 6}, {"fan_out": 6}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_whole_saved_tensors(fan, dtype):
    torch.manual_seed(0)
    layer = sk.SparseLinear(96, 96, **fan, dtype=dtype)
    x = torch.randn(3, 9, 96, dtype=dtype, requires_grad=True)
    weight = torch.rand(96, dtype=dtype, requires_grad=True)
    leaves = (x, weight, *layer.parameters())

    def grads():
        return torch.autograd.grad(chain(layer, x, weight).square().sum(), leaves)

    mine = grads()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):  # ours step back
        wanted = grads()
    assert all(map(torch.equal, mine, wanted))


def test_second_derivatives_reach_through_a_packed_tensor():
    """The weight's gradient depends on x, and with it on what AbsTopK was made of."""
    torch.manual_seed(0)
    layer = sk.SparseLinear(64, 32, fan_in=8, dtype=torch.float64)
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)

    def second():
        y = layer(gelu_abs_topk(x, 16))
        (first,) = torch.autograd.grad(y.square().sum(), layer.weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, layer.weight))

    mine = second()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        wanted = second()
    assert mine[0].abs().sum() > 0
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_the_whole_tensor_is_not_kept():
    layer = sk.SparseLinear(64, 32, fan_in=8)
    x = torch.randn(5, 64, requires_grad=True)
    for act in (
        lambda t: gelu_abs_topk(t, 16),
        lambda t: rms_norm_abs_topk(t, torch.ones(64), 16, 1e-6),
    ):
        hidden = act(x)
        recall = sk.remember(hidden)
        storage, copy = StorageWeakRef(hidden.untyped_storage()), hidden.detach().clone()
        y = layer(hidden)
        del hidden
        assert storage.expired()
        assert torch.equal(recall(), copy)
        y.sum().backward()


@pytest.mark.parametrize(
    "change", [lambda t: t.mul_(2), lambda t: t[:, :3], lambda t: t.double(), lambda t: t + 0]
)
def test_what_is_no_longer_the_result_is_saved_as_it_is(change):
    x = torch.randn(5, 64, requires_grad=True)
    hidden = gelu_abs_topk(x, 16)
    assert kept.packed_form(hidden.view(5, 8, 8)) is not None
    changed = change(hidden)
    assert kept.packed_form(changed) is None
    assert torch.equal(sk.remember(changed)(), changed)


def test_no_packed_form_where_a_transform_or_a_graph_is_recorded():
    layer = sk.SparseLinear(64, 32, fan_in=8)
    x = torch.randn(5, 64)
    got = torch.func.grad(lambda t: layer(sk.abs_topk(t, 16)).sum())(x)
    leaf = x.clone().requires_grad_()
    layer(sk.abs_topk(leaf, 16)).sum().backward()
    torch.testing.assert_close(got, leaf.grad)
    outside = gelu_abs_topk(leaf, 16)
    assert kept.packed_form(outside) is not None
    by_weight = torch.func.grad(lambda w: sk.sparse_linear(outside, w, layer.layout).sum())
    torch.testing.assert_close(
        by_weight(layer.weight.detach()), torch.autograd.grad(layer(outside).sum(), layer.weight)[0]
    )


@every_dtype
def test_opcheck(dtype):
    x = torch.randn(3, 70).to(dtype)
    op = torch.ops.sparse_kernels
    for name in ("reference", "cpu"):
        y, bits, values = ops.gelu_abs_topk_packed(x, 9, name)
        weight = torch.ones(70, dtype=dtype)
        _, scales = ops.norm_abs_topk(x, weight, 9, 1e-6, name)
        for call, arguments in (
            (op.pack, (y, x, 9)),
            (op.unpack, (values, bits, 70, True)),
            (op.abs_topk_packed, (x, 9)),
            (op.gelu_abs_topk_packed, (x, 9)),
            (op.norm_abs_topk_packed, (x, weight, 9, 1e-6)),
            (op.abs_topk_backward, (x, bits)),
            (op.gelu_abs_topk_packed_backward, (x, bits, values)),
            (op.norm_abs_topk_packed_backward, (x, bits, x, weight, scales)),
        ):
            # What lies behind a row's values has no meaning, so two runs may differ there.
            torch.library.opcheck(call.default, (*arguments, name), test_utils=CHECKS)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
