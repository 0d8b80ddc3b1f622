"""A model in a wrapper of torch or accelerate on two gloo processes, against one process without a wrapper.

Each of the two processes has half of the responses.
"""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from causal_models import V, gradients, make
from ranks import RANKS, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from minirl_kernels.integrations.transformers import enable_log_probs

BF16 = torch.bfloat16


def run(names: list[str], folder: Path) -> None:
    """All in the same two processes, because a process needs far longer to start than to check a wrapper."""
    run_ranks(_check_rank, folder, names)


def ddp(**options):
    return lambda model: DistributedDataParallel(model, **options)


def fsdp1(**options):
    def wrap(model):
        policy = ModuleWrapPolicy({type(model.model.layers[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"), **options
        )

    return wrap


def fsdp2(of_layers=None, of_root=None):
    def wrap(model):
        for part in [*model.model.layers, model]:
            policy = (of_root if part is model else of_layers) or MixedPrecisionPolicy()
            fully_shard(part, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=policy, reshard_after_forward=True)
        return model

    return wrap


def accelerate_fsdp2(model):
    """The preparation of Accelerator.prepare for FSDP2; accelerate itself does it on GPUs only."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    PartialState(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_mixed_precision("bf16")
    prepares = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        is_main_process=False,
        device=torch.device("cpu"),
        torch_device_mesh=init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["fsdp"]),
    )
    return fsdp2_prepare_model(prepares, model)


def accelerate_ddp(model):
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


WRAPPERS = {
    "DDP": ddp(),
    "DDP with static_graph": ddp(static_graph=True),
    "DDP with find_unused_parameters": ddp(find_unused_parameters=True),
    "FSDP1": fsdp1(),
    "FSDP2": fsdp2(),
    "FSDP2 with output_dtype": fsdp2(of_root=MixedPrecisionPolicy(output_dtype=BF16)),
}
# wrappers with bfloat16 weights or hidden states; arguments and results must still be float32
IN_16_BITS = {
    "FSDP1 in bfloat16": fsdp1(mixed_precision=MixedPrecision(param_dtype=BF16)),
    "FSDP2 in bfloat16": fsdp2(*[MixedPrecisionPolicy(param_dtype=BF16, output_dtype=BF16)] * 2),
    "DDP of accelerate": accelerate_ddp,
    "FSDP2 of accelerate": accelerate_fsdp2,
}


def _check_rank(rank: int, names: list[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="localhost")
    for name in names:
        for enable_first in (True, False):
            try:
                _check(rank, name, enable_first)
            except Exception as error:
                raise AssertionError(f"{name}, {enable_first=}") from error


def _check(rank: int, name: str, enable_first: bool) -> None:
    gen = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, V, (2 * RANKS, 7), generator=gen)
    old_log_probs = -3 - torch.rand(input_ids.shape, generator=gen)
    advantages = torch.tensor([1.0, -0.5, 0.75, -1.0])

    def outputs_of(model, rows):
        """The outputs of both kinds of call; each has run its own backward."""
        ids = input_ids[rows]
        output = model(ids, token_ids=ids, use_cache=False)
        (output.log_probs.sum() + 0.3 * output.entropy.sum()).backward()
        loss = {
            "old_log_probs": old_log_probs[rows],
            "rollout_log_probs": old_log_probs[rows] + 2.0**-12,
            "advantages": advantages[rows],
            "loss_mask": None,
            "num_responses": len(input_ids),
        }
        second = model(ids, token_ids=ids, use_cache=False, policy_loss=loss)
        second.loss.backward()
        return output, second

    def metrics_of(output):
        return output.policy_loss.metrics.all_reduce().compute()

    mine = slice(2 * rank, 2 * rank + 2)
    model = make("qwen3")
    alone = enable_log_probs(copy.deepcopy(model))
    expected = outputs_of(alone, slice(None))
    if enable_first:
        enable_log_probs(model)
    wrapped = {**WRAPPERS, **IN_16_BITS}[name](model)
    kinds = DistributedDataParallel if "DDP" in name.split() else (FSDPModule, FullyShardedDataParallel)
    assert isinstance(wrapped, kinds), name
    exact = name in WRAPPERS
    if _is_fsdp1(wrapped) and not enable_first:
        with pytest.raises(ValueError, match="in FullyShardedDataParallel: enable_log_probs must come before it, and"):
            enable_log_probs(wrapped)
        return
    if not (enable_first and exact):  # a wrapper that casts a model's arguments must be known
        enable_log_probs(wrapped)
    found = outputs_of(wrapped, mine)
    tolerances = {} if exact else {"rtol": 0.05, "atol": 0.15}
    for ours, theirs in zip(found, expected, strict=True):
        for field in ("log_probs", "entropy"):
            assert ours[field].dtype == torch.float32, name
            torch.testing.assert_close(ours[field], theirs[field][mine], **tolerances)
        assert type(ours) is type(theirs)
    policy_loss = found[1].policy_loss
    assert found[1].loss.dtype == policy_loss.loss.dtype == torch.float32
    assert policy_loss.metrics.sums.dtype == torch.float64
    # a cast of the given log-probabilities would change their difference
    assert abs(policy_loss.metrics.all_reduce().compute()["log_d_abs_max"] - 2.0**-12) < 1e-6
    _compare(wrapped, alone, exact)


def _compare(model, alone, exact):
    """Compare the gradients of two calls, each of which averages over the ranks."""
    theirs = gradients(alone)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if _is_fsdp1(model) else nullcontext():
        for name, grad in gradients(model).items():
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            name = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
            error = (RANKS * grad - theirs[name]).abs().max() / theirs[name].abs().max()
            assert error < (1e-5 if exact else 0.2), (name, error)
            theirs.pop(name)
    assert not theirs


def _is_fsdp1(model):
    return isinstance(model, FullyShardedDataParallel)
