"""Arguments for opcheck of mean's op."""

import torch


def op_arguments():
    x, half = torch.randn(2, 3, 7), torch.randn(3, 5).half()
    return {"mean": [(x, (0, -1), True, torch.float32, True, "cpu"), (half, (), False, torch.float16, False, "cpu")]}
