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

COMPILED = """
import json, re
from verify import compile_matrix
from verify.cases import compile_cases
from verify.launches import captured, on_gpu
found = {}
for case in compile_cases():
    kernel, dtype = case.name, str(case.dtype)
    if kernel not in ("matmul", "moe_experts up", "moe_experts d gate_up_proj") or (kernel, dtype) in found:
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


@pytest.fixture(scope="module")
def starts():
    """{(kernel, dtype): for each product in the code, whether its chain starts at 0}, of two GPUs."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, check=True, timeout=600
    )
    return {(kernel, dtype): values for kernel, dtype, values in json.loads(result.stdout)}


@pytest.mark.parametrize("kernel", ["matmul", "moe_experts up", "moe_experts d gate_up_proj"])
def test_a_chain_in_float32_ends_with_its_step(starts, kernel):
    assert starts[kernel, "torch.float32"]
    assert all(starts[kernel, "torch.float32"])
    assert not any(starts[kernel, "torch.bfloat16"])
    assert starts[kernel, "torch.bfloat16"]
