"""Measurements: `python -m benchmarks.matmul` and `python -m benchmarks.activation`."""
