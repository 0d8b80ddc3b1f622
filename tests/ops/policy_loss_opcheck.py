"""Arguments for opcheck of policy_loss's ops, which Triton computes: here in its interpreter."""

import math

import torch

from minirl_kernels.backends import unavailable_reason

VALUES = -torch.arange(6.0).view(2, 3)


def op_arguments():
    """No arguments where Triton does not interpret."""
    arguments = triton_arguments()
    is_there = unavailable_reason("triton", torch.device("cpu")) is None
    return {name: given if is_there else [] for name, given in arguments.items()}


def triton_arguments():
    ids, mask = torch.tensor([[0, 6, -100], [1, 2, 3]]), torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    offsets, groups = torch.tensor([0, 4, 6], dtype=torch.int32), torch.tensor([7, 9])
    flat = VALUES.flatten()
    plain, of_response = (
        ("plain", 0.0, math.inf, "truncate", True, False),
        ("sequence", 0.5, 2.0, "truncate", True, True),
    )
    objective, options = ("minirl", "token", True, 0.8, 1.27, math.inf, math.inf), ("w in loss", 5.0, 0.1, "k3", 0.01)
    own = ("", "sequence", False, 0.0, math.inf, math.inf, math.inf)
    values = (mask, VALUES, VALUES, VALUES, VALUES, VALUES, None)
    packed = (mask.flatten(), flat, flat, None, flat, None, offsets)
    corrected = (mask.flatten(), flat, flat, flat, flat, None, offsets)
    sums, log_mean = torch.ones(6, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    losses = (flat.double(), flat.double(), mask.flatten(), mask.flatten())
    return {
        "policy_loss_inputs": [
            (None, None, (2, 3), ids, mask.view(torch.uint8), VALUES, VALUES, None, torch.ones(2), None, 0.0, 1.0,
             "seq-mean-token-mean"),
            (offsets, groups, (6,), None, None, None, flat, flat, flat, torch.tensor(3), 0.0, 1.0, "group-token-mean"),
        ],
        "policy_loss_without_ignored": [(ids, mask, VALUES, None), (ids.flatten(), mask.flatten(), flat, offsets)],
        "policy_loss_response_sums": [(VALUES, *values, *plain), (None, *corrected, *of_response)],
        "policy_loss_behaviour": [(*corrected, sums, log_mean, *of_response)],
        "policy_loss_ratios": [
            (VALUES, "token", *values, None, None, *plain),
            (flat, "sequence_mean", *corrected, sums, log_mean, *of_response),
        ],
        "policy_loss_sums": [
            (VALUES, VALUES, None, None, None, None, *values, None, None, *objective, *plain, *options),
            (flat, None, *losses, *packed, sums, None, *own, "none", *plain[1:], *options[:-1], 0.0),
        ],
    }  # fmt: skip
