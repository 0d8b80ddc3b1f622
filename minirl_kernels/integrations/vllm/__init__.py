"""vLLM as a rollout engine: the plugin that vLLM's processes load, the trainer's client, and batch-invariant mode.

MINIRL_BATCH_INVARIANT=1 switches the mode on. On a CPU, this library's kernels then replace vLLM's for Qwen3 and
Qwen3-MoE, in the order in which transformers runs them. So vLLM and the training engine compute the same
log-probabilities, bit for bit. On a GPU, vLLM has its own batch-invariant mode.
"""

from __future__ import annotations

import os

FILE_TRANSFER = "minirl_file"  # name of the backend in weights.py for vLLM's weight transfer
_installed = False


def register() -> None:
    """The plugin function that vLLM calls in each of its processes (entry point vllm.general_plugins).

    Registers the backend "minirl_file" for weight transfer. If MINIRL_BATCH_INVARIANT is 1, it also switches the mode
    on. Raises ValueError on a GPU if VLLM_BATCH_INVARIANT is not 1 too, and on a CPU for an untested version of vLLM.
    """
    from vllm.distributed.weight_transfer import factory

    if FILE_TRANSFER not in factory.WeightTransferEngineFactory._registry:
        weights = f"{__name__}.weights"
        factory.WeightTransferEngineFactory.register_engine(FILE_TRANSFER, weights, "FileWeightTransfer")
        factory.WeightTransferTrainerFactory.register_engine(FILE_TRANSFER, weights, "FileTrainer")
    if os.environ.get("MINIRL_BATCH_INVARIANT") != "1":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from .install import install

        global _installed
        install()
        _installed = True
    elif os.environ.get("VLLM_BATCH_INVARIANT") != "1":
        raise ValueError(
            f"MINIRL_BATCH_INVARIANT is 1 and VLLM_BATCH_INVARIANT is {os.environ.get('VLLM_BATCH_INVARIANT')!r}: on "
            f"{current_platform.device_name} it must be 1 too, since vLLM has its own mode there"
        )


def is_installed() -> bool:
    """Whether this library's kernels have replaced vLLM's in this process. This cannot be undone."""
    return _installed
