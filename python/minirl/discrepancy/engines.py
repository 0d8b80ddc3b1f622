"""The two engines by transformers: the trainer's rollout engine (mu), and the trainer's forward (pi)."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import minirl_kernels.integrations.transformers  # noqa: F401  for the implementations "minirl"
from minirl_kernels import RoutedExperts, batch_invariant_mode, record_routing, replay_routing
from minirl_kernels.discrepancy import Rescored, Scores
from minirl_kernels.discrepancy.engines import GeneratingEngine, TokenIds
from minirl_kernels.integrations.transformers.e4m3 import E4M3Copy
from minirl_kernels.integrations.transformers.log_probs import after_head
from minirl_kernels.moe.replay import RoutingRecord
from minirl_kernels.ops.matmul.op import float32_linear

from ..batch import next_token_targets
from ..config import RolloutConfig
from ..errors import MiniRLError
from ..models import autocast, make_batch_invariant
from ..rollout import Rollouts, TransformersEngine
from .settings import EngineSettings, InferenceSettings


def inference_engine(
    model: PreTrainedModel,
    settings: InferenceSettings,
    sampling: RolloutConfig,
    end_token_ids: list[int],
    *,
    records_routing: bool = False,
) -> GeneratingEngine:
    """The engine mu. sampling: temperature, max_new_tokens and batch_size. Raises MiniRLError for invalid settings."""
    generator = _Generator(_configured_copy(model, settings, "mu"), settings, sampling, end_token_ids, records_routing)
    if settings.decode:
        return generator
    scorer = training_engine(model, settings, sampling.temperature, "mu", records_routing=records_routing)
    return Rescored(generator, scorer)


def training_engine(
    model: PreTrainedModel, settings: EngineSettings, temperature: float, name: str, *, records_routing: bool = False
) -> TrainingEngine:
    """A training engine. name: prefix of its options, "pi" or "mu". Raises MiniRLError for invalid settings."""
    model = _configured_copy(model, settings, name)
    if settings.quantization is not None:
        try:
            model = E4M3Copy(model).model
        except ValueError as error:
            raise MiniRLError(
                f"--{name}.quantization is {settings.quantization!r}: it must be None, as {error}"
            ) from None
    return TrainingEngine(model, settings, temperature, records_routing)


class _Generator:
    """The trainer's rollout engine, which also keeps its logits."""

    def __init__(self, model, settings: EngineSettings, sampling: RolloutConfig, end_token_ids, records_routing: bool):
        self._mode = _mode(settings)
        self._engine = TransformersEngine(
            sampling,
            dtype=settings.dtype,
            pad_token_id=end_token_ids[0],
            eos_token_ids=end_token_ids,
            records_routing=records_routing,
            keeps_logits=True,
        )
        self._engine.update_weights(model)

    @property
    def model(self) -> PreTrainedModel:
        return self._engine.model

    def generate(self, prompts: TokenIds, *, seed: int) -> tuple[list[list[int]], Scores]:
        with self._mode():
            rollouts = self._engine.generate(prompts, 1, seed=seed)
        return rollouts.responses(), scores_of(rollouts)


def scores_of(rollouts: Rollouts) -> Scores:
    """The scores in the rollouts of an engine."""
    rows = zip(rollouts.rollout_log_probs, rollouts.response_mask, strict=True)
    return Scores([values[mask] for values, mask in rows], rollouts.logits, rollouts.routed_experts)


class TrainingEngine:
    """Log-probabilities as the trainer computes old_log_probs: whole sequences, padded on the right."""

    def __init__(self, model: PreTrainedModel, settings: EngineSettings, temperature: float, records_routing: bool):
        self.model, self._dtype, self._temperature = model, settings.dtype, temperature
        self._records_routing = records_routing
        self._mode = _mode(settings)

    @torch.no_grad()
    def score(
        self, prompts: TokenIds, responses: TokenIds, *, with_logits: bool, routed_experts: RoutedExperts | None = None
    ) -> Scores:
        rows = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        starts = torch.tensor([len(prompt) for prompt in prompts])
        input_ids = pad_sequence(rows, batch_first=True)
        places = torch.arange(input_ids.shape[1])
        held = places < lengths[:, None]
        token_ids, scores = next_token_targets(input_ids, held & (places >= starts[:, None]))
        head, hidden = self.model.get_output_embeddings(), []
        handle = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        try:
            with self._routing(routed_experts) as routing, self._mode(), autocast(self.model.device, self._dtype):
                log_probs = self.model(
                    input_ids.to(self.model.device),
                    attention_mask=held.to(self.model.device),
                    use_cache=False,
                    token_ids=token_ids.to(self.model.device),
                    temperature=self._temperature,
                ).log_probs.cpu()
        finally:
            handle.remove()
        each = range(len(rows))
        logits = [self._logits(head, hidden[0][row, scores[row].to(hidden[0].device)]) for row in each if with_logits]
        recorded = routing.sequences(len(rows)).to("cpu") if isinstance(routing, RoutingRecord) else None
        return Scores([log_probs[row, scores[row]] for row in each], logits if with_logits else None, recorded)

    def _routing(self, routed_experts: RoutedExperts | None):
        if routed_experts is not None:
            return replay_routing(self.model, routed_experts)
        return record_routing(self.model) if self._records_routing else nullcontext()

    def _logits(self, head: torch.nn.Linear, hidden: Tensor) -> Tensor:
        """Logits [R, V] float32 of hidden states [R, H], as linear_token_logprobs computes them."""
        if self._dtype != "float32":  # as autocast: round both factors, then sum in float32
            hidden, weight = (tensor.to(getattr(torch, self._dtype)) for tensor in (hidden, head.weight))
        else:
            weight = head.weight
        scale, softcap = after_head(self.model)
        logits = float32_linear(hidden, weight, head.bias) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return (logits / self._temperature).cpu()


def _configured_copy(model: PreTrainedModel, settings: EngineSettings, name: str) -> PreTrainedModel:
    """A copy of `model` that shares its weights and has the implementations of the settings."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    if settings.batch_invariant:
        make_batch_invariant(twin)
    for key, change in (
        ("attn_implementation", twin.set_attn_implementation),
        ("experts_implementation", twin.set_experts_implementation),
    ):
        value = getattr(settings, key)
        if value is not None:
            try:
                change(value)
            except (ValueError, ImportError) as error:
                raise MiniRLError(f"--{name}.{key.replace('_', '-')} is {value!r}: {error}") from None
    try:
        with torch.no_grad(), _mode(settings)(), autocast(twin.device, settings.dtype):
            token = torch.zeros(1, 1, dtype=torch.long, device=twin.device)
            twin(token, attention_mask=torch.ones_like(token), use_cache=False)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise MiniRLError(f"{name} cannot compute with its options: {error}") from error
    return twin


def _mode(settings: EngineSettings):
    """A function that returns the context in which the engine computes; each forward needs a new context."""
    return batch_invariant_mode if settings.batch_invariant else nullcontext
