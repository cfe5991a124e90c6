"""The state of a run, and one step of it.

On several devices each rank computes its part of the same global batch, gradients are averaged, and
all ranks keep the same connections.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparse_kernels as sk
from sparse_transformer import tasks
from sparse_transformer.data import Batches, Corpus, check_length, validation_batches
from sparse_transformer.errors import UserError
from sparse_transformer.generation import stream
from sparse_transformer.masked import masked_layers
from sparse_transformer.model import Transformer
from sparse_transformer.ranges import need, need_number, need_whole
from sparse_transformer.train import checkpoint, sharding
from sparse_transformer.train.bigram import set_to_counts_
from sparse_transformer.train.checkpoint import Checkpoint
from sparse_transformer.train.distributed import Ranks
from sparse_transformer.train.masked_dense import project_
from sparse_transformer.train.optimizer import learning_rate, make_optimizer, normalize_gradients_
from sparse_transformer.train.settings import Settings, TrainConfig
from sparse_transformer.train.start import grown
from sparse_transformer.train.topology import Topology, annealed_after, annealed_fraction


class Diverged(UserError):
    """Training diverged; the last checkpoint is good."""


class Trainer:
    """The state of a run, and one step of it. Writes nothing.

    Args:
        corpus: what it trains on.
        here: this process among the ranks.
        point: where to go on, or None to begin.

    Attributes:
        model, optimizer, topology: the last is None unless `settings.model.linear` is "sparse".
        step: how many steps are done.

    Raises:
        UserError: settings that do not fit the device, the ranks or the corpus.
    """

    def __init__(
        self, settings: Settings, corpus: Corpus, here: Ranks, point: Checkpoint | None = None
    ) -> None:
        config = settings.train
        self.settings, self.ranks, self.corpus = settings, here, corpus
        if config.dtype == "float16" and here.device.type == "cpu":
            raise UserError("float16 needs a GPU: use --dtype bfloat16 or float32 on the CPU")
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        if config.shard:
            reason = sharding.why_not(settings.model.linear, here.world)
            if reason:
                raise UserError(reason)
        context = settings.model.context
        windows = _windows(config, context, here.world)
        self._batches = Batches(
            corpus.train,
            context=context,
            batch=windows,
            seed=config.seed,
            rank=here.rank,
            world=here.world,
        )
        self._micro_batch = windows // (here.world * config.accumulate)
        check_length(corpus.validation, context, "validation")
        if config.task_pairs % here.world:
            raise UserError(
                f"--task-pairs {config.task_pairs} cannot be divided among {here.world} ranks: "
                f"choose a multiple of it"
            )
        self._tasks = [tasks.get(name) for name in config.tasks or tasks.TASKS]
        for task in self._tasks if config.task_pairs else ():
            task.pairs(corpus.tokenizer, 1, split="train", context=context)  # or say why not
        _check_memory(settings, here, self._micro_batch * context)
        self.step = point.step if point else 0
        self.anneal_steps = config.steps
        if point is None:
            torch.manual_seed(config.seed)
            self.model = Transformer(
                settings.model,
                fan_multiple=settings.topology.start_multiple,
                generator=torch.Generator().manual_seed(config.seed),
                device=here.device,
            )
            if config.start_from is not None:
                other = checkpoint.load_weights(config.start_from, device=here.device)
                self.model = grown(other, self.model)
            elif self.model.bigram is not None and config.bigram_start == "counts":
                set_to_counts_(self.model.bigram, corpus.train)
            here.broadcast_(self.model.state_dict().values())
            self._equip()
        else:
            with checkpoint.damage_named(point.path, "--from-step"):
                progress = Progress.of(point)
                self.anneal_steps = progress.anneal_steps
                self.model = checkpoint.model_of(point, settings.model, here.device)
                self._equip()
                self._restore(point, progress)
        self._topology_hash = self.topology.hash() if self.topology else "0"
        self._compiled = torch.compile(self.model.loss) if config.compile else None

    def _equip(self) -> None:
        """What works on the model: optimizer, topology, scaler and watch."""
        settings, config = self.settings, self.settings.train
        if config.shard:
            sharding.shard_(self.model, self.ranks.world, self.ranks.device)
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.topology = (
            Topology(self.model, self.optimizer, settings.topology, config.steps, self.anneal_steps)
            if settings.model.linear == "sparse"
            else None
        )
        # Gradients of float16 are kept in range.
        self._scaler = torch.amp.GradScaler(
            self.ranks.device.type, growth_interval=1000, enabled=self.dtype == torch.float16
        )
        self._watch = _RiseWatch(config.max_rise)

    @property
    def fraction(self) -> float:
        """L0 now over L0 at the end, as scheduled; at least 1."""
        settings = self.settings
        if self.topology is not None:
            return self.topology.fraction(self.step)
        if settings.model.linear == "masked_dense":
            # The published recipe starts dense.
            sparsest = min(settings.model.density, settings.model.embedding_density)
            return annealed_fraction(
                self.step, self.anneal_steps, 1 / sparsest, settings.topology.anneal_share
            )
        return 1.0

    def advance(self) -> dict[str, float]:
        """One optimizer step: loss, gradients, update, topology. Returns what there is to report.

        Diverged is raised, and nothing has been updated, where a loss or gradient is not finite, or
        the loss rises and rises.
        """
        config, fraction = self.settings.train, self.fraction
        rate = learning_rate(
            self.step, config.steps, self.settings.optimizer.learning_rate, fraction
        )
        loss, answer_loss, rms = self._gradients()
        self._watch.look(loss)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.topology is not None and self.topology.step(self.step):
            self._topology_hash = self.topology.hash()
        elif self.settings.model.linear == "masked_dense":
            project_(self.model, fraction, method=config.projection)
        self.step += 1
        return {
            "loss": loss,
            **({"answer_loss": answer_loss} if config.task_pairs else {}),
            "lr": rate,
            "l0": self.l0(),
            "tokens": self.step * config.batch_tokens,
            "gradient_rms": rms,
        }

    def agree(self, stop: int) -> int:
        """See `Ranks.agree`."""
        return self.ranks.agree(self._topology_hash, stop)

    def validate(self) -> float:
        """Mean loss over the validation windows, all ranks together."""
        config, context = self.settings.train, self.settings.model.context
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        batches = validation_batches(
            self.corpus.validation,
            context=context,
            batch=self._micro_batch,
            windows=max(1, config.validation_tokens // context),
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        with torch.no_grad(), self._autocast():
            for tokens, targets in batches:
                windows = len(tokens)
                if windows == 0:
                    # The ranks of a sharded model must compute together: any window, counted as 0.
                    tokens = targets = torch.zeros(1, context, dtype=torch.int64)
                loss = self.model.loss(*self._move(tokens, targets))
                total += torch.stack([loss.double() * windows, total.new_tensor(windows)])
        loss_sum, count = self.ranks.sum(total).tolist()
        return float(loss_sum / count)

    @property
    def annealed_after(self) -> int | None:
        """The step with which the schedule of L0 reaches its target; None if it has none."""
        settings = self.settings
        if settings.model.linear == "dense" or (
            self.topology is not None and settings.topology.start_multiple == 1
        ):
            return None
        return annealed_after(self.anneal_steps, settings.topology.anneal_share) + 1

    def sample(self) -> str:
        """A text that the model begins and continues, the same choices after the same step.

        Empty where other ranks would have to compute with this one.
        """
        count = self.settings.train.sample_tokens
        if self.ranks.world > 1 or count == 0:
            return ""
        end = self.corpus.end_of_text
        generator = torch.Generator(self.ranks.device).manual_seed(self.step)
        steps = stream(self.model, [[end]], count, temperature=0.8, top_k=40, generator=generator)
        return str(self.corpus.tokenizer.decode([token for (token,) in steps if token is not None]))

    def l0(self) -> int:
        """Nonzero weights of all matrices: for the sparse ones, those that exist.

        All ranks must call it.
        """
        if self.topology is not None:
            return sum(layer.weight.numel() for layer in self.model.sparse_layers().values())
        masked = masked_layers(self.model).values()
        if masked:
            counts = torch.stack([torch.count_nonzero(layer.weight) for layer in masked])
            return int(sharding.whole(counts.sum()))
        return sum(
            module.weight.numel()
            for module in self.model.modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors, and what JSON can hold.

        All ranks must call it; only the first one gets tensors, on the CPU. Diverged is raised
        where a parameter is not finite, so that this is no state to go back to.
        """
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(sharding.whole(parameter)).all():
                raise Diverged(f"{name} is no longer finite after step {self.step}")
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["generator.cpu"] = torch.get_rng_state()
        if self.ranks.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state()
        meta: dict[str, Any] = {
            "settings": self.settings.to_dict(),
            "corpus": self.corpus.key,
            "loss_scale": {
                "scale": self._scaler.get_scale(),
                "good": self._scaler.state_dict().get("_growth_tracker", 0),
            },
            "watch": vars(self._watch),
            "anneal_steps": self.anneal_steps,
        }
        if self.topology is not None:
            meta["topology"] = self.topology.state_dict()
        return sharding.gather(tensors, keep=self.ranks.first), meta

    def _restore(self, point: Checkpoint, progress: Progress) -> None:
        """Optimizer, topology and generators; the model has its tensors already."""
        tensors, meta = point.tensors, point.meta
        numbers = {
            parameter: number
            for number, parameter in enumerate(
                parameter for group in self.optimizer.param_groups for parameter in group["params"]
            )
        }
        packed = self.optimizer.state_dict()
        for name, parameter in self.model.named_parameters():
            state = checkpoint.part(tensors, f"optimizer.{name}")
            _check_moments(name, state, parameter.shape, point.step)
            packed["state"][numbers[parameter]] = {
                key: sharding.like(value, parameter) if value.dim() else value
                for key, value in state.items()
            }
        self.optimizer.load_state_dict(packed)
        if self.topology is not None:
            self.topology.load_state_dict(meta["topology"])
        if self._scaler.is_enabled():
            kept = {"scale": progress.scale, "_growth_tracker": progress.good % 1000}
            self._scaler.load_state_dict(self._scaler.state_dict() | kept)
        self._watch.mean, self._watch.least = progress.mean_loss, progress.least_loss
        torch.set_rng_state(tensors["generator.cpu"].cpu())
        if self.ranks.device.type == "cuda" and "generator.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["generator.cuda"].cpu())

    def _gradients(self) -> tuple[float, float, float]:
        """Normalised gradients of this step over all ranks.

        Returns its mean loss on the corpus and on answers, and the RMS before normalisation.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        while True:
            share = self._backward()
            if not self.settings.train.shard:  # which has averaged them already
                self.ranks.average_gradients_(parameters)
            loss, answer_loss = (self.ranks.sum(share) / self.ranks.world).tolist()
            if not math.isfinite(loss + answer_loss):
                raise Diverged(f"the loss of step {self.step + 1} is {loss + answer_loss}")
            self._scaler.unscale_(self.optimizer)
            rms = normalize_gradients_(parameters, clip_only=self.settings.train.clip_only)
            if math.isfinite(rms):
                return loss, answer_loss, rms
            scale = self._scaler.get_scale()
            if self._scaler.is_enabled():
                # Halves it: the same step again.
                self._scaler.update()
            if not 1 <= self._scaler.get_scale() < scale:
                raise Diverged(f"the gradients of step {self.step + 1} are not finite")

    def _backward(self) -> Tensor:
        """Adds up the gradients of this rank's share.

        Returns its mean loss on the corpus and on answers, float64 `(2,)`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        accumulate = self.settings.train.accumulate
        capture: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        compute = self._compiled or self.model.loss
        if self.topology is not None:
            if self.fraction > 1:
                # Each intermediate fan-in would be compiled separately.
                compute = self.model.loss
            if self.topology.wants_gradients(self.step):
                # It uses module hooks, which a compiled model does not call.
                capture, compute = self.topology.capture(), self.model.loss
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        tokens, targets = self._move(*self._batches.at(self.step))
        # Dense layers save whole results beside the packed ones.
        packed = contextlib.nullcontext() if self.topology is None else sk.packed_activations()
        with capture, packed:
            for part, goal in zip(
                tokens.split(self._micro_batch), targets.split(self._micro_batch), strict=True
            ):
                with self._autocast():
                    loss = compute(part, goal)
                total[0] += loss.detach().double() / accumulate
                self._scaler.scale(loss * (1 / accumulate)).backward()
            if self.settings.train.task_pairs:
                with self._autocast():
                    loss = self._answer_loss()
                total[1] = loss.detach().double()
                self._scaler.scale(loss).backward()
        return total

    def _answer_loss(self) -> Tensor:
        """Mean cross-entropy of the right answers to this rank's share of the step's prompts.

        The tasks take turns; the pairs are a pure function of (seed, step, rank, world).
        """
        config, here = self.settings.train, self.ranks
        count = config.task_pairs // here.world
        number = self.step * here.world + here.rank
        turns = Counter((number * count + turn) % len(self._tasks) for turn in range(count))
        pairs = [
            pair
            for index, asked in sorted(turns.items())
            for pair in self._tasks[index].pairs(
                self.corpus.tokenizer,
                asked,
                split="train",
                # Apart from those of sparse_transformer.tasks and of searches for circuits.
                seed=config.seed * 2**32 + 2**31 + number,
                context=self.settings.model.context,
            )
        ]
        batch = tasks.collate(pairs, self.corpus.end_of_text).to(here.device)
        logits = self.model(batch.tokens, at=batch.last).squeeze(1)
        return nn.functional.cross_entropy(logits.float(), batch.right)

    def _move(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.ranks.device.type == "cpu":
            return tokens, targets
        device = self.ranks.device
        return (
            tokens.pin_memory().to(device, non_blocking=True),
            targets.pin_memory().to(device, non_blocking=True),
        )

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(
            self.ranks.device.type, self.dtype if enabled else None, enabled=enabled
        )


@dataclass
class _RiseWatch:
    """Notices a loss that diverges: its running mean far above the least that it has been."""

    limit: float
    mean: float | None = None
    least: float | None = None

    def look(self, loss: float) -> None:
        self.mean = loss if self.mean is None else 0.9 * self.mean + 0.1 * loss
        self.least = self.mean if self.least is None else min(self.least, self.mean)
        if self.mean > self.least + self.limit:
            raise Diverged(f"the loss has risen from {self.least:.3g} to {self.mean:.3g}")


@dataclass(frozen=True)
class Progress:
    """What the meta of a checkpoint says about a run, checked; `Trainer.state` has written it."""

    settings: Settings
    corpus: str
    anneal_steps: int
    metrics_position: int
    seconds: float
    scale: float
    good: int
    mean_loss: float | None
    least_loss: float | None

    @classmethod
    def of(cls, point: Checkpoint) -> Progress:
        """Reads it; a KeyError, TypeError or ValueError if something has no sensible value."""
        meta = point.meta
        settings = Settings.from_dict(meta["settings"])
        progress = cls(
            settings,
            corpus=meta["corpus"],
            # Older checkpoints are of runs that were not extended.
            anneal_steps=meta.get("anneal_steps", settings.train.steps),
            metrics_position=meta["metrics_position"],
            seconds=meta["seconds"],
            scale=meta["loss_scale"]["scale"],
            good=meta["loss_scale"]["good"],
            mean_loss=meta["watch"]["mean"],
            least_loss=meta["watch"]["least"],
        )
        need(isinstance(progress.corpus, str), "corpus", "a key", progress.corpus)
        need_whole(progress, "anneal_steps", 1)
        for name in ("metrics_position", "good"):
            need_whole(progress, name, 0)
        need_number(progress, "seconds", 0, math.inf)
        need_number(progress, "scale", 0, math.inf, above=True)
        for name in ("mean_loss", "least_loss"):
            if getattr(progress, name) is not None:
                need_number(progress, name, -math.inf, math.inf)
        return progress


def _check_moments(name: str, state: dict[str, Tensor], shape: torch.Size, step: int) -> None:
    """Raises ValueError unless AdamW can go on with `state` after `step` steps.

    It would read past the end of moments that are too small.
    """
    if state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        held = ", ".join(sorted(state)) or "nothing"
        raise ValueError(f"the optimizer's state of {name} must be AdamW's, it has {held}")
    for key, tensor in state.items():
        wanted = torch.Size() if key == "step" else shape
        if tensor.shape != wanted or tensor.dtype != torch.float32:
            raise ValueError(
                f"{key} of {name} must be float32 {tuple(wanted)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} of {name} is not finite")
    if int(state["step"]) != step:
        raise ValueError(f"the optimizer has done {int(state['step'])} steps, and not {step}")


def _windows(config: TrainConfig, context: int, world: int) -> int:
    """Windows of a step, over all ranks."""
    unit = context * world * config.accumulate
    if config.batch_tokens % unit:
        raise UserError(
            f"--batch-tokens {config.batch_tokens} cannot be divided into windows of {context} "
            f"tokens for {world} ranks of {config.accumulate} parts: choose a multiple of {unit}"
        )
    return config.batch_tokens // context


def _check_memory(settings: Settings, here: Ranks, tokens: int) -> None:
    """Refuses what cannot fit, before anything is allocated.

    Counts the parameters, their gradients and both moments at the start of training, and the logits
    and the residual stream of `tokens` tokens.
    """
    if here.device.type == "cuda":
        available = torch.cuda.get_device_properties(here.device).total_memory
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model = settings.model
    parts = here.world if settings.train.shard else 1
    needed = 4 * 4 * model.values(settings.topology.start_multiple) // parts
    needed += 4 * tokens * (model.vocab_size + 2 * model.n_layer * model.d_model)
    if needed > available:
        raise UserError(
            f"training needs at least {needed / 2**30:,.0f} GiB of memory and the device has "
            f"{available / 2**30:,.0f}: choose a smaller model, or --accumulate for fewer tokens "
            f"at once"
        )
