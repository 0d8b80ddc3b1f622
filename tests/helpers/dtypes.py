"""The dtypes of every op."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
