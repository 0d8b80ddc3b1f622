"""SamplingMask made from the records of engines and trainers, its layouts, and invalid arguments."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minirl_kernels import SamplingMask

SETS = [[3, 1, 5], [], [7], [0, 9]]


def sets_of(mask):
    """The sets of the flattened positions, as lists."""
    offsets = mask.offsets.tolist()
    return [mask.token_ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]


def ordered(sets):
    return [sorted(one) for one in sets]


def test_sets_in_compressed_rows():
    mask = SamplingMask.from_sets(SETS)
    assert mask.token_ids.tolist() == [1, 3, 5, 7, 0, 9]
    assert mask.offsets.tolist() == [0, 3, 3, 4, 6]
    assert mask.counts.tolist() == [3, 0, 1, 2]
    assert mask.shape == (4,)
    assert {mask.token_ids.dtype, mask.offsets.dtype, mask.counts.dtype} == {torch.int32}


def test_none_and_an_empty_list_are_the_whole_vocabulary():
    """SGLang uses None for a token without a mask, and prime-rl a count of 0."""
    expected = sets_of(SamplingMask.from_sets(SETS))
    assert sets_of(SamplingMask.from_sets([one if one else None for one in SETS])) == expected
    ids = np.array([token for one in SETS for token in one], np.int32)
    counts = np.array([len(one) for one in SETS], np.int32)
    assert sets_of(SamplingMask.from_counts(ids, counts)) == expected
    assert sets_of(SamplingMask.from_counts(torch.from_numpy(ids), torch.from_numpy(counts))) == expected


def test_nothing_recorded():
    for mask in (
        SamplingMask.from_sets([]),
        SamplingMask.from_sets([], num_positions=3),
        SamplingMask.from_sets(SETS)[:0],
    ):
        assert not mask.token_ids.numel()
        assert mask.counts.tolist() == [0] * mask.shape[0]


@pytest.mark.parametrize("flat", [False, True])
def test_vllm_has_a_set_for_each_generated_token(flat):
    """With a prompt of 3 tokens, the logits at the prompt's last token score the first of 4 generated tokens."""
    output = SimpleNamespace(token_ids=SETS)
    if flat:
        output = SimpleNamespace(token_ids=[3, 1, 5, 7, 0, 9], offsets=[0, 3, 3, 4, 6])
    prompt, response = [11, 12, 13], [5, 2, 7, 9]
    sequence = torch.tensor(prompt + response)
    mask = SamplingMask.from_vllm(output, num_positions=len(sequence), first_position=len(prompt) - 1)
    scored = torch.cat([sequence[1:], torch.tensor([-100])])
    assert sets_of(mask) == [[], [], [1, 3, 5], [], [7], [0, 9], []]
    for token, one in zip(scored.tolist(), sets_of(mask), strict=True):
        assert not one or token in one
    assert sets_of(SamplingMask.from_vllm(output)) == ordered(SETS)


def test_padded_ids_and_counts():
    ids = torch.tensor([[[3, 1, 5], [-1, -1, -1]], [[7, 7, 7], [9, 0, 4]]])
    mask = SamplingMask.from_padded(ids, torch.tensor([[3, 0], [1, 2]]))
    assert mask.shape == (2, 2)
    assert sets_of(mask) == ordered(SETS)
    assert sets_of(SamplingMask.from_padded(ids.flatten(0, 1), torch.tensor([3, 0, 1, 2]))) == ordered(SETS)


def test_sequences_are_packed_and_padded():
    a, b = SamplingMask.from_sets(SETS[:1]), SamplingMask.from_sets(SETS[1:])
    assert sets_of(SamplingMask.pack([a, b])) == ordered(SETS)
    right, left = SamplingMask.pad([a, b], 4), SamplingMask.pad([a, b], side="left")
    assert (right.shape, left.shape) == ((2, 4), (2, 3))
    assert sets_of(right) == ordered([SETS[0], [], [], [], *SETS[1:], []])
    assert sets_of(left) == ordered([[], [], SETS[0], *SETS[1:]])


def test_a_part_of_a_mini_batch():
    mask = SamplingMask.pad([SamplingMask.from_sets(SETS), SamplingMask.from_sets(SETS[:2])])
    rows = [[sorted(one) for one in SETS], [*ordered(SETS[:2]), [], []]]
    for index, expected in (
        (slice(1, 2), rows[1:]),
        (torch.tensor([1, 0, 1]), [rows[1], rows[0], rows[1]]),
        (torch.tensor([True, False]), rows[:1]),
        ((slice(None), slice(None, 3)), [row[:3] for row in rows]),
        ((slice(None), torch.tensor([3, 0])), [[row[3], row[0]] for row in rows]),
    ):
        part = mask[index]
        assert part.shape == (len(expected), len(expected[0]))
        assert sets_of(part) == [one for row in expected for one in row]
    assert sets_of(mask[0]) == rows[0]
    assert sets_of(SamplingMask.from_sets(SETS)[torch.tensor([3, 0])]) == [[0, 9], [1, 3, 5]]


def test_to_a_device():
    mask = SamplingMask.from_counts(torch.arange(4), torch.tensor([[1, 3]])).to("cpu")
    assert mask.device == torch.device("cpu")
    moved = mask.to("meta", non_blocking=True)
    assert (moved.device.type, moved.shape) == ("meta", (1, 2))


INTS = torch.arange(4, dtype=torch.int32)
OFFSETS = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SamplingMask(INTS.long(), OFFSETS), TypeError, r"^token_ids has dtype torch.int64: .*must be int32"),
        (lambda: SamplingMask(INTS[None], OFFSETS), ValueError, r"^token_ids has shape \(1, 4\): .*one dimension"),
        (lambda: SamplingMask([1], OFFSETS), TypeError, "^token_ids is a list: it must be a tensor"),
        (lambda: SamplingMask(INTS, OFFSETS[:0]), ValueError, "^offsets is empty"),
        (lambda: SamplingMask(INTS, OFFSETS.to("meta")), ValueError, "^offsets is on meta: it must be on cpu"),
        (lambda: SamplingMask(INTS, OFFSETS, (2,)), ValueError, r"^shape is \(2,\): it must be \(1,\), or"),
        (lambda: SamplingMask(INTS, OFFSETS - 1), ValueError, "^offsets goes from -1 to 3: it must go from 0 to 4"),
        (
            lambda: SamplingMask(INTS, INTS[[0, 3, 1, 3]] * 4 // 3),
            ValueError,
            "^offsets goes from 0 to 4: .*never down",
        ),
        (lambda: SamplingMask(INTS - 1, OFFSETS), ValueError, "^token_ids has the id -1 at position 0"),
        (lambda: SamplingMask(INTS.flip(0), OFFSETS), ValueError, "^token_ids has the id 2 after 3 at position 0"),
        (lambda: SamplingMask.from_sets([[1], [2, 8, 2]]), ValueError, "^token_ids has the id 2 twice at position 1"),
        (lambda: SamplingMask.from_sets([[1], [2, -8]]), ValueError, "^token_ids has the id -8 at position 1"),
        (lambda: SamplingMask.from_sets([[2**31]]), ValueError, r"^token_ids has the id 2147483648: .*below 2\*\*31"),
        (
            lambda: SamplingMask.from_sets(SETS, num_positions=5, first_position=2),
            ValueError,
            "^sampling_mask has 4 sets from position 2 on: they must fit into 5 positions",
        ),
        (
            lambda: SamplingMask.from_sets(SETS, first_position=-1),
            ValueError,
            "^sampling_mask has 4 sets from position -1",
        ),
        (lambda: SamplingMask.from_sets([[1], 2]), TypeError, r"^sampling_mask\[1\] is a int: .*list of token ids"),
        (
            lambda: SamplingMask.from_vllm(None),
            TypeError,
            "^sampling_mask is a NoneType: .*return_sampling_mask=True",
        ),
        (
            lambda: SamplingMask.from_vllm(SimpleNamespace(token_ids=[1, 2, 3], offsets=[0, 2])),
            ValueError,
            r"^sampling_mask.offsets is \[0, 2\]: it must go from 0 to the 3 of token_ids",
        ),
        (lambda: SamplingMask.from_counts(INTS, INTS), ValueError, "^counts has the smallest value 0 and the sum 6"),
        (
            lambda: SamplingMask.from_counts(INTS, torch.tensor([5, -1])),
            ValueError,
            "^counts has the smallest value -1",
        ),
        (lambda: SamplingMask.from_counts(INTS.float(), INTS), TypeError, "^token_ids has dtype torch.float32"),
        (lambda: SamplingMask.from_counts(INTS[None], INTS), ValueError, r"^token_ids has shape \(1, 4\)"),
        (lambda: SamplingMask.from_counts(INTS, INTS[0]), ValueError, r"^counts has shape \(\)"),
        (lambda: SamplingMask.from_padded(INTS, INTS), ValueError, r"^token_ids has shape \(4,\)"),
        (lambda: SamplingMask.from_padded(INTS[:, None], INTS[:2]), ValueError, r"^counts has shape \(2,\): .*\(4,\)"),
        (lambda: SamplingMask.from_padded(INTS[:, None], INTS), ValueError, "^counts has the value 3: .*at most 1, K"),
        (lambda: SamplingMask.pad([]), ValueError, "^sequences is empty"),
        (
            lambda: SamplingMask.pad([SamplingMask.from_sets(SETS)], 3),
            ValueError,
            "^length is 3: it must be at least 4, the length of the longest sequence",
        ),
        (lambda: SamplingMask.pad([SamplingMask.from_sets(SETS)], side="up"), ValueError, "^side is 'up'"),
        (
            lambda: SamplingMask.pack([SamplingMask.from_counts(INTS, torch.tensor([[4]]))]),
            ValueError,
            r"^sequences\[0\] has shape \(1, 1\)",
        ),
        (lambda: SamplingMask.from_sets(SETS)[1], IndexError, "^SamplingMask was given 1, which leaves no dimension"),
        (lambda: SamplingMask.from_sets(SETS)[:, 0], IndexError, "^SamplingMask was given 2 indices: it has 1"),
    ],
)
def test_what_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_page_runs_as_it_stands():
    page = (Path(__file__).resolve().parents[1] / "docs" / "sampling_mask.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/sampling_mask.md", "exec"), {})
