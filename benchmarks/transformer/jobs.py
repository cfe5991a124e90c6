"""What is timed of a case: an optimizer step, or a forward."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from benchmarks.transformer.check import Verdict
from benchmarks.transformer.variants import Case, make_model
from sparse_transformer import KVCache, Transformer
from sparse_transformer.masked import project_
from sparse_transformer.optimizer import OptimizerConfig, make_optimizer, normalize_gradients_
from sparse_transformer.topology import Topology, TopologyConfig

# Larger than any step number here: the share of connections that a change replaces is at its most.
_RUN = 10**6


class Job:
    """A model of a case and the call that is timed.

    Attributes:
        verdict: of the correctness check, where there is one.
        topology: changes the connections of a sparse model that is trained, else None.
        optimizer: None for a forward.
        loss: of the last step; None for a forward.
    """

    topology: Topology | None = None
    optimizer: torch.optim.Optimizer | None = None
    loss: float | None = None

    def __init__(self, case: Case, device: str, model: Transformer) -> None:
        self.case, self.device, self.model = case, device, model
        self.verdict: Verdict | None = None
        generator = torch.Generator().manual_seed(0)
        size = (case.batch, case.length)
        self.tokens, self.targets = (
            torch.randint(case.model.vocab_size, size, generator=generator).to(device)
            for _ in range(2)
        )

    @property
    def failure(self) -> str | None:
        """A sentence, or None."""
        if self.verdict is not None and self.verdict.failure is not None:
            return self.verdict.failure
        if self.loss is not None and not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        return None

    def step(self) -> None:
        """The call that is timed."""
        raise NotImplementedError

    def l0(self) -> int:
        """Nonzero weights of all matrices, embedding and unembedding included."""
        sparse = sum(layer.weight.numel() for layer in self.model.sparse_layers().values())
        dense = (m.weight for m in self.model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
        return sparse + sum(int(torch.count_nonzero(weight)) for weight in dense)

    def state_mb(self) -> dict[str, float]:
        """MB of the parameters and, where they are trained, gradients and optimizer state.

        The bigram table, dense in every variant, counts apart; so do the index buffers.
        """
        sizes = dict.fromkeys(("state_mb", "bigram_mb"), 0.0)
        for parameter in self.model.parameters():
            tensors: list[Tensor] = [parameter]
            if self.optimizer is not None:
                kept = self.optimizer.state.get(parameter, {}).values()
                # The gradient, of the parameter's size and dtype, is freed after a step.
                tensors += [parameter, *(t for t in kept if isinstance(t, Tensor))]
            name = "bigram_mb" if parameter is self.model.bigram else "state_mb"
            sizes[name] += sum(t.nbytes for t in tensors) / 1e6
        patterns = sum(layer.indices.nbytes for layer in self.model.sparse_layers().values())
        return sizes | {"patterns_mb": patterns / 1e6}


class Training(Job):
    """An optimizer step, as `sparse_transformer.train` takes it."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device, make_model(case, device))
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.model, OptimizerConfig())
        if case.variant.linear == "sparse":
            # At the final density: what annealing adds before, the sweep over L0 shows.
            config = TopologyConfig(start_multiple=1)
            self.topology = Topology(self.model, self.optimizer, config, _RUN)
        self._compute = self.model.loss
        if case.variant.compiled:
            self._compute = torch.compile(self.model.loss)
        self._parameters = list(self.model.parameters())

    def step(self) -> None:
        self._step(rewires=False)

    def rewire(self) -> None:
        """A step that changes the connections, and the next one, which builds new schedules."""
        self._step(rewires=True)
        self._step(rewires=False)

    def _step(self, *, rewires: bool) -> None:
        # A change is due at multiples of the period.
        number = TopologyConfig.period if rewires else 1
        capture: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.topology is not None and self.topology.wants_gradients(number):
            capture = self.topology.capture()
        with capture:
            bf16 = self.case.dtype == "bfloat16"
            with torch.autocast(self.device, self.case.torch_dtype, enabled=bf16):
                loss = self._compute(self.tokens, self.targets)
            loss.backward()
        # The names of the ranges are parts: see benchmarks.transformer.parts.
        with record_function("optimizer"):
            self.loss = float(loss.detach())
            normalize_gradients_(self._parameters, clip_only=False)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with record_function("topology"):
            if self.topology is not None:
                if self.topology.step(number):
                    self.topology.hash()
            elif self.case.variant.projection is not None:
                project_(self.model, 1.0, method=self.case.variant.projection)
        if self.device != "cpu":
            torch.cuda.synchronize()


class Inference(Job):
    """A forward of a prompt, or of one more token of each sequence."""

    def __init__(self, case: Case, device: str, model: Transformer) -> None:
        super().__init__(case, device, model.eval())
        self._cache = None
        if case.phase == "decode":
            self._cache = KVCache(model.config, case.batch, device=device, dtype=case.torch_dtype)

    @torch.inference_mode()
    def step(self) -> None:
        if self._cache is not None:
            self._cache.length = self.case.cached
        self.model(self.tokens, self._cache)
        if self.device != "cpu":
            torch.cuda.synchronize()
