"""The torch.library namespace that every op registers in: opaque to torch.compile, with fakes for its shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("minirl_kernels", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define `minirl_kernels::<schema>` for tensors of any device and return the callable op."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minirl_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.minirl_kernels, name).default
