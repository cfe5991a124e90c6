"""From masks to circuits: the whole search must find a planted circuit."""

import dataclasses
import time

import pytest
import torch
from planted import (
    BUDGET,
    PLANTED_NODES,
    chosen,
    ids,
    with_paths,
)

from sparse_transformer import UserError
from sparse_transformer.circuits import pipeline
from sparse_transformer.circuits.budget import Budget, Progress
from sparse_transformer.circuits.masks import (
    MaskConfig,
    Price,
    _Adam,
    train_mask,
)
from sparse_transformer.circuits.objective import (
    PRUNED_UNDER,
)
from sparse_transformer.circuits.pipeline import CURVE, find_circuit, need_reachable
from sparse_transformer.circuits.search import search


def test_the_planted_circuit_is_found_and_validated(task):
    assert task.score(task.test).accuracy == 1.0
    found = find_circuit(task, 0.15, BUDGET, controls=0)
    assert ids(task, found.subgraph.keep) == PLANTED_NODES
    assert found.sizes["edges"] == (3, 2)
    assert found.sizes["cut"].edges >= found.sizes["nodes"].edges >= 2
    validation = found.validation
    assert (validation.sufficient, validation.necessary, validation.robust) == (True, True, True)
    assert (validation.controls, validation.passed) == ((), None)
    assert validation.circuit["mean"].accuracy == 1.0
    assert [point.target for point in found.curve if point is not None] == list(CURVE)
    assert list(found.seconds) == ["search", "validate", "controls", "size curve"]
    # Two edges are enough: nothing is known before them, everything with them.
    needed, faithful = 2 / len(task.edges.source), found.faithfulness
    shares = [share for share, _ in faithful.points]
    assert shares == sorted(shares)
    for share, value in faithful.points:
        assert value == pytest.approx(1.0 if share >= needed else 0.0, abs=0.02)
    # By trapezoids: half of the first step that has both edges is lost.
    first = next(share for share in shares if share >= needed)
    assert faithful.cpr == pytest.approx(1 - first / 2, abs=0.01)
    assert faithful.cmd == pytest.approx(first / 2, abs=0.01)


@pytest.mark.slow
def test_a_circuit_pruned_under_the_mixture_withstands_the_adversary():
    """That of the mean alone does not, see above."""
    task = with_paths(8.0, -16.0, 16.0).under(*PRUNED_UNDER["mixture"])
    found = find_circuit(task, 0.15, dataclasses.replace(BUDGET, trials=1), controls=0)
    assert found.validation.sufficient
    assert found.validation.robust
    assert task.size(found.subgraph) < len(task.edges.source) / 4


@pytest.mark.parametrize("withstood_after", [0, 2, None])
def test_pruning_is_repeated_with_each_adversary(task, monkeypatch, withstood_after):
    """Each is a condition of the next time; where they do not end, nothing is pruned."""
    known = []

    def prune(asked, start, target, **options):
        known.append(len(asked.adversaries))
        return dataclasses.replace(start, keep=~start.keep)

    def adversary(asked, subgraph, target):
        return None if len(asked.adversaries) == withstood_after else subgraph.keep

    monkeypatch.setattr(pipeline, "greedy_prune", prune)
    monkeypatch.setattr(pipeline, "_adversary", adversary)
    start = chosen(task, *PLANTED_NODES)
    few = pipeline._pruned(task, start, 9.0, True, Progress())
    ended = withstood_after is not None
    assert torch.equal(few.keep, ~start.keep if ended else start.keep)
    assert known == list(range(1 + withstood_after if ended else pipeline._HARDENINGS))


def test_masks_under_several_ablations_have_more_steps_but_no_more_time(task, monkeypatch):
    asked = []

    def within(budget, seconds, step):
        asked.append(budget.steps)
        return dataclasses.replace(budget, trials=1, steps=7)

    monkeypatch.setattr(Budget, "within", within)
    for ablations in PRUNED_UNDER.values():
        found = find_circuit(task.under(*ablations), 0.15, BUDGET, edges=False, controls=0)
        assert found.config.steps == 7
    assert asked == [BUDGET.steps, 2 * BUDGET.steps]


def test_what_is_left_of_the_time_decides_how_much_is_done(task, monkeypatch):
    """The steps are far too many for the time; the search ends in time, with a valid circuit."""
    clock = Clock(monkeypatch)
    budget = dataclasses.replace(BUDGET, seconds=30.0, steps=10**6)
    found = find_circuit(task, 0.15, budget, controls=2)
    assert clock() < 1.5 * budget.seconds
    assert found.config.steps < budget.steps
    assert task.calibrated_loss(found.subgraph) <= 0.15
    assert found.validation.pairs >= min(48, len(task.test))
    assert len(found.validation.controls) >= 1
    assert sum(found.seconds.values()) <= clock()


class Clock:
    """`time.monotonic` that runs five times as fast, and not while other processes run."""

    def __init__(self, monkeypatch):
        self._began = time.process_time()
        monkeypatch.setattr(time, "monotonic", self)

    def __call__(self):
        return 5.0 * (time.process_time() - self._began)


def test_a_step_has_its_share_of_the_time_and_a_part_that_of_the_step():
    progress = Progress(100.0)
    progress.reserved = 20.0
    with progress.step("a", 0.25):
        assert progress.left == pytest.approx(20, abs=1)
        with progress.part(0.0, 0.5):
            assert progress.left == pytest.approx(10, abs=1)
        with progress.part(0.5, 1.0):
            assert progress.left == pytest.approx(20, abs=1)
    progress.reserved = 0.0
    with progress.step("b", 1.0):
        assert progress.left == pytest.approx(100, abs=1)
    assert list(progress.laps) == ["a", "b"]


def test_the_bar_has_one_line_and_ends_full(capsys):
    progress = Progress(100.0, shown=True)
    with progress.step("search", 0.5), progress.part(0.0, 0.5):
        progress.advance(0.5, edges=7)
    with progress.step("control", 1.0):
        progress.advance(0.1)
    progress.close()
    shown = capsys.readouterr().err
    assert "search" in shown
    assert "left" in shown
    assert "\n" not in shown.strip()


def test_a_price_follows_the_loss():
    fixed, follows = Price(MaskConfig(price=1e-3)), Price(MaskConfig(price=1e-3, aim=0.1))
    assert [fixed.after(loss) for loss in (0.0, 5.0)] == [1e-3, 1e-3]
    rising = [follows.after(0.0) for _ in range(50)]
    assert rising == sorted(rising)
    assert rising[-1] > 5e-3
    falling = [follows.after(5.0) for _ in range(100)]
    assert falling[-1] < 1e-3
    assert follows.after(0.0) > 0


@pytest.mark.parametrize("under", PRUNED_UNDER)
def test_a_mask_keeps_what_is_worth_its_price(task, under):
    task = task.under(*PRUNED_UNDER[under])
    config = MaskConfig(steps=30 * len(task.pruned_under), pairs=8, learning_rate=3e-2)
    cheap, dear = (
        train_mask(task, dataclasses.replace(config, price=price)) for price in (1e-4, 1e2)
    )
    needed = [task.nodes.index(id) for id in PLANTED_NODES]
    assert (cheap[needed] > 0).all()
    assert (dear[needed] < 0).all()
    assert float(cheap.abs().max()) <= 1


def test_the_optimizer_is_adamw():
    """As torch has it, step by step."""
    ours, theirs = torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9).requires_grad_(True)
    steer = _Adam(ours, 3e-2, 1e-2)
    optimizer = torch.optim.AdamW([theirs], lr=3e-2, betas=(0.9, 0.95), weight_decay=1e-2)
    for step in range(5):
        grad = torch.sin(torch.arange(9.0) + step)
        theirs.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 5)
        optimizer.step()
        steer.step(grad, 1 - step / 5)
        torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.slow
def test_a_search_goes_on_where_it_stopped(task, tmp_path):
    journal = tmp_path / "search.journal"
    first, complete = search(task, 0.12, dataclasses.replace(BUDGET, trials=2), journal=journal)
    assert complete
    trained = []

    def watched(*arguments, **keywords):
        trained.append(1)
        return train_mask(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_transformer.circuits.search.train_mask", watched)
        again, _ = search(task, 0.12, dataclasses.replace(BUDGET, trials=2), journal=journal)
        assert not trained
        assert [c.nodes.edges for c in again] == [c.nodes.edges for c in first]
        assert torch.equal(again[0].nodes.keep, first[0].nodes.keep)
        search(task, 0.12, BUDGET, journal=journal)
        assert len(trained) == 2
        # Another key starts from nothing.
        search(task, 0.12, BUDGET, journal=journal, key="other")
        assert len(trained) == 6


def test_a_search_says_if_the_clock_ended_it(task):
    few = dataclasses.replace(BUDGET, trials=3, steps=3)
    assert search(task, 0.12, few, progress=Progress(1e-9))[1] is False
    assert search(task, 0.12, dataclasses.replace(few, trials=1), progress=Progress(1e-9))[1]


def test_what_the_model_cannot_do_is_refused(task):
    assert need_reachable(task, 0.15).accuracy == 1.0
    swapped = task.with_answers(None)
    # No larger target is proposed: it would be above what guessing has.
    with pytest.raises(UserError, match=r"no circuit can have 0\.15 to spare: train it longer$"):
        need_reachable(swapped, 0.15)
    assert swapped.score(swapped.test).accuracy == 0.0
    with pytest.raises(UserError, match="does not solve planted: its accuracy is"):
        swapped.need_solved(0.95)
