"""Models of the package and of its checkout do what their cards say."""

import functools
import re

import pytest
import torch
from test_programs import mostly_slow

from sparse_transformer import load_model
from sparse_transformer.evaluation import evaluate_task
from sparse_transformer.tasks import TASKS
from sparse_transformer.train.checkpoint import MODELS, models

CARDS = {name: (folder / "README.md").read_text() for name, folder in models().items()}
MEGABYTES = {"python-small": 10, "python-base": 16}


def unsolved(name):
    (listed,) = re.findall(r"Not solved: (.*?)\.", CARDS[name], re.DOTALL)
    return re.findall(r"`(\w+)`", listed)


SOLVED = [(name, task) for name in CARDS for task in TASKS if task not in unsolved(name)]


@functools.cache
def loaded(name):
    torch.set_num_threads(1)
    return load_model(name)


def test_models_are_where_they_are_looked_for():
    assert [root for root in MODELS if (root / "python-small").is_dir()] == MODELS[:1]
    assert set(CARDS) <= set(MEGABYTES)


@pytest.mark.parametrize("name", CARDS)
def test_the_card_counts_what_it_lists(name):
    asked = [task for task in TASKS if TASKS[task].shortcut is None]
    assert set(unsolved(name)) <= set(asked)
    solved = len(asked) - len(unsolved(name))
    assert f"It solves {solved} of the {len(asked)} binary tasks" in CARDS[name]


@pytest.mark.parametrize("name", CARDS)
def test_models_are_small(name):
    files = [path for path in models()[name].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MEGABYTES[name] * 10**6


@pytest.mark.parametrize(("name", "task"), mostly_slow(SOLVED, 8))
def test_it_solves_the_tasks_that_its_card_says(name, task):
    # Other prompts than those of the card.
    model = loaded(name)
    pairs = TASKS[task].pairs(model.tokenizer, 128, split="test", seed=7)
    assert evaluate_task(model, pairs, pad=model.config.vocab_size - 1).solved
