"""The check of replayed experts, and its error message."""

from __future__ import annotations

from torch import Tensor

from ...common.library import register_check


def routed_experts_message(row: int, routed_experts: Tensor, num_experts: int) -> str:
    """The error for a row that has an id out of range, or an id twice."""
    ids = routed_experts[row].tolist()
    for expert in ids:
        if not 0 <= expert < num_experts:
            return (
                f"routed_experts has the expert {expert} at row {row}: an expert must be in [0, {num_experts}), and a "
                "row without experts must be marked in valid"
            )
    twice = next(expert for expert in ids if ids.count(expert) > 1)
    return f"routed_experts has the expert {twice} twice at row {row} ({ids}): the experts of a row must differ"


def bad_rows(ids: Tensor, num_experts: int) -> Tensor:
    """[...] bool: whether a row of int64 ids [..., K] has an id out of range, or an id twice."""
    ordered = ids.sort(-1).values
    return ((ids < 0) | (ids >= num_experts)).any(-1) | (ordered[..., 1:] == ordered[..., :-1]).any(-1)


def _check_routed_experts(routed_experts, valid, num_experts):
    bad = bad_rows(routed_experts.long(), num_experts)
    if valid is not None:
        bad &= valid
    if bool(bad.any()):
        raise ValueError(routed_experts_message(int(bad.nonzero()[0]), routed_experts, num_experts))


checked_routed_experts = register_check(
    "checked_routed_experts(Tensor routed_experts, Tensor? valid, SymInt num_experts) -> Tensor", _check_routed_experts
)
