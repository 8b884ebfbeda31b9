"""Generation with latent attention keeps a latent of each token, and nothing for each head."""

from __future__ import annotations

import pytest
import torch

from megalite.infer.cache import CachedModel, LatentKVCache, Row, lay_out
from megalite.models import family, model_config
from megalite.models.latent import LatentAttention
from megalite.models.layers import Decoder, SequenceInfo

CPU = torch.device("cpu")
MODEL = {
    "family": "deepseek_v3", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_layers": 2,
    "num_attention_heads": 4, "max_positions": 64, "moe_intermediate_size": 24, "num_experts": 6,
    "experts_per_token": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 12, "q_lora_rank": 20,
}  # fmt: skip


def random_model() -> Decoder:
    config = model_config(MODEL)
    model = family("deepseek_v3").MODEL(config)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def attentions(model: Decoder) -> list[LatentAttention]:
    return [module for module in model.modules() if isinstance(module, LatentAttention)]


def test_the_cache_holds_a_latent_of_each_token() -> None:
    model = random_model()
    tokens = torch.randint(0, 99, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens, SequenceInfo.whole(40, CPU))
    cached = CachedModel(model, num_slots=3)
    done = 0
    for count in (17, 5, 1, 1, 16):
        row = Row(1, done, tokens[0, done : done + count].tolist(), 40)
        done += count
        found = cached.predict(*lay_out([row], CPU))
        # fp32 products in another order: queries are multiplied with what makes keys, not latents.
        torch.testing.assert_close(found[0], wanted[0, done - 1], rtol=1e-4, atol=1e-4)
    for attention in attentions(model):
        cache = attention.cache
        assert isinstance(cache, LatentKVCache)
        assert attention.core.strategy is None
        latents = cache.cells.numbers
        assert latents is not None
        assert latents.shape[:2] == (3, 1)
        assert latents.shape[3] == MODEL["kv_lora_rank"] + MODEL["qk_rope_head_dim"]
    assert "up" not in {name.rpartition(".")[2] for name, _ in model.named_parameters()}


def test_adapters_of_what_makes_keys_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in no weight: keys and values are made, and kept."""
    model = random_model()
    for attention in attentions(model):
        attention.kv.updates = object()  # type: ignore[assignment]
    CachedModel(model, num_slots=3)
    assert all(
        attention.cache is None and attention.core.strategy is not None
        for attention in attentions(model)
    )
