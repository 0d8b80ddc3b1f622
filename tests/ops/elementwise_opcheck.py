"""Arguments for opcheck of the elementwise ops."""

import torch


def op_arguments():
    x = torch.randn(2, 3, 7)
    return {
        "elementwise": [(x, "silu", 0.0, 0.0, "cpu"), (x.half(), "softplus", 1.0, 20.0, "cpu")],
        "elementwise_backward": [(x, x + 1, "gelu_tanh", 0.0, 0.0, "cpu")],
    }
