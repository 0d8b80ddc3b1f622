"""Whether the bits of a row are its own, asked of any call over rows; and data whose sums show any change of order."""

import torch

from minirl_kernels.backends import native

MOST_ROWS = 257


def cancelling(rows, size, dtype=torch.float32, seed=0):
    """[rows, size] of +-v in a random order, v over many powers of two: a row's exact sum is 0, and in float32 nearly
    every order of adding it up leaves something else."""
    gen = torch.Generator().manual_seed(seed)
    spread = torch.randint(-8, 9, (rows, size // 2), generator=gen)
    half = torch.ldexp(torch.randn(rows, size // 2, generator=gen), spread).to(dtype)
    out = torch.zeros(rows, size, dtype=dtype)
    out[:, : size // 2 * 2] = torch.cat([half, -half], 1)
    return out.gather(1, torch.rand(rows, size, generator=gen).argsort(1))


def sum_by_lanes(terms, lanes):
    """Of each row [rows, n], float32: `lanes` partial sums, each in order, then these in order; n a multiple of it."""
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
    """call(*rows) gives results by row, and each row the same in batches of every size, wherever it is in them."""
    together, count = call(*rows), len(rows[0])
    for size in sizes:
        start = (7 * size) % (count - size + 1)
        part = slice(start, start + size)
        assert_same(call(*(x[part] for x in rows)), [values[part] for values in together])


def check_layouts(call, *rows):
    """In another order, with other strides, at other addresses."""
    together = call(*rows)
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(0))
    assert_same(call(*(x[order] for x in rows)), [values[order] for values in together])
    for padding, offset in ((1, 1), (16, 3), (0, 7)):
        assert_same(call(*(strided(x, padding, offset) for x in rows)), together)


def strided(x, padding, offset=0):
    """The same rows `padding` elements apart, `offset` from the start of their memory."""
    rows, size = x.shape
    storage = torch.full((rows * (size + padding) + offset,), 7.0, dtype=x.dtype)
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
    """On every instruction set that runs here."""
    results = []
    for isa in native().isa_supported():
        set_isa(isa)
        results.append(call(*rows))
    for result in results[1:]:
        assert_same(result, results[0])
