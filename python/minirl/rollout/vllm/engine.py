"""The rollout engine by vLLM's `LLM`, in a separate process or in the trainer's process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from transformers import PreTrainedModel
from vllm import LLM, RequestOutput, SamplingParams, plugins

from minirl_kernels.discrepancy.modules import Place, PlaceName
from minirl_kernels.integrations.vllm import is_installed, register
from minirl_kernels.integrations.vllm.client import LLMClient

from ...config import RolloutConfig
from ...errors import MiniRLError
from ...seeds import derive_seed
from ..interface import Rollouts
from .arguments import engine_arguments, engine_environment
from .failures import Result, as_one_message, while_alive, written_to

PROBE = list(range(1, 9))  # token ids of a test prompt, which every vocabulary has


class VLLMEngine:
    """Samples with vLLM from a copy of the training model's weights. `update_weights` replaces the copy.

    config: sampling settings, with vLLM's settings in config.vllm.
    dtype: name of the computation's dtype. With batch_invariant it is the autocast dtype of float32 weights, as in
        training.
    eos_token_ids: ids that end a response. log: file for vLLM's output.
    records_routing: whether rollouts have routed_experts.
    replays_routing: whether training records or replays experts, and so routes by moe_routing.
    keeps_logits: whether rollouts have logits; CPU only.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        dtype: str,
        pad_token_id: int,
        eos_token_ids: list[int],
        log: Path,
        records_routing: bool = False,
        replays_routing: bool = False,
        keeps_logits: bool = False,
        batch_invariant: bool = False,
    ):
        self._config, self._dtype, self._batch_invariant = config, dtype, batch_invariant
        self._pad_token_id, self._eos_token_ids = pad_token_id, eos_token_ids
        self._records_routing, self._replays_routing = records_routing, replays_routing
        self._keeps_logits, self._log = keeps_logits, log
        self._llm: LLM | None = None
        self._client: LLMClient | None = None
        self._processes: list[BaseProcess] = []

    def update_weights(self, model: PreTrainedModel) -> None:
        if self._llm is None:
            self._start(model)
            return
        self._ask("take new weights", lambda: self._client.send_weights(model))

    def generate(self, prompts: Sequence[Sequence[int]], n: int, *, seed: int) -> Rollouts:
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(n)]
        sampling = [self._sampling(derive_seed(seed, "vllm", number)) for number in range(len(requests))]
        if self._keeps_logits:
            self._ask("note logits", self._client.note_logits)
        outputs = self._ask("sample", lambda: self._llm.generate(requests, sampling, use_tqdm=False))
        routed_experts = None
        if self._records_routing:
            routed_experts = self._ask("tell its experts", lambda: self._client.routed_experts(outputs, self._model))
        logits = None
        if self._keeps_logits:
            noted = self._ask("tell its logits", lambda: self._client.logits(outputs))
            logits = [scores / self._config.temperature for scores in noted]
        responses = [output.outputs[0] for output in outputs]
        return Rollouts.collate(
            prompts,
            [list(response.token_ids) for response in responses],
            [_log_probs(output) for output in outputs],
            [response.finish_reason for response in responses],
            pad_token_id=self._pad_token_id,
            routed_experts=routed_experts,
            logits=logits,
        )

    @contextmanager
    def recording(self, rows: int) -> Iterator[dict[PlaceName, Place]]:
        """Record the modules for the first `rows` responses of the `generate` call inside the block; CPU only.

        Yields a dict that is filled when the block ends. Names are the names of transformers' modules.
        """
        self._ask("record its modules", lambda: self._client.trace_modules(rows))
        places: dict[PlaceName, Place] = {}
        yield places
        places.update(self._ask("tell its modules", self._client.modules))

    def close(self) -> None:
        """End vLLM and its process."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _ask(self, doing: str, call: Callable[[], Result]) -> Result:
        with as_one_message(doing, self._log), torch.random.fork_rng([]):  # vLLM may use this process's generator
            return while_alive(self._processes, call)

    def _sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=self._config.temperature,
            max_tokens=self._config.max_new_tokens,
            stop_token_ids=self._eos_token_ids,
            seed=seed,
            logprobs=0,  # only of the sampled token
            detokenize=False,
        )

    def _start(self, model: PreTrainedModel) -> None:
        device = model.device.type
        arguments = engine_arguments(
            self._config,
            device,
            dtype=self._dtype,
            records_routing=self._records_routing,
            replays_routing=self._replays_routing,
            batch_invariant=self._batch_invariant,
        )
        with tempfile.TemporaryDirectory(prefix="minirl-model-") as folder, as_one_message("start", self._log):
            model.save_pretrained(folder)
            others = active_children()
            environment = engine_environment(self._config, device, batch_invariant=self._batch_invariant)
            with written_to(self._log), environment, torch.random.fork_rng([]):  # vLLM seeds torch's generator
                self._settle_mode()
                self._llm = LLM(folder, **arguments)
        self._processes = [process for process in active_children() if process not in others]
        self._model = model
        self._client = self._ask(
            "be watched", lambda: LLMClient(self._llm, device, records_routing=self._records_routing)
        )
        self._ask("take the weights that it has", lambda: self._rehearse(model))

    def _settle_mode(self) -> None:
        """Raises MiniRLError if this process has loaded vLLM with another mode; a plugin's changes are permanent."""
        shared = not self._config.vllm.separate_process
        if shared and plugins.plugins_loaded and self._batch_invariant != is_installed():
            raise MiniRLError(
                f"rollout.vllm.separate_process is False with batch_invariant={self._batch_invariant}, and this "
                "process has used vLLM with another batch_invariant: it must be True"
            )
        if self._batch_invariant:
            register()  # a separate process gets its configuration from this one

    def _rehearse(self, model: PreTrainedModel) -> None:
        """Send the same weights again. Raises MiniRLError unless vLLM then computes the same bits as before."""
        before = self._client.weight_checksums(), self._probe()
        self._client.send_weights(model)
        if (self._client.weight_checksums(), self._probe()) != before:
            raise MiniRLError(
                f"this vLLM cannot take new weights for a {type(model).__name__}: with the same weights again, it "
                "computes other values"
            )

    def _probe(self) -> list[float]:
        (output,) = self._llm.generate(
            [{"prompt_token_ids": PROBE}],
            SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]


def _log_probs(output: RequestOutput) -> list[float]:
    """Log-probabilities of the sampled tokens."""
    response = output.outputs[0]
    return [entry[token].logprob for token, entry in zip(response.token_ids, response.logprobs, strict=True)]
