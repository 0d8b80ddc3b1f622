"""The Triton kernel of matmul, linear and bmm on a GPU: the interpreter's checks, and checks that need hardware."""

from itertools import product

import pytest
import row_bits
import torch
from dtypes import DTYPES
from matmul_cases import (
    TURNS,
    cancelling,
    check_a_row_in_any_batch_and_place,
    check_bmm,
    check_linear,
    check_matmul,
    matrix,
)
from unprepared import unprepared

from minirl_kernels import matmul
from minirl_kernels.ops.matmul import aten

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 70, 33), (130, 3, 530), (300, 264, 1024), (65, 8200, 72)], ids=str)
def test_matmul(sizes, dtype):
    check_matmul(sizes, dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bmm(dtype):
    check_bmm((3, 170, 33, 200), dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype):
    check_linear((2, 90), (136, 512), dtype, "triton", DEVICE)


@pytest.mark.parametrize("columns", [70, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_in_any_batch_and_place(dtype, columns):
    counts = [*range(1, 258, 16), 255, 256]
    check_a_row_in_any_batch_and_place((300, columns, 1000), dtype, "triton", counts, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype):
    from minirl_kernels.ops.matmul import triton as kernels

    ends = [0, 3, 3, 300, 301, 500]
    offs = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    a, b = matrix(510, 144, dtype=dtype, device=DEVICE), matrix(6, 144, 50, dtype=dtype, seed=1, device=DEVICE)
    by_rows = aten.grouped_product(kernels, a, b, offs)
    by_terms = aten.grouped_product(kernels, a.T, a, offs)
    for group, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        assert torch.equal(by_rows[begin:end], matmul(a[begin:end], b[group], backend="triton"))
        assert torch.equal(by_terms[group], matmul(a[begin:end].T, a[begin:end], backend="triton"))
    assert not by_rows[500:].any()


@pytest.mark.parametrize("depth", [72, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_tiles_give_the_same_bits(dtype, depth, monkeypatch):
    """On the GPUs whose tile is chosen by the number of rows, sums that cancel show any other order, in float32.

    If this fails on a GPU, it must leave SAME_BITS_IN_ALL_TILES.
    """
    from minirl_kernels.common.triton import architecture
    from minirl_kernels.ops.matmul import triton as kernels

    gpu = architecture.of(torch.device(DEVICE, torch.cuda.current_device()))
    if gpu not in kernels.SAME_BITS_IN_ALL_TILES:
        pytest.skip(f"all launches on {gpu} have one tile for a dtype and a number of columns")
    choose = kernels.tile_config
    base = [kernels.tile_config(kernels.Products("", dtype, 1, 1, n, False, True)) for n in (8, kernels.WIDE)]
    spread = [row_bits.cancelling(rows, depth, dtype, seed).to(DEVICE) for seed, rows in enumerate((300, 264))]
    for x, weight in (cancelling(300, 264, depth, dtype, device=DEVICE), spread):
        results = []
        for tile, (x_turned, weight_turned) in product((*base, *kernels.MEASURED_TILES), TURNS):
            if tile == kernels.TILE_OF_16_ROWS and x_turned:
                continue  # never launched: it would spill
            monkeypatch.setattr(kernels, "tile_config", lambda products, tile=tile: tile)
            a = x.T.contiguous().T if x_turned else x
            b = weight.T if weight_turned else weight.T.contiguous()
            out = torch.empty(300, 264, device=DEVICE)
            with unprepared():  # else the tile of the first launch
                results.append(kernels.matmul_into(out, a, b))
        monkeypatch.setattr(kernels, "tile_config", choose)
        assert results[0].any()
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_beside_any_number_of_rows(dtype):
    """The numbers around which the launcher chooses another tile, with rows of 128-bit accesses and without."""
    x, weight = cancelling(8200, 1032, 1000, dtype, device=DEVICE)
    together = matmul(x, weight.T, backend="triton")
    for count in (1, 16, 17, 32, 33, 128, 129, 1000, 1536, 1537, 4096):
        assert torch.equal(matmul(x[-count:], weight.T, backend="triton"), together[-count:]), count
    odd = row_bits.strided(x[:300].cpu(), 1).to(DEVICE)
    assert torch.equal(matmul(odd, weight.T, backend="triton"), together[:300])


@pytest.mark.parametrize("depth", [1024, 8192, 8200])
def test_long_sums_in_float32_are_as_exact_as_the_vendors(depth):
    a, b = matrix(256, depth, device=DEVICE), matrix(depth, 256, seed=1, device=DEVICE)
    exact = a.double() @ b.double()
    ours, eager = ((result - exact).abs().max() for result in (matmul(a, b, backend="triton"), a @ b))
    assert ours <= 1.5 * eager


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stock_operation_depends_on_the_batch(dtype):
    """The data show that the vendor's operation has other bits in another batch.

    Where it has not, the test is skipped.
    """
    x, weight = cancelling(4096, 512, 2048, dtype, device=DEVICE)
    together = x @ weight.T
    if all(torch.equal(x[:count] @ weight.T, together[:count]) for count in (1, 2, 16, 17, 64, 255, 1024)):
        pytest.skip(f"torch {torch.__version__} gives the same bits in {dtype} for any of these batches on this GPU")
