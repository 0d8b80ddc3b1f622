"""Arguments for opcheck of matmul's and linear's ops."""

import torch


def op_arguments():
    return {
        "linear": [
            (torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4), "cpu"),
            (torch.randn(3, 5), torch.randn(4, 5), None, "cpu"),
        ],
        "matmul": [
            (torch.randn(3, 5), torch.randn(4, 5).T, "cpu"),
            (torch.randn(2, 3, 5).half(), torch.randn(2, 5, 4).half(), "cpu"),
        ],
    }
