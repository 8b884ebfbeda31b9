from __future__ import annotations

import pytest

from megalite.config import Config
from megalite.data.tokenizer_training import train_tokenizer
from ranks import run_ranks
from small_runs import make_config, train_on_rank


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 12 steps over tensor 2, with checkpoints at 4, 8 and 12 and a tokenizer in them:
    every kind of file."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("def f(x): return x + 1\n" * 50)
    train_tokenizer([str(folder / "text.txt")], str(folder / "tokenizer"), 300)
    config = make_config(
        folder, "llama", "train.steps=12", "checkpoint.every=4", "parallel.tensor=2", "train.precision=bf16",
        f"data.tokenizer={folder / 'tokenizer'}", "model.vocab_size=320",
    )  # fmt: skip
    run_ranks(2, train_on_rank, [config])
    return config
