"""Search for the hyperparameters that give the smallest circuit: Optuna, within a budget.

A trial is ended where its mask keeps more nodes than the median of those before it at that step.
Trials are kept in a journal file, with the order of their nodes, so that an interrupted search can
continue.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
import torch
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import Tensor

from sparse_transformer.circuits.budget import Budget, Progress
from sparse_transformer.circuits.masks import MaskConfig, train_mask
from sparse_transformer.circuits.objective import TaskLoss
from sparse_transformer.circuits.prune import NodeOrder, Thresholded


@dataclass(frozen=True)
class Candidate:
    """A trial that reached the target, or came nearest.

    Attributes:
        nodes: the fewest of `order` that reach the target.
        order: the nodes by their mask.
        config: how it was trained.
    """

    nodes: Thresholded
    order: NodeOrder
    config: MaskConfig


# Shares of a trial's steps after which it may be ended.
_CHECKS = (0.5, 0.75)
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
        (True, 1e-3, 2e-2),
        (True, 1e-3, 3e-2),
        (True, 1e-3, 1.5e-2),
        (False, 3e-4, 3e-2),
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
) -> tuple[list[Candidate], bool]:
    """Candidates, the smallest first, and whether there was time for all trials.

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
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(_GUESSES)),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_min_trials=1),
    )
    if not study.trials:
        for guess in _GUESSES:
            study.enqueue_trial(guess)
    progress = progress or Progress()
    while (done := _done(study)) < budget.trials and (not done or progress.left > 0):
        with progress.part(done / budget.trials, (done + 1) / budget.trials):
            trial = study.ask()
            config = _suggest(trial, budget, target)
            try:
                # Trial numbers continue after an interruption, and so do the batches.
                mask = train_mask(
                    task,
                    config,
                    seed=seed + trial.number,
                    progress=progress,
                    watch=_Watch(trial, target),
                )
            except optuna.TrialPruned:
                study.tell(trial, state=TrialState.PRUNED)
                continue
            order = NodeOrder.of(task, mask)
            found = order.threshold(target, progress)
            trial.set_user_attr("config", asdict(config))
            trial.set_user_attr("order", json.dumps(order.order.tolist()))
            trial.set_user_attr("chosen", order.chosen)
            trial.set_user_attr("nodes", json.dumps(found.keep.nonzero().squeeze(1).tolist()))
            trial.set_user_attr("loss", found.loss)
            study.tell(trial, _value(task, found, target))
        progress.advance(0.0, trials=_done(study), edges=found.edges)
    complete = study.get_trials(states=[TrialState.COMPLETE])
    complete.sort(key=lambda trial: (trial.value, trial.number))
    distinct = {trial.user_attrs["nodes"]: trial for trial in reversed(complete)}
    best = list(distinct.values())[::-1][: budget.finalists]
    return [_candidate(task, trial) for trial in best], done == budget.trials


class _Watch:
    """Reports to a trial how many nodes its mask keeps, and ends it if that is too many.

    A loss above the target counts as more nodes.
    """

    def __init__(self, trial: Trial, target: float) -> None:
        self._trial, self._target, self._reported = trial, target, 0

    def __call__(self, done: float, loss: float, mask: Tensor) -> None:
        if self._reported == len(_CHECKS) or done < _CHECKS[self._reported]:
            return
        kept = math.log(1 + int((mask > 0).sum()))
        self._trial.report(kept * max(1.0, loss / self._target), self._reported)
        self._reported += 1
        if self._trial.should_prune():
            raise optuna.TrialPruned


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
    states = [TrialState.COMPLETE, TrialState.PRUNED]
    return len(study.get_trials(deepcopy=False, states=states))


def _candidate(task: TaskLoss, trial: FrozenTrial) -> Candidate:
    known = trial.user_attrs
    keep = torch.zeros(task.nodes.total, dtype=torch.bool)
    keep[torch.tensor(json.loads(known["nodes"]), dtype=torch.int64)] = True
    found = Thresholded(keep, int(keep.sum()), task.edges.count(keep), known["loss"])
    order = NodeOrder(task, torch.tensor(json.loads(known["order"])), known["chosen"])
    return Candidate(found, order, MaskConfig(**known["config"]))
