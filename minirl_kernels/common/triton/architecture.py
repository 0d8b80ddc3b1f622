"""The GPU of a launch."""

from __future__ import annotations

from functools import cache

import torch


@cache
def of(device: torch.device) -> str:
    """The name that compilers have for a GPU, "sm_90" or "gfx942"; "" for the CPU, on which Triton's interpreter runs.

    Launchers call it as architecture.of, so that a check without a GPU can name one.
    """
    if device.type == "cpu":
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
