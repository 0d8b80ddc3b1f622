"""Checks that the bits of a row depend on that row only, and data whose sums show any change of order."""

import torch

from minirl_kernels.backends import native

MOST_ROWS = 257


def cancelling(rows, size, dtype=torch.float32, seed=0):
    """[rows, size] of pairs +-v in a random order, where v covers many powers of two.

    The exact sum of a row is 0. In float32 nearly every order of summation gives another result.
    """
    gen = torch.Generator().manual_seed(seed)
    spread = torch.randint(-8, 9, (rows, size // 2), generator=gen)
    half = torch.ldexp(torch.randn(rows, size // 2, generator=gen), spread).to(dtype)
    out = torch.zeros(rows, size, dtype=dtype)
    out[:, : size // 2 * 2] = torch.cat([half, -half], 1)
    return out.gather(1, torch.rand(rows, size, generator=gen).argsort(1))


def sum_by_lanes(terms, lanes):
    """Row sums of float32 terms [rows, n], where n is a multiple of `lanes`.

    Each lane adds its terms in order, and then the lanes are added in order.
    """
    partial = torch.zeros(len(terms), lanes)
    for part in terms.split(lanes, 1):
        partial += part
    total = torch.zeros(len(terms))
    for lane in partial.unbind(1):
        total += lane
    return total


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def check_batches(call, *rows, sizes=range(1, MOST_ROWS + 1)):
    """call(*rows) gives each row the same results in batches of every size and at any place in them."""
    together, count = call(*rows), len(rows[0])
    for size in sizes:
        start = (7 * size) % (count - size + 1)
        part = slice(start, start + size)
        assert_same(call(*(x[part] for x in rows)), [values[part] for values in together])


def check_layouts(call, *rows):
    """Rows in another order, with other strides and at other addresses have the same results."""
    together = call(*rows)
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(0))
    assert_same(call(*(x[order] for x in rows)), [values[order] for values in together])
    for padding, offset in ((1, 1), (16, 3), (0, 7)):
        assert_same(call(*(strided(x, padding, offset) for x in rows)), together)


def strided(x, padding, offset=0):
    """A copy of the rows with `padding` elements between two rows, which starts `offset` elements into its memory."""
    rows, size = x.shape
    storage = torch.full((rows * (size + padding) + offset,), 7.0, dtype=x.dtype, device=x.device)
    view = storage.as_strided((rows, size), (size + padding, 1), offset)
    return view.copy_(x)


def check_threads(call, *rows, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(call(*rows))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def check_tables(call, *rows, set_isa):
    """All instruction sets of this machine give the same results."""
    results = []
    for isa in native().isa_supported():
        set_isa(isa)
        results.append(call(*rows))
    for result in results[1:]:
        assert_same(result, results[0])
