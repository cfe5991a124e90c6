"""The benchmarks run, say what they measured in the promised schema, and refuse bad options."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import baselines, matmul, problems, report, roofline, timing
from benchmarks.processor import Processor

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = (
    "device", "dtype", "M", "K", "N", "fan_in", "block", "density", "product", "backend",
    "time_ms", "spread_ms", "masked_dense_ms", "dense_ms", "best_dense_ms", "best_dense_kind",
    "torch_csr_ms", "bound_ms", "error", "torch_error",
)  # fmt: skip


def run_matmul(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.matmul", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("smoke")
    done = run_matmul(
        "--smoke", "--json", str(folder / "rows.json"), "--plot", str(folder / "plot.png")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_smoke_rows_keep_the_schema(smoke: tuple[Path, str]) -> None:
    content = json.loads((smoke[0] / "rows.json").read_text())
    assert content["complete"] is True
    assert content["machine"]["command"].startswith("python -m benchmarks.matmul --smoke")
    assert content["machine"]["ceilings"]["fma_gflops"] > 0
    rows = content["rows"]
    assert len(rows) == 4 * len(problems.smoke_cases())
    for row in rows:
        assert set(SCHEMA) <= row.keys()
        assert row["correct"]
        for name in ("time_ms", "masked_dense_ms", "dense_ms", "best_dense_ms", "bound_ms"):
            assert math.isfinite(row[name])
            assert row[name] > 0
        assert row["spread_ms"] >= 0
        assert (row["torch_csr_ms"] is None) == (row["dtype"] == "bfloat16")
        assert row["density"] == row["fan_in"] / row["K"]


def test_smoke_step_is_the_sum_of_the_products(smoke: tuple[Path, str]) -> None:
    rows = json.loads((smoke[0] / "rows.json").read_text())["rows"]
    for start in range(0, len(rows), 4):
        *products, step = rows[start : start + 4]
        assert [row["product"] for row in products] == list(problems.PRODUCTS)
        assert step["product"] == "step"
        for name in ("time_ms", "masked_dense_ms", "best_dense_ms", "bound_ms"):
            assert step[name] == pytest.approx(sum(row[name] for row in products))


def test_smoke_prints_a_table_that_fits_and_a_plot(smoke: tuple[Path, str]) -> None:
    folder, printed = smoke
    for word in ("forward", "grad_input", "grad_weight", "step", "bfloat16", "16x16", "M=33"):
        assert word in printed
    assert max(len(line) for line in printed.splitlines()[1:]) <= 140
    image = (folder / "plot.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_report_fills_the_readme_section(smoke: tuple[Path, str], tmp_path: Path) -> None:
    content = json.loads((smoke[0] / "rows.json").read_text())
    content["rows"] = [{**row, "headline": True} for row in content["rows"]]
    (tmp_path / "rows.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    begin, end = report.MARKS["cpu"]
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    words = [str(tmp_path / "rows.json"), "--update-readme", str(readme)]
    assert report.main(words) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "| 33 | 64, 128, 16 | 16x1 | float32 |" in text
    assert content["machine"]["command"] in text


def test_report_refuses_a_readme_without_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    with pytest.raises(ValueError, match="measured:begin"):
        report.update_readme(readme, "table\n", "cpu")
    assert readme.read_text() == "nothing here\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "it must be one of cpu, cuda, got 'tpu'"),
        (["--json", "no/such/folder/rows.json"], "does not exist"),
        (["--json", "."], "is a directory"),
        (["--plot", "plot.pdf"], "does not end in .png"),
        (["--filter", "1024"], "a shape looks like K,N"),
        (["--filter", "3,5"], "no case is left"),
        (["--block", "16"], "a block looks like 16x1"),
        (["--dtype", "float16"], "have no float16"),
        (["--dtype", "int8"], "invalid choice"),
        (["--threads", "0"], "needs a positive whole number"),
        (["--repeats", "-1"], "expected one argument|needs a positive whole number"),
        (["--backend", "cuda"], "cannot run here"),
        (["--backend", "abacus"], "--backend must be one of"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        matmul.main(words)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert any(part in printed.err for part in message.split("|"))
    assert printed.out == ""


def test_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    # Samples enough that the later cases are still running when the first has been written.
    words = ["--smoke", "--repeats", "100", "--json", str(path)]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.matmul", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Where the tests themselves were started in the background, Ctrl-C would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == matmul.INTERRUPTED, printed + errors
    assert "interrupted after" in printed
    assert "Traceback" not in errors
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert len(content["rows"]) % 4 == 0
    assert content["rows"]


def test_wrong_result_prints_fail_and_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = matmul.baselines.ours
    monkeypatch.setattr(
        matmul.baselines,
        "ours",
        lambda operands, product, backend: lambda: right(operands, product, backend)() * 1.01,
    )
    words = ["--smoke", "--tokens", "33", "--block", "16x16", "--backend", "reference"]
    assert matmul.main(words) == 1
    printed = capsys.readouterr().out
    assert "4 of 4 rows are WRONG" in printed
    (forward,) = (line for line in printed.splitlines() if " forward " in line)
    assert "FAIL" in forward
    assert "x " not in forward.partition("FAIL")[2]


CEILINGS = roofline.Ceilings(
    isa="made up",
    threads=1,
    vector_bytes=64,
    l1_size=5120,
    fma_gflops=100.0,
    bf16_gflops=50.0,
    l1_read_gbs=200.0,
    l2_read_gbs=100.0,
    read_gbs=((1000, 100.0), (100_000, 10.0), (10_000_000, 20.0)),
    write_gbs=((1000, 50.0), (100_000, 5.0), (10_000_000, 5.0)),
    copy_gbs=((1000, 60.0), (100_000, 8.0), (10_000_000, 8.0)),
)


def test_bandwidth_is_never_below_that_of_a_larger_buffer() -> None:
    assert roofline.bandwidth_gbs(CEILINGS.read_gbs, 10) == 100.0
    assert roofline.bandwidth_gbs(CEILINGS.read_gbs, 99_999) == 100.0
    assert roofline.bandwidth_gbs(CEILINGS.read_gbs, 100_000) == 20.0
    assert roofline.bandwidth_gbs(CEILINGS.read_gbs, 10**12) == 20.0


def test_work_and_bound_by_hand() -> None:
    shape = {"tokens": 10, "in_features": 40, "out_features": 20, "fan_in": 8}
    # nnz = 160; X 1600 bytes, Y 800, values 640, 160 indices of 2 bytes.
    work = roofline.count_work("forward", **shape, block=(1, 1), element_bytes=4)
    assert work == roofline.Work(3200.0, 6400, 1600 + 640 + 320, 800, 1.0, True, 40)
    bound = roofline.bound(work, CEILINGS, is_bf16=False)
    assert bound.compute_ms == pytest.approx(3200 / 100e9 * 1e3)
    # Tiles of 2, 4, 8 and 16 vectors: all of the 40 features fit the first level, half of them,
    # a quarter, an eighth. A byte takes 1/200 ns from the first level and 1/100 from the second.
    # 1 + 1/2 first-level reads are as long as 1/2 + 1/4 from it and 1/2 from the second.
    bytes_ns = [(1 + 1 / 2) / 200, (1 / 2 + 1 / 4) / 200 + 1 / 2 / 100, 1 / 4 / 200 + 3 / 4 / 100]
    assert bound.operands_ms == pytest.approx(6400 * min(bytes_ns) * 1e-6)
    # 3360 bytes: the fastest of read, write and copy moves 100 GB/s.
    assert bound.memory_ms == pytest.approx(3360 / 100e9 * 1e3)
    assert bound.limit == "operands"
    assert bound.ms == bound.operands_ms
    assert bound.peak_ms == bound.memory_ms
    faster = replace(CEILINGS, l1_read_gbs=2000.0, l2_read_gbs=1000.0)
    bound = roofline.bound(work, faster, is_bf16=False)
    assert bound.operands_ms == pytest.approx(6400 * min(bytes_ns) * 1e-7)
    assert bound.limit == "memory"
    assert bound.ms == bound.peak_ms == bound.memory_ms
    work = roofline.count_work("grad_input", **shape, block=(4, 2), element_bytes=2)
    # 20 blocks, shared by the longer side 4; dY 400 bytes, values 320, dX 800.
    assert work == roofline.Work(3200.0, 3200, 400 + 320 + 40, 800, 1 / 4, True, 20)
    work = roofline.count_work(
        "grad_weight", **shape, block=(1, 1), element_bytes=4, used_in_features=30
    )
    assert work == roofline.Work(3200.0, 6400, 800 + 1200 + 320, 640, 1.0, False, 20)
    # 20 features of one vector fit the first level, and no weights are read.
    bound = roofline.bound(work, CEILINGS, is_bf16=False)
    assert bound.operands_ms == pytest.approx(6400 / 200e9 * 1e3)
    # bf16 may be widened: its bound uses the faster of the two multiply-adds.
    assert roofline.bound(work, CEILINGS, is_bf16=True).compute_ms == pytest.approx(3.2e-5)


def test_a_fraction_over_100_percent_is_called_wrong() -> None:
    operands = baselines.Operands.draw(problems.Case(33, 64, 32, 8))
    machine = Processor()
    machine._ceilings = CEILINGS
    row = matmul.measure_product(operands, "forward", "cpu", machine, budget_s=0.0, repeats=1)
    for share, is_wrong in ((0.5, False), (1.2, True)):
        row["bound_ms"] = share * row["time_ms"]
        assert any("run again" in line for line in report.summary_lines([row])) is is_wrong


def test_geometric_mean() -> None:
    assert roofline.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(roofline.geometric_mean([]))


def test_candidates_take_turns_and_slow_ones_keep_their_minimum() -> None:
    order: list[str] = []
    timings = timing.interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        repeats=3,
        estimates={"a": 1.0, "b": 1.0},
    )
    assert order == ["a", "b"] * 3
    assert [t.samples for t in timings.values()] == [3, 3]
    timings = timing.interleave({"a": lambda: None}, budget_s=0.0, estimates={"a": 1.0})
    assert timings["a"].samples == timing.MIN_SAMPLES_SLOW
    timings = timing.interleave({"a": lambda: None}, budget_s=0.0, estimates={"a": 1e-3})
    assert timings["a"].samples == timing.MIN_SAMPLES


def test_very_slow_candidates_keep_their_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLOW_S", 0.0)
    monkeypatch.setattr(timing, "VERY_SLOW_S", 0.0)
    calls: list[str] = []
    candidates = {"slow": lambda: calls.append("slow")}
    estimates = timing.estimate_s(candidates)
    timings = timing.interleave(candidates, estimates=estimates)
    assert calls == ["slow"]
    assert timings["slow"] == timing.Timing(estimates["slow"] * 1e3, 0.0, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16_dense_is_left_out_only_where_it_is_slow(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = baselines.Operands.draw(problems.Case(40, 64, 32, 8, dtype=dtype))
    monkeypatch.setattr(baselines, "BF16_MAX_SECONDS", 0.0)
    monkeypatch.setattr(baselines, "BF16_SLOWER", 1e9)
    assert baselines.why_no_bf16_dense(operands, "forward") is None
    monkeypatch.setattr(baselines, "BF16_SLOWER", 0.0)
    row = matmul.measure_product(operands, "forward", "cpu", Processor(), budget_s=0.0, repeats=1)
    assert "not timed" in row["bf16_dense_note"]
    assert "torch bf16" not in row["baselines"]
    assert (row["dense_ms"] is None) == (row["masked_dense_ms"] is None) == (dtype == "bfloat16")
    assert row["best_dense_ms"] > 0
    step = matmul.sum_rows([row, row])
    assert step["dense_ms"] is None if dtype == "bfloat16" else step["dense_ms"] > 0
    assert any("not timed" in line for line in report.summary_lines([row]))


def test_summarize_is_median_and_interquartile_range() -> None:
    assert timing.summarize([0.004, 0.001, 0.002, 0.003, 0.005]) == timing.Timing(3.0, 2.0, 5)
    assert timing.summarize([0.002]) == timing.Timing(2.0, 0.0, 1)


def test_default_cases_hold_every_promise_once() -> None:
    cases = problems.default_cases()
    assert len(set(cases)) == len(cases)
    for shape in problems.TARGETS:
        for dtype in problems.CPU_DTYPES:
            assert problems.Case(2048, *shape, dtype=dtype) in cases
    assert {case.tokens for case in cases} == set(problems.TOKENS)
    assert {case.block for case in cases} >= {(1, 1), (4, 1), (16, 1), (16, 16), (32, 32)}
    assert set(cases) <= set(problems.full_cases())
    for case in problems.full_cases():
        assert case.fan_in % case.block[1] == 0
        assert case.out_features % case.block[0] == 0
