"""LLMClient: sends weights from a trainer to a vLLM engine, and reads experts, logits and module outputs from it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from vllm import LLM, RequestOutput
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from ...discrepancy.forwards import STRIDE
from ...discrepancy.modules import Place, PlaceName
from ...moe import RoutedExperts, moe_layer_indices
from ...moe.routers import routers
from . import FILE_TRANSFER
from .weights import CheckpointSource, FileTrainerInfo


def llm_arguments(device: str, *, records_routing: bool = False) -> dict[str, Any]:
    """Keyword arguments of `LLM` that an `LLMClient` needs. device: "cpu" or "cuda", for both vLLM and the trainer."""
    arguments = {
        "worker_extension_cls": "minirl_kernels.integrations.vllm.extension.WorkerExtension",
        "weight_transfer_config": {"backend": "ipc" if device == "cuda" else FILE_TRANSFER},
        # no sampling defaults from the model's folder
        "generation_config": "vllm",
    }
    if device == "cpu":
        arguments["enforce_eager"] = True  # compiled code does not run hooks
    elif records_routing:
        arguments["enable_return_routed_experts"] = True
    return arguments


class LLMClient:
    """The trainer's interface to an `LLM` made with `llm_arguments`, in this process or in a separate one."""

    def __init__(self, llm: LLM, device: str, *, records_routing: bool = False):
        """Raises ValueError for a compiled engine on a CPU, since its modules cannot be watched."""
        if device == "cpu" and not llm.llm_engine.model_config.enforce_eager:
            raise ValueError("enforce_eager is False: on a CPU it must be True, since compiled code does not run hooks")
        self._llm, self._device, self._records_routing = llm, device, records_routing
        llm.collective_rpc("watch_weights")
        if device == "cpu":
            llm.collective_rpc("mend_seeds")
            if records_routing:
                llm.collective_rpc("capture_routing")

    def send_weights(self, model: PreTrainedModel) -> None:
        """Send the current weights of `model` to vLLM.

        Raises ValueError if vLLM's loader did not receive exactly these weights; the message names the first that
        differs. The engine must not be used after this error.
        """
        source = CheckpointSource(model)
        info = (IPCTrainerInitInfo if self._device == "cuda" else FileTrainerInfo)(rank=0)
        WeightTransferTrainerFactory.trainer_init(info, client=_Transfer(self._llm), source=source).send_weights()
        sent = source.digests
        for received in self._llm.collective_rpc("received_weights"):
            wrong = [name for name in sent | received if sent.get(name) != received.get(name)]
            if wrong:
                raise ValueError(
                    f"{len(wrong)} of {len(sent)} weights did not reach vLLM as they were sent: the first is {wrong[0]}"
                )
        self._llm.reset_prefix_cache()
        if self._records_routing and self._device == "cpu":
            self._llm.collective_rpc("forget_routing")

    def weight_checksums(self) -> list[dict[str, str]]:
        """vLLM's digests of the loaded weights, one dict per worker."""
        return self._llm.collective_rpc("compute_weight_checksums")

    def routed_experts(self, outputs: Sequence[RequestOutput], model: PreTrainedModel) -> list[RoutedExperts]:
        """The experts of finished requests with one response each: [tokens of prompt and response, layers, K].

        model: the training model. The last token was sampled but never computed, so its experts are missing.
        """
        num_experts = routers(model)[0].num_experts
        layers = moe_layer_indices(model)
        captured = self._captured() if self._device == "cpu" else None
        found = []
        for output in outputs:
            tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
            if captured is None:
                rows = output.outputs[0].routed_experts
                found.append(RoutedExperts.from_vllm(rows, num_experts=num_experts, num_tokens=tokens, layers=layers))
            else:
                rows = captured[output.request_id][: tokens - 1]
                found.append(RoutedExperts.from_ids(rows, num_experts=num_experts, num_tokens=tokens))
        return found

    def note_logits(self) -> None:
        """Start recording the logits of later requests, until `logits` is called. CPU only."""
        self._llm.collective_rpc("note_logits")

    def logits(self, outputs: Sequence[RequestOutput]) -> list[Tensor]:
        """The recorded logits of each output, [R, V] float32, not divided by the temperature. Ends the recording.

        outputs: all requests since `note_logits`, in the order of their creation.
        """
        keys, logits = self._fetched("save_logits")
        row_of = {key: row for row, key in enumerate(keys.tolist())}
        found = []
        for number, output in enumerate(outputs):
            first = number * STRIDE + len(output.prompt_token_ids) - 1
            found.append(logits[[row_of[first + place] for place in range(len(output.outputs[0].token_ids))]])
        return found

    def trace_modules(self, rows: int) -> None:
        """Start recording module values of the next `rows` requests, until `modules` is called. CPU only."""
        self._llm.collective_rpc("trace_modules", args=(rows,))

    def modules(self) -> dict[PlaceName, Place]:
        """The recorded inputs and outputs, under the names of transformers' modules. Ends the recording."""
        return {name: Place(*parts) for name, parts in self._fetched("save_modules").items()}

    def _fetched(self, method: str) -> Any:
        """A record that a worker writes to a file, since it is too large for an RPC result."""
        with tempfile.TemporaryDirectory(prefix="minirl-record-") as folder:
            path = str(Path(folder) / "record.pt")
            self._llm.collective_rpc(method, args=(path,))
            return torch.load(path)

    def _captured(self) -> dict[str, np.ndarray]:
        """{request id: experts}. vLLM's internal ids have a random suffix, which is removed."""
        return {
            request.rpartition("-")[0]: np.frombuffer(data, np.int16).reshape(shape)
            for request, (shape, data) in self._llm.collective_rpc("take_routing")[0].items()
        }


class _Transfer:
    """vLLM's VLLMWeightSyncClient for an LLM object, whose methods take their arguments inside a dict."""

    def __init__(self, llm: LLM):
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)
