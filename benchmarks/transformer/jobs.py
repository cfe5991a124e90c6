"""What is timed of a case: an optimizer step, or a forward."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from benchmarks.timing import Candidate
from benchmarks.transformer.check import Verdict
from benchmarks.transformer.variants import PROJECTIONS, Case, make_model
from sparse_transformer import KVCache, Transformer
from sparse_transformer.train.masked_dense import project_
from sparse_transformer.train.optimizer import OptimizerConfig, make_optimizer, normalize_gradients_
from sparse_transformer.train.topology import Topology, TopologyConfig

# Larger than any step number here: the share of connections that a change replaces is at its most.
_RUN = 10**6


class Job:
    """A model of a case and the calls that are timed, in the order in which they warm up."""

    def __init__(self, case: Case, device: str, model: Transformer) -> None:
        self.case, self.device, self.model = case, device, model
        self.calls: dict[str, Candidate] = {}
        self.verdict = Verdict()  # of the correctness check, where there is one
        self.optimizer: torch.optim.Optimizer | None = None
        self.loss: float | None = None  # of the last training step
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, case.length)
        self.tokens, self.targets = (
            torch.randint(case.model.vocab_size, shape, generator=generator).to(device)
            for _ in range(2)
        )

    @property
    def failure(self) -> str | None:
        """A sentence, or None."""
        is_finite = self.loss is None or math.isfinite(self.loss)
        return self.verdict.failure or (None if is_finite else f"the loss is {self.loss}")

    def l0(self) -> int:
        """Nonzero weights of all matrices, embedding and unembedding included."""
        sparse = sum(layer.weight.numel() for layer in self.model.sparse_layers().values())
        dense = (m.weight for m in self.model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
        return sparse + sum(int(torch.count_nonzero(weight)) for weight in dense)

    def state_mb(self) -> dict[str, float]:
        """MB of the parameters and, in training, their gradients and optimizer state.

        "bigram_mb" is the bigram table, which is dense in every variant.
        """
        sizes = {"state_mb": 0.0, "bigram_mb": 0.0}
        for parameter in self.model.parameters():
            tensors: list[Tensor] = [parameter]
            if self.optimizer is not None:
                # The gradient, of the parameter's size and dtype, is freed after a step.
                tensors += [parameter, *self.optimizer.state[parameter].values()]
            name = "bigram_mb" if parameter is self.model.bigram else "state_mb"
            sizes[name] += sum(tensor.nbytes for tensor in tensors) / 1e6
        return sizes


class Training(Job):
    """An optimizer step, as `sparse_transformer.train` takes it."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device, make_model(case, device))
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.model, OptimizerConfig())
        self.topology: Topology | None = None
        if case.variant == "sparse":
            # At the final density: what annealing adds before, the sweep over L0 shows.
            config = TopologyConfig(start_multiple=1)
            self.topology = Topology(self.model, self.optimizer, config, _RUN)
            self.calls["rewiring"] = self.rewire
        self.calls["step"] = self.step
        self._parameters = list(self.model.parameters())

    def rewire(self) -> None:
        """A step that changes the connections, and the next one, which builds new schedules."""
        self.step(TopologyConfig.period)
        self.step()

    def step(self, number: int = 1) -> None:
        """One step; it changes the connections where `number` is a multiple of the period."""
        case = self.case
        capture: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.topology is not None and self.topology.wants_gradients(number):
            capture = self.topology.capture()
        with capture:
            with torch.autocast(self.device, case.torch_dtype, enabled=case.dtype == "bfloat16"):
                loss = self.model.loss(self.tokens, self.targets)
            loss.backward()
        # The names of the ranges are parts: see benchmarks.transformer.profile.
        with record_function("optimizer"):
            self.loss = float(loss.detach())
            normalize_gradients_(self._parameters, clip_only=False)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with record_function("topology"):
            if self.topology is not None:
                if self.topology.step(number):
                    self.topology.hash()
            elif case.variant in PROJECTIONS:
                project_(self.model, 1.0, method=PROJECTIONS[case.variant])
        if self.device != "cpu":
            torch.cuda.synchronize()


class Inference(Job):
    """A forward of a prompt, or of one more token of each sequence."""

    def __init__(self, case: Case, device: str, model: Transformer) -> None:
        super().__init__(case, device, model.eval())
        self.calls["step"] = self.step
        self._cache = None
        if case.phase == "decode":
            dtype = case.torch_dtype
            self._cache = KVCache(model.config, case.batch, device=device, dtype=dtype)

    @torch.inference_mode()
    def step(self) -> None:
        if self._cache is not None:
            self._cache.length = self.model.config.context // 2
        self.model(self.tokens, self._cache)
        if self.device != "cpu":
            torch.cuda.synchronize()
