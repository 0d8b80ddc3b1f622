"""PolicyLossInputs: the arguments of a policy loss except its log-probabilities, checked and in one shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...backends import unavailable_reason
from ...common.checks import IGNORE_INDEX, check_device, check_tensor, check_token_ids
from ...config import PolicyLossConfig
from .by_kernels import without_ignored
from .layout import Packed, Padded
from .prepare import Arguments, ids_in_loss, prepare_by_kernels, prepare_by_torch


@dataclass(frozen=True, eq=False)
class PolicyLossInputs:
    """The arguments of a policy loss except its log-probabilities: checked, per token, with the weight of each token.

    `prepare` makes a PolicyLossInputs from a mini-batch, and `split` cuts it into micro-batches. A loss call takes it
    as `inputs=…`, in place of the arguments that it was made of.

    All per-token tensors have one shape, [B, L] or [T]. `mask` is bool, and the other tensors are float32.

    layout: maps tokens to responses, for padded [B, L] or packed [T].
    mask: True where a token is in the loss.
    weights: the loss is the sum of weight * token loss over the tokens; 0 outside the mask.
    advantages: the advantage of each token.
    old_log_probs, rollout_log_probs, ref_log_probs: log pi_old, log mu_old and log pi_ref in nats, or None.
    config: the objective and its options.
    raises: True: a NaN or an infinity inside the mask raises ValueError, and the host waits for the device. False: a
        NaN or an infinity makes the advantage of its token NaN.
    backend: "triton": the kernels make the weights, the metrics and the sums over tokens. Otherwise torch does.
    """

    layout: Padded | Packed
    mask: Tensor
    weights: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None
    rollout_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    config: PolicyLossConfig
    raises: bool
    backend: str

    @classmethod
    def prepare(
        cls,
        token_ids: Tensor,
        *,
        old_log_probs: Tensor | None,
        rollout_log_probs: Tensor | None,
        advantages: Tensor,
        loss_mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
        group_ids: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        num_responses: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        num_groups: float | Tensor | None = None,
        config: PolicyLossConfig = PolicyLossConfig(),
        check: bool = False,
    ) -> PolicyLossInputs:
        """The inputs of a whole mini-batch, or of the part of a mini-batch that this rank has.

        The other arguments have the same meaning as in `policy_loss`.

        token_ids: [B, L] (padded, rows are responses) or [T] (packed with cu_seqlens), int32 or int64. An id of -100
            takes its token out of the loss, like loss_mask = 0.
        num_responses, num_tokens, num_groups: counts over all ranks. Needed only if ranks share a mini-batch.
        check: on a GPU, raise ValueError for a value that is not finite. The host then waits for the GPU.
        Raises ValueError or TypeError that names the argument, and the token if the error is in one token.
        """
        check_tensor("token_ids", token_ids)
        check_token_ids(token_ids, token_ids.shape, token_ids.device)
        return prepare_inputs(
            token_ids.shape,
            token_ids.device,
            old_log_probs=old_log_probs,
            rollout_log_probs=rollout_log_probs,
            advantages=advantages,
            loss_mask=loss_mask,
            token_ids=token_ids,
            cu_seqlens=cu_seqlens,
            group_ids=group_ids,
            ref_log_probs=ref_log_probs,
            num_responses=num_responses,
            num_tokens=num_tokens,
            num_groups=num_groups,
            config=config,
            raises=check or token_ids.device.type == "cpu",
            backend=backend_of(token_ids.device),
        )

    def split(self, sizes: int | Sequence[int]) -> list[PolicyLossInputs]:
        """Micro-batches of whole responses, in order. Their losses and gradients sum to those of the mini-batch.

        The call for a micro-batch gets the token_ids and log-probabilities of this micro-batch only. For packed inputs
        on a GPU the host waits for the GPU.

        sizes: the number of responses of each micro-batch: one number for all (the last may have fewer), or one number
            for each micro-batch.
        Raises TypeError or ValueError if sizes are not counts that sum to the number of responses. A Correction with
            normalise=True raises ValueError.
        """
        if self.config.correction is not None and self.config.correction.normalise:
            raise ValueError(
                f"config has rollout_is={self.config.rollout_is!r}: normalise must be False where inputs are split, "
                "since a micro-batch does not see the mean of the mini-batch"
            )
        bounds = _bounds(sizes, self.layout.num_responses)
        return [
            self._with_tensors(lambda values, tokens=tokens: values[tokens], layout)
            for tokens, layout in self.layout.parts(bounds)
        ]

    def shorten(self, length: int) -> PolicyLossInputs:
        """The first `length` tokens of each row, for a micro-batch [B, L] with a smaller L. Waits for the device.

        Raises ValueError for packed inputs, and if a token after `length` is in the loss.
        """
        if not isinstance(self.layout, Padded):
            raise ValueError("inputs is packed, [T]: it must be padded, [B, L], for shorten")
        if bool(self.mask[:, length:].any()):
            longest = int(self.mask.nonzero()[:, 1].max()) + 1
            raise ValueError(f"length is {length}: it must be at least {longest}, where the last token of the loss is")
        values = self.mask[:, :length]
        return self._with_tensors(lambda tensor: tensor[:, :length], Padded(values.shape, values.device))

    def to(self, device: torch.device | str) -> PolicyLossInputs:
        """The same inputs with all tensors on `device`."""
        return self._with_tensors(lambda values: values.to(device), self.layout.to(device))

    def for_call(
        self, shape: torch.Size, device: torch.device, token_ids: Tensor | None, raises: bool, backend: str
    ) -> tuple[PolicyLossInputs, Tensor | None]:
        """(these inputs for one call, token_ids with -100 where a token is not in the loss).

        Checks shape and device, and takes ignored tokens out of the loss. The other tokens keep their weights, since
        the counts of the mini-batch were taken by `prepare`.
        """
        if self.layout.shape != shape:
            raise ValueError(
                f"inputs has the shape {tuple(self.layout.shape)}: it must be {tuple(shape)}, the shape of the tokens"
            )
        check_device("inputs", self.mask, device)
        if token_ids is None:
            return replace(self, raises=raises, backend=backend), None
        if backend == "triton":
            ids, mask, weights = without_ignored(token_ids, self.mask, self.weights, self.layout.cu_seqlens)
        else:
            mask = self.mask & (token_ids != IGNORE_INDEX)
            weights, ids = torch.where(mask, self.weights, 0.0), ids_in_loss(token_ids, mask)
        return replace(self, mask=mask, weights=weights, raises=raises, backend=backend), ids

    @property
    def lengths(self) -> Tensor:
        """For each token, the number of tokens of its response that are in the loss; at least 1, float32."""
        return self.layout.to_tokens(self.layout.response_sum(self.mask.float()).clamp(min=1))

    @property
    def entropy_grad(self) -> Tensor | None:
        """d loss / d entropy of each token; None if entropy_coef is 0."""
        return -self.config.entropy_coef * self.weights if self.config.entropy_coef else None

    def _with_tensors(self, function: Callable[[Tensor], Tensor], layout: Padded | Packed) -> PolicyLossInputs:
        tensors = {name: values for name, values in vars(self).items() if isinstance(values, Tensor)}
        return replace(self, layout=layout, **{name: function(values) for name, values in tensors.items()})


def backend_of(device: torch.device) -> str:
    """The backend of a call that has no argument for it."""
    return "triton" if device.type == "cuda" and unavailable_reason("triton", device) is None else "reference"


def prepare_inputs(shape: torch.Size, device: torch.device, **arguments) -> PolicyLossInputs:
    """The inputs of `prepare_rows`, without the ids."""
    return prepare_rows(shape, device, **arguments)[0]


def prepare_rows(
    shape: torch.Size,
    device: torch.device,
    *,
    inputs: PolicyLossInputs | None = None,
    old_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    group_ids: Tensor | None,
    ref_log_probs: Tensor | None,
    num_responses,
    num_tokens,
    num_groups,
    config: PolicyLossConfig,
    raises: bool,
    token_ids: Tensor | None = None,
    backend: str = "reference",
) -> tuple[PolicyLossInputs, Tensor | None]:
    """(the arguments that all policy losses share, checked and in one shape; token_ids, contiguous).

    inputs: the PolicyLossInputs of the caller, or None. It replaces all but shape, device, token_ids, raises, backend.
    raises, backend: the same as in PolicyLossInputs.
    token_ids: an id of -100 takes its token out of the loss. In the result, all tokens out of the loss have this id.
    """
    if inputs is not None:
        return inputs.for_call(shape, device, token_ids, raises, backend)
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"config is a {type(config).__name__}: it must be a PolicyLossConfig")
    if rollout_log_probs is None and config.needs_rollout_log_probs:
        raise ValueError(
            f"rollout_log_probs is None with rollout_is={config.rollout_is!r}: the objective weighs by pi/mu, so it "
            "must be the log-probabilities of the inference engine (or config.rollout_is must be None)"
        )
    counts = {"num_responses": num_responses, "num_tokens": num_tokens, "num_groups": num_groups}
    if config.correction is not None:
        config.correction.check_counts(**counts)
    if ref_log_probs is None and config.kl_coef:
        raise ValueError(
            f"ref_log_probs is None with kl_coef={config.kl_coef}: it must be the reference policy's log-probabilities"
        )
    per_token = (old_log_probs, rollout_log_probs, ref_log_probs, advantages)
    arguments = Arguments(shape, device, token_ids, loss_mask, cu_seqlens, group_ids, *per_token)
    if backend == "triton" and not raises and shape.numel():  # no tokens make no block for a kernel
        prepared = prepare_by_kernels(arguments, counts, config)
    else:
        prepared = prepare_by_torch(arguments, counts, config, raises)
    values = {"config": config, "raises": raises, "backend": backend, **prepared.values}
    return PolicyLossInputs(layout=prepared.layout, **values), prepared.token_ids


def _bounds(sizes: int | Sequence[int], num_responses: int) -> list[int]:
    """The first response of each part, and the end of the last part."""
    several = isinstance(sizes, Sequence)
    for size in sizes if several else [sizes]:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"sizes has {size!r}: it must be integers, numbers of responses")
        if size < 1:
            raise ValueError(f"sizes has {size}: a micro-batch must have at least 1 response")
    if not several:
        return [*range(0, num_responses, sizes), num_responses]
    if sum(sizes) != num_responses:
        raise ValueError(f"sizes sums to {sum(sizes)}: it must be {num_responses}, the number of responses")
    return [0, *itertools.accumulate(sizes)]
