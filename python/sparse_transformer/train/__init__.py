"""Training: `python -m sparse_transformer.train --preset tiny --out DIR`.

On several devices `torchrun --nproc-per-node 2 -m sparse_transformer.train ...`; with `--shard`
each rank keeps a part of a dense model; the files written are the same. `--resume` continues an
interrupted run from the newest checkpoint; on the CPU the losses are bit-identical.
"""
