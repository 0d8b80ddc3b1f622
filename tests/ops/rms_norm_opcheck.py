"""Arguments for opcheck of rms_norm's ops."""

import torch


def op_arguments():
    x, half = torch.randn(2, 3, 7), torch.randn(3, 5).half()
    gradients = [(torch.randn(7), (True, True)), (None, (True, False)), (torch.randn(7), (False, True))]
    return {
        "rms_norm": [(x, torch.randn(7), 1e-6, "cpu"), (half, None, 0.0, "cpu")],
        "rms_norm_backward": [(x, x + 1, weight, torch.ones(2, 3, 1), *wanted, "cpu") for weight, wanted in gradients],
    }
