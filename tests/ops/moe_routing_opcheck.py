"""Arguments for opcheck of moe_routing's ops: once with and once without each argument that may be None."""

import torch


def op_arguments():
    router, routed, bias = torch.randn(3, 9), torch.tensor([[0, 8], [3, 1], [4, 5]]), torch.randn(9)
    valid = torch.tensor([True, False, True])
    return {
        "checked_routed_experts": [(routed, None, 9), (routed.to(torch.uint8), valid, 9)],
        "moe_routing": [
            (router, 2, None, None, True, "softmax", None, 1, 1, 1.0, "cpu"),
            (router.bfloat16(), 2, routed, valid, False, "sigmoid", bias, 3, 2, 2.5, "cpu"),
        ],
        "moe_routing_backward": [
            (router, torch.rand(3, 2), routed, torch.rand(3, 2), norm, "softmax", 2.5, "cpu") for norm in (True, False)
        ],
    }
