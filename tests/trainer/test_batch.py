"""The shift by one position, and the split of responses into mini-batches."""

import pytest
import torch
from minirl.batch import IGNORED, Batch, next_token_targets, shift_left
from minirl.rollout import Rollouts


@pytest.fixture
def rollouts():
    """Three prompts of 1, 3 and 2 tokens, two responses each; token ids count all tokens."""
    prompts = [[1], [2, 3, 4], [5, 6]]
    responses = [[10], [11, 12, 13], [14, 15], [16], [17, 18, 19, 20], [21]]
    log_probs = [[-token / 8 for token in response] for response in responses]
    reasons = ["stop", "length", "stop", "stop", "stop", "length"]
    return Rollouts.collate(prompts, responses, log_probs, reasons, pad_token_id=0)


def test_collate(rollouts):
    assert rollouts.token_ids.tolist() == [
        [1, 10, 0, 0, 0, 0],
        [1, 11, 12, 13, 0, 0],
        [2, 3, 4, 14, 15, 0],
        [2, 3, 4, 16, 0, 0],
        [5, 6, 17, 18, 19, 20],
        [5, 6, 21, 0, 0, 0],
    ]
    assert torch.equal(rollouts.attention_mask, rollouts.token_ids != 0)
    assert torch.equal(rollouts.response_mask, rollouts.token_ids >= 10)
    assert torch.equal(rollouts.rollout_log_probs, torch.where(rollouts.response_mask, -rollouts.token_ids / 8, 0.0))
    assert rollouts.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert rollouts.responses() == [[10], [11, 12, 13], [14, 15], [16], [17, 18, 19, 20], [21]]


def test_next_token_targets_against_a_loop(rollouts):
    token_ids, loss_mask = next_token_targets(rollouts.token_ids, rollouts.response_mask)
    for row in range(token_ids.shape[0]):
        for position in range(token_ids.shape[1]):
            is_scored = position + 1 < token_ids.shape[1] and bool(rollouts.response_mask[row, position + 1])
            assert loss_mask[row, position] == is_scored
            expected = rollouts.token_ids[row, position + 1] if is_scored else IGNORED
            assert token_ids[row, position] == expected


def test_shift_keeps_dtype():
    assert torch.equal(shift_left(torch.tensor([[1.5, 2.5]]), 0.0), torch.tensor([[2.5, 0.0]]))
    assert shift_left(torch.tensor([[True, False]]), False).dtype == torch.bool


def test_log_probs_move_with_their_tokens(rollouts):
    batch = Batch.from_rollouts(rollouts, torch.arange(6.0))
    assert torch.equal(batch.rollout_log_probs, torch.where(batch.loss_mask, -batch.token_ids / 8, 0.0))
    assert batch.loss_mask.sum() == rollouts.response_mask.sum()


def test_minibatches_hold_whole_groups(rollouts):
    minibatches = list(Batch.from_rollouts(rollouts, torch.arange(6.0)).split(2))
    assert [part.group_ids.tolist() for part in minibatches] == [[0, 0], [1, 1], [2, 2]]
    assert torch.cat([part.advantages for part in minibatches]).tolist() == list(range(6))


def test_micro_batches_are_as_long_as_they_must_be(rollouts):
    batch = Batch.from_rollouts(rollouts, torch.arange(6.0))
    micro_batches = list(batch.micro_batches(4, torch.device("cpu")))
    assert [tuple(part.input_ids.shape) for part in micro_batches] == [(4, 5), (2, 6)]
    assert sum(int(part.loss_mask.sum()) for part in micro_batches) == int(batch.loss_mask.sum())
    assert micro_batches[0].old_log_probs is None
