"""What each row of a family's table says of a weight, against a statement of its own: layouts that
agree with one process share the table with it, so that parity cannot see a wrong row."""

from __future__ import annotations

import math

import pytest
import torch

from megalite.models import from_hf_config, model_config, weight_table
from megalite.models.weights import Weight
from megalite.registry import families
from tiny_models import CASES, SEQ2SEQ

STD = 0.05
ONES_BY_ZERO = ("gemma", "gemma2", "gemma3_text")
"""Families whose norms scale by 1 + weight."""


def table_of(case: str) -> tuple[Weight, ...]:
    from transformers import AutoConfig

    hf = AutoConfig.for_model(**CASES[case] | {"initializer_range": STD}).to_dict()
    return weight_table(model_config(from_hf_config(hf)))


def expected_std(weight: Weight, num_layers: int) -> float | None:
    """A normal distribution's standard deviation, or None for a constant. Products that end in the
    residual stream are scaled by 1/√(2 · layers) (Radford et al. 2019, section 2.3)."""
    if weight.name.endswith(".bias") or (
        len(weight.shape) == 1 and not weight.name.endswith("sinks")
    ):
        return None
    ends_in_the_stream = weight.name.endswith(
        ("attention.out.weight", "mlp.down.weight", "experts.down.weight", "shared.down.weight")
    )
    return STD / math.sqrt(2 * num_layers) if ends_in_the_stream else STD


def test_every_family_has_a_case() -> None:
    assert {values["model_type"] for values in CASES.values()} == set(families.own)


# test_t5.py.
@pytest.mark.parametrize(
    "case", [case for case in CASES if CASES[case]["model_type"] not in SEQ2SEQ]
)
def test_initial_values(case: str) -> None:
    family = CASES[case]["model_type"]
    for weight in table_of(case):
        values = weight.initial_rows(0, 0, weight.num_rows, None).double()
        std = expected_std(weight, 2)
        if std is None:
            is_scale = weight.name.endswith("norm.weight") and family not in ONES_BY_ZERO
            assert torch.equal(values, torch.full_like(values, float(is_scale))), weight.name
        else:
            # The deviation of n samples is off by std/√(2n); five times that is met by chance once
            # in a million.
            assert abs(values.std().item() - std) < 5 * std / math.sqrt(2 * weight.numel), (
                weight.name
            )
            assert abs(values.mean().item()) < 5 * std / math.sqrt(weight.numel), weight.name


@pytest.mark.parametrize("case", CASES)
def test_matrices_decay_and_nothing_else(case: str) -> None:
    """As in Megatron-LM and nanoGPT: no decay of biases and of norms."""
    for weight in table_of(case):
        assert weight.decay == (len(weight.shape) >= 2 and not weight.name.endswith(".bias")), (
            weight.name
        )
