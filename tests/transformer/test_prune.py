"""What removes many candidates at once: sparse_transformer.circuits.prune."""

from types import SimpleNamespace

import pytest
import torch

from sparse_transformer.circuits import prune
from sparse_transformer.circuits.budget import Progress


class Candidates:
    """Numbers; the loss is the sum of what those that went are worth."""

    def __init__(self, effects, worth):
        self._effects, self._worth = torch.tensor(effects), torch.tensor(worth)
        self.subgraph = torch.zeros(0, dtype=torch.int64)
        self.task = SimpleNamespace(probe=lambda: None, calibrated_loss=self._loss)

    def left(self):
        return torch.arange(len(self._effects))

    def effects(self):
        return self._effects

    def without(self, gone):
        return gone

    def _loss(self, gone, probe=None):
        return float(self._worth[gone].sum())


def removed(effects, worth, target):
    return sorted(prune._many(Candidates(effects, worth), target, Progress()).tolist())


def test_a_large_gain_that_gradients_promise_is_not_trusted_first():
    """The loss rises tenfold by the node that should lower it, and hardly by the others."""
    effects = [-5.0] + [0.001] * 99
    assert removed(effects, [10.0] + [0.001] * 99, 1.0) == list(range(1, 100))


def test_as_many_of_the_cheapest_go_as_the_target_allows():
    costs = [float(number) for number in range(100)]
    assert removed(costs, costs, 45.0) == list(range(10))


@pytest.mark.parametrize(("worth", "wanted"), [(0.0, 400), (1.0, 0)])
def test_all_or_none(worth, wanted):
    assert len(removed([0.0] * 400, [worth] * 400, 0.5)) == wanted
