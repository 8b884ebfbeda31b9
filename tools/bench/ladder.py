"""A ladder of five sizes and three lengths on this machine's source code, within an hour of two cores.

    python tools/bench/ladder.py FOLDER [rates=step_law and other settings of the ladder]

Takes the Python sources that machine_corpus.py finds, in an order of their contents, trains a
tokenizer of 512 tokens, and runs `megalite ladder`; what is there already is kept. The last line of
its table says how far the largest run is from what the other fourteen predict."""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from machine_corpus import texts_of_machine

MOST = 200_000
"""Bytes of a file that is taken: longer ones are tables, mostly."""
WIDTHS = (16, 24, 32, 40, 48)


def write_text(file: Path, most_bytes: int) -> None:
    """Write up to `most_bytes` of the machine's sources as JSON lines, each text once, in an order
    that no folder has."""
    texts = {
        hashlib.sha256(text.encode("utf-8", "replace")).digest(): text
        for _, text in texts_of_machine("code")
        if 0 < len(text) <= MOST
    }
    written = 0
    with file.open("w", encoding="utf-8") as out:
        for key in sorted(texts):
            if written > most_bytes:
                break
            written += out.write(json.dumps({"text": texts[key]}) + "\n")


def config_of(folder: Path) -> dict[str, Any]:
    return {
        "model": {
            "family": "llama",
            "vocab_size": 512,
            "num_layers": 4,
            "max_positions": 256,
            "tie_embeddings": False,
        },
        "data": {
            "train": [{"path": str(folder / "tokens_text_document")}],
            "split": [99, 1, 0],
            "seq_length": 256,
            "tokenizer": str(folder / "tokenizer"),
        },
        "train": {"precision": "fp32", "micro_batch_size": 4, "global_batch_size": 8},
        "optimizer": {
            "name": "adamw",
            "lr": 4e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "schedule": {"name": "cosine", "warmup_steps": 0.05},
        },
        "checkpoint": {"every": 2000, "keep": 1},
        "observe": {"log_every": 200, "eval_every": 0, "eval_batches": 100},
    }


def size_of(width: int) -> dict[str, int]:
    return {
        "model.hidden_size": width,
        "model.intermediate_size": 8 * width // 3 // 8 * 8,
        "model.num_attention_heads": width // 8,
    }


def megalite(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "megalite", *map(str, arguments)], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the text, tokens, runs and the report")
    parser.add_argument("--mb", type=int, default=60, help="megabytes of text")
    options, overrides = parser.parse_known_args(arguments)
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.jsonl"
    if not text.exists():
        write_text(text, options.mb * 1_000_000)
    if not (folder / "tokenizer").exists():
        megalite(
            "tokenizer", "train", "--input", text, "--output", folder / "tokenizer",
            "--vocab-size", "512", "--max-bytes", "20000000",
        )  # fmt: skip
    if not (folder / "tokens_text_document.idx").exists():
        megalite(
            "preprocess", "--input", text, "--output-prefix", folder / "tokens",
            "--tokenizer", folder / "tokenizer",
        )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(folder)), encoding="utf-8")
    ladder = {
        "name": "ladder",
        "dir": str(folder),
        "config": str(folder / "config.yaml"),
        "sizes": [size_of(width) for width in WIDTHS],
        "tokens_per_parameter": [20, 40, 80],
        "parallel": 2,
    }
    (folder / "ladder.yaml").write_text(yaml.safe_dump(ladder), encoding="utf-8")
    began = time.perf_counter()
    megalite("ladder", folder / "ladder.yaml", *overrides)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"took {(time.perf_counter() - began) / 60:.1f} minutes, "
        f"{(spent.ru_utime + spent.ru_stime) / 60:.1f} of CPU with what came before"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
