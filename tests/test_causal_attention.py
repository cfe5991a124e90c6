"""Causal attention with sinks: every instruction set against the formula in float64."""

import dataclasses
import re
import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels import backends, cpu, ops, reference
from sparse_kernels.layout import Problem
from sparse_kernels.transformer_ops import cached_attention, causal_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_isa = pytest.mark.parametrize("isa", cpu.isas())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@dataclasses.dataclass(frozen=True)
class Case:
    B: int
    T: int
    H: int
    d: int
    sinks: bool = True
    size: float = 2.0  # of the entries of q and k: how sharp the softmax is

    def draw(self, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, size=1.0):
            return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        qkv = normal(self.B, self.T, 3, self.H, self.d, size=self.size)
        sinks = normal(self.H) if self.sinks else None
        return qkv, sinks, normal(self.B, self.T, self.H, self.d)


cases = st.builds(
    Case,
    B=st.integers(1, 3),
    T=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 130, 200])),
    H=st.integers(1, 5),
    d=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 32, 40, 64]),
    sinks=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 4.0]),
)


def results(qkv, sinks, grad, backend="cpu"):
    """Y and the gradients of qkv and sinks."""
    leaves = [leaf.detach().requires_grad_() for leaf in (qkv, sinks) if leaf is not None]
    y = causal_attention(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def by_torch(qkv, sinks, grad):
    """The same by dense products of PyTorch in the dtype at hand."""
    leaves = [leaf.detach().requires_grad_() for leaf in (qkv, sinks) if leaf is not None]
    q, k, v = leaves[0].permute(2, 0, 3, 1, 4)
    T = q.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    if sinks is not None:
        sink = leaves[1].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    y = (scores.softmax(-1)[..., :T] @ v).transpose(1, 2)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@every_isa
@every_dtype
@given(case=cases, seed=st.integers(0, 2**31))
def test_errors_are_at_most_twice_those_of_dense_products(isa, dtype, case, seed):
    qkv, sinks, grad = case.draw(dtype, seed)
    wide = [None if tensor is None else tensor.double() for tensor in (qkv, sinks, grad)]
    exact = by_torch(*wide)
    with cpu.use_isa(isa):
        made = results(qkv, sinks, grad)
    peers = by_torch(qkv, sinks, grad)
    for got, peer, want in zip(made, peers, exact, strict=True):
        assert got.dtype == dtype
        scale = float(want.abs().max()) + 1.0
        error = float((got.double() - want).abs().max())
        allowed = 2 * float((peer.double() - want).abs().max())
        # exp is good to a unit in the last place, of which a softmax multiplies the rounding of
        # the scores; y is stored rounded, which its gradients see.
        allowed += 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * scale
        if dtype == torch.float64:
            # PyTorch's result stands for the exact one, whose own error is not known: scores of a
            # hundred are rounded by a hundred units in both.
            allowed = 1000 * torch.finfo(dtype).eps * scale
        if dtype == torch.bfloat16:
            allowed += 4 * torch.finfo(dtype).eps * scale
        assert error <= allowed, (error, allowed)


@given(case=cases, seed=st.integers(0, 2**31))
def test_the_reference_is_the_formula(case, seed):
    wide = case.draw(torch.float64, seed)
    for got, want in zip(results(*wide, "reference"), by_torch(*wide), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_isa
@every_dtype
def test_logarithms_of_the_sums(isa, dtype):
    qkv, sinks, _ = Case(2, 70, 3, 16).draw(dtype)
    with cpu.use_isa(isa):
        _, lse = cpu.attention(*qkv.unbind(2), sinks)
    _, wanted = reference.attention(*qkv.unbind(2), sinks)
    torch.testing.assert_close(lse, wanted, rtol=1e-5, atol=1e-5)


@every_isa
@given(case=cases, seed=st.integers(0, 2**31), data=st.data())
def test_the_last_positions_alone_are_the_same(isa, case, seed, data):
    qkv, sinks, _ = case.draw(torch.float32, seed)
    count = data.draw(st.integers(1, case.T))
    q, k, v = qkv.unbind(2)
    with cpu.use_isa(isa), torch.no_grad():
        whole = causal_attention(qkv, sinks)
        last = cached_attention(q[:, -count:], k, v, sinks)
        # As a cache holds them: a head's positions next to each other.
        turned = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (k, v)]
        again = cached_attention(q[:, -count:], *turned, sinks)
    torch.testing.assert_close(last, whole[:, -count:], rtol=1e-5, atol=1e-5)
    assert torch.equal(again, last)


@every_isa
def test_strides_do_not_matter(isa):
    qkv, sinks, grad = Case(2, 50, 4, 16).draw(torch.float32)
    with cpu.use_isa(isa):
        wanted = results(qkv, sinks, grad)
        for turned in (
            qkv.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
            qkv.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4),
            torch.cat([qkv, qkv], 4)[..., :16],
        ):
            assert not turned.is_contiguous()
            for got, want in zip(results(turned, sinks, grad), wanted, strict=True):
                assert torch.equal(got, want)
        apart = torch.cat([grad, grad], 1)[:, :50]
        for got, want in zip(results(qkv, sinks, apart), wanted, strict=True):
            assert torch.equal(got, want)


@every_isa
@every_dtype
def test_bits_do_not_depend_on_threads(isa, dtype):
    qkv, sinks, grad = Case(3, 75, 5, 16).draw(dtype)
    with cpu.use_isa(isa):
        torch.set_num_threads(1)
        wanted = results(qkv, sinks, grad)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for got, want in zip(results(qkv, sinks, grad), wanted, strict=True):
                assert torch.equal(got, want)


@every_isa
def test_extreme_scores(isa):
    with cpu.use_isa(isa):
        # A later key would win by far: it must neither be seen nor spoil the softmax's scale.
        qkv = torch.zeros(1, 70, 3, 1, 1)
        qkv[0, :, 0] = 100.0
        qkv[0, :, 1, 0, 0] = qkv[0, :, 2, 0, 0] = torch.arange(70.0)
        y = causal_attention(qkv, torch.tensor([-200.0]))
        torch.testing.assert_close(y[0, 1:, 0, 0], torch.arange(1.0, 70.0))
        # A sink that takes everything.
        assert causal_attention(qkv, torch.tensor([1e5])).abs().max() == 0
        # Scores beyond float32's exponent range, both ways.
        huge = torch.full((1, 9, 3, 1, 1), 1e19)
        huge[:, :, 2] = 1.0
        y, grad = results(huge, torch.tensor([0.0]), torch.ones(1, 9, 1, 1))[:2]
        assert torch.equal(y, torch.ones_like(y))
        assert grad.isfinite().all()


@every_isa
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1])
def test_a_nan_is_seen_by_all_that_look_at_it_and_by_no_other(isa, bits):
    qkv, sinks, _ = Case(1, 40, 2, 16).draw(torch.float32)
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    with cpu.use_isa(isa):
        before = causal_attention(qkv, sinks)
        for part in range(3):
            spoiled = qkv.clone()
            spoiled[0, 17, part, 1, 3] = nan
            y = causal_attention(spoiled, sinks)
            # A value that is NaN also reaches the queries that are computed together with its own,
            # as 0 * NaN; in PyTorch's dense products it reaches every earlier one.
            clean = 16 if part == 2 else 17
            assert torch.equal(y[:, :clean], before[:, :clean])
            assert torch.equal(y[:, :, 0], before[:, :, 0])
            hit = y[0, 17:18, 1] if part == 0 else y[0, 17:, 1]
            if part == 2:
                hit = hit[:, 3]
            assert hit.isnan().all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 4), (2, 0, 3, 2, 4), (2, 5, 3, 0, 4)])
def test_nothing_to_attend(shape):
    qkv = torch.zeros(shape, requires_grad=True)
    sinks = torch.zeros(shape[3], requires_grad=True)
    y = causal_attention(qkv, sinks)
    assert y.shape == (shape[0], shape[1], shape[3], shape[4])
    y.sum().backward()
    assert qkv.grad.shape == shape
    assert torch.equal(sinks.grad, torch.zeros(shape[3]))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, sinks):
    qkv, sink, _ = Case(1, 19, 2, 3, sinks=sinks).draw(torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (qkv, sink) if leaf is not None]

    def run(qkv, sinks=None):
        return causal_attention(qkv, sinks, backend)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@every_dtype
def test_opcheck(dtype):
    qkv, sinks, grad = Case(2, 9, 2, 4).draw(dtype)
    for sink in (sinks, None):
        arguments = (*qkv.unbind(2), sink, "cpu")
        torch.library.opcheck(torch.ops.sparse_kernels.attention.default, arguments)
        y, lse = ops.attention(*arguments)
        torch.library.opcheck(
            torch.ops.sparse_kernels.attention_backward.default,
            (qkv, sink, y, lse, grad, "cpu"),
        )


@pytest.mark.slow
def test_compiles_whole_and_ignores_autocast():
    qkv, sinks, grad = Case(2, 33, 3, 16).draw(torch.float32)
    wanted = results(qkv, sinks, grad)
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(results(qkv, sinks, grad), wanted, strict=True):
            assert torch.equal(got, want)
    compiled = torch.compile(causal_attention, fullgraph=True)
    leaves = [qkv.requires_grad_(), sinks.requires_grad_()]
    y = compiled(*leaves)
    for got, want in zip([y, *torch.autograd.grad(y, leaves, grad)], wanted, strict=True):
        assert torch.equal(got, want)


GOOD = torch.zeros(2, 5, 3, 2, 4)
PART = torch.zeros(2, 5, 2, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "qkv must be a torch.Tensor", lambda: causal_attention([1])),
        (TypeError, "got torch.float16", lambda: causal_attention(GOOD.half())),
        (ValueError, r"qkv must be \(B, T, 3, H, d\)", lambda: causal_attention(PART)),
        (ValueError, "qkv must be", lambda: causal_attention(GOOD[..., :0])),
        (ValueError, r"sinks must have shape \(2,\)",
         lambda: causal_attention(GOOD, torch.zeros(3))),
        (TypeError, "sinks must be torch.float32, got torch.float64",
         lambda: causal_attention(GOOD, torch.zeros(2).double())),
        (ValueError, "sinks must be on cpu, got meta",
         lambda: causal_attention(GOOD, torch.zeros(2, device="meta"))),
        (ValueError, "backend must be one of", lambda: causal_attention(GOOD, None, "gpu")),
        (RuntimeError, "the device is cpu", lambda: causal_attention(GOOD, None, "cuda")),
        (ValueError, "with S at least T", lambda: cached_attention(PART, PART[:, 1:], PART)),
        (ValueError, "with S at least T", lambda: cached_attention(PART, *[PART[:, 1:]] * 2)),
        (ValueError, r"k \(B, S, H, d\)", lambda: cached_attention(PART, GOOD, PART)),
        (ValueError, "v must have shape", lambda: cached_attention(PART, PART, PART[:, 1:])),
        (TypeError, "k must be a torch.Tensor", lambda: cached_attention(PART, None, PART)),
        (TypeError, "v must be torch.float32, got torch.float64",
         lambda: cached_attention(PART, PART, PART.double())),
        (RuntimeError, "cached_attention has no gradient",
         lambda: cached_attention(PART.clone().requires_grad_(), PART, PART)),
    ],
)  # fmt: skip
def test_refusals(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_gpus_are_told_where_to_find_theirs():
    problem = Problem("cuda", torch.float32, "attention")
    assert backends.rule_for(problem).order == ()
    with pytest.raises(RuntimeError, match="no backend can run attention on cuda"):
        backends.choose(problem)
    for name in ("triton", "cuda"):
        assert backends.why_not(name, problem)


@pytest.mark.parametrize(
    "functions",
    [
        "attend_one|attention_of_one",
        "attend_head|attention",
        "attend_head_backward|attention_backward",
    ],
)
def test_the_next_head_is_read_ahead(functions):
    """GCC leaves out calls of a function that only prefetches, unless it is inlined."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump, which comes with the compiler, is not there")
    command = [objdump, "-dC", "--no-show-raw-insn", cpu._extension.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [part for part in code.split("\n\n") if re.search(rf"::({functions})<.*>:\n", part)]
    if not found:
        pytest.skip("the extension has no symbols")
    assert any(re.search(r"\s(prefetch|prfm)", part) for part in found)
