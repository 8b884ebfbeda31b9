"""What is measured of layers and of the gradients' noise, on every layout, against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.data.mixture import build_mixtures
from megalite.errors import ConfigError
from megalite.models import family, weight_table
from megalite.models.core_attention import CoreAttention
from megalite.observe.noise import estimate
from megalite.plan import make_plan
from megalite.train import train
from ranks import run_ranks
from small_runs import MODELS, make_config, metrics_of, train_on_rank

LAYOUTS = {
    "data": ["parallel.zero_stage=1"],
    "data, ZeRO-2": ["parallel.zero_stage=2"],
    "tensor": ["parallel.tensor=2", "train.micro_batch_size=2"],
    "tensor, whole sequences": ["parallel={tensor: 2, sequence: false}"],
    "pipeline": ["parallel.pipeline=2", "model.tie_embeddings=true"],
    "context": ["parallel.context=2", "train.recompute=full"],
}


def plain_model(config: Config) -> torch.nn.Module:
    model = family(config.model.family).MODEL(config.model)
    parameters, read = dict(model.named_parameters()), from_seed(config.train.seed, Mesh.alone())
    for weight in weight_table(config.model):
        parameters[weight.name].data.copy_(
            read(weight, "weight", 0, weight.numel).view(weight.shape)
        )
    return model


def batch_of(config: Config, step: int) -> tuple[Tensor, Tensor]:
    mixture = build_mixtures(config)["train"]
    assert mixture is not None
    samples = mixture.read(np.arange(4 * step - 4, 4 * step))
    return torch.from_numpy(samples.tokens), torch.from_numpy(samples.labels)


def plain_measures(config: Config) -> dict[str, float]:
    """Of the first step."""
    model: Any = plain_model(config)
    found: dict[str, float] = {}

    def note_logits(name: str) -> Any:
        def note(core: CoreAttention, arguments: Any) -> None:
            qkv, heads, groups, _ = arguments
            q, k = (
                qkv[:, :, :heads],
                qkv[:, :, heads : heads + groups].repeat_interleave(heads // groups, 2),
            )
            logits = torch.einsum("bthk,bshk->bhts", q, k) / qkv.shape[-1] ** 0.5
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
            found[f"attention_logit/{name}"] = logits[..., seen].max().item()

        return note

    def note_output(name: str) -> Any:
        def note(layer: torch.nn.Module, arguments: Any, out: Tensor) -> None:
            found[f"activation_rms/{name}"] = out.square().mean().sqrt().item()

        return note

    for name, layer in model.layers.items():
        layer.register_forward_hook(note_output(name))
        layer.attention.core.register_forward_pre_hook(note_logits(name))
    tokens, labels = batch_of(config, 1)
    F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        place = (
            name.split(".")[1]
            if name.startswith("layers.")
            else "embeddings"
            if "embedding" in name
            else "head"
        )
        squares[place] = squares.get(place, 0.0) + parameter.grad.square().sum().item()
    return found | {f"grad_norm/{place}": square**0.5 for place, square in squares.items()}


def test_layers_measure_the_same_on_every_layout(tmp_path: Path) -> None:
    settings = (
        "train.steps=3",
        "observe.layers_every=2",
        "checkpoint.every=0",
        "observe.eval_every=0",
    )
    configs = {
        name: make_config(tmp_path, "llama", *settings, f"run.name=layout-{number}", *layout)
        for number, (name, layout) in enumerate(LAYOUTS.items())
    }
    run_ranks(2, train_on_rank, list(configs.values()))
    for tied in ("true", "false"):
        alone = make_config(
            tmp_path, "llama", *settings, f"run.name=alone-{tied}", "observe.layers_every=1",
            f"model.tie_embeddings={tied}",
        )  # fmt: skip
        train(alone)
        wanted = [line for line in metrics_of(alone) if "loss" in line]
        plain = plain_measures(alone)
        # Sums of fp32.
        assert {name: wanted[0][name] for name in plain} == pytest.approx(plain, rel=1e-5)
        whole = sum(wanted[0][name] ** 2 for name in plain if name.startswith("grad_norm/")) ** 0.5
        assert whole == pytest.approx(wanted[0]["grad_norm"], rel=1e-6)
        for name, config in configs.items():
            if config.model.tie_embeddings != alone.model.tie_embeddings:
                continue
            lines = [line for line in metrics_of(config) if "loss" in line]
            assert plain.keys().isdisjoint(lines[0]), "not asked for"
            for line in (1, 2):  # every second step, and the last
                found = {key: lines[line][key] for key in plain}
                assert found == pytest.approx(
                    {key: wanted[line][key] for key in plain}, rel=1e-4
                ), name


def test_loads_of_experts_are_the_same_on_every_layout(tmp_path: Path) -> None:
    model = MODELS["llama"] | {"family": "mixtral", "num_experts": 4, "experts_per_token": 2}
    settings = (
        "train.steps=3",
        "observe.layers_every=2",
        "checkpoint.every=0",
        "observe.eval_every=0",
    )
    layouts = {
        "expert": ["parallel.expert=2", "train.recompute=full"], "tensor": ["parallel={tensor: 2, sequence: false}"],
        "whole": ["parallel={tensor: 2, expert: 2, expert_tensor: 1}"], "pipeline": ["parallel.pipeline=2"],
    }  # fmt: skip
    configs = {
        name: make_config(tmp_path, model, *settings, f"run.name={name}", *each)
        for name, each in layouts.items()
    }
    alone = make_config(tmp_path, model, *settings, "run.name=alone", "observe.layers_every=1")
    train(alone)
    run_ranks(2, train_on_rank, list(configs.values()))
    visits: list[Tensor] = []
    plain: Any = plain_model(alone)
    for layer in plain.layers.values():
        layer.mlp.router.register_forward_hook(lambda router, arguments, out: visits.append(out[2]))
    plain(batch_of(alone, 1)[0])
    wanted = [line for line in metrics_of(alone) if "loss" in line]
    for number, index in enumerate(visits):
        share = (
            torch.stack([(index == expert).sum() for expert in range(4)]).double() / index.numel()
        )
        assert wanted[0][f"expert_load/{number}"] == pytest.approx(4 * share.max().item(), rel=1e-6)
        entropy = torch.distributions.Categorical(share).entropy().item() / np.log(4)
        assert wanted[0][f"expert_entropy/{number}"] == pytest.approx(entropy, rel=1e-6)
        assert wanted[0][f"dead_experts/{number}"] == (share == 0).sum().item()
    keys = [key for key in wanted[0] if "expert" in key]
    assert len(keys) == 3 * len(visits)
    for name, config in configs.items():
        lines = [line for line in metrics_of(config) if "loss" in line]
        assert {key: lines[1][key] for key in keys} == pytest.approx(
            {key: wanted[1][key] for key in keys}
        ), name
        assert (config.run.folder / "experts.png").stat().st_size > 10_000


def plain_noise(config: Config, num_small: int) -> float:
    """That of the first step, by gradients of small batches."""
    model = plain_model(config)
    tokens, labels = batch_of(config, 1)
    flats = []
    for rows in torch.arange(4).view(-1, num_small).T:
        model.zero_grad()
        F.cross_entropy(model(tokens[rows]).flatten(0, 1), labels[rows].flatten()).backward()
        flats.append(
            torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()
        )
    small, size = torch.stack(flats).square().sum(1).mean(), 4 / num_small
    big = torch.stack(flats).mean(0).square().sum()
    return ((small - big) / (1 / size - 1 / 4) / ((4 * big - size * small) / (4 - size))).item()


def test_the_noise_scale_is_that_of_small_batches(tmp_path: Path) -> None:
    settings = (
        "train.steps=6",
        "observe.noise_scale_every=1",
        "observe.eval_every=0",
        "checkpoint.every=2",
    )
    layouts = {
        "zero-1": (2, ["parallel.zero_stage=1"]),
        "zero-2": (4, ["parallel.zero_stage=2"]),
        "tensor": (4, ["parallel={tensor: 2, zero_stage: 2}"]),
        "pipeline": (4, ["parallel={pipeline: 2, zero_stage: 2}"]),
    }
    configs = {
        name: make_config(tmp_path, "llama", *settings, f"run.name={name}", *layout)
        for name, (_, layout) in layouts.items()
    }
    broken = [
        make_config(tmp_path, "llama", *settings, "run.name=broken", "parallel.zero_stage=1", *more)
        for more in (["train.stop_at=2"], [])
    ]
    run_ranks(2, train_on_rank, [*configs.values(), *broken])
    for name, config in configs.items():
        found = next(line["noise_scale"] for line in metrics_of(config) if "loss" in line)
        # A difference of norms.
        assert found == pytest.approx(plain_noise(config, layouts[name][0]), rel=1e-4), name
    unbroken, resumed = (
        [line["noise_scale"] for line in metrics_of(each) if "loss" in line]
        for each in (configs["zero-1"], broken[1])
    )
    assert len(unbroken) == 6
    assert resumed == unbroken, "a resumed run goes on with its averages"


def test_the_estimate_has_no_bias() -> None:
    """Of gradients with a known mean and a known noise, in batches of 2 and of 16."""
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.full((50,), 0.3, dtype=torch.float64), 2.0
    drawn = mean + noise * torch.randn(4000, 16, 50, generator=generator, dtype=torch.float64)
    small = drawn.unflatten(1, (8, 2)).mean(2).square().sum(-1).mean()
    big = drawn.mean(1).square().sum(-1).mean()
    found = estimate(small, big, 2, 16)
    assert found[0].item() == pytest.approx(noise**2 * 50, rel=0.02)  # 64,000 draws
    assert found[1].item() == pytest.approx(mean.square().sum().item(), rel=0.02)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for ranks, settings, why in (
        (
            1,
            ["observe.noise_scale_every=1"],
            "needs several data ranks, or several micro-batches with",
        ),
        (
            2,
            ["observe.noise_scale_every=1", "parallel.context=2"],
            r"needs parallel\.context: 1, not 2",
        ),
        (
            1,
            ["observe.layers_every=1", "parallel.engine=deepspeed"],
            r"observe\.layers_every needs parallel\.engine",
        ),
    ):
        config = make_config(tmp_path, "llama", *settings)
        with pytest.raises(ConfigError, match=why):
            make_plan(config, weight_table(config.model), ranks)
