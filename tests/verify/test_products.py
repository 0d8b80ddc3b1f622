"""Float32 products are sums of short chains in what the compiler makes of them, and 16-bit products use tensor cores.

Triton would make one chain of a product and the sum that it is added to, and the interpreter cannot show it. Triton
compiles in another process, because it interprets in this one.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PRODUCTS = ("matmul", "moe_experts up", "moe_experts d gate_up_proj")
# the products of each kernel that are summed over keys or queries; the others are summed over a head, in one chain
ATTENTION = {"attention": 2, "attention backward q": 2, "attention backward k, v": 4}
COMPILED = (
    f"KERNELS = {[*PRODUCTS, *ATTENTION]}\n"
    + """
import json, re
from verify import compile_matrix
from verify.cases import compile_cases
from verify.launches import captured, on_gpu
found = {}
for case in compile_cases():
    kernel, dtype = case.name, str(case.dtype)
    if kernel not in KERNELS or (kernel, dtype) in found:
        continue
    found[kernel, dtype] = []
    for name in ("sm_90", "gfx942"):
        with on_gpu(name), captured() as launches:
            case.run()
        text = compile_matrix.compile_launch(launches[0], compile_matrix.PARTS[name].target).asm["ttgir"]
        zeros = re.findall(r"(%\\w+) = arith.constant dense<0.000000e\\+00> : tensor<\\d+x\\d+xf32", text)
        dots = re.findall(r"\\b(?:tt\\.dot|ttng\\.warp_group_dot) %[\\w#]+, %[\\w#]+, (%\\w+)", text)
        found[kernel, dtype] += [start in zeros for start in dots]
print(json.dumps([[*key, value] for key, value in found.items()]))
"""
)


@pytest.fixture(scope="module")
def starts():
    """{(kernel, dtype): for each product in the code, whether its chain starts at 0}, of two GPUs."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, check=True, timeout=600
    )
    return {(kernel, dtype): values for kernel, dtype, values in json.loads(result.stdout)}


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_a_chain_in_float32_ends_with_its_step(starts, kernel):
    assert starts[kernel, "torch.float32"]
    assert all(starts[kernel, "torch.float32"])
    assert not any(starts[kernel, "torch.bfloat16"])
    assert starts[kernel, "torch.bfloat16"]


@pytest.mark.parametrize("kernel", ATTENTION)
def test_a_chain_in_float32_ends_with_its_block_of_keys_or_queries(starts, kernel):
    of_two_gpus = starts[kernel, "torch.float32"]
    assert sum(of_two_gpus) == 2 * ATTENTION[kernel]
