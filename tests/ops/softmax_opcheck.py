"""Arguments for opcheck of softmax's ops."""

import torch


def op_arguments():
    x = torch.randn(2, 3, 7)
    return {
        "softmax": [(x, -1, True, "cpu"), (x.half(), 1, False, "cpu")],
        "softmax_backward": [(x, x - 3, 0, True, "cpu"), (x.half(), x.half(), -1, False, "cpu")],
    }
