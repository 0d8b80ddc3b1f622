"""group_advantages against a loop over the groups."""

import math
import statistics

import pytest
import torch

from minirl_kernels import group_advantages


def by_loop(rewards, group_ids, norm_by_std=False):
    out = []
    for reward, group in zip(rewards, group_ids, strict=True):
        members = [r for r, g in zip(rewards, group_ids, strict=True) if g == group]
        advantage = reward - math.fsum(members) / len(members)
        if norm_by_std:
            std = statistics.stdev(members)
            advantage = advantage / std if std else 0.0
        out.append(advantage)
    return out


REWARDS = [0.1, 1.0, 0.7, -2.5, 0.3, 1e-3, 4.0, 0.1, 0.9, 0.1]
GROUPS = [7, -3, 7, 0, -3, 0, 7, 0, 0, 7]  # interleaved, of sizes 4, 2 and 4


@pytest.mark.parametrize("norm_by_std", [False, True])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_a_loop(dtype, ids_dtype, norm_by_std):
    rewards = torch.tensor(REWARDS, dtype=dtype)
    advantages = group_advantages(rewards, torch.tensor(GROUPS, dtype=ids_dtype), norm_by_std=norm_by_std)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx(by_loop(rewards.tolist(), GROUPS, norm_by_std), rel=1e-6, abs=1e-9)


def test_the_mean_includes_the_response_itself():
    """Without the response itself in the mean, the advantages would be 1 and -0.5."""
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.int64))
    assert advantages.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("norm_by_std", [False, True])
@pytest.mark.parametrize("size", [2, 3, 7, 10, 1000])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7, 1e-30, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(reward, size, norm_by_std, dtype):
    """The floating-point mean of ten times 0.1 is not 0.1. Another group is in the batch."""
    rewards = torch.tensor([reward, 1.0, 0.0] + [reward] * (size - 1), dtype=dtype)
    group_ids = torch.tensor([1, 2, 2] + [1] * (size - 1))
    advantages = group_advantages(rewards, group_ids, norm_by_std=norm_by_std)
    assert torch.equal(advantages[group_ids == 1], torch.zeros(size))
    assert advantages[1] > 0 > advantages[2]


def test_a_group_does_not_depend_on_the_others():
    gen = torch.Generator().manual_seed(0)
    rewards = torch.randn(5000, generator=gen)
    group_ids = torch.randint(3, (5000,), generator=gen)
    together = group_advantages(rewards, group_ids, norm_by_std=True)
    for group in range(3):
        members = group_ids == group
        assert torch.equal(together[members], group_advantages(rewards[members], group_ids[members], norm_by_std=True))


def test_no_responses():
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_rewards_carry_no_gradient():
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not group_advantages(rewards, torch.zeros(2, dtype=torch.int64)).requires_grad


IDS = torch.tensor([0, 0, 1, 1])
ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("rewards", "group_ids", "error", "named", "was", "must_be"),
    [
        (ONES, torch.tensor([5, 5, 5, 8]), ValueError, "group_ids", "one response in group 8", "at least 2"),
        (torch.tensor([1, math.nan, 0, 0]), IDS, ValueError, "rewards", "nan", "finite"),
        (torch.tensor([1, 0, -math.inf, 0]), IDS, ValueError, "rewards", "-inf", "finite"),
        (ONES.long(), IDS, TypeError, "rewards", "torch.int64", "floats"),
        (ONES[None], IDS, TypeError, "rewards", r"\(1, 4\)", r"\[B\]"),
        ([1.0, 0.0], IDS, TypeError, "rewards", "list", "a tensor"),
        (ONES, IDS.float(), TypeError, "group_ids", "torch.float32", "integers"),
        (ONES, IDS > 0, TypeError, "group_ids", "torch.bool", "integers"),
        (ONES, IDS.tolist(), TypeError, "group_ids", "list", "a tensor"),
        (ONES, IDS[:3], ValueError, "group_ids", r"\(3,\)", r"\(4,\)"),
        (ONES, IDS.to("meta"), ValueError, "group_ids", "meta", "cpu"),
    ],
)
def test_bad_input(rewards, group_ids, error, named, was, must_be):
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        group_advantages(rewards, group_ids)
