"""Calls of the GPU kernels never make the host wait, so that a CUDA graph can hold them."""

from unittest import mock

import pytest
import torch
import triton_cases
from graph_cases import graph_cases
from kernel_counts import waits

pytestmark = triton_cases.interpreter_only()
# policy_loss follows the device of its tensors, and checks values on the CPU; two phases of the fused loss run its code
CASES = [name for name in graph_cases("cpu") if name != "policy_loss"]


@pytest.mark.parametrize("name", CASES)
def test_no_call_waits(name):
    case = graph_cases("cpu", "triton")[name]
    inputs = case.make(0)
    # arguments on a GPU are checked by assertions of the GPU
    with mock.patch.object(torch.Tensor, "is_cuda", True, create=True):
        assert waits(lambda: case.run(inputs)) == []
