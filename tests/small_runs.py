"""Small real training runs for tests: a corpus, a config, and the metrics afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.indexed_writer import IndexedWriter
from megalite.train import train

VOCAB = 97

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "family": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
        "num_attention_heads": 4, "num_kv_heads": 2, "max_positions": 64, "init_std": 0.1,
    },
    "gpt2": {
        "family": "gpt2", "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
        "max_positions": 64, "embedding_dropout": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1,
    },
    # Latent attention, a dense layer and one with experts, and a predictor of the token after the next.
    "experts": {
        "family": "deepseek_v3", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
        "num_attention_heads": 4, "max_positions": 64, "init_std": 0.1, "moe_intermediate_size": 16, "num_experts": 4,
        "experts_per_token": 2, "first_k_dense_replace": 1, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "num_nextn_predict_layers": 1,
    },
}  # fmt: skip


def write_corpus(prefix: Path, num_tokens: int = 16 * 33 + 1, seed: int = 0) -> Path:
    """Tokens that each follow from the one before with some noise, so that there is something to
    learn."""
    rng = np.random.default_rng(seed)
    tokens = np.empty(num_tokens, np.int64)
    tokens[0] = 1
    for i in range(1, num_tokens):
        tokens[i] = rng.integers(VOCAB) if rng.random() < 0.3 else (tokens[i - 1] * 5 + 3) % VOCAB
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in np.array_split(tokens, 7):
            writer.add_document(document)
    return prefix


def make_config(folder: Path, model: str | dict[str, Any] = "llama", *overrides: str) -> Config:
    """16 steps of 4 sequences out of 33: an epoch ends within the 9th step."""
    if not (folder / "corpus.idx").exists():
        write_corpus(folder / "corpus")
    values = {
        "run": {"name": "test", "dir": str(folder / "runs")},
        "model": MODELS[model] if isinstance(model, str) else model,
        "data": {
            "train": [{"path": str(folder / "corpus")}], "valid": [{"path": str(folder / "corpus")}], "seq_length": 16,
        },
        "train": {"steps": 16, "global_batch_size": 4, "precision": "fp32", "seed": 3},
        "parallel": {"bucket_mb": 0.01},
        "optimizer": {"lr": 1e-2, "schedule": {"name": "cosine", "warmup_steps": 2, "min_lr": 1e-3}},
        "checkpoint": {"every": 8},
        "observe": {"eval_every": 8, "eval_batches": 3, "log_every": 4},
    }  # fmt: skip
    return parse_config(values, overrides)


def train_on_rank(rank: int, world_size: int, configs: list[Config]) -> None:
    for config in configs:
        train(config)


def metrics_of(config: Config) -> list[dict[str, Any]]:
    lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve_of(config: Config) -> list[tuple[float, ...]]:
    """(step, loss, lr, gradient norm, tokens) of every step; times left out."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens")
    return [tuple(line[key] for key in keys) for line in metrics_of(config) if "loss" in line]
