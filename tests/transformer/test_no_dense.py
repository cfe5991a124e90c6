"""A whole training step, rewiring included, makes no tensor as large as one of its matrices."""

import torch
from oracle import Largest

from sparse_transformer import ModelConfig, Transformer
from sparse_transformer.train.masked_dense import project_
from sparse_transformer.train.optimizer import OptimizerConfig, make_optimizer, normalize_gradients_
from sparse_transformer.train.topology import Topology, TopologyConfig

# The smallest matrix of a block has 256 x 256 = 65,536 entries, embedding and unembedding twice as
# many. 32 tokens have 32 x 1024 activations at most. The bigram table is dense by design: without.
D, V, TOKENS = 256, 512, 32
STEPS = 8


def watched(linear):
    """The largest tensor of `STEPS` steps, of which the fourth and others change connections."""
    config = ModelConfig(
        vocab_size=V, n_layer=2, d_model=D, context=TOKENS, linear=linear, density=1 / 64,
        embedding_density=1 / 16, min_nonzeros=1, bigram=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config, fan_multiple=4)
    optimizer = make_optimizer(model, OptimizerConfig())
    topology = None
    if linear == "sparse":
        chosen = TopologyConfig(start_multiple=4.0, period=2, anneal_share=0.6, stop_share=0.9)
        topology = Topology(model, optimizer, chosen, STEPS)
    tokens = torch.randint(V, (1, TOKENS))
    changed = 0
    with Largest() as largest:
        for step in range(STEPS):
            if topology is not None and topology.wants_gradients(step):
                with topology.capture():
                    model.loss(tokens, tokens.roll(-1, 1)).backward()
            else:
                model.loss(tokens, tokens.roll(-1, 1)).backward()
            normalize_gradients_(model.parameters(), clip_only=False)
            optimizer.step()
            optimizer.zero_grad()
            if topology is not None:
                changed += topology.step(step)
            elif linear == "masked_dense":
                project_(model)
    return largest, changed


def test_no_tensor_of_a_step_is_as_large_as_a_matrix():
    largest, changed = watched("sparse")
    assert changed >= 3
    assert 0 < largest.elements < D * D, largest.name


def test_the_watch_sees_what_masked_dense_makes():
    largest, _ = watched("masked_dense")
    assert largest.elements >= 4 * D * D
