"""Rows at any address and stride on a GPU: the bits of contiguous rows."""

import pytest
from dtypes import DTYPES
from row_bits import cancelling, check_batches
from row_layouts import CALLS, check_layouts_of

DEVICE = "cuda"
COUNTS = (1, 2, 3, 8, 63, 64, 128, 299, 300)  # of rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 999, 1000, 2048, 20_011, 40_000])
@pytest.mark.parametrize("name", CALLS)
def test_the_layout_of_rows_changes_no_bit(name, size, dtype):
    if name == "moe_routing" and size > 2048:
        pytest.skip("a row of experts is one tile")
    check_layouts_of(name, *(cancelling(128, size, dtype, seed=seed).to(DEVICE) for seed in (0, 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [128, 999, 2048])
@pytest.mark.parametrize("name", ["softmax", "mean"])
def test_the_number_of_rows_changes_no_bit(name, size, dtype):
    """Some of the batches begin at an address that allows no 128-bit access."""
    check_batches(CALLS[name], *(cancelling(300, size, dtype, seed=seed).to(DEVICE) for seed in (0, 1)), sizes=COUNTS)
