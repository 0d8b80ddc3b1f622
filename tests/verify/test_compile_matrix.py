"""The committed compile matrix is correct, and its checks find the faults of a kernel.

Triton compiles in other processes, because it interprets in this one.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton

from verify import cases, compile_matrix
from verify.compile_matrix import Needs

COMMAND = str(Path(__file__).resolve().parent)
TABLE = Path(COMMAND, "compile_matrix.md")
COMPILED = """
import json
import sys
import torch
from verify import cases, compile_matrix
part = sys.argv[1]
first = {}
for case in cases.compile_cases():
    if case.dtype == torch.bfloat16:
        first.setdefault(case.name.partition(",")[0].partition(":")[0], case)
found = []
for case in first.values():
    needs = compile_matrix.needs(case, compile_matrix.PARTS[part])
    found.append([compile_matrix.head_of_row(case), str(needs), compile_matrix.faults(case, part, needs)])
print(json.dumps(found))
"""
FAULTY = """
import json
import torch
from faulty_kernels import faulty_case
from verify import compile_matrix
found = {}
for name, vocab_size in (("gluttonous", 12_288), ("narrow", 1024)):
    case = faulty_case(name, vocab_size)
    found[name] = compile_matrix.faults(case, "sm_90", compile_matrix.needs(case, compile_matrix.PARTS["sm_90"]))
print(json.dumps(found))
"""
REDUCING = """
import json
from verify import cases, compile_matrix
from verify.launches import captured
found = {}
for case in cases.compile_cases():
    if case.name in ("mean", "mean of columns", "rms_norm d weight") and len(found.setdefault(case.name, [])) < 6:
        with captured() as launches:
            case.run()
        code = compile_matrix.compile_launch(launches[0], compile_matrix.PARTS["sm_90"].target).asm["ttgir"]
        found[case.name].append(code.count('"tt.reduce"'))
print(json.dumps(found))
"""


def compiling(program, *arguments, **options):
    """The finished Python process, in which Triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, **options)


def test_the_table_is_fresh():
    """If a kernel or its launch changed, run: python tests/verify compile"""
    assert f"Sources: `{compile_matrix.fingerprint()}`" in TABLE.read_text()


def test_the_table_lists_every_configuration():
    rows = [line.split(" | ")[:3] for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    expected = [[f"| {case.name}", str(case.dtype).removeprefix("torch."), case.size] for case in cases.compile_cases()]
    assert rows == expected


@pytest.mark.parametrize("part", compile_matrix.PARTS)
def test_the_table_is_what_the_compiler_says(part):
    """One configuration of every kernel is compiled again; the command compiles everything.

    Continuous integration runs this with other releases of triton too. Their table may differ.
    """
    found = json.loads(compiling(["-c", COMPILED, part], check=True).stdout)
    assert found
    committed = TABLE.read_text()
    column = list(compile_matrix.PARTS).index(part)
    is_pinned = f"by triton {triton.__version__}, " in committed
    for head, needs, faults in found:
        assert faults == []
        if is_pinned:
            (row,) = [line for line in committed.splitlines() if line.startswith("| " + " | ".join(head) + " |")]
            assert row.strip("| ").split(" | ")[len(head) + column] == needs


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs(64, 8, 0, 128, 128), "spills 8 bytes"),
        (Needs(65, 0, 0, 128, 128), "1024 threads of 65 registers do not fit"),
        (Needs(64, 0, 240_000, 128, 128), "240000 bytes of shared memory do not fit"),
        (Needs(64, 0, 0, 64, 128), "loads at most 64 bits"),
        (Needs(64, 0, 0, 128, 32), "stores at most 32 bits"),
    ],
)
def test_what_a_part_cannot_give_is_found(needs, reason):
    (case,) = [case for case in cases.compile_cases() if (case.name, case.size) == ("fused_policy_loss", "32,768")]
    assert compile_matrix.faults(case, "sm_90", Needs(64, 0, 128, 128, 128)) == []
    (fault,) = compile_matrix.faults(case, "sm_90", needs)
    assert reason in fault


def test_a_product_without_tensor_cores_is_found():
    of_dtype = {case.dtype: case for case in cases.compile_cases() if case.name == "moe_experts down"}
    needs = Needs(64, 0, 128, 128, 128)
    assert compile_matrix.faults(of_dtype[torch.float32], "sm_90", needs) == []
    assert compile_matrix.faults(of_dtype[torch.bfloat16], "sm_90", replace(needs, tensor_cores="HGMMA")) == []
    (fault,) = compile_matrix.faults(of_dtype[torch.bfloat16], "sm_90", needs)
    assert fault.endswith("sm_90: multiplies without tensor cores")


def test_faults_are_found_in_what_is_compiled():
    found = json.loads(compiling(["-c", FAULTY], check=True).stdout)
    assert "spills" in found["gluttonous"][0]
    assert [fault.partition("sm_90: ")[2] for fault in found["narrow"]] == [
        "loads at most 32 bits at once",
        "stores at most 32 bits at once",
    ]


def test_sums_of_columns_exchange_no_values_between_threads():
    """A sum over rows of a matrix has an order of its own; a sum along a row has the order of the threads."""
    found = json.loads(compiling(["-c", REDUCING], check=True).stdout)
    assert found["mean of columns"] == found["rms_norm d weight"] == [0] * 6
    assert all(found["mean"])


def test_command_without_a_check_explains_itself():
    result = compiling([COMMAND], check=True)
    assert all(
        check in result.stdout for check in ("traffic", "ownership", "order", "bounds", "races", "compile", "all")
    )


def test_command_names_a_folder_that_does_not_exist(tmp_path):
    result = compiling([COMMAND], "compile", "--output", str(tmp_path / "none" / "table.md"))
    assert result.returncode == 1
    assert "its folder must exist" in result.stderr


def test_command_runs_a_check():
    result = compiling([COMMAND], "bounds", check=True)
    assert len(result.stdout.splitlines()) == len(list(cases.interpreter_cases()))
