"""Models to quantise, and what is in the folders that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.convert import open_source
from tiny_models import randomize

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}


def save(folder: Path, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**values)
    )
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    model = open_source(folder)
    return {
        name: x for weight in model.weights for name, x in weight.to_hf(model.read(weight)).items()
    }
