"""NVFP4 against an independent statement over all codes, the rotation, and chance that no layout
changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.kernels.linear import linear
from megalite.kernels.nvfp4 import Nvfp4, hadamard, quantise_nvfp4, rotate, to_e2m1
from megalite.kernels.recipes import RECIPES
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.train import train
from ranks import run_ranks
from small_runs import VOCAB, make_config, metrics_of, train_on_rank, write_corpus

E2M1 = [
    (1 + m / 2) * 2.0 ** (e - 1) if e else m / 2 for e, m in itertools.product(range(4), (0, 1))
]
"""Of the 8 codes without a sign: 2 bits of exponent with a bias of 1, 1 of mantissa."""
E4M3 = [
    (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6
    for e, m in itertools.product(range(16), range(8))
][:-1]
"""Of the 127 codes without a sign that are numbers."""


def nearest(value: float, table: list[float]) -> float:
    """Return the number of a table that is nearest; of two, the one with the even code; the largest of
    all beyond it."""
    size = min(abs(value), table[-1])
    code = min(range(len(table)), key=lambda c: (abs(table[c] - size), c % 2))
    return float(np.copysign(table[code], value))


def stated(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Return what NVFP4 makes of a matrix, number by number, in fp32."""
    one, out = np.float32(1), np.empty_like(x)
    whole = np.abs(x).max()
    inverse = np.float32(6 * 448) / whole
    for top, left in itertools.product(
        *(range(0, n, b) for n, b in zip(x.shape, block, strict=True))
    ):
        here = slice(top, top + block[0]), slice(left, left + block[1])
        wanted = np.abs(x[here]).max() / np.float32(6) * inverse
        scale = np.float32(nearest(float(wanted), E4M3)) * (one / inverse)
        for place in np.ndindex(x[here].shape):
            code = nearest(float(x[here][place] * (one / scale)), E2M1) if scale else 0.0
            out[here][place] = np.float32(code) * scale
    return out


def test_the_table_is_that_of_the_format() -> None:
    assert E2M1 == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E4M3[-1] == 448


def test_every_number_is_rounded_to_the_nearest_code() -> None:
    """At all codes, all middles between two, and their neighbours in fp32, of both signs."""
    edges = [*E2M1, *((a + b) / 2 for a, b in itertools.pairwise(E2M1)), 6.9, 7.0, 100.0]
    near = [np.nextafter(np.float32(x), np.float32(y)) for x in edges for y in (-9, 9)]
    values = torch.tensor([s * float(x) for x in (*edges, *near) for s in (1, -1)])
    wanted = torch.tensor([nearest(float(x), E2M1) for x in values])
    assert torch.equal(to_e2m1(values), wanted)
    assert to_e2m1(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("block", [(1, 16), (16, 16), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_the_definition(
    block: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 48, generator=generator)
    # Of many magnitudes: scales from the largest of e4m3 to its subnormals, and to nothing.
    x *= 2.0 ** torch.randint(-14, 3, (32, 1), generator=generator)
    x[:, 16:32] *= 2.0 ** torch.randint(-9, 1, (32, 1), generator=generator)
    x[16:, 32:] = 0
    x = x.to(dtype)
    found = quantise_nvfp4(x, block).dequantise(torch.float32)
    assert np.array_equal(found.numpy(), stated(x.float().numpy(), block))
    assert torch.equal(
        quantise_nvfp4(torch.zeros(16, 16), (1, 16)).dequantise(dtype),
        torch.zeros(16, 16, dtype=dtype),
    )


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = torch.ones(16, 16)
    x[3, 4] = bad
    assert quantise_nvfp4(x, (1, 16)).dequantise(torch.float32).isnan().all()


def test_a_rotation_changes_no_product() -> None:
    matrix = hadamard()
    assert torch.equal(matrix.abs(), torch.full((16, 16), 0.25))
    assert torch.allclose(matrix @ matrix.t(), torch.eye(16))
    assert 0 < (matrix[0] < 0).sum() < 16, "signs are drawn"
    grad, x = (torch.randn(64, n, generator=torch.Generator().manual_seed(n)) for n in (8, 12))
    assert torch.allclose(rotate(grad).t() @ rotate(x), grad.t() @ x, atol=1e-4)
    rounded_grad, rounded_x = RECIPES["nvfp4"].wgrad_operands(grad.repeat(1, 2), x.repeat(1, 4))
    assert isinstance(rounded_grad, Tensor)
    assert isinstance(rounded_x, Tensor)
    off = rounded_grad.t() @ rounded_x - grad.repeat(1, 2).t() @ x.repeat(1, 4)
    # A code has two bits and a half: about a tenth of a number is lost.
    assert off.norm() < 0.3 * (grad.t() @ x).norm() * 8**0.5
    outlier = torch.zeros(16, 1)
    outlier[5] = 4.0
    assert torch.equal(rotate(outlier).abs(), torch.ones(16, 1))


def keyed(samples: list[int], features: Tensor) -> Nvfp4:
    recipe = RECIPES["nvfp4"]
    assert isinstance(recipe, Nvfp4)
    return recipe.of("layers.0.mlp.down", features).of_samples(torch.tensor(samples))


def test_chance_is_right_on_average_and_the_same_on_every_layout() -> None:
    x = torch.tensor([0.1, 0.7, 1.9, 2.3, 3.9, 4.5, -5.9, -0.3])
    draws = (torch.arange(1000) + 0.5) / 1000
    found = to_e2m1(x.expand(1000, 8), draws[:, None]).mean(0)
    assert torch.allclose(found, x, atol=2e-3), "expected values are the numbers"
    whole = keyed([7, 9], torch.arange(64))
    rows = torch.empty(2 * 8, 64)
    chance = whole._chance(rows, "output")
    assert chance is not None
    assert 0.45 < chance.mean() < 0.55
    # A rank with the second sample alone, and features that are not next to one another.
    features = torch.tensor([3, 40, 41])
    part = keyed([9], features)._chance(torch.empty(8, 3), "output")
    assert part is not None
    assert torch.equal(part, chance[8:, features])
    other = whole._chance(rows, "tokens")
    assert other is not None
    assert not torch.equal(other, chance), "each product draws anew"


def test_gradients_are_right_on_average() -> None:
    """Over many draws, the input's gradient is that of the rounded weight."""
    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (
        torch.randn(n, m, generator=generator) for n, m in ((16, 32), (48, 32), (16, 48))
    )
    total = torch.zeros(16, 32)
    for sample in range(200):
        x = x.detach().requires_grad_()
        linear(x, weight, recipe=keyed([sample], torch.arange(48))).backward(grad)
        assert x.grad is not None
        total += x.grad / 200
    wanted = grad @ quantise_nvfp4(weight, (16, 16)).dequantise(torch.float32)
    once = grad - quantise_nvfp4(grad, (1, 16)).dequantise(torch.float32)
    # 200 draws: a standard deviation of about a half step / √200.
    assert (total - wanted).norm() < 0.25 * (once @ weight).norm()


MODEL: dict[str, Any] = {
    "family": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_layers": 3,
    "num_attention_heads": 2, "max_positions": 64, "init_std": 0.1,
}  # fmt: skip


def config_of(folder: Path, name: str, *overrides: str) -> Config:
    write_corpus(folder / "corpus", 33 * 20)
    return make_config(
        folder, MODEL, "data.seq_length=32", "train.steps=1", "checkpoint.every=0", "train.fp8.recipe=nvfp4",
        "train.fp8.first_last_bf16=[1,0]", "observe.eval_every=0", "optimizer.schedule.warmup_steps=0",
        f"run.name={name}", *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("cut", ["column", "row"])
def test_what_a_rank_rounds_is_its_part_of_the_whole(cut: str) -> None:
    """To the bit, of each operand in each product, with a fused weight whose rows lie apart."""
    generator = torch.Generator().manual_seed(5)
    x, weight, grad = (
        torch.randn(n, m, generator=generator) for n, m in ((32, 64), (96, 64), (32, 96))
    )
    grad[3, 90], x[5, 50] = 40.0, 50.0  # the largest are on one rank alone
    weight[90, 60] = 9.0
    whole = keyed([7, 9], torch.arange(96))
    rows = (
        torch.cat([torch.arange(16, 32), torch.arange(64, 96)])
        if cut == "column"
        else torch.arange(96)
    )
    columns = torch.arange(64) if cut == "column" else torch.arange(32)
    parts = {
        "x": (x, x[:, columns]),
        "weight": (weight, weight[rows][:, columns]),
        "grad": (grad, grad[:, rows]),
    }
    kept = {
        "x": (slice(None), columns),
        "weight": (rows[:, None], columns),
        "grad": (slice(None), rows),
    }
    products: list[tuple[Any, Any]] = [
        ("x", "input"), ("weight", "input"), ("grad", "output"), ("weight", "output"), ("x", "tokens"),
        ("grad", "tokens"),
    ]  # fmt: skip
    for operand, over in products:
        given, part = parts[operand]
        rotated = rotate(given) if over == "tokens" else given
        largest = rotated.abs().max().reshape(1).view(torch.int32)
        rank = keyed([7, 9], rows).on(cut, lambda _, largest=largest: largest)
        wanted = whole._round(given, operand, over)[kept[operand]]
        assert torch.equal(rank._round(part.contiguous(), operand, over), wanted), (operand, over)


def test_every_layout_trains_the_same_model(tmp_path: Path) -> None:
    layouts = {
        "zero": ["parallel.zero_stage=1"],
        "pipeline": ["parallel.pipeline=2", "parallel.schedule=zero_bubble"],
        "tensor": ["parallel.tensor=2"],
    }
    configs = [config_of(tmp_path, name, *given) for name, given in layouts.items()]
    one, plain = config_of(tmp_path, "one"), config_of(tmp_path, "plain", "train.fp8=null")
    train(one)
    train(plain)
    run_ranks(2, train_on_rank, configs)

    def found(config: Config) -> list[float]:
        (line,) = (line for line in metrics_of(config) if "loss" in line)
        return [line["loss"], line["grad_norm"]]

    # Data and pipeline ranks add as one process does. Sums over tensor ranks end in other last bits
    # of fp32, by which one of 65,000 numbers becomes the next of 4 bits here.
    for each, most in zip(configs, (1e-6, 1e-6, 2e-2), strict=True):
        assert found(each) == pytest.approx(found(one), rel=most), each.run.name
    assert found(one) == pytest.approx(found(plain), rel=0.1)
    assert found(one) != found(plain)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["train.recompute=full"], "nvfp4 needs train.recompute: none, not full"),
        (["parallel.context=2"], "nvfp4 needs parallel.context: 1"),
        (["model.intermediate_size=72"], "multiples of 16, into which the 72 output features"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, given: list[str], words: str) -> None:
    config = config_of(tmp_path, "x", *given)
    with pytest.raises(ConfigError, match=words):
        make_plan(config, weight_table(config.model), config.parallel.context)
