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


def compiling(program):
    """What a Python process prints, in which Triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", program]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=600).stdout)


@pytest.fixture(scope="module")
def planted():
    return compiling(PLANTED)


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
