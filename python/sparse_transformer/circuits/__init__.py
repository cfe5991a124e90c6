"""Circuits: the few neurons and channels that perform a task, found, proved and drawn.

`python -m sparse_transformer.circuits` does it all. From Python: `Problem` asks a task of a model,
`find` prunes the model to the circuit and proves it, `describe` makes a `Circuit` of it, which
`picture` draws.
"""

from sparse_transformer.circuits.circuit import Circuit

__all__ = ["Circuit"]
