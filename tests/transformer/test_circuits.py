"""Circuits: the parts of a model, and a planted circuit that the whole procedure must find."""

import dataclasses
import json
import math
import time

import pytest
import torch
from test_model import SMALL, batch, make

from sparse_transformer import ModelConfig, Transformer, UserError, hooks
from sparse_transformer.circuits import pipeline
from sparse_transformer.circuits.ablation import keep_nodes, mask_nodes, remove_edges
from sparse_transformer.circuits.budget import Budget, Progress
from sparse_transformer.circuits.circuit import Ablated, Control, Validation
from sparse_transformer.circuits.edge_attribution import edge_effects, node_effects
from sparse_transformer.circuits.forward import Skipped, answer_logits
from sparse_transformer.circuits.graph import Edges, Nodes
from sparse_transformer.circuits.masks import (
    MaskConfig,
    Price,
    _Adam,
    train_mask,
)
from sparse_transformer.circuits.objective import (
    ABLATIONS,
    PRUNED_UNDER,
    Calibration,
    Subgraph,
    TaskLoss,
    calibrate,
    score,
)
from sparse_transformer.circuits.pipeline import CURVE, find_circuit, need_reachable
from sparse_transformer.circuits.prune import (
    NodeOrder,
    greedy_prune,
    on_paths,
)
from sparse_transformer.circuits.search import search
from sparse_transformer.circuits.validate import _Test, control_tasks, validate, worst_rest
from sparse_transformer.model import count_weights
from sparse_transformer.tasks import Pair, Prompt, collate

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


def planted_task(seed=0, test_pairs=32):
    return task_of(planted(), seed, test_pairs)


def task_of(model, seed=0, test_pairs=32):
    return TaskLoss(
        model, PlantedTask(), None, planted_means(model), train_pairs=64, fit_pairs=24,
        test_pairs=test_pairs, seed=seed,
    )  # fmt: skip


@pytest.fixture
def task():
    return planted_task()


def everything(task):
    return Subgraph(torch.ones(task.nodes.total, dtype=torch.bool))


def ids(task, keep):
    return {task.nodes.id(number) for number in keep.nonzero().squeeze(1).tolist()}


BUDGET = Budget(trials=4, steps=60, pairs=8, finalists=1)


def test_the_planted_circuit_is_found_and_validated(task):
    assert task.score(task.test).accuracy == 1.0
    found = find_circuit(task, 0.15, BUDGET, controls=0)
    assert ids(task, found.subgraph.keep) == PLANTED_NODES
    assert found.sizes["edges"] == (3, 2)
    assert found.sizes["cut"].edges >= found.sizes["nodes"].edges >= 2
    validation = found.validation
    assert (validation.sufficient, validation.necessary, validation.robust) == (True, True, True)
    assert (validation.controls, validation.passed) == ((), None)
    assert validation.circuit["mean"].accuracy == 1.0
    assert [point.target for point in found.curve if point is not None] == list(CURVE)
    assert list(found.seconds) == ["search", "validate", "controls", "size curve"]
    # Two edges are enough: nothing is known before them, everything with them.
    needed, faithful = 2 / len(task.edges.source), found.faithfulness
    shares = [share for share, _ in faithful.points]
    assert shares == sorted(shares)
    for share, value in faithful.points:
        assert value == pytest.approx(1.0 if share >= needed else 0.0, abs=0.02)
    # By trapezoids: half of the first step that has both edges is lost.
    first = next(share for share in shares if share >= needed)
    assert faithful.cpr == pytest.approx(1 - first / 2, abs=0.01)
    assert faithful.cmd == pytest.approx(first / 2, abs=0.01)


# --- validation


def chosen(task, *names):
    keep = torch.zeros(task.nodes.total, dtype=torch.bool)
    for name in names:
        keep[task.nodes.index(name)] = True
    return Subgraph(keep)


def test_the_planted_circuit_is_all_that_counts(task):
    found = validate(task, chosen(task, *PLANTED_NODES), 0.15)
    assert (found.sufficient, found.necessary, found.robust) == (True, True, True)
    assert (found.edges, found.draws, found.pairs) == (2, 3, len(task.test))
    for name, alone in found.circuit.items():
        assert alone.high < (0.15 if name != "zero" else 0.69), name
        assert alone.low <= alone.loss <= alone.high
        assert min(alone.draws) <= alone.loss <= max(alone.draws)
    for lost in found.without.values():
        assert lost.low > 0.6
    assert Validation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_wrong_circuit_fails_every_verdict(task):
    wrong = chosen(task, "0.attn.act_in:2", "0.attn.v:4", "0.attn.resid_delta:6")
    found = validate(task, wrong, 0.15)
    assert (found.sufficient, found.necessary, found.robust) == (False, False, False)
    assert found.circuit["mean"].low > 0.6
    assert found.circuit["edges"].low > 0.6
    assert found.without["mean"].high < 0.15
    assert found.without["edges"].accuracy == 1.0


def with_paths(*weights):
    """The planted task; v channels 5, 6 and 7 write to channel 3 with these weights."""
    model = planted()
    with torch.no_grad():
        for channel, weight in enumerate(weights, 5):
            model.blocks[0].attn.qkv.weight[2 * D + channel, 0] = 2.0
            model.blocks[0].attn.out.weight[3, channel] = weight
    return task_of(model)


def test_a_circuit_that_has_a_double_is_not_necessary():
    found = validate(with_paths(8.0, 8.0), chosen(with_paths(8.0), *PLANTED_NODES), 0.15)
    # Without its nodes there is no way to channel 3, but without its edges there is.
    assert found.sufficient
    assert found.without["mean"].low > 0.6
    assert found.without["edges"].high < 0.15
    assert found.necessary is False


def test_the_adversary_finds_the_part_that_turns_the_answer():
    """Two more paths cancel each other: all is well at the mean, and if both are alive."""
    task = with_paths(8.0, -16.0, 16.0)
    circuit = chosen(task, *PLANTED_NODES)
    worst = worst_rest(task, circuit)
    assert worst.keep[task.nodes.index("0.attn.v:6")]
    assert not worst.keep[task.nodes.index("0.attn.v:7")]
    assert (worst.keep | ~circuit.keep).all()
    found = validate(task, circuit, 0.15)
    assert found.sufficient
    assert found.circuit["pair"].high < 0.3
    assert found.circuit["adversarial"].low > 0.6
    assert found.circuit["random"].loss > found.circuit["mean"].loss
    assert found.robust is False


@pytest.mark.slow
def test_a_circuit_pruned_under_the_mixture_withstands_the_adversary():
    """That of the mean alone does not, see above."""
    task = with_paths(8.0, -16.0, 16.0).under(*PRUNED_UNDER["mixture"])
    found = find_circuit(task, 0.15, dataclasses.replace(BUDGET, trials=1), controls=0)
    assert found.validation.sufficient
    assert found.validation.robust
    assert task.size(found.subgraph) < len(task.edges.source) / 4


@pytest.mark.parametrize("withstood_after", [0, 2, None])
def test_pruning_is_repeated_with_each_adversary(task, monkeypatch, withstood_after):
    """Each is a condition of the next time; where they do not end, nothing is pruned."""
    known = []

    def prune(asked, start, target, **options):
        known.append(len(asked.adversaries))
        return dataclasses.replace(start, keep=~start.keep)

    def adversary(asked, subgraph, target):
        return None if len(asked.adversaries) == withstood_after else subgraph.keep

    monkeypatch.setattr(pipeline, "greedy_prune", prune)
    monkeypatch.setattr(pipeline, "_adversary", adversary)
    start = chosen(task, *PLANTED_NODES)
    few = pipeline._pruned(task, start, 9.0, True, Progress())
    ended = withstood_after is not None
    assert torch.equal(few.keep, ~start.keep if ended else start.keep)
    assert known == list(range(1 + withstood_after if ended else pipeline._HARDENINGS))


def test_a_verdict_needs_the_whole_interval(task):
    circuit = chosen(task, *PLANTED_NODES)
    alone = validate(task, circuit, 0.15, pairs=8).circuit["mean"]
    assert alone.low < alone.loss < alone.high
    for target, verdict in ((alone.high, True), (alone.loss, None), (alone.low * 0.99, False)):
        assert validate(task, circuit, target, pairs=8).sufficient is verdict


def test_intervals_hold_the_truth_and_shrink_with_the_prompts(task):
    circuit = chosen(task, *PLANTED_NODES)
    many = planted_task(seed=7, test_pairs=150)
    truth = validate(many, circuit, 0.15).circuit["mean"]
    few = validate(many, circuit, 0.15, pairs=10).circuit["mean"]
    assert truth.high - truth.low < (few.high - few.low) / 2
    assert few.low <= truth.loss <= few.high


# --- controls


def deaf(task):
    """The planted task, whose model reads channel 3 for its two answers alone."""
    model = planted(noise=0.0)
    return task_of(model)


def test_controls_ask_other_things_of_the_same_prompts(task):
    corpus = torch.randint(V, (16, 12), generator=torch.Generator().manual_seed(0))
    made = dict(control_tasks(task, 3, corpus))
    assert list(made) == [
        "answers 1", "answers 2", "answers 3", "labels swapped", "weights permuted"
    ]  # fmt: skip
    mappings = set()
    for number in (1, 2, 3):
        asked = made[f"answers {number}"]
        pairs = list(zip(asked.fit, task.fit, strict=True))
        mapping = {b.positive.right: a.positive.right for a, b in pairs}
        mapping |= {b.negative.right: a.negative.right for a, b in pairs}
        # Fixed, decidable by what decides the task, and known to the model.
        assert set(mapping) == set(ANSWERS)
        assert set(mapping.values()) <= set(range(8))
        for after, before in pairs:
            for side in ("positive", "negative"):
                one, other = getattr(after, side), getattr(before, side)
                assert one.tokens == other.tokens
                assert (one.right, one.wrong) == (mapping[other.right], mapping[other.wrong])
        mappings.add(tuple(mapping.values()))
    assert len(mappings) > 1
    swapped = made["labels swapped"]
    assert torch.equal(swapped.logit_diffs(task.fit)[0], task.logit_diffs(task.fit)[0])
    assert torch.equal(swapped.logit_diffs(swapped.fit)[0], -task.logit_diffs(task.fit)[0])
    permuted = made["weights permuted"]
    for one, other in zip(permuted.edges.matrices, task.edges.matrices, strict=True):
        assert torch.equal(one.position, other.position)
        assert not torch.equal(one.weight, other.weight)
        assert torch.equal(one.weight.sort().values, other.weight.sort().values)
    assert task.score(task.test).accuracy == 1.0
    assert [name for name, _ in control_tasks(task, 1, None)] == ["answers 1", "labels swapped"]
    assert not list(control_tasks(task, 0, corpus))


@pytest.mark.slow
def test_controls_fail_where_any_answer_can_be_read(task):
    """A scale makes of the noise in the unembedding of other tokens as good an answer.

    Not of all: where the noise has the other sign no positive scale helps.
    """
    budget = dataclasses.replace(BUDGET, trials=1, steps=30)
    found = find_circuit(task, 0.15, budget, controls=3).validation
    assert [control.name for control in found.controls] == [
        *(f"answers {number}" for number in range(1, 4)), "labels swapped"
    ]  # fmt: skip
    assert any(control.reached for control in found.controls[:3])
    assert not found.controls[3].reached
    assert found.ratio < 3
    assert found.passed is False


def test_controls_pass_where_only_the_task_can_be_read(task):
    budget = dataclasses.replace(BUDGET, trials=1, steps=30)
    found = find_circuit(deaf(task), 0.15, budget, controls=2).validation
    assert found.sufficient
    assert [control.reached for control in found.controls] == [False] * 3
    assert min(control.loss for control in found.controls) > 0.6
    assert (found.ratio, found.passed) == (None, True)


def test_a_control_that_was_cut_short_decides_nothing():
    some = Ablated(0.1, 1.0, 0.05, 0.12)
    control = Control("answers 1", 0.5, 0.4, 30, 40, reached=False, complete=True)
    base = Validation(
        9, 3, 2, some, {"mean": some}, {"mean": some}, sufficient=True, necessary=True, robust=True
    )

    def passed(*controls):
        return dataclasses.replace(base, controls=controls).passed

    late = dataclasses.replace(control, complete=False)
    near, far = (dataclasses.replace(control, reached=True, edges=edges) for edges in (19, 20))
    assert [passed(), passed(control), passed(control, far)] == [None, True, True]
    assert [passed(control, late), passed(far, late)] == [None, None]
    assert [passed(control, near), passed(near, late)] == [False, False]
    assert dataclasses.replace(base, controls=(control, near, far)).ratio == 9.5


# --- dead ends


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


# --- search


def test_masks_under_several_ablations_have_more_steps_but_no_more_time(task, monkeypatch):
    asked = []

    def within(budget, seconds, step):
        asked.append(budget.steps)
        return dataclasses.replace(budget, trials=1, steps=7)

    monkeypatch.setattr(Budget, "within", within)
    for ablations in PRUNED_UNDER.values():
        found = find_circuit(task.under(*ablations), 0.15, BUDGET, edges=False, controls=0)
        assert found.config.steps == 7
    assert asked == [BUDGET.steps, 2 * BUDGET.steps]


def test_what_is_left_of_the_time_decides_how_much_is_done(task, monkeypatch):
    """The steps are far too many for the time; the search ends in time, with a valid circuit."""
    clock = Clock(monkeypatch)
    budget = dataclasses.replace(BUDGET, seconds=30.0, steps=10**6)
    found = find_circuit(task, 0.15, budget, controls=2)
    assert clock() < 1.5 * budget.seconds
    assert found.config.steps < budget.steps
    assert task.calibrated_loss(found.subgraph) <= 0.15
    assert found.validation.pairs >= min(48, len(task.test))
    assert len(found.validation.controls) >= 1
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


@pytest.mark.parametrize("under", PRUNED_UNDER)
def test_a_mask_keeps_what_is_worth_its_price(task, under):
    task = task.under(*PRUNED_UNDER[under])
    config = MaskConfig(steps=30 * len(task.pruned_under), pairs=8, learning_rate=3e-2)
    cheap, dear = (
        train_mask(task, dataclasses.replace(config, price=price)) for price in (1e-4, 1e2)
    )
    needed = [task.nodes.index(id) for id in PLANTED_NODES]
    assert (cheap[needed] > 0).all()
    assert (dear[needed] < 0).all()
    assert float(cheap.abs().max()) <= 1


def test_the_optimizer_is_adamw():
    """As torch has it, step by step."""
    ours, theirs = torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9).requires_grad_(True)
    steer = _Adam(ours, 3e-2, 1e-2)
    optimizer = torch.optim.AdamW([theirs], lr=3e-2, betas=(0.9, 0.95), weight_decay=1e-2)
    for step in range(5):
        grad = torch.sin(torch.arange(9.0) + step)
        theirs.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 5)
        optimizer.step()
        steer.step(grad, 1 - step / 5)
        torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.slow
def test_a_search_goes_on_where_it_stopped(task, tmp_path):
    journal = tmp_path / "search.journal"
    first, complete = search(task, 0.12, dataclasses.replace(BUDGET, trials=2), journal=journal)
    assert complete
    trained = []

    def watched(*arguments, **keywords):
        trained.append(1)
        return train_mask(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_transformer.circuits.search.train_mask", watched)
        again, _ = search(task, 0.12, dataclasses.replace(BUDGET, trials=2), journal=journal)
        assert not trained
        assert [c.nodes.edges for c in again] == [c.nodes.edges for c in first]
        assert torch.equal(again[0].nodes.keep, first[0].nodes.keep)
        search(task, 0.12, BUDGET, journal=journal)
        assert len(trained) == 2
        # Another key starts from nothing.
        search(task, 0.12, BUDGET, journal=journal, key="other")
        assert len(trained) == 6


def test_a_search_says_if_the_clock_ended_it(task):
    few = dataclasses.replace(BUDGET, trials=3, steps=3)
    assert search(task, 0.12, few, progress=Progress(1e-9))[1] is False
    assert search(task, 0.12, dataclasses.replace(few, trials=1), progress=Progress(1e-9))[1]


def test_what_the_model_cannot_do_is_refused(task):
    assert need_reachable(task, 0.15).accuracy == 1.0
    swapped = task.with_answers(None)
    with pytest.raises(UserError, match=r"no circuit can have 0\.15 to spare"):
        need_reachable(swapped, 0.15)
    assert swapped.score(swapped.test).accuracy == 0.0
    with pytest.raises(UserError, match="does not solve planted: its accuracy is"):
        swapped.need_solved(0.95)


def test_the_rest_has_what_the_ablation_says(task):
    pairs = task.test[:4]
    nothing = Subgraph(torch.zeros(task.nodes.total, dtype=torch.bool))
    whole, _ = task.logit_diffs(pairs)
    assert (whole > 0).all()
    found = {name: task.logit_diffs(pairs, nothing, name)[0] for name in ABLATIONS}
    # Nothing is left but the other prompt's activations, and they say the other answer.
    torch.testing.assert_close(found["pair"], -whole.view(-1, 2).flip(1).flatten())
    # Prompts of other pairs, half of which have the other answer.
    assert 0 < int((found["resample"] < 0).sum()) < 8
    # Constants: the same for each answer.
    for name in ("mean", "zero"):
        right, wrong = found[name].view(-1, 2).unbind(1)
        torch.testing.assert_close(right, -wrong, atol=1e-4, rtol=0)
    # A random share of everything, another for each seed.
    shares = [task.with_random_rest(nothing, seed).keep.float().mean() for seed in range(8)]
    assert min(shares) < 0.3
    assert max(shares) > 0.7


def test_other_prompts_are_aligned_at_the_last_token(task):
    short, long = (1, 7, 2, 3, 4), (0, 2, 5, 5, 7, 2, 3, 4)
    pair = Pair(Prompt("", short, 8, 9), Prompt("", long, 9, 8))
    made = collate([pair], task.pad)
    base = task.baseline(made, "pair")["0.attn.act_in"]
    with hooks.recording(task.model) as seen, torch.no_grad():
        task.model(made.tokens)
    wanted = seen["0.attn.act_in"]
    torch.testing.assert_close(base[0, :5], wanted[1, 3:8])
    torch.testing.assert_close(base[1, 3:8], wanted[0, :5])
    torch.testing.assert_close(base[1, :3], wanted[0, :1].expand(3, -1))


@pytest.mark.parametrize("linear", LINEARS)
def test_l0_is_that_of_training(linear):
    model = model_of(linear)
    nonzero = sum(
        int(parameter.count_nonzero())
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and "norm" not in name
    )
    assert count_weights(model) == nonzero > len(Edges.of(model).weight)
