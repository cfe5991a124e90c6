"""The frontier: equal L0, runs that go on where they stopped, means over common tasks alone."""

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.experiments import frontier
from benchmarks.experiments import frontier_results as results
from sparse_transformer import Transformer, data, evaluation
from sparse_transformer.train.trainer import Trainer

TASK = "single_double_quote"
OPTIONS = frontier.Options(out=Path(), json=Path(), steps=10, rate=0.5)


def block_weights(kind):
    config = replace(kind.settings(0, OPTIONS).model, vocab_size=64)
    model = Transformer(config, fan_multiple=1.0)
    return [
        module.weight.numel()
        for name, module in model.named_modules()
        if name.startswith("blocks.") and getattr(module, "weight", None) is not None
        if module.weight.dim() > 1
    ]


def test_widths_share_an_l0_and_no_neuron_has_fewer_than_four():
    edges = {kind.name: sum(block_weights(kind)) for kind in frontier.KINDS}
    assert edges["d64"] == edges["d128"] == edges["d256"] == 24 * 256 * 8
    assert edges["d128-half"] * 2 == edges["d128"] == edges["d128-double"] / 2
    assert edges["dense128"] == 24 * 128 * 128
    for kind in frontier.KINDS:
        settings = kind.settings(3, OPTIONS)
        assert (settings.train.seed, settings.train.steps) == (3, 10)
        assert settings.optimizer.learning_rate == kind.learning_rate / 2
        assert settings.model.active == (None if kind.fan is None else 0.25)
        if kind.fan is not None:
            assert kind.fan >= settings.model.min_nonzeros == 4
            assert settings.model.embedding_density * kind.d_model == frontier.EMBEDDING_FAN
            assert settings.topology.start_multiple * kind.fan <= kind.d_model


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Two tiny models, which solve everything by decree; returns the command line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = frontier.BASE
    train = replace(base.train, batch_tokens=192, validate_every=2, validation_tokens=96)
    model = replace(base.model, vocab_size=400, n_layer=1, context=96)
    monkeypatch.setattr(frontier, "BASE", replace(base, train=train, model=model))
    made = ("sparse", 8), ("dense", None)
    kinds = tuple(frontier.Kind(name, name, 32, fan, 0.01) for name, fan in made)
    monkeypatch.setattr(frontier, "KINDS", kinds)
    monkeypatch.setattr(
        results, "LINES", {"both": ("sparse", "dense"), "dense": ("dense",), "none": ()}
    )
    for name, value in (("SEEDS", (0,)), ("QUESTIONS", (TASK,))):
        monkeypatch.setattr(frontier, name, value)
    monkeypatch.setattr(frontier, "TaskLoss", partial(frontier.TaskLoss, fit_pairs=8))
    monkeypatch.setattr(frontier, "_TRAIN_PAIRS", 16)
    monkeypatch.setattr(frontier, "SEARCHED", 3.0)
    monkeypatch.setattr(results, "TARGET", 3.0)
    monkeypatch.setattr(evaluation, "SOLVED_ACCURACY", 0.0)
    source = Path(data.__file__).parent / "circuits"
    words = f"--out {tmp_path / 'out'} --json {tmp_path / 'rows.json'} --data {source} --steps 4"
    return f"{words} --trials 1 --search-steps 2 --test-pairs 8".split()


def test_a_killed_run_continues(tiny, tmp_path, monkeypatch, capsys):
    out, path, plot = tmp_path / "out", tmp_path / "rows.json", tmp_path / "plot.png"
    advance = Trainer.advance

    def interrupted(trainer):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        with pytest.raises(SystemExit) as stopped:
            frontier.main(tiny)
    assert stopped.value.code == report.INTERRUPTED
    lines = (out / "sparse-0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frontier, "find_circuit", killed)
        assert frontier.main(tiny) == report.INTERRUPTED
    lines = (out / "sparse-0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert [row["run"] for row in content["rows"]] == ["sparse-0", "dense-0"]

    # What is trained and evaluated is not so again.
    monkeypatch.setattr(frontier, "train", killed)
    monkeypatch.setattr(frontier, "evaluate_task", killed)
    assert frontier.main(tiny) == 0
    first = json.loads(path.read_text())
    # Nor what is searched.
    monkeypatch.setattr(frontier, "find_circuit", killed)
    capsys.readouterr()
    assert frontier.main([*tiny, "--plot", str(plot)]) == 0
    again = json.loads(path.read_text())
    assert again["complete"] is True
    assert again["rows"] == first["rows"]
    assert plot.read_bytes().startswith(b"\x89PNG")

    sparse, dense = again["rows"]
    assert (sparse["edges"], dense["edges"]) == (12 * 32 * 8, 12 * 32 * 32)
    for row in (sparse, dense):
        found = row["circuits"][TASK]
        assert 0 <= found["sizes"]["edges"][1] <= found["sizes"]["nodes"][1] <= row["edges"]
        held_out = found["proof"]["circuit"]["mean"]
        assert held_out["low"] <= held_out["loss"] <= held_out["high"]
        shown = f"{found['sizes']['edges'][1]} at {held_out['loss']:.3f}"
        assert shown in results.text(again["rows"])
    assert frontier.main([*tiny, "--steps", "5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_the_loss_is_the_mean_of_all_windows(tiny):
    model = Transformer(frontier.KINDS[1].settings(0, OPTIONS).model)
    text = torch.randint(400, (40 * 96 + 1,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [model.loss(*window(text, first)) for first in range(0, 40 * 96, 96)]
    mean = float(torch.stack(each).mean())
    assert frontier.held_out_loss(model, text.numpy()) == pytest.approx(mean, rel=1e-5)


def window(text, first):
    return text[None, first : first + 96], text[None, first + 1 : first + 97]


def row(kind, seed, edges, *, missed=(), fan=8, loss=2.0):
    """Edges by task; an edge count of None is a refusal."""
    circuits = {}
    for task, count in edges.items():
        low = 0.151 if task in missed else 0.1
        proof = {"circuit": {"mean": {"loss": 0.1, "low": low, "high": 0.2}}}
        circuits[task] = {"sizes": {"edges": [1, count]}, "proof": proof}
        if count is None:
            circuits[task] = {"error": "the whole model has a loss of 0.2"}
    return {
        "run": f"{kind}-{seed}", "kind": {"name": kind, "label": kind, "fan": fan}, "seed": seed,
        "edges": 1000, "loss": loss, "scores": {}, "circuits": circuits,
    }  # fmt: skip


def test_means_are_geometric_and_their_intervals_of_tasks_and_seeds():
    tasks = ["a", "b", "c"]
    rows = [row("s", 0, {"a": 1, "b": 10, "c": 100}), row("s", 1, {"a": 4, "b": 40, "c": 400})]
    mean = results.mean_edges(rows, tasks)
    assert mean.value == pytest.approx(20)
    # From the smallest task of one seed to the largest of the other, and symmetric in logarithms.
    assert mean.low == pytest.approx(2, rel=0.6)
    assert mean.low * mean.high == pytest.approx(400, rel=0.2)
    same = results.mean_edges(rows, ["b"])
    assert (same.low, same.high) == pytest.approx((10, 40))
    # A circuit without edges counts as one.
    assert results.mean_edges([row("s", 0, {"a": 0, "b": 100})], ["a", "b"]).value == pytest.approx(
        10
    )
    assert results.mean_edges(rows, []) is None


def test_ratios_are_of_the_same_tasks():
    sparse = [row("s", seed, {"a": 1, "b": 10, "c": 1000}) for seed in (0, 1)]
    dense = [row("d", seed, {"a": 7, "b": 70, "c": 7000}) for seed in (0, 1)]
    ratio = results.mean_edges(dense, ["a", "b", "c"], over=sparse)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((7, 7, 7))


def test_a_missed_target_is_reported_and_in_no_mean():
    sparse = [
        row("s", 0, {"a": 2, "b": 50, "c": 8}),
        row("s", 1, {"a": 2, "b": 50, "c": 8}, missed=["b"]),
    ]
    dense = [row("d", 0, {"a": 40, "b": 9, "c": None}, fan=None, loss=2.5)]
    assert results.common(sparse) == ["a", "c"]
    assert results.common([*sparse, *dense]) == ["a"]
    # Nor one that was not searched, or whose search did not reach its loss.
    failed = row("s", 3, {"a": 2})
    del failed["circuits"]["a"]["sizes"]["edges"]
    assert results.common([failed]) == []
    assert any("s-3" in text and "no trial" in text for text in results.text([failed]).splitlines())
    assert results.common([sparse[0], row("s", 2, {"a": 2})]) == ["a"]
    shown = results.text([*sparse, *dense]).splitlines()
    assert shown[2].split("  ")[0].strip() == "s"
    assert "0, 1" in shown[2]
    assert shown[2].endswith("2.0 [2.0, 2.0]")
    assert any("s-1" in text and "50 at 0.100" in text and "above" in text for text in shown)
    assert any("d-0" in text and "a loss of 0.2" in text for text in shown)
    assert any(text.startswith("d / s") and "20.0 [20.0, 20.0]" in text for text in shown)


def test_nothing_is_drawn_without_a_common_task():
    from matplotlib.figure import Figure

    rows = [row("d64", 0, {"a": 2}), row("d128", 0, {"a": None})]
    with pytest.raises(ValueError, match="no task in common"):
        results.draw(rows, Figure())
