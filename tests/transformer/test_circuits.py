"""Parts of a model that circuits are made of: nodes, edges, calibrated answers."""

import dataclasses
import math

import pytest
import torch
from test_model import SMALL, batch, make

from sparse_transformer import hooks
from sparse_transformer.circuits.ablation import keep_nodes, mask_nodes, remove_edges
from sparse_transformer.circuits.forward import Skipped, answer_logits
from sparse_transformer.circuits.graph import Edges, Nodes
from sparse_transformer.circuits.objective import (
    Calibration,
    calibrate,
    score,
)
from sparse_transformer.circuits.validate import _Test
from sparse_transformer.model import count_weights

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


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"positions": 8}, {"added_positions": True}, {"n_layer": 1}, {"tied": True}],
)
def test_answers_are_those_of_the_model(linear, changes, shared):
    """With and without sublayers that are not computed, which write their baseline.

    Two prompts begin alike as far as the shorter one goes, two in part, one has no partner.
    """
    model = model_of(linear, **changes)
    tokens, T = batch(B=5)[0], batch()[0].shape[1]
    tokens[1], tokens[3, :4] = tokens[0], tokens[2, :4]
    last = torch.tensor([3, T - 1, 5, T - 2, 0])
    tokens[0, 4:] = model.config.vocab_size - 1
    wanted = model(tokens, at=last).squeeze(1)
    torch.testing.assert_close(answer_logits(model, tokens, last, shared=shared), wanted)
    base, nodes = base_of(model), Nodes.of(model.config)
    for gone in (["0.attn"], ["0.mlp"], ["0.attn", f"{model.config.n_layer - 1}.mlp"]):
        keep = torch.ones(nodes.total, dtype=torch.bool)
        for name in gone:
            nodes.split(keep)[f"{name}.resid_delta"].zero_()
        skipped = Skipped.without(nodes, keep, base)
        assert list(skipped.writes) == sorted(gone)
        with keep_nodes(model, keep, base):
            wanted = model(tokens, at=last).squeeze(1)
            found = answer_logits(model, tokens, last, skipped, shared=shared)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("heads", [[], [1], [0, 3]])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_without_a_v_are_not_computed(shared, heads):
    """Their result is replaced; so nothing changes but what they do to memory."""
    model = model_of()
    tokens, last = batch(B=4)[0], torch.tensor([30, 12, 7, 20])
    base, nodes = base_of(model), Nodes.of(model.config)
    keep = torch.ones(nodes.total, dtype=torch.bool)
    for layer in range(2):
        v = nodes.split(keep)[f"{layer}.attn.v"].view(-1, nodes.d_head)
        v.zero_()
        v[heads, 3:] = True
    skipped = Skipped.without(nodes, keep, base)
    assert skipped.heads["0.attn"].tolist() == heads
    found = {}
    for name, less in (("all", None), ("fewer", skipped)):
        with keep_nodes(model, keep, base):
            found[name] = answer_logits(model, tokens, last, less, shared=shared)
    torch.testing.assert_close(found["all"], found["fewer"])
    with hooks.recording(model, ["0.attn.y"]) as seen:
        answer_logits(model, tokens, last, skipped, shared=shared)
    computed = seen["0.attn.y"].unflatten(2, (-1, nodes.d_head)).abs().sum((0, 1, 3)) > 0
    assert computed.nonzero().squeeze(1).tolist() == heads


@pytest.mark.parametrize("changes", [{}, {"positions": 8}])
def test_what_prompts_share_is_computed_once(changes):
    """And has the gradients of all of them."""
    model = model_of(dtype=torch.float64, **changes).requires_grad_(False)
    tokens = batch(B=4, T=20)[0]
    tokens[1, :12], tokens[3, :15] = tokens[0, :12], tokens[2, :15]
    last = torch.tensor([19, 17, 16, 19])
    base = base_of(model)
    rows, found = {}, []
    for shared in (True, False):
        mask = (
            torch.linspace(-1, 1, Nodes.of(model.config).total)
            .double()[
                torch.randperm(
                    Nodes.of(model.config).total, generator=torch.Generator().manual_seed(1)
                )
            ]
            .requires_grad_(True)
        )
        with mask_nodes(model, mask, base), hooks.recording(model) as seen:
            logits = answer_logits(model, tokens, last, shared=shared)
            logits.square().sum().backward()
        found.append((logits.detach(), mask.grad))
        rows[shared] = {name: value[..., 0].numel() for name, value in seen.items()}
    torch.testing.assert_close(*found)
    beginnings = 20 + 6 + 17 + 5
    distinct = beginnings if changes else len(tokens.unique())
    assert rows[True]["0.attn.q"] == distinct
    assert rows[True]["0.mlp.post_act"] == beginnings
    assert rows[False]["0.attn.q"] == rows[False]["0.mlp.post_act"] == tokens.numel()
    assert rows[True]["1.attn.k"] == beginnings
    assert rows[True]["1.attn.y"] == len(tokens)


@pytest.mark.parametrize("by_token", [False, True])
def test_masks_have_the_gradient_of_the_formula(by_token):
    model = model_of(dtype=torch.float64, active=None)
    tokens = batch(B=4, T=20)[0]
    base = base_of(model)
    if by_token:
        base = {
            name: value.expand(4, 20, -1) + torch.rand(4, 20, 1) for name, value in base.items()
        }
    nodes = Nodes.of(model.config)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(nodes.total, generator=generator, dtype=torch.float64) * 2 - 0.8
    mask.requires_grad_(True)
    live = torch.rand(nodes.total, generator=generator) < 0.2
    weights = torch.randn(4, 20, SMALL.vocab_size, generator=generator, dtype=torch.float64)
    with mask_nodes(model, mask, base, 0.3, live):
        found = model(tokens)
    (found * weights).sum().backward()
    with keep_nodes(model, (mask.detach() > 0) | live, base):
        torch.testing.assert_close(found.detach(), model(tokens))
    # The same with the step as a variable h of its own: y = base + h (x - base).
    step = ((mask.detach() > 0) | live).double().requires_grad_(True)
    by_place = nodes.split(step)

    def change(name):
        part = by_place[name[:-1] + "v" if name.endswith(".y") else name]
        return lambda x: base[name] + part * (x - base[name])

    names = [name for name in hooks.names(model) if name != "final_resid"]
    with hooks.replacing(model, {name: change(name) for name in names}):
        (model(tokens) * weights).sum().backward()
    share = torch.sigmoid(mask.detach() / 0.3)
    wanted = (step.grad * share * (1 - share) / 0.3).masked_fill(live, 0.0)
    torch.testing.assert_close(mask.grad, wanted)
    assert int((wanted != 0).sum()) > nodes.total // 2


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


class Answers:
    """A task whose logit differences are given; nothing is known of prompts for fitting."""

    def __init__(self, diffs, draws):
        self.test, self.draws, self._diffs = list(range(len(draws))), torch.tensor(draws), diffs

    def logit_diffs(self, pairs, part, ablation):
        rows = torch.tensor([row for pair in pairs for row in (2 * pair, 2 * pair + 1)])
        return self._diffs[rows], torch.tensor([True, False]).repeat(len(pairs))


@pytest.mark.parametrize("draws", [[0] * 40 + [1] * 40 + [2] * 40, [0] * 120])
def test_calibration_of_a_draw_is_fitted_on_the_others(draws):
    """A few wrong answers of a sure model cost what they cost, not all that a scale can make."""
    diffs = torch.full((240,), 3.0)
    diffs[::42] = -3.0
    found = _Test(Answers(diffs, draws), None).measure((None, "mean"))
    # The entropy of 1 wrong answer in 40.
    assert found.loss == pytest.approx(
        -(0.025 * math.log(0.025) + 0.975 * math.log(0.975)), rel=0.3
    )
    assert found.accuracy == pytest.approx(0.975)
    # A draw that is wrong where all others are right does not fit its own scale.
    first = torch.tensor(draws).repeat_interleave(2) == 0
    if not first.all():
        surprised = _Test(Answers(torch.where(first, -3.0, 3.0), draws), None)
        assert surprised.measure((None, "mean")).draws[0] > 5


@pytest.mark.parametrize("linear", LINEARS)
def test_l0_is_that_of_training(linear):
    model = model_of(linear)
    nonzero = sum(
        int(parameter.count_nonzero())
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and "norm" not in name
    )
    assert count_weights(model) == nonzero > len(Edges.of(model).weight)
