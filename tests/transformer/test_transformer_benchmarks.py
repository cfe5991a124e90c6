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

import sparse_kernels as sk
from benchmarks import baselines, devices, inference, parts, report, roofline, run, training
from benchmarks.cases import Case as SizedCase
from benchmarks.experiments import mini_gpt, scaling
from benchmarks.timing import Timing
from benchmarks.transformer import measure, results
from benchmarks.transformer.jobs import (
    SMOKE_MODEL,
    VARIANTS,
    Case,
    Job,
    Training,
    make_job,
    make_model,
)
from benchmarks.transformer.measure import measure_peak_mb
from sparse_kernels import cpu
from sparse_transformer import ModelConfig
from sparse_transformer import testing as check

CPU = devices.Device()
ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMA = (
    "variant", "d_model", "n_layer", "density", "tokens", "step_ms", "tokens_per_s", "peak_mb",
    "state_mb", "phase", "dtype", "spread_ms", "samples", "bigram_mb",
)  # fmt: skip
TINY = ModelConfig(
    d_model=32, n_layer=1, density=1 / 4, embedding_density=1 / 4, context=16, vocab_size=64,
    min_nonzeros=1,
)  # fmt: skip


def tiny(variant: str) -> Case:
    return Case(TINY, variant, batch=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where another process is busy, two threads wait for each other at every product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, "--threads", "1", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def smoke_inference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("smoke") / "rows.json"
    done = start("benchmarks.inference", "--smoke", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def check_row(row: dict[str, Any]) -> None:
    assert set(SCHEMA) <= row.keys()
    assert row["correct"]
    assert row["step_ms"] > 0
    assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["step_ms"])


def check_training_row(row: dict[str, Any]) -> None:
    check_row(row)
    assert math.isfinite(row["loss"])
    is_sparse = row["variant"] == "sparse"
    assert (row["rewiring_ms"] is not None) == is_sparse
    if is_sparse:
        change_ms = row["rewiring_ms"] - row["ordinary_ms"]
        assert row["step_ms"] == pytest.approx(row["ordinary_ms"] + change_ms / row["period"])


@pytest.mark.slow
def test_training_rows_keep_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = start("benchmarks.training", "--smoke", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    content = json.loads(path.read_text())
    assert content["complete"] is True
    rows = content["rows"]
    assert {row["part"] for row in rows} == {"default"}
    assert {row["variant"] for row in rows} == set(VARIANTS)
    for row in rows:
        check_training_row(row)
    # The first case alone, and in a smoke run its few MB fit in what the allocator has anyway.
    assert [row["peak_mb"] is not None for row in rows] == [row is rows[0] for row in rows]


@pytest.mark.slow
def test_scaling_rows_keep_the_schema_and_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    assert scaling.main(["--smoke", "--json", str(path)]) == 0
    assert "FAIL" not in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert {row["part"] for row in rows} == {"l0", "width"}
    for row in rows:
        check_training_row(row)
    report.main(path, plot=plot)
    image = plot.read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


@pytest.mark.slow
def test_inference_rows_keep_the_schema(smoke_inference: tuple[Path, str]) -> None:
    rows = json.loads(smoke_inference[0].read_text())["rows"]
    assert len(rows) == 18
    kinds = {(row["phase"], row["batch"], row["variant"], row["dtype"]) for row in rows}
    assert len(kinds) == 18
    for row in rows:
        check_row(row)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--threads", "0"], "--threads: it must be at least 1, got 0"),
        (["--json", "/no/such/folder/x.json"], "--json: the folder /no/such/folder does not exist"),
        (["--device", "tpu"], "tpu"),
        (["--part", "l1"], "l1"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "make_job", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        scaling.main(words)
    assert stopped.value.code == 2
    assert sentence in "".join(capsys.readouterr())


@pytest.mark.slow
def test_wrong_result_prints_fail_and_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = check.densified

    def wrong(model: Any) -> Any:
        dense = right(model)
        with torch.no_grad():
            dense.blocks[0].mlp.down.weight[0] *= 1.01
        return dense

    monkeypatch.setattr(check, "densified", wrong)
    path = tmp_path / "rows.json"
    assert scaling.main(["--smoke", "--threads", "1", "--part", "width", "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL: logits in float64" in printed
    assert "rows FAILED" in printed
    rows = json.loads(path.read_text())["rows"]
    assert ["step_ms" not in row for row in rows] == [row["variant"] == "sparse" for row in rows]


@pytest.mark.slow
def test_interruption_keeps_the_finished_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_job = measure.make_job

    def interrupt(case: Case, device: str, *, checks: bool) -> Job:
        if case.model.d_model < SMOKE_MODEL.d_model:  # of the last group, the widths
            raise KeyboardInterrupt
        return make_job(case, device, checks=checks)

    monkeypatch.setattr(measure, "make_job", interrupt)
    monkeypatch.setattr(measure, "measure_peak_mb", lambda *_: None)
    path = tmp_path / "rows.json"
    assert scaling.main(["--smoke", "--json", str(path)]) == report.INTERRUPTED
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert {row["part"] for row in content["rows"]} == {"l0"}


def test_dense_bf16_that_is_too_slow_is_left_out_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = run.Options()
    monkeypatch.setattr(baselines, "has_bf16_dense", lambda: False)
    (sentence,) = measure.missing(options)
    assert sentence.startswith("dense bfloat16 is left out")
    for groups in (training.plan(options, CPU), inference.plan(options, CPU)):
        cases = [case for group in groups for case in (*group.cases, *group.memory)]
        assert {case.variant for case in cases if case.dtype == "bfloat16"} == {"sparse"}
    assert len(training.plan(options, CPU)[0].cases) == 7
    monkeypatch.setattr(baselines, "has_bf16_dense", lambda: True)
    assert measure.missing(options) == []
    assert len(training.plan(options, CPU)[0].cases) == 10


def test_check_sees_a_wrong_gradient() -> None:
    model = make_model(tiny("sparse"), "cpu").double()
    dense = check.densified(model).double()
    tokens = torch.randint(TINY.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    for one in (model, dense):
        one.loss(tokens, tokens).backward()
    assert check.compare_gradients(model, dense) is None
    gradient = model.blocks[0].attn.out.weight.grad
    assert gradient is not None
    gradient[3] *= 1 + 1e-6
    failure = check.compare_gradients(model, dense)
    assert failure is not None
    assert "blocks.0.attn.out.weight" in failure
    # And where the dense one has a gradient that the sparse one lacks, that is no error.
    assert check.check(make_model(tiny("sparse"), "cpu")).failure is None


def test_state_by_hand() -> None:
    one = Training(tiny("sparse"), "cpu")
    one.rewire()
    # qkv 96 x 8, out 32 x 8, up 128 x 8, down 128 x 8 (outputs of each input), embeddings 64 x 8
    weights = (96 + 32 + 128 + 128 + 2 * 64) * 8
    others = 96 + 32 + 128 + 32 + 3 * 32 + 2  # biases, norms, sinks
    sizes = one.state_mb()
    assert sizes["bigram_mb"] == pytest.approx((4 * 4 * 64 * 64 + 4) / 1e6)
    parameters = len(list(one.model.parameters())) - 1
    # Four numbers for each weight, and each tensor's step counter.
    state = 4 * 4 * (weights + others) + 4 * parameters
    assert sizes["state_mb"] == pytest.approx(state / 1e6)
    assert one.l0() == weights
    assert Training(tiny("dense"), "cpu").l0() == 32 * (96 + 32 + 128 + 128 + 2 * 64)


@pytest.mark.slow
def test_peak_memory_has_the_state_and_no_imports() -> None:
    case = Case(replace(TINY, d_model=256, context=64), "dense")
    job = Training(case, "cpu")
    job.step()
    sizes = job.state_mb()
    needed = sizes["state_mb"] + sizes["bigram_mb"]
    assert 10 < 0.9 * needed < measure_peak_mb(case, "cpu") < 3 * needed


def row(**values: Any) -> dict[str, Any]:
    common = {
        "phase": "train", "part": "default", "dtype": "float32", "d_model": 1024, "tokens": 2048,
        "density": 1 / 64, "correct": True, "l0": 1000,
    }  # fmt: skip
    return common | values


def test_sentences_by_hand() -> None:
    common: dict[str, Any] = {"n_layer": 4, "spread_ms": 1.0, "failure": None}
    rows = [
        row(variant="sparse", step_ms=100.0, **common),
        row(variant="masked_dense", step_ms=700.0, **common | {"spread_ms": 141.0}),
        row(variant="dense", step_ms=50.0, **common),
        row(variant="masked_dense", dtype="bfloat16", correct=False),
    ]
    step, failed, disturbed = results.closing(rows)
    assert "takes 100.0 ms" in step
    assert "7 times faster than masked_dense" in step
    assert "2 times slower than dense" in step
    assert failed.startswith("1 rows FAILED")
    assert disturbed.endswith("train masked_dense float32 1/64.")


def test_the_widths_have_one_l0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "has_bf16_dense", lambda: True)
    _, width = scaling.plan(scaling.Options(), CPU)
    wide = [case.model for case in width.cases]
    assert len({round(model.d_model**2 * model.density) for model in wide}) == 1
    assert len({model.d_model for model in wide}) == 4
    (only,) = training.plan(run.Options(), CPU)
    assert {case.variant for case in only.cases} == set(VARIANTS)
    assert all(case.batch * case.length == 2048 for case in only.cases)


def test_a_step_has_its_share_of_the_rewiring() -> None:
    job = Training(tiny("sparse"), "cpu")
    job.step()
    case = job.case
    timings = {f"step {case}": Timing(10.0, 1.0, 5), f"rewiring {case}": Timing(30.0, 1.0, 5)}
    made = measure.describe(job, timings)
    assert made["rewiring_ms"] == 20.0
    assert made["step_ms"] == pytest.approx(10.0 + 10.0 / 20)


def test_a_file_without_its_machine_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.json"
    for machine in ("{}", "[]", '{"command": "-m benchmarks.training", "torch": "2"}'):
        path.write_text(f'{{"machine": {machine}, "rows": []}}')
        with pytest.raises(SystemExit) as stopped:
            report.main(path)
        assert stopped.value.code == 2
        assert "rows.json does not say where it was measured" in capsys.readouterr().err


def test_parts_of_a_step_are_its_kernels_and_add_up() -> None:
    rows = parts.measure_case(tiny("sparse"), parts.Options(smoke=True), CPU)
    calls = {row["part"]: row["calls"] for row in rows}
    assert calls["attention"] == calls["attention_backward"] == TINY.n_layer
    # The forward of a fan-out layer is the product that is a fan-in layer's grad_input.
    assert calls["forward"] == calls["grad_weight"] == calls["grad_input"] == 4 * TINY.n_layer
    assert calls["unembed forward"] == calls["token_losses_"] == 1
    assert min(calls["rest"], calls["optimizer"]) > 0
    assert all(row["time_ms"] > 0 and row["correct"] for row in rows)
    step = float(parts.lines(rows).splitlines()[-1].split()[2])
    assert step == pytest.approx(sum(row["time_ms"] for row in rows), rel=1e-3)


def test_parts_of_a_forward_without_gradients() -> None:
    """The checked call of a layer has one more argument than that of its backward."""
    job = make_job(replace(tiny("sparse"), phase="prefill"), "cpu")
    recorder = parts.Recorder(job.model)
    job.calls["step"]()
    taken = recorder.take(job.calls["step"])
    assert {"forward", "grad_input", "unembed forward"} <= taken.keys()


def test_the_peers_example_runs(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert mini_gpt.main(["--smoke", "--threads", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {"ours", "dense"} <= {row["layers"] for row in rows}
    assert {row["part"] for row in rows} == {"mlp", "all"}
    assert all(row["step_ms"] > 0 for row in rows)


def test_a_kernel_is_no_part_of_the_rest() -> None:
    recorder, x = parts.Recorder(make_model(tiny("sparse"), "cpu")), torch.randn(3, 8)
    recorder.count(lambda: sk.abs_topk(x, 2))
    assert {part: len(works) for part, works in recorder.works.items()} == {"abs_topk": 1}
    recorder.count(lambda: x.add_(1.0))
    assert recorder.works["rest"] == [roofline.Work(0.0, 0, x.nbytes, x.nbytes)]


def test_work_of_a_part_is_that_of_its_call() -> None:
    x = torch.randn(3, 8)
    y, bits = cpu.abs_topk_packed(x, 2)
    work = parts.work_of("abs_topk_packed", (x, 2), (y, bits))
    assert (work.read_bytes, work.write_bytes) == (x.nbytes, y.nbytes + bits.nbytes)
    qkv = torch.randn(2, 5, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    work = parts.work_of("attention", (q, k, v, None), cpu.attention(q, k, v, None))
    assert work.flops == 2 * 2 * 4 * 15 * (2 * 16 + parts.EXP)
    layout = sk.FanInLayout.random(6, 8, 2)
    values = torch.randn(layout.values_shape)
    work = parts.work_of("forward", (x, values, layout, None), None)
    assert work == roofline.count_work(SizedCase(3, 8, 6, 2), "forward")
