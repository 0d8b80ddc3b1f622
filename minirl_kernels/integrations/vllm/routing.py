"""The experts that vLLM's routers choose, where vLLM does not return them itself (on a CPU, in 0.32)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.layer import MoERunner


class RoutingCapture:
    """Notes the experts of every token that a model runner computes, by the slot of the KV cache that the token fills.

    What a request has read from the prefix cache was computed for another one, in the same slots; what a preempted
    request computes again, and each chunk of a long prompt, has slots of its own. So a request's experts are those of
    its slots, and need no book-keeping of batches.
    """

    def __init__(self, runner):
        self._runner = runner
        self._layers = sorted(
            (module for module in runner.model.modules() if isinstance(module, MoERunner)),
            key=lambda module: module.layer_id,
        )
        self._chosen: list[Tensor | None] = [None] * len(self._layers)
        self._finished: dict[str, np.ndarray] = {}
        self._ids: np.ndarray | None = None  # [slots, layers, K] int16, -1 where nothing was computed
        for place, module in enumerate(self._layers):
            module.router.set_capture_fn(partial(self._note, place))
        runner.execute_model = partial(self._execute, runner.execute_model)

    def forget(self) -> None:
        """Of other weights: nothing that is in the cache counts any more."""
        self._finished.clear()
        if self._ids is not None:
            self._ids.fill(-1)

    def take(self) -> dict[str, np.ndarray]:
        """The experts of all requests that ended since the last call, by vLLM's request id.

        [tokens, layers, K] int16 each: the MoE layers in order, -1 where nothing was recorded. There may be rows beyond
        the tokens that were computed, whose content means nothing.
        """
        finished = {request: self._of(request) for request in self._runner.requests} | self._finished
        self._finished = {}
        return finished

    def _note(self, place: int, ids: Tensor) -> None:
        self._chosen[place] = ids

    def _execute(self, execute_model, scheduler_output, *args, **kwargs):
        # their slots are free from now on, and still hold what was computed in them
        for request in scheduler_output.finished_req_ids:
            if request in self._runner.requests:
                self._finished[request] = self._of(request)
        output = execute_model(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            self._store(scheduler_output.total_num_scheduled_tokens)
        return output

    def _store(self, tokens: int) -> None:
        ids = torch.stack([chosen[:tokens] for chosen in self._chosen], 1).cpu().numpy()
        table = self._runner.input_batch.block_table[0]
        if self._ids is None:
            slots = self._runner.kv_cache_config.num_blocks * table.block_size
            self._ids = np.full((slots, *ids.shape[1:]), -1, np.int16)
        self._ids[table.slot_mapping.gpu[:tokens].cpu().numpy()] = ids

    def _of(self, request: str) -> np.ndarray:
        size = self._runner.input_batch.block_table[0].block_size
        blocks = np.asarray(self._runner.requests[request].block_ids[0])
        rows = self._ids[(blocks[:, None] * size + np.arange(size)).ravel()]
        rows[np.repeat(blocks == 0, size)] = -1  # vLLM's stand-in for a block that was given up
        return rows
