"""Inputs for the models with this library's functions."""

import pytest
import torch
from causal_models import V


@pytest.fixture
def ids():
    """(input_ids, token_ids), [3, 7]: a prompt of two tokens is not scored, nor is the last position."""
    input_ids = torch.randint(3, V, (3, 7), generator=torch.Generator().manual_seed(1))
    token_ids = input_ids.roll(-1, 1)
    token_ids[:, 0] = token_ids[:, -1] = -100
    return input_ids, token_ids


@pytest.fixture
def policy_loss():
    """Arguments of a policy loss without its log-probabilities."""
    old_log_probs = -3 - torch.rand(3, 7, generator=torch.Generator().manual_seed(2))
    return {
        "old_log_probs": old_log_probs,
        "rollout_log_probs": old_log_probs + 0.1,
        "advantages": torch.tensor([1.0, -0.5, 0.75]),
        "loss_mask": None,
    }
