"""vLLM finds the plugin, the variables switch it on, and unsupported settings are refused."""

from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from minirl.discrepancy.engines import training_engine
from minirl.discrepancy.settings import EngineSettings
from transformers import AutoModelForCausalLM

from minirl_kernels.integrations.transformers import enable_log_probs
from minirl_kernels.integrations.vllm import register

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12], [13]]
AUTOCAST = {"additional_config": {"minirl_autocast": "bfloat16"}}
REFUSED = [
    ({"enforce_eager": False}, "the compilation mode (enforce_eager=True) is"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2: it must be 1"),
    ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2: it must be 1"),
    ({"dtype": "float16"}, "dtype is torch.float16: it must be torch.float32 or torch.bfloat16"),
    ({"dtype": "bfloat16", **AUTOCAST}, "dtype is torch.bfloat16: it must be torch.float32"),
    (
        {"additional_config": {"minirl_autocast": "float16"}},
        "additional_config['minirl_autocast'] is 'float16': it must be None or 'bfloat16'",
    ),
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8': it must be 'auto'"),
    ({"enable_lora": True}, "enable_lora is True: it must be False"),
    ({"quantization": "fp8", "dtype": "bfloat16"}, "quantization is 'fp8': it must be None"),
    ({"worker_cls": "their.Worker"}, "worker_cls is 'their.Worker': it must be"),
    ({"hf_overrides": {"head_dtype": "bfloat16"}}, "head_dtype is torch.bfloat16: it must be torch.float32"),
    ({"hf_overrides": {"attention_bias": True}}, "attention_bias is True: it must be False"),
    (
        {"hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        "rope_type is 'linear': it must be 'default'",
    ),
    (
        {"hf_overrides": {"architectures": ["Qwen2ForCausalLM"]}},
        "the architecture is 'Qwen2ForCausalLM': it must be 'Qwen3ForCausalLM' or 'Qwen3MoeForCausalLM'",
    ),
]


@pytest.fixture
def configure(checkpoint, call_elsewhere):
    """The result of vllm_answers for each change of the settings."""

    def ask(changes, **variables):
        from vllm_answers import configured

        return call_elsewhere(configured, checkpoint("Qwen3"), changes, **variables, VLLM_ENABLE_V1_MULTIPROCESSING="0")

    return ask


@pytest.fixture
def platform(monkeypatch):
    """Makes vLLM act as if there were a GPU."""
    import vllm.platforms

    gpu = SimpleNamespace(is_cpu=lambda: False, device_name="cuda")
    monkeypatch.setattr(vllm.platforms, "current_platform", gpu, raising=False)
    monkeypatch.setenv("MINIRL_BATCH_INVARIANT", "1")


def test_vllm_finds_it():
    found = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "minirl"]
    assert {entry.load() for entry in found} == {register}


def test_without_the_variable_nothing_is_refused_or_replaced(configure):
    assert configure([{}, {"enable_lora": True}]) == ["vllm.v1.worker.cpu_worker.CPUWorker auto"] * 2


@pytest.mark.usefixtures("cpu")
def test_processes_of_vllms_own(checkpoint, call_elsewhere):
    """By default vLLM runs in separate processes; each of them must find the plugin."""
    from vllm_answers import answers

    path = checkpoint("Qwen3-MoE")
    sampling = [{"max_tokens": 12, "logprobs": 0, "seed": 1}] * len(PROMPTS)
    rounds = {"sampled": {"prompts": PROMPTS, "sampling": sampling}}
    engine = {"model": path, "dtype": "float32", "max_model_len": 64}
    found = call_elsewhere(answers, engine, rounds, MINIRL_BATCH_INVARIANT="1")["sampled"]
    model = enable_log_probs(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    engine = training_engine(model, EngineSettings(batch_invariant=True), 1.0, "pi")
    scores = engine.score(PROMPTS, [answer["token_ids"] for answer in found], with_logits=False)
    assert torch.equal(torch.tensor([answer["log_probs"] for answer in found]), torch.stack(scores.log_probs))


def test_what_it_refuses(configure):
    found = configure([changes for changes, _ in REFUSED], MINIRL_BATCH_INVARIANT="1")
    for (changes, message), answer in zip(REFUSED, found, strict=True):
        assert f"MINIRL_BATCH_INVARIANT is 1, and on a CPU {message}" in answer, changes


def test_what_it_takes(configure):
    worker = "minirl_kernels.integrations.vllm.worker.BatchInvariantWorker"
    found = configure([{}, {"dtype": "bfloat16"}, AUTOCAST], MINIRL_BATCH_INVARIANT="1")
    assert found == [f"{worker} auto", f"{worker} auto", f"{worker} bfloat16"]


def test_vllms_own_mode_is_none_for_a_cpu(configure):
    (answer,) = configure([{}], MINIRL_BATCH_INVARIANT="1", VLLM_BATCH_INVARIANT="1")
    assert "VLLM_BATCH_INVARIANT is True: it must be False" in answer


@pytest.mark.usefixtures("platform")
def test_on_a_gpu_the_mode_is_vllms_own(monkeypatch):
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT is None: on cuda it must be 1 too"):
        register()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    register()


def test_another_vllm_is_refused(monkeypatch):
    import vllm

    from minirl_kernels.integrations.vllm.install import install

    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    with pytest.raises(ValueError, match=r"with vLLM 0\.31\.2: on a CPU it must be 0\.32\.\*"):
        install()
