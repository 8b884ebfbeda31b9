"""AWQ and SmoothQuant against plain statements on transformers' modules; what is scaled computes the
same, and where nothing can be, that is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.kernels.schemes import make_scheme
from megalite.quantization.layers import LayerRuns, read_rows
from megalite.quantization.run import Method, quantised
from quantized_folders import SMALL, weights_of
from tiny_models import GEMMA2, LLAMA, OLMO3, QWEN3, save_model

PLAIN = LLAMA | SMALL | {"num_key_value_heads": LLAMA["num_attention_heads"]}


def rounded(weight: Tensor, group: int, bits: int) -> Tensor:
    """To the nearest of symmetric integers, with a scale for each group of columns."""
    blocks = weight.unflatten(1, (-1, group))
    scales = blocks.abs().amax(-1, keepdim=True) * (2 / (2**bits - 1))
    most = 2 ** (bits - 1)
    return ((blocks / scales).round().clamp(-most, most - 1) * scales).flatten(1)


def inputs_of(layer: Any, run: Callable[[], None]) -> dict[str, Tensor]:
    """What goes into a layer's linears, [tokens, features], by their names."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, x, name=name: found.update({name: x[0].flatten(0, -2)})
                )
            )
    run()
    for handle in handles:
        handle.remove()
    return found


def plain_awq(layer: Any, inputs: dict[str, Tensor]) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for before, linears, x in (
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], inputs["self_attn.q_proj"]),
        (attention.v_proj, [attention.o_proj], inputs["self_attn.o_proj"]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], inputs["mlp.gate_proj"]),
        (mlp.up_proj, [mlp.down_proj], inputs["mlp.down_proj"]),
    ):  # fmt: skip
        tried = []
        for step in range(20):
            s = x.abs().mean(0) ** (step / 20)
            s = s / (s.max() * s.min()).sqrt()
            lost = sum(
                ((rounded(each.weight * s, 16, 4) / s - each.weight) @ x.T).square().sum().item()
                for each in linears
            )
            tried.append((lost, step, s))
        s = min(tried)[2]
        before.weight /= s if before.weight.dim() == 1 else s[:, None]
        for each in linears:
            each.weight *= s


def plain_smoothquant(layer: Any, inputs: dict[str, Tensor]) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for norm, linears, x in (
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], inputs["self_attn.q_proj"]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], inputs["mlp.gate_proj"]),
    ):  # fmt: skip
        of_weights = torch.cat([each.weight for each in linears]).abs().amax(0)
        s = (x.abs().amax(0) / of_weights).sqrt()
        norm.weight /= s
        for each in linears:
            each.weight *= s


@pytest.mark.parametrize(
    ("method", "scheme", "group", "bits"), [("awq", "w4a16", 16, 4), ("smoothquant", "w8a8", 0, 8)]
)
@torch.no_grad()
def test_it_is_the_plain_statement(
    method: Method, scheme: str, group: int, bits: int, tokens: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from megalite.checkpoint.convert import write_model

    source = save_model(tmp_path / "source", PLAIN)
    runs = LayerRuns.from_tokens(source, tokens, 16, 32)
    model, _ = quantised(source, make_scheme(scheme, group or 128), method, runs)
    write_model(model, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    rows = read_rows(tokens, 16, 32)[[number % 4 != 3 for number in range(16)], :-1]
    layer = plain.model.layers[0]
    exact = plain(rows).logits
    inputs = inputs_of(layer, lambda: plain(rows))
    (plain_awq if method == "awq" else plain_smoothquant)(layer, inputs)
    assert (plain(rows).logits - exact).abs().max() <= 1e-3, "the same model, of other weights"
    for name, value in layer.state_dict().items():
        wanted = rounded(value, group or value.shape[1], bits) if value.dim() == 2 else value
        off = (found[f"model.layers.0.{name}"] - wanted).abs() / wanted.abs().mean()
        # A number half way between two is rounded either way; statistics are sums in other orders.
        assert (off > 1e-4).float().mean() < 0.005, name


def test_outliers_cost_awq_less_than_rounding_and_gptq_least(tokens: str, tmp_path: Path) -> None:
    """Where a few inputs are much larger than others, which is what it is for. What a layer
    computes is compared with the same inputs."""
    source, errors = save_model(tmp_path / "source", PLAIN), {}
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::17] *= 30
            layer.post_attention_layernorm.weight[::17] *= 30
    model.save_pretrained(source)
    for method in ("rtn", "awq", "gptq"):
        runs = LayerRuns.from_tokens(source, tokens, 16, 32)
        made, report = quantised(source, make_scheme("w4a16", 16), method, runs)
        for weight in made.weights:
            made.encode(weight, weight.to_hf(made.read(weight)))
        errors[method] = report.mean_error
    assert errors["gptq"] < errors["awq"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize(
    "values",
    [QWEN3 | SMALL | {"head_dim": 16}, GEMMA2 | SMALL | {"head_dim": 16}],
    ids=["qwen3", "gemma2"],
)
def test_other_families_are_scaled(values: dict[str, Any], tokens: str, tmp_path: Path) -> None:
    """Of Gemma a norm scales by 1 + weight."""
    source = save_model(tmp_path / "source", values)
    runs = LayerRuns.from_tokens(source, tokens, 8, 32)
    model, report = quantised(source, make_scheme("w8a8"), "awq", runs)
    changed = []
    for weight in model.weights:
        before = weight.to_hf(model.read(weight))
        after = model.encode(weight, before)
        changed += [
            name for name in before if "norm" in name and not torch.equal(before[name], after[name])
        ]
    assert changed, "norms are scaled"
    assert report.perplexities is not None
    # In 8 bits the model is the same: what is scaled on one side only would show.
    assert report.perplexities[1] == pytest.approx(report.perplexities[0], rel=0.02)


def test_a_model_without_norms_in_front_is_refused(tokens: str, tmp_path: Path) -> None:
    from megalite.checkpoint.convert import write_model
    from megalite.errors import ConfigError

    source = save_model(tmp_path / "source", OLMO3 | SMALL)
    runs = LayerRuns.from_tokens(source, tokens, 8, 32)
    model, _ = quantised(source, make_scheme("w8a8"), "smoothquant", runs)
    with pytest.raises(ConfigError, match="layer 0 has no norm in front of a matrix alone"):
        write_model(model, tmp_path / "out")
