"""Interventions: against what hooks record and against unpadded prompts; the program end to end."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_hooks import bare
from test_model import SMALL, batch, make

from sparse_transformer import ModelConfig, Transformer, UserError, data, hooks, tasks
from sparse_transformer.cli.steer import main
from sparse_transformer.interventions import (
    Ablate,
    Add,
    Nodes,
    Patch,
    Scale,
    Set,
    answer,
    intervene,
    next_logits,
)
from sparse_transformer.tokenizer import load_tokenizer
from sparse_transformer.train import checkpoint

NEURONS = "0.mlp.post_act"
# Prompts of these lengths, padded to 70.
LAST = torch.tensor([69, 40, 12])


@pytest.fixture(scope="module")
def model():
    return make(dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens():
    return batch()[0]


@pytest.fixture(scope="module")
def plain(model, tokens):
    with torch.no_grad(), hooks.recording(model) as seen:
        model(tokens)
    return seen


def under(model, tokens, interventions, last=None):
    """What is recorded under the interventions."""
    with (
        torch.no_grad(),
        intervene(model, interventions, last=last),
        hooks.recording(model) as seen,
    ):
        model(tokens)
    return seen


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.mlp.post_act:127", (NEURONS, 127, 127, 128)),
        ("1.attn.v:3-7", ("1.attn.v", 3, 7, 32)),
        ("1.attn.act_in", ("1.attn.act_in", 0, 31, 32)),
        ("final_resid:0", ("final_resid", 0, 0, 32)),
    ],
)
def test_nodes_are_read(model, text, wanted):
    assert dataclasses.astuple(Nodes.parse(model, text)) == wanted


@pytest.mark.parametrize("extra", [{}, {"positions": 8}, {"n_head": 3, "d_mlp": 40}])
def test_places_are_as_wide_as_what_flows_there(extra):
    config = dataclasses.replace(SMALL, **extra)
    model = Transformer(config)
    with torch.no_grad(), hooks.recording(model) as seen:
        model(torch.zeros(1, 2, dtype=torch.int64))
    for place, value in seen.items():
        assert Nodes.parse(model, place).width == value.shape[-1], place


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.mlp.post_act:128", "0.mlp.post_act has 128 channels, 0 to 127"),
        ("1.attn.v:7-3", "1.attn.v has 32 channels, 0 to 31, and a range begins"),
        ("0.mlp.posact:3", "no hook point '0.mlp.posact': did you mean 0.mlp.post_act"),
        ("xyz", "no hook point 'xyz': hook points are 0.attn.act_in.*final_resid, and so on for 2"),
        ("0.mlp.post_act:x", "'0.mlp.post_act:x' is not a node: write HOOK:CHANNEL"),
        ("0.mlp.post_act:-1", "is not a node"),
        ("0.mlp.post_act:1:2", "is not a node"),
        (f"0.mlp.post_act:{'9' * 5000}", "is not a node"),
        (f"0.mlp.post_act:{'9' * 12}", "has 128 channels"),
        ("", "'' is not a node"),
    ],
)
def test_what_is_no_node_is_refused(model, tokens, text, message):
    for refused in (lambda: Nodes.parse(model, text), lambda: under(model, tokens, [Set(text, 1)])):
        with pytest.raises(UserError, match=message):
            refused()
    assert bare(model)


ACTIONS = {
    "set": (Set, 2.5, lambda old: torch.full_like(old, 2.5)),
    "add": (Add, 2.5, lambda old: old + 2.5),
    "scale": (Scale, -2.5, lambda old: old * -2.5),
    "ablate": (Ablate, 0.0, torch.zeros_like),
    "mean": (Ablate, torch.tensor([1.0, 2.0, 3.0]), lambda old: old * 0 + torch.arange(1.0, 4.0)),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("place", [NEURONS, "1.attn.v", "1.attn.y", "0.mlp.act_in", "final_resid"])
def test_actions_change_these_nodes_at_all_tokens_and_nothing_else(
    model, tokens, plain, place, action
):
    kind, value, function = ACTIONS[action]
    wanted = plain[place].clone()
    wanted[..., 4:7] = function(wanted[..., 4:7])
    intervention = kind(f"{place}:4-6", value)
    torch.testing.assert_close(under(model, tokens, [intervention])[place], wanted)
    # And the model goes on with it: by hand, with a function for the hook point.
    with torch.no_grad(), hooks.replacing(model, {place: lambda _: wanted}):
        logits = model(tokens)[:, -1]
    assert (logits - model(tokens)[:, -1]).abs().max() > 1e-4 or torch.equal(wanted, plain[place])
    torch.testing.assert_close(next_logits(model, tokens, [intervention]), logits)
    ids = [3, 49, 0]
    torch.testing.assert_close(answer(model, tokens, ids, [intervention]), logits[:, ids])
    assert bare(model)


def test_a_place_alone_is_all_of_its_nodes(model, tokens):
    seen = under(model, tokens, [Set("0.attn.k", 3.0)])
    assert torch.equal(seen["0.attn.k"], torch.full_like(seen["0.attn.k"], 3.0))


@pytest.mark.parametrize(
    ("at", "chosen"),
    [
        (None, [range(70), range(70), range(70)]),
        ("3", [[3], [3], [3]]),
        ("-1", [[69], [40], [12]]),
        ("-13", [[57], [28], [0]]),
        ("2-5", [range(2, 6)] * 3),
        ("-3--1", [range(67, 70), range(38, 41), range(10, 13)]),
        ("10--1", [range(10, 70), range(10, 41), range(10, 13)]),
    ],
)
def test_positions_count_from_each_prompts_own_end(model, tokens, plain, at, chosen):
    seen = under(model, tokens, [Set(f"{NEURONS}:5", 4.0, at)], LAST)[NEURONS]
    wanted = plain[NEURONS].clone()
    ends = [69, 40, 12] if at is None else [69, 69, 69]
    for row, (positions, end) in enumerate(zip(chosen, ends, strict=True)):
        for position in positions:
            if position <= end:
                wanted[row, position, 5] = 4.0
    if at is None:
        for row, end in enumerate(ends):  # what padding holds is nobody's business
            seen[row, end + 1 :] = wanted[row, end + 1 :] = 0
    torch.testing.assert_close(seen, wanted)


def test_padded_prompts_are_answered_as_they_are_alone(model, tokens):
    changes = [Set(f"{NEURONS}:5", 4.0, "-2--1"), Scale("1.attn.v", 2.0), Add("0.attn.q:3", 1, "4")]
    answers = torch.tensor([[1, 2], [3, 4], [5, 6]])
    got = answer(model, tokens, answers, changes, last=LAST)
    for row, last in enumerate(LAST.tolist()):
        alone = answer(model, tokens[row : row + 1, : last + 1], answers[row], changes)
        torch.testing.assert_close(got[row : row + 1], alone)
        without = answer(model, tokens[row : row + 1, : last + 1], answers[row])
        assert (alone - without).abs().max() > 1e-3


def test_a_mask_chooses_positions(model, tokens, plain):
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    values = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    seen = under(model, tokens, [Set(f"{NEURONS}:5-6", values, mask)])[NEURONS]
    wanted = plain[NEURONS].clone()
    for row, position in mask.nonzero().tolist():
        wanted[row, position, 5:7] = row + 1.0
    torch.testing.assert_close(seen, wanted)
    for wrong in (mask[:, 1:], mask.long()):
        with pytest.raises(ValueError, match=r"at must be bool of shape \(3, 70\), got"):
            under(model, tokens, [Set(NEURONS, 0.0, wrong)])
    assert bare(model)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("13", "there is no @13 in a prompt of 13 tokens: positions are 0 to 12, or -13 to -1"),
        ("-14", "there is no @-14 in a prompt of 13 tokens"),
        ("9" * 12, "there is no @999999999999 in a prompt of"),
        ("9" * 30, "is not a position: write @3"),
        ("2-20", "there is no @2-20 in a prompt of 13 tokens"),
        ("5-2", "there is no @5-2 in a prompt of 70 tokens.*the first one first"),
        ("-1--2", "there is no @-1--2"),
        ("x", "@x is not a position: write @3, @2-5, or @-1"),
        ("", "@ is not a position"),
        ("1-", "@1- is not a position"),
    ],
)
def test_positions_that_are_not_there_are_refused(model, tokens, at, message):
    for change in (Set(NEURONS, 0.0, at), Patch(NEURONS, tokens, LAST, at)):
        with pytest.raises(UserError, match=message):
            next_logits(model, tokens, [change], last=LAST)
    assert bare(model)


@pytest.mark.parametrize("place", [NEURONS, "0.attn.v", "1.attn.resid_delta"])
def test_a_patch_is_what_was_recorded(model, tokens, plain, place):
    other = batch(seed=5)[0]
    with torch.no_grad(), hooks.recording(model, [place]) as recorded:
        model(other)
    there = recorded[place]
    seen = under(model, tokens, [Patch(f"{place}:2-9", other)])[place]
    torch.testing.assert_close(seen[..., 2:10], there[..., 2:10])
    torch.testing.assert_close(seen[..., 10:], plain[place][..., 10:])
    # One prompt for all rows, another length, and positions from the end.
    seen = under(model, tokens, [Patch(place, other[1, :33], at="-4--2")], LAST)[place]
    wanted = plain[place].clone()
    for row, last in enumerate(LAST.tolist()):
        wanted[row, last - 3 : last] = there[1, 29:32]
    torch.testing.assert_close(seen, wanted)
    # Padded on both sides, positions from the beginning; and a mask, the same in both.
    seen = under(model, tokens, [Patch(place, other, LAST.flip(0), "3-5")], LAST)[place]
    wanted = plain[place].clone()
    wanted[:, 3:6] = there[:, 3:6]
    torch.testing.assert_close(seen, wanted)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, 7] = mask[2, 11] = True
    seen = under(model, tokens, [Patch(place, other, at=mask)])[place]
    wanted = plain[place].clone()
    wanted[0, 7], wanted[2, 11] = there[0, 7], there[2, 11]
    torch.testing.assert_close(seen, wanted)


def test_a_patched_stream_gives_the_other_prompts_answer(model, tokens):
    other = batch(seed=5)[0][:, :50]
    other[torch.arange(3), torch.tensor([49, 30, 20])] = tokens[torch.arange(3), LAST]
    other_last = torch.tensor([49, 30, 20])
    patch = Patch("final_resid", other, other_last, "-1")
    got = next_logits(model, tokens, [patch], last=LAST)
    # The bigram table reads the last token, which is the same.
    torch.testing.assert_close(got, next_logits(model, other, last=other_last))
    assert (got - next_logits(model, tokens, last=LAST)).abs().max() > 1e-2


@pytest.mark.parametrize("at", [None, "2--1"])
def test_a_patch_between_different_lengths_needs_positions(model, tokens, at):
    with pytest.raises(UserError, match=r"cannot be patched at all of these positions.*@-1"):
        next_logits(model, tokens, [Patch(NEURONS, tokens[0, :30], at=at)])
    assert bare(model)


def test_a_patch_reads_under_what_is_active_and_not_under_its_neighbours(model, tokens, plain):
    patch = Patch(f"{NEURONS}:3", tokens)
    with intervene(model, [Set(f"{NEURONS}:3", 7.0)]):
        seen = under(model, tokens, [Scale(f"{NEURONS}:3", 2.0), patch])
    assert torch.equal(seen[NEURONS][..., 3], torch.full(tokens.shape, 7.0))
    seen = under(model, tokens, [Scale(f"{NEURONS}:3", 2.0), patch])
    torch.testing.assert_close(seen[NEURONS], plain[NEURONS])


def test_interventions_on_one_node_act_in_order(model, tokens):
    node = f"{NEURONS}:3"
    for changes, wanted in (
        ([Set(node, 2.0), Scale(node, 3.0), Add(node, 1.0)], 7.0),
        ([Add(node, 1.0), Scale(node, 3.0), Set(node, 2.0)], 2.0),
        ([Set(node, 2.0), Ablate(node), Add(node, 1.0)], 1.0),
    ):
        seen = under(model, tokens, changes)[NEURONS][..., 3]
        assert torch.equal(seen, torch.full_like(seen, wanted))


def test_gradients_pass_an_intervention(model, tokens):
    with intervene(model, [Scale(NEURONS, 2.0)]), hooks.recording(model, ["0.mlp.act_in"]) as seen:
        logits = model(tokens)
    (grad,) = torch.autograd.grad(logits.square().sum(), seen["0.mlp.act_in"])
    assert grad.abs().max() > 0


def prepared_tokenizer(cache, source):
    """Path of a real tokenizer of 300 tokens."""
    for file in Path(data.__file__).parent.glob("*.py"):
        shutil.copy(file, source)
    return data.prepare(source, vocab_size=300, cache_dir=cache).folder / "tokenizer.json"


def save_run(folder, model, tokenizer):
    """A run's folder with that model and tokenizer."""
    shutil.copy(tokenizer, folder)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    meta = {"settings": {"model": dataclasses.asdict(model.config)}}
    checkpoint.save(folder, 7, tensors, meta)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder, model and tokenizer of a run, untrained but with large weights."""
    path = prepared_tokenizer(tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("source"))
    config = ModelConfig(vocab_size=300, n_layer=2, d_model=32, d_head=8, context=200, density=0.2)
    model = make(config, dtype=torch.float32)
    folder = save_run(tmp_path_factory.mktemp("run"), model, path)
    return folder, model, load_tokenizer(path)


def ran(run, capsys, tmp_path, *arguments):
    """Text and JSON of the program."""
    file = tmp_path / "report.json"
    assert main(["--checkpoint", str(run[0]), "--json", str(file), *arguments]) == 0
    return capsys.readouterr().out, json.loads(file.read_text())


PROMPT = 'print("hello world'


def test_the_program_answers_before_and_after(run, capsys, tmp_path):
    _, model, tokenizer = run
    ids = tokenizer.encode(PROMPT).ids
    other = torch.tensor(tokenizer.encode("log = ['a', 'b").ids)
    text, report = ran(
        run, capsys, tmp_path,
        "--prompt", PROMPT, "--answers", '")', "')",
        "--set", "1.mlp.post_act:3@-1=4", "--set", "0.mlp.post_act:5-6=-2",
        "--scale", "1.attn.v@2-4=-3", "--add", "1.attn.q=2.5", "--ablate", "1.attn.k:4-19",
        "--patch", "0.attn.resid_delta@-2=log = ['a', 'b",
    )  # fmt: skip
    changes = [
        Ablate("1.attn.k:4-19"),
        Patch("0.attn.resid_delta", other, at="-2"),
        Set("1.mlp.post_act:3", 4.0, "-1"),
        Set("0.mlp.post_act:5-6", -2.0),
        Scale("1.attn.v", -3.0, "2-4"),
        Add("1.attn.q", 2.5),
    ]
    answers = [tokenizer.encode(text).ids[0] for text in ('")', "')")]
    for when, made in (("before", []), ("after", changes)):
        logits = next_logits(model, torch.tensor([ids]), made)[0]
        difference = float(logits[answers[0]] - logits[answers[1]])
        assert report["logit_difference"][when] == pytest.approx(difference, abs=1e-4)
        for entry, id in zip(report["next"], answers, strict=True):
            assert entry[when] == pytest.approx(float(logits.softmax(0)[id]), rel=1e-4)
    # Each of them matters.
    for number in range(len(changes)):
        fewer = changes[:number] + changes[number + 1 :]
        assert (next_logits(model, torch.tensor([ids]), fewer)[0] - logits).abs().max() > 1e-5
    differences = report["logit_difference"]
    assert f"{differences['before']:.3f} -> {differences['after']:.3f}\n" in text
    flipped = (differences["before"] > 0) != (differences["after"] > 0)
    assert report["flipped"] == flipped
    assert f"the answer {'flipped' if flipped else 'did not flip'}" in text
    assert "logit difference of '\")' over \"')\"" in text


def test_without_answers_the_likeliest_tokens_are_listed(run, capsys, tmp_path):
    _, model, tokenizer = run
    change = "--set=0.mlp.resid_delta=5"
    text, report = ran(run, capsys, tmp_path, "--prompt", PROMPT, change)
    tokens = torch.tensor([tokenizer.encode(PROMPT).ids])
    before = next_logits(model, tokens)[0].topk(5).indices.tolist()
    after = next_logits(model, tokens, [Set("0.mlp.resid_delta", 5.0)])[0].topk(5).indices.tolist()
    assert len(report["next"]) == len({*before, *after})
    best = max(report["next"], key=lambda entry: entry["after"])
    first = max(report["next"], key=lambda entry: entry["before"])
    assert report["flipped"] == (best != first) == (before[0] != after[0])
    assert first["token"] == report["next"][0]["token"]
    # Nothing to change: one column.
    text, report = ran(run, capsys, tmp_path, "--prompt", PROMPT)
    assert "after" not in text
    assert "flip" not in text
    assert len(report["next"]) == 5


def test_activations_are_shown_at_each_token(run, capsys, tmp_path):
    _, model, tokenizer = run
    text, report = ran(
        run, capsys, tmp_path, "--prompt", PROMPT, "--show", "0.mlp.post_act", "--show",
        "0.attn.v:12", "--add", "0.attn.v:12@-1=3",
    )  # fmt: skip
    tokens = torch.tensor([tokenizer.encode(PROMPT).ids])
    (shown,) = report["activations"]
    assert "".join(map(eval, shown["tokens"])) == PROMPT
    with torch.no_grad(), hooks.recording(model) as seen:
        model(tokens)
    value = shown["nodes"]["0.attn.v:12"]
    wanted = seen["0.attn.v"][0, :, 12].tolist()
    assert value["before"] == pytest.approx(wanted, abs=1e-5)
    wanted[-1] += 3
    assert value["after"] == pytest.approx(wanted, abs=1e-5)
    assert f"{wanted[-1] - 3:.3f} -> {wanted[-1]:.3f}" in text
    # Of many nodes the most active ones, where nothing is changed.
    _, report = ran(run, capsys, tmp_path, "--prompt", PROMPT, "--show", "0.mlp.post_act")
    (shown,) = report["activations"]
    strength = seen["0.mlp.post_act"][0].abs().amax(0)
    channels = {int(node.split(":")[1]) for node in shown["nodes"] if "post_act" in node}
    assert len(channels) == 8
    assert strength[list(channels)].min() >= strength.topk(8).values.min() * 0.5


def margins(model, pairs, interventions=()):
    collated = tasks.collate(pairs, 299)
    answers = torch.stack([collated.right, collated.wrong], 1)
    logits = answer(model, collated.tokens, answers, interventions, last=collated.last)
    return logits[:, 0] - logits[:, 1]


def test_the_program_asks_a_task(run, capsys, tmp_path):
    _, model, tokenizer = run
    text, report = ran(
        run, capsys, tmp_path, "--task", "single_double_quote", "--pairs", "20", "--seed", "3",
        "--ablate", "0.mlp.post_act", "--show", "0.mlp.post_act:1",
    )  # fmt: skip
    pairs = tasks.get("single_double_quote").pairs(tokenizer, 20, split="test", seed=3, context=200)
    before = margins(model, pairs)
    after = margins(model, pairs, [Ablate("0.mlp.post_act")])
    assert (before - after).abs().max() > 1e-2
    for kind, rows in (
        ("all", slice(None)),
        ("positive", slice(0, None, 2)),
        ("negative", slice(1, None, 2)),
    ):
        effect = report["effects"][kind]
        for when, values in (("before", before[rows]), ("after", after[rows])):
            accuracy = float((values > 0).float().mean())
            assert effect[f"accuracy_{when}"] == pytest.approx(accuracy)
            loss = sum(math.log1p(math.exp(-value)) for value in values.tolist()) / len(values)
            assert effect[f"loss_{when}"] == pytest.approx(loss, rel=1e-4)
            mean = float(values.mean())
            assert effect[f"logit_difference_{when}"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
        flipped = ((before[rows] > 0) != (after[rows] > 0)).float().mean()
        assert effect["flipped"] == pytest.approx(float(flipped))
    assert "single_double_quote, 20 pairs of the test split" in text
    first = [prompt["tokens"] for prompt in report["activations"]]
    lengths = [len(pairs[0].positive.tokens), len(pairs[0].negative.tokens)]
    assert [len(tokens) for tokens in first] == lengths


def test_a_task_may_be_patched_from_the_other_prompt_of_the_pair(run, capsys, tmp_path):
    _, report = ran(
        run, capsys, tmp_path, "--task", "single_double_quote", "--pairs", "18",
        "--patch", "final_resid@-1",
    )  # fmt: skip
    effects = report["effects"]
    for kind, other in (("positive", "negative"), ("negative", "positive")):
        # The stream of the other prompt answers as the other prompt does, and that is wrong here.
        assert effects[kind]["logit_difference_after"] == pytest.approx(
            -effects[other]["logit_difference_before"], rel=1e-3, abs=1e-4
        )
    assert abs(effects["all"]["logit_difference_before"]) > 1e-4


def test_means_are_taken_from_a_file(run, capsys, tmp_path):
    means = {"0.mlp.post_act": torch.arange(128.0)}
    save_file(means, tmp_path / "means")
    arguments = ["--prompt", PROMPT, "--means", str(tmp_path / "means")]
    _, report = ran(
        run, capsys, tmp_path, *arguments, "--ablate", "0.mlp.post_act:5-6@-1", "--show",
        "0.mlp.post_act:5-7",
    )  # fmt: skip
    nodes = report["activations"][0]["nodes"]
    assert [nodes[f"0.mlp.post_act:{n}"]["after"][-1] for n in (5, 6)] == [5.0, 6.0]
    untouched = nodes["0.mlp.post_act:7"]
    assert untouched["after"] == untouched["before"]
    main(["--checkpoint", str(run[0]), *arguments, "--ablate", "0.attn.v"])
    assert "has no means of 0.attn.v in this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt or --task"),
        (["--prompt", "x", "--task", "if_ternary"], "give either --prompt or --task"),
        (["--task", "if_ternary", "--answers", "a", "b"], "--answers cannot be used with --task"),
        (["--prompt", "x", "--set", "0.mlp.post_act:5"], "--set 0.mlp.post_act:5 has no number"),
        (
            ["--prompt", "x", "--add", "0.mlp.post_act:5=1@-1"],
            "write --add NODE=VALUE or --add NODE@",
        ),
        (["--prompt", "x", "--set", "0.mlp.post_act:5=nan"], "=nan has no number"),
        (["--prompt", "x", "--set", "final_resid=1e39"], "the logits are not finite"),
        (["--prompt", "x", "--set", "0.mlp.pos_act:5=1"], "did you mean 0.mlp.post_act"),
        (["--prompt", "x", "--show", "0.mlp.post_act:500"], "has 128 channels, 0 to 127"),
        (["--prompt", "x", "--ablate", "0.attn.v@5"], "there is no @5 in a prompt of 1 tokens"),
        (["--prompt", "x", "--patch", "0.attn.v"], "write --patch 0.attn.v=TEXT"),
        (
            ["--prompt", "x", "--answers", "a b c", "d"],
            "the answer 'a b c' is not one token, it is",
        ),
        (["--prompt", "x", "--answers", "", "d"], "the answer '' is not one token, it is empty"),
        (["--prompt", "x", "--means", "absent"], "the means absent cannot be read"),
        (
            ["--prompt", "x", "--json", "absent/file"],
            "there is no folder absent: choose another --json",
        ),
        (["--task", "brackets"], "brackets"),
        (["--task", "single_double_quote", "--pairs", "0"], "--pairs must be at least 1"),
    ],
)
def test_errors_are_one_sentence_and_exit_2(run, refused, arguments, message):
    assert refused(main(["--checkpoint", str(run[0]), *arguments]), message) == ""


def test_a_prompt_that_is_too_long_is_cropped_with_a_note(run, capsys):
    folder, model, tokenizer = run
    context = model.config.context
    text = "x = 1\n" * 99
    ids = tokenizer.encode(text).ids
    assert main(["--checkpoint", str(folder), "--prompt", text, "--answers", "=", "1"]) == 0
    out, error = capsys.readouterr()
    assert error == f"of the prompt's {len(ids)} tokens the last {context} are read\n"
    logits = next_logits(model, torch.tensor([ids[-context:]]))[0]
    share = logits.softmax(0)[tokenizer.token_to_id("=")]
    assert f"{share:.2%}" in out


@pytest.mark.slow
def test_the_module_runs_and_reads_a_prompt_from_standard_input(run):
    ran = subprocess.run(
        [sys.executable, "-m", "sparse_transformer.steer", "--checkpoint", str(run[0]),
         "--prompt", "-", "--ablate", "0.mlp.post_act:7", "--show", "0.mlp.post_act:7"],
        input="import os",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "next token" in ran.stdout
    assert "0.mlp.post_act:7" in ran.stdout
