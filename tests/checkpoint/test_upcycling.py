"""Dense models made mixtures of experts: what they are at first, and that transformers opens
them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.upcycle import Upcycling
from megalite.errors import ConfigError
from tiny_models import CASES

TOKENS = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(0))


def saved(case: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case] | {"intermediate_size": 24})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.5 * (parameter.dim() == 1), std=0.25)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("experts", "visited", "slices"), [(4, 2, 1), (8, 2, 2), (6, 6, 3)])
@pytest.mark.parametrize("case", ["llama-3", "mistral", "qwen3"])
def test_logits_are_those_of_the_dense_model(
    case: str, experts: int, visited: int, slices: int, tmp_path: Path
) -> None:
    dense = saved(case, tmp_path / "dense")
    write_model(
        Upcycling(experts, visited, slices).apply(open_source(tmp_path / "dense")),
        tmp_path / "routed",
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "routed", output_loading_info=True
    )
    assert not any(info.values()), info
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (experts, visited)
    router = model.model.layers[1].mlp.gate.weight
    assert len(router.unique(dim=0)) == experts // slices
    with torch.no_grad():
        wanted = dense(TOKENS).logits
        assert wanted.std() > 0.5
        # Fp32 sums of other terms.
        assert (model.eval()(TOKENS).logits - wanted).abs().max().item() <= 2e-5


@pytest.mark.parametrize(
    ("case", "upcycling", "words"),
    [
        (
            "llama",
            Upcycling(6, 2, 4),
            "the number of experts, 6, must be a multiple of the granularity, 4",
        ),
        (
            "llama",
            Upcycling(8, 3, 2),
            "experts per token, 3, must be a multiple of the granularity, 2",
        ),
        ("llama", Upcycling(10, 5, 5), "24 inner features of the MLP do not divide into 5 slices"),
        ("llama", Upcycling(2, 4), "experts_per_token 4 must not be more than num_experts 2"),
        (
            "llama-biases",
            Upcycling(4, 2),
            "the dense model has attention_bias, which its kin with experts, mixtral, lacks",
        ),
        (
            "gemma2",
            Upcycling(4, 2),
            "a gemma2 model has no kin with experts here; llama, mistral, qwen3 have",
        ),
    ],
)
def test_what_makes_no_mixture_is_refused(
    case: str, upcycling: Upcycling, words: str, tmp_path: Path
) -> None:
    saved(case, tmp_path)
    with pytest.raises(ConfigError, match=words):
        upcycling.apply(open_source(tmp_path))
