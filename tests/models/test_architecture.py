"""What a family describes as data is what its modules compute and what its table holds."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch.nn as nn

from megalite.config import ModelConfig
from megalite.errors import ConfigError
from megalite.models import build_model, from_hf_config, model_config, weight_table
from megalite.models.architecture import AttentionSpec, ExpertsSpec, LatentSpec, LayerSpec
from megalite.models.core_attention import CoreAttention
from megalite.models.experts import SparseMLP
from megalite.models.latent import LatentAttention
from megalite.models.layers import LayerNorm, RMSNorm
from megalite.models.llama import Attention
from tiny_models import CASES


def config_of(case: str) -> ModelConfig:
    from transformers import AutoConfig

    return model_config(from_hf_config(AutoConfig.for_model(**CASES[case]).to_dict()))


def attention_of(spec: LayerSpec) -> AttentionSpec:
    assert isinstance(spec.mixer, AttentionSpec)
    return spec.mixer


@pytest.mark.parametrize("case", CASES)
def test_described_parameters_are_those_of_the_table(case: str) -> None:
    config = config_of(case)
    table, hidden = weight_table(config), config.hidden_size
    architecture = config.architecture
    for number, layer in enumerate(architecture.layers):
        described = layer.mixer.num_elements(hidden) + layer.feed_forward.num_elements(hidden)
        rows = {
            weight.name.split(".", 2)[2]: weight.numel for weight in table if weight.place == number
        }
        a_norm = hidden * (2 if any(name.endswith("norm.bias") for name in rows) else 1)
        # Biases, and norms of queries and keys, stand inside of attention and MLP, and are not
        # described in numbers.
        small = {name for name in rows if name.count(".") >= 2 and not name.endswith(MATRICES)}
        assert (
            sum(rows[name] for name in rows.keys() - small) == described + layer.num_norms * a_norm
        )
        of_latents = isinstance(layer.mixer, LatentSpec)
        assert (
            any("q_norm" in name for name in small) == attention_of(layer).head_norms or of_latents
        )
    assert len(architecture.layers) == config.num_layers


MATRICES = (
    "qkv.weight", "out.weight", "gate_up.weight", "up.weight", "down.weight", "router.weight", "_gate.weight",
    "q.weight", "q_a.weight", "kv.weight", "kv_a.weight",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_described_layers_are_what_the_modules_compute(case: str) -> None:
    config = config_of(case)
    model, architecture = build_model(config), config.architecture
    kinds: dict[str, tuple[type[nn.Module], ...]] = {"rms": (RMSNorm,), "layer": (LayerNorm,)}
    assert len(model.layers) == len(architecture.layers) == config.num_layers
    for layer, spec in zip(model.layers.values(), architecture.layers, strict=True):
        attention: Any = layer.attention
        mixer, core = attention_of(spec), attention.core
        assert isinstance(core, CoreAttention)
        assert (mixer.window, mixer.softcap, mixer.scale) == (
            core.kind.window,
            core.kind.softcap,
            core.kind.scale,
        )
        assert mixer.dropout == (core.dropout.p if core.dropout else 0.0)
        if isinstance(attention, LatentAttention):
            assert attention.q.out_features == mixer.num_heads * mixer.head_size
            assert attention.out.in_features == mixer.num_heads * mixer.value_size
        else:
            is_rotated = isinstance(attention, Attention) and attention.turn is not None
            assert bool(mixer.rope_size) == is_rotated
            features = (
                mixer.num_heads + mixer.num_kv_heads
            ) * mixer.head_size + mixer.num_kv_heads * mixer.value_size
            assert features == attention.qkv.out_features
        mlp, feed_forward = layer.mlp, spec.feed_forward
        assert isinstance(mlp, SparseMLP) == isinstance(feed_forward, ExpertsSpec)
        if isinstance(mlp, SparseMLP) and isinstance(feed_forward, ExpertsSpec):
            assert (
                feed_forward.num_experts == len(mlp.router.weight) == len(mlp.experts.down.weight)
            )
            assert feed_forward.experts_per_token == mlp.router.experts_per_token
            mlp = mlp.experts
        assert feed_forward.inner == mlp.down.weight.shape[-1]  # type: ignore[union-attr]
        first: Any = getattr(mlp, "gate_up", None) or getattr(mlp, "up", None)
        assert first.weight.shape[-2] == (2 if feed_forward.gated else 1) * feed_forward.inner
        norms = [child for child in layer.children() if isinstance(child, (RMSNorm, LayerNorm))]
        assert len(norms) == spec.num_norms
        assert all(isinstance(norm, kinds[architecture.norm]) for norm in (*norms, model.norm))


def test_dropout_and_turning_points() -> None:
    dropout = config_of("gpt2").architecture
    assert dropout.hidden_dropout == attention_of(dropout.layers[0]).dropout == 0.1, (
        "transformers' default"
    )
    assert attention_of(dropout.layers[0]).writes_scores
    assert [config_of(case).architecture.turning_points for case in ("phi3", "phi3-long")] == [
        range(0),
        range(16, 17),
    ]
    assert config_of("gemma2").architecture.logit_softcap == 6.0


def test_a_changed_copy_describes_itself() -> None:
    config = config_of("llama")
    assert len(config.architecture.layers) == 2
    assert len(config.model_copy(update={"num_layers": 5}).architecture.layers) == 5


class Undescribed(ModelConfig):
    family: Literal["undescribed"] = "undescribed"


def test_a_family_that_describes_nothing_or_too_much_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Undescribed(
        vocab_size=9, hidden_size=8, num_layers=1, num_attention_heads=2, max_positions=4
    )
    with pytest.raises(
        ConfigError,
        match=r"'undescribed' does not describe its layers.*Undescribed must have a method",
    ):
        _ = config.architecture
    monkeypatch.setattr(Undescribed, "describe", lambda _: config_of("llama").architecture)
    with pytest.raises(ConfigError, match="'undescribed' describes 2 layers for num_layers = 1"):
        _ = config.architecture
