"""FanInLayout: the format by plain loops, its transpose, equality, copies, and what it may cost."""

import copy
import io
import pickle
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import kept, layouts, seeds, to_dense

import sparse_kernels as sk


@given(layouts(max_features=40), seeds())
def test_format_is_the_documented_equation(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.values_shape, generator=generator)
    rows, per_row, block_out, block_in = layout.values_shape
    expected = torch.zeros(layout.out_features, layout.in_features)
    for r in range(rows):
        for f in range(per_row):
            for a in range(block_out):
                for b in range(block_in):
                    k = int(layout.indices[r, f]) * block_in + b
                    expected[r * block_out + a, k] = values[r, f, a, b]
    assert torch.equal(sk.to_dense(values, layout), expected)
    assert torch.equal(to_dense(values, layout), expected)  # the tests' own oracle
    assert torch.equal(kept(expected, layout), values)


@given(layouts())
def test_properties_agree_with_the_table(layout):
    rows, per_row = layout.indices.shape
    block_out, block_in = layout.block
    assert layout.indices.dtype == torch.int32
    assert layout.indices.is_contiguous()
    assert layout.block_rows == rows == layout.out_features // block_out
    assert layout.block_cols == layout.in_features // block_in
    assert layout.blocks_per_row == per_row
    assert layout.fan_in == per_row * block_in
    assert layout.num_blocks == rows * per_row
    assert layout.nnz == rows * per_row * block_out * block_in
    assert layout.density == layout.nnz / (layout.out_features * layout.in_features)
    assert layout.values_shape == (rows, per_row, block_out, block_in)
    assert layout.device.type == "cpu"
    text = repr(layout)
    for word in (layout.out_features, layout.in_features, layout.fan_in, layout.block):
        assert str(word) in text


@given(layouts())
def test_transposed_lists_every_block_once_in_order(layout):
    expected = [[] for _ in range(layout.block_cols)]
    for r, row in enumerate(layout.indices.tolist()):
        for slot, column in enumerate(row):
            expected[column].append((r, slot))
    offsets, rows, slots = layout.transposed
    assert (offsets.dtype, rows.dtype, slots.dtype) == (torch.int64, torch.int32, torch.int32)
    assert all(part.is_contiguous() for part in layout.transposed)
    assert offsets.shape == (layout.block_cols + 1,)
    assert offsets[0] == 0
    assert offsets[-1] == rows.numel() == slots.numel() == layout.num_blocks
    for column, entries in enumerate(expected):
        begin, end = offsets[column], offsets[column + 1]
        pairs = list(zip(rows[begin:end].tolist(), slots[begin:end].tolist(), strict=True))
        assert pairs == entries


def test_transposed_is_built_once():
    layout = sk.FanInLayout.random(64, 64, 4)
    assert layout.transposed.rows.data_ptr() == layout.transposed.rows.data_ptr()
    assert layout.transposed is layout.transposed


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(1, 1), (3, 1), (1, 2), (4, 5)]),
    st.data(),
)
def test_random_is_valid_and_reproducible(rows, cols, block, data):
    per_row = data.draw(st.one_of(st.integers(1, cols), st.sampled_from([1, cols])))
    seed = data.draw(seeds())
    block_out, block_in = block

    def make():
        return sk.FanInLayout.random(
            rows * block_out,
            cols * block_in,
            per_row * block_in,
            block,
            generator=torch.Generator().manual_seed(seed),
        )

    layout = make()
    assert layout.indices.shape == (rows, per_row)
    assert bool((layout.indices >= 0).all())
    assert bool((layout.indices < cols).all())
    assert bool((layout.indices[:, 1:] > layout.indices[:, :-1]).all())
    assert layout == make()
    again = sk.FanInLayout(layout.indices, cols * block_in, block=block)
    assert again == layout
    assert hash(again) == hash(layout)


def test_random_rows_are_independent_uniform_subsets():
    # 20000 rows of 3 of 6: each of the 20 subsets is expected 1000 times, standard deviation 31.
    generator = torch.Generator().manual_seed(0)
    for fan_in, subsets in [(3, 20), (2, 15), (4, 15)]:
        layout = sk.FanInLayout.random(20000, 6, fan_in, generator=generator)
        code = (2 ** layout.indices.long()).sum(1)
        counts = code.unique(return_counts=True)[1]
        assert len(counts) == subsets
        expected = 20000 / subsets
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_random_uses_the_global_seed_and_does_not_repeat():
    torch.manual_seed(5)
    first, second = sk.FanInLayout.random(32, 64, 4), sk.FanInLayout.random(32, 64, 4)
    torch.manual_seed(5)
    assert sk.FanInLayout.random(32, 64, 4) == first
    assert first != second


@pytest.mark.parametrize("fan_in", [1, 1023, 1024, 2047, 2048])
def test_random_takes_moderate_time_at_any_density(fan_in):
    start = time.perf_counter()
    layout = sk.FanInLayout.random(512, 2048, fan_in)
    assert layout.fan_in == fan_in
    # Loose, for slow machines; drawing with rejection would need minutes near fan_in = K.
    assert time.perf_counter() - start < 10


@given(layouts(max_features=30), st.data())
def test_equality_is_the_pattern(layout, data):
    same = sk.FanInLayout(layout.indices.long(), layout.in_features, block=layout.block)
    assert same == layout
    assert (same != layout) is False
    assert hash(same) == hash(layout)
    wider = sk.FanInLayout(layout.indices, layout.in_features + layout.block[1], block=layout.block)
    assert wider != layout
    assert layout != "layout"
    assert layout != layout.indices.tolist()
    if layout.blocks_per_row < layout.block_cols:
        row = data.draw(st.integers(0, layout.block_rows - 1))
        other = layout.indices.clone()
        unused = sorted(set(range(layout.block_cols)) - set(other[row].tolist()))
        other[row, data.draw(st.integers(0, layout.blocks_per_row - 1))] = unused[0]
        other = sk.FanInLayout(other.sort(dim=1).values, layout.in_features, block=layout.block)
        assert other != layout


def test_same_table_with_another_block_is_another_layout():
    indices = torch.tensor([[0, 1], [1, 2]])
    layouts_made = {
        sk.FanInLayout(indices, 12, block=(1, 1)),
        sk.FanInLayout(indices, 12, block=(2, 1)),
        sk.FanInLayout(indices, 12, block=(1, 2)),
        sk.FanInLayout(indices, 12, block=(1, 1)),
    }
    assert len(layouts_made) == 3


def test_owns_its_indices():
    indices = torch.tensor([[0, 2], [1, 3]], dtype=torch.int32)
    layout = sk.FanInLayout(indices, 4)
    indices[0, 0] = 77
    assert layout.indices.tolist() == [[0, 2], [1, 3]]


def test_accepts_strided_indices():
    table = torch.tensor([[0, 9, 2], [1, 9, 3]])
    assert sk.FanInLayout(table[:, ::2], 4).indices.tolist() == [[0, 2], [1, 3]]
    assert sk.FanInLayout(torch.tensor([[0, 1], [2, 3]]).t(), 4).indices.tolist() == [
        [0, 2],
        [1, 3],
    ]


@pytest.mark.parametrize(
    "name", ["indices", "in_features", "block", "fan_in", "transposed", "nonsense"]
)
def test_is_immutable(name):
    layout = sk.FanInLayout.random(4, 4, 2)
    before = (layout.indices.clone(), layout.block, layout.in_features)
    with pytest.raises(AttributeError):
        setattr(layout, name, 1)
    assert torch.equal(before[0], layout.indices)
    assert before[1:] == (layout.block, layout.in_features)


@pytest.mark.parametrize("copier", ["copy", "deepcopy", "pickle", "torch.save"])
def test_copies_equal_the_original(copier):
    layout = sk.FanInLayout.random(12, 8, 4, block=(3, 2))
    values = torch.randn(layout.values_shape)
    sk.sparse_linear(torch.randn(5, 8), values, layout)  # fills the caches
    if copier == "torch.save":
        file = io.BytesIO()
        torch.save(layout, file)
        file.seek(0)
        made = torch.load(file, weights_only=True)
    elif copier == "pickle":
        made = pickle.loads(pickle.dumps(layout))
    else:
        made = getattr(copy, copier)(layout)
    assert made == layout
    x = torch.randn(7, 8)
    assert torch.equal(sk.sparse_linear(x, values, made), sk.sparse_linear(x, values, layout))
    for mine, theirs in zip(made.transposed, layout.transposed, strict=True):
        assert torch.equal(mine, theirs)


def test_pickle_of_a_hostile_layout_is_refused():
    layout = sk.FanInLayout(torch.tensor([[0, 1], [1, 2]]), 4)
    layout.indices[1, 1] = 99  # what a tampered file would hold
    data = pickle.dumps(layout)
    with pytest.raises(ValueError, match="99"):
        pickle.loads(data)


def test_to_the_same_device_is_itself():
    layout = sk.FanInLayout.random(4, 4, 2)
    assert layout.to("cpu") is layout
    assert layout.to(torch.device("cpu")) is layout


def test_works_in_inference_mode_and_trains_afterwards():
    with torch.inference_mode():
        layout = sk.FanInLayout.random(6, 5, 2)
        from_table = sk.FanInLayout(torch.tensor([[0, 1]]), 5)
        sk.sparse_linear(torch.ones(7, 5), torch.ones(6, 2, 1, 1), layout)
        assert layout.transposed.rows.numel() == 12
    for made in (layout, from_table):
        values = torch.ones(made.values_shape, requires_grad=True)
        x = torch.ones(7, 5, requires_grad=True)
        sk.sparse_linear(x, values, made).sum().backward()
        assert torch.equal(values.grad, torch.full_like(values, 7))
