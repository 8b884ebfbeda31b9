"""Chips and interconnects are data; what is not known is asked for. Collectives and kernels by
hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.observe.throughput import chip_peak
from megalite.plan import make_plan
from megalite.planner.estimate import estimate
from megalite.planner.hardware import (
    TYPICAL_MATMUL,
    TYPICAL_SUSTAINED,
    Chip,
    Interconnect,
    find_hardware,
)
from megalite.planner.kernels import LAUNCH_US, MEGALITE, MEMORY_SHARE, RAMP, Kernels
from megalite.planner.network import (
    BASE_US,
    LINK_SHARE,
    LINK_US,
    NETWORK_SHARE,
    Group,
    Network,
    place,
)
from megalite.utils.resources import configs_dir

MINE = {
    "chip": "Mine",
    "bf16_tflops": 100,
    "memory_gb": 64,
    "memory_tb_s": 1,
    "link_gb_s": 100,
    "num_sms": 100,
}


def test_every_chip_of_the_table_can_be_planned_for_and_has_its_mfu() -> None:
    for row in yaml.safe_load((configs_dir() / "chips.yaml").read_text()):
        assert find_hardware(row["chip"]).chip.bf16_tflops == row["bf16_tflops"]
        assert row["source"]
        assert all(row.get(f"{name}_source") for name in ("matmul", "attention") if name in row)
    assert chip_peak("NVIDIA H200", torch.bfloat16) == 989.5, "the table still serves the meter"
    for row in yaml.safe_load((configs_dir() / "interconnects.yaml").read_text()):
        assert find_hardware("h100", interconnect=row["interconnect"]).network_bytes_s > 0


@pytest.mark.parametrize("name", ["h200", "H200", "H200 SXM", "h200-sxm"])
def test_spelling_of_a_chip(name: str) -> None:
    assert find_hardware(name).chip.chip == "H200 SXM"


@pytest.mark.parametrize("name", ["h20", "B100", "MI300X", "H200 MIG 1g"])
def test_unknown_chip_must_be_described(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_hardware(name)
    message = str(caught.value)
    for part in (
        f"--gpu {name!r}",
        "H200 SXM",
        "RTX 3090",
        "my.yaml",
        "bf16_tflops",
        "memory_tb_s",
        "num_sms",
    ):
        assert part in message


def test_nearest_chip_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'A100 80GB'"):
        find_hardware("A100-80")
    with pytest.raises(ConfigError, match="did you mean 'ib-ndr'"):
        find_hardware("h100", interconnect="ib-nrd")


def test_described_chip(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(MINE))
    chip = find_hardware(str(file)).chip
    assert (chip.chip, chip.bf16_tflops) == ("Mine", 100)
    assert len(chip.assumed) == 3, "what was not measured is said"
    file.write_text(yaml.safe_dump({**MINE, "matmul": 0.9, "attention": 0.5, "sustained": 0.8}))
    assert find_hardware(str(file)).chip.assumed == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"memory_tb_s": None}, "memory_tb_s"),
        ({"memory_tbs": 1}, "did you mean 'memory_tb_s'"),
        ({"matmul": 80}, "matmul"),
    ],
)
def test_mistakes_in_a_description_are_named(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    file = tmp_path / "mine.yaml"
    values = {name: value for name, value in (MINE | change).items() if value is not None}
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=expected):
        find_hardware(str(file))
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        find_hardware(str(tmp_path / "none.yaml"))


def network(
    tensor: int = 8, world_size: int = 64, pipeline: int = 1, node: int = 8, context: int = 1
) -> Network:
    config = parse_config(
        {
            "run": {"name": "test"},
            "model": {"preset": "llama-8b"},
            "data": {"train": [{"path": "x"}], "seq_length": 4096},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "context": context},
            "train": {"steps": 1, "global_batch_size": 512},
            "optimizer": {"lr": 1e-4},
        }
    )
    plan = make_plan(config, weight_table(config.model), world_size)
    return place(plan, find_hardware("h100", node, "ib-ndr"))


def test_groups_lie_where_the_mesh_puts_them() -> None:
    assert network(8).tensor == Group(8, 8)
    assert network(8).replicas == Group(8, 1), "one GPU of each node"
    assert network(2).replicas == Group(32, 4)
    assert network(2).replicas.nodes == 8
    assert network(8, node=4).tensor.nodes == 2
    assert network(4, context=4).context == Group(4, 2), "beside the tensor ranks of each"
    assert network(8, world_size=64, pipeline=4).pipeline_crosses_nodes
    assert not network(2, world_size=4, pipeline=2).pipeline_crosses_nodes


def test_collectives_by_hand() -> None:
    wide = network(2)
    gigabyte = 1e9
    near, far = 450e9 * LINK_SHARE, 50e9 * NETWORK_SHARE
    expected = (BASE_US + LINK_US) * 1e-6 + gigabyte / 2 / near
    assert wide.gather(gigabyte, wide.tensor) == pytest.approx(expected)
    # 32 ranks, 4 on each of 8 nodes: 24 hops within, 7 between; the ring has 4 network cards of a
    # node.
    latency = (BASE_US + 24 * LINK_US + 7 * 9.6) * 1e-6
    assert wide.gather(gigabyte, wide.replicas) == pytest.approx(
        latency + gigabyte * 31 / 32 / (4 * far)
    )
    assert wide.all_reduce(gigabyte, wide.replicas) == pytest.approx(
        2 * wide.gather(gigabyte, wide.replicas), rel=1e-3
    )
    assert wide.gather(gigabyte, Group(1, 1)) == 0.0


def test_a_network_card_that_is_shared() -> None:
    hardware = find_hardware("a40", 4, "ethernet-100")
    assert hardware.network_bytes_s == pytest.approx(12.5e9 / 4)
    with pytest.raises(ValueError, match="either"):
        Interconnect(interconnect="both", gpu_gb_s=1, node_gb_s=1, latency_us=1)


def test_a_power_limit_slows_products_and_attention_by_its_third_root() -> None:
    chip = Chip.model_validate(MINE | {"watts": 800})
    limited = chip.model_copy(update={"power_limit": 100})
    assert chip.clock == 1.0
    assert chip.model_copy(update={"power_limit": 1000}).clock == 1.0
    free, slow = (Kernels(one, MEGALITE, 2) for one in (chip, limited))
    assert slow.product(8192, 8192, 8192) == pytest.approx(2 * free.product(8192, 8192, 8192))
    assert slow.attention(1e12, 4096, 128) == pytest.approx(2 * free.attention(1e12, 4096, 128))
    assert slow.memory(1e9) == free.memory(1e9)


def test_attention_is_slower_on_short_sequences_and_small_heads() -> None:
    kernels = Kernels(Chip.model_validate(MINE), MEGALITE, 2)
    long = kernels.attention(1e13, 1000 * RAMP, 128)
    assert kernels.attention(1e13, RAMP, 128) == pytest.approx(2 * long, rel=0.01)
    assert kernels.attention(1e13, 1000 * RAMP, 64) == pytest.approx(long * 2**0.2)
    assert kernels.attention(1e13, 1000 * RAMP, 256) == pytest.approx(long)


def test_products_by_hand() -> None:
    chip = Chip.model_validate(MINE | {"num_sms": 64, "memory_tb_s": 1000})
    kernels = Kernels(chip, MEGALITE, 2)
    # 64 tiles of 128 × 256 are one full wave.
    full = kernels.product(1024, 2048, 128 * 1023)
    peak = 100e12 * TYPICAL_MATMUL * TYPICAL_SUSTAINED
    assert full == pytest.approx(2.0 * 1024 * 2048 * 128 * 1023 / peak * 1024 / 1023, rel=1e-6)
    assert kernels.product(512, 2048, 128 * 1023) == pytest.approx(full / 2), (
        "64 tiles of 128 × 128 are one as well"
    )
    assert kernels.product(256, 2048, 128 * 1023) == pytest.approx(full / 2), (
        "half of the chip is idle"
    )
    assert kernels.product(768, 2048, 128 * 1023) == pytest.approx(full), (
        "48 tiles, or 96 of half the size: two waves"
    )
    # Thin products wait for memory, and nothing is quicker than its launch.
    slow = Kernels(Chip.model_validate(MINE | {"memory_tb_s": 0.1}), MEGALITE, 2)
    assert slow.product(4096, 4096, 16) == pytest.approx(
        2 * (4096 * 4096 + 2 * 4096 * 16) / (0.1e12 * MEMORY_SHARE)
    )
    assert Kernels(find_hardware("h100").chip, MEGALITE, 2).product(8, 8, 8) == pytest.approx(
        LAUNCH_US * 1e-6
    )


def test_fp32_has_no_peak() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision"):
        Kernels(find_hardware("h100").chip, MEGALITE, 4).product(128, 128, 128)


def test_a_loss_in_chunks_needs_less_and_takes_longer() -> None:
    found = []
    for chunk in (None, 4096, 1024):
        config = parse_config(
            {
                "run": {"name": "test"},
                "model": {"preset": "llama-8b"},
                "data": {"train": [{"path": "x"}], "seq_length": 4096},
                "train": {
                    "steps": 1,
                    "global_batch_size": 8,
                    "micro_batch_size": 1,
                    "loss_chunk": chunk,
                },
                "optimizer": {"lr": 1e-4},
            }
        )
        plan = make_plan(config, weight_table(config.model), 8)
        found.append(estimate(config, plan, find_hardware("h100")))
    times, totals = [one.step_time_s for one in found], [one.fullest.total for one in found]
    assert times == sorted(times)
    assert times[1] / times[0] < 1.05, "a product of four with the head is little of a step"
    # All at once, its logits are there in the passes only; a quarter is three quarters less.
    assert totals[1] == pytest.approx(totals[0], rel=1e-3)
    assert totals[1] - totals[2] == pytest.approx(3072 * 128256 * 2, rel=0.01)
