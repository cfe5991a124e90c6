"""Models that come with the package do what their cards say."""

import re
from pathlib import Path

import pytest
import torch
from test_programs import mostly_slow

import sparse_transformer
from sparse_transformer import load_model
from sparse_transformer.evaluation import evaluate_task
from sparse_transformer.tasks import TASKS

CARD = Path(sparse_transformer.__file__).parent / "models" / "python-small" / "README.md"
(UNSOLVED,) = re.findall(r"Not solved: (.*?)\.", CARD.read_text(), re.DOTALL)
SOLVED = [name for name in TASKS if f"`{name}`" not in UNSOLVED]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_model("python-small")


def test_the_card_counts_what_it_lists():
    solved = [name for name in SOLVED if TASKS[name].shortcut is None]
    asked = [name for name in TASKS if TASKS[name].shortcut is None]
    assert f"It solves {len(solved)} of the {len(asked)} binary tasks" in CARD.read_text()
    assert len(SOLVED) + UNSOLVED.count("`") // 2 == len(TASKS)


@pytest.mark.parametrize("name", mostly_slow([(name,) for name in SOLVED], 8))
def test_it_solves_the_tasks_that_its_card_says(model, name):
    # Other prompts than those of the card.
    pairs = TASKS[name].pairs(model.tokenizer, 128, split="test", seed=7)
    assert evaluate_task(model, pairs, pad=model.config.vocab_size - 1).solved
