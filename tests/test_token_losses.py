"""Cross-entropy of tokens with a bigram table, and its gradient in the memory of the logits."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels import cpu
from sparse_kernels.testing import allowed_error, max_error
from sparse_kernels.transformer_ops import token_losses_

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_isa = pytest.mark.parametrize("isa", cpu.isas())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def truth(logits, targets, bigram, tokens, scale):
    """Losses and gradients, in the dtype of the logits."""
    z = logits if bigram is None else logits + bigram.to(logits.dtype)[tokens]
    p = torch.softmax(z, -1)
    losses = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    grad = scale * (p - torch.nn.functional.one_hot(targets, z.shape[1]).to(p.dtype))
    return losses, grad


@every_isa
@every_dtype
@given(
    rows=st.integers(0, 20),
    cols=st.integers(1, 150),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    table=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 1 / 4096]),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradients(isa, dtype, rows, cols, spread, table, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * spread

    logits = draw(rows, cols).to(dtype)
    bigram = draw(7, cols).to(wide) if table else None
    targets = torch.randint(cols, (2 * rows,), generator=generator)[::2]
    tokens = torch.randint(7, (2 * rows,), generator=generator)[::2]
    # The gradient lies beside memory that nobody may write to.
    held = torch.full((rows + 2, cols), 7.0, dtype=dtype)
    memory = held[1 : rows + 1].copy_(logits)
    with cpu.use_isa(isa):
        torch.set_num_threads(1)
        losses = token_losses_(memory, targets, bigram, tokens, scale)
        torch.set_num_threads(3)
        again = logits.clone()
        assert torch.equal(token_losses_(again, targets, bigram, tokens, scale), losses)
        assert torch.equal(again, memory)
    assert losses.dtype == wide
    assert (held[0] == 7).all()
    assert (held[-1] == 7).all()
    double = None if bigram is None else bigram.double()
    exact_losses, exact_grad = truth(logits.double(), targets, double, tokens, scale)
    peer_losses, peer_grad = truth(logits.to(wide), targets, bigram, tokens, scale)
    assert max_error(losses, exact_losses) <= allowed_error(peer_losses, exact_losses) + (
        4 * torch.finfo(wide).eps * float(logits.abs().max() if rows else 0)
    )
    if scale == 0:
        assert torch.equal(memory, logits)
    else:
        error = allowed_error(peer_grad, exact_grad) + scale * torch.finfo(dtype).eps
        assert max_error(memory, exact_grad) <= error


@every_isa
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(isa, value):
    logits = torch.randn(3, 40)
    logits[1, 17] = value
    targets, tokens = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64)
    expected, grad = truth(logits, targets, None, tokens, 1.0)
    with cpu.use_isa(isa):
        losses = token_losses_(logits, targets, None, tokens, 1.0)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    torch.testing.assert_close(logits, grad, equal_nan=True)


@pytest.mark.parametrize("table", [False, True])
def test_pytorch_does_the_same_where_no_kernel_runs(monkeypatch, table):
    logits, targets = torch.randn(50, 30), torch.randint(30, (50,))
    tokens, bigram = torch.randint(4, (50,)), torch.randn(4, 30) if table else None
    mine, theirs = logits.clone(), logits.clone()
    losses = token_losses_(mine, targets, bigram, tokens, 0.5)
    monkeypatch.setattr(cpu, "_extension", None)
    monkeypatch.setattr("sparse_kernels.transformer_ops._LOGITS", {"cpu": 70})
    peer = token_losses_(theirs, targets, bigram, tokens, 0.5)
    torch.testing.assert_close(losses, peer)
    torch.testing.assert_close(mine, theirs)


def test_a_gradient_counts_as_a_write():
    logits, numbers = torch.randn(4, 5), torch.arange(4)
    before = logits._version
    token_losses_(logits, numbers, None, numbers, 0.0)
    assert logits._version == before
    token_losses_(logits, numbers, None, numbers, 1.0)
    assert logits._version > before


GOOD = {
    "logits": torch.randn(4, 5),
    "targets": torch.arange(4),
    "bigram": torch.randn(6, 5),
    "tokens": torch.arange(4),
}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("logits", None, TypeError, "logits must be a torch.Tensor"),
        ("logits", torch.ones(4, 5, dtype=torch.int64), TypeError, "logits must be one of"),
        ("logits", torch.randn(4), ValueError, "logits must be"),
        ("logits", torch.randn(5, 4).t(), ValueError, "contiguous"),
        ("logits", torch.randn(4, 5, requires_grad=True), ValueError, "pass logits.detach"),
        ("targets", torch.arange(3), ValueError, "targets must have shape"),
        ("targets", torch.arange(4.0), TypeError, "targets must be torch.int64"),
        ("targets", torch.tensor([0, 1, 2, 5]), IndexError, r"targets must lie in \[0, 5\)"),
        ("targets", torch.tensor([0, -1, 2, 3]), IndexError, "got -1 to 3"),
        ("tokens", torch.tensor([0, 1, 2, 6]), IndexError, r"tokens must lie in \[0, 6\)"),
        ("bigram", torch.randn(6, 4), ValueError, "bigram must have shape"),
        ("bigram", torch.randn(6, 5).to_sparse(), TypeError, "bigram must be a strided tensor"),
    ],
)
def test_refusals(monkeypatch, kernel, name, value, error, message):
    if not kernel:
        monkeypatch.setattr(cpu, "_extension", None)
    given = {key: tensor.clone() for key, tensor in GOOD.items()} | {name: value}
    with contextlib.suppress(AttributeError, TypeError):
        before = given["logits"].clone()
    with pytest.raises(error, match=message):
        token_losses_(*given.values(), 1.0)
    if name != "logits":
        assert torch.equal(given["logits"], before)
