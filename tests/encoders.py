"""Tiny encoders and their tokenizers for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, processors

from megalite.config import Config
from megalite.data.tokenizer import write_tokenizer_config
from megalite.data.tokenizer_training import BERT, BERT_SETTINGS
from small_runs import VOCAB, make_config

MODEL: dict[str, Any] = {
    "family": "bert", "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
    "max_positions": 64, "init_std": 0.1, "hidden_dropout": 0.1,
}  # fmt: skip


def write_words(folder: Path) -> Path:
    """A tokenizer whose word "w7" has the id 7; the first ids are BERT's special tokens."""
    words = {
        token: number
        for number, token in enumerate([*BERT.values(), *(f"w{n}" for n in range(5, VOCAB))])
    }
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token=BERT["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*BERT.values()])
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"])
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder, None, more=BERT_SETTINGS)
    return folder


def masked_config(folder: Path, *overrides: str, model: dict[str, Any] = MODEL) -> Config:
    """Sixteen steps of an encoder on small_runs' corpus."""
    tokenizer = write_words(folder / "tokenizer")
    return make_config(
        folder, model, f"data.tokenizer={tokenizer}", "objective.name=masked_lm", *overrides
    )
