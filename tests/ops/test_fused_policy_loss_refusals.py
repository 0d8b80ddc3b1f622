"""Invalid arguments of fused_policy_loss: each error names the argument, and the logits stay unchanged."""

import re

import pytest
import torch

from minirl_kernels import PolicyLossConfig, fused_policy_loss

META = torch.device("meta")
LOGITS = torch.linspace(-1, 1, 2 * 3 * 7).reshape(2, 3, 7)
IDS = torch.zeros(2, 3, dtype=torch.int64)
PER_TOKEN = torch.full((2, 3), -1.0)
GOOD = {
    "logits": LOGITS,
    "token_ids": IDS,
    "old_log_probs": PER_TOKEN,
    "rollout_log_probs": PER_TOKEN,
    "advantages": torch.ones(2),
    "loss_mask": None,
}


@pytest.mark.parametrize("strides", [(0, 7), (7, 0), (14, 7), (20, 7), (7, 6), (7, 7)], ids=str)
def test_rows_that_share_memory_are_not_overwritten(strides, backend):
    logits = torch.zeros(100).as_strided((2, 3, 7), (*strides, 1)).requires_grad_()
    was = re.escape(str((*strides, 1)))
    with pytest.raises(ValueError, match=rf"^logits has shape \(2, 3, 7\) and strides {was}: .*must not overlap"):
        fused_policy_loss(**{**GOOD, "logits": logits}, overwrite_logits=True, backend=backend)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("bad", [-1, 7, 2**32 + 3])
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_id_out_of_range_leaves_the_logits_alone(preset, bad, overwrite, check, backend):
    """The last token's id is checked before the first row is overwritten."""
    ids = IDS.clone()
    ids[1, 2] = bad
    logits = LOGITS.clone().requires_grad_()
    config = PolicyLossConfig.preset(preset)
    with pytest.raises(ValueError, match=rf"^token_ids has the id {bad} at row 5: .*must be in \[0, 7\), or -100"):
        fused_policy_loss(
            **{**GOOD, "logits": logits, "token_ids": ids},
            config=config,
            overwrite_logits=overwrite,
            check=check,
            backend=backend,
        )
    assert torch.equal(logits.detach(), LOGITS)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"logits": LOGITS.double()}, TypeError, "logits", "torch.float64", "float32, bfloat16 or float16"),
        ({"logits": LOGITS[0, 0]}, ValueError, "logits", r"\(7,\)", r"\[T, D\] or \[B, L, D\]"),
        ({"logits": LOGITS.mT.contiguous().mT}, ValueError, "logits", r"\(21, 1, 3\)", "contiguous"),
        ({"token_ids": IDS.float()}, TypeError, "token_ids", "torch.float32", "int32 or int64"),
        ({"token_ids": IDS[:, :2]}, ValueError, "token_ids", r"\(2, 2\)", r"\(2, 3\)"),
        ({"token_ids": IDS.to(META)}, ValueError, "token_ids", "meta", "cpu"),
        ({"temperature": 0.0}, ValueError, "temperature", "0.0", "above 0"),
        ({"temperature": -1}, ValueError, "temperature", "-1", "above 0"),
        ({"temperature": True}, TypeError, "temperature", "True", "a number or a tensor"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature", r"\(2,\)", r"\(2, 3\)"),
        ({"temperature": torch.zeros(2, 3), "check": True}, ValueError, "temperature", "0.0", "above 0"),
        ({"old_log_probs": PER_TOKEN[:1]}, ValueError, "old_log_probs", r"\(1, 3\)", r"\(2, 3\)"),
        ({"rollout_log_probs": None}, ValueError, "rollout_log_probs", "None", "inference engine"),
        ({"rollout_log_probs": PER_TOKEN.to(META)}, ValueError, "rollout_log_probs", "meta", "cpu"),
        ({"advantages": torch.ones(3)}, ValueError, "advantages", r"\(3,\)", r"\[2\].* or \(2, 3\)"),
        ({"loss_mask": torch.ones(3, 2)}, ValueError, "loss_mask", r"\(3, 2\)", r"\(2, 3\)"),
        ({"config": PolicyLossConfig(kl_coef=0.1)}, ValueError, "ref_log_probs", "None", "the reference policy's"),
        ({"config": PolicyLossConfig.cispo()}, ValueError, "group_ids", "None", r"\[B\]"),
        ({"config": PolicyLossConfig.minirl}, TypeError, "config", "method", "PolicyLossConfig"),
        ({"num_responses": -2}, ValueError, "num_responses", "-2", "above 0"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens", r"\(2, 3\)", r"\[T\]"),
        ({"logits": LOGITS[0], "token_ids": IDS[0]}, ValueError, "cu_seqlens", "None", r"\[B \+ 1\]"),
        ({"backend": "gpu"}, ValueError, "backend", "'gpu'", "auto, reference, cpu, triton"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, backend):
    """Each error names the argument, its value and the permitted values. The logits stay unchanged."""
    logits = bad.get("logits", LOGITS).clone(memory_format=torch.preserve_format)
    if logits.is_floating_point():
        logits.requires_grad_()
    arguments = {**GOOD, "backend": backend, "overwrite_logits": True, **bad, "logits": logits}
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        fused_policy_loss(**arguments)
    assert torch.equal(logits.detach(), bad.get("logits", LOGITS))


def test_a_backend_that_cannot_run_is_never_replaced(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="fused_policy_loss: backend 'triton' is unavailable: "):
        fused_policy_loss(**GOOD, backend="triton")
    on_meta = {name: value.to(META) if isinstance(value, torch.Tensor) else value for name, value in GOOD.items()}
    with pytest.raises(RuntimeError, match="'cpu' is unavailable: it runs on CPU tensors, these are on meta"):
        fused_policy_loss(**on_meta, backend="cpu")
