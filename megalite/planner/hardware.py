"""Chips and interconnects: data read from configs/chips.yaml, configs/interconnects.yaml or a file
of the user's.

Unknown hardware is an error that asks for a description; its peak is never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from megalite.config import Section
from megalite.config.errors import describe_errors
from megalite.errors import ConfigError
from megalite.kernels.fp8 import Name
from megalite.kernels.scaled_product import chip_takes
from megalite.utils.outside import read_text
from megalite.utils.resources import configs_dir, parse_yaml
from megalite.utils.spelling import nearest

TYPICAL_MATMUL = 0.75
"""Share of the peak for chips without a measured `matmul`: between MI-class 0.6 and A100's 0.87."""

TYPICAL_SUSTAINED = 0.7
"""Share of `matmul` for chips without a calibrated `sustained`: an H100's."""

TYPICAL_ATTENTION = 0.35
"""Share of the peak for chips without a measured `attention`: FlashAttention-2 on an H100
(arXiv:2407.08608)."""


class Chip(Section):
    """Holds one line of configs/chips.yaml, where each field is explained."""

    chip: str
    bf16_tflops: float = Field(gt=0)
    fp8_tflops: float | None = Field(None, gt=0)
    capability: float | None = Field(None, gt=0)
    memory_gb: float = Field(gt=0)
    memory_tb_s: float = Field(gt=0)
    link_gb_s: float = Field(gt=0)
    num_sms: int = Field(gt=0)
    matmul: float | None = Field(None, gt=0, le=1)
    attention: float | None = Field(None, gt=0, le=1)
    sustained: float | None = Field(None, gt=0, le=1)
    watts: float | None = Field(None, gt=0)
    power_limit: float | None = Field(None, gt=0)
    also: tuple[str, ...] = ()
    name: str | None = None
    source: str | None = None
    matmul_source: str | None = None
    attention_source: str | None = None

    @property
    def matmul_share(self) -> float:
        """Share of the peak that the best matrix products reach."""
        return self.matmul or TYPICAL_MATMUL

    @property
    def product_share(self) -> float:
        """Share of the peak that matrix products sustain in training."""
        return self.matmul_share * (self.sustained or TYPICAL_SUSTAINED) * self.clock

    @property
    def clock(self) -> float:
        """Share of its clock that the chip keeps under its `power_limit`: power grows with the
        clock's third power, as the voltage grows with the clock."""
        if self.watts is None or self.power_limit is None:
            return 1.0
        return min(1.0, self.power_limit / self.watts) ** (1 / 3)

    @property
    def attention_share(self) -> float:
        """Share of the peak that flash attention reaches."""
        return self.attention or TYPICAL_ATTENTION

    def multiplies(self, recipe: Name) -> bool:
        """Return whether its products take the codes of a recipe of `train.fp8`, at a speed that is
        known."""
        if self.fp8_tflops is None or self.capability is None:
            return False
        major, minor = divmod(round(self.capability * 10), 10)
        return chip_takes(recipe, (major, minor))

    @property
    def assumed(self) -> list[str]:
        """Shares of the peak that were not measured on this chip, as text for a person."""
        found = []
        if self.matmul is None:
            found.append(f"matmul {TYPICAL_MATMUL:g} of the peak")
        if self.attention is None:
            found.append(f"attention {TYPICAL_ATTENTION:g} of the peak")
        if self.sustained is None:
            found.append(f"{TYPICAL_SUSTAINED:g} of `matmul` in training")
        return found


class Interconnect(Section):
    """Holds one line of configs/interconnects.yaml, where each field is explained."""

    interconnect: str
    gpu_gb_s: float | None = Field(None, gt=0)
    node_gb_s: float | None = Field(None, gt=0)
    latency_us: float = Field(gt=0)
    source: str | None = None

    @model_validator(mode="after")
    def _one_bandwidth(self) -> Interconnect:
        if (self.gpu_gb_s is None) == (self.node_gb_s is None):
            raise ValueError("give either gpu_gb_s or node_gb_s")
        return self


@dataclass(frozen=True)
class Hardware:
    """Describes the machines of a run: equal nodes of equal GPUs."""

    chip: Chip
    interconnect: Interconnect
    gpus_per_node: int

    @property
    def link_bytes_s(self) -> float:
        """Bandwidth of a GPU within its node, in bytes/s, one direction, datasheet."""
        return self.chip.link_gb_s * 1e9

    @property
    def network_bytes_s(self) -> float:
        """Bandwidth of a GPU's share of its node's network, in bytes/s, one direction,
        datasheet."""
        net = self.interconnect
        # Either a network card for each GPU, or one network that the node's GPUs share.
        gb_s = net.gpu_gb_s or (net.node_gb_s or 0.0) / self.gpus_per_node
        return gb_s * 1e9


DEFAULT_INTERCONNECT = "ib-ndr"


def find_hardware(
    gpu: str,
    gpus_per_node: int = 8,
    interconnect: str = DEFAULT_INTERCONNECT,
) -> Hardware:
    """Find a chip and an interconnect by name, or by the path of a YAML file that describes one.

    `gpu` and `interconnect` are such names or paths; a node has `gpus_per_node` GPUs. Raises
    ConfigError with the known names."""
    if gpus_per_node < 1:
        raise ConfigError(f"--nodes-of {gpus_per_node}: a node has at least one GPU")
    return Hardware(find_chip(gpu), find_interconnect(interconnect), gpus_per_node)


def find_chip(gpu: str) -> Chip:
    """Find a chip by name or by the path of a file, as `find_hardware` does."""
    return _find(gpu, "chip", "chips.yaml", "--gpu", Chip)


def find_interconnect(interconnect: str) -> Interconnect:
    """Find an interconnect by name or by the path of a file, as `find_hardware` does."""
    return _find(interconnect, "interconnect", "interconnects.yaml", "--interconnect", Interconnect)


S = TypeVar("S", bound=Section)


def _find(wanted: str, key: str, file: str, option: str, section: type[S]) -> S:
    if wanted.endswith((".yaml", ".yml")):
        return _described(Path(wanted), key, section)
    rows = _rows(file)
    names = {}
    for row in rows:
        for name in (row[key], *row.get("also", ())):
            names[_plain(name)] = row
    if _plain(wanted) in names:
        return _checked(names[_plain(wanted)], f"{file}: {wanted}", section)
    # The message tells how to describe other hardware, which the tables cannot all hold.
    known = [str(row[key]) for row in rows]
    close = nearest(_plain(wanted), names)
    hint = f"did you mean {names[close][key]!r}? " if close else ""
    fields = ", ".join(name for name, field in section.model_fields.items() if field.is_required())
    if section is Interconnect:
        fields += ", and gpu_gb_s or node_gb_s"
    raise ConfigError(
        f"{option} {wanted!r} is not known; {hint}known: {', '.join(known)}. To describe another, give a file: "
        f"{option} my.yaml with the lines {fields} (configs/{file} explains them)"
    )


def _described(path: Path, key: str, section: type[S]) -> S:
    values = parse_yaml(read_text(path, ConfigError), str(path))
    # A row of the table, copied as it stands there.
    if isinstance(values, list) and len(values) == 1:
        values = values[0]
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected the `field: value` lines of one {key}")
    return _checked(values, str(path), section)


def _checked(values: dict[str, Any], origin: str, section: type[S]) -> S:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {describe_errors(error, section, values)}") from None


@cache
def _rows(file: str) -> list[dict[str, Any]]:
    path = configs_dir() / file
    return parse_yaml(path.read_text(encoding="utf-8"), str(path))


def _plain(name: str) -> str:
    """Reduce a name to its letters and digits, so that "H100-SXM" and "h100 sxm" are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
