"""Sparse training algorithms: each change against dense matrices and plain loops over rows."""

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from oracle import Largest, kept, seeds, to_dense

import sparse_kernels as sk
from benchmarks import report
from benchmarks.experiments import algorithms as experiment

ALGORITHMS = {
    "Static": sk.Static,
    "SET": sk.SET,
    "RigL": sk.RigL,
    "AnnealedRigL": lambda *model, **options: sk.AnnealedRigL(
        *model, fan=4, multiple=2, anneal=1, candidates=0.5, **options
    ),
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def make(block=(1, 1), fan=4, seed=0):
    """An MLP that reads through fan-in and writes through fan-out, and its optimizer."""
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        sk.SparseLinear(24, 36, fan_in=fan, block=block, generator=g),
        torch.nn.Tanh(),
        sk.SparseLinear(36, 12, fan_out=fan, block=block, generator=g),
    )
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.1)


def train(model, optimizer, algorithm, steps, seed=1, passes=1):
    """The model's losses. Does not count the last step, whose change may be examined then."""
    g = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(passes):
            loss = (model(torch.randn(20, 24, generator=g)) - 1).square().sum()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step < steps - 1:
            algorithm.step()
    return losses


def state(layer, optimizer):
    """Layout; weight and both moments of a layer."""
    moments = optimizer.state[layer.weight]
    tensors = (layer.weight, moments["exp_avg"], moments["exp_avg_sq"])
    return layer.layout, [tensor.detach().clone() for tensor in tensors]


@given(
    name=st.sampled_from(["SET", "RigL", "AnnealedRigL"]),
    block=st.sampled_from([(1, 1), (4, 1), (1, 2), (2, 4)]),
    fan=st.sampled_from([4, 8, 12]),
    drop=st.floats(0, 1),
    seed=seeds(),
)
def test_a_change_drops_the_smallest_and_keeps_the_rest_bit_for_bit(name, block, fan, drop, seed):
    model, optimizer = make(block, fan, seed)
    algorithm = ALGORITHMS[name](model, optimizer, until=8, every=2, drop=drop, seed=seed)
    train(model, optimizer, algorithm, 3, seed)
    before = [state(layer, optimizer) for layer in algorithm.layers.values()]
    assert algorithm.due
    share = algorithm.share()
    algorithm.step()
    for layer, (old, tensors) in zip(algorithm.layers.values(), before, strict=True):
        new, now = state(layer, optimizer)
        width = old.blocks_per_row if name != "AnnealedRigL" else 4 // new.block[1]
        replaced = min(round(share * width), old.block_cols - old.blocks_per_row)
        assert new.blocks_per_row == width
        for r in range(new.block_rows):
            had, has = old.indices[r].tolist(), new.indices[r].tolist()
            size = tensors[0][r].abs().sum((1, 2))
            stay = sorted(had, key=lambda c, h=had, z=size: -z[h.index(c)])[: width - replaced]
            assert set(stay) == set(had) & set(has)
            assert len(set(has) - set(had)) == replaced
            for slot, column in enumerate(has):
                for after, earlier in zip(now, tensors, strict=True):
                    expected = earlier[r, had.index(column)] if column in had else 0 * after[0, 0]
                    assert torch.equal(after[r, slot], expected)


@pytest.mark.parametrize("passes", [1, 2])
@given(block=st.sampled_from([(1, 1), (4, 1), (1, 2), (2, 4)]), fan=st.sampled_from([4, 8]))
def test_rigl_grows_the_largest_gradients(passes, block, fan):
    """Of the same model with dense weights, whose gradient autograd computes everywhere."""
    model, optimizer = make(block, fan)
    algorithm = sk.RigL(model, optimizer, until=8, every=2, drop=1.0)
    train(model, optimizer, algorithm, 2, passes=passes)
    algorithm.step()
    dense = torch.nn.Sequential(model[0].to_dense(), torch.nn.Tanh(), model[2].to_dense())
    g = torch.Generator().manual_seed(5)
    for _ in range(passes):
        x = torch.randn(20, 24, generator=g)
        for one in (model, dense):
            (one(x) - 1).square().sum().backward()
    before, share = [layer.layout for layer in algorithm.layers.values()], algorithm.share()
    algorithm.step()
    for (name, layer), old in zip(algorithm.layers.items(), before, strict=True):
        gradient = dense.get_submodule(name).weight.grad
        gradient = gradient.t() if layer.transpose else gradient
        everything = sk.FanInLayout.random(*gradient.shape, gradient.shape[1], old.block)
        score = kept(gradient, everything).abs().flatten(2).sum(2)
        grown = to_dense(torch.ones(layer.layout.values_shape), layer.layout)
        grown = kept(grown, everything)[:, :, 0, 0] > 0
        absent = kept(to_dense(torch.ones(old.values_shape), old), everything)[:, :, 0, 0] == 0
        count = min(round(share * old.blocks_per_row), old.block_cols - old.blocks_per_row)
        assert count > 0
        for r in range(old.block_rows):
            best = score[r].masked_fill(~absent[r], -1).topk(count).indices
            assert set(best.tolist()) == set((grown & absent)[r].nonzero()[:, 0].tolist())


def test_set_grows_uniformly():
    layer = sk.SparseLinear(6, 20_000, fan_in=2)
    sk.rewire_(layer, None, sk.FanInLayout(torch.tensor([[1, 4]]).expand(20_000, 2), 6))
    algorithm = sk.SET(layer, None, until=3, every=1, drop=0.5)
    algorithm.step()
    algorithm.step()
    counts = layer.layout.indices.flatten().bincount(minlength=6)
    assert counts[[1, 4]].sum() == 20_000
    # Four standard deviations of a binomial count of 20,000 with a probability of 1/4.
    assert (counts[[0, 2, 3, 5]] - 5000).abs().max() < 4 * math.sqrt(20_000 * 3 / 16)


@every_algorithm
def test_equal_runs_are_equal_and_a_resumed_one_continues(name):
    def start(fan=8 if name == "AnnealedRigL" else 4):
        model, optimizer = make(fan=fan)
        return model, optimizer, ALGORITHMS[name](model, optimizer, until=9, every=2)

    def proceed(run, steps):
        losses = []
        for step in steps:
            losses += train(*run, 1, seed=step)
            run[2].step()
        return losses

    whole = start()
    losses = proceed(whole, range(9))
    first = start()
    assert proceed(first, range(4)) == losses[:4]
    second = start(first[0][0].fan_in)
    for part, saved in zip(second, first, strict=True):
        part.load_state_dict(saved.state_dict())
    assert proceed(second, range(4, 9)) == losses[4:]
    for ours, theirs in zip(second[2].layers.values(), whole[2].layers.values(), strict=True):
        assert ours.layout == theirs.layout
    drawn = start(4)[2].layers.values()
    same = [
        one.layout == two.layout for one, two in zip(drawn, whole[2].layers.values(), strict=True)
    ]
    assert same == [name == "Static"] * 2


def test_schedules_by_hand():
    model, optimizer = make()
    options = {"until": 100, "every": 10, "drop": 0.4}
    static, evolve, rigl = (
        kind(model, optimizer, **options) for kind in (sk.Static, sk.SET, sk.RigL)
    )
    shares = []
    for steps in (0, 50, 100):
        for algorithm in (static, evolve, rigl):
            algorithm.load_state_dict({"steps": steps})
        shares.append([static.share(), evolve.share(), rigl.share()])
    assert shares == [[0, 0.4, 0.4], [0, 0.4, pytest.approx(0.2)], [0, 0.4, 0]]
    due = []
    for steps in range(130):
        evolve.load_state_dict({"steps": steps})
        due += [steps] if evolve.due else []
    assert due == [10, 20, 30, 40, 50, 60, 70, 80, 90]


@pytest.mark.parametrize("drop", [0.3, 0.0])
def test_the_fan_falls_linearly_to_its_end(drop):
    model, optimizer = make(fan=12)
    algorithm = sk.AnnealedRigL(
        model, optimizer, fan={"0": 2, "2": 4}, multiple=6, until=10, every=2, anneal=8, drop=drop
    )
    fans = []
    for step in range(10):
        train(model, optimizer, algorithm, 1, seed=step)
        algorithm.step()
        fans.append((model[0].fan_in, model[2].fan_out))
    # 2 (1 + 5 (1 - t / 8)) and at most 12 of 4 (1 + 5 (1 - t / 8)); halves are rounded to even.
    assert fans[::2] == [(12, 12), (10, 12), (7, 12), (4, 9), (2, 4)]
    assert algorithm.steps == 10


def test_hooks_are_there_only_when_needed_and_see_only_their_model():
    model, optimizer = make()
    algorithm = sk.RigL(model, optimizer, until=8, every=2)

    def hooked():
        return [bool(module._forward_hooks) for module in model]

    for due in (False, False, True, False, True):
        assert hooked() == [due, False, due]
        assert algorithm.due == due
        train(model, optimizer, algorithm, 1)
        algorithm.step()


def test_no_tensor_is_as_large_as_the_matrix():
    layer = sk.SparseLinear(128, 96, fan_in=4)
    optimizer = torch.optim.Adam(layer.parameters())
    for kind in (sk.SET, sk.RigL):
        algorithm = kind(layer, optimizer, until=3, every=1)
        algorithm.step()
        with Largest() as largest:
            layer(torch.randn(2, 128)).square().sum().backward()
            assert algorithm.step()
        assert 0 < largest.elements <= layer.weight.numel(), largest.name


def test_refuses_and_says_why():
    model, optimizer = make()

    def start(kind=sk.RigL, model=model, optimizer=optimizer, **options):
        return kind(model, optimizer, **{"until": 10, "every": 2} | options)

    stranger = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    for call, kind, words in [
        (lambda: start(model="mlp"), TypeError, "model must be a torch.nn.Module"),
        (lambda: start(model=torch.nn.Linear(2, 2)), ValueError, "sparsify_"),
        (lambda: start(optimizer=stranger), ValueError, "optimizer must hold"),
        (lambda: start(until=0), ValueError, "until must be at least 1"),
        (lambda: start(every=2.5), TypeError, "every must be an int"),
        (lambda: start(drop=1.5), ValueError, r"drop must be in \[0, 1\], got 1.5"),
        (lambda: start(sk.AnnealedRigL, fan=5), ValueError, "fan of 0 must be at most 4"),
        (lambda: start(sk.AnnealedRigL, fan={"0": 2}), TypeError, "fan of 2 must be an int"),
        (lambda: start(sk.AnnealedRigL, fan=2, anneal=9), ValueError, "until=10 must"),
        (lambda: start(sk.AnnealedRigL, fan=2, multiple=0.5), ValueError, "multiple must"),
        (lambda: start(sk.AnnealedRigL, fan=2, candidates=2), ValueError, "candidates"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=words):
            call()
    algorithm = start(every=1)
    algorithm.step()
    before = [layer.layout for layer in algorithm.layers.values()]
    with pytest.raises(RuntimeError, match="0 saw no backward pass"):
        algorithm.step()
    assert [layer.layout for layer in algorithm.layers.values()] == before


def test_ranks_that_see_other_tokens_choose_alike(monkeypatch):
    """Two ranks, in threads, with half of a batch each grow what one with all of it grows."""
    barrier, shared, own = threading.Barrier(2, timeout=60), [None, None], threading.local()

    def all_reduce(tensor):
        shared[own.rank] = tensor.clone()
        barrier.wait()
        total = shared[0] + shared[1]
        barrier.wait()
        tensor.copy_(total)

    def grown(rank, ranks):
        own.rank = rank
        model, optimizer = make()
        algorithm = sk.RigL(model, optimizer, until=8, every=1, drop=0.5)
        algorithm.step()
        x = torch.randn(20, 24, generator=torch.Generator().manual_seed(3))
        (model(x[rank::ranks]) - 1).square().sum().backward()
        algorithm.step()
        return [layer.layout for layer in algorithm.layers.values()]

    alone = grown(0, 1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(grown, range(2), [2, 2])] == [alone, alone]


def test_the_experiment_compares_at_equal_l0(monkeypatch, tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    data = torch.rand(40, 64, generator=g), torch.randint(10, (40,), generator=g)
    for name, value in {"digits": lambda: data, "FANS": (2,), "SEEDS": 2, "TEST": 20}.items():
        monkeypatch.setattr(experiment, name, value)
    path = tmp_path / "rows.json"
    assert experiment.main(["--json", str(path), "--smoke"]) == 0
    rows = report.read_json(path)["rows"]
    assert [row["algorithm"] for row in rows[::2]] == [
        "static",
        "SET",
        "RigL",
        "AnnealedRigL",
        "dense",
    ]
    assert {row["l0"] for row in rows[:8]} == {2 * (256 + 256 + 10)}
    assert [row["mean_l0"] > row["l0"] for row in rows] == [False] * 6 + [True] * 2 + [False] * 2
    shown = capsys.readouterr().out
    report.main(path)
    assert experiment.text(rows) in shown
    assert experiment.text(rows) in capsys.readouterr().out


def test_the_experiment_names_the_package_that_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit):
        experiment.digits()
    assert "pip install scikit-learn" in capsys.readouterr().err
