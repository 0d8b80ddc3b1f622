"""The counting sort gives the same stable order for one segment, as on the CPU, and for many, as on a GPU."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# The sort of a GPU: as many workers as segments, which run in any order within a phase.
SOURCE = """
#include "common/counting_sort.h"

extern "C" void counting_sort(const int64_t* keys, int64_t items, int64_t num_keys, int64_t segments, int64_t* places,
                              int64_t* begins, int64_t* order, void*) {
  const minirl::CountingSort sort = {keys, items, num_keys, segments, places, begins, order};
  for (int phase = 0; phase < minirl::kSortPhases; ++phase)
    for (int64_t worker = segments; worker-- > 0;) minirl::sort_phase(sort, phase, worker);
}
"""


@pytest.fixture(scope="module")
def counting_sort(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++ on the PATH")
    folder = tmp_path_factory.mktemp("counting_sort")
    (folder / "sort.cpp").write_text(SOURCE)
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", CSRC]
    subprocess.run([compiler, *options, "sort.cpp", "-o", "sort.so"], cwd=folder, check=True)
    function = ctypes.CDLL(folder / "sort.so").counting_sort
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 4]
    return function


@pytest.mark.parametrize("segments", range(1, 8))
@pytest.mark.parametrize(("items", "num_keys"), [(0, 1), (1, 1), (6, 8), (100, 1), (1000, 17), (5, 300)])
def test_against_sorted(items, num_keys, segments, counting_sort):
    generator = random.Random(items)
    keys = torch.tensor([generator.randrange(num_keys) for _ in range(items)], dtype=torch.int64)
    places, begins, order = (torch.full((size,), -1) for size in (segments * num_keys, num_keys + 1, items))
    addresses = [values.data_ptr() for values in (places, begins, order)]
    counting_sort(keys.data_ptr(), items, num_keys, segments, *addresses, None)
    assert begins.tolist() == [int((keys < bound).sum()) for bound in range(num_keys + 1)]
    assert order.tolist() == sorted(range(items), key=keys.tolist().__getitem__)


@pytest.mark.parametrize(("items", "num_experts"), [(0, 3), (1, 1), (300, 7), (5000, 60)])
def test_as_a_gpu_is_asked_for_it(items, num_experts, counting_sort, monkeypatch):
    """Invalid experts come last, in the order of torch's sort."""
    pytest.importorskip("triton", reason="triton is not installed")
    from minirl_kernels.ops.moe_experts import triton

    def on_the_cpu(keys, places, begins, order, stream):
        segments, num_keys = places.shape
        addresses = [values.data_ptr() for values in (places, begins, order)]
        counting_sort(keys.data_ptr(), keys.numel(), num_keys, segments, *addresses, stream)

    native = SimpleNamespace(counting_sort=on_the_cpu, most_segments=64)
    monkeypatch.setattr(triton, "native", lambda: native)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
    keys = torch.randint(-2, num_experts + 2, (items,), generator=torch.Generator().manual_seed(0))
    assert all(map(torch.equal, triton.native_sort(keys, num_experts), triton.torch_sort(keys, num_experts)))
