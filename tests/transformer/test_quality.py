"""The comparison of what the variants learn: runs, goes on where it stopped, says what it found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.experiments import quality
from benchmarks.experiments.quality import SUITES, Run, compare, main
from sparse_transformer.presets import Settings
from sparse_transformer.train.trainer import Trainer

RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks/results"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_quality_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    words = ["--smoke", "--json", str(path)]
    starts: list[Settings] = []
    train = quality.Trainer

    def interrupt(settings: Settings, *rest: Any) -> Trainer:
        if starts:
            raise KeyboardInterrupt
        starts.append(settings)
        return train(settings, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quality, "Trainer", interrupt)
        assert main(words) == report.INTERRUPTED
    content = json.loads(path.read_text())
    assert content["complete"] is False
    first = content["rows"]
    assert len(first) == 1

    assert main(words) == 0
    report.main(path, plot=plot)
    content = json.loads(path.read_text())
    assert content["complete"] is True
    assert content["machine"]["torch"] == torch.__version__
    rows = content["rows"]
    assert rows[0] == first[0]
    assert len(rows) == len(SUITES["smoke"])
    assert {row["variant"] for row in rows} == set(quality.MODELS)
    assert plot.read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert [point["tokens"] for point in row["curve"]] == [128, 256]
        assert row["val_loss"] == row["curve"][-1]["val_loss"]
        assert 0 < row["curve"][0]["seconds"] < row["curve"][1]["seconds"]
    # Equal L0 at the end, whatever the way there.
    assert len({row["l0"] for row in rows if row["variant"] != "dense"}) == 1

    capsys.readouterr()
    shown = quality.text(rows)
    assert "sparse grow=random" in shown
    assert len([line for line in shown.splitlines() if line.startswith("masked_dense")]) == 1


@pytest.mark.parametrize("name", ["quality", "sooner"])
def test_quality_reads_files_of_earlier_versions(name: str, tmp_path: Path) -> None:
    content = report.read_json(RESULTS / f"{name}-cpu-zen5.json")
    shown = quality.text(content["rows"])
    for row in content["rows"]:
        assert row["name"] in shown
    report.main(RESULTS / f"{name}-cpu-zen5.json", plot=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_runs_differ_in_what_they_say() -> None:
    for suite in SUITES.values():
        assert all(suite.count(run) == 1 for run in suite)
    released = Run("released").settings()
    assert (released.model.abs_topk, released.train.projection) == ("torch", "topk")
    assert replace(released.model, abs_topk="kernel") == Run("masked_dense").settings().model
    static = Run("static", seed=3).settings()
    assert (static.topology.start_multiple, static.topology.drop_share) == (1, 0)
    assert (static.topology.seed, static.train.seed) == (3, 3)
    assert static.model == replace(Run("sparse"), seed=3).settings().model
    assert Run("dense").settings().model.active is None


def test_a_suite_that_is_named_twice_runs_once() -> None:
    once = quality.plan(quality.Options(suite=["width", "rates"]), None)
    assert quality.plan(quality.Options(suite=["width", "rates", "width"]), None) == once
    assert once == SUITES["width"] + SUITES["rates"]


def test_a_run_that_diverged_says_so() -> None:
    rows = [
        {"name": "sparse", "seed": 0, "val_loss": 3.5, "failure": None},
        {"name": "sparse", "seed": 1, "val_loss": None, "failure": "the loss is nan"},
    ]
    assert quality.lines(rows) == "sparse, seed 0: 3.5\nsparse, seed 1: the loss is nan"


def test_comparison_of_equal_seeds_counts_seconds_to_the_same_loss() -> None:
    def row(seed: int, *points: tuple[float, float]) -> dict:
        curve = [{"seconds": seconds, "val_loss": loss} for seconds, loss in points]
        return {
            "seed": seed, "curve": curve, "seconds": points[-1][0], "val_loss": points[-1][1],
        }  # fmt: skip

    released = [row(0, (50, 5.0), (100, 4.0)), row(1, (50, 5.0), (90, 1.0))]
    ours = [row(0, (10, 5.0), (20, 4.0), (30, 3.0)), row(1, (10, 2.0)), row(2, (1, 0.0))]
    assert compare(ours, released) == [(-0.25, 5.0), (1.0, 0.0)]


def test_quality_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"machine": {}, "rows": [{}]}')
    with pytest.raises(SystemExit) as stopped:
        main(["--smoke", "--json", str(path)])
    assert stopped.value.code == 2
    assert "another benchmark" in capsys.readouterr().err
    assert path.read_text() == '{"machine": {}, "rows": [{}]}'
