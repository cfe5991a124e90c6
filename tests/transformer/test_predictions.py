"""Predictions: held by a model made by hand that averages, not by one that counts or looks up."""

import dataclasses
import json

import pytest
import torch
from test_steer import prepared_tokenizer, save_run

from benchmarks.experiments.predictions import __main__ as predictions
from benchmarks.experiments.predictions import brackets, quotes
from benchmarks.experiments.predictions.__main__ import (
    bracket_counting,
    main,
    single_double_quote,
)
from benchmarks.experiments.predictions.dose_response import dose_response as follow
from sparse_transformer import ModelConfig, Transformer, UserError, tasks
from sparse_transformer.circuits.circuit import Circuit, Node
from sparse_transformer.tasks.template import Template
from sparse_transformer.tokenizer import load_tokenizer

NEURON, VALUE, DEPTH = "0.mlp.post_act:0", "1.attn.v:0", "1.attn.resid_delta:3"
TRENDS = ["longer_list", "text_before", "open_brackets_before", "double_brackets_before"]
TRENDS += ["closed_lists_before"]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return prepared_tokenizer(tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)


CONFIG = ModelConfig(
    vocab_size=300, n_layer=2, d_model=8, d_head=8, d_mlp=8, context=400, activation="relu",
    active=None, sinks=False, bigram=False, linear="dense",
)  # fmt: skip


@torch.no_grad()
def averaging(kinds, answers, lean, copies=(1, 0)):
    """A model whose one head averages what neurons make of each token.

    Args:
        kinds: by token, what it has in channel 0 of the embedding.
        answers: the answer that is preferred where the average is above `lean`, and the other.
        lean: in favour of the second.
        copies: how many neurons detect tokens above 0, and how many those below it; there are as
            many v channels as of the first.
    """
    model = Transformer(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.fill_(float(name.endswith("norm.weight")))
    first, second = model.blocks
    for token, kind in kinds.items():
        model.embed.weight[token, 0] = kind
    model.embed.weight[:, 1] = 1
    above, below = copies
    first.mlp.up.weight[:above, 0] = 1
    first.mlp.up.weight[above : above + below, 0] = -1
    first.mlp.down.weight[2, :above] = 1
    first.mlp.down.weight[2, above : above + below] = -1
    # Queries and keys are zero: all tokens weigh the same.
    second.attn.qkv.weight[16 : 16 + above, 2] = 1
    second.attn.out.weight[3, :above] = 1
    model.unembed.weight[answers[0], 3] = 200
    model.unembed.weight[answers[1], 1] = 200 * lean
    return model


def ids(tokenizer, *texts):
    return [tokenizer.encode(text).ids[0] for text in texts]


def brackets_by_averaging(tokenizer):
    texts = [tokenizer.decode([token]) for token in range(300)]
    kinds = {token: text.count("[") for token, text in enumerate(texts)}
    return averaging(kinds, ids(tokenizer, "]]", "]"), 0.1)


def quotes_by_averaging(tokenizer, **arguments):
    double, single = ids(tokenizer, '("', "('")
    arguments = {"lean": 0.002, **arguments}
    return averaging({double: 1, single: -1}, ids(tokenizer, '")', "')"), **arguments)


@pytest.fixture
def plain_quotes(monkeypatch):
    """The task without distractors, which mislead a model that averages all quotes."""
    template = Template(
        text="<name> = <long><fact><noun> <noun2>",
        facts=(('("', "('"),),
        answers=('")', "')"),
        indents=(0,),
    )
    task = tasks.Task(name="single_double_quote", description="Quotes.", draw=template)
    monkeypatch.setattr(tasks, "get", {task.name: task}.__getitem__)


class Reading(Transformer):
    """A model that answers a text as a function of it says; its activations decide nothing."""

    def __init__(self, tokenizer, rule):
        super().__init__(CONFIG)
        self.tokenizer, self.rule = tokenizer, rule

    def forward(self, tokens, cache=None, *, last_only=False, at=None):
        super().forward(tokens, at=at)
        logits = torch.zeros(len(tokens), 1, 300)
        for row, (ids, last) in enumerate(zip(tokens.tolist(), at.tolist(), strict=True)):
            for answer, logit in self.rule(self.tokenizer.decode(ids[: last + 1])).items():
                logits[row, 0, self.tokenizer.encode(answer).ids[0]] = logit
        return logits


def counts(text):
    line = text.rsplit("\n", 1)[-1]
    return {"]]": line.count("[") - line.count("]") - 1.5}


def circuit(task, *nodes):
    made = [
        Node(id=id, kind=kind, label=id, place=id.split(":")[0], channel=int(id.split(":")[1]))
        for id, kind in nodes
    ]
    made += [Node(id="token:3", kind="token", label="x")]
    made += [Node(id="answer:4", kind="answer", label="y")]
    return Circuit(
        task=task, description="", model={}, target_loss=0.15, scale=1.0, shift=0.0,
        nodes=tuple(made), edges=(), edges_before=0,
    )  # fmt: skip


def by_name(found):
    return {prediction.name: prediction for prediction in found}


def test_a_model_that_averages_brackets_does_as_predicted(tokenizer):
    found = by_name(bracket_counting(brackets_by_averaging(tokenizer), tokenizer, prompts=6))
    assert list(found) == TRENDS
    for prediction in found.values():
        numbers = prediction.numbers
        assert prediction.held, prediction
        assert numbers["ordered"] == 1
        assert numbers["prompts"] == 6
        sizes = {len(numbers[name]) for name in ("amount", "logit_difference", "accuracy")}
        assert sizes == {len(numbers["amount"])}
        change = numbers["logit_difference"][-1] - numbers["logit_difference"][0]
        assert numbers["change"] == pytest.approx(change)
    # Short nested lists are closed rightly, long ones no longer; and flat ones without distractors.
    assert found["longer_list"].numbers["accuracy"][0] == 1
    assert found["longer_list"].numbers["accuracy"][-1] == 0
    assert found["double_brackets_before"].numbers["accuracy"][0] == 1
    assert found["double_brackets_before"].numbers["accuracy"][-1] == 0


def test_a_model_that_counts_does_not(tokenizer):
    model, given = Reading(tokenizer, counts), circuit("bracket_counting", (DEPTH, "write"))
    *found, node = bracket_counting(model, tokenizer, given, prompts=6)
    assert (node.held, node.numbers["restored"], node.numbers["cost"]) == (False, 0, 0)
    assert [prediction.name for prediction in found] == TRENDS
    for prediction in found:
        assert not prediction.held
        assert prediction.numbers["change"] == 0
        assert set(prediction.numbers["accuracy"]) == {1.0}


def test_a_model_that_hardly_tells_lists_apart_predicts_nothing(tokenizer):
    def little(text):
        return {"]]": 0.1 * text.count("[") / len(text)}

    def much(text):
        return {"]]": 1000.0 * text.count("[") / len(text) - 100}

    for rule, held in ((little, False), (much, True)):
        for prediction in bracket_counting(Reading(tokenizer, rule), tokenizer, prompts=4):
            assert prediction.numbers["change"] != 0
            assert prediction.held == held


def test_the_opposite_of_a_prediction_is_not_held(tokenizer):
    def grows(text):
        return {"]]": len(text) - 100.0 * text.count("[") / len(text)}

    for prediction in bracket_counting(Reading(tokenizer, grows), tokenizer, prompts=4)[:2]:
        assert prediction.numbers["change"] > 0
        assert prediction.numbers["ordered"] < 0.5
        assert not prediction.held


def trend(rows, direction=-1, gap=5.0):
    margins = {amount: torch.tensor(row) for amount, row in enumerate(rows)}
    return follow("name", "task", "sentence", margins, direction, gap)


def test_a_trend_needs_order_and_a_change_beyond_its_error():
    falling = [[9.0, 7.0, 8.0], [6.0, 4.0, 5.0], [1.0, -1.0, 0.5]]
    found = trend(falling)
    assert found.held
    assert found.numbers["logit_difference"] == pytest.approx([8, 5, 1 / 6])
    assert found.numbers["accuracy"] == pytest.approx([1, 1, 2 / 3])
    changes = torch.tensor([-8.0, -8.0, -7.5])
    assert found.numbers["change"] == pytest.approx(float(changes.mean()))
    assert found.numbers["change_error"] == pytest.approx(float(changes.std()) / 3**0.5)
    rising = [[-margin for margin in row] for row in falling]
    assert trend(rising, 1).held
    assert not trend(falling, 1).held
    assert not trend(falling[::-1]).held
    # Out of order, though the ends are as they should be.
    assert not trend([falling[0], falling[2], falling[1], falling[2]]).held
    # Ordered, but within the error.
    noisy = trend([[1.0, 1.0, 1.0], [0.9, 0.9, 0.9], [-5.0, 5.0, 2.0]], gap=1.0)
    assert noisy.numbers["ordered"] == 1
    assert not noisy.held
    # Clear, but small against what the model makes of the task.
    assert trend(falling, gap=78).held
    assert not trend(falling, gap=79).held
    # The model cannot do the task.
    assert trend(falling, gap=1.0).held
    assert not trend(falling, gap=0.9).held
    assert not trend(falling, gap=-5).held
    # No change at all.
    assert not trend([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]).held


def test_the_node_of_the_depth_gives_back_what_a_longer_list_costs(tokenizer):
    model = brackets_by_averaging(tokenizer)
    nodes = ((NEURON, "neuron"), (VALUE, "v"), (DEPTH, "write"), ("0.attn.q:2", "q"))
    *_, found = bracket_counting(model, tokenizer, circuit("bracket_counting", *nodes), prompts=6)
    assert found.name == "depth_node"
    assert found.held
    assert found.numbers["node"] == DEPTH
    assert found.numbers["restored"] == pytest.approx(1, abs=1e-3)
    assert found.numbers["tried"] == 4
    assert found.numbers["prompts"] == 3
    # At the last token the detector has nothing to give.
    less = circuit("bracket_counting", *nodes[:2])
    *_, found = bracket_counting(model, tokenizer, less, prompts=6)
    assert not found.held
    assert abs(found.numbers["restored"]) < 0.1
    *_, found = bracket_counting(model, tokenizer, circuit("bracket_counting"), prompts=6)
    assert not found.held
    assert found.numbers["node"] is None


def test_the_node_of_the_depth_needs_a_cost_beyond_its_error(tokenizer):
    model = brackets_by_averaging(tokenizer)
    short, long = (tokenizer.encode(text).ids for text in ("a = [[1, 2", "a = [[1, 2, 3, 4, 5, 6"))
    given = circuit("bracket_counting", (DEPTH, "write"))
    answers = torch.tensor(ids(tokenizer, "]]", "]"))
    for swapped, held in ((0, True), (1, False)):
        one = [short, long] if swapped else [short, short]
        other = [long, short] if swapped else [long, long]
        found = brackets._depth_node(model, given, [*one, short] * 2, [*other, long] * 2, answers)
        assert found.numbers["restored"] == pytest.approx(1, abs=1e-3)
        assert found.numbers["cost"] > 0
        assert found.held == held


@pytest.mark.parametrize("nodes", [None, ((NEURON, "neuron"), (DEPTH, "write"))])
@pytest.mark.usefixtures("plain_quotes")
def test_one_node_holds_the_kind_of_quote(tokenizer, nodes):
    model = quotes_by_averaging(tokenizer)
    given = None if nodes is None else circuit("single_double_quote", *nodes)
    node, trend = single_double_quote(model, tokenizer, given, prompts=8)
    assert (node.name, trend.name) == ("quote_node", "other_quotes_before")
    assert node.held
    assert node.numbers["node"] in ([NEURON, VALUE] if nodes is None else [NEURON])
    assert node.numbers["solved"] >= 0.8  # other strings before the open one may mislead it
    assert node.numbers["flipped"] >= 0.8
    assert node.numbers["flipped_by_own_mean"] == 0
    assert node.numbers["prompts"] == 16
    assert node.numbers["tried"] == (16 if nodes is None else 1)
    assert trend.held
    assert trend.numbers["amount"] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("plain_quotes")
def test_the_nodes_that_matter_are_tried_first(tokenizer, monkeypatch):
    monkeypatch.setattr(quotes, "_TRIED", 2)
    model = quotes_by_averaging(tokenizer)
    pairs = tasks.get("single_double_quote").pairs(tokenizer, 8, split="test", context=400)
    held = quotes._Quotes.of(model, pairs)
    found = quotes._influential(model, held, quotes._means(model, held))
    assert set(found) == {NEURON, VALUE}


@pytest.mark.usefixtures("plain_quotes")
def test_a_node_that_flips_the_answer_whatever_it_is_set_to_does_not_hold_it(
    tokenizer, monkeypatch
):
    model = quotes_by_averaging(tokenizer)
    margins = quotes._Quotes.diffs
    # Any change inverts the margins.
    monkeypatch.setattr(
        quotes._Quotes,
        "diffs",
        lambda self, model, changes=(): margins(self, model) * (-1 if changes else 1),
    )
    node, _ = single_double_quote(model, tokenizer, prompts=8)
    assert node.numbers["flipped"] == node.numbers["flipped_by_own_mean"] >= 0.8
    assert not node.held


@pytest.mark.usefixtures("plain_quotes")
def test_many_nodes_that_hold_it_together_are_not_one(tokenizer):
    model = quotes_by_averaging(tokenizer, lean=0.0, copies=(3, 3))
    node, trend = single_double_quote(model, tokenizer, prompts=8)
    assert node.numbers["node"] is not None
    assert node.numbers["flipped"] == 0
    assert not node.held
    assert [len(nodes) for nodes in node.numbers["together"]] == [1, 2, 4, 8, 16]
    assert node.numbers["flipped_together"][0] == 0
    assert node.numbers["flipped_together"][-1] >= 0.8
    assert trend.held
    without = circuit("single_double_quote", (DEPTH, "write"))
    node, _ = single_double_quote(model, tokenizer, without, prompts=8)
    assert (node.held, node.numbers["node"], node.numbers["tried"]) == (False, None, 0)


def test_a_model_that_looks_at_the_open_string_only_is_not_pulled(tokenizer):
    def looks(text):
        return {'")': float(text.rfind('("') > text.rfind("('")), "')": 0.5}

    given = circuit("single_double_quote", (NEURON, "neuron"))
    node, trend = single_double_quote(Reading(tokenizer, looks), tokenizer, given, prompts=8)
    assert not node.held
    assert node.numbers["flipped"] == 0
    assert not trend.held
    assert trend.numbers["change"] == 0
    assert set(trend.numbers["accuracy"]) == {1.0}


def test_a_seed_decides_everything(tokenizer):
    model = brackets_by_averaging(tokenizer)
    first, again, other = (
        [dataclasses.asdict(p) for p in bracket_counting(model, tokenizer, prompts=4, seed=seed)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_short_context_is_refused(tokenizer):
    model = Transformer(dataclasses.replace(CONFIG, context=40))
    with pytest.raises(UserError, match="a context of 40 tokens is too short"):
        bracket_counting(model, tokenizer, prompts=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, tokenizer_path):
    model = brackets_by_averaging(tokenizer)
    return save_run(tmp_path_factory.mktemp("run"), model, tokenizer_path)


def test_the_program_reports_every_prediction(folder, tokenizer, tmp_path, capsys):
    file = tmp_path / "predictions.json"
    arguments = ["--checkpoint", str(folder), "--prompts", "4", "--json", str(file)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    names = [*TRENDS, "quote_node", "other_quotes_before"]
    assert [prediction["name"] for prediction in found] == names
    for prediction in found:
        verdict = "held" if prediction["held"] else "did not hold"
        assert f"{prediction['task']}, {prediction['name']}: {verdict}\n" in out
        assert prediction["prediction"] in out
    wanted = bracket_counting(brackets_by_averaging(tokenizer), tokenizer, prompts=4)
    assert found[:5] == [dataclasses.asdict(prediction) for prediction in wanted]
    # With a circuit, what it predicts alone.
    (tmp_path / "circuit.json").write_text(circuit("bracket_counting", (DEPTH, "write")).to_json())
    assert main([*arguments, "--circuit", str(tmp_path / "circuit.json")]) == 0
    found = json.loads(file.read_text())
    assert [prediction["name"] for prediction in found] == [*TRENDS, "depth_node"]
    assert found[-1]["held"]
    assert f"{DEPTH}: restored 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "1"], "--prompts must be at least 2"),
        (["--circuit", "absent.json"], "the circuit absent.json cannot be read"),
        (["--circuit", "OTHER"], "there are no predictions for for_while"),
        (["--json", "absent/file"], "there is no folder absent: choose another --json"),
        (["--step", "3"], "there is no checkpoint of step 3"),
    ],
)
def test_errors_are_one_sentence_and_exit_2(folder, tmp_path, refused, arguments, message):
    other = tmp_path / "circuit.json"
    other.write_text(circuit("for_while").to_json())
    arguments = [str(other) if argument == "OTHER" else argument for argument in arguments]
    arguments = ["--checkpoint", str(folder), "--prompts", "2", *arguments]
    assert refused(main(arguments), message) == ""


def test_ctrl_c_exits_130(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predictions, "load_run", stop)
    assert main(["--checkpoint", str(folder)]) == 130
