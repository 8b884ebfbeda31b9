"""The section `kernels`: what computes each fused operation."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from megalite import registry
from megalite.config.section import Section


class KernelsConfig(Section):
    """Implementation of each fused operation. `auto`: megalite's own kernels where they are built,
    else plain torch."""

    norm: str = Field("auto", description="Implementation: auto, megalite, torch or apex.")
    rope: str = Field("auto", description="Implementation: auto, megalite or torch.")
    activation: str = Field("auto", description="Implementation: auto, megalite or torch.")
    attention: str = Field(
        "auto", description="Implementation: auto, megalite, torch or flash_attn."
    )
    loss: str = Field("auto", description="Implementation: auto, megalite or torch.")
    weight_gradient: str = Field("auto", description="Implementation: auto, megalite or torch.")
    experts: str = Field("auto", description="Implementation: auto, megalite or torch.")
    fp8: str = Field("auto", description="Implementation: auto, megalite or torch.")
    optimizer: str = Field("auto", description="Implementation: auto, megalite or torch.")

    @field_validator("*")
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        own, key = implementations(str(info.field_name)), f"{info.field_name}."
        # In this order: asking the registry imports the plugins.
        if name not in own and key + name not in registry.kernels:
            added = [
                other.removeprefix(key)
                for other in registry.kernels.names()
                if other.startswith(key)
            ]
            raise ValueError(f"is not known; {registry.hint(name, [*own, *added])}")
        return name


def implementations(operation: str) -> tuple[str, ...]:
    """Return the implementations of an operation that exist without a plugin."""
    libraries = {"norm": "apex", "attention": "flash_attn"}
    return ("auto", "megalite", "torch", *filter(None, [libraries.get(operation)]))
