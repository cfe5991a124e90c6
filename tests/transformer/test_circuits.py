"""Circuits: the parts of a model, and a planted circuit that the whole procedure must find."""

import dataclasses
import math
import time

import pytest
import torch
from test_model import SMALL, batch, make

from sparse_transformer import ModelConfig, Transformer, UserError, hooks
from sparse_transformer.circuits.ablation import keep_nodes, mask_nodes, remove_edges
from sparse_transformer.circuits.budget import Budget, Progress
from sparse_transformer.circuits.circuit import Validation
from sparse_transformer.circuits.edge_attribution import edge_effects, node_effects
from sparse_transformer.circuits.graph import Edges, Nodes, count_weights
from sparse_transformer.circuits.masks import EdgeMasks, MaskConfig, NodeMasks, Price, train_masks
from sparse_transformer.circuits.objective import (
    Calibration,
    Subgraph,
    TaskLoss,
    calibrate,
    score,
)
from sparse_transformer.circuits.pipeline import CURVE, find_circuit, need_reachable
from sparse_transformer.circuits.prune import greedy_prune, threshold_edges, threshold_nodes
from sparse_transformer.circuits.search import search
from sparse_transformer.circuits.validate import control, validate
from sparse_transformer.tasks import Pair, Prompt

LINEARS = ("sparse", "masked_dense", "dense")


def model_of(linear="sparse", dtype=torch.float32, **changes):
    model = make(dataclasses.replace(SMALL, linear=linear, **changes), dtype=dtype)
    return model.eval().requires_grad_(False)


def base_of(model, seed=3):
    """Any constants, of the size of activations."""
    generator = torch.Generator().manual_seed(seed)
    tokens = batch()[0]
    with hooks.recording(model) as seen:
        model(tokens)
    return {
        name: torch.randn(value.shape[-1], generator=generator, dtype=torch.float64).to(value)
        * value.std()
        for name, value in seen.items()
    }


# --- nodes


def test_nodes_have_names_and_numbers():
    nodes = Nodes.of(SMALL)
    W = SMALL.d_model
    assert nodes.total == SMALL.n_layer * (7 * W + 4 * W)
    assert [nodes.index(nodes.id(number)) for number in range(nodes.total)] == list(
        range(nodes.total)
    )
    assert nodes.id(0) == "0.attn.act_in:0"
    assert nodes.locate(nodes.index("1.mlp.post_act:5")) == ("1.mlp.post_act", 5)
    parts = nodes.split(torch.arange(nodes.total))
    assert torch.equal(torch.cat(list(parts.values())), torch.arange(nodes.total))
    assert int(parts["1.attn.v"][3]) == nodes.index("1.attn.v:3")


@pytest.mark.parametrize(
    "id",
    ["0.mlp.post:3", "0.mlp.post_act:128", "0.mlp.post_act", "0.mlp.post_act:-1", "0.attn.y:1"],
)
def test_there_are_no_other_nodes(id):
    with pytest.raises(KeyError):
        Nodes.of(SMALL).index(id)


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("changes", [{}, {"positions": 8}, {"active": None}, {"sinks": False}])
def test_freezing_is_what_interventions_do(linear, changes):
    model = model_of(linear, **changes)
    tokens, base = batch()[0], base_of(model)
    nodes = Nodes.of(model.config)
    keep = torch.rand(nodes.total, generator=torch.Generator().manual_seed(0)) < 0.7
    by_place = nodes.split(keep)

    def change(name):
        # A frozen v freezes the head's result at the same channel.
        part = by_place[name[:-1] + "v" if name.endswith(".y") else name]
        return lambda x: torch.where(part, x, base[name])

    names = [name for name in hooks.names(model) if name != "final_resid"]
    with hooks.replacing(model, {name: change(name) for name in names}):
        wanted = model(tokens)
    with keep_nodes(model, keep, base):
        found = model(tokens)
    assert torch.equal(found, wanted)
    with keep_nodes(model, torch.ones_like(keep), base):
        torch.testing.assert_close(model(tokens), model(tokens))
    assert not torch.equal(found, model(tokens))


def test_with_nothing_kept_only_the_last_token_counts():
    model = model_of()
    tokens = batch()[0]
    other = tokens.roll(1, 1)
    other[:, -1] = tokens[:, -1]
    keep = torch.zeros(Nodes.of(SMALL).total, dtype=torch.bool)
    with keep_nodes(model, keep, base_of(model)):
        assert torch.equal(model(tokens)[:, -1], model(other)[:, -1])
    assert not torch.equal(model(tokens)[:, -1], model(other)[:, -1])


def test_groups_are_frozen_each_by_itself():
    model, tokens = model_of(), batch(B=4)[0]
    base, total = base_of(model), Nodes.of(SMALL).total
    keeps = torch.rand(2, total, generator=torch.Generator().manual_seed(1)) < 0.6
    with keep_nodes(model, keeps, base):
        together = model(tokens)
    for group, keep in enumerate(keeps):
        rows = slice(2 * group, 2 * group + 2)
        with keep_nodes(model, keep, base):
            torch.testing.assert_close(together[rows], model(tokens[rows]))


def test_masks_have_the_gradient_of_the_formula():
    model = model_of(dtype=torch.float64, active=None)
    tokens = batch(B=4, T=20)[0]
    base = base_of(model)
    nodes = Nodes.of(model.config)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(2, nodes.total, generator=generator, dtype=torch.float64) * 2 - 0.8
    mask.requires_grad_(True)
    temperature = torch.tensor([[1.0], [0.3]], dtype=torch.float64)
    weights = torch.randn(4, 20, SMALL.vocab_size, generator=generator, dtype=torch.float64)
    with mask_nodes(model, mask, base, temperature):
        found = model(tokens)
    (found * weights).sum().backward()
    with keep_nodes(model, mask.detach() > 0, base):
        torch.testing.assert_close(found.detach(), model(tokens))
    # The same with the step as a variable h of its own: y = base + h (x - base).
    step = (mask.detach() > 0).double().requires_grad_(True)
    by_place = nodes.split(step)

    def change(name):
        part = by_place[name[:-1] + "v" if name.endswith(".y") else name]
        rows = part.repeat_interleave(2, 0).unsqueeze(1)
        return lambda x: base[name] + rows * (x - base[name])

    names = [name for name in hooks.names(model) if name != "final_resid"]
    with hooks.replacing(model, {name: change(name) for name in names}):
        (model(tokens) * weights).sum().backward()
    share = torch.sigmoid(mask.detach() / temperature)
    wanted = step.grad * share * (1 - share) / temperature
    torch.testing.assert_close(mask.grad, wanted)
    assert int((wanted != 0).sum()) > nodes.total


# --- edges


@pytest.mark.parametrize("writers", ["fan_out", "fan_in"])
@pytest.mark.parametrize("linear", LINEARS)
def test_edges_are_the_nonzero_weights_of_the_blocks(linear, writers):
    model = model_of(linear, writers=writers)
    edges, nodes = Edges.of(model), Nodes.of(model.config)
    starts = {name: nodes.index(f"{name}:0") for name in nodes.names}
    dense = torch.zeros(nodes.total, nodes.total)
    dense[edges.target, edges.source] = edges.weight
    count = 0
    for layer, block in enumerate(model.blocks):
        for module, source, targets in (
            (block.attn.qkv, "attn.act_in", ("attn.q", "attn.k", "attn.v")),
            (block.attn.out, "attn.v", ("attn.resid_delta",)),
            (block.mlp.up, "mlp.act_in", ("mlp.post_act",)),
            (block.mlp.down, "mlp.post_act", ("mlp.resid_delta",)),
        ):
            weight = module.to_dense().weight if linear == "sparse" else module.weight
            count += int((weight != 0).sum())
            for part, target in zip(weight.chunk(len(targets)), targets, strict=True):
                row, column = starts[f"{layer}.{target}"], starts[f"{layer}.{source}"]
                block_found = dense[row : row + part.shape[0], column : column + part.shape[1]]
                assert torch.equal(block_found, part)
    assert len(edges.weight) == count == int((dense != 0).sum())
    everything = torch.ones(nodes.total, dtype=torch.bool)
    assert edges.count(everything) == count
    everything[starts["0.mlp.post_act"]] = False
    neuron = dense[starts["0.mlp.post_act"]].count_nonzero()
    neuron += dense[:, starts["0.mlp.post_act"]].count_nonzero()
    assert edges.count(everything) == count - neuron


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"writers": "fan_in"}])
def test_a_removed_edge_carries_the_base(linear, changes, by_token):
    model = model_of(linear, dtype=torch.float64, **changes)
    tokens = batch()[0]
    edges, base = Edges.of(model), base_of(model)
    if by_token:
        with hooks.recording(model) as seen:
            model(tokens.roll(1, 0))
        base = dict(seen)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matrix = edges.matrices[0]
    module = model.get_submodule(matrix.module)
    removed = torch.rand(len(edges.source), generator=torch.Generator().manual_seed(0)) < 0.5
    gone = edges.split(removed)[0]
    dense = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
    dense[matrix.outputs[gone], matrix.inputs[gone]] = matrix.weight[gone]
    inputs = []
    hook = module.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    only = torch.zeros_like(removed)
    only[: len(gone)] = gone
    outputs = []
    with remove_edges(model, edges, only, base):
        watch = module.register_forward_hook(lambda module, given, out: outputs.append(out))
        model(tokens)
        watch.remove()
    hook.remove()
    wanted = module(inputs[0]) + (base[matrix.reads] - inputs[0]) @ dense.T
    torch.testing.assert_close(outputs[0], wanted)
    with pytest.raises(KeyError), remove_edges(model, edges, removed, base):
        raise KeyError
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in model.modules())


# --- calibration


def test_calibration_finds_scale_and_shift_and_never_turns_the_sign():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(4000, generator=generator)
    truth = torch.rand(4000, generator=generator) < torch.sigmoid(2.5 * difference - 0.7)
    diffs = torch.where(truth, difference, -difference)
    found = calibrate(diffs, truth)
    assert found.scale == pytest.approx(2.5, rel=0.1)
    assert found.shift == pytest.approx(-0.7, abs=0.15)
    tiny = calibrate(diffs * 1e-6, truth)
    assert tiny.scale == pytest.approx(found.scale * 1e6, rel=1e-2)
    wrong = calibrate(-diffs, truth)
    assert wrong.scale > 0
    # What always answers wrongly knows as little as who guesses.
    assert score(-diffs, truth, wrong).loss > 0.6
    assert score(diffs, truth, Calibration(1.0, 0.5)).loss == pytest.approx(
        float(torch.nn.functional.softplus(-(diffs + torch.where(truth, 0.5, -0.5))).mean())
    )


# --- a planted circuit

V, D = 12, 8
A, B, END = 0, 1, V - 1
ANSWERS = (8, 9)


class PlantedTask:
    """The first token, 0 or 1, decides whether 8 or 9 follows; tokens 2 to 7 in between."""

    name, description = "planted", "Say which token came first."

    def pairs(self, tokenizer, count, *, split, seed=0, context=256, max_tokens=None):
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        found = []
        for _ in range(count):
            length = int(torch.randint(2, 9, (), generator=generator))
            rest = torch.randint(2, 8, (length,), generator=generator).tolist()
            sides = [
                Prompt(f"{first} {rest}", (first, *rest), ANSWERS[first], ANSWERS[1 - first])
                for first in (A, B)
            ]
            found.append(Pair(*sides))
        return found


def planted(noise=0.02, seed=0):
    """Layer 0 reads channel 0, v channel 5 takes the mean over positions, channel 3 is written."""
    config = ModelConfig(
        vocab_size=V, n_layer=2, d_model=D, d_head=4, context=16, active=None, linear="dense",
        sinks=False, bigram=False,
    )  # fmt: skip
    model = Transformer(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, noise, generator=torch.Generator().manual_seed(len(name)))
        model.embed.weight[:, 1] = 3.0
        model.embed.weight[A, 0], model.embed.weight[B, 0] = 3.0, -3.0
        block = model.blocks[0].attn
        block.qkv.weight[2 * D + 5, 0] = 2.0
        block.out.weight[3, 5] = 8.0
        model.unembed.weight[ANSWERS[0], 3], model.unembed.weight[ANSWERS[1], 3] = 4.0, -4.0
    return model


PLANTED_NODES = {"0.attn.act_in:0", "0.attn.v:5", "0.attn.resid_delta:3"}


def planted_means(model):
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(V, (64, 12), generator=generator)
    with hooks.recording(model) as seen, torch.no_grad():
        model(tokens)
    return {name: value.mean((0, 1)) for name, value in seen.items()}


def planted_task(seed=0):
    model = planted()
    return TaskLoss(
        model, PlantedTask(), None, planted_means(model), train_pairs=64, fit_pairs=24,
        test_pairs=32, seed=seed,
    )  # fmt: skip


@pytest.fixture
def task():
    return planted_task()


def everything(task):
    return Subgraph(torch.ones(task.nodes.total, dtype=torch.bool))


def ids(task, keep):
    return {task.nodes.id(number) for number in keep.nonzero().squeeze(1).tolist()}


BUDGET = Budget(trials=4, together=2, steps=60, pairs=8, finalists=1)


def test_the_planted_circuit_is_found_and_validated(task):
    assert task.score(task.test).accuracy == 1.0
    found = find_circuit(task, 0.15, BUDGET)
    assert ids(task, found.subgraph.keep) == PLANTED_NODES
    assert found.sizes["edges"] == (3, 2)
    assert found.sizes["cut"].edges >= found.sizes["nodes"].edges >= 2
    validation = found.validation
    assert validation.sufficient
    assert validation.necessary
    assert validation.circuit["mean"].accuracy == 1.0
    assert validation.without["mean"].loss > 0.6
    assert validation.without["resample"].loss > 0.6
    assert validation.control.passed
    assert validation.control.loss > 0.5
    assert validation.control.limit == 10 * found.sizes["nodes"].edges
    assert [point.target for point in found.curve if point is not None] == list(CURVE)
    steps = ["search", "prune nodes", "prune edges", "validate", "control", "size curve"]
    assert list(found.seconds) == steps


def test_what_is_left_of_the_time_decides_how_much_is_done(task, monkeypatch):
    """The steps are far too many for the time; the search ends in time, with a valid circuit."""
    clock = Clock(monkeypatch)
    budget = dataclasses.replace(BUDGET, seconds=30.0, steps=10**6)
    found = find_circuit(task, 0.15, budget)
    assert clock() < 1.2 * budget.seconds
    assert task.calibrated_loss(found.subgraph) <= 0.15
    assert found.validation.pairs >= min(32, len(task.test))
    assert 0 < found.validation.control.trained < 1
    assert sum(found.seconds.values()) <= clock()


class Clock:
    """`time.monotonic` that runs five times as fast, and not while other processes run."""

    def __init__(self, monkeypatch):
        self._began = time.process_time()
        monkeypatch.setattr(time, "monotonic", self)

    def __call__(self):
        return 5.0 * (time.process_time() - self._began)


def test_pruning_ends_when_its_time_is_over(task):
    whole = everything(task)
    assert greedy_prune(task, whole, 0.15, progress=Progress(1e-9)).keep.all()


def test_a_step_has_its_share_of_the_time_and_a_part_that_of_the_step():
    progress = Progress(100.0)
    progress.reserved = 20.0
    with progress.step("a", 0.25):
        assert progress.left == pytest.approx(20, abs=1)
        with progress.part(0.0, 0.5):
            assert progress.left == pytest.approx(10, abs=1)
        with progress.part(0.5, 1.0):
            assert progress.left == pytest.approx(20, abs=1)
    progress.reserved = 0.0
    with progress.step("b", 1.0):
        assert progress.left == pytest.approx(100, abs=1)
    assert list(progress.laps) == ["a", "b"]


def test_the_bar_has_one_line_and_ends_full(capsys):
    progress = Progress(100.0, shown=True)
    with progress.step("search", 0.5), progress.part(0.0, 0.5):
        progress.advance(0.5, edges=7)
    with progress.step("control", 1.0):
        progress.advance(0.1)
    progress.close()
    shown = capsys.readouterr().err
    assert "search" in shown
    assert "left" in shown
    assert "\n" not in shown.strip()


def test_a_wrong_circuit_is_neither_sufficient_nor_necessary(task):
    keep = torch.zeros(task.nodes.total, dtype=torch.bool)
    for id in ("0.attn.act_in:2", "0.attn.v:4", "0.attn.resid_delta:6"):
        keep[task.nodes.index(id)] = True
    validation = validate(task, Subgraph(keep), Calibration(), 0.15)
    assert not validation.sufficient
    assert not validation.necessary
    assert validation.circuit["mean"].loss > 0.6
    assert validation.without["mean"].accuracy == 1.0
    assert Validation.from_dict(validation.to_dict()) == validation


def test_the_control_sees_a_procedure_that_can_fit_anything(task, monkeypatch):
    honest = control(task, 20, MaskConfig(steps=5, pairs=8), 0.15)
    assert honest.passed
    # With the labels left as they are the same nodes do reach the target.
    monkeypatch.setattr(TaskLoss, "with_random_labels", lambda self, seed: self)
    config = MaskConfig(steps=120, pairs=8, price=1e-2, learning_rate=5e-2)
    fooled = control(task, 20, config, 0.15)
    assert fooled.reached
    assert not fooled.passed


def test_a_cut_is_the_least_that_the_order_allows(task):
    mask = torch.full((task.nodes.total,), -0.5)
    for place, id in enumerate(sorted(PLANTED_NODES)):
        mask[task.nodes.index(id)] = 0.9 - 0.1 * place
    mask[task.nodes.index("1.mlp.post_act:0")] = 0.85  # in between, and of no use
    found = threshold_nodes(task, mask, 0.15)
    assert found.nodes == 4
    assert found.loss <= 0.15
    assert ids(task, found.keep) == PLANTED_NODES | {"1.mlp.post_act:0"}
    subgraph = greedy_prune(task, Subgraph(found.keep), 0.15)
    assert ids(task, subgraph.keep) == PLANTED_NODES
    assert task.size(subgraph) == 2


def test_refining_from_the_whole_model_leaves_what_is_planted(task):
    subgraph = greedy_prune(task, everything(task), 0.15)
    assert ids(task, subgraph.keep) >= PLANTED_NODES
    assert task.size(subgraph) == 2
    assert task.calibrated_loss(subgraph) <= 0.15


def test_masks_on_edges_find_the_planted_ones(task):
    whole = everything(task).keep
    config = MaskConfig(steps=120, pairs=8, price=1e-3, learning_rate=5e-2, aim=0.1)
    (mask,) = train_masks(EdgeMasks(task, whole), [config]).masks
    assert float(mask.abs().max()) <= 1
    subgraph = threshold_edges(task, whole, mask, 0.15)
    assert subgraph is not None
    assert task.calibrated_loss(subgraph) <= 0.15
    assert ids(task, subgraph.keep) >= PLANTED_NODES
    assert task.size(subgraph) < 20
    refined = greedy_prune(task, subgraph, 0.15)
    assert ids(task, refined.keep) == PLANTED_NODES
    # Among these nodes there is nothing to be found.
    nothing = torch.zeros_like(whole)
    nothing[task.nodes.index("1.mlp.post_act:0")] = True
    (mask,) = train_masks(EdgeMasks(task, nothing), [dataclasses.replace(config, steps=2)]).masks
    assert mask.shape == (0,)
    assert threshold_edges(task, nothing, mask, 0.15) is None


def test_a_price_follows_the_loss():
    fixed, follows = Price(MaskConfig(price=1e-3)), Price(MaskConfig(price=1e-3, aim=0.1))
    assert [fixed.after(loss) for loss in (0.0, 5.0)] == [1e-3, 1e-3]
    rising = [follows.after(0.0) for _ in range(50)]
    assert rising == sorted(rising)
    assert rising[-1] > 5e-3
    falling = [follows.after(5.0) for _ in range(100)]
    assert falling[-1] < 1e-3
    assert follows.after(0.0) > 0


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


def test_masks_are_trained_alike_alone_and_together(task):
    configs = [
        MaskConfig(steps=30, pairs=4, price=price, learning_rate=3e-2) for price in (1e-4, 1e2)
    ]
    together = train_masks(NodeMasks(task), configs).masks
    for config, mask in zip(configs, together, strict=True):
        (alone,) = train_masks(NodeMasks(task), [config]).masks
        torch.testing.assert_close(mask, alone, atol=1e-3, rtol=0)
    # What the task needs becomes worth less than its price.
    needed = [task.nodes.index(id) for id in PLANTED_NODES]
    assert (together[0][needed] > 0).all()
    assert (together[1][needed] < 0).all()
    assert float(together.abs().max()) <= 1


@pytest.mark.slow
def test_a_search_goes_on_where_it_stopped(task, tmp_path):
    journal = tmp_path / "search.journal"
    first = search(task, 0.12, dataclasses.replace(BUDGET, trials=2), journal=journal)
    trained = []

    def watched(*arguments, **keywords):
        trained.append(1)
        return train_masks(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_transformer.circuits.search.train_masks", watched)
        again = search(task, 0.12, dataclasses.replace(BUDGET, trials=2), journal=journal)
        assert not trained
        assert [c.nodes.edges for c in again] == [c.nodes.edges for c in first]
        assert torch.equal(again[0].nodes.keep, first[0].nodes.keep)
        search(task, 0.12, BUDGET, journal=journal)
        assert len(trained) == 1
        # Another key begins anew.
        search(task, 0.12, BUDGET, journal=journal, key="other")
        assert len(trained) == 3


def test_what_the_model_cannot_do_is_refused(task):
    assert need_reachable(task, 0.15).accuracy == 1.0
    random = task.with_random_labels(0)
    with pytest.raises(UserError, match=r"no circuit can have 0\.15 to spare"):
        need_reachable(random, 0.15)
    assert 0.3 < random.score(random.test).accuracy < 0.7
    with pytest.raises(UserError, match="does not solve planted: its accuracy is"):
        random.need_solved(0.95)


def test_resampled_activations_are_those_of_the_other_prompt(task):
    pairs = task.test[:4]
    nothing = Subgraph(torch.zeros(task.nodes.total, dtype=torch.bool))
    others = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])  # the other one of the pair
    diffs, _ = task.logit_diffs(pairs, nothing, resample=others)
    whole, _ = task.logit_diffs(pairs)
    # Nothing is left but the other prompt's activations, and they say the other answer.
    assert (diffs < 0).all()
    assert (whole > 0).all()
    assert math.isclose(float(diffs.abs().mean()), float(whole.abs().mean()), rel_tol=0.2)


@pytest.mark.parametrize("linear", LINEARS)
def test_l0_is_that_of_training(linear):
    model = model_of(linear)
    nonzero = sum(
        int(parameter.count_nonzero())
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and "norm" not in name
    )
    assert count_weights(model) == nonzero > len(Edges.of(model).weight)
