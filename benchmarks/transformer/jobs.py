"""The models that are measured against each other, and what is timed of each.

Weights, connections and tokens are random: a step takes as long whatever their values are.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

import sparse_kernels as sk
from benchmarks.cases import DTYPES
from benchmarks.timing import Candidate
from sparse_transformer import KVCache
from sparse_transformer.model import ModelConfig, Transformer
from sparse_transformer.testing import Verdict, check, densified
from sparse_transformer.train.masked_dense import project_
from sparse_transformer.train.optimizer import OptimizerConfig, make_optimizer, normalize_gradients_
from sparse_transformer.train.topology import Topology, TopologyConfig

MODEL = ModelConfig(d_model=1024)
# One whose weights a forward must read, and one for tests.
LARGE_MODEL = ModelConfig(d_model=2048, n_layer=8, density=1 / 256, embedding_density=1 / 32)
SMOKE_MODEL = ModelConfig(
    d_model=64, n_layer=2, density=1 / 8, embedding_density=1 / 4, context=32, vocab_size=128,
    min_nonzeros=1,
)  # fmt: skip
# What differs from the sparse model.
VARIANTS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "masked_dense": {"linear": "masked_dense", "abs_topk": "torch"},
    "masked_dense_abs_topk": {"linear": "masked_dense"},
    "masked_dense_kernel": {"linear": "masked_dense"},
    "dense": {"linear": "dense", "active": None},
}
# How `project_` makes a weight sparse after each step, if not by "select".
PROJECTIONS = dict.fromkeys(("masked_dense", "masked_dense_abs_topk"), "topk")


@dataclass(frozen=True)
class Case:
    """One line of the table: what is timed of a variant of a model, its products in a dtype.

    The phase is "train", "prefill" or "decode"; the model is that of the sparse variant; a call has
    a batch of sequences, each of a whole context, or of one token with half of it in the cache.
    """

    model: ModelConfig
    variant: str
    dtype: str = "float32"
    phase: str = "train"
    batch: int = 8

    @property
    def length(self) -> int:
        return 1 if self.phase == "decode" else self.model.context

    def __str__(self) -> str:
        name = f"{self.phase} {self.variant} {self.dtype} d_model={self.model.d_model}"
        return f"{name} 1/{1 / self.model.density:g}"

    def columns(self) -> dict[str, Any]:
        shape = ("d_model", "n_layer", "context", "density", "embedding_density")
        # Without training there is no projection, and one masked dense.
        name = self.variant if self.phase == "train" else self.variant.removesuffix("_kernel")
        return {
            "phase": self.phase,
            "variant": name,
            "dtype": self.dtype,
            **{name: getattr(self.model, name) for name in shape},
            "tokens": self.batch * self.length,
            "batch": self.batch,
        }


@dataclass(frozen=True)
class Group:
    """Cases that take turns, all in memory at once; the peak memory of some is measured too."""

    name: str
    cases: tuple[Case, ...]
    memory: tuple[Case, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {len(self.cases)} variants in turns"


def make_model(case: Case, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The seeded model of a case, with float32 parameters unless told otherwise."""
    generator = torch.Generator().manual_seed(0)
    config = replace(case.model, **VARIANTS[case.variant])
    return Transformer(config, generator=generator, device=device, dtype=dtype)


class Job:
    """A model of a case and the calls that are timed, in the order in which they warm up."""

    def __init__(self, case: Case, device: str, model: Transformer) -> None:
        self.case, self.device, self.model = case, device, model
        self.calls: dict[str, Candidate] = {}
        self.verdict = Verdict()  # of the correctness check, where there is one
        self.optimizer: torch.optim.Optimizer | None = None
        self.loss: float | None = None  # of the last training step
        generator = torch.Generator().manual_seed(0)
        shape = (2, case.batch, case.length)
        drawn = torch.randint(case.model.vocab_size, shape, generator=generator)
        self.tokens, self.targets = drawn.to(device)

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
            # At the final density: what annealing adds before, the sweep over L0 shows. The run is
            # long, so that a change replaces the largest share of connections.
            config = TopologyConfig(start_multiple=1)
            self.topology = Topology(self.model, self.optimizer, config, 10**6)
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
        # As the trainer does: dense layers save whole results beside the packed ones.
        packed = contextlib.nullcontext() if self.topology is None else sk.packed_activations()
        with capture, packed:
            with torch.autocast(self.device, DTYPES[case.dtype], enabled=case.dtype == "bfloat16"):
                loss = self.model.loss(self.tokens, self.targets)
            loss.backward()
        # The names of the ranges are parts: see benchmarks.parts.
        with record_function("optimizer"):
            self.loss = float(loss.detach())
            normalize_gradients_(self._parameters, clip_only=False)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with record_function("topology"):
            if self.topology is not None:
                if self.topology.step(number):
                    self.topology.hash()
            elif self.model.config.linear == "masked_dense":
                project_(self.model, 1.0, method=PROJECTIONS.get(case.variant, "select"))
        if self.device != "cpu":
            torch.cuda.synchronize()


class Inference(Job):
    """A forward of a prompt, or of one more token of each sequence."""

    def __init__(self, case: Case, device: str, model: Transformer) -> None:
        super().__init__(case, device, model.eval())
        self.calls["step"] = self.step
        options: dict[str, Any] = {"device": device, "dtype": DTYPES[case.dtype]}
        is_decoding = case.phase == "decode"
        self._cache = KVCache(model.config, case.batch, **options) if is_decoding else None

    @torch.inference_mode()
    def step(self) -> None:
        if self._cache is not None:
            self._cache.length = self.model.config.context // 2
        self.model(self.tokens, self._cache)
        if self.device != "cpu":
            torch.cuda.synchronize()


def make_job(case: Case, device: str, *, checks: bool = False) -> Job:
    """The job of a case, on request with the verdict on its model if that is sparse."""
    if case.phase == "train":
        job: Job = Training(case, device)
        if checks and case.variant == "sparse":
            job.verdict = check(job.model)
    elif checks:
        model, verdict = _shared(replace(case, phase="prefill", batch=1), device)
        job = Inference(case, device, model)
        job.verdict = verdict
    else:
        job = Inference(case, device, make_model(case, device, DTYPES[case.dtype]))
    return job


@functools.cache
def _shared(case: Case, device: str) -> tuple[Transformer, Verdict]:
    """The model of all phases and batches, and if it is sparse the verdict on it in float32."""
    exact = replace(case, variant="sparse", dtype="float32")
    if case == exact:
        model = make_model(case, device)
        return model, check(model, gradients=False)
    sparse, verdict = _shared(exact, device)
    masked = case.variant == "masked_dense_kernel"
    model = densified(sparse) if masked else make_model(case, device)
    return model.to(DTYPES[case.dtype]), verdict if case.variant == "sparse" else Verdict()
