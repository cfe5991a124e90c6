"""Weights explained: all of a model whose neurons detect tokens, none by the labels of others."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.experiments import explained
from sparse_transformer import ModelConfig, Transformer, data
from sparse_transformer.circuits.labels import Label

CONFIG = ModelConfig(
    vocab_size=300, n_layer=1, d_model=16, d_head=16, d_mlp=16, context=32, activation="relu",
    active=None, sinks=False, bigram=False, linear="dense",
)  # fmt: skip


@torch.no_grad()
def detector(tokens):
    """Each of these tokens has a channel, and each channel a neuron; no other weight of a block."""
    model = Transformer(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.fill_(float(name.endswith("norm.weight")))
    for channel, token in enumerate(tokens):
        model.embed.weight[token, channel] = 1
        model.blocks[0].mlp.up.weight[channel, channel] = -1 if channel % 2 else 1
        model.blocks[0].mlp.up.bias[channel] = 4 if channel % 2 else 0
    return model


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return data.prepare(Path(data.__file__).parent / "tasks", vocab_size=300)


def test_every_weight_of_a_detector_is_explained_and_by_no_other_label(
    corpus, tmp_path, monkeypatch, capsys
):
    counts = torch.from_numpy(corpus.train.astype("int64")).bincount()
    model = detector(counts.topk(16).indices.tolist())
    monkeypatch.setattr(explained, "load_run", lambda _: (model, corpus.tokenizer))
    path, source = tmp_path / "rows.json", Path(data.__file__).parent / "tasks"
    words = ["--checkpoint", "runs/one", "--against", "two", "--json", str(path)]
    assert explained.main([*words, "--data", str(source), "--weights", "12"]) == 0
    one, two = json.loads(path.read_text())["rows"]
    assert (one["model"], two["model"]) == ("one", "two")
    assert (one["weights"], one["drawn"]) == (16, 12)
    assert one["explained"]["value"] == one["matter"]["value"] == 1
    assert one["explained"]["low"] < 1
    assert one["shuffled"]["value"] <= 0.25
    shown = capsys.readouterr().out
    report.main(path)
    assert explained.text([one, two]) in shown
    assert explained.text([one, two]) in capsys.readouterr().out


def test_a_weight_matters_where_its_source_is_large_and_its_target_active():
    label = Label("", None, None, center=0.0, reach=1.0, rule=None, texts=None)
    source = torch.zeros(2, 20)
    source[0, :3] = torch.tensor([-3.0, 2.0, 1.0])
    target = torch.zeros(2, 20)
    target[0, :3] = torch.tensor([5.0, -1.0, 5.0])
    target[1] = 9
    # Two of 40 tokens are the top 5 %.
    assert explained.matters(source, target, label).nonzero().tolist() == [[0, 0], [0, 1]]
    assert not explained.matters(source * 0, target, label).any()
    target[0, 1] = 0.5
    assert explained.matters(source, target, label).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("hits", "missed", "wrong", "good"),
    [(8, 8, 8, True), (8, 9, 0, False), (8, 0, 9, False), (7, 0, 0, False), (0, 0, 0, False)],
)
def test_an_explanation_needs_precision_recall_and_cases(hits, missed, wrong, good):
    true = torch.tensor([True] * (hits + missed) + [False] * (wrong + 20))
    said = torch.tensor([True] * hits + [False] * missed + [True] * wrong + [False] * 20)
    assert explained.is_explained(said, true) == good


def test_a_share_has_the_interval_of_wilson():
    found = explained.share([True] * 30 + [False] * 70)
    assert found["value"] == pytest.approx(0.3)
    assert found["low"] < 0.3 < found["high"]
    # Its ends are the shares that 0.3 is 1.96 of their own standard errors away from.
    for end in (found["low"], found["high"]):
        error = (end * (1 - end) / 100) ** 0.5
        assert abs(end - 0.3) / error == pytest.approx(1.96, abs=1e-3)
    assert explained.share([False] * 5)["low"] == 0


def test_bad_numbers_are_refused(tmp_path, capsys):
    words = ["--checkpoint", "x", "--json", str(tmp_path / "rows.json"), "--weights", "0"]
    with pytest.raises(SystemExit) as stopped:
        explained.main(words)
    assert stopped.value.code == 2
    assert "--weights must be at least 1" in capsys.readouterr().err
