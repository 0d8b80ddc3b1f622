"""Records the experts that vLLM's routers choose. On a CPU, vLLM 0.32 does not return them itself."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.layer import MoERunner


class RoutingCapture:
    """Records the experts of every computed token, under the KV cache slot of the token.

    A prefix that a request reads from the cache was computed for another request, in the same slots. Chunks of a long
    prompt and recomputed tokens of a preempted request also have their slots. So the experts of a request are the
    entries of its slots, without any bookkeeping of batches.
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
        """Delete all records, after a change of weights."""
        self._finished.clear()
        if self._ids is not None:
            self._ids.fill(-1)

    def take(self) -> dict[str, np.ndarray]:
        """{vLLM's request id: experts} of all requests that ended since the last call.

        Experts are [tokens, layers, K] int16: the MoE layers in order, -1 where nothing was recorded. Rows after the
        computed tokens are undefined.
        """
        finished = {request: self._experts_of(request) for request in self._runner.requests} | self._finished
        self._finished = {}
        return finished

    def _note(self, place: int, ids: Tensor) -> None:
        self._chosen[place] = ids

    def _execute(self, execute_model, scheduler_output, *args, **kwargs):
        # before this step, since it may reuse the slots of finished requests
        for request in scheduler_output.finished_req_ids:
            if request in self._runner.requests:
                self._finished[request] = self._experts_of(request)
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

    def _experts_of(self, request: str) -> np.ndarray:
        size = self._runner.input_batch.block_table[0].block_size
        blocks = np.asarray(self._runner.requests[request].block_ids[0])
        rows = self._ids[(blocks[:, None] * size + np.arange(size)).ravel()]
        rows[np.repeat(blocks == 0, size)] = -1  # block 0 is vLLM's placeholder for a freed block
        return rows
