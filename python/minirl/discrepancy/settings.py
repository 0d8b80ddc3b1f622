"""What the command is told: its options, and how each engine computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import TrainConfig, VLLMConfig
from ..errors import MiniRLError
from ..paths import home


@dataclass(frozen=True)
class EngineSettings:
    """How an engine computes; both have the same float32 weights to begin with."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of its computation (autocast, as in training)."""
    attn_implementation: str | None = None
    """Of transformers: eager, sdpa, …; none: the model's own."""
    experts_implementation: str | None = None
    """How experts are computed: minirl, or as transformers does (eager, grouped_mm, …); none: the model's own."""
    quantization: Literal["e4m3"] | None = None
    """e4m3: weights and activations are rounded as FP8 engines do."""
    batch_invariant: bool = False
    """Computes in batch_invariant_mode(), and by the implementations minirl where no other is named."""

    @property
    def summary(self) -> str:
        """In a few words."""
        parts = [self.dtype, self.attn_implementation, self.experts_implementation, self.quantization]
        return ", ".join([part for part in parts if part] + ["batch-invariant"] * self.batch_invariant)


@dataclass(frozen=True)
class InferenceSettings(EngineSettings):
    """How the inference engine computes."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers is the embedded one."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    decode: bool = True
    """Its log-probabilities are those of the decode; False: of the whole responses, scored again as π does."""

    @property
    def summary(self) -> str:
        engine = "vLLM, " if self.engine == "vllm" else ""
        return engine + super().summary + ("" if self.decode else ", not decoded")

    def check(self) -> None:
        """Raises MiniRLError, naming the option, for an engine that the report lacks and settings that vLLM lacks."""
        if self.engine == "transformers":
            return
        if self.engine != "vllm":  # an engine of your own, as the target has it
            raise MiniRLError(f"--mu.engine is {self.engine!r}: it must be transformers or vllm")
        for name in ("attn_implementation", "experts_implementation"):
            value = getattr(self, name)
            if value is not None:
                raise MiniRLError(
                    f"--mu.{name.replace('_', '-')} is {value!r} with --mu.engine vllm: it must be None there, "
                    "where vLLM has its own"
                )
        if not self.decode:
            raise MiniRLError("--mu.no-decode is given with --mu.engine vllm: it must be left out, vLLM always decodes")


@dataclass(frozen=True)
class TrainingSettings(EngineSettings):
    """How the training engine computes."""

    routing_replay: Literal["disabled", "R2", "R3"] = "disabled"
    """Experts to replay: R3, those that μ chose, in π_old and π_θ; R2, those that π_old chose, in π_θ."""

    @property
    def summary(self) -> str:
        return super().summary + (f", {self.routing_replay}" if self.routing_replay != "disabled" else "")


@dataclass(frozen=True)
class DiscrepancyOptions:
    """What `minirl discrepancy` is told beside its target."""

    mu: InferenceSettings
    """The inference engine: it samples the responses, and says with which log-probabilities."""
    pi: TrainingSettings
    """The training engine: it scores them."""
    updated_model: str | None = None
    """Folder or hub name of π_θ, for the staleness r = π_θ/π_old; none: r is 1."""
    prompts: Path | None = None
    """File of one per line, in a .jsonl its key prompt; none: the task's, or random tokens where there is no task."""
    responses: int = 64
    """How many, one to each prompt."""
    max_new_tokens: int = 256
    """A response is cut off here."""
    temperature: float = 1.0
    """Of sampling, and of all log-probabilities."""
    seed: int = 0
    """Of the samples."""
    batch_size: int = 32
    """Responses at a time, for which the logits of both engines are kept, 8 bytes × vocabulary per token."""
    trace_sequences: int = 4
    """Sequences of the first batch to compare module by module; every output of μ's modules is kept for them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    output: Path | None = None
    """Folder for discrepancy.json and discrepancy.png; none: the run's, or this one."""
    fail_above: float | None = None
    """End with status 1 if fail_metric is above this, or is not a number."""
    fail_metric: Literal["kl_k3", "kl_full", "abs_log_d_max"] = "kl_k3"
    """KL(μ‖π_old) by k3, or over the whole vocabulary, or the largest |log π_old − log μ|; in nats."""

    def __post_init__(self):
        for name in ("prompts", "output"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(home(str(value), f"--{name}")))

    def check(self) -> None:
        """Raises MiniRLError, naming the option, for a value that makes no sense."""
        self.mu.check()
        for name in ("responses", "max_new_tokens", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("trace_sequences", self.trace_sequences >= 0, "at least 0")
        self._require("seed", -(2**63) <= self.seed < 2**63, "a number of 64 bits")
        self._require("temperature", 0 < self.temperature < math.inf, "above 0 and finite")
        self._require("fail_above", self.fail_above is None or self.fail_above >= 0, "at least 0")

    def _require(self, name: str, holds: bool, must_be: str) -> None:
        if not holds:
            raise MiniRLError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be {must_be}")


def default_options(config: TrainConfig) -> DiscrepancyOptions:
    """Engines and sampling as a run of `config` has them."""
    experts = config.model.experts_implementation
    return DiscrepancyOptions(
        mu=InferenceSettings(
            engine=config.rollout.engine,
            vllm=config.rollout.vllm,
            dtype=config.rollout.dtype or config.dtype,
            experts_implementation=experts if config.rollout.engine == "transformers" else None,
            quantization=config.rollout.quantization,
            batch_invariant=config.batch_invariant,
        ),
        pi=TrainingSettings(
            dtype=config.dtype,
            experts_implementation=experts,
            batch_invariant=config.batch_invariant,
            routing_replay=config.routing_replay,
        ),
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        device=config.device,
    )
