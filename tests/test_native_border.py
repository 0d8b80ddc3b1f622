"""The native functions refuse tensors and records that they would misread. The error names the argument."""

from types import SimpleNamespace

import pytest
import torch

from minirl_kernels import moe_routing, token_logprobs
from minirl_kernels.backends import native

pytestmark = pytest.mark.usefixtures("cpu")

OPTIONS = {
    "objective": "grpo",
    "clip": True,
    "ratio_low": 0.8,
    "ratio_high": 1.2,
    "threshold": 5.0,
    "kl_coef": 0.0,
    "kl_estimator": "k1",
    "entropy_coef": 0.0,
}


def fused_policy_loss(*absent, **changes):
    rows = torch.zeros(3)
    tokens = dict.fromkeys(("old_log_probs", "advantages", "weights"), rows)
    fields = {"behaviour_log_probs": None, "ref_log_probs": None, **tokens, **OPTIONS, **changes}
    for name in absent:
        del fields[name]
    results = SimpleNamespace(log_probs=rows, entropy=rows, token_loss=rows, token_grad=rows)
    logits, ids = torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64)
    arguments = (logits, ids, torch.ones(3), SimpleNamespace(**fields), results)
    return native().fused_policy_loss(*arguments, torch.zeros(3, 7), 0.0, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64], ids=str)
def test_rows_of_another_dtype_are_refused(dtype):
    expected = f"dtype is {dtype}: it must be torch.float32, torch.bfloat16 or torch.float16"
    with pytest.raises(ValueError, match=expected):
        native().softmax(torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3), False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_numbers_of_another_dtype_than_the_kernel_reads_are_refused(dtype):
    ids, row = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    with pytest.raises(ValueError, match=f"dtype is {dtype}: it must be torch.float32"):
        native().token_logprobs(torch.zeros(2, 3), ids, row, torch.zeros(2, dtype=dtype), None, row, row)


def test_token_ids_that_are_no_integers_are_refused():
    row = torch.zeros(2)
    with pytest.raises(ValueError, match=r"dtype is torch.float32: it must be torch.uint8, .* or torch.int64"):
        native().token_logprobs(torch.zeros(2, 3), row, row, row, None, row, row)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 2).T, "the rows of a tensor are not contiguous"),
        (torch.zeros(4, 3, 3, 5)[:2, :2, :2, :4], "the rows of a tensor lie apart by more than two strides"),
    ],
    ids=["columns", "three strides"],
)
def test_rows_that_two_strides_do_not_reach_are_refused(x, message):
    out = torch.full(x.shape, 7.0)
    with pytest.raises(ValueError, match=message):
        native().softmax(x, out, False)
    assert bool((out == 7).all())


def test_none_where_a_tensor_is_needed_is_refused():
    with pytest.raises(TypeError, match=r"softmax\(\): incompatible function arguments"):
        native().softmax(torch.zeros(2, 3), None, False)


@pytest.mark.parametrize("name", [*OPTIONS, "ref_log_probs"])
def test_a_record_without_a_field_is_refused(name):
    with pytest.raises(AttributeError, match=f"'{name}'"):
        fused_policy_loss(name)


def test_a_field_of_another_type_or_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="ratio_low is 'wide'"):
        fused_policy_loss(ratio_low="wide")
    with pytest.raises(ValueError, match="advantages is None"):
        fused_policy_loss(advantages=None)
    with pytest.raises(ValueError, match="objective is 'ppo', which the kernel does not have"):
        fused_policy_loss(objective="ppo")
    assert fused_policy_loss() == -1


def test_results_do_not_depend_on_the_default_dtype():
    """Results are float32 for any default dtype of torch."""
    logits, ids = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    calls = [
        lambda: token_logprobs(logits, ids, with_entropy=True, backend="cpu"),
        lambda: moe_routing(logits, 2, backend="cpu"),
    ]
    expected = [call() for call in calls]
    torch.set_default_dtype(torch.float64)
    try:
        found = [call() for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert [x.dtype for x in ours] == [x.dtype for x in theirs]
        assert all(map(torch.equal, ours, theirs))
