"""Which decoder layer a module belongs to. Models call them layers, h, blocks: they are found by what holds them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model. prefix: the name of their list, with a dot; none where there is no list."""

    prefix: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """The list that is in no other list, and has the most parameters of these."""
        sizes: dict[str, int] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and not any(name.startswith(outer) for outer in sizes):
                sizes[f"{name}."] = sum(parameter.numel() for parameter in module.parameters())
        return cls(max(sizes, key=sizes.get) if sizes else None)

    def number(self, name: str) -> int | None:
        """Of the layer that the module is, or is in; None if it is outside all."""
        if self.prefix is None or not name.startswith(self.prefix):
            return None
        return int(name.removeprefix(self.prefix).partition(".")[0])

    def has(self, name: str) -> bool:
        """Whether the module is a layer."""
        return self.number(name) is not None and "." not in name.removeprefix(self.prefix)
