"""Report what the quickstart's run has learned: its validation loss beside that of a unigram model,
and both in loss.png."""

from __future__ import annotations

import sys
from pathlib import Path

from megalite.config_file import load_config
from megalite.data.indexed import IndexedDataset
from megalite.data.stacks import num_hidden
from megalite.data.statistics import unigram_accuracy, unigram_loss
from megalite.data.tokenizer import load_tokenizer
from megalite.observe.jsonl import read_metrics
from megalite.observe.plot import plot_loss
from megalite.training.seq2seq import SpanCorruptionConfig


def report(run: Path, base: Path) -> int:
    """Print both losses and draw loss.png; return 1 where the model has learned too little.

    `run` is the run's folder, `base` the folder that the paths in its config are relative to. There
    is no picture without matplotlib."""
    config = load_config(run / "config.yaml")
    train, valid = (
        IndexedDataset(base / sources[0].path) for sources in (config.data.train, config.data.valid)
    )
    unigram = unigram_loss(train, valid, config.model.vocab_size)
    metrics = run / "metrics.jsonl"
    losses = [
        loss for record in read_metrics(metrics) if (loss := record.get("valid_loss")) is not None
    ]
    picture = run / "loss.png"
    try:
        plot_loss(metrics, picture, {"unigram model": unigram})
        drawn = f"picture: {picture}"
    except ImportError:
        drawn = "no picture: pip install 'megalite[observe]' brings what draws it"
    print(
        f"validation loss {losses[-1]:.3f}, of a unigram model of the same tokens {unigram:.3f} (nats per token)"
    )
    print(drawn)
    if config.model.task == "masked" and config.data.tokenizer:
        special = load_tokenizer(base / config.data.tokenizer).special_ids
        told = [
            record["valid_accuracy"]
            for record in read_metrics(metrics)
            if "valid_accuracy" in record
        ][-1]
        often = unigram_accuracy(train, valid, config.model.vocab_size, special)
        print(
            f"masked tokens predicted correctly {told:.1%}; the most frequent token is right in {often:.1%}"
        )
        if not told > 2 * often:
            print("error: the model has learned too little", file=sys.stderr)
            return 1
        return 0
    if isinstance(config.objective, SpanCorruptionConfig):
        # Of what the decoder tells, all but the sentinels and the end are tokens of the text.
        _, spans = num_hidden(
            config.lengths.read, config.objective.density, config.objective.mean_length
        )
        of_text = unigram * (1 - (spans + 1) / config.lengths.target)
        print(f"of a unigram model that is told where spans begin and end {of_text:.3f}")
        unigram = of_text + 0.5
    if not losses[-1] < unigram - 1.0:  # a model that has learned some Python is far below
        print("error: the model has learned too little", file=sys.stderr)
        return 1
    return 0
