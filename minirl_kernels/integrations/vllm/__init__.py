"""vLLM as a rollout engine: what its processes load, what a trainer asks of it, and its parts in our mode.

MINIRL_BATCH_INVARIANT=1 switches the mode on. On a CPU our operators then take the place of vLLM's own under Qwen3 and
Qwen3-MoE, in the order in which transformers runs them, so that vLLM's log-probabilities are those of training to the
last bit. On a GPU vLLM has a mode of its own.
"""

from __future__ import annotations

import os

FILE_TRANSFER = "minirl_file"  # our backend of vLLM's weight transfer
_installed = False


def register() -> None:
    """What vLLM calls in each of its processes (entry point vllm.general_plugins).

    It makes our backend for weights known to vLLM; nothing else changes without the variable. Raises ValueError on a
    GPU where VLLM_BATCH_INVARIANT is not 1 too, and for another vLLM than was looked at.
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
            f"{current_platform.device_name} it must be 1 too, the mode is vLLM's own there"
        )


def is_installed() -> bool:
    """Whether our operators have taken the place of vLLM's in this process, for good."""
    return _installed
