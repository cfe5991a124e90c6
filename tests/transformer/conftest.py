"""One thread: models this small are slower with two, much slower beside a busy neighbour."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(clean_state):
    """`clean_state` puts the threads back."""
    torch.set_num_threads(1)
