"""Finds the decoder layer of a module. Models name the list of layers differently (layers, h, blocks)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model. prefix: the name of their ModuleList and a dot; None without a ModuleList."""

    prefix: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """Takes the ModuleList with the most parameters, among those inside no other ModuleList."""
        sizes: dict[str, int] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and not any(name.startswith(outer) for outer in sizes):
                sizes[f"{name}."] = sum(parameter.numel() for parameter in module.parameters())
        return cls(max(sizes, key=sizes.get) if sizes else None)

    def number(self, name: str) -> int | None:
        """Number of the layer that is the module or contains it; None outside the layers."""
        if self.prefix is None or not name.startswith(self.prefix):
            return None
        return int(name.removeprefix(self.prefix).partition(".")[0])

    def has(self, name: str) -> bool:
        """Whether the module is a layer."""
        return self.number(name) is not None and "." not in name.removeprefix(self.prefix)
