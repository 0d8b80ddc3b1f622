"""Arguments for opcheck of moe_experts' ops."""

import torch


def op_arguments():
    experts = torch.tensor([[0, 8], [3, 1], [4, 5]])
    operands = (torch.randn(3, 5), torch.rand(3, 2), experts % 4, torch.randn(4, 6, 5), torch.randn(4, 5, 3))
    hidden, weights, ids, gate_up, down = operands
    half = (hidden.half(), weights, ids, gate_up.half(), down.half())
    kept = [torch.randn(6, 6)]
    return {
        "checked_experts": [(experts, 9)],
        "moe_experts": [(*operands, True, "cpu"), (*half, False, "cpu")],
        "moe_experts_backward": [
            (*operands, kept, torch.randn(3, 5), *[True] * 4, "cpu"),
            (*operands, kept, torch.randn(3, 5), False, True, False, False, "cpu"),
        ],
    }
