"""Search for the hyperparameters that give the smallest circuit: Optuna, within a budget.

Masks of several trials are trained in the same forwards. Trials are kept in a journal file, nodes
included, so that an interrupted search can continue.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import optuna
import torch
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from sparse_transformer.circuits.masks import PruneConfig, train_masks
from sparse_transformer.circuits.problem import Problem
from sparse_transformer.circuits.prune import Cut, cut


@dataclass(frozen=True)
class Budget:
    """The limits of a search for a circuit; it stops at the first that it reaches.

    Attributes:
        trials: number of trials, including those of an interrupted search.
        together: trials trained in one batch.
        seconds: time after which no trial starts.
        steps: training steps of a mask.
        pairs: prompt pairs per training step.
        finalists: number of best trials that are refined by removing single nodes and edges.
        refine_seconds: time limit of the refinement of each.
    """

    trials: int = 8
    together: int = 4
    seconds: float = 240.0
    steps: int = 300
    pairs: int = 16
    finalists: int = 2
    refine_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in (
            "trials",
            "together",
            "steps",
            "pairs",
            "finalists",
            "seconds",
            "refine_seconds",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Candidate:
    """A trial that reached the target, or came nearest."""

    cut: Cut
    config: PruneConfig


# To begin with. The published starting values (price 1e-4, learning rate 3e-3) suit far longer
# trainings. Where `follow` is true the price follows the loss, see `PruneConfig.aim`.
_GUESSES = tuple(
    {
        "follow": follow,
        "price": price,
        "learning_rate": rate,
        "start": 0.1,
        "temperature": 1.0,
        "weight_decay": 1e-3,
    }
    for follow, price, rate in (
        (True, 1e-3, 3e-2),
        (False, 3e-4, 3e-2),
        (True, 1e-3, 6e-2),
        (False, 1e-2, 3e-2),
    )
)


def search(
    problem: Problem,
    target: float,
    budget: Budget,
    *,
    key: str = "search",
    journal: Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Candidate]:
    """Candidates, the smallest first.

    Args:
        target: loss on the prompts for fitting, calibrated.
        key: of everything that the result depends on; a search of another key is not gone on with.
        journal: file that keeps the trials; its folder exists. None keeps nothing.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage: BaseStorage = (
        InMemoryStorage() if journal is None else JournalStorage(JournalFileBackend(str(journal)))
    )
    study = optuna.create_study(
        storage=storage,
        study_name=key,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, constant_liar=True),
    )
    if not study.trials:
        for guess in _GUESSES:
            study.enqueue_trial(guess)
    began = time.monotonic()
    disable = None if progress is None else not progress
    with tqdm(
        total=budget.trials, initial=_done(study), desc="search", unit=" trials", disable=disable,
        leave=False,
    ) as bar:  # fmt: skip
        while (left := budget.trials - _done(study)) > 0:
            if _done(study) and time.monotonic() - began > budget.seconds:
                break
            trials = [study.ask() for _ in range(min(left, budget.together))]
            configs = [_suggest(trial, budget, target) for trial in trials]
            # Numbers of trials go on after an interruption, and so do the batches that are drawn.
            masks = train_masks(problem, configs, seed=seed + trials[0].number, progress=progress)
            for trial, config, mask in zip(trials, configs, masks, strict=True):
                found = cut(problem, mask, target)
                trial.set_user_attr("config", asdict(config))
                trial.set_user_attr("nodes", json.dumps(found.keep.nonzero().squeeze(1).tolist()))
                trial.set_user_attr("loss", found.loss)
                trial.set_user_attr("edges", found.edges)
                study.tell(trial, _value(problem, found, target))
                bar.update()
            bar.set_postfix(edges=_edges(study.best_trial))
    complete = study.get_trials(states=[TrialState.COMPLETE])
    complete.sort(key=lambda trial: (trial.value, trial.number))
    return [_candidate(problem, trial) for trial in _distinct(complete)[: budget.finalists]]


def _suggest(trial: Trial, budget: Budget, target: float) -> PruneConfig:
    return PruneConfig(
        steps=budget.steps,
        pairs=budget.pairs,
        price=trial.suggest_float("price", 1e-4, 1e-1, log=True),
        aim=target if trial.suggest_categorical("follow", [False, True]) else None,
        learning_rate=trial.suggest_float("learning_rate", 1e-2, 1e-1, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-4, 1e-2, log=True),
        start=trial.suggest_float("start", 3e-2, 3e-1, log=True),
        temperature=trial.suggest_float("temperature", 0.3, 2.0, log=True),
    )


def _value(problem: Problem, found: Cut, target: float) -> float:
    """The logarithm of the size; what does not reach the target is worse than all that do."""
    if found.loss <= target:
        return math.log(found.edges + 1)
    return math.log(len(problem.edges.source) + 1) + found.loss - target


def _done(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))


def _edges(trial: FrozenTrial) -> int:
    edges = trial.user_attrs["edges"]
    assert isinstance(edges, int)
    return edges


def _distinct(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those whose nodes are not the ones of an earlier one."""
    return list({trial.user_attrs["nodes"]: trial for trial in reversed(trials)}.values())[::-1]


def _candidate(problem: Problem, trial: FrozenTrial) -> Candidate:
    keep = torch.zeros(problem.places.total, dtype=torch.bool)
    keep[torch.tensor(json.loads(trial.user_attrs["nodes"]), dtype=torch.int64)] = True
    loss = trial.user_attrs["loss"]
    found = Cut(keep, int(keep.sum()), _edges(trial), loss)
    return Candidate(found, replace(PruneConfig(), **trial.user_attrs["config"]))
