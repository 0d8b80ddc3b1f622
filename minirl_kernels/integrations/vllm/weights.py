"""Sends weights from a trainer to vLLM through vLLM's weight-transfer interface, with digests to check the arrival.

vLLM's own backends transfer weights between GPUs. The backend "minirl_file" works on every device; it needs a folder
that both processes can access.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    materialize_full_tensor,
)
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from . import FILE_TRANSFER


class CheckpointSource(WeightSource):
    """The current weights of a transformers model, under their names in a checkpoint, as vLLM loads them.

    A tensor with two names (tied embeddings) appears under the first name only, as in a checkpoint.
    digests: {name: digest} of the weights that were read.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self.digests: dict[str, str] = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        state = self._model.state_dict()
        first_names = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
        whole = {name: materialize_full_tensor(state[name]) for name in first_names.values()}
        return noting(revert_weight_conversion(self._model, whole).items(), self.digests)


def noting(weights: Iterable[tuple[str, Tensor]], digests: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yields `weights`, and stores the SHA-256 of each tensor's bytes in `digests` under its name."""
    for name, tensor in weights:
        data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
        digests[name] = hashlib.sha256(data).hexdigest()
        yield name, tensor


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Empty: the two sides need no parameters."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """path: a safetensors file with all weights of the checkpoint."""

    path: str


class FileWeightTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """The worker's side of "minirl_file"."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        with safe_open(update_info.path, "pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            pack_experts(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


def pack_experts(model: nn.Module) -> None:
    """Convert reloaded experts to the layout of vLLM's CPU kernels. vLLM 0.32 does not do so when it reloads."""
    for module in model.modules():
        if isinstance(module, MoERunner) and module._quant_method.moe_kernel is not None:  # None for layers.Experts
            module._quant_method.moe_kernel.fused_experts.process_weights_after_loading(module.routed_experts)


@dataclass
class FileTrainerInfo(TrainerInitInfo):
    """Selects the backend "minirl_file" on the trainer's side."""

    backend: ClassVar[str] = FILE_TRANSFER


class FileTrainer(TrainerWeightTransferEngine[FileTrainerInfo]):
    """The trainer's side of "minirl_file". Each transfer writes a temporary file."""

    init_info_cls = FileTrainerInfo

    @classmethod
    def trainer_init(
        cls, init_info: FileTrainerInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> FileTrainer:
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        with tempfile.TemporaryDirectory(prefix="minirl-weights-") as folder:
            path = Path(folder) / "model.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in self.source}, path)
            self.client.start_weight_update()
            self.client.update_weights({"path": str(path)})
            self.client.finish_weight_update()
