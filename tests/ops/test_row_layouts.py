"""Rows at any address and stride, in Triton's interpreter: values equal to those of contiguous rows, bit for bit.

A kernel with 128-bit accesses gets a copy of rows whose addresses do not allow them; hardware is not tested.
"""

import pytest
import torch
import triton_cases
from row_layouts import CALLS, check_layouts_of
from triton_cases import random_logits

from minirl_kernels.common.triton.alignment import aligned, memory_for
from minirl_kernels.common.triton.config import make_config

pytestmark = triton_cases.interpreter_only()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 61)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_layout_of_rows_changes_no_bit(name, dtype, size):
    check_layouts_of(name, *(random_logits(4, size, dtype=dtype, seed=seed) for seed in (0, 1)))


@pytest.mark.parametrize("name", ["mean", "fused_policy_loss"])
def test_rows_of_many_tiles(name):
    check_layouts_of(name, *(random_logits(2, 17_000, seed=seed) for seed in (0, 1)))


def test_rows_that_allow_wide_accesses_are_not_copied():
    buffer = torch.zeros(2, 3, 72)
    config = make_config(64, torch.float32, threads=64, per_thread=4)
    for x in (buffer[..., :64], buffer[:, 1:, 4:68], buffer[:1, :, :64], buffer[..., :61]):
        assert aligned(x, config.vec) is x
        assert memory_for(x, config.vec) is x
    for x in (buffer[..., 1:65], torch.zeros(3 * 67).view(3, 67)[:, :64]):
        assert aligned(x, config.vec).data_ptr() % 16 == 0
        assert torch.equal(aligned(x, config.vec), x)
        assert memory_for(x, config.vec).is_contiguous()
