"""Log-probabilities over the tokens that the sampler kept: float64 accuracy, bits, gradients and invalid masks."""

import math

import pytest
import torch
from dtypes import DTYPES
from equations import upstream
from kept_cases import check_token_logprobs, forward_backward, mask_of, random_mask, random_sets
from policy_batches import random_rows

from minirl_kernels import SamplingMask, token_logprobs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 1025, 4097])
def test_values_and_gradients(vocab_size, dtype, backend):
    check_token_logprobs(*random_rows((10,), vocab_size, dtype), backend)


@pytest.mark.parametrize("temperature", [0.3, torch.linspace(0.2, 3, 10)], ids=["one", "each"])
def test_temperature(temperature, backend):
    check_token_logprobs(*random_rows((10,), 1025), backend, temperature)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_a_padded_batch_by_its_strides(ids_dtype, backend):
    buffer, _ = random_rows((3, 6), 96)
    for logits in (buffer[:, 1:, :90], buffer.transpose(0, 1)[1:, :, 3:80], buffer[:, ::2]):
        token_ids = torch.arange(logits.shape[:-1].numel()).view(logits.shape[:-1]).to(ids_dtype)
        token_ids[:, 1] = -100
        check_token_logprobs(logits, token_ids, backend)


def test_the_sampled_token_alone_was_kept(backend):
    """A set of one token has log-probability, entropy and gradient 0 for any logit."""
    logits, token_ids = random_rows((4,), 300)
    results = forward_backward(logits, token_ids, SamplingMask.from_sets([[t] for t in token_ids.tolist()]), backend)
    for values in results:
        assert not values.any()


def test_a_set_of_all_tokens_or_none_changes_no_bit(backend):
    logits, token_ids = random_rows((6,), 300)
    expected = forward_backward(logits, token_ids, None, backend)
    for sets in ([None] * 6, [list(range(300))] * 6):
        ours = forward_backward(logits, token_ids, SamplingMask.from_sets(sets), backend)
        assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_position_depend_on_its_own_set_alone(dtype, cpu, threads):
    """Other positions' sets, the order of a set's tokens and the number of threads do not change the bits."""
    logits, token_ids = random_rows((60,), 5000, dtype)
    sets = random_sets(token_ids, 5000)
    threads(1)
    together = forward_backward(logits, token_ids, SamplingMask.from_sets(sets), cpu)
    threads(2)
    reordered = SamplingMask.from_sets([one and one[::-1] for one in sets])
    assert all(map(torch.equal, forward_backward(logits, token_ids, reordered, cpu), together))
    for rows in (slice(0, 1), slice(2, 7), slice(59, 60)):
        alone = [token_logprobs(logits[rows], token_ids[rows], kept=SamplingMask.from_sets(sets[rows]), backend=cpu)]
        assert torch.equal(alone[0], together[0][rows])
    wider = [None if number % 7 else one for number, one in enumerate(sets)]
    others = forward_backward(logits, token_ids, SamplingMask.from_sets(wider), cpu)
    assert all(torch.equal(a[::7], b[::7]) for a, b in zip(others, together, strict=True))


def test_bits_are_those_of_every_instruction_set(set_isa):
    logits, token_ids = random_rows((10,), 999)
    kept = random_mask(token_ids, 999)
    results = []
    for isa in ("baseline", "avx2", "avx512"):
        try:
            set_isa(isa)
        except ValueError:
            continue
        results.append(forward_backward(logits, token_ids, kept, "cpu"))
    assert all(all(map(torch.equal, ours, results[0])) for ours in results)


def test_whatever_was_not_kept_is_not_looked_at(backend):
    """Logits outside of the set may have any value, also NaN and infinity."""
    logits, token_ids = random_rows((10,), 200)
    sets = [one or list(range(200)) for one in random_sets(token_ids, 200)]
    kept = SamplingMask.from_sets(sets)
    expected = forward_backward(logits, token_ids, kept, backend)
    for garbage in (math.nan, math.inf, -math.inf):
        spoilt = torch.full_like(logits, garbage)
        for row, one in enumerate(sets):
            spoilt[row, one] = logits[row, one]
        assert all(map(torch.equal, forward_backward(spoilt, token_ids, kept, backend), expected))


def test_kept_logits_that_are_all_minus_infinity(backend):
    """A position without a finite kept logit has no distribution: NaN at that position only."""
    logits, token_ids = random_rows((3,), 50)
    sets = [[int(token), (int(token) + 1) % 50] for token in token_ids]
    expected = forward_backward(logits, token_ids, SamplingMask.from_sets(sets), backend)
    logits[1, sets[1]] = -math.inf
    ours = forward_backward(logits, token_ids, SamplingMask.from_sets(sets), backend)
    for values, others in zip(ours, expected, strict=True):
        assert values[1].isnan().any()
        assert torch.equal(values[[0, 2]], others[[0, 2]])
    logits[1, sets[1][0]] = 1.0
    log_probs, entropy, _ = forward_backward(logits, token_ids, SamplingMask.from_sets(sets), backend)
    assert log_probs[1] == entropy[1] == 0


def test_ignored_tokens_are_zero_whatever_their_set(backend):
    logits, token_ids = random_rows((10,), 40)
    token_ids[::3] = -100
    logits[::3] = math.nan
    for values in forward_backward(logits, token_ids, random_mask(token_ids, 40), backend):
        assert not values[::3].any()
        assert values.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_zero_tokens(shape, backend):
    token_ids = torch.zeros(shape, dtype=torch.int64)
    kept = mask_of([], shape)
    results = forward_backward(torch.zeros(*shape, 7), token_ids, kept, backend)
    assert [tuple(values.shape) for values in results] == [shape, shape, (*shape, 7)]


def test_a_second_backward(backend):
    logits, token_ids = random_rows((5,), 30)
    leaf = logits.requires_grad_()
    outs = token_logprobs(leaf, token_ids, kept=random_mask(token_ids, 30), with_entropy=True, backend=backend)
    first, second = (torch.autograd.grad(outs, leaf, upstream(token_ids), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(leaf.detach(), random_rows((5,), 30)[0])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler, backend):
    """One graph serves masks of any size. An invalid mask raises in compiled code too."""
    torch.compiler.reset()
    logits, token_ids = random_rows((10,), 21)

    def call(logits, token_ids, kept):
        log_probs, entropy = token_logprobs(logits * 1, token_ids, kept=kept, with_entropy=True, backend=backend)
        return 2 * log_probs.sum() - entropy.sum()

    compiled = torch.compile(call, fullgraph=True, backend=compiler, dynamic=True)
    for seed in range(3):
        kept = random_mask(token_ids, 21, seed)[: 10 - seed]
        results = []
        for f in (compiled, call):
            leaf = logits[: 10 - seed].clone().requires_grad_()
            results.append(torch.autograd.grad(f(leaf, token_ids[: 10 - seed], kept), leaf)[0])
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="token_ids has the id 3 at row 0"):
        compiled(logits, torch.full_like(token_ids, 3), SamplingMask.from_sets([[4], *[None] * 9]))


def test_under_autocast(backend):
    logits, token_ids = random_rows((5,), 30)
    kept = random_mask(token_ids, 30)
    expected = forward_backward(logits, token_ids, kept, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = forward_backward(logits, token_ids, kept, backend)
    assert all(map(torch.equal, ours, expected))


LOGITS, IDS = torch.zeros(2, 3, 7), torch.tensor([[0, 1, 2], [3, -100, 5]])
FLAT_SETS = [[0, 6], [1], None, [3], [4], None]


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        (mask_of([[0, 6], [0, 2, 3], None, [3], [4], None], (2, 3)), ValueError,
         r"^token_ids has the id 1 at row 1, which is not among the 3 tokens that kept has there \(0, 2, 3\)"),
        (mask_of([[0, 7], [1], None, [3], [4], None], (2, 3)), ValueError,
         "^kept has the id 7 at row 0: an id must be below 7"),
        (mask_of([[0], [1], None, [3], [900], None], (2, 3)), ValueError, "^kept has the id 900 at row 4"),
        (SamplingMask.from_sets(FLAT_SETS), ValueError, r"^kept has the shape \(6,\): it must be \(2, 3\)"),
        (mask_of(FLAT_SETS, (2, 3)).to("meta"), ValueError, "^kept is on meta: it must be on cpu"),
        (FLAT_SETS, TypeError, "^kept is a list: it must be a SamplingMask, or None"),
    ],
    ids=["not its own", "too large", "of an ignored token", "shape", "device", "no mask"],
)  # fmt: skip
def test_a_mask_that_cannot_be_of_these_tokens(kept, error, message, check, backend):
    with pytest.raises(error, match=message):
        token_logprobs(LOGITS, IDS, kept=kept, check=check, backend=backend)


def test_an_id_out_of_range_is_told_as_ever(backend):
    ids = IDS.clone()
    ids[0, 2] = 7
    with pytest.raises(ValueError, match=r"^token_ids has the id 7 at row 2: an id must be in \[0, 7\)"):
        token_logprobs(LOGITS, ids, kept=mask_of(FLAT_SETS, (2, 3)), backend=backend)


def nucleus(logits, top_p):
    """The tokens of each row that top-p sampling keeps: the most likely ones, until their mass reaches top_p."""
    probs, order = torch.softmax(logits, -1).sort(-1, descending=True)
    before = probs.cumsum(-1) - probs
    return [ids[mass < top_p].tolist() for ids, mass in zip(order, before, strict=True)]


def test_ratios_of_a_top_p_rollout_are_1_on_policy(backend):
    """Without the sets, each ratio is the kept mass: the trainer's probability is that fraction of the sampler's."""
    logits, _ = random_rows((200,), 50)
    sets = nucleus(logits.double(), 0.8)
    keep = torch.zeros(200, 50, dtype=torch.bool)
    for row, one in enumerate(sets):
        keep[row, one] = True
    processed = torch.log_softmax(logits.double().masked_fill(~keep, -torch.inf), -1)
    token_ids = torch.multinomial(processed.exp(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    rollout_log_probs = processed.gather(-1, token_ids[:, None])[:, 0]
    ours = token_logprobs(logits, token_ids, kept=SamplingMask.from_sets(sets), backend=backend)
    torch.testing.assert_close((ours - rollout_log_probs).exp(), torch.ones(200).double(), rtol=0, atol=1e-5)
    whole = token_logprobs(logits, token_ids, backend=backend)
    kept_mass = (torch.softmax(logits.double(), -1) * keep).sum(-1)
    assert kept_mass.mean() < 0.95
    torch.testing.assert_close((whole - rollout_log_probs).exp(), kept_mass, rtol=0, atol=1e-5)
