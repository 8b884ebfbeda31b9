from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from encoders import masked_config
from megalite.config import LoraConfig
from megalite.config_file import parse_config
from megalite.models import family
from megalite.models.architecture import AttentionSpec
from megalite.models.layers import SequenceInfo, Source
from megalite.observe import throughput
from megalite.observe.throughput import (
    HostEvent,
    Meter,
    chip_peak,
    flops_per_token,
    model_flops_per_token,
)


def test_flops_follow_the_published_convention() -> None:
    """GPT-3 175B's own count (arXiv:2005.14165, appendix D) is 6N; at 2,048 positions attention
    adds 12·L·HQ·T."""
    num_params = 174_600_000_000
    attention = AttentionSpec(num_heads=96, num_kv_heads=96, head_size=128, value_size=128)
    flops = flops_per_token(num_params, 96 * attention.products(2048))
    assert flops == 6 * num_params + 12 * 96 * 12288 * 2048
    # Attention is 2.8 % of that model's work.
    assert flops / (6 * num_params) == pytest.approx(1.0277, abs=1e-4)


GEMMA3: dict[str, Any] = {
    "family": "gemma3_text", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_layers": 6,
    "num_attention_heads": 4, "max_positions": 512, "sliding_window": 64,
}  # fmt: skip


def flops_of(
    length: int, lora: LoraConfig | None = None, table: dict[str, Any] = GEMMA3, **model: Any
) -> float:
    rest = {
        "run": {"name": "t"},
        "train": {"steps": 1, "global_batch_size": 1},
        "optimizer": {"lr": 1.0},
    }
    data = {"train": [{"path": "x"}], "seq_length": length}
    config = parse_config({**rest, "model": table | model, "data": data})
    return model_flops_per_token(config.model_copy(update={"lora": lora}))


def test_a_window_counts_as_what_it_sees() -> None:
    # Of six layers one sees all; from 64 on, the others see no more.
    assert flops_of(512) - flops_of(64) == 12 * 32 * (512 - 64)
    assert flops_of(64) - flops_of(32) == 12 * 32 * 6 * (64 - 32)


def test_a_tied_head_multiplies_like_any_other() -> None:
    assert flops_of(512, tie_embeddings=True) == flops_of(512, tie_embeddings=False)
    assert flops_of(512, vocab_size=101) - flops_of(512) == 6 * 32, (
        "a token is looked up, and multiplied once"
    )


def test_a_head_of_masked_tokens_counts_for_these(tmp_path: Path) -> None:
    whole, some = (
        masked_config(tmp_path, f"objective.share={share}", "model.num_layers=1")
        for share in (0.999, 0.25)
    )
    # The vocabulary, its bias, and the transform with its bias and norm.
    behind = 97 * 33 + 32 * 35
    assert model_flops_per_token(whole) - model_flops_per_token(some) == pytest.approx(
        6 * 0.749 * behind, rel=1e-9
    )


def test_a_predictor_counts_as_a_layer_and_a_head() -> None:
    table = {
        "family": "deepseek_v3", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2,
        "num_attention_heads": 4, "max_positions": 512, "kv_lora_rank": 8, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 2, "v_head_dim": 5, "moe_intermediate_size": 16, "num_experts": 8,
        "experts_per_token": 2,
    }  # fmt: skip
    attention = 32 * 4 * 8 + 32 * (8 + 2) + 8 * 4 * (6 + 5) + 4 * 5 * 32
    experts = 8 * 32 + 3 * 32 * 16 * (2 + 1)
    norms = 2 * 32 + 8 + 3 * 32 + 8  # with the biases by which experts are chosen
    matrices = attention + experts + 2 * 32 * 32 + norms + 100 * 32
    more = flops_of(512, None, table, num_nextn_predict_layers=1) - flops_of(512, None, table)
    assert more == 6 * matrices + 6 * 512 * 4 * (8 + 5)


def test_a_frozen_weight_has_no_gradient_to_multiply() -> None:
    attention, mlp, head = 4 * 32 * 32, 3 * 32 * 64, 100 * 32
    adapters = 4 * (4 * (32 + 32) + 3 * (32 + 64))
    norms = 6 * (4 * 32 + 2 * 8) + 32
    frozen = 6 * (attention + mlp) + norms + head
    assert flops_of(512) - 6 * frozen == 12 * 32 * (512 + 5 * 64)
    assert flops_of(512, lora=LoraConfig(rank=4)) - flops_of(512) == 6 * 6 * adapters - 2 * frozen


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        # Not in the table, though their names begin as one that is.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks_come_from_the_table_and_are_never_guessed(
    device_name: str, peak: float | None
) -> None:
    assert chip_peak(device_name, torch.bfloat16) == peak
    assert chip_peak(device_name, torch.float32) is None


def test_every_chip_has_all_its_columns_and_one_row() -> None:
    chips = throughput._chips()
    assert (
        len({chip["chip"] for chip in chips}) == len({chip["name"] for chip in chips}) == len(chips)
    )
    for chip in chips:
        assert set(chip) >= {"chip", "name", "bf16_tflops", "memory_gb", "source"}


def test_meter_counts_from_the_last_tick_or_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = Meter(1e9, world_size=4, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert meter.tick(8_000).read() == {
        "step_time_s": 2.0,
        "tokens_per_s": 4_000.0,
        "tflops": 1.0,
    }  # per chip; no peak known
    meter.start()
    assert meter.tick(8_000).read()["step_time_s"] == 4.0


def test_meter_of_a_known_chip_tells_mfu_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: HostEvent())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    meter = Meter(1e9, world_size=4, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    record = meter.tick(1_248_000).read()
    assert record["tflops"] == 156.0
    assert record["mfu"] == 0.5
    assert record["memory_gb"] == 3.0


def test_an_encoder_decoder_counts_what_each_stack_computes() -> None:
    """Against torch's own count of a forward pass: each stack its own tokens, and cross-attention
    those of both."""
    values = {
        "run": {"name": "t"}, "train": {"steps": 1, "global_batch_size": 1}, "optimizer": {"lr": 1.0},
        "model": {
            "family": "t5", "vocab_size": 100, "hidden_size": 32, "head_dim": 12, "intermediate_size": 56,
            "num_layers": 5, "encoder_layers": 2, "num_attention_heads": 4, "dropout": 0.1,
        },
        "data": {"train": [{"path": "x"}], "seq_length": 48, "tokenizer": "x"},
        "objective": {"name": "span_corruption"},
    }  # fmt: skip
    config = parse_config(values)
    # In training with dropout, whose attention is of products that torch counts; its fused ones it
    # does not.
    model, keys = family("t5").MODEL(config.model), torch.zeros(1, dtype=torch.int64)
    source, target = (torch.zeros(1, length, dtype=torch.int64) for length in config.lengths[1:])
    places = SequenceInfo.whole(source.shape[1], source.device)
    both = Source(source, replace(places, key_B=keys))
    places = replace(SequenceInfo.whole(target.shape[1], target.device, both), key_B=keys)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(target, places)
    # Forward and backward are three times the forward pass.
    assert model_flops_per_token(config) * config.sample_tokens == 3 * counter.get_total_flops()
