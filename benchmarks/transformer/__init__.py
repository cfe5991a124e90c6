"""What benchmarks.training and benchmarks.inference share: variants, parts, proof, tables."""
