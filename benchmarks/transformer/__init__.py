"""What benchmarks.training and benchmarks.inference share."""
