"""What the training engine says of sampled responses."""

import torch
from minirl.batch import next_token_targets, shift_left
from minirl.models import autocast


@torch.no_grad()
def differences(model, rollouts, dtype="float32", temperature=1.0):
    """log pi of the trainer minus log mu of the engine, of each sampled token."""
    token_ids, mask = next_token_targets(rollouts.token_ids, rollouts.response_mask)
    with autocast(model.device, dtype):
        log_probs = model(
            rollouts.token_ids, attention_mask=rollouts.attention_mask, token_ids=token_ids, temperature=temperature
        ).log_probs
    return (log_probs - shift_left(rollouts.rollout_log_probs, 0.0))[mask]
