"""The published projection, against a slow reading of its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_transformer import masked
from sparse_transformer.masked import MaskedEmbedding, MaskedLinear
from sparse_transformer.train.masked_dense import density_at, project_

METHODS = pytest.mark.parametrize("method", ["select", "topk"])


def brute_force(weight, count, rows_keep, columns_keep):
    """Sort all magnitudes; those that a row or column must keep come first."""
    size = weight.abs().tolist()
    rows, columns = weight.shape
    forced = set()
    for r in range(rows if rows_keep else 0):
        forced |= {(r, c) for c in sorted(range(columns), key=lambda c: -size[r][c])[:rows_keep]}
    for c in range(columns if columns_keep else 0):
        forced |= {(r, c) for r in sorted(range(rows), key=lambda r: -size[r][c])[:columns_keep]}
    order = sorted(
        ((r, c) for r in range(rows) for c in range(columns)),
        key=lambda place: (place not in forced, -size[place[0]][place[1]]),
    )
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for place in order[:count]:
        kept[place] = True
    return torch.where(kept, weight, 0)


@METHODS
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_projection_is_the_published_one(method, data, seed):
    torch.manual_seed(seed)
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    density = data.draw(st.floats(0.01, 1))
    side = data.draw(st.sampled_from(["none", "rows", "columns"]))
    least_rows = data.draw(st.integers(1, columns)) if side == "rows" else 0
    least_columns = data.draw(st.integers(1, rows)) if side == "columns" else 0
    layer = MaskedLinear(
        columns, rows, density=density, min_fan_in=least_rows, min_fan_out=least_columns
    )
    with torch.no_grad():  # over many magnitudes
        layer.weight.copy_(torch.randn(rows, columns) * torch.randn(rows, columns).mul(4).exp())
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    project_(layer, method=method)
    count = max(int(density * rows * columns), least_rows * rows, least_columns * columns, 1)
    assert torch.equal(layer.weight, brute_force(before, count, least_rows, least_columns))
    assert torch.equal(layer.bias, bias)
    again = layer.weight.detach().clone()
    project_(layer, method=method)
    assert torch.equal(layer.weight, again)


@METHODS
@given(seed=st.integers(0, 2**32), levels=st.integers(1, 4), count=st.integers(1, 59))
def test_equal_magnitudes_do_not_exceed_the_budget(method, seed, levels, count):
    torch.manual_seed(seed)
    layer = MaskedLinear(10, 6, density=(count + 0.5) / 60)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-levels, levels + 1, (6, 10)))
    before = layer.weight.detach().clone()
    project_(layer, method=method)
    after = layer.weight.detach()
    kept = after != 0
    assert kept.sum() == min(count, int((before != 0).sum()))
    assert torch.equal(after[kept], before[kept])
    if kept.any() and (before[~kept] != 0).any():
        assert after[kept].abs().min() >= before[~kept].abs().max()


@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(method, dtype):
    layer = MaskedLinear(16, 16, density=0.25, min_fan_in=2, dtype=dtype)
    before = layer.weight.detach().clone()
    project_(layer, method=method)
    kept = layer.weight != 0
    assert kept.sum() == 64
    assert (kept.sum(1) >= 2).all()
    assert torch.equal(layer.weight[kept], before[kept])


def test_all_layers_at_their_own_density():
    model = nn.Sequential(
        MaskedEmbedding(20, 16, density=1 / 4),
        MaskedLinear(16, 64, density=1 / 16, min_fan_in=1),
        nn.Linear(64, 64),
        MaskedLinear(64, 16, density=1 / 16, min_fan_out=1),
    )
    assert list(masked.masked_layers(model)) == ["0", "1", "3"]
    dense = model[2].weight.detach().clone()
    project_(model, fraction=16)
    assert all((layer.weight != 0).all() for layer in model)
    project_(model, fraction=8.5)  # half of the way: (8.5 - 1) / (16 - 1)
    assert [int((layer.weight != 0).sum()) for layer in model] == [200, 544, 4096, 544]
    project_(model)
    assert [int((layer.weight != 0).sum()) for layer in model] == [80, 64, 4096, 64]
    assert torch.equal(model[2].weight, dense)
    assert ((model[3].weight != 0).sum(0) >= 1).all()


def test_density_by_hand():
    assert density_at(1 / 64, 64, 1 / 64) == 1
    assert density_at(1 / 64, 1, 1 / 64) == 1 / 64
    assert density_at(1 / 64, 16, 1 / 64) == pytest.approx(1 / 4)
    assert density_at(1 / 16, 32.5, 1 / 64) == pytest.approx((1 + 1 / 16) / 2)
    assert density_at(1 / 16, 1000, 1 / 64) == 1
    with pytest.raises(ValueError, match="fraction"):
        density_at(1 / 16, 0.5, 1 / 64)


def test_bad_arguments():
    for arguments in (
        {"density": 0},
        {"density": 1.5},
        {"density": 0.5, "min_fan_in": 1, "min_fan_out": 1},
        {"density": 0.5, "min_fan_in": 9},
        {"density": 0.5, "min_fan_out": 5},
    ):
        with pytest.raises(ValueError, match=r"density|min_fan"):
            MaskedLinear(8, 4, **arguments)
    with pytest.raises(ValueError, match="method"):
        project_(MaskedLinear(8, 4, density=0.5), method="sort")
