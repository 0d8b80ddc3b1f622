"""`import minirl_kernels` needs no GPU, no Triton, no transformers and no `_C`, and does not query a device."""

import subprocess
import sys

# Torch is imported first, so that its own imports and queries do not count.
PRELUDE = """
import sys, torch
before = set(sys.modules)
def refuse(*args, **kwargs):
    raise AssertionError("a device was asked at import")
for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability"):
    setattr(torch.cuda, name, refuse)
"""


def run(code, tmp_path):
    result = subprocess.run([sys.executable, "-c", PRELUDE + code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_loads_nothing_heavy(tmp_path):
    loaded = run("import minirl_kernels.discrepancy; print(*(set(sys.modules) - before))", tmp_path).split()
    assert "minirl_kernels.backends" in loaded
    heavy = {"triton", "transformers", "trl", "vllm", "matplotlib", "minirl"}
    assert not heavy & {name.partition(".")[0] for name in loaded}
    assert "minirl_kernels._C" not in loaded


def test_imports_where_nothing_optional_exists(tmp_path):
    absent = ("triton", "transformers", "minirl_kernels._C")
    block = "\n".join(f"sys.modules[{name!r}] = None" for name in absent)
    run(f"{block}\nimport minirl_kernels\nassert not torch.cuda.is_initialized()", tmp_path)
