"""Annealing and rewiring: the schedule by hand, the change against a plain loop, ranks alike."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparse_kernels as sk
from sparse_transformer.model import ModelConfig, Transformer
from sparse_transformer.train.topology import (
    Topology,
    TopologyConfig,
    annealed_fraction,
    rewired,
)

TARGETS = {"embed": 4, "up": 4, "down": 3, "unembed": 4}
SIZES = {"embed": (40, 24), "up": (24, 32), "down": (32, 24), "unembed": (24, 40)}


class Lookup(sk.SparseLinear):
    """A fan-out layer whose input is one-hot, given by its index."""

    def forward(self, tokens):
        rows = self.weight.new_zeros(*tokens.shape, self.out_features)
        values = self.weight[tokens].flatten(tokens.dim())
        return rows.scatter(-1, self.indices[tokens].long(), values)


class Model(nn.Module):
    def __init__(self, multiple=1, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, (inputs, outputs) in SIZES.items():
            side = "fan_out" if name in ("embed", "down") else "fan_in"
            kind = Lookup if name == "embed" else sk.SparseLinear
            width = outputs if side == "fan_out" else inputs
            fan = min(round(TARGETS[name] * multiple), width)
            bias = name != "embed"
            setattr(self, name, kind(inputs, outputs, **{side: fan}, bias=bias, generator=g))

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.unembed(x + self.down(torch.nn.functional.gelu(self.up(x))))

    def sparse_layers(self):
        return {name: getattr(self, name) for name in SIZES}

    def target_fan(self, name):
        return TARGETS[name]


def tokens(step, rank=0):
    g = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(40, (3, 20), generator=g)


def backward(model, step, rank=0):
    batch = tokens(step, rank)
    loss = torch.nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten().roll(1))
    loss.backward()
    return loss.item()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.1, fused=True)


def advance(model, optimizer, topology, step, rank=0):
    optimizer.zero_grad()
    if topology.wants_gradients(step):
        with topology.capture():
            loss = backward(model, step, rank)
    else:
        loss = backward(model, step, rank)
    optimizer.step()
    topology.step(step)
    return loss


def training(config, total, multiple=None, seed=0):
    model = Model(config.start_multiple if multiple is None else multiple, seed)
    optimizer = adam(model)
    return model, optimizer, Topology(model, optimizer, config, total)


# ---- the schedule


def test_annealed_fraction_by_hand():
    values = [annealed_fraction(step, 1000, 64, 0.5, 0.01) for step in (0, 10, 255, 500, 999)]
    assert values == [64, 64, 32.5, 1, 1]
    assert [annealed_fraction(step, 10, 8, 0.5, 0.0) for step in range(7)] == pytest.approx(
        [8, 6.6, 5.2, 3.8, 2.4, 1, 1]
    )
    assert annealed_fraction(0, 10, 8, 0.0, 0.0) == 1


def test_schedule_by_hand():
    config = TopologyConfig(start_multiple=8, anneal_share=0.5, period=20, stop_share=0.75)
    topology = Topology(Model(8), None, config, 1000)
    assert topology.fraction(0) == 8
    assert topology.fraction(250) == 4.5
    assert topology.fraction(500) == topology.fraction(999) == 1
    assert topology.fan("up", 0) == 24  # capped at dense
    assert topology.fan("up", 250) == 18
    assert topology.fan("down", 250) == 14  # 3 * 4.5, rounded to even
    assert topology.fan("up", 499) == 4
    assert topology.fan("up", 500) == 4
    assert topology.replaced_share(0) == 0.3
    assert topology.replaced_share(375) == pytest.approx(0.15)
    assert topology.replaced_share(750) == topology.replaced_share(999) == 0
    assert not topology.changes(0)
    assert [step for step in range(1, 70) if topology.changes(step)] == [20, 40, 60]
    assert topology.changes(740)
    assert not topology.changes(760)


def test_the_fans_reach_their_ends_whatever_the_period():
    for total, period in ((50, 20), (10, 7), (3, 1), (37, 100), (1, 5)):
        config = TopologyConfig(start_multiple=4, period=period, drop_share=0)
        topology = Topology(Model(4), None, config, total)
        last = max((step for step in range(total) if topology.changes(step)), default=0)
        assert {name: topology.fan(name, last) for name in TARGETS} == TARGETS


def test_a_static_pattern_never_changes():
    config = TopologyConfig(start_multiple=1, drop_share=0, period=1)
    model, optimizer, topology = training(config, 5)
    before = topology.hash()
    for step in range(5):
        assert not topology.wants_gradients(step)
        advance(model, optimizer, topology, step)
        assert not topology.step(step)
    assert topology.hash() == before


@given(
    multiple=st.floats(1, 9),
    anneal=st.floats(0, 1),
    period=st.integers(1, 6),
    stop=st.floats(0, 1),
    drop=st.floats(0, 1),
    candidates=st.floats(0, 1),
    grow=st.sampled_from(["gradient", "random"]),
    total=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_fans_follow_the_schedule_and_equal_runs_are_equal(
    multiple, anneal, period, stop, drop, candidates, grow, total, seed
):
    config = TopologyConfig(
        start_multiple=multiple,
        anneal_share=anneal,
        period=period,
        stop_share=stop,
        drop_share=drop,
        candidates=candidates,
        grow=grow,
        seed=seed,
    )
    runs = []
    for _ in range(2):
        model, optimizer, topology = training(config, total)
        record = []
        for step in range(total):
            loss = advance(model, optimizer, topology, step)
            record.append((loss, topology.hash()))
            for name, layer in model.sparse_layers().items():
                indices = layer.layout.indices
                assert (indices[:, 1:] > indices[:, :-1]).all()
                assert layer.weight.shape == layer.layout.values_shape
                if topology.changes(step):
                    assert layer.layout.fan_in == topology.fan(name, step)
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert optimizer.state[layer.weight][moment].shape == layer.weight.shape
        runs.append(record)
    assert runs[0] == runs[1]
    if total > 1:
        assert {name: layer.layout.fan_in for name, layer in model.sparse_layers().items()} == (
            TARGETS if multiple > 1 else {n: topology.fan(n, 0) for n in TARGETS}
        )


# ---- one change


def plain_choice(weight, layout, fan, replaced, candidates, scores):
    """One row at a time, in lists."""
    rows = []
    for r in range(layout.block_rows):
        columns = layout.indices[r].tolist()
        size = dict(zip(columns, weight[r].abs().flatten(1).sum(1).tolist(), strict=True))
        own = sorted(columns, key=lambda c: (-size[c], c))
        gain = dict(
            zip(candidates.indices[r].tolist(), scores[r].flatten(1).sum(1).tolist(), strict=True)
        )
        new = sorted((c for c in gain if c not in columns), key=lambda c: (-gain[c], c))
        new = new[: min(replaced, fan, candidates.blocks_per_row)]
        rows.append(sorted(own[: fan - len(new)] + new))
    return torch.tensor(rows)


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_change_of_a_layer_against_a_plain_loop(data, seed):
    g = torch.Generator().manual_seed(seed)
    block = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    before, count = data.draw(st.integers(1, columns)), data.draw(st.integers(1, columns))
    fan = data.draw(st.integers(1, before))
    replaced = data.draw(st.integers(0, fan))

    def draw(fan):
        shape = rows * block[0], columns * block[1], fan * block[1], block
        return sk.FanInLayout.random(*shape, generator=g)

    layout, candidates = draw(before), draw(count)
    weight = torch.randn(layout.values_shape, generator=g, dtype=torch.float64)
    scores = torch.rand(candidates.values_shape, generator=g, dtype=torch.float64)
    new = rewired(weight, layout, fan, replaced, candidates, scores)
    assert new.blocks_per_row == fan
    expected = plain_choice(weight, layout, fan, replaced, candidates, scores)
    assert torch.equal(new.indices.long(), expected)
    nothing = plain_choice(weight, layout, fan, 0, candidates, scores)
    assert torch.equal(rewired(weight, layout, fan, replaced).indices.long(), nothing)


@pytest.mark.parametrize("multiple", [1, 4])
def test_survivors_keep_everything_and_new_ones_start_at_zero(multiple):
    config = TopologyConfig(start_multiple=multiple, period=3, candidates=0.5)
    model, optimizer, topology = training(config, 20)
    for step in range(3):
        advance(model, optimizer, topology, step)
    with_step = {}

    def remember(*_):
        for name, layer in model.sparse_layers().items():
            state = optimizer.state[layer.weight]
            tensors = (layer.weight, state["exp_avg"], state["exp_avg_sq"])
            with_step[name] = layer.layout, [t.detach().clone() for t in tensors]

    optimizer.register_step_post_hook(remember)
    advance(model, optimizer, topology, 3)
    new_connections = 0
    for name, layer in model.sparse_layers().items():
        old, before = with_step[name]
        state = optimizer.state[layer.weight]
        now = (layer.weight, state["exp_avg"], state["exp_avg_sq"])
        for r, columns in enumerate(layer.layout.indices.tolist()):
            had = old.indices[r].tolist()
            for slot, column in enumerate(columns):
                new_connections += column not in had
                for after, earlier in zip(now, before, strict=True):
                    kept = earlier[r, had.index(column)] if column in had else 0
                    assert after[r, slot] == kept
    assert new_connections > 20


# ---- the gradient at connections that do not exist


@pytest.mark.parametrize("passes", [1, 3])
def test_candidates_are_scored_with_the_dense_gradient(passes):
    """Against the model with dense weights, whose gradient autograd computes everywhere."""
    model, _, topology = training(TopologyConfig(start_multiple=2, candidates=0.5), 100)
    assert topology.wants_gradients(20)
    with topology.capture():
        for step in range(passes):
            backward(model, step)
    weights = {}
    for name, layer in model.sparse_layers().items():
        dense = sk.to_dense(layer.weight.detach(), layer.layout).double()
        weights[name] = (dense.t() if layer.transpose else dense).contiguous().requires_grad_()
    biases = {
        name: getattr(model, name).bias.detach().double() for name in ("up", "down", "unembed")
    }
    for step in range(passes):
        batch, linear = tokens(step), torch.nn.functional.linear
        x = weights["embed"].t()[batch]
        h = torch.nn.functional.gelu(linear(x, weights["up"], biases["up"]))
        x = x + linear(h, weights["down"], biases["down"])
        y = linear(x, weights["unembed"], biases["unembed"])
        torch.nn.functional.cross_entropy(y.flatten(0, 1), batch.flatten().roll(1)).backward()
    for name, layer in model.sparse_layers().items():
        gradient = weights[name].grad.t() if layer.transpose else weights[name].grad
        candidates = topology._candidates[name]
        expected = gradient.gather(1, candidates.indices.long())
        measured = topology._gradients[name][:, :, 0, 0].double()
        assert candidates.blocks_per_row == layer.layout.block_cols // 2
        torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-7)


def test_candidates_that_exist_have_the_gradient_of_their_weight():
    """In the real model, whose pieces have gradients of their own; every layer is seen."""
    config = ModelConfig(vocab_size=64, n_layer=2, d_model=32, context=16, d_head=8)
    model = Transformer(config, fan_multiple=4, generator=torch.Generator().manual_seed(0))
    topology = Topology(model, None, TopologyConfig(candidates=0.5), 100)
    batch = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
    assert topology.wants_gradients(20)
    with topology.capture():
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
    for name, layer in model.sparse_layers().items():
        old, columns = layer.layout.indices, topology._candidates[name].indices
        slots = torch.searchsorted(old, columns).clamp_(max=old.shape[1] - 1)
        exists = old.gather(1, slots) == columns
        assert 0 < exists.sum() < columns.numel(), name
        gradient = layer.weight.grad[:, :, 0, 0].gather(1, slots)[exists]
        measured = topology._gradients[name][:, :, 0, 0][exists]
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(measured, gradient, rtol=1e-4, atol=1e-8)


def test_every_column_is_a_candidate_about_as_often():
    _, _, topology = training(TopologyConfig(start_multiple=1, candidates=0.3), 100_000)
    counts = torch.zeros(24)
    for step in range(400):
        candidates = topology._draw("up", 1, step)
        assert candidates.blocks_per_row == 7
        counts += candidates.indices.flatten().long().bincount(minlength=24)
    # 32 rows x 400 draws: each is drawn from a range of 3 or 4 columns.
    assert counts.min() > 12800 / 4 * 0.9
    assert counts.max() < 12800 / 3 * 1.1


def test_capture_changes_neither_loss_nor_gradients_and_leaves_no_hook():
    model, _, topology = training(TopologyConfig(start_multiple=2), 100)
    loss = backward(model, 0)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    topology.wants_gradients(20)
    with topology.capture():
        assert backward(model, 0) == loss
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert not any(module._forward_hooks for module in model.modules())


def test_under_autocast():
    model, _, topology = training(TopologyConfig(start_multiple=2), 100)
    measured = []
    for enabled in (False, True):
        model.zero_grad()
        topology.wants_gradients(20)
        with topology.capture(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            backward(model, 0)
        measured.append(topology._gradients)
    for name, exact in measured[0].items():
        error = (measured[1][name] - exact).norm() / exact.norm()
        assert error < 0.05


def test_growth_finds_the_connection_that_matters():
    """y = 3 x[7]: the one input worth reading, which no row reads at first, is soon read by all."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            indices = torch.arange(8, 12).repeat(4, 1)
            self.layer = sk.SparseLinear(64, 4, fan_in=4, bias=False)
            sk.rewire_(self.layer, None, sk.FanInLayout(indices, 64))

        def sparse_layers(self):
            return {"layer": self.layer}

        def target_fan(self, name):
            return 4

    torch.manual_seed(0)
    model = One()
    nn.init.uniform_(model.layer.weight, -0.01, 0.01)
    optimizer = adam(model)
    config = TopologyConfig(start_multiple=1, period=3, candidates=0.4)
    topology = Topology(model, optimizer, config, 100)
    for step in range(60):
        x = torch.randn(64, 64)
        with topology.capture() if topology.wants_gradients(step) else torch.enable_grad():
            (model.layer(x) - 3 * x[:, 7:8]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        topology.step(step)
    assert (model.layer.indices == 7).any(dim=1).all()


# ---- refusals, checkpoints, ranks


def test_a_step_that_was_not_captured_is_refused():
    model, _, topology = training(TopologyConfig(start_multiple=2), 100)
    with pytest.raises(RuntimeError, match="wants_gradients"), topology.capture():
        pass
    before = topology.hash()
    assert topology.wants_gradients(20)
    with pytest.raises(RuntimeError, match=r"not captured for down, embed, unembed, up"):
        topology.step(20)
    with topology.capture():
        model.down(model.up(torch.randn(2, 24))).sum().backward()
    with pytest.raises(RuntimeError, match=r"not captured for embed, unembed:"):
        topology.step(20)
    assert topology.hash() == before
    assert not topology.wants_gradients(21)
    assert not topology.step(21)


def test_a_model_whose_fans_are_too_small_is_refused():
    model, optimizer, topology = training(TopologyConfig(start_multiple=8), 100, multiple=1)
    with pytest.raises(ValueError, match="fan_multiple"):
        advance(model, optimizer, topology, 20)


@pytest.mark.parametrize(
    "setting",
    [
        {"start_multiple": 0.5},
        {"period": 0},
        {"anneal_share": 1.5},
        {"drop_share": -0.1},
        {"candidates": 2},
        {"grow": "most"},
    ],
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        TopologyConfig(**setting)


def test_resumed_is_the_same_as_never_stopped():
    config = TopologyConfig(start_multiple=4, period=2)
    model, optimizer, topology = training(config, 20)
    losses = []
    for step in range(20):
        if step == 7:
            saved = copy.deepcopy(
                (model.state_dict(), optimizer.state_dict(), topology.state_dict())
            )
        losses.append(advance(model, optimizer, topology, step))
    again = Model(seed=5)
    with pytest.raises(ValueError, match="connections"):
        Topology(again, None, config, 20).load_state_dict(saved[2])
    for name, layer in again.sparse_layers().items():
        old = layer.layout
        indices = saved[0][f"{name}.indices"]
        new = sk.FanInLayout(indices, old.in_features, old.out_features, old.block)
        sk.rewire_(layer, None, new)
    again.load_state_dict(saved[0])
    optimizer_again = adam(again)
    optimizer_again.load_state_dict(saved[1])
    topology_again = Topology(again, optimizer_again, config, 20)
    topology_again.load_state_dict(saved[2])
    assert [
        advance(again, optimizer_again, topology_again, step) for step in range(7, 20)
    ] == losses[7:]
    assert topology_again.hash() == topology.hash()


def test_two_ranks_decide_alike(monkeypatch):
    """Two threads play two ranks with different batches; all_reduce really adds."""
    barrier, shared, own = threading.Barrier(2, timeout=60), [None, None], threading.local()

    def all_reduce(tensor):
        shared[own.rank] = tensor.clone()
        barrier.wait()
        total = shared[0] + shared[1]
        barrier.wait()
        tensor.copy_(total)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    config, results = TopologyConfig(start_multiple=3, period=2, candidates=0.5), [None, None]

    def run(rank):
        own.rank = rank
        model, optimizer, topology = training(config, 12)
        hashes = []
        for step in range(12):
            optimizer.zero_grad()
            with topology.capture() if topology.wants_gradients(step) else torch.enable_grad():
                backward(model, step, rank)
            for parameter in model.parameters():
                all_reduce(parameter.grad)
            optimizer.step()
            topology.step(step)
            hashes.append(topology.hash())
        results[rank] = hashes

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results[0] == results[1]
    assert len(set(results[0])) > 3


def test_hash_follows_the_pattern():
    assert Topology(Model(2), None, TopologyConfig(), 9).hash() == (
        Topology(Model(2), None, TopologyConfig(), 9).hash()
    )
    assert Topology(Model(2), None, TopologyConfig(), 9).hash() != (
        Topology(Model(2, seed=1), None, TopologyConfig(), 9).hash()
    )
