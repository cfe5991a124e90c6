"""python -m sparse_transformer.circuits, from a checkpoint to files, and what it refuses."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from test_model import make

from benchmarks.experiments import circuits as benchmark
from sparse_transformer import ModelConfig, data
from sparse_transformer.circuits import __main__ as program
from sparse_transformer.circuits import compare, pipeline
from sparse_transformer.circuits.circuit import Circuit, Validation
from sparse_transformer.run import load_run
from sparse_transformer.train import checkpoint

TASK = "single_double_quote"
QUICK = [
    "--budget.trials", "1", "--budget.steps", "4", "--budget.pairs", "2", "--budget.finalists", "1",
    "--budget.test-pairs", "8", "--controls", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, its model untrained."""
    folder, cache = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("cache")
    files = sorted(Path(data.__file__).parent.glob("*.py"))
    corpus = data.prepare(files, vocab_size=400, cache_dir=cache, progress=False)
    shutil.copy(corpus.folder / "tokenizer.json", folder)
    config = ModelConfig(vocab_size=400, n_layer=1, d_model=32, context=96, density=0.2)
    model = make(config, dtype=torch.float32)
    with torch.no_grad():
        model.bigram.zero_()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    train = {"data": [str(file) for file in files]}
    settings = {"model": dataclasses.asdict(config), "train": train, "preset": "none"}
    checkpoint.save(folder, 3, tensors, {"settings": settings})
    return folder, cache


def arguments(run, out, *more):
    return [
        "--checkpoint", str(run[0]), "--cache-dir", str(run[1]), "--out", str(out), *QUICK, *more
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """What the program leaves behind; an untrained model "solves" everything at such a target."""
    out = tmp_path_factory.mktemp("out")
    more = ["--task", TASK, "--solved", "0", "--target", "3"]
    assert program.main(arguments(run, out, *more)) == 0
    return out, more


def test_a_circuit_comes_with_its_pictures(run, found):
    folder = found[0] / TASK
    circuit = Circuit.from_json((folder / "circuit.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert circuit.task == TASK
    assert [circuit.node_count, circuit.edge_count] == summary["sizes"]["edges"]
    assert circuit.validation == Validation.from_dict(summary["proof"])
    assert set(circuit.validation.circuit) > {"mean", "pair", "adversarial", "edges"}
    names = [control.name for control in circuit.validation.controls]
    assert names == ["answers 1", "labels swapped", "weights permuted"]
    assert circuit.model["linear"] == "sparse"
    # L0 is that of training, embeddings included; edges are the weights of the blocks.
    assert circuit.model["l0"] == sum(
        layer.weight.numel() for layer in load_run(run[0])[0].sparse_layers().values()
    )
    assert 0 < circuit.model["edges"] < circuit.model["l0"]
    notes = [example.note for example in circuit.examples]
    # An untrained model's circuit is often wrong.
    assert notes == [
        *("the shortest prompts",) * 2, *("most distractors",) * 2, "the circuit is wrong"
    ]  # fmt: skip
    for example in circuit.examples:
        values = example.circuit.activations.values()
        assert all(len(v) == len(example.tokens) for v in values)
    # Every name that says when its node is active has its score.
    named = [node for node in circuit.nodes if node.label.startswith(("detects", "reads", "key"))]
    assert all(node.score is not None and node.score >= 0.75 for node in named)
    assert all(node.sources for node in circuit.nodes if node.kind == "read")
    page = (folder / "circuit.html").read_text()
    assert TASK in page
    assert matplotlib.image.imread(folder / "circuit.png").std() > 0.01
    assert "<svg" in (folder / "circuit.svg").read_text()


def test_a_second_run_does_nothing_again(run, found, monkeypatch, capsys):
    out, more = found
    monkeypatch.setattr(program, "find_circuit", None)
    assert program.main(arguments(run, out, *more)) == 0
    said = capsys.readouterr().out
    assert TASK in said
    assert "loss is binary cross-entropy over the two answers" in " ".join(said.split())
    assert "ufficient" in said
    assert "control: answers 1" in said
    assert not any(word in said for word in ("two-way", "recalibrated", "resid_delta"))
    # So are other weights, though the folder is the same.
    monkeypatch.setattr(program, "fingerprint", lambda model: "other")
    with pytest.raises(TypeError):
        program.main(arguments(run, out, *more))
    monkeypatch.undo()
    monkeypatch.setattr(program, "find_circuit", None)
    # Another target is another question.
    with pytest.raises(TypeError):
        program.main(arguments(run, out, *more[:-1], "4"))


@pytest.mark.slow
def test_all_and_against_compare(run, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(run[0], other)
    names = [TASK, "bracket_counting"]
    monkeypatch.setattr(program.tasks, "TASKS", {name: program.tasks.TASKS[name] for name in names})
    out = tmp_path / "out"
    more = ["--all", "--against", str(other), "--solved", "0", "--target", "3"]
    more += ["--no-edges", "--controls", "0"]
    assert program.main(arguments(run, out, *more)) == 0
    text = capsys.readouterr().out
    assert "geometric mean of" in text
    results = json.loads((out / "comparison.json").read_text())
    assert set(results) == {run[0].name, "other"}
    # The same model twice has the same circuits.
    for name in compare.common_tasks(results):
        assert results[run[0].name][name]["sizes"] == results["other"][name]["sizes"]
    assert (out / "comparison.png").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--task", "single_dubble_quote"], "single_double_quote"),
        (["--task", TASK], "does not solve single_double_quote: its accuracy is"),
        (
            ["--task", TASK, "--solved", "0", "--target", "0.01"],
            "no circuit can have 0.01 to spare",
        ),
        (["--task", TASK, "--target", "0"], "--target must be above 0"),
        (["--task", TASK, "--controls", "-1"], "--controls must be at least 0"),
        (["--task", TASK, "--solved", "1.1"], "--solved must be between 0 and 1"),
        ([], "use --task NAME or --all"),
        (["--task", TASK, "--all"], "use --task NAME or --all"),
        (["--task", TASK, "--step", "99"], "no checkpoint of step 99"),
    ],
)
def test_errors_are_one_sentence_and_exit_2(run, tmp_path, refused, more, sentence):
    refused(program.main(arguments(run, tmp_path / "out", *more)), sentence)
    assert not (tmp_path / "out" / TASK / "circuit.json").exists()


def test_a_budget_that_cannot_be_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        program.main(arguments(run, tmp_path, "--task", TASK, "--budget.trials", "0"))
    assert refused.value.code == 2
    assert "trials must be above 0, got 0" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_refused(run, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert program.main(arguments(run, tmp_path / "out", "--task", TASK)) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_is_refused(run, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(run[0], bare)
    (bare / "tokenizer.json").unlink()
    assert program.main(arguments((bare, run[1]), tmp_path / "out", "--task", TASK)) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_ctrl_c_exits_130_and_says_how_to_go_on(run, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "find_circuit", interrupted)
    more = ["--task", TASK, "--solved", "0", "--target", "3"]
    assert program.main(arguments(run, tmp_path / "out", *more)) == 130
    assert "continues the search" in capsys.readouterr().err


def test_there_is_a_picture_before_the_controls(run, tmp_path, monkeypatch, capsys):
    """An interruption during the controls leaves a validated circuit without them."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_control", interrupted)
    more = ["--task", TASK, "--solved", "0", "--target", "3", "--controls", "1"]
    assert program.main(arguments(run, tmp_path / "out", *more)) == 130
    folder = tmp_path / "out" / TASK
    assert f"{folder}: drawn; its controls follow" in capsys.readouterr().out
    assert (folder / "circuit.html").exists()
    validation = Circuit.from_json((folder / "circuit.json").read_text()).validation
    assert validation.controls == ()
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_the_module_runs():
    found = subprocess.run(
        [sys.executable, "-m", "sparse_transformer.circuits", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--checkpoint DIR" in found.stdout


@pytest.mark.slow
def test_the_benchmark_records_scores_and_circuits(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program.tasks, "TASKS", {TASK: program.tasks.TASKS[TASK]})
    monkeypatch.setattr(benchmark.evaluate, "TASKS", program.tasks.TASKS)
    line = {"step": 3, "tokens": 30, "l0": 7, "val_loss": 5.5, "seconds": 1.5, "loss": 6.0}
    (run[0] / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"step": 4}) + "\n")
    file = tmp_path / "circuits.json"
    words = [str(run[0]), "--out", str(tmp_path / "out"), "--json", str(file), "--pairs", "8", "--"]
    rest = ["--cache-dir", str(run[1]), *QUICK, "--no-edges", "--controls", "0"]
    assert benchmark.main([*words, *rest, "--solved", "0", "--target", "3"]) == 0
    shown = capsys.readouterr().out
    content = json.loads(file.read_text())
    (row,) = content["rows"]
    assert "benchmarks.experiments.circuits" in content["machine"]["command"]
    assert row["training"]["val_loss"] == 5.5
    assert row["scores"][TASK]["pairs"] == 8
    assert row["circuits"][TASK]["sizes"]["cut"][1] >= 0
    table = benchmark.text(content["rows"])
    assert "5.500" in table
    assert table in shown
    # What is refused by the program is refused here.
    assert benchmark.main([*words, *rest, "--target", "0"]) == 2


def test_geometric_means_are_over_the_tasks_of_all():
    def row(edges):
        sizes = {"cut": [1, edges], "nodes": [1, edges], "edges": [1, 0]}
        return {"sizes": sizes, "curve": [[0.5, 1, edges // 2], [0.1, 1, edges]]}

    results = {
        "a": {"x": row(2), "y": row(8), "z": row(1000)},
        "b": {"x": row(20), "y": row(80), "z": {"error": "no"}},
    }
    assert compare.common_tasks(results) == ["x", "y"]
    assert compare.geometric_means(results, "cut") == pytest.approx({"a": 4.0, "b": 40.0})
    assert compare.geometric_means(results, "edges") == {"a": 1.0, "b": 1.0}
    assert compare.curves(results)["a"] == pytest.approx({0.1: 4.0, 0.5: 2.0})
    assert list(compare.curves(results)["a"]) == [0.1, 0.5]
    # A target that one task does not reach has no mean.
    results["b"]["y"]["curve"][1] = None
    assert compare.curves(results)["b"] == pytest.approx({0.5: 20.0})
    text = compare.table(results)
    assert "geometric mean of 2" in text
    assert "b, z: no" in text
    # What the last tokens decide is shown and not counted.
    for rows in results.values():
        rows["else_elif"] = row(1)
    assert compare.common_tasks(results) == ["x", "y"]
    text = compare.table(results)
    assert "geometric mean of 2" in text
    assert "else_elif is in no mean: the published task asks" in text


def test_a_missing_graphviz_is_said_before_the_search(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    assert program.main(arguments(run, tmp_path / "out", "--task", TASK)) == 2
    assert "pip install '.[transformer]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
