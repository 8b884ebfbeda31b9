"""Models to quantise, and what is in the folders that come out."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megalite.checkpoint.convert import open_source

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}


def weights_of(folder: Path) -> dict[str, Tensor]:
    model = open_source(folder)
    return {
        name: x for weight in model.weights for name, x in weight.to_hf(model.read(weight)).items()
    }
