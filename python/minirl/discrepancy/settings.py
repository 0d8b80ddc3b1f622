"""The options of `minirl discrepancy`, and the settings of each engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import EngineName, TrainConfig, VLLMConfig
from ..errors import MiniRLError
from ..paths import home


@dataclass(frozen=True)
class EngineSettings:
    """How an engine computes. Both engines start from the same float32 weights."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation (autocast, as in training)."""
    attn_implementation: str | None = None
    """Attention implementation of transformers: minirl, eager, sdpa, …; none: the model's default."""
    experts_implementation: str | None = None
    """How experts are computed: minirl, or as transformers does (eager, grouped_mm, …); none: the model's default."""
    quantization: Literal["e4m3"] | None = None
    """e4m3: weights and activations are rounded as in FP8 engines."""
    batch_invariant: bool = False
    """Compute in batch_invariant_mode(). The implementations are then minirl, unless others are given."""

    @property
    def summary(self) -> str:
        """The settings in a few words."""
        parts = [self.dtype, self.attn_implementation, self.experts_implementation, self.quantization]
        return ", ".join([part for part in parts if part] + ["batch-invariant"] * self.batch_invariant)


@dataclass(frozen=True)
class InferenceSettings(EngineSettings):
    """How the inference engine computes."""

    engine: EngineName = "transformers"
    """The inference engine; transformers is the embedded one."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    decode: bool = True
    """True: log-probabilities come from the decode. False: μ scores whole responses again, as π does."""

    @property
    def summary(self) -> str:
        engine = "vLLM, " if self.engine == "vllm" else ""
        return engine + super().summary + ("" if self.decode else ", not decoded")

    def check(self) -> None:
        """Raises MiniRLError, naming the option, for another engine, or for a setting that vLLM does not have."""
        if self.engine == "transformers":
            return
        if self.engine != "vllm":  # the target may have an engine that the user added
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
    """R3: π_old and π_θ replay the experts that μ chose. R2: π_θ replays the experts that π_old chose."""

    @property
    def summary(self) -> str:
        return super().summary + (f", {self.routing_replay}" if self.routing_replay != "disabled" else "")


@dataclass(frozen=True)
class DiscrepancyOptions:
    """The options of `minirl discrepancy` besides its target."""

    mu: InferenceSettings
    """The inference engine. It samples the responses and returns their log-probabilities."""
    pi: TrainingSettings
    """The training engine. It scores the responses."""
    updated_model: str | None = None
    """Folder or hub name of π_θ, for the staleness r = π_θ/π_old; none: r is 1."""
    prompts: Path | None = None
    """File with one prompt per line (in a .jsonl, the key prompt). None: the task's prompts, or random tokens."""
    responses: int = 64
    """Number of responses, one per prompt."""
    max_new_tokens: int = 256
    """A response is cut off at this length."""
    temperature: float = 1.0
    """Temperature of sampling, and of all log-probabilities."""
    seed: int = 0
    """Seed of the samples."""
    batch_size: int = 32
    """Responses per batch. The logits of both engines are kept for a batch: 8 bytes × vocabulary per token."""
    trace_sequences: int = 4
    """Sequences of the first batch to compare module by module. Every module output of μ is kept for them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    output: Path | None = None
    """Folder for discrepancy.json and discrepancy.png; none: the run's folder, or the current one."""
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
        """Raises MiniRLError, naming the option, for a value that is not allowed."""
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
    """The options with the engines and the sampling of a run of `config`."""
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
