import json
import subprocess
import sys

import pytest
import torch

from minirl_kernels import backends, env


def run_env(tmp_path, *arguments):
    command = [sys.executable, "-m", "minirl_kernels.env", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


def test_json(tmp_path):
    found = json.loads(run_env(tmp_path, "--json"))
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["python"].startswith("3.")
    assert found["processor"]["name"]
    assert found["processor"]["cores"] >= 1
    assert found["backends"]["reference"] == {"available": True, "reason": None}
    assert found["native"]["picked"] in found["native"]["built"]


def test_text(tmp_path):
    text = run_env(tmp_path)
    for line_start in ("python ", "torch ", "minirl-kernels ", "processor ", "instruction sets ", "backend triton "):
        assert f"\n{line_start}" in f"\n{text}"
    assert "picked: " in text
    assert "\ntorch with triton " in text


def test_every_missing_backend_has_its_reason():
    text = env.render(env.environment())
    for name in backends.BACKENDS:
        reason = backends.unavailable_reason(name)
        assert (f"missing: {reason}" if reason else "available") in text


def test_without_native_module_or_optional_packages(monkeypatch):
    reason = "the native module minirl_kernels._C does not load: broken"
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "_native_reason", reason)
    monkeypatch.setattr(env, "DISTRIBUTIONS", ("torch", "no-such-distribution"))
    found = env.environment()
    assert found["versions"]["no-such-distribution"] is None
    text = env.render(found)
    assert "not installed" in text
    assert f"missing: {reason}" in text
    assert "picked" not in text


def test_unknown_argument(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_env(tmp_path, "--yaml")
    assert error.value.returncode == 2
