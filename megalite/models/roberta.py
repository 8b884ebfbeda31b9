"""RoBERTa (Liu et al. 2019): BERT's modules, with positions that begin behind those of padding, one
type of tokens, and other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from megalite.models.bert import KEYS as BERT_KEYS
from megalite.models.bert import Bert, BertConfig, HeadNames, fields_from_hf, fields_to_hf
from megalite.models.bert import weights as weights

PADDING = 1
"""Id of the padding token, behind which positions are counted."""


class RobertaConfig(BertConfig):
    family: Literal["roberta"] = "roberta"  # type: ignore[assignment]
    token_types: int = Field(
        1,
        gt=0,
        description="Rows of the embedding of a token's type: 1 in the second of two texts, else 0.",
    )
    norm_eps: float = Field(1e-5, gt=0)

    PREFIX: ClassVar[str] = "roberta"
    HEAD: ClassVar[HeadNames] = HeadNames(
        transform="lm_head.dense",
        norm="lm_head.layer_norm",
        bias="lm_head.bias",
        decoder="lm_head.decoder",
        pooler="classifier.dense",
    )
    SPARE: ClassVar[tuple[str, ...]] = (
        *(f"roberta.pooler.dense.{part}" for part in ("weight", "bias")),
        "lm_head.decoder.bias",
    )
    HEAD_ACTS_ALIKE: ClassVar[bool] = False
    OLD_ENDS: ClassVar[Mapping[str, str]] = {}
    OFFSET: ClassVar[int] = PADDING + 1


KEYS = BERT_KEYS.but(only={"pad_token_id": PADDING})


def to_hf(config: RobertaConfig) -> dict[str, Any]:
    return fields_to_hf(config, "RobertaForMaskedLM") | {"pad_token_id": PADDING}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return fields_from_hf(hf | {"pad_token_id": PADDING}, RobertaConfig)


MODEL, CONFIG = Bert, RobertaConfig
