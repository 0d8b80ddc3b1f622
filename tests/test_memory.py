"""Rounding in place, which returns the free part of a large buffer to the system."""

import sys

import pytest
import torch

from minirl_kernels.common.memory import rounded

LARGE = 2**20  # float32 elements from which rounding is in place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (LARGE,), (LARGE + 1,), (1237, 1129)])
def test_rounding_in_place_is_rounding(shape, dtype):
    wide = torch.randn(shape)
    expected = wide.to(dtype)
    narrow = rounded(wide, dtype)
    assert torch.equal(narrow, expected)
    assert narrow.untyped_storage().nbytes() == expected.nbytes, "saving it would save all of the wide one"


@pytest.mark.usefixtures("cpu")
@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
def test_what_rounding_leaves_free_goes_back_to_the_system():
    wide = torch.ones(4 * LARGE)
    narrow = rounded(wide, torch.bfloat16)
    freed = wide[2 * LARGE :]
    assert narrow.data_ptr() == wide.data_ptr()
    assert (freed == 0).float().mean() > 0.99, "a page that was given back reads as zeros"
    assert (narrow == 1).all()
