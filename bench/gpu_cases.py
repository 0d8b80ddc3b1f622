"""The cases of `python bench/gpu.py`, at sizes that fill a GPU. Most contenders are those of `pytest bench/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_attention as attention
import bench_fused_linear_policy_loss as linear_loss
import bench_fused_policy_loss as loss
import bench_matmul as products
import bench_mean as mean
import bench_moe_experts as experts
import bench_moe_routing as routing
import bench_rms_norm as rms_norm
import bench_softmax as softmax
import bench_token_logprobs as token_logprobs
import gpu_model as model
import peers
import torch
from batches import policy_batch
from harness import Bar, Contender, Inputs

from minirl_kernels import fused_policy_loss, log_softmax

BF16, FP32 = torch.bfloat16, torch.float32
VOCABULARY = 151_936


@dataclass(frozen=True)
class Case:
    """One comparison.

    make(dtype=, device=, **shape): the `Inputs`. contenders(inputs): the `Contender`s, one of ours first.
    shape, small: the sizes on a GPU; the sizes of the check and of a rehearsal.
    floor_bytes(inputs): the bytes that any implementation must move. flops(inputs): its operations, or None.
    in_mode: whether batch-invariant mode is on around all contenders.
    """

    what: str
    dtype: torch.dtype
    make: Callable[..., Inputs]
    contenders: Callable[[Any], list[Contender]]
    shape: dict[str, int]
    small: dict[str, int]
    floor_bytes: Callable[[Any], int]
    flops: Callable[[Any], int] | None = None
    bars: tuple[Bar, ...] = ()
    in_mode: bool = False


def cases() -> Iterator[Case]:
    """Every case, the most telling first: a run that is out of time leaves out the last ones."""
    yield from _losses()
    yield from _linear_losses()
    yield from _model()
    yield from _attention()
    yield from _products()
    yield from _experts()
    yield from _rows()


FROM_LOGITS, FROM_HIDDEN = "policy loss from logits", "policy loss from hidden states"
LOG_PROBS = "token log-probabilities and entropy"


def _loss(batch, overwrite_logits):
    """Without the numbers of the metrics, for which the host would wait."""
    arguments = {name: getattr(batch, name) for name in ("old_log_probs", "rollout_log_probs", "advantages", "config")}
    out = fused_policy_loss(
        batch.logits, batch.token_ids, loss_mask=None, overwrite_logits=overwrite_logits, **arguments
    )
    (grad,) = torch.autograd.grad(out.loss, batch.logits)
    return {"loss": out.loss.detach(), "log_probs": out.log_probs, "entropy": out.entropy, "grad": grad}


def _loss_contenders(batch):
    logits = batch.logits.detach()
    warm = torch.empty_like(logits)
    return [
        Contender(loss.FRESH, partial(_loss, batch, False), kind="ours"),
        Contender(loss.OVERWRITE, partial(_loss, batch, True), kind="ours"),
        *peers.contenders(peers.POLICY_LOSS, batch, logits.device),
        Contender(loss.WARM_COPY, lambda: {"copy": warm.copy_(logits)}, kind="floor"),
    ]


def _losses():
    small = {"tokens": 12, "vocab_size": 515}
    sizes = ((8192, VOCABULARY, BF16, peers.TRL), (4096, VOCABULARY, FP32, peers.TRL), (256, 32_000, BF16, peers.EAGER))
    for tokens, vocab_size, dtype, bar in sizes:
        yield Case(
            FROM_LOGITS,
            dtype,
            policy_batch,
            _loss_contenders,
            {"tokens": tokens, "vocab_size": vocab_size},
            small,
            floor_bytes=lambda batch: 2 * batch.logits.nbytes,
            bars=(Bar(loss.FRESH, "speed", bar, 1),),
        )
    yield Case(
        LOG_PROBS,
        BF16,
        policy_batch,
        partial(token_logprobs.contenders, ours=token_logprobs.forward, alternatives=peers.LOG_PROBS),
        {"tokens": 8192, "vocab_size": VOCABULARY},
        small,
        floor_bytes=lambda batch: batch.logits.nbytes,
    )


def _linear_losses():
    yield Case(
        FROM_HIDDEN,
        BF16,
        linear_loss.linear_batch,
        linear_loss.contenders,
        {"tokens": 8192, "hidden_size": 4096, "vocab_size": VOCABULARY},
        {"tokens": 12, "hidden_size": 48, "vocab_size": 515},
        floor_bytes=lambda batch: 2 * (batch.hidden.nbytes + batch.weight.nbytes),
        flops=lambda batch: 6 * batch.hidden.numel() * batch.weight.shape[0],
    )


def _model():
    sizes = {"layers": 8, "hidden_size": 1024, "vocab_size": VOCABULARY}
    small = {"layers": 2, "hidden_size": 64, "vocab_size": 301}
    yield Case(
        model.TRAINING,
        BF16,
        model.model_batch,
        model.training_contenders,
        {"responses": 8, "tokens": 8192, **sizes},
        {"responses": 2, "tokens": 16, **small},
        floor_bytes=lambda batch: batch.parameter_bytes,
        bars=(Bar(model.ON, "time", model.OFF, 1.7),),
        in_mode=True,
    )
    yield Case(
        model.DECODING,
        BF16,
        model.model_batch,
        model.decoding_contenders,
        {"responses": 48, "tokens": 48 * 64, **sizes},
        {"responses": 2, "tokens": 16, **small},
        floor_bytes=lambda batch: model.NEW_TOKENS * batch.parameter_bytes,
        in_mode=True,
    )


def _attention():
    heads = {"heads": 32, "key_heads": 4, "size": 128}
    small = {"heads": 4, "key_heads": 2, "size": 16}
    ways = (
        ("attention, forward", attention.forward, 4 * 2048, 2048, 2048),
        ("attention, forward + backward", attention.forward_backward, 4 * 2048, 2048, 2048),
        ("attention, decoding", attention.forward, 64, 1, 4096),
    )
    for what, way, tokens, length, keys in ways:
        few = 5 if length > 1 else 1
        yield Case(
            what,
            BF16,
            attention.sequences,
            partial(attention.contenders, way=way),
            {"tokens": tokens, "length": length, "keys": keys, **heads},
            {"tokens": 2 * few, "length": few, "keys": 5, **small},
            floor_bytes=lambda batch: sum(x.nbytes for x in (batch.q, batch.k, batch.v, batch.grad_out)),
        )


def _products():
    for tokens in (8192, 1024, 128, 16, 1):
        yield Case(
            "product",
            BF16,
            products.linear_batch,
            partial(products.contenders, way=products.forward),
            {"tokens": tokens, "in_features": 4096, "out_features": 4096},
            {"tokens": 1, "in_features": 33, "out_features": 40},
            floor_bytes=lambda batch: batch.x.nbytes + batch.weight.nbytes + batch.grad_out.nbytes,
            flops=lambda batch: 2 * batch.x.shape[0] * batch.weight.numel(),
            bars=(Bar(products.OURS, "time", products.TORCH, 1.25),) if tokens <= 128 else (),
            in_mode=True,
        )


def _experts():
    ways = (("forward", experts.forward, 8192), ("forward + backward", experts.forward_backward, 8192))
    for way, run, tokens in (*ways, ("forward", experts.forward, 64)):
        yield Case(
            f"mixture of experts, {way}",
            BF16,
            experts.experts_batch,
            partial(_experts_contenders, way=run),
            {"tokens": tokens, "hidden_size": 2048, "intermediate_size": 768, "num_experts": 128, "top_k": 8},
            {"tokens": 4, "hidden_size": 64, "intermediate_size": 64, "num_experts": 8, "top_k": 4},
            floor_bytes=lambda batch: batch.gate_up_proj.nbytes + batch.down_proj.nbytes,
            flops=lambda batch: 3 * batch.experts.numel() * batch.gate_up_proj[0].numel(),
        )
    sizes = {"num_experts": 128, "top_k": 8}
    yield Case(
        "routing, natural",
        FP32,
        routing.router_batch,
        partial(routing.contenders, ours=routing.natural, theirs=routing.their_natural),
        {"tokens": 65_536, **sizes},
        {"tokens": 40, **sizes},
        floor_bytes=lambda batch: batch.logits.nbytes,
    )


def _experts_contenders(batch, way):
    """The floor is torch's grouped products on sorted rows: single products of many experts are mostly launches."""
    shown = (experts.OURS, experts.GROUPED)
    found = [contender for contender in experts.contenders(batch, way) if contender.name in shown]
    return [*found, Contender("bare grouped products", _bare_grouped(batch, way), kind="floor")]


def _bare_grouped(batch, way):
    order = batch.experts.flatten().argsort(stable=True)
    counts = torch.bincount(batch.experts.flatten(), minlength=len(batch.down_proj))
    ends = counts.cumsum(0).to(torch.int32)
    rows = batch.hidden.detach()[order // batch.experts.shape[1]]
    halves = rows.new_ones(len(rows), batch.gate_up_proj.shape[1])
    activation, gate_up, down = rows.new_ones(len(rows), batch.down_proj.shape[2]), batch.gate_up_proj, batch.down_proj

    def product(a, b):
        return torch._grouped_mm(a, b, offs=ends)

    @torch.no_grad()
    def run():
        outputs = [product(rows, gate_up.mT), product(activation, down.mT)]
        if way is experts.forward_backward:
            outputs += [product(rows, down), product(halves, gate_up), product(halves.T, rows)]
            outputs.append(product(rows.T, activation))
        return dict(enumerate(outputs))

    return run


def _rows():
    for way, run, passes in (("forward", rms_norm.forward, 2), ("forward + backward", rms_norm.forward_backward, 5)):
        yield Case(
            f"RMS norm, {way}",
            BF16,
            rms_norm.norm_batch,
            partial(rms_norm.contenders, run=run),
            {"tokens": 16_384, "hidden_size": 4096},
            {"tokens": 12, "hidden_size": 515},
            floor_bytes=lambda batch, passes=passes: passes * batch.x.nbytes,
        )
    yield Case(
        "log-softmax, forward",
        BF16,
        softmax.rows_batch,
        partial(softmax.contenders, run=softmax.forward, ours=log_softmax, theirs=torch.log_softmax),
        {"tokens": 4096, "vocab_size": VOCABULARY},
        {"tokens": 12, "vocab_size": 515},
        floor_bytes=lambda batch: 2 * batch.x.nbytes,
    )
    yield Case(
        "mean of each row",
        BF16,
        mean.matrix_batch,
        partial(mean.contenders, name="mean", dim=-1),
        {"tokens": 4096, "hidden_size": VOCABULARY},
        {"tokens": 12, "hidden_size": 515},
        floor_bytes=lambda batch: batch.x.nbytes,
    )
