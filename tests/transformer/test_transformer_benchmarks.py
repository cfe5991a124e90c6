"""The transformer's benchmarks run, say what they measured in the promised schema, and can fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import inference, report, training
from benchmarks.transformer import check, results
from benchmarks.transformer.parts import PARTS, PartClock, scaled, split
from benchmarks.transformer.variants import (
    DENSE,
    MASKED_DENSE,
    MASKED_DENSE_ABS_TOPK,
    MASKED_DENSE_KERNEL,
    SPARSE,
    Case,
    Shape,
    Training,
    make_model,
    state_bytes,
)

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMA = (
    "variant", "d_model", "n_layer", "density", "tokens", "step_ms", "tokens_per_s", "parts_ms",
    "peak_mb", "state_mb", "phase", "dtype", "spread_ms", "samples", "bigram_mb",
)  # fmt: skip
TINY = Shape(32, 1, 1 / 4, 1 / 4, context=16, tokens=32, vocab_size=64, min_nonzeros=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where another process is busy, two threads wait for each other at every product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, "--threads", "1", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("smoke")
    words = ("--json", str(folder / "rows.json"), "--plot", str(folder / "plot.png"))
    done = run("benchmarks.training", "--smoke", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def smoke_inference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("smoke") / "rows.json"
    done = run("benchmarks.inference", "--smoke", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def check_row(row: dict[str, Any]) -> None:
    assert set(SCHEMA) <= row.keys()
    assert row["correct"]
    assert row["step_ms"] > 0
    assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["step_ms"])
    assert set(row["parts_ms"]) == set(PARTS)
    assert sum(row["parts_ms"].values()) == pytest.approx(row["step_ms"])
    for part in ("linears", "attention"):
        assert row["parts_ms"][part] > 0
    # A plain model has none; the others must not lose it to the rest.
    assert (row["parts_ms"]["abs_topk"] > 0) == (row["variant"] != "dense")


def test_training_rows_keep_the_schema(smoke: tuple[Path, str]) -> None:
    content = json.loads((smoke[0] / "rows.json").read_text())
    assert content["complete"] is True
    rows = content["rows"]
    assert {row["part"] for row in rows} == {"default", "l0", "width"}
    assert {row["variant"] for row in rows} == {
        "sparse", "masked_dense", "masked_dense_abs_topk", "masked_dense_kernel", "dense"
    }  # fmt: skip
    for row in rows:
        check_row(row)
        assert math.isfinite(row["loss"])
        is_sparse = row["variant"] == "sparse"
        assert (row["rewiring_ms"] is not None) == is_sparse
        if is_sparse:
            change_ms = row["rewiring_ms"] - row["ordinary_ms"]
            assert row["step_ms"] == pytest.approx(row["ordinary_ms"] + change_ms / row["period"])
    assert rows[0]["peak_mb"] > 0


def test_training_prints_goals_and_draws(smoke: tuple[Path, str]) -> None:
    folder, printed = smoke
    for word in ("rewiring", "optimizer", "Goals", "d_model 64 over 32", "density 1/8 over 1/16"):
        assert word in printed
    assert "FAIL" not in printed
    image = (folder / "plot.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_inference_rows_keep_the_schema(smoke_inference: tuple[Path, str]) -> None:
    rows = json.loads(smoke_inference[0].read_text())["rows"]
    assert len(rows) == 18
    kinds = {(row["phase"], row["batch"], row["variant"], row["dtype"]) for row in rows}
    assert len(kinds) == 18
    for row in rows:
        check_row(row)
    assert "decode, batch 1, d_model 64, float32" in smoke_inference[1]


@pytest.mark.parametrize("name", ["training", "inference"])
def test_result_file_fills_the_readme(
    name: str,
    smoke: tuple[Path, str],
    smoke_inference: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = smoke[0] / "rows.json" if name == "training" else smoke_inference[0]
    module = training if name == "training" else inference
    readme = tmp_path / "README.md"
    begin, end = report.MARKS[name]
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert module.main(["--from", str(source), "--update-readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + (10 if name == "training" else 18)
    assert "sparse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--json", "/no/such/folder/x.json"], "--json: the folder /no/such/folder does not exist"),
        (["--plot", "plot.jpg"], "--plot: the plot is a PNG"),
        (["--device", "tpu"], "--device tpu: it must be one of cpu, cuda"),
        (["--part", "all"], "invalid choice: 'all'"),
        (["--update-readme", "README.md"], "--update-readme needs --from FILE"),
        (["--from", "/no/such/file.json"], "--from: cannot read /no/such/file.json"),
        (["--from", "benchmarks/results/matmul-cpu-zen5.json"], "of another benchmark"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(training, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        training.main(words)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_wrong_result_prints_fail_and_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = check.densified

    def wrong(model: Any, shape: Shape) -> Any:
        dense = right(model, shape)
        with torch.no_grad():
            dense.blocks[0].mlp.down.weight[0] *= 1.01
        return dense

    monkeypatch.setattr(check, "densified", wrong)
    monkeypatch.setattr(training, "keep_freed_memory", lambda: True)
    path = tmp_path / "rows.json"
    assert training.main(["--smoke", "--threads", "1", "--part", "width", "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL: logits in float64" in printed
    assert "rows FAILED" in printed
    rows = json.loads(path.read_text())["rows"]
    assert [row["step_ms"] is None for row in rows] == [row["variant"] == "sparse" for row in rows]


def test_interruption_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "measure", interrupt)
    monkeypatch.setattr(training, "keep_freed_memory", lambda: True)
    assert training.main(["--smoke"]) == training.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_check_sees_a_wrong_gradient() -> None:
    model = make_model(Case(TINY, SPARSE), "cpu").double()
    dense = check.densified(model, TINY).double()
    tokens = torch.randint(TINY.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    for one in (model, dense):
        one.loss(tokens, tokens).backward()
    assert check._compare_gradients(model, dense) is None
    gradient = model.blocks[0].attn.out.weight.grad
    assert gradient is not None
    gradient[3] *= 1 + 1e-6
    failure = check._compare_gradients(model, dense)
    assert failure is not None
    assert "blocks.0.attn.out.weight" in failure
    # And where the dense one has a gradient that the sparse one lacks, that is no error.
    assert check.check(make_model(Case(TINY, SPARSE), "cpu"), TINY).failure is None


@pytest.mark.parametrize("variant", [SPARSE, MASKED_DENSE, MASKED_DENSE_KERNEL, DENSE])
def test_split_changes_no_result(variant: Any) -> None:
    losses = []
    for listens in (False, True):
        one = Training(Case(TINY, variant), "cpu")
        clock = PartClock("cpu")
        for _ in range(3):
            if listens:
                with split(one.model, clock):
                    clock.start()
                    one.step(at=clock.switch)
                    parts = clock.stop()
            else:
                one.step()
        losses.append(one.loss)
    assert losses[0] == losses[1]
    assert math.isfinite(losses[0])
    assert all(ms >= 0 for ms in parts.values())


def test_clock_gives_every_moment_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PartClock("cpu")
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(clock, "_now", lambda: next(times))
    clock.start()
    clock.switch("linears")
    clock.switch("optimizer")
    clock.switch("linears")
    parts = clock.stop()
    assert parts == {
        "linears": 6000.0, "abs_topk": 0.0, "attention": 0.0, "rest": 1000.0,
        "optimizer": 3000.0, "topology": 0.0,
    }  # fmt: skip


def test_state_by_hand() -> None:
    one = Training(Case(TINY, SPARSE), "cpu")
    one.step(rewires=True)
    # qkv 96 x 8, out 32 x 8, up 128 x 8, down 128 x 8 (outputs of each input), embeddings 64 x 8
    weights = (96 + 32 + 128 + 128 + 2 * 64) * 8
    others = 96 + 32 + 128 + 32 + 3 * 32 + 2  # biases, norms, sinks
    sizes = state_bytes(one)
    assert sizes["bigram"] == 4 * 4 * 64 * 64 + 4
    parameters = len(list(one.model.parameters())) - 1
    # Four numbers for each weight, and each tensor's step counter.
    assert sizes["state"] == 4 * 4 * (weights + others) + 4 * parameters
    assert sizes["patterns"] == 4 * weights
    assert one.l0() == weights


def row(**values: Any) -> dict[str, Any]:
    common = {
        "phase": "train", "part": "default", "dtype": "float32", "d_model": 1024, "tokens": 2048,
        "density": 1 / 64, "correct": True, "l0": 1000,
    }  # fmt: skip
    return common | values


def test_goals_by_hand() -> None:
    rows = [
        row(variant="sparse", step_ms=100.0, state_mb=10.0),
        row(
            variant="masked_dense",
            step_ms=700.0,
            spread_ms=141.0,
            state_mb=199.0,
        ),
        row(variant="sparse", dtype="bfloat16", step_ms=80.0),
        row(variant="masked_dense_abs_topk", dtype="bfloat16", step_ms=409.0, spread_ms=1.0),
        row(variant="masked_dense_kernel", dtype="bfloat16", step_ms=399.0, spread_ms=1.0),
        row(variant="sparse", part="width", d_model=512, step_ms=50.0),
        row(variant="sparse", part="width", step_ms=110.0),
        row(variant="sparse", part="l0", parts_ms={"linears": 10.0}),
        row(variant="sparse", part="l0", density=1 / 32, parts_ms={"linears": 20.1}),
        row(variant="sparse", part=None, phase="decode", tokens=1, tokens_per_s=100.0),
        row(variant="masked_dense", part=None, phase="decode", tokens=1, tokens_per_s=9.9),
    ]
    lines = results.goals(rows)
    assert lines[0] == "Goals"
    said = [(line.split("  goal")[0].split()[-1], line.split()[-1]) for line in lines[1:-1]]
    assert lines[-1].endswith("run again when it is idle: masked_dense float32 1/64)")
    assert said == [
        ("7.00x", "reached"),
        ("19.90x", "missed"),
        ("4.09x", "reached"),
        ("5.11x", "reached"),
        ("3.99x", "missed"),
        ("4.99x", "reached"),
        ("2.20x", "reached"),
        ("2.01x", "missed"),
        ("10.10x", "reached"),
    ]
    assert results.goals([]) == ["No goal was measured"]
    failed = [row(variant="sparse", correct=False)]
    assert results.goals(failed) == ["Goals", "  1 rows FAILED: nothing is said about them"]


def test_default_cases_are_those_of_the_goals() -> None:
    chosen = training.groups(training.NAMES, training._MODEL, device="cpu", smoke=False)
    cases = [case for group in chosen if group.name == "default" for case in group.cases]
    assert Case(Shape(), SPARSE) in cases
    assert Case(Shape(density=1 / 256), SPARSE) in cases
    assert Case(Shape(density=1 / 256), MASKED_DENSE) in cases
    for variant in (SPARSE, MASKED_DENSE_ABS_TOPK, MASKED_DENSE_KERNEL):
        assert Case(Shape(), variant, "bfloat16") in cases
    wide = [case.shape for group in chosen if group.name == "width" for case in group.cases]
    weights = {round(s.d_model**2 * s.density) for s in wide}
    assert len(weights) == 1
    assert {s.d_model for s in wide} == set(training.WIDTHS)
    assert Case.from_dict(json.loads(json.dumps(cases[0].as_dict()))) == cases[0]
    assert replace(cases[0].shape, density=1 / 256) == Shape(density=1 / 256)


def test_parts_are_scaled_from_the_quickest_sample() -> None:
    quick = dict.fromkeys(PARTS, 1.0) | {"linears": 5.0}
    slow = dict.fromkeys(PARTS, 1.0) | {"rest": 100.0}
    assert scaled([slow, quick], 20.0) == dict.fromkeys(PARTS, 2.0) | {"linears": 10.0}
