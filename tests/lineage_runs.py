"""Small runs on texts, whose sources are known: for tests of traces and of forgetting."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import encoder_decoders
import encoders
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.blocks import Shard
from megalite.data.preprocess import preprocess
from small_runs import MODELS

FIM = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]


def write_bytes_tokenizer(folder: Path) -> Path:
    """A token a byte, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", *FIM, *letters]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({name: number for number, name in enumerate(names)}, [])
    )
    tokenizer.add_special_tokens(["<|endoftext|>", *FIM])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


def write_texts(folder: Path) -> list[Path]:
    """Two corpora: plain lines, among them empty and bad ones, and packed ones with a record of
    cleaning."""
    draw, plain, packed = np.random.default_rng(0), [], []
    for number in range(60):
        words = [f"w{n}" for n in draw.integers(5, 80, draw.integers(2, 30))]
        plain.append(json.dumps({"text": " ".join(words) + f" é{number}", "n": number}))
        if number % 7 == 0:
            plain += ["", "not json", '{"text": ""}']
        record = {
            "text": f"{number} of the other " + " ".join(reversed(words)),
            "id": f"x:{number}",
        }
        packed.append(json.dumps(record | {"source": "web", "mended_bytes": 3}))
    (folder / "plain.jsonl").write_text("\n".join(plain) + "\n", "utf-8")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join(packed).encode()))
    return [folder / "plain.jsonl", folder / "packed.jsonl.gz"]


def token_files(folder: Path, tokenizer: Path) -> list[dict[str, Any]]:
    """Token files of both corpora."""
    sources = []
    for path in write_texts(folder):
        name = path.name.partition(".")[0]
        for index in (2, 0, 1):  # as jobs that share the work
            shard = Shard(index, 3)
            preprocess([str(path)], folder / name, tokenizer, append_eod=True, shard=shard)
        sources.append({"path": str(folder / f"{name}_text_document"), "name": name})
    return sources


def config_of(folder: Path, *overrides: str, **data: Any) -> Config:
    """Twenty steps of bytes."""
    tokenizer = write_bytes_tokenizer(folder / "tokenizer")
    values = {
        "run": {"name": "traced", "dir": str(folder / "runs")},
        "model": MODELS["llama"] | {"vocab_size": 320},
        "data": {
            "train": token_files(folder, tokenizer), "seq_length": 32, "tokenizer": str(tokenizer), **data
        },
        "train": {"steps": 20, "global_batch_size": 8, "precision": "fp32", "seed": 5},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 10},
    }  # fmt: skip
    return parse_config(values, overrides)


PHASES = [
    {"after_step": 6, "weights": {"packed": 3, "plain": 1}},
    {"after_step": 12, "weights": {"plain": 1.0}},
]
MIXED = {"packing": "best_fit", "document_mask": True, "border_loss": False, "phases": PHASES}


def encoder_config(folder: Path, kind: str) -> Config:
    """Masked or hidden words."""
    if kind == "masked":
        config = encoders.masked_config(folder)
    else:
        of_all = ["objective.mixture=ul2"] if kind == "denoisers" else []
        config = encoder_decoders.span_config(folder, *of_all)
    assert config.data.tokenizer is not None
    sources = token_files(folder, config.data.tokenizer)
    return parse_config(
        config.model_dump(mode="json"), [f"data.train={json.dumps(sources)}", "data.valid=[]"]
    )
