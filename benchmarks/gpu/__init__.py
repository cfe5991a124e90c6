"""Builds, checks, measures and profiles the GPU kernels: `python -m benchmarks.gpu`."""
