"""Circuits: the few neurons and channels that perform a task, found, validated and drawn.

`python -m sparse_transformer.circuits` does it all. From Python: `TaskLoss` is a model's loss on a
task, `find_circuit` prunes the model to the circuit and validates it, `annotate` makes a `Circuit`
of it, which `viz` draws.
"""

from sparse_transformer.circuits.circuit import Circuit

__all__ = ["Circuit"]
