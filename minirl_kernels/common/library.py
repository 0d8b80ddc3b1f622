"""The torch.library namespace that every op registers in: opaque to torch.compile, with fakes for its shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("minirl_kernels", "DEF")


def register(schema: str, implementation: Callable, fake: Callable, *, waits: bool = False) -> Callable:
    """Define `minirl_kernels::<schema>` for tensors of any device and return the callable op.

    waits: the host waits for the device in it, so that no CUDA graph can hold it.
    """
    name = schema.partition("(")[0]
    tags = (torch.Tag.needs_exact_strides, *([torch.Tag.cudagraph_unsafe] if waits else []))
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minirl_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.minirl_kernels, name).default
