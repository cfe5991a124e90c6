"""What only a GPU needs of the benchmarks; `python -m benchmarks.gpu` runs everything on one."""
