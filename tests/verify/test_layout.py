"""The check of register layouts finds sums whose order depends on strides, addresses, or the number of columns.

Triton compiles in another process, because it interprets in this one.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PLANTED = """
import json
from faulty_kernels import faulty_case
from verify import layout
names = ("sums a row by its alignment", "sums columns by their number", "sums a row of aligned memory")
print(json.dumps({name: layout.check(faulty_case(name, 256, padding=0)) for name in names}))
"""
EVERY = """
import json
import torch
from verify import cases, layout
first = {}
for case in cases.compile_cases():
    if case.dtype == torch.bfloat16:
        first.setdefault(case.name.partition(",")[0].partition(":")[0], case)
found = {name: layout.specializations(case) for name, case in first.items()}
print(json.dumps({name: [len(found[name]), layout.faults(case, found[name])] for name, case in first.items()}))
"""
OF_ROWS = (
    "softmax",
    "softmax_backward",
    "token_logprobs",
    "token_logprobs_backward",
    "fused_policy_loss",
    "rms_norm",
    "rms_norm_backward",
    "mean",
    "moe_routing",
    "moe_routing_backward",
)


def compiling(program):
    """What a Python process prints, in which Triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", program]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=600).stdout)


@pytest.fixture(scope="module")
def planted():
    return compiling(PLANTED)


@pytest.fixture(scope="module")
def every():
    return compiling(EVERY)


def test_every_kernel_sums_in_one_order(every):
    """One case of each kernel; the command compiles all."""
    assert [fault for _, faults in every.values() for fault in faults] == []


def test_a_kernel_over_rows_has_one_binary(every):
    """So the rounding of products before a sum is the same too, which layouts do not show."""
    assert {name: every[name][0] for name in OF_ROWS} == dict.fromkeys(OF_ROWS, 1)


def test_a_sum_that_follows_strides_or_addresses_is_found(planted):
    faults = planted["sums a row by its alignment"]
    assert any("(4 rows of 256, 3 between rows)" in fault for fault in faults)
    assert any("logits off by one element" in fault for fault in faults)
    assert all("sizePerThread = [4]" in fault and "sizePerThread = [1]" in fault for fault in faults)


def test_a_sum_that_follows_the_number_of_columns_is_found(planted):
    faults = planted["sums columns by their number"]
    assert all(fault.startswith("sums columns by their number, float32, 4 rows of 256: ") for fault in faults)
    assert any("(4 rows of 255)" in fault for fault in faults)


def test_a_sum_of_aligned_memory_holds(planted):
    assert planted["sums a row of aligned memory"] == []
