"""The numbers that the benchmarks print are those of the rows, and bad options are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    activation,
    baselines,
    cases,
    matmul,
    report,
    roofline,
    tables,
    timing,
)
from sparse_kernels import backends, cpu

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def step(**changes: object) -> dict[str, object]:
    row = {"device": "cpu", **cases.Case(2048, 1024, 1024, 64).columns, "product": "step"}
    row |= {"headline": True, "correct": True, "time_ms": 2.0, "masked_dense_ms": 50.0}
    row |= {"best_dense_ms": 10.0, "best_dense_kind": "oneDNN fp32"}
    return row | {"best_sparse_ms": 7.0, "best_sparse_kind": "SparseLab"} | changes


def test_sentences_are_computed_from_the_rows() -> None:
    first, second = tables.sentences([step()])
    assert first == (
        "On this machine a training step of 1024->1024 with fan-in 64 (float32) is 25 times "
        "faster than masked dense, 5 times faster than the best dense (oneDNN fp32) and "
        "3.5 times faster than the best sparse peer (SparseLab)."
    )
    assert "No measured case was slower" in second
    said = tables.sentences([step(), step(best_dense_ms=1.0)])[-1]
    assert "1 of 2 cases" in said
    assert "2 times slower than the best dense (oneDNN fp32)" in said
    said = tables.sentences([step(best_dense_ms=1.0)] * 5)[-1]
    assert said.startswith("It does not pay in 5 of 5 cases: ")
    assert said.endswith("; 2 more.")


@pytest.mark.parametrize(
    ("times", "words"),
    [(1.3, "1.3 times faster"), (122.0, "120 times faster"), (0.98, "as fast as"), (1.0, "as fast"),
     (0.78, "1.3 times slower"), (1.05, "1.1 times faster"), (0.952, "as fast")],
)  # fmt: skip
def test_a_comparison_has_two_digits_and_is_never_one_time(times: float, words: str) -> None:
    assert report.compare(times, "dense").startswith(words)


def test_an_impossible_fraction_of_the_bound_is_flagged() -> None:
    possible = step(product="forward", bound_ms=1.9)
    assert "above 100%" not in "\n".join(tables.closing([possible]))
    said = "\n".join(tables.closing([possible, step(product="forward", bound_ms=2.2)]))
    assert "A fraction above 100% means" in said


@pytest.mark.parametrize("product", cases.PRODUCTS)
def test_peers_agree_with_ours_and_a_wrong_one_is_left_out(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = baselines.Operands.draw(cases.Case(40, 64, 48, 8))
    ours = baselines.ours(operands, product, "reference")
    found, wrong = baselines.sparse_rivals(operands, product, ours)
    assert wrong == {}
    assert "torch CSR" in found
    right = baselines._values(ours(), operands)
    monkeypatch.setattr(
        baselines, "_torch_csr", lambda *_: iter([("torch CSR", lambda: right * 1.01)])
    )
    found, wrong = baselines.sparse_rivals(operands, product, ours)
    assert "torch CSR" not in found
    assert wrong["sparse_note"].startswith("torch CSR is not compared")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
@pytest.mark.parametrize("markdown", [False, True])
def test_every_committed_result_prints(
    path: Path, markdown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main(path, markdown=markdown)
    printed = capsys.readouterr().out
    assert printed.count("\n") > 2
    assert ("|--" in printed) == markdown


@pytest.mark.slow
def test_smoke_rows_are_complete_and_a_step_is_the_sum(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    words = ["--smoke", "--case", "M=33", "--json", str(path)]
    assert matmul.main(words) == 0
    content = json.loads(path.read_text())
    assert content["complete"]
    rows = content["rows"]
    assert len(rows) == 4 * sum(c.tokens == 33 for c in cases.matmul_cases("cpu", "smoke"))
    for start in range(0, len(rows), 4):
        *products, total = rows[start : start + 4]
        assert [row["product"] for row in products] == list(cases.PRODUCTS)
        for name in ("time_ms", "masked_dense_ms", "best_dense_ms"):
            if total[name] is not None:
                assert total[name] == pytest.approx(sum(row[name] for row in products))
        assert all(row["correct"] for row in rows)


def test_a_wrong_result_has_no_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = baselines.ours
    monkeypatch.setattr(
        baselines,
        "ours",
        lambda operands, product, backend: lambda: right(operands, product, backend)() * 1.01,
    )
    path = tmp_path / "rows.json"
    assert matmul.main([*ONE_CASE, "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4
    assert not any(row["correct"] or "time_ms" in row for row in rows)
    assert "4 of 4 rows are WRONG" in capsys.readouterr().out


def test_a_report_that_is_cut_off_is_quiet() -> None:
    """As by `python -m benchmarks.report FILE | head`."""
    out, into = os.pipe()
    os.close(out)
    words = [sys.executable, "-m", "benchmarks.report", str(RESULTS[-1])]
    done = subprocess.run(words, cwd=ROOT, stdout=into, stderr=subprocess.PIPE, check=False)
    os.close(into)
    assert (done.returncode, done.stderr) == (0, b"")


ONE_CASE = ["--smoke", "--case", "64->48"]


def test_check_compares_and_takes_no_times_on_a_busy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 1.0, 1.0))
    assert matmul.main([*ONE_CASE, "--check", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["correct"] and "time_ms" not in row for row in rows] == [True] * 4
    report.main(path)
    printed = capsys.readouterr().out
    assert "correct" in printed
    assert printed.count("The machine is busy (load 99.0 on ") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, report.INTERRUPTED), (RuntimeError("no memory\nat all"), 1)],
)
@pytest.mark.slow
def test_rows_are_kept_after_an_interruption_and_a_case_that_fails_alone(
    error: BaseException | type[BaseException],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw = baselines.Operands.draw

    def fail(case: cases.Case, device: str) -> baselines.Operands:
        if case.dtype == "bfloat16":
            raise error
        return draw(case, device)

    monkeypatch.setattr(baselines.Operands, "draw", fail)
    path = tmp_path / "rows.json"
    words = ["--smoke", "--case", "M=33", "--json", str(path)]
    assert matmul.main(words) == status
    content = json.loads(path.read_text())
    shapes = [(row["fan_in"], row["block"]) for row in content["rows"] if row["product"] == "step"]
    printed = capsys.readouterr().out
    if error is KeyboardInterrupt:
        assert not content["complete"]
        assert shapes == [(8, "1x1")]
        assert "interrupted; the rows of the finished cases are kept (4)" in printed
    else:
        assert content["complete"]
        assert list(content["failed"].values()) == ["no memory"]
        assert shapes == [(8, "1x1"), (16, "16x1"), (16, "16x16")]
        assert "1 cases did not run" in printed


def test_slow_bf16_dense_is_left_out_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baselines, "BF16_LOOP_MAX", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    path = tmp_path / "rows.json"
    words = ["--smoke", "--case", "bfloat16 M=33", "--json", str(path)]
    assert matmul.main(words) == 0
    *products, total = json.loads(path.read_text())["rows"]
    for row in products:
        assert "torch's bfloat16 dense product is not timed" in row["bf16_dense_note"]
        assert not {"torch bf16", "masked dense"} & row["baselines"].keys()
    assert "masked_dense_ms" not in total
    assert "torch's bfloat16 dense takes seconds a call here" in capsys.readouterr().out


def test_cases_that_a_backend_cannot_run_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        backends, "why_not", lambda _, p: "it has no blocks" if p.block != (1, 1) else None
    )
    path = tmp_path / "rows.json"
    words = ["--smoke", "--case", "16x", "--json", str(path)]
    with pytest.raises(SystemExit):
        matmul.main(words)
    assert "the backend cpu cannot run here: it has no blocks" in capsys.readouterr().err
    words[2] = "float32 M=33"
    assert matmul.main(words) == 0
    assert {row["block"] for row in json.loads(path.read_text())["rows"]} == {"1x1"}
    assert "16x16 float32 M=33 is left out: it has no blocks" in capsys.readouterr().out


def test_activation_rows_compare_with_torch(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    words = ["--smoke", "--case", "D=64 k=16 float32", "--json", str(path)]
    assert activation.main(words) == 0
    forward, backward, total = json.loads(path.read_text())["rows"]
    assert (forward["product"], backward["product"]) == ("abs_topk forward", "abs_topk backward")
    for row in (forward, backward):
        assert row["correct"]
        assert row["torch_ms"] == row["baselines"][row["torch_kind"]]["time_ms"]
    assert total["torch_ms"] == pytest.approx(forward["torch_ms"] + backward["torch_ms"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "it must be one of cpu, cuda, got 'tpu'"),
        (["--json", "no/such/folder/rows.json"], "does not exist"),
        (["--json", "."], "is a directory"),
        (["--case", "3->5"], "no case matches"),
        (["--backend", "triton"], "the backend triton cannot run here"),
        (["--threads", "0"], "--threads: it must be at least 1, got 0"),
        (["--backend", "abacus"], "--backend: it must be one of"),
        pytest.param(["--device", "cuda"], "PyTorch finds no GPU", marks=NO_GPU),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        matmul.main(words)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    with pytest.raises(SystemExit):
        activation.main(["--case", "nothing"])
    assert capsys.readouterr().err.startswith("python -m benchmarks.activation: no case matches")


def test_a_setting_is_put_back_and_gpu_bound_by_hand() -> None:
    seen = []
    call = baselines.with_precision(
        lambda: seen.append(torch.get_float32_matmul_precision()), "medium"
    )
    before = torch.get_float32_matmul_precision()
    call()
    assert (seen, torch.get_float32_matmul_precision()) == (["medium"], before)
    work = roofline.Work(flops=2e12, operand_bytes=0, read_bytes=10**9, write_bytes=10**9)
    bound = roofline.GpuPeaks({"bfloat16": 100.0}, 1000.0).bound_ms(work, "bfloat16")
    assert bound == {"compute": pytest.approx(20.0), "memory": pytest.approx(2.0)}


PEAKS = roofline.Peaks(
    isa="made up",
    threads=1,
    vector_bytes=64,
    fma_gflops=100.0,
    bf16_gflops=50.0,
    gather_gbs=((1, ((1000, 120.0), (10_000, 60.0))), (2, ((1000, 150.0), (5000, 90.0)))),
    read_gbs=((1000, 100.0), (100_000, 10.0), (10_000_000, 20.0)),
    write_gbs=((1000, 50.0), (100_000, 5.0), (10_000_000, 5.0)),
    copy_gbs=((1000, 60.0), (100_000, 8.0), (10_000_000, 8.0)),
    one_read_gbs=((1000, 80.0),),
)


def test_bandwidth_is_never_below_that_of_a_larger_buffer() -> None:
    assert roofline.bandwidth_gbs(PEAKS.read_gbs, 10) == 100.0
    assert roofline.bandwidth_gbs(PEAKS.read_gbs, 99_999) == 100.0
    assert roofline.bandwidth_gbs(PEAKS.read_gbs, 100_000) == 20.0
    assert roofline.bandwidth_gbs(PEAKS.read_gbs, 10**12) == 20.0


def test_work_and_bound_by_hand() -> None:
    case = cases.Case(10, 40, 20, 8)
    # nnz = 160; X 1600 bytes, Y 800, values 640, 160 indices of 2 bytes.
    work = roofline.count_work(case, "forward")
    assert work == roofline.Work(3200.0, 6400, 1600 + 640 + 320, 800, 1.0, 40)
    bound = PEAKS.bound_ms(work, "float32")
    # One thread reads 2560 bytes, then computes.
    packed_ns = 2560 / 80
    assert bound["compute"] == pytest.approx((packed_ns + 3200 / 100) * 1e-6)
    # A tile of one vector has 2560 bytes, one of two 5120: 120 GB/s and 90.
    assert bound["operands"] == pytest.approx((packed_ns + 6400 / 120) * 1e-6)
    # 3360 bytes: the fastest of read, write and copy moves 100 GB/s.
    assert bound["memory"] == pytest.approx(3360 / 100e9 * 1e3)
    assert max(bound.values()) == bound["operands"]
    # Two threads do all but the shared memory's part together.
    two = replace(PEAKS, threads=2).bound_ms(work, "float32")
    assert two["compute"] == pytest.approx((packed_ns / 2 + 3200 / 100) * 1e-6)
    assert two["memory"] == bound["memory"]
    bf16 = replace(case, block=(4, 2), dtype="bfloat16")
    work = roofline.count_work(bf16, "grad_input")
    # 20 blocks, shared by the longer side 4; dY 400 bytes, values 320, dX 800.
    assert work == roofline.Work(3200.0, 3200, 400 + 320 + 40, 800, 1 / 4, 20)
    packed_ns = 760 / 80
    # A tile of two vectors has 2560 bytes.
    bound = PEAKS.bound_ms(work, "float32")
    assert bound["operands"] == pytest.approx((packed_ns + 3200 / 4 / 150) * 1e-6)
    work = roofline.count_work(case, "grad_weight", used_in_features=30)
    assert work == roofline.Work(3200.0, 6400, 800 + 1200 + 320, 640, 1.0, 20)
    # bf16 may be widened: its bound uses the faster of the two multiply-adds.
    packed_ns = 2320 / 80
    assert PEAKS.bound_ms(work, "bfloat16")["compute"] == pytest.approx((packed_ns + 32) * 1e-6)


def test_the_loop_of_the_bound_runs() -> None:
    short, long = cases.Case(256, 64, 64, 8), cases.Case(256, 64, 1024, 8)
    times = [roofline.product_ms(cpu.isa(), 1, case) for case in (short, long)]
    assert 0 < 4 * times[0] < times[1]


def test_candidates_take_turns_until_the_limit() -> None:
    order: list[str] = []

    def call(name: str) -> float:
        order.append(name)
        return 0.1

    calls = {name: partial(call, name) for name in "ab"}

    def interleave(**limits: float) -> list[timing.Timing]:
        order.clear()
        return list(timing.interleave(calls, sampler=lambda call, _: call(), **limits).values())

    found = interleave(budget_s=0.0)
    assert order == ["a", "b"] * (1 + timing.MIN_SAMPLES)  # the first calls are no samples
    assert [t.samples for t in found] == [timing.MIN_SAMPLES] * 2
    interleave(limit_s=0.0)
    assert order == ["a", "b"] * 2


def test_a_rival_without_hope_sits_out() -> None:
    seconds = {
        "ours": [9.0, 0.5, 0.5],
        "best": [0.2, 0.3, 0.3],
        "near": [0.7, 0.5, 0.4],  # a slow first call
        "far": [0.7, 0.7],  # out after one sample
        "hopeless": [0.9],
        "short": [0.04, 1e-3, 2e-3, 1.0, 1.0],
    }
    calls = {name: partial(times.pop, 0) for name, times in seconds.items()}
    group = ["best", "near", "far", "hopeless"]
    found = timing.interleave(
        calls, [group], budget_s=0.0, min_samples=2, sampler=lambda call, _: call()
    )
    assert not any(seconds.values())
    times = {name: (t.time_ms, t.samples) for name, t in found.items()}
    assert times == {
        "ours": (500, 2),
        "best": (300, 2),
        "near": (450, 2),
        "far": (700, 1),
        "hopeless": (900, 1),
        "short": (1000, 2),
    }


def test_summarize_is_median_and_interquartile_range() -> None:
    assert timing.summarize([0.004, 0.001, 0.002, 0.003, 0.005]) == timing.Timing(3.0, 2.0, 5)
    assert timing.summarize([0.002]) == timing.Timing(2.0, 0.0, 1)


def test_results_that_cannot_be_drawn_or_written_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, plot = ROOT / "benchmarks" / "results", tmp_path / "plot.png"
    for name in ("matmul", "training"):
        report.main(results / f"{name}-cpu-zen5.json", plot=plot)
        assert plot.read_bytes().startswith(b"\x89PNG")
        plot.unlink()
    for name, sentence in {
        "activation-cpu-zen5": "there is nothing to draw",
        "inference-cpu-zen5": "cannot be drawn",
        "break-even-cpu-zen5": "cannot be drawn",
    }.items():
        with pytest.raises(SystemExit):
            report.main(results / f"{name}.json", plot=plot)
        assert sentence in capsys.readouterr().err
        assert not plot.exists()
    with pytest.raises(SystemExit):
        report.main(results / "matmul-cpu-zen5.json", plot=tmp_path / "plot.pdf")
    assert "does not end in .png" in capsys.readouterr().err
