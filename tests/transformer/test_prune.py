"""Pruning: dead ends, thresholds, effects by gradients, and what goes first."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from planted import (
    PLANTED_NODES,
    A,
    B,
    D,
    V,
    chosen,
    deaf,
    everything,
    ids,
    planted,
    task_of,
)

from sparse_transformer import hooks
from sparse_transformer.circuits import prune
from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.edge_attribution import edge_effects, node_effects
from sparse_transformer.circuits.objective import (
    Subgraph,
    calibrate,
    score,
)
from sparse_transformer.circuits.prune import (
    NodeOrder,
    greedy_prune,
    on_paths,
)


def test_dead_ends_are_removed(task):
    """The last token of each path is what the planted model has exactly; nothing else leads on."""
    task = deaf(task)
    circuit = chosen(task, *PLANTED_NODES)
    assert torch.equal(on_paths(task, circuit).keep, circuit.keep)
    for more in (
        "0.attn.v:4",  # without a source
        "0.attn.act_in:2",  # read by nothing
        "1.attn.act_in:3",  # reads what is written, and leads nowhere
        "1.mlp.resid_delta:3",  # would reach the answer, but nothing reaches it
        "0.attn.q:5",  # decides where v looks, but reads nothing
    ):
        wider = chosen(task, *PLANTED_NODES, more)
        assert torch.equal(on_paths(task, wider).keep, circuit.keep), more
    for id in PLANTED_NODES:
        assert not on_paths(task, chosen(task, *(PLANTED_NODES - {id}))).keep.any()
    # What decides where a kept v looks is on a path.
    task.model.blocks[0].attn.qkv.weight.data[6, 1] = 1.0
    task = task_of(task.model)
    wider = chosen(task, *PLANTED_NODES, "0.attn.act_in:1", "0.attn.q:6")
    assert torch.equal(on_paths(task, wider).keep, wider.keep)
    # Without their edge, neither end is.
    edge = (task.edges.source == task.nodes.index("0.attn.v:5")) & wider.keep[task.edges.target]
    cut = dataclasses.replace(wider, removed=edge)
    assert int(edge.sum()) == 1
    assert not on_paths(task, cut).keep.any()


def test_every_node_that_is_found_lies_on_a_path(task):
    mask = torch.rand(task.nodes.total, generator=torch.Generator().manual_seed(3))
    for id in PLANTED_NODES:
        mask[task.nodes.index(id)] = 0.5
    found = NodeOrder.of(task, mask).threshold(0.15)
    assert torch.equal(on_paths(task, Subgraph(found.keep)).keep, found.keep)
    pruned = greedy_prune(task, Subgraph(found.keep), 0.15)
    assert torch.equal(on_paths(task, pruned).keep, pruned.keep)


def test_pruning_ends_when_its_time_is_over(task):
    whole = everything(task)
    assert greedy_prune(task, whole, 0.15, progress=Progress(1e-9)).keep.all()


def test_a_cut_is_the_least_that_the_order_allows(task):
    mask = torch.full((task.nodes.total,), -0.5)
    for place, id in enumerate(sorted(PLANTED_NODES)):
        mask[task.nodes.index(id)] = 0.9 - 0.1 * place
    mask[task.nodes.index("1.mlp.post_act:0")] = 0.85  # in between, and of no use
    mask[task.nodes.index("0.attn.v:4")] = 0.85  # in between, and on another path
    found = NodeOrder.of(task, mask).threshold(0.15)
    # The neuron is a dead end.
    assert found.nodes == 4
    assert found.loss <= 0.15
    assert ids(task, found.keep) == PLANTED_NODES | {"0.attn.v:4"}
    subgraph = greedy_prune(task, Subgraph(found.keep), 0.15)
    assert ids(task, subgraph.keep) == PLANTED_NODES
    assert task.size(subgraph) == 2


def test_refining_from_the_whole_model_leaves_what_is_planted(task):
    subgraph = greedy_prune(task, everything(task), 0.15)
    assert ids(task, subgraph.keep) >= PLANTED_NODES
    assert task.size(subgraph) == 2
    assert task.calibrated_loss(subgraph) <= 0.15


def test_what_costs_least_for_its_edges_goes_first():
    """Of three noisy paths the weakest goes, whichever it is, and nothing that is left could go."""
    for weakest in range(3):
        model, generator = planted(noise=0.0), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, channel in enumerate((0, 2, 4)):
                strength = 1.5 if path == weakest else 3.0
                model.embed.weight[:, channel] = torch.randn(V, generator=generator)
                model.embed.weight[A, channel] += strength
                model.embed.weight[B, channel] -= strength
                model.blocks[0].attn.qkv.weight[2 * D + 5 + path, :] = 0
                model.blocks[0].attn.qkv.weight[2 * D + 5 + path, channel] = 2.0
                model.blocks[0].attn.out.weight[3, 5 + path] = 8.0
        task = task_of(model)
        paths = [{f"0.attn.act_in:{2 * path}", f"0.attn.v:{5 + path}"} for path in range(3)]
        whole = chosen(task, "0.attn.resid_delta:3", *set.union(*paths))
        without = [
            task.calibrated_loss(
                chosen(task, "0.attn.resid_delta:3", *set.union(*paths[:path], *paths[path + 1 :]))
            )
            for path in range(3)
        ]
        target = without[weakest] + 1e-3
        assert (
            task.calibrated_loss(whole)
            < target
            < min(loss for path, loss in enumerate(without) if path != weakest)
        )
        found = greedy_prune(task, whole, target)
        left = task.present_edges(found).nonzero().squeeze(1)
        assert not ids(task, found.keep) & paths[weakest]
        assert len(left) == 4
        for edge in left:
            removed = found.removed.clone()
            removed[edge] = True
            assert task.calibrated_loss(dataclasses.replace(found, removed=removed)) > target


def test_nothing_has_no_effects_and_stays_nothing(task):
    nothing = Subgraph(torch.zeros(task.nodes.total, dtype=torch.bool))
    assert not node_effects(task, nothing).any()
    # The whole model is there to be let in again.
    assert node_effects(task, nothing, everywhere=True).any()
    assert not greedy_prune(task, nothing, 0.7).keep.any()


@pytest.mark.parametrize("effects", ["nodes", "edges"])
def test_estimated_effects_are_derivatives(task, effects):
    subgraph = Subgraph(
        everything(task).keep, torch.zeros(len(task.edges.source), dtype=torch.bool)
    )
    calibration = calibrate(*task.logit_diffs(task.fit, subgraph))
    epsilon = 1e-2

    def loss():
        diffs, positive = task.logit_diffs(task.fit)
        return score(diffs, positive, calibration).loss

    before = loss()
    if effects == "nodes":
        found = node_effects(task, subgraph)
        chosen = [task.nodes.index(id) for id in sorted(PLANTED_NODES)]
        chosen += [task.nodes.index("1.mlp.act_in:3")]
        for number in chosen:
            place, channel = task.nodes.locate(number)
            names = [place] + ([place[:-1] + "y"] if place.endswith(".v") else [])

            def change(name, channel=channel):
                def nearer(x):
                    x = x.clone()
                    mean = task.means[name][channel]
                    x[..., channel] += epsilon * (mean - x[..., channel])
                    return x

                return nearer

            with hooks.replacing(task.model, {name: change(name) for name in names}):
                measured = (loss() - before) / epsilon
            assert float(found[number]) == pytest.approx(measured, rel=0.1, abs=1e-4)
        return
    found = edge_effects(task, subgraph)
    order = found.abs().argsort(descending=True)
    for number in order[:4].tolist():
        which = torch.zeros_like(subgraph.removed)
        which[number] = True
        (matrix, gone) = next(
            (matrix, gone)
            for matrix, gone in zip(task.edges.matrices, task.edges.split(which), strict=True)
            if gone.any()
        )
        module = task.model.get_submodule(matrix.module)
        weight, inputs, outputs = matrix.weight[gone], matrix.inputs[gone], matrix.outputs[gone]
        change = epsilon * weight
        module.weight.data[outputs, inputs] -= change
        module.bias.data[outputs] += change * task.means[matrix.reads][inputs]
        measured = (loss() - before) / epsilon
        module.weight.data[outputs, inputs] += change
        module.bias.data[outputs] -= change * task.means[matrix.reads][inputs]
        assert float(found[number]) == pytest.approx(measured, rel=0.1, abs=1e-4)


class Candidates:
    """Numbers; the loss is the sum of what those that went are worth."""

    def __init__(self, effects, worth):
        self._effects, self._worth = torch.tensor(effects), torch.tensor(worth)
        self.subgraph = torch.zeros(0, dtype=torch.int64)
        self.task = SimpleNamespace(probe=lambda: None, calibrated_loss=self._loss)

    def left(self):
        return torch.arange(len(self._effects))

    def effects(self):
        return self._effects

    def without(self, gone):
        return gone

    def _loss(self, gone, probe=None):
        return float(self._worth[gone].sum())


def removed(effects, worth, target):
    return sorted(prune._many(Candidates(effects, worth), target, Progress()).tolist())


def test_a_large_gain_that_gradients_promise_is_not_trusted_first():
    """The loss rises tenfold by the node that should lower it, and hardly by the others."""
    effects = [-5.0] + [0.001] * 99
    assert removed(effects, [10.0] + [0.001] * 99, 1.0) == list(range(1, 100))


def test_as_many_of_the_cheapest_go_as_the_target_allows():
    costs = [float(number) for number in range(100)]
    assert removed(costs, costs, 45.0) == list(range(10))


@pytest.mark.parametrize(("worth", "wanted"), [(0.0, 400), (1.0, 0)])
def test_all_or_none(worth, wanted):
    assert len(removed([0.0] * 400, [worth] * 400, 0.5)) == wanted
