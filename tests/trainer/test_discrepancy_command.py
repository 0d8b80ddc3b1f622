"""`minirl discrepancy` as a command, and its agreement with the trainer's metrics."""

import contextlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from command import fails
from minirl.cli import main
from minirl.config import ModelConfig, TaskConfig, VLLMConfig
from minirl.discrepancy import engines
from minirl.discrepancy.engines import training_engine
from minirl.discrepancy.settings import EngineSettings, InferenceSettings, default_options
from transformers import AutoModelForCausalLM

from minirl_kernels.discrepancy import compare_engines, sampled_token_metrics

E4M3 = ["--mu.dtype", "bfloat16", "--mu.quantization", "e4m3", "--pi.dtype", "bfloat16"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns (its JSON report, its output)."""
    monkeypatch.chdir(tmp_path)

    def call(target, *options, status=0):
        arguments = ["discrepancy", str(target), "--responses", "12", *map(str, options)]
        if status:
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == status
        else:
            main(arguments)
        # long file names may be wrapped over lines
        return json.loads((tmp_path / "discrepancy.json").read_text()), capsys.readouterr().out

    return call


def keys_of(value) -> object:
    """The tree of an object's keys, with the first item of each list."""
    if isinstance(value, dict):
        return {key: keys_of(item) for key, item in value.items()}
    return [keys_of(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


ENGINE = dict.fromkeys(("dtype", "attn_implementation", "experts_implementation", "quantization", "batch_invariant"))
SIZES = dict.fromkeys(("differing_fraction", "relative_difference", "max_abs_difference"))
SCHEMA = {
    **dict.fromkeys(("format", "target", "prompts", "updated_model", "responses", "max_new_tokens", "temperature")),
    **dict.fromkeys(("seed", "batch_size", "trace_sequences", "device", "output", "fail_above", "fail_metric")),
    "mu": {**ENGINE, "decode": None, "engine": None, "vllm": {"separate_process": None, "args": {}}},
    "pi": {**ENGINE, "routing_replay": None},
    "num_tokens": None,
    "num_responses": None,
    "discrepancy": {
        **dict.fromkeys(("kl_k1", "kl_k3", "kl_full_mean", "kl_full_max", "abs_log_d_max", "bit_equal_fraction")),
        "abs_log_d_quantiles": dict.fromkeys(("0.5", "0.9", "0.99", "0.999")),
    },
    "staleness": None,
    "importance_weight": dict.fromkeys(
        (
            "num_overflow_tokens",
            "clip_fraction_high",
            "clip_fraction_low",
            "truncation_fraction",
            "is_weight_mean",
            "is_weight_max",
            "ess",
            "first_order_error_mean",
            "first_order_error_max",
        )
    ),
    "routing": [dict.fromkeys(("router", "equal_fraction", "overlap"))],
    "routing_missing": None,
    "modules": {
        "sequences": None,
        "tokens": None,
        "first_difference": {
            **dict.fromkeys(("module", "class", "layer", "before", "operation_missing")),
            **SIZES,
            "operation": dict.fromkeys(("name", "relative_difference", "ran_mu", "ran_pi")),
        },
        "jump": {**dict.fromkeys(("module", "class", "layer", "before", "factor")), **SIZES},
        "layers": [{"layer": None, **SIZES}],
        "outputs": [{"module": None, "class": None, **SIZES}],
    },
    "modules_missing": None,
}


def test_json_has_every_key(config_file, run):
    table, _ = run(config_file(), *E4M3)
    assert keys_of(table) == SCHEMA
    assert table["format"] == 1
    assert (table["num_responses"], table["prompts"]) == (12, "the task, arithmetic")
    assert table["mu"]["quantization"] == "e4m3"
    assert table["discrepancy"]["kl_k3"] > 0
    assert [one["layer"] for one in table["modules"]["layers"]] == [0, 1]


def test_what_is_missing_is_null_and_the_keys_stay(config_file, run):
    model = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    table, said = run(config_file(model=ModelConfig(config=model)), "--mu.no-decode", "--trace-sequences", 0)
    expected = {**SCHEMA, "routing": None, "modules": None}
    assert keys_of(table) == expected
    assert "without experts" in table["routing_missing"]
    assert "trace_sequences is 0" in table["modules_missing"]
    assert "No routing was compared" in said
    assert "No modules were compared" in said


def test_equal_engines(config_file, run):
    table, said = run(config_file(), "--mu.no-decode", "--fail-above", 0, "--fail-metric", "abs_log_d_max")
    assert table["discrepancy"]["kl_k3"] == table["discrepancy"]["kl_full_max"] == 0.0
    assert table["discrepancy"]["bit_equal_fraction"] == 1.0
    assert table["modules"]["first_difference"] is None
    assert "First difference: none, in 4 sequences" in said
    assert "abs_log_d_max is 0: within --fail-above 0" in said


def test_report_and_picture(config_file, run, tmp_path):
    table, said = run(config_file(), *E4M3)
    assert f"{table['num_tokens']} sampled tokens" in said
    assert "First difference: model.layers.0.self_attn.q_proj (Linear)" in said
    assert "comparing 12/12  responses" in said
    assert "discrepancy.json" in said
    assert (tmp_path / "discrepancy.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in said


def test_fail_above(config_file, run, monkeypatch):
    table, _ = run(config_file(), *E4M3)
    report = []

    def once(*arguments, **options):
        if not report:
            report.append(compare_engines(*arguments, **options))
        return report[0]

    monkeypatch.setattr("minirl.discrepancy.command.compare_engines", once)
    for metric in ("kl_k3", "kl_full", "abs_log_d_max"):
        value = table["discrepancy"]["kl_full_mean" if metric == "kl_full" else metric]
        limit = ("--fail-metric", metric, "--fail-above")
        _, said = run(config_file(), *E4M3, *limit, value * 1.01)
        assert f"{metric} is" in said
        assert ": within --fail-above" in said
        _, said = run(config_file(), *E4M3, *limit, value * 0.99, status=1)
        assert "not within --fail-above" in said


def test_a_metric_that_is_not_a_number_fails(config_file, run, monkeypatch):
    monkeypatch.setattr("minirl.discrepancy.command.compare_engines", with_metrics(discrepancy_kl_k3=float("nan")))
    table, _ = run(config_file(), "--fail-above", 1, status=1)
    assert table["discrepancy"]["kl_k3"] is None


def with_metrics(**changes):
    def call(*arguments, **options):
        report = compare_engines(*arguments, **options)
        return replace(report, metrics={**report.metrics, **changes})

    return call


def test_a_run_its_model_and_an_update(config_file, run, tmp_path):
    """The folder of a run, the folder of a model, and a second checkpoint for r."""
    main(["train", str(config_file()), "--rollout.quantization", "e4m3", "--steps", "1"])
    folder = tmp_path / "run"
    main(["discrepancy", str(folder), "--responses", "6"])
    table = json.loads((folder / "discrepancy.json").read_text())
    assert table["mu"]["quantization"] == "e4m3"
    assert table["staleness"] is None

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "later")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "later" / name).write_bytes((folder / "model" / name).read_bytes())
    table, said = run(folder / "model", "--updated-model", tmp_path / "later", "--max-new-tokens", 5, "--mu.no-decode")
    assert table["prompts"] == "made up of random tokens"
    assert table["discrepancy"]["kl_k3"] == 0.0
    assert table["staleness"]["kl_k3"] > 1e-3
    assert set(table["staleness"]) == {"kl_k1", "kl_k3", "abs_log_r_max"}
    assert table["importance_weight"]["clip_fraction_high"] > 0
    assert "Staleness r = π_θ/π_old" in said


def test_prompts_of_a_file(config_file, run, tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("1+1=\n\n12+3=\n")
    lines.write_text('{"prompt": "1+1="}\n{"prompt": "12+3=", "answer": "15"}\n')
    found = [run(config_file(), "--prompts", path)[0] for path in (text, lines)]
    assert [table["num_responses"] for table in found] == [2, 2]
    assert found[0]["discrepancy"] == found[1]["discrepancy"]
    assert found[0]["prompts"] == str(text)


def test_settings_reach_the_engines(config_file, run, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def mode():
        entered.append(True)
        yield

    monkeypatch.setattr(engines, "batch_invariant_mode", mode)
    run(config_file())
    assert not entered
    table, _ = run(config_file(), "--mu.batch-invariant", "--pi.attn-implementation", "eager")
    assert entered
    assert table["mu"]["batch_invariant"] is True
    first = table["modules"]["first_difference"]
    assert any("softmax" in ran for ran in first["operation"]["ran_pi"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant_engines_agree_to_the_last_bit(dtype, config_file, run):
    at_all = ["--temperature", 0.7, "--fail-metric", "abs_log_d_max", "--fail-above", 0]
    dtypes = ["--mu.dtype", dtype, "--pi.dtype", dtype]
    table, _ = run(config_file(), *dtypes, *at_all, "--mu.batch-invariant", "--pi.batch-invariant")
    found = table["discrepancy"]
    assert found["abs_log_d_max"] == found["kl_full_max"] == 0.0
    assert found["bit_equal_fraction"] == 1.0
    assert table["modules"]["first_difference"] is None
    if dtype == "bfloat16":  # on some processors, float32 engines agree for such small sizes
        run(config_file(), *dtypes, *at_all, status=1)


def test_options_begin_with_what_the_config_says(config_file, run, config):
    rollout = replace(config.rollout, dtype="bfloat16", quantization="e4m3", temperature=0.5)
    model = replace(config.model, experts_implementation="minirl")
    table, _ = run(config_file(rollout=rollout, model=model))
    assert table["mu"] == {
        "dtype": "bfloat16",
        "attn_implementation": None,
        "experts_implementation": "minirl",
        "quantization": "e4m3",
        "batch_invariant": False,
        "decode": True,
        "engine": "transformers",
        "vllm": {"separate_process": True, "args": {}},
    }
    assert (table["pi"]["dtype"], table["pi"]["quantization"]) == ("float32", None)
    assert (table["temperature"], table["max_new_tokens"]) == (0.5, 6)


def test_options_of_a_run_with_vllm(config):
    vllm = VLLMConfig(separate_process=False, args={"max_num_batched_tokens": 64})
    rollout = replace(config.rollout, engine="vllm", vllm=vllm)
    model = replace(config.model, experts_implementation="minirl")
    options = default_options(replace(config, rollout=rollout, model=model))
    options.check()
    assert options.mu == InferenceSettings(engine="vllm", vllm=vllm)  # vLLM has its own experts
    assert options.pi.experts_implementation == "minirl"


def test_what_vllm_cannot_be(config_file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if vLLM were not installed
    path = config_file()

    def said(*options):
        return fails(capsys, "discrepancy", path, "--mu.engine", "vllm", *options)

    assert "--mu.engine is 'vllm', which cannot be imported" in said()
    message = "is 'eager' with --mu.engine vllm: it must be None there"
    assert f"--mu.attn-implementation {message}" in said("--mu.attn-implementation", "eager")
    assert f"--mu.experts-implementation {message}" in said("--mu.experts-implementation", "eager")
    assert "--mu.no-decode is given with --mu.engine vllm: it must be left out" in said("--mu.no-decode")


def test_what_cannot_be(config_file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config_file()

    def said(*options):
        return fails(capsys, "discrepancy", path, "--responses", 3, *options)

    assert "cannot read the config file" in fails(capsys, "discrepancy", tmp_path / "no.toml")
    assert "cannot load a model from" in fails(capsys, "discrepancy", tmp_path / "nowhere")
    assert "it must come after it" in fails(capsys, "discrepancy", "--seed", "1", path)
    assert "--responses is 0: it must be at least 1" in said("--responses", 0)
    assert "--temperature is -1.0: it must be above 0" in said("--temperature", -1)
    assert "--fail-above is -1.0: it must be at least 0" in said("--fail-above", -1)
    assert "--mu.attn-implementation is 'flesh'" in said("--mu.attn-implementation", "flesh")
    assert "--pi.experts-implementation is 'many'" in said("--pi.experts-implementation", "many")
    assert "--mu.dtype" in said("--mu.dtype", "float8")
    assert "cannot read --prompts" in said("--prompts", tmp_path / "none.txt")
    empty, broken = tmp_path / "empty.txt", tmp_path / "broken.jsonl"
    empty.write_text("\n")
    assert "has no prompts: it must have one per line" in said("--prompts", empty)
    for line, message in (
        ("{", "line 2: not valid JSON"),
        ('{"question": "1"}', "line 2: "),
        ('{"prompt": ""}', "must be an object whose prompt is text"),
        ("[1]", "must be an object whose prompt is text"),
    ):
        broken.write_text('{"prompt": "1+1="}\n' + line + "\n")
        assert message in said("--prompts", broken)
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in said("--output", tmp_path / "file" / "folder")
    assert "cannot load a model from" in said("--updated-model", tmp_path / "nowhere")


def test_a_run_that_has_not_ended(config_file, capsys, tmp_path):
    config_file().rename(tmp_path / "config.toml")
    (tmp_path / "metrics.jsonl").write_text("")
    assert "holds no model yet" in fails(capsys, "discrepancy", tmp_path)


def test_experts_that_cannot_be(config_file, capsys):
    path = config_file(model=ModelConfig(config={**GPT_OSS}))
    said = fails(capsys, "discrepancy", path, "--mu.experts-implementation", "minirl")
    assert "mu cannot compute with its options: experts_implementation is 'minirl'" in said


GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def test_help_with_a_target_shows_its_defaults(config_file, capsys, config):
    path = config_file(rollout=replace(config.rollout, quantization="e4m3"))
    with pytest.raises(SystemExit) as stopped:
        main(["discrepancy", str(path), "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: e4m3)" in said
    assert "module by module" in said


@pytest.mark.parametrize("routing_replay", ["disabled", "R3"])
def test_numbers_are_those_that_the_trainer_sees(config, make_trainer, routing_replay):
    """Training in bfloat16 on rollouts of the e4m3 copy: the same old_log_probs, and the same metrics."""
    trainer = make_trainer(
        config,
        dtype="bfloat16",
        rollout=replace(config.rollout, quantization="e4m3"),
        num_minibatches=1,
        micro_batch_size=64,
        routing_replay=routing_replay,
    )
    batch, _ = trainer.collect(1)
    batch, _ = trainer.with_old_log_probs(batch)
    prompts, responses, rollout_log_probs, old_log_probs = [], [], [], []
    for row in range(len(batch)):
        scored = batch.loss_mask[row]
        start, end = int(scored.nonzero()[0]) + 1, int(batch.attention_mask[row].sum())
        prompts.append(batch.input_ids[row, :start].tolist())
        responses.append(batch.input_ids[row, start:end].tolist())
        rollout_log_probs.append(batch.rollout_log_probs[row, scored])
        old_log_probs.append(batch.old_log_probs[row, scored])

    pi = training_engine(trainer.model, EngineSettings(dtype="bfloat16"), 1.0, "pi")
    scores = pi.score(prompts, responses, with_logits=False, routed_experts=batch.routed_experts)
    assert all(torch.equal(*pair) for pair in zip(scores.log_probs, old_log_probs, strict=True))

    seen = trainer.update(batch).metrics.compute()
    found = sampled_token_metrics(rollout_log_probs, scores.log_probs)
    for key in (
        "num_tokens",
        "discrepancy_kl_k1",
        "discrepancy_kl_k3",
        "log_d_abs_max",
        "is_weight_mean",
        "is_weight_max",
        "ess",
        "truncation_fraction",
        "first_order_error_mean",
    ):
        assert found[key] == pytest.approx(seen[key], rel=1e-12), key
    assert found["discrepancy_kl_k3"] > 1e-5


def test_training_on_quantized_rollouts(config, make_trainer):
    plain = make_trainer(config).step(1)
    trainer = make_trainer(config, rollout=replace(config.rollout, quantization="e4m3"))
    quantized = [trainer.step(1)]
    trainer.sampler.engine.update_weights(trainer.model)
    quantized.append(trainer.step(2))
    assert plain["discrepancy_kl_k3"] < 1e-9
    assert all(1e-5 < metrics["discrepancy_kl_k3"] < 0.1 for metrics in quantized)  # refreshed: no growth


def test_a_task_of_a_file(config_file, run, tmp_path, config):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(f'{{"prompt": "{n}+1=", "answer": "{n + 1}"}}' for n in range(40)))
    main(["train", str(config_file(steps=1))])
    task = TaskConfig(kind="jsonl", path=str(problems))
    model = ModelConfig(path=str(tmp_path / "run" / "model"))
    table, _ = run(config_file(task=task, model=model))
    assert table["prompts"] == "the task, jsonl"


def test_the_same_seed_gives_the_same_report(config_file, run):
    first, second, other = (run(config_file(), *E4M3, "--seed", seed)[0] for seed in (0, 0, 1))
    assert first == second
    assert first["discrepancy"] != other["discrepancy"]
