"""The settings of a run: frozen dataclasses, filled from a TOML file (`config_file`) and the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from minirl_kernels import PolicyLossConfig
from minirl_kernels.config import ObjectiveName

from .errors import MiniRLError
from .paths import home

EngineName = Literal["transformers", "vllm"]  # the modules of `rollout`


@dataclass(frozen=True)
class ModelConfig:
    """The policy: a folder (or hub name) with weights, or a transformers config to build a new one from."""

    path: str | None = None
    """Folder or hub name of a causal language model with its tokenizer; none: build from model.config."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of a transformers config, model_type first; vocabulary and special tokens come from the task."""
    experts_implementation: str | None = None
    """How experts are computed: minirl, or as transformers does (eager, grouped_mm, …); none: the default."""

    def __post_init__(self):
        _expand_home(self, "model.path")


@dataclass(frozen=True)
class TaskConfig:
    """Where prompts come from, and how a response is graded."""

    kind: Literal["arithmetic", "jsonl"] = "arithmetic"
    """arithmetic: sums, graded by exact match. jsonl: lines of prompt and answer, graded as text or by math-verify."""
    max_operand: int = 99
    """Largest number to be added (arithmetic)."""
    path: str | None = None
    """File of lines like {"prompt": "...", "answer": "..."} (jsonl)."""
    held_out_fraction: float = 0.1
    """Share of problems that are held out of training, chosen by a hash of the problem, independent of the seed."""

    def __post_init__(self):
        _expand_home(self, "task.path")


@dataclass(frozen=True)
class ColdStartConfig:
    """Supervised training on problems and their answers, before any reinforcement learning."""

    steps: int = 0
    """Maximum number of optimizer steps; 0 means no cold start."""
    stop_at_reward: float = 1.0
    """The cold start ends when the mean reward on training prompts reaches this value."""
    check_every: int = 25
    """Steps between two measurements of this reward."""
    batch_size: int = 128
    """Problems per step."""
    lr: float = 2e-3
    """Learning rate of its AdamW."""


@dataclass(frozen=True)
class VLLMConfig:
    """How vLLM runs, where it is the rollout engine."""

    separate_process: bool = True
    """False: vLLM runs in the trainer's process, which halves the start time."""
    args: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments of vllm.LLM: kv_cache_memory_bytes (1 GiB on a CPU), gpu_memory_utilization, …"""


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled: temperature only, no top-p, top-k or other filter."""

    engine: EngineName = "transformers"
    """Inference engine; transformers is the embedded one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the engine's computation; none: as in training. A different dtype causes a discrepancy, for studies."""
    quantization: Literal["e4m3"] | None = None
    """e4m3: sample from a fake-quantised copy, rounded as in FP8 engines. With vllm: vLLM's fp8, on GPUs only."""
    group_size: int = 8
    """Responses per prompt, G in the paper; their mean reward is the baseline."""
    temperature: float = 1.0
    """Temperature of sampling, and of all log-probabilities in training."""
    max_new_tokens: int = 256
    """A response is cut off at this length. It keeps its tokens and is graded as it is."""
    batch_size: int = 256
    """Responses decoded at a time."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


_FILTERS = ("top_p", "top_k", "min_p")


def refuse_filter(key: str) -> None:
    """Raises MiniRLError for a key or option of a sampling filter, such as rollout.top_p, which samplers often have."""
    if key.replace("-", "_").rpartition(".")[2] in _FILTERS:
        raise MiniRLError(
            f"{key} is not an option: it must be left out, since rollouts are sampled from the whole distribution "
            "(top-p 1 and no other filter, as in the paper), at rollout.temperature"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a constant learning rate."""

    lr: float = 1e-6
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""


@dataclass(frozen=True)
class EvalConfig:
    """avg@k on held-out prompts: the mean reward of k sampled responses to each."""

    every: int = 10
    """Steps between two evaluations; the first is before step 1, the last after the final step."""
    k: int = 4
    """Responses per prompt."""
    prompts: int = 200
    """Held-out prompts, the same ones each time (all, if there are fewer)."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Sizes are counted in prompts, responses (group_size per prompt) and steps."""

    run_dir: str = "runs/minirl"
    """Folder for all files of the run."""
    seed: int = 0
    """Seed of weights, prompts and samples. The same seed gives the same curve on one machine and thread count."""
    threads: int | None = None
    """CPU threads; none: torch's default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation (autocast). The weights that the optimizer updates stay float32."""
    steps: int = 100
    """Global steps: each samples, then makes num_minibatches updates."""
    prompts_per_minibatch: int = 16
    """Prompts per optimizer update."""
    num_minibatches: int = 1
    """Updates per global step, N in the paper; 1 is on policy."""
    micro_batch_size: int = 128
    """Responses per forward and backward pass; changes memory and speed, not the update."""
    batch_invariant: bool = False
    """Rollout and training compute the same bits for a token in every batch: the discrepancy is 0. Somewhat slower."""
    routing_replay: Literal["disabled", "R2", "R3"] = "disabled"
    """R2: updates replay the experts of the pass for old_log_probs. R3: this pass and updates replay the rollout's."""
    preset: ObjectiveName = "minirl"
    """Named objective that sets the defaults of policy_loss."""
    norm_advantages_by_std: bool | None = None
    """Divide advantages by their group's standard deviation; none: as the preset's paper does."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        _expand_home(self, "run_dir")

    @property
    def minibatch_size(self) -> int:
        """Responses per optimizer update."""
        return self.prompts_per_minibatch * self.rollout.group_size

    @property
    def advantages_by_std(self) -> bool:
        """norm_advantages_by_std, or the preset's default: GRPO, CISPO and GSPO divide by the standard deviation."""
        if self.norm_advantages_by_std is None:
            return self.preset in ("grpo", "cispo", "gspo")
        return self.norm_advantages_by_std

    def check(self) -> None:
        """Raises MiniRLError, naming the key, for a value of the right type that is not allowed."""
        for key in _AT_LEAST_ONE:
            _require(self, key, lambda value: value >= 1, "at least 1")
        for key in ("cold_start.steps", "optimizer.weight_decay"):
            _require(self, key, lambda value: value >= 0, "at least 0")
        for key in ("rollout.temperature", "optimizer.lr", "optimizer.max_grad_norm", "cold_start.lr"):
            _require(self, key, lambda value: value > 0, "above 0")
        _require(self, "cold_start.stop_at_reward", lambda value: 0 < value <= 1, "above 0 and at most 1")
        _require(self, "threads", lambda value: value is None or value >= 1, "at least 1, or none")
        _require(self, "threads", lambda value: value is None or value <= MOST_THREADS, f"at most {MOST_THREADS}")
        _require(self, "rollout.group_size", lambda value: value >= 2, "at least 2, to have a mean to compare with")
        _require(self, "task.max_operand", lambda value: 1 <= value <= 999, "between 1 and 999")
        _require(self, "task.held_out_fraction", lambda value: 0 < value < 1, "between 0 and 1, both excluded")
        _require(self, "optimizer.betas", lambda value: all(0 <= beta < 1 for beta in value), "in [0, 1)")
        for key in _numbers(self):
            _require(self, key, math.isfinite, "finite")
        if self.routing_replay == "R2" and self.num_minibatches == 1:
            raise MiniRLError(
                "routing_replay is 'R2' with num_minibatches=1: it must be 'disabled' or 'R3' there, since the one "
                "update of a step routes as the pass before it does"
            )
        if self.batch_invariant and self.model.experts_implementation not in (None, "minirl"):
            raise MiniRLError(
                f"model.experts_implementation is {self.model.experts_implementation!r} with batch_invariant: it must "
                "be 'minirl' or none there"
            )
        correction = self.policy_loss.correction
        if correction is not None and correction.normalise:
            raise MiniRLError(
                "policy_loss.rollout_is.normalise is true: it must be false here, since a micro-batch does not know "
                "the mean weight of its mini-batch"
            )
        if self.policy_loss.loss_agg_mode == "group-token-mean" and self.micro_batch_size % self.rollout.group_size:
            raise MiniRLError(
                f"micro_batch_size is {self.micro_batch_size} with loss_agg_mode='group-token-mean': it must be a "
                f"multiple of rollout.group_size, {self.rollout.group_size}, so that no group is split"
            )
        if (self.model.path is None) == (not self.model.config):
            raise MiniRLError(
                f"model.path is {self.model.path!r} and model.config has {len(self.model.config)} keys: exactly one "
                "of the two must be given"
            )
        if self.task.kind == "jsonl" and self.task.path is None:
            raise MiniRLError("task.path is none with task.kind='jsonl': it must be a file of prompts and answers")
        if self.task.kind == "arithmetic" and self.task.path is not None:
            raise MiniRLError(f"task.path is {self.task.path!r} with task.kind='arithmetic': the kind must be 'jsonl'")
        if self.task.kind == "jsonl" and self.model.path is None:
            raise MiniRLError("model.path is none with task.kind='jsonl': it must be a model that has a tokenizer")


MOST_THREADS = 1024  # OpenMP aborts the process if it cannot create its threads
_AT_LEAST_ONE = (
    "steps",
    "prompts_per_minibatch",
    "num_minibatches",
    "micro_batch_size",
    "rollout.max_new_tokens",
    "rollout.batch_size",
    "cold_start.check_every",
    "cold_start.batch_size",
    "eval.every",
    "eval.k",
    "eval.prompts",
)


def _numbers(config: Any, prefix: str = "") -> Iterator[str]:
    """Keys of all fields that hold a floating-point number, including fields of nested tables."""
    for key, value in ((f"{prefix}{one.name}", getattr(config, one.name)) for one in fields(config)):
        if is_dataclass(value):
            yield from _numbers(value, f"{key}.")
        elif isinstance(value, float):
            yield key


def _expand_home(config: Any, key: str) -> None:
    """Replace a leading ~ in the path `key` of a frozen dataclass by the home folder. Raises MiniRLError."""
    name = key.rpartition(".")[2]
    value = getattr(config, name)
    if value is not None:
        object.__setattr__(config, name, home(value, key))


def _require(config: TrainConfig, key: str, holds, must_be: str) -> None:
    value = config
    for name in key.split("."):
        value = getattr(value, name)
    if not holds(value):
        raise MiniRLError(f"{key} is {value}: it must be {must_be}")
