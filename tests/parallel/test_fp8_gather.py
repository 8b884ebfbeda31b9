"""Weights that replicas gather as codes of fp8 train the same model as weights gathered as they are,
to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import make_mesh
from megalite.config import FP8_BLOCK, Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.engine.native import NativeEngine
from megalite.errors import ConfigError
from megalite.kernels.fp8 import CodedWeight, quantise
from megalite.kernels.recipes import RECIPES
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.training.parts import build, forward_backward
from ranks import run_ranks

SEED, BATCH, LENGTH, STEPS = 5, 2, 128, 2
# Half of a weight of 384 rows ends in the middle of a block, and so do shards of two replicas.
MODEL = {
    "family": "llama", "vocab_size": 97, "hidden_size": 384, "intermediate_size": 256, "num_layers": 2,
    "num_attention_heads": 6, "max_positions": LENGTH, "init_std": 0.05,
}  # fmt: skip
EXPERTS = MODEL | {
    "family": "qwen3_moe", "moe_intermediate_size": 128, "num_experts": 2, "experts_per_token": 1,
    "num_kv_heads": 2,
}  # fmt: skip
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]
"""Model, layout, optimizer and precision."""
CASES: dict[str, Case] = {
    "zero 1, bf16": (MODEL, {"zero_stage": 1}, {}, "bf16"),
    "zero 2, fp32": (MODEL, {"zero_stage": 2}, {"ema": 0.9, "eps": 1e-3}, "fp32"),
    "context, muon": (MODEL, {"zero_stage": 1, "context": 2}, {"name": "muon"}, "bf16"),
    "experts": (EXPERTS, {"zero_stage": 1}, {"state_dtype": "8bit"}, "bf16"),
    "experts on other ranks": (EXPERTS, {"zero_stage": 1, "expert": 2}, {}, "fp32"),
}


def config_of(case: Case, param_gather: bool, **fp8: Any) -> Config:
    model, layout, optimizer, precision = case
    length = LENGTH * (4 if "context" in layout else 1)
    fp8 = {"first_last_bf16": [0, 1], "exclude": ["down_proj"], "param_gather": param_gather} | fp8
    if model is EXPERTS:
        fp8["exclude"] = ["q_proj", "k_proj", "v_proj"]
    return parse_config(
        {
            "run": {"name": "fp8"}, "model": model | {"max_positions": length},
            "data": {"train": [{"path": "-"}], "seq_length": length},
            # So that most weights have a bucket, and a border between two shards, of their own.
            "parallel": {"bucket_mb": 0.5} | layout, "optimizer": {"lr": 1e-2} | optimizer,
            "train": {"steps": STEPS, "global_batch_size": BATCH, "precision": precision, "fp8": fp8},
        }
    )  # fmt: skip


Results = dict[tuple[str, bool], dict[str, Any]]


def train(rank: int, world_size: int) -> Results:
    """Train a few steps of each case, with codes and without."""
    results = {}
    for name in CASES:
        for param_gather in (False, True):
            config = config_of(CASES[name], param_gather)
            weights = weight_table(config.model, fp8=config.train.fp8)
            plan = make_plan(config, weights, world_size)
            mesh = make_mesh(plan, torch.device("cpu"))
            parts = build(config, plan, mesh)
            engine = parts.engine
            assert isinstance(engine, NativeEngine)
            engine.load(from_seed(SEED, mesh))
            tokens = torch.randint(
                0,
                97,
                (BATCH, config.data.seq_length + 1),
                generator=torch.Generator().manual_seed(0),
            )
            micro = [
                MicroBatch(tokens[row, None, :-1], tokens[row, None, 1:], torch.tensor([row]))
                for row in range(mesh.data.rank, BATCH, mesh.data.size)
            ]
            owners = {w.name: 0 for w in weights}
            losses = []
            for _ in range(STEPS):
                losses.append(forward_backward(parts, micro, mesh, SEED)["loss"].item())
                engine.step(1e-2)
            if config.optimizer.ema:
                with engine.averaged():
                    losses.append(forward_backward(parts, micro, mesh, SEED)["loss"].item())
                engine.gradients.forget()
            losses.append(forward_backward(parts, micro, mesh, SEED)["loss"].item())
            kinds = ("weight", "grad", *engine.states)
            held = {
                name: parameter.dequantise()
                for stage in parts.stages
                for name, parameter in stage.model.named_parameters()
                if isinstance(parameter, CodedWeight)
            }
            assert held.keys() == {w.name for w in weights if w.coded and plan.gathers(w)}
            results[name, param_gather] = {
                "losses": losses,
                "held": held,
                "bits": [tensor.clone() for _, tensor in engine.copies()],
                **{kind: engine.gather(kind, owners) for kind in kinds},
            }
    return results


@pytest.fixture(scope="module")
def ranks() -> list[Results]:
    return run_ranks(2, train)


@pytest.mark.parametrize("name", CASES)
def test_codes_train_the_same_model_to_the_bit(name: str, ranks: list[Results]) -> None:
    first, second = ranks
    plain, coded = first[name, False], first[name, True]
    assert plain["losses"] == coded["losses"]
    assert len({*plain["losses"]}) == len(plain["losses"])
    for kind in plain.keys() - {"losses", "held", "bits"}:
        assert plain[kind].keys() == coded[kind].keys()
        for key, wanted in plain[kind].items():
            assert torch.equal(coded[kind][key], wanted), (kind, key)
    assert not plain["held"]
    assert coded["held"]
    for key, codes in coded["held"].items():
        assert torch.equal(codes, second[name, True]["held"][key])
        # What codes stand for is near the weight, and is not it.
        weight = coded["weight"][key].view_as(codes)
        assert not torch.equal(codes, weight)
        assert (codes - weight).abs().max() <= weight.abs().max() / 16


def test_products_take_codes_as_they_would_round_the_weight() -> None:
    """Along both dimensions, and where a chip takes codes: transposed. Zeros, subnormal numbers and
    blocks that are not finite among them."""
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[:128, :128] *= 2.0**-130
    weight[5, 200] = torch.inf
    weight[200] = 0.0
    block = (FP8_BLOCK, FP8_BLOCK)
    coded = CodedWeight(quantise(weight, block), weight.shape, weight.dtype)
    recipe = RECIPES["blockwise"]
    for over in ("input", "output"):
        for found, wanted in (
            (recipe._round(coded, "weight", over), recipe._round(weight, "weight", over)),
            *zip(
                recipe._codes(coded, "weight", over)[:2],
                recipe._codes(weight, "weight", over)[:2],
                strict=True,
            ),
        ):
            assert found.is_contiguous()
            assert torch.equal(found.float().nan_to_num(1e9), wanted.float().nan_to_num(1e9))


@pytest.mark.parametrize(
    ("fp8", "zero_stage", "said"),
    [
        ({"recipe": "mxfp8"}, 1, "recipe: blockwise, not mxfp8: it rounds a weight along either"),
        ({"recipe": "current"}, 1, "recipe: blockwise, not current: it has one scale for a whole"),
        ({}, 0, "needs parallel.zero_stage: 1 or 2, not 0"),
    ],
)
def test_what_cannot_be_gathered_as_codes_is_refused(
    fp8: dict[str, Any], zero_stage: int, said: str
) -> None:
    config = config_of((MODEL, {"zero_stage": zero_stage}, {}, "bf16"), True, **fp8)
    with pytest.raises(ConfigError) as refused:
        make_plan(config, weight_table(config.model), 2)
    assert "train.fp8.param_gather needs " in str(refused.value)
    assert said in str(refused.value)
