"""Launches of kernels, prepared once for each layout of their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .alignment import is_aligned
from .config import LaunchConfig, Threads

LIMIT = 4096
"""Number of launches that are kept per kernel. Packed batches have other sizes in each step."""


class Launch(NamedTuple):
    """kernel[grid](*tensors, *values, **constants), without the tensors.

    constants: the kernel's last parameters in their order, and the options of Triton.
    """

    kernel: Any
    grid: tuple[int, ...]
    values: tuple[float | int | None, ...]
    constants: dict[str, Any]


class prepared:
    """Makes prepare(*tensors, **options) -> Launch a function that launches.

    `prepare` runs once for each layout of the tensors and each choice of the options, because its arithmetic and
    Triton's choice of the binary take longer than the launch. So the Launch must be a function of layouts and options.

    tensors: the first parameters of the kernel, in their order; None for a tensor that is left out.
    options: any that are hashable.
    """

    def __init__(self, prepare: Callable[..., Launch]):
        functools.update_wrapper(self, prepare)
        self.prepare = prepare
        self._known: dict[tuple, tuple[Callable, tuple, int]] = {}

    def __call__(self, *tensors: Tensor | None, **options) -> None:
        # all that a launch may depend on; an address counts for its alignment alone
        layouts = [x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15) for x in tensors]
        key = (*layouts, *options.items())
        known = self._known.get(key)
        if known is None:
            launch, compiled = self.launch(tensors, options)
            if compiled is not None:
                self._keep(key, tensors, launch, compiled)
            return
        run, rest, first = known
        with torch.cuda.device_of(tensors[first]):
            run(*tensors, *rest)

    def launch(self, tensors: tuple[Tensor | None, ...], options: dict) -> tuple[Launch, Any]:
        """Prepare, and launch by Triton. Returns (launch, the compiled kernel). Triton's interpreter compiles none."""
        launch = self.prepare(*tensors, **options)
        if 0 in launch.grid:
            return launch, None
        with torch.cuda.device_of(tensors[_first(tensors)]):
            return launch, launch.kernel[launch.grid](*tensors, *launch.values, **launch.constants)

    def _keep(self, key: tuple, tensors: tuple, launch: Launch, compiled: Any) -> None:
        if len(self._known) == LIMIT:
            self._known.clear()
        names = launch.kernel.arg_names[len(tensors) + len(launch.values) :]
        rest = (*launch.values, *(launch.constants[name] for name in names))
        self._known[key] = compiled[(*launch.grid, 1, 1)[:3]], rest, _first(tensors)


def _first(tensors: tuple[Tensor | None, ...]) -> int:
    """The index of the first tensor that is not None."""
    return next(i for i, x in enumerate(tensors) if x is not None)


def over_rows(
    kernel: Any, grid: tuple[int, ...], *values, config: LaunchConfig, rows: tuple[Tensor, ...], **constants
) -> Launch:
    """The launch of a kernel over tiles of `rows`, which are tensors of one shape [..., V].

    It uses 128-bit accesses if all of the rows are aligned. A kernel with sums gets rows that went through `aligned`.
    """
    wide = all(is_aligned(x, config.vec) for x in rows)
    tile = {"LANES": config.lanes, "VEC": config.vec, "ALIGN": config.vec if wide else 1}
    return Launch(kernel, grid, values, {**constants, **tile, "num_warps": config.num_warps})


def prepared_over_blocks(kernel: Any, block: int, config: Threads) -> prepared:
    """A function that launches `kernel` over blocks of `block` elements, with the threads of `config`.

    It takes the tensors, the number of programs, the values and the other constants.
    """

    def prepare(*tensors: Tensor | None, programs: int, values: tuple, **constants) -> Launch:
        return Launch(kernel, (programs,), values, {**constants, "BLOCK": block, "num_warps": config.num_warps})

    return prepared(prepare)
