"""QK-clip: the largest attention logits, found in pieces; what is scaled, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import megalite.kernels.largest_logits as logits_module
from megalite.checkpoint.folder import step_folder
from megalite.engine.qk_clip import scale_rows_
from megalite.errors import ConfigError
from megalite.kernels.attention_kinds import AttentionKind, attention_mask
from megalite.kernels.largest_logits import largest_logits
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.train import train
from ranks import run_ranks
from small_runs import make_config, metrics_of, train_on_rank

KINDS = {
    "plain": AttentionKind(),
    "window": AttentionKind(window=5),
    "encoder": AttentionKind(causal=False),
    "encoder with a window": AttentionKind(window=5, causal=False),
    "scaled and capped": AttentionKind(softcap=2.0, scale=0.7),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_logits_are_those_of_whole_matrices(
    kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 23, 6, 8, generator=generator)
    k = torch.randn(3, 23, 2, 8, generator=generator)
    documents = (
        (torch.rand(3, 23, generator=generator) < 0.2).long().cumsum(1)
        if packed
        else torch.zeros(3, 23).long()
    )
    logits = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(3, 2)) * KINDS[kind].scale_of(8)
    wanted = logits.masked_fill(
        ~attention_mask(documents, documents, KINDS[kind]), -torch.inf
    ).amax((0, 2, 3))
    for at_once in (2**24, 7 * 3 * 6 * 23, 1):  # all, pieces of 7 queries, one query at a time
        monkeypatch.setattr(logits_module, "LOGITS_AT_ONCE", at_once)
        found = largest_logits(q, k, documents if packed else None, KINDS[kind])
        # Sums of 8 products in fp32.
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_rows_are_scaled_wherever_a_shard_is_cut() -> None:
    scales, whole = torch.tensor([2.0, 3.0, 5.0, 7.0]), torch.ones(4 * 6)
    wanted = scales.repeat_interleave(6)
    for start in range(24):
        for stop in range(start, 25):
            part = whole[start:stop].clone()
            scale_rows_(part, scales, 6, start)
            assert torch.equal(part, wanted[start:stop])


def test_bf16_weights_are_the_scaled_master_weights_rounded(tmp_path: Path) -> None:
    settings = ("train.precision=bf16", "train.steps=3", "optimizer.name=muon")
    configs = [
        make_config(
            tmp_path, "llama", *settings, "run.name=clipped", "optimizer.qk_clip={threshold: 0.01}"
        ),
        make_config(tmp_path, "llama", *settings, "run.name=plain"),
    ]
    for config in configs:
        train(config)
    clipped, plain = (step_folder(config.run.folder / "checkpoints", 3) for config in configs)
    weights, master = (
        load_file(clipped / "model.safetensors"),
        load_file(clipped / "optimizer/master.safetensors"),
    )
    assert all(torch.equal(weight, master[name].bfloat16()) for name, weight in weights.items())
    name = "model.layers.0.self_attn.{}_proj.weight"
    larger = load_file(plain / "model.safetensors")
    ratios = {
        part: (weights[name.format(part)].norm() / larger[name.format(part)].norm()).item()
        for part in "qkv"
    }
    assert max(ratios["q"], ratios["k"]) < 0.5
    assert ratios["v"] == pytest.approx(1.0, abs=0.1)


def test_every_layout_records_the_largest_logit_of_each_step(tmp_path: Path) -> None:
    settings = (
        "train.steps=4",
        "optimizer.qk_clip={threshold: 0.5}",
        "observe.eval_every=0",
        "checkpoint.every=0",
    )
    alone = make_config(tmp_path, "llama", *settings, "observe.layers_every=1", "run.name=alone")
    train(alone)
    wanted = [line for line in metrics_of(alone) if "loss" in line]
    for line in wanted:
        assert line["attention_logit"] == max(line["attention_logit/0"], line["attention_logit/1"])
    layouts = {
        "tensor": "parallel.tensor=2",
        "pipeline": "parallel.pipeline=2",
        "context": "parallel.context=2",
    }
    configs = [
        make_config(tmp_path, "llama", *settings, f"run.name={name}", each)
        for name, each in layouts.items()
    ]
    run_ranks(2, train_on_rank, configs)
    for config in configs:
        found = [line["attention_logit"] for line in metrics_of(config) if "loss" in line]
        assert found == pytest.approx([line["attention_logit"] for line in wanted], rel=1e-4), (
            config.run.name
        )


def test_what_cannot_be_clipped_is_refused(tmp_path: Path) -> None:
    for settings, why in {
        "model.family=qwen3": r"qk_clip must be null for model\.family = 'qwen3': it normalizes queries and keys",
        "parallel.engine=deepspeed": r"optimizer\.qk_clip needs parallel\.engine: native",
    }.items():
        config = make_config(tmp_path, "llama", "optimizer.qk_clip={}", settings)
        with pytest.raises(ConfigError, match=why):
            make_plan(config, weight_table(config.model), 1)
