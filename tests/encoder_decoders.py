"""Tiny encoder-decoders, their tokenizer and their data for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from megalite.config import Config
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.tokenizer import write_tokenizer_config
from megalite.data.tokenizer_training import T5_SETTINGS, T5_SPECIAL
from small_runs import VOCAB, make_config

SENTINELS = [VOCAB - 1 - number for number in range(8)]
"""Ids of <extra_id_0>, <extra_id_1>, …, which go down as T5's do."""
MODEL: dict[str, Any] = {
    "family": "t5", "vocab_size": VOCAB, "hidden_size": 32, "head_dim": 6, "intermediate_size": 48, "num_layers": 5,
    "encoder_layers": 2, "num_attention_heads": 4, "max_positions": 64, "relative_buckets": 16,
    "relative_distance": 24, "dropout": 0.1, "tie_embeddings": True, "scale_head": True,
}  # fmt: skip


def write_words(folder: Path) -> Path:
    """A tokenizer whose word "w7" has the id 7."""
    names = {number: f"w{number}" for number in range(VOCAB)} | dict(enumerate(T5_SPECIAL.values()))
    names |= {token: f"<extra_id_{number}>" for number, token in enumerate(SENTINELS)}
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({name: token for token, name in names.items()}, unk_token="w2")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [*T5_SPECIAL.values(), *(names[token] for token in SENTINELS)]
    tokenizer.add_special_tokens(special)
    end = T5_SPECIAL["eos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    extra = T5_SETTINGS | {"additional_special_tokens": special[2:]}
    write_tokenizer_config(folder, end, more=extra)
    return folder


def span_config(folder: Path, *overrides: str, model: dict[str, Any] = MODEL) -> Config:
    """Sixteen steps of an encoder-decoder that tells hidden spans of small_runs' corpus."""
    tokenizer = write_words(folder / "tokenizer")
    own = f"data.tokenizer={tokenizer}", "objective.name=span_corruption", "data.seq_length=32"
    return make_config(folder, model, *own, *overrides)


def write_rows(prefix: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Path:
    """Rows of a source and a target, each of which the end token (1) is put behind."""
    with IndexedWriter(prefix, np.uint16, np.uint8) as writer:
        for source, target in rows:
            ids, values = (
                [*source, 1, *target, 1],
                [0] * (len(source) + 1) + [1] * (len(target) + 1),
            )
            writer.add_documents(np.array(ids, np.uint16), [len(ids)], np.array(values, np.uint8))
    prefix.with_name(f"{prefix.name}.json").write_text('{"format": "seq2seq"}')
    return prefix


def reversing_rows(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Sources of two to seven words, and the same from the last to the first."""
    draw = np.random.default_rng(seed)
    sources = [draw.integers(2, 12, draw.integers(2, 8)).tolist() for _ in range(count)]
    return [(source, source[::-1]) for source in sources]


def rows_config(folder: Path, *overrides: str, model: dict[str, Any] = MODEL) -> Config:
    """Sixteen steps of an encoder-decoder on rows."""
    tokenizer, rows = write_words(folder / "tokenizer"), folder / "rows"
    if not rows.with_name("rows.idx").exists():
        write_rows(rows, reversing_rows(200))
        write_rows(folder / "held-out", reversing_rows(60, seed=1))
    return make_config(
        folder, model, f"data.tokenizer={tokenizer}", "objective.name=seq2seq", "objective.target_length=16",
        "data.document_mask=true", f"data.train=[{{path: {rows}}}]", f"data.valid=[{{path: {folder / 'held-out'}}}]",
        *overrides,
    )  # fmt: skip
