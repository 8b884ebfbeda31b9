"""Upcycling: a mixture of experts that begins as a dense model (Komatsuzaki et al. 2023). Each
expert is a copy of its layer's MLP, or with a granularity g one of the g slices that the MLP's
inner features are cut into (He et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.convert import Model
from megalite.errors import ConfigError
from megalite.models import family, from_hf_config, model_config, to_hf_config, weight_table
from megalite.models.weights import Weight

ROUTED = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Family with experts that a dense one is as a mixture of experts."""


@dataclass(frozen=True)
class Upcycling:
    """What becomes of each MLP. The model's logits are at first those of the dense model."""

    num_experts: int
    experts_per_token: int
    granularity: int = 1
    """Slices of each copy of the MLP. A token visits all slices of a copy or none, as their rows of
    the router are equal at first."""
    seed: int = 0
    """Seed of the router, which is new."""

    def apply(self, dense: Model) -> Model:
        """Return `dense` as a mixture of experts. Raises ConfigError for a model, or numbers, for
        which there is none."""
        fields = from_hf_config(dense.config)
        name = fields["family"]
        if name not in ROUTED:
            raise ConfigError(
                f"a {name} model has no kin with experts here; {', '.join(ROUTED)} have"
            )
        config = model_config(self._fields(fields, ROUTED[name]))
        tables = {weight.name: weight for weight in dense.weights}

        def read(weight: Weight, exact: bool) -> Tensor:
            source = dense.read_exact if exact and dense.read_exact else dense.read
            if weight.name.endswith("mlp.router.weight"):
                return self._router(weight, source(tables["embedding.weight"]).dtype)
            return self._as_experts(weight, source(tables[weight.name.replace(".experts.", ".")]))

        return replace(
            dense,
            config=to_hf_config(config),
            weights=weight_table(config),
            read=lambda weight: read(weight, False),
            read_exact=lambda weight: read(weight, True),
        )

    def _fields(self, dense: dict[str, Any], name: str) -> dict[str, Any]:
        """Return the fields of the config of the family called `name`."""
        slices, inner = self.granularity, dense["intermediate_size"]
        for what, number in (
            ("the number of experts", self.num_experts),
            ("experts per token", self.experts_per_token),
        ):
            if number % slices:
                raise ConfigError(
                    f"{what}, {number}, must be a multiple of the granularity, {slices}"
                )
        if inner % slices:
            raise ConfigError(
                f"the {inner} inner features of the MLP do not divide into {slices} slices"
            )
        types = set(dense.pop("layer_types", None) or ())
        if len(types) > 1:
            raise ConfigError(
                "only some of the model's layers have a sliding window, which its kin with experts lacks"
            )
        if types == {"full_attention"}:
            dense.pop("sliding_window", None)
        known = family(name).CONFIG.model_fields
        for field in [field for field in dense if field not in known]:
            # The families of dense models have options that those with experts lack, biases for
            # example.
            if dense.pop(field):
                raise ConfigError(
                    f"the dense model has {field}, which its kin with experts, {name}, lacks"
                )
        fields = dense | {
            "family": name, "num_experts": self.num_experts, "experts_per_token": self.experts_per_token,
            "intermediate_size": inner // slices,
        }  # fmt: skip
        if "moe_intermediate_size" in known:  # beside that of dense layers
            fields |= {
                "intermediate_size": inner, "moe_intermediate_size": inner // slices, "norm_topk_prob": True,
            }  # fmt: skip
        return fields

    def _router(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Return a new router's weight, equal for all slices of a copy."""
        rows = weight.initial_rows(self.seed, 0, self.num_experts // self.granularity, None).view(
            -1, weight.shape[1]
        )
        return rows.repeat_interleave(self.granularity, 0).to(dtype)

    def _as_experts(self, weight: Weight, dense: Tensor) -> Tensor:
        """Return the experts' weight, from that of an MLP; another weight as it is."""
        copies, slices = self.num_experts // self.granularity, self.granularity
        if weight.name.endswith("experts.gate_up.weight"):
            gate, up = (part.chunk(slices) for part in dense.chunk(2))
            # [slices, 2I/g, D]: gate and up of a slice stay together, as an expert's fused
            # projection has them.
            cut = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        elif weight.name.endswith("experts.down.weight"):
            # A token's weights add up to 1 over all slices of its copies: each slice has a share of
            # it only.
            cut = torch.stack(dense.chunk(slices, 1)) * slices
        else:
            return dense
        # [experts, …]: all slices of the first copy, then of the second, as the router's rows are.
        return cut.repeat(copies, 1, 1)
