"""Each failure of vLLM ends with one message, and finished steps are kept."""

import json
import socket
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from minirl.cli import main
from minirl.config import ModelConfig, VLLMConfig
from minirl.config_file import dump_config
from minirl.train import Trainer
from tiny_run import tiny_run
from transformers import AutoModelForCausalLM

# vLLM's kernels need multiples of the vector width
SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 32}


@pytest.fixture
def config(tmp_path):
    config = tiny_run(tmp_path / "run")
    vllm = VLLMConfig(args={"kv_cache_memory_bytes": 64 << 20})
    return replace(
        config,
        steps=4,
        model=ModelConfig(config=config.model.config | SIZES | {"max_position_embeddings": 64}),
        rollout=replace(config.rollout, engine="vllm", vllm=vllm),
    )


def run(config, tmp_path, capfd):
    """Runs `minirl train`, which must end with status 2; returns its message."""
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path)])
    assert ended.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("minirl:")]
    assert len(lines) == 1
    return lines[0]


def kill_vllm():
    for process in psutil.Process().children(recursive=True):
        if "VLLM" in process.name():
            process.kill()


@pytest.mark.parametrize("moment", ["sampling", "hand-over"])
def test_a_killed_engine(config, tmp_path, capfd, monkeypatch, moment):
    """vLLM is killed in step 3 or after its update. Metrics and model must include all finished steps."""
    weights = {}
    step = Trainer.step

    def killing(self, number):
        if number == 3 and moment == "sampling":
            kill_vllm()
        metrics = step(self, number)
        weights.update({name: weight.clone() for name, weight in self.model.state_dict().items()})
        if number == 3:
            kill_vllm()
        return metrics

    monkeypatch.setattr(Trainer, "step", killing)
    message = run(config, tmp_path, capfd)
    assert "vLLM failed to " + ("sample" if moment == "sampling" else "take new weights") in message
    assert "its process has ended" in message
    assert str(tmp_path / "run" / "vllm.log") in message
    done = 2 if moment == "sampling" else 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "train"] == [0, *range(1, done + 1)]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def in_this_process(config, **args):
    vllm = VLLMConfig(separate_process=False, args=config.rollout.vllm.args | args)
    return replace(config, rollout=replace(config.rollout, vllm=vllm))


def test_too_little_memory(config, tmp_path, capfd):
    args = {"kv_cache_memory_bytes": 1000}
    config = replace(config, rollout=replace(config.rollout, vllm=VLLMConfig(args=args)))
    message = run(config, tmp_path, capfd)
    assert "vLLM failed to start: No available memory for the cache blocks" in message


def test_a_port_in_use(config, tmp_path, capfd, monkeypatch):
    """vLLM normally needs no port for one device; here it is configured to use a port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr("vllm.v1.executor.uniproc_executor.get_file_store_init_method", lambda: place)
        message = run(in_this_process(config), tmp_path, capfd)
    assert "vLLM failed to start" in message
    assert "EADDRINUSE" in message


def test_an_architecture_that_vllm_does_not_have(config, tmp_path, capfd):
    """The failed run leaves nothing that prevents the next run in the same folder."""
    codegen = {"model_type": "codegen", "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    unknown = replace(config, model=ModelConfig(config=codegen))
    assert "CodeGenForCausalLM" in run(in_this_process(unknown), tmp_path, capfd)
    message = run(in_this_process(config, kv_cache_memory_bytes=1000), tmp_path, capfd)
    assert "vLLM failed to start: No available memory for the cache blocks" in message


def test_a_misspelt_argument(config, tmp_path, capfd):
    assert "'max_model_length'" in run(in_this_process(config, max_model_length=64), tmp_path, capfd)
    message = run(in_this_process(config, dtype="float16"), tmp_path, capfd)
    assert "rollout.vllm.args has dtype: it must be left out, rollout.dtype decides it" in message


def test_a_compiled_engine():
    from minirl_kernels.integrations.vllm.client import LLMClient

    compiled = SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(enforce_eager=False)))
    with pytest.raises(ValueError, match="enforce_eager is False: on a CPU it must be True"):
        LLMClient(compiled, "cpu")


def test_fp8_on_a_cpu(config, tmp_path, capfd):
    config = replace(config, rollout=replace(config.rollout, quantization="e4m3"))
    assert "rollout.quantization is 'e4m3' with rollout.engine='vllm' on a CPU" in run(config, tmp_path, capfd)
