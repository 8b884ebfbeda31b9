"""What makes a folder of safetensors a Hugging Face model: config.json, generation_config.json and the tokenizer."""

from __future__ import annotations

from pathlib import Path

from megalite.checkpoint.folder import write_json
from megalite.config import Config
from megalite.data.tokenizer import Tokenizer
from megalite.models import to_hf_config

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def write_extras(folder: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Also keeps the run's own config beside them, as config.yaml."""
    dtype = DTYPES[config.train.precision]
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eod_id if tokenizer else None}
    # transformers 5 reads `dtype`, transformers 4 and vLLM `torch_dtype`.
    write_json(folder / "config.json", to_hf_config(config.model) | ends | {"dtype": dtype, "torch_dtype": dtype})
    write_json(folder / "generation_config.json", ends | {"do_sample": True})
    (folder / "config.yaml").write_text(config.to_yaml())
    if tokenizer:
        tokenizer.save(folder)
