"""Search for the hyperparameters that give the smallest circuit: Optuna, within a budget.

Masks of several trials are trained in the same forwards. Trials are kept in a journal file, nodes
included, so that an interrupted search can continue.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import optuna
import torch
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from sparse_transformer.circuits.budget import Budget, Progress
from sparse_transformer.circuits.masks import MaskConfig, NodeMasks, train_masks
from sparse_transformer.circuits.objective import TaskLoss
from sparse_transformer.circuits.prune import Thresholded, threshold_nodes


@dataclass(frozen=True)
class Candidate:
    """A trial that reached the target, or came nearest."""

    nodes: Thresholded
    config: MaskConfig


# Share of a trial's time for training; the rest is for the threshold.
_TRAINING = 0.75

# To begin with. The published starting values (price 1e-4, learning rate 3e-3) suit far longer
# trainings. Where `follow` is true the price follows the loss, see `MaskConfig.aim`.
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
    task: TaskLoss,
    target: float,
    budget: Budget,
    *,
    key: str = "search",
    journal: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Candidates, the smallest first.

    Args:
        target: loss on the prompts for fitting, calibrated.
        key: of everything that the result depends on; only a search with this key is continued.
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
    progress = progress or Progress()
    batches = -(-(budget.trials - _done(study)) // budget.together)
    for batch in range(batches):
        if _done(study) and progress.left <= 0:
            break
        with progress.part(batch / batches, (batch + 1) / batches):
            count = min(budget.trials - _done(study), budget.together)
            trials = [study.ask() for _ in range(count)]
            configs = [_suggest(trial, budget, target) for trial in trials]
            # Trial numbers continue after an interruption, and so do the batches that are drawn.
            with progress.part(0.0, _TRAINING):
                masks, _ = train_masks(
                    NodeMasks(task), configs, seed=seed + trials[0].number, progress=progress
                )
            for trial, config, mask in zip(trials, configs, masks, strict=True):
                found = threshold_nodes(task, mask, target, progress)
                trial.set_user_attr("config", asdict(config))
                trial.set_user_attr("nodes", json.dumps(found.keep.nonzero().squeeze(1).tolist()))
                trial.set_user_attr("loss", found.loss)
                trial.set_user_attr("edges", found.edges)
                study.tell(trial, _value(task, found, target))
        progress.advance(0.0, trials=_done(study), edges=_edges(study.best_trial))
    complete = study.get_trials(states=[TrialState.COMPLETE])
    complete.sort(key=lambda trial: (trial.value, trial.number))
    return [_candidate(task, trial) for trial in _distinct(complete)[: budget.finalists]]


def _suggest(trial: Trial, budget: Budget, target: float) -> MaskConfig:
    return MaskConfig(
        steps=budget.steps,
        pairs=budget.pairs,
        price=trial.suggest_float("price", 1e-4, 1e-1, log=True),
        aim=target if trial.suggest_categorical("follow", [False, True]) else None,
        learning_rate=trial.suggest_float("learning_rate", 1e-2, 1e-1, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-4, 1e-2, log=True),
        start=trial.suggest_float("start", 3e-2, 3e-1, log=True),
        temperature=trial.suggest_float("temperature", 0.3, 2.0, log=True),
    )


def _value(task: TaskLoss, found: Thresholded, target: float) -> float:
    """The logarithm of the size; what does not reach the target is worse than all that do."""
    if found.loss <= target:
        return math.log(found.edges + 1)
    return math.log(len(task.edges.source) + 1) + found.loss - target


def _done(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))


def _edges(trial: FrozenTrial) -> int:
    edges = trial.user_attrs["edges"]
    assert isinstance(edges, int)
    return edges


def _distinct(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those whose nodes are not the ones of an earlier one."""
    return list({trial.user_attrs["nodes"]: trial for trial in reversed(trials)}.values())[::-1]


def _candidate(task: TaskLoss, trial: FrozenTrial) -> Candidate:
    keep = torch.zeros(task.nodes.total, dtype=torch.bool)
    keep[torch.tensor(json.loads(trial.user_attrs["nodes"]), dtype=torch.int64)] = True
    loss = trial.user_attrs["loss"]
    found = Thresholded(keep, int(keep.sum()), _edges(trial), loss)
    return Candidate(found, replace(MaskConfig(), **trial.user_attrs["config"]))
